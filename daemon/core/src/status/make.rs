//! How a status is made of what is wanted, seen, remembered and planned. Pure; the types stand in `status`.

use super::{
    EnclaveState, EnclaveStatus, Facts, FetchStatus, Health, HostStatus, LastError, NamedFetch, PoolStatus, Problem,
    ProxyStatus, Status,
};
use crate::desired::{AllocatorMode, Desired, EnclaveSpec, HealthCheck, ImageRequest};
use crate::failure::Failure;
use crate::id::{EifDigest, EnclaveKey, EnclaveName, Generation, MemoryMib, Timestamp};
use crate::ledger::{EnclaveRecord, GenerationRecord, ImageOutcome, Ledger, Phase};
use crate::observed::{InstanceState, JobKey, Observation, Observed, Pool};
use crate::plan::Plan;
use crate::plan::pool::PoolPlan;
use std::collections::BTreeMap;
use std::time::Duration;

/// A certificate of an image that ends sooner than this is told as a problem: time enough to build, sign and roll out.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 24 * 3600);

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
        if let Observation::Known(Pool::Sized { cpus, memory, memory_free, .. }) = &self.observed.pool {
            (host.pool_cpus, host.pool_memory_mib) = (Some(*cpus), Some(*memory));
            host.pool_memory_free_mib = Some(*memory_free);
            let held = self.ledger.generations().filter(|(_, of)| of.holds_resources());
            let held = held.fold(0_u32, |sum, (_, of)| sum.saturating_add(of.identity.cpus));
            host.pool_cpus_free = Some(cpus.saturating_sub(held));
        }
        if self.desired.host.allocator == AllocatorMode::Manage {
            let PoolPlan { wanted, pending, waits, .. } = &self.plan.pool;
            host.pool = Some(PoolStatus {
                policy: self.desired.host.pool,
                wanted_cpus: wanted.as_ref().map(|wanted| wanted.cpus.count()),
                wanted_memory_mib: wanted.as_ref().map(|wanted| wanted.memory_mib),
                settled: !pending,
                waiting_for: waits.clone(),
            });
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
        if let Observation::Unknown(failure) = &self.observed.inventory
            && self.desired.host.allocator == AllocatorMode::Manage
        {
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
                if let Some(error) = &report.access_log_error {
                    let text = format!("the access log is not written, requests go on: {error}");
                    let remedy = "mend it, it is tried again with each line; or change ingress.access_log";
                    add("proxy", Failure::new(text).with_remedy(remedy));
                }
                // Several domains may have one pair of files.
                let broken = report.certificates.iter().filter_map(|certificate| {
                    let error = certificate.error.as_ref()?;
                    Some((error, (&certificate.domain, certificate.expires.is_some())))
                });
                for (error, (domain, serves)) in broken.collect::<BTreeMap<_, _>>() {
                    let served = if serves { "the last good one is served on" } else { "its clients get a TLS alert" };
                    add("proxy", Failure::new(format!("a certificate for {domain} can't be used: {error}; {served}")));
                }
                for authority in &report.client_authorities {
                    let (Some(error), enclave) = (&authority.error, authority.enclave.as_str()) else { continue };
                    let served =
                        if authority.usable { "the last good ones count on" } else { "its clients get a TLS alert" };
                    let text = format!("the authorities of its clients' certificates can't be used: {error}; {served}");
                    add(
                        enclave,
                        Failure::new(text)
                            .with_remedy("mend the file of ingress.client_ca: it is read again by itself"),
                    );
                }
            }
        }
        for (key, instance) in self.observed.instances.known().into_iter().flatten() {
            let over = matches!(instance.state, InstanceState::Ended(_));
            if !over && self.ledger.generation(key).is_none() && instance.generation.is_none() {
                let text = format!("{key} runs, or may run, and what it is cannot be read any more; it is left alone");
                add(key.name.as_str(), Failure::new(text).with_remedy("end it with nitro-cli if it is not wanted"));
            }
        }
        for (name, record) in &self.ledger.enclaves {
            let Some((generation, doubt)) = record.doubt() else { continue };
            let text = format!("generation {generation} runs on and is held as it is: {}", doubt.message);
            let remedy = format!("`enclavectl adopt {name}` takes it as it is, `enclavectl stop {name}` ends it");
            add(name.as_str(), Failure::new(text).with_remedy(remedy));
        }
        for failure in &self.plan.pool.problems {
            add("host", failure.clone());
        }
        for (name, failure) in &self.plan.pool.refused {
            add(name.as_str(), failure.clone());
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
                JobKey::RemoveCached(_) | JobKey::Describe => add("host", failed.failure.clone()),
                // What could not be had is no news once it is there, or not wanted any more.
                JobKey::Reserve if self.plan.pool.pending => add("host", failed.failure.clone()),
                JobKey::Reserve => {}
                JobKey::StartProxy | JobKey::Publish => add("proxy", failed.failure.clone()),
            }
        }
        for (name, spec) in &self.desired.enclaves {
            if let Some(ImageOutcome::Verified { facts: Some(facts), .. }) = self.ledger.image(&spec.image)
                && let Err(unfit) = facts.launchable(spec.memory, self.now)
            {
                add(name.as_str(), unfit.failure);
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
            waiting_for: self.plan.waits.get(name).cloned().or_else(|| record.held(name)),
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
