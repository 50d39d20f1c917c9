//! What is told of the connections into enclaves that carry requests.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// HTTP connections into an enclave. Those that changed to another protocol (WebSocket) are none any more.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UpstreamReport {
    /// Open, with a request on them.
    pub active: u64,
    /// Open, kept for the next request.
    pub idle: u64,
    /// Tries to open one.
    pub connects: u64,
    /// Those that failed, by reason (`connect`, `connect_timeout`, `bad_answer`).
    pub connects_failed: BTreeMap<String, u64>,
    /// Requests that were sent over a kept one.
    pub reused: u64,
    /// Requests that were sent a second time, because the enclave had closed the kept connection meanwhile.
    pub repeated: u64,
}
