//! The host's enclave resources, as the driver and the kernel show them in sysfs. Reads only; who may have them changed asks for it
//! in `managed`; whether the stock service changes them just now is asked in `stock`.

pub mod managed;
pub mod stock;

use super::{Allocator, NotReserved, Outcome};
use crate::atomic_file;
use enclaved_core::allocator_file::Reservation;
use enclaved_core::failure::Failure;
use enclaved_core::id::MemoryMib;
use enclaved_core::inventory::{CpuSet, parse};
use enclaved_core::observed::Pool;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// sysfs files are a page long at most.
const MAX_FILE: u64 = 64 * 1024;

/// The stock allocator service, set up by an operator: what it made available is looked at, never changed.
#[derive(Debug, Clone)]
pub struct SysfsAllocator {
    sysfs: PathBuf,
}

impl SysfsAllocator {
    /// Looks below that folder, `/sys` on a real host.
    pub fn new(sysfs: impl Into<PathBuf>) -> Self {
        Self { sysfs: sysfs.into() }
    }
}

impl Allocator for SysfsAllocator {
    async fn observe(&self) -> Outcome<Pool> {
        Ok(look(&self.sysfs).await?.into())
    }

    async fn reserve(&self, wish: &Reservation, _least: Option<&Reservation>) -> Result<(), NotReserved> {
        Err(NotReserved::not_tried(Failure::new(format!(
            "{wish} are not reserved: host.allocator is \"verify\", the pool is the administrator's"
        ))))
    }
}

/// Somebody else hands out CPUs and memory, Kubernetes' device plugin say: nothing is looked at.
#[derive(Debug, Clone, Copy)]
pub struct ExternalAllocator;

impl Allocator for ExternalAllocator {
    async fn observe(&self) -> Outcome<Pool> {
        Ok(Pool::External)
    }

    async fn reserve(&self, wish: &Reservation, _least: Option<&Reservation>) -> Result<(), NotReserved> {
        Err(NotReserved::not_tried(Failure::new(format!(
            "{wish} are not reserved: host.allocator is \"external\", the pool is somebody else's"
        ))))
    }
}

/// What sysfs shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    cpus: u32,
    memory: MemoryMib,
    memory_free: MemoryMib,
}

impl From<Seen> for Pool {
    fn from(seen: Seen) -> Self {
        Self::Sized { cpus: seen.cpus, memory: seen.memory, memory_free: seen.memory_free, changing: false }
    }
}

async fn look(sysfs: &Path) -> Outcome<Seen> {
    let sysfs = sysfs.to_owned();
    let seen = tokio::task::spawn_blocking(move || read_pool(&sysfs)).await;
    seen.map_err(|error| Failure::new(format!("looking at the enclave pool was cut off: {error}")))?
}

fn read_pool(sysfs: &Path) -> Outcome<Seen> {
    let pool_file = sysfs.join("module/nitro_enclaves/parameters/ne_cpus");
    let Some(text) = read(&pool_file)? else { return Err(no_driver(&pool_file)) };
    let pool: CpuSet = text.parse().map_err(|_| not_understood(&pool_file, &text))?;
    let cpus_folder = sysfs.join("devices/system/cpu");
    let mut pool_nodes = BTreeSet::new();
    for cpu in pool.iter() {
        // CPUs of the pool are offline: no node's `cpulist` names them, but they keep the link to their node.
        let links = list(&cpus_folder.join(format!("cpu{cpu}")))?;
        pool_nodes.extend(links.iter().filter_map(|(name, _)| parse::numbered(name, "node")));
    }
    if !pool.is_empty() && pool_nodes.is_empty() {
        return Err(Failure::new(format!(
            "none of the pool's CPUs {pool} names its memory node in {}",
            cpus_folder.display()
        )));
    }
    let nodes_folder = sysfs.join("devices/system/node");
    let (mut kib, mut kib_free) = (0_u64, 0_u64);
    for (name, node) in list(&nodes_folder)? {
        // An enclave's memory is on the node of its CPUs; without a pool yet, any node will do.
        match parse::numbered(&name, "node") {
            Some(number) if pool.is_empty() || pool_nodes.contains(&number) => {}
            _ => continue,
        }
        for (name, folder) in list(&node.join("hugepages"))? {
            let Some(size) = parse::page_size_kib(&name) else { continue };
            let count = |file: &str| -> Outcome<u64> {
                let path = folder.join(file);
                let Some(text) = read(&path)? else { return Err(missing(&path)) };
                let count: u64 = text.trim().parse().map_err(|_| not_understood(&path, &text))?;
                Ok(count.saturating_mul(size))
            };
            kib = kib.saturating_add(count("nr_hugepages")?);
            kib_free = kib_free.saturating_add(count("free_hugepages")?);
        }
    }
    Ok(Seen { cpus: pool.len(), memory: MemoryMib(kib / 1024), memory_free: MemoryMib(kib_free / 1024) })
}

fn read(path: &Path) -> Outcome<Option<String>> {
    let bytes = atomic_file::read(path, MAX_FILE).map_err(|error| Failure::from_error(&error))?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

fn list(folder: &Path) -> Outcome<Vec<(String, PathBuf)>> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => missing(folder),
        _ => Failure::new(format!("could not list {}: {error}", folder.display())),
    };
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        entries.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    Ok(entries)
}

fn no_driver(path: &Path) -> Failure {
    Failure::new(format!(
        "this host can't run enclaves: the nitro_enclaves driver is not loaded ({} is missing)",
        path.display()
    ))
    .with_remedy(
        "start the instance with enclaves enabled (`--enclave-options Enabled=true`, an instance type that has them), \
             install aws-nitro-enclaves-cli, and run `modprobe nitro_enclaves`",
    )
}

fn missing(path: &Path) -> Failure {
    Failure::new(format!("{} is missing: the kernel shows no hugepages of its memory nodes", path.display()))
        .with_remedy("boot a kernel with CONFIG_NUMA and CONFIG_HUGETLBFS; in a container, mount the host's /sys")
}

fn not_understood(path: &Path, text: &str) -> Failure {
    let text: String = text.trim().chars().take(100).flat_map(char::escape_debug).collect();
    Failure::new(format!("{} is not understood: \"{text}\"", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::allocator_file::CpuRequest;
    use tempfile::TempDir;

    /// Size in kB, pages, free pages.
    type Pages = (u64, u64, u64);

    /// A sysfs with this pool and, for each node, its CPUs and hugepages.
    fn sysfs(ne_cpus: Option<&str>, nodes: &[(&str, &[Pages])]) -> (TempDir, SysfsAllocator) {
        let folder = tempfile::tempdir().unwrap();
        if let Some(ne_cpus) = ne_cpus {
            let parameters = folder.path().join("module/nitro_enclaves/parameters");
            fs::create_dir_all(&parameters).unwrap();
            fs::write(parameters.join("ne_cpus"), ne_cpus).unwrap();
        }
        for (number, (cpus, pages)) in nodes.iter().enumerate() {
            let node = folder.path().join(format!("devices/system/node/node{number}"));
            fs::create_dir_all(node.join("hugepages")).unwrap();
            for cpu in cpus.parse::<CpuSet>().unwrap().iter() {
                fs::create_dir_all(folder.path().join(format!("devices/system/cpu/cpu{cpu}/node{number}"))).unwrap();
            }
            for (size, count, free) in *pages {
                let pages = node.join(format!("hugepages/hugepages-{size}kB"));
                fs::create_dir_all(&pages).unwrap();
                fs::write(pages.join("nr_hugepages"), format!("{count}\n")).unwrap();
                fs::write(pages.join("free_hugepages"), format!("{free}\n")).unwrap();
            }
        }
        let allocator = SysfsAllocator::new(folder.path());
        (folder, allocator)
    }

    #[tokio::test]
    async fn the_pool_is_the_drivers_cpus_and_the_hugepages_of_their_node() {
        let nodes: &[(&str, &[Pages])] =
            &[("0-3\n", &[(2048, 512, 100), (1_048_576, 2, 1)]), ("4-7\n", &[(2048, 10_000, 10_000)])];
        let (_folder, allocator) = sysfs(Some("1,3\n"), nodes);
        let expected = Pool::Sized { cpus: 2, memory: MemoryMib(3072), memory_free: MemoryMib(1224), changing: false };
        assert_eq!(allocator.observe().await.unwrap(), expected);
        let (_folder, allocator) = sysfs(Some("\n"), nodes);
        let expected =
            Pool::Sized { cpus: 0, memory: MemoryMib(23_072), memory_free: MemoryMib(21_224), changing: false };
        assert_eq!(allocator.observe().await.unwrap(), expected);
    }

    #[tokio::test]
    async fn a_host_without_the_driver_says_what_makes_one_with_it() {
        let (_folder, allocator) = sysfs(None, &[("0-3", &[])]);
        let failure = allocator.observe().await.unwrap_err();
        assert!(failure.message.contains("driver is not loaded") && failure.message.contains("ne_cpus"), "{failure}");
        assert!(failure.remedy.unwrap().contains("Enabled=true"));
    }

    #[tokio::test]
    async fn what_is_not_understood_or_missing_is_an_error_and_never_zero() {
        let (_folder, allocator) = sysfs(Some("1-x"), &[("0-3", &[])]);
        assert!(allocator.observe().await.unwrap_err().message.contains("ne_cpus is not understood: \"1-x\""));
        let (folder, allocator) = sysfs(Some("1"), &[("0-3", &[(2048, 1, 1)])]);
        let pages = folder.path().join("devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages");
        fs::remove_file(&pages).unwrap();
        assert!(allocator.observe().await.unwrap_err().message.contains("free_hugepages is missing"));
        fs::write(&pages, "-1").unwrap();
        assert!(allocator.observe().await.unwrap_err().message.contains("free_hugepages is not understood"));
        let (_folder, allocator) = sysfs(Some(""), &[]);
        assert!(allocator.observe().await.unwrap_err().message.contains("node is missing"));
    }

    #[tokio::test]
    async fn what_is_somebody_elses_is_not_reserved_and_an_external_pool_not_even_looked_at() {
        assert_eq!(ExternalAllocator.observe().await.unwrap(), Pool::External);
        let wish = Reservation { cpus: CpuRequest::Count(2), memory_mib: MemoryMib(64) };
        let failure = ExternalAllocator.reserve(&wish, None).await.unwrap_err().failure;
        assert!(failure.message.contains("somebody else's"), "{failure}");
        let (_folder, allocator) = sysfs(Some("2-3"), &[("0-7", &[(2048, 512, 100)])]);
        assert!(allocator.reserve(&wish, None).await.unwrap_err().failure.message.contains("the administrator's"));
    }

    #[tokio::test]
    async fn cpus_of_the_pool_that_name_no_node_are_an_error_and_no_pool_without_memory() {
        let (folder, allocator) = sysfs(Some("1"), &[("0-3", &[(2048, 512, 512)])]);
        fs::remove_dir(folder.path().join("devices/system/cpu/cpu1/node0")).unwrap();
        assert!(
            allocator.observe().await.unwrap_err().message.contains("none of the pool's CPUs 1 names its memory node")
        );
        fs::remove_dir(folder.path().join("devices/system/cpu/cpu1")).unwrap();
        assert!(allocator.observe().await.unwrap_err().message.contains("cpu1 is missing"));
    }
}
