//! What the programs are built from: which crates are in them in one version only, which are in none of them, and which
//! way the arrows between our own crates point. `deny.toml` bans some of this too, but cargo-deny is not on every machine.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// What is linked into a package of ours for this machine: names and their versions.
fn linked_into(package: &str) -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let mut command = Command::new(cargo);
    command.args(["tree", "--package", package, "--edges", "normal", "--prefix", "none", "--offline", "--locked"]);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree: {errors}");
    let mut crates: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in std::str::from_utf8(&output.stdout).unwrap().lines() {
        let mut words = line.split(' ');
        if let (Some(name), Some(version)) = (words.next(), words.next()) {
            crates.entry(name.to_owned()).or_default().insert(version.trim_start_matches('v').to_owned());
        }
    }
    assert!(crates.contains_key(package), "cargo tree shows no {package}: {crates:?}");
    crates
}

/// That none of these (`aws-` means all whose names begin so) is linked into the package.
fn check_absent(package: &str, absent: &[&str]) {
    let crates = linked_into(package);
    let banned = |name: &&String| absent.iter().any(|ban| name == ban || (ban.ends_with('-') && name.starts_with(ban)));
    let found: Vec<_> = crates.keys().filter(banned).collect();
    assert!(found.is_empty(), "{package} is linked with {found:?}; `cargo tree -p {package} -i NAME` shows why");
}

/// The SDK's own `rustls` feature would bring a second HTTP and a second, old TLS stack into a process that holds keys.
#[test]
fn the_daemon_has_one_http_and_one_tls_stack_and_both_are_current() {
    let crates = linked_into("enclaved");
    for (name, oldest) in [("hyper", (1, 0)), ("rustls", (0, 23)), ("tokio", (1, 0)), ("aws-lc-rs", (1, 0))] {
        let versions: Vec<_> = crates[name].iter().collect();
        assert_eq!(versions.len(), 1, "{name}: {versions:?}; `cargo tree -p enclaved -d` shows why");
        let mut numbers = versions[0].split('.').map(|number| number.parse::<u32>().unwrap());
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        assert!(version >= oldest, "{name} {}", versions[0]);
    }
}

#[test]
fn the_daemon_has_one_crypto_library_and_none_of_the_systems() {
    check_absent("enclaved", &["ring", "openssl", "openssl-sys", "native-tls"]);
}

#[test]
fn the_daemon_has_one_async_runtime() {
    check_absent("enclaved", &["async-io", "async-executor", "async-global-executor", "async-std", "smol"]);
}

#[test]
fn core_is_pure() {
    check_absent(
        "enclaved-core",
        &["tokio", "hyper", "rustls", "rustix", "aws-", "rand", "getrandom", "enclaved", "enclaved-proxy"],
    );
}

#[test]
fn the_data_plane_knows_nothing_of_aws_metrics_and_systemd() {
    let absent = ["aws-config", "aws-sdk-", "aws-smithy-", "prometheus", "zbus", "sd-notify", "enclaved"];
    check_absent("enclaved-proxy", &absent);
}

#[test]
fn the_daemon_does_not_need_the_stand_ins() {
    check_absent("enclaved", &["enclaved-integration", "s3s", "proptest"]);
}
