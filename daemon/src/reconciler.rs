//! The reconcile loop: observe, plan, record, act, repeat. It owns all control state and is the only writer of the
//! ledger. It decides nothing (that is `enclaved_core::plan`) and does nothing (that is `host`, through `jobs`).

use crate::asked::{Asked, FetchAnswer};
use crate::events::{Event, Events};
use crate::host::{Allocator, Clock, Host, ImageStore, LedgerStore, Outcome, ProxyLink, Supervisor, Surveyor};
use crate::jobs::{Done, Jobs};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::desired::{Desired, ImageRequest};
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, EnclaveKey, EnclaveName, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::ledger::{Change, HeldBy, ImageOutcome, Ledger, ProcessIdentity};
use enclaved_core::observed::{HealthReport, JobFailure, JobKey, Observation, Observed, ReserveEnded};
use enclaved_core::plan::{Plan, Step, plan, restart};
use enclaved_core::routes::ProxyReport;
use enclaved_core::status::{Facts, Problem, Status, status};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The loop looks at the host at least this often, whether or not anything woke it.
const TICK: Duration = Duration::from_secs(5);
/// A loop that has not made a report for so long hangs: a pass whose every part takes as long as it may is three times as fast.
const HANGS: Duration = Duration::from_secs(60);
/// An observation that takes longer is unknown in this pass.
const OBSERVE: Duration = Duration::from_secs(10);
/// A failure to remove something from the cache is forgotten when it was not repeated for so long.
const STALE: Duration = Duration::from_secs(60);
/// How long ending all enclaves may take beyond their drain time: longer than a supervisor takes to resort to force.
const TERMINATE: Duration = Duration::from_secs(120);
/// The shortest pause between two wake-ups by the same port: a port that cries all the time does not starve the rest.
const NUDGE: Duration = Duration::from_millis(10);

/// What can be asked of the loop.
#[derive(Debug)]
pub enum Command {
    /// Another configuration is in force from now on.
    Configure(Box<Desired>),
    /// Stop that enclave and keep it stopped. Answers once that is on disk, or why not.
    Hold(EnclaveName, oneshot::Sender<Result<(), String>>),
    /// Start it again.
    Release(EnclaveName, oneshot::Sender<Result<(), String>>),
    /// Take an enclave that is held in doubt as it is.
    Accept(EnclaveName, oneshot::Sender<Result<(), String>>),
    /// Fetch an image into the cache ahead of its use, or, unless it is to `begin`, tell how far that is. Answers at once.
    Fetch {
        /// Which.
        request: Box<ImageRequest>,
        /// Begin, also if it was fetched just now.
        begin: bool,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<FetchAnswer, String>>,
    },
    /// End every enclave, then stop the loop (`on_stop = "terminate"`).
    Terminate,
}

/// What the loop tells.
#[derive(Debug, Clone)]
pub struct Report {
    /// For people, Prometheus and the control plane.
    pub status: Status,
    /// The proxy's own report, for its counters.
    pub proxy: Option<ProxyReport>,
    /// Why what runs could not be seen: then nothing was adopted yet.
    pub unseen: Option<Failure>,
    /// When it was made, by the clock that never steps.
    pub made: tokio::time::Instant,
}

impl Report {
    /// Whether the loop still turned a moment ago; if not, for how long it has not.
    ///
    /// # Errors
    /// It hangs, for so long.
    pub fn turning(&self) -> Result<(), Duration> {
        let age = self.made.elapsed();
        if age < HANGS { Ok(()) } else { Err(age) }
    }
}

/// Why the loop ended though nobody asked it to. The process ends with it: enclaves and traffic go on, and the next
/// process adopts them.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// A job panicked.
    #[error("a job of the reconcile loop panicked; this is a bug")]
    Job(#[source] tokio::task::JoinError),
    /// Whoever wakes the loop ended.
    #[error("what wakes the reconcile loop ended; this is a bug")]
    Watcher(#[source] Option<tokio::task::JoinError>),
    /// Some enclaves did not end in time (`on_stop = "terminate"`).
    #[error("{left} enclaves did not end in time")]
    NotEnded {
        /// How many.
        left: usize,
    },
    /// Whoever sends commands is gone.
    #[error("the reconcile loop lost its commands; this is a bug")]
    CommandsClosed,
}

/// What the loop is given.
#[derive(Debug)]
pub struct Inputs {
    /// What is wanted at the start.
    pub desired: Desired,
    /// Which boot of the host this is.
    pub boot_id: BootId,
    /// What can be asked of the loop.
    pub commands: mpsc::Receiver<Command>,
    /// What goes into the status beside what the loop knows.
    pub facts: watch::Receiver<Facts>,
    /// Where the status goes.
    pub reports: watch::Sender<Option<Arc<Report>>>,
    /// Where events go.
    pub events: Events,
}

/// Runs the loop until `stop`.
///
/// # Errors
/// A bug; see [`LoopError`].
pub async fn run<H: Host>(host: Arc<H>, inputs: Inputs, stop: CancellationToken) -> Result<(), LoopError> {
    let Some((ledger, problem)) = load(&*host, &inputs, &stop).await else { return Ok(()) };
    let nudge = Arc::new(Notify::new());
    let mut watchers = JoinSet::new();
    watchers.spawn(watch_supervisor(Arc::clone(&host), Arc::clone(&nudge)));
    watchers.spawn(watch_proxy(Arc::clone(&host), Arc::clone(&nudge)));
    let state = Loop {
        host,
        boot_id: inputs.boot_id,
        desired: inputs.desired,
        commands: inputs.commands,
        facts: inputs.facts,
        reports: inputs.reports,
        events: inputs.events,
        ledger,
        ledger_problem: problem,
        jobs: Jobs::new(),
        images: BTreeMap::new(),
        refreshed: BTreeMap::new(),
        asked: Asked::default(),
        health: BTreeMap::new(),
        described: BTreeMap::new(),
        failed: BTreeMap::new(),
        succeeded: BTreeMap::new(),
        reserving: None,
        reserve_ended: None,
        unsaved: None,
        terminating: None,
    };
    state.run(watchers, &nudge, &stop).await
}

async fn watch_supervisor<H: Host>(host: Arc<H>, nudge: Arc<Notify>) {
    loop {
        host.supervisor().changed().await;
        nudge.notify_one();
        tokio::time::sleep(NUDGE).await;
    }
}

async fn watch_proxy<H: Host>(host: Arc<H>, nudge: Arc<Notify>) {
    loop {
        host.proxy().changed().await;
        nudge.notify_one();
        tokio::time::sleep(NUDGE).await;
    }
}

/// Loads the ledger, however long it takes: without it nothing may be done. `None` if stopped meanwhile.
async fn load<H: Host>(host: &H, inputs: &Inputs, stop: &CancellationToken) -> Option<(Ledger, Option<Failure>)> {
    let mut failures = 0;
    loop {
        let limited = tokio::time::timeout(OBSERVE, host.ledger().load());
        let loaded = tokio::select! {
            biased;
            // Dropping it loses nothing: loading changes nothing but the name of a file that can't be used.
            loaded = limited => loaded.unwrap_or_else(|_| Err(Failure::new("reading the ledger takes too long"))),
            () = stop.cancelled() => return None,
        };
        match loaded {
            Ok(loaded) => return Some((loaded.ledger, loaded.problem)),
            Err(failure) => {
                failures += 1;
                inputs.events.emit(&Event::LedgerUnavailable { failure: &failure });
                inputs.reports.send_replace(Some(Arc::new(blind(host, inputs, &failure))));
                tokio::select! {
                    biased;
                    // Both are plain waits.
                    () = tokio::time::sleep(restart::STEP.after(failures)) => {}
                    () = stop.cancelled() => return None,
                }
            }
        }
    }
}

/// The report while there is no ledger: nothing was looked at, and why.
fn blind<H: Host>(host: &H, inputs: &Inputs, failure: &Failure) -> Report {
    let observed = Observed {
        boot_id: inputs.boot_id.clone(),
        instances: Observation::Unknown(failure.clone()),
        pool: Observation::Unknown(failure.clone()),
        inventory: Observation::Unknown(failure.clone()),
        proxy: Observation::Unknown(failure.clone()),
        cache: Observation::Unknown(failure.clone()),
        refreshed: BTreeMap::new(),
        asked: BTreeSet::new(),
        ahead: BTreeSet::new(),
        images: BTreeMap::new(),
        health: BTreeMap::new(),
        described: BTreeMap::new(),
        running: BTreeSet::new(),
        failed: BTreeMap::new(),
        succeeded: BTreeMap::new(),
        reserve_ended: None,
    };
    let facts = inputs.facts.borrow().clone();
    let (ledger, plan, now) = (Ledger::default(), Plan::default(), host.clock().now());
    let mut status = status(&inputs.desired, &observed, &ledger, &plan, &facts, now);
    status.problems = facts.problems;
    status.problems.push(Problem { about: "ledger".to_owned(), failure: failure.clone() });
    Report { status, proxy: None, unseen: Some(failure.clone()), made: tokio::time::Instant::now() }
}

struct Loop<H: Host> {
    host: Arc<H>,
    boot_id: BootId,
    desired: Desired,
    commands: mpsc::Receiver<Command>,
    facts: watch::Receiver<Facts>,
    reports: watch::Sender<Option<Arc<Report>>>,
    events: Events,
    /// As it is on disk, or is to be there before anything else happens (`unsaved`).
    ledger: Ledger,
    ledger_problem: Option<Failure>,
    jobs: Jobs,
    images: BTreeMap<ImageRequest, VerifiedImage>,
    /// When each image's source was last asked, with success.
    refreshed: BTreeMap<ImageRequest, Timestamp>,
    /// What is fetched ahead of its use.
    asked: Asked,
    health: BTreeMap<EnclaveKey, HealthReport>,
    /// What nitro-cli said of what runs.
    described: BTreeMap<EnclaveKey, (ProcessIdentity, Option<Failure>)>,
    failed: BTreeMap<JobKey, JobFailure>,
    succeeded: BTreeMap<JobKey, Timestamp>,
    /// What the allocator is being asked for.
    reserving: Option<Reservation>,
    /// The last time that it was asked, once that is over.
    reserve_ended: Option<ReserveEnded>,
    /// The ledger in memory is not on disk: when that was noticed, how often it failed, why.
    unsaved: Option<JobFailure>,
    /// Every enclave is to end, and the loop with them, at this time at the latest.
    terminating: Option<tokio::time::Instant>,
}

impl<H: Host> Loop<H> {
    async fn run(
        mut self,
        mut watchers: JoinSet<()>,
        nudge: &Notify,
        stop: &CancellationToken,
    ) -> Result<(), LoopError> {
        loop {
            let started = tokio::time::Instant::now();
            let observed = self.observe().await;
            let plan = plan(&self.desired, &observed, &self.ledger, self.now());
            let again = self.carry_out(&plan).await;
            self.tell(&observed, &plan);
            self.events.emit(&Event::Pass { took: started.elapsed(), steps: plan.steps.len() });
            if let Some(latest) = self.terminating {
                let left = self.ledger.generations().count();
                if left == 0 {
                    return Ok(());
                }
                if tokio::time::Instant::now() >= latest {
                    return Err(LoopError::NotEnded { left });
                }
            }
            if stop.is_cancelled() {
                return Ok(());
            }
            if again {
                // Let others run between two passes, whatever the ports are made of.
                tokio::task::yield_now().await;
                continue;
            }
            self.wait(&plan, &mut watchers, nudge, stop).await?;
        }
    }

    fn now(&self) -> Timestamp {
        self.host.clock().now()
    }

    async fn observe(&self) -> Observed {
        let known =
            self.ledger.generations().filter_map(|(key, record)| Some((key, record.launch()?.clone()))).collect();
        let (instances, pool, inventory, proxy, cache) = tokio::join!(
            look("looking at the host's enclaves", self.host.supervisor().observe(&known)),
            look("looking at the host's enclave resources", self.host.allocator().observe()),
            look("looking at what the host is made of", self.host.surveyor().observe()),
            look("asking the proxy process", self.host.proxy().observe()),
            look("looking at the image cache", self.host.images().observe()),
        );
        Observed {
            boot_id: self.boot_id.clone(),
            instances,
            pool,
            inventory,
            proxy,
            cache,
            refreshed: self.refreshed.clone(),
            asked: self.asked.wanted().cloned().collect(),
            ahead: self.asked.fetched(self.now()),
            images: self.images.clone(),
            health: self.health.clone(),
            described: self.described.clone(),
            running: self.jobs.running().clone(),
            failed: self.failed.clone(),
            succeeded: self.succeeded.clone(),
            reserve_ended: self.reserve_ended.clone(),
        }
    }

    /// Carries out a plan as far as it goes; `true` if the next pass should follow at once.
    async fn carry_out(&mut self, plan: &Plan) -> bool {
        let now = self.now();
        let mut changed = false;
        for step in &plan.steps {
            if let Step::Record(change) = step
                && !self.keeps(change)
            {
                self.record(change.clone(), now);
                changed = true;
            }
        }
        if (changed || self.unsaved.is_some()) && !self.save().await {
            // No effect without its intent on disk (invariant 8).
            return false;
        }
        for step in &plan.steps {
            self.events.emit(&Event::Step { step });
            if let Step::Reserve { wish, .. } = step
                && !self.jobs.running().contains(&JobKey::Reserve)
            {
                self.reserving = Some(wish.clone());
            }
            self.jobs.start(&self.host, step);
        }
        changed
    }

    /// Ending everything with the process (`on_stop = "terminate"`) is not forgetting it: what an operator holds stopped
    /// is still held when the next process starts.
    fn keeps(&self, change: &Change) -> bool {
        self.terminating.is_some() && matches!(change, Change::Removed(_) | Change::ImageForgotten(_))
    }

    fn record(&mut self, change: Change, now: Timestamp) {
        self.events.emit(&Event::Changed { change: &change, ledger: &self.ledger });
        self.ledger.apply(change, now);
    }

    async fn save(&mut self) -> bool {
        if let Some(failed) = &self.unsaved
            && restart::pause_end(failed.at, restart::STEP.after(failed.count), self.now()).is_some()
        {
            return false;
        }
        let outcome = match tokio::time::timeout(OBSERVE, self.host.ledger().save(&self.ledger)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::new("writing the ledger takes too long")),
        };
        match outcome {
            Ok(()) => {
                self.unsaved = None;
                true
            }
            Err(failure) => {
                self.events.emit(&Event::LedgerUnavailable { failure: &failure });
                let count = self.unsaved.as_ref().map_or(0, |failed| failed.count).saturating_add(1);
                self.unsaved = Some(JobFailure { at: self.now(), count, failure });
                false
            }
        }
    }

    fn tell(&mut self, observed: &Observed, plan: &Plan) {
        let mut facts = self.facts.borrow().clone();
        facts.fetches = self.jobs.fetches();
        let ledger_problems = self.ledger_problem.iter().chain(self.unsaved.as_ref().map(|failed| &failed.failure));
        let problem = |failure: &Failure| Problem { about: "ledger".to_owned(), failure: failure.clone() };
        facts.problems.extend(ledger_problems.map(problem));
        let status = status(&self.desired, observed, &self.ledger, plan, &facts, self.now());
        let unseen = match &observed.instances {
            Observation::Known(_) => None,
            Observation::Unknown(failure) => Some(failure.clone()),
        };
        let proxy = observed.proxy.known().cloned();
        let report = Report { status, proxy, unseen, made: tokio::time::Instant::now() };
        self.reports.send_replace(Some(Arc::new(report)));
    }

    /// Waits until there is a reason for another pass.
    async fn wait(
        &mut self,
        plan: &Plan,
        watchers: &mut JoinSet<()>,
        nudge: &Notify,
        stop: &CancellationToken,
    ) -> Result<(), LoopError> {
        let mut pause = plan.wake_at.map_or(TICK, |at| at.since(self.now()).min(TICK));
        if let Some(failed) = &self.unsaved {
            pause = pause.min(failed.at.plus(restart::STEP.after(failed.count)).since(self.now()));
        }
        let got_on = self.jobs.got_on();
        tokio::select! {
            // In this order, so that the same things happening make the same passes: simulations can be repeated. Nothing
            // starves, for jobs end only as often as passes start them.
            biased;
            // `ended` is cancel-safe: a job that has ended is reported by the next call.
            ended = self.jobs.ended() => {
                let (key, outcome) = ended.map_err(LoopError::Job)?;
                self.job_ended(key, outcome);
            }
            // `recv` is cancel-safe.
            command = self.commands.recv() => match command {
                Some(command) => self.obey(command).await,
                None => return Err(LoopError::CommandsClosed),
            },
            // A permit that is not consumed stays.
            () = nudge.notified() => {}
            // Cancel-safe: one that has ended is reported by the next call. They never end by themselves, and without them the loop
            // would go on, late for everything.
            ended = watchers.join_next() => return Err(LoopError::Watcher(ended.and_then(Result::err))),
            // A change that is not seen now is seen by the next call.
            changed = self.facts.changed() => {
                if changed.is_err() {
                    return Err(LoopError::CommandsClosed);
                }
            }
            // Looks at counters, which stay as they are: the pass tells how far downloads are.
            () = got_on => {}
            // Plain waits.
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
        Ok(())
    }

    fn job_ended(&mut self, key: JobKey, outcome: Outcome<Done>) {
        let at = self.now();
        let (outcome, ran) = match outcome {
            Ok(Done::NotReserved(not)) => (Err(not.failure), not.ran),
            outcome => (outcome, true),
        };
        self.events.emit(&Event::JobEnded { job: &key, outcome: &outcome });
        if key == JobKey::Reserve
            && let Some(wish) = self.reserving.take().filter(|_| ran)
        {
            self.reserve_ended = Some(ReserveEnded { wish, at });
        }
        match outcome {
            Ok(done) => {
                self.failed.remove(&key);
                self.succeeded.insert(key.clone(), at);
                match (key, done) {
                    (JobKey::Fetch(request), Done::Image(image)) => {
                        self.asked.ended(&request, Ok(&image), at);
                        // What a look at the source brought meanwhile is newer than what this one found in the cache.
                        if !self.is_outdated(&request, &image) {
                            self.images.insert(request, *image);
                        }
                    }
                    (JobKey::Refresh(request), done) => {
                        self.refreshed.insert(request.clone(), at);
                        if let Done::Image(image) = done {
                            self.failed.remove(&JobKey::Fetch(request.clone()));
                            self.images.insert(request, *image);
                        }
                    }
                    // Without its proof it is fetched again before anything is launched.
                    (_, Done::Spoilt(digest, _)) => self.images.retain(|_, image| image.digest() != digest),
                    (JobKey::Probe(key), Done::Health(result)) => {
                        let same = self.health.get(&key).filter(|last| last.result.is_ok() == result.is_ok());
                        let streak = same.map_or(1, |last| last.streak.saturating_add(1));
                        self.health.insert(key, HealthReport { at, result, streak });
                    }
                    (JobKey::Describe, Done::Described(described)) => self.described.extend(described),
                    _ => {}
                }
            }
            Err(failure) => {
                if let JobKey::Fetch(request) = &key
                    && self.asked.ended(request, Err(&failure), at)
                {
                    self.events.emit(&Event::FetchAheadFailed { request, failure: &failure });
                }
                let count = self.failed.get(&key).map_or(0, |failed| failed.count).saturating_add(1);
                self.failed.insert(key, JobFailure { at, count, failure });
            }
        }
        self.prune();
    }

    /// Whether another image of that request is in force than this one, and is at hand.
    fn is_outdated(&self, request: &ImageRequest, image: &VerifiedImage) -> bool {
        let Some(ImageOutcome::Verified { digest, .. }) = self.ledger.image(request) else { return false };
        let at_hand = self.images.get(request).is_some_and(|image| image.digest() == *digest);
        at_hand && *digest != image.digest()
    }

    /// Forgets what is about nothing any more, so that memory stays bounded by what is configured.
    fn prune(&mut self) {
        let now = self.now();
        self.succeeded.retain(|_, at| restart::pause_end(*at, restart::AGAIN, now).is_some());
        let (ledger, desired) = (&self.ledger, &self.desired);
        let wanted = |request: &ImageRequest| desired.enclaves.values().any(|spec| spec.image == *request);
        self.images.retain(|request, _| wanted(request));
        self.refreshed.retain(|request, _| wanted(request));
        self.health.retain(|key, _| ledger.generation(key).is_some());
        self.described.retain(|key, _| ledger.generation(key).is_some());
        self.failed.retain(|job, failed| match job {
            JobKey::Fetch(request) | JobKey::Refresh(request) => wanted(request),
            JobKey::Launch(key) | JobKey::Stop(key) | JobKey::Forget(key) | JobKey::Probe(key) => {
                ledger.generation(key).is_some()
            }
            // It is tried again much sooner, if it is still to go.
            JobKey::RemoveCached(_) => restart::pause_end(failed.at, STALE, now).is_some(),
            JobKey::Reserve | JobKey::StartProxy | JobKey::Publish | JobKey::Describe => true,
        });
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Configure(desired) => {
                if self.terminating.is_none() {
                    self.desired = *desired;
                    self.failed.remove(&JobKey::Publish);
                    self.failed.remove(&JobKey::Reserve);
                }
                self.prune();
            }
            Command::Hold(name, reply) => {
                let known = self.desired.enclaves.contains_key(&name) || self.ledger.enclaves.contains_key(&name);
                let answer = if known {
                    self.command(Change::Held { name, by: HeldBy::Enclavectl }).await
                } else {
                    Err(unknown(&name))
                };
                drop(reply.send(answer));
            }
            Command::Release(name, reply) => {
                let known = self.ledger.enclaves.contains_key(&name) || self.desired.enclaves.contains_key(&name);
                let answer = if known { self.command(Change::Released(name)).await } else { Err(unknown(&name)) };
                drop(reply.send(answer));
            }
            Command::Accept(name, reply) => {
                let doubt = self.ledger.enclaves.get(&name).map(|enclave| enclave.doubt().is_some());
                let answer = match doubt {
                    Some(true) => self.command(Change::Accepted(name)).await,
                    Some(false) => Err(format!("{name} is not held in doubt: there is nothing to decide")),
                    None => Err(unknown(&name)),
                };
                drop(reply.send(answer));
            }
            Command::Fetch { request, begin, reply } => {
                let fetching = self.jobs.fetches().get(&request).copied();
                drop(reply.send(self.asked.ask(&request, begin, fetching)));
            }
            Command::Terminate => {
                self.terminating = Some(tokio::time::Instant::now() + self.desired.host.drain + TERMINATE);
                self.desired.enclaves.clear();
            }
        }
    }

    /// A change that an operator asked for: he is told that it holds only when it is on disk.
    async fn command(&mut self, change: Change) -> Result<(), String> {
        let now = self.now();
        self.record(change, now);
        self.unsaved = None;
        if self.save().await {
            return Ok(());
        }
        let reason = self.unsaved.as_ref().map_or_else(String::new, |failed| failed.failure.to_string());
        Err(format!("the ledger could not be written, so this may not survive a restart: {reason}"))
    }
}

fn unknown(name: &EnclaveName) -> String {
    format!("there is no enclave \"{name}\"; `enclavectl status` lists them")
}

async fn look<T>(doing: &str, observation: impl Future<Output = Outcome<T>>) -> Observation<T> {
    match tokio::time::timeout(OBSERVE, observation).await {
        Ok(Ok(value)) => Observation::Known(value),
        Ok(Err(failure)) => Observation::Unknown(failure),
        Err(_) => {
            let limit = humantime::format_duration(OBSERVE);
            Observation::Unknown(Failure::new(format!("{doing} took longer than {limit}")))
        }
    }
}
