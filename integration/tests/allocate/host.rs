//! A recorded host, and a stand-in for the stock service that changes it as the real one does: it follows the same file, sets all
//! hugepages of the node to zero first, takes large pages first, and can say one thing and do another.

use enclaved::allocate::service::StockService;
use enclaved::allocate::{Did, FORMAT, Places, Report, Request, allocate};
use enclaved::host::inventory::{HostInventory, InventorySource, Roots};
use enclaved::systemd_bus::JobError;
use enclaved_core::allocator_file::{self, CpuRequest, Reservation};
use enclaved_core::failure::Failure;
use enclaved_core::id::{MemoryMib, Timestamp};
use enclaved_core::inventory::{CpuSet, Inventory};
use enclaved_core::sizing::Reserve;
use enclaved_integration::host_tree::HostTree;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

/// How the service fails.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    /// Memory that can be had as hugepages, in MiB, until memory is compacted.
    pub(crate) in_one_piece: Option<u64>,
    /// And afterwards.
    pub(crate) after_compaction: Option<u64>,
    /// It takes only CPUs that are named.
    pub(crate) no_counted_cpus: bool,
    /// It says that it failed, or that it succeeded, whatever it did.
    pub(crate) says: Option<bool>,
    /// It takes no CPUs.
    pub(crate) no_cpus: bool,
    /// systemd does not restart it, from that try on (counted from 1).
    pub(crate) refused_from: Option<u32>,
    /// It is masked.
    pub(crate) masked: bool,
    /// The bus is lost in that try, and the service works on for that many looks; `u32::MAX`: for ever.
    pub(crate) lost: Option<(u32, u32)>,
}

/// A recorded host, and the service on it.
pub(crate) struct Host {
    pub(crate) tree: HostTree,
    pub(crate) faults: Faults,
    restarts: Mutex<u32>,
    /// Looks that are left until the service is over.
    at_work: Mutex<u32>,
}

impl Host {
    pub(crate) fn new(shape: &str) -> Self {
        let tree = HostTree::unpack(shape).unwrap();
        tree.write("proc/sys/vm/compact_memory", "").unwrap();
        Self { tree, faults: Faults::default(), restarts: Mutex::new(0), at_work: Mutex::new(0) }
    }

    pub(crate) fn with(shape: &str, faults: Faults) -> Self {
        Self { faults, ..Self::new(shape) }
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.tree.path().join(file)
    }

    pub(crate) fn file(&self) -> String {
        fs::read_to_string(self.path("etc/nitro_enclaves/allocator.yaml")).unwrap()
    }

    pub(crate) fn restarts(&self) -> u32 {
        *self.restarts.lock().unwrap()
    }

    pub(crate) async fn allocate_text(&self, request: &str) -> Report {
        self.tree.write("run/request.json", request).unwrap();
        let places = Places {
            request: self.path("run/request.json"),
            allocator_file: self.path("etc/nitro_enclaves/allocator.yaml"),
            launch_lock: self.path("run/launch.lock"),
            compact_memory: self.path("proc/sys/vm/compact_memory"),
            sysfs: self.path("sys"),
        };
        let inventory = HostInventory::new(Roots::below(self.tree.path()), self.path("usr/bin/nitro-cli"));
        allocate(&places, Reserve::default(), &Kernel { host: self, inventory }, self, Timestamp::from_millis(1)).await
    }

    pub(crate) async fn allocate(&self, wish: Reservation, least: Option<Reservation>) -> Report {
        let request = Request { format: FORMAT, id: 7, wish, least };
        let report = self.allocate_text(&serde_json::to_string(&request).unwrap()).await;
        assert_eq!(report.request, Some(request));
        report
    }

    /// The enclave of the recorded host has ended.
    pub(crate) fn end_enclaves(&self) {
        self.tree.write("proc/net/unix", "").unwrap();
        self.set_pages(0, 2048, 256);
    }

    pub(crate) fn set_pages(&self, node: u32, kib: u64, count: u64) {
        for file in ["nr_hugepages", "free_hugepages"] {
            let folder = format!("sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB");
            self.tree.write(&format!("{folder}/{file}"), &format!("{count}\n")).unwrap();
        }
    }

    /// What the script does with CPUs named or counted: all on node 0 here, the lowest first, whole cores but CPU 0's.
    pub(crate) fn set_pool(&self, cpus: &CpuRequest) {
        let list = match cpus {
            CpuRequest::Pool(cpus) => cpus.to_string(),
            CpuRequest::Count(count) => {
                let half = self.cpus() / 2;
                let cores = (1..=count / 2).flat_map(|core| [core, core + half]);
                cores.map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",")
            }
        };
        self.tree.write("sys/module/nitro_enclaves/parameters/ne_cpus", &format!("{list}\n")).unwrap();
    }

    pub(crate) fn cpus(&self) -> u32 {
        let present = fs::read_to_string(self.path("sys/devices/system/cpu/present")).unwrap();
        present.trim().strip_prefix("0-").unwrap().parse::<u32>().unwrap() + 1
    }
}

/// The tree as a kernel would show it: pages that are given back are not free any more.
pub(crate) struct Kernel<'a> {
    host: &'a Host,
    inventory: HostInventory,
}

impl InventorySource for Kernel<'_> {
    async fn read(&self) -> Inventory {
        for pages in ["node0", "node1"].iter().flat_map(|node| [(node, 2048), (node, 1_048_576)]) {
            let folder = format!("sys/devices/system/node/{}/hugepages/hugepages-{}kB", pages.0, pages.1);
            let count = |file: &str| -> Option<u64> {
                fs::read_to_string(self.host.path(&format!("{folder}/{file}"))).ok()?.trim().parse().ok()
            };
            if let (Some(all), Some(free)) = (count("nr_hugepages"), count("free_hugepages")) {
                self.host.tree.write(&format!("{folder}/free_hugepages"), &format!("{}\n", free.min(all))).unwrap();
            }
        }
        self.inventory.read().await
    }
}

impl StockService for Host {
    async fn can_run(&self) -> Result<(), Failure> {
        if self.faults.masked { Err(Failure::new("Unit is masked")) } else { Ok(()) }
    }

    async fn restart(&self, _patience: Duration) -> Result<(), JobError> {
        assert_eq!(*self.at_work.lock().unwrap(), 0, "it is restarted while it is at work");
        let number = *self.restarts.lock().unwrap() + 1;
        if self.faults.refused_from.is_some_and(|from| number >= from) {
            return Err(JobError::NotRun(Failure::new("systemd is busy")));
        }
        *self.restarts.lock().unwrap() = number;
        let wanted = allocator_file::check(&self.file()).outcome.unwrap();
        let node = match &wanted.cpus {
            CpuRequest::Pool(cpus) if self.cpus() > 64 => u32::from(cpus.contains(24)),
            _ => 0,
        };
        let compacted = fs::read_to_string(self.path("proc/sys/vm/compact_memory")).unwrap() == "1\n";
        let limit = if compacted { self.faults.after_compaction } else { self.faults.in_one_piece };
        let had = wanted.memory_mib.0 <= limit.unwrap_or(u64::MAX);
        let memory = if had { wanted.memory_mib.0 } else { 0 };
        self.set_pages(node, 1_048_576, memory / 1024);
        self.set_pages(node, 2048, (memory % 1024).div_ceil(2));
        let none = CpuRequest::Pool(CpuSet::default());
        let counted = matches!(wanted.cpus, CpuRequest::Count(_));
        let takes = had && !self.faults.no_cpus && !(counted && self.faults.no_counted_cpus);
        self.set_pool(if takes { &wanted.cpus } else { &none });
        if let Some((_, looks)) = self.faults.lost.filter(|(of, _)| *of == number) {
            *self.at_work.lock().unwrap() = looks;
            return Err(JobError::Unknown(Failure::new("the connection ended")));
        }
        if self.faults.says.unwrap_or(had) { Ok(()) } else { Err(JobError::Failed(Failure::new("restarting: failed"))) }
    }

    async fn at_rest(&self) -> Result<bool, Failure> {
        let mut left = self.at_work.lock().unwrap();
        match *left {
            0 => Ok(true),
            u32::MAX => Ok(false),
            _ => {
                *left -= 1;
                Err(Failure::new("the bus is away"))
            }
        }
    }

    async fn journal(&self, lines: u32) -> Result<Vec<String>, Failure> {
        Ok(vec![format!("the last {lines} lines")])
    }
}

pub(crate) fn count(cpus: u32, memory: u64) -> Reservation {
    Reservation { cpus: CpuRequest::Count(cpus), memory_mib: MemoryMib(memory) }
}

pub(crate) fn why(report: &Report) -> String {
    assert_eq!(report.did, Did::Failed);
    report.failure.as_ref().unwrap().to_string()
}
