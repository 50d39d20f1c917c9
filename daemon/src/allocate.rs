//! `enclaved allocate`: reserves CPUs and memory for enclaves, as root, once, and ends. It takes one small request (numbers and CPU
//! lists), believes nothing of it before it has looked at the host itself, and writes what came of it for the daemon to read.
//!
//! It decides nothing about enclaves, and starts and ends none.

mod file;
mod lock;
mod report;
mod request;
pub mod service;

pub use lock::at_work_file;
pub use report::{Did, Pool, Report};
pub use request::{FORMAT, Request};

use crate::atomic_file;
use crate::config::DEFAULT_RUN_DIR;
use crate::host::inventory::{ALLOCATOR_UNIT, HostInventory, InventorySource, MAX_SOCKETS, Roots};
use crate::systemd_bus::{JobError, SystemdBus};
use enclaved_core::allocator_file::{CpuRequest, Reservation};
use enclaved_core::desired::AllocatorMode;
use enclaved_core::failure::Failure;
use enclaved_core::id::{MemoryMib, Timestamp};
use enclaved_core::inventory::Inventory;
use enclaved_core::inventory::parse::shows_the_hosts_sockets;
use enclaved_core::observed::Observation;
use enclaved_core::sizing::pool::{PoolNow, kernel_arguments, left_behind, node_of, within};
use enclaved_core::sizing::{Capacity, Reserve};
use service::StockService;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How many lines of the stock service's journal go into the report.
const JOURNAL_LINES: u32 = 20;
/// Hugepages beyond what was asked for that do not make another pool of it: one large page.
const ONE_LARGE_PAGE: u64 = 1024;

/// Where the report is: in a folder in which only root can write.
pub const REPORT: &str = "/run/enclaved-allocator/report.json";
/// The name of the request in the daemon's run directory.
pub const REQUEST: &str = "allocate.json";

/// How the command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The host's configuration does not allow it, or can't be used: the request was not even read.
    NotAllowed(Failure),
    /// The request was looked at.
    Tried(Report),
}

/// The unit that runs this command.
pub const ALLOCATE_UNIT: &str = "enclaved-allocator.service";

/// The whole command: as the host's configuration allows it, and on the real host. The report is on disk when it returns.
/// `request`: where it is asked; by default in the folder that the configuration names.
///
/// # Errors
/// The report can't be written, or another one is at work.
pub async fn run(config: &Path, request: Option<PathBuf>, report: PathBuf) -> Result<Ended, Failure> {
    // It must be known beforehand that the report can be written.
    only_ours_for_the_report(&report)?;
    let _alone = lock::alone(&report)?;
    let _at_work = lock::show_at_work(&report).await?;
    let now = SystemTime::now().into();
    let (reserve, roots, request) = match allowed(config) {
        Ok(Allowed { reserve, roots, run_dir }) => (reserve, roots, request.unwrap_or_else(|| run_dir.join(REQUEST))),
        Err(failure) => {
            // Nothing of it is looked at; but whoever wrote it knows by it that this is the answer.
            let request = request.unwrap_or_else(|| Path::new(DEFAULT_RUN_DIR).join(REQUEST));
            let request = request::read(&request).ok();
            let refused = Report { request, failure: Some(failure.clone()), ..Report::new(now) };
            publish(&refused, &report)?;
            return Ok(Ended::NotAllowed(failure));
        }
    };
    let places = Places {
        request,
        allocator_file: enclaved_core::allocator_file::PATH.into(),
        compact_memory: roots.procfs.join("sys/vm/compact_memory"),
        sysfs: roots.sysfs.clone(),
    };
    let host = OfTheHost { sockets: roots.procfs.join("net/unix"), host: HostInventory::new(roots, "nitro-cli") };
    let done = allocate(&places, reserve, &host, &service::Systemd(SystemdBus::new()), now).await;
    publish(&done, &report)?;
    Ok(Ended::Tried(done))
}

/// The host's inventory, in which no enclave is taken for not running because this process can't see the host's sockets.
struct OfTheHost {
    sockets: PathBuf,
    host: HostInventory,
}

impl InventorySource for OfTheHost {
    async fn read(&self) -> Inventory {
        let mut inventory = self.host.read().await;
        let shown = atomic_file::read(&self.sockets, MAX_SOCKETS).ok().flatten();
        if !shown.is_some_and(|text| shows_the_hosts_sockets(&String::from_utf8_lossy(&text))) {
            inventory.enclaves = Observation::Unknown(Failure::new(format!(
                "{} does not show systemd's sockets: this process does not see those of the host",
                self.sockets.display()
            )));
        }
        inventory
    }
}

/// What the configuration says of this command.
struct Allowed {
    /// What is to be left to the parent.
    reserve: Reserve,
    roots: Roots,
    /// Where the daemon writes its requests.
    run_dir: PathBuf,
}

/// Whether the configuration makes the pool enclaved's to change, and within which bounds. Nobody else can say that: the request is
/// written by another user, and so is the last good configuration by which the daemon may run while the file is broken. A
/// configuration that can't be used so changes nothing, and neither does one that is not there.
fn allowed(config: &Path) -> Result<Allowed, Failure> {
    let manage = "host.allocator = \"manage\" in the configuration (the default under systemd) lets enclaved change it";
    if !is_there(config)? {
        return Err(Failure::new(format!("there is no {}: the pool is the administrator's", config.display()))
            .with_remedy(manage));
    }
    let config = crate::config::load(config).map_err(|errors| {
        Failure::new(format!("the configuration can't be used: {errors}"))
            .with_remedy("`enclavectl check` says whether it is right; until it is, the pool stays as it is")
    })?;
    match config.desired.host.allocator {
        AllocatorMode::External => Err(Failure::new("host.allocator is \"external\": the pool is somebody else's")),
        AllocatorMode::Verify => {
            Err(Failure::new("host.allocator is \"verify\": the pool is the administrator's").with_remedy(manage))
        }
        AllocatorMode::Manage => Ok(Allowed {
            reserve: Reserve::from(&config.desired.host),
            roots: Roots { sysfs: config.host.sysfs, ..Roots::default() },
            run_dir: config.host.run_dir,
        }),
    }
}

/// Whether there is any configuration: the file, or files in `conf.d` beside it, which no daemon runs with alone.
fn is_there(config: &Path) -> Result<bool, Failure> {
    for path in [config, &config.with_file_name("conf.d")] {
        match std::fs::symlink_metadata(path) {
            Ok(_) => return Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::new(format!("could not look at {}: {error}", path.display()))),
        }
    }
    Ok(false)
}

/// Where this process reads and writes.
#[derive(Debug, Clone)]
pub struct Places {
    /// What is asked for.
    pub request: PathBuf,
    /// The stock allocator's file.
    pub allocator_file: PathBuf,
    /// Where the kernel is asked to put its free memory together.
    pub compact_memory: PathBuf,
    /// `/sys`
    pub sysfs: PathBuf,
}

/// Reserves what is asked for. Everything that was done and seen is in the report, failures included.
pub async fn allocate<I: InventorySource, S: StockService>(
    places: &Places,
    reserve: Reserve,
    inventory: &I,
    service: &S,
    now: Timestamp,
) -> Report {
    let mut run = Run { places, inventory, service, report: Report::new(now) };
    let outcome = run.reserve(reserve).await;
    let mut report = run.report;
    match outcome {
        Ok(did) => report.did = did,
        Err(failure) => report.failure = Some(failure),
    }
    if report.restarts > 0 {
        report.journal = match service.journal(JOURNAL_LINES).await {
            Ok(lines) => lines,
            Err(failure) => vec![format!("(the journal could not be read: {failure})")],
        };
    }
    report
}

/// Why the pool is not what was asked for.
struct Shortage {
    failure: Failure,
    of_memory: bool,
}

struct Run<'a, I, S> {
    places: &'a Places,
    inventory: &'a I,
    service: &'a S,
    report: Report,
}

impl<I: InventorySource, S: StockService> Run<'_, I, S> {
    async fn reserve(&mut self, reserve: Reserve) -> Result<Did, Failure> {
        let request = request::read(&self.places.request)?;
        self.report.request = Some(request.clone());
        let Request { wish, least, .. } = request;
        let seen = self.inventory.read().await;
        let capacity = Capacity::of(&seen, reserve).map_err(|failure| Failure {
            message: format!("the host could not be sized up: {}", failure.message),
            ..failure
        })?;
        within(&capacity, &wish)?;
        if let Some(least) = &least {
            within(&capacity, least)?;
        }
        let left = left_behind(&seen, &wish)?;
        let before = PoolNow::of(&seen)?;
        self.report.before = Some(pool(&before));
        if is(&before, &wish) {
            // The next boot should find it in the file, too.
            self.write(&wish)?;
            self.report.after.clone_from(&self.report.before);
            return Ok(Did::Nothing);
        }
        nothing_runs(&seen)?;
        for node in left {
            self.free_pages(node).await?;
        }
        if self.try_to_have(&wish).await? {
            return Ok(Did::Reserved(wish));
        }
        if compact(&self.places.compact_memory).is_ok() {
            self.report.compacted = true;
        }
        if self.try_to_have(&wish).await? {
            return Ok(Did::Reserved(wish));
        }
        if let Some(least) = least.filter(|least| *least != wish) {
            let had = self.try_to_have(&least).await?;
            if had {
                return Ok(Did::Reserved(least));
            }
        }
        let shortage = self.shortage(&wish, &capacity, &seen)?;
        let kept = self.keep_former(&before, &capacity).await?;
        if shortage.of_memory {
            // So that the next boot, which is the remedy, reserves all of it.
            self.write(&wish)?;
        }
        match kept {
            Some(former) => {
                self.report.failure = Some(shortage.failure);
                Ok(Did::KeptFormer(former))
            }
            None => Err(shortage.failure),
        }
    }

    /// The pool that was there before, again if need be: a growth that failed must not cost what ran. `None`: there was none, it is
    /// not one that may be reserved, or it can't be had any more.
    async fn keep_former(&mut self, before: &PoolNow, capacity: &Capacity) -> Result<Option<Reservation>, Failure> {
        let former = Reservation { cpus: CpuRequest::Pool(before.cpus.clone()), memory_mib: before.memory };
        if before.cpus.is_empty() || within(capacity, &former).is_err() {
            return Ok(None);
        }
        // Also where it is there still: the file must not name what can't be had.
        self.write(&former)?;
        let there = self.report.after.as_ref() == Some(&pool(before)) || self.try_to_have(&former).await?;
        Ok(there.then_some(former))
    }

    /// Writes the file, restarts the stock service, and looks whether the pool is there, whatever the service says of itself.
    async fn try_to_have(&mut self, reservation: &Reservation) -> Result<bool, Failure> {
        self.write(reservation)?;
        self.report.after = None;
        let restarted = self.service.restart().await;
        if !matches!(restarted, Err(JobError::NotRun(_))) {
            self.report.restarts += 1;
        }
        self.report.service_failure = match restarted {
            Ok(()) => None,
            Err(JobError::Failed(failure)) => Some(failure),
            // Neither more free memory nor another file helps where it does not run.
            Err(JobError::NotRun(failure)) => {
                self.report.service_failure = Some(failure.clone());
                return Err(Failure {
                    message: format!("the stock allocator did not run: {}", failure.message),
                    remedy: failure.remedy.or_else(|| {
                        Some(format!("`systemctl status {ALLOCATOR_UNIT}` says why; the next restart of it reserves {reservation}"))
                    }),
                    code: None,
                });
            }
            Err(JobError::Unknown(failure)) => {
                self.report.service_failure = Some(failure.clone());
                return Err(Failure {
                    message: format!("what became of the pool is not known: {}", failure.message),
                    remedy: failure.remedy.or_else(|| Some(format!("look at `systemctl status {ALLOCATOR_UNIT}`"))),
                    code: None,
                });
            }
        };
        let seen = PoolNow::of(&self.inventory.read().await)?;
        self.report.after = Some(pool(&seen));
        Ok(is(&seen, reservation))
    }

    /// Gives back the hugepages of a node that the pool leaves: the stock service sees to those of the new node only. Nobody uses them,
    /// and they were the pool's.
    async fn free_pages(&mut self, node: u32) -> Result<(), Failure> {
        let folder = self.places.sysfs.join(format!("devices/system/node/node{node}/hugepages"));
        let failed = |error: std::io::Error| {
            Failure::new(format!("freeing the hugepages of memory node {node} in {}: {error}", folder.display()))
        };
        for size in std::fs::read_dir(&folder).map_err(failed)? {
            let pages = size.map_err(failed)?.path().join("nr_hugepages");
            std::fs::write(&pages, "0\n").map_err(failed)?;
        }
        let (left, _) = self.inventory.read().await.hugepages_on(node)?;
        if left.0 > 0 {
            return Err(Failure::new(format!("{left} in hugepages of memory node {node} could not be freed"))
                .with_remedy("reboot: the pool moves to another memory node"));
        }
        Ok(())
    }

    fn write(&mut self, reservation: &Reservation) -> Result<(), Failure> {
        let backup = file::write(&self.places.allocator_file, reservation)?;
        self.report.backup = self.report.backup.take().or(backup);
        Ok(())
    }

    fn shortage(&self, wish: &Reservation, capacity: &Capacity, seen: &Inventory) -> Result<Shortage, Failure> {
        let after = self.report.after.clone().ok_or_else(|| Failure::new("the pool was not read after the restart"))?;
        let said =
            self.report.service_failure.as_ref().map(|failure| format!(": {}", failure.message)).unwrap_or_default();
        let message = format!(
            "the allocator was asked for {wish}; the pool has {} CPUs ({}) and {} in hugepages{said}",
            after.cpus.len(),
            after.cpus,
            after.memory
        );
        if after.memory >= wish.memory_mib {
            let failure = Failure::new(message)
                .with_remedy("the journal of nitro-enclaves-allocator.service says why it refused the CPUs");
            return Ok(Shortage { failure, of_memory: false });
        }
        let node = node_of(seen, wish)?;
        let of_node = capacity.nodes.iter().find(|candidate| node.is_none_or(|node| candidate.node == node));
        let pages = of_node.map_or(&[][..], |node| &node.pages_mib);
        // Where there is one node only, it needs no name.
        let named = node.filter(|_| capacity.nodes.len() > 1);
        let arguments = kernel_arguments(wish.memory_mib, pages, named);
        let since = if named.is_some() { " (Linux 5.16 or later)" } else { "" };
        let failure = Failure::new(message).with_remedy(format!(
            "unless the journal of nitro-enclaves-allocator.service says otherwise, memory is in pieces: reboot (the file is in place, \
             and early after a boot it is in one piece), or reserve it on the kernel command line: {arguments}{since}"
        ));
        Ok(Shortage { failure, of_memory: true })
    }
}

/// Whether that reservation is there.
fn is(now: &PoolNow, reservation: &Reservation) -> bool {
    let most = reservation.memory_mib.0.saturating_add(ONE_LARGE_PAGE);
    now.has(reservation) && now.cpus.len() == reservation.cpus.count() && now.memory < MemoryMib(most)
}

fn pool(now: &PoolNow) -> Pool {
    Pool { cpus: now.cpus.clone(), memory: now.memory }
}

/// The stock service takes the CPUs and the memory of whatever runs away, or tries to: so nothing may run.
fn nothing_runs(seen: &Inventory) -> Result<(), Failure> {
    let why = match &seen.enclaves {
        Observation::Known(0) => return Ok(()),
        Observation::Known(1) => "1 enclave runs".to_owned(),
        Observation::Known(count) => format!("{count} enclaves run"),
        Observation::Unknown(failure) => format!("whether an enclave runs is not known: {}", failure.message),
    };
    Err(Failure::new(format!("{why}; what is reserved changes only while none does"))
        .with_remedy("it is tried again when all have ended; `nitro-cli describe-enclaves` lists them"))
}

/// Asks the kernel to move pages together until free memory is in one piece, as far as it can be.
fn compact(compact_memory: &Path) -> std::io::Result<()> {
    std::fs::write(compact_memory, "1\n")
}

/// Puts the report where the daemon finds it.
///
/// # Errors
/// It can't be written, or others than its owner could write in its folder.
pub fn publish(report: &Report, path: &Path) -> Result<(), Failure> {
    only_ours_for_the_report(path)?;
    let mut bytes =
        serde_json::to_vec_pretty(report).map_err(|error| Failure::new(format!("writing the report: {error}")))?;
    bytes.push(b'\n');
    atomic_file::write_with_mode(path, &bytes, 0o644).map_err(|error| Failure::from_error(&error))
}

fn only_ours_for_the_report(report: &Path) -> Result<(), Failure> {
    let folder = report.parent().unwrap_or(Path::new("/"));
    // Not RuntimeDirectory=: systemd removes that folder when a oneshot ends, and the report with it.
    file::only_ours(folder).map_err(|failure| {
        failure.with_remedy(format!("let systemd make it: `d {} 0755 root root` in tmpfiles.d", folder.display()))
    })
}
