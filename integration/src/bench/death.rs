//! How soon the daemon knows that an enclave has died: from the kill of the process that owns it to the daemon's own line about that,
//! by one clock. From then on no new request is sent there.

use super::table::median;
use crate::host::{Machine, Options as HostOptions};
use crate::machine::parent::{Parent, parent_host};
use crate::processes::signal;
use anyhow::{Context as _, bail, ensure};
use enclaved_core::status::Status;
use rustix::process::Signal;
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Whatever is waited for happens within this time.
const DEADLINE: Duration = Duration::from_secs(60);
const IMAGE: &str = "/srv/signer.eif";

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// How often an enclave is killed.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// One supervisor only; that of systemd boots a machine, which needs root.
    #[arg(long, value_enum)]
    only: Option<Kind>,
    /// Fails if a median is above this.
    #[arg(long, value_parser = humantime::parse_duration)]
    limit: Option<Duration>,
    /// A file for the figures of every round.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Who supervises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Direct,
    Systemd,
}

#[derive(Debug, Serialize)]
struct Row {
    supervisor: Kind,
    median_ms: f64,
    rounds_ms: Vec<f64>,
}

/// A host whose enclave `signer` is killed again and again.
trait Host {
    /// The status, if the daemon tells one.
    fn status(&self) -> anyhow::Result<Option<Status>>;
    /// `enclavectl start signer`: it has failed, and is not to be waited with for that.
    fn start(&self) -> anyhow::Result<()>;
    /// Kills a process that it knows by that number, and gives how long it took until the daemon told of the end of that generation.
    fn kill(&self, pid: u32, key: &str) -> anyhow::Result<Duration>;
}

pub(super) fn measure(options: &Options) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for kind in [Kind::Direct, Kind::Systemd] {
        if options.only.is_some_and(|only| only != kind) {
            continue;
        }
        let rounds_ms = match kind {
            Kind::Direct => {
                let runtime = tokio::runtime::Runtime::new()?;
                let host = runtime.block_on(Direct::start())?;
                rounds(&host, options.rounds)?
            }
            Kind::Systemd => rounds(&Systemd::start()?, options.rounds)?,
        };
        rows.push(Row { supervisor: kind, median_ms: median(rounds_ms.clone()), rounds_ms });
    }
    println!(
        "death of an enclave noticed, {} rounds\n  {:<12}{:>12}{:>12}",
        options.rounds, "supervisor", "median ms", "worst ms"
    );
    for row in &rows {
        let worst = row.rounds_ms.iter().copied().fold(0.0, f64::max);
        println!("  {:<12}{:>12.1}{worst:>12.1}", format!("{:?}", row.supervisor).to_lowercase(), row.median_ms);
    }
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(limit) = options.limit {
        let late: Vec<_> = rows.iter().filter(|row| row.median_ms > limit.as_secs_f64() * 1000.0).collect();
        ensure!(late.is_empty(), "above {limit:?}: {late:?}");
    }
    Ok(())
}

fn rounds(host: &impl Host, rounds: u32) -> anyhow::Result<Vec<f64>> {
    let mut times = Vec::new();
    let mut before = None;
    for _ in 0..rounds {
        let (pid, generation) = until("the enclave is ready", || {
            let Some(status) = host.status()? else { return Ok(None) };
            let signer = status.enclaves.first().filter(|signer| signer.ready);
            Ok(signer.and_then(|signer| Some((signer.pid?, signer.generation?.0))).filter(|now| Some(*now) != before))
        })?;
        before = Some((pid, generation));
        times.push(host.kill(pid, &format!("signer-{generation}"))?.as_secs_f64() * 1000.0);
        host.start()?;
    }
    Ok(times)
}

fn until<T>(what: &str, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// What the daemon says when it has noticed.
fn tells(line: &str, key: &str) -> bool {
    line.contains("ended: ") && line.split_whitespace().any(|word| word == format!("enclave={key}"))
}

/// A host without systemd: the daemon's log is a file.
struct Direct(Machine);

impl Direct {
    async fn start() -> anyhow::Result<Self> {
        let machine = Machine::start(HostOptions::default()).await?;
        machine.put_image("signer.eif", &machine.sample_application("v1")).await?;
        machine.write_config(&(machine.host_config() + &machine.sample_enclave("signer", "signer.eif")))?;
        machine.start_daemon()?;
        Ok(Self(machine))
    }

    fn ctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = self.0.command("enclavectl")?;
        let output = command.arg("--config").arg(self.0.config_file()).args(arguments).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Host for Direct {
    fn status(&self) -> anyhow::Result<Option<Status>> {
        let said = self.ctl(&["status", "--json"])?;
        Ok(if said.is_empty() { None } else { Some(serde_json::from_str(&said)?) })
    }

    fn start(&self) -> anyhow::Result<()> {
        self.ctl(&["start", "signer"]).map(drop)
    }

    fn kill(&self, pid: u32, key: &str) -> anyhow::Result<Duration> {
        let before = self.0.log().len();
        let began = Instant::now();
        signal(pid, Signal::KILL)?;
        loop {
            let log = self.0.log();
            let taken = began.elapsed();
            if log.get(before..).unwrap_or_default().lines().any(|line| tells(line, key)) {
                return Ok(taken);
            }
            ensure!(taken < DEADLINE, "the daemon does not tell of the end of {key}");
            sleep(Duration::from_micros(200));
        }
    }
}

/// A host with systemd: the journal has the time of the daemon's line.
struct Systemd(Parent);

impl Systemd {
    fn start() -> anyhow::Result<Self> {
        let parent = parent_host()?;
        parent.put_image(IMAGE, &parent.sample_application("v1"))?;
        parent.configure(&parent.sample_enclave("signer", IMAGE))?;
        parent.run_ok(&["systemctl", "start", "enclaved"])?;
        Ok(Self(parent))
    }

    /// When the daemon told of the end of that generation, in microseconds of the clock.
    fn told(&self, key: &str) -> anyhow::Result<Option<u64>> {
        let journal = ["journalctl", "--no-pager", "--output=json", "--unit=enclaved", "--lines=100"];
        for line in self.0.run_ok(&journal)?.lines() {
            let entry: serde_json::Value = serde_json::from_str(line)?;
            if entry["MESSAGE"].as_str().is_some_and(|text| tells(text, key)) {
                return Ok(entry["__REALTIME_TIMESTAMP"].as_str().and_then(|time| time.parse().ok()));
            }
        }
        Ok(None)
    }
}

impl Host for Systemd {
    fn status(&self) -> anyhow::Result<Option<Status>> {
        self.0.status()
    }

    fn start(&self) -> anyhow::Result<()> {
        self.0.run_ok(&["enclavectl", "start", "signer"]).map(drop)
    }

    fn kill(&self, pid: u32, key: &str) -> anyhow::Result<Duration> {
        let outside = self.0.outside(pid)?;
        let began = SystemTime::now().duration_since(UNIX_EPOCH)?;
        signal(outside, Signal::KILL)?;
        let told = Duration::from_micros(until("the daemon tells of the end", || self.told(key))?);
        match told.checked_sub(began) {
            Some(taken) => Ok(taken),
            None => bail!("the clock was set back meanwhile"),
        }
    }
}
