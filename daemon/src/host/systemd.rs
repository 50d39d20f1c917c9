//! The supervisor for hosts with systemd: every launch is a unit of its own, `enclave@<key>.service`, whose helper is started,
//! and whose enclave is asked to end, over D-Bus. Deaths are noticed by the process, as without systemd; the unit tells a
//! little later how it ended.
//!
//! What it has in common with the other one stands in [`crate::launches`]. Units of which there are no traces are shown and
//! never touched.

use super::{Outcome, Supervisor};
use crate::journal;
use crate::launch::unit::ENDED_UNASKED;
use crate::launches::{Beside, LaunchSettings, Launches, Story, UNIT_PREFIX, reap, unit_name};
use crate::systemd_bus::{JobError, ServiceResult, SystemdBus, UnitState, Verb};
use enclaved_core::failure::Failure;
use enclaved_core::id::EnclaveKey;
use enclaved_core::ledger::LaunchRecord;
use enclaved_core::observed::{Instance, InstanceState};
use enclaved_core::plan::{Launch, Launched};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How long a look waits for systemd. What can be seen without it must not wait for it.
const LIST_PATIENCE: Duration = Duration::from_secs(2);
/// So long what systemd said of the units holds unless it sends news.
const LIST_AGE: Duration = Duration::from_secs(10);
/// So long systemd is not asked again after it did not answer.
const LIST_RETRY: Duration = Duration::from_secs(5);
/// How often, and how long after each other, is looked whether systemd begins to stop a unit.
const STOP_LOOKS: u32 = 10;
const STOP_LOOK: Duration = Duration::from_millis(50);
/// How many lines of a unit's journal are told: what the helper said of the launch, and whatever nitro-cli's process did.
const WORDS: u32 = 12;

/// The supervisor for hosts with systemd.
#[derive(Debug)]
pub struct Systemd {
    launches: Launches,
    bus: SystemdBus,
    /// Grows with news of the units.
    news: watch::Receiver<u64>,
    units: Arc<Mutex<Units>>,
    /// Ask how units fared. End with this process, which asks anew then.
    tasks: Mutex<JoinSet<()>>,
}

type States = BTreeMap<EnclaveKey, UnitState>;

/// What systemd said of the units.
#[derive(Debug, Default)]
struct Units {
    /// How they are, or why that is not known; when that was asked, and what of the news was known before.
    listed: Option<(Result<States, Failure>, Instant, u64)>,
    /// How many lists were asked for.
    lists: u64,
    /// Units whose start was asked for: since which list that is over, so that later ones show what came of it.
    started: BTreeMap<EnclaveKey, Option<u64>>,
    /// How units fared that failed.
    stories: BTreeMap<EnclaveKey, Story>,
    /// Strangers that were told of.
    strangers: BTreeSet<String>,
}

/// A unit that is being started; until a list was asked for after that, its helper counts as being at work.
struct Starting {
    units: Arc<Mutex<Units>>,
    key: EnclaveKey,
}

impl Starting {
    fn begin(units: &Arc<Mutex<Units>>, key: &EnclaveKey) -> Self {
        let mut state = lock(units);
        state.started.insert(key.clone(), None);
        state.stories.remove(key);
        Self { units: units.clone(), key: key.clone() }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let mut units = lock(&self.units);
        let lists = units.lists;
        units.listed = None;
        units.started.insert(self.key.clone(), Some(lists));
    }
}

impl Systemd {
    /// Makes the folders, and takes up whatever traces are there. Must be called where tokio runs.
    ///
    /// # Errors
    /// The folders can't be made, or `/proc` can't be read.
    pub fn new(settings: LaunchSettings, bus: SystemdBus) -> Outcome<Self> {
        let news = bus.changes(UNIT_PREFIX)?;
        let launches = Launches::new(settings)?;
        Ok(Self { launches, bus, news, units: Arc::default(), tasks: Mutex::default() })
    }

    /// How the units are, as far as systemd says so within a moment.
    async fn list(&self) -> Result<States, Failure> {
        let news = *self.news.borrow();
        let number = {
            let mut units = lock(&self.units);
            if let Some((states, at, known)) = &units.listed
                && at.elapsed() < (if states.is_ok() { LIST_AGE } else { LIST_RETRY })
                && *known == news
            {
                return states.clone();
            }
            units.lists += 1;
            units.lists
        };
        let listed = match tokio::time::timeout(LIST_PATIENCE, self.bus.units(UNIT_PREFIX)).await {
            Ok(Ok(units)) => Ok(self.keyed(units)),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::new(format!("systemd does not say within {LIST_PATIENCE:?} how its units are"))),
        };
        let mut units = lock(&self.units);
        if listed.is_ok() {
            // What was started before this list was asked for is in it.
            units.started.retain(|_, since| since.is_none_or(|since| since >= number));
        }
        units.listed = Some((listed.clone(), Instant::now(), news));
        listed
    }

    fn keyed(&self, units: BTreeMap<String, UnitState>) -> States {
        let mut states = States::new();
        for (name, state) in units {
            let key = name.strip_prefix(UNIT_PREFIX).and_then(|rest| rest.strip_suffix(".service"));
            match key.and_then(|key| key.parse().ok()) {
                Some(key) => drop(states.insert(key, state)),
                None if lock(&self.units).strangers.insert(name.clone()) => {
                    tracing::warn!("{name} is no unit of an enclave of this host by its name, and is left alone");
                }
                None => {}
            }
        }
        states
    }

    /// What is known beside the traces.
    fn beside(&self, listed: &Result<States, Failure>) -> Beside {
        drop(reap(&self.tasks));
        let no_units = States::new();
        let states = listed.as_ref().unwrap_or(&no_units);
        for (key, _) in states.iter().filter(|(_, state)| state.active == "failed" && state.job.is_none()) {
            if self.launches.trace(key).folder().exists() {
                self.ask_how_it_fared(key);
            }
        }
        let units = lock(&self.units);
        let with = |is: fn(&UnitState) -> bool| states.iter().filter(move |(_, state)| is(state)).map(|(key, _)| key);
        Beside {
            busy: with(is_at_work).chain(units.started.keys()).cloned().collect(),
            standing: with(|state| !is_over(state)).cloned().collect(),
            unseen: listed.as_ref().err().cloned(),
            stories: units.stories.clone(),
            exits_are_noted: true,
        }
    }

    /// Finds out, on the side, how a unit that failed fared.
    fn ask_how_it_fared(&self, key: &EnclaveKey) {
        if lock(&self.units).stories.contains_key(key) {
            return;
        }
        lock(&self.units).stories.insert(key.clone(), Story::Coming);
        let (bus, units, shared) = (self.bus.clone(), self.units.clone(), self.launches.shared.clone());
        let key = key.clone();
        reap(&self.tasks).spawn(async move {
            let unit = unit_name(&key);
            let (service, words) = tokio::join!(bus.service(&unit), journal::last_words(&unit, WORDS));
            let result = match service {
                Ok(service) => fared(&service),
                Err(failure) => failure.message,
            };
            let mut words = words.unwrap_or_else(|failure| {
                tracing::debug!("{key}: {failure}");
                Vec::new()
            });
            // That is what the words are put beside.
            words.retain(|line| !line.contains(ENDED_UNASKED));
            let mut units = lock(&units);
            // Unless it was started anew meanwhile.
            if units.stories.get(&key) == Some(&Story::Coming) {
                units.stories.insert(key, Story::Told { result, words });
            }
            drop(units);
            shared.bump();
        });
    }

    /// Has systemd start the unit of a launch; its helper does the rest.
    async fn start(&self, key: &EnclaveKey) -> Result<(), JobError> {
        let starting = Starting::begin(&self.units, key);
        let enqueued = self.bus.enqueue(Verb::Start, &unit_name(key)).await;
        drop(starting);
        self.launches.shared.bump();
        enqueued
    }

    /// Has systemd stop the unit of a launch.
    ///
    /// A job can wait for others, for as long as these take; so it is not waited for, and whether the unit begins to stop is seen.
    async fn ask_to_stop(&self, key: &EnclaveKey) -> Outcome<()> {
        let unit = unit_name(key);
        self.bus.enqueue(Verb::Stop, &unit).await.map_err(JobError::into_failure)?;
        for _ in 0..STOP_LOOKS {
            tokio::time::sleep(STOP_LOOK).await;
            let state = self.bus.unit(&unit).await?;
            if state.is_none_or(|state| state.active != "active") {
                return Ok(());
            }
        }
        Err(Failure::new("systemd has something else to do before"))
    }

    /// Units that run, or may, and of which there are no traces.
    fn strangers(&self, states: &States, instances: &mut BTreeMap<EnclaveKey, Instance>) {
        for (key, state) in states {
            let runs = ["active", "reloading", "activating", "deactivating"].contains(&state.active.as_str());
            if !runs || instances.contains_key(key) || self.launches.trace(key).folder().exists() {
                continue;
            }
            let unit = unit_name(key);
            let failure = Failure::new(format!("{unit} is {}, and enclaved has no traces of its launch", state.active))
                .with_remedy(format!("it is left alone; `systemctl stop {unit}` ends it"));
            if lock(&self.units).strangers.insert(unit) {
                tracing::warn!("{failure}");
            }
            instances.insert(key.clone(), Instance { generation: None, state: InstanceState::Unknown(failure) });
        }
    }
}

impl Supervisor for Systemd {
    async fn observe(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>) -> Outcome<BTreeMap<EnclaveKey, Instance>> {
        let listed = self.list().await;
        let beside = self.beside(&listed);
        let mut scan = self.launches.look(known, beside).await?;
        for key in &scan.unresolved {
            // Traces of an attempt on which nobody works any more: the helper finds out what came of it. If its unit ends
            // without that, it is started again only after a pause.
            let unit = unit_name(key);
            let failure = Failure::new(format!("{unit} was started again to find that out"))
                .with_remedy(format!("`journalctl -u {unit}` says what it found"));
            self.launches.shared.helper_failed(key, failure);
            if let Err(error) = self.start(key).await {
                self.launches.shared.helper_failed(key, error.into_failure());
            }
        }
        if let Ok(states) = &listed {
            self.strangers(states, &mut scan.instances);
        }
        Ok(scan.instances)
    }

    async fn launch(&self, launch: &Launch) -> Outcome<()> {
        let key = &launch.key;
        // There before the traces are: whoever sees these must not take the launch for cut off.
        let starting = Starting::begin(&self.units, key);
        let Some(working) = self.launches.begin(launch).await? else { return Ok(()) };
        let enqueued = self.bus.enqueue(Verb::Start, &unit_name(key)).await;
        drop(starting);
        let failure = match enqueued {
            Ok(()) => None,
            Err(JobError::NotRun(failure)) => {
                // Nothing was started, so there must be no traces of it.
                self.launches.take_back(key).await?;
                Some(failure)
            }
            // It may be started yet: what comes of that is seen.
            Err(JobError::Failed(failure) | JobError::Unknown(failure)) => {
                tracing::warn!("{key}: {failure}");
                None
            }
        };
        drop(working);
        failure.map_or(Ok(()), Err)
    }

    async fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> Outcome<()> {
        let Some(stopping) = self.launches.stop(key, launch).await? else { return Ok(()) };
        if stopping.ask {
            let listed = self.list().await;
            let in_unit = listed.as_ref().is_ok_and(|states| states.get(key).is_some_and(|unit| !is_over(unit)));
            let asked = match in_unit {
                // The unit could not tell it from a stop by hand, and the enclave would be held stopped.
                true if !stopping.noted => Err(Failure::new("its traces can't say that enclaved asks")),
                true => self.ask_to_stop(key).await,
                false => Err(listed.err().unwrap_or_else(|| Failure::new("it does not run in a unit of its own"))),
            };
            if let Err(failure) = asked {
                tracing::warn!("{key}: it is ended by a signal, not by systemd: {failure}");
                stopping.signal(Signal::TERM)?;
            }
        }
        stopping.wait().await;
        Ok(())
    }

    async fn describe(&self, launched: &[Launched]) -> Outcome<BTreeMap<EnclaveKey, Option<Failure>>> {
        self.launches.describe(launched).await
    }

    async fn forget(&self, key: &EnclaveKey) -> Outcome<()> {
        // First, because without traces nobody would come back to it.
        self.bus.reset_failed(&unit_name(key)).await?;
        self.launches.forget(key).await?;
        let mut units = lock(&self.units);
        units.stories.remove(key);
        units.started.remove(key);
        units.strangers.remove(&unit_name(key));
        Ok(())
    }

    async fn changed(&self) {
        let known = lock(&self.units).listed.as_ref().map(|(_, _, news)| *news);
        let mut news = self.news.clone();
        let news = async {
            // Its sender lives as long as the bus does; without it there is nothing to wait for.
            if news.wait_for(|news| known != Some(*news)).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // Cancel-safe: it begins anew with the next call.
            () = self.launches.changed() => {}
            // Cancel-safe: the number is compared, not consumed.
            () = news => {}
        }
    }
}

/// Whether the unit's helper is at work, or will be, or what its end leaves behind is still being noted.
fn is_at_work(state: &UnitState) -> bool {
    state.job.is_some() || ["activating", "deactivating", "reloading"].contains(&state.active.as_str())
}

/// Whether the unit runs nothing, and will run nothing unless it is started.
fn is_over(state: &UnitState) -> bool {
    state.job.is_none() && ["inactive", "failed"].contains(&state.active.as_str())
}

/// How a service fared, in words.
fn fared(service: &ServiceResult) -> String {
    let ServiceResult { result, code, status, .. } = service;
    match (code, spawn_error(*status)) {
        (1, Some(step)) => {
            format!("{result}, exit status {status}: systemd could not run its program, for want of {step}")
        }
        (1, None) => format!("{result}, exit status {status}"),
        (2 | 3, _) => format!("{result}, ended by signal {status}"),
        _ => result.clone(),
    }
}

/// What systemd could not do before it ran a program (systemd.exec(5), "Process Exit Codes").
fn spawn_error(status: i32) -> Option<&'static str> {
    Some(match status {
        200 => "its working directory (CHDIR)",
        203 => "the program itself (EXEC): is /usr/bin/enclaved there?",
        205 => "its resource limits (LIMITS)",
        208 | 209 | 222 => "its standard input or output (STDIN, STDOUT, STDERR)",
        216 => "its group (GROUP): is there a group ne?",
        217 => "its user (USER): is there a user enclaved?",
        218 => "its capabilities (CAPABILITIES)",
        219 => "its control group (CGROUP)",
        225 => "its network namespace (NETWORK)",
        226 => "its mount namespace (NAMESPACE): a folder that the unit names is missing?",
        227 => "no_new_privs (NO_NEW_PRIVILEGES)",
        228 => "its system call filter (SECCOMP)",
        232 => "its address families (ADDRESS_FAMILIES)",
        201..=245 => "what systemd.exec(5) says of that status",
        _ => return None,
    })
}

fn lock(units: &Mutex<Units>) -> MutexGuard<'_, Units> {
    // No code that holds it can leave it half-changed.
    units.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
