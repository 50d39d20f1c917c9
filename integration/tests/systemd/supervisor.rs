//! Enclaves as units: the daemon, its proxy and an enclave on a parent host whose supervisor is systemd; and what operators do to
//! the units with systemctl.

use crate::DEADLINE;
use enclaved_core::status::{EnclaveState, EnclaveStatus, Status};
use enclaved_integration::machine::parent::{Parent, parent_host};
use enclaved_integration::nitro_cli::Code;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const IMAGE: &str = "/opt/images/signer.eif";

fn config(parent: &Parent, more: &str) -> String {
    let host = parent.host_config().replace("[host]\n", &format!("[host]\n{more}"));
    host + &parent.sample_enclave("signer", IMAGE)
}

/// A parent host with an enclave that is configured, and a daemon that was not started.
fn configured(more: &str) -> Parent {
    let parent = parent_host().unwrap();
    parent.put_image(IMAGE, &parent.sample_application("v1")).unwrap();
    parent.write("/etc/enclaved/enclaved.toml", config(&parent, more)).unwrap();
    parent
}

/// Lines for the units of enclaves, or of enclaved.
fn drop_in(parent: &Parent, unit: &str, lines: &str) {
    let path = format!("/etc/systemd/system/{unit}.service.d/test.conf");
    parent.write(&path, format!("[Service]\n{lines}\n")).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
}

/// The units of enclaves that are not over.
fn units(parent: &Parent) -> String {
    let states = "--state=active,activating,deactivating";
    parent.run_ok(&["systemctl", "list-units", "--plain", "--no-legend", states, "enclave@*"]).unwrap()
}

fn is_held(status: &Status) -> bool {
    signer(status).state == EnclaveState::Held
}

/// A parent host with an enclave that serves.
fn serving_with(more: &str) -> Parent {
    let parent = configured(more);
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    until_ready(&parent, 1);
    parent
}

fn serving() -> Parent {
    serving_with("")
}

fn signer(status: &Status) -> &EnclaveStatus {
    status.enclaves.iter().find(|enclave| enclave.name.as_str() == "signer").unwrap()
}

/// Waits until that generation serves.
fn until_ready(parent: &Parent, generation: u32) -> EnclaveStatus {
    let what = format!("signer-{generation} is ready");
    let ready = |status: &Status| {
        let signer = status.enclaves.first();
        signer.is_some_and(|signer| signer.ready && signer.generation.is_some_and(|of| of.0 == generation))
    };
    signer(&parent.until(&what, ready).unwrap()).clone()
}

fn until_property(parent: &Parent, unit: &str, name: &str, value: &str) {
    let what = format!("{name} of {unit} is {value}");
    parent.wait_until(&what, DEADLINE, || Ok((parent.property(unit, name)? == value).then_some(()))).unwrap();
}

#[test]
fn an_enclave_is_a_unit_whose_main_process_is_nitro_clis_and_it_outlives_the_daemon() {
    let parent = serving();
    let signer = until_ready(&parent, 1);
    let unit = "enclave@signer-1.service";
    assert_eq!(parent.main_pid(unit).unwrap(), signer.pid);
    assert_eq!(parent.property(unit, "ActiveState").unwrap(), "active");
    assert_eq!(parent.property(unit, "StatusText").unwrap(), format!("{} runs", signer.enclave_id.clone().unwrap()));
    assert_eq!(parent.property("enclaved-proxy", "ActiveState").unwrap(), "active");
    for how in [&["systemctl", "restart", "enclaved"][..], &["systemctl", "kill", "--signal=KILL", "enclaved"]] {
        let before = parent.main_pid("enclaved").unwrap();
        parent.run_ok(how).unwrap();
        parent
            .wait_until("another process is the daemon", DEADLINE, || {
                Ok(parent.main_pid("enclaved")?.filter(|pid| Some(*pid) != before))
            })
            .unwrap();
        assert_eq!(until_ready(&parent, 1).pid, signer.pid);
    }
    parent.run_ok(&["systemctl", "stop", "enclaved"]).unwrap();
    assert_eq!(parent.main_pid(unit).unwrap(), signer.pid);
}

#[test]
fn enclaved_comes_back_at_once_while_an_enclave_boots() {
    let parent = configured("");
    parent.switch_on(&[Hazard::always("run-enclave", Fault::SlowBoot { millis: 20_000 })]).unwrap();
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    until_property(&parent, "enclave@signer-1", "ActiveState", "activating");
    parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    let status = parent.status().unwrap().unwrap();
    assert_eq!(signer(&status).state, EnclaveState::Launching, "it still boots");
    assert_eq!(parent.property("enclave@signer-1", "ActiveState").unwrap(), "activating");
    until_ready(&parent, 1);
}

#[test]
fn an_enclave_outlives_a_switch_of_the_target() {
    let parent = serving();
    let before = until_ready(&parent, 1).pid;
    parent.run_ok(&["systemctl", "isolate", "multi-user.target"]).unwrap();
    parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    assert_eq!(until_ready(&parent, 1).pid, before);
}

#[test]
fn what_is_stopped_by_hand_stays_stopped_until_it_is_released() {
    let parent = serving();
    parent.run_ok(&["systemctl", "stop", "enclave@signer-1"]).unwrap();
    let held = |status: &Status| signer(status).state == EnclaveState::Held;
    let status = parent.until("it is held", held).unwrap();
    let why = signer(&status).waiting_for.clone().unwrap();
    assert!(why.contains("systemctl stop") && why.contains("enclavectl start signer"), "{why}");
    assert_eq!(signer(&status).last_error, None, "nothing failed");
    // Nothing of it is left that an on-call engineer would take for a failure.
    parent
        .wait_until("its traces are gone", DEADLINE, || {
            Ok((!parent.run(&["test", "-e", "/run/enclaved/enclaves/signer-1"])?.success()).then_some(()))
        })
        .unwrap();
    assert_eq!(parent.property("enclave@signer-1", "ActiveState").unwrap(), "inactive");
    parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    parent.until("it is held by the next daemon, too", held).unwrap();
    parent.run_ok(&["enclavectl", "start", "signer"]).unwrap();
    until_ready(&parent, 2);
}

#[test]
fn what_is_stopped_by_hand_while_no_daemon_runs_is_held_by_the_next_one() {
    let parent = serving();
    parent.run_ok(&["systemctl", "stop", "enclaved"]).unwrap();
    parent.run_ok(&["systemctl", "stop", "enclave@signer-1"]).unwrap();
    parent.run_ok(&["systemctl", "start", "enclaved"]).unwrap();
    parent.until("it is held", |status| signer(status).state == EnclaveState::Held).unwrap();
}

#[test]
fn what_is_stopped_by_hand_while_no_daemon_runs_is_held_after_a_reboot_too() {
    let parent = serving();
    parent.run_ok(&["systemctl", "stop", "enclaved"]).unwrap();
    parent.run_ok(&["systemctl", "stop", "enclave@signer-1"]).unwrap();
    parent.reboot().unwrap();
    parent.until("it is held", is_held).unwrap();
    // The hold is in the ledger now, and the note is not needed any more.
    let gone = || Ok(parent.run_ok(&["ls", "/var/lib/enclaved/stopped"])?.is_empty().then_some(()));
    parent.wait_until("the note is gone", DEADLINE, gone).unwrap();
    assert_eq!(units(&parent), "");
    parent.reboot().unwrap();
    parent.until("it is still held", is_held).unwrap();
    parent.run_ok(&["enclavectl", "start", "signer"]).unwrap();
    until_ready(&parent, 2);
}

#[test]
fn what_is_stopped_by_hand_before_its_unit_is_up_is_held() {
    // systemd is never told that it is up; the enclave is seen all the same.
    let parent = configured("");
    drop_in(&parent, "enclave@", "Environment=NOTIFY_SOCKET=/nonexistent");
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    until_ready(&parent, 1);
    let unit = "enclave@signer-1";
    assert_eq!(parent.property(unit, "ActiveState").unwrap(), "activating");
    parent.run_ok(&["systemctl", "stop", unit]).unwrap();
    let status = parent.until("it is held", is_held).unwrap();
    let none_is_left = || Ok(units(&parent).is_empty().then_some(()));
    parent.wait_until("what was launched instead has ended again", DEADLINE, none_is_left).unwrap();
    assert_eq!((signer(&status).restarts, &signer(&status).last_error), (0, &None), "it did not fail");
    drop_in(&parent, "enclave@", "");
    parent.run_ok(&["enclavectl", "start", "signer"]).unwrap();
    parent.until("it serves again", |status| status.ready).unwrap();
}

#[test]
fn who_ends_an_enclave_is_told_apart_where_nothing_of_it_can_be_noted_in_its_traces() {
    let parent = serving();
    // What a full /run does, too: a file is written beside its place first.
    let full = |generation: u32| {
        for file in ["stop", "asked", "exit"] {
            let path = format!("/run/enclaved/enclaves/signer-{generation}/.{file}.json.tmp");
            parent.run_ok(&["mkdir", &path]).unwrap();
        }
    };
    full(1);
    let good = parent.read("/etc/enclaved/enclaved.toml").unwrap();
    let unhealthy = good.replace("\"/health\" }", "\"/stream\" }, on_failure = \"restart\", failures = 1");
    assert_ne!(unhealthy, good);
    parent.write("/etc/enclaved/enclaved.toml", unhealthy).unwrap();
    parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
    let forgotten = || {
        let there = parent.run(&["test", "-e", "/run/enclaved/enclaves/signer-1"])?.success();
        Ok((!there).then_some(()))
    };
    parent.wait_until("it is ended for its health, and forgotten", DEADLINE, forgotten).unwrap();
    let status = parent.status().unwrap().unwrap();
    assert!(!is_held(&status), "enclaved ended it: {status:#?}");
    assert_eq!(signer(&status).restarts, 1);
    parent.write("/etc/enclaved/enclaved.toml", good).unwrap();
    parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
    until_ready(&parent, 2);

    full(2);
    parent.run_ok(&["systemctl", "stop", "enclave@signer-2"]).unwrap();
    parent.until("it is held: an operator stopped it", is_held).unwrap();
}

#[test]
fn what_is_stopped_by_hand_while_it_boots_is_held() {
    let parent = configured("");
    parent.switch_on(&[Hazard::always("run-enclave", Fault::SlowBoot { millis: 600_000 })]).unwrap();
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    let begun =
        || Ok(parent.run(&["test", "-e", "/run/enclaved/enclaves/signer-1/nitro-cli.json"])?.success().then_some(()));
    parent.wait_until("nitro-cli is at work", DEADLINE, begun).unwrap();
    parent.run_ok(&["systemctl", "stop", "enclave@signer-1"]).unwrap();
    let status = parent.until("it is held", is_held).unwrap();
    assert_eq!(signer(&status).last_error, None);
    assert_eq!(units(&parent), "");
    parent.switch_on(&[]).unwrap();
    parent.run_ok(&["enclavectl", "start", "signer"]).unwrap();
    until_ready(&parent, 2);
}

#[test]
fn an_enclave_of_which_nothing_can_be_found_out_for_a_while_is_not_given_up() {
    let parent = configured("");
    // A launch has no more time than this, unless it asks for more.
    drop_in(&parent, "enclave@", "TimeoutStartSec=2s");
    let deaf = Hazard::always("describe-enclaves", Fault::Fail { code: Code(7) });
    parent.switch_on(&[Hazard::always("run-enclave", Fault::GarbledAnswer), deaf]).unwrap();
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    let unknown = |status: &Status| {
        let waits = signer(status).waiting_for.clone().unwrap_or_default();
        waits.contains("cannot be told whether signer-1 runs")
    };
    parent.until("it says that it can't be told", unknown).unwrap();
    let told = || Ok(parent.property("enclave@signer-1", "StatusText")?.contains("not known yet").then_some(()));
    parent.wait_until("its unit says so, too", DEADLINE, told).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(parent.property("enclave@signer-1", "ActiveState").unwrap(), "activating");
    parent.switch_on(&[]).unwrap();
    until_ready(&parent, 1);
    let launches = parent.calls().unwrap().iter().filter(|call| call.command() == "run-enclave").count();
    assert_eq!(launches, 1);
    until_property(&parent, "enclave@signer-1", "ActiveState", "active");
}

#[test]
fn what_is_restarted_by_hand_is_launched_anew_and_has_not_failed() {
    let parent = serving();
    // The unit itself can't: a generation is launched once.
    let said = parent.run(&["systemctl", "restart", "enclave@signer-1"]).unwrap();
    assert_eq!(said.code, Some(1), "{said:?}");
    let signer = until_ready(&parent, 2);
    assert_eq!((signer.restarts, signer.last_error), (0, None));
    assert!(parent.journal("enclave@signer-1").unwrap().contains("this launch is over"));
}

#[test]
fn a_death_is_told_with_how_the_process_ended_and_the_enclave_is_launched_again() {
    let parent = serving();
    for (generation, signal, words) in [(1, "KILL", "killed by SIGKILL"), (2, "TERM", "exited with status 0")] {
        let signer = until_ready(&parent, generation);
        parent.run_ok(&["kill", &format!("-{signal}"), &signer.pid.unwrap().to_string()]).unwrap();
        until_ready(&parent, generation + 1);
        let told = |status: &Status| {
            let error = self::signer(status).last_error.as_ref();
            error.is_some_and(|error| error.failure.message.contains(words))
        };
        let status = parent.until("it is told how it ended", told).unwrap();
        assert_eq!(self::signer(&status).restarts, u64::from(generation));
        // With what its own processes said last, not with what systemd says of every unit that ends.
        let message = &self::signer(&status).last_error.as_ref().unwrap().failure.message;
        let (_, words) = message.split_once("last in its journal: ").unwrap();
        assert!(words.contains(&format!("signer-{generation}: runs as process")), "{message}");
        assert!(!words.contains("Main process exited") && !words.contains("ended unasked"), "{message}");
    }
    parent
        .wait_until("nothing of it looks failed", DEADLINE, || {
            let failed = parent.run_ok(&["systemctl", "--failed", "--quiet", "list-units", "enclave@*"])?;
            Ok(failed.is_empty().then_some(()))
        })
        .unwrap();
}

#[test]
fn a_reboot_holds_nothing_stopped_and_is_nobodys_failure() {
    let parent = serving();
    parent.reboot().unwrap();
    let signer = until_ready(&parent, 2);
    assert_eq!((signer.restarts, signer.last_error), (0, None));
    parent.reset().unwrap();
    assert_eq!(until_ready(&parent, 3).last_error, None);
}

#[test]
fn a_unit_that_fails_before_its_helper_runs_ends_the_launch_and_says_why() {
    let parent = serving();
    let folder = "/run/systemd/system/enclave@.service.d";
    parent.write(&format!("{folder}/broken.conf"), "[Service]\nBindPaths=/nonexistent\n").unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    let pid = until_ready(&parent, 1).pid.unwrap().to_string();
    parent.run_ok(&["kill", "-KILL", &pid]).unwrap();
    let told = |status: &Status| {
        let error = signer(status).last_error.as_ref().map(|error| error.failure.to_string()).unwrap_or_default();
        error.contains("226") && error.contains("NAMESPACE") && error.contains("journalctl -u enclave@signer-")
    };
    parent.until("it is told what is wrong with the unit", told).unwrap();
    parent.run_ok(&["rm", &format!("{folder}/broken.conf")]).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.until("it serves again", |status| status.ready).unwrap();
}

#[test]
fn a_unit_that_nobody_asked_for_fails_and_launches_nothing() {
    let parent = serving();
    let before = parent.calls().unwrap().len();
    let said = parent.run(&["systemctl", "start", "enclave@nobody-9"]).unwrap();
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(parent.journal("enclave@nobody-9").unwrap().contains("holds no launch"));
    let launches = parent.calls().unwrap().iter().skip(before).filter(|call| call.command() == "run-enclave").count();
    assert_eq!(launches, 0);
    until_ready(&parent, 1);
}

#[test]
fn an_enclave_goes_on_while_the_bus_is_away_and_the_news_come_in_when_it_is_back() {
    let parent = serving();
    let pid = until_ready(&parent, 1).pid;
    parent.run_ok(&["systemctl", "stop", "dbus.socket", "dbus.service"]).unwrap();
    assert_eq!(until_ready(&parent, 1).pid, pid);
    parent.run_ok(&["systemctl", "start", "dbus.socket", "dbus.service"]).unwrap();
    parent.run_ok(&["kill", "-KILL", &pid.unwrap().to_string()]).unwrap();
    until_ready(&parent, 2);
}

#[test]
fn where_it_is_said_so_the_enclaves_end_with_the_daemon() {
    let parent = serving_with("on_stop = \"terminate\"\n");
    let began = Instant::now();
    parent.run_ok(&["systemctl", "stop", "enclaved"]).unwrap();
    // systemd would stop its unit only after enclaved's own.
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    until_property(&parent, "enclave@signer-1", "ActiveState", "inactive");
    parent.run_ok(&["systemctl", "start", "enclaved"]).unwrap();
    let signer = until_ready(&parent, 2);
    assert_eq!(signer.last_error, None);
}

#[test]
fn enclaves_that_end_with_the_daemon_have_all_their_time_to_drain() {
    let parent = parent_host().unwrap();
    let echo = SocketAddr::from(([127, 0, 0, 1], 9007));
    parent.put_image(IMAGE, &parent.sample_application("v1")).unwrap();
    let host = parent.host_config().replace("[host]\n", "[host]\non_stop = \"terminate\"\n");
    let host = host.replace("drain = \"2s\"", "drain = \"12s\"");
    parent.write("/etc/enclaved/enclaved.toml", host + &parent.echoing_enclave("signer", IMAGE, echo)).unwrap();
    // No more than this, unless it asks for more.
    drop_in(&parent, "enclaved", "TimeoutStopSec=5s");
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    until_ready(&parent, 1);
    let mut client = parent.in_network(|| TcpStream::connect(echo)).unwrap().unwrap();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0; 1]).unwrap();
    let began = Instant::now();
    parent.run_ok(&["systemctl", "stop", "enclaved"]).unwrap();
    assert!(began.elapsed() >= Duration::from_secs(12), "{:?}", began.elapsed());
    assert_eq!(parent.property("enclaved", "Result").unwrap(), "success");
    until_property(&parent, "enclave@signer-1", "ActiveState", "inactive");
}
