//! The ledger: what enclaved remembers over restarts of itself and of the host. What it says of each enclave stands in `records`, every
//! change that it can undergo in `change`.
//!
//! It is the record of intent (invariant 8): it is on disk before a step that cannot be repeated. It changes only by
//! [`Ledger::apply`]. Reading and writing it is the daemon's `host::ledger_file`.

mod change;
mod records;

pub use crate::image_record::{ImageFacts, ImageOutcome, ImageRecord};
pub use change::Change;
pub use records::{
    EnclaveRecord, EndRecord, GenerationRecord, HeldBy, Identity, LaunchRecord, Phase, ProcessIdentity, StopReason,
    Verdict,
};

use crate::allocator_file::Reservation;
use crate::desired::ImageRequest;
use crate::id::{BootId, Cid, EnclaveKey, EnclaveName, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// The [`Ledger::format`] that this version writes. It reads this one and all before it.
///
/// An earlier version, after a rollback, reads what a later one wrote in the same format: fields that it does not know are ignored, and
/// lost with its next save. So whoever adds a field that must not be ignored, or a phase, raises the number. What an enclave
/// may reach and what an image must measure are read strictly all the same ([`EgressSpec`](crate::desired::EgressSpec), [`ImageRequest`],
/// [`Measurements`](crate::id::Measurements)): to
/// ignore a part of these would allow more than was asked for. The same holds for the traces of a launch.
pub const LEDGER_FORMAT: u32 = 1;

/// An enclave that was ready for this long before it died starts its next series of failures from the beginning.
pub const STABLE_AFTER: Duration = Duration::from_secs(600);

/// Everything that is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Version of this format.
    pub format: u32,
    /// The boot in which it was last written.
    pub boot_id: Option<BootId>,
    /// The next CID to give away.
    pub next_cid: Cid,
    /// Every enclave that is wanted, or of which something is left.
    pub enclaves: BTreeMap<EnclaveName, EnclaveRecord>,
    /// What image requests came to.
    pub images: Vec<ImageRecord>,
    /// What the allocator was last asked for in this boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolTried>,
    /// Whether any launch was decided in this boot. From then on the pool changes only for an enclave that has no room otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub launched: bool,
}

/// Tries of the allocator that follow each other within this time are a row.
const ROW: Duration = Duration::from_secs(3600);

/// The allocator's tries for one pool, in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolTried {
    /// What it was asked for.
    pub wish: Reservation,
    /// How often, with success or without.
    pub tries: u32,
    /// When the last try was over.
    pub at: Timestamp,
    /// How many tries in a row that was, whatever for.
    #[serde(default)]
    pub row: u32,
}

impl PoolTried {
    /// How many tries in a row there were, as far as they still matter.
    pub fn in_a_row(&self, now: Timestamp) -> u32 {
        if in_a_row(self.at, now) { self.row.max(1) } else { 0 }
    }
}

/// Whether what was tried then and what is tried now follow each other.
pub(crate) fn in_a_row(then: Timestamp, now: Timestamp) -> bool {
    now.since(then) < ROW
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            format: LEDGER_FORMAT,
            boot_id: None,
            next_cid: Cid::FIRST,
            enclaves: BTreeMap::new(),
            images: Vec::new(),
            pool: None,
            launched: false,
        }
    }
}

impl Ledger {
    /// The generation of that key.
    pub fn generation(&self, key: &EnclaveKey) -> Option<&GenerationRecord> {
        self.enclaves.get(&key.name)?.generations.get(&key.generation)
    }

    /// Every generation of every enclave.
    pub fn generations(&self) -> impl Iterator<Item = (EnclaveKey, &GenerationRecord)> {
        self.enclaves.iter().flat_map(|(name, record)| {
            let key = |generation| EnclaveKey { name: name.clone(), generation };
            record.generations.iter().map(move |(generation, record)| (key(*generation), record))
        })
    }

    /// What that image request came to, if it was tried.
    pub fn image(&self, request: &ImageRequest) -> Option<&ImageOutcome> {
        self.images.iter().find(|record| record.request == *request).map(|record| &record.outcome)
    }

    /// A CID that no generation in the ledger has, beginning with the one after the last given away, so that a CID
    /// comes back only after all others.
    pub fn free_cid(&self) -> Cid {
        let mut cid = self.next_cid;
        while self.generations().any(|(_, record)| record.cid == cid) {
            cid = cid.next();
        }
        cid
    }
}
