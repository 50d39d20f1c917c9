//! The daemon and the proxy under their units, on a parent host that has no enclaves to run.

use enclaved_core::status::Status;
use enclaved_integration::machine::DEADLINE;
use enclaved_integration::machine::parent::{Parent, parent_host};

fn started() -> Parent {
    let parent = parent_host().unwrap();
    parent.configure("").unwrap();
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    parent
}

#[test]
fn enabling_the_daemon_is_all_a_host_needs() {
    let parent = started();
    for unit in ["enclaved.service", "enclaved-proxy.service"] {
        parent
            .wait_until("it is active", DEADLINE, || {
                Ok((parent.property(unit, "ActiveState")? == "active").then_some(()))
            })
            .unwrap_or_else(|error| panic!("{unit}: {error:#}\n{}", parent.journal(unit).unwrap()));
    }
    let status = parent.until("it tells its status", |status| status.ready).unwrap();
    let told = || Ok((parent.property("enclaved", "StatusText")? == "0 of 0 enclaves ready").then_some(()));
    parent.wait_until("systemctl status tells it, too", DEADLINE, told).unwrap();
    assert_eq!(status.host.pid, parent.main_pid("enclaved").unwrap().unwrap());

    parent.reboot().unwrap();
    parent.until("it is there again after a reboot", |status| status.ready).unwrap();
    for unit in ["enclaved.service", "enclaved-proxy.service"] {
        assert_eq!(parent.property(unit, "ActiveState").unwrap(), "active", "{unit}");
        assert_eq!(parent.property(unit, "NRestarts").unwrap(), "0", "{unit}");
    }
    assert_eq!(parent.run_ok(&["systemctl", "is-system-running", "--wait"]).unwrap(), "running\n");
}

#[test]
fn a_reload_of_a_wrong_file_fails_and_says_why_and_the_daemon_goes_on() {
    let parent = started();
    let pid = parent.main_pid("enclaved").unwrap();
    parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();

    parent.configure("[nonsense]\n").unwrap();
    let said = parent.run(&["systemctl", "reload", "enclaved"]).unwrap();
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(parent.journal("enclaved").unwrap().contains("nonsense"));
    assert_eq!(parent.main_pid("enclaved").unwrap(), pid);
    let shown = || {
        anyhow::Ok(parent.run_ok(&["systemctl", "status", "enclaved"])?.contains("problems, see enclavectl status\""))
    };
    parent.wait_until("systemctl status shows it", DEADLINE, || Ok(shown()?.then_some(()))).unwrap();

    parent.configure("").unwrap();
    parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
    parent.until("the problem is gone", |status| status.problems.is_empty()).unwrap();
    assert_eq!(parent.main_pid("enclaved").unwrap(), pid);
}

#[test]
fn a_wrong_file_at_a_restart_leaves_the_daemon_on_the_last_good_one() {
    let parent = started();
    parent.until("it is ready", |status| status.ready).unwrap();
    parent.configure("[nonsense]\n").unwrap();
    parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    let status = parent.until("it says what is wrong", |status| !status.problems.is_empty()).unwrap();
    assert!(status.problems.iter().any(|problem| problem.failure.to_string().contains("nonsense")), "{status:#?}");
}

#[test]
fn a_daemon_that_hangs_is_killed_by_the_watchdog_and_started_again() {
    let parent = parent_host().unwrap();
    parent.configure("").unwrap();
    parent.write("/run/systemd/system/enclaved.service.d/soon.conf", "[Service]\nWatchdogSec=2s\n").unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.run_ok(&["systemctl", "start", "enclaved"]).unwrap();
    let before = parent.main_pid("enclaved").unwrap().unwrap();
    parent.run_ok(&["kill", "-STOP", &before.to_string()]).unwrap();
    parent
        .wait_until("another process is the daemon", DEADLINE, || {
            Ok(parent.main_pid("enclaved")?.filter(|pid| *pid != before))
        })
        .unwrap();
    parent.until("it is ready again", |status| status.ready).unwrap();
    assert!(parent.journal("enclaved").unwrap().contains("watchdog"));
}

#[test]
fn a_daemon_without_a_configuration_says_so_and_takes_one_when_it_comes() {
    let parent = parent_host().unwrap();
    parent.run(&["systemctl", "start", "--no-block", "enclaved"]).unwrap();
    parent
        .wait_until("it has tried twice", DEADLINE, || {
            let restarts: u32 = parent.property("enclaved", "NRestarts")?.parse()?;
            Ok((restarts >= 2).then_some(()))
        })
        .unwrap();
    let journal = parent.journal("enclaved").unwrap();
    assert!(journal.contains("status=78/CONFIG") && journal.contains("/etc/enclaved/enclaved.toml"), "{journal}");
    parent.configure("").unwrap();
    parent.until("it is ready", |status| status.ready).unwrap();
}

#[test]
fn a_daemon_that_cannot_see_what_runs_says_so_and_not_that_it_is_ready() {
    let parent = parent_host().unwrap();
    parent.configure("").unwrap();
    // It can't be read, and not be taken for a broken one either.
    parent.run_ok(&["mkdir", "/var/lib/enclaved/ledger.json"]).unwrap();
    parent.run_ok(&["systemctl", "start", "--no-block", "enclaved"]).unwrap();
    let said = || Ok(parent.property("enclaved", "StatusText")?.contains("what runs can't be seen").then_some(()));
    parent.wait_until("it says so", DEADLINE, said).unwrap();
    assert_eq!(parent.property("enclaved", "ActiveState").unwrap(), "activating");
    parent.run_ok(&["rmdir", "/var/lib/enclaved/ledger.json"]).unwrap();
    let ready = || Ok((parent.property("enclaved", "ActiveState")? == "active").then_some(()));
    parent.wait_until("it is ready", DEADLINE, ready).unwrap();
    assert_eq!(parent.property("enclaved", "NRestarts").unwrap(), "0");
}

#[test]
fn a_proxy_that_supervisor_direct_has_left_running_is_told_until_it_is_gone() {
    let parent = parent_host().unwrap();
    let image = "/srv/a.eif";
    parent.put_image(image, &parent.sample_application("a")).unwrap();
    parent.configure(&parent.sample_enclave("a", image)).unwrap();
    // As root, whose socket the daemon may not even connect to.
    let former = ["enclaved", "proxy", "--state-dir", "/var/lib/former", "--link", "/run/enclaved/proxy.sock"];
    let former = parent.start(&former).unwrap();
    let listens = || Ok(parent.run(&["test", "-S", "/run/enclaved/proxy.sock"])?.success().then_some(()));
    parent.wait_until("it listens", DEADLINE, listens).unwrap();
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    let problem = |status: &Status| {
        status
            .problems
            .iter()
            .find(|problem| problem.about == "former proxy")
            .map(|problem| problem.failure.to_string())
    };
    let status = parent.until("it is told", |status| problem(status).is_some()).unwrap();
    let text = problem(&status).unwrap();
    assert!(text.contains("serves at /run/enclaved/proxy.sock") && text.contains("ss -xlp src"), "{text}");
    drop(former);
    parent.until("it is told no more", |status| status.ready && problem(status).is_none()).unwrap();
}
