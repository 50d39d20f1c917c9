//! Launches as both supervisors see them: one folder of traces a launch, looked at anew every time, and deaths by pidfd.
//!
//! The folder `<run_dir>/enclaves/<key>/` appears, whole, before anything is started; that is what makes a launch happen
//! once at most. Helpers and enclaves outlive this process: what it knows of them it reads from the traces
//! ([`crate::launch_trace`]) and from `/proc`. How a helper is started, and how an enclave is asked to end, is the
//! supervisors' ([`crate::host::direct`], [`crate::host::systemd`]); deciding anything is the planner's.

mod account;
mod folder;
pub(crate) mod scan;
pub(crate) mod stop;

use crate::atomic_file::{self, FileError};
use crate::host::Outcome;
use crate::launch_trace::{FORMAT, LAUNCH_LOCK, LaunchSpec, STOP_FILE, Trace};
use crate::nitro_cli::{self, NitroCli};
use crate::pidfd::Pidfd;
use crate::procfs;
use crate::stop_notes::StopNotes;
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, EnclaveKey, Timestamp};
use enclaved_core::ledger::{LaunchRecord, ProcessIdentity};
use enclaved_core::plan::restart::Backoff;
use enclaved_core::plan::{Launch, Launched};
use folder::{make_trace, remove_trace};
use rustix::process::Signal;
use scan::{Scan, Scanner};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use stop::{StopFile, StopStep};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How soon is looked again at what can't be watched.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Pauses before a helper that did not finish its work, or could not be started, is started again.
const HELPER_PAUSES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(600));
/// How long a stop waits for the end it asked for, so that the next look sees it.
const STOP_WAIT: Duration = Duration::from_secs(1);
/// What the units of launches begin with.
pub(crate) const UNIT_PREFIX: &str = "enclave@";
/// Folders that are being made or removed begin with this; no key does.
const HIDDEN: &str = ".";

/// Where things are.
#[derive(Debug, Clone)]
pub struct LaunchSettings {
    /// Holds `enclaves/` and the lock of the launches; emptied by a reboot, or not.
    pub run_dir: PathBuf,
    /// Holds the proven images, each as `<sha256>.eif`.
    pub images_dir: PathBuf,
    /// Holds the notes of stops by hand; not emptied by a reboot.
    pub stopped_dir: PathBuf,
    /// nitro-cli.
    pub nitro_cli: PathBuf,
}

/// All launches of which there are traces.
#[derive(Debug)]
pub(crate) struct Launches {
    pub(crate) settings: LaunchSettings,
    /// `<run_dir>/enclaves`
    pub(crate) folder: PathBuf,
    notes: StopNotes,
    boot_id: BootId,
    pub(crate) shared: Arc<Shared>,
    /// Waits for what was started to end an enclave. Ends with this process.
    tasks: Mutex<JoinSet<()>>,
}

/// What a supervisor knows beside the traces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Beside {
    /// Launches whose helper is at work, or will be in a moment, or has just been.
    pub(crate) busy: BTreeSet<EnclaveKey>,
    /// Launches whose unit is not over: what there is to be noted of an end is not all noted yet.
    pub(crate) standing: BTreeSet<EnclaveKey>,
    /// Why it can't be seen whether a helper is at work.
    pub(crate) unseen: Option<Failure>,
    /// How units fared that failed.
    pub(crate) stories: BTreeMap<EnclaveKey, Story>,
    /// Whether the end of an enclave is noted by its unit, a little later than it is noticed.
    pub(crate) exits_are_noted: bool,
}

/// How a unit fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Story {
    /// It is being asked for.
    Coming,
    /// How it ended, and its last words.
    Told {
        /// Its result, and the exit status of what it ran.
        result: String,
        /// The last lines of its journal; none where it can't be read.
        words: Vec<String>,
    },
}

#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Grows with everything that this process itself brings about or notices.
    pub(crate) version: watch::Sender<u64>,
}

/// What is known beyond the traces. Lost with this process, and not missed then.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Launches of which this process is just making or removing the traces, or whose helper is its child and has not ended.
    pub(crate) working: BTreeSet<EnclaveKey>,
    /// What the last observation saw alive.
    pub(crate) watched: Vec<ProcessIdentity>,
    /// [`Shared::version`] before the last observation.
    pub(crate) seen: u64,
    /// When to look again even if nothing happens.
    pub(crate) look_again: Option<Duration>,
    /// Launches that were said to take too long.
    pub(crate) overdue: BTreeSet<EnclaveKey>,
    /// Helpers that did not finish their work, and have not since.
    pub(crate) helpers: BTreeMap<EnclaveKey, HelperFailure>,
    /// Since when enclaves of which there are no traces have been asked to end.
    pub(crate) stops: BTreeMap<EnclaveKey, StopFile>,
}

/// A helper that has not done its work.
#[derive(Debug, Clone)]
pub(crate) struct HelperFailure {
    /// When it ended, or could not be started.
    at: Instant,
    /// How often in a row.
    count: u32,
    failure: Failure,
}

impl Shared {
    pub(crate) fn helper_failed(&self, key: &EnclaveKey, failure: Failure) {
        tracing::warn!("{key}: {failure}");
        let mut state = self.state();
        let count = state.helpers.get(key).map_or(0, |failed| failed.count).saturating_add(1);
        state.helpers.insert(key.clone(), HelperFailure { at: Instant::now(), count, failure });
    }

    /// How long no helper is to be started for that launch, and why.
    pub(crate) fn helper_pause(&self, key: &EnclaveKey) -> Option<(Duration, Failure)> {
        let state = self.state();
        let failed = state.helpers.get(key)?;
        let left = HELPER_PAUSES.after(failed.count).saturating_sub(failed.at.elapsed());
        (!left.is_zero()).then(|| (left, failed.failure.clone()))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds it can leave it half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bump(&self) {
        self.version.send_modify(|version| *version = version.wrapping_add(1));
    }
}

/// Marks a launch as being worked on by this process until it is dropped. It is there before the traces are, so whoever
/// sees the traces sees the mark, too, unless the work is done.
#[derive(Debug)]
pub(crate) struct Working {
    pub(crate) shared: Arc<Shared>,
    pub(crate) key: EnclaveKey,
}

impl Working {
    /// None if it is being worked on already.
    pub(crate) fn begin(shared: &Arc<Shared>, key: &EnclaveKey) -> Option<Self> {
        let new = shared.state().working.insert(key.clone());
        new.then(|| Self { shared: shared.clone(), key: key.clone() })
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.shared.state().working.remove(&self.key);
        self.shared.bump();
    }
}

/// An enclave that is made to end.
#[derive(Debug)]
pub(crate) struct Stopping {
    key: EnclaveKey,
    process: Pidfd,
    pid: u32,
    /// Whether it is to be asked to end now.
    pub(crate) ask: bool,
    /// Whether the traces say that enclaved asks. If not, a stop job of systemd's would be taken for one by hand.
    pub(crate) noted: bool,
}

impl Stopping {
    /// Sends that signal to the process that owns it.
    pub(crate) fn signal(&self, signal: Signal) -> Outcome<()> {
        self.process.send(signal).map_err(|error| {
            Failure::new(format!("could not signal the process {} of {}: {error}", self.pid, self.key))
                .with_remedy("it runs as another user: end it by hand, with `nitro-cli terminate-enclave`")
        })
    }

    /// Waits a moment for its end, so that the next look sees it.
    pub(crate) async fn wait(self) {
        // It is asked, which is what counts; one that takes its time is seen to end by whoever watches it.
        let _ended_or_late = tokio::time::timeout(STOP_WAIT, self.process.ended()).await;
    }
}

impl Launches {
    /// Makes the folders, and takes up whatever traces are there.
    ///
    /// # Errors
    /// The folders can't be made, or `/proc` can't be read.
    pub(crate) fn new(settings: LaunchSettings) -> Outcome<Self> {
        let folder = settings.run_dir.join("enclaves");
        let notes = StopNotes::new(&settings.stopped_dir);
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&folder).map_err(|error| fault(&FileError::io("make folder", &folder)(error)))?;
        // Without it only a stop by hand while enclaved does not run is forgotten by a reboot.
        if let Err(error) = builder.create(notes.folder()) {
            tracing::warn!("{}", fault(&FileError::io("make folder", notes.folder())(error)));
        }
        let boot_id = procfs::boot_id()
            .map_err(|error| Failure::new(format!("could not find out which boot of the host this is: {error}")))?;
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { state, version: watch::Sender::new(1) });
        let launches = Self { settings, folder, notes, boot_id, shared, tasks: Mutex::default() };
        launches.remove_hidden();
        Ok(launches)
    }

    pub(crate) fn trace(&self, key: &EnclaveKey) -> Trace {
        Trace::new(self.folder.join(key.to_string()))
    }

    /// What an earlier life was making or removing when it ended; nothing was started from there.
    fn remove_hidden(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".")) {
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!("could not remove {}: {error}", entry.path().display());
            }
        }
    }

    pub(crate) fn scanner(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>, beside: Beside) -> Scanner {
        Scanner {
            folder: self.folder.clone(),
            notes: self.notes.clone(),
            boot_id: self.boot_id.clone(),
            nitro_cli: self.settings.nitro_cli.clone(),
            known: known.clone(),
            shared: self.shared.clone(),
            beside,
            now: now(),
        }
    }

    /// Looks at all launches.
    pub(crate) async fn look(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>, beside: Beside) -> Outcome<Scan> {
        drop(reap(&self.tasks));
        let version = *self.shared.version.borrow();
        let scanner = self.scanner(known, beside);
        match blocking(move || scanner.scan()).await.flatten() {
            Ok(scan) => {
                self.take_over(&scan, version);
                Ok(scan)
            }
            Err(failure) => {
                // What was watched before is watched on; and it is looked again in a while, not at once.
                let mut state = self.shared.state();
                state.seen = version;
                state.look_again = Some(LOOK_AGAIN);
                Err(failure)
            }
        }
    }

    fn take_over(&self, scan: &Scan, version: u64) {
        let mut state = self.shared.state();
        state.seen = version;
        state.watched.clone_from(&scan.watch);
        state.look_again = scan.look_again;
        for (key, text) in &scan.overdue {
            if state.overdue.insert(key.clone()) {
                tracing::warn!("{key}: {text}");
            }
        }
    }

    fn terminate(&self, key: &EnclaveKey, launch: &LaunchRecord) {
        let nitro_cli = NitroCli::new(&self.settings.nitro_cli);
        let (key, id) = (key.clone(), launch.enclave_id.clone());
        reap(&self.tasks).spawn(async move {
            if let Err(failure) = nitro_cli.terminate_enclave(&id).await {
                tracing::warn!("{key}: {failure}");
            }
        });
    }

    /// Makes the traces of a launch, and marks it as worked on. `None` if there are traces, whatever became of it.
    pub(crate) async fn begin(&self, launch: &Launch) -> Outcome<Option<Working>> {
        let image = self.settings.images_dir.join(format!("{}.eif", launch.image.digest()));
        let spec = LaunchSpec {
            format: FORMAT,
            boot_id: self.boot_id.clone(),
            at: now(),
            key: launch.key.clone(),
            generation: launch.record.clone(),
            patience_s: nitro_cli::patience(launch.image.size(), launch.record.identity.memory).as_secs(),
            image,
            nitro_cli: self.settings.nitro_cli.clone(),
            host_lock: self.settings.run_dir.join(LAUNCH_LOCK),
            stop_notes: Some(self.notes.folder().to_owned()),
        };
        let Some(working) = Working::begin(&self.shared, &launch.key) else { return Ok(None) };
        let (folder, notes) = (self.folder.clone(), self.notes.clone());
        let making = blocking(move || {
            // One of another launch under this number, before the ledger was lost.
            if !folder.join(spec.key.to_string()).exists() {
                notes.remove(&spec.key)?;
            }
            make_trace(&folder, &spec)
        });
        let made = making.await?.map_err(|error| fault(&error))?;
        Ok(made.then_some(working))
    }

    /// Removes the traces of a launch of which nothing was started.
    pub(crate) async fn take_back(&self, key: &EnclaveKey) -> Outcome<()> {
        let (folder, key) = (self.folder.clone(), key.clone());
        blocking(move || remove_trace(&folder, &key)).await?
    }

    /// Has that enclave end: says whether it is to be asked to now, or uses stronger means if asking did not help. How far that
    /// is is noted beforehand. `None` if it has ended.
    pub(crate) async fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> Outcome<Option<Stopping>> {
        let look = |error: io::Error| {
            Failure::new(format!("could not look at the process {} of {key}: {error}", launch.process.pid))
        };
        let Some(process) = Pidfd::open(launch.process).map_err(look)? else {
            self.shared.state().stops.remove(key);
            return Ok(None);
        };
        let trace = self.trace(key);
        let since_boot = procfs::since_boot()
            .map_err(|error| Failure::new(format!("could not find out how long this host has been up: {error}")))?;
        let noted = self.shared.state().stops.get(key).copied();
        let noting = blocking(move || {
            // An unreadable file only makes the escalation begin anew.
            let noted = noted.or_else(|| trace.read(STOP_FILE).ok().flatten());
            let (step, next) = stop::next(noted, since_boot);
            let written = if noted != Some(next) && trace.folder().exists() {
                atomic_file::write_json(&trace.folder().join(STOP_FILE), &next)
            } else {
                Ok(())
            };
            (step, next, written)
        });
        let (step, next, written) = noting.await?;
        if let Err(error) = &written {
            // A full disk must not keep an enclave from being ended: only after a restart it is asked from the beginning.
            tracing::warn!("{key}: that it is asked to end can't be noted: {}", fault(error));
        }
        self.shared.state().stops.insert(key.clone(), next);
        let (pid, ask, noted) = (launch.process.pid, step == StopStep::Ask, written.is_ok());
        let stopping = Stopping { key: key.clone(), process, pid, ask, noted };
        match step {
            StopStep::Wait | StopStep::Ask => {}
            StopStep::Terminate => {
                tracing::warn!("{key}: process {} does not end; asking nitro-cli", launch.process.pid);
                self.terminate(key, launch);
            }
            StopStep::Kill => {
                tracing::error!("{key}: process {} does not end; killing it", launch.process.pid);
                stopping.signal(Signal::KILL)?;
            }
        }
        Ok(Some(stopping))
    }

    /// Asks nitro-cli once what runs, beside what was launched.
    pub(crate) async fn describe(&self, launched: &[Launched]) -> Outcome<BTreeMap<EnclaveKey, Option<Failure>>> {
        crate::describe::describe(&NitroCli::new(&self.settings.nitro_cli), launched).await
    }

    /// Removes the traces of a launch that is over.
    pub(crate) async fn forget(&self, key: &EnclaveKey) -> Outcome<()> {
        let (folder, notes, trace) = (self.folder.clone(), self.notes.clone(), self.trace(key));
        let name = key.clone();
        let refused = move |why: String| Failure::new(format!("the traces of {name} are not removed: {why}"));
        let Some(working) = Working::begin(&self.shared, key) else {
            return Err(refused("its launch helper is at work".to_owned()));
        };
        // The mark goes with the work: it stays until that is done, even if nobody waits for it any more.
        let removed = blocking(move || {
            scan::check_over(&trace).map_err(refused)?;
            notes.remove(&working.key).map_err(|error| fault(&error))?;
            remove_trace(&folder, &working.key)
        });
        removed.await??;
        let mut state = self.shared.state();
        state.stops.remove(key);
        state.overdue.remove(key);
        state.helpers.remove(key);
        Ok(())
    }

    /// As [`Supervisor::changed`](crate::host::Supervisor::changed), by what this process does and by the ends of processes.
    pub(crate) async fn changed(&self) {
        let (seen, watched, mut look_again) = {
            let state = self.shared.state();
            (state.seen, state.watched.clone(), state.look_again)
        };
        let mut ends: Vec<Pin<Box<dyn Future<Output = ()> + Send>>> = Vec::new();
        for process in watched {
            match Pidfd::open(process) {
                Ok(Some(process)) => ends.push(Box::pin(async move {
                    // One that can't be watched is looked at in a while; it has not ended.
                    if process.ended().await.is_err() {
                        tokio::time::sleep(LOOK_AGAIN).await;
                    }
                })),
                Ok(None) => return,
                // None left of the descriptors, say.
                Err(_) => look_again = Some(LOOK_AGAIN),
            }
        }
        let ended = std::future::poll_fn(move |context| {
            match ends.iter_mut().any(|end| end.as_mut().poll(context).is_ready()) {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            }
        });
        let mut version = self.shared.version.subscribe();
        let later = async {
            match look_again {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: the version is compared, not consumed.
            _ = version.wait_for(|version| *version != seen) => {}
            // Cancel-safe: an ended process stays ended.
            () = ended => {}
            // Cancel-safe: it begins anew with the next call.
            () = later => {}
        }
    }
}

/// The unit of a launch, where there is systemd.
pub(crate) fn unit_name(key: &EnclaveKey) -> String {
    format!("{UNIT_PREFIX}{key}.service")
}

/// Clears away the tasks that have ended. One that panicked is a bug, which ends whoever looks here, and with it the process: what it
/// was to find out would be waited for for ever.
pub(crate) fn reap(tasks: &Mutex<JoinSet<()>>) -> MutexGuard<'_, JoinSet<()>> {
    let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(ended) = tasks.try_join_next() {
        if let Some(panic) = ended.err().and_then(|error| error.try_into_panic().ok()) {
            std::panic::resume_unwind(panic);
        }
    }
    tasks
}

pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| Failure::new(format!("looking at the traces of launches was cut off: {error}")))
}

pub(crate) fn fault(error: &FileError) -> Failure {
    Failure::from_error(error)
}

pub(crate) fn now() -> Timestamp {
    SystemTime::now().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panicked_ends_whoever_waits_for_what_it_was_to_find_out() {
        let tasks = Mutex::new(JoinSet::new());
        reap(&tasks).spawn(async {});
        while !reap(&tasks).is_empty() {
            tokio::task::yield_now().await;
        }
        reap(&tasks).spawn(async { panic!("a bug") });
        let looking = tokio::spawn(async move {
            while !reap(&tasks).is_empty() {
                tokio::task::yield_now().await;
            }
        });
        assert!(looking.await.unwrap_err().is_panic());
    }
}
