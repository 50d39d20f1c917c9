//! What is told of a host: status, metrics, liveness and readiness, reports to the control plane, the tool's answers.

use crate::fixture::{DEADLINE, Host, of};
use crate::schema::violations;
use crate::traffic::Client;
use enclaved_core::status::EnclaveState;
use enclaved_integration::application::Application;
use serde_json::Value;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

#[tokio::test(flavor = "multi_thread")]
async fn metrics_cover_both_processes_and_promtool_finds_nothing_to_complain_about() {
    let host = Host::ready().await;
    Client::new(&host, "localhost").answer().await;
    let has = |text: &str, series: &str| text.lines().any(|line| line.starts_with(series));
    // The report with the request's counters reaches the control process soon after the request.
    let text = crate::fixture::eventually("the request is counted", async || {
        let (_, text) = host.ask_publicly("/metrics").await?;
        has(&text, "enclaved_https_responses_total{class=\"2xx\",enclave=\"signer\"} ").then_some(text)
    })
    .await;
    for series in [
        "enclaved_reconcile_passes_total ",
        "enclaved_build_info{",
        "enclaved_ready 1",
        "enclaved_enclave_ready{enclave=\"signer\"} 1",
        "enclaved_enclave_state{enclave=\"signer\",state=\"ready\"} 1",
        "enclaved_proxy_up 1",
        "enclaved_traffic_total{direction=\"egress\"",
        "enclaved_traffic_total{direction=\"https\"",
        "enclaved_traffic_bytes_total{direction=\"egress\"",
        "enclaved_upstream_connections{enclave=\"signer\",state=\"idle\"} ",
        "enclaved_upstream_connects_total{enclave=\"signer\"} ",
        "enclaved_access_log_dropped_total 0",
    ] {
        assert!(has(&text, series), "{series} is not in\n{text}");
    }
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("promtool can't be run ({error}); install it: apt-get install prometheus"));
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let complaints = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && complaints.is_empty(), "{complaints}\n{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn live_and_ready_say_how_it_is_while_an_enclave_starts_serves_and_fails() {
    let host = Host::with_image().await;
    host.put("signer.eif", &Application { ready_millis: 500, ..host.application("v1") }).await;
    host.configure(&host.signer());
    host.start();
    host.until_signer_is(EnclaveState::Booting).await;
    assert_eq!(host.ask_publicly("/live").await.unwrap().0, 200);
    let (code, text) = host.ask_publicly("/ready").await.unwrap();
    assert!(code == 503 && text.contains("signer: booting"), "{code} {text}");
    host.until_ready().await;
    assert_eq!(host.ask_publicly("/ready").await.unwrap(), (200, "ready\n".to_owned()));
    assert_eq!(host.ask_publicly("/v1/status").await.unwrap().0, 404, "only the admin socket tells more");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_arrives_at_the_control_plane_in_the_form_of_its_schema() {
    let host = Host::ready().await;
    let report = host.machine.control_plane.report_where(DEADLINE, |body| body["ready"] == true).await.unwrap();
    let path = "/v1/hosts/i-0123456789abcdef0/status";
    assert_eq!((report.method.as_str(), report.path.as_str()), ("PUT", path));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/status.schema.json");
    let schema: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    for report in host.machine.control_plane.reports() {
        assert_eq!(violations(&schema, &schema, &report.body), [] as [String; 0], "{:#}", report.body);
    }
    let mut other = report.body.clone();
    other["enclaves"][0]["state"] = "perhaps".into();
    assert!(!violations(&schema, &schema, &other).is_empty(), "the schema lets anything pass");
    assert_eq!(report.body["enclaves"][0]["name"], "signer");
    assert_eq!(report.body["host"]["tags"]["caution:deployment-id"], "d-0001");
    assert_eq!(host.machine.control_plane.refused(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn enclavectl_shows_the_enclave_in_a_table_and_in_json() {
    let host = Host::ready().await;
    let table = host.ctl_ok(&["status"]);
    let status = host.until_ready().await;
    let signer = of(&status, "signer");
    let heads = ["NAME", "GEN", "STATE", "SINCE", "CID", "CPUS", "MEMORY", "IMAGE", "PCR0", "HEALTH", "RESTARTS"];
    let head = table.lines().find(|line| line.starts_with("NAME")).unwrap();
    assert!(heads.iter().all(|column| head.contains(column)) && head.contains("LAST ERROR"), "{head}");
    let row: Vec<_> = table.lines().find(|line| line.starts_with("signer ")).unwrap().split_whitespace().collect();
    let (cid, digest) = (signer.cid.unwrap().to_string(), signer.image_digest.unwrap().to_string());
    for cell in ["1", "ready", &cid, &digest[..12], &signer.pcr0.unwrap().to_string()[..12], "healthy"] {
        assert!(row.contains(&cell), "{cell} is not in {row:?}");
    }
    let json: Value = serde_json::from_str(&host.ctl_ok(&["status", "--json"])).unwrap();
    assert_eq!((json["ready"].as_bool(), json["enclaves"][0]["state"].as_str()), (Some(true), Some("ready")));
    assert_eq!(json["proxy"]["https"].as_str(), Some(host.machine.ingress().to_string().as_str()));
    assert!(host.ctl_ok(&["status", "signer"]).contains(&digest));
    assert_eq!(host.ctl_ok(&["plan"]), "nothing to do\n");
    assert!(host.ctl_ok(&["check"]).contains("ok: 1 enclave"));
    assert!(host.ctl_ok(&["check", host.machine.config_file().to_str().unwrap()]).contains("ok"));
}

#[tokio::test(flavor = "multi_thread")]
async fn enclavectl_waits_until_all_is_ready_and_says_what_is_not() {
    let host = Host::with_image().await;
    host.put("signer.eif", &Application { ready_millis: 800, ..host.application("v1") }).await;
    host.configure(&host.signer());
    let said = host.ctl(&["status"]);
    assert!(said.code == Some(75) && said.stderr.contains("not running"), "{said:?}");
    host.start();
    host.until_signer_is(EnclaveState::Booting).await;
    let said = host.ctl(&["wait", "--timeout", "0s"]);
    assert!(said.code == Some(75) && said.stderr.contains("signer: booting"), "{said:?}");
    host.ctl_ok(&["wait", "--timeout", "20s"]);
    assert!(host.status().await.unwrap().ready);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_is_away_stops_nothing_and_hears_of_it_later() {
    let host = Host::with_image().await;
    host.machine.control_plane.set_fault(Some(enclaved_integration::control_plane::ControlPlaneFault::Down));
    host.configure(&host.signer());
    host.start();
    host.until_ready().await;
    assert_eq!(host.machine.control_plane.latest(), None);
    host.machine.control_plane.set_fault(None);
    assert!(host.machine.control_plane.report_where(DEADLINE, |body| body["ready"] == true).await.is_some());
}
