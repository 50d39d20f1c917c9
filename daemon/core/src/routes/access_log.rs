//! Where the access log goes.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where the access log goes: one line of JSON for each request and each raw connection from clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AccessLog {
    /// The proxy's standard output: the journal, under systemd.
    Stdout,
    /// A file at an absolute path, which is made if it is not there, and again when it was moved away.
    File(PathBuf),
}

/// Why a text says of no place where an access log can go.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("allowed: the absolute path of a file, or \"stdout\", which is the journal under systemd")]
pub struct BadAccessLog;

impl AccessLog {
    /// Whether a file's path can be meant: absolute, and not that of a folder. What opens a process's own streams by name fails
    /// on sockets, which the journal's are.
    pub(super) fn is_sensible(&self) -> bool {
        match self {
            Self::Stdout => true,
            Self::File(path) => {
                let text = path.as_os_str().as_encoded_bytes();
                let stream = ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc"].iter().any(|own| path.starts_with(own));
                path.is_absolute()
                    && path.file_name().is_some()
                    && !text.ends_with(b"/")
                    && !text.contains(&0)
                    && !stream
            }
        }
    }

    /// The file, if it is one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Stdout => None,
            Self::File(path) => Some(path),
        }
    }
}

impl FromStr for AccessLog {
    type Err = BadAccessLog;
    fn from_str(text: &str) -> Result<Self, BadAccessLog> {
        let to = if text == "stdout" { Self::Stdout } else { Self::File(text.into()) };
        if to.is_sensible() { Ok(to) } else { Err(BadAccessLog) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_log_goes_to_stdout_or_to_a_file_at_an_absolute_path() {
        assert_eq!("stdout".parse(), Ok(AccessLog::Stdout));
        assert_eq!("/var/log/x.log".parse(), Ok(AccessLog::File("/var/log/x.log".into())));
        for bad in
            ["", "journal", "access.log", "./x", "/", "/var/log/", "/var/..", "/dev/stdout", "/proc/self/fd/1", "/a\0b"]
        {
            assert_eq!(bad.parse::<AccessLog>(), Err(BadAccessLog), "{bad:?}");
        }
    }
}
