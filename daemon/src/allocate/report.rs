//! What came of a request, for the daemon and for people.

use super::request::{FORMAT, Request};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::failure::Failure;
use enclaved_core::id::{MemoryMib, Timestamp};
use enclaved_core::inventory::CpuSet;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// The form of this report.
    pub format: u32,
    /// When the request was taken up.
    pub at: Timestamp,
    /// The request, by which its writer knows it again; `None` if it could not be read.
    pub request: Option<Request>,
    /// What is reserved now.
    pub did: Did,
    /// Why not what was asked for.
    pub failure: Option<Failure>,
    /// The pool before.
    pub before: Option<Pool>,
    /// The pool after; `None` if it was not read after the last restart, or there was none.
    pub after: Option<Pool>,
    /// How often the stock service was restarted, or may have been.
    pub restarts: u32,
    /// What the stock service's last restart failed with, where it did.
    pub service_failure: Option<Failure>,
    /// Whether the kernel was asked to put free memory together.
    pub compacted: bool,
    /// Where a file of somebody else was kept that was replaced.
    pub backup: Option<PathBuf>,
    /// The last lines of the stock service's journal.
    pub journal: Vec<String>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Did {
    /// What was asked for was there already.
    Nothing,
    /// This was reserved: the wish, or the least.
    Reserved(Reservation),
    /// It was not to be had, `failure` says why; the pool that was there before is there again.
    KeptFormer(Reservation),
    /// It was not done; `failure` says why.
    Failed,
}

/// A pool, in numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// The driver's CPUs.
    pub cpus: CpuSet,
    /// The hugepages on their node.
    pub memory: MemoryMib,
}

impl Report {
    pub(super) fn new(at: Timestamp) -> Self {
        Self {
            format: FORMAT,
            at,
            request: None,
            did: Did::Failed,
            failure: None,
            before: None,
            after: None,
            restarts: 0,
            service_failure: None,
            compacted: false,
            backup: None,
            journal: Vec::new(),
        }
    }
}
