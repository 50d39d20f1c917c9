//! What happens, once: an event is both a log line and a metric, and both are made here.
//!
//! Levels: `warn` means "look sometime", `error` means "act now".

use crate::host::Outcome;
use crate::jobs::Done;
use crate::metrics::Metrics;
use enclaved_core::desired::ImageRequest;
use enclaved_core::diagnosis::Finding;
use enclaved_core::failure::Failure;
use enclaved_core::ledger::{Change, Ledger};
use enclaved_core::observed::JobKey;
use enclaved_core::plan::Step;
use std::time::Duration;
use tracing::{debug, error, info, warn};

/// Where events go. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    metrics: Metrics,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A pass of the loop ended.
    Pass {
        /// How long observing, planning and recording took.
        took: Duration,
        /// How many steps the plan had.
        steps: usize,
    },
    /// The ledger is about to change.
    Changed {
        /// How.
        change: &'a Change,
        /// As it was before.
        ledger: &'a Ledger,
    },
    /// A step is taken.
    Step {
        /// Which.
        step: &'a Step,
    },
    /// A job ended.
    JobEnded {
        /// Which.
        job: &'a JobKey,
        /// How.
        outcome: &'a Outcome<Done>,
    },
    /// What was to be fetched ahead of its use could not be had.
    FetchAheadFailed {
        /// Which image.
        request: &'a ImageRequest,
        /// Why.
        failure: &'a Failure,
    },
    /// The ledger could not be read or written.
    LedgerUnavailable {
        /// Why.
        failure: &'a Failure,
    },
    /// A configuration was read and is in force.
    Configured {
        /// Its fingerprint.
        revision: &'a str,
    },
    /// A configuration was refused; the last good one stays in force.
    ConfigRefused {
        /// Why.
        reason: &'a str,
    },
    /// A check of the host fails that did not before.
    CheckFailed {
        /// What it found.
        finding: &'a Finding,
    },
    /// A check of the host does not fail any more.
    CheckPassed {
        /// Which, and about what.
        name: &'a str,
    },
    /// A status report was taken by the control plane, or was not.
    ControlPlane {
        /// Why not.
        failure: Option<&'a Failure>,
        /// Whether the report before this one had the same fate: then it is no news.
        same_as_before: bool,
    },
}

impl Events {
    /// Events go to the log and to these metrics.
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics }
    }

    /// Logs and counts it.
    pub fn emit(&self, event: &Event<'_>) {
        match event {
            Event::Pass { took, steps } => {
                self.metrics.pass(*took);
                if *steps > 0 {
                    debug!(?took, steps, "pass");
                }
            }
            Event::Changed { change, ledger } => self.changed(change, ledger),
            Event::Step { step } => Self::step(step),
            Event::JobEnded { job, outcome } => self.job_ended(job, outcome),
            Event::FetchAheadFailed { request, failure } => {
                warn!(image = %request.source, "not fetched ahead: {failure}");
            }
            Event::LedgerUnavailable { failure } => {
                self.metrics.ledger_failure();
                error!("{failure}; nothing is launched or stopped until the ledger can be kept");
            }
            Event::Configured { revision } => {
                self.metrics.reload(true);
                info!(revision, "configuration is in force");
            }
            Event::ConfigRefused { reason } => {
                self.metrics.reload(false);
                error!("the configuration is refused, the last good one stays in force: {reason}");
            }
            Event::CheckFailed { finding } => error!("{}", finding.to_failure()),
            Event::CheckPassed { name } => info!("the check {name} does not fail any more"),
            Event::ControlPlane { failure, same_as_before } => {
                self.metrics.control_plane(failure.is_none());
                match failure {
                    Some(failure) if !same_as_before => warn!("{failure}"),
                    None if !same_as_before => info!("the control plane takes status reports"),
                    Some(_) | None => {}
                }
            }
        }
    }

    fn changed(&self, change: &Change, ledger: &Ledger) {
        match change {
            Change::Booted(boot_id) => info!(%boot_id, "first pass in this boot of the host"),
            Change::ImageVerified { request, digest, measurements, .. } => {
                info!(image = %request.source, sha256 = %digest, pcr0 = %measurements.pcr0, "image is verified");
            }
            Change::ImageFailed { request, failure, .. } => error!(image = %request.source, "{failure}"),
            Change::Planned { key, cid, not_before, .. } => {
                info!(enclave = %key, %cid, %not_before, "generation is planned")
            }
            Change::Adopted { key, record } => {
                warn!(enclave = %key, cid = %record.cid, "adopted from the host's traces: the ledger did not know it");
            }
            Change::Launching(key) => {
                if let Some(of) = ledger.generation(key) {
                    let (cpus, memory) = (of.identity.cpus, of.identity.memory);
                    info!(enclave = %key, cid = %of.cid, cpus, %memory, "launching");
                }
            }
            Change::Booting { key, launch } => {
                info!(enclave = %key, id = launch.enclave_id, pid = launch.process.pid, "launched, waiting until it is ready");
            }
            Change::Ready(key) => info!(enclave = %key, "ready"),
            Change::Draining { key, why, until } => info!(enclave = %key, %until, "draining: {why}"),
            Change::Stopping { key, why } => info!(enclave = %key, "stopping: {why}"),
            Change::Ended { key, failure } => {
                let launched =
                    ledger.generation(key).is_some_and(enclaved_core::ledger::GenerationRecord::holds_resources);
                match failure {
                    Some(failure) => error!(enclave = %key, "ended: {failure}"),
                    None => info!(enclave = %key, "ended"),
                }
                if launched {
                    self.metrics.end(key.name.as_str(), failure.is_none());
                }
            }
            Change::Described { key, doubt: Some(doubt) } => {
                warn!(enclave = %key.name, %key, "held as it is, an operator has to decide: {doubt}");
            }
            Change::Accepted(name) => info!(enclave = %name, "taken as it is by an operator"),
            Change::Excused(key) => info!(enclave = %key, "somebody had asked for its end: it did not fail"),
            Change::Explained { key, failure } => info!(enclave = %key, "how it ended: {failure}"),
            Change::Held { name, by } => info!(enclave = %name, "held stopped by an operator ({by})"),
            Change::Released(name) => info!(enclave = %name, "released by an operator"),
            Change::PoolTried { .. }
            | Change::Described { doubt: None, .. }
            | Change::Endpoints { .. }
            | Change::ImageForgotten(_)
            | Change::Forgotten(_)
            | Change::Removed(_) => debug!("{change}"),
        }
    }

    fn step(step: &Step) {
        match step {
            Step::Fetch { request, .. } => info!(image = %request.source, "fetching the image"),
            Step::RemoveCached(_) => info!("{step}"),
            Step::StartProxy => info!("starting the proxy process"),
            Step::Reserve { .. } => info!("{step}"),
            // The change of the ledger before a launch or a stop is its line.
            Step::Launch(_) | Step::Stop { .. } => debug!("{step}"),
            Step::Describe(_) => debug!("{step}"),
            Step::Record(_) | Step::Refresh { .. } | Step::Publish(_) | Step::Forget(_) | Step::Probe { .. } => {
                debug!("{step}")
            }
        }
    }

    fn job_ended(&self, job: &JobKey, outcome: &Outcome<Done>) {
        let (name, about) = match job {
            JobKey::Fetch(request) => ("fetch", request.source.to_string()),
            JobKey::Refresh(request) => ("refresh", request.source.to_string()),
            JobKey::RemoveCached(item) => ("remove_cached", item.to_string()),
            JobKey::Reserve => ("reserve", String::new()),
            JobKey::StartProxy => ("start_proxy", String::new()),
            JobKey::Publish => ("publish", String::new()),
            JobKey::Launch(key) => ("launch", key.to_string()),
            JobKey::Stop(key) => ("stop", key.to_string()),
            JobKey::Forget(key) => ("forget", key.to_string()),
            JobKey::Probe(key) => ("probe", key.to_string()),
            JobKey::Describe => ("describe", String::new()),
        };
        self.metrics.job(name, outcome.is_ok());
        if *job == JobKey::Reserve {
            self.metrics.allocator_run(outcome.is_ok());
        }
        match outcome {
            Ok(Done::Spoilt(_, failure)) => {
                warn!(enclave = about, "not launched, its image is fetched again: {failure}");
            }
            Ok(Done::Health(Err(error))) => debug!(enclave = about, "health probe: {error}"),
            Ok(_) => debug!(job = name, about, "done"),
            // The plan records it, and that is logged.
            Err(_) if matches!(job, JobKey::Fetch(_)) => {}
            Err(failure) => warn!(job = name, about, "{failure}"),
        }
    }
}
