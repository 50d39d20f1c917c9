//! What can be had only in part, or not at all; and a stock service that does not do what it says.

use crate::host::{Faults, Host, count, why};
use enclaved::allocate::Did;
use enclaved_core::allocator_file::{self, CpuRequest, Reservation};
use enclaved_core::id::MemoryMib;
use enclaved_core::inventory::CpuSet;
use std::fs;

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
async fn a_growth_that_fails_keeps_the_former_pool() {
    let faults = Faults { in_one_piece: Some(2048), after_compaction: Some(2048), ..Faults::default() };
    let host = Host::with("m5.2xlarge", faults);
    host.end_enclaves();
    let report = host.allocate(count(6, 29_000), Some(count(4, 4096))).await;
    let former = Reservation { cpus: CpuRequest::Pool("1,5".parse().unwrap()), memory_mib: MemoryMib(512) };
    assert_eq!((&report.did, report.restarts), (&Did::KeptFormer(former), 4));
    assert_eq!(report.after, report.before);
    assert!(report.failure.unwrap().to_string().contains("reboot"));
    // A reboot is the remedy, so the file is for that.
    assert_eq!(host.file(), allocator_file::write(&count(6, 29_000)));
}

#[tokio::test]
async fn a_growth_that_fails_has_the_former_pool_rather_than_the_least() {
    let faults = Faults { in_one_piece: Some(2048), after_compaction: Some(2048), ..Faults::default() };
    let host = Host::with("m5.2xlarge", faults);
    host.end_enclaves();
    let report = host.allocate(count(6, 29_000), Some(count(2, 256))).await;
    let former = Reservation { cpus: CpuRequest::Pool("1,5".parse().unwrap()), memory_mib: MemoryMib(512) };
    assert_eq!((&report.did, report.restarts), (&Did::KeptFormer(former), 3));
    // The least is a way out where the former pool is lost.
    let faults = Faults { in_one_piece: Some(300), after_compaction: Some(300), ..Faults::default() };
    let host = Host::with("m5.2xlarge", faults);
    host.end_enclaves();
    let report = host.allocate(count(6, 29_000), Some(count(2, 256))).await;
    assert_eq!((&report.did, report.restarts), (&Did::Reserved(count(2, 256)), 4));
    assert_eq!(host.file(), allocator_file::write(&count(2, 256)));
}

#[tokio::test]
async fn hugepages_that_no_pool_had_are_there_again_after_a_try_that_failed() {
    // As the kernel's command line reserves them; and a service that gives them back before it fails.
    for no_cpus in [false, true] {
        let limit = if no_cpus { None } else { Some(512) };
        let faults = Faults { in_one_piece: limit, after_compaction: limit, no_cpus, ..Faults::default() };
        let host = Host::with("m5.xlarge", faults);
        host.set_pool(&CpuRequest::Pool(CpuSet::default()));
        host.set_pages(0, 1_048_576, 2);
        host.set_pages(0, 2048, 100);
        let file = host.file();
        let report = host.allocate(count(2, 10_240), Some(count(2, 4096))).await;
        assert!(why(&report).contains("asked for 2 CPUs and 10240 MiB"), "{report:?}");
        assert_eq!((report.after, pages(&host, 0)), (report.before, 2), "{no_cpus}");
        assert_eq!(host.file(), file, "a boot with another one would give the pages back");
    }
}

#[tokio::test]
async fn a_service_that_cannot_run_is_found_out_before_anything_is_touched() {
    let host = on_two_nodes(Faults { masked: true, ..Faults::default() });
    let before = (host.file(), pages(&host, 0));
    let report = host.allocate(on_node_1(), None).await;
    assert!(why(&report).contains("the stock allocator did not run: Unit is masked"), "{report:?}");
    assert_eq!((report.restarts, report.compacted), (0, false));
    assert_eq!((host.file(), pages(&host, 0)), before, "neither the file nor the former node's pages");
}

#[tokio::test]
async fn a_service_that_is_refused_is_not_asked_for_anything_else() {
    let host = Host::with("m5.xlarge", Faults { refused_from: Some(1), ..Faults::default() });
    let before = host.file();
    let report = host.allocate(count(2, 2048), Some(count(2, 1024))).await;
    let failure = why(&report);
    assert!(failure.contains("did not run: systemd is busy") && !failure.contains("memory is in pieces"), "{failure}");
    assert_eq!((report.restarts, report.compacted, &report.after), (0, false, &None));
    assert_eq!(host.file(), before, "nothing was changed, so the file still says what there is");
    // Nor is there a file where there was none.
    let path = host.path("etc/nitro_enclaves/allocator.yaml");
    fs::remove_file(&path).unwrap();
    host.allocate(count(2, 2048), None).await;
    assert!(!path.exists());
}

#[tokio::test(start_paused = true)]
async fn a_service_whose_end_was_not_heard_is_waited_for_and_then_its_work_counts() {
    // Had.
    let host = Host::with("m5.xlarge", Faults { lost: Some((1, 400)), ..Faults::default() });
    let report = host.allocate(count(2, 2048), None).await;
    assert_eq!((&report.did, report.restarts), (&Did::Reserved(count(2, 2048)), 1));
    // Not had: then it goes on as after any other failure, and never while it is at work (its stand-in sees to that).
    let faults = Faults { lost: Some((1, 400)), in_one_piece: Some(1024), ..Faults::default() };
    let report = Host::with("m5.xlarge", faults).allocate(count(2, 2048), None).await;
    assert_eq!((&report.did, report.restarts), (&Did::Reserved(count(2, 2048)), 2));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_done_on_top_of_a_service_that_does_not_end() {
    let host = Host::with("m5.xlarge", Faults { lost: Some((1, u32::MAX)), ..Faults::default() });
    let began = tokio::time::Instant::now();
    let report = host.allocate(count(2, 2048), Some(count(2, 1024))).await;
    let failure = why(&report);
    assert!(failure.contains("what becomes of the pool is not known: the connection ended"), "{failure}");
    assert_eq!((report.restarts, report.compacted), (1, false));
    assert!(began.elapsed().as_secs() > 37 * 60, "as long as its unit may: so long its lock says that it is at work");
    assert!(began.elapsed().as_secs() < 41 * 60);
    assert_eq!(host.file(), allocator_file::write(&count(2, 2048)), "no other file is tried");
}

#[tokio::test]
async fn the_former_pool_is_had_again_whatever_went_wrong_and_wherever_it_lies() {
    // It leaves the parent less than the reserve.
    let host = Host::with("m5.2xlarge", Faults { no_counted_cpus: true, ..Faults::default() });
    host.end_enclaves();
    host.set_pages(0, 2048, 0);
    host.set_pages(0, 1_048_576, 30);
    let report = host.allocate(count(6, 29_000), None).await;
    let former = Reservation { cpus: CpuRequest::Pool("1,5".parse().unwrap()), memory_mib: MemoryMib(30_720) };
    assert_eq!((&report.did, report.restarts), (&Did::KeptFormer(former), 3));
    assert_eq!(report.after, report.before);

    // A try failed, and the next one was refused.
    let faults = Faults { in_one_piece: Some(512), refused_from: Some(2), ..Faults::default() };
    let host = Host::with("m5.2xlarge", faults);
    host.end_enclaves();
    let report = host.allocate(count(6, 29_000), Some(count(2, 256))).await;
    let failure = why(&report);
    assert!(failure.contains("did not run: systemd is busy"), "{failure}");
    assert!(failure.contains("the former pool can't be had again: the stock allocator did not run"), "{failure}");
    let former = Reservation { cpus: CpuRequest::Pool("1,5".parse().unwrap()), memory_mib: MemoryMib(512) };
    assert_eq!(
        host.file(),
        allocator_file::write(&former),
        "the service's next run has it again, and not only the least"
    );
}

#[tokio::test]
async fn a_move_that_fails_leaves_the_former_nodes_pages_and_cpus() {
    let faults = Faults { in_one_piece: Some(4096), after_compaction: Some(4096), ..Faults::default() };
    let host = on_two_nodes(faults);
    let report = host.allocate(on_node_1(), None).await;
    let former = Reservation { cpus: CpuRequest::Pool("1,49".parse().unwrap()), memory_mib: MemoryMib(4096) };
    assert_eq!((&report.did, report.after == report.before), (&Did::KeptFormer(former), true));
    assert_eq!(pages(&host, 0), 4);
}

/// A pool of 4 GiB on node 0.
fn on_two_nodes(faults: Faults) -> Host {
    let host = Host::with("m5.24xlarge", faults);
    host.tree.write("sys/module/nitro_enclaves/parameters/ne_cpus", "1,49\n").unwrap();
    host.set_pages(0, 1_048_576, 4);
    host
}

fn on_node_1() -> Reservation {
    Reservation { cpus: CpuRequest::Pool("24-47,72-95".parse().unwrap()), memory_mib: MemoryMib(188_500) }
}

/// Pages of 1 GiB.
fn pages(host: &Host, node: u32) -> u64 {
    let folder = format!("sys/devices/system/node/node{node}/hugepages/hugepages-1048576kB");
    fs::read_to_string(host.path(&format!("{folder}/nr_hugepages"))).unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn the_kernels_command_line_names_the_node_of_the_wish_and_pages_that_it_has() {
    let host =
        Host::with("m5.24xlarge", Faults { in_one_piece: Some(0), after_compaction: Some(0), ..Faults::default() });
    let cpus = CpuRequest::Pool("1,49".parse().unwrap());
    let failure = why(&host.allocate(Reservation { cpus, memory_mib: MemoryMib(2048) }, None).await);
    assert!(failure.contains("hugepagesz=1G hugepages=0:2 (Linux 5.16 or later)"), "{failure}");
}
