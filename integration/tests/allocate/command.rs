//! The command as systemd runs it: whose pool it is.

use crate::host::why;
use enclaved::allocate::Report;
use std::fs;

/// Runs the command as systemd would, with that configuration, and with a request that can't get as far as the host; what it reports.
fn command(config: Option<&str>, request: &str) -> (Option<i32>, Report) {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    fs::create_dir(&run_dir).unwrap();
    let file = folder.path().join("enclaved.toml");
    if let Some(config) = config {
        fs::write(&file, config.replace("RUN_DIR", run_dir.to_str().unwrap())).unwrap();
    }
    fs::write(run_dir.join("allocate.json"), request).unwrap();
    let mut command = std::process::Command::new(enclaved_integration::binaries::find("enclaved").unwrap());
    command.arg("allocate").arg("--config").arg(file).arg("--report").arg(folder.path().join("report.json"));
    if config.is_none_or(|config| !config.contains("RUN_DIR")) {
        command.arg("--request").arg(run_dir.join("allocate.json"));
    }
    let output = command.output().unwrap();
    let report: Report = serde_json::from_slice(&fs::read(folder.path().join("report.json")).unwrap()).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("what is reserved is not changed: "), "{output:?}");
    (output.status.code(), report)
}

#[test]
fn the_pool_stays_the_administrators_unless_the_configuration_says_that_it_is_enclaveds() {
    for (config, code, part) in [
        (None, 78, "the pool is the administrator's (host.allocator = \"manage\""),
        (
            Some("[host]\nsupervisor = \"direct\"\n"),
            78,
            "host.allocator is \"verify\": the pool is the administrator's",
        ),
        (Some("[host]\nallocator = \"verify\"\n"), 78, "host.allocator is \"verify\""),
        (Some("[host]\nallocator = \"external\"\n"), 78, "host.allocator is \"external\""),
        // Then its own request is read, from the daemon's folder.
        (Some("[host]\n"), 75, "is not taken: EOF"),
        (
            Some("[host]\nsupervisor = \"direct\"\nallocator = \"manage\"\nrun_dir = \"RUN_DIR\"\n"),
            75,
            "is not taken: EOF",
        ),
    ] {
        let (exit, report) = command(config, "");
        let why = why(&report);
        assert!(exit == Some(code) && why.contains(part), "{config:?}: {exit:?} {why}");
    }
}

#[test]
fn with_a_configuration_that_cannot_be_used_nothing_is_changed_and_the_daemon_learns_why() {
    let request = r#"{"format":1,"id":7,"wish":{"cpus":{"count":2},"memory_mib":512}}"#;
    for config in ["[host", "[host]\nallocator = \"manage\"\nreserve_memory_mib = \"much\"\n"] {
        let (exit, report) = command(Some(config), request);
        let why = why(&report);
        assert!(exit == Some(78) && why.contains("the configuration can't be used"), "{exit:?} {why}");
        assert_eq!(report.request.unwrap().id, 7, "it is an answer to the request");
    }
}
