//! The demo: sets a simulated host up, lets the real `enclaved` run an enclave on it, and tells what happens. This file
//! is its life from the command line to the exit code; nothing of it is left behind, however it ends.
//!
//! It says what it has seen in the daemon's answers and in the records of the stand-ins, never what ought to be.

mod build;
mod chaos;
mod clients;
mod guard;
mod life;
mod stages;
mod stay;

use crate::host::{Machine, Options};
use crate::processes;
use anyhow::Context as _;
pub(crate) use build::build_beside;
use clap::{Parser, ValueEnum};
use guard::Guard;
use life::Life;
use stages::Stages;
use std::cell::RefCell;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// The demo did not come to its end; the reason was printed.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 64;
/// It was ended from outside before it had come to its end, as shells say it of SIGINT.
const INTERRUPTED: u8 = 130;
/// Lines of the daemon's log that are shown after a failure.
const LAST_LINES: usize = 20;

const ABOUT: &str = "\
Shows the life of a Nitro Enclave on a simulated host.

The daemon is the real one: it takes its configuration, gets credentials from a metadata service, downloads an enclave \
image from S3, proves it, launches it through nitro-cli and carries its traffic in (HTTPS) and out. What is around it \
is simulated on this machine's loopback: S3, the metadata service, the control plane, nitro-cli and the inside of the \
enclave. It needs no root, no AWS account and no Nitro hardware, and leaves nothing behind.

Without options it stays up until Ctrl-C and says what to try.";

const AFTER: &str = "\
Exit codes:
  0    it did all that it says (without --once: it was ended by Ctrl-C)
  1    something failed; the reason and the last lines of the daemon's log are printed
  64   the command line is wrong
  130  it was interrupted before it had come to its end

Examples:
  cargo demo                    look around
  cargo demo -- --once          what it takes to become ready, stage by stage
  cargo demo -- --once --chaos  and what happens when parts of it are killed";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "demo", bin_name = "cargo demo --", about = ABOUT, after_help = AFTER, max_term_width = 100)]
struct Args {
    /// Send one request through the enclave, print a summary and end.
    #[arg(long)]
    once: bool,
    /// Then kill the enclave, the control process and the proxy, and offer a forged image.
    #[arg(long)]
    chaos: bool,
    /// Print the summary as JSON on stdout; all else goes to stderr.
    #[arg(long, requires = "once")]
    json: bool,
    /// Run what was built before.
    #[arg(long, hide = true)]
    no_build: bool,
    /// Let something go wrong.
    #[arg(long, hide = true, value_name = "WHAT")]
    provoke: Option<Provoke>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Provoke {
    /// The role may not read the image.
    S3Forbidden,
    /// The upstream answers nobody.
    UpstreamDown,
    /// The image in the bucket is not the one that was measured.
    ForgedImage,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == guard::ARGUMENT) {
        return guard::main();
    }
    let args = match Args::try_parse_from(arguments(std::env::args_os())) {
        Ok(args) => args,
        Err(error) => {
            // Nobody is left to tell if even this can't be printed.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(&args)),
        Err(error) => {
            eprintln!("demo: starting the runtime: {error}");
            ExitCode::from(FAILED)
        }
    }
}

/// The alias `cargo demo` ends with `--`, so that `cargo demo --once` works; of `cargo demo -- --once` a `--` is left over.
fn arguments(all: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    all.into_iter().enumerate().filter(|(at, argument)| *at != 1 || argument != "--").map(|(_, argument)| argument)
}

/// How far it is, for whoever ends it from outside.
#[derive(Debug, Default)]
struct Place {
    /// Where everything is, once there is anything.
    folder: Option<PathBuf>,
    /// All was shown; it stays up only to be looked at.
    staying: bool,
}

async fn run(args: &Args) -> ExitCode {
    let mut stages = Stages::new(args.json);
    let place = RefCell::new(Place::default());
    let ended = tokio::select! {
        // Dropped when a signal ends it: that ends all processes and removes all files.
        shown = show(args, &mut stages, &place) => shown.map(|()| None),
        // A plain wait.
        signal = asked_to_end() => signal.map(Some).map_err(Failed::from),
    };
    let Place { folder, staying } = place.into_inner();
    let folder = folder.as_deref();
    let left = folder.map_or(Ok(()), nothing_left);
    match (ended, left) {
        (Ok(None), Ok(())) => {
            stages.summary(folder);
            ExitCode::SUCCESS
        }
        (Ok(Some(signal)), Ok(())) => {
            stages.say(&format!("\n{signal}: everything was ended and removed"));
            if staying { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) }
        }
        (Err(failed), left) => {
            stages.failed(folder, &failed);
            if let Err(error) = left {
                stages.say(&format!("{error:#}"));
            }
            ExitCode::from(FAILED)
        }
        (Ok(_), Err(error)) => {
            stages.failed(folder, &error.into());
            ExitCode::from(FAILED)
        }
    }
}

/// Why the demo did not come to its end.
#[derive(Debug)]
struct Failed {
    error: anyhow::Error,
    /// What the daemon said last; its log is gone with the folder.
    last_lines: Vec<String>,
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self { error, last_lines: Vec::new() }
    }
}

/// Waits for Ctrl-C, for being asked to end, or for the terminal to go.
async fn asked_to_end() -> anyhow::Result<&'static str> {
    let listen = |kind| signal(kind).context("listening for signals");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(tokio::select! {
        // Whichever comes first ends the demo.
        _ = interrupt.recv() => "interrupted",
        _ = terminate.recv() => "asked to end",
        _ = hangup.recv() => "the terminal is gone",
    })
}

fn nothing_left(folder: &Path) -> anyhow::Result<()> {
    let processes = processes::carrying(folder);
    anyhow::ensure!(processes.is_empty(), "the processes {processes:?} are left behind and can't be ended");
    anyhow::ensure!(!folder.exists(), "{} is left behind", folder.display());
    Ok(())
}

/// All of it, from building to the end.
async fn show(args: &Args, stages: &mut Stages, place: &RefCell<Place>) -> Result<(), Failed> {
    stages.say(
        "The life of an enclave. enclaved and enclavectl are the real ones; S3, metadata service, control plane,\n\
         nitro-cli and the inside of the enclave are stand-ins on this machine's loopback.\n",
    );
    if !args.no_build {
        build::build(stages).await?;
    }
    // Dropped last: while it lives, all that the machine started is ended even if this process is killed.
    let guard = Guard::start()?;
    // Who stays up is to be reached at localhost; who does not is to be in nobody's way.
    let address = (!args.once).then_some(Ipv4Addr::LOCALHOST);
    let machine = Machine::start(Options { address, ..Options::default() }).await;
    let machine = machine.context("setting the simulated host up")?;
    place.borrow_mut().folder = Some(machine.path().to_owned());
    guard.watch_over(machine.path())?;
    let lived = live(args, &machine, stages, place).await;
    lived.map_err(|error| Failed { error, last_lines: last_lines(&machine.log()) })
}

async fn live(args: &Args, machine: &Machine, stages: &mut Stages, place: &RefCell<Place>) -> anyhow::Result<()> {
    let mut life = Life::begin(machine, stages, args.provoke).await?;
    life.until_ready().await?;
    life.use_it().await?;
    if args.chaos {
        chaos::all(&mut life).await?;
    }
    if !args.once {
        place.borrow_mut().staying = true;
        stay::stay(&mut life).await?;
    }
    Ok(())
}

fn last_lines(log: &str) -> Vec<String> {
    let lines: Vec<&str> = log.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(LAST_LINES)).map(|line| (*line).to_owned()).collect()
}
