//! Processes of the daemon that are killed, and files that are torn: enclaves and traffic go on.

use crate::fixture::{DEADLINE, Host, eventually, kill, of};
use crate::traffic::{Client, Load};
use enclaved_integration::processes::is_alive;
use rustix::process::Signal;
use std::fs;
use std::path::Path;

/// Leaves the first half of a file.
fn tear(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

/// The files of a folder whose names begin so, without the one of just that name.
fn put_aside(folder: &Path, name: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    entries.filter(|entry| entry.starts_with(name) && entry != name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_control_process_takes_nothing_with_it_and_its_successor_adopts_what_runs() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let load = Load::start(Client::new(&host, "localhost"));
    host.kill_daemon();
    let answer = Client::new(&host, "localhost").answer().await;
    assert_eq!(answer.cid, of(&before, "signer").cid.unwrap().get());
    assert!(is_alive(of(&before, "signer").pid.unwrap()));

    host.start();
    let after = host.until_ready().await;
    assert_eq!(after.host.pid, host.daemon());
    let (before_signer, after_signer) = (of(&before, "signer"), of(&after, "signer"));
    assert_eq!(after_signer.pid, before_signer.pid);
    assert_eq!(after_signer.generation, before_signer.generation);
    assert_eq!((after_signer.restarts, host.launches().len()), (0, 1));
    assert_eq!(after.proxy.pid, before.proxy.pid, "the proxy is the same process");
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_proxy_is_started_again_on_its_own_routes_and_the_enclave_does_not_notice() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    kill(before.proxy.pid);
    let after = host.until("another proxy serves", |status| status.ready && status.proxy.pid != before.proxy.pid).await;
    assert_eq!(after.proxy.revision, before.proxy.revision);
    assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
    assert_eq!(host.launches().len(), 1);
    Client::new(&host, "localhost").answer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_started_by_hand_serves_from_its_own_disk_while_the_control_process_is_dead() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let client = Client::new(&host, "localhost");
    host.kill_daemon();
    kill(before.proxy.pid);
    eventually("ingress is closed", async || client.get("/").await.is_err().then_some(())).await;
    start_proxy(&host);
    // With the certificate authority of before: clients that trust it go on to.
    eventually("the proxy serves", async || client.get("/").await.is_ok_and(|(status, _)| status == 200).then_some(()))
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.cid, of(&before, "signer").cid.unwrap().get());
}

fn start_proxy(host: &Host) -> u32 {
    let mut command = host.machine.command("enclaved").unwrap();
    command.arg("proxy").arg("--state-dir").arg(host.machine.proxy_state_dir());
    command.arg("--link").arg(host.machine.run_dir().join("proxy.sock"));
    host.machine.start_program(command).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_route_snapshot_is_kept_aside_and_made_good_by_the_control_process() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    host.kill_daemon();
    kill(before.proxy.pid);
    eventually("the proxy is gone", async || (!is_alive(before.proxy.pid)).then_some(())).await;
    tear(&host.machine.proxy_state_dir().join("routes.json"));
    start_proxy(&host);
    let line = eventually("the proxy says so", async || host.log_lines("cannot be served").pop()).await;
    assert!(line.contains("routes.json") && line.contains("torn"), "{line}");
    assert_eq!(put_aside(&host.machine.proxy_state_dir(), "routes.json").len(), 1);

    host.start();
    let after = host.until_ready().await;
    assert_eq!(after.proxy.revision, before.proxy.revision);
    assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
    Client::new(&host, "localhost").answer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_torn_ledger_the_enclave_is_adopted_and_the_file_is_kept_aside() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let load = Load::start(Client::new(&host, "localhost"));
    host.kill_daemon();
    tear(&host.machine.state_dir().join("ledger.json"));
    host.start();
    let after = host.until_ready().await;
    let problem = &after.problems.iter().find(|problem| problem.about == "ledger").unwrap().failure;
    assert!(problem.message.contains("put aside") && problem.remedy.is_some(), "{problem:?}");
    assert_eq!(put_aside(&host.machine.state_dir(), "ledger.json").len(), 1);
    assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
    assert_eq!(host.launches().len(), 1);
    load.end().await;
}

/// Adds a field to that object of a JSON file, as a later version may.
fn add_field(file: &Path, pointer: &str) {
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let object = json.pointer_mut(pointer).and_then(|value| value.as_object_mut()).unwrap();
    object.insert("added_later".to_owned(), serde_json::json!({ "by": "another version" }));
    fs::write(file, serde_json::to_vec(&json).unwrap()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_later_version_that_knew_more_fields_the_enclave_runs_on_and_nothing_is_forgotten() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let load = Load::start(Client::new(&host, "localhost"));
    host.kill_daemon();
    let (ledger, trace) =
        (host.machine.state_dir().join("ledger.json"), host.machine.run_dir().join("enclaves/signer-1"));
    for pointer in ["", "/enclaves/signer", "/enclaves/signer/generations/1", "/enclaves/signer/generations/1/phase"] {
        add_field(&ledger, pointer);
    }
    add_field(&trace.join("launch.json"), "");
    add_field(&trace.join("launch.json"), "/generation");
    add_field(&trace.join("record.json"), "/launch");
    for lost in [false, true] {
        if lost {
            // Then its traces have to do.
            host.kill_daemon();
            tear(&ledger);
        }
        host.start();
        let after = host.until_ready().await;
        assert_eq!(after.problems.iter().any(|problem| problem.about == "ledger"), lost);
        assert_eq!((&of(&after, "signer").pid, host.launches().len()), (&of(&before, "signer").pid, 1));
    }
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_control_process_with_0_and_nothing_else() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let load = Load::start(Client::new(&host, "localhost"));
    host.machine.signal(host.daemon(), Signal::TERM).unwrap();
    let ended = host.machine.wait_for_end(host.daemon(), DEADLINE).unwrap().unwrap();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let answer = Client::new(&host, "localhost").answer().await;
    assert_eq!(answer.cid, of(&before, "signer").cid.unwrap().get());
    assert!(is_alive(of(&before, "signer").pid.unwrap()) && is_alive(before.proxy.pid));
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_host_exits_75_and_disturbs_nothing() {
    let host = Host::ready().await;
    let first = host.daemon();
    let second = host.machine.start_daemon().unwrap();
    let ended = host.machine.wait_for_end(second, DEADLINE).unwrap().unwrap();
    assert_eq!(ended.code(), Some(75), "{ended:?}");
    let lines = host.log_lines("another enclaved runs");
    assert!(lines[0].contains(host.machine.run_dir().to_str().unwrap()), "{lines:?}");
    assert_eq!(host.until_ready().await.host.pid, first);
    assert_eq!(host.launches().len(), 1);
    Client::new(&host, "localhost").answer().await;
}
