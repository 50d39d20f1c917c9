//! The control tool: its command line, and what each command does. It decides nothing about the host: it asks the daemon
//! over its admin socket, or judges files, or the host, with the same code as the daemon.
//!
//! Results go to stdout, everything else to stderr.

mod client;
mod doctor;
mod fetch;
mod host;
mod hosts;
mod import;
mod measure;
mod status;
mod table;
mod text;
mod wait;

use crate::config;
use clap::{Args, Parser, Subcommand, ValueEnum};
use client::Client;
use enclaved_core::desired::hosts_document;
use enclaved_core::id::{EnclaveName, Timestamp};
use enclaved_core::status::Status;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// Why a command did not succeed: what the exit code says, and what the person is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum CtlError {
    /// What was asked for can't be: exit code 64.
    #[error("{0}")]
    Usage(String),
    /// A defect, here or in the daemon: exit code 70.
    #[error("{0}")]
    Bug(String),
    /// It may work another time: exit code 75.
    #[error("{0}")]
    TryAgain(String),
    /// A configuration, an image or the host is not good as it is: exit code 78.
    #[error("{0}")]
    Unfit(String),
}

impl CtlError {
    fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 64,
            Self::Bug(_) => 70,
            Self::TryAgain(_) => 75,
            Self::Unfit(_) => 78,
        }
    }
}

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  64  the command line is wrong, or names an enclave that there is not
  70  a defect of enclavectl or enclaved
  75  not now: enclaved does not answer, or not everything is ready; try again
  78  a configuration, an image or this host (doctor) is not good as it is; the message says why

Files:
  /etc/enclaved/enclaved.toml   the configuration, with conf.d/*.toml beside it
  /run/enclaved/admin.sock      where enclaved answers; its group may use it

Examples:
  enclavectl check /etc/enclaved/enclaved.toml && enclavectl reload
  enclavectl wait --timeout 5m          in user data, after systemctl start enclaved
  enclavectl --config next.toml fetch   before an update: its images are there when it comes
  enclavectl status signer              why it is not ready, and what to do
  enclavectl doctor                     whether this host would launch, and what is in the way";

/// Shows and steers the Nitro Enclaves that enclaved runs on this host.
#[derive(Debug, Parser)]
#[command(name = "enclavectl", version, after_help = EXIT_CODES, max_term_width = 120)]
struct Cli {
    /// The configuration file of enclaved.
    #[arg(long, global = true, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    /// The socket on which enclaved answers [default: admin.sock in the configuration's run_dir, /run/enclaved].
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the enclaves, what is wrong and what to do about it.
    Status(StatusArgs),
    /// Wait until enclaves are ready. Exits with 75 at the timeout and says what is not ready and why.
    Wait(WaitArgs),
    /// Check a configuration, and the conf.d/*.toml beside it, without a daemon and without looking at the host.
    Check {
        /// The file [default: that of --config].
        file: Option<PathBuf>,
        /// Print JSON: whether it is ok, and every error and warning.
        #[arg(long)]
        json: bool,
    },
    /// Show the steps that enclaved would take now, and what enclaves wait for.
    Plan {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End an enclave, after draining it, and keep it stopped over reloads and reboots.
    Stop {
        /// Its name.
        name: EnclaveName,
    },
    /// Launch an enclave again that was kept stopped, or that ended and is not launched again by itself.
    Start {
        /// Its name.
        name: EnclaveName,
    },
    /// Take an enclave that is held, because nitro-cli describes it otherwise than it was launched, as it is.
    Adopt {
        /// Its name.
        name: EnclaveName,
    },
    /// Bring in the changed configuration. One that is wrong is refused and nothing changes.
    Reload,
    /// Print the lines for an enclave's /etc/hosts that lead its programs to its egress endpoints.
    Hosts {
        /// Its name.
        name: EnclaveName,
        /// Print JSON: the endpoints.
        #[arg(long)]
        json: bool,
    },
    /// Fetch images into enclaved's cache ahead of an update, so that the update itself takes no download.
    Fetch(FetchArgs),
    /// Show what this host is, what enclaves may have of it, what is reserved, and what is in the way. Needs no daemon.
    Host {
        /// Where the host's root is: elsewhere in a container that has it mounted.
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check everything that a launch needs, and say what is in its way and what to do. Changes nothing; needs no daemon. Exits with 0
    /// only if this host would launch its enclaves, with 75 if that could not be found out, with 78 if it would not.
    Doctor {
        /// Print JSON: the verdict, and what every check found.
        #[arg(long)]
        json: bool,
    },
    /// Turn the configuration of another program into that of enclaved, on stdout; what to look at is said on stderr.
    Import {
        /// Whose configuration it is.
        #[arg(value_enum)]
        from: ImportFrom,
        /// Its files: allowlists (vsock-proxy.yaml), and the systemd units and drop-ins that run it.
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// Measure an enclave image: prints the [enclave.measurements] of a configuration.
    Measure {
        /// The image (EIF): a file, or an s3:// or https:// URL.
        #[arg(value_name = "FILE|URL")]
        image: OsString,
        /// Print JSON; also for an image that is refused, on stdout: what is wrong, and at which byte.
        #[arg(long)]
        json: bool,
    },
    /// Print a JSON schema.
    Schema {
        /// Of what.
        of: SchemaOf,
    },
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// One enclave, in detail.
    name: Option<EnclaveName>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Print digests, PCRs and errors in full.
    #[arg(long)]
    wide: bool,
}

#[derive(Debug, Args)]
struct FetchArgs {
    /// The images: s3://bucket/key, https://… or file:///…. Without any: those of the configuration (--config FILE names one
    /// that is not in force yet), which must then be what it says they are.
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
    /// How long to wait; enclaved goes on fetching when this ends.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print JSON: what each image came to.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct WaitArgs {
    /// The enclaves to wait for. Without any: all that are wanted, the proxy and its listeners.
    names: Vec<EnclaveName>,
    /// How long to wait, as 90s or 5m; 0s looks once.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Show progress on stderr even if that is no terminal.
    #[arg(long)]
    progress: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ImportFrom {
    /// AWS's vsock-proxy.
    VsockProxy,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SchemaOf {
    /// The configuration file: config/enclaved.schema.json.
    Config,
    /// The status, as `status --json` prints it and the control plane receives it: config/status.schema.json.
    Status,
}

/// Runs the command line; returns the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody is left to tell if even this can't be printed.
            drop(error.print());
            return ExitCode::from(if error.use_stderr() { 64 } else { 0 });
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => {
            let done = runtime.block_on(run(cli));
            // A name that is still being looked up, or a disk that hangs, is not waited for.
            runtime.shutdown_background();
            done
        }
        Err(error) => Err(CtlError::TryAgain(format!("starting: {error}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut stderr = std::io::stderr().lock();
            drop(writeln!(stderr, "enclavectl: {error}"));
            ExitCode::from(error.code())
        }
    }
}

async fn run(cli: Cli) -> Result<(), CtlError> {
    let socket = || cli.socket.clone().unwrap_or_else(|| config::run_dir(&cli.config).join(config::ADMIN_SOCKET));
    let client = || Client::new(socket());
    match cli.command {
        Command::Status(args) => show_status(&client(), &args).await,
        Command::Wait(args) => {
            let terminal = std::io::stderr().is_terminal();
            let show = (terminal || args.progress).then_some(wait::Show { redraw: terminal });
            wait::wait(&client(), &args.names, args.timeout, show).await
        }
        Command::Check { file, json } => check(&file.unwrap_or(cli.config), json),
        Command::Plan { json } => plan(&client(), json).await,
        Command::Stop { name } => {
            told(&client(), &name, "stop").await?;
            print(&format!(
                "{name} is kept stopped; it is drained first. `enclavectl start {name}` launches it again\n"
            ))
        }
        Command::Start { name } => {
            told(&client(), &name, "start").await?;
            print(&format!("{name} is to be launched; `enclavectl wait {name}` waits until it is ready\n"))
        }
        Command::Adopt { name } => {
            told(&client(), &name, "adopt").await?;
            print(&format!("{name} is taken as it is; what is configured counts for it again\n"))
        }
        Command::Reload => {
            let answer = client().post("/v1/reload").await?;
            let revision = answer.get("revision").and_then(Value::as_str).unwrap_or("(unnamed)");
            print(&format!("configuration {revision} is in force\n"))
        }
        Command::Hosts { name, json } => {
            let config = config::load(&cli.config).map_err(|errors| CtlError::Unfit(errors.to_string()))?;
            let spec =
                config.desired.enclaves.get(&name).ok_or_else(|| unknown(&name, config.desired.enclaves.keys()))?;
            print(&if json { hosts_document(&spec.egress) } else { hosts::lines(&name, spec) })
        }
        Command::Import { from: ImportFrom::VsockProxy, files } => {
            let read = |file: &PathBuf| match std::fs::read_to_string(file) {
                Ok(text) => Ok(import::Source { name: file.display().to_string(), text }),
                Err(error) => Err(CtlError::Usage(format!("reading {}: {error}", file.display()))),
            };
            let sources = files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            let imported = import::import(&sources).map_err(CtlError::Unfit)?;
            for warning in imported.warnings {
                eprintln!("{warning}");
            }
            print(&imported.toml)
        }
        Command::Fetch(args) => {
            let wanted = if args.images.is_empty() {
                let config = config::load(&cli.config).map_err(|errors| CtlError::Unfit(errors.to_string()))?;
                fetch::of_config(&config.desired)
            } else {
                fetch::of_sources(&args.images)?
            };
            let terminal = std::io::stderr().is_terminal();
            let results = fetch::fetch(&client(), &wanted, args.timeout, terminal).await;
            print(&if args.json { results.in_json()? } else { results.in_words() })?;
            results.judged()
        }
        Command::Measure { image, json } => {
            match measure::measure(&image, json, Timestamp::from(SystemTime::now())).await {
                Ok(text) => print(&text),
                Err(refused) => refused.output.map_or(Ok(()), |text| print(&text)).and(Err(refused.error)),
            }
        }
        Command::Host { root, json } => print(&host::host(&cli.config, &root, json).await?),
        Command::Doctor { json } => doctor::doctor(&cli.config, &client(), json).await,
        Command::Schema { of } => print(&format!(
            "{:#}\n",
            match of {
                SchemaOf::Config => config::schema(),
                SchemaOf::Status => status::schema(),
            }
        )),
    }
}

async fn show_status(client: &Client, args: &StatusArgs) -> Result<(), CtlError> {
    let mut json = client.get("/v1/status").await?;
    let known = understood(&json)?;
    if let Some(name) = &args.name {
        if !known.enclaves.iter().any(|enclave| enclave.name == *name) {
            return Err(unknown(name, known.enclaves.iter().map(|enclave| &enclave.name)));
        }
        if let Some(enclaves) = json.get_mut("enclaves").and_then(Value::as_array_mut) {
            enclaves.retain(|enclave| enclave.get("name").and_then(Value::as_str) == Some(name.as_str()));
        }
    }
    // JSON is passed on as it came, with what a newer daemon may have added.
    print(&match &args.name {
        _ if args.json => format!("{json:#}\n"),
        Some(name) => status::detail(&known, name),
        None => status::overview(&known, args.wide),
    })
}

fn check(file: &std::path::Path, json: bool) -> Result<(), CtlError> {
    let loaded = config::load(file);
    if json {
        print(&format!("{:#}\n", checked(&loaded)))?;
    }
    let config = loaded.map_err(|errors| CtlError::Unfit(format!("{} is refused\n{errors}", file.display())))?;
    if json {
        return Ok(());
    }
    let mut stderr = std::io::stderr().lock();
    for warning in &config.warnings {
        drop(writeln!(stderr, "warning: {warning}"));
    }
    let number = config.desired.enclaves.len();
    let files = config.sources.len();
    print(&format!(
        "{}: ok: {number} {} in {files} {}, revision {}\n",
        file.display(),
        if number == 1 { "enclave" } else { "enclaves" },
        if files == 1 { "file" } else { "files" },
        config.revision
    ))
}

/// What a check found, for programs.
fn checked(loaded: &Result<config::Config, config::ConfigErrors>) -> Value {
    match loaded {
        Ok(config) => json!({
            "ok": true,
            "revision": config.revision,
            "enclaves": config.desired.enclaves.keys().collect::<Vec<_>>(),
            "warnings": config.warnings,
            "errors": [],
        }),
        Err(errors) => json!({ "ok": false, "warnings": [], "errors": errors.iter().collect::<Vec<_>>() }),
    }
}

async fn plan(client: &Client, json: bool) -> Result<(), CtlError> {
    let plan = client.get("/v1/plan").await?;
    print(&if json { format!("{plan:#}\n") } else { status::plan(&plan) })
}

/// Asks the daemon to stop or start an enclave that it has.
async fn told(client: &Client, name: &EnclaveName, verb: &str) -> Result<(), CtlError> {
    let status = client.status().await?;
    if !status.enclaves.iter().any(|enclave| enclave.name == *name) {
        return Err(unknown(name, status.enclaves.iter().map(|enclave| &enclave.name)));
    }
    client.post(&format!("/v1/enclaves/{name}/{verb}")).await.map(drop)
}

fn understood(status: &Value) -> Result<Status, CtlError> {
    serde::Deserialize::deserialize(status).map_err(|error| {
        CtlError::Bug(format!("the status of enclaved can't be understood ({error}): is it another version?"))
    })
}

fn unknown<'a>(name: &EnclaveName, known: impl Iterator<Item = &'a EnclaveName>) -> CtlError {
    let known: Vec<_> = known.map(EnclaveName::as_str).collect();
    let list = if known.is_empty() { "there are none".to_owned() } else { format!("there are: {}", known.join(", ")) };
    CtlError::Usage(format!("there is no enclave \"{name}\"; {list}"))
}

fn print(text: &str) -> Result<(), CtlError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // Whoever reads has seen enough (`| head`).
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(CtlError::TryAgain(format!("writing to stdout: {error}"))),
        Ok(()) => Ok(()),
    }
}
