//! `enclaved allocate`: reserves CPUs and memory for enclaves, as root, once, and ends. It takes one small request (numbers and CPU
//! lists), believes nothing of it before it has looked at the host itself, and writes what came of it for the daemon to read.
//!
//! It decides nothing about enclaves, and starts and ends none.

mod change;
mod file;
pub(crate) mod lock;
mod report;
mod request;
pub mod service;

pub use lock::is_at_work;
pub use report::{Did, Pool, Report};
pub use request::{FORMAT, Request};

use crate::atomic_file;
use crate::config::DEFAULT_RUN_DIR;
use crate::host::inventory::{HostInventory, InventorySource, MAX_SOCKETS, Roots};
use crate::launch_trace::LAUNCH_LOCK;
use crate::systemd_bus::SystemdBus;
use enclaved_core::desired::AllocatorMode;
use enclaved_core::failure::Failure;
use enclaved_core::id::Timestamp;
use enclaved_core::inventory::Inventory;
use enclaved_core::inventory::parse::shows_the_hosts_sockets;
use enclaved_core::observed::Observation;
use enclaved_core::sizing::Reserve;
use service::StockService;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How many lines of the stock service's journal go into the report.
const JOURNAL_LINES: u32 = 20;

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
    let _at_work = lock::show_at_work(&report)?;
    let now = SystemTime::now().into();
    let Allowed { reserve, roots, run_dir } = match allowed(config) {
        Ok(allowed) => allowed,
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
        request: request.unwrap_or_else(|| run_dir.join(REQUEST)),
        launch_lock: run_dir.join(LAUNCH_LOCK),
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
    /// What every launch of enclaved holds while it is under way.
    pub launch_lock: PathBuf,
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
    let mut report = Report::new(now);
    change::reserve(places, reserve, inventory, service, &mut report).await;
    if report.restarts > 0 {
        report.journal = match service.journal(JOURNAL_LINES).await {
            Ok(lines) => lines,
            Err(failure) => vec![format!("(the journal could not be read: {failure})")],
        };
    }
    report
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
        failure.with_remedy(format!("let systemd make it: `d {} 0750 root enclaved` in tmpfiles.d", folder.display()))
    })
}
