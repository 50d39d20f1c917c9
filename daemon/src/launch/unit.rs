//! The phases of the unit of a launch, `enclave@<key>.service`: the helper as its `ExecStart=`, and what is noted in the traces when
//! the unit is stopped (`ExecStop=`) and when its processes have ended (`ExecStopPost=`).
//!
//! Whoever stops the unit by hand wants the enclave to stay stopped, and this is where that is told from all other ends: by
//! enclaved (it has noted so before), by itself, or because the host shuts down. At a shutdown systemd stops all units, and
//! nothing of that may hold an enclave stopped after the boot: so it is noted as what it is, and as that also if it can't be
//! told; and what was noted in one boot means nothing in the next, but for a stop by hand, of which a second note is on disk.

use super::{LaunchError, mark, perform, unfinished};
use crate::launch_trace::{Asked, Exit, Outcome, Recorded, Trace};
use crate::launches::unit_name;
use crate::procfs;
use crate::stop_notes::StopNotes;
use crate::systemd_bus::SystemdBus;
use enclaved_core::failure::Failure;
use enclaved_core::id::{EnclaveKey, Timestamp};
use enclaved_core::observed::AskedBy;
use enclaved_core::plan::restart::Backoff;
use sd_notify::NotifyState;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use tokio::task::JoinSet;

/// How often systemd is told that the start goes on, and for how long each time.
const EXTEND_EVERY: Duration = Duration::from_secs(15);
const EXTEND_USEC: u32 = 60_000_000;
/// Pauses before it is tried again to find out what came of a launch, while any of its processes lives. Rather long ones later:
/// every question puts load on enclaves that run.
const AGAIN_PAUSES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
/// How long it may take to find out who stops a unit. The enclave runs on meanwhile.
const ASKING_PATIENCE: Duration = Duration::from_secs(5);
/// No word of systemd's about an exit is longer.
const MAX_WORD: usize = 64;
/// How what is said of an end that nobody asked for begins.
pub(crate) const ENDED_UNASKED: &str = "ended unasked";
/// Exit status 1: it did not go well, as is to be seen by the unit.
const FAILED: u8 = 1;

/// `ExecStart=`: carries out the launch, and makes nitro-cli's process the unit's main process.
///
/// With the end of this process before that, the unit ends, and with the unit every process of it, the enclave's among them. So
/// it stays, and tries again, for as long as it is not known what came of the launch and any process of it lives.
///
/// Exit status: 0 when the enclave runs, 1 when it does not, 75 when nothing of it lives and that could not be noted, 70 when the
/// traces make no sense.
pub async fn supervised(trace_dir: &Path) -> ExitCode {
    let mut extending = JoinSet::new();
    extending.spawn(extend());
    let trace = Trace::new(trace_dir);
    let mut failures = 0;
    loop {
        let error = match supervise(&trace).await {
            Ok(code) => return code,
            Err(error @ LaunchError::NoLaunch(_)) => return unfinished(trace_dir, &error),
            Err(error) => error,
        };
        // Where that can't be found out, it may.
        if matches!(mark(&trace).is_alive(), Ok(false)) {
            return unfinished(trace_dir, &error);
        }
        failures += 1;
        let (failure, pause) = (Failure::from_error(&error), AGAIN_PAUSES.after(failures));
        tracing::warn!("a process of this launch lives, and it is tried again in {} s: {failure}", pause.as_secs());
        tell(&[NotifyState::Status(&format!("not known yet whether it runs: {}", failure.message))]);
        tokio::time::sleep(pause).await;
    }
}

async fn supervise(trace: &Trace) -> Result<ExitCode, LaunchError> {
    perform(trace).await?;
    match trace.outcome()? {
        Outcome::Ran(recorded) => hand_over(&recorded),
        // Said when it failed; and again by a unit that was started once more.
        Outcome::Failed(failed) => Ok(over(&format!("it failed at {}: {}", failed.at, failed.failure))),
        Outcome::Attempted(_) | Outcome::Nothing => {
            Err(LaunchError::Unresolved(Failure::new("what was noted of it was lost again")))
        }
    }
}

fn over(why: &str) -> ExitCode {
    tracing::error!("this launch is over: {why}; enclaved launches the enclave anew, under the next number");
    ExitCode::from(FAILED)
}

/// Tells systemd that the start goes on: waiting for other launches, booting, and finding out what came of it may take longer
/// than any fixed limit.
async fn extend() {
    loop {
        tell(&[NotifyState::ExtendTimeoutUsec(EXTEND_USEC)]);
        tokio::time::sleep(EXTEND_EVERY).await;
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager was not told: {error}");
    }
}

/// The record is on disk: from here on the unit is nitro-cli's process.
fn hand_over(recorded: &Recorded) -> Result<ExitCode, LaunchError> {
    let process = recorded.launch.process;
    let alive = procfs::is_alive(process).and_then(|alive| Ok(alive && procfs::boot_id()? == recorded.boot_id));
    if !alive.map_err(LaunchError::Process)? {
        return Ok(over("its enclave has ended"));
    }
    if !procfs::same_control_group(process.pid).unwrap_or(true) {
        // It was launched by other means: systemd would not take it for this unit's.
        tracing::error!("its enclave runs already, outside of this unit, as process {}", process.pid);
        return Ok(ExitCode::from(FAILED));
    }
    let status = format!("{} runs", recorded.launch.enclave_id);
    // systemd reads it before it learns that this process, which it watches as the main one until then, has ended.
    sd_notify::notify(&[NotifyState::MainPid(process.pid), NotifyState::Ready, NotifyState::Status(&status)])
        .map_err(LaunchError::NotTold)?;
    Ok(ExitCode::SUCCESS)
}

/// `ExecStop=`: notes who stops the unit, if it was not enclaved. systemd runs it also when the main process has ended by
/// itself; `$MAINPID` is not set then, and there is nothing to note.
pub async fn stopping(trace_dir: &Path) -> ExitCode {
    let trace = Trace::new(trace_dir);
    if variable("MAINPID").is_empty() || !is_launch(&trace) || trace.stop_is_noted() {
        return ExitCode::SUCCESS;
    }
    note_who_asks(&trace).await;
    // The stop goes on either way.
    ExitCode::SUCCESS
}

/// `ExecStopPost=`: notes how the unit's processes ended. Fails unless somebody asked for the end: so that an enclave that died is
/// seen as a unit that failed, although nitro-cli exits with 0.
pub async fn ended(trace_dir: &Path) -> ExitCode {
    let trace = Trace::new(trace_dir);
    if !is_launch(&trace) {
        // The start of such a unit has failed, and said so.
        return ExitCode::SUCCESS;
    }
    if let Ok(Outcome::Ran(recorded)) = trace.outcome()
        && !matches!(procfs::is_alive(recorded.launch.process), Ok(false))
        // One that is of this unit is ended after this: of a unit that was not up yet, systemd has only ended the helper so far.
        && !procfs::same_control_group(recorded.launch.process.pid).unwrap_or(false)
        && procfs::boot_id().is_ok_and(|boot_id| boot_id == recorded.boot_id)
    {
        tracing::warn!("the enclave does not end with this unit: it was launched by other means, and runs on");
        return ExitCode::SUCCESS;
    }
    let asked = trace.stop_is_noted() || is_noted(&trace) || note_who_asks(&trace).await;
    let exit = Exit {
        at: now(),
        result: variable("SERVICE_RESULT"),
        code: variable("EXIT_CODE"),
        status: variable("EXIT_STATUS"),
        asked,
    };
    if let Err(error) = trace.write_exit(&exit) {
        tracing::warn!("how it ended can't be noted: {}", Failure::from_error(&error));
    }
    if asked {
        return ExitCode::SUCCESS;
    }
    tracing::error!("{ENDED_UNASKED}: {}, {} {}", exit.result, exit.code, exit.status);
    ExitCode::from(FAILED)
}

/// Whether there are traces of a launch; a unit that somebody started under another name has none, and makes none.
fn is_launch(trace: &Trace) -> bool {
    trace.spec().is_ok_and(|spec| spec.is_some()) && key(trace).is_some()
}

fn key(trace: &Trace) -> Option<EnclaveKey> {
    trace.folder().file_name()?.to_str()?.parse().ok()
}

/// Whether somebody else than enclaved is noted to have asked for the end, in this boot.
fn is_noted(trace: &Trace) -> bool {
    let asked = trace.asked().ok().flatten();
    asked.is_some_and(|asked| procfs::boot_id().is_ok_and(|boot_id| boot_id == asked.boot_id))
}

/// Notes who asks for the end; false if nobody does.
async fn note_who_asks(trace: &Trace) -> bool {
    let Some(key) = key(trace) else { return false };
    let Some(by) = who_asks(&key).await else { return false };
    let noted = procfs::boot_id().map_err(|error| Failure::from_error(&error)).and_then(|boot_id| {
        let asked = Asked { boot_id, at: now(), by };
        if by == AskedBy::Stop
            && let Some(folder) = trace.spec().ok().flatten().and_then(|spec| spec.stop_notes)
            && let Err(error) = StopNotes::new(folder).write(&key, &asked)
        {
            // It counts in this boot all the same.
            tracing::warn!("a reboot before enclaved runs again would launch it: {}", Failure::from_error(&error));
        }
        trace.write_asked(&asked).map_err(|error| Failure::from_error(&error))
    });
    match noted {
        Ok(()) => tracing::info!("{}", said(by)),
        Err(failure) => tracing::warn!("who stops it can't be noted, so it may be launched again: {failure}"),
    }
    true
}

fn said(by: AskedBy) -> &'static str {
    match by {
        AskedBy::Stop => "stopped by hand: it is held stopped until `enclavectl start`",
        AskedBy::Restart => "restarted by hand: it is launched anew, under the next number",
        AskedBy::Shutdown => "stopped with everything else",
    }
}

/// Who has systemd end that unit; `None` if nobody does.
async fn who_asks(key: &EnclaveKey) -> Option<AskedBy> {
    let bus = SystemdBus::new();
    let unit = unit_name(key);
    let asking = async { tokio::try_join!(bus.system_state(), bus.unit(&unit)) };
    let answer = tokio::time::timeout(ASKING_PATIENCE, asking).await;
    match answer {
        Ok(Ok((system, unit))) => who(&system, unit.and_then(|unit| unit.job).as_deref()),
        // The bus goes away early in a shutdown.
        Ok(Err(failure)) => {
            tracing::warn!("it can't be told who stops it: {failure}");
            Some(AskedBy::Shutdown)
        }
        Err(_) => {
            tracing::warn!("systemd does not say within {ASKING_PATIENCE:?} who stops it");
            Some(AskedBy::Shutdown)
        }
    }
}

/// By how the system is, and the job that there is for the unit.
fn who(system: &str, job: Option<&str>) -> Option<AskedBy> {
    match (system, job) {
        (_, None) => None,
        // To be powered off, or in rescue mode, where only what is named runs.
        ("stopping" | "maintenance", Some(_)) => Some(AskedBy::Shutdown),
        (_, Some("stop")) => Some(AskedBy::Stop),
        (_, Some("restart" | "try-restart")) => Some(AskedBy::Restart),
        (_, Some(_)) => None,
    }
}

/// A word that systemd gives in the environment.
fn variable(name: &str) -> String {
    let value = std::env::var_os(name).unwrap_or_default();
    value.to_string_lossy().chars().filter(|c| !c.is_control()).take(MAX_WORD).collect()
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::tests::asked;
    use crate::test_support::Stand;

    #[test]
    fn only_a_stop_of_that_unit_alone_is_one_by_hand() {
        assert_eq!(who("running", Some("stop")), Some(AskedBy::Stop));
        assert_eq!(who("degraded", Some("stop")), Some(AskedBy::Stop));
        assert_eq!(who("running", Some("restart")), Some(AskedBy::Restart));
        assert_eq!(who("stopping", Some("stop")), Some(AskedBy::Shutdown));
        assert_eq!(who("maintenance", Some("stop")), Some(AskedBy::Shutdown));
        assert_eq!(who("running", None), None, "it ended by itself");
        assert_eq!(who("running", Some("start")), None, "its start timed out");
    }

    #[tokio::test]
    async fn a_unit_without_a_launch_does_nothing_and_its_start_fails() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("signer-9");
        assert_eq!(format!("{:?}", supervised(&missing).await), format!("{:?}", ExitCode::from(70)));
        assert_eq!(format!("{:?}", stopping(&missing).await), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(format!("{:?}", ended(&missing).await), format!("{:?}", ExitCode::SUCCESS));
        assert!(!missing.exists());
    }

    async fn spawned(stand: &Stand, trace: &Trace) -> tokio::task::JoinHandle<ExitCode> {
        let folder = trace.folder().to_owned();
        let helper = tokio::spawn(async move { supervised(&folder).await });
        stand.wait_for("begun").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!helper.is_finished(), "its end would be that of the enclave");
        helper
    }

    #[tokio::test]
    async fn the_helper_stays_while_it_cannot_be_found_out_whether_the_enclave_runs() {
        let describe = "touch $d/begun; [ -e $d/well ] || { echo '[ E07 ] x' >&2; exit 7; }; describe";
        let (stand, trace) = asked("enclave > $d/answer; exit 101", describe);
        let helper = spawned(&stand, &trace).await;
        std::fs::write(stand.path().join("well"), "").unwrap();
        assert_eq!(format!("{:?}", helper.await.unwrap()), format!("{:?}", ExitCode::SUCCESS));
        assert!(matches!(trace.outcome().unwrap(), Outcome::Ran(_)));
    }

    #[tokio::test]
    async fn the_helper_stays_while_the_record_of_an_enclave_that_runs_cannot_be_written() {
        // What a full disk does, too.
        let (stand, trace) = asked("mkdir $d/trace/record.json; touch $d/begun; enclave | tee $d/answer", "describe");
        let helper = spawned(&stand, &trace).await;
        std::fs::remove_dir(trace.folder().join("record.json")).unwrap();
        assert_eq!(format!("{:?}", helper.await.unwrap()), format!("{:?}", ExitCode::SUCCESS));
        assert!(matches!(trace.outcome().unwrap(), Outcome::Ran(_)));
    }

    #[tokio::test]
    async fn the_helper_ends_when_nothing_of_its_launch_lives() {
        let describe = "touch $d/begun; echo '[ E07 ] x' >&2; exit 7";
        let (stand, trace) = asked("enclave > $d/answer; exit 101", describe);
        let helper = spawned(&stand, &trace).await;
        let pid: i32 = std::fs::read_to_string(stand.path().join("pids")).unwrap().trim().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert_eq!(format!("{:?}", helper.await.unwrap()), format!("{:?}", ExitCode::from(FAILED)));
        assert!(matches!(trace.outcome().unwrap(), Outcome::Failed(_)));
    }
}
