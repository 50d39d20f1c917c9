//! The access log under the proxy's unit: in its folder, rotated there by root, or in the journal.

use enclaved_integration::machine::DEADLINE;
use enclaved_integration::machine::parent::{Parent, parent_host};
use std::net::SocketAddr;

const PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9007);
const FOLDER: &str = "/var/log/enclaved-proxy";

/// Has what is configured in force.
fn reload(parent: &Parent, access_log: &str) {
    let text = format!("[ingress]\naccess_log = \"{access_log}\"\n");
    parent.write("/etc/enclaved/conf.d/log.toml", text).unwrap();
    parent.run_ok(&["systemctl", "reload-or-restart", "enclaved"]).unwrap();
}

/// Makes connections to the enclave's port, which it does not take, until what this shows has a line of one.
fn until_logged(parent: &Parent, show: &[&str]) -> String {
    let connect = format!("exec 3<>/dev/tcp/127.0.0.1/{} && cat <&3", PORT.port());
    let line = || {
        // Before the port is open there is nobody to connect to.
        parent.run(&["bash", "-c", &connect])?;
        let said = parent.run(show)?.stdout;
        Ok(said.lines().find(|line| line.contains(r#""reason":"no_target""#)).map(str::to_owned))
    };
    parent.wait_until("a connection is logged", DEADLINE, line).unwrap()
}

#[test]
fn lines_are_in_the_logs_folder_survive_its_rotation_and_are_in_the_journal_if_that_is_wanted() {
    let parent = parent_host().unwrap();
    // Its image is not there, which a port and its connections do not need.
    parent.configure(&parent.echoing_enclave("signer", "/srv/none.eif", PORT)).unwrap();
    let file = format!("{FOLDER}/access.log");
    reload(&parent, &file);
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    let line: serde_json::Value = serde_json::from_str(&until_logged(&parent, &["cat", &file])).unwrap();
    assert_eq!((&line["protocol"], &line["enclave"]), (&"tcp".into(), &"signer".into()), "{line}");
    let stat = |path: &str| parent.run_ok(&["stat", "--format=%a %U:%G", path]).unwrap();
    assert_eq!(stat(FOLDER), "750 enclaved-proxy:enclaved-proxy\n");
    assert_eq!(stat(&file), "640 enclaved-proxy:enclaved-proxy\n");

    parent.run_ok(&["mv", &file, &format!("{file}.1")]).unwrap();
    until_logged(&parent, &["cat", &file]);

    reload(&parent, "stdout");
    until_logged(&parent, &["journalctl", "--unit=enclaved-proxy", "--output=cat"]);

    reload(&parent, "/etc/access.log");
    let told = |parent: &Parent| {
        parent.run(&["bash", "-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{} && cat <&3", PORT.port())])?;
        let status = parent.status()?;
        let problem =
            |problem: &str| problem.contains("the access log is not written") && problem.contains("/etc/access.log");
        Ok(status.filter(|status| status.problems.iter().any(|one| problem(&one.failure.message))))
    };
    parent.wait_until("the status tells that it cannot be written", DEADLINE, || told(&parent)).unwrap();
}
