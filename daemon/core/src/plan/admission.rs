//! Whether an enclave fits into the host's enclave resources, next to those that run.

use crate::id::{EnclaveKey, EnclaveName, MemoryMib};
use crate::ledger::{GenerationRecord, Ledger};
use crate::observed::Pool;
use std::fmt;

/// Enclaves that the driver runs at the same time on one parent.
pub const MAX_ENCLAVES: usize = 4;

/// What is missing for one more enclave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shortage {
    /// The driver's limit of enclaves is reached.
    Enclaves,
    /// The pool is too small.
    Pool {
        /// CPUs asked for.
        cpus: u32,
        /// CPUs that no enclave uses.
        cpus_free: u32,
        /// Memory asked for.
        memory: MemoryMib,
        /// Hugepage memory that nobody uses.
        memory_free: MemoryMib,
    },
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enclaves => write!(f, "{MAX_ENCLAVES} enclaves run already, the most a parent can run"),
            Self::Pool { cpus, cpus_free, memory, memory_free } => write!(
                f,
                "it needs {cpus} CPUs and {memory}; the host's enclave pool has {cpus_free} CPUs and {memory_free} free"
            ),
        }
    }
}

/// Whether that many CPUs and that much memory are free beside all generations that hold, or may hold, resources; with
/// `instead_of`, once the generations of that enclave are gone.
///
/// # Errors
/// What is missing.
pub fn fits(
    pool: &Pool,
    ledger: &Ledger,
    instead_of: Option<&EnclaveName>,
    cpus: u32,
    memory: MemoryMib,
) -> Result<(), Shortage> {
    let holders = ledger.generations().filter(|(_, record)| record.holds_resources());
    let (leaving, staying): (Vec<_>, Vec<_>) = holders.partition(|(key, _)| Some(&key.name) == instead_of);
    if staying.len() >= MAX_ENCLAVES {
        return Err(Shortage::Enclaves);
    }
    let Pool::Sized { cpus: pool_cpus, memory: pool_memory, memory_free, .. } = pool else { return Ok(()) };
    let memory_held = |held: &[(EnclaveKey, &GenerationRecord)]| {
        held.iter().fold(0_u64, |sum, (_, record)| sum.saturating_add(memory_of(record).0))
    };
    let cpus_held = staying.iter().fold(0_u32, |sum, (_, record)| sum.saturating_add(record.identity.cpus));
    let cpus_free = pool_cpus.saturating_sub(cpus_held);
    // Others may hold hugepages too; and what a launch has not taken yet is spoken for.
    let free_then = memory_free.0.saturating_add(memory_held(&leaving));
    let memory_free = MemoryMib(free_then.min(pool_memory.0.saturating_sub(memory_held(&staying))));
    if cpus > cpus_free || memory > memory_free {
        return Err(Shortage::Pool { cpus, cpus_free, memory, memory_free });
    }
    Ok(())
}

/// What it holds: what nitro-cli gave, which may be more than was asked for.
fn memory_of(record: &GenerationRecord) -> MemoryMib {
    let given = record.launch().map_or(MemoryMib(0), |launch| launch.memory);
    record.identity.memory.max(given)
}
