//! What is asked for. It is written by a user who may do little, and read by root: small, strict, and checked again against the host.

use enclaved_core::allocator_file::Reservation;
use enclaved_core::failure::Failure;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The form of requests and reports that this version writes and reads.
pub const FORMAT: u32 = 1;
/// A request of the longest CPU lists is shorter.
const MAX_REQUEST: u64 = 64 * 1024;

/// `{"format": 1, "id": 7, "wish": {"cpus": {"count": 6}, "memory_mib": 28672}, "least": {"cpus": {"pool": "1,5"}, "memory_mib": 512}}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`FORMAT`].
    pub format: u32,
    /// By which its writer knows the answer to it: no two requests have the same.
    pub id: u64,
    /// What is to be reserved.
    pub wish: Reservation,
    /// What is to be reserved if the wish can't be had, memory being in pieces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least: Option<Reservation>,
}

/// Reads the request. A link in its place is not followed: its writer could point it at what only root may read.
pub(super) fn read(path: &Path) -> Result<Request, Failure> {
    let refused = |why: String| Failure::new(format!("the request {} is not taken: {why}", path.display()));
    // Neither does a pipe in its place make this wait.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(|error| refused(error.to_string()))?;
    let file =
        OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| refused(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| refused(error.to_string()))?;
    if !metadata.is_file() {
        return Err(refused("it is no file".to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(MAX_REQUEST + 1).read_to_end(&mut bytes).map_err(|error| refused(error.to_string()))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_REQUEST) {
        return Err(refused(format!("it is longer than {MAX_REQUEST} bytes")));
    }
    let request: Request = serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))?;
    if request.format != FORMAT {
        return Err(refused(format!("its format is {}, known is {FORMAT}", request.format)));
    }
    Ok(request)
}
