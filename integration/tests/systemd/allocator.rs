//! The enclave pool managed: the daemon as its own user, polkit, `enclaved-allocator.service` as root, and a stock service that
//! behaves as the real one does, on a sysfs that stands for the host's.

use super::DEADLINE;
use enclaved_core::status::Status;
use enclaved_integration::machine::MachineOptions;
use enclaved_integration::machine::parent::Parent;
use enclaved_integration::nitro_host::Shape;

const FILE: &str = "/etc/nitro_enclaves/allocator.yaml";
const REPORT: &str = "/run/enclaved-allocator/report.json";

/// Strict as the real one; takes all pages away before it takes new ones, and none while an enclave runs.
const STOCK: &str = r#"#!/bin/bash
set -u
how=$(cat /run/standin/stock 2>/dev/null || true)
if [ "$how" = effectless ]; then echo "Done."; exit 0; fi
sys=/run/standin/sys
pages=$sys/devices/system/node/node0/hugepages/hugepages-2048kB
pool() {
    echo "$1" > $sys/module/nitro_enclaves/parameters/ne_cpus
    echo "$2" > $sys/devices/system/cpu/online
}
read -r first < /etc/nitro_enclaves/allocator.yaml
if [ "$first" != --- ]; then echo "no ---"; exit 1; fi
memory= cpus=
while IFS=: read -r key value; do
    case $key in
        '#'* | ---) ;;
        memory_mib) memory=${value# } ;;
        cpu_count) [ "${value# }" = 6 ] && cpus=1-3,5-7 ;;
        cpu_pool) cpus=${value# } ;;
        *) echo "unknown key: $key"; exit 1 ;;
    esac
done < /etc/nitro_enclaves/allocator.yaml
if grep -q ' /run/nitro_enclaves/' /proc/net/unix; then echo "Could not re-online CPUs"; exit 1; fi
echo 0 | tee $pages/nr_hugepages > $pages/free_hugepages
pool '' 0-7
most=$(cat /run/standin/in-one-piece 2>/dev/null || echo 1000000)
if [ "$memory" -gt "$most" ]; then
    echo "Insufficient memory: $memory MiB requested, $most MiB available"
    exit 1
fi
echo $((memory / 2)) | tee $pages/nr_hugepages > $pages/free_hugepages
pool "$cpus" 0,4
echo "Reserved."
"#;

const UNIT: &str = "[Unit]\nDescription=Nitro Enclaves Resource Allocator\n\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
     ExecStart=/opt/nitro/allocator\n\n[Install]\nWantedBy=multi-user.target\n";

/// A host of 8 CPUs and 4 GiB, of which 6 CPUs and 2 GiB are set aside at its boot.
fn host() -> Parent {
    let options = MachineOptions::default().file("/opt/nitro/allocator", 0o755, STOCK).file(
        FILE,
        0o644,
        "---\nmemory_mib: 2048\ncpu_count: 6\n",
    );
    let parent = Parent::boot(&Shape::small(), options).unwrap();
    let node = "/run/standin/sys/devices/system/node/node0";
    parent.write(&format!("{node}/meminfo"), "Node 0 MemTotal: 4194304 kB\nNode 0 MemFree: 1 kB\n").unwrap();
    parent.write("/usr/lib/systemd/system/nitro-enclaves-allocator.service", UNIT).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    // The pool is for an enclave; that its image is missing makes no difference to it.
    let config =
        parent.host_config().replace("\"verify\"", "\"manage\"") + &parent.sample_enclave("a", "/srv/none.eif");
    parent.write("/etc/enclaved/enclaved.toml", config).unwrap();
    parent
}

fn start(parent: &Parent) {
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
}

fn problem(status: &Status) -> String {
    status.problems.iter().map(|problem| format!("{}\n", problem.failure)).collect()
}

fn until_it_says(parent: &Parent, parts: &[&str]) {
    let said = parent.until("it says what is wrong", |status| {
        let text = problem(status);
        parts.iter().all(|part| text.contains(part))
    });
    said.unwrap_or_else(|error| panic!("no {parts:?}: {error:#}\n{}", parent.journal("enclaved-allocator").unwrap()));
}

/// Nothing was done, and what was there is there.
fn assert_untouched(parent: &Parent) {
    assert_eq!(parent.read(FILE).unwrap(), "---\nmemory_mib: 2048\ncpu_count: 6\n");
    assert_eq!(parent.property("nitro-enclaves-allocator", "ActiveState").unwrap(), "inactive");
}

fn ask(parent: &Parent, wish: &str) -> String {
    let request = format!(r#"{{"format":1,"id":7,"wish":{wish}}}"#);
    parent.write("/run/enclaved/allocate.json", request).unwrap();
    let said = parent.run_as("enclaved", &["systemctl", "--no-ask-password", "start", "enclaved-allocator"]).unwrap();
    assert!(!said.success(), "{said:?}");
    parent.read(REPORT).unwrap()
}

#[test]
fn everything_beyond_the_reserve_is_set_aside_by_a_daemon_that_may_do_nothing_itself() {
    let parent = host();
    start(&parent);
    let settled = |status: &Status| {
        let pool = status.host.pool.as_ref();
        pool.is_some_and(|pool| pool.settled && pool.wanted_cpus == Some(6))
            && status.host.pool_memory_mib.is_some_and(|m| m.0 == 4032)
    };
    let status = parent.until("the pool is set aside", settled);
    let status = status.unwrap_or_else(|error| panic!("{error:#}\n{}", parent.journal("enclaved-allocator").unwrap()));
    assert_eq!((status.host.pool_cpus, status.host.pool_cpus_free), (Some(6), Some(6)));
    assert!(status.problems.iter().all(|problem| problem.about != "host"), "{}", problem(&status));
    let file = parent.read(FILE).unwrap();
    assert!(file.starts_with("---\n") && file.ends_with("\nmemory_mib: 4032\ncpu_count: 6\n"), "{file}");
    assert_eq!(parent.read(&format!("{FILE}.before-enclaved")).unwrap(), "---\nmemory_mib: 2048\ncpu_count: 6\n");
    assert_eq!(parent.run_ok(&["stat", "--format=%a %U", REPORT, FILE]).unwrap(), "644 root\n644 root\n");
    // Nobody else has any business there.
    for user in ["nobody", "enclaved-proxy"] {
        let said = parent.run_as(user, &["cat", "/run/enclaved-allocator/at-work"]).unwrap();
        assert!(!said.success() && said.stderr.contains("Permission denied"), "{user}: {said:?}");
    }
    assert_eq!(parent.property("enclaved-allocator", "Result").unwrap(), "success");
    assert!(parent.run_ok(&["enclavectl", "status"]).unwrap().contains("6 CPUs, 4032 MiB wanted, reserved"));
    assert!(!parent.run_ok(&["enclavectl", "plan"]).unwrap().contains("allocator"));
}

#[test]
fn memory_in_pieces_is_said_with_the_numbers_the_remedy_and_the_stock_services_own_words_and_tried_once() {
    let parent = host();
    parent.write("/run/standin/in-one-piece", "3000\n").unwrap();
    start(&parent);
    until_it_says(
        &parent,
        &[
            "asked for 6 CPUs and 4032 MiB",
            "kept the former pool of",
            "Insufficient memory: 4032 MiB requested, 3000 MiB",
            "reboot",
        ],
    );
    let status = parent.status().unwrap().unwrap();
    assert_eq!(status.host.pool_memory_mib.map(|memory| memory.0), Some(2048), "the former pool");
    let runs = || parent.journal("enclaved-allocator").unwrap().matches("Starting").count();
    parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    parent
        .until("it waits for the next boot", |status| {
            let pool = status.host.pool.as_ref();
            pool.and_then(|pool| pool.waiting_for.as_ref()).is_some_and(|why| why.contains("after the next"))
        })
        .unwrap();
    assert_eq!(runs(), 1, "once in a boot");
}

#[test]
fn a_stock_service_that_is_masked_missing_or_only_claims_success_is_found_out() {
    let parent = host();
    parent.write("/run/standin/stock", "effectless\n").unwrap();
    start(&parent);
    until_it_says(&parent, &["asked for 6 CPUs and 4032 MiB; the pool has 6 CPUs (1-3,5-7) and 2048 MiB in hugepages"]);

    let parent = host();
    parent.run_ok(&["systemctl", "mask", "nitro-enclaves-allocator"]).unwrap();
    start(&parent);
    until_it_says(&parent, &["the stock allocator did not run", "masked"]);

    let parent = host();
    parent.run_ok(&["rm", "/usr/lib/systemd/system/nitro-enclaves-allocator.service"]).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    start(&parent);
    until_it_says(&parent, &["the stock allocator did not run", "nitro-enclaves-allocator.service not found"]);
}

#[test]
fn root_keeps_the_bounds_of_its_own_configuration_whatever_the_daemon_asks_for() {
    let parent = host();
    let report = ask(&parent, r#"{"cpus":{"count":8},"memory_mib":512}"#);
    assert!(report.contains("leave the parent 2 CPUs and 64 MiB"), "{report}");
    let report = ask(&parent, r#"{"cpus":{"count":6},"memory_mib":4034}"#);
    assert!(report.contains("there are 6 CPUs and 4032 MiB"), "{report}");
    // A configuration that can't be used has no bounds, and one that says otherwise has no pool.
    let config = parent.read("/etc/enclaved/enclaved.toml").unwrap();
    for (text, why) in
        [(format!("{config}\n[nonsense]\n"), "can't be used"), (config.replace("manage", "verify"), "administrator")]
    {
        parent.write("/etc/enclaved/enclaved.toml", text).unwrap();
        let report = ask(&parent, r#"{"cpus":{"count":6},"memory_mib":512}"#);
        assert!(report.contains(why) && report.contains("\"id\": 7"), "{report}");
    }
    assert_untouched(&parent);
}

#[test]
fn nothing_is_changed_while_an_enclave_runs_that_only_its_socket_tells_of() {
    let parent = host();
    parent
        .write("/run/systemd/system/stranger.socket", "[Socket]\nListenStream=/run/nitro_enclaves/0123.sock\n")
        .unwrap();
    parent.write("/run/systemd/system/stranger.service", "[Service]\nExecStart=sleep infinity\n").unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.run_ok(&["systemctl", "start", "stranger.socket"]).unwrap();
    // Root looks for itself.
    let report = ask(&parent, r#"{"cpus":{"count":6},"memory_mib":512}"#);
    assert!(report.contains("1 enclave runs"), "{report}");
    start(&parent);
    parent
        .until("it waits", |status| {
            let pool = status.host.pool.as_ref();
            pool.and_then(|pool| pool.waiting_for.as_ref()).is_some_and(|why| why.contains("1 enclave runs"))
        })
        .unwrap();
    assert_untouched(&parent);
    parent.run_ok(&["systemctl", "stop", "stranger.socket"]).unwrap();
    parent
        .wait_until("it is changed once none runs", DEADLINE, || {
            Ok(parent.read(FILE)?.contains("memory_mib: 4032").then_some(()))
        })
        .unwrap();
}
