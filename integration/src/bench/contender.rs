//! The processes of one contender: started with a log and a processor of their own, what they have cost so far, and their end.

use crate::processes::{self, Owned};
use anyhow::{Context as _, bail, ensure};
use enclaved_core::routes::{LinkReply, LinkRequest, ProxyReport, Routes};
use rustix::process::Signal;
use serde::Serialize;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a proxy may take to open its link.
const DEADLINE: Duration = Duration::from_secs(10);

/// What comparisons of long-running contenders have in common.
#[derive(Debug, clap::Args)]
pub(crate) struct Setting {
    /// An `enclaved` to measure in place of the one that was built with this program.
    #[arg(long)]
    enclaved: Option<PathBuf>,
    /// Gives the contenders one processor, and clients and backend another.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub(crate) pin: bool,
    /// A file for the figures of every round.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Setting {
    /// Has this process ready for the load, and gives the `enclaved` that is measured.
    pub(crate) fn prepare(&self) -> anyhow::Result<PathBuf> {
        let enclaved = match &self.enclaved {
            Some(path) => path.clone(),
            None => {
                crate::demo::build_beside("enclaved")?;
                crate::binaries::find("enclaved")?
            }
        };
        raise_descriptor_limit();
        if self.pin {
            pin_the_load()?;
        }
        Ok(enclaved)
    }

    /// Writes the figures to the file that was asked for, if one was.
    pub(crate) fn keep(&self, figures: &impl Serialize) -> anyhow::Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        fs::write(path, serde_json::to_vec_pretty(figures)?).with_context(|| format!("writing {}", path.display()))
    }
}

/// Both ends of every connection are this process's.
pub(super) fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Without it, fewer connections can be held, which then fails.
    let _kept = setrlimit(Resource::Nofile, limit);
}

/// Has this program, and what it starts unless that is told its own, on the second processor.
fn pin_the_load() -> anyhow::Result<()> {
    let mut pinning = Command::new("taskset");
    pinning.args(["-a", "-p", "-c", "1"]).arg(std::process::id().to_string()).stdout(Stdio::null());
    let done = pinning.status().context("pinning the load with taskset")?;
    ensure!(done.success(), "taskset failed: --pin false where there is one processor");
    Ok(())
}

/// Started together, measured as one.
#[derive(Debug)]
pub(crate) struct Processes {
    name: &'static str,
    owned: Vec<Owned>,
    log: PathBuf,
}

impl Processes {
    /// Starts them, pinned to the first processor if asked; what they print is kept in the folder.
    pub(crate) fn start(
        name: &'static str,
        commands: &[Vec<OsString>],
        pin: bool,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let log = folder.join("log");
        let owned = commands.iter().map(|command| spawn(command, pin, &log)).collect::<Result<_, _>>()?;
        Ok(Self { name, owned, log })
    }

    /// Starts `enclaved proxy`, with these arguments and its state in `state` of the folder, and has it serve these routes.
    pub(crate) fn proxy(
        enclaved: &Path,
        arguments: &[OsString],
        routes: Routes,
        pin: bool,
        folder: &Path,
    ) -> anyhow::Result<(Self, ProxyReport)> {
        let link = folder.join("link");
        let mut command: Vec<OsString> = vec![enclaved.into(), "proxy".into()];
        command.extend(["--state-dir".into(), folder.join("state").into(), "--link".into(), link.clone().into()]);
        command.extend_from_slice(arguments);
        let processes = Self::start("enclaved proxy", &[command], pin, folder)?;
        let began = Instant::now();
        while UnixStream::connect(&link).is_err() {
            ensure!(began.elapsed() < DEADLINE, "the proxy has no link: {}", processes.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        let report = ask(&link, &LinkRequest::Publish { routes })?;
        Ok((processes, report))
    }

    /// What they printed.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// They, and what they started.
    fn pids(&self) -> Vec<u32> {
        processes::with_descendants(self.owned.iter().map(|process| process.0.id()).collect())
    }

    /// CPU seconds of them and of all they started, user and system, also of those that ended.
    pub(crate) fn cpu_s(&self) -> anyhow::Result<f64> {
        let mut ticks = 0_u32;
        for pid in self.pids() {
            // One that ended meanwhile is in its parent's sum.
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let (_, fields) = stat.rsplit_once(')').context("/proc/<pid>/stat without a name")?;
            // utime, stime, cutime, cstime: fields 14 to 17 of all, proc_pid_stat(5).
            for field in fields.split_ascii_whitespace().skip(11).take(4) {
                ticks += field.parse::<u32>()?;
            }
        }
        ensure!(ticks > 0 || self.pids().len() == self.owned.len(), "{} has ended: {}", self.name, self.said());
        // USER_HZ is 100 on every architecture that this runs on.
        Ok(f64::from(ticks) / 100.0)
    }

    /// Open descriptors of them and of all they started.
    pub(super) fn descriptors(&self) -> anyhow::Result<usize> {
        let count = |pid: u32| Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
        self.pids().into_iter().map(count).sum()
    }

    /// The proportional set of them and of all they started.
    pub(crate) fn pss_mib(&self) -> anyhow::Result<f64> {
        let mut kib = 0_u32;
        for pid in self.pids() {
            let Ok(rollup) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
            kib += pss.trim().trim_end_matches(" kB").parse::<u32>()?;
        }
        Ok(f64::from(kib) / 1024.0)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // Those of their children that are still there; the processes themselves end with `Owned`.
        for pid in self.pids().into_iter().rev() {
            let _ended_already = processes::signal(pid, Signal::KILL);
        }
    }
}

/// An address of this machine that nobody has.
pub(crate) fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr())?)
}

fn spawn(command: &[OsString], pin: bool, log: &Path) -> anyhow::Result<Owned> {
    let to_log = || fs::File::options().create(true).append(true).open(log);
    let pinned = [OsString::from("taskset"), "-c".into(), "0".into()];
    let mut words = pinned.iter().filter(|_| pin).chain(command);
    let program = words.next().context("no program")?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(to_log()?).stderr(to_log()?);
    Ok(Owned(command.spawn().with_context(|| format!("starting {}", program.display()))?))
}

/// Asks a proxy for something over its link.
pub(crate) fn ask(link: &Path, request: &LinkRequest) -> anyhow::Result<ProxyReport> {
    let mut stream = UnixStream::connect(link).context("connecting to the proxy's link")?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match serde_json::from_str(&answer)? {
        LinkReply::Report(report) => Ok(report),
        LinkReply::Refused { reason } => bail!("the proxy refused it: {reason}"),
    }
}
