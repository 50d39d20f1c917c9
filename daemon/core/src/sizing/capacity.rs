//! What of a host can be had for enclaves: whole cores of one memory node, never CPU 0's, and the memory of that node, less the
//! reserve.

use super::instance_types::InstanceSize;
use super::{Reserve, instance_types};
use crate::failure::Failure;
use crate::id::MemoryMib;
use crate::inventory::{CpuSet, Inventory, known};
use crate::observed::Observation;
use std::collections::{BTreeMap, BTreeSet};

/// The smallest pages that an enclave's memory can be made of, in KiB.
const SMALLEST_PAGE_KIB: u64 = 2048;
/// The largest, in KiB.
const LARGEST_PAGE_KIB: u64 = 1 << 20;
/// What firmware and kernel take at most of an instance's nominal memory before the kernel counts it: one part in so many.
const NOMINAL_LOSS: u64 = 16;

/// What of a host can be had for enclaves.
///
/// The driver's pool lies in one memory node, so all enclaves together share one node's CPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// CPUs of the host that are in use: online, or in the driver's pool.
    pub cpus: u32,
    /// Threads of a core.
    pub threads_per_core: u32,
    /// What stays with the parent.
    pub reserve: Reserve,
    /// The memory nodes: that of the pool that is there first, as moving a pool costs a restart of the allocator; then the one with
    /// most room.
    pub nodes: Vec<NodeCapacity>,
    /// The instance type, where it is known.
    pub instance_type: Option<String>,
}

/// What one memory node has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCapacity {
    /// Its number.
    pub node: u32,
    /// Its cores that enclaves may have, the highest CPUs first: the parent keeps the low ones, which boot and interrupts use.
    pub cores: Vec<CpuSet>,
    /// All of its memory, as the kernel has it.
    pub memory: MemoryMib,
    /// Sizes of hugepages that it can have, in MiB, smallest first. 2 MiB is always among them on a host that runs enclaves.
    pub pages_mib: Vec<u64>,
}

impl Capacity {
    /// Of a host as it was seen.
    ///
    /// # Errors
    /// What is not known of it and has to be.
    pub fn of(inventory: &Inventory, reserve: Reserve) -> Result<Self, Failure> {
        let cpus = known(&inventory.cpus)?;
        // Without a driver there is no pool; then offline CPUs are just that.
        let none = CpuSet::default();
        let pool = inventory.pool.known().unwrap_or(&none);
        let ours: BTreeSet<u32> = cpus
            .iter()
            .filter(|(number, cpu)| cpu.online || pool.contains(**number))
            .map(|(number, _)| *number)
            .collect();
        let first = cpus.get(&0).ok_or_else(|| Failure::new("the kernel shows no CPU 0"))?;
        let first = known(&first.core)?;
        // Cores whose CPUs are all there, all on one node, and all known to be so.
        let mut cores: BTreeMap<u32, BTreeSet<CpuSet>> = BTreeMap::new();
        for number in &ours {
            let Some(core) = cpus.get(number).and_then(|cpu| cpu.core.known()) else { continue };
            let nodes: Option<BTreeSet<u32>> =
                core.iter().map(|cpu| cpus.get(&cpu).and_then(|cpu| cpu.node.known().copied())).collect();
            let node = match nodes.as_ref().map(|nodes| (nodes.first(), nodes.len())) {
                Some((Some(node), 1)) => *node,
                _ => continue,
            };
            let whole = core.iter().all(|cpu| ours.contains(&cpu)) && core.len() == first.len();
            if whole && core.is_disjoint(first) {
                cores.entry(node).or_default().insert(core.clone());
            }
        }
        let mut unknown = None;
        let mut nodes = Vec::new();
        for (number, node) in known(&inventory.nodes)? {
            let (total, pages) = match (&node.total_kib, &node.hugepages) {
                (Observation::Known(total), Observation::Known(pages)) => (*total, pages),
                (Observation::Unknown(failure), _) | (_, Observation::Unknown(failure)) => {
                    unknown = Some(failure.clone());
                    continue;
                }
            };
            let usable = |size: &u64| (SMALLEST_PAGE_KIB..=LARGEST_PAGE_KIB).contains(size);
            let pages_mib: Vec<u64> = pages.keys().copied().filter(usable).map(|size| size / 1024).collect();
            if pages_mib.is_empty() {
                unknown = Some(Failure::new(format!("memory node {number} can have no hugepages of 2 MiB to 1 GiB")));
                continue;
            }
            let cores = cores.remove(number).unwrap_or_default().into_iter().rev().collect();
            nodes.push(NodeCapacity { node: *number, cores, memory: MemoryMib(total / 1024), pages_mib });
        }
        if nodes.is_empty() {
            return Err(unknown.unwrap_or_else(|| Failure::new("the kernel shows no memory nodes")));
        }
        let cpus = u32::try_from(ours.len()).unwrap_or(u32::MAX);
        let instance_type = inventory.instance_type.known().cloned();
        let mut capacity = Self::new(cpus, first.len(), reserve, nodes, instance_type);
        let present = inventory.pool_nodes().unwrap_or_default();
        // Stable: the others stay in their order.
        capacity.nodes.sort_by_key(|node| !present.contains(&node.node));
        Ok(capacity)
    }

    /// Of an instance that is not there, by the table: a little less than its nominal memory.
    pub fn nominal(size: &InstanceSize, reserve: Reserve) -> Self {
        let count = size.nodes.max(1);
        let threads = size.threads_per_core.max(1);
        let cores = size.vcpus / threads;
        let memory = size.memory_gib * 1024 / u64::from(count);
        let node = |node: u32| {
            let of_node = (node * cores / count)..((node + 1) * cores / count);
            let core = |core: u32| CpuSet::new((0..threads).map(|thread| core + thread * cores));
            NodeCapacity {
                node,
                cores: of_node.filter(|core| *core != 0).rev().filter_map(core).collect(),
                memory: MemoryMib(memory - memory / NOMINAL_LOSS),
                pages_mib: vec![SMALLEST_PAGE_KIB / 1024, LARGEST_PAGE_KIB / 1024],
            }
        };
        Self::new(size.vcpus, threads, reserve, (0..count).map(node).collect(), Some(size.name.to_owned()))
    }

    pub(super) fn new(
        cpus: u32,
        threads_per_core: u32,
        reserve: Reserve,
        nodes: Vec<NodeCapacity>,
        instance_type: Option<String>,
    ) -> Self {
        let mut capacity = Self { cpus, threads_per_core: threads_per_core.max(1), reserve, nodes, instance_type };
        let mut nodes = std::mem::take(&mut capacity.nodes);
        nodes.sort_by_key(|node| {
            let (cpus, memory) = capacity.budget(node);
            std::cmp::Reverse((memory, cpus, node.node))
        });
        capacity.nodes = nodes;
        capacity
    }

    /// What enclaves may have on that node: CPUs of whole cores, and memory in whole small pages.
    pub fn budget(&self, node: &NodeCapacity) -> (u32, MemoryMib) {
        let of_node = node.cores.iter().fold(0_u32, |sum, core| sum.saturating_add(core.len()));
        let beyond_reserve = self.cpus.saturating_sub(self.reserve.cpus);
        let cpus = of_node.min(beyond_reserve - beyond_reserve % self.threads_per_core);
        let memory = node.memory.0.saturating_sub(self.reserve.memory.0);
        (cpus, MemoryMib(memory - memory % node.smallest_page()))
    }

    /// The instance's entry in the table, where it has one.
    pub fn size(&self) -> Option<InstanceSize> {
        self.instance_type.as_deref().and_then(instance_types::find)
    }
}

impl NodeCapacity {
    /// In MiB.
    pub(super) fn smallest_page(&self) -> u64 {
        self.pages_mib.first().copied().unwrap_or(SMALLEST_PAGE_KIB / 1024).max(1)
    }

    /// In MiB.
    pub(super) fn largest_page(&self) -> u64 {
        self.pages_mib.last().copied().unwrap_or(SMALLEST_PAGE_KIB / 1024).max(1)
    }

    /// That many of its CPUs, in whole cores; `None` if it does not have so many.
    pub(super) fn take(&self, cpus: u32) -> Option<CpuSet> {
        let mut taken = CpuSet::default();
        for core in &self.cores {
            if taken.len() >= cpus {
                break;
            }
            taken.extend(core);
        }
        (taken.len() == cpus).then_some(taken)
    }
}
