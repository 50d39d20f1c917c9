//! The stand-in for the stock allocator's service: that it is as strict, and as rough, as the real one.

use enclaved_core::status::{EnclaveStatus, Status};
use enclaved_integration::machine::parent::{Parent, parent_host};

const UNIT: &str = "nitro-enclaves-allocator.service";
const POOL: &str = "/run/standin/sys/module/nitro_enclaves/parameters/ne_cpus";
const PAGES: &str = "/run/standin/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";

/// What the pool is after the service was restarted on that file; or what it said.
fn restarted(parent: &Parent, file: &str) -> Result<(String, String), String> {
    parent.write("/etc/nitro_enclaves/allocator.yaml", file).unwrap();
    let said = parent.run(&["systemctl", "restart", UNIT]).unwrap();
    if !said.success() {
        return Err(parent.journal(UNIT).unwrap());
    }
    Ok((parent.read(POOL).unwrap().trim().to_owned(), parent.read(PAGES).unwrap().trim().to_owned()))
}

#[test]
fn the_stock_allocator_reserves_what_its_file_says_and_refuses_what_its_parser_does_not_know() {
    let parent = parent_host().unwrap();
    let pool = |cpus: &str, pages: &str| Ok((cpus.to_owned(), pages.to_owned()));
    assert_eq!(restarted(&parent, "---\nmemory_mib: 512\ncpu_count: 4\n"), pool("1,2,5,6", "256"));
    assert_eq!(restarted(&parent, "---\n# known\nmemory_mib: 1024\ncpu_pool: 2-3,6-7\n"), pool("2,3,6,7", "512"));
    for wrong in [
        "memory_mib: 512\ncpu_count: 2\n",
        "---\n\nmemory_mib: 512\ncpu_count: 2\n",
        "---\nmemory_mib: 512\ncpu_count: 2",
        "---\nmemory_mib: 512 # MiB\ncpu_count: 2\n",
        "---\nmemory_mib: '512'\ncpu_count: 2\n",
        "---\nmemory_mib: 512\ncpu_count: 2\ncpu_pool: 1,5\n",
        "---\nmemory_mib: 512\ncpu_pool: [1, 5]\n",
        "---\nmemory_mib: 512\ncpu_pool: 0,4\n",
        "---\nmemory_mib: 512\ncpu_pool: 1\n",
        "---\nmemory_mib: 512\ncpu_count: 3\n",
        "---\nmemory_mib: 512\ncpus: 2\n",
    ] {
        let said = restarted(&parent, wrong).unwrap_err();
        assert!(said.contains("Error: "), "{wrong:?}: {said}");
    }
    // Nothing of that got as far as the pool.
    assert_eq!(parent.read(POOL).unwrap(), "2,3,6,7\n");
}

#[test]
fn the_stock_allocator_takes_nothing_where_it_can_not_take_all_and_has_given_back_what_there_was() {
    let parent = parent_host().unwrap();
    restarted(&parent, "---\nmemory_mib: 512\ncpu_count: 2\n").unwrap();
    parent.write("/run/standin/memory_mib", "1000").unwrap();
    let said = restarted(&parent, "---\nmemory_mib: 2048\ncpu_count: 2\n").unwrap_err();
    assert!(said.contains("insufficient huge pages"), "{said}");
    assert_eq!(parent.read(PAGES).unwrap(), "0\n");
}

#[test]
fn the_stock_allocator_refuses_while_an_enclave_runs() {
    let parent = parent_host().unwrap();
    restarted(&parent, "---\nmemory_mib: 512\ncpu_count: 2\n").unwrap();
    parent.put_image("/srv/a.eif", &parent.sample_application("a")).unwrap();
    parent.configure(&parent.sample_enclave("a", "/srv/a.eif")).unwrap();
    parent.run_ok(&["systemctl", "start", "enclaved"]).unwrap();
    parent.until("the enclave is ready", |status| status.ready && !status.enclaves.is_empty()).unwrap();
    let said = restarted(&parent, "---\nmemory_mib: 512\ncpu_count: 4\n").unwrap_err();
    assert!(said.contains("Could not re-online CPUs"), "{said}");
    assert_eq!(parent.read(POOL).unwrap(), "1,5\n");
}

#[test]
fn a_stock_allocator_that_hangs_keeps_the_daemon_neither_from_its_start_nor_from_waiting_for_the_pool() {
    let parent = parent_host().unwrap();
    let hangs = "[Service]\nExecStart=\nExecStart=/bin/bash -c 'until [ -e /run/standin/go-on ]; do sleep 0.05; done; \
         exec /usr/bin/nitro-enclaves-allocator'\n";
    parent.write(&format!("/run/systemd/system/{UNIT}.d/hangs.conf"), hangs).unwrap();
    parent.write("/etc/nitro_enclaves/allocator.yaml", "---\nmemory_mib: 512\ncpu_count: 2\n").unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.put_image("/srv/a.eif", &parent.sample_application("a")).unwrap();
    // In the pool as it is, which is the administrator's, there would be room.
    parent.configure(&parent.sample_enclave("a", "/srv/a.eif")).unwrap();
    parent.run_ok(&["systemctl", "start", "--no-block", UNIT]).unwrap();
    parent.run_ok(&["timeout", "20", "systemctl", "start", "enclaved"]).unwrap();
    assert_eq!(parent.property("enclaved", "ActiveState").unwrap(), "active", "it said that it is ready");
    let waits = |status: &Status| {
        let of =
            |enclave: &EnclaveStatus| enclave.waiting_for.as_ref().is_some_and(|why| why.contains("being changed"));
        status.enclaves.first().is_some_and(of)
    };
    parent.until("the enclave waits for the pool", waits).unwrap();
    assert!(parent.calls().unwrap().iter().all(|call| call.command() != "run-enclave"));
    parent.write("/run/standin/go-on", "").unwrap();
    parent.until("the enclave is ready", |status| status.ready && !status.enclaves.is_empty()).unwrap();
    assert_eq!(parent.read(POOL).unwrap(), "1,5\n", "the stock service was done by then");
}
