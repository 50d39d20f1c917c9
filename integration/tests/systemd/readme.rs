//! The README's way to install, command by command.

use enclaved_integration::machine::{Machine, MachineOptions};
use std::fs;
use std::path::{Path, PathBuf};

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn a_host_that_is_set_up_as_the_readme_says_runs_the_daemon() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let commands = readme.lines().filter_map(|line| line.trim().strip_prefix("sudo "));
    let commands: Vec<_> = commands.take_while(|command| *command != "enclavectl check").collect();
    assert!(commands.len() >= 8, "{commands:?}");

    let mut options = MachineOptions::default();
    for file in files(&root.join("units")) {
        let path = Path::new("/src").join(file.strip_prefix(root).unwrap());
        options = options.file(path, 0o644, fs::read_to_string(&file).unwrap());
    }
    for program in ["enclaved", "enclavectl"] {
        options = options.program(program, format!("/src/target/release/{program}"));
    }
    let machine = Machine::boot(&options).unwrap();
    for command in commands {
        machine.run_ok(&["sh", "-e", "-c", &format!("cd /src; {command}")]).unwrap();
    }
    // Not AF_VSOCK: it is not confined to the machine.
    let config = "[vsock]\ntransport = { hybrid = \"/run/enclaved\" }\n";
    machine.write("/etc/enclaved/enclaved.toml", config).unwrap();
    machine.run_ok(&["enclavectl", "check"]).unwrap();
    machine.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    machine.run_ok(&["systemctl", "is-active", "enclaved"]).unwrap();
}
