//! The metadata section: where an image says it comes from.
//!
//! It is covered by the CRC but not by any measurement: it is for people to read, never for decisions.

use super::error::{EifError, reason};
use super::layout::SectionInfo;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Longest of the texts that are shown, in bytes.
const MAX_TEXT: usize = 1024;

/// What an image says of itself. **Not measured**: a file with the right PCRs may say anything here.
///
/// The texts are at most 1 KiB each and have no control characters, so they can be shown as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageMetadata {
    /// The image's name, often that of the container image it was built from.
    pub name: Option<String>,
    /// The image's version.
    pub version: Option<String>,
    /// When it was built, as written by its builder.
    pub build_time: Option<String>,
    /// What it was built with.
    pub build_tool: Option<String>,
    /// The version of that.
    pub build_tool_version: Option<String>,
    /// The operating system inside.
    pub operating_system: Option<String>,
    /// The kernel's version.
    pub kernel_version: Option<String>,
    /// The whole section, a JSON object, as it stands in the file; at most [`Limits::metadata`](super::Limits) bytes.
    #[serde(serialize_with = "as_json")]
    pub json: String,
}

/// The keys that AWS's builder writes. The rest (`DockerInfo`, `CustomMetadata`) is kept as it is.
#[derive(Deserialize)]
struct Known {
    #[serde(rename = "ImageName")]
    name: Option<String>,
    #[serde(rename = "ImageVersion")]
    version: Option<String>,
    #[serde(rename = "BuildMetadata")]
    build: Option<Build>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct Build {
    build_time: Option<String>,
    build_tool: Option<String>,
    build_tool_version: Option<String>,
    operating_system: Option<String>,
    kernel_version: Option<String>,
}

impl ImageMetadata {
    pub(super) fn parse(json: Vec<u8>, section: &SectionInfo) -> Result<Self, EifError> {
        let refuse = |reason: String| EifError::Metadata { offset: section.offset, reason };
        let json = String::from_utf8(json).map_err(|error| refuse(reason(&error)))?;
        if !json.trim_start().starts_with('{') {
            return Err(refuse("it is not a JSON object".to_owned()));
        }
        // The whole of it, so that what is kept is known to be JSON, and not nested more deeply than readers bear; the
        // second reading also refuses a known key that stands there twice.
        serde_json::from_str::<Seen>(&json).map_err(|error| refuse(reason(&error)))?;
        let known: Known = serde_json::from_str(&json).map_err(|error| refuse(reason(&error)))?;
        let build = known.build.unwrap_or_default();
        let text = |key: &str, text: Option<String>| match text {
            Some(text) if text.len() > MAX_TEXT => {
                Err(refuse(format!("its {key} has {} bytes, {MAX_TEXT} at most are taken", text.len())))
            }
            Some(text) if text.chars().any(char::is_control) => {
                Err(refuse(format!("its {key} has control characters")))
            }
            text => Ok(text),
        };
        Ok(Self {
            name: text("ImageName", known.name)?,
            version: text("ImageVersion", known.version)?,
            build_time: text("BuildTime", build.build_time)?,
            build_tool: text("BuildTool", build.build_tool)?,
            build_tool_version: text("BuildToolVersion", build.build_tool_version)?,
            operating_system: text("OperatingSystem", build.operating_system)?,
            kernel_version: text("KernelVersion", build.kernel_version)?,
            json,
        })
    }
}

/// JSON that was read to its end and of which nothing was kept: as a tree it would take many times the memory that it takes as
/// text. (Unlike `IgnoredAny`, which lets any depth pass.)
struct Seen;

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Seen {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}

/// Writes the section as the JSON that it is, not as a string of JSON.
fn as_json<S: Serializer>(json: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let value: serde_json::Value = serde_json::from_str(json).map_err(serde::ser::Error::custom)?;
    value.serialize(serializer)
}
