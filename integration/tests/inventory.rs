//! The recorded hosts, read by the daemon's own reader, and what it decides for them.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

use enclaved::host::inventory::{HostInventory, InventorySource, Roots};
use enclaved_core::allocator_file::{CpuRequest, Reservation};
use enclaved_core::desired::UpdatePolicy;
use enclaved_core::id::MemoryMib;
use enclaved_core::inventory::{AllocatorService, Device, Inventory};
use enclaved_core::observed::Observation;
use enclaved_core::sizing::pool::{PoolNow, PoolPolicy, kernel_arguments, wanted};
use enclaved_core::sizing::{Capacity, Demand, Reserve, admit};
use enclaved_integration::host_tree::{HostTree, SHAPES};
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;

async fn read(tree: &HostTree) -> Inventory {
    HostInventory::new(Roots::below(tree.path()), tree.path().join("usr/bin/nitro-cli")).read().await
}

async fn inventory(shape: &str) -> Inventory {
    read(&HostTree::unpack(shape).unwrap()).await
}

async fn capacity(shape: &str) -> Capacity {
    Capacity::of(&inventory(shape).await, Reserve::default()).unwrap()
}

fn known<T: std::fmt::Debug>(observation: &Observation<T>) -> &T {
    match observation {
        Observation::Known(value) => value,
        Observation::Unknown(failure) => panic!("{failure}"),
    }
}

fn reason<T: std::fmt::Debug>(observation: &Observation<T>) -> String {
    match observation {
        Observation::Known(value) => panic!("{value:?} is known"),
        Observation::Unknown(failure) => failure.to_string(),
    }
}

fn demand(cpus: u32, memory: u64) -> Demand {
    let update = UpdatePolicy::Recreate;
    Demand { name: "signer".parse().unwrap(), cpus, memory: MemoryMib(memory), image_size: None, update }
}

#[tokio::test]
async fn every_recorded_host_is_read_in_full_but_for_what_it_does_not_have() {
    for shape in SHAPES {
        let seen = inventory(shape).await;
        let laptop = shape == "laptop";
        assert_eq!(seen.instance_type.known().map(String::as_str), (!laptop).then_some(shape));
        assert_eq!(known(&seen.driver_loaded), &!laptop);
        for (number, cpu) in known(&seen.cpus) {
            known(&cpu.node);
            assert!(known(&cpu.core).contains(*number), "{shape}: {cpu:?}");
        }
        for node in known(&seen.nodes).values() {
            assert!(known(&node.total_kib) > known(&node.free_kib) && !known(&node.hugepages).is_empty());
        }
        assert_eq!(matches!(known(&seen.device), Device::Present { .. }), !laptop);
        let service = known(&seen.allocator_service);
        assert_eq!(service.installed, !laptop);
        assert_eq!(seen.pool.known().is_some(), !laptop);
        let reason = reason(&seen.nitro_cli);
        assert!(reason.contains("usr/bin/nitro-cli --version: No such file"), "{reason}");
    }
}

#[tokio::test]
async fn a_host_with_an_enclave_shows_its_pool_its_hugepages_and_that_it_runs() {
    let seen = inventory("m5.2xlarge").await;
    assert_eq!(known(&seen.pool).to_string(), "1,5");
    let cpus = known(&seen.cpus);
    assert_eq!(cpus.values().filter(|cpu| cpu.online).count(), 6);
    assert_eq!(known(&cpus[&1].core).to_string(), "1,5", "which the kernel does not say of CPUs that are offline");
    assert_eq!(seen.pool_nodes().unwrap(), [0]);
    assert_eq!(seen.hugepages_on(0).unwrap(), (MemoryMib(512), MemoryMib(0)));
    assert_eq!(PoolNow::of(&seen).unwrap().memory, MemoryMib(512));
    assert_eq!(known(&seen.enclaves), &1);
    assert_eq!(known(&seen.allocator_service), &AllocatorService { installed: true, enabled: true });
    let file = known(&seen.allocator_file).as_ref().unwrap();
    let stock = Reservation { cpus: CpuRequest::Count(2), memory_mib: MemoryMib(512) };
    assert_eq!((&file.outcome, file.remarks.len()), (&Ok(stock), 0));
    // What enclaves may have does not depend on what is reserved now.
    assert_eq!(capacity("m5.2xlarge").await.nodes[0].cores.len(), 3);
}

#[tokio::test]
async fn a_file_that_the_allocator_misreads_is_seen_before_it_fails() {
    let seen = inventory("m5.4xlarge").await;
    let reason = known(&seen.allocator_file).as_ref().unwrap().outcome.clone().unwrap_err();
    assert!(reason.contains("a comment on the line of a value becomes part of it"), "{reason}");
}

#[tokio::test]
async fn real_memory_is_what_is_given_out_and_it_is_less_than_nominal() {
    for (shape, cpus, real, nominal) in [
        ("m5.xlarge", 2, 13_474, 14),
        ("m5.2xlarge", 6, 29_208, 30),
        ("m5.4xlarge", 14, 60_834, 62),
        ("m5.8xlarge", 30, 123_942, 126),
    ] {
        let capacity = capacity(shape).await;
        assert_eq!(capacity.budget(&capacity.nodes[0]), (cpus, MemoryMib(real)), "{shape}");
        assert_eq!(capacity.size().unwrap().nominal(Reserve::default()), (cpus, MemoryMib(nominal * 1024)), "{shape}");
        admit(&capacity, &[demand(cpus, real)]).unwrap();
        let refusal = admit(&capacity, &[demand(cpus, nominal * 1024)]).unwrap_err().to_string();
        assert!(refusal.contains(&format!("{real} MiB can be had")), "{refusal}");
        assert!(refusal.contains(&format!("and {nominal} GiB for enclaves")), "{refusal}");
    }
}

#[tokio::test]
async fn a_pool_of_everything_is_found_complete_on_the_host_that_has_it() {
    let seen = inventory("m5.8xlarge").await;
    let capacity = Capacity::of(&seen, Reserve::default()).unwrap();
    let now = PoolNow::of(&seen).unwrap();
    let all = wanted(PoolPolicy::All, &capacity, &[demand(8, 16_384)]).unwrap().unwrap();
    assert!(now.is(&all), "{now:?} {all:?}");
    assert_eq!(all.wish.cpus, CpuRequest::Count(30));
    assert!(!now.is(&wanted(PoolPolicy::Exact, &capacity, &[demand(8, 16_384)]).unwrap().unwrap()));
}

#[tokio::test]
async fn on_two_nodes_the_node_of_the_pool_that_is_there_comes_first() {
    let tree = HostTree::unpack("m5.24xlarge").unwrap();
    tree.write("sys/module/nitro_enclaves/parameters/ne_cpus", "1,49\n").unwrap();
    tree.write("sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages", "4\n").unwrap();
    tree.write("sys/devices/system/node/node0/hugepages/hugepages-1048576kB/free_hugepages", "4\n").unwrap();
    let seen = read(&tree).await;
    let capacity = Capacity::of(&seen, Reserve::default()).unwrap();
    let now = PoolNow::of(&seen).unwrap();
    assert_eq!((capacity.nodes[0].node, now.node, now.memory), (0, Some(0), MemoryMib(4096)));
    let exact = wanted(PoolPolicy::Exact, &capacity, &[demand(2, 4096)]).unwrap().unwrap();
    assert!(now.is(&exact) && now.is_just(&exact.wish, &seen, &capacity).unwrap(), "{now:?} {exact:?}");
    assert_ne!(CpuRequest::Pool(now.cpus.clone()), exact.wish.cpus, "which CPUs they are makes no difference");
}

#[tokio::test]
async fn on_two_nodes_the_cpus_are_named_and_lie_on_the_node_without_cpu_0() {
    let capacity = capacity("m5.24xlarge").await;
    let all = wanted(PoolPolicy::All, &capacity, &[]).unwrap().unwrap();
    assert_eq!(all.wish.cpus, CpuRequest::Pool("24-47,72-95".parse().unwrap()));
    assert_eq!(all.wish.memory_mib, MemoryMib(188_500));
    assert_eq!(
        kernel_arguments(all.wish.memory_mib, &capacity.nodes[0].pages_mib, Some(all.node)),
        "hugepagesz=1G hugepages=1:184 hugepagesz=2M hugepages=1:42"
    );
}

#[tokio::test]
async fn without_smt_every_cpu_but_the_reserve_can_be_had() {
    for (shape, cpus) in [("c6g.xlarge", 2), ("m7g.2xlarge", 6)] {
        let capacity = capacity(shape).await;
        assert_eq!((capacity.threads_per_core, capacity.budget(&capacity.nodes[0]).0), (1, cpus), "{shape}");
        assert_eq!(capacity.nodes[0].pages_mib, [2, 32, 1024], "{shape}: pages of 64 KiB are too small for enclaves");
        admit(&capacity, &[demand(1, 512)]).unwrap();
    }
    let seen = inventory("m7g.2xlarge").await;
    assert_eq!(seen.hugepages_on(0).unwrap(), (MemoryMib(4096), MemoryMib(2048)));
}

#[tokio::test]
async fn a_laptop_is_read_as_it_is_and_its_surplus_pages_do_not_count() {
    let seen = inventory("laptop").await;
    assert!(reason(&seen.instance_type).contains("LENOVO"));
    assert!(reason(&seen.pool).contains("driver is not loaded"));
    assert_eq!(seen.hugepages_on(0).unwrap().0, MemoryMib(0));
    let cores = &Capacity::of(&seen, Reserve::default()).unwrap().nodes[0].cores;
    assert_eq!(
        cores.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["2,3"],
        "cores of one thread are of another kind"
    );
}

/// A file that is broken, and in which fields of the inventory (as JSON) that must show.
#[tokio::test]
async fn a_file_that_is_missing_or_garbled_makes_its_own_field_unknown_and_no_other() {
    const NODE: &str = "sys/devices/system/node/node0";
    let cases: &[(&str, &str, &str, &str)] = &[
        ("sys/devices/system/cpu/online", "0-x", "/cpus", "cpu/online is not understood: \"0-x\" is not a CPU list"),
        (
            "sys/devices/system/cpu/cpu0/topology/core_cpus_list",
            "0-99999999999",
            "/cpus/0/core",
            "core_cpus_list is not understood",
        ),
        ("sys/module/nitro_enclaves/parameters/ne_cpus", "all", "/pool", "ne_cpus is not understood"),
        (&format!("{NODE}/meminfo"), "MemTotal: lots", "/nodes/0/total_kib", "meminfo is not understood"),
        (&format!("{NODE}/hugepages/hugepages-2048kB/free_hugepages"), "7", "/nodes/0/hugepages", "7 of 0 free"),
        ("proc/net/unix", "\u{fffd}", "/enclaves", ""),
        ("sys/class/dmi/id/product_name", "rm -rf /", "/instance_type", "an instance type was expected"),
    ];
    for (file, garbage, field, expected) in cases {
        let tree = HostTree::unpack("m5.xlarge").unwrap();
        let whole = serde_json::to_value(read(&tree).await).unwrap();
        tree.write(file, garbage).unwrap();
        let garbled = serde_json::to_value(read(&tree).await).unwrap();
        let said = garbled.pointer(field).unwrap();
        if expected.is_empty() {
            assert_eq!(said, &serde_json::json!(0), "{file}");
        } else {
            let said = said["unknown"]["message"].as_str().unwrap();
            assert!(said.contains(expected), "{file}: {said}");
        }
        // A CPU's sibling no longer agrees with it, and the node's free memory is in the same file.
        let others = |value: &serde_json::Value| {
            let mut value = value.clone();
            let top = field.split('/').nth(1).unwrap();
            value.as_object_mut().unwrap().remove(top);
            value
        };
        assert_eq!(others(&garbled), others(&whole), "{file}");

        std::fs::remove_file(tree.path().join(file)).unwrap();
        let without = serde_json::to_value(read(&tree).await).unwrap();
        if !file.contains("core_cpus_list") {
            let said = without.pointer(field).unwrap()["unknown"]["message"].as_str().unwrap();
            assert!(said.contains("is missing"), "{file}: {said}");
        }
    }
}

#[tokio::test]
async fn a_host_with_nothing_to_be_read_is_unknown_everywhere_and_nothing_is_decided_from_it() {
    let empty = tempfile::tempdir().unwrap();
    let seen = HostInventory::new(Roots::below(empty.path()), "/nonexistent/nitro-cli").read().await;
    assert!(reason(&seen.cpus).contains("sys/devices/system/cpu/online is missing"));
    assert!(reason(&seen.enclaves).contains("proc/net/unix is missing"));
    // A kernel without memory nodes has one, and nothing is known of this one.
    assert!(reason(&known(&seen.nodes)[&0].total_kib).contains("proc/meminfo is missing"));
    assert!(Capacity::of(&seen, Reserve::default()).is_err() && PoolNow::of(&seen).is_err());
}

#[tokio::test]
async fn a_kernel_without_memory_nodes_has_node_0() {
    let tree = HostTree::unpack("m5.xlarge").unwrap();
    std::fs::remove_dir_all(tree.path().join("sys/devices/system/node")).unwrap();
    for file in ["nr_hugepages", "free_hugepages", "surplus_hugepages"] {
        tree.write(&format!("sys/kernel/mm/hugepages/hugepages-2048kB/{file}"), "0\n").unwrap();
    }
    let capacity = Capacity::of(&read(&tree).await, Reserve::default()).unwrap();
    assert_eq!(capacity.budget(&capacity.nodes[0]), (2, MemoryMib(13_474)));
}

#[tokio::test]
async fn what_nitro_cli_says_of_its_version_is_believed_only_if_it_is_one() {
    let tree = HostTree::unpack("m5.xlarge").unwrap();
    let scripts = [
        ("echo Nitro CLI 1.5.2", Ok("1.5.2")),
        ("echo hello", Err("a version of nitro-cli was expected, found \"hello\"")),
        ("exec yes Nitro CLI 1.5.2", Err("signal")),
        ("echo Nitro CLI 1.5.2; exit 3", Err("exit status: 3")),
    ];
    for (script, expected) in scripts {
        tree.write("usr/bin/nitro-cli", &format!("#!/bin/sh\n[ \"$1\" = --version ] || exit 9\n{script}\n")).unwrap();
        std::fs::set_permissions(tree.path().join("usr/bin/nitro-cli"), std::fs::Permissions::from_mode(0o755))
            .unwrap();
        let seen = read(&tree).await.nitro_cli;
        match expected {
            Ok(version) => assert_eq!(known(&seen), version),
            Err(part) => assert!(reason(&seen).contains(part), "{}", reason(&seen)),
        }
    }
}

/// On a recorded host whatever is reserved is whole cores that exist, without CPU 0's.
#[tokio::test]
async fn whatever_is_admitted_on_a_recorded_host_keeps_its_rules() {
    for shape in SHAPES {
        let seen = inventory(shape).await;
        let cpus = known(&seen.cpus).clone();
        let config = ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() };
        let demands = prop::collection::vec((1_u32..40, 64_u64..60_000), 0..5);
        let reserve = (0_u32..10, 0_u64..9000);
        proptest!(config, |(sizes in demands, (reserve_cpus, reserve_mib) in reserve, all in any::<bool>())| {
            let reserve = Reserve { cpus: reserve_cpus, memory: MemoryMib(reserve_mib) };
            let capacity = Capacity::of(&seen, reserve).unwrap();
            let demands: Vec<_> = sizes.into_iter().map(|(cpus, memory)| demand(cpus, memory)).collect();
            let policy = if all { PoolPolicy::All } else { PoolPolicy::Exact };
            let Ok(Some(wanted)) = wanted(policy, &capacity, &demands) else { return Ok(()) };
            prop_assert!(wanted.wish.cpus.count() + reserve_cpus <= cpus.len().try_into().unwrap());
            if let CpuRequest::Pool(pool) = &wanted.wish.cpus {
                for cpu in pool.iter() {
                    let core = known(&cpus[&cpu].core);
                    prop_assert!(core.is_subset(pool) && !core.contains(0));
                    prop_assert_eq!(known(&cpus[&cpu].node), &wanted.node);
                }
            }
        });
    }
}
