//! What polkit lets which user have systemd do.

use enclaved_integration::machine::Said;
use enclaved_integration::machine::parent::{Parent, parent_host};

/// Units that stand for those of enclaved, and do nothing; and one of somebody else's.
const NOTHING: &str = "[Service]\nExecStart=sleep infinity\n";

fn host() -> Parent {
    let parent = parent_host().unwrap();
    for unit in ["enclave@", "enclaved-proxy", "enclaved-allocator"] {
        parent.write(&format!("/run/systemd/system/{unit}.service.d/nothing.conf"), HARMLESS).unwrap();
    }
    for unit in ["ssh", "enclaved-other", "enclavex", "other@enclave"] {
        parent.write(&format!("/run/systemd/system/{unit}.service"), NOTHING).unwrap();
    }
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent
}

const HARMLESS: &str = "[Service]\nType=exec\nExecStart=\nExecStart=sleep infinity\nExecStop=\nExecStopPost=\nWatchdogSec=0\nUser=\nGroup=\n";

/// A refusal, not another failure.
fn is_refused(said: &Said) -> bool {
    let text = said.stderr.to_lowercase();
    said.code != Some(0)
        && ["access denied", "authentication required", "interactive authentication", "authorization", "not authorized"]
            .iter()
            .any(|sign| text.contains(sign))
}

const OURS: [&str; 5] = [
    "enclave@signer-1.service",
    "enclave@a.service",
    "enclave@a-b-c-4000000000.service",
    "enclaved-proxy.service",
    "enclaved-allocator.service",
];

#[test]
fn the_daemons_user_may_manage_the_units_of_enclaves_proxy_and_allocator() {
    let parent = host();
    for unit in OURS {
        for verb in ["start", "restart", "stop", "reset-failed"] {
            let said = parent.run_as("enclaved", &["systemctl", "--no-ask-password", verb, unit]).unwrap();
            // What is not loaded has nothing to be reset, which is no refusal.
            assert!(
                said.success() || verb == "reset-failed" && said.stderr.contains("not loaded"),
                "{verb} {unit}: {said:?}"
            );
        }
        assert_eq!(parent.property(unit, "ActiveState").unwrap(), "inactive");
    }
    // One that has failed is there to be reset.
    parent.run_ok(&["systemctl", "start", OURS[0]]).unwrap();
    parent.run_ok(&["systemctl", "kill", "--signal=KILL", OURS[0]]).unwrap();
    let failed = || parent.property(OURS[0], "ActiveState");
    parent.wait_until("it has failed", super::DEADLINE, || Ok((failed()? == "failed").then_some(()))).unwrap();
    assert!(parent.run_as("enclaved", &["systemctl", "reset-failed", OURS[0]]).unwrap().success());
    assert_eq!(failed().unwrap(), "inactive");
}

#[test]
fn the_daemons_user_may_do_nothing_else() {
    let parent = host();
    parent.run_ok(&["systemctl", "start", OURS[0], "ssh.service"]).unwrap();
    let mut refused: Vec<Vec<&str>> = vec![
        vec!["daemon-reload"],
        vec!["daemon-reexec"],
        vec!["reboot"],
        vec!["poweroff"],
        vec!["isolate", "rescue.target"],
        vec!["set-environment", "A=B"],
        vec!["set-default", "rescue.target"],
        vec!["enable", OURS[3]],
        vec!["disable", OURS[3]],
        vec!["mask", OURS[0]],
        vec!["link", "/var/lib/enclaved/evil.service"],
        vec!["reset-failed"],
        vec!["kill", OURS[0]],
        vec!["set-property", "--runtime", OURS[0], "MemoryMax=1"],
        vec!["reload", OURS[0]],
        vec!["clean", OURS[0]],
        vec!["freeze", OURS[0]],
        vec!["start", "enclaved.service"],
        vec!["stop", "enclaved.service"],
        vec!["start", "enclave@a.timer"],
        vec!["start", "enclave@A.service"],
        vec!["start", "enclave@..service"],
        vec!["start", "enclave@a-.service"],
        vec!["start", "enclave@a\\x2fb.service"],
        vec!["stop", "multi-user.target"],
    ];
    for unit in ["ssh.service", "enclaved-other.service", "enclavex.service", "other@enclave.service", "dbus.service"] {
        refused.extend(["start", "stop", "restart"].map(|verb| vec![verb, unit]));
    }
    // Only what is loaded can be reset.
    refused.extend(["ssh.service", "dbus.service"].map(|unit| vec!["reset-failed", unit]));
    for arguments in refused {
        let said =
            parent.run_as("enclaved", &[&["systemctl", "--no-ask-password"], arguments.as_slice()].concat()).unwrap();
        assert!(is_refused(&said), "{arguments:?}: {said:?}");
    }
    let transient = ["systemd-run", "--no-ask-password", "--unit=enclave@evil.service", "id"];
    let said = parent.run_as("enclaved", &transient).unwrap();
    assert!(is_refused(&said), "{said:?}");
    for unit in [OURS[0], "ssh.service", "dbus.service"] {
        assert_eq!(parent.property(unit, "ActiveState").unwrap(), "active", "{unit}");
    }
}

#[test]
fn other_users_may_do_nothing_at_all() {
    let parent = host();
    parent.run_ok(&["systemctl", "start", OURS[0]]).unwrap();
    for user in ["enclaved-proxy", "nobody"] {
        for unit in OURS {
            for verb in ["start", "stop", "restart", "reset-failed"] {
                if verb == "reset-failed" && unit != OURS[0] {
                    // Not loaded: there is nothing that could be refused.
                    continue;
                }
                let said = parent.run_as(user, &["systemctl", "--no-ask-password", verb, unit]).unwrap();
                assert!(is_refused(&said), "{user}: {verb} {unit}: {said:?}");
            }
        }
    }
    assert_eq!(parent.property(OURS[0], "ActiveState").unwrap(), "active");
}
