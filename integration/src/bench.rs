//! Comparisons of the real programs with their peers, in one run on one machine.
//!
//! ```text
//! cargo run --release -p enclaved-integration --bin bench -- images [--size 1GiB] [--rounds 5] [--json FILE]
//! cargo run --release -p enclaved-integration --bin bench -- relay [--only ingress] [--buffers 16,64,256] [--rounds 5] [--json FILE]
//! cargo run --release -p enclaved-integration --bin bench -- https [--without caddy] [--rounds 5] [--json FILE]
//! cargo run --release -p enclaved-integration --bin bench -- death [--only direct] [--rounds 20] [--limit 50ms] [--json FILE]
//! ```
//!
//! Prints one table for each comparison; what it looks like:
//!
//! ```text
//! fetch: 1024 MiB from a local S3 server, 5 rounds
//!   what                                            wall s   CPU s  user s   sys s  peak MiB  anon MiB   MiB/s
//!   enclaved: fetched, measured, verified, synced     4.10    5.01    3.70    1.31        44        21     250
//!   aws s3 cp: fetched                                6.80    9.40    6.90    2.50        95        70     151
//! ```
//!
//! How to read it:
//! - Only ratios within one table mean something, and only of columns that the machine does not disturb: CPU seconds hold on
//!   a busy machine, wall-clock does not. Contenders take turns, in an order that alternates from round to round, so that
//!   what disturbs one disturbs the other. Figures are medians of the rounds; the JSON has every round.
//! - CPU is that of the program and of what it started and waited for, user and system, by `getrusage`. Neither the server
//!   nor the one that measures is in it; on a machine with few cores both are in the wall-clock.
//! - "peak" is the largest resident set (`ru_maxrss`; never below the 10 MiB or so of the process that started it). "anon"
//!   is the largest anonymous memory (heap and stacks) that was seen, looked at every 5 ms.
//! - The page cache is warm for all. Files are written to the folder for temporary files (`TMPDIR`): on another kind of disk
//!   the wall-clock of a fetch says more about the disk.
//! - The contenders of the first table do not do the same: `aws s3 cp` only downloads. What a host needs without enclaved
//!   is it and `nitro-cli describe-eif` one after the other: that sum is said at the end. That both came to the same bytes
//!   and the same measurements is checked in every round; a difference ends the run.
//!
//! A program that is missing is installed by `integration/tool`, outside the tree.

pub(crate) mod contender;
mod death;
mod https;
mod images;
mod relay;
mod run;
mod server;
mod table;

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Compares the real programs with their peers.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Getting an image from S3 beside `aws s3 cp`, and measuring one beside `nitro-cli describe-eif`.
    Images(images::Options),
    /// Carrying raw connections beside nginx, haproxy and socat (Debian: nginx-light, libnginx-mod-stream, haproxy, socat).
    Relay(relay::Options),
    /// Serving HTTPS beside nginx, haproxy and Caddy (Debian: nginx-light, haproxy, caddy; the load: nghttp2-client).
    Https(https::Options),
    /// How soon the daemon knows that an enclave has died, under both supervisors. No peers: a figure with a limit.
    Death(death::Options),
    /// Relays by splice(2). Used by the comparisons.
    #[command(hide = true)]
    Splice {
        /// Pairs of a place to listen on and one to connect to.
        #[arg(required = true)]
        places: Vec<relay::Place>,
    },
    /// Runs a program, and writes what it cost to a file. Used by the comparisons.
    #[command(hide = true)]
    Run {
        #[arg(long)]
        report: PathBuf,
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Serves one file as an object. Used by the comparisons.
    #[command(hide = true)]
    Serve { file: PathBuf },
    /// Gets an image as the daemon does. Used by the comparisons.
    #[command(hide = true)]
    Fetch { source: String, folder: PathBuf },
}

/// The program.
pub fn main() -> ExitCode {
    let done = match Arguments::parse().what {
        What::Images(options) => images::compare(&options),
        What::Relay(options) => relay::compare(&options),
        What::Https(options) => https::compare(&options),
        What::Death(options) => death::measure(&options),
        What::Run { report, command } => return run::in_child(&report, &command),
        What::Splice { places } => {
            let pairs: Vec<_> = places.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
            relay::splice(&pairs)
        }
        What::Serve { file } => server::serve(&file),
        What::Fetch { source, folder } => images::fetch(&source, &folder),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A size as it is written on a command line: a number of bytes, or of KiB, MiB or GiB.
fn size(text: &str) -> anyhow::Result<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim() {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        unit => anyhow::bail!("unknown unit {unit:?}; there are KiB, MiB and GiB"),
    };
    let number: u64 = number.parse().context("a size begins with a number")?;
    let size = number.checked_mul(unit).context("too large")?;
    ensure!(size >= 1 << 20, "at least 1 MiB");
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(size("1GiB").unwrap(), 1 << 30);
        assert_eq!(size("64 MiB").unwrap(), 64 << 20);
        assert_eq!(size("2097152").unwrap(), 2 << 20);
        for wrong in ["", "GiB", "1GB", "1", "99999999999GiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
