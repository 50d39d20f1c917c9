//! `enclaved allocate`: reserves CPUs and memory for enclaves, as root, once, and ends. It takes one small request (numbers and CPU
//! lists), believes nothing of it before it has looked at the host itself, and writes what came of it for the daemon to read.
//!
//! It decides nothing about enclaves, and starts and ends none.

mod file;
mod report;
mod request;
pub mod service;

pub use report::{Did, Pool, Report};
pub use request::{FORMAT, Request};

use crate::atomic_file;
use crate::config::AllocatorMode;
use crate::host::inventory::{HostInventory, InventorySource, Roots};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::failure::Failure;
use enclaved_core::id::{MemoryMib, Timestamp};
use enclaved_core::inventory::Inventory;
use enclaved_core::observed::Observation;
use enclaved_core::sizing::pool::{PoolNow, kernel_arguments, within};
use enclaved_core::sizing::{Capacity, Reserve};
use service::StockService;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How many lines of the stock service's journal go into the report.
const JOURNAL_LINES: u32 = 20;
/// Hugepages beyond what was asked for that do not make another pool of it: one large page.
const ONE_LARGE_PAGE: u64 = 1024;

/// How the command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The host's configuration does not allow it, or can't be used: the request was not even read.
    NotAllowed(Failure),
    /// The request was looked at.
    Tried(Report),
}

/// The whole command: with the reserve of the host's configuration, and on the real host. The report is on disk when it returns.
/// `manage`: whoever started it says that this host's pool is enclaved's to change.
///
/// # Errors
/// The report can't be written.
pub async fn run(config: &Path, manage: bool, request: PathBuf, report: PathBuf) -> Result<Ended, Failure> {
    // It must be known beforehand that the report can be written.
    only_ours_for_the_report(&report)?;
    let now = SystemTime::now().into();
    let (reserve, roots) = match allowed(config, manage) {
        Ok(allowed) => allowed,
        Err(failure) => {
            let refused = Report { failure: Some(failure.clone()), ..Report::new(now) };
            publish(&refused, &report)?;
            return Ok(Ended::NotAllowed(failure));
        }
    };
    let places = Places {
        request,
        allocator_file: enclaved_core::allocator_file::PATH.into(),
        compact_memory: roots.procfs.join("sys/vm/compact_memory"),
    };
    let host = HostInventory::new(roots, "nitro-cli");
    let done = allocate(&places, reserve, &host, &service::Systemd, now).await;
    publish(&done, &report)?;
    Ok(Ended::Tried(done))
}

/// What the configuration says is to be left to the parent, and where the host's files are. The request can't say that itself, as
/// another user writes it; and a configuration that can't be used may say anything, so no default stands in for it.
fn allowed(config: &Path, manage: bool) -> Result<(Reserve, Roots), Failure> {
    let mut roots = Roots::default();
    let (mode, reserve) = if is_there(config)? {
        let config = crate::config::load(config).map_err(|errors| {
            Failure::new(format!("the configuration can't be used: {errors}"))
                .with_remedy("`enclavectl check` says whether it is right")
        })?;
        roots.sysfs = config.host.sysfs;
        (config.host.allocator, Reserve::from(&config.desired.host))
    } else {
        (AllocatorMode::default(), Reserve::default())
    };
    match mode {
        AllocatorMode::External => Err(Failure::new("host.allocator is \"external\": the pool is somebody else's")),
        AllocatorMode::Verify if !manage => {
            Err(Failure::new("host.allocator is \"verify\": the pool is the administrator's")
                .with_remedy("--manage says that this host's pool is enclaved's to change"))
        }
        AllocatorMode::Verify => Ok((reserve, roots)),
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
        let before = PoolNow::of(&seen)?;
        self.report.before = Some(pool(&before));
        self.report.after.clone_from(&self.report.before);
        if is(&before, &wish) {
            // The next boot should find it in the file, too.
            self.write(&wish)?;
            return Ok(Did::Nothing);
        }
        nothing_runs(&seen)?;
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
            // So that the next boot, which is the remedy, reserves all of it.
            self.write(&wish)?;
        }
        Err(self.shortage(&wish, &capacity))
    }

    /// Writes the file, restarts the stock service, and looks whether the pool is there, whatever the service says of itself.
    async fn try_to_have(&mut self, reservation: &Reservation) -> Result<bool, Failure> {
        self.write(reservation)?;
        self.report.restarts += 1;
        self.report.service_failure = self.service.restart().await.err();
        let seen = PoolNow::of(&self.inventory.read().await)?;
        self.report.after = Some(pool(&seen));
        Ok(is(&seen, reservation))
    }

    fn write(&mut self, reservation: &Reservation) -> Result<(), Failure> {
        let backup = file::write(&self.places.allocator_file, reservation)?;
        self.report.backup = self.report.backup.take().or(backup);
        Ok(())
    }

    fn shortage(&self, wish: &Reservation, capacity: &Capacity) -> Failure {
        let after = self.report.after.clone().unwrap_or_default();
        let said =
            self.report.service_failure.as_ref().map(|failure| format!(": {}", failure.message)).unwrap_or_default();
        let message = format!(
            "the allocator was asked for {wish}; the pool has {} CPUs ({}) and {} in hugepages{said}",
            after.cpus.len(),
            after.cpus,
            after.memory
        );
        if after.memory >= wish.memory_mib {
            return Failure::new(message)
                .with_remedy("the journal of nitro-enclaves-allocator.service says why it refused the CPUs");
        }
        let node = (capacity.nodes.len() > 1).then(|| capacity.nodes.first().map(|node| node.node)).flatten();
        let arguments = kernel_arguments(wish.memory_mib, node);
        Failure::new(message).with_remedy(format!(
            "memory is in pieces: reboot (the file is in place, and early after a boot it is in one piece), or reserve it on the kernel \
             command line: {arguments}"
        ))
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
