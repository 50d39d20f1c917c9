//! The launch helper, `enclaved launch --trace-dir DIR`: a process of its own that carries out one launch and outlives
//! the process that asked for it. What it finds out it leaves in the launch's traces.
//!
//! Run a second time on the same traces it does not launch again: it finds out what became of the first. So whoever finds
//! traces that nobody works on may start it at any time.

pub mod unit;

use crate::atomic_file::FileError;
use crate::launch_trace::{FORMAT, Failed, LaunchSpec, Lock, Moment, Outcome, Recorded, Trace};
use crate::nitro_cli::{Described, Description, Flag, Mark, NitroCli, RunError, RunRequest, State};
use crate::pidfd::Pidfd;
use crate::procfs;
use enclaved_core::failure::{ECode, Failure};
use enclaved_core::id::Timestamp;
use enclaved_core::ledger::LaunchRecord;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// The driver refuses for a moment after another enclave's end.
const DRIVER_BUSY: ECode = ECode(29);
/// How often a launch is tried while the driver refuses.
const DRIVER_TRIES: u32 = 3;
/// Pause between these tries.
const DRIVER_PAUSE: Duration = Duration::from_secs(2);

/// Pause before asking again what runs while a process of the launch is still at work; doubles up to [`BOOTING_PAUSE_MAX`].
const BOOTING_PAUSE: Duration = Duration::from_millis(500);
/// Longest such pause: every question puts load on enclaves that run.
const BOOTING_PAUSE_MAX: Duration = Duration::from_secs(30);

/// Exit status 75: not finished, to be run again.
const TRY_AGAIN: u8 = 75;
/// Exit status 70: the traces make no sense.
const BUG: u8 = 70;

/// Why the helper could not finish its work.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A trace could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is nothing to be launched in this folder.
    #[error("{0} holds no launch that this version understands")]
    NoLaunch(std::path::PathBuf),
    /// A process could not be looked at.
    #[error("could not look at a process")]
    Process(#[source] io::Error),
    /// The helper could not leave its parent's session.
    #[error("could not begin a session of its own")]
    Session(#[source] io::Error),
    /// It is still not known whether the enclave runs.
    #[error("it could not be found out whether the enclave runs: {0}")]
    Unresolved(Failure),
    /// systemd was not told that the enclave runs.
    #[error("systemd could not be told that the enclave runs")]
    NotTold(#[source] io::Error),
    /// A part of this program ended early.
    #[error("waiting for a lock was cut off")]
    Cut(#[from] tokio::task::JoinError),
}

/// The whole helper: leaves the session of whoever started it, so that it outlives them, and carries out the launch.
///
/// Exit status: 0 when the traces hold an outcome (a failed launch is one), 75 when they do not yet and it should be run
/// again, 70 when they make no sense.
pub async fn run(trace_dir: &Path) -> ExitCode {
    let result = match leave_session() {
        Ok(()) => perform(&Trace::new(trace_dir)).await,
        Err(error) => Err(LaunchError::Session(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => unfinished(trace_dir, &error),
    }
}

fn unfinished(trace_dir: &Path, error: &LaunchError) -> ExitCode {
    tracing::error!("launch in {}: {}", trace_dir.display(), Failure::from_error(error));
    ExitCode::from(if matches!(error, LaunchError::NoLaunch(_)) { BUG } else { TRY_AGAIN })
}

fn leave_session() -> io::Result<()> {
    match rustix::process::setsid() {
        // Already its leader: started by hand, from a shell.
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Carries out the launch, or finds out what became of it.
async fn perform(trace: &Trace) -> Result<(), LaunchError> {
    let no_launch = || LaunchError::NoLaunch(trace.folder().to_owned());
    let spec = match trace.spec() {
        Ok(spec) => spec.filter(|spec| spec.format == FORMAT).ok_or_else(no_launch)?,
        Err(error) if error.is_about_contents() => return Err(no_launch()),
        Err(error) => return Err(error.into()),
    };
    let _working = locked({
        let trace = trace.clone();
        move || trace.lock()
    })
    .await?;
    trace.write_helper(&procfs::own_identity().map_err(LaunchError::Process)?)?;
    let _launching = {
        let path = spec.host_lock.clone();
        locked(move || Lock::wait(&path)).await?
    };
    let nitro_cli = NitroCli::new(&spec.nitro_cli);
    match trace.outcome()? {
        Outcome::Ran(_) | Outcome::Failed(_) => Ok(()),
        Outcome::Nothing => launch(trace, &spec, &nitro_cli).await,
        Outcome::Attempted(attempt) => resolve(trace, &spec, &nitro_cli, attempt).await,
    }
}

async fn locked(lock: impl FnOnce() -> Result<Lock, FileError> + Send + 'static) -> Result<Lock, LaunchError> {
    Ok(tokio::task::spawn_blocking(lock).await??)
}

async fn launch(trace: &Trace, spec: &LaunchSpec, nitro_cli: &NitroCli) -> Result<(), LaunchError> {
    let identity = &spec.generation.identity;
    let request = RunRequest {
        image: spec.image.clone(),
        name: spec.key.to_string(),
        cid: spec.generation.cid,
        cpus: identity.cpus,
        memory: identity.memory,
        debug: identity.debug,
        mark: mark(trace),
    };
    let mut tries = 1;
    loop {
        trace.clear_nitro_cli()?;
        let attempt = Moment { at: now() };
        trace.write_attempt(&attempt)?;
        tracing::info!("{}: nitro-cli run-enclave, CID {}", spec.key, request.cid);
        match nitro_cli.run_enclave(&request, |pid| note_nitro_cli(trace, pid)).await {
            Ok(launch) => return record(trace, spec, launch),
            Err(RunError::NotRunning(failure)) if failure.code == Some(DRIVER_BUSY) && tries < DRIVER_TRIES => {
                tracing::warn!("{}: {failure}; trying again", spec.key);
                tries += 1;
                tokio::time::sleep(DRIVER_PAUSE).await;
            }
            Err(RunError::NotRunning(failure)) => return fail(trace, spec, failure),
            Err(RunError::Unclear(failure)) => {
                trace.write_unclear(&failure)?;
                return resolve(trace, spec, nitro_cli, attempt).await;
            }
        }
    }
}

/// By this process nitro-cli is found again if this helper dies while it is at work.
fn note_nitro_cli(trace: &Trace, pid: u32) {
    let noted = match procfs::process(pid) {
        Ok(Some(process)) => trace.write_nitro_cli(&process.identity).map_err(|error| Failure::from_error(&error)),
        Ok(None) => Ok(()),
        Err(error) => Err(Failure::from_error(&error)),
    };
    if let Err(failure) = noted {
        // A launch that is under way is not given up for that: without the note, more time is taken for finding out.
        tracing::warn!("the process of nitro-cli could not be noted: {failure}");
    }
}

/// Finds out whether an enclave came of a launch that was interrupted, or whose answer is not to be understood.
async fn resolve(trace: &Trace, spec: &LaunchSpec, nitro_cli: &NitroCli, attempt: Moment) -> Result<(), LaunchError> {
    tracing::info!("{}: finding out what became of its launch", spec.key);
    outlast_nitro_cli(trace, spec, attempt).await?;
    let unresolved = |failure: Failure| {
        let before = trace.resolve().ok().flatten().map_or(0, |failed| failed.count);
        let failed = Failed { at: now(), count: before.saturating_add(1), failure: failure.clone() };
        match trace.write_resolve(&failed) {
            Ok(()) => LaunchError::Unresolved(failure),
            Err(error) => LaunchError::File(error),
        }
    };
    let left = spec.patience().saturating_sub(now().since(attempt.at));
    let deadline = Instant::now() + left;
    let mut pause = BOOTING_PAUSE;
    let is_alive = || mark(trace).is_alive().map_err(LaunchError::Process);
    loop {
        let description = match nitro_cli.describe_enclaves().await {
            Ok(description) => description,
            // An enclave ends with the process that owns it: nobody has to say so.
            Err(_) if !is_alive()? => return came_to_nothing(trace, spec),
            Err(failure) => return Err(unresolved(failure)),
        };
        match Found::in_description(&description, spec) {
            Found::Ours(enclave) => {
                return match owner(trace, enclave).map_err(unresolved)? {
                    Some(launch) => record(trace, spec, launch),
                    None => fail(trace, spec, Failure::new("the enclave ended right after its launch")),
                };
            }
            Found::Wrong(enclave, what) => {
                nitro_cli.terminate_enclave(&enclave.enclave_id).await.map_err(unresolved)?;
                return fail(trace, spec, what.with_remedy("it was ended again; launch it anew"));
            }
            Found::InTheWay(failure) => return fail(trace, spec, failure),
            // Whoever does not answer is somebody else.
            Found::Incomplete(_) if !is_alive()? => return came_to_nothing(trace, spec),
            Found::Incomplete(failure) => return Err(unresolved(failure.clone())),
            // An enclave is listed only when it has booted.
            Found::Nothing if Instant::now() < deadline && is_alive()? => {
                tracing::info!("{}: a process of its launch is still at work", spec.key);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BOOTING_PAUSE_MAX);
            }
            Found::Nothing => return came_to_nothing(trace, spec),
        }
    }
}

/// No enclave of that launch runs.
fn came_to_nothing(trace: &Trace, spec: &LaunchSpec) -> Result<(), LaunchError> {
    let unclear = trace.unclear().ok().flatten();
    let interrupted = || {
        Failure::new("the launch was interrupted, and no enclave came of it")
            .with_remedy("it is launched again; if that repeats, see who ends the launch helper")
    };
    fail(trace, spec, unclear.unwrap_or_else(interrupted))
}

/// What became of a launch, by what runs on the host.
enum Found<'a> {
    /// Its enclave runs.
    Ours(&'a Described),
    /// An enclave of this launch runs, and is not what was asked for.
    Wrong(&'a Described, Failure),
    /// Somebody else's enclave runs with its name or its CID: so it can't run itself.
    InTheWay(Failure),
    /// No such enclave is listed, and not all enclaves are.
    Incomplete(&'a Failure),
    /// No such enclave runs.
    Nothing,
}

impl<'a> Found<'a> {
    fn in_description(description: &'a Description, spec: &LaunchSpec) -> Self {
        let name = spec.key.to_string();
        let cid = spec.generation.cid;
        if let Some(enclave) = description.enclaves.iter().find(|enclave| enclave.cid == u64::from(cid.get())) {
            let debug = spec.generation.identity.debug;
            return match &enclave.name {
                // nitro-cli does that where another enclave has the name.
                Some(other) if is_renamed(other, &name) => {
                    Self::Wrong(enclave, Failure::new(format!("nitro-cli launched {name} under the name {other}")))
                }
                Some(other) if *other != name => Self::InTheWay(in_the_way(
                    enclave,
                    &format!("an enclave named \"{}\" has its CID {cid}", other.escape_debug()),
                )),
                Some(_) | None if debug != (enclave.flags == Flag::DebugMode) => {
                    let mode = if debug { "without debug mode" } else { "in debug mode" };
                    Self::Wrong(
                        enclave,
                        Failure::new(format!("nitro-cli launched {name} {mode}, unlike it was asked to")),
                    )
                }
                Some(_) | None => Self::Ours(enclave),
            };
        }
        let namesake = description.enclaves.iter().find(|enclave| enclave.name.as_ref() == Some(&name));
        match (namesake, &description.incomplete) {
            (Some(enclave), _) => Self::InTheWay(in_the_way(
                enclave,
                &format!("an enclave named {name} runs with CID {} instead of {cid}", enclave.cid),
            )),
            (None, Some(failure)) => Self::Incomplete(failure),
            (None, None) => Self::Nothing,
        }
    }
}

fn in_the_way(enclave: &Described, what: &str) -> Failure {
    Failure::new(format!("{what}: it is not this launch's, and is left alone"))
        .with_remedy(format!("end it with `nitro-cli terminate-enclave --enclave-id {}`", enclave.enclave_id))
}

/// `name_1`, `name_2`, ...
fn is_renamed(other: &str, name: &str) -> bool {
    let number = other.strip_prefix(name).and_then(|rest| rest.strip_prefix('_'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
}

/// Waits while a nitro-cli that lost its helper is still at work: what it will come to can't be seen before.
async fn outlast_nitro_cli(trace: &Trace, spec: &LaunchSpec, attempt: Moment) -> Result<(), LaunchError> {
    let noted = match trace.nitro_cli() {
        Ok(noted) => noted,
        Err(error) if error.is_about_contents() => None,
        Err(error) => return Err(error.into()),
    };
    match noted {
        Some(process) => match Pidfd::open(process).map_err(LaunchError::Process)? {
            Some(process) => {
                tracing::info!("{}: nitro-cli is still at work", spec.key);
                process.ended().await.map_err(LaunchError::Process)
            }
            None => Ok(()),
        },
        // It was about to be started and there is no trace of it. Should it run, it is over by then.
        None if trace.unclear().is_ok_and(|unclear| unclear.is_none()) => {
            tokio::time::sleep(spec.patience().saturating_sub(now().since(attempt.at))).await;
            Ok(())
        }
        None => Ok(()),
    }
}

fn mark(trace: &Trace) -> Mark {
    Mark(trace.folder().to_owned())
}

/// The record of that enclave; `None` if it is over.
fn owner(trace: &Trace, enclave: &Described) -> Result<Option<LaunchRecord>, Failure> {
    if matches!(enclave.state, State::Terminating | State::Empty) {
        return Ok(None);
    }
    let process = mark(trace).owner(enclave.process_id)?;
    Ok(process.map(|process| enclave.to_record(process.identity, now())))
}

fn record(trace: &Trace, spec: &LaunchSpec, launch: LaunchRecord) -> Result<(), LaunchError> {
    tracing::info!("{}: runs as process {}", spec.key, launch.process.pid);
    Ok(trace.write_record(&Recorded { boot_id: spec.boot_id.clone(), launch })?)
}

fn fail(trace: &Trace, spec: &LaunchSpec, failure: Failure) -> Result<(), LaunchError> {
    tracing::error!("{}: {failure}", spec.key);
    Ok(trace.write_failure(&Failed { at: now(), count: 1, failure })?)
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

#[cfg(test)]
pub(crate) mod tests;
