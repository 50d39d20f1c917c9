//! The host's resources: which CPUs, hugepages and CIDs the running enclaves hold.
//!
//! Every background process holds one reservation file and a lock on it for as long as it lives, so the accounts are
//! right again after any death, kill -9 included: whoever comes next takes the file of a dead process away. The
//! `free_hugepages` of the sysfs tree follow from the living reservations.

use super::Environment;
use super::failure::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// A parent runs at most this many enclaves.
const MAX_ENCLAVES: usize = 4;
/// The driver's minimum for an enclave.
const MIN_MEMORY_MIB: u64 = 64;
/// Hugepage sizes that are looked for, in KiB, largest first.
const PAGE_SIZES_KIB: [u64; 2] = [1024 * 1024, 2048];

/// What an enclave is given, or asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CpuChoice {
    /// So many, whichever the driver gives.
    Count(usize),
    /// Exactly these.
    List(Vec<u32>),
}

/// What a launch asks of the host.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub(super) cpus: CpuChoice,
    /// In MiB.
    pub(super) memory_mib: u64,
    /// None: whichever is free.
    pub(super) cid: Option<u64>,
}

/// What a running enclave holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Holding {
    pub(super) cid: u32,
    pub(super) cpu_ids: Vec<u32>,
    /// Hugepages by their size in KiB.
    pages: BTreeMap<u64, u64>,
}

impl Holding {
    /// Memory of all pages, in MiB.
    pub(super) fn memory_mib(&self) -> u64 {
        self.pages.iter().map(|(kib, count)| kib * count / 1024).sum()
    }
}

/// A reservation of this process; ends with it.
#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) holding: Holding,
    path: PathBuf,
    // Held for its lock.
    _file: File,
}

impl Reservation {
    /// Gives everything back.
    pub(super) fn give_back(self, environment: &Environment) {
        // What can't be removed here is found dead, as the lock goes, by whoever settles next.
        let _ignored = fs::remove_file(&self.path);
        drop(self);
        let _ignored = settle(environment);
    }
}

/// Reads a CPU list as the kernel writes it (`1-3,7`).
///
/// # Errors
/// E23, as nitro-cli says of a number that is none.
pub(super) fn parse_cpu_list(text: &str) -> Result<Vec<u32>, Failure> {
    let number = |text: &str| {
        text.trim().parse::<u32>().map_err(|error| Failure::new(Code::MALFORMED_CPU, format!("\"{text}\": {error}")))
    };
    let mut cpus = Vec::new();
    for part in text.split([',', '\n']).filter(|part| !part.trim().is_empty()) {
        match part.split_once('-') {
            // Bounded, whatever the file says.
            Some((first, last)) => cpus.extend((number(first)?..=number(last)?).take(4096)),
            None => cpus.push(number(part)?),
        }
    }
    Ok(cpus)
}

/// The CPU pool, as the driver shows it.
///
/// # Errors
/// E19 naming `ne_cpus` where the driver is not there.
pub(super) fn pool(environment: &Environment) -> Result<Vec<u32>, Failure> {
    let path = environment.sysfs.join("module/nitro_enclaves/parameters/ne_cpus");
    let text = fs::read_to_string(&path).map_err(|error| Failure::file(&path, "Open", &error))?;
    parse_cpu_list(&text)
}

/// Checks what nitro-cli itself checks of the CPUs before it asks the driver.
///
/// # Errors
/// E20, E21, E22.
pub(super) fn check_cpus(pool: &[u32], choice: &CpuChoice) -> Result<(), Failure> {
    match choice {
        CpuChoice::Count(count) if pool.len() < *count => Err(Failure::new(
            Code::INSUFFICIENT_CPUS,
            format!("Insufficient CPUs available (requested {count}, but maximum is {})", pool.len()),
        )
        .about(["cpu-count".to_owned(), count.to_string()])),
        CpuChoice::Count(_) => Ok(()),
        CpuChoice::List(cpus) => {
            let mut seen = BTreeSet::new();
            let twice: BTreeSet<u32> = cpus.iter().copied().filter(|cpu| !seen.insert(*cpu)).collect();
            if !twice.is_empty() {
                let twice: String = twice.iter().map(u32::to_string).collect();
                return Err(Failure::new(Code::DUPLICATE_CPU, "CPU IDs list contains duplicates")
                    .about(["cpu-ids".to_owned(), twice]));
            }
            match seen.into_iter().find(|cpu| !pool.contains(cpu)) {
                Some(cpu) => Err(Failure::new(
                    Code::CPU_NOT_IN_POOL,
                    format!("The CPU with ID {cpu} is not available in the NE CPU pool"),
                )
                .about(["cpu-ids".to_owned(), cpu.to_string()])),
                None => Ok(()),
            }
        }
    }
}

fn driver(message: &str) -> Failure {
    Failure::new(Code::IOCTL, message)
}

fn no_device() -> Failure {
    Failure::file(Path::new("/dev/nitro_enclaves"), "Open", &io::ErrorKind::NotFound.into())
}

/// The accounts, locked: no other process changes them meanwhile.
struct Accounts<'a> {
    environment: &'a Environment,
    folder: PathBuf,
    living: Vec<Holding>,
    _lock: File,
}

impl<'a> Accounts<'a> {
    fn open(environment: &'a Environment) -> io::Result<Self> {
        let state = environment.state.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let folder = state.join("enclaves");
        fs::create_dir_all(&folder)?;
        let lock = OpenOptions::new().create(true).append(true).open(state.join("accounts.lock"))?;
        lock.lock()?;
        let mut living = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let file = match File::open(&path) {
                Ok(file) => file,
                // Given back since the folder was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            match file.try_lock() {
                Ok(()) => fs::remove_file(&path)?,
                Err(TryLockError::WouldBlock) => living.push(serde_json::from_reader(file)?),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(Self { environment, folder, living, _lock: lock })
    }

    fn hugepages_file(&self, kib: u64, name: &str) -> PathBuf {
        self.environment.sysfs.join(format!("devices/system/node/node0/hugepages/hugepages-{kib}kB/{name}"))
    }

    /// Hugepages that no enclave holds, by size in KiB; a size that the host does not have is left out.
    fn free_pages(&self) -> BTreeMap<u64, u64> {
        PAGE_SIZES_KIB
            .into_iter()
            .filter_map(|kib| {
                let total: u64 =
                    fs::read_to_string(self.hugepages_file(kib, "nr_hugepages")).ok()?.trim().parse().ok()?;
                let held: u64 = self.living.iter().filter_map(|holding| holding.pages.get(&kib)).sum();
                Some((kib, total.saturating_sub(held)))
            })
            .collect()
    }

    fn write_free_pages(&self) -> io::Result<()> {
        for (kib, free) in self.free_pages() {
            let path = self.hugepages_file(kib, "free_hugepages");
            let text = format!("{free}\n");
            if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                // In one step: a reader must not find it empty.
                let fresh = path.with_extension("new");
                fs::write(&fresh, text)?;
                fs::rename(fresh, path)?;
            }
        }
        Ok(())
    }

    /// Whole cores of the pool, each with those of its CPUs that are free.
    fn free_cores(&self, pool: &[u32]) -> Vec<Vec<u32>> {
        let mut cores: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
        for cpu in pool {
            let siblings = self.siblings(*cpu);
            let free = !self.living.iter().any(|holding| holding.cpu_ids.contains(cpu));
            match cores.iter_mut().find(|(core, _)| *core == siblings) {
                Some((_, members)) => members.extend(free.then_some(*cpu)),
                None => cores.push((siblings, free.then_some(*cpu).into_iter().collect())),
            }
        }
        cores.into_iter().map(|(_, members)| members).collect()
    }

    fn siblings(&self, cpu: u32) -> Vec<u32> {
        let path = self.environment.sysfs.join(format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
        fs::read_to_string(path).ok().and_then(|text| parse_cpu_list(&text).ok()).unwrap_or_else(|| vec![cpu])
    }

    fn take_pages(&self, memory_mib: u64) -> Result<BTreeMap<u64, u64>, Failure> {
        let mut free = self.free_pages();
        let mut taken: Vec<u64> = Vec::new();
        let mut needed = i128::from(memory_mib) * 1024;
        let mut take = |kib: u64, needed: &mut i128, whole: bool| {
            let enough = |needed: i128| if whole { needed < i128::from(kib) } else { needed <= 0 };
            while !enough(*needed) && free.get(&kib).is_some_and(|count| *count > 0) {
                free.entry(kib).and_modify(|count| *count -= 1);
                taken.push(kib);
                *needed -= i128::from(kib);
            }
        };
        // Largest pages first; for the rest, smallest first, so as to waste little.
        PAGE_SIZES_KIB.iter().for_each(|kib| take(*kib, &mut needed, true));
        PAGE_SIZES_KIB.iter().rev().for_each(|kib| take(*kib, &mut needed, false));
        if needed > 0 {
            return Err(Failure::new(
                Code::NO_HUGEPAGES,
                format!("Failed to allocate entire memory ({} MB remained)", needed / 1024),
            )
            .about(["memory".to_owned(), memory_mib.to_string()]));
        }
        // Whatever is beyond need goes back, smallest first.
        taken.sort_unstable_by(|a, b| b.cmp(a));
        let mut covered = 0;
        let mut pages = BTreeMap::new();
        for kib in taken {
            if covered >= memory_mib * 1024 {
                break;
            }
            covered += kib;
            *pages.entry(kib).or_insert(0) += 1;
        }
        Ok(pages)
    }

    fn take_cpus(&self, pool: &[u32], choice: &CpuChoice) -> Result<Vec<u32>, Failure> {
        let cores = self.free_cores(pool);
        let cpus = match choice {
            CpuChoice::Count(count) => {
                let cpus: Vec<u32> = cores.iter().flatten().copied().take(*count).collect();
                if cpus.len() < *count {
                    return Err(driver("Add vCPU ioctl failed: no CPUs are available in the pool"));
                }
                cpus
            }
            CpuChoice::List(cpus) => cpus.clone(),
        };
        if cpus.iter().any(|cpu| self.living.iter().any(|holding| holding.cpu_ids.contains(cpu))) {
            return Err(driver("The provided vCPU is already used"));
        }
        Ok(cpus)
    }

    /// Whether some core would be given to the enclave in part only.
    fn splits_a_core(&self, pool: &[u32], cpus: &[u32]) -> bool {
        cpus.is_empty()
            || cpus.iter().any(|cpu| self.siblings(*cpu).iter().any(|twin| pool.contains(twin) && !cpus.contains(twin)))
    }

    fn choose_cid(&self, wanted: Option<u64>) -> Result<u32, Failure> {
        let used = |cid: u32| self.living.iter().any(|holding| holding.cid == cid);
        match wanted {
            None | Some(0) => (4..u32::MAX).find(|cid| !used(*cid)).ok_or_else(|| driver("No CID is left")),
            Some(cid) => {
                let number = u32::try_from(cid).ok().filter(|cid| *cid > 3 && *cid != u32::MAX).ok_or_else(|| {
                    driver("The provided enclave CID is invalid, being a well-known CID or the parent VM CID")
                })?;
                if used(number) {
                    return Err(driver("Start enclave ioctl failed: An error has occurred: 98 (rc: -1)"));
                }
                Ok(number)
            }
        }
    }
}

/// Refuses where the driver would not even create an enclave: no device, four of them already, no CPU left.
///
/// # Errors
/// E19, E29.
pub(super) fn check_device(environment: &Environment, pool: &[u32]) -> Result<(), Failure> {
    if environment.vsock.is_none() {
        return Err(no_device());
    }
    let accounts = Accounts::open(environment).map_err(|_| no_device())?;
    if accounts.living.len() >= MAX_ENCLAVES {
        return Err(driver("Create VM ioctl failed: An error has occurred: 22 (rc: -1)"));
    }
    if accounts.free_cores(pool).iter().all(Vec::is_empty) {
        return Err(driver("The enclave cannot be created because no CPUs are available in the pool"));
    }
    Ok(())
}

/// Takes what the launch asks for, in the driver's order: memory, CPUs, CID.
///
/// # Errors
/// E27 for memory; E29 for what the driver refuses; E19 where the state folder can't be written.
pub(super) fn reserve(environment: &Environment, slot: &str, wish: &Wish) -> Result<Reservation, Failure> {
    let pool = pool(environment)?;
    let mut accounts = Accounts::open(environment).map_err(|_| no_device())?;
    let pages = accounts.take_pages(wish.memory_mib)?;
    let cpu_ids = accounts.take_cpus(&pool, &wish.cpus)?;
    if accounts.splits_a_core(&pool, &cpu_ids) {
        return Err(driver("The enclave cannot start because full CPU cores have not been set"));
    }
    if wish.memory_mib < MIN_MEMORY_MIB {
        return Err(driver("The enclave's memory size is lower than the minimum supported"));
    }
    let cid = accounts.choose_cid(wish.cid)?;
    let holding = Holding { cid, cpu_ids, pages };
    let path = accounts.folder.join(format!("{slot}.json"));
    let write = || -> io::Result<File> {
        let mut file = File::create_new(&path)?;
        file.try_lock()?;
        file.write_all(&serde_json::to_vec(&holding)?)?;
        Ok(file)
    };
    let file = write().map_err(|error| Failure::file(&path, "Write", &error))?;
    accounts.living.push(holding.clone());
    accounts.write_free_pages().map_err(|error| Failure::file(&accounts.environment.sysfs, "Write", &error))?;
    Ok(Reservation { holding, path, _file: file })
}

/// Brings the accounts in line with what lives: reservations of the dead go, `free_hugepages` follow.
///
/// # Errors
/// When the state folder or the sysfs tree can't be read or written.
pub fn settle(environment: &Environment) -> io::Result<()> {
    Accounts::open(environment)?.write_free_pages()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        _folder: tempfile::TempDir,
        environment: Environment,
    }

    fn host(pool: &str, pages: &[(u64, u64)]) -> Host {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let parameters = root.join("sys/module/nitro_enclaves/parameters");
        fs::create_dir_all(&parameters).unwrap();
        fs::write(parameters.join("ne_cpus"), pool).unwrap();
        for (kib, count) in pages {
            let node = root.join(format!("sys/devices/system/node/node0/hugepages/hugepages-{kib}kB"));
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("nr_hugepages"), format!("{count}\n")).unwrap();
        }
        let environment = Environment {
            sysfs: root.join("sys"),
            sockets: root.join("sockets"),
            logs: root.join("logs"),
            vsock: Some(root.join("vsock")),
            state: Some(root.join("state")),
            faults: None,
            enclave_binary: None,
        };
        Host { _folder: folder, environment }
    }

    fn siblings(host: &Host, pairs: &[[u32; 2]]) {
        for pair in pairs {
            for cpu in pair {
                let topology = host.environment.sysfs.join(format!("devices/system/cpu/cpu{cpu}/topology"));
                fs::create_dir_all(&topology).unwrap();
                fs::write(topology.join("thread_siblings_list"), format!("{},{}\n", pair[0], pair[1])).unwrap();
            }
        }
    }

    fn free(host: &Host, kib: u64) -> String {
        let file = format!("devices/system/node/node0/hugepages/hugepages-{kib}kB/free_hugepages");
        fs::read_to_string(host.environment.sysfs.join(file)).unwrap().trim().to_owned()
    }

    fn wish(cpus: usize, memory_mib: u64, cid: Option<u64>) -> Wish {
        Wish { cpus: CpuChoice::Count(cpus), memory_mib, cid }
    }

    #[test]
    fn what_is_taken_is_missing_until_it_is_given_back() {
        let host = host("1-3\n", &[(2048, 256)]);
        let taken = reserve(&host.environment, "a", &wish(2, 127, Some(16))).unwrap();
        assert_eq!(taken.holding.cpu_ids, [1, 2]);
        assert_eq!(taken.holding.memory_mib(), 128, "rounded up to whole pages");
        assert_eq!(free(&host, 2048), "192");
        let refused = reserve(&host.environment, "b", &wish(2, 128, None)).unwrap_err();
        assert_eq!(refused.code, Code::IOCTL, "one CPU is left");
        let refused = reserve(&host.environment, "b", &wish(1, 386, None)).unwrap_err();
        assert_eq!(refused.code, Code::NO_HUGEPAGES);
        taken.give_back(&host.environment);
        assert_eq!(free(&host, 2048), "256");
        assert_eq!(reserve(&host.environment, "b", &wish(3, 512, None)).unwrap().holding.cid, 4);
    }

    #[test]
    fn what_a_dead_process_held_is_free_again() {
        let host = host("1", &[(2048, 64)]);
        let taken = reserve(&host.environment, "a", &wish(1, 128, None)).unwrap();
        assert_eq!(free(&host, 2048), "0");
        drop(taken); // As at kill -9: the lock goes, the file stays.
        settle(&host.environment).unwrap();
        assert_eq!(free(&host, 2048), "64");
        assert!(check_device(&host.environment, &[1]).is_ok());
    }

    #[test]
    fn large_pages_are_taken_first_and_none_is_wasted_on_a_small_rest() {
        let host = host("1", &[(1_048_576, 2), (2048, 256)]);
        let taken = reserve(&host.environment, "a", &wish(1, 1024 + 512, None)).unwrap();
        assert_eq!(taken.holding.memory_mib(), 1536);
        assert_eq!((free(&host, 1_048_576), free(&host, 2048)), ("1".to_owned(), "0".to_owned()));
    }

    #[test]
    fn only_whole_cores_make_an_enclave() {
        let host = host("1,3,5,7", &[(2048, 256)]);
        siblings(&host, &[[1, 5], [3, 7]]);
        let half = reserve(&host.environment, "a", &wish(1, 64, None)).unwrap_err();
        assert_eq!(half.code, Code::IOCTL);
        let core = reserve(&host.environment, "a", &wish(2, 64, None)).unwrap();
        assert_eq!(core.holding.cpu_ids, [1, 5]);
        let listed = Wish { cpus: CpuChoice::List(vec![3, 7]), ..wish(0, 64, None) };
        assert_eq!(reserve(&host.environment, "b", &listed).unwrap().holding.cpu_ids, [3, 7]);
    }

    #[test]
    fn a_reserved_or_used_cid_is_refused() {
        let host = host("1-4", &[(2048, 256)]);
        let _held = reserve(&host.environment, "a", &wish(1, 64, Some(16))).unwrap();
        for cid in [1, 2, 3, 16, u64::from(u32::MAX), u64::MAX] {
            assert_eq!(
                reserve(&host.environment, "b", &wish(1, 64, Some(cid))).unwrap_err().code,
                Code::IOCTL,
                "{cid}"
            );
        }
    }

    #[test]
    fn a_fifth_enclave_is_refused_and_so_is_one_without_a_cpu() {
        let host = host("1-5", &[(2048, 256)]);
        let held: Vec<Reservation> =
            ["a", "b", "c"].map(|slot| reserve(&host.environment, slot, &wish(1, 64, None)).unwrap()).into();
        assert!(check_device(&host.environment, &[1, 2, 3, 4, 5]).is_ok());
        assert_eq!(check_device(&host.environment, &[1, 2, 3]).unwrap_err().code, Code::IOCTL);
        let _fourth = reserve(&host.environment, "d", &wish(1, 64, None)).unwrap();
        assert_eq!(check_device(&host.environment, &[1, 2, 3, 4, 5]).unwrap_err().code, Code::IOCTL);
        drop(held);
    }

    #[test]
    fn the_pool_is_checked_as_nitro_cli_checks_it() {
        let code = |choice| check_cpus(&[1, 3], &choice).unwrap_err().code;
        assert_eq!(code(CpuChoice::Count(3)), Code::INSUFFICIENT_CPUS);
        assert_eq!(code(CpuChoice::List(vec![1, 1])), Code::DUPLICATE_CPU);
        assert_eq!(code(CpuChoice::List(vec![1, 2])), Code::CPU_NOT_IN_POOL);
        assert_eq!(parse_cpu_list("1-3,7\n").unwrap(), [1, 2, 3, 7]);
        assert_eq!(parse_cpu_list("x").unwrap_err().code, Code::MALFORMED_CPU);
        assert_eq!(parse_cpu_list("").unwrap(), [] as [u32; 0]);
    }
}
