//! `enclaved allocate` on recorded hosts, with a stand-in for the stock service that changes them as the real one does: it follows
//! the same file, sets all hugepages of the node to zero first, takes large pages first, and can say one thing and do another.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use enclaved::allocate::service::StockService;
use enclaved::allocate::{Did, FORMAT, Places, Report, Request, allocate, publish};
use enclaved::host::inventory::{HostInventory, InventorySource, Roots};
use enclaved::systemd_bus::JobError;
use enclaved_core::allocator_file::{self, CpuRequest, Reservation};
use enclaved_core::failure::Failure;
use enclaved_core::id::{MemoryMib, Timestamp};
use enclaved_core::inventory::{CpuSet, Inventory};
use enclaved_core::sizing::Reserve;
use enclaved_integration::host_tree::HostTree;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Mutex;

/// How the service fails.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    /// Memory that can be had as hugepages, in MiB, until memory is compacted.
    in_one_piece: Option<u64>,
    /// And afterwards.
    after_compaction: Option<u64>,
    /// It says that it failed, or that it succeeded, whatever it did.
    says: Option<bool>,
    /// It takes no CPUs.
    no_cpus: bool,
    /// It does nothing: systemd refuses (`Some(true)`), or does not say what became of it.
    silent: Option<bool>,
}

/// A recorded host, and the service on it.
struct Host {
    tree: HostTree,
    faults: Faults,
    restarts: Mutex<u32>,
}

impl Host {
    fn new(shape: &str) -> Self {
        let tree = HostTree::unpack(shape).unwrap();
        tree.write("proc/sys/vm/compact_memory", "").unwrap();
        Self { tree, faults: Faults::default(), restarts: Mutex::new(0) }
    }

    fn with(shape: &str, faults: Faults) -> Self {
        Self { faults, ..Self::new(shape) }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.tree.path().join(file)
    }

    fn file(&self) -> String {
        fs::read_to_string(self.path("etc/nitro_enclaves/allocator.yaml")).unwrap()
    }

    fn restarts(&self) -> u32 {
        *self.restarts.lock().unwrap()
    }

    async fn allocate_text(&self, request: &str) -> Report {
        self.tree.write("run/request.json", request).unwrap();
        let places = Places {
            request: self.path("run/request.json"),
            allocator_file: self.path("etc/nitro_enclaves/allocator.yaml"),
            compact_memory: self.path("proc/sys/vm/compact_memory"),
            sysfs: self.path("sys"),
        };
        let inventory = HostInventory::new(Roots::below(self.tree.path()), self.path("usr/bin/nitro-cli"));
        allocate(&places, Reserve::default(), &Kernel { host: self, inventory }, self, Timestamp::from_millis(1)).await
    }

    async fn allocate(&self, wish: Reservation, least: Option<Reservation>) -> Report {
        let request = Request { format: FORMAT, id: 7, wish, least };
        let report = self.allocate_text(&serde_json::to_string(&request).unwrap()).await;
        assert_eq!(report.request, Some(request));
        report
    }

    fn set_pages(&self, node: u32, kib: u64, count: u64) {
        for file in ["nr_hugepages", "free_hugepages"] {
            let folder = format!("sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB");
            self.tree.write(&format!("{folder}/{file}"), &format!("{count}\n")).unwrap();
        }
    }

    /// What the script does with CPUs named or counted: all on node 0 here, the lowest first, whole cores but CPU 0's.
    fn set_pool(&self, cpus: &CpuRequest) {
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

    fn cpus(&self) -> u32 {
        let present = fs::read_to_string(self.path("sys/devices/system/cpu/present")).unwrap();
        present.trim().strip_prefix("0-").unwrap().parse::<u32>().unwrap() + 1
    }
}

/// The tree as a kernel would show it: pages that are given back are not free any more.
struct Kernel<'a> {
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
    async fn restart(&self) -> Result<(), JobError> {
        match self.faults.silent {
            Some(true) => return Err(JobError::NotRun(Failure::new("Unit is masked"))),
            Some(false) => return Err(JobError::Unknown(Failure::new("the connection ended"))),
            None => {}
        }
        *self.restarts.lock().unwrap() += 1;
        let wanted = allocator_file::check(&self.file()).outcome.unwrap();
        let node = if self.cpus() > 24 && matches!(wanted.cpus, CpuRequest::Pool(_)) { 1 } else { 0 };
        let compacted = fs::read_to_string(self.path("proc/sys/vm/compact_memory")).unwrap() == "1\n";
        let limit = if compacted { self.faults.after_compaction } else { self.faults.in_one_piece };
        let had = wanted.memory_mib.0 <= limit.unwrap_or(u64::MAX);
        let memory = if had { wanted.memory_mib.0 } else { 0 };
        self.set_pages(node, 1_048_576, memory / 1024);
        self.set_pages(node, 2048, (memory % 1024).div_ceil(2));
        let none = CpuRequest::Pool(CpuSet::default());
        self.set_pool(if had && !self.faults.no_cpus { &wanted.cpus } else { &none });
        if self.faults.says.unwrap_or(had) { Ok(()) } else { Err(JobError::Failed(Failure::new("restarting: failed"))) }
    }

    async fn journal(&self, lines: u32) -> Result<Vec<String>, Failure> {
        Ok(vec![format!("the last {lines} lines")])
    }
}

fn count(cpus: u32, memory: u64) -> Reservation {
    Reservation { cpus: CpuRequest::Count(cpus), memory_mib: MemoryMib(memory) }
}

fn why(report: &Report) -> String {
    assert_eq!(report.did, Did::Failed);
    report.failure.as_ref().unwrap().to_string()
}

#[tokio::test]
async fn what_is_asked_for_is_reserved_once_and_then_left_alone() {
    let host = Host::new("m5.2xlarge");
    host.tree.write("proc/net/unix", "").unwrap();
    let report = host.allocate(count(6, 29_000), None).await;
    assert_eq!((&report.did, &report.failure, report.restarts), (&Did::Reserved(count(6, 29_000)), &None, 1));
    assert_eq!(report.before.unwrap().memory, MemoryMib(512));
    let after = report.after.unwrap();
    assert_eq!((after.cpus.len(), after.memory), (6, MemoryMib(29_000)));
    assert_eq!(report.journal, ["the last 20 lines"]);
    assert_eq!(host.file(), allocator_file::write(&count(6, 29_000)));

    let report = host.allocate(count(6, 29_000), None).await;
    assert_eq!((report.did, report.restarts, host.restarts()), (Did::Nothing, 0, 1));
}

#[tokio::test]
async fn a_file_of_somebody_else_is_kept_and_every_version_of_it() {
    let host = Host::new("m5.xlarge");
    let theirs = host.file();
    let report = host.allocate(count(2, 1024), None).await;
    let backup = report.backup.unwrap();
    assert_eq!(fs::read_to_string(&backup).unwrap(), theirs);
    assert!(backup.ends_with("allocator.yaml.before-enclaved"));
    // Ours is replaced without one; an edited one is somebody's again.
    assert_eq!(host.allocate(count(2, 2048), None).await.backup, None);
    host.tree.write("etc/nitro_enclaves/allocator.yaml", "---\nmemory_mib: 64\ncpu_count: 2\n").unwrap();
    let report = host.allocate(count(2, 1024), None).await;
    assert!(report.backup.unwrap().ends_with("allocator.yaml.before-enclaved.1"));
    assert_eq!(fs::read_to_string(&backup).unwrap(), theirs);
    let mode = fs::metadata(host.path("etc/nitro_enclaves/allocator.yaml")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644, "nitro-cli's users read it");
}

#[tokio::test]
async fn nothing_is_touched_while_an_enclave_runs_or_may_run() {
    let host = Host::new("m5.2xlarge");
    let before = host.file();
    let report = host.allocate(count(4, 1024), None).await;
    assert!(why(&report).contains("1 enclave runs; what is reserved changes only while none does"), "{report:?}");
    fs::remove_file(host.path("proc/net/unix")).unwrap();
    assert!(why(&host.allocate(count(4, 1024), None).await).contains("whether an enclave runs is not known"));
    assert_eq!((host.restarts(), host.file()), (0, before));
    // What is there already needs no change, so it is no matter what runs.
    assert_eq!(host.allocate(count(2, 512), None).await.did, Did::Nothing);
}

#[tokio::test]
async fn the_bounds_of_the_host_count_whatever_is_asked_for() {
    let host = Host::new("m5.xlarge");
    for (wish, least, part) in [
        (count(4, 512), None, "leave the parent 2 CPUs and 2048 MiB"),
        (count(2, 15_000), None, "there are 2 CPUs and 13474 MiB"),
        (count(1, 512), None, "whole cores"),
        (count(2, 512), Some(count(4, 512)), "leave the parent 2 CPUs"),
        (
            Reservation { cpus: CpuRequest::Pool("0,2".parse().unwrap()), memory_mib: MemoryMib(64) },
            None,
            "without CPU 0's",
        ),
    ] {
        let report = host.allocate(wish, least).await;
        assert!(why(&report).contains(part), "{report:?}");
    }
    // A host that can't be seen has no bounds to check against.
    fs::remove_file(host.path("sys/devices/system/cpu/online")).unwrap();
    assert!(why(&host.allocate(count(2, 512), None).await).contains("could not be sized up"));
    assert_eq!(host.restarts(), 0);
}

#[tokio::test]
async fn a_request_that_is_not_strictly_one_is_refused() {
    let host = Host::new("m5.xlarge");
    let long = format!("{{\"format\":1,{}", " ".repeat(70_000));
    for (request, part) in [
        ("", "EOF"),
        ("{", "EOF"),
        (r#"{"format":2,"id":7,"wish":{"cpus":{"count":2},"memory_mib":512}}"#, "its format is 2"),
        (r#"{"format":1,"id":7,"wish":{"cpus":{"count":2},"memory_mib":512},"run":"sh"}"#, "unknown field `run`"),
        (r#"{"format":1,"id":7,"wish":{"cpus":{"count":2},"memory_mib":512,"x":1}}"#, "unknown field `x`"),
        (r#"{"format":1,"id":7,"wish":{"cpus":{"count":-2},"memory_mib":512}}"#, "invalid value"),
        (r#"{"format":1,"id":7,"wish":{"cpus":{"count":2.5},"memory_mib":512}}"#, "floating point"),
        (r#"{"format":1,"id":7,"wish":{"cpus":{"pool":"1,3\ncpu_count: 2"},"memory_mib":512}}"#, "is not a CPU list"),
        (r#"{"format":1,"id":7,"wish":{"cpus":{"count":2,"pool":"1"},"memory_mib":512}}"#, "expected"),
        (&long, "longer than 65536 bytes"),
    ] {
        let report = host.allocate_text(request).await;
        assert!(why(&report).contains(part), "{request:.100}: {report:?}");
        assert_eq!(report.request, None);
    }
    // Its writer could point a link at what only root may read.
    fs::write(host.path("secret"), "{\"format\":1}").unwrap();
    let inventory = HostInventory::new(Roots::below(host.tree.path()), "/nonexistent");
    symlink(host.path("secret"), host.path("run/link.json")).unwrap();
    for request in [host.path("run/link.json"), host.path("run"), host.path("run/none.json")] {
        let places = Places {
            request,
            allocator_file: host.path("etc/nitro_enclaves/allocator.yaml"),
            compact_memory: host.path("proc/sys/vm/compact_memory"),
            sysfs: host.path("sys"),
        };
        let report = allocate(&places, Reserve::default(), &inventory, &host, Timestamp::from_millis(1)).await;
        assert!(why(&report).contains("is not taken"), "{report:?}");
    }
    assert_eq!(host.restarts(), 0);
}

#[tokio::test]
async fn memory_in_pieces_is_put_together_and_tried_once_more() {
    let faults = Faults { in_one_piece: Some(4096), ..Faults::default() };
    let report = Host::with("m5.xlarge", faults).allocate(count(2, 13_474), None).await;
    assert_eq!((report.did, report.compacted, report.restarts), (Did::Reserved(count(2, 13_474)), true, 2));
}

#[tokio::test]
async fn what_the_enclaves_need_is_reserved_if_not_everything_can_be() {
    let faults = Faults { in_one_piece: Some(1024), after_compaction: Some(2048), ..Faults::default() };
    let host = Host::with("m5.xlarge", faults);
    let report = host.allocate(count(2, 13_474), Some(count(2, 2048))).await;
    assert_eq!((report.did, report.restarts), (Did::Reserved(count(2, 2048)), 3));
    assert_eq!(host.file(), allocator_file::write(&count(2, 2048)));
}

#[tokio::test]
async fn when_nothing_helps_it_says_what_does_and_leaves_the_file_for_the_next_boot() {
    let faults = Faults { in_one_piece: Some(512), after_compaction: Some(1024), ..Faults::default() };
    let host = Host::with("m5.xlarge", faults);
    let report = host.allocate(count(2, 13_474), Some(count(2, 2048))).await;
    let failure = why(&report);
    let expected = "asked for 2 CPUs and 13474 MiB; the pool has 0 CPUs () and 0 MiB in hugepages: restarting: failed";
    assert!(failure.contains(expected), "{failure}");
    assert!(
        failure.contains("reboot") && failure.contains("hugepagesz=1G hugepages=13 hugepagesz=2M hugepages=81"),
        "{failure}"
    );
    assert_eq!((report.restarts, report.compacted), (3, true));
    assert_eq!(host.file(), allocator_file::write(&count(2, 13_474)));
}

#[tokio::test]
async fn the_pool_is_believed_and_not_the_service() {
    // It says that all is well, and took no CPUs.
    let host = Host::with("m5.xlarge", Faults { says: Some(true), no_cpus: true, ..Faults::default() });
    let failure = why(&host.allocate(count(2, 1024), None).await);
    assert!(
        failure.contains("the pool has 0 CPUs () and 1024 MiB") && failure.contains("refused the CPUs"),
        "{failure}"
    );
    // It says that it failed, and all is there.
    let host = Host::with("m5.xlarge", Faults { says: Some(false), ..Faults::default() });
    let report = host.allocate(count(2, 1024), None).await;
    assert_eq!((report.did, report.failure), (Did::Reserved(count(2, 1024)), None));
    assert!(report.service_failure.is_some());
}

#[tokio::test]
async fn on_two_nodes_the_pool_is_reserved_on_the_one_that_is_named() {
    let host = Host::new("m5.24xlarge");
    let wish = Reservation { cpus: CpuRequest::Pool("24-47,72-95".parse().unwrap()), memory_mib: MemoryMib(188_500) };
    let report = host.allocate(wish.clone(), None).await;
    assert_eq!(report.did, Did::Reserved(wish));
    assert_eq!(report.after.unwrap().memory, MemoryMib(188_500));
}

#[tokio::test]
async fn the_report_reads_back_and_is_only_written_where_nobody_else_can_write() {
    let host = Host::new("m5.xlarge");
    let report = host.allocate(count(2, 1024), None).await;
    let folder = host.path("run/allocator");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("report.json");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(publish(&report, &file).unwrap_err().message.contains("only its owner"));
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    publish(&report, &file).unwrap();
    assert_eq!(serde_json::from_slice::<Report>(&fs::read(&file).unwrap()).unwrap(), report);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644, "the daemon reads it");
}

#[tokio::test]
async fn the_allocators_file_is_not_written_where_somebody_else_can_write() {
    let host = Host::new("m5.xlarge");
    let before = host.file();
    fs::set_permissions(host.path("etc/nitro_enclaves"), fs::Permissions::from_mode(0o775)).unwrap();
    let failure = why(&host.allocate(count(2, 1024), None).await);
    assert!(failure.contains("only its owner") && failure.contains("chmod go-w"), "{failure}");
    assert_eq!((host.restarts(), host.file()), (0, before));
}

/// Runs the command as systemd would, with that configuration, and with a request that can't get as far as the host; what it reports.
fn command(config: Option<&str>, request: &str) -> (Option<i32>, Report) {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    fs::create_dir(&run_dir).unwrap();
    let file = folder.path().join("enclaved.toml");
    if let Some(config) = config {
        fs::write(&file, config.replace("RUN_DIR", run_dir.to_str().unwrap())).unwrap();
    }
    fs::write(run_dir.join("allocate.json"), request).unwrap();
    let mut command = std::process::Command::new(enclaved_integration::binaries::find("enclaved").unwrap());
    command.arg("allocate").arg("--config").arg(file).arg("--report").arg(folder.path().join("report.json"));
    if config.is_none_or(|config| !config.contains("RUN_DIR")) {
        command.arg("--request").arg(run_dir.join("allocate.json"));
    }
    let output = command.output().unwrap();
    let report: Report = serde_json::from_slice(&fs::read(folder.path().join("report.json")).unwrap()).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("what is reserved is not changed: "), "{output:?}");
    (output.status.code(), report)
}

#[test]
fn the_pool_stays_the_administrators_unless_the_configuration_says_that_it_is_enclaveds() {
    for (config, code, part) in [
        (None, 78, "the pool is the administrator's (host.allocator = \"manage\""),
        (
            Some("[host]\nsupervisor = \"direct\"\n"),
            78,
            "host.allocator is \"verify\": the pool is the administrator's",
        ),
        (Some("[host]\nallocator = \"verify\"\n"), 78, "host.allocator is \"verify\""),
        (Some("[host]\nallocator = \"external\"\n"), 78, "host.allocator is \"external\""),
        // Then its own request is read, from the daemon's folder.
        (Some("[host]\n"), 75, "is not taken: EOF"),
        (
            Some("[host]\nsupervisor = \"direct\"\nallocator = \"manage\"\nrun_dir = \"RUN_DIR\"\n"),
            75,
            "is not taken: EOF",
        ),
    ] {
        let (exit, report) = command(config, "");
        let why = why(&report);
        assert!(exit == Some(code) && why.contains(part), "{config:?}: {exit:?} {why}");
    }
}

#[test]
fn with_a_configuration_that_cannot_be_used_nothing_is_changed_and_the_daemon_learns_why() {
    let request = r#"{"format":1,"id":7,"wish":{"cpus":{"count":2},"memory_mib":512}}"#;
    for config in ["[host", "[host]\nallocator = \"manage\"\nreserve_memory_mib = \"much\"\n"] {
        let (exit, report) = command(Some(config), request);
        let why = why(&report);
        assert!(exit == Some(78) && why.contains("the configuration can't be used"), "{exit:?} {why}");
        assert_eq!(report.request.unwrap().id, 7, "it is an answer to the request");
    }
}

#[tokio::test]
async fn a_growth_that_fails_keeps_the_former_pool() {
    let faults = Faults { in_one_piece: Some(2048), after_compaction: Some(2048), ..Faults::default() };
    let host = Host::with("m5.2xlarge", faults);
    host.tree.write("proc/net/unix", "").unwrap();
    let report = host.allocate(count(6, 29_000), Some(count(4, 4096))).await;
    let former = Reservation { cpus: CpuRequest::Pool("1,5".parse().unwrap()), memory_mib: MemoryMib(512) };
    assert_eq!((&report.did, report.restarts), (&Did::KeptFormer(former), 4));
    assert_eq!(report.after, report.before);
    assert!(report.failure.unwrap().to_string().contains("reboot"));
    // A reboot is the remedy, so the file is for that.
    assert_eq!(host.file(), allocator_file::write(&count(6, 29_000)));
}

#[tokio::test]
async fn a_service_that_does_not_run_or_whose_end_is_not_known_is_left_alone() {
    for (refuses, restarts, part) in
        [(true, 0, "did not run: Unit is masked"), (false, 1, "is not known: the connection ended")]
    {
        let host = Host::with("m5.xlarge", Faults { silent: Some(refuses), ..Faults::default() });
        let report = host.allocate(count(2, 2048), Some(count(2, 1024))).await;
        let failure = why(&report);
        assert!(failure.contains(part) && !failure.contains("memory is in pieces"), "{failure}");
        assert_eq!((report.restarts, report.compacted, &report.after), (restarts, false, &None));
        assert_eq!(host.file(), allocator_file::write(&count(2, 2048)), "no other file is tried");
    }
}

#[tokio::test]
async fn a_move_gives_the_pages_of_the_former_node_back_unless_somebody_uses_them() {
    let host = Host::new("m5.24xlarge");
    host.tree.write("sys/module/nitro_enclaves/parameters/ne_cpus", "1,49\n").unwrap();
    host.set_pages(0, 1_048_576, 4);
    let wish = Reservation { cpus: CpuRequest::Pool("24-47,72-95".parse().unwrap()), memory_mib: MemoryMib(188_500) };
    // Somebody uses a page there: then they are not the pool's alone.
    let folder = "sys/devices/system/node/node0/hugepages/hugepages-1048576kB";
    host.tree.write(&format!("{folder}/free_hugepages"), "3\n").unwrap();
    let failure = why(&host.allocate(wish.clone(), None).await);
    assert!(
        failure.contains("of the 4096 MiB in hugepages on node 0 only 3072 MiB are free: somebody uses"),
        "{failure}"
    );
    assert_eq!(host.restarts(), 0);
    host.set_pages(0, 1_048_576, 4);
    assert_eq!(host.allocate(wish.clone(), None).await.did, Did::Reserved(wish));
    assert_eq!(fs::read_to_string(host.path(&format!("{folder}/nr_hugepages"))).unwrap(), "0\n");
}

#[tokio::test]
async fn the_kernels_command_line_names_the_node_of_the_wish_and_pages_that_it_has() {
    let host =
        Host::with("m5.24xlarge", Faults { in_one_piece: Some(0), after_compaction: Some(0), ..Faults::default() });
    let cpus = CpuRequest::Pool("1,49".parse().unwrap());
    let failure = why(&host.allocate(Reservation { cpus, memory_mib: MemoryMib(2048) }, None).await);
    assert!(failure.contains("hugepagesz=1G hugepages=0:2 (Linux 5.16 or later)"), "{failure}");
}
