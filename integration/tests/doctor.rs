//! `enclavectl doctor`, and the daemon's own checks, on a simulated machine: the metadata service, S3, the ports and the files are
//! stand-ins that can be broken one by one.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

use enclaved_core::status::Status;
use enclaved_integration::host::{Machine, Options};
use enclaved_integration::imds::ImdsFault;
use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

/// What a doctor said.
#[derive(Debug)]
struct Said {
    code: i32,
    json: Value,
    took: Duration,
}

impl Said {
    /// What came of a check: the worst of its findings, which stands first.
    fn of(&self, check: &str) -> (&str, &str) {
        let findings = self.json["findings"].as_array().unwrap();
        let finding = findings.iter().find(|finding| finding["check"] == check).unwrap();
        (finding["outcome"].as_str().unwrap(), finding["seen"].as_str().unwrap())
    }
}

async fn machine() -> Machine {
    let machine = Machine::start(Options::default()).await.unwrap();
    machine.put_image("signer.eif", &machine.sample_application("signer")).await.unwrap();
    machine.write_config(&(machine.host_config() + &machine.sample_enclave("signer", "signer.eif"))).unwrap();
    machine
}

async fn doctor(machine: &Machine) -> Said {
    let mut command = tokio::process::Command::from(machine.command("enclavectl").unwrap());
    command.arg("--config").arg(machine.config_file()).args(["doctor", "--json"]);
    let since = Instant::now();
    let output = command.kill_on_drop(true).output().await.unwrap();
    let json = serde_json::from_slice(&output.stdout);
    let json = json.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    Said { code: output.status.code().unwrap(), json, took: since.elapsed() }
}

async fn status(machine: &Machine) -> Option<Status> {
    let mut command = tokio::process::Command::from(machine.command("enclavectl").unwrap());
    command.arg("--config").arg(machine.config_file()).args(["status", "--json"]);
    serde_json::from_slice(&command.kill_on_drop(true).output().await.unwrap().stdout).ok()
}

async fn until(machine: &Machine, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        let now = status(machine).await;
        if let Some(status) = now.as_ref().filter(|status| condition(status)) {
            return status.clone();
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}: {now:?}\n{}", machine.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn a_good_machine_would_launch_with_and_without_a_daemon() {
    let machine = machine().await;
    let before = doctor(&machine).await;
    assert_eq!((before.code, before.json["would_launch"].as_bool()), (0, Some(true)), "{:#}", before.json);
    assert_eq!(before.of("driver").0, "not-needed", "its enclaves are no Nitro enclaves");
    assert_eq!(before.of("role_credentials"), ("ok", "those of the instance's role enclave-host"));
    machine.start_daemon().unwrap();
    let status = until(&machine, "the daemon is ready and has made its checks", |status| {
        status.ready && status.host.checked_at.is_some()
    })
    .await;
    assert_eq!(status.host.failed_checks, []);
    let after = doctor(&machine).await;
    assert_eq!(after.code, 0, "its own ports are not in its way: {:#}", after.json);
    let pid = format!("the running daemon, process {}", status.host.pid);
    assert!(after.json["judged_for"].as_str().unwrap().contains(&pid), "{:#}", after.json);
}

#[tokio::test]
async fn an_object_that_the_role_may_not_read_fails_with_bucket_key_and_role() {
    let machine = machine().await;
    machine.write_config(&(machine.host_config() + &machine.sample_enclave("signer", "missing.eif"))).unwrap();
    let said = doctor(&machine).await;
    assert_eq!(said.code, 78);
    let (outcome, seen) = said.of("image");
    assert_eq!(outcome, "failure");
    let address = format!("s3://{}/missing.eif", machine.bucket());
    assert!(seen.contains(&address) && seen.contains("enclave-host") && seen.contains("403"), "{seen}");
}

#[tokio::test]
async fn a_hop_limit_that_keeps_tokens_away_is_told_from_a_service_that_is_off_and_nothing_waits_for_ever() {
    let machine = machine().await;
    machine.imds.set_fault(Some(ImdsFault::NoTokens));
    let said = doctor(&machine).await;
    assert_eq!(said.code, 78);
    let (outcome, seen) = said.of("metadata");
    assert_eq!(outcome, "failure");
    assert!(seen.contains("hop limit"), "{seen}");
    assert!(said.took < Duration::from_secs(25), "it took {:?}", said.took);
    machine.imds.set_fault(Some(ImdsFault::NoRole));
    let said = doctor(&machine).await;
    assert_eq!((said.code, said.of("role_credentials").0), (78, "failure"), "{:#}", said.json);
}

#[tokio::test]
async fn a_port_that_somebody_else_holds_fails_and_names_the_process() {
    let machine = machine().await;
    let _other = TcpListener::bind(SocketAddr::new(machine.ingress().ip(), machine.ingress().port())).unwrap();
    let said = doctor(&machine).await;
    assert_eq!(said.code, 78);
    let (outcome, seen) = said.of("listening_ports");
    assert_eq!(outcome, "failure");
    assert!(seen.contains(&format!("process {}", std::process::id())), "{seen}");
}

#[tokio::test]
async fn the_daemon_names_what_fails_at_its_start_launches_what_it_can_and_takes_it_back_when_it_passes() {
    let machine = machine().await;
    let upstream = machine.upstream.address().ip();
    // A name, since the configuration itself refuses the bare address.
    let open = machine.sample_enclave("signer", "signer.eif");
    let shut = open
        .replace(&format!("hostname = \"{upstream}\""), "hostname = \"localhost\"")
        .replace(&format!("allow_addresses = [\"{upstream}\"]"), "allow_addresses = []");
    assert_ne!(shut, open);
    machine.write_config(&(machine.host_config() + &shut)).unwrap();
    machine.start_daemon().unwrap();
    let failing = until(&machine, "the check fails", |status| !status.host.failed_checks.is_empty()).await;
    assert_eq!(failing.host.failed_checks.iter().map(|check| check.as_str()).collect::<Vec<_>>(), ["egress_dns"]);
    let problem = failing.problems.iter().find(|problem| problem.about == "doctor").unwrap();
    assert!(problem.failure.message.starts_with("egress_dns "), "{problem:?}");
    assert!(problem.failure.remedy.as_ref().unwrap().contains("allow_addresses"));
    assert_eq!(doctor(&machine).await.code, 78);
    until(&machine, "the enclave runs all the same", |status| status.enclaves.iter().all(|enclave| enclave.ready))
        .await;
    machine.write_config(&(machine.host_config() + &machine.sample_enclave("signer", "signer.eif"))).unwrap();
    let mut reload = tokio::process::Command::from(machine.command("enclavectl").unwrap());
    assert!(reload.arg("--config").arg(machine.config_file()).arg("reload").status().await.unwrap().success());
    let well = until(&machine, "nothing fails any more", |status| status.host.failed_checks.is_empty()).await;
    assert!(well.problems.iter().all(|problem| problem.about != "doctor"), "{well:?}");
    let lines = machine.log();
    assert_eq!(lines.matches("no address of it may be reached").count(), 1, "one line in the log:\n{lines}");
}
