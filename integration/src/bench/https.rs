//! HTTPS: what a request, an upload, a handshake and the memory cost in `enclaved proxy` and in its peers. All end TLS 1.3 with a
//! P-256 key, and pass requests on over a Unix socket (ours with the handshake of hybrid vsock at every new connection). The load
//! is h2load's; the application behind is this program's.

mod application;
mod contenders;

use anyhow::{Context as _, ensure};
use application::Application;
use contenders::{Contender, Kind};
use serde::Serialize;
use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// How often each contender does each work.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Requests of 1 KiB in one round; a twentieth of it of 100 KiB, a hundredth of uploads of 1 MiB, a thirtieth of new
    /// connections.
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1000..))]
    requests: u32,
    /// Contenders to leave out.
    #[arg(long, value_enum, value_delimiter = ',')]
    without: Vec<Kind>,
    /// An `enclaved` to measure in place of the one that was built with this program.
    #[arg(long)]
    enclaved: Option<PathBuf>,
    /// Gives the contenders one processor, and load and application another.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pin: bool,
    /// A file for the figures of every round.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What is done in one round.
struct Work {
    name: &'static str,
    path: &'static str,
    requests: u32,
    /// h2load's own arguments.
    how: &'static [&'static str],
    /// A body of 1 MiB with each request.
    upload: bool,
}

fn works(requests: u32) -> Vec<Work> {
    let work = |name, path, requests, how| Work { name, path, requests, how, upload: false };
    vec![
        work("1 KiB", "/1024", requests, &["--h1", "-c", "8"]),
        work("100 KiB", "/102400", requests / 20, &["--h1", "-c", "8"]),
        work("h2 1 KiB", "/1024", requests, &["-c", "8", "-m", "10"]),
        Work { upload: true, ..work("upload", "/2", requests / 100, &["--h1", "-c", "4"]) },
        // One request of each connection.
        work("handshake", "/2", requests / 30, &["--h1"]),
    ]
}

/// CPU of one contender for one request of each work, in microseconds.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    median_us: Vec<f64>,
    idle_pss_mib: f64,
    loaded_pss_mib: f64,
    rounds_us: Vec<Vec<f64>>,
}

#[derive(Debug, Serialize)]
struct Table {
    title: String,
    works: Vec<&'static str>,
    rows: Vec<Row>,
}

/// `bench https`.
pub(super) fn compare(options: &Options) -> anyhow::Result<()> {
    let enclaved = match &options.enclaved {
        Some(path) => path.clone(),
        None => {
            crate::demo::build_beside("enclaved")?;
            crate::binaries::find("enclaved")?
        }
    };
    if options.pin {
        // This program and what it starts, but for those that are told their own.
        let mut pinning = Command::new("taskset");
        pinning.args(["-a", "-p", "-c", "1"]).arg(std::process::id().to_string()).stdout(Stdio::null());
        let done = pinning.status().context("pinning the load with taskset")?;
        ensure!(done.success(), "taskset failed: --pin false where there is one processor");
    }
    let folder = tempfile::tempdir().context("making a folder")?;
    let application = Application::start(folder.path())?;
    let works = works(options.requests);
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| !options.without.contains(kind)).collect();
    let mut seen: Vec<Vec<Round>> = kinds.iter().map(|_| Vec::new()).collect();
    for number in 0..options.rounds {
        let mut order: Vec<_> = kinds.iter().zip(&mut seen).collect();
        if number % 2 == 1 {
            order.reverse();
        }
        for (kind, rounds) in order {
            let contender = Contender::start(*kind, &application, folder.path(), &enclaved, options.pin)?;
            rounds.push(round(&contender, &works, folder.path()).with_context(|| kind.name())?);
        }
    }
    let rows = kinds.iter().zip(seen).map(|(kind, rounds)| Row::new(*kind, &rounds)).collect();
    let title = format!("HTTPS -> HTTP/1.1 over a Unix socket: CPU us a request, {} rounds", options.rounds);
    let table = Table { title, works: works.iter().map(|work| work.name).collect(), rows };
    println!("{table}");
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_vec_pretty(&table)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

struct Round {
    us: Vec<f64>,
    idle_mib: f64,
    loaded_mib: f64,
}

fn round(contender: &Contender, works: &[Work], folder: &Path) -> anyhow::Result<Round> {
    let idle_mib = contender.pss_mib()?;
    let (mut us, mut loaded_mib) = (Vec::new(), idle_mib);
    for work in works {
        // What is done only once (connections to the application, first allocations) is not measured.
        load(contender.address, work, 64, folder)?;
        let before = contender.cpu_s()?;
        load(contender.address, work, work.requests, folder).with_context(|| work.name)?;
        us.push((contender.cpu_s()? - before) * 1e6 / f64::from(work.requests));
        loaded_mib = contender.pss_mib()?.max(loaded_mib);
    }
    Ok(Round { us, idle_mib, loaded_mib })
}

/// Has h2load make that many requests; all must be answered well.
fn load(address: SocketAddr, work: &Work, requests: u32, folder: &Path) -> anyhow::Result<()> {
    let mut left = requests;
    while left > 0 {
        // As many clients as requests where each connection has one; some at a time.
        let now = if work.name == "handshake" { left.min(100) } else { left };
        let mut command = Command::new("h2load");
        command.args(work.how).args(["-n", &now.to_string(), "-t", "1"]);
        if work.name == "handshake" {
            command.args(["-c", &now.to_string()]);
        }
        if work.upload {
            let file = folder.join("upload");
            fs::write(&file, vec![b'u'; 1 << 20])?;
            command.arg("-d").arg(file);
        }
        let output = command.arg(format!("https://{address}{}", work.path)).output().context("running h2load")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let good = format!("{now} succeeded, 0 failed");
        ensure!(output.status.success() && text.contains(&good), "not every request was answered well:\n{text}");
        left -= now;
    }
    Ok(())
}

impl Row {
    fn new(kind: Kind, rounds: &[Round]) -> Self {
        let works = rounds.first().map_or(0, |round| round.us.len());
        let of = |work: usize| rounds.iter().filter_map(|round| round.us.get(work).copied()).collect::<Vec<f64>>();
        let median = super::table::median;
        Self {
            what: kind.name(),
            median_us: (0..works).map(|work| median(of(work))).collect(),
            idle_pss_mib: median(rounds.iter().map(|round| round.idle_mib).collect()),
            loaded_pss_mib: median(rounds.iter().map(|round| round.loaded_mib).collect()),
            rounds_us: rounds.iter().map(|round| round.us.clone()).collect(),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  {:16}", self.title, "what")?;
        self.works.iter().try_for_each(|work| write!(f, "{work:>11}"))?;
        writeln!(f, "   PSS MiB idle, loaded")?;
        for row in &self.rows {
            write!(f, "  {:16}", row.what)?;
            row.median_us.iter().try_for_each(|us| write!(f, "{us:>11.1}"))?;
            writeln!(f, "{:>10.1}{:>10.1}", row.idle_pss_mib, row.loaded_pss_mib)?;
        }
        Ok(())
    }
}
