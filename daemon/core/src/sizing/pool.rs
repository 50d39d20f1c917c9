//! What the allocator is to reserve for the wanted enclaves, and whether the pool has to change for it.

use super::admit::{admit, needs};
use super::{Capacity, Demand, NodeCapacity, Refusal};
use crate::allocator_file::{CpuRequest, Reservation};
pub use crate::desired::PoolPolicy;
use crate::failure::Failure;
use crate::id::MemoryMib;
use crate::inventory::{CpuSet, Inventory, known};
use crate::observed::Observation;

/// What is said of a change that brings no wanted enclave what it lacks.
pub const NOT_URGENT: &str =
    "all that is wanted has room, so it is changed at the next boot, before anything is launched";

/// Less than everything beyond the reserve is good enough by one part in so many: memory that is in pieces is not worth a restart.
const GOOD_ENOUGH: u64 = 16;

/// A pool that would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedPool {
    /// By what it was made.
    pub policy: PoolPolicy,
    /// What is asked for.
    pub wish: Reservation,
    /// The least that all wanted enclaves run with, if the wish can't be had: without room for updates, which wait then. `None`: no
    /// enclave is wanted.
    pub least: Option<Reservation>,
    /// The memory node.
    pub node: u32,
    /// Less memory than this is worth another try.
    enough: MemoryMib,
    /// More memory than this is more than was asked for.
    most: MemoryMib,
}

/// The pool as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolNow {
    /// The driver's CPUs.
    pub cpus: CpuSet,
    /// Their node; `None` without any CPUs.
    pub node: Option<u32>,
    /// Hugepages on their node; without any CPUs, on all nodes.
    pub memory: MemoryMib,
}

/// What is to be done about the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolChange {
    /// Nothing: it has what is wanted.
    Nothing,
    /// It can be changed now.
    Due {
        /// To what.
        to: WantedPool,
        /// Whether some wanted enclave has no room until then. If not, nothing is amiss.
        urgent: bool,
    },
    /// It is to be changed, but can't be: an enclave runs, or may run.
    Waits {
        /// To what.
        to: WantedPool,
        /// Whether some wanted enclave has no room until then. If not, nothing is amiss.
        urgent: bool,
        /// Why it waits, and what would end that.
        why: String,
    },
}

/// What the allocator is to reserve; `None`: nothing.
///
/// # Errors
/// The enclaves do not fit the host.
pub fn wanted(policy: PoolPolicy, capacity: &Capacity, demands: &[Demand]) -> Result<Option<WantedPool>, Refusal> {
    let admission = if demands.is_empty() { None } else { Some(admit(capacity, demands)?) };
    // Where the enclaves are to be; if there are none, the node of the pool that is there, or the one with most room.
    let node = match &admission {
        Some(admission) => capacity.nodes.iter().find(|node| node.node == admission.node),
        None => capacity.nodes.first(),
    };
    let Some(node) = node else { return Ok(None) };
    let least = admission.as_ref().and_then(|_| {
        let needs = needs(node, demands, &[]);
        reservation(capacity, node, u32::try_from(needs.cpus).ok()?, MemoryMib(needs.memory))
    });
    let wish = match policy {
        PoolPolicy::Exact => {
            admission.and_then(|admission| reservation(capacity, node, admission.cpus, admission.memory))
        }
        PoolPolicy::All => {
            let (cpus, memory) = capacity.budget(node);
            reservation(capacity, node, cpus, memory).filter(|_| memory.0 > 0)
        }
    };
    let Some(wish) = wish else { return Ok(None) };
    let most = most(capacity, Some(node.node), wish.memory_mib);
    let enough = match policy {
        PoolPolicy::Exact => wish.memory_mib,
        PoolPolicy::All => MemoryMib(wish.memory_mib.0 - wish.memory_mib.0 / GOOD_ENOUGH),
    };
    let enough = enough.max(least.as_ref().map_or(MemoryMib(0), |least| least.memory_mib));
    Ok(Some(WantedPool { policy, wish, least, node: node.node, enough, most }))
}

/// By count on a host with one memory node, where the allocator's choice is as good as any; by name where the node matters. `None`
/// for no CPUs at all, which the allocator refuses.
fn reservation(capacity: &Capacity, node: &NodeCapacity, cpus: u32, memory_mib: MemoryMib) -> Option<Reservation> {
    let chosen = node.take(cpus).filter(|cpus| !cpus.is_empty())?;
    let cpus = if capacity.nodes.len() == 1 { CpuRequest::Count(cpus) } else { CpuRequest::Pool(chosen) };
    Some(Reservation { cpus, memory_mib })
}

/// With how much memory a pool is still the one that was asked for: a large page more, but never at the cost of the parent's reserve,
/// beyond which is only what rounding up to pages takes.
fn most(capacity: &Capacity, node: Option<u32>, memory: MemoryMib) -> MemoryMib {
    let Some(node) = capacity.nodes.iter().find(|of| node.is_none_or(|node| of.node == node)) else { return memory };
    let allowed = capacity.budget(node).1.0.saturating_add(node.smallest_page());
    MemoryMib(memory.0.saturating_add(node.largest_page()).min(allowed)).max(memory)
}

impl PoolNow {
    /// As it was seen.
    ///
    /// # Errors
    /// What could not be seen.
    pub fn of(inventory: &Inventory) -> Result<Self, Failure> {
        let cpus = known(&inventory.pool)?.clone();
        let mut nodes = inventory.pool_nodes()?;
        let node = nodes.first().copied();
        if nodes.is_empty() {
            nodes = known(&inventory.nodes)?.keys().copied().collect();
        }
        let mut memory = 0_u64;
        for node in nodes {
            memory = memory.saturating_add(inventory.hugepages_on(node)?.0.0);
        }
        Ok(Self { cpus, node, memory: MemoryMib(memory) })
    }

    /// Whether it has room for that, on whatever node and with whatever CPUs it is.
    pub fn has(&self, reservation: &Reservation) -> bool {
        self.cpus.len() >= reservation.cpus.count() && self.memory >= reservation.memory_mib
    }

    /// Whether restarting the allocator for that pool would bring nothing that is worth it.
    pub fn is(&self, wanted: &WantedPool) -> bool {
        self.is_between(&wanted.wish, Some(wanted.node), wanted.enough, wanted.most)
    }

    /// Whether it is what somebody asked for who knows no more than that.
    ///
    /// # Errors
    /// What could not be seen.
    pub fn is_just(&self, wish: &Reservation, inventory: &Inventory, capacity: &Capacity) -> Result<bool, Failure> {
        let node = node_of(inventory, wish)?;
        let most = most(capacity, node.or(self.node), wish.memory_mib);
        Ok(self.is_between(wish, node, wish.memory_mib, most))
    }

    /// By count and node: which CPUs of a node they are makes no difference to an enclave.
    fn is_between(&self, wish: &Reservation, node: Option<u32>, enough: MemoryMib, most: MemoryMib) -> bool {
        self.cpus.len() == wish.cpus.count()
            && node.is_none_or(|node| self.node.is_none_or(|now| now == node))
            && (enough..=most).contains(&self.memory)
    }
}

/// Whether that can be reserved on the host and leaves it its reserve: whole cores of one memory node without CPU 0's, and no more
/// memory than that node has beyond the reserve. Whoever is asked to reserve something checks it with this, whatever was promised.
///
/// # Errors
/// Which bound it is beyond, in numbers.
pub fn within(capacity: &Capacity, reservation: &Reservation) -> Result<(), Failure> {
    let count = reservation.cpus.count();
    let threads = capacity.threads_per_core;
    if count == 0 || !count.is_multiple_of(threads) {
        return Err(Failure::new(format!(
            "{reservation} can't be reserved: the CPUs must be whole cores, here of {threads} each"
        )));
    }
    if reservation.memory_mib.0 == 0 {
        return Err(Failure::new(format!("{reservation} can't be reserved: there must be some memory")));
    }
    let mut can = Vec::new();
    for node in &capacity.nodes {
        let (cpus, memory) = capacity.budget(node);
        let chosen = match &reservation.cpus {
            CpuRequest::Count(_) => true,
            CpuRequest::Pool(pool) => {
                let whole = node.cores.iter().filter(|core| core.is_subset(pool)).map(CpuSet::len).sum::<u32>();
                whole == pool.len()
            }
        };
        if chosen && count <= cpus && reservation.memory_mib <= memory {
            return Ok(());
        }
        can.push(format!("{cpus} CPUs and {memory} on memory node {}", node.node));
    }
    let reserve = &capacity.reserve;
    Err(Failure::new(format!(
        "{reservation} can't be reserved: that must be whole cores of one memory node, without CPU 0's, and leave the parent {} CPUs \
         and {}; there are {}",
        reserve.cpus,
        reserve.memory,
        can.join(", ")
    )))
}

/// The nodes whose hugepages a move of the pool to the node of those CPUs would leave behind. The stock allocator sets the pages of
/// the new pool's node only, so the old node's stay reserved: neither the parent nor an enclave could use them. A node's pages count
/// while the pool's CPUs lie on it; whose the pages of other nodes are can't be told from here ([`stray_pages`]).
///
/// # Errors
/// What could not be seen, or that somebody uses pages there, so that they are not the pool's alone to give back.
pub fn left_behind(inventory: &Inventory, reservation: &Reservation) -> Result<Vec<u32>, Failure> {
    let Some(to) = node_of(inventory, reservation)? else { return Ok(Vec::new()) };
    let mut left = Vec::new();
    for from in inventory.pool_nodes()?.into_iter().filter(|node| *node != to) {
        let (memory, free) = inventory.hugepages_on(from)?;
        if free < memory {
            return Err(Failure::new(format!(
                "{reservation} would move the pool from memory node {from} to {to}, and of the {memory} in hugepages on node {from} \
                 only {free} are free: somebody uses the rest"
            ))
            .with_remedy(format!("end what uses them, or reserve CPUs of node {from}")));
        }
        if memory.0 > 0 {
            left.push(from);
        }
    }
    Ok(left)
}

/// Hugepages on a node where no enclave will be. Nobody but whoever made them can tell whose they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StrayPages {
    /// The node.
    pub node: u32,
    /// All there are.
    pub memory: MemoryMib,
    /// Those that nobody uses.
    pub free: MemoryMib,
}

impl StrayPages {
    /// What an operator should know of them.
    pub fn failure(&self) -> Failure {
        let Self { node, memory, free } = self;
        Failure::new(format!(
            "{memory} in hugepages on memory node {node} are for no enclave, as all enclaves are on another node; {free} of them are \
             used by nobody"
        ))
        .with_remedy(format!(
            "unless somebody else reserved them, free them: write 0 to every \
             /sys/devices/system/node/node{node}/hugepages/*/nr_hugepages"
        ))
    }
}

/// The hugepages that lie neither on that node, where the enclaves are to be, nor on the node of the pool as it is (which a change of
/// the pool takes care of).
///
/// # Errors
/// What could not be seen.
pub fn stray_pages(inventory: &Inventory, node: u32) -> Result<Vec<StrayPages>, Failure> {
    let pool = inventory.pool_nodes()?;
    let mut stray = Vec::new();
    for number in known(&inventory.nodes)?.keys().filter(|number| **number != node && !pool.contains(number)) {
        let (memory, free) = inventory.hugepages_on(*number)?;
        if memory.0 > 0 {
            stray.push(StrayPages { node: *number, memory, free });
        }
    }
    Ok(stray)
}

/// The memory node on which that is to be, as far as it says so; by count on a host with several the allocator chooses.
///
/// # Errors
/// What could not be seen.
pub fn node_of(inventory: &Inventory, reservation: &Reservation) -> Result<Option<u32>, Failure> {
    let cpus = match &reservation.cpus {
        CpuRequest::Count(_) => return Ok(None),
        CpuRequest::Pool(cpus) => cpus,
    };
    let Some(first) = cpus.iter().next() else { return Ok(None) };
    let cpu = known(&inventory.cpus)?.get(&first);
    let cpu =
        cpu.ok_or_else(|| Failure::new(format!("{reservation} names CPU {first}, which the kernel does not know")))?;
    known(&cpu.node).copied().map(Some)
}

/// How much of the hugepages is in use where the allocator would take them away: on the node of the pool, and on the one that
/// reservation is for. An enclave that boots has taken its memory before anything else tells of it.
///
/// # Errors
/// What could not be seen.
pub fn in_use(inventory: &Inventory, reservation: &Reservation) -> Result<MemoryMib, Failure> {
    let mut nodes = inventory.pool_nodes()?;
    nodes.extend(node_of(inventory, reservation)?);
    if nodes.is_empty() {
        nodes.extend(known(&inventory.nodes)?.keys());
    }
    nodes.sort_unstable();
    nodes.dedup();
    nodes
        .into_iter()
        .try_fold(MemoryMib(0), |sum, node| Ok(MemoryMib(sum.0.saturating_add(inventory.hugepages_in_use_on(node)?.0))))
}

/// What is to be done to have that pool. `running`: how many enclaves run, whoever started them. `in_use`: as [`in_use`] says.
pub fn change(
    wanted: Option<WantedPool>,
    now: &PoolNow,
    running: &Observation<u32>,
    in_use: &Result<MemoryMib, Failure>,
) -> PoolChange {
    let Some(wanted) = wanted.filter(|wanted| !now.is(wanted)) else { return PoolChange::Nothing };
    let urgent = wanted.least.as_ref().is_some_and(|least| !now.has(least));
    let only = "the allocator changes the pool only when none does";
    let ended = "it is changed once all have ended";
    let (why, until) = match (running, in_use) {
        (Observation::Known(0), Ok(MemoryMib(0))) => return PoolChange::Due { to: wanted, urgent },
        (Observation::Known(0), Ok(memory)) => (
            format!(
                "{memory} of the hugepages are in use, by whom is not known, and the allocator would take them away"
            ),
            "it is changed once nobody uses any",
        ),
        (Observation::Unknown(failure), _) | (Observation::Known(0), Err(failure)) => {
            (format!("whether an enclave runs is not known ({}), and {only}", failure.message), ended)
        }
        (Observation::Known(1), _) => (format!("1 enclave runs, and {only}"), ended),
        (Observation::Known(count), _) => (format!("{count} enclaves run, and {only}"), ended),
    };
    PoolChange::Waits { to: wanted, urgent, why: format!("{why}; {}", if urgent { until } else { NOT_URGENT }) }
}

/// What to put on the kernel's command line to have that much memory in hugepages from the boot on, before anything is in pieces.
/// On a host with several memory nodes the kernel spreads them over all; `node` says on which they are wanted, which Linux
/// understands from 5.16 on. `pages_mib`: the sizes of pages that the node can have, in MiB.
pub fn kernel_arguments(memory: MemoryMib, pages_mib: &[u64], node: Option<u32>) -> String {
    let mut sizes: Vec<u64> = pages_mib.iter().copied().filter(|size| *size > 0).collect();
    sizes.sort_unstable();
    let smallest = sizes.first().copied();
    let mut rest = memory.0;
    let mut arguments = Vec::new();
    for size in sizes.into_iter().rev() {
        let pages = if Some(size) == smallest { rest.div_ceil(size) } else { rest / size };
        rest = rest.saturating_sub(pages.saturating_mul(size));
        if pages > 0 {
            let unit = if size.is_multiple_of(1024) { format!("{}G", size / 1024) } else { format!("{size}M") };
            let place = node.map_or(String::new(), |node| format!("{node}:"));
            arguments.push(format!("hugepagesz={unit} hugepages={place}{pages}"));
        }
    }
    arguments.join(" ")
}
