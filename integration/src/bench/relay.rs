//! Raw relays: what a connection, a gigabyte, a round trip and an idle connection cost in `enclaved proxy` and in its peers.
//!
//! Both directions: `ingress` is TCP on this side and a Unix socket on the other (a raw port that leads into an enclave over
//! hybrid vsock), `egress` the reverse. The same clients and the same backend serve all contenders; what ours does on top is
//! said in the table: the handshake of hybrid vsock at every ingress connection.
//!
//! With `--vsock` AF_VSOCK takes the place of the Unix socket. Never on this machine's own: on the tests' kernel
//! (`integration/vsock/run`), with programs that take CID 1 for an enclave's (feature `enclaved-proxy/loopback-cid`).

mod contenders;
mod load;
mod splice;

use super::contender::Setting;
use anyhow::Context as _;
use contenders::{Contender, Kind};
use load::{Backend, Far, Way};
use serde::Serialize;
pub(super) use splice::{Place, serve as splice};
use std::fmt;
use std::fs;
use std::path::Path;

/// What 8,000 idle connections may take, in MiB.
const IDLE_MIB: f64 = 70.0;

/// Peers hold as many idle connections as are asked for; socat starts a process for each, so it holds few.
const SOCAT_IDLE: usize = 500;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// How often each contender does each work.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Connections of one round: connect, a byte each way, close. socat gets a tenth.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(10..))]
    connections: u32,
    /// Bytes that go one way in one round.
    #[arg(long, default_value = "2GiB", value_parser = super::size)]
    size: u64,
    /// Round trips of 64 bytes in one round.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..))]
    trips: u32,
    /// Idle connections to hold, several times. Each costs two descriptors in every process.
    #[arg(long, value_delimiter = ',', default_values_t = [5000_usize, 8000])]
    idle: Vec<usize>,
    /// Connections of one process of ours, one after another, after which it must be as small as before.
    #[arg(long, default_value_t = 100_000)]
    endure: u32,
    /// Sizes of our relay's buffer to compare, in KiB. Left out: as it is.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(4..=1024))]
    buffers: Vec<u32>,
    /// A relay by splice(2) beside ours.
    #[arg(long)]
    splice: bool,
    /// Over AF_VSOCK, on the tests' own kernel.
    #[arg(long)]
    vsock: bool,
    /// One direction only.
    #[arg(long, value_enum)]
    only: Option<Way>,
    /// Contenders to leave out.
    #[arg(long, value_enum, value_delimiter = ',')]
    without: Vec<Kind>,
    #[command(flatten)]
    setting: Setting,
}

/// What one round of one contender came to.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Round {
    cpu_us_per_connection: f64,
    connections_per_s: f64,
    cpu_s_per_gb: f64,
    gb_per_s: f64,
    trip_p50_us: f64,
    trip_p99_us: f64,
}

/// Memory with that many idle connections.
#[derive(Debug, Clone, Copy, Serialize)]
struct Idle {
    connections: usize,
    pss_mib: f64,
    per_connection_kib: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    what: String,
    median: Round,
    idle: Vec<Idle>,
    rounds: Vec<Round>,
}

/// One direction.
#[derive(Debug, Serialize)]
struct Table {
    title: String,
    rows: Vec<Row>,
}

/// `bench relay`.
pub(super) fn compare(options: &Options) -> anyhow::Result<()> {
    let enclaved = options.setting.prepare()?;
    let mut tables = Vec::new();
    for way in [Way::Ingress, Way::Egress] {
        if options.only.is_none_or(|only| only == way) {
            let table = direction(options, &enclaved, way)?;
            println!("{table}");
            tables.push(table);
        }
    }
    options.setting.keep(&tables)
}

fn direction(options: &Options, enclaved: &Path, way: Way) -> anyhow::Result<Table> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let far = if options.vsock { Far::Vsock } else { Far::Unix };
    let backend = Backend::start(way, far, folder.path())?;
    let ours =
        if options.buffers.is_empty() { vec![None] } else { options.buffers.iter().copied().map(Some).collect() };
    let mut kinds: Vec<(Kind, Option<u32>)> = ours.into_iter().map(|buffer| (Kind::Enclaved, buffer)).collect();
    kinds.extend([Kind::Nginx, Kind::Haproxy, Kind::Socat, Kind::Splice].map(|kind| (kind, None)));
    let offered = |kind: Kind| match kind {
        Kind::Nginx | Kind::Haproxy => !options.vsock,
        Kind::Splice => options.splice,
        Kind::Enclaved | Kind::Socat => true,
    };
    kinds.retain(|(kind, _)| offered(*kind) && !options.without.contains(kind));
    let mut rounds: Vec<Vec<Round>> = kinds.iter().map(|_| Vec::new()).collect();
    for number in 0..options.rounds {
        let mut order: Vec<_> = kinds.iter().zip(&mut rounds).collect();
        if number % 2 == 1 {
            order.reverse();
        }
        for ((kind, buffer), rounds) in order {
            let contender = Contender::start(*kind, *buffer, &backend, folder.path(), enclaved, options.setting.pin)?;
            rounds.push(round(options, &contender).with_context(|| kind.name())?);
        }
    }
    let mut rows = Vec::new();
    for ((kind, buffer), rounds) in kinds.into_iter().zip(rounds) {
        let mut idle = Vec::new();
        for &connections in &options.idle {
            let connections = if kind == Kind::Socat { connections.min(SOCAT_IDLE) } else { connections };
            let contender = Contender::start(kind, buffer, &backend, folder.path(), enclaved, options.setting.pin)?;
            idle.push(idle_memory(&contender, connections).with_context(|| kind.name())?);
        }
        if kind == Kind::Enclaved && options.endure > 0 {
            let contender = Contender::start(kind, buffer, &backend, folder.path(), enclaved, options.setting.pin)?;
            endure(&contender, options.endure)?;
        }
        let what = buffer.map_or_else(|| kind.name().to_owned(), |kib| format!("{} {kib} KiB", kind.name()));
        rows.push(Row { what, median: Round::median(&rounds), idle, rounds });
    }
    let enclave = if options.vsock { "AF_VSOCK" } else { "Unix socket" };
    let (far, near) = if way == Way::Ingress { (enclave, "TCP") } else { ("TCP", enclave) };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    Ok(Table { title: format!("{way:?}: {near} -> {far}, {} rounds, load at the end {load}", options.rounds), rows })
}

fn round(options: &Options, contender: &Contender) -> anyhow::Result<Round> {
    // What is done only once (first allocations, first connection to the backend) is not measured.
    load::connections(contender, 64)?;
    let count = if contender.kind == Kind::Socat { options.connections / 10 } else { options.connections };
    let before = contender.processes.cpu_s()?;
    let wall = load::connections(contender, count)?;
    let per_connection = (contender.processes.cpu_s()? - before) / f64::from(count);
    let before = contender.processes.cpu_s()?;
    let carrying = load::one_way(contender, options.size)?;
    #[expect(clippy::cast_precision_loss, reason = "sizes of a benchmark are far below 2^53")]
    let gb = options.size as f64 / 1e9;
    let per_gb = (contender.processes.cpu_s()? - before) / gb;
    let mut trips = load::round_trips(contender, options.trips)?;
    trips.sort_unstable();
    let at = |hundredth: usize| {
        let at = (trips.len() * hundredth / 100).min(trips.len().saturating_sub(1));
        trips.get(at).map_or(0.0, |trip| trip.as_secs_f64() * 1e6)
    };
    Ok(Round {
        cpu_us_per_connection: per_connection * 1e6,
        connections_per_s: f64::from(count) / wall.as_secs_f64(),
        cpu_s_per_gb: per_gb,
        gb_per_s: gb / carrying.as_secs_f64(),
        trip_p50_us: at(50),
        trip_p99_us: at(99),
    })
}

fn idle_memory(contender: &Contender, connections: usize) -> anyhow::Result<Idle> {
    let before = contender.processes.pss_mib()?;
    let _held = load::hold(contender, connections)?;
    let pss_mib = contender.processes.pss_mib()?;
    #[expect(clippy::cast_precision_loss, reason = "thousands of connections")]
    let per_connection_kib = (pss_mib - before) * 1024.0 / connections as f64;
    anyhow::ensure!(
        contender.kind != Kind::Enclaved || connections > 8000 || pss_mib <= IDLE_MIB,
        "{connections} idle connections take {pss_mib:.1} MiB, and may take {IDLE_MIB}"
    );
    Ok(Idle { connections, pss_mib, per_connection_kib })
}

/// Fails if that many connections leave memory or descriptors behind.
fn endure(contender: &Contender, connections: u32) -> anyhow::Result<()> {
    load::connections(contender, connections / 10)?;
    let (memory, descriptors) = (contender.processes.pss_mib()?, contender.processes.descriptors()?);
    load::connections(contender, connections)?;
    let (memory_after, descriptors_after) = (contender.processes.pss_mib()?, contender.processes.descriptors()?);
    println!(
        "{connections} connections of one process: {memory:.1} MiB and {descriptors} descriptors before, \
         {memory_after:.1} MiB and {descriptors_after} descriptors after"
    );
    anyhow::ensure!(memory_after < memory + 1.0 && descriptors_after <= descriptors + 8, "connections leave something");
    Ok(())
}

impl Round {
    fn median(rounds: &[Self]) -> Self {
        let of = |value: fn(&Self) -> f64| super::table::median(rounds.iter().map(value).collect());
        Self {
            cpu_us_per_connection: of(|round| round.cpu_us_per_connection),
            connections_per_s: of(|round| round.connections_per_s),
            cpu_s_per_gb: of(|round| round.cpu_s_per_gb),
            gb_per_s: of(|round| round.gb_per_s),
            trip_p50_us: of(|round| round.trip_p50_us),
            trip_p99_us: of(|round| round.trip_p99_us),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        let heads = ["us/conn", "conn/s", "s/GB", "GB/s", "p50 us", "p99 us"];
        write!(f, "  {:18}", "what")?;
        heads.iter().try_for_each(|head| write!(f, "{head:>9}"))?;
        writeln!(f, "   idle connections: PSS MiB (KiB each)")?;
        for Row { what, median, idle, .. } in &self.rows {
            let Round { cpu_us_per_connection, connections_per_s, cpu_s_per_gb, gb_per_s, trip_p50_us, trip_p99_us } =
                median;
            write!(f, "  {what:18}{cpu_us_per_connection:>9.1}{connections_per_s:>9.0}{cpu_s_per_gb:>9.3}")?;
            write!(f, "{gb_per_s:>9.2}{trip_p50_us:>9.1}{trip_p99_us:>9.1}  ")?;
            for Idle { connections, pss_mib, per_connection_kib } in idle {
                write!(f, " {connections}: {pss_mib:.1} ({per_connection_kib:.2})")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
