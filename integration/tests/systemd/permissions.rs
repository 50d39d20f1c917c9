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

const ENCLAVES: [&str; 2] = ["enclave@signer-1.service", "enclave@a-b-c-4000000000.service"];
const OTHERS: [&str; 2] = ["enclaved-proxy.service", "enclaved-allocator.service"];

#[test]
fn the_daemons_user_may_start_and_stop_enclaves_and_start_the_proxy_and_the_allocator() {
    let parent = host();
    for unit in OTHERS {
        assert!(parent.run_as("enclaved", &["systemctl", "--no-ask-password", "start", unit]).unwrap().success());
        assert_eq!(parent.property(unit, "ActiveState").unwrap(), "active");
    }
    for unit in ENCLAVES {
        for verb in ["start", "stop", "reset-failed"] {
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
    parent.run_ok(&["systemctl", "start", ENCLAVES[0]]).unwrap();
    parent.run_ok(&["systemctl", "kill", "--signal=KILL", ENCLAVES[0]]).unwrap();
    let failed = || parent.property(ENCLAVES[0], "ActiveState");
    parent.wait_until("it has failed", super::DEADLINE, || Ok((failed()? == "failed").then_some(()))).unwrap();
    assert!(parent.run_as("enclaved", &["systemctl", "reset-failed", ENCLAVES[0]]).unwrap().success());
    assert_eq!(failed().unwrap(), "inactive");
}

#[test]
fn the_daemons_user_may_do_nothing_else() {
    let parent = host();
    parent.run_ok(&["systemctl", "start", ENCLAVES[0], OTHERS[0], OTHERS[1], "ssh.service"]).unwrap();
    let mut refused: Vec<Vec<&str>> = vec![
        vec!["daemon-reload"],
        vec!["daemon-reexec"],
        vec!["reboot"],
        vec!["poweroff"],
        vec!["isolate", "rescue.target"],
        vec!["set-environment", "A=B"],
        vec!["set-default", "rescue.target"],
        vec!["enable", OTHERS[0]],
        vec!["disable", OTHERS[0]],
        vec!["mask", ENCLAVES[0]],
        vec!["link", "/var/lib/enclaved/evil.service"],
        vec!["reset-failed"],
        vec!["kill", ENCLAVES[0]],
        vec!["set-property", "--runtime", ENCLAVES[0], "MemoryMax=1"],
        vec!["reload", ENCLAVES[0]],
        vec!["clean", ENCLAVES[0]],
        vec!["freeze", ENCLAVES[0]],
        vec!["start", "enclaved.service"],
        vec!["stop", "enclaved.service"],
        vec!["start", "enclave@a.timer"],
        vec!["start", "enclave@A.service"],
        vec!["start", "enclave@a.service"],
        vec!["start", "enclave@a-.service"],
        vec!["start", "enclave@a-b.service"],
        vec!["restart", ENCLAVES[0]],
        vec!["try-restart", ENCLAVES[0]],
        vec!["start", "enclave@..service"],
        vec!["start", "enclave@a\\x2fb-1.service"],
        vec!["stop", "multi-user.target"],
    ];
    for unit in ["ssh.service", "enclaved-other.service", "enclavex.service", "other@enclave.service", "dbus.service"] {
        refused.extend(["start", "stop", "restart"].map(|verb| vec![verb, unit]));
    }
    for unit in OTHERS {
        refused
            .extend(["stop", "restart", "try-restart", "reset-failed", "reload", "kill"].map(|verb| vec![verb, unit]));
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
    for unit in [ENCLAVES[0], OTHERS[0], OTHERS[1], "ssh.service", "dbus.service"] {
        assert_eq!(parent.property(unit, "ActiveState").unwrap(), "active", "{unit}");
    }
}

#[test]
fn other_users_may_do_nothing_at_all() {
    let parent = host();
    parent.run_ok(&["systemctl", "start", ENCLAVES[0]]).unwrap();
    for user in ["enclaved-proxy", "nobody"] {
        for unit in ENCLAVES.iter().chain(&OTHERS) {
            for verb in ["start", "stop", "restart", "reset-failed"] {
                if verb == "reset-failed" && *unit != ENCLAVES[0] {
                    // Not loaded: there is nothing that could be refused.
                    continue;
                }
                let said = parent.run_as(user, &["systemctl", "--no-ask-password", verb, unit]).unwrap();
                assert!(is_refused(&said), "{user}: {verb} {unit}: {said:?}");
            }
        }
    }
    assert_eq!(parent.property(ENCLAVES[0], "ActiveState").unwrap(), "active");
}
