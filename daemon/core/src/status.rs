//! The status: what people, Prometheus and the control plane are told. One type for all three, and the pure function
//! that makes it. Its JSON form is `config/status.schema.json`.

use crate::desired::{Desired, EnclaveSpec, HealthCheck, ImageRequest};
use crate::failure::Failure;
use crate::id::{BootId, Cid, EifDigest, EnclaveKey, EnclaveName, Generation, MemoryMib, Pcr, Timestamp};
use crate::ledger::{EnclaveRecord, GenerationRecord, ImageOutcome, Ledger, Phase};
use crate::observed::{InstanceState, JobKey, Observation, Observed, Pool};
use crate::plan::Plan;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// A certificate of an image that ends sooner than this is told as a problem: time enough to build, sign and roll out.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// The status of one host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// Whole images in the cache; absent where it can't be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_cache_images: Option<usize>,
    /// Bytes of images in the cache, unfinished downloads included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_cache_bytes: Option<u64>,
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
    /// What it concerns: `config`, `host`, `proxy`, `ledger`, or an enclave's name.
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

/// Makes the status.
pub fn status(
    desired: &Desired,
    observed: &Observed,
    ledger: &Ledger,
    plan: &Plan,
    facts: &Facts,
    now: Timestamp,
) -> Status {
    let maker = Maker { desired, observed, ledger, plan, facts, now };
    let names: std::collections::BTreeSet<_> = desired.enclaves.keys().chain(ledger.enclaves.keys()).collect();
    let enclaves: Vec<_> = names.into_iter().map(|name| maker.enclave(name)).collect();
    let proxy = maker.proxy();
    let problems = maker.problems(&enclaves);
    let served = |enclave: &EnclaveStatus| enclave.ready || !enclave.wanted || enclave.state == EnclaveState::Held;
    let ready = enclaves.iter().all(served) && proxy.current && proxy.listeners_failed == 0;
    let steps = plan.steps.iter().map(ToString::to_string).collect();
    let named = |(request, progress): (&ImageRequest, &FetchStatus)| NamedFetch {
        image: request.source.to_string(),
        progress: *progress,
    };
    let fetches = facts.fetches.iter().map(named).collect();
    Status { at: now, ready, host: maker.host(), proxy, problems, enclaves, fetches, steps }
}

struct Maker<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    ledger: &'a Ledger,
    plan: &'a Plan,
    facts: &'a Facts,
    now: Timestamp,
}

impl Maker<'_> {
    fn host(&self) -> HostStatus {
        let mut host = HostStatus { boot_id: Some(self.observed.boot_id.clone()), ..self.facts.host.clone() };
        if let Observation::Known(Pool::Sized { cpus, memory, memory_free }) = &self.observed.pool {
            (host.pool_cpus, host.pool_memory_mib) = (Some(*cpus), Some(*memory));
            host.pool_memory_free_mib = Some(*memory_free);
        }
        if let Observation::Known(cache) = &self.observed.cache {
            let sizes = cache.images.iter().map(|image| image.size);
            let all = sizes.chain(cache.unfinished.iter().map(|unfinished| unfinished.size));
            host.image_cache_images = Some(cache.images.len());
            host.image_cache_bytes = Some(all.fold(0, u64::saturating_add));
        }
        host
    }

    fn proxy(&self) -> ProxyStatus {
        let Observation::Known(report) = &self.observed.proxy else { return ProxyStatus::default() };
        let wanted = crate::plan::routing::routes(self.desired, self.ledger).revision();
        let https = report.listeners.iter().find_map(|listener| match listener.listener {
            crate::routes::ListenerKey::Https { .. } if listener.error.is_none() => Some(listener.address.clone()),
            _ => None,
        });
        let failed = report.listeners.iter().filter(|listener| listener.error.is_some()).count();
        ProxyStatus {
            running: true,
            pid: report.pid,
            revision: report.revision.map(|revision| revision.to_string()),
            current: report.revision == Some(wanted),
            https,
            listeners_open: report.listeners.len() - failed,
            listeners_failed: failed,
        }
    }

    fn problems(&self, enclaves: &[EnclaveStatus]) -> Vec<Problem> {
        let mut problems = self.facts.problems.clone();
        let mut add = |about: &str, failure: Failure| problems.push(Problem { about: about.to_owned(), failure });
        if let Observation::Unknown(failure) = &self.observed.instances {
            add("host", failure.clone());
        }
        if let Observation::Unknown(failure) = &self.observed.pool {
            add("host", failure.clone());
        }
        if let Observation::Unknown(failure) = &self.observed.cache {
            add("host", failure.clone());
        }
        match &self.observed.proxy {
            Observation::Unknown(failure) => add("proxy", failure.clone()),
            Observation::Known(report) => {
                for listener in &report.listeners {
                    if let Some(error) = &listener.error {
                        add("proxy", Failure::new(format!("{} is not open: {error}", listener.address)));
                    }
                }
                if let Some(error) = &report.last_routes_error {
                    add("proxy", Failure::new(error.clone()));
                }
            }
        }
        for (key, instance) in self.observed.instances.known().into_iter().flatten() {
            let over = matches!(instance.state, InstanceState::Ended { .. });
            if !over && self.ledger.generation(key).is_none() && instance.generation.is_none() {
                let text = format!("{key} runs, or may run, and what it is cannot be read any more; it is left alone");
                add(key.name.as_str(), Failure::new(text).with_remedy("end it with nitro-cli if it is not wanted"));
            }
        }
        for (job, failed) in &self.observed.failed {
            match job {
                JobKey::Fetch(_) => {}
                JobKey::Probe(key) | JobKey::Launch(key) | JobKey::Stop(key) | JobKey::Forget(key) => {
                    add(key.name.as_str(), failed.failure.clone());
                }
                JobKey::Refresh(request) => {
                    let watches = |spec: &EnclaveSpec| spec.image_poll.is_some() && spec.image == *request;
                    for (name, _) in self.desired.enclaves.iter().filter(|(_, spec)| watches(spec)) {
                        add(name.as_str(), failed.failure.clone());
                    }
                }
                JobKey::Reserve | JobKey::RemoveCached(_) => add("host", failed.failure.clone()),
                JobKey::StartProxy | JobKey::Publish => add("proxy", failed.failure.clone()),
            }
        }
        for enclave in enclaves {
            if enclave.debug {
                let text = "it runs in debug mode: its console is readable and its attestation proves nothing";
                add(enclave.name.as_str(), Failure::new(text).with_remedy("remove debug_mode from its configuration"));
            }
            if let Some(expires) = enclave.image_certificate_expires.filter(|at| *at <= self.now.plus(EXPIRES_SOON)) {
                let text = format!(
                    "the certificate that its image is signed with is valid until {expires}: from then on it can't be launched again"
                );
                let remedy = "sign the image again with a certificate that is valid for longer, and update";
                add(enclave.name.as_str(), Failure::new(text).with_remedy(remedy));
            }
            if let Health::Unhealthy { error } = &enclave.health {
                add(enclave.name.as_str(), Failure::new(format!("its health check fails: {error}")));
            }
            let down = matches!(enclave.state, EnclaveState::ImageFailed | EnclaveState::Ended | EnclaveState::Waiting);
            if let Some(error) = enclave.last_error.as_ref().filter(|_| down) {
                add(enclave.name.as_str(), error.failure.clone());
            }
        }
        problems
    }

    fn enclave(&self, name: &EnclaveName) -> EnclaveStatus {
        let nothing = EnclaveRecord::default();
        let record = self.ledger.enclaves.get(name).unwrap_or(&nothing);
        let spec = self.desired.enclaves.get(name);
        let shown = shown(record);
        let image = spec.and_then(|spec| self.ledger.image(&spec.image));
        let image_error = match image {
            Some(ImageOutcome::Failed { at, failure, .. }) => Some(LastError { at: *at, failure: failure.clone() }),
            Some(ImageOutcome::Verified { .. }) | None => None,
        };
        let end_error = record.last_end.as_ref().map(|end| LastError { at: end.at, failure: end.failure.clone() });
        let running = shown.filter(|(_, of)| !matches!(of.phase, Phase::Ended { .. } | Phase::Planned { .. }));
        let verified = match image {
            Some(ImageOutcome::Verified { digest, measurements, .. }) => Some((*digest, *measurements)),
            Some(ImageOutcome::Failed { .. }) | None => None,
        };
        let proof = shown.map(|(_, of)| (of.identity.image, of.measurements)).or(verified);
        let (state, since) = self.state(spec, record, shown);
        let health = self.health(name, spec.and_then(|spec| spec.health.as_ref()), shown);
        let launch = shown.and_then(|(_, of)| of.launch());
        EnclaveStatus {
            name: name.clone(),
            generation: shown.map(|(generation, _)| generation),
            state,
            since,
            ready: state == EnclaveState::Ready && !matches!(health, Health::Unhealthy { .. }),
            wanted: spec.is_some(),
            cid: shown.map(|(_, of)| of.cid),
            cpus: running.map(|(_, of)| of.identity.cpus).or(spec.map(|spec| spec.cpus)).unwrap_or(0),
            memory_mib: launch
                .map(|launch| launch.memory)
                .or(running.map(|(_, of)| of.identity.memory))
                .or(spec.map(|spec| spec.memory))
                .unwrap_or(MemoryMib(0)),
            debug: running.map(|(_, of)| of.identity.debug).or(spec.map(|spec| spec.debug)).unwrap_or(false),
            image: spec.map(|spec| spec.image.source.to_string()),
            image_digest: proof.map(|(digest, _)| digest),
            pcr0: proof.map(|(_, measurements)| measurements.pcr0),
            pcr1: proof.map(|(_, measurements)| measurements.pcr1),
            pcr2: proof.map(|(_, measurements)| measurements.pcr2),
            image_certificate_expires: self.certificate_expires(spec, proof.map(|(digest, _)| digest)),
            image_polled_at: spec
                .filter(|spec| spec.image_poll.is_some())
                .and_then(|spec| self.observed.refreshed.get(&spec.image))
                .copied(),
            enclave_id: launch.map(|launch| launch.enclave_id.clone()),
            pid: launch.map(|launch| launch.process.pid),
            health,
            restarts: record.restarts,
            last_error: match (image_error, end_error) {
                (Some(a), Some(b)) => Some(if a.at >= b.at { a } else { b }),
                (a, b) => a.or(b),
            },
            waiting_for: self.plan.waits.get(name).cloned(),
            fetch: spec.and_then(|spec| self.facts.fetches.get(&spec.image)).copied(),
            others: record
                .generations
                .iter()
                .filter(|(generation, _)| Some(**generation) != shown.map(|(shown, _)| shown))
                .map(|(generation, of)| format!("{generation}: {}", phase_name(&of.phase)))
                .collect(),
        }
    }

    /// Until when the certificate of that image is valid, if it is the one that is wanted and it is signed.
    fn certificate_expires(&self, spec: Option<&EnclaveSpec>, shown: Option<EifDigest>) -> Option<Timestamp> {
        match self.ledger.image(&spec?.image)? {
            ImageOutcome::Verified { digest, facts: Some(facts), .. } if Some(*digest) == shown => {
                Some(facts.certificate?.not_after)
            }
            ImageOutcome::Verified { .. } | ImageOutcome::Failed { .. } => None,
        }
    }

    fn state(
        &self,
        spec: Option<&EnclaveSpec>,
        record: &EnclaveRecord,
        shown: Option<(Generation, &GenerationRecord)>,
    ) -> (EnclaveState, Option<Timestamp>) {
        let since = shown.map(|(_, of)| of.since());
        let unseen = matches!(self.observed.instances, Observation::Unknown(_));
        let live = shown.filter(|(_, of)| !matches!(of.phase, Phase::Planned { .. } | Phase::Ended { .. }));
        if let Some((_, of)) = live {
            let state = match of.phase {
                _ if unseen => EnclaveState::Unknown,
                Phase::Launching { .. } => EnclaveState::Launching,
                Phase::Booting { .. } => EnclaveState::Booting,
                Phase::Ready { .. } => EnclaveState::Ready,
                Phase::Draining { .. } => EnclaveState::Draining,
                Phase::Stopping { .. } | Phase::Planned { .. } | Phase::Ended { .. } => EnclaveState::Stopping,
            };
            return (state, since);
        }
        if let Some(held) = record.held_since {
            return (EnclaveState::Held, Some(held));
        }
        let Some(spec) = spec else { return (EnclaveState::Ended, since) };
        if unseen {
            return (EnclaveState::Unknown, since);
        }
        match self.ledger.image(&spec.image) {
            _ if self.observed.running.contains(&JobKey::Fetch(spec.image.clone())) => (EnclaveState::Fetching, since),
            None => (EnclaveState::Fetching, since),
            Some(ImageOutcome::Failed { at, .. }) => (EnclaveState::ImageFailed, Some(*at)),
            Some(ImageOutcome::Verified { .. }) => {
                let given_up = spec.restart == crate::desired::RestartPolicy::Never && record.last_end.is_some();
                let planned = shown.is_some_and(|(_, of)| matches!(of.phase, Phase::Planned { .. }));
                (if given_up && !planned { EnclaveState::Ended } else { EnclaveState::Waiting }, since)
            }
        }
    }

    fn health(
        &self,
        name: &EnclaveName,
        check: Option<&HealthCheck>,
        shown: Option<(Generation, &GenerationRecord)>,
    ) -> Health {
        let Some(check) = check else { return Health::None };
        let Some((generation, of)) = shown.filter(|(_, of)| of.launch().is_some()) else { return Health::None };
        let key = EnclaveKey { name: name.clone(), generation };
        let gone = self.observed.instances.known().is_some_and(|all| {
            !matches!(all.get(&key).map(|instance| &instance.state), Some(InstanceState::Running(_)))
        });
        if gone {
            return Health::None;
        }
        if self.observed.failed.contains_key(&JobKey::Probe(key.clone())) {
            return Health::Unknown;
        }
        match self.observed.health.get(&key) {
            None => Health::Unknown,
            Some(report) => match &report.result {
                Ok(()) => Health::Healthy,
                Err(error) if report.streak >= check.failures && !matches!(of.phase, Phase::Booting { .. }) => {
                    Health::Unhealthy { error: error.clone() }
                }
                Err(error) => Health::Failing { error: error.clone() },
            },
        }
    }
}

/// The generation that a status line is about: the newest that is ready; else the newest of which something lives; else
/// the newest.
fn shown(record: &EnclaveRecord) -> Option<(Generation, &GenerationRecord)> {
    let newest = |wanted: fn(&Phase) -> bool| {
        record.generations.iter().rev().find(|(_, of)| wanted(&of.phase)).map(|(generation, of)| (*generation, of))
    };
    newest(|phase| matches!(phase, Phase::Ready { .. }))
        .or_else(|| newest(|phase| !matches!(phase, Phase::Ended { .. })))
        .or_else(|| newest(|_| true))
}

fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Planned { .. } => "planned",
        Phase::Launching { .. } => "launching",
        Phase::Booting { .. } => "booting",
        Phase::Ready { .. } => "ready",
        Phase::Draining { .. } => "draining",
        Phase::Stopping { .. } => "stopping",
        Phase::Ended { .. } => "ended",
    }
}
