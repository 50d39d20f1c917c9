//! What to do next: a pure function of what is wanted, what is there, what is remembered, and the time.
//!
//! Every pass of the loop makes a plan from scratch; a plan is carried out as far as it goes, and the next pass sees
//! what came of it. A step is taken only from a ledger that is on disk: where a step cannot be repeated, the plan first
//! records the intent and takes the step in the next pass (invariant 8).

pub mod admission;
mod describe;
mod enclave;
mod images;
pub mod pool;
pub mod restart;
pub mod routing;

use crate::allocator_file::Reservation;
use crate::desired::{Desired, HealthCheck, ImageRequest};
use crate::id::{Cid, EifDigest, EnclaveKey, EnclaveName, Measurements, MemoryMib, Timestamp};
use crate::image::VerifiedImage;
use crate::ledger::{Change, GenerationRecord, LaunchRecord, Ledger, Phase};
use crate::observed::{CacheItem, Instance, InstanceState, JobKey, Observation, Observed};
use crate::routes::Routes;
use restart::Backoff;
use std::collections::BTreeMap;
use std::fmt;

/// What to do now, and when to look again.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// The next point in time at which a plan would differ though nothing else changed.
    pub wake_at: Option<Timestamp>,
    /// What each enclave waits for, where it waits.
    pub waits: BTreeMap<EnclaveName, String>,
    /// What becomes of the host's enclave pool.
    pub pool: pool::PoolPlan,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Change the ledger. All changes of a plan are on disk before its first effect.
    Record(Change),
    /// Fetch an image and verify it.
    Fetch {
        /// Which.
        request: ImageRequest,
        /// Where it is looked for first.
        prefer: Prefer,
    },
    /// Ask an image's source whether it has something else by now; if so, fetch and verify that.
    Refresh {
        /// Which.
        request: ImageRequest,
        /// What it came to, as far as the ledger knows.
        known: EifDigest,
        /// The most memory of the enclaves that watch it: an image for which that is too little is no news.
        memory: MemoryMib,
    },
    /// Remove something from the image cache.
    RemoveCached(CacheItem),
    /// Have the allocator change the pool. No enclave runs.
    Reserve {
        /// What is asked for.
        wish: Reservation,
        /// What is asked for if that can't be had; `None`: no enclave needs any.
        least: Option<Reservation>,
    },
    /// Start the proxy process.
    StartProxy,
    /// Hand the routes to the proxy.
    Publish(Routes),
    /// Launch a generation.
    Launch(Box<Launch>),
    /// End a generation.
    Stop {
        /// Which.
        key: EnclaveKey,
        /// Its process, as the supervisor saw it in this pass.
        launch: LaunchRecord,
    },
    /// Remove the traces of a generation that is over.
    Forget(EnclaveKey),
    /// Probe a generation's health.
    Probe {
        /// Which.
        key: EnclaveKey,
        /// Where.
        cid: Cid,
        /// How.
        check: HealthCheck,
    },
    /// Ask nitro-cli what runs, and compare it with these.
    Describe(Vec<Launched>),
}

/// A generation that runs, as it was launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    /// Which.
    pub key: EnclaveKey,
    /// Its CID.
    pub cid: Cid,
    /// The image's measurements.
    pub measurements: Measurements,
    /// Debug mode.
    pub debug: bool,
    /// Its process.
    pub launch: LaunchRecord,
}

/// Where an image is looked for first, where a request may come to several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefer {
    /// The cache has the image that the ledger knows. Anything else there may have come since, and is not for this fetch.
    Known(EifDigest),
    /// The cache has what the request came to last.
    Cached,
    /// The source is asked whether that is what it has now.
    Source,
}

/// All that is needed to launch one generation. It holds a [`VerifiedImage`]: nothing else can be launched.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Which.
    pub key: EnclaveKey,
    /// Its record, as it stands in the ledger.
    pub record: GenerationRecord,
    /// The proven image.
    pub image: VerifiedImage,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(change) => change.fmt(f),
            Self::Fetch { request, .. } => write!(f, "fetch and verify {}", request.source),
            Self::Refresh { request, .. } => write!(f, "ask {} for a new image", request.source),
            Self::RemoveCached(item) => write!(f, "remove {item} from the cache"),
            Self::Reserve { wish, least } => {
                write!(f, "ask the allocator for {wish} in all")?;
                match least {
                    Some(least) if least != wish => write!(f, ", at the least {least}"),
                    _ => Ok(()),
                }
            }
            Self::StartProxy => f.write_str("start the proxy process"),
            Self::Publish(routes) => write!(f, "publish routes {}", routes.revision()),
            Self::Launch(launch) => write!(
                f,
                "launch {} with CID {}, {} CPUs and {}",
                launch.key, launch.record.cid, launch.record.identity.cpus, launch.record.identity.memory
            ),
            Self::Stop { key, launch } => write!(f, "stop {key} (process {})", launch.process.pid),
            Self::Forget(key) => write!(f, "remove the traces of {key}"),
            Self::Probe { key, .. } => write!(f, "probe {key}"),
            Self::Describe(launched) => {
                let keys: Vec<_> = launched.iter().map(|launched| launched.key.to_string()).collect();
                write!(f, "ask nitro-cli whether {} is what was launched", keys.join(", "))
            }
        }
    }
}

/// Makes the plan. Total: it gives a plan for every input.
pub fn plan(desired: &Desired, observed: &Observed, ledger: &Ledger, now: Timestamp) -> Plan {
    let routes = routing::routes(desired, ledger);
    let mut planner = Planner {
        desired,
        observed,
        ledger,
        now,
        routes,
        launching: false,
        verdict: pool::verdict(desired, observed, ledger),
        pool_changes: false,
        plan: Plan::default(),
    };
    planner.launching = planner.someone_is_launching();
    // Only together with a look at what the boot left: what is gone then was ended by it.
    if ledger.boot_id.as_ref() != Some(&observed.boot_id) && observed.instances.known().is_some() {
        planner.record(Change::Booted(observed.boot_id.clone()));
    }
    planner.pool();
    planner.images();
    planner.enclaves();
    planner.describe();
    planner.proxy();
    planner.refresh();
    planner.collect_images();
    planner.plan
}

/// One making of a plan.
struct Planner<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    ledger: &'a Ledger,
    now: Timestamp,
    /// The routes that this ledger asks for.
    routes: Routes,
    /// Somebody is between the decision to launch and the word of nitro-cli. Launches are serial: there is one
    /// heartbeat port.
    launching: bool,
    /// What the host has, where it could be looked at.
    verdict: Option<pool::Verdict>,
    /// The pool is being changed, or is to be by this plan.
    pool_changes: bool,
    plan: Plan,
}

impl Planner<'_> {
    fn someone_is_launching(&self) -> bool {
        // nitro-cli is not at work on what cannot be judged: that is found out only after it has ended.
        let unknown = |key: &EnclaveKey| {
            let instance = self.observed.instances.known().and_then(|all| all.get(key));
            instance.is_some_and(|instance| matches!(instance.state, InstanceState::Unknown(_)))
        };
        let in_ledger = self
            .ledger
            .generations()
            .any(|(key, record)| matches!(record.phase, Phase::Launching { .. }) && !unknown(&key));
        let on_host = self
            .observed
            .instances
            .known()
            .is_some_and(|all| all.values().any(|instance| matches!(instance.state, InstanceState::Launching)));
        in_ledger || on_host
    }

    fn record(&mut self, change: Change) {
        self.plan.steps.push(Step::Record(change));
    }

    /// Nothing more to do before that time.
    fn wake(&mut self, at: Timestamp) {
        if at > self.now {
            self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |earlier| earlier.min(at)));
        }
    }

    fn wait(&mut self, name: &EnclaveName, reason: impl Into<String>) {
        self.plan.waits.insert(name.clone(), reason.into());
    }

    /// Takes the step, unless its job is at work, or failed just now and pauses.
    fn job(&mut self, job: &JobKey, backoff: Backoff, step: Step) {
        if self.observed.running.contains(job) {
            return;
        }
        if let Some(failed) = self.observed.failed.get(job)
            && let Some(again) = restart::pause_end(failed.at, backoff.after(failed.count), self.now)
        {
            return self.wake(again);
        }
        let slow = matches!(job, JobKey::Stop(_) | JobKey::Forget(_) | JobKey::Launch(_) | JobKey::StartProxy);
        if slow
            && let Some(last) = self.observed.succeeded.get(job)
            && let Some(again) = restart::pause_end(*last, restart::AGAIN, self.now)
        {
            return self.wake(again);
        }
        self.plan.steps.push(step);
    }

    /// Whether the proxy serves exactly the routes that the ledger asks for.
    fn routes_applied(&self) -> bool {
        let revision = self.routes.revision();
        self.observed.proxy.known().is_some_and(|report| report.revision == Some(revision))
    }

    /// Whether the ledger knows every enclave that runs, or may run: not if its file was lost, or the supervisor has not
    /// been heard.
    fn ledger_is_complete(&self) -> bool {
        self.observed.instances.known().is_some_and(|all| {
            let over = |instance: &Instance| matches!(instance.state, InstanceState::Ended(_));
            all.iter().all(|(key, instance)| over(instance) || self.ledger.generation(key).is_some())
        })
    }

    fn proxy(&mut self) {
        if matches!(self.observed.proxy, Observation::Unknown(_)) {
            self.job(&JobKey::StartProxy, restart::STEP, Step::StartProxy);
            return;
        }
        // Routes are made from the ledger. As long as it may lack an enclave that runs, publishing them could cut that
        // enclave off.
        if self.ledger_is_complete() && !self.routes_applied() {
            let routes = self.routes.clone();
            self.job(&JobKey::Publish, restart::STEP, Step::Publish(routes));
        }
    }

    fn enclaves(&mut self) {
        let (desired, ledger) = (self.desired, self.ledger);
        let names: std::collections::BTreeSet<_> = desired.enclaves.keys().chain(ledger.enclaves.keys()).collect();
        let instances = match &self.observed.instances {
            Observation::Known(instances) => instances,
            Observation::Unknown(failure) => {
                for name in names {
                    self.wait(name, format!("the host's enclaves cannot be seen: {}", failure.message));
                }
                return;
            }
        };
        let strangers = instances.keys().map(|key| &key.name).filter(|name| !names.contains(name));
        let strangers: std::collections::BTreeSet<_> = strangers.collect();
        for name in names.iter().chain(&strangers) {
            self.enclave(name, instances);
        }
    }
}
