//! The status: what people, Prometheus and the control plane are told. One type for all three, and the pure function
//! that makes it (`make`). Its JSON form is `config/status.schema.json`.

mod make;

pub use make::status;

use crate::desired::{ImageRequest, PoolPolicy};
use crate::diagnosis::Check;
use crate::failure::Failure;
use crate::id::{BootId, Cid, EifDigest, EnclaveName, Generation, MemoryMib, Pcr, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The status of one host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// When it was made.
    pub at: Timestamp,
    /// Every wanted enclave that is not held stopped is ready, and nothing is degraded.
    pub ready: bool,
    /// The host and the control process.
    pub host: HostStatus,
    /// The proxy process.
    pub proxy: ProxyStatus,
    /// What an operator should know: each with its remedy where there is one. Empty when all is well.
    pub problems: Vec<Problem>,
    /// Every enclave that is wanted, or of which something is left.
    pub enclaves: Vec<EnclaveStatus>,
    /// Every download under way, those for no enclave of the configuration included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fetches: Vec<NamedFetch>,
    /// The steps that would be taken now, for people to read.
    pub steps: Vec<String>,
}

/// The host and the control process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostStatus {
    /// EC2's id of the instance, where the metadata service told it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    /// Instance type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_type: Option<String>,
    /// Region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Availability zone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub availability_zone: Option<String>,
    /// Instance tags, where the metadata service shows them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// This boot of the host.
    pub boot_id: Option<BootId>,
    /// Version of enclaved.
    pub version: String,
    /// Process id of the control process.
    pub pid: u32,
    /// When the control process started.
    pub started_at: Timestamp,
    /// Fingerprint of the configuration in force.
    pub config_revision: String,
    /// Where `/metrics`, `/live` and `/ready` are, as bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// Enclave CPUs of the host, used or not; absent where somebody else hands them out or they can't be seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_cpus: Option<u32>,
    /// Enclave memory of the host, used or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_memory_mib: Option<MemoryMib>,
    /// Enclave memory that nobody uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_memory_free_mib: Option<MemoryMib>,
    /// Enclave CPUs that no enclave uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_cpus_free: Option<u32>,
    /// What is to be set aside, where that is enclaved's to decide (`allocator = "manage"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolStatus>,
    /// Whole images in the cache; absent where it can't be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_cache_images: Option<usize>,
    /// Bytes of images in the cache, unfinished downloads included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_cache_bytes: Option<u64>,
    /// When the checks of `enclavectl doctor` were made last by the control process, all or those that failed; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_at: Option<Timestamp>,
    /// The checks that fail.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_checks: Vec<Check>,
}

/// What is to be set aside for enclaves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoolStatus {
    /// Everything beyond the reserve, or what the enclaves need.
    pub policy: PoolPolicy,
    /// CPUs to be set aside; absent where nothing is, or the host can't be sized up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_cpus: Option<u32>,
    /// Memory to be set aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_memory_mib: Option<MemoryMib>,
    /// The pool is what is wanted, or near enough to it.
    pub settled: bool,
    /// Why it is not; or why nothing is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
}

/// The proxy process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProxyStatus {
    /// It answers.
    pub running: bool,
    /// Its process id; 0 while it does not answer.
    pub pid: u32,
    /// The routes it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// It serves the routes that are wanted.
    pub current: bool,
    /// Where HTTPS is served, as bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub https: Option<String>,
    /// Listeners that are open.
    pub listeners_open: usize,
    /// Listeners that are not.
    pub listeners_failed: usize,
}

/// Something that an operator should know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// What it concerns: `config`, `host`, `proxy`, `ledger`, `doctor`, or an enclave's name.
    pub about: String,
    /// What is wrong and what can be done.
    #[serde(flatten)]
    pub failure: Failure,
}

/// One enclave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EnclaveStatus {
    /// Its name.
    pub name: EnclaveName,
    /// The generation that this line is about: the one that serves, or the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// How it is.
    pub state: EnclaveState,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// It serves, and its health check does not say otherwise.
    pub ready: bool,
    /// It is in the configuration.
    pub wanted: bool,
    /// Its vsock CID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cid: Option<Cid>,
    /// vCPUs.
    pub cpus: u32,
    /// Memory: given, or asked for.
    pub memory_mib: MemoryMib,
    /// It runs in debug mode: its attestation proves nothing.
    pub debug: bool,
    /// Where its image comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// SHA-256 of its image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<EifDigest>,
    /// Kernel, command line and all ramdisks; computed by this host from the file, not attested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcr0: Option<Pcr>,
    /// Kernel, command line and the first ramdisk; computed by this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcr1: Option<Pcr>,
    /// The ramdisks after the first; computed by this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcr2: Option<Pcr>,
    /// Until when the certificate is valid that its image is signed with: from then on it can't be launched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_certificate_expires: Option<Timestamp>,
    /// When its image's source was last asked for a new image, where it is watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_polled_at: Option<Timestamp>,
    /// nitro-cli's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enclave_id: Option<String>,
    /// nitro-cli's background process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What its health check says.
    pub health: Health,
    /// How often it ended unasked.
    pub restarts: u64,
    /// The last end that nobody asked for, or the reason why its image can't be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// What it waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// How far the download of its image is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fetch: Option<FetchStatus>,
    /// Its other generations, as `generation: state`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

/// How an enclave is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EnclaveState {
    /// Its image is being fetched and verified.
    Fetching,
    /// Its image could not be had, or is not what it must be; tried again later.
    ImageFailed,
    /// Waiting for resources, for the proxy, or for its pause to end.
    Waiting,
    /// nitro-cli is starting it.
    Launching,
    /// It runs, and has not answered its health check yet.
    Booting,
    /// It serves.
    Ready,
    /// It takes no new requests.
    Draining,
    /// It is being ended.
    Stopping,
    /// It ended unasked and is not to be launched again.
    Ended,
    /// An operator keeps it stopped.
    Held,
    /// The host's enclaves can't be seen.
    Unknown,
}

impl EnclaveState {
    /// Every state, for metrics that have one series a state.
    pub const ALL: [Self; 11] = [
        Self::Fetching,
        Self::ImageFailed,
        Self::Waiting,
        Self::Launching,
        Self::Booting,
        Self::Ready,
        Self::Draining,
        Self::Stopping,
        Self::Ended,
        Self::Held,
        Self::Unknown,
    ];

    /// Its name in JSON, in metrics and for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fetching => "fetching",
            Self::ImageFailed => "image-failed",
            Self::Waiting => "waiting",
            Self::Launching => "launching",
            Self::Booting => "booting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Ended => "ended",
            Self::Held => "held",
            Self::Unknown => "unknown",
        }
    }
}

/// What a health check says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Health {
    /// There is no health check, or nothing runs.
    None,
    /// Not probed yet.
    Unknown,
    /// Well.
    Healthy,
    /// Fewer failures in a row than make it unhealthy.
    Failing {
        /// What the last probe said.
        error: String,
    },
    /// As many failures in a row as make it unhealthy.
    Unhealthy {
        /// What the last probe said.
        error: String,
    },
}

/// What went wrong last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LastError {
    /// When.
    pub at: Timestamp,
    /// What.
    #[serde(flatten)]
    pub failure: Failure,
}

/// How far a download is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FetchStatus {
    /// What is being done.
    #[serde(default)]
    pub stage: FetchStage,
    /// Bytes that are done with.
    pub bytes: u64,
    /// Bytes in all; 0 while unknown.
    pub total: u64,
    /// How many bytes a second were done with lately; absent until that can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// How many seconds the rest takes at that rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
}

/// What is done to get an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FetchStage {
    /// Its source is asked.
    #[default]
    Asking,
    /// It is downloaded, or copied, and measured as it arrives.
    Downloading,
    /// What is on disk already is measured.
    Measuring,
}

impl FetchStage {
    /// Its name for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asking => "asking",
            Self::Downloading => "downloading",
            Self::Measuring => "measuring",
        }
    }
}

/// A download that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NamedFetch {
    /// From where.
    pub image: String,
    /// How far it is.
    #[serde(flatten)]
    pub progress: FetchStatus,
}

/// What goes into a status beside what the loop knows.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The host, as far as it does not come from an observation.
    pub host: HostStatus,
    /// Standing problems: a refused configuration, a ledger that was put aside.
    pub problems: Vec<Problem>,
    /// Downloads under way.
    pub fetches: BTreeMap<ImageRequest, FetchStatus>,
}
