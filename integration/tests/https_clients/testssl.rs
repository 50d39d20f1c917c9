//! testssl.sh, which takes minutes: what it finds wrong with HTTPS as it is without any settings.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod origin;

use enclaved_core::routes::UpstreamHttp;
use enclaved_integration::https_site::{HttpsSites, Program, Site, runtime};
use serde::Deserialize;
use std::fs;
use std::time::Duration;

const DOMAIN: &str = "app.test";
/// It makes hundreds of connections, each with a program of its own.
const PATIENCE: Duration = Duration::from_secs(1200);

/// What is no fault of the proxy, and why.
const EXCEPTIONS: [(&str, &str); 3] = [
    ("cert_expirationStatus", "certificates of the internal CA are valid for a week, and made anew by themselves"),
    ("cert_notAfter", "the same, said twice"),
    ("cert_revocation", "the internal CA revokes nothing: its certificates are short-lived"),
];
/// Warnings about the test's own tools.
const ABOUT_TOOLS: [&str; 1] = ["engine_problem"];

#[derive(Debug, Deserialize)]
struct Finding {
    id: String,
    severity: String,
    finding: String,
}

#[test]
fn testssl_finds_nothing_above_low() {
    let runtime = runtime().unwrap();
    let origin = runtime.block_on(origin::start());
    let site = Site { domain: DOMAIN, port: origin.address().port(), upstream: UpstreamHttp::Http1 };
    let sites = HttpsSites::start(&[site], runtime).unwrap();
    let report = sites.folder().join("report.json");
    // Neither names nor revocation lists are asked for: nothing leaves this machine.
    let program = Program::new("testssl", "testssl.sh").args(["--quiet", "--color", "0", "--warnings", "batch"]);
    let program = program.args(["--nodns", "none", "--ip", "127.0.0.1", "--connect-timeout", "20"]);
    let program =
        program.args(["--openssl-timeout", "20", "--openssl", "/usr/bin/openssl"]).arg("--add-ca").arg(&sites.root);
    let program = program.arg("--jsonfile").arg(&report).arg(format!("{DOMAIN}:{}", sites.https.port()));
    let said = program.run_within(PATIENCE).unwrap();
    let findings: Vec<Finding> = serde_json::from_slice(&fs::read(&report).unwrap_or_default())
        .unwrap_or_else(|error| panic!("no report: {error}: {said}"));

    let found =
        |id: &str| findings.iter().find(|finding| finding.id == id).unwrap_or_else(|| panic!("no {id}: {said}"));
    // It came to its end, and saw what is there.
    for (id, expected) in [
        ("SSLv2", "not offered"),
        ("SSLv3", "not offered"),
        ("TLS1", "not offered"),
        ("TLS1_1", "not offered"),
        ("TLS1_2", "offered"),
        ("TLS1_3", "offered"),
        ("HSTS_time", "365 days"),
        ("secure_client_renego", "not vulnerable"),
        ("heartbleed", "not vulnerable"),
        ("RC4", "not vulnerable"),
    ] {
        assert!(found(id).finding.contains(expected), "{:?}: {said}", found(id));
    }
    let harmless = ["OK", "INFO", "LOW"];
    let is_excepted = |finding: &&Finding| EXCEPTIONS.iter().any(|(id, _)| *id == finding.id);
    let faults = findings.iter().filter(|finding| !harmless.contains(&finding.severity.as_str()));
    let faults: Vec<_> = faults.filter(|finding| !ABOUT_TOOLS.contains(&finding.id.as_str())).collect();
    let (excepted, faults): (Vec<_>, Vec<_>) = faults.into_iter().partition(is_excepted);
    assert!(faults.is_empty(), "{faults:#?}\n{said}");
    // An exception that is needed no more goes.
    for (id, reason) in EXCEPTIONS {
        assert!(excepted.iter().any(|finding| finding.id == id), "{id} is not found any more: {reason}");
    }
}
