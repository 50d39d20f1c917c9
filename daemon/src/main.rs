//! `enclaved`: the control process; and, as subcommands, the proxy process and the launch helper.

use clap::{Parser, Subcommand};
use enclaved::app::{self, Arguments, StartError};
use enclaved::config::DEFAULT_PATH;
use enclaved::launch;
use enclaved_proxy::{Limits, Manager};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A bug.
const BUG: u8 = 70;
/// It may well work later.
const TRY_AGAIN: u8 = 75;
/// The proxy: another one serves from the same folder.
const ALREADY_RUNS: u8 = enclaved::host::proxy_link::ALREADY_RUNS;
/// The configuration is wrong.
const CONFIG: u8 = 78;
/// The command line is wrong.
const USAGE: u8 = 64;

/// Runs AWS Nitro Enclaves on their parent instance.
///
/// Reads its configuration, fetches and verifies the enclave images, launches the enclaves and keeps them running, with
/// their traffic in and out. SIGHUP reads the configuration again; SIGTERM ends this process, not the enclaves.
/// `enclavectl` shows and controls what it does.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    /// The configuration; conf.d/*.toml beside it is read too.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Where to look for the last good configuration when FILE cannot be read at all.
    #[arg(long, value_name = "DIR", env = "STATE_DIRECTORY", default_value = "/var/lib/enclaved")]
    state_dir: PathBuf,
    #[command(subcommand)]
    command: Option<Subcommands>,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run the proxy process: it carries the traffic, on routes it is handed over a socket.
    Proxy {
        /// Certificates and the last routes.
        #[arg(long, value_name = "DIR", default_value = "/var/lib/enclaved-proxy")]
        state_dir: PathBuf,
        /// The socket on which the control process hands over routes.
        #[arg(long, value_name = "SOCKET", default_value = "/run/enclaved/proxy.sock")]
        link: PathBuf,
        /// Leave the session of whoever started it, to outlive them.
        #[arg(long)]
        own_session: bool,
        /// How long connections under way may go on when it is told to end; longer ones are cut. No connection is refused
        /// meanwhile under systemd: new ones wait for the next proxy, so that a long time is a long wait for them.
        #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
        drain: Duration,
        /// Bytes that a relay reads at once: for comparisons.
        #[arg(long, hide = true, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(4096..=1 << 20))]
        relay_buffer: Option<u32>,
    },
    /// Reserve CPUs and memory for enclaves, once, as root; started as enclaved-allocator.service.
    ///
    /// Changes nothing, and exits with 78, unless the configuration has host.allocator = "manage".
    Allocate {
        /// The configuration: what it reserves for the parent is kept, whatever is asked for.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// What is asked for, written by the control process. [default: allocate.json in the configuration's host.run_dir]
        #[arg(long, value_name = "FILE")]
        request: Option<PathBuf>,
        /// What came of it; in a folder in which only root can write.
        #[arg(long, value_name = "FILE", default_value = enclaved::allocate::REPORT)]
        report: PathBuf,
    },
    /// Launch one enclave as its traces say; started by the control process.
    #[command(hide = true)]
    Launch {
        /// The traces of the launch.
        #[arg(long, value_name = "DIR")]
        trace_dir: PathBuf,
        /// As the main process of the launch's unit.
        #[arg(long, conflicts_with_all = ["stopping", "ended"])]
        supervised: bool,
        /// When that unit is stopped.
        #[arg(long, conflicts_with = "ended")]
        stopping: bool,
        /// When the processes of that unit have ended.
        #[arg(long)]
        ended: bool,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Printing help fails only where nobody reads.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    log();
    // Before anything else has descriptors.
    let manager = match cli.command {
        Some(Subcommands::Proxy { .. }) => Manager::from_environment(),
        _ => Manager::none(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("enclaved: starting the runtime: {error}");
            return ExitCode::from(TRY_AGAIN);
        }
    };
    let code = match cli.command {
        None => runtime.block_on(control(Arguments { config: cli.config, state_dir: cli.state_dir })),
        Some(Subcommands::Proxy { state_dir, link, own_session, drain, relay_buffer }) => {
            let options = enclaved_proxy::Options { state_dir, link };
            let mut limits = Limits::default();
            limits.drain = drain;
            limits.relay_buffer = relay_buffer.and_then(|bytes| bytes.try_into().ok()).unwrap_or(limits.relay_buffer);
            runtime.block_on(proxy(manager, options, limits, own_session))
        }
        Some(Subcommands::Allocate { config, request, report }) => runtime.block_on(allocate(&config, request, report)),
        Some(Subcommands::Launch { trace_dir, supervised, stopping, ended }) => runtime.block_on(async {
            match (supervised, stopping, ended) {
                (true, _, _) => launch::unit::supervised(&trace_dir).await,
                (_, true, _) => launch::unit::stopping(&trace_dir).await,
                (_, _, true) => launch::unit::ended(&trace_dir).await,
                (false, false, false) => launch::run(&trace_dir).await,
            }
        }),
    };
    // What still runs on a thread of its own (a hash, a name being resolved) is not waited for.
    runtime.shutdown_background();
    code
}

/// To stderr, which systemd hands to the journal with times of its own. RUST_LOG chooses levels.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,aws=error,hyper=warn,rustls=warn"));
    let format = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() { format.without_time().init() } else { format.init() }
}

async fn control(arguments: Arguments) -> ExitCode {
    if std::process::id() == 1 {
        tracing::warn!(
            "enclaved is process 1, and does not wait for processes that others leave behind: ended enclaves stay as \
             zombies; run it under an init (`docker run --init`, tini, shareProcessNamespace)"
        );
    }
    match app::run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(StartError::Config { refused, last_good }) => {
            eprintln!("{refused}\nenclaved: the configuration is refused, and there is no former one: {last_good}");
            ExitCode::from(CONFIG)
        }
        Err(StartError::TryAgain(error)) => {
            tracing::error!("{error:#}");
            ExitCode::from(TRY_AGAIN)
        }
        Err(StartError::Bug(error)) => {
            tracing::error!("{error:#}");
            ExitCode::from(BUG)
        }
    }
}

async fn allocate(config: &std::path::Path, request: Option<PathBuf>, report: PathBuf) -> ExitCode {
    use enclaved::allocate::{Did, Ended};
    match enclaved::allocate::run(config, request, report).await {
        Ok(Ended::NotAllowed(failure)) => {
            tracing::error!("what is reserved is not changed: {failure}");
            ExitCode::from(CONFIG)
        }
        Ok(Ended::Tried(report)) => match (&report.did, &report.failure) {
            (Did::Nothing, _) => {
                tracing::info!("what is asked for is reserved already");
                ExitCode::SUCCESS
            }
            (Did::Reserved(reservation), _) => {
                tracing::info!("reserved {reservation}");
                ExitCode::SUCCESS
            }
            (Did::KeptFormer(former), failure) => {
                let why = failure.as_ref().map_or_else(String::new, ToString::to_string);
                tracing::error!("what is reserved is not changed, kept the former: {former}; {why}");
                ExitCode::from(TRY_AGAIN)
            }
            (Did::Failed, failure) => {
                let why = failure.as_ref().map_or_else(String::new, ToString::to_string);
                // Until the stock service was restarted nothing can have changed.
                let then = if report.restarts == 0 {
                    "what is reserved is not changed"
                } else {
                    "what was asked for is not done"
                };
                tracing::error!("{then}: {why}");
                ExitCode::from(TRY_AGAIN)
            }
        },
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::from(TRY_AGAIN)
        }
    }
}

async fn proxy(manager: Manager, options: enclaved_proxy::Options, limits: Limits, own_session: bool) -> ExitCode {
    if own_session && let Err(error) = rustix::process::setsid() {
        // A leader of a session already: started by hand.
        tracing::debug!("no session of its own: {error}");
    }
    let stop = CancellationToken::new();
    let asked = stop.clone();
    let signals = tokio::spawn(async move {
        match app::asked_to_end().await {
            Ok(signal) => tracing::info!("{signal}, the proxy ends"),
            Err(error) => tracing::error!("{error:#}"),
        }
        asked.cancel();
    });
    let ended = enclaved_proxy::run_under(manager, options, limits, stop).await;
    signals.abort();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", enclaved_core::failure::Failure::from_error(&error));
            let already_runs = matches!(error, enclaved_proxy::ProxyError::AlreadyRunning { .. });
            ExitCode::from(if already_runs { ALREADY_RUNS } else { TRY_AGAIN })
        }
    }
}
