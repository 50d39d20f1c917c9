//! Every change that the ledger can undergo, what it is called for people, and how it is applied. Decides nothing: that a change is
//! right is the plan's to know.

use super::{
    EndRecord, GenerationRecord, HeldBy, Identity, ImageFacts, ImageOutcome, ImageRecord, LaunchRecord, Ledger, Phase,
    PoolTried, STABLE_AFTER, StopReason, Verdict,
};
use crate::allocator_file::Reservation;
use crate::desired::{EgressSpec, ImageRequest};
use crate::failure::Failure;
use crate::id::{BootId, Cid, EifDigest, EnclaveKey, EnclaveName, Measurements, Timestamp};
use std::fmt;

/// A change of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The host was booted.
    Booted(BootId),
    /// The allocator was asked for a pool, and that is over, with success or without.
    PoolTried {
        /// What it was asked for.
        wish: Reservation,
        /// When it was over.
        at: Timestamp,
    },
    /// An image was verified.
    ImageVerified {
        /// What was asked for.
        request: ImageRequest,
        /// The file's SHA-256.
        digest: EifDigest,
        /// Its measurements.
        measurements: Measurements,
        /// What else a launch must know of it.
        facts: ImageFacts,
    },
    /// An image could not be had.
    ImageFailed {
        /// What was asked for.
        request: ImageRequest,
        /// When it failed.
        at: Timestamp,
        /// Why.
        failure: Failure,
    },
    /// Nobody asks for that image any more.
    ImageForgotten(ImageRequest),
    /// A new generation gets its number and its CID.
    Planned {
        /// Which.
        key: EnclaveKey,
        /// Its CID.
        cid: Cid,
        /// What will run.
        identity: Identity,
        /// The image's measurements.
        measurements: Measurements,
        /// What it may reach.
        egress: Vec<EgressSpec>,
        /// Not to be launched earlier than this.
        not_before: Timestamp,
    },
    /// A launch of which the ledger knew nothing is taken over, from the supervisor's traces.
    Adopted {
        /// Which.
        key: EnclaveKey,
        /// As it was told to the supervisor.
        record: GenerationRecord,
    },
    /// What it may reach was configured anew.
    Endpoints {
        /// Which.
        key: EnclaveKey,
        /// What it may reach.
        egress: Vec<EgressSpec>,
    },
    /// The launch is decided.
    Launching(EnclaveKey),
    /// nitro-cli says that it runs.
    Booting {
        /// Which.
        key: EnclaveKey,
        /// Its process.
        launch: LaunchRecord,
    },
    /// It answered its health check.
    Ready(EnclaveKey),
    /// nitro-cli was asked what it is.
    Described {
        /// Which.
        key: EnclaveKey,
        /// In what that differs from what was launched.
        doubt: Option<Failure>,
    },
    /// An operator takes an enclave that is held in doubt as it is.
    Accepted(EnclaveName),
    /// It takes no new requests.
    Draining {
        /// Which.
        key: EnclaveKey,
        /// When it is stopped whatever is still under way.
        until: Timestamp,
        /// Why.
        why: StopReason,
    },
    /// It is to end now.
    Stopping {
        /// Which.
        key: EnclaveKey,
        /// Why.
        why: StopReason,
    },
    /// It is over.
    Ended {
        /// Which.
        key: EnclaveKey,
        /// What happened, if nobody asked for it.
        failure: Option<Failure>,
    },
    /// Nothing of it is left on the host.
    Forgotten(EnclaveKey),
    /// More came to be known of the last end that nobody asked for.
    Explained {
        /// Whose.
        key: EnclaveKey,
        /// What happened.
        failure: Failure,
    },
    /// It came to be known that somebody had asked for the last end that counted as a failure.
    Excused(EnclaveKey),
    /// An operator stops it.
    Held {
        /// Which.
        name: EnclaveName,
        /// By what.
        by: HeldBy,
    },
    /// An operator starts it again; earlier failures are forgiven.
    Released(EnclaveName),
    /// It is not wanted, and nothing of it is left.
    Removed(EnclaveName),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Booted(id) => write!(f, "note that the host was booted ({id})"),
            Self::PoolTried { wish, .. } => write!(f, "note that {wish} was tried in this boot"),
            Self::ImageVerified { request, digest, .. } => {
                write!(f, "note that {} is verified (sha256 {})", request.source, digest.short())
            }
            Self::ImageFailed { request, failure, .. } => write!(f, "note that {} failed: {failure}", request.source),
            Self::ImageForgotten(request) => write!(f, "forget image {}", request.source),
            Self::Planned { key, cid, .. } => write!(f, "plan {key} with CID {cid}"),
            Self::Adopted { key, .. } => write!(f, "adopt {key}"),
            Self::Endpoints { key, .. } => write!(f, "note the new endpoints of {key}"),
            Self::Launching(key) => write!(f, "decide to launch {key}"),
            Self::Booting { key, launch } => write!(f, "note that {key} runs as process {}", launch.process.pid),
            Self::Ready(key) => write!(f, "note that {key} is ready"),
            Self::Described { key, doubt: None } => write!(f, "note that nitro-cli describes {key} as it was launched"),
            Self::Described { key, doubt: Some(doubt) } => write!(f, "hold {key}: {doubt}"),
            Self::Accepted(name) => write!(f, "take {name} as it is"),
            Self::Draining { key, why, .. } => write!(f, "drain {key}: {why}"),
            Self::Stopping { key, why } => write!(f, "decide to stop {key}: {why}"),
            Self::Ended { key, failure: Some(failure) } => write!(f, "note that {key} ended: {failure}"),
            Self::Ended { key, failure: None } => write!(f, "note that {key} ended as asked"),
            Self::Forgotten(key) => write!(f, "forget {key}"),
            Self::Explained { key, failure } => write!(f, "note how {key} ended: {failure}"),
            Self::Excused(key) => write!(f, "note that {key} ended as asked after all"),
            Self::Held { name, by } => write!(f, "hold {name} stopped ({by})"),
            Self::Released(name) => write!(f, "release {name}"),
            Self::Removed(name) => write!(f, "forget {name}"),
        }
    }
}

impl Ledger {
    /// Applies one change, at time `now`. A change that no longer fits (its generation is gone) changes nothing.
    pub fn apply(&mut self, change: Change, now: Timestamp) {
        match change {
            Change::Booted(id) => {
                self.boot_id = Some(id);
                // Memory is in one piece again.
                self.pool = None;
                self.launched = false;
            }
            Change::PoolTried { wish, at } => {
                let before = self.pool.take();
                let row = before.as_ref().map_or(0, |tried| tried.in_a_row(at)).saturating_add(1);
                let same = before.filter(|tried| tried.wish == wish);
                let tries = same.map_or(0, |tried| tried.tries).saturating_add(1);
                self.pool = Some(PoolTried { wish, tries, at, row });
            }
            Change::ImageVerified { request, digest, measurements, facts } => {
                let facts = Some(facts);
                self.set_image(request, ImageOutcome::Verified { at: now, digest, measurements, facts });
            }
            Change::ImageFailed { request, at, failure } => {
                let count = match self.image(&request) {
                    Some(ImageOutcome::Failed { count, .. }) => count.saturating_add(1),
                    Some(ImageOutcome::Verified { .. }) | None => 1,
                };
                self.set_image(request, ImageOutcome::Failed { at, count, failure });
            }
            Change::ImageForgotten(request) => self.images.retain(|record| record.request != request),
            Change::Planned { key, cid, identity, measurements, egress, not_before } => {
                self.next_cid = cid.next();
                let enclave = self.enclaves.entry(key.name).or_default();
                enclave.last_generation = enclave.last_generation.max(key.generation);
                if enclave.last_end.as_ref().is_some_and(|end| end.identity != identity) {
                    enclave.failures = 0;
                }
                let phase = Phase::Planned { since: now, not_before };
                enclave
                    .generations
                    .insert(key.generation, GenerationRecord { cid, identity, measurements, egress, phase });
            }
            Change::Adopted { key, record } => {
                // Its traces are of this boot.
                self.launched = true;
                if record.cid >= self.next_cid {
                    self.next_cid = record.cid.next();
                }
                let enclave = self.enclaves.entry(key.name.clone()).or_default();
                enclave.last_generation = enclave.last_generation.max(key.generation);
                enclave.generations.insert(key.generation, record);
                self.note_image(&key);
            }
            Change::Endpoints { key, egress } => {
                let enclave = self.enclaves.get_mut(&key.name);
                if let Some(record) = enclave.and_then(|enclave| enclave.generations.get_mut(&key.generation)) {
                    record.egress = egress;
                }
            }
            Change::Launching(key) => {
                self.launched = true;
                self.set_phase(&key, |_| Phase::Launching { since: now });
            }
            Change::Booting { key, launch } => self.set_phase(&key, |_| Phase::Booting { since: now, launch }),
            Change::Ready(key) => {
                self.set_phase(&key, |record| match record.launch() {
                    Some(launch) => Phase::Ready { since: now, launch: launch.clone() },
                    None => record.phase.clone(),
                });
                self.note_image(&key);
            }
            Change::Described { key, doubt } => {
                if let Some(enclave) = self.enclaves.get_mut(&key.name)
                    && enclave.generations.contains_key(&key.generation)
                {
                    enclave.verdicts.insert(key.generation, Verdict { at: now, doubt, accepted: None });
                }
            }
            Change::Accepted(name) => {
                let verdicts =
                    self.enclaves.get_mut(&name).into_iter().flat_map(|enclave| enclave.verdicts.values_mut());
                for verdict in verdicts.filter(|verdict| verdict.doubt.is_some()) {
                    verdict.accepted.get_or_insert(now);
                }
            }
            Change::Draining { key, until, why } => self.set_phase(&key, |record| match record.launch() {
                Some(launch) => Phase::Draining { since: now, until, launch: launch.clone(), why },
                None => Phase::Stopping { since: now, launch: None, why },
            }),
            Change::Stopping { key, why } => {
                // It counts as long as it was ready, not as long as it takes to end.
                if self.is_stable(&key, now)
                    && let Some(enclave) = self.enclaves.get_mut(&key.name)
                {
                    enclave.failures = 0;
                }
                self.set_phase(&key, |record| Phase::Stopping { since: now, launch: record.launch().cloned(), why });
            }
            Change::Ended { key, failure } => self.end(&key, failure, now),
            Change::Forgotten(key) => {
                if let Some(enclave) = self.enclaves.get_mut(&key.name) {
                    enclave.generations.remove(&key.generation);
                    enclave.verdicts.remove(&key.generation);
                }
            }
            Change::Explained { key, failure } => {
                let end = self.enclaves.get_mut(&key.name).and_then(|enclave| enclave.last_end.as_mut());
                if let Some(end) = end.filter(|end| end.generation == key.generation) {
                    end.failure = failure;
                }
            }
            Change::Excused(key) => {
                if let Some(enclave) = self.enclaves.get_mut(&key.name)
                    && enclave.last_end.take_if(|end| end.generation == key.generation).is_some()
                {
                    enclave.failures = enclave.failures.saturating_sub(1);
                    enclave.restarts = enclave.restarts.saturating_sub(1);
                }
            }
            Change::Held { name, by } => {
                let enclave = self.enclaves.entry(name).or_default();
                if enclave.held_since.is_none() {
                    enclave.held_since = Some(now);
                    enclave.held_by = by;
                }
            }
            Change::Released(name) => {
                if let Some(enclave) = self.enclaves.get_mut(&name) {
                    enclave.held_since = None;
                    enclave.failures = 0;
                    enclave.last_end = None;
                }
            }
            Change::Removed(name) => {
                self.enclaves.remove(&name);
            }
        }
    }

    /// Notes the image of a generation that is ready.
    fn note_image(&mut self, key: &EnclaveKey) {
        let Some(enclave) = self.enclaves.get_mut(&key.name) else { return };
        let ready = enclave.generations.get(&key.generation).filter(|of| matches!(of.phase, Phase::Ready { .. }));
        let Some(image) = ready.map(|of| of.identity.image) else { return };
        if enclave.image != Some(image) {
            enclave.previous_image = enclave.image.replace(image);
        }
    }

    fn set_image(&mut self, request: ImageRequest, outcome: ImageOutcome) {
        match self.images.iter_mut().find(|record| record.request == request) {
            Some(record) => record.outcome = outcome,
            None => self.images.push(ImageRecord { request, outcome }),
        }
    }

    fn set_phase(&mut self, key: &EnclaveKey, phase: impl FnOnce(&GenerationRecord) -> Phase) {
        let enclave = self.enclaves.get_mut(&key.name);
        if let Some(record) = enclave.and_then(|enclave| enclave.generations.get_mut(&key.generation)) {
            record.phase = phase(record);
        }
    }

    /// Whether it has been ready long enough for earlier failures to be forgiven.
    fn is_stable(&self, key: &EnclaveKey, now: Timestamp) -> bool {
        let phase = self.generation(key).map(|record| &record.phase);
        matches!(phase, Some(Phase::Ready { since, .. }) if now.since(*since) >= STABLE_AFTER)
    }

    fn end(&mut self, key: &EnclaveKey, failure: Option<Failure>, now: Timestamp) {
        let stable = self.is_stable(key, now);
        let Some(enclave) = self.enclaves.get_mut(&key.name) else { return };
        let Some(record) = enclave.generations.get_mut(&key.generation) else { return };
        if matches!(record.phase, Phase::Ended { .. }) {
            return;
        }
        if let Some(failure) = failure {
            let ran = !matches!(record.phase, Phase::Planned { .. } | Phase::Launching { .. });
            enclave.failures = if stable { 1 } else { enclave.failures.saturating_add(1) };
            enclave.restarts = enclave.restarts.saturating_add(1);
            enclave.last_end =
                Some(EndRecord { generation: key.generation, at: now, identity: record.identity, ran, failure });
        }
        record.phase = Phase::Ended { at: now };
    }
}
