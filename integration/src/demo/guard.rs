//! What is left behind when the demo itself is killed: nothing, by a second process that waits for its end. It never ends
//! anything while the demo lives.

use crate::processes;
use anyhow::Context as _;
use std::ffi::OsStr;
use std::io::{BufRead as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

/// The first argument of the second process.
pub(super) const ARGUMENT: &str = "--guard";

/// The second process, seen from the first. It ends with this.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
}

impl Guard {
    pub(super) fn start() -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("finding this program")?;
        let mut command = Command::new(this);
        // In a group of its own, so that Ctrl-C is for the demo alone.
        command.arg(ARGUMENT).env_clear().current_dir("/").process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { child: command.spawn().context("starting the process that clears up after this one")? })
    }

    /// Gives it the folder of a machine to end once this process is gone.
    pub(super) fn watch_over(&self, folder: &Path) -> anyhow::Result<()> {
        let mut line = folder.as_os_str().as_bytes().to_vec();
        line.push(b'\n');
        // By standard input: an argument would make it one of the machine's processes.
        let mut stdin = self.child.stdin.as_ref().context("the process that clears up has no input")?;
        stdin.write_all(&line).context("telling the process that clears up where everything is")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The end of its input is its sign; the machine was dropped before, so it finds nothing to do.
        drop(self.child.stdin.take());
        drop(self.child.wait());
    }
}

/// The second process: waits until the first is gone, in whatever way, and ends what it has left.
pub(super) fn main() -> ExitCode {
    let folders: Vec<Vec<u8>> = std::io::stdin().lock().split(b'\n').map_while(Result::ok).collect();
    let mut clean = true;
    for folder in folders.iter().map(|line| Path::new(OsStr::from_bytes(line))) {
        // A name that no machine has: nothing of anybody else's is ever removed.
        let is_machine = folder.file_name().is_some_and(|name| name.as_bytes().starts_with(b"encl-"));
        if !is_machine || !folder.is_absolute() {
            continue;
        }
        clean &= processes::end_all(folder).is_empty();
        clean &= !folder.exists() || std::fs::remove_dir_all(folder).is_ok();
    }
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
