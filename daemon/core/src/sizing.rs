//! What a host has for enclaves, and whether the wanted ones fit: decided from its inventory before anything is tried, with the
//! numbers and the way out in every refusal.
//!
//! Pure. The room that running enclaves leave in an existing pool is another question: `plan::admission`.

mod admit;
mod capacity;
pub mod instance_types;
pub mod pool;
mod refusal;
#[cfg(test)]
mod tests;

pub use admit::{Admission, Share, Spare, admit};
pub use capacity::{Capacity, NodeCapacity};
#[cfg(test)]
use refusal::mended;
pub use refusal::{Breach, FamilyAdvice, Nearest, Refusal};

use crate::desired::{EnclaveSpec, HostPolicy, UpdatePolicy};
use crate::id::{EnclaveName, MemoryMib};
use serde::{Deserialize, Serialize};

/// What stays with the parent, whatever the enclaves ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reserve {
    /// CPUs (vCPUs). CPU 0's core stays in any case.
    pub cpus: u32,
    /// Memory, kept free on the node that the enclaves' memory is taken from.
    pub memory: MemoryMib,
}

impl Default for Reserve {
    fn default() -> Self {
        (&HostPolicy::default()).into()
    }
}

impl From<&HostPolicy> for Reserve {
    fn from(policy: &HostPolicy) -> Self {
        Self { cpus: policy.reserve_cpus, memory: policy.reserve_memory }
    }
}

/// What one wanted enclave needs of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Its name.
    pub name: EnclaveName,
    /// vCPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: MemoryMib,
    /// The size of its image in bytes, where it is known.
    pub image_size: Option<u64>,
    /// Whether an update needs room for both generations.
    pub update: UpdatePolicy,
}

impl Demand {
    /// Of a configured enclave.
    pub fn of(name: &EnclaveName, spec: &EnclaveSpec, image_size: Option<u64>) -> Self {
        Self { name: name.clone(), cpus: spec.cpus, memory: spec.memory, image_size, update: spec.update }
    }
}
