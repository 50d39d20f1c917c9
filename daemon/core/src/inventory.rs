//! What a host is made of, as far as it matters to enclaves: CPUs and their cores, memory and hugepages of each node, the
//! driver, its CPU pool, its device, and the tools. One value; reading the host happens in the daemon's `host::inventory`.
//!
//! Whatever could not be read is `Unknown` with its reason, never a zero, never "no".

mod cpu_set;
pub mod parse;
mod topology;

pub use cpu_set::{BadCpuSet, CpuSet, MAX_CPUS};
pub use topology::{SeenCpu, topology};

use crate::allocator_file::FileReport;
use crate::failure::Failure;
use crate::id::MemoryMib;
use crate::observed::Observation;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// All that was seen of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// The EC2 instance type, as the firmware names it (DMI `product_name`): `m5.xlarge`.
    pub instance_type: Observation<String>,
    /// Every CPU that is present, online or not, by its number.
    pub cpus: Observation<BTreeMap<u32, Cpu>>,
    /// The memory nodes, by their number. A host without NUMA has node 0.
    pub nodes: Observation<BTreeMap<u32, Node>>,
    /// Whether the nitro_enclaves driver is loaded.
    pub driver_loaded: Observation<bool>,
    /// The CPUs that the driver has taken offline for enclaves, used or not (`ne_cpus`).
    pub pool: Observation<CpuSet>,
    /// `/dev/nitro_enclaves`.
    pub device: Observation<Device>,
    /// What `nitro-cli --version` says.
    pub nitro_cli: Observation<String>,
    /// `nitro-enclaves-allocator.service`, as far as files tell.
    pub allocator_service: Observation<AllocatorService>,
    /// What the allocator would make of `/etc/nitro_enclaves/allocator.yaml`; `None`: there is no such file.
    pub allocator_file: Observation<Option<FileReport>>,
    /// How many processes of running enclaves there are, by their listening control sockets.
    pub enclaves: Observation<u32>,
}

/// One CPU (a vCPU, a hardware thread).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Whether the parent uses it. CPUs in the driver's pool are offline.
    pub online: bool,
    /// Its NUMA node.
    pub node: Observation<u32>,
    /// The threads of its core, itself among them. The kernel shows them of online CPUs only; of offline ones they follow
    /// from how the online ones are numbered.
    pub core: Observation<CpuSet>,
}

/// One memory node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// All of its memory, in KiB, as the kernel has it (`MemTotal`): some percent below the nominal amount.
    pub total_kib: Observation<u64>,
    /// What is free of it, in KiB. Hugepages are not, whether used or not.
    pub free_kib: Observation<u64>,
    /// Its hugepages, by their size in KiB. A size without pages is one that could be had.
    pub hugepages: Observation<BTreeMap<u64, Hugepages>>,
}

/// The hugepages of one size on one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Hugepages {
    /// All there are.
    pub total: u64,
    /// Those that nobody uses.
    pub free: u64,
    /// Those beyond the reserved number, which go away once they are free. Not for enclaves to count on.
    pub surplus: u64,
}

/// `/dev/nitro_enclaves`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Device {
    /// It is not there: the instance was started without enclaves, or the driver is not loaded.
    Absent,
    /// It is there.
    Present {
        /// Permission bits (`0o660`).
        mode: u32,
        /// The owner.
        uid: u32,
        /// The group: `ne`'s, on a host that is set up.
        gid: u32,
        /// Whether it is a character device, and not something left in its place.
        character_device: bool,
        /// Whether whoever looked may open it for reading and writing; if not, why.
        #[serde(serialize_with = "serialize_openable")]
        openable: Result<(), String>,
    },
}

/// The stock allocator's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AllocatorService {
    /// Its unit file is there.
    pub installed: bool,
    /// It is started at boot.
    pub enabled: bool,
}

impl Hugepages {
    /// Those that were asked for: all but surplus ones.
    pub fn reserved(&self) -> u64 {
        self.total.saturating_sub(self.surplus)
    }
}

impl Inventory {
    /// Hugepages of all sizes on that node, without surplus ones: all, and free.
    ///
    /// # Errors
    /// What could not be read.
    pub fn hugepages_on(&self, node: u32) -> Result<(MemoryMib, MemoryMib), Failure> {
        let nodes = known(&self.nodes)?;
        let node = nodes.get(&node).ok_or_else(|| Failure::new(format!("there is no memory node {node}")))?;
        let (mut all, mut free) = (0_u64, 0_u64);
        for (size, pages) in known(&node.hugepages)? {
            all = all.saturating_add(pages.reserved().saturating_mul(*size));
            free = free.saturating_add(pages.free.saturating_mul(*size));
        }
        Ok((MemoryMib(all / 1024), MemoryMib(free.min(all) / 1024)))
    }

    /// Hugepages of all sizes on that node that somebody uses, surplus ones among them.
    ///
    /// # Errors
    /// What could not be read.
    pub fn hugepages_in_use_on(&self, node: u32) -> Result<MemoryMib, Failure> {
        let nodes = known(&self.nodes)?;
        let node = nodes.get(&node).ok_or_else(|| Failure::new(format!("there is no memory node {node}")))?;
        let used = |(size, pages): (&u64, &Hugepages)| pages.total.saturating_sub(pages.free).saturating_mul(*size);
        let kib = known(&node.hugepages)?.iter().map(used).fold(0_u64, u64::saturating_add);
        Ok(MemoryMib(kib.div_ceil(1024)))
    }

    /// The nodes of the CPUs in the pool: one on every host, for the driver takes no others; none for an empty pool.
    ///
    /// # Errors
    /// What could not be read.
    pub fn pool_nodes(&self) -> Result<Vec<u32>, Failure> {
        let cpus = known(&self.cpus)?;
        let mut nodes = Vec::new();
        for cpu in known(&self.pool)?.iter() {
            let cpu = cpus.get(&cpu).ok_or_else(|| {
                Failure::new(format!("the driver's pool names CPU {cpu}, which the kernel does not know"))
            })?;
            let node = known(&cpu.node)?;
            if !nodes.contains(node) {
                nodes.push(*node);
            }
        }
        Ok(nodes)
    }
}

/// The value.
///
/// # Errors
/// Why it is not known.
pub fn known<T>(observation: &Observation<T>) -> Result<&T, Failure> {
    match observation {
        Observation::Known(value) => Ok(value),
        Observation::Unknown(failure) => Err(failure.clone()),
    }
}

/// What is known stands as it is; what is not, as `{"unknown": {...}}`.
impl<T: Serialize> Serialize for Observation<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Known(value) => value.serialize(serializer),
            Self::Unknown(failure) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("unknown", failure)?;
                map.end()
            }
        }
    }
}

/// `true`, or the reason why not.
fn serialize_openable<S: Serializer>(openable: &Result<(), String>, serializer: S) -> Result<S::Ok, S::Error> {
    match openable {
        Ok(()) => serializer.serialize_bool(true),
        Err(reason) => serializer.serialize_str(reason),
    }
}
