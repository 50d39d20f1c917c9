//! The plan for one enclave: first the ledger follows what is seen, then, if nothing was new, what is wanted is pursued.

use super::{Launch, Planner, Step, admission, restart};
use crate::desired::{EnclaveSpec, OnUnhealthy, RestartPolicy, UpdatePolicy};
use crate::failure::Failure;
use crate::id::{EnclaveKey, EnclaveName, Generation, Measurements, Timestamp};
use crate::ledger::{Change, EnclaveRecord, GenerationRecord, HeldBy, Identity, ImageOutcome, Phase, StopReason};
use crate::observed::{AskedBy, End, Instance, InstanceState, JobKey, Observation};
use crate::routes::ListenerKey;
use std::collections::BTreeMap;
use std::time::Duration;

/// How often a booting enclave is asked whether it is ready; its health check's interval may be shorter.
const BOOT_PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// How long an enclave that is to end waits for a proxy that has yet to take new routes, which it does within milliseconds.
const CUT_PATIENCE: Duration = Duration::from_secs(1);

/// What is said of an enclave that is gone, before it is known how.
const GONE: &str = "its process is gone";
const RIGHT_AFTER: &str = "it ended right after its launch";

type Instances = BTreeMap<EnclaveKey, Instance>;

impl Planner<'_> {
    pub(super) fn enclave(&mut self, name: &EnclaveName, instances: &Instances) {
        let nothing = EnclaveRecord::default();
        let record = self.ledger.enclaves.get(name).unwrap_or(&nothing);
        let spec = self.desired.enclaves.get(name);
        let wanted = spec.filter(|_| record.held_since.is_none());
        let before = self.plan.steps.len();
        self.adopt(name, record, instances);
        for (generation, of) in &record.generations {
            let key = EnclaveKey { name: name.clone(), generation: *generation };
            let last = record.generations.last_key_value().is_some_and(|(last, _)| last == generation);
            self.follow(&key, of, instances.get(&key), wanted.is_some() && last);
        }
        let news = self.plan.steps[before..].iter().any(|step| matches!(step, Step::Record(_)));
        if news {
            // The next pass sees the ledger as it is then.
            return;
        }
        self.drains(name, record);
        let unreadable = |(key, instance): (&EnclaveKey, &Instance)| {
            let over = matches!(instance.state, InstanceState::Ended(_));
            key.name == *name && !record.generations.contains_key(&key.generation) && !over
        };
        if instances.iter().any(unreadable) {
            // Something of that name runs that nobody can account for: no second one beside it.
            return;
        }
        if let Some(spec) = spec {
            self.endpoints(name, spec, record);
        }
        match wanted {
            Some(spec) if self.held_in_doubt(name, spec, record) => {}
            Some(spec) => self.pursue(name, spec, record, instances),
            None => self.abandon(name, spec.is_none(), record, instances),
        }
    }

    /// Takes over what the supervisor was told to launch and the ledger does not know: the ledger was lost.
    fn adopt(&mut self, name: &EnclaveName, record: &EnclaveRecord, instances: &Instances) {
        for (key, instance) in instances.iter().filter(|(key, _)| key.name == *name) {
            if record.generations.contains_key(&key.generation) {
                continue;
            }
            let phase = match &instance.state {
                InstanceState::Launching | InstanceState::Unknown(_) => Phase::Launching { since: self.now },
                // It ran before this ledger began, so presumably it served: taken as ready, for otherwise its traffic
                // would be cut for nothing; its health check goes on at once.
                InstanceState::Running(launch) => Phase::Ready { since: self.now, launch: launch.clone() },
                InstanceState::Ended(_) => Phase::Ended { at: self.now },
            };
            match &instance.generation {
                Some(told) => {
                    let record = GenerationRecord { phase, ..told.clone() };
                    self.record(Change::Adopted { key: key.clone(), record });
                    if matches!(&instance.state, InstanceState::Ended(end) if end.asked == Some(AskedBy::Stop)) {
                        self.record(Change::Held { name: name.clone(), by: HeldBy::Systemctl });
                    }
                }
                // Nothing of it runs, and nobody can say what it was.
                None if matches!(instance.state, InstanceState::Ended(_)) => {
                    let by_hand =
                        matches!(&instance.state, InstanceState::Ended(end) if end.asked == Some(AskedBy::Stop));
                    if by_hand && record.last_generation < key.generation && record.held_since.is_none() {
                        // Nor does the ledger know that this was stopped.
                        self.record(Change::Held { name: name.clone(), by: HeldBy::Systemctl });
                    }
                    self.job(&JobKey::Forget(key.clone()), restart::STEP, Step::Forget(key.clone()));
                }
                None => self.wait(
                    name,
                    format!("{key} was launched, but what it is cannot be read any more; it is left alone, and nothing else is \
                         handed to the proxy until it is ended (`systemctl stop enclave@{key}`)"),
                ),
            }
        }
    }

    /// Lets the ledger follow what is seen of one generation. `next` says that a successor is wanted and not planned yet.
    fn follow(&mut self, key: &EnclaveKey, record: &GenerationRecord, seen: Option<&Instance>, next: bool) {
        let state = seen.map(|instance| &instance.state);
        let key = key.clone();
        match (&record.phase, state) {
            (
                Phase::Launching { .. } | Phase::Booting { .. } | Phase::Ready { .. },
                Some(InstanceState::Unknown(failure)),
            )
            | (
                Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Ended { .. },
                Some(InstanceState::Unknown(failure)),
            ) => self.wait(&key.name, format!("it cannot be told whether {key} runs: {}", failure.message)),
            (Phase::Planned { .. }, Some(_)) => self.record(Change::Launching(key)),
            (Phase::Launching { .. }, Some(InstanceState::Running(launch))) => {
                self.record(Change::Booting { key, launch: launch.clone() });
            }
            (
                Phase::Launching { .. } | Phase::Booting { .. } | Phase::Ready { .. },
                Some(InstanceState::Ended(End { asked: Some(asked), .. })),
            ) => {
                // Whoever stopped its unit by hand wants it to stay stopped: also over a restart of enclaved.
                if *asked == AskedBy::Stop {
                    self.record(Change::Held { name: key.name.clone(), by: HeldBy::Systemctl });
                }
                self.record(Change::Ended { key, failure: None });
            }
            (
                Phase::Launching { .. } | Phase::Booting { .. } | Phase::Ready { .. },
                Some(InstanceState::Ended(End { launch_failure: Some(failure), .. })),
            ) => self.record(Change::Ended { key, failure: Some(failure.clone()) }),
            (Phase::Launching { .. }, Some(InstanceState::Ended(end))) => {
                let failure = self.death(RIGHT_AFTER, end.account.as_deref());
                self.record(Change::Ended { key, failure });
            }
            (Phase::Booting { .. } | Phase::Ready { .. }, None) => {
                let failure = self.death(GONE, None);
                self.record(Change::Ended { key, failure });
            }
            (Phase::Booting { .. } | Phase::Ready { .. }, Some(InstanceState::Ended(end))) => {
                let failure = self.death(GONE, end.account.as_deref());
                self.record(Change::Ended { key, failure });
            }
            (Phase::Draining { why, .. } | Phase::Stopping { why, .. }, None | Some(InstanceState::Ended(_))) => {
                let failure = why.is_failure().then(|| Failure::new(why.to_string()));
                self.record(Change::Ended { key, failure });
            }
            (Phase::Stopping { since, .. }, Some(InstanceState::Running(launch))) => {
                if let Some(until) = self.proxy_may_yet_cut(*since) {
                    self.wait(&key.name, format!("{key} ends when the proxy has cut its connections"));
                    return self.wake(until);
                }
                let step = Step::Stop { key: key.clone(), launch: launch.clone() };
                self.job(&JobKey::Stop(key), restart::STEP, step);
            }
            // It was taken for ended and is not. It has, or will have, a successor: there must not be two.
            (Phase::Ended { .. }, Some(InstanceState::Launching | InstanceState::Running(_))) => {
                self.record(Change::Stopping { key, why: StopReason::Replaced });
            }
            (Phase::Ended { .. }, Some(InstanceState::Ended(end))) => self.over(key, end),
            (Phase::Ended { .. }, None) if !next => self.record(Change::Forgotten(key)),
            // As it should be, or a launch under way that the next passes will see the end of.
            (Phase::Planned { .. } | Phase::Ended { .. } | Phase::Launching { .. }, None)
            | (Phase::Launching { .. } | Phase::Stopping { .. }, Some(InstanceState::Launching))
            | (
                Phase::Booting { .. } | Phase::Ready { .. } | Phase::Draining { .. },
                Some(InstanceState::Launching | InstanceState::Running(_)),
            ) => {}
        }
    }

    /// Until when an enclave that is to end waits for the proxy to cut the connections to it. What ends with its enclave can look to a
    /// client as if it were done; the proxy resets it. One that is away, or does not listen, is not waited for.
    fn proxy_may_yet_cut(&self, since: Timestamp) -> Option<Timestamp> {
        let away = self.observed.proxy.known().is_none();
        if away || self.routes_applied() { None } else { restart::pause_end(since, CUT_PATIENCE, self.now) }
    }

    /// Takes in what came to be known of an end after it was noticed; then nothing is needed of its traces any more.
    fn over(&mut self, key: EnclaveKey, end: &End) {
        let last = self.ledger.enclaves.get(&key.name).and_then(|enclave| enclave.last_end.as_ref());
        let last = last.filter(|last| last.generation == key.generation);
        if let (Some(_), Some(asked)) = (last, end.asked) {
            // Its unit noted that only after its end was noticed: it was not up yet. Or an operator was first, and it was to be ended
            // for its health as well. The note is never of what enclaved asked for itself: that it asks for only once it has noted so.
            if asked == AskedBy::Stop {
                self.record(Change::Held { name: key.name.clone(), by: HeldBy::Systemctl });
            }
            return self.record(Change::Excused(key));
        }
        if let (Some(last), Some(account)) = (last, &end.account) {
            for text in [GONE, RIGHT_AFTER] {
                let failure = death(text, Some(account));
                if last.failure == death(text, None) && last.failure != failure {
                    return self.record(Change::Explained { key, failure });
                }
            }
        }
        if end.settled {
            self.job(&JobKey::Forget(key.clone()), restart::STEP, Step::Forget(key));
        }
    }

    /// The failure that a lost enclave leaves behind, unless the host was rebooted, which is nobody's failure.
    fn death(&self, text: &str, account: Option<&str>) -> Option<Failure> {
        let same_boot = self.ledger.boot_id.as_ref() == Some(&self.observed.boot_id);
        same_boot.then(|| death(text, account))
    }

    /// Lets what a generation may reach follow the configuration, at once, if the configuration is for it. One that is
    /// being replaced keeps what it had: its application knows nothing of its successor's endpoints.
    fn endpoints(&mut self, name: &EnclaveName, spec: &EnclaveSpec, record: &EnclaveRecord) {
        let Some(ImageOutcome::Verified { digest, .. }) = self.ledger.image(&spec.image) else { return };
        let target = Identity { image: *digest, cpus: spec.cpus, memory: spec.memory, debug: spec.debug };
        for (generation, of) in record.generations.iter().filter(|(_, of)| of.egress != spec.egress) {
            if of.identity == target && !matches!(of.phase, Phase::Ended { .. }) {
                let key = EnclaveKey { name: name.clone(), generation: *generation };
                self.record(Change::Endpoints { key, egress: spec.egress.clone() });
            }
        }
    }

    /// Ends what is drained, or has drained long enough.
    fn drains(&mut self, name: &EnclaveName, record: &EnclaveRecord) {
        for (generation, record) in &record.generations {
            let Phase::Draining { since, until, why, .. } = &record.phase else { continue };
            let open = match &self.observed.proxy {
                Observation::Known(report) if self.routes_applied() => report.ingress_open.get(&record.cid).copied(),
                // It may still be sending new requests there.
                Observation::Known(_) | Observation::Unknown(_) => Some(u64::MAX),
            };
            // A deadline must not end what serves for a successor that the proxy does not know how to reach.
            let counts = *why != StopReason::Replaced || self.routes_applied();
            let over = counts && restart::pause_end(*since, until.since(*since), self.now).is_none();
            if open.unwrap_or(0) == 0 || over {
                let key = EnclaveKey { name: name.clone(), generation: *generation };
                self.record(Change::Stopping { key, why: why.clone() });
            } else {
                self.wait(name, format!("generation {generation} drains until {until} at the latest"));
                self.wake(*until);
            }
        }
    }

    /// Ends all of an enclave that is not wanted, or is held.
    fn abandon(&mut self, name: &EnclaveName, removed: bool, record: &EnclaveRecord, instances: &Instances) {
        let why = if removed { StopReason::Removed } else { StopReason::Held };
        if let Some(held) = record.held(name).filter(|_| !removed) {
            self.wait(name, held);
        }
        for (generation, of) in &record.generations {
            if of.is_current() {
                self.end(EnclaveKey { name: name.clone(), generation: *generation }, of, &why, instances);
            }
        }
        if removed && record.generations.is_empty() && self.ledger.enclaves.contains_key(name) {
            self.record(Change::Removed(name.clone()));
        }
    }

    /// Whether there is a trace of its launch, or may be one soon.
    fn is_launched(&self, key: &EnclaveKey, instances: &Instances) -> bool {
        instances.contains_key(key) || self.observed.running.contains(&JobKey::Launch(key.clone()))
    }

    /// Ends one generation, in the way its phase allows.
    fn end(&mut self, key: EnclaveKey, record: &GenerationRecord, why: &StopReason, instances: &Instances) {
        let launched = self.is_launched(&key, instances);
        let why = why.clone();
        match &record.phase {
            Phase::Planned { .. } => self.record(Change::Ended { key, failure: None }),
            Phase::Launching { .. } if !launched => self.record(Change::Ended { key, failure: None }),
            Phase::Launching { .. } | Phase::Booting { .. } => self.record(Change::Stopping { key, why }),
            Phase::Ready { .. } => {
                let until = self.now.plus(self.desired.host.drain);
                self.record(Change::Draining { key, until, why });
            }
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Ended { .. } => {}
        }
    }

    /// Brings a wanted enclave a step closer to what is wanted.
    fn pursue(&mut self, name: &EnclaveName, spec: &EnclaveSpec, record: &EnclaveRecord, instances: &Instances) {
        let current: Vec<_> = record.generations.iter().filter(|(_, of)| of.is_current()).collect();
        let key = |generation: &Generation| EnclaveKey { name: name.clone(), generation: *generation };
        let (digest, measurements) = match self.ledger.image(&spec.image) {
            Some(ImageOutcome::Verified { digest, measurements, .. }) => (*digest, *measurements),
            Some(ImageOutcome::Failed { .. }) | None => {
                match self.refused(name) {
                    // Not even its image is fetched for nothing.
                    Some(refused) => self.wait(name, format!("it can't be launched: {refused}")),
                    None => self.fetch(name, &spec.image),
                }
                // What runs goes on meanwhile. A launch that was decided and never taken would only be in the way of others'.
                for (generation, of) in &current {
                    let (key, launching) = (key(generation), matches!(of.phase, Phase::Launching { .. }));
                    if launching && !self.is_launched(&key, instances) {
                        self.end(key, of, &StopReason::Replaced, instances);
                    } else {
                        self.watch(&key, of, spec);
                    }
                }
                return;
            }
        };
        let target = Identity { image: digest, cpus: spec.cpus, memory: spec.memory, debug: spec.debug };
        let unfit = self.launchable(spec).err().map(|unfit| unfit.failure).or_else(|| self.refused(name));
        let Some(((newest, of), older)) = current.split_last() else {
            return match unfit {
                Some(unfit) => self.wait(name, format!("it can't be launched: {unfit}")),
                None => self.plan_next(name, spec, record, target, measurements),
            };
        };
        let serves = matches!(of.phase, Phase::Ready { .. });
        for (generation, of) in older {
            if matches!(of.phase, Phase::Ready { .. }) && !serves {
                self.watch(&key(generation), of, spec);
            } else {
                // It never served and a newer one is on its way, or the newer one serves in its place.
                self.end(key(generation), of, &StopReason::Replaced, instances);
            }
        }
        let launched = self.is_launched(&key(newest), instances);
        if let Some(unfit) = unfit
            && (of.identity != target || !launched)
        {
            // What runs goes on; what was only planned is taken back.
            self.wait(name, format!("{} can't be launched: {unfit}", if launched { "its update" } else { "it" }));
            return if launched {
                self.watch(&key(newest), of, spec);
            } else {
                self.end(key(newest), of, &StopReason::Replaced, instances);
            };
        }
        if of.identity == target {
            return self.advance(&key(newest), of, spec, instances);
        }
        if serves && spec.update != UpdatePolicy::Recreate {
            match self.room_for(spec, None) {
                Some(Ok(())) => return self.plan_next(name, spec, record, target, measurements),
                Some(Err(shortage)) if spec.update == UpdatePolicy::BlueGreen => {
                    self.wait(name, format!("its update waits for room: {shortage}"));
                    return self.watch(&key(newest), of, spec);
                }
                Some(Err(_)) | None => {}
            }
        }
        // Nothing that works is ended for something that cannot be launched.
        if serves {
            if self.observed.images.get(&spec.image).is_none_or(|image| image.digest() != target.image) {
                self.fetch(name, &spec.image);
                return self.watch(&key(newest), of, spec);
            }
            if !self.routes_applied() {
                self.wait(name, "its update waits until the proxy serves its routes");
                return self.watch(&key(newest), of, spec);
            }
        }
        match self.room_for(spec, Some(name)) {
            Some(Ok(())) => self.end(key(newest), of, &StopReason::Replaced, instances),
            Some(Err(shortage)) => {
                self.no_room(name, &shortage);
                self.watch(&key(newest), of, spec);
            }
            None => {
                self.wait(name, "its update waits until the host's enclave pool can be seen");
                self.watch(&key(newest), of, spec);
            }
        }
    }

    /// Whether one more of it fits beside all that run, or in the place of what runs under that name; `None` if that
    /// can't be seen.
    fn room_for(
        &self,
        spec: &EnclaveSpec,
        instead_of: Option<&EnclaveName>,
    ) -> Option<Result<(), admission::Shortage>> {
        let pool = self.observed.pool.known()?;
        Some(admission::fits(pool, self.ledger, instead_of, spec.cpus, spec.memory))
    }

    /// Gives the next generation its number and CID.
    fn plan_next(
        &mut self,
        name: &EnclaveName,
        spec: &EnclaveSpec,
        record: &EnclaveRecord,
        identity: Identity,
        measurements: Measurements,
    ) {
        let ending =
            record.generations.values().any(|of| matches!(of.phase, Phase::Draining { .. } | Phase::Stopping { .. }));
        if ending && spec.update != UpdatePolicy::BlueGreen && !record.generations.values().any(|of| of.is_current()) {
            return self.wait(name, "its former generation is ending");
        }
        let mut not_before = self.now;
        if let Some(end) = record.last_end.as_ref().filter(|end| end.identity == identity) {
            if spec.restart == RestartPolicy::Never && end.ran {
                let text = format!("it ended and `restart = \"never\"`; `enclavectl start {name}` launches it again");
                return self.wait(name, text);
            }
            not_before =
                restart::pause_end(end.at, restart::LAUNCH.after(record.failures), self.now).unwrap_or(self.now);
        }
        // Two enclaves planned in one pass must not get the same CID: the second one waits for the next pass.
        let planned = |step: &Step| matches!(step, Step::Record(Change::Planned { .. } | Change::Adopted { .. }));
        if self.plan.steps.iter().any(planned) {
            return;
        }
        let key = EnclaveKey { name: name.clone(), generation: record.last_generation.next() };
        let (cid, egress) = (self.ledger.free_cid(), spec.egress.clone());
        self.record(Change::Planned { key, cid, identity, measurements, egress, not_before });
    }

    /// Brings the generation that is wanted one phase further.
    fn advance(&mut self, key: &EnclaveKey, record: &GenerationRecord, spec: &EnclaveSpec, instances: &Instances) {
        match &record.phase {
            Phase::Planned { since, not_before }
                if restart::pause_end(*since, not_before.since(*since), self.now).is_some() =>
            {
                self.wait(&key.name, format!("it is launched again at {not_before}"));
                self.wake(*not_before);
            }
            Phase::Planned { .. } => self.decide_launch(key, record, spec, instances),
            Phase::Launching { .. } if !instances.contains_key(key) => self.launch(key, record, spec, instances),
            Phase::Launching { .. } => match instances.get(key).map(|instance| &instance.state) {
                // Said already, with the reason.
                Some(InstanceState::Unknown(_)) => {}
                _ => self.wait(&key.name, "nitro-cli is starting it"),
            },
            Phase::Booting { .. } | Phase::Ready { .. } => self.watch(key, record, spec),
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Ended { .. } => {}
        }
    }

    /// Decides the launch once everything that must stand before it stands.
    fn decide_launch(
        &mut self,
        key: &EnclaveKey,
        record: &GenerationRecord,
        spec: &EnclaveSpec,
        instances: &Instances,
    ) {
        let name = &key.name;
        if self.observed.images.get(&spec.image).is_none_or(|image| image.digest() != record.identity.image) {
            return self.fetch(name, &spec.image);
        }
        if let Err(reason) = self.egress_open(record) {
            return self.wait(name, reason);
        }
        if self.waits_for_the_pool(name, record.since()) {
            return;
        }
        let room = match &self.observed.pool {
            Observation::Unknown(failure) => {
                return self.wait(name, format!("the host's enclave pool cannot be seen: {failure}"));
            }
            Observation::Known(pool) => {
                admission::fits(pool, self.ledger, None, record.identity.cpus, record.identity.memory)
            }
        };
        if let Err(shortage) = room {
            // The room that a blue-green update was planned with was taken by another enclave meanwhile.
            let fits_alone = matches!(self.room_for(spec, Some(name)), Some(Ok(())));
            if spec.update == UpdatePolicy::Auto && fits_alone {
                self.make_way(key, instances);
            }
            return self.no_room(name, &shortage);
        }
        if self.launching {
            return self.wait(name, "another enclave is being launched; launches are serial");
        }
        self.launching = true;
        self.record(Change::Launching(key.clone()));
    }

    /// Whether the proxy listens for everything that this generation may reach.
    fn egress_open(&self, record: &GenerationRecord) -> Result<(), String> {
        let report = match &self.observed.proxy {
            Observation::Known(report) if self.routes_applied() => report,
            Observation::Known(_) | Observation::Unknown(_) => {
                return Err("the proxy does not serve its routes yet".to_owned());
            }
        };
        for listener in &report.listeners {
            if let (ListenerKey::Egress { cid, .. }, Some(error)) = (&listener.listener, &listener.error)
                && *cid == record.cid
            {
                return Err(format!("its egress listener {} is not open: {error}", listener.address));
            }
        }
        Ok(())
    }

    /// Ends what runs under that name before this generation.
    fn make_way(&mut self, key: &EnclaveKey, instances: &Instances) {
        let Some(enclave) = self.ledger.enclaves.get(&key.name) else { return };
        for (generation, of) in enclave.generations.iter().filter(|(generation, _)| **generation < key.generation) {
            let older = EnclaveKey { name: key.name.clone(), generation: *generation };
            self.end(older, of, &StopReason::Replaced, instances);
        }
    }

    /// Takes the decided launch. Taken again after a crash right here, for the supervisor has no trace of it.
    fn launch(&mut self, key: &EnclaveKey, record: &GenerationRecord, spec: &EnclaveSpec, instances: &Instances) {
        let job = JobKey::Launch(key.clone());
        match self.observed.images.get(&spec.image) {
            Some(image) if image.digest() == record.identity.image => {
                // Decided while its egress was open; the proxy may have gone since.
                if let Err(reason) = self.egress_open(record) {
                    return self.wait(&key.name, reason);
                }
                if self.waits_for_the_pool(&key.name, record.since()) {
                    return;
                }
                let said = self.observed.failed.get(&job).map(|failed| failed.failure.to_string());
                self.wait(&key.name, said.unwrap_or_else(|| "it is being launched".to_owned()));
                let launch = Launch { key: key.clone(), record: record.clone(), image: image.clone() };
                self.job(&job, restart::STEP, Step::Launch(Box::new(launch)));
            }
            // Decided in an earlier life of this process, and the image is not proven in this one. It was never
            // launched, so the decision is taken back.
            Some(_) | None => self.end(key.clone(), record, &StopReason::Replaced, instances),
        }
    }

    /// Probes what runs, and draws the consequences.
    pub(super) fn watch(&mut self, key: &EnclaveKey, record: &GenerationRecord, spec: &EnclaveSpec) {
        let (booting, since) = match &record.phase {
            Phase::Booting { since, .. } => (true, *since),
            Phase::Ready { since, .. } => (false, *since),
            _ => return,
        };
        let Some(check) = &spec.health else {
            if booting {
                self.record(Change::Ready(key.clone()));
            }
            return;
        };
        let report = self.observed.health.get(key);
        match report.map(|report| &report.result) {
            Some(Ok(())) if booting => return self.record(Change::Ready(key.clone())),
            Some(Err(error)) => {
                let grace = since.plus(check.start_period);
                let streak = report.map_or(0, |report| report.streak);
                let patient = restart::pause_end(since, check.start_period, self.now).is_some();
                let unhealthy = if booting { !patient } else { streak >= check.failures };
                if booting {
                    self.wait(&key.name, format!("it is not ready yet: {error}"));
                    self.wake(grace);
                }
                if unhealthy && check.on_failure == OnUnhealthy::Restart {
                    let why = StopReason::Unhealthy { error: error.clone() };
                    return self.record(Change::Stopping { key: key.clone(), why });
                }
            }
            Some(Ok(())) => {}
            None if booting => self.wait(&key.name, "it boots"),
            None => {}
        }
        let pause = if booting { check.interval.min(BOOT_PROBE_INTERVAL) } else { check.interval };
        if let Some(due) = report.and_then(|report| restart::pause_end(report.at, pause, self.now)) {
            return self.wake(due);
        }
        let step = Step::Probe { key: key.clone(), cid: record.cid, check: check.clone() };
        self.job(&JobKey::Probe(key.clone()), restart::STEP, step);
    }
}

fn death(text: &str, account: Option<&str>) -> Failure {
    let how = account.unwrap_or("the enclave crashed, powered off, or was ended from outside");
    Failure::new(format!("{text}: {how}"))
}
