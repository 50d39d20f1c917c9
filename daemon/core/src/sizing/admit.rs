//! Whether the wanted enclaves fit a host, with the room that their updates need.

use super::refusal::{self, Breach, Refusal};
use super::{Capacity, Demand, NodeCapacity};
use crate::desired::UpdatePolicy;
use crate::id::{EnclaveName, MemoryMib};
use crate::image::required_memory;
use crate::plan::admission::MAX_ENCLAVES;
use serde::Serialize;

/// The least memory of an enclave.
const LEAST_MEMORY: u64 = 64;

/// What the wanted enclaves get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Admission {
    /// The memory node that all of it is on.
    pub node: u32,
    /// CPUs of all enclaves and of `spare`.
    pub cpus: u32,
    /// Hugepages for all enclaves and for `spare`.
    pub memory: MemoryMib,
    /// Each enclave's.
    pub shares: Vec<Share>,
    /// Room for a second generation beside the first, while it is updated.
    pub spare: Option<Spare>,
}

/// What one enclave gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Which.
    pub name: EnclaveName,
    /// Its CPUs, whole cores.
    pub cpus: u32,
    /// The hugepages that are kept for it: its memory, rounded up to pages.
    pub memory: MemoryMib,
}

/// Room for the second generation of one enclave at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Spare {
    /// CPUs.
    pub cpus: u32,
    /// Hugepages.
    pub memory: MemoryMib,
}

impl Admission {
    /// Whether that enclave can be updated without a gap.
    pub fn has_spare_for(&self, share: &Share) -> bool {
        self.spare.is_some_and(|spare| spare.cpus >= share.cpus && spare.memory >= share.memory)
    }
}

/// Fits the wanted enclaves into the host: all on one memory node, whole cores, memory in whole pages, the reserve kept; with room
/// to update where an enclave asks for it (`blue-green`) or would use it (`auto`).
///
/// # Errors
/// Which rules are broken, by how much, and what would fit.
pub fn admit(capacity: &Capacity, demands: &[Demand]) -> Result<Admission, Refusal> {
    fit(capacity, demands).map_err(|(node, breaches)| refusal::refuse(capacity, demands, node, breaches))
}

/// [`admit`], with the bare reasons: those on the node that is nearest to having room, and which node that is.
pub(super) fn fit(capacity: &Capacity, demands: &[Demand]) -> Result<Admission, (usize, Vec<Breach>)> {
    let own = own_breaches(capacity, demands);
    let mut nearest: Option<(usize, Vec<Breach>)> = None;
    for choice in spares(demands) {
        for (number, node) in capacity.nodes.iter().enumerate() {
            let mut breaches = own.clone();
            match fit_on(capacity, node, demands, &choice) {
                Ok(admission) if breaches.is_empty() => return Ok(admission),
                Ok(_) => {}
                Err(room) => breaches.extend(room),
            }
            // Of the last choice: what is needed at the least.
            if choice.last && nearest.as_ref().is_none_or(|(_, fewest)| breaches.len() < fewest.len()) {
                nearest = Some((number, breaches));
            }
        }
    }
    Err(nearest.unwrap_or((0, own)))
}

/// What is wrong with each enclave by itself, on whatever host.
fn own_breaches(capacity: &Capacity, demands: &[Demand]) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for demand in demands {
        let Demand { name, cpus, memory, .. } = demand;
        if *cpus == 0 || !cpus.is_multiple_of(capacity.threads_per_core) {
            let threads = capacity.threads_per_core;
            breaches.push(Breach::HalfCore { name: name.clone(), cpus: *cpus, threads_per_core: threads });
        }
        let least = least_memory(demand);
        if *memory < least {
            let image_size = demand.image_size;
            breaches.push(Breach::TooLittleMemory { name: name.clone(), memory: *memory, least, image_size });
        }
    }
    breaches
}

/// What that enclave must have at least: 64 MiB, and four times its image.
pub(super) fn least_memory(demand: &Demand) -> MemoryMib {
    demand.image_size.map_or(MemoryMib(LEAST_MEMORY), required_memory)
}

/// For whose update room is kept.
struct SpareChoice<'a> {
    /// Those of which one at a time has a second generation.
    of: Vec<&'a Demand>,
    /// Nothing less is asked for.
    last: bool,
}

/// First all that would use room, then those that must have it.
fn spares(demands: &[Demand]) -> Vec<SpareChoice<'_>> {
    let must: Vec<_> = demands.iter().filter(|demand| demand.update == UpdatePolicy::BlueGreen).collect();
    let may: Vec<_> = demands.iter().filter(|demand| demand.update != UpdatePolicy::Recreate).collect();
    if may.len() == must.len() {
        return vec![SpareChoice { of: must, last: true }];
    }
    vec![SpareChoice { of: may, last: false }, SpareChoice { of: must, last: true }]
}

fn fit_on(
    capacity: &Capacity,
    node: &NodeCapacity,
    demands: &[Demand],
    choice: &SpareChoice<'_>,
) -> Result<Admission, Vec<Breach>> {
    let mut breaches = Vec::new();
    let generations = demands.len() + usize::from(!choice.of.is_empty());
    if generations > MAX_ENCLAVES {
        breaches.push(Breach::TooMany { wanted: demands.len(), second_generation: !choice.of.is_empty() });
    }
    let needs = needs(node, demands, &choice.of);
    let (cpus, memory) = capacity.budget(node);
    if needs.cpus > u64::from(cpus) {
        let (needed, spare) = (needs.cpus, needs.spare.cpus);
        breaches.push(Breach::Cpus { needed, spare, available: cpus });
    }
    if needs.memory > memory.0 {
        let (needed, spare, asked) = (MemoryMib(needs.memory), needs.spare.memory, MemoryMib(needs.asked));
        breaches.push(Breach::Memory { needed, spare, asked, available: memory, page: MemoryMib(needs.granule) });
    }
    if !breaches.is_empty() {
        return Err(breaches);
    }
    let spare = (!choice.of.is_empty()).then_some(needs.spare);
    // It fits, so it is small enough.
    let cpus = u32::try_from(needs.cpus).unwrap_or(u32::MAX);
    Ok(Admission { node: node.node, cpus, memory: MemoryMib(needs.memory), shares: needs.shares, spare })
}

/// What enclaves need together on a node.
pub(super) struct Needs {
    pub(super) cpus: u64,
    pub(super) memory: u64,
    /// Without rounding.
    pub(super) asked: u64,
    /// What each enclave's memory is rounded up to, in MiB.
    pub(super) granule: u64,
    shares: Vec<Share>,
    spare: Spare,
}

/// Adds up, each enclave rounded up to pages.
///
/// To which pages is not a matter of taste. The allocator takes as many pages of the largest size (1 GiB) as go into the whole
/// amount, and nitro-cli gives an enclave a large page where the small ones have run out. Two enclaves of 1.5 GiB so get three
/// pages of 1 GiB, of which the first takes two. Only if everything is smaller than one large page, or there is only one
/// enclave, do the small pages count.
pub(super) fn needs(node: &NodeCapacity, demands: &[Demand], spare_of: &[&Demand]) -> Needs {
    let (small, large) = (node.smallest_page(), node.largest_page());
    let up = |memory: u64, page: u64| memory.div_ceil(page).saturating_mul(page);
    let largest = |page: u64| spare_of.iter().map(|demand| up(demand.memory.0, page)).max().unwrap_or(0);
    let sum =
        |page: u64| demands.iter().fold(largest(page), |sum, demand| sum.saturating_add(up(demand.memory.0, page)));
    let alone = demands.len() + usize::from(!spare_of.is_empty()) <= 1;
    let granule = if alone || sum(small) < large { small } else { large };
    let share = |demand: &Demand| Share {
        name: demand.name.clone(),
        cpus: demand.cpus,
        memory: MemoryMib(up(demand.memory.0, granule)),
    };
    let spare_cpus = spare_of.iter().map(|demand| demand.cpus).max().unwrap_or(0);
    Needs {
        cpus: demands.iter().fold(u64::from(spare_cpus), |sum, demand| sum.saturating_add(u64::from(demand.cpus))),
        memory: sum(granule),
        asked: sum(1),
        granule,
        shares: demands.iter().map(share).collect(),
        spare: Spare { cpus: spare_cpus, memory: MemoryMib(largest(granule)) },
    }
}
