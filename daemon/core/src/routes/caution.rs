//! The ports that Caution's services have in an enclave. An image is of one release, so both of them are.

use super::{PathRoute, UpstreamHttp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which of Caution's releases an image is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CautionRelease {
    /// Those of today: attestation on vsock port 49502, end-to-end encryption on 49500 and for `/e2p` alone.
    Current,
    /// Those before: attestation on vsock port 8082, end-to-end encryption on 8080, for all paths.
    Earlier,
}

impl CautionRelease {
    /// In images of earlier releases, the application's own port behind end-to-end encryption.
    pub const EARLIER_APP: u32 = 8083;

    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Earlier => "earlier",
        }
    }

    /// The attestation service.
    pub fn attestation(self) -> PathRoute {
        route("/attestation", if self == Self::Current { 49502 } else { 8082 })
    }

    /// The end-to-end encryption, STEVE.
    pub fn e2e(self) -> PathRoute {
        match self {
            Self::Current => route("/e2p", 49500),
            Self::Earlier => route("/", 8080),
        }
    }
}

fn route(prefix: &str, vsock_port: u32) -> PathRoute {
    PathRoute { prefix: prefix.to_owned(), vsock_port, upstream: UpstreamHttp::Http1 }
}
