//! The machine itself: what the other tests take for granted.

use enclaved_integration::machine::{DEADLINE, Machine, MachineOptions};
use enclaved_integration::processes::{is_alive, signal};
use rustix::process::Signal;
use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What a machine of that name has on this computer: groups of processes, and files.
fn traces(name: &str) -> Vec<PathBuf> {
    let folders = ["/sys/fs/cgroup", "/run/systemd/nspawn", "/tmp"];
    let pattern = format!("*{name}*");
    let mut find = Command::new("find");
    let found = find.args(folders).args(["-maxdepth", "6", "-name", &pattern, "-prune"]).output().unwrap();
    String::from_utf8(found.stdout).unwrap().lines().map(PathBuf::from).collect()
}

#[test]
fn a_machine_boots_with_no_failed_unit() {
    let machine = Machine::boot(&MachineOptions::default()).unwrap();
    assert_eq!(machine.run_ok(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).unwrap(), "");
    assert_eq!(machine.run_ok(&["systemctl", "is-system-running"]).unwrap(), "running\n");
    assert_eq!(machine.run_as("nobody", &["id", "--user", "--name"]).unwrap().stdout, "nobody\n");
}

#[test]
fn machines_share_neither_processes_nor_network_nor_groups_and_leave_nothing_behind() {
    let (one, other) = (Machine::boot(&MachineOptions::default()), Machine::boot(&MachineOptions::default()));
    let (one, other) = (one.unwrap(), other.unwrap());
    for machine in [&one, &other] {
        let unit = ["systemd-run", "--unit=hello", "--service-type=exec", "sleep", "infinity"];
        machine.run_ok(&unit).unwrap();
        assert!(machine.main_pid("hello").unwrap().is_some());
    }
    one.run_ok(&["systemctl", "stop", "hello"]).unwrap();
    assert_eq!(other.property("hello", "ActiveState").unwrap(), "active");

    let (name, init) = (one.name().to_owned(), one.init().unwrap());
    assert!(traces(&name).len() >= 3, "{:?}", traces(&name));
    drop(one);
    assert_eq!(traces(&name), [] as [PathBuf; 0]);
    assert!(!is_alive(init));
    assert_eq!(other.property("hello", "ActiveState").unwrap(), "active");
}

#[test]
fn a_machine_keeps_its_files_and_its_journal_over_a_reboot_and_no_process() {
    let machine = Machine::boot(&MachineOptions::default()).unwrap();
    for reboot in [Machine::reboot, Machine::reset] {
        let boot = |machine: &Machine| machine.read("/proc/sys/kernel/random/boot_id").unwrap();
        let before = boot(&machine);
        machine.run_ok(&["systemd-run", "--unit=hello", "--wait", "echo", "said", &before]).unwrap();
        machine.write("/var/lib/hello/file", &before).unwrap();
        machine.write("/run/hello", "").unwrap();
        machine.run_ok(&["journalctl", "--flush"]).unwrap();
        machine.run_ok(&["journalctl", "--sync"]).unwrap();

        reboot(&machine).unwrap();
        assert_ne!(boot(&machine), before);
        assert_eq!(machine.read("/var/lib/hello/file").unwrap(), before);
        assert!(!machine.run(&["test", "-e", "/run/hello"]).unwrap().success());
        assert!(machine.journal("hello").unwrap().contains(before.trim()));
    }
}

#[test]
fn a_connection_from_a_test_reaches_what_listens_in_its_machine() {
    let serves = "[Socket]\nListenStream=127.0.0.1:7\nAccept=yes\n";
    let says = "[Service]\nExecStart=echo hello\nStandardOutput=socket\n";
    let options = MachineOptions::default().file("/etc/systemd/system/hello.socket", 0o644, serves).file(
        "/etc/systemd/system/hello@.service",
        0o644,
        says,
    );
    let machine = Machine::boot(&options).unwrap();
    machine.run_ok(&["systemctl", "start", "hello.socket"]).unwrap();
    let said = machine.in_network(|| {
        let mut said = String::new();
        TcpStream::connect("127.0.0.1:7").unwrap().read_to_string(&mut said).unwrap();
        said
    });
    assert_eq!(said.unwrap(), "hello\n");
    assert!(TcpStream::connect("127.0.0.1:7").is_err());
}

#[test]
fn a_machine_is_taken_down_when_whoever_booted_it_is_killed() {
    const CHILD: &str = "ENCLAVED_TEST_BOOTS_AND_IS_KILLED";
    if std::env::var_os(CHILD).is_some() {
        let machine = Machine::boot(&MachineOptions::default()).unwrap();
        assert!(!traces(machine.name()).is_empty());
        let text = format!("{} {}", machine.init().unwrap(), machine.name());
        fs::write(std::env::var_os(CHILD).unwrap(), text).unwrap();
        signal(std::process::id(), Signal::KILL).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine");
    let this = "machine::a_machine_is_taken_down_when_whoever_booted_it_is_killed";
    let ended =
        Command::new(std::env::current_exe().unwrap()).args(["--exact", this]).env(CHILD, &file).output().unwrap();
    assert!(!ended.status.success());
    let text = fs::read_to_string(file).unwrap();
    let (init, name) = text.split_once(' ').unwrap();
    let began = Instant::now();
    while is_alive(init.parse().unwrap()) || !traces(name).is_empty() {
        assert!(began.elapsed() < DEADLINE, "{name} is still there: {:?}", traces(name));
        sleep(Duration::from_millis(20));
    }
}
