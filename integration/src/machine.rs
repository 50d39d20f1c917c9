//! A machine under the real systemd, in which the units are tested: with a process table, users, a D-Bus, a journal and a network
//! of its own, booted in about a second. Any number of them run at a time; they share nothing but the kernel, and nothing of
//! them is left when their test has ended, however it did (the script `integration/machine` sees to that).
//!
//! What a machine does not have: this computer's network, devices and sysfs. **AF_VSOCK is not confined to a network
//! namespace**: what runs in a machine must use the hybrid transport.
//!
//! Needs root.

mod command;
pub mod memory;
pub mod parent;
pub mod traffic;

pub use command::{Said, Within};

use crate::binaries;
use crate::imds::unique;
use anyhow::{Context as _, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

/// A machine boots, and whatever is asked of one happens, within this time; also where many do at once.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// A machine is up within a second, but not while others use the processors.
const BOOT: Duration = Duration::from_secs(150);
/// How often is looked at what can't be waited for.
const POLL: Duration = Duration::from_millis(20);

/// What lies over the plain Debian when a machine is booted.
#[derive(Debug, Clone, Default)]
pub struct MachineOptions {
    files: Vec<(PathBuf, Contents)>,
}

#[derive(Debug, Clone)]
enum Contents {
    Text(String, u32),
    Folder,
    /// A program of this workspace.
    Program(String),
    /// Another program.
    CopyOf(PathBuf),
}

impl MachineOptions {
    /// A file of root's.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>, mode: u32, text: impl Into<String>) -> Self {
        self.files.push((path.into(), Contents::Text(text.into(), mode)));
        self
    }

    /// A folder of root's.
    #[must_use]
    pub fn folder(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push((path.into(), Contents::Folder));
        self
    }

    /// A program of this workspace, at that path.
    #[must_use]
    pub fn program(mut self, name: &str, path: impl Into<PathBuf>) -> Self {
        self.files.push((path.into(), Contents::Program(name.to_owned())));
        self
    }

    /// A program outside, at that path.
    #[must_use]
    pub fn copy_of(mut self, program: PathBuf, path: impl Into<PathBuf>) -> Self {
        self.files.push((path.into(), Contents::CopyOf(program)));
        self
    }

    /// Lays the files out below a folder.
    fn write(&self, folder: &Path) -> anyhow::Result<()> {
        // A journal that outlives a reboot.
        make_folder(&folder.join("var/log/journal"))?;
        for (path, contents) in &self.files {
            let target = folder.join(path.strip_prefix("/").context("a path in a machine is absolute")?);
            make_folder(target.parent().unwrap_or(folder))?;
            let failed = || format!("laying out {} for a machine", path.display());
            match contents {
                Contents::Folder => make_folder(&target)?,
                Contents::Text(text, mode) => {
                    fs::write(&target, text).with_context(failed)?;
                    fs::set_permissions(&target, fs::Permissions::from_mode(*mode)).with_context(failed)?;
                }
                Contents::Program(name) => link(&binaries::find(name)?, &target).with_context(failed)?,
                Contents::CopyOf(program) => link(program, &target).with_context(failed)?,
            }
        }
        Ok(())
    }
}

fn link(program: &Path, target: &Path) -> std::io::Result<()> {
    // Large, and only read; another file system can't have a link to it.
    fs::hard_link(program, target).or_else(|_| fs::copy(program, target).map(drop))
}

fn make_folder(folder: &Path) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(folder);
    made.with_context(|| format!("making {}", folder.display()))
}

/// The machine. It ends with this.
#[derive(Debug)]
pub struct Machine {
    name: String,
    folder: PathBuf,
    holder: Child,
    /// The holder takes the machine down when this is closed.
    lifeline: Option<ChildStdin>,
}

impl Machine {
    /// Boots a machine, and waits until systemd has nothing left to do.
    ///
    /// # Errors
    /// Without root, when its Debian can't be made, or when it does not come up.
    pub fn boot(options: &MachineOptions) -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "booting a machine needs root");
        let rootfs = binaries::of_others("rootfs")?;
        let name = unique(10);
        let folder = Path::new("/tmp").join(format!("enclaved-machine-{name}"));
        make_folder(&folder)?;
        let files = folder.join("below");
        let laid_out = make_folder(&files).and_then(|()| options.write(&files));
        let holder = laid_out.and_then(|()| {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("machine");
            let log = File::create(folder.join("holder.log"))?;
            let mut command = Command::new(&script);
            // In a group of its own: whatever ends the test's group, the holder is there to clear up.
            command.arg(&name).args([&folder, &rootfs, &files]).process_group(0).current_dir("/");
            command.env_clear().env("PATH", command::PATH);
            command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
            command.spawn().with_context(|| format!("running {}", script.display()))
        });
        let mut holder = match holder {
            Ok(holder) => holder,
            Err(error) => {
                drop(fs::remove_dir_all(&folder));
                return Err(error);
            }
        };
        let lifeline = holder.stdin.take();
        let machine = Self { name, folder, holder, lifeline };
        machine.until_booted(None)?;
        Ok(machine)
    }

    /// Waits until the machine has a first process, another one than before, and systemd says that it is up.
    fn until_booted(&self, before: Option<u32>) -> anyhow::Result<()> {
        self.wait_until("the machine has booted", BOOT, || {
            if let Ok(status) = fs::read_to_string(self.folder.join("ended")) {
                bail!("the machine ended (status {}); its console:\n{}", status.trim(), self.console());
            }
            let booted = self.init().is_ok_and(|init| Some(init) != before)
                && self.run(&["test", "-S", "/run/systemd/private"])?.success();
            Ok(booted.then_some(()))
        })
        .with_context(|| format!("console:\n{}", self.console()))?;
        let state = self.run(&["systemctl", "is-system-running", "--wait"])?;
        // `degraded` is a matter of the units, which are the tests'.
        ensure!(matches!(state.stdout.trim(), "running" | "degraded"), "the machine is not up: {state:?}");
        Ok(())
    }

    /// The process that is its PID 1, as seen from outside.
    ///
    /// # Errors
    /// It is not up.
    pub fn init(&self) -> anyhow::Result<u32> {
        let text = fs::read_to_string(self.folder.join("init")).context("the machine is not up")?;
        Ok(text.trim().parse()?)
    }

    /// Its name, unique on this computer: part of the names of all that it leaves there while it runs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder outside, for as long as it runs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it wrote to its console.
    pub fn console(&self) -> String {
        let read = |name| fs::read(self.folder.join(name)).unwrap_or_default();
        let bytes = [read("holder.log"), read("console.log")].concat();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Reboots it in an orderly way. Its files are kept, but for `/run` and `/tmp`.
    ///
    /// # Errors
    /// It does not come up again.
    pub fn reboot(&self) -> anyhow::Result<()> {
        self.reboot_by(&["systemctl", "reboot"])
    }

    /// Reboots it at once, as by its reset button: nothing in it is asked to end. Its files are kept, but for `/run` and `/tmp`.
    ///
    /// # Errors
    /// It does not come up again.
    pub fn reset(&self) -> anyhow::Result<()> {
        self.reboot_by(&["systemctl", "reboot", "--force", "--force"])
    }

    fn reboot_by(&self, command: &[&str]) -> anyhow::Result<()> {
        let before = self.init()?;
        // The command itself dies with all else.
        drop(self.run(command)?);
        self.until_booted(Some(before))
    }

    /// Runs this in the network of the machine, on a thread of its own: sockets that it opens there are in that network.
    ///
    /// # Errors
    /// The machine is not up.
    pub fn in_network<T: Send>(&self, act: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let network = File::open(format!("/proc/{}/ns/net", self.init()?))?;
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(act())
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Looks until there is something, and gives it.
    ///
    /// # Errors
    /// Not within the limit; or looking itself failed, which ends it at once.
    pub fn wait_until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let began = Instant::now();
        loop {
            if let Some(found) = look().with_context(|| format!("waiting until {what}"))? {
                return Ok(found);
            }
            ensure!(began.elapsed() < limit, "not within {limit:?}: {what}");
            sleep(POLL);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let journal = self.run(&["journalctl", "--no-pager", "--lines=400", "--output=short-precise"]);
            eprintln!("---- journal of the machine\n{}----", journal.map(|said| said.stdout).unwrap_or_default());
        }
        drop(self.lifeline.take());
        let ended = self.holder.wait();
        if (ended.is_err() || self.folder.exists()) && !thread::panicking() {
            eprintln!("machine {}: not taken down ({ended:?})", self.folder.display());
        }
    }
}
