//! That every check can fail, and then says what to do: one that can't is none. (The configuration is judged by `enclavectl doctor`
//! itself, and tested there.)

use super::access::PathSeen;
use super::access::tests::account;
use super::cloud::{self, ImageSeen, MetadataSeen};
use super::network::{self, EndpointSeen, Holder, ListenSeen, LowPorts};
use super::nitro::{self, HeartbeatSeen};
use super::pool::tests::inventory;
use super::pool::{self, SetAsideBy, Wanted};
use super::rights::{self, BusSeen, PolkitSeen, Right};
use super::system::{self, ClockSeen, DescriptorsSeen, DiskSeen};
use super::{Check, Finding, Outcome};
use crate::desired::UpdatePolicy;
use crate::failure::Failure;
use crate::id::MemoryMib;
use crate::inventory::{AllocatorService, Device, Inventory};
use crate::observed::Observation::{Known, Unknown};
use crate::sizing::{Demand, Reserve};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

fn wanted(by: SetAsideBy, cpus: u32, memory: u64) -> Wanted {
    let (name, update) = ("signer".parse().unwrap(), UpdatePolicy::Recreate);
    let demand = Demand { name, cpus, memory: MemoryMib(memory), image_size: None, update };
    Wanted { demands: vec![demand], reserve: Reserve::default(), by }
}

/// A host on which nothing is as it should be, as each check sees it.
fn worst() -> Vec<Finding> {
    let host = inventory();
    let bare = Inventory {
        driver_loaded: Known(false),
        device: Known(Device::Absent),
        nitro_cli: Unknown(Failure::new("nitro-cli --version: No such file or directory")),
        allocator_service: Known(AllocatorService { installed: false, enabled: false }),
        ..host.clone()
    };
    let shut = Device::Present { mode: 0o600, uid: 0, gid: 0, character_device: true, openable: Ok(()) };
    let shut = Inventory { device: Known(shut), ..host.clone() };
    let account = Known(account());
    let missing = |path: &str| Known(PathSeen { path: path.to_owned(), above: Vec::new(), node: None });
    let refused = || Failure::new("403 Forbidden").with_remedy("allow it");
    let start = Right { verb: "start", unit: "enclave@x-1.service" };
    let image = ImageSeen {
        source: "s3://bucket/signer.eif".to_owned(),
        size: Known(Err(refused())),
        cached: false,
        kept_from: None,
    };
    let endpoint = EndpointSeen {
        endpoint: "kms:443".to_owned(),
        enclaves: vec!["signer".to_owned()],
        allowed: Vec::new(),
        addresses: Known(Err("Name or service not known".to_owned())),
    };
    let port = ListenSeen {
        what: "HTTPS".to_owned(),
        address: "[::]:443".parse().unwrap(),
        holder: Known(Holder::Other("nginx, process 12".to_owned())),
    };
    let low = LowPorts { free_from: 1024, may_bind: Some(true) };
    let clock = ClockSeen { kept_by: None, apart: vec![("S3".to_owned(), Duration::from_secs(3600))] };
    let descriptors = DescriptorsSeen { whose: "the daemon".to_owned(), limit: 64, open: Some(60) };
    let disk = DiskSeen { path: "/var/lib/enclaved".to_owned(), free: 0, free_inodes: None, kept_from: None };
    let mut findings = vec![
        nitro::driver(&bare),
        nitro::device(&bare),
        nitro::device_group(&shut, &account),
        nitro::sockets_folder(&missing("/run/nitro_enclaves"), &account),
        nitro::log_folder(&missing("/var/log/nitro_enclaves"), &account),
        nitro::nitro_cli(&bare),
        nitro::heartbeat_port(&Known(HeartbeatSeen::Held)),
        pool::sizing(&host, &wanted(SetAsideBy::Enclaved, 64, 64)),
        pool::cpu_pool(&host, &wanted(SetAsideBy::Administrator, 6, 64)),
        pool::hugepages(&host, &wanted(SetAsideBy::Administrator, 2, 8192)),
        pool::allocator_service(&bare, &wanted(SetAsideBy::Enclaved, 2, 64)),
        rights::bus(&Known(BusSeen::Unreachable("no such file".to_owned())), std::slice::from_ref(&start)),
        rights::polkit(&Known(PolkitSeen::Answers(BTreeMap::from([(start.clone(), false)]))), &[start]),
        cloud::metadata(&Known(MetadataSeen::HopLimit), true),
        cloud::role_credentials(Some(&Known(Err(refused())))),
        system::clock_source(&Known("jiffies".to_owned())),
        system::clock_drift(&Known(clock)),
        system::file_descriptors(&Known(descriptors)),
        system::disk(&Known(disk), 0),
    ];
    findings.extend(cloud::images(&[image]));
    findings.extend(network::egress_dns(&[endpoint], &Known(Vec::new())));
    findings.extend(network::listening_ports(&[port], low));
    findings
}

#[test]
fn every_check_can_fail_and_says_what_to_do() {
    let findings = worst();
    for finding in &findings {
        // With a slow clock enclaves are launched all the same.
        let expected = if finding.check == Check::ClockSource { Outcome::Warning } else { Outcome::Failure };
        assert_eq!(finding.outcome, expected, "{finding:?}");
        assert!(finding.remedy.as_ref().is_some_and(|remedy| !remedy.is_empty()), "{finding:?}");
        assert!(!finding.seen.is_empty(), "{finding:?}");
    }
    let failed: BTreeSet<Check> = findings.iter().map(|finding| finding.check).collect();
    let all: BTreeSet<Check> = Check::ALL.iter().copied().filter(|check| *check != Check::Configuration).collect();
    assert_eq!(failed, all);
}
