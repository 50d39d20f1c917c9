//! Commands in a machine: run as root or as another, with what they said; and what is asked of systemd all the time.

use super::Machine;
use anyhow::{Context as _, bail, ensure};
use std::fs;
use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::thread;

/// Where programs are, in a machine as outside.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// No command takes longer; then it is killed, and has the exit status 137.
const LIMIT: &str = "120";

/// What a program said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Its exit status; none if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Said {
    /// Whether its exit status was 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// A program that runs in a machine until this is dropped.
#[derive(Debug)]
pub struct Within(Child);

impl Drop for Within {
    fn drop(&mut self) {
        // It may have ended by itself. nsenter is told to take its child along.
        let _ignored = self.0.kill();
        let _ignored = self.0.wait();
    }
}

impl Machine {
    /// A command in the machine, as root, with nothing of this process's environment.
    ///
    /// # Errors
    /// The machine is not up.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.init()?.to_string()).args(["--all", "--wdns=/", "--"]);
        command.args(arguments).env_clear().env("PATH", PATH).env("LANG", "C.UTF-8").stdin(Stdio::null());
        Ok(command)
    }

    /// The number by which a process of the machine is known outside.
    ///
    /// # Errors
    /// There is no such process.
    pub fn outside(&self, pid: u32) -> anyhow::Result<u32> {
        let init = self.init()?;
        let namespace = fs::read_link(format!("/proc/{init}/ns/pid"))?;
        for entry in fs::read_dir("/proc")? {
            let Some(outside) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            if !fs::read_link(format!("/proc/{outside}/ns/pid")).is_ok_and(|other| other == namespace) {
                continue;
            }
            // The last of its numbers is the one in its own namespace.
            let status = fs::read_to_string(format!("/proc/{outside}/status")).unwrap_or_default();
            let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last());
            if inside.is_some_and(|inside| inside == pid.to_string()) {
                return Ok(outside);
            }
        }
        bail!("no process {pid} in the machine")
    }

    /// Runs a command as root.
    ///
    /// # Errors
    /// It could not be run. That it failed is no error.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<Said> {
        self.run_with(arguments, b"")
    }

    /// Runs a command as root, with that standard input.
    ///
    /// # Errors
    /// It could not be run. That it failed is no error.
    pub fn run_with(&self, arguments: &[&str], input: &[u8]) -> anyhow::Result<Said> {
        let limited = [&["timeout", "--signal=KILL", LIMIT], arguments].concat();
        let mut command = self.command(&limited)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("running nsenter")?;
        let mut stdin = child.stdin.take();
        let output = thread::scope(|scope| {
            scope.spawn(move || {
                // One that does not read its input has its reasons.
                if let Some(stdin) = &mut stdin {
                    let _ignored = stdin.write_all(input);
                }
            });
            child.wait_with_output()
        })?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Said { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) })
    }

    /// Runs a command as root, which must succeed; gives what it printed.
    ///
    /// # Errors
    /// It could not be run, or failed.
    pub fn run_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let said = self.run(arguments)?;
        ensure!(said.success(), "{arguments:?}: {said:?}");
        Ok(said.stdout)
    }

    /// Runs a command as another user, in all of that user's groups.
    ///
    /// # Errors
    /// It could not be run. That it failed is no error.
    pub fn run_as(&self, user: &str, arguments: &[&str]) -> anyhow::Result<Said> {
        let regid = self.run_ok(&["id", "--group", user])?;
        let reuid = format!("--reuid={user}");
        let regid = format!("--regid={}", regid.trim());
        self.run(&[&["setpriv", &reuid, &regid, "--init-groups", "--"], arguments].concat())
    }

    /// Starts a command as root, which goes on until what this gives is dropped.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start(&self, arguments: &[&str]) -> anyhow::Result<Within> {
        let taken_along = [&["setpriv", "--pdeathsig=KILL", "--"], arguments].concat();
        let mut command = self.command(&taken_along)?;
        Ok(Within(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    }

    /// The contents of a file.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        self.run_ok(&["cat", path])
    }

    /// Replaces a file in one step; its folder is made. It is root's, with mode 0644.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self, path: &str, contents: impl AsRef<[u8]>) -> anyhow::Result<()> {
        // By the machine's own programs: its symbolic links lead elsewhere from outside.
        let script = "set -e; mkdir -p \"$(dirname \"$1\")\"; cat >\"$1.new\"; mv -f \"$1.new\" \"$1\"";
        let said = self.run_with(&["sh", "-c", script, "sh", path], contents.as_ref())?;
        ensure!(said.success(), "writing {path}: {said:?}");
        Ok(())
    }

    /// A property of a unit.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub fn property(&self, unit: &str, name: &str) -> anyhow::Result<String> {
        let property = format!("--property={name}");
        Ok(self.run_ok(&["systemctl", "show", "--value", &property, "--", unit])?.trim_end().to_owned())
    }

    /// The main process of a unit, by its PID in the machine.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub fn main_pid(&self, unit: &str) -> anyhow::Result<Option<u32>> {
        let pid = self.property(unit, "MainPID")?.parse()?;
        Ok(Some(pid).filter(|pid| *pid != 0))
    }

    /// What the unit has logged since the machine was made, oldest first.
    ///
    /// # Errors
    /// The journal can't be read.
    pub fn journal(&self, unit: &str) -> anyhow::Result<String> {
        // What was written is there after this.
        self.run_ok(&["journalctl", "--sync"])?;
        self.run_ok(&["journalctl", "--no-pager", "--quiet", "--output=short-precise", "--unit", unit])
    }
}
