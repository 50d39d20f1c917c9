//! The application of a stand-in enclave: what an image for the simulated host carries in its last ramdisk.
//!
//! A real ramdisk is an archive with programs; this one is a line of JSON that says what the one program of the stand-in
//! is to do. So the image decides what runs, and two images with different applications have different measurements.

use serde::{Deserialize, Serialize};
use std::io;

/// Longest application, in bytes.
pub const MAX_LEN: usize = 64 * 1024;

/// One endpoint that the application calls out to, through the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// The vsock port on which the host listens for it.
    pub vsock_port: u32,
    /// What the application puts into the Host header.
    pub host: String,
}

/// What the inside of an enclave does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Application {
    /// Free text that appears in every answer, so that one image can be told from another.
    pub label: String,
    /// vsock ports that serve HTTP.
    #[serde(default)]
    pub http_ports: Vec<u32>,
    /// vsock ports that send back what they receive.
    #[serde(default)]
    pub echo_ports: Vec<u32>,
    /// Where it calls out to; `GET /` uses the first.
    #[serde(default)]
    pub egress: Vec<Egress>,
    /// How long booting takes, until nitro-cli hears of it, in milliseconds.
    #[serde(default)]
    pub boot_millis: u64,
    /// How long after that `GET /health` answers 503, in milliseconds.
    #[serde(default)]
    pub ready_millis: u64,
}

impl Application {
    /// One that serves HTTP on a port and calls nothing.
    pub fn http(label: &str, port: u32) -> Self {
        Self {
            label: label.to_owned(),
            http_ports: vec![port],
            echo_ports: Vec::new(),
            egress: Vec::new(),
            boot_millis: 0,
            ready_millis: 0,
        }
    }

    /// The contents of the ramdisk: one line, with the newline.
    pub fn to_line(&self) -> Vec<u8> {
        // Strings and numbers always serialize; an empty line would be refused.
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Reads a ramdisk. Zero bytes at its end are padding, with which an image is given a size.
    ///
    /// # Errors
    /// When it is longer than [`MAX_LEN`] without its padding, or no application.
    pub fn from_ramdisk(bytes: &[u8]) -> io::Result<Self> {
        let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let bytes = bytes.get(..len).filter(|bytes| bytes.len() <= MAX_LEN).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("an application of {len} bytes; at most {MAX_LEN}"))
        })?;
        Ok(serde_json::from_slice(bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_reads_back_what_it_writes_padded_or_not() {
        let mut application = Application::http("v1", 8080);
        application.egress.push(Egress { vsock_port: 8000, host: "upstream".into() });
        let mut bytes = application.to_line();
        assert_eq!(Application::from_ramdisk(&bytes).unwrap(), application);
        bytes.extend([0; 100_000]);
        assert_eq!(Application::from_ramdisk(&bytes).unwrap(), application);
    }

    #[test]
    fn what_is_no_application_is_refused() {
        for bad in [b"".as_slice(), b"\0\0", b"ramdisk", b"{}", &[b' '; MAX_LEN + 1]] {
            assert!(Application::from_ramdisk(bad).is_err());
        }
    }
}
