//! Configurations that are wrong: the host goes on with the last good one.

use crate::fixture::{DEADLINE, Host, eventually, of};
use crate::traffic::Client;
use enclaved_core::status::Status;

/// What the status says of the configuration.
fn complaint(status: &Status) -> Option<String> {
    let problem = status.problems.iter().find(|problem| problem.about == "config")?;
    Some(problem.failure.to_string())
}

/// A wrong key in the enclave's table.
fn bad(host: &Host) -> String {
    host.signer() + "cpuss = 2\n"
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_configuration_is_refused_on_sighup_with_its_reason_and_nothing_changes() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    host.configure(&bad(&host));
    host.hang_up();
    let after = host.until("it is refused", |status| complaint(status).is_some()).await;
    let reason = complaint(&after).unwrap();
    for part in ["enclaved.toml:", "cpuss", "cpus", "stays in force"] {
        assert!(reason.contains(part), "{part} is not in {reason}");
    }
    assert_eq!(after.host.config_revision, before.host.config_revision);
    assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
    assert!(host.ctl_ok(&["status"]).contains("cpuss"));
    let said = host.ctl(&["reload"]);
    assert!(said.code == Some(78) && said.stderr.contains("cpuss"), "{said:?}");
    let said = host.ctl(&["check"]);
    assert!(said.code == Some(78) && said.stderr.contains("cpuss"), "{said:?}");
    assert!(host.log_lines("the configuration is refused").iter().any(|line| line.contains("cpuss")));
    Client::new(&host, "localhost").answer().await;

    host.configure(&host.signer());
    host.hang_up();
    host.until("it is accepted", |status| complaint(status).is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_restarted_on_a_bad_configuration_goes_on_with_the_last_good_one() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    for text in [host.machine.host_config() + &bad(&host), "]] this is no TOML".to_owned()] {
        host.kill_daemon();
        host.machine.write_config(&text).unwrap();
        let mut command = host.machine.command("enclaved").unwrap();
        command.arg("--config").arg(host.machine.config_file()).arg("--state-dir").arg(host.machine.state_dir());
        host.started(host.machine.start_program(command).unwrap());
        let after = host.until("it works", |status| status.host.pid == host.daemon() && status.ready).await;
        assert!(complaint(&after).unwrap().contains("stays in force"));
        assert_eq!(after.host.config_revision, before.host.config_revision);
        assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
    }
    assert_eq!(host.launches().len(), 1);
    Client::new(&host, "localhost").answer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_that_refuses_what_the_version_before_took_keeps_what_runs_and_says_so() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    host.kill_daemon();
    // As if the version before had taken a key that this one does not know: in the file, and in what it kept of it.
    host.machine.write_config(&(host.machine.host_config() + &host.signer() + "retired = true\n")).unwrap();
    let kept = host.machine.state_dir().join("last-good-config.json");
    let text = std::fs::read_to_string(&kept).unwrap();
    let retired = text.replace("[[enclave]]\\n", "[[enclave]]\\nretired = true\\n");
    assert_ne!(retired, text);
    std::fs::write(&kept, retired).unwrap();
    for _ in 0..2 {
        host.start();
        let after = host.until("it works", |status| status.host.pid == host.daemon() && status.ready).await;
        let complaint = complaint(&after).unwrap();
        assert!(complaint.contains("retired") && complaint.contains("stays in force"), "{complaint}");
        assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
        Client::new(&host, "localhost").answer().await;
        host.kill_daemon();
    }
    assert_eq!(host.launches().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_with_a_bad_configuration_and_no_good_one_before_it_exits_78_with_the_reason() {
    let host = Host::with_image().await;
    host.configure(&bad(&host));
    let ended = host.machine.wait_for_end(host.start(), DEADLINE).unwrap().unwrap();
    assert_eq!(ended.code(), Some(78), "{ended:?}");
    let log = host.machine.log();
    assert!(log.contains("enclaved.toml:") && log.contains("cpuss"), "{log}");
    assert_eq!(host.launches().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metrics_port_that_is_taken_is_a_problem_that_is_shown_and_not_the_end() {
    let host = Host::with_image().await;
    let taken = std::net::TcpListener::bind(host.machine.metrics()).unwrap();
    host.configure(&host.signer());
    host.start();
    let status = host.until_ready().await;
    let problem = &status.problems.iter().find(|problem| problem.about == "metrics").unwrap().failure;
    assert!(problem.message.contains(&host.machine.metrics().to_string()), "{problem:?}");
    assert!(host.ctl_ok(&["status"]).contains("/metrics"));
    Client::new(&host, "localhost").answer().await;
    drop(taken);
    eventually("they are served", async || host.ask_publicly("/live").await.filter(|(code, _)| *code == 200)).await;
}
