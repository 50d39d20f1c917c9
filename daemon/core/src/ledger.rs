//! The ledger: what enclaved remembers over restarts of itself and of the host, and every change it can undergo.
//!
//! It is the record of intent (invariant 8): it is on disk before a step that cannot be repeated. It changes only by
//! [`Ledger::apply`]. Reading and writing it is the daemon's `host::ledger_file`.

pub use crate::image_record::{ImageFacts, ImageOutcome, ImageRecord};

use crate::allocator_file::Reservation;
use crate::desired::{EgressSpec, ImageRequest};
use crate::failure::Failure;
use crate::id::{BootId, Cid, EifDigest, EnclaveKey, EnclaveName, Generation, Measurements, MemoryMib, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// The [`Ledger::format`] that this version writes. It reads this one and all before it.
///
/// An earlier version, after a rollback, reads what a later one wrote in the same format: fields that it does not know are ignored, and
/// lost with its next save. So whoever adds a field that must not be ignored, or a phase, raises the number. What an enclave
/// may reach and what an image must measure are read strictly all the same ([`EgressSpec`], [`ImageRequest`], [`Measurements`]): to
/// ignore a part of these would allow more than was asked for. The same holds for the traces of a launch.
pub const LEDGER_FORMAT: u32 = 1;

/// An enclave that was ready for this long before it died starts its next series of failures from the beginning.
pub const STABLE_AFTER: Duration = Duration::from_secs(600);

/// Everything that is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Version of this format.
    pub format: u32,
    /// The boot in which it was last written.
    pub boot_id: Option<BootId>,
    /// The next CID to give away.
    pub next_cid: Cid,
    /// Every enclave that is wanted, or of which something is left.
    pub enclaves: BTreeMap<EnclaveName, EnclaveRecord>,
    /// What image requests came to.
    pub images: Vec<ImageRecord>,
    /// What the allocator was last asked for in this boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolTried>,
    /// Whether any launch was decided in this boot. From then on the pool changes only for an enclave that has no room otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub launched: bool,
}

/// Tries of the allocator that follow each other within this time are a row.
const ROW: Duration = Duration::from_secs(3600);

/// The allocator's tries for one pool, in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolTried {
    /// What it was asked for.
    pub wish: Reservation,
    /// How often, with success or without.
    pub tries: u32,
    /// When the last try was over.
    pub at: Timestamp,
    /// How many tries in a row that was, whatever for.
    #[serde(default)]
    pub row: u32,
}

impl PoolTried {
    /// How many tries in a row there were, as far as they still matter.
    pub fn in_a_row(&self, now: Timestamp) -> u32 {
        if in_a_row(self.at, now) { self.row.max(1) } else { 0 }
    }
}

/// Whether what was tried then and what is tried now follow each other.
pub(crate) fn in_a_row(then: Timestamp, now: Timestamp) -> bool {
    now.since(then) < ROW
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            format: LEDGER_FORMAT,
            boot_id: None,
            next_cid: Cid::FIRST,
            enclaves: BTreeMap::new(),
            images: Vec::new(),
            pool: None,
            launched: false,
        }
    }
}

/// One enclave over all its generations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnclaveRecord {
    /// Since when an operator keeps it stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_since: Option<Timestamp>,
    /// By what they stopped it.
    #[serde(default)]
    pub held_by: HeldBy,
    /// The highest generation number ever given away; 0 before the first.
    pub last_generation: Generation,
    /// How often it ended unasked, in all.
    pub restarts: u64,
    /// How often it ended unasked in the current series; decides the pause before the next launch.
    pub failures: u32,
    /// The last end that nobody asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<EndRecord>,
    /// The image that was ready last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<EifDigest>,
    /// The other image that was ready before that one: where an operator goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_image: Option<EifDigest>,
    /// The generations of which something is left.
    pub generations: BTreeMap<Generation, GenerationRecord>,
    /// What nitro-cli's own description said of those that run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub verdicts: BTreeMap<Generation, Verdict>,
}

/// What nitro-cli's description of a running enclave says beside what was launched. It is asked once for each launch: asking loads
/// every enclave's process, and the first answer can take as long as hashing the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// When it was asked.
    pub at: Timestamp,
    /// In what it differs from what was launched; `None` if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<Failure>,
    /// An operator takes it as it is, since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<Timestamp>,
}

/// How an operator came to hold an enclave stopped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldBy {
    /// `enclavectl stop`.
    #[default]
    Enclavectl,
    /// `systemctl stop` of its unit.
    Systemctl,
}

impl fmt::Display for HeldBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enclavectl => "enclavectl stop",
            Self::Systemctl => "systemctl stop",
        })
    }
}

/// An end that nobody asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// Which generation ended.
    pub generation: Generation,
    /// When that was noticed.
    pub at: Timestamp,
    /// What was running.
    pub identity: Identity,
    /// Whether it ran at all; otherwise its launch failed.
    pub ran: bool,
    /// What happened.
    pub failure: Failure,
}

/// What makes two generations the same: a change of any of these needs a new launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The image.
    pub image: EifDigest,
    /// vCPUs.
    pub cpus: u32,
    /// Memory as asked for (nitro-cli may give more).
    pub memory: MemoryMib,
    /// Debug mode.
    pub debug: bool,
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationRecord {
    /// Its vsock CID.
    pub cid: Cid,
    /// What runs.
    pub identity: Identity,
    /// The image's measurements, computed by us from the file.
    pub measurements: Measurements,
    /// What it may reach. It follows the configuration as long as that asks for this image and size; a generation that is
    /// being replaced keeps what it had, so that it can do its work until its successor serves.
    pub egress: Vec<EgressSpec>,
    /// How far it is.
    pub phase: Phase,
}

/// How far a generation is.
///
/// | phase | egress | ingress | enclave process | left by |
/// |---|---|---|---|---|
/// | Planned | open | no | none | launch, or a changed mind |
/// | Launching | open | no | perhaps | what the supervisor sees |
/// | Booting | open | no | yes | first good probe, death, stop |
/// | Ready | open | yes | yes | death, stop |
/// | Draining | open | old connections only | yes | drained, deadline, death |
/// | Stopping | open | no | perhaps | its end being seen |
/// | Ended | only until its successor is planned | no | none | its traces removed |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// It has a number and a CID; the proxy can listen for it.
    Planned {
        /// Since when.
        since: Timestamp,
        /// Not to be launched earlier than this.
        not_before: Timestamp,
    },
    /// The launch was decided; whether it happened is for the supervisor to say.
    Launching {
        /// Since when.
        since: Timestamp,
    },
    /// nitro-cli says that it runs.
    Booting {
        /// Since when.
        since: Timestamp,
        /// Its process.
        launch: LaunchRecord,
    },
    /// It answered its health check.
    Ready {
        /// Since when.
        since: Timestamp,
        /// Its process.
        launch: LaunchRecord,
    },
    /// It takes no new requests; those under way may finish.
    Draining {
        /// Since when.
        since: Timestamp,
        /// When it is stopped whatever is still under way.
        until: Timestamp,
        /// Its process.
        launch: LaunchRecord,
        /// Why it is to end.
        why: StopReason,
    },
    /// It is to end now.
    Stopping {
        /// Since when.
        since: Timestamp,
        /// Its process, if it has one: what runs is found by it even if every other trace of it is lost.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        launch: Option<LaunchRecord>,
        /// Why.
        why: StopReason,
    },
    /// It is over.
    Ended {
        /// When that was noticed.
        at: Timestamp,
    },
}

/// A process, so that a reused PID is not mistaken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub start_time: u64,
}

/// What a launch came to, from nitro-cli's JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchRecord {
    /// nitro-cli's id (`i-…-enc…`).
    pub enclave_id: String,
    /// nitro-cli's background process; it owns the enclave, and dies with it.
    pub process: ProcessIdentity,
    /// The CPUs it was given.
    pub cpu_ids: Vec<u32>,
    /// The memory it was given.
    pub memory: MemoryMib,
    /// When nitro-cli said that it runs.
    pub at: Timestamp,
}

/// Why a generation is ended on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum StopReason {
    /// An operator holds it stopped.
    Held,
    /// It is no longer in the configuration.
    Removed,
    /// Another image or size takes its place.
    Replaced,
    /// Its health check failed and the configuration says to restart then.
    Unhealthy {
        /// What the probe said.
        error: String,
    },
}

impl StopReason {
    /// Whether this end counts as a failure of the enclave.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Unhealthy { .. })
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held => f.write_str("an operator stopped it"),
            Self::Removed => f.write_str("it is no longer in the configuration"),
            Self::Replaced => f.write_str("another image or size takes its place"),
            Self::Unhealthy { error } => write!(f, "its health check failed: {error}"),
        }
    }
}

impl EnclaveRecord {
    /// That it is held stopped, since when, by what, and how it goes on; `None` if it is not.
    pub fn held(&self, name: &EnclaveName) -> Option<String> {
        let (since, by) = (self.held_since?, self.held_by);
        Some(format!("it is held stopped since {since}, by `{by}`; `enclavectl start {name}` launches it"))
    }

    /// The generation that is held for what nitro-cli says of it, and that: nothing is done with it until an operator decides.
    pub fn doubt(&self) -> Option<(Generation, &Failure)> {
        let doubtful = |(generation, verdict): (&Generation, &Verdict)| {
            let current = |record: &GenerationRecord| record.is_current() && record.launch().is_some();
            self.generations.get(generation).is_some_and(current)
                && verdict.doubt.is_some()
                && verdict.accepted.is_none()
        };
        let (generation, verdict) =
            self.verdicts.iter().find(|(generation, verdict)| doubtful((generation, verdict)))?;
        verdict.doubt.as_ref().map(|doubt| (*generation, doubt))
    }
}

impl GenerationRecord {
    /// Its process, where nitro-cli has told of one.
    pub fn launch(&self) -> Option<&LaunchRecord> {
        match &self.phase {
            Phase::Booting { launch, .. } | Phase::Ready { launch, .. } | Phase::Draining { launch, .. } => {
                Some(launch)
            }
            Phase::Stopping { launch, .. } => launch.as_ref(),
            Phase::Planned { .. } | Phase::Launching { .. } | Phase::Ended { .. } => None,
        }
    }

    /// Since when it is in its phase.
    pub fn since(&self) -> Timestamp {
        match &self.phase {
            Phase::Planned { since, .. }
            | Phase::Launching { since }
            | Phase::Booting { since, .. }
            | Phase::Ready { since, .. }
            | Phase::Draining { since, .. }
            | Phase::Stopping { since, .. } => *since,
            Phase::Ended { at } => *at,
        }
    }

    /// Whether it holds, or may hold, CPUs and memory of the pool.
    pub fn holds_resources(&self) -> bool {
        !matches!(self.phase, Phase::Planned { .. } | Phase::Ended { .. })
    }

    /// Whether it is meant to go on: neither being ended nor over.
    pub fn is_current(&self) -> bool {
        !matches!(self.phase, Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Ended { .. })
    }
}

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
    /// The generation of that key.
    pub fn generation(&self, key: &EnclaveKey) -> Option<&GenerationRecord> {
        self.enclaves.get(&key.name)?.generations.get(&key.generation)
    }

    /// Every generation of every enclave.
    pub fn generations(&self) -> impl Iterator<Item = (EnclaveKey, &GenerationRecord)> {
        self.enclaves.iter().flat_map(|(name, record)| {
            let key = |generation| EnclaveKey { name: name.clone(), generation };
            record.generations.iter().map(move |(generation, record)| (key(*generation), record))
        })
    }

    /// What that image request came to, if it was tried.
    pub fn image(&self, request: &ImageRequest) -> Option<&ImageOutcome> {
        self.images.iter().find(|record| record.request == *request).map(|record| &record.outcome)
    }

    /// A CID that no generation in the ledger has, beginning with the one after the last given away, so that a CID
    /// comes back only after all others.
    pub fn free_cid(&self) -> Cid {
        let mut cid = self.next_cid;
        while self.generations().any(|(_, record)| record.cid == cid) {
            cid = cid.next();
        }
        cid
    }

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
