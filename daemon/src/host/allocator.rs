//! The host's enclave resources: read from sysfs, compared with what is needed, or left to somebody else.
//!
//! Nothing here changes the host. What is missing is said with numbers, and with what has to stand in the allocator's
//! file for it to be there.

use super::{Allocator, Outcome};
use enclaved_core::failure::Failure;
use enclaved_core::id::MemoryMib;
use enclaved_core::observed::Pool;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// CPUs on the largest host, with room to spare: a list in sysfs that names higher ones is not believed.
const MAX_CPU: u32 = 65_535;
/// A number or a list in sysfs is a page at most.
const MAX_BYTES: u64 = 4096;

/// Resources that the host's administrator set aside (`/etc/nitro_enclaves/allocator.yaml`); only looked at.
#[derive(Debug, Clone)]
pub struct SysfsAllocator {
    sysfs: PathBuf,
}

/// Resources that somebody else hands out, such as a Kubernetes device plugin.
#[derive(Debug, Clone, Copy)]
pub struct ExternalAllocator;

impl Allocator for ExternalAllocator {
    async fn observe(&self) -> Outcome<Pool> {
        Ok(Pool::External)
    }

    async fn reserve(&self, _: u32, _: MemoryMib) -> Outcome<()> {
        Ok(())
    }
}

impl SysfsAllocator {
    /// For the host whose sysfs is there (`/sys`).
    pub fn new(sysfs: &Path) -> Self {
        Self { sysfs: sysfs.to_owned() }
    }

    /// The CPUs of the driver's pool (`modprobe nitro_enclaves` makes the parameter, the allocator fills it).
    fn cpus(&self) -> Outcome<u32> {
        let path = self.sysfs.join("module/nitro_enclaves/parameters/ne_cpus");
        let text = read(&path).map_err(|error| {
            let failure = Failure::new(format!("reading the enclave CPU pool {}: {error}", path.display()));
            failure.with_remedy(
                "start the instance with enclave support (EnclaveOptions), then `modprobe nitro_enclaves` and \
                 `systemctl enable --now nitro-enclaves-allocator`",
            )
        })?;
        let list = parse_cpu_list(&text).ok_or_else(|| {
            Failure::new(format!(
                "the enclave CPU pool {} is no list of CPUs: \"{}\"",
                path.display(),
                text.escape_debug()
            ))
        })?;
        u32::try_from(list.len()).map_err(|_| Failure::new("the enclave CPU pool is impossibly large"))
    }

    /// Hugepage memory of all nodes and page sizes: in all, and free.
    fn memory(&self) -> Outcome<(MemoryMib, MemoryMib)> {
        let nodes = self.sysfs.join("devices/system/node");
        let failed = |path: &Path, error: &std::io::Error| {
            Failure::new(format!("reading the hugepages in {}: {error}", path.display()))
        };
        let (mut total, mut free) = (0_u64, 0_u64);
        for node in folders(&nodes, "node").map_err(|error| failed(&nodes, &error))? {
            let sizes = node.join("hugepages");
            for pages in folders(&sizes, "hugepages-").map_err(|error| failed(&sizes, &error))? {
                let kib = pages.file_name().and_then(|name| name.to_str()).and_then(page_kib);
                let Some(kib) = kib else { continue };
                let count = |name: &str| {
                    let path = pages.join(name);
                    let text = read(&path).map_err(|error| failed(&path, &error))?;
                    let number = text.trim().parse::<u64>();
                    number.map_err(|_| Failure::new(format!("{} holds no number", path.display())))
                };
                total = total.saturating_add(count("nr_hugepages")?.saturating_mul(kib));
                free = free.saturating_add(count("free_hugepages")?.saturating_mul(kib));
            }
        }
        Ok((MemoryMib(total / 1024), MemoryMib(free / 1024)))
    }

    fn pool(&self) -> Outcome<Pool> {
        let cpus = self.cpus()?;
        let (memory, memory_free) = self.memory()?;
        Ok(Pool::Sized { cpus, memory, memory_free })
    }
}

impl Allocator for SysfsAllocator {
    async fn observe(&self) -> Outcome<Pool> {
        // A few small files that the kernel makes up as they are read; no disk is waited for.
        self.pool()
    }

    async fn reserve(&self, cpus: u32, memory: MemoryMib) -> Outcome<()> {
        let Pool::Sized { cpus: have_cpus, memory: have_memory, memory_free } = self.pool()? else { return Ok(()) };
        if have_cpus >= cpus && have_memory >= memory {
            return Ok(());
        }
        let text = format!(
            "the enclaves need {cpus} CPUs and {memory} in all; the host has set aside {have_cpus} CPUs and {have_memory} \
             ({memory_free} free)"
        );
        let remedy = format!(
            "in /etc/nitro_enclaves/allocator.yaml set memory_mib: {} and cpu_count: {}, then `systemctl restart \
             nitro-enclaves-allocator` while no enclave runs; or make the enclaves smaller",
            memory.0.max(have_memory.0),
            cpus.max(have_cpus)
        );
        Err(Failure::new(text).with_remedy(remedy))
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// The folders in `path` whose names begin with `prefix`.
fn folders(path: &Path, prefix: &str) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)) && entry.path().is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The page size in a name like `hugepages-2048kB`.
fn page_kib(name: &str) -> Option<u64> {
    name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
}

/// The kernel's list form: `1-3,5,7-9`; empty for none.
fn parse_cpu_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    let number = |text: &str| text.parse::<u32>().ok().filter(|cpu| *cpu <= MAX_CPU);
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        match part.split_once('-') {
            Some((first, last)) => cpus.extend(number(first)?..=number(last)?),
            None => {
                cpus.insert(number(part)?);
            }
        }
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(cpus: &str, pages: u64, free: u64) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let parameters = dir.path().join("module/nitro_enclaves/parameters");
        std::fs::create_dir_all(&parameters).unwrap();
        std::fs::write(parameters.join("ne_cpus"), cpus).unwrap();
        for (name, nr, free) in [("hugepages-2048kB", pages, free), ("hugepages-1048576kB", 1, 1)] {
            let folder = dir.path().join("devices/system/node/node0/hugepages").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("nr_hugepages"), format!("{nr}\n")).unwrap();
            std::fs::write(folder.join("free_hugepages"), format!("{free}\n")).unwrap();
        }
        dir
    }

    #[tokio::test]
    async fn the_pool_is_the_drivers_cpus_and_the_hugepages_of_every_size() {
        let dir = sysfs("1-2,5\n", 512, 256);
        let pool = SysfsAllocator::new(dir.path()).observe().await.unwrap();
        assert_eq!(pool, Pool::Sized { cpus: 3, memory: MemoryMib(2048), memory_free: MemoryMib(1536) });
    }

    #[tokio::test]
    async fn a_host_without_the_driver_says_how_to_get_it() {
        let dir = tempfile::tempdir().unwrap();
        let failure = SysfsAllocator::new(dir.path()).observe().await.unwrap_err();
        assert!(failure.message.contains("ne_cpus") && failure.remedy.unwrap().contains("modprobe"));
    }

    #[tokio::test]
    async fn what_is_missing_is_said_in_numbers_with_the_line_that_would_help() {
        let dir = sysfs("1-2", 512, 512);
        let allocator = SysfsAllocator::new(dir.path());
        allocator.reserve(2, MemoryMib(2048)).await.unwrap();
        let failure = allocator.reserve(4, MemoryMib(4096)).await.unwrap_err();
        assert!(failure.message.contains("4 CPUs and 4096 MiB") && failure.message.contains("2 CPUs and 2048 MiB"));
        assert!(failure.remedy.unwrap().contains("memory_mib: 4096 and cpu_count: 4"));
    }

    #[test]
    fn a_cpu_list_that_is_none_is_refused() {
        for bad in ["x", "1-", "-1", "1-2-3", "1;2", "99999999"] {
            assert_eq!(parse_cpu_list(bad), None, "{bad}");
        }
        assert_eq!(parse_cpu_list("\n"), Some(BTreeSet::new()));
        assert_eq!(parse_cpu_list("3-1"), Some(BTreeSet::new()));
    }
}
