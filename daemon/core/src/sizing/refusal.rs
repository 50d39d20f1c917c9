//! Why enclaves do not fit, in numbers, and what would: the nearest configuration for this host, the nearest host for this
//! configuration.

use super::admit::{fit, least_memory, needs};
use super::instance_types::{self, InstanceSize};
use super::{Capacity, Demand, NodeCapacity};
use crate::desired::UpdatePolicy;
use crate::failure::Failure;
use crate::id::{EnclaveName, MemoryMib};
use crate::inventory::MAX_CPUS;
use crate::inventory::parse::cpus as cpus_text;
use crate::plan::admission::MAX_ENCLAVES;
use std::fmt;

/// More memory than any host has, in MiB.
const NONSENSE_MEMORY: u64 = 1 << 40;

/// A rule that is broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Breach {
    /// The driver runs no more than four.
    TooMany {
        /// Enclaves.
        wanted: usize,
        /// Whether one of them is to be updated with both generations running.
        second_generation: bool,
    },
    /// An enclave has whole cores.
    HalfCore {
        /// Which.
        name: EnclaveName,
        /// What it asks for.
        cpus: u32,
        /// Threads of a core here.
        threads_per_core: u32,
    },
    /// An enclave has at least 64 MiB, and four times its image.
    TooLittleMemory {
        /// Which.
        name: EnclaveName,
        /// What it asks for.
        memory: MemoryMib,
        /// What it must have.
        least: MemoryMib,
        /// The size of its image in bytes, where it is known.
        image_size: Option<u64>,
    },
    /// All CPUs beyond the reserve, on one memory node, are too few.
    Cpus {
        /// What all need.
        needed: u64,
        /// How many of these are for a second generation during an update.
        spare: u32,
        /// What there is.
        available: u32,
    },
    /// The memory beyond the reserve, on one memory node, is too small.
    Memory {
        /// What all need.
        needed: MemoryMib,
        /// How much of that is for a second generation during an update.
        spare: MemoryMib,
        /// What was asked for, before each was rounded up to pages.
        asked: MemoryMib,
        /// What there is.
        available: MemoryMib,
        /// The pages that each was rounded up to.
        page: MemoryMib,
    },
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany { wanted, second_generation } => {
                write!(f, "a parent runs at most {MAX_ENCLAVES} enclaves; {wanted} are wanted")?;
                if *second_generation {
                    f.write_str(", and a blue-green update needs one more")?;
                }
                Ok(())
            }
            Self::HalfCore { name, cpus, threads_per_core } => {
                let threads = *threads_per_core;
                write!(f, "{name} wants {}; an enclave has whole cores, here of {}", cpus_text(*cpus), Threads(threads))
            }
            Self::TooLittleMemory { name, memory, least, image_size } => {
                write!(f, "{name} has {memory} of memory and needs {least}")?;
                match image_size.filter(|_| least.0 > 64) {
                    Some(size) => write!(f, ": four times its image of {} MiB", size.div_ceil(1 << 20)),
                    None => f.write_str(", the least for any enclave"),
                }
            }
            Self::Cpus { needed, spare, available } => {
                write!(f, "{needed} CPUs are needed")?;
                if *spare > 0 {
                    write!(f, " ({spare} of them for a blue-green update)")?;
                }
                write!(f, ", {available} can be had")
            }
            Self::Memory { needed, spare, asked, available, page } => {
                write!(f, "{needed} of memory are needed")?;
                if spare.0 > 0 {
                    write!(f, " ({spare} of it for a blue-green update)")?;
                }
                write!(f, ", {available} can be had")?;
                if *asked <= *available {
                    write!(f, "; {asked} would fit, but each enclave takes whole pages of {page}")?;
                }
                Ok(())
            }
        }
    }
}

struct Threads(u32);

impl fmt::Display for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} each", cpus_text(self.0))
    }
}

/// A configuration that fits, as near to the wanted one as can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nearest {
    /// The enclaves.
    pub enclaves: Vec<Demand>,
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, demand) in self.enclaves.iter().enumerate() {
            let separator = if number == 0 { "" } else { "; " };
            write!(f, "{separator}{} with cpus = {}, memory_mib = {}", demand.name, demand.cpus, demand.memory.0)?;
            if demand.update == UpdatePolicy::Recreate {
                f.write_str(", update = \"recreate\"")?;
            }
        }
        Ok(())
    }
}

/// Which size of the same family has room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyAdvice {
    /// The smallest that has.
    Size(InstanceSize),
    /// None has; this is the largest.
    NoSize(InstanceSize),
    /// The instance type is not known, or not in the table.
    Unknown,
    /// What is wrong can be mended without another host.
    NotNeeded,
}

/// Why the wanted enclaves do not fit, and what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The rules that are broken; at least one.
    pub breaches: Vec<Breach>,
    /// Where the numbers come from: the host, its memory, the reserve.
    pub host: String,
    /// What would fit here; `None`: so many enclaves do not, however small.
    pub nearest: Option<Nearest>,
    /// What this would fit.
    pub family: FamilyAdvice,
}

impl Refusal {
    /// In the form that status and logs take.
    pub fn failure(&self) -> Failure {
        let breaches: Vec<String> = self.breaches.iter().map(Breach::to_string).collect();
        let message = format!("the enclaves do not fit this host: {} ({})", breaches.join("; "), self.host);
        let here = match &self.nearest {
            Some(nearest) => format!("the nearest that fits here: {nearest}"),
            None => "no sizes of so many enclaves fit here".to_owned(),
        };
        let elsewhere = match &self.family {
            FamilyAdvice::Size(size) => {
                format!("; {} is the smallest {} with room for what is wanted", size.name, size.family())
            }
            FamilyAdvice::NoSize(size) => {
                format!("; no {} has room for what is wanted, not even {}", size.family(), size.name)
            }
            FamilyAdvice::Unknown | FamilyAdvice::NotNeeded => String::new(),
        };
        Failure::new(message).with_remedy(here + &elsewhere)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure().fmt(f)
    }
}

impl std::error::Error for Refusal {}

pub(super) fn refuse(capacity: &Capacity, demands: &[Demand], node: usize, breaches: Vec<Breach>) -> Refusal {
    let mended = mended(capacity, demands);
    let nearest = capacity.nodes.iter().find_map(|node| nearest(capacity, node, &mended));
    let family = if fit(capacity, &mended).is_ok() { FamilyAdvice::NotNeeded } else { family(capacity, &mended) };
    Refusal { breaches, host: host(capacity, node), nearest, family }
}

/// The same enclaves without what is wrong with each by itself: whole cores, and memory for their images.
pub(super) fn mended(capacity: &Capacity, demands: &[Demand]) -> Vec<Demand> {
    let threads = capacity.threads_per_core;
    let mend = |demand: &Demand| {
        // More than any host has is no more wrong than a little more, and can be computed with.
        let cpus = demand.cpus.clamp(1, MAX_CPUS).next_multiple_of(threads);
        let memory = demand.memory.min(MemoryMib(NONSENSE_MEMORY)).max(least_memory(demand));
        Demand { cpus, memory, ..demand.clone() }
    };
    demands.iter().map(mend).collect()
}

/// Real and nominal amounts, so that whoever knows only one of them finds the difference.
fn host(capacity: &Capacity, node: usize) -> String {
    let reserve = &capacity.reserve;
    let mut text = match &capacity.instance_type {
        Some(name) => format!("{name} with {}", cpus_text(capacity.cpus)),
        None => format!("a host with {}", cpus_text(capacity.cpus)),
    };
    if let Some(node) = capacity.nodes.get(node) {
        let place = if capacity.nodes.len() > 1 { format!(" on memory node {}", node.node) } else { String::new() };
        text += &format!(" and {}{place}", node.memory);
    }
    text += &format!(", of which {} and {} stay with the parent", cpus_text(reserve.cpus), reserve.memory);
    if let Some(size) = capacity.size() {
        let (cpus, memory) = size.nominal(*reserve);
        text += &format!(
            "; nominally {} GiB, so {} and {} GiB for enclaves",
            size.memory_gib,
            cpus_text(cpus),
            memory.0 / 1024
        );
    }
    text
}

fn family(capacity: &Capacity, demands: &[Demand]) -> FamilyAdvice {
    let Some(family) = capacity.instance_type.as_deref().map(instance_types::family) else {
        return FamilyAdvice::Unknown;
    };
    let sizes = || instance_types::sizes().filter(|size| size.family() == family);
    let fits = |size: &InstanceSize| fit(&Capacity::nominal(size, capacity.reserve), demands).is_ok();
    match (sizes().find(fits), sizes().last()) {
        (Some(size), _) => FamilyAdvice::Size(size),
        (None, Some(largest)) => FamilyAdvice::NoSize(largest),
        (None, None) => FamilyAdvice::Unknown,
    }
}

/// Gives up the second generation, and if that is not enough takes CPUs and memory from those that have most of them, until
/// all fit.
fn nearest(capacity: &Capacity, node: &NodeCapacity, mended: &[Demand]) -> Option<Nearest> {
    let mut enclaves = mended.to_vec();
    let fits = |enclaves: &[Demand]| fit(capacity, enclaves).is_ok();
    if fits(&enclaves) {
        return Some(Nearest { enclaves });
    }
    if enclaves.len() > MAX_ENCLAVES {
        return None;
    }
    for demand in &mut enclaves {
        demand.update = UpdatePolicy::Recreate;
    }
    let threads = capacity.threads_per_core;
    let (cpus, memory) = capacity.budget(node);
    while !fits(&enclaves) {
        let over = needs(node, &enclaves, &[]);
        if over.cpus > u64::from(cpus) {
            let largest =
                enclaves.iter_mut().max_by_key(|demand| demand.cpus).filter(|demand| demand.cpus > threads)?;
            // No enclave can have more than all; then a core in each turn.
            let beyond = largest.cpus.saturating_sub(cpus.max(threads));
            largest.cpus -= beyond.next_multiple_of(threads).clamp(threads, largest.cpus - threads);
        } else if over.memory > memory.0 {
            let excess = (over.memory - memory.0).next_multiple_of(over.granule);
            let slack = |demand: &Demand| demand.memory.0.saturating_sub(least_memory(demand).0);
            let largest = enclaves.iter_mut().max_by_key(|demand| slack(demand)).filter(|demand| slack(demand) > 0)?;
            let aligned = largest.memory.0.next_multiple_of(over.granule);
            largest.memory = MemoryMib(aligned.saturating_sub(excess)).max(least_memory(largest));
        } else {
            // Another node has the room.
            return None;
        }
    }
    Some(Nearest { enclaves })
}
