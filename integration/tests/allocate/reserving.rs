//! What is asked for is reserved, within the bounds of the host, and nothing that is not strictly asked for.

use crate::host::{Host, count, why};
use enclaved::allocate::{Did, Places, Report, allocate, publish};
use enclaved::host::inventory::{HostInventory, Roots};
use enclaved_core::allocator_file::{self, CpuRequest, Reservation};
use enclaved_core::id::{MemoryMib, Timestamp};
use enclaved_core::sizing::Reserve;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

#[tokio::test]
async fn what_is_asked_for_is_reserved_once_and_then_left_alone() {
    let host = Host::new("m5.2xlarge");
    host.end_enclaves();
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
    // An enclave that boots by hand has taken its memory, and there is no socket of it yet.
    host.tree.write("proc/net/unix", "").unwrap();
    let report = host.allocate(count(4, 1024), None).await;
    assert!(why(&report).contains("512 MiB of the hugepages are in use; an enclave may be booting"), "{report:?}");
    // A launch of enclaved that has not come as far.
    host.end_enclaves();
    let lock = fs::File::create(host.path("run/launch.lock")).unwrap();
    lock.lock().unwrap();
    let report = host.allocate(count(4, 1024), None).await;
    assert!(why(&report).contains("an enclave is being launched"), "{report:?}");
    assert_eq!(host.restarts(), 0);
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
            launch_lock: host.path("run/launch.lock"),
            compact_memory: host.path("proc/sys/vm/compact_memory"),
            sysfs: host.path("sys"),
        };
        let report = allocate(&places, Reserve::default(), &inventory, &host, Timestamp::from_millis(1)).await;
        assert!(why(&report).contains("is not taken"), "{report:?}");
    }
    assert_eq!(host.restarts(), 0);
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
