//! Whatever happens to the control process, to the proxy, and to systemd itself: enclaves keep their processes, and no connection is
//! refused.

use enclaved_core::status::Status;
use enclaved_integration::machine::DEADLINE;
use enclaved_integration::machine::memory::Starved;
use enclaved_integration::machine::parent::{Parent, parent_host};
use enclaved_integration::machine::traffic::Traffic;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::Duration;

const PROXY: &str = "enclaved-proxy.service";
/// Where the enclave `signer` echoes.
const ECHO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9007);
const V1: &str = "/srv/v1.eif";
const V2: &str = "/srv/v2.eif";

/// A host on which `signer` and `other` serve. The daemon is started again without the usual pause.
struct Host {
    parent: Parent,
    pids: BTreeMap<String, u32>,
}

impl Host {
    fn ready() -> Self {
        let parent = parent_host().unwrap();
        for (path, label) in [(V1, "v1"), (V2, "v2")] {
            parent.put_image(path, &parent.sample_application(label)).unwrap();
        }
        let soon = "[Service]\nRestartSec=100ms\nWatchdogSec=2s\n";
        parent.write("/etc/systemd/system/enclaved.service.d/soon.conf", soon).unwrap();
        parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
        let host = Self { parent, pids: BTreeMap::new() };
        host.configure(Some(V1));
        host.parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
        let status = host.until_ready(2);
        assert_eq!(host.processes(&status).len(), 2);
        Self { pids: host.processes(&status), ..host }
    }

    /// `signer`, and `other` with that image.
    fn configure(&self, other: Option<&str>) {
        let signer = self.parent.echoing_enclave("signer", V1, ECHO);
        let other = other.map(|image| self.parent.sample_enclave("other", image));
        self.parent.configure(&(signer + &other.unwrap_or_default())).unwrap();
    }

    fn until_ready(&self, enclaves: usize) -> Status {
        let like = |status: &Status| status.ready && status.enclaves.len() == enclaves;
        self.parent.until(&format!("{enclaves} enclaves are ready"), like).unwrap()
    }

    fn daemon(&self) -> u32 {
        self.parent.main_pid("enclaved").unwrap().unwrap()
    }

    fn proxy(&self) -> Option<u32> {
        let active = self.parent.property(PROXY, "ActiveState").unwrap() == "active";
        self.parent.main_pid(PROXY).unwrap().filter(|_| active)
    }

    /// Waits until another process than that is the proxy, and serves.
    fn until_another_proxy(&self, before: u32) {
        let other = || Ok(self.proxy().filter(|pid| *pid != before));
        self.parent.wait_until("another process is the proxy", DEADLINE, other).unwrap();
    }

    fn kill(&self, unit: &str) {
        // It may be between two lives.
        self.parent.run(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", unit]).unwrap();
    }

    /// The processes of the enclaves of that status, as systemd knows them.
    fn processes(&self, status: &Status) -> BTreeMap<String, u32> {
        let with_generation = status.enclaves.iter().filter_map(|enclave| Some((&enclave.name, enclave.generation?)));
        let process = |unit: &str| self.parent.main_pid(unit).unwrap();
        let of = |(name, generation)| Some((format!("{name}"), process(&format!("enclave@{name}-{generation}"))?));
        with_generation.filter_map(of).collect()
    }

    /// The units of enclaves that are not over.
    fn units(&self) -> Vec<String> {
        let list = [
            "systemctl",
            "list-units",
            "--plain",
            "--no-legend",
            "--state=active,activating,deactivating",
            "enclave@*",
        ];
        let said = self.parent.run_ok(&list).unwrap();
        said.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    }
}

fn nothing_was_lost(traffic: Traffic) {
    let outcome = traffic.end().unwrap();
    let nothing = [] as [String; 0];
    assert_eq!((&outcome.refused[..], &outcome.broken[..]), (&nothing[..], &nothing[..]), "of {}", outcome.served);
    assert_eq!(outcome.cut, None);
}

/// The proxy died so often: nobody was refused, and no more was cut than was under way.
fn only_cut_so_often(traffic: Traffic, deaths: usize) {
    let outcome = traffic.end().unwrap();
    assert!(outcome.refused.is_empty() && outcome.broken.len() <= deaths, "of {deaths} deaths: {outcome:?}");
}

#[test]
fn restarts_and_upgrades_of_the_control_process_keep_every_enclave_and_refuse_no_connection() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    for round in 0..50 {
        if round == 25 {
            // Another file from now on, as a package puts it there.
            host.parent.run_ok(&["cp", "/usr/bin/enclaved", "/usr/bin/enclaved.new"]).unwrap();
            host.parent.run_ok(&["mv", "/usr/bin/enclaved.new", "/usr/bin/enclaved"]).unwrap();
        }
        let before = host.daemon();
        host.parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
        assert_ne!(host.daemon(), before);
        assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    }
    nothing_was_lost(traffic);
}

#[test]
fn a_stop_of_the_control_process_leaves_enclaves_and_traffic_and_a_start_takes_them_over() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    host.parent.run_ok(&["systemctl", "stop", "enclaved"]).unwrap();
    let served = traffic.served();
    host.parent.wait_until("it serves on", DEADLINE, || Ok((traffic.served() > served + 50).then_some(()))).unwrap();
    host.parent.run_ok(&["systemctl", "start", "enclaved"]).unwrap();
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    nothing_was_lost(traffic);
}

#[test]
fn a_control_process_that_hangs_is_ended_by_the_watchdog_and_nothing_else_is() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    let before = host.daemon();
    host.parent.run_ok(&["kill", "-STOP", &before.to_string()]).unwrap();
    let new = || Ok(host.parent.main_pid("enclaved")?.filter(|pid| *pid != before));
    host.parent.wait_until("another process is the daemon", DEADLINE, new).unwrap();
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    assert!(host.parent.journal("enclaved").unwrap().contains("watchdog"));
    nothing_was_lost(traffic);
}

#[test]
fn systemds_own_reload_and_reexecution_change_nothing() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    let before = host.daemon();
    for verb in ["daemon-reload", "daemon-reexec", "daemon-reload"] {
        host.parent.run_ok(&["systemctl", verb]).unwrap();
        let served = traffic.served();
        host.parent
            .wait_until("it serves on", DEADLINE, || Ok((traffic.served() > served + 20).then_some(())))
            .unwrap();
        assert_eq!(host.processes(&host.until_ready(2)), host.pids, "{verb}");
    }
    assert_eq!(host.daemon(), before);
    // And the daemon has its bus again: it can still launch.
    host.configure(None);
    host.parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
    host.until_ready(1);
    host.configure(Some(V2));
    host.parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
    assert_eq!(host.processes(&host.until_ready(2)).get("signer"), host.pids.get("signer"));
    nothing_was_lost(traffic);
}

#[test]
fn a_wrong_configuration_at_a_restart_changes_nothing_that_runs() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    host.parent.configure("[nonsense]\n").unwrap();
    host.parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    let status = host.parent.until("it says what is wrong", |status| !status.problems.is_empty()).unwrap();
    assert_eq!(host.processes(&status), host.pids);
    nothing_was_lost(traffic);
}

#[test]
fn after_a_reboot_every_enclave_is_launched_anew_once() {
    for reboot in [enclaved_integration::machine::Machine::reboot, enclaved_integration::machine::Machine::reset] {
        let host = Host::ready();
        reboot(&host.parent).unwrap();
        host.until_ready(2);
        assert_eq!(host.units().len(), 2, "{:?}", host.units());
        let launches = host.parent.calls().unwrap();
        // What was run since the boot.
        assert_eq!(launches.iter().filter(|call| call.command() == "run-enclave").count(), 2, "{launches:#?}");
        nothing_was_lost(Traffic::begin(&host.parent, ECHO).unwrap());
    }
}

/// Twenty rounds, or `ENCLAVED_ROUNDS`: in each the second enclave is to come, to go, or to be another; and the daemon or the proxy is
/// killed somewhere in between, at a moment that is another in each round.
#[test]
fn a_control_process_or_a_proxy_killed_at_any_moment_of_a_change_loses_nothing_and_doubles_nothing() {
    let rounds: usize = std::env::var("ENCLAVED_ROUNDS").map_or(20, |rounds| rounds.parse().unwrap());
    let host = Host::ready();
    let traffic = Traffic::of_short_connections(&host.parent, ECHO).unwrap();
    let signer = host.pids.get("signer").copied();
    let mut deaths = 0;
    for round in 0..rounds {
        let other = [None, Some(V1), Some(V2)][round % 3];
        host.configure(other);
        // A reload whose answer does not come fails; the file counts at the next start anyhow.
        host.parent.run(&["systemctl", "reload", "--no-block", "enclaved"]).unwrap();
        // Steps of a prime, so that the rounds cover all of the change's half second.
        sleep(Duration::from_millis(round as u64 * 97 % 600));
        match round % 5 {
            0 | 2 => host.kill("enclaved"),
            1 | 3 => {
                let before = host.proxy();
                host.kill(PROXY);
                host.until_another_proxy(before.unwrap_or_default());
                deaths += 1;
            }
            _ => {
                host.kill(PROXY);
                host.kill("enclaved");
                deaths += 1;
            }
        }
        // Its answer may have been lost with whoever was killed.
        host.parent.run(&["systemctl", "reload", "enclaved"]).unwrap();
        let enclaves = 1 + usize::from(other.is_some());
        let status = host.until_ready(enclaves);
        assert_eq!(host.processes(&status).get("signer").copied(), signer, "round {round}");
        // One unit an enclave, once what is to go has gone.
        let only = || Ok((host.units().len() == enclaves).then_some(()));
        host.parent.wait_until("only what is wanted runs", DEADLINE, only).unwrap();
    }
    only_cut_so_often(traffic, deaths);
}

#[test]
fn restarts_of_the_proxy_refuse_no_connection_and_cut_none_that_ends_in_time() {
    let host = Host::ready();
    let stored = host.parent.property(PROXY, "NFileDescriptorStore").unwrap();
    assert_eq!(stored, "3", "the port of signer, HTTPS, and the link");
    let traffic = Traffic::of_short_connections(&host.parent, ECHO).unwrap();
    for _ in 0..50 {
        host.parent.run_ok(&["systemctl", "restart", PROXY]).unwrap();
    }
    nothing_was_lost(traffic);
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    assert_eq!(host.parent.property(PROXY, "NFileDescriptorStore").unwrap(), stored);
}

#[test]
fn a_proxy_that_is_killed_again_and_again_refuses_no_connection() {
    let host = Host::ready();
    let traffic = Traffic::of_short_connections(&host.parent, ECHO).unwrap();
    for _ in 0..10 {
        let before = host.proxy().unwrap();
        host.kill(PROXY);
        host.until_another_proxy(before);
    }
    only_cut_so_often(traffic, 10);
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
}

#[test]
fn a_proxy_that_hangs_is_ended_by_the_watchdog_and_nobody_is_refused_meanwhile() {
    let host = Host::ready();
    let soon = "[Service]\nWatchdogSec=2s\n";
    host.parent.write("/etc/systemd/system/enclaved-proxy.service.d/soon.conf", soon).unwrap();
    host.parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    host.parent.run_ok(&["systemctl", "restart", PROXY]).unwrap();
    let traffic = Traffic::of_short_connections(&host.parent, ECHO).unwrap();
    let before = host.proxy().unwrap();
    host.parent.run_ok(&["kill", "-STOP", &before.to_string()]).unwrap();
    host.until_another_proxy(before);
    assert!(host.parent.journal(PROXY).unwrap().contains("watchdog"));
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    only_cut_so_often(traffic, 1);
}

#[test]
fn a_stop_of_the_proxy_closes_its_sockets_and_a_start_opens_them_again() {
    let host = Host::ready();
    let connect = || host.parent.in_network(|| TcpStream::connect(ECHO).map(drop)).unwrap();
    // What the other tests rely on: their clients do find out.
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    host.parent.run_ok(&["systemctl", "stop", "enclaved", PROXY]).unwrap();
    assert_eq!(connect().unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    sleep(Duration::from_millis(200));
    let outcome = traffic.end().unwrap();
    assert!(!outcome.refused.is_empty() && outcome.cut.is_some(), "{outcome:?}");
    host.parent.run_ok(&["systemctl", "start", PROXY]).unwrap();
    connect().unwrap();
    assert_eq!(host.parent.property(PROXY, "StatusText").unwrap(), "2 of 2 listeners open");
}

#[test]
fn a_control_process_or_a_proxy_that_the_kernel_kills_for_want_of_memory_comes_back_and_nothing_else_ends() {
    let host = Host::ready();
    let traffic = Traffic::of_short_connections(&host.parent, ECHO).unwrap();
    let before = host.daemon();
    let starved = Starved::process(&host.parent, before).unwrap();
    host.parent
        .wait_until("another process is the daemon", DEADLINE, || {
            // An answer takes memory.
            host.parent.run(&["enclavectl", "status"])?;
            Ok(host.parent.main_pid("enclaved")?.filter(|pid| *pid != before))
        })
        .unwrap();
    assert_eq!(starved.killed().unwrap(), 1);
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);

    let before = host.proxy().unwrap();
    let starved = Starved::process(&host.parent, before).unwrap();
    host.until_another_proxy(before);
    assert_eq!(starved.killed().unwrap(), 1);
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    only_cut_so_often(traffic, 1);
}

#[test]
fn restarts_of_the_allocators_change_nothing_that_runs() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    for unit in ["nitro-enclaves-allocator", "enclaved-allocator"] {
        // Both refuse, each with its reason.
        assert!(!host.parent.run(&["systemctl", "restart", unit]).unwrap().success(), "{unit}");
    }
    host.parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
    assert_eq!(host.processes(&host.until_ready(2)), host.pids);
    nothing_was_lost(traffic);
}

#[test]
fn a_shutdown_ends_enclaves_cleanly_in_the_midst_of_traffic_and_the_next_boot_launches_them() {
    let host = Host::ready();
    let traffic = Traffic::begin(&host.parent, ECHO).unwrap();
    host.parent.reboot().unwrap();
    // It was served until then, and not since.
    assert!(traffic.end().unwrap().served > 0);
    let status = host.until_ready(2);
    for enclave in &status.enclaves {
        assert_eq!((enclave.restarts, &enclave.last_error), (0, &None), "{}", enclave.name);
        let journal = host.parent.journal(&format!("enclave@{}-1", enclave.name)).unwrap();
        for said in ["stopped with everything else", "Deactivated successfully"] {
            assert!(journal.contains(said), "{said}: {journal}");
        }
        // Neither by force nor by anybody's hand.
        for said in ["timed out", "SIGKILL", "held stopped", "ended unasked"] {
            assert!(!journal.contains(said), "{said}: {journal}");
        }
    }
    nothing_was_lost(Traffic::begin(&host.parent, ECHO).unwrap());
}
