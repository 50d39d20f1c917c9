//! The whole way on a fresh host: the pool set aside by root's unit and the stock service, enclaves launched in it by their units, and
//! what later changes of the configuration cost; and what becomes of all that while the stock service does not end.

use super::DEADLINE;
use enclaved_core::status::{EnclaveStatus, Status};
use enclaved_integration::machine::MachineOptions;
use enclaved_integration::machine::parent::Parent;
use enclaved_integration::nitro_host::Shape;
use std::time::Duration;

const STOCK: &str = "nitro-enclaves-allocator";

/// A host of 8 CPUs and 4 GiB, on which nothing is set aside.
fn fresh(options: MachineOptions) -> Parent {
    let parent = Parent::boot(&Shape { cores: Vec::new(), hugepages: 0, cpus: 8 }, options).unwrap();
    for name in ["signer", "vault"] {
        parent.put_image(&image(name), &parent.sample_application(name)).unwrap();
    }
    parent
}

fn image(name: &str) -> String {
    format!("/opt/images/{name}.eif")
}

/// The host's configuration with these enclaves and their CPUs.
fn configure(parent: &Parent, pool: &str, enclaves: &[(&str, u32)]) {
    let host = parent.host_config().replace("\"verify\"\n", &format!("\"manage\"\npool = \"{pool}\"\n"));
    let enclave = |(name, cpus): &(&str, u32)| {
        parent.sample_enclave(name, &image(name)).replace("cpus = 2", &format!("cpus = {cpus}"))
    };
    let enclaves: String = enclaves.iter().map(enclave).collect();
    parent.write("/etc/enclaved/enclaved.toml", host + &enclaves).unwrap();
}

fn start(parent: &Parent) {
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
}

fn reload(parent: &Parent) {
    parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
}

fn of<'a>(status: &'a Status, name: &str) -> Option<&'a EnclaveStatus> {
    status.enclaves.iter().find(|enclave| enclave.name.as_str() == name)
}

fn until_ready(parent: &Parent, names: &[&str]) -> Status {
    let ready = |status: &Status| names.iter().all(|name| of(status, name).is_some_and(|enclave| enclave.ready));
    let status = parent.until(&format!("{names:?} are ready"), ready);
    status.unwrap_or_else(|error| panic!("{error:#}\n{}", parent.journal("enclaved-allocator").unwrap()))
}

/// How often the allocator was asked, and how often the stock service ran for it.
fn runs(parent: &Parent) -> (usize, usize) {
    let starts = |unit: &str| parent.journal(unit).unwrap().matches("Starting").count();
    (starts("enclaved-allocator"), starts(STOCK))
}

fn pool_waits(status: &Status) -> &str {
    status.host.pool.as_ref().and_then(|pool| pool.waiting_for.as_deref()).unwrap_or_default()
}

#[test]
fn a_fresh_host_sets_everything_aside_launches_and_never_needs_the_allocator_again() {
    let parent = fresh(MachineOptions::default());
    configure(&parent, "all", &[("signer", 2)]);
    start(&parent);
    let status = until_ready(&parent, &["signer"]);
    assert_eq!((status.host.pool_cpus, status.host.pool_memory_mib.map(|memory| memory.0)), (Some(6), Some(4032)));
    assert_eq!(parent.property("enclave@signer-1", "ActiveState").unwrap(), "active");
    assert_eq!(runs(&parent), (1, 1));
    // A second one, an update of the first, the end of both: all in what is there.
    configure(&parent, "all", &[("signer", 2), ("vault", 2)]);
    reload(&parent);
    until_ready(&parent, &["signer", "vault"]);
    parent.put_image(&image("signer"), &parent.sample_application("new")).unwrap();
    configure(&parent, "all", &[("signer", 4), ("vault", 2)]);
    reload(&parent);
    let generation =
        |status: &Status, name: &str| of(status, name).and_then(|enclave| enclave.generation).map(|of| of.0);
    parent
        .until("the update serves", |status| {
            generation(status, "signer") == Some(2) && of(status, "signer").is_some_and(|signer| signer.ready)
        })
        .unwrap();
    parent.run_ok(&["systemctl", "kill", "--signal=KILL", "enclave@signer-2", "enclave@vault-1"]).unwrap();
    parent
        .until("both were launched again", |status| {
            status.ready && generation(status, "signer") > Some(2) && generation(status, "vault") > Some(1)
        })
        .unwrap();
    assert_eq!(runs(&parent), (1, 1));
}

#[test]
fn an_exact_pool_follows_the_enclaves_once_none_runs_and_says_that_it_waits() {
    let parent = fresh(MachineOptions::default());
    configure(&parent, "exact", &[("signer", 2)]);
    start(&parent);
    // With room for its update, as there is some.
    let status = until_ready(&parent, &["signer"]);
    assert_eq!(status.host.pool_cpus, Some(4));
    configure(&parent, "exact", &[("signer", 2), ("vault", 4)]);
    reload(&parent);
    let status = parent.until("it waits", |status| pool_waits(status).contains("1 enclave runs")).unwrap();
    assert!(pool_waits(&status).contains("the allocator changes the pool only when none does"), "{status:#?}");
    let text = parent.run_ok(&["enclavectl", "status"]).unwrap();
    assert!(text.contains("1 enclave runs, and the allocator changes the pool only when none does"), "{text}");
    assert!(of(&status, "signer").is_some_and(|signer| signer.ready));
    assert_eq!(runs(&parent), (1, 1));
    // What it says helps.
    let says = |status: &Status| of(status, "vault").and_then(|vault| vault.waiting_for.clone());
    let way_out =
        |status: &Status| says(status).is_some_and(|why| why.contains("`enclavectl stop` the enclaves that run"));
    parent.until("it says what helps", way_out).unwrap();
    parent.run_ok(&["enclavectl", "stop", "signer"]).unwrap();
    let status = until_ready(&parent, &["vault"]);
    assert_eq!(status.host.pool_cpus, Some(6));
    parent.run_ok(&["enclavectl", "start", "signer"]).unwrap();
    until_ready(&parent, &["signer", "vault"]);
    assert_eq!(runs(&parent), (2, 2));
}

#[test]
fn a_stock_service_that_outlives_roots_process_keeps_launches_waiting_until_it_is_over() {
    let waits = "[Service]\nExecStart=\nExecStart=/bin/bash -c 'until [ -e /run/standin/go-on ]; do sleep 0.05; done; \
         exec /usr/bin/nitro-enclaves-allocator'\n";
    let drop_in = format!("/etc/systemd/system/{STOCK}.service.d/slow.conf");
    let parent = fresh(MachineOptions::default().file(drop_in, 0o644, waits));
    configure(&parent, "all", &[("signer", 2)]);
    start(&parent);
    let until = |unit: &str, value: &str| {
        let is = || Ok((parent.property(unit, "ActiveState")? == value).then_some(()));
        parent.wait_until(&format!("{unit} is {value}"), DEADLINE, is).unwrap();
    };
    until(STOCK, "activating");
    parent.run_ok(&["systemctl", "kill", "--signal=KILL", "enclaved-allocator"]).unwrap();
    until("enclaved-allocator", "failed");
    // Nobody holds the lock any more. Nor does the next daemon know more than what systemd says.
    for _ in 0..2 {
        parent.until("it is seen at work", |status| pool_waits(status) == "the allocator is at work").unwrap();
        parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    }
    parent.until("it is seen at work", |status| pool_waits(status) == "the allocator is at work").unwrap();
    assert_eq!(parent.property(STOCK, "ActiveState").unwrap(), "activating");
    assert!(parent.calls().unwrap().iter().all(|call| !format!("{call:?}").contains("run-enclave")), "it is launched");
    parent.write("/run/standin/go-on", "").unwrap();
    let status = until_ready(&parent, &["signer"]);
    assert_eq!(status.host.pool_cpus, Some(6));
    assert_eq!(runs(&parent).1, 1, "what it did was enough");
}

#[test]
fn root_waits_for_a_stock_service_of_which_the_bus_does_not_tell_any_more() {
    let waits = "[Service]\nExecStart=\nExecStart=/bin/bash -c 'until [ -e /run/standin/go-on ]; do sleep 0.05; done; \
         exec /usr/bin/nitro-enclaves-allocator'\n";
    let drop_in = format!("/etc/systemd/system/{STOCK}.service.d/slow.conf");
    let parent = fresh(MachineOptions::default().file(drop_in, 0o644, waits));
    configure(&parent, "all", &[("signer", 2)]);
    start(&parent);
    let activating = || Ok((parent.property(STOCK, "ActiveState")? == "activating").then_some(()));
    parent.wait_until("the stock service is at work", DEADLINE, activating).unwrap();
    // Its job is taken away: it goes on without one.
    let jobs = parent.run_ok(&["systemctl", "list-jobs", "--no-legend"]).unwrap();
    let job = jobs.lines().find(|line| line.contains(STOCK)).and_then(|line| line.split_whitespace().next());
    parent.run_ok(&["systemctl", "cancel", job.unwrap()]).unwrap();
    assert_eq!(parent.property(STOCK, "ActiveState").unwrap(), "activating");
    for _ in 0..20 {
        assert_eq!(parent.property("enclaved-allocator", "ActiveState").unwrap(), "activating", "it waits");
    }
    parent.write("/run/standin/go-on", "").unwrap();
    until_ready(&parent, &["signer"]);
    assert_eq!(runs(&parent), (1, 1));
}

#[test]
fn what_does_not_begin_is_taken_back_so_that_it_does_not_begin_later() {
    let parent = fresh(MachineOptions::default());
    // Something that the allocator's unit has to wait for, and that does not end.
    let never = "[Service]\nType=oneshot\nExecStart=sleep infinity\n";
    parent.write("/run/systemd/system/never.service", never).unwrap();
    let after = "[Unit]\nAfter=never.service\n";
    parent.write("/run/systemd/system/enclaved-allocator.service.d/after.conf", after).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.run_ok(&["systemctl", "start", "--no-block", "never"]).unwrap();
    configure(&parent, "all", &[("signer", 2)]);
    start(&parent);
    let has_job = || Ok::<_, anyhow::Error>(parent.run_ok(&["systemctl", "list-jobs"])?.contains("enclaved-allocator"));
    parent.wait_until("it is queued", DEADLINE, || Ok(has_job()?.then_some(()))).unwrap();
    let limit = Duration::from_secs(100);
    parent.wait_until("it is taken back", limit, || Ok((!has_job()?).then_some(()))).unwrap();
    let said = |status: &Status| {
        status.problems.iter().any(|problem| problem.failure.message.contains("did not begin within 60 s"))
    };
    parent.until("it says so", said).unwrap();
    assert_eq!(runs(&parent), (0, 0));
}
