//! Runs a program and says what it cost. A small process of its own starts it and asks the kernel afterwards: then the
//! figures of "all children" are those of this one.

use anyhow::{Context as _, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// What is shown of the output of a program that failed.
const SHOWN: usize = 2000;

/// What one run cost.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Cost {
    /// From its start to its end.
    pub(super) wall_s: f64,
    /// CPU outside of the kernel.
    pub(super) user_s: f64,
    /// CPU in the kernel, for it.
    pub(super) system_s: f64,
    /// The largest resident set.
    pub(super) peak_rss_mib: f64,
    /// The most anonymous memory that was seen.
    pub(super) peak_anonymous_mib: f64,
}

/// A program to run.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub(super) path: OsString,
    pub(super) arguments: Vec<OsString>,
    pub(super) environment: BTreeMap<&'static str, OsString>,
}

impl Program {
    /// Runs it and gives what it cost and what it printed.
    pub(super) fn run(&self, scratch: &Path) -> anyhow::Result<(Cost, String)> {
        let report = scratch.join("cost.json");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run").arg("--report").arg(&report).arg("--").arg(&self.path).args(&self.arguments);
        command.envs(&self.environment).stdin(Stdio::null());
        let name = || self.path.to_string_lossy().into_owned();
        let output = command.output().with_context(|| format!("running {}", name()))?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
            bail!("{}: {}\n{}", name(), output.status, text.concat().chars().take(SHOWN).collect::<String>());
        }
        let cost = serde_json::from_slice(&fs::read(&report).context("reading what it cost")?)?;
        Ok((cost, String::from_utf8_lossy(&output.stdout).into_owned()))
    }
}

/// `bench run`: runs the command, and writes what it cost.
pub(super) fn in_child(report: &Path, command: &[String]) -> ExitCode {
    match measured(report, command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measured(report: &Path, command: &[String]) -> anyhow::Result<ExitCode> {
    let (program, arguments) = command.split_first().context("no program")?;
    let began = Instant::now();
    let mut child = Command::new(program).args(arguments).spawn().with_context(|| format!("starting {program}"))?;
    let (anonymous, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let pid = child.id();
    let (status, wall) = std::thread::scope(|scope| {
        let _watching = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                anonymous.fetch_max(anonymous_kib(pid).unwrap_or_default(), Ordering::Relaxed);
                std::thread::sleep(LOOK);
            }
        });
        let status = child.wait();
        let wall = began.elapsed();
        ended.store(true, Ordering::Relaxed);
        (status, wall)
    });
    let status = status.context("waiting for it")?;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let kib = |kib: f64| kib / 1024.0;
    #[expect(clippy::cast_precision_loss, reason = "KiB of memory are far below 2^53")]
    let cost = Cost {
        wall_s: wall.as_secs_f64(),
        user_s: seconds(usage.user_time()),
        system_s: seconds(usage.system_time()),
        peak_rss_mib: kib(usage.max_rss() as f64),
        peak_anonymous_mib: kib(anonymous.load(Ordering::Relaxed) as f64),
    };
    fs::write(report, serde_json::to_vec(&cost)?).with_context(|| format!("writing {}", report.display()))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn seconds(time: TimeVal) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "seconds and microseconds of a benchmark are far below 2^53")]
    let (seconds, micros) = (time.tv_sec() as f64, time.tv_usec() as f64);
    seconds + micros / 1e6
}

/// The anonymous memory of a process, in KiB; none once it has ended.
fn anonymous_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}
