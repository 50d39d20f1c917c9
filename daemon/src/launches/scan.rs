//! One look at the traces of all launches and at the processes they tell of. Writes only what was found out for good: the
//! time of an end, and that a launch was cut off before it began.

use super::account::{account, last_words};
use super::{Beside, HIDDEN, LOOK_AGAIN, Shared, Story, fault};
use crate::atomic_file::FileError;
use crate::host::Outcome;
use crate::launch_trace::{self, Failed, LaunchSpec, Moment, Trace};
use crate::launches::unit_name;
use crate::nitro_cli::Mark;
use crate::procfs;
use crate::stop_notes::StopNotes;
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, EnclaveKey, Timestamp};
use enclaved_core::ledger::{LaunchRecord, ProcessIdentity};
use enclaved_core::observed::{AskedBy, End, Instance, InstanceState};
use enclaved_core::plan::restart::{Backoff, pause_end};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Pauses before asking again what runs, where nitro-cli could not say.
const RESOLVE_PAUSES: Backoff = Backoff::new(Duration::from_secs(15), Duration::from_secs(600));
/// A launch is noted within this time after its process was started, whatever was done to the clock in small steps.
const CLOCK_SLACK: Duration = Duration::from_secs(5);
/// An end is told without an account of it after this time; its unit may take much longer to be done with it.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(10);
/// The kernel keeps so many bytes of an executable's name.
const NAME_LEN: usize = 15;

/// What a look needs to know.
#[derive(Debug)]
pub(crate) struct Scanner {
    pub(crate) folder: PathBuf,
    pub(crate) notes: StopNotes,
    pub(crate) boot_id: BootId,
    pub(crate) nitro_cli: PathBuf,
    /// The processes that the ledger knows.
    pub(crate) known: BTreeMap<EnclaveKey, LaunchRecord>,
    /// Has the launches on which this process works just now: their helpers may not have the lock yet.
    pub(crate) shared: Arc<Shared>,
    /// What the supervisor knows beside the traces.
    pub(crate) beside: Beside,
    pub(crate) now: Timestamp,
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) instances: BTreeMap<EnclaveKey, Instance>,
    /// Processes whose end is a change.
    pub(crate) watch: Vec<ProcessIdentity>,
    /// How soon to look again even if none of them ends.
    pub(crate) look_again: Option<Duration>,
    /// Launches that need a helper to find out what became of them.
    pub(crate) unresolved: Vec<EnclaveKey>,
    /// Launches that take longer than they can, and what to say of them.
    pub(crate) overdue: Vec<(EnclaveKey, String)>,
}

impl Scan {
    fn look_within(&mut self, pause: Duration) {
        self.look_again = Some(self.look_again.map_or(pause, |earlier| earlier.min(pause)));
    }
}

impl Scanner {
    /// Looks at everything. What can't be read of one launch leaves that one unknown, and the others as they are.
    ///
    /// # Errors
    /// The launches can't be listed: then nothing is known.
    pub(crate) fn scan(&self) -> Outcome<Scan> {
        let mut scan = Scan::default();
        for key in self.keys()? {
            let trace = Trace::new(self.folder.join(key.to_string()));
            if let Some(instance) = self.see(&key, &trace, &mut scan) {
                scan.instances.insert(key, instance);
            }
        }
        self.noted(&mut scan)?;
        self.known_alive(&mut scan);
        Ok(scan)
    }

    /// Launches of which a reboot has left nothing but the note that they were stopped by hand.
    /// Without them nothing is known: what is to stay stopped would be launched.
    fn noted(&self, scan: &mut Scan) -> Outcome<()> {
        for key in self.notes.keys().map_err(|error| fault(&error))? {
            let end = End { asked: Some(AskedBy::Stop), ..End::noticed(self.now) };
            scan.instances.entry(key).or_insert(Instance { generation: None, state: InstanceState::Ended(end) });
        }
        Ok(())
    }

    /// What can be seen of that launch; `None` if it was forgotten since it was listed.
    pub(crate) fn see(&self, key: &EnclaveKey, trace: &Trace, scan: &mut Scan) -> Option<Instance> {
        let seen = self.instance(key, trace, scan);
        if !trace.folder().exists() {
            // What was read of it is half of the truth.
            scan.unresolved.retain(|unresolved| unresolved != key);
            return None;
        }
        Some(seen.unwrap_or_else(|failure| {
            scan.look_within(LOOK_AGAIN);
            Instance { generation: None, state: InstanceState::Unknown(not_known(key, failure)) }
        }))
    }

    fn instance(&self, key: &EnclaveKey, trace: &Trace, scan: &mut Scan) -> Outcome<Instance> {
        let spec = match trace.spec() {
            // Another launch's file, or a later version's, is no spec of this one.
            Ok(spec) => spec.filter(|spec| spec.key == *key && spec.format == launch_trace::FORMAT),
            Err(error) if error.is_about_contents() => None,
            Err(error) => return Err(fault(&error)),
        };
        let state = self.state(key, trace, spec.as_ref(), scan).unwrap_or_else(|failure| {
            scan.look_within(LOOK_AGAIN);
            InstanceState::Unknown(not_known(key, failure))
        });
        Ok(Instance { generation: spec.map(|spec| spec.generation), state })
    }

    fn keys(&self) -> Outcome<Vec<EnclaveKey>> {
        let failed = |error| fault(&FileError::io("list", &self.folder)(error));
        let mut keys = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let name = name.to_string_lossy();
            match name.parse() {
                Ok(key) => keys.push(key),
                Err(_) if name.starts_with(HIDDEN) => {}
                Err(error) => tracing::debug!("{} is left alone: {error}", self.folder.join(&*name).display()),
            }
        }
        Ok(keys)
    }

    /// How far that launch is.
    fn state(
        &self,
        key: &EnclaveKey,
        trace: &Trace,
        spec: Option<&LaunchSpec>,
        scan: &mut Scan,
    ) -> Outcome<InstanceState> {
        let outcome = |trace: &Trace| trace.outcome().map_err(|error| fault(&error));
        let same_boot = |boot_id: &BootId| *boot_id == self.boot_id;
        match outcome(trace)? {
            launch_trace::Outcome::Ran(ran) => return self.ran(key, trace, ran.boot_id, ran.launch, scan),
            launch_trace::Outcome::Failed(failed) => return Ok(self.failed(key, trace, failed)),
            launch_trace::Outcome::Attempted(_) | launch_trace::Outcome::Nothing => {}
        }
        if spec.is_some_and(|spec| !same_boot(&spec.boot_id)) {
            return self.end(key, trace, scan);
        }
        if let Ok(Some(_)) = trace.end() {
            // Whoever works on it removes it.
            return self.end(key, trace, scan);
        }
        if self.works_on(key) {
            return Ok(match self.between_tries(key, trace)? {
                Some(failure) => {
                    scan.look_within(LOOK_AGAIN);
                    InstanceState::Unknown(not_known(key, failure))
                }
                None => self.launching(key, trace, spec, scan),
            });
        }
        let Some(_lock) = trace.try_lock().map_err(|error| fault(&error))? else {
            return Ok(self.launching(key, trace, spec, scan));
        };
        if let Some(failure) = self.beside.unseen.clone().filter(|_| !trace.is_over()) {
            scan.look_within(LOOK_AGAIN);
            return Ok(InstanceState::Unknown(not_known(key, failure)));
        }
        // Nobody works on it, and nobody can begin to: only now is what the traces say the last word.
        match outcome(trace)? {
            launch_trace::Outcome::Ran(ran) => self.ran(key, trace, ran.boot_id, ran.launch, scan),
            launch_trace::Outcome::Failed(failed) => Ok(self.failed(key, trace, failed)),
            launch_trace::Outcome::Nothing => {
                let failure = match self.beside.stories.get(key) {
                    // Whoever tells it wakes.
                    Some(Story::Coming) => return Ok(InstanceState::Launching),
                    Some(Story::Told { result, words }) => Failure::new(format!(
                        "its unit {} failed before nitro-cli was run: {result}{}",
                        unit_name(key),
                        last_words(words)
                    ))
                    .with_remedy(format!("see `journalctl -u {}`", unit_name(key))),
                    None => Failure::new("the launch was cut off before nitro-cli was run"),
                };
                let failed = Failed { at: self.now, count: 1, failure };
                trace.write_failure(&failed).map_err(|error| fault(&error))?;
                Ok(self.failed(key, trace, failed))
            }
            launch_trace::Outcome::Attempted(_) => self.attempted(key, trace, spec, scan),
        }
    }

    /// nitro-cli was begun to be run, nobody works on it any more, and the traces do not say what came of it.
    fn attempted(
        &self,
        key: &EnclaveKey,
        trace: &Trace,
        spec: Option<&LaunchSpec>,
        scan: &mut Scan,
    ) -> Outcome<InstanceState> {
        match self.known.get(key) {
            // The ledger knows: it came to run.
            Some(launch) if self.runs(launch)? => {
                scan.watch.push(launch.process);
                Ok(InstanceState::Running(launch.clone()))
            }
            Some(_) => self.end(key, trace, scan),
            None if spec.is_none() => {
                let failure =
                    Failure::new(format!("it can't be found out whether {key} runs: its traces are unreadable"));
                let remedy = format!(
                    "see whether `nitro-cli describe-enclaves` lists {key}; if not, remove {}",
                    trace.folder().display()
                );
                Ok(InstanceState::Unknown(failure.with_remedy(remedy)))
            }
            None => self.unresolved(key, trace, scan),
        }
    }

    fn ran(
        &self,
        key: &EnclaveKey,
        trace: &Trace,
        boot_id: BootId,
        launch: LaunchRecord,
        scan: &mut Scan,
    ) -> Outcome<InstanceState> {
        if boot_id == self.boot_id && alive(launch.process)? {
            scan.watch.push(launch.process);
            return Ok(InstanceState::Running(launch));
        }
        self.end(key, trace, scan)
    }

    /// It is over: since when is noted once.
    fn end(&self, key: &EnclaveKey, trace: &Trace, scan: &mut Scan) -> Outcome<InstanceState> {
        let noted = match trace.end() {
            Err(error) if error.is_about_contents() => None,
            other => other.map_err(|error| fault(&error))?,
        };
        let at = match noted {
            Some(end) => end.at,
            None => {
                trace.write_end(&Moment { at: self.now }).map_err(|error| fault(&error))?;
                self.now
            }
        };
        let mut end = End { asked: self.asked(key, trace), ..End::noticed(at) };
        if self.beside.exits_are_noted && self.is_of_this_boot(trace) {
            // It was noticed by its process; its unit notes a moment later how that ended, and who asked for it.
            let exit = trace.exit().ok().flatten();
            let story = self.beside.stories.get(key);
            end.settled = self.is_at_rest(key) && story != Some(&Story::Coming);
            let late = pause_end(at, ACCOUNT_PATIENCE, self.now).is_none();
            if end.settled || late {
                end.account = account(exit.as_ref(), story);
            }
            if !end.settled {
                scan.look_within(LOOK_AGAIN);
            }
        }
        Ok(InstanceState::Ended(end))
    }

    /// The launch failed.
    fn failed(&self, key: &EnclaveKey, trace: &Trace, failed: Failed) -> InstanceState {
        let (asked, settled) = (self.asked(key, trace), self.is_at_rest(key));
        InstanceState::Ended(End { launch_failure: Some(failed.failure), asked, settled, ..End::noticed(failed.at) })
    }

    /// Whether its unit, if it has one, does nothing any more: until then more may be noted, and it may yet come to be seen as
    /// failed.
    fn is_at_rest(&self, key: &EnclaveKey) -> bool {
        let Beside { unseen, busy, standing, .. } = &self.beside;
        unseen.is_none() && !busy.contains(key) && !standing.contains(key)
    }

    /// Who asked for its end, if enclaved did not: in this boot, or in a former one by hand.
    fn asked(&self, key: &EnclaveKey, trace: &Trace) -> Option<AskedBy> {
        // What can't be read is as good as not there: an end that nobody asked for is the one that leads to a launch.
        let asked = trace.asked().ok().flatten().filter(|asked| asked.boot_id == self.boot_id);
        let by_hand = || self.notes.is_noted(key).is_ok_and(|noted| noted).then_some(AskedBy::Stop);
        asked.map(|asked| asked.by).or_else(by_hand)
    }

    fn is_of_this_boot(&self, trace: &Trace) -> bool {
        trace.spec().ok().flatten().is_some_and(|spec| spec.boot_id == self.boot_id)
    }

    fn works_on(&self, key: &EnclaveKey) -> bool {
        self.beside.busy.contains(key) || self.shared.state().working.contains(key)
    }

    /// Why the helper of a unit, which stays while a process of its launch lives, could not find out what came of that; `None` while
    /// it tries to.
    fn between_tries(&self, key: &EnclaveKey, trace: &Trace) -> Outcome<Option<Failure>> {
        if !self.beside.busy.contains(key) || self.shared.state().working.contains(key) {
            return Ok(None);
        }
        let failed = match trace.resolve() {
            Err(error) if error.is_about_contents() => None,
            failed => failed.map_err(|error| fault(&error))?,
        };
        let Some(Failed { failure, .. }) = failed else { return Ok(None) };
        let idle = trace.try_lock().map_err(|error| fault(&error))?.is_some();
        // By now it may be known.
        Ok((idle && !trace.is_over()).then_some(failure))
    }

    fn launching(&self, key: &EnclaveKey, trace: &Trace, spec: Option<&LaunchSpec>, scan: &mut Scan) -> InstanceState {
        // The end of a helper that is a child of this process is noticed without this.
        if !self.works_on(key) {
            match trace.helper() {
                Ok(Some(helper)) => scan.watch.push(helper),
                // It has only just begun.
                Ok(None) | Err(_) => scan.look_within(LOOK_AGAIN),
            }
        }
        if let Some(spec) = spec.filter(|spec| self.now.since(spec.at) > spec.patience()) {
            let text = format!(
                "its launch has been under way for longer than nitro-cli may take ({} s); nitro-cli hangs, or waits behind another launch; see {}",
                spec.patience_s,
                trace.log().display()
            );
            scan.overdue.push((key.clone(), text));
        }
        InstanceState::Launching
    }

    /// An attempt of which it is not known what came of it.
    fn unresolved(&self, key: &EnclaveKey, trace: &Trace, scan: &mut Scan) -> Outcome<InstanceState> {
        if self.asked(key, trace).is_some() && trace.exit().is_ok_and(|exit| exit.is_some()) {
            // Not to be started again to find out what came of it, as long as that is certain without.
            let look = |error| Failure::new(format!("could not look for processes of its launch: {error}"));
            if !Mark(trace.folder().to_owned()).is_alive().map_err(look)? {
                let failure = Failure::new("its unit was stopped while it was being launched");
                let failed = Failed { at: self.now, count: 1, failure };
                trace.write_failure(&failed).map_err(|error| fault(&error))?;
                return Ok(self.failed(key, trace, failed));
            }
        }
        if let Some((pause, failure)) = self.shared.helper_pause(key) {
            scan.look_within(pause);
            return Ok(InstanceState::Unknown(not_known(key, failure)));
        }
        let failed = match trace.resolve() {
            Ok(failed) => failed,
            Err(error) if error.is_about_contents() => None,
            Err(error) => return Err(fault(&error)),
        };
        if let Some(Failed { at, count, failure }) = failed
            && let Some(end) = pause_end(at, RESOLVE_PAUSES.after(count), self.now)
        {
            scan.look_within(end.since(self.now));
            return Ok(InstanceState::Unknown(not_known(key, failure)));
        }
        scan.unresolved.push(key.clone());
        Ok(InstanceState::Launching)
    }

    /// What the ledger knows and the traces do not show: an enclave whose process runs is running, whatever was lost.
    fn known_alive(&self, scan: &mut Scan) {
        for (key, launch) in &self.known {
            let shown = scan.instances.get(key).map(|instance| &instance.state);
            if matches!(shown, Some(InstanceState::Running(_))) {
                continue;
            }
            let state = match self.runs(launch) {
                Ok(false) => continue,
                Ok(true) => {
                    scan.watch.push(launch.process);
                    InstanceState::Running(launch.clone())
                }
                Err(failure) => {
                    scan.look_within(LOOK_AGAIN);
                    InstanceState::Unknown(not_known(key, failure))
                }
            };
            let generation = scan.instances.remove(key).and_then(|instance| instance.generation);
            scan.instances.insert(key.clone(), Instance { generation, state });
        }
    }

    /// Whether the process that the ledger knows runs. The ledger does not say in which boot it was launched, and PIDs and
    /// start times can come again after a reboot; so it must have been launched after the boot (by a clock that may have
    /// been set since), or be a nitro-cli by name.
    fn runs(&self, launch: &LaunchRecord) -> Outcome<bool> {
        let look = |error| Failure::new(format!("could not look at process {}: {error}", launch.process.pid));
        let Some(process) = procfs::process(launch.process.pid).map_err(look)? else { return Ok(false) };
        if process.identity != launch.process {
            return Ok(false);
        }
        let started = procfs::boot_time().map_err(look)?.plus(procfs::started_after_boot(process.identity));
        let name = self.nitro_cli.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let named = name.as_bytes().get(..NAME_LEN).unwrap_or(name.as_bytes()) == process.name.as_bytes();
        Ok(named || launch.at.plus(CLOCK_SLACK) >= started)
    }
}

/// Why the traces of a launch must stay: it is not over.
pub(crate) fn check_over(trace: &Trace) -> Result<(), String> {
    if !trace.folder().exists() {
        return Ok(());
    }
    let unread = |error: FileError| Failure::from_error(&error).message;
    let Some(_lock) = trace.try_lock().map_err(unread)? else { return Err("its launch helper is at work".to_owned()) };
    match trace.outcome().map_err(unread)? {
        launch_trace::Outcome::Ran(ran) => {
            let this_boot = procfs::boot_id().map_err(|error| error.to_string())? == ran.boot_id;
            if this_boot && procfs::is_alive(ran.launch.process).map_err(|error| error.to_string())? {
                return Err(format!("its process {} runs", ran.launch.process.pid));
            }
            Ok(())
        }
        launch_trace::Outcome::Failed(_) | launch_trace::Outcome::Nothing => Ok(()),
        launch_trace::Outcome::Attempted(_) => match trace.end() {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => Err("it is not known yet what came of its launch".to_owned()),
        },
    }
}

fn alive(process: ProcessIdentity) -> Outcome<bool> {
    procfs::is_alive(process)
        .map_err(|error| Failure::new(format!("could not look at process {}: {error}", process.pid)))
}

fn not_known(key: &EnclaveKey, failure: Failure) -> Failure {
    let message = Failure::new(format!("it is not known whether {key} runs: {}", failure.message)).message;
    Failure { message, ..failure }
}
