//! The JSON that commands print: keys, their order, which are left out.

use super::image::Image;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What `run-enclave` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Run {
    #[serde(rename = "EnclaveName")]
    pub(super) name: String,
    #[serde(rename = "EnclaveID")]
    pub(super) id: String,
    #[serde(rename = "ProcessID")]
    pub(super) process_id: u32,
    #[serde(rename = "EnclaveCID")]
    pub(super) cid: u32,
    #[serde(rename = "NumberOfCPUs")]
    pub(super) cpu_count: usize,
    #[serde(rename = "CPUIDs")]
    pub(super) cpu_ids: Vec<u32>,
    #[serde(rename = "MemoryMiB")]
    pub(super) memory_mib: u64,
}

/// What `describe-enclaves` prints of one enclave.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Describe {
    #[serde(flatten)]
    pub(super) run: Run,
    #[serde(rename = "State")]
    pub(super) state: String,
    #[serde(rename = "Flags")]
    pub(super) flags: String,
    #[serde(rename = "Measurements")]
    pub(super) measurements: BTreeMap<String, String>,
    #[serde(flatten)]
    pub(super) identity: Identity,
}

/// What `terminate-enclave` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Terminate {
    #[serde(rename = "EnclaveName")]
    pub(super) name: String,
    #[serde(rename = "EnclaveID")]
    pub(super) id: String,
    #[serde(rename = "Terminated")]
    pub(super) terminated: bool,
}

/// What an image says of itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Identity {
    #[serde(rename = "ImageName", skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    #[serde(rename = "ImageVersion", skip_serializing_if = "Option::is_none")]
    pub(super) version: Option<String>,
    #[serde(rename = "Metadata", skip_serializing_if = "Option::is_none")]
    pub(super) metadata: Option<Metadata>,
}

/// The image's metadata as nitro-cli prints it: the build's facts, then the user's own keys beside them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Metadata {
    #[serde(rename = "BuildTime")]
    build_time: String,
    #[serde(rename = "BuildTool")]
    build_tool: String,
    #[serde(rename = "BuildToolVersion")]
    build_tool_version: String,
    #[serde(rename = "OperatingSystem")]
    operating_system: String,
    #[serde(rename = "KernelVersion")]
    kernel_version: String,
    #[serde(rename = "DockerInfo")]
    docker_info: serde_json::Value,
    #[serde(flatten)]
    custom: Option<serde_json::Map<String, serde_json::Value>>,
}

/// The metadata section of an image.
#[derive(Deserialize)]
struct MetadataSection {
    #[serde(rename = "ImageName")]
    name: String,
    #[serde(rename = "ImageVersion")]
    version: String,
    #[serde(rename = "BuildMetadata")]
    build: BuildMetadata,
    #[serde(rename = "DockerInfo")]
    docker_info: serde_json::Value,
    #[serde(rename = "CustomMetadata")]
    custom: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
struct BuildMetadata {
    #[serde(rename = "BuildTime")]
    time: String,
    #[serde(rename = "BuildTool")]
    tool: String,
    #[serde(rename = "BuildToolVersion")]
    tool_version: String,
    #[serde(rename = "OperatingSystem")]
    operating_system: String,
    #[serde(rename = "KernelVersion")]
    kernel_version: String,
}

impl Identity {
    /// Reads an image's metadata section; an image without one, or with one that is no such JSON, has no identity.
    pub(super) fn of(image: &Image) -> Self {
        let Some(section) =
            image.metadata.as_ref().and_then(|bytes| serde_json::from_slice::<MetadataSection>(bytes).ok())
        else {
            return Self::default();
        };
        Self {
            name: Some(section.name),
            version: Some(section.version),
            metadata: Some(Metadata {
                build_time: section.build.time,
                build_tool: section.build.tool,
                build_tool_version: section.build.tool_version,
                operating_system: section.build.operating_system,
                kernel_version: section.build.kernel_version,
                docker_info: section.docker_info,
                custom: section.custom,
            }),
        }
    }
}

/// What `describe-eif` prints.
#[derive(Debug, Clone, Serialize)]
pub(super) struct DescribeEif {
    #[serde(rename = "EifVersion")]
    pub(super) version: u16,
    #[serde(rename = "Measurements")]
    pub(super) measurements: BTreeMap<String, String>,
    #[serde(rename = "IsSigned")]
    pub(super) is_signed: bool,
    #[serde(rename = "CheckCRC")]
    pub(super) check_crc: bool,
    #[serde(rename = "SignatureCheck", skip_serializing_if = "Option::is_none")]
    pub(super) signature_check: Option<bool>,
    #[serde(flatten)]
    pub(super) identity: Identity,
}
