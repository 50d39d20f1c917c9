//! Where images come from: the addresses that the configuration may name, read and written. Nothing is fetched here.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Longest address of an object or a file, in bytes. S3's keys have 1024 bytes at most.
const MAX_ADDRESS: usize = 2048;
/// Longest URL, in bytes: a presigned one carries a session token.
const MAX_URL: usize = 8192;
/// Where an object's version is given.
const VERSION: &str = "?versionId=";

/// Where an EIF comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImageSource {
    /// `s3://bucket/key`, or `s3://bucket/key?versionId=version`
    S3 {
        /// The bucket's name.
        bucket: String,
        /// The object's key.
        key: String,
        /// Which version of the object; `None`: the newest. (Reading a given version takes s3:GetObjectVersion.)
        version: Option<String>,
    },
    /// `https://host/path?query`, a presigned URL as a rule.
    Https(Url),
    /// `file:///absolute/path`
    File(String),
}

/// A URL that images may come from: `https://`, or `http://` to this very host. Its query may be what grants access, so
/// neither `Display` nor `Debug` shows it; the serialised form has it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Url(String);

impl Url {
    /// Reads a URL.
    ///
    /// # Errors
    /// Why it is none that images may come from.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() > MAX_URL || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a URL has 8192 bytes at most, and only printable ASCII characters");
        }
        let (rest, encrypted) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (rest, true),
            (None, Some(rest)) => (rest, false),
            (None, None) => return Err("its scheme is unknown"),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
        if authority.contains('@') {
            return Err("a URL may not hold a user's name or password");
        }
        if rest.contains('#') {
            return Err("a URL may not have a fragment (#)");
        }
        let (host, port) = split_port(authority).ok_or("its host or port is not one")?;
        if port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return Err("its port is not one");
        }
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        if !(encrypted || host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())) {
            return Err("http:// is for this very host only, use https://");
        }
        Ok(Self(text.to_owned()))
    }

    /// All of it, with what it keeps secret: for whoever makes the request, not for logs.
    pub fn secret(&self) -> &str {
        &self.0
    }

    /// Where a redirect (`Location`) leads to from here, by RFC 3986 (5.2), but for `..`, which is the server's to resolve.
    ///
    /// # Errors
    /// Why it is none that images may come from: an encrypted address never leads to one that is not, not even on this host.
    pub fn join(&self, location: &str) -> Result<Self, &'static str> {
        let joined = self.resolve(location)?;
        if self.is_encrypted() && !joined.is_encrypted() {
            return Err("an https:// address may not lead on to http://, use https://");
        }
        Ok(joined)
    }

    fn resolve(&self, location: &str) -> Result<Self, &'static str> {
        // What has a scheme is whole. A colon further on is a part of a path or a query.
        if location.find([':', '/', '?', '#']).is_some_and(|at| location[at..].starts_with(':')) {
            return Self::parse(location);
        }
        let (scheme, rest) = self.0.split_once("://").ok_or("its scheme is unknown")?;
        if let Some(elsewhere) = location.strip_prefix("//") {
            return Self::parse(&format!("{scheme}://{elsewhere}"));
        }
        let authority = self.authority();
        let path = rest.split('?').next().unwrap_or(rest);
        match location.chars().next() {
            None => Err("it is empty, or not text"),
            Some('/') => Self::parse(&format!("{scheme}://{authority}{location}")),
            Some('?') => Self::parse(&format!("{scheme}://{path}{location}")),
            Some(_) => {
                let folder = path.rsplit_once('/').map_or(authority, |(folder, _)| folder);
                Self::parse(&format!("{scheme}://{folder}/{location}"))
            }
        }
    }

    fn is_encrypted(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// The host and the port, as written.
    pub fn authority(&self) -> &str {
        let rest = self.0.split_once("://").map_or(self.0.as_str(), |(_, rest)| rest);
        rest.split(['/', '?']).next().unwrap_or(rest)
    }
}

/// Host and port of an authority; `None` if there is no host, or it can't be one.
fn split_port(authority: &str) -> Option<(&str, Option<&str>)> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    if let Some(ip) = host.strip_prefix('[') {
        let ip = ip.strip_suffix(']')?;
        return ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()).then_some((host, port));
    }
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    (!host.is_empty() && host.len() <= 253 && host.bytes().all(in_name)).then_some((host, port))
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_query(&self.0))
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text with `?…` in place of a query.
fn without_query(text: &str) -> String {
    match text.split_once('?') {
        Some((before, _)) => format!("{before}?…"),
        None => text.to_owned(),
    }
}

/// An image address that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is not an image address: {reason}; allowed are s3://bucket/key[?versionId=version], https://host/path and \
     file:///absolute/path"
)]
pub struct BadImageSource {
    /// As given, without a URL's query.
    text: String,
    reason: &'static str,
}

impl std::str::FromStr for ImageSource {
    type Err = BadImageSource;
    fn from_str(text: &str) -> Result<Self, BadImageSource> {
        let is_url = ["https://", "http://"].iter().any(|scheme| text.starts_with(scheme));
        let bad = |reason| {
            let shown = if is_url { without_query(text) } else { text.to_owned() };
            let shown: String = shown.chars().take(MAX_ADDRESS).collect();
            BadImageSource { text: shown.escape_debug().to_string(), reason }
        };
        if is_url {
            return Url::parse(text).map(Self::Https).map_err(bad);
        }
        if text.len() > MAX_ADDRESS || text.chars().any(char::is_control) {
            return Err(bad("it is longer than 2048 bytes or holds control characters"));
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, key) = rest.split_once('/').ok_or_else(|| bad("the key is missing"))?;
            let in_bucket = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
            if !(3..=255).contains(&bucket.len()) || !bucket.chars().all(in_bucket) {
                return Err(bad("the bucket's name is not one"));
            }
            let (key, version) = match key.rsplit_once(VERSION) {
                Some((key, version)) => (key, Some(version)),
                None => (key, None),
            };
            if key.is_empty() || key.ends_with('/') {
                return Err(bad("the key is missing"));
            }
            // S3's are URL-safe; what signs and sends them encodes whatever it is given.
            if version.is_some_and(|version| version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_graphic()))
            {
                return Err(bad("the version after ?versionId= is not one"));
            }
            let version = version.map(str::to_owned);
            return Ok(Self::S3 { bucket: bucket.to_owned(), key: key.to_owned(), version });
        }
        if let Some(path) = text.strip_prefix("file://") {
            if !path.starts_with('/') || path.ends_with('/') {
                return Err(bad("the path is not absolute or names a folder"));
            }
            return Ok(Self::File(path.to_owned()));
        }
        Err(bad("its scheme is unknown"))
    }
}
impl TryFrom<String> for ImageSource {
    type Error = BadImageSource;
    fn try_from(text: String) -> Result<Self, BadImageSource> {
        text.parse()
    }
}
impl From<ImageSource> for String {
    /// Whole, with a URL's query.
    fn from(source: ImageSource) -> Self {
        match source {
            ImageSource::Https(Url(url)) => url,
            other => other.to_string(),
        }
    }
}
impl fmt::Display for ImageSource {
    /// For people: a URL's query is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, key, version: None } => write!(f, "s3://{bucket}/{key}"),
            Self::S3 { bucket, key, version: Some(version) } => write!(f, "s3://{bucket}/{key}{VERSION}{version}"),
            Self::Https(url) => url.fmt(f),
            Self::File(path) => write!(f, "file://{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_address_reads_back_what_it_writes() {
        for text in [
            "s3://caution-abc-images/signer.eif",
            "s3://b-1/a/b/c.eif",
            "s3://b-1/a?b=c",
            "s3://b-1/a.eif?versionId=3HL4kqCxf3vjVBH40Nrjfkd",
            "file:///opt/x.eif",
            "https://example.com/a/b.eif",
            "https://[2001:db8::1]:8443/b.eif",
            "http://127.0.0.1:9000/b.eif",
        ] {
            assert_eq!(text.parse::<ImageSource>().unwrap().to_string(), text);
            assert_eq!(String::from(text.parse::<ImageSource>().unwrap()), text);
        }
    }

    #[test]
    fn a_version_is_told_from_the_key() {
        let source = "s3://bucket/a?versionId=v1".parse::<ImageSource>().unwrap();
        let ImageSource::S3 { key, version, .. } = source else { panic!("{source}") };
        assert_eq!((key.as_str(), version.as_deref()), ("a", Some("v1")));
    }

    #[test]
    fn a_urls_query_is_kept_but_never_shown() {
        let text = "https://b.s3.amazonaws.com/k?X-Amz-Signature=abcdef&X-Amz-Expires=60";
        let source = text.parse::<ImageSource>().unwrap();
        assert_eq!(source.to_string(), "https://b.s3.amazonaws.com/k?…");
        assert!(!format!("{source:?}").contains("abcdef"), "{source:?}");
        let json = serde_json::to_string(&source).unwrap();
        assert!(json.contains("abcdef"), "{json}");
        assert_eq!(serde_json::from_str::<ImageSource>(&json).unwrap(), source);
        let bad = "https://user@b.example/k?X-Amz-Signature=abcdef".parse::<ImageSource>().unwrap_err();
        assert!(!format!("{bad:?} {bad}").contains("abcdef"), "{bad}");
    }

    #[test]
    fn a_redirect_leads_on_to_https_or_nowhere() {
        let url = Url::parse("https://a.example/x/y.eif?s=1").unwrap();
        for (location, expected) in [
            ("https://b.example/z?t=2", "https://b.example/z?t=2"),
            ("//b.example/z", "https://b.example/z"),
            ("/z?t", "https://a.example/z?t"),
            ("z", "https://a.example/x/z"),
            ("/login?next=https://b.example/z", "https://a.example/login?next=https://b.example/z"),
            ("z?next=https://b.example/z", "https://a.example/x/z?next=https://b.example/z"),
            ("?s=2", "https://a.example/x/y.eif?s=2"),
        ] {
            assert_eq!(url.join(location).unwrap().secret(), expected);
        }
        for location in [
            "http://b.example/z",
            "http://127.0.0.1/z",
            "ftp://b.example/z",
            "mailto:x",
            "https://u:p@b.example/z",
            "/a b",
            "",
        ] {
            assert!(url.join(location).is_err(), "{location}");
        }
        let here = Url::parse("http://127.0.0.1/x").unwrap();
        assert_eq!(here.join("http://127.0.0.1:8080/z").unwrap().secret(), "http://127.0.0.1:8080/z");
        assert_eq!(Url::parse("https://a.example").unwrap().join("z").unwrap().secret(), "https://a.example/z");
    }

    #[test]
    fn an_image_address_that_is_none_says_what_is_allowed() {
        for text in [
            "",
            "s3://",
            "s3://bucket",
            "s3://bucket/",
            "s3://b/k",
            "file://x",
            "ftp://a/b",
            "s3://buc ket/k",
            "s3://bucket/a\n",
            "s3://bucket/a?versionId=",
            "s3://bucket/?versionId=v",
            "https://",
            "https:///a",
            "https://user:password@a.example/x",
            "https://a.example:99999/x",
            "https://a.example/x#y",
            "https://a b.example/x",
            "http://a.example/x",
            "http://127.0.0.1.example/x",
            "http://localhost@a.example/x",
        ] {
            let error = text.parse::<ImageSource>().unwrap_err().to_string();
            assert!(error.contains("s3://bucket/key"), "{error}");
        }
    }
}
