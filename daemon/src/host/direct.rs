//! The supervisor for hosts without systemd: one launch helper a launch, one folder of traces a launch, deaths by pidfd.
//!
//! The folder `<run_dir>/enclaves/<key>/` appears, whole, before anything is started; that is what makes a launch happen
//! once at most. Helpers and enclaves outlive this process: what it knows of them it reads from the traces
//! ([`crate::launch_trace`]) and from `/proc`, every time anew. Deciding anything about them is the planner's.

mod scan;
mod stop;

use super::{Outcome, Supervisor};
use crate::atomic_file::{self, FileError};
use crate::child_environment;
use crate::launch_trace::{FORMAT, LaunchSpec, Trace};
use crate::nitro_cli::{self, NitroCli};
use crate::pidfd::Pidfd;
use crate::procfs;
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, EnclaveKey, Timestamp};
use enclaved_core::ledger::{LaunchRecord, ProcessIdentity};
use enclaved_core::observed::Instance;
use enclaved_core::plan::restart::Backoff;
use enclaved_core::plan::{Launch, Launched};
use scan::{Scan, Scanner};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use stop::{StopFile, StopStep};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How soon is looked again at what can't be watched.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Pauses before a helper that did not finish its work, or could not be started, is started again.
const HELPER_PAUSES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(600));
/// How long a stop waits for the end it asked for, so that the next look sees it.
const STOP_WAIT: Duration = Duration::from_secs(1);
/// A helper's log that is longer is put aside before the next helper writes to it; so there are two of about that size.
const MAX_LOG: u64 = 256 * 1024;
/// Folders that are being made or removed begin with this; no key does.
const HIDDEN: &str = ".";

/// Where things are.
#[derive(Debug, Clone)]
pub struct DirectSettings {
    /// Holds `enclaves/` and the lock of the launches; emptied by a reboot, or not.
    pub run_dir: PathBuf,
    /// Holds the proven images, each as `<sha256>.eif`.
    pub images_dir: PathBuf,
    /// nitro-cli.
    pub nitro_cli: PathBuf,
    /// The launch helper.
    pub helper: HelperCommand,
}

/// How the launch helper is started: this program and these arguments, then `--trace-dir DIR`.
#[derive(Debug, Clone)]
pub struct HelperCommand {
    /// The executable.
    pub program: PathBuf,
    /// What comes before `--trace-dir`.
    pub arguments: Vec<OsString>,
}

/// The supervisor for hosts without systemd.
#[derive(Debug)]
pub struct Direct {
    settings: DirectSettings,
    /// `<run_dir>/enclaves`
    folder: PathBuf,
    boot_id: BootId,
    shared: Arc<Shared>,
    /// Waits for the helpers that are children of this process. Ends with it; the helpers go on.
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Grows with everything that this process itself brings about or notices.
    version: watch::Sender<u64>,
}

/// What is known beyond the traces. Lost with this process, and not missed then.
#[derive(Debug, Default)]
struct State {
    /// Launches of which this process is just making the traces, or whose helper is its child and has not ended.
    working: BTreeSet<EnclaveKey>,
    /// What the last observation saw alive.
    watched: Vec<ProcessIdentity>,
    /// [`Shared::version`] before the last observation.
    seen: u64,
    /// When to look again even if nothing happens.
    look_again: Option<Duration>,
    /// Launches that were said to take too long.
    overdue: BTreeSet<EnclaveKey>,
    /// Helpers that did not finish their work, and have not since.
    helpers: BTreeMap<EnclaveKey, HelperFailure>,
    /// Since when enclaves of which there are no traces have been asked to end.
    stops: BTreeMap<EnclaveKey, StopFile>,
}

/// A helper that has not done its work.
#[derive(Debug, Clone)]
struct HelperFailure {
    /// When it ended, or could not be started.
    at: Instant,
    /// How often in a row.
    count: u32,
    failure: Failure,
}

impl Shared {
    fn helper_failed(&self, key: &EnclaveKey, failure: Failure) {
        tracing::warn!("{key}: {failure}");
        let mut state = self.state();
        let count = state.helpers.get(key).map_or(0, |failed| failed.count).saturating_add(1);
        state.helpers.insert(key.clone(), HelperFailure { at: Instant::now(), count, failure });
    }

    /// How long no helper is to be started for that launch, and why.
    fn helper_pause(&self, key: &EnclaveKey) -> Option<(Duration, Failure)> {
        let state = self.state();
        let failed = state.helpers.get(key)?;
        let left = HELPER_PAUSES.after(failed.count).saturating_sub(failed.at.elapsed());
        (!left.is_zero()).then(|| (left, failed.failure.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds it can leave it half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bump(&self) {
        self.version.send_modify(|version| *version = version.wrapping_add(1));
    }
}

/// Marks a launch as being worked on by this process until it is dropped. It is there before the traces are, so whoever
/// sees the traces sees the mark, too, unless the work is done.
#[derive(Debug)]
struct Working {
    shared: Arc<Shared>,
    key: EnclaveKey,
}

impl Working {
    /// None if it is being worked on already.
    fn begin(shared: &Arc<Shared>, key: &EnclaveKey) -> Option<Self> {
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

impl Direct {
    /// Makes the folders, and takes up whatever traces are there.
    ///
    /// # Errors
    /// The folders can't be made, or `/proc` can't be read.
    pub fn new(settings: DirectSettings) -> Outcome<Self> {
        let folder = settings.run_dir.join("enclaves");
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&folder).map_err(|error| fault(&FileError::io("make folder", &folder)(error)))?;
        let boot_id = procfs::boot_id()
            .map_err(|error| Failure::new(format!("could not find out which boot of the host this is: {error}")))?;
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { state, version: watch::Sender::new(1) });
        let direct = Self { settings, folder, boot_id, shared, tasks: Mutex::default() };
        direct.remove_hidden();
        Ok(direct)
    }

    fn trace(&self, key: &EnclaveKey) -> Trace {
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

    fn scanner(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>) -> Scanner {
        Scanner {
            folder: self.folder.clone(),
            boot_id: self.boot_id.clone(),
            nitro_cli: self.settings.nitro_cli.clone(),
            known: known.clone(),
            shared: self.shared.clone(),
            now: now(),
        }
    }

    /// Starts a helper on a launch's traces, and waits for it in a task.
    fn start_helper(&self, working: Working) -> Outcome<()> {
        let trace = self.trace(&working.key);
        trace.cap_log(MAX_LOG).map_err(|error| fault(&error))?;
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(trace.log())
            .and_then(|log| Ok((log.try_clone()?, log)))
            .map_err(|error| fault(&FileError::io("open", &trace.log())(error)))?;
        let HelperCommand { program, arguments } = &self.settings.helper;
        let mut command = Command::new(program);
        child_environment::without_secrets(command.as_std_mut());
        let mut child = command
            .args(arguments)
            .arg("--trace-dir")
            .arg(trace.folder())
            .stdin(Stdio::null())
            .stdout(log.0)
            .stderr(log.1)
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| {
                Failure::new(format!("could not start the launch helper {}: {error}", program.display()))
            })?;
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let key = &working.key;
            match child.wait().await {
                Ok(status) if status.success() => drop(working.shared.state().helpers.remove(key)),
                Ok(status) => {
                    let failure = Failure::new(format!("its launch helper ended with {status}"));
                    working.shared.helper_failed(key, failure.with_remedy(format!("see {}", trace.log().display())));
                }
                Err(error) => {
                    let failure = Failure::new(format!("its launch helper could not be waited for: {error}"));
                    working.shared.helper_failed(key, failure);
                }
            }
            drop(working);
        });
        drop(tasks);
        self.shared.bump();
        Ok(())
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
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.spawn(async move {
            if let Err(failure) = nitro_cli.terminate_enclave(&id).await {
                tracing::warn!("{key}: {failure}");
            }
        });
    }
}

impl Supervisor for Direct {
    async fn observe(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>) -> Outcome<BTreeMap<EnclaveKey, Instance>> {
        let version = *self.shared.version.borrow();
        let scanner = self.scanner(known);
        let scan = match blocking(move || scanner.scan()).await.flatten() {
            Ok(scan) => scan,
            Err(failure) => {
                // What was watched before is watched on; and it is looked again in a while, not at once.
                let mut state = self.shared.state();
                state.seen = version;
                state.look_again = Some(LOOK_AGAIN);
                return Err(failure);
            }
        };
        self.take_over(&scan, version);
        for key in &scan.unresolved {
            // Traces of an attempt on which nobody works any more: the helper finds out what came of it.
            if let Some(working) = Working::begin(&self.shared, key)
                && let Err(failure) = self.start_helper(working)
            {
                self.shared.helper_failed(key, failure);
            }
        }
        Ok(scan.instances)
    }

    async fn launch(&self, launch: &Launch) -> Outcome<()> {
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
            host_lock: self.settings.run_dir.join("launch.lock"),
        };
        let Some(working) = Working::begin(&self.shared, &launch.key) else { return Ok(()) };
        let folder = self.folder.clone();
        if !blocking(move || make_trace(&folder, &spec)).await?.map_err(|error| fault(&error))? {
            return Ok(());
        }
        if let Err(failure) = self.start_helper(working) {
            // Nothing was started, so there must be no traces of it.
            let (folder, key) = (self.folder.clone(), launch.key.clone());
            blocking(move || remove_trace(&folder, &key)).await??;
            return Err(failure);
        }
        Ok(())
    }

    async fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> Outcome<()> {
        let look = |error: io::Error| {
            Failure::new(format!("could not look at the process {} of {key}: {error}", launch.process.pid))
        };
        let Some(process) = Pidfd::open(launch.process).map_err(look)? else {
            self.shared.state().stops.remove(key);
            return Ok(());
        };
        let trace = self.trace(key);
        let noted = self.shared.state().stops.get(key).copied();
        let noting = blocking(move || {
            // An unreadable file only makes the escalation begin anew.
            let noted = noted.or_else(|| trace.read(stop::FILE).ok().flatten());
            let (step, next) = stop::next(noted, now());
            let written = if noted != Some(next) && trace.folder().exists() {
                atomic_file::write_json(&trace.folder().join(stop::FILE), &next)
            } else {
                Ok(())
            };
            (step, next, written)
        });
        let (step, next, written) = noting.await?;
        if let Err(error) = written {
            // A full disk must not keep an enclave from being ended: only after a restart it is asked from the beginning.
            tracing::warn!("{key}: that it is asked to end can't be noted: {}", fault(&error));
        }
        self.shared.state().stops.insert(key.clone(), next);
        let sent = match step {
            StopStep::Wait => Ok(()),
            StopStep::Ask => process.send(rustix::process::Signal::TERM),
            StopStep::Terminate => {
                tracing::warn!("{key}: process {} does not end; asking nitro-cli", launch.process.pid);
                self.terminate(key, launch);
                Ok(())
            }
            StopStep::Kill => {
                tracing::error!("{key}: process {} does not end; killing it", launch.process.pid);
                process.send(rustix::process::Signal::KILL)
            }
        };
        sent.map_err(|error| {
            Failure::new(format!("could not signal the process {} of {key}: {error}", launch.process.pid))
                .with_remedy("it runs as another user: end it by hand, with `nitro-cli terminate-enclave`")
        })?;
        // It is asked, which is what counts; one that takes its time is seen to end by whoever watches it.
        let _ended_or_late = tokio::time::timeout(STOP_WAIT, process.ended()).await;
        Ok(())
    }

    async fn describe(&self, launched: &[Launched]) -> Outcome<BTreeMap<EnclaveKey, Option<Failure>>> {
        crate::describe::describe(&NitroCli::new(&self.settings.nitro_cli), launched).await
    }

    async fn forget(&self, key: &EnclaveKey) -> Outcome<()> {
        let (folder, trace) = (self.folder.clone(), self.trace(key));
        let name = key.clone();
        let refused = move |why: String| Failure::new(format!("the traces of {name} are not removed: {why}"));
        let Some(working) = Working::begin(&self.shared, key) else {
            return Err(refused("its launch helper is at work".to_owned()));
        };
        // The mark goes with the work: it stays until that is done, even if nobody waits for it any more.
        let removed = blocking(move || {
            scan::check_over(&trace).map_err(refused)?;
            remove_trace(&folder, &working.key)
        });
        removed.await??;
        let mut state = self.shared.state();
        state.stops.remove(key);
        state.overdue.remove(key);
        state.helpers.remove(key);
        Ok(())
    }

    async fn changed(&self) {
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

/// Makes the folder of a launch, whole: what is in it is on disk before its name is there. False if there is one.
fn make_trace(folder: &Path, spec: &LaunchSpec) -> Result<bool, FileError> {
    let trace = folder.join(spec.key.to_string());
    let hidden = folder.join(format!("{HIDDEN}new-{}", spec.key));
    match fs::remove_dir_all(&hidden) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(FileError::io("remove", &hidden)(error)),
    }
    fs::DirBuilder::new().mode(0o700).create(&hidden).map_err(FileError::io("make folder", &hidden))?;
    Trace::new(&hidden).write_spec(spec)?;
    // The folder of a launch is never empty, and a rename replaces only an empty one.
    match fs::rename(&hidden, &trace) {
        Ok(()) => atomic_file::sync_folder(folder).map(|()| true),
        Err(_) if trace.exists() => Ok(false),
        Err(error) => Err(FileError::io("make folder", &trace)(error)),
    }
}

/// Removes the traces of a launch; half-removed ones are never seen.
fn remove_trace(folder: &Path, key: &EnclaveKey) -> Outcome<()> {
    let trace = folder.join(key.to_string());
    let hidden = folder.join(format!("{HIDDEN}gone-{key}"));
    let removed = (|| {
        if hidden.exists() {
            fs::remove_dir_all(&hidden).map_err(FileError::io("remove", &hidden))?;
        }
        match fs::rename(&trace, &hidden) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(FileError::io("remove", &trace)(error)),
        }
        atomic_file::sync_folder(folder)?;
        fs::remove_dir_all(&hidden).map_err(FileError::io("remove", &hidden))
    })();
    removed.map_err(|error| fault(&error))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| Failure::new(format!("looking at the traces of launches was cut off: {error}")))
}

fn fault(error: &FileError) -> Failure {
    Failure::from_error(error)
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

#[cfg(test)]
mod tests;
