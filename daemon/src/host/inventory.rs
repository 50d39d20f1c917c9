//! Reads what a host is made of: sysfs, procfs, its device, its files, and the version of nitro-cli. Reads only, and understands
//! nothing: what the texts mean is `enclaved_core::inventory`'s. What can't be read becomes `Unknown` with its reason.

use super::{Outcome, Surveyor};
use crate::{atomic_file, child_environment};
use enclaved_core::allocator_file;
use enclaved_core::failure::Failure;
use enclaved_core::inventory::{
    AllocatorService, CpuSet, Device, Hugepages, Inventory, Node, SeenCpu, parse, topology,
};
use enclaved_core::observed::Observation::{self, Known, Unknown};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;

/// sysfs files are a page long at most, except lists of many CPUs.
const MAX_FILE: u64 = 64 * 1024;
/// A line for every Unix socket of the host.
pub(crate) const MAX_SOCKETS: u64 = 64 << 20;
/// More entries than any folder here has.
const MAX_ENTRIES: usize = 65_536;
/// How long `nitro-cli --version` may take: it prints one line.
const VERSION_PATIENCE: Duration = Duration::from_secs(5);
/// What the daemon has seen is looked at anew after this, whether or not anything seems to have changed.
const AGE: Duration = Duration::from_secs(60);
/// The stock allocator's unit.
pub const ALLOCATOR_UNIT: &str = "nitro-enclaves-allocator.service";

/// Looks at the host.
pub trait InventorySource: Send + Sync {
    /// All of it, as it is now. What can't be read is `Unknown`, so this never fails.
    fn read(&self) -> impl Future<Output = Inventory> + Send;
}

/// Where a host's files are: elsewhere in a container that has the host's mounted, and in tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/sys`
    pub sysfs: PathBuf,
    /// `/proc`
    pub procfs: PathBuf,
    /// `/dev`
    pub dev: PathBuf,
    /// `/`, for configuration and unit files.
    pub root: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self::below(Path::new("/"))
    }
}

impl Roots {
    /// All below one folder.
    pub fn below(root: &Path) -> Self {
        Self { sysfs: root.join("sys"), procfs: root.join("proc"), dev: root.join("dev"), root: root.to_owned() }
    }
}

/// The host's own files and programs.
#[derive(Debug, Clone)]
pub struct HostInventory {
    roots: Roots,
    nitro_cli: PathBuf,
}

impl HostInventory {
    /// Looks there, and asks that program for its version.
    pub fn new(roots: Roots, nitro_cli: impl Into<PathBuf>) -> Self {
        Self { roots, nitro_cli: nitro_cli.into() }
    }
}

impl InventorySource for HostInventory {
    async fn read(&self) -> Inventory {
        let roots = self.roots.clone();
        let version = nitro_cli_version(&self.nitro_cli);
        let (files, nitro_cli) = tokio::join!(tokio::task::spawn_blocking(move || read_files(&roots)), version);
        match files {
            Ok(inventory) => Inventory { nitro_cli, ..inventory },
            Err(error) => nothing_seen(&Failure::new(format!("looking at the host was cut off: {error}"))),
        }
    }
}

/// The host as it is seen by the daemon, again and again. Most of what a host is made of stays as it is, so all of it is read only when
/// what changes has changed, or after a while. nitro-cli is not asked for its version.
#[derive(Debug)]
pub struct Survey {
    /// `None`: nothing is looked at.
    roots: Option<Roots>,
    seen: Arc<Mutex<Option<Seen>>>,
}

#[derive(Debug)]
struct Seen {
    at: Instant,
    changing: Changing,
    inventory: Arc<Inventory>,
}

/// What changes on a host that runs, and matters for what is set aside.
#[derive(Debug, PartialEq, Eq)]
struct Changing {
    online: Result<String, Failure>,
    pool: Result<String, Failure>,
    pages: BTreeMap<String, Result<BTreeMap<u64, Hugepages>, Failure>>,
    enclaves: Result<u32, Failure>,
}

impl Survey {
    /// Looks there.
    pub fn new(roots: Roots) -> Self {
        Self { roots: Some(roots), seen: Arc::default() }
    }

    /// Looks at nothing.
    pub fn blind() -> Self {
        Self { roots: None, seen: Arc::default() }
    }
}

impl Surveyor for Survey {
    async fn observe(&self) -> Outcome<Option<Arc<Inventory>>> {
        let Some(roots) = self.roots.clone() else { return Ok(None) };
        let seen = Arc::clone(&self.seen);
        let read = tokio::task::spawn_blocking(move || {
            // One look at a time: those that hang (a sysfs file does while CPUs go off line) must not take one thread after another.
            let mut seen = match seen.try_lock() {
                Ok(seen) => seen,
                // A panic while it was held left what was there before, which is as good as any.
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    return Err(Failure::new("the last look at the host's CPUs and memory has not ended yet"));
                }
            };
            let changing = changing(&roots);
            match &*seen {
                Some(seen) if seen.changing == changing && seen.at.elapsed() < AGE => Ok(Arc::clone(&seen.inventory)),
                _ => {
                    let inventory = Arc::new(read_files(&roots));
                    *seen = Some(Seen { at: Instant::now(), changing, inventory: Arc::clone(&inventory) });
                    Ok(inventory)
                }
            }
        });
        let read = read.await.map_err(|error| Failure::new(format!("looking at the host was cut off: {error}")))?;
        read.map(Some)
    }
}

fn changing(roots: &Roots) -> Changing {
    let Roots { sysfs, procfs, .. } = roots;
    // On a host without NUMA there are no nodes.
    let nodes = list(&sysfs.join("devices/system/node")).unwrap_or_default();
    let nodes = nodes.into_iter().filter(|(name, _)| parse::numbered(name, "node").is_some());
    let mut pages: BTreeMap<_, _> = nodes.map(|(name, path)| (name, hugepages_in(&path.join("hugepages")))).collect();
    if pages.is_empty() {
        pages.insert(String::new(), hugepages_in(&sysfs.join("kernel/mm/hugepages")));
    }
    Changing {
        online: text(&sysfs.join("devices/system/cpu/online")),
        pool: text(&sysfs.join("module/nitro_enclaves/parameters/ne_cpus")),
        pages,
        enclaves: running(procfs),
    }
}

fn read_files(roots: &Roots) -> Inventory {
    let Roots { sysfs, procfs, dev, root } = roots;
    let nodes_folder = sysfs.join("devices/system/node");
    let numa = nodes_folder.is_dir();
    let driver = sysfs.join("module/nitro_enclaves");
    let driver_loaded = exists(&driver);
    let pool = match &driver_loaded {
        Known(false) => unknown(format!("the nitro_enclaves driver is not loaded ({} is missing)", driver.display())),
        Known(true) | Unknown(_) => parsed(&driver.join("parameters/ne_cpus"), |text| text.parse::<CpuSet>()),
    };
    Inventory {
        instance_type: observed(instance_type(sysfs)),
        cpus: observed(cpus(sysfs, numa).map(topology)),
        nodes: if numa {
            observed(nodes(&nodes_folder))
        } else {
            Known(BTreeMap::from([(0, whole_memory(sysfs, procfs))]))
        },
        driver_loaded,
        pool,
        device: device(&dev.join("nitro_enclaves")),
        nitro_cli: unknown("nitro-cli was not asked".to_owned()),
        allocator_service: observed(allocator_service(root)),
        allocator_file: observed(allocator_file(root)),
        enclaves: observed(running(procfs)),
    }
}

fn instance_type(sysfs: &Path) -> Result<String, Failure> {
    let (vendor, product) = (sysfs.join("class/dmi/id/sys_vendor"), sysfs.join("class/dmi/id/product_name"));
    let (vendor, product) = (text(&vendor)?, text(&product)?);
    parse::instance_type(&vendor, &product)
        .map_err(|error| Failure::new(format!("this is no known EC2 instance: {error}")))
}

fn cpus(sysfs: &Path, numa: bool) -> Result<BTreeMap<u32, SeenCpu>, Failure> {
    let folder = sysfs.join("devices/system/cpu");
    let online: CpuSet = understood(&folder.join("online"), |text| text.parse::<CpuSet>())?;
    let mut cpus = BTreeMap::new();
    for (name, path) in list(&folder)? {
        let Some(number) = parse::numbered(&name, "cpu") else { continue };
        let online = online.contains(number);
        // A CPU that is offline keeps its node's link; a kernel without NUMA has none.
        let node = if numa { observed(node_of(&path)) } else { Known(0) };
        cpus.insert(number, SeenCpu { online, node, siblings: siblings(&path) });
    }
    Ok(cpus)
}

fn node_of(cpu: &Path) -> Result<u32, Failure> {
    let mut nodes = list(cpu)?.into_iter().filter_map(|(name, _)| parse::numbered(&name, "node"));
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(node),
        (None, _) => Err(Failure::new(format!("{} names no memory node", cpu.display()))),
        (Some(one), Some(other)) => {
            Err(Failure::new(format!("{} names two memory nodes, {one} and {other}", cpu.display())))
        }
    }
}

/// `None`: it has no topology, as it is offline.
fn siblings(cpu: &Path) -> Option<Observation<CpuSet>> {
    // The second is the older name, and the only one before Linux 5.4.
    for name in ["topology/core_cpus_list", "topology/thread_siblings_list"] {
        let path = cpu.join(name);
        match atomic_file::read(&path, MAX_FILE) {
            Ok(None) => {}
            _ => return Some(parsed(&path, |text| text.parse::<CpuSet>())),
        }
    }
    None
}

fn nodes(folder: &Path) -> Result<BTreeMap<u32, Node>, Failure> {
    let numbered = list(folder)?.into_iter().filter_map(|(name, path)| Some((parse::numbered(&name, "node")?, path)));
    Ok(numbered.map(|(number, path)| (number, memory(&path.join("meminfo"), &path.join("hugepages")))).collect())
}

fn whole_memory(sysfs: &Path, procfs: &Path) -> Node {
    memory(&procfs.join("meminfo"), &sysfs.join("kernel/mm/hugepages"))
}

fn memory(meminfo: &Path, hugepages: &Path) -> Node {
    let field = |name| parsed(meminfo, |text| parse::meminfo_kib(text, name));
    Node { total_kib: field("MemTotal"), free_kib: field("MemFree"), hugepages: observed(hugepages_in(hugepages)) }
}

fn hugepages_in(folder: &Path) -> Result<BTreeMap<u64, Hugepages>, Failure> {
    let mut sizes = BTreeMap::new();
    for (name, path) in list(folder)? {
        let Some(size) = parse::page_size_kib(&name) else { continue };
        let file = |name: &str| text(&path.join(name));
        let (total, free, surplus) = (file("nr_hugepages")?, file("free_hugepages")?, file("surplus_hugepages")?);
        let pages = parse::hugepages(&total, &free, &surplus).map_err(|error| not_understood(&path, &error))?;
        sizes.insert(size, pages);
    }
    Ok(sizes)
}

fn device(path: &Path) -> Observation<Device> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Known(Device::Absent),
        Err(error) => return unknown(format!("could not look at {}: {error}", path.display())),
    };
    let character_device = metadata.file_type().is_char_device();
    // Opening the device does nothing yet: an enclave begins with a call on it. Of anything else, a pipe say, it might wait.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let opened = OpenOptions::new().read(true).write(true).custom_flags(nonblock).open(path);
    Known(Device::Present {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        character_device,
        openable: opened.map(drop).map_err(|error| error.to_string()),
    })
}

fn allocator_service(root: &Path) -> Result<AllocatorService, Failure> {
    let folders = [
        "etc/systemd/system",
        "run/systemd/system",
        "usr/local/lib/systemd/system",
        "usr/lib/systemd/system",
        "lib/systemd/system",
    ];
    let mut service = AllocatorService { installed: false, enabled: false };
    for folder in folders.map(|folder| root.join(folder)) {
        service.installed |= present(&folder.join(ALLOCATOR_UNIT))?;
        let entries = match fs::symlink_metadata(&folder) {
            Ok(_) => list(&folder)?,
            Err(_) => continue,
        };
        for (name, path) in entries {
            if name.ends_with(".wants") || name.ends_with(".requires") {
                service.enabled |= present(&path.join(ALLOCATOR_UNIT))?;
            }
        }
    }
    Ok(service)
}

/// Also of a link that leads nowhere from here, as one into a root that is mounted elsewhere.
fn present(path: &Path) -> Result<bool, Failure> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(Failure::new(format!("could not look at {}: {error}", path.display()))),
    }
}

fn allocator_file(root: &Path) -> Result<Option<allocator_file::FileReport>, Failure> {
    let path = root.join(allocator_file::PATH.trim_start_matches('/'));
    let bytes = atomic_file::read(&path, allocator_file::MAX_FILE).map_err(|error| Failure::from_error(&error))?;
    Ok(bytes.map(|bytes| allocator_file::check(&String::from_utf8_lossy(&bytes))))
}

/// Asks the kernel which control sockets are listened on. The sockets themselves are never connected to: nitro-cli takes a
/// connection without a command for a broken one, and the enclave goes down with it.
fn running(procfs: &Path) -> Result<u32, Failure> {
    let path = procfs.join("net/unix");
    let bytes = atomic_file::read(&path, MAX_SOCKETS).map_err(|error| Failure::from_error(&error))?;
    let bytes = bytes.ok_or_else(|| missing(&path))?;
    Ok(parse::listening_below(&String::from_utf8_lossy(&bytes), "/run/nitro_enclaves"))
}

async fn nitro_cli_version(program: &Path) -> Observation<String> {
    let failed =
        |error: &dyn std::fmt::Display| unknown(format!("could not run {} --version: {error}", program.display()));
    let mut command = tokio::process::Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    child_environment::without_secrets(command.as_std_mut());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return failed(&error),
    };
    let Some(stdout) = child.stdout.take() else { return failed(&"it has no output") };
    let mut text = Vec::new();
    let said = async {
        stdout.take(4096).read_to_end(&mut text).await?;
        child.wait().await
    };
    match tokio::time::timeout(VERSION_PATIENCE, said).await {
        Err(_) => failed(&format_args!("it did not end within {} s", VERSION_PATIENCE.as_secs())),
        Ok(Err(error)) => failed(&error),
        Ok(Ok(status)) if !status.success() => failed(&status),
        Ok(Ok(_)) => match parse::nitro_cli_version(&String::from_utf8_lossy(&text)) {
            Ok(version) => Known(version),
            Err(error) => failed(&error),
        },
    }
}

fn observed<T>(outcome: Result<T, Failure>) -> Observation<T> {
    match outcome {
        Ok(value) => Known(value),
        Err(failure) => Unknown(failure),
    }
}

fn unknown<T>(message: String) -> Observation<T> {
    Unknown(Failure::new(message))
}

fn exists(path: &Path) -> Observation<bool> {
    observed(present(path))
}

fn parsed<T, E: std::error::Error>(path: &Path, parse: impl FnOnce(&str) -> Result<T, E>) -> Observation<T> {
    observed(understood(path, parse))
}

fn understood<T, E: std::error::Error>(path: &Path, parse: impl FnOnce(&str) -> Result<T, E>) -> Result<T, Failure> {
    parse(&text(path)?).map_err(|error| not_understood(path, &error))
}

fn text(path: &Path) -> Result<String, Failure> {
    let bytes = atomic_file::read(path, MAX_FILE).map_err(|error| Failure::from_error(&error))?;
    bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).ok_or_else(|| missing(path))
}

fn missing(path: &Path) -> Failure {
    Failure::new(format!("{} is missing", path.display()))
}

fn not_understood(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("{} is not understood: {error}", path.display()))
}

fn list(folder: &Path) -> Result<Vec<(String, PathBuf)>, Failure> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => missing(folder),
        _ => Failure::new(format!("could not list {}: {error}", folder.display())),
    };
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)?.take(MAX_ENTRIES) {
        let entry = entry.map_err(failed)?;
        entries.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    Ok(entries)
}

fn nothing_seen(failure: &Failure) -> Inventory {
    fn unknown<T>(failure: &Failure) -> Observation<T> {
        Unknown(failure.clone())
    }
    Inventory {
        instance_type: unknown(failure),
        cpus: unknown(failure),
        nodes: unknown(failure),
        driver_loaded: unknown(failure),
        pool: unknown(failure),
        device: unknown(failure),
        nitro_cli: unknown(failure),
        allocator_service: unknown(failure),
        allocator_file: unknown(failure),
        enclaves: unknown(failure),
    }
}
