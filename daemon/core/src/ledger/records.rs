//! What the ledger says of one enclave: of its generations, how far each of them is, and how it ended before. Values; how they change
//! stands in `change`.

use crate::desired::EgressSpec;
use crate::failure::Failure;
use crate::id::{Cid, EifDigest, EnclaveName, Generation, Measurements, MemoryMib, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

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
