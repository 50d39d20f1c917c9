//! HTTPS ingress: what a request, an upload, a handshake and a held connection cost in `enclaved proxy` and in its peers.
//!
//! All of them have a certificate on P-256, speak TLS 1.3 and ALPN, add the headers of a proxy, and keep connections to the same
//! backend behind a Unix socket (a hybrid vsock for ours: one handshake more for each connection to it). Requests come from h2load, which
//! counts answers and their status; new connections are made here, without resumption, and check certificate and body.
//! nginx passes uploads on as they come (`proxy_request_buffering off`), as the others do by themselves.

mod contenders;
mod load;

use super::contender::Setting;
use anyhow::Context as _;
use contenders::{Contender, Kind};
use load::{Backend, Load};
use serde::Serialize;
use std::fmt;
use std::path::Path;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// How often each contender does each work.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Requests for 1 KiB in one round, over HTTP/1.1 and over HTTP/2 each; for 100 KiB a tenth, uploads of 1 MiB a fiftieth, new
    /// connections a tenth.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(500..))]
    requests: u32,
    /// Connections at a time.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=500))]
    clients: u32,
    /// Idle connections to hold; each has had its request.
    #[arg(long, default_value_t = 2000)]
    idle: usize,
    /// Contenders to leave out.
    #[arg(long, value_enum, value_delimiter = ',')]
    without: Vec<Kind>,
    #[command(flatten)]
    setting: Setting,
}

/// What is done, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Work {
    Small,
    SmallHttp2,
    Large,
    Upload,
    Handshake,
}

impl Work {
    const ALL: [Self; 5] = [Self::Small, Self::SmallHttp2, Self::Large, Self::Upload, Self::Handshake];

    fn name(self) -> &'static str {
        match self {
            Self::Small => "1 KiB",
            Self::SmallHttp2 => "h2 1 KiB",
            Self::Large => "100 KiB",
            Self::Upload => "1 MiB up",
            Self::Handshake => "new conn",
        }
    }

    fn count(self, requests: u32) -> u32 {
        match self {
            Self::Small | Self::SmallHttp2 => requests,
            Self::Large | Self::Handshake => requests / 10,
            Self::Upload => requests / 50,
        }
    }
}

/// What one work of one round came to.
#[derive(Debug, Clone, Copy, Serialize)]
struct Figure {
    work: Work,
    cpu_us: f64,
    per_s: f64,
}

/// What one round of one contender came to.
#[derive(Debug, Clone, Serialize)]
struct Round {
    figures: Vec<Figure>,
    /// Before its first request, and at the end of the works.
    idle_mib: f64,
    loaded_mib: f64,
}

/// Memory with connections that only wait.
#[derive(Debug, Clone, Copy, Serialize)]
struct Held {
    connections: usize,
    pss_mib: f64,
    per_connection_kib: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    median: Round,
    held: Held,
    rounds: Vec<Round>,
}

#[derive(Debug, Serialize)]
struct Table {
    title: String,
    rows: Vec<Row>,
}

/// `bench https`.
pub(super) fn compare(options: &Options) -> anyhow::Result<()> {
    let enclaved = options.setting.prepare()?;
    let table = measure(options, &enclaved)?;
    println!("{table}");
    options.setting.keep(&table)
}

fn measure(options: &Options, enclaved: &Path) -> anyhow::Result<Table> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let backend = Backend::start(folder.path())?;
    let load = Load::new(folder.path(), options.clients)?;
    let kinds = [Kind::Enclaved, Kind::Nginx, Kind::Haproxy, Kind::Caddy];
    let kinds: Vec<Kind> = kinds.into_iter().filter(|kind| !options.without.contains(kind)).collect();
    let mut rounds: Vec<Vec<Round>> = kinds.iter().map(|_| Vec::new()).collect();
    let start = |kind: Kind| Contender::start(kind, &backend, folder.path(), enclaved, options.setting.pin);
    for number in 0..options.rounds {
        let mut order: Vec<_> = kinds.iter().zip(&mut rounds).collect();
        if number % 2 == 1 {
            order.reverse();
        }
        for (kind, rounds) in order {
            rounds.push(round(options, &load, &start(*kind)?).with_context(|| kind.name())?);
        }
    }
    let mut rows = Vec::new();
    for (kind, rounds) in kinds.into_iter().zip(rounds) {
        let held = held(&load, &start(kind)?, options.idle).with_context(|| kind.name())?;
        rows.push(Row { what: kind.name(), median: Round::median(&rounds), held, rounds });
    }
    let title = format!("HTTPS -> HTTP/1.1 over a Unix socket, {} clients, {} rounds", options.clients, options.rounds);
    Ok(Table { title, rows })
}

fn round(options: &Options, load: &Load, contender: &Contender) -> anyhow::Result<Round> {
    let idle_mib = contender.pss_mib()?;
    // What is done only once (first allocations, first connections to the backend) is not measured.
    for work in Work::ALL {
        load.run(contender, work, work.count(options.requests) / 10 + options.clients)?;
    }
    let mut figures = Vec::new();
    for work in Work::ALL {
        let count = work.count(options.requests).max(options.clients);
        let before = contender.cpu_s()?;
        let wall = load.run(contender, work, count).with_context(|| work.name())?;
        let cpu_us = (contender.cpu_s()? - before) * 1e6 / f64::from(count);
        figures.push(Figure { work, cpu_us, per_s: f64::from(count) / wall.as_secs_f64() });
    }
    Ok(Round { figures, idle_mib, loaded_mib: contender.pss_mib()? })
}

fn held(load: &Load, contender: &Contender, connections: usize) -> anyhow::Result<Held> {
    let before = contender.pss_mib()?;
    let _held = load.hold(contender, connections)?;
    let pss_mib = contender.pss_mib()?;
    #[expect(clippy::cast_precision_loss, reason = "thousands of connections")]
    let per_connection_kib = (pss_mib - before) * 1024.0 / connections.max(1) as f64;
    Ok(Held { connections, pss_mib, per_connection_kib })
}

impl Round {
    fn median(rounds: &[Self]) -> Self {
        let of = |value: &dyn Fn(&Self) -> f64| super::table::median(rounds.iter().map(value).collect());
        let figure = |round: &Self, work: Work| round.figures.iter().find(|figure| figure.work == work).copied();
        let figures = Work::ALL.map(|work| Figure {
            work,
            cpu_us: of(&|round| figure(round, work).map_or(0.0, |figure| figure.cpu_us)),
            per_s: of(&|round| figure(round, work).map_or(0.0, |figure| figure.per_s)),
        });
        Self {
            figures: figures.into(),
            idle_mib: of(&|round| round.idle_mib),
            loaded_mib: of(&|round| round.loaded_mib),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\nCPU us (and how many a second, which says more about the machine)", self.title)?;
        write!(f, "  {:16}", "what")?;
        Work::ALL.iter().try_for_each(|work| write!(f, "{:>17}", work.name()))?;
        writeln!(f, "{:>20}   with held connections", "idle / loaded MiB")?;
        for Row { what, median, held, .. } in &self.rows {
            write!(f, "  {what:16}")?;
            for Figure { cpu_us, per_s, .. } in &median.figures {
                write!(f, "{cpu_us:>8.1} ({per_s:>6.0})")?;
            }
            write!(f, "{:>11.1} / {:>6.1}", median.idle_mib, median.loaded_mib)?;
            writeln!(f, "   {}: {:.1} ({:.1} KiB each)", held.connections, held.pss_mib, held.per_connection_kib)?;
        }
        Ok(())
    }
}
