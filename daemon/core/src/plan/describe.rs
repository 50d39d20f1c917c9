//! When nitro-cli is asked what runs, and what its answer means: evidence for adoption beside the traces and the process.
//!
//! Asking puts load on every enclave's process, and the first answer after a launch takes as long as hashing the image; so it is
//! asked once for each launch, late, and never while another launch is under way. What differs is held and told, never ended.

use super::{Launched, Planner, Step, restart};
use crate::desired::{EnclaveSpec, HealthCheck, OnUnhealthy};
use crate::id::{EnclaveKey, EnclaveName};
use crate::ledger::{Change, EnclaveRecord, GenerationRecord, Phase};
use crate::observed::{Instance, InstanceState, JobKey};
use std::time::Duration;

/// So long the youngest enclave has run before it is asked.
const LATE: Duration = Duration::from_secs(60);

impl Planner<'_> {
    pub(super) fn describe(&mut self) {
        let Some(instances) = self.observed.instances.known() else { return };
        // Whatever runs is asked, also what is being ended or is not in the ledger.
        let born = |instance: &Instance| match &instance.state {
            InstanceState::Running(launch) => Some(launch.at),
            InstanceState::Launching | InstanceState::Unknown(_) | InstanceState::Ended { .. } => None,
        };
        let youngest = instances.values().filter_map(born).max();
        let mut unknown = Vec::new();
        for (key, record) in self.ledger.generations() {
            let (Some(launch), Some(launched)) = (record.launch(), self.launched(&key, record)) else { continue };
            let runs =
                |state: &InstanceState| matches!(state, InstanceState::Running(seen) if seen.process == launch.process);
            if !instances.get(&key).is_some_and(|instance| runs(&instance.state)) {
                continue;
            }
            let enclave = self.ledger.enclaves.get(&key.name);
            if enclave.is_none_or(|enclave| !enclave.verdicts.contains_key(&key.generation)) {
                unknown.push(launched);
            }
        }
        for launched in &unknown {
            if let Some((process, doubt)) = self.observed.described.get(&launched.key)
                && *process == launched.launch.process
            {
                self.record(Change::Described { key: launched.key.clone(), doubt: doubt.clone() });
            }
        }
        unknown.retain(|launched| !self.observed.described.contains_key(&launched.key));
        let Some(youngest) = youngest.filter(|_| !unknown.is_empty() && !self.launching) else { return };
        if let Some(late) = restart::pause_end(youngest, LATE, self.now) {
            return self.wake(late);
        }
        self.job(&JobKey::Describe, restart::DESCRIBE, Step::Describe(unknown));
    }

    fn launched(&self, key: &EnclaveKey, record: &GenerationRecord) -> Option<Launched> {
        // One that is being ended is asked nothing more.
        let lives = matches!(record.phase, Phase::Booting { .. } | Phase::Ready { .. } | Phase::Draining { .. });
        let launch = record.launch().filter(|_| lives)?.clone();
        let (cid, measurements, debug) = (record.cid, record.measurements, record.identity.debug);
        Some(Launched { key: key.clone(), cid, measurements, debug, launch })
    }

    /// Whether nothing is to be done with a wanted enclave because nitro-cli describes it otherwise than it was launched. It serves on,
    /// with its endpoints, and is watched; whether it is ended, replaced or taken as it is, an operator decides.
    pub(super) fn held_in_doubt(&mut self, name: &EnclaveName, spec: &EnclaveSpec, record: &EnclaveRecord) -> bool {
        let Some((generation, doubt)) = record.doubt() else { return false };
        let text = format!("generation {generation} is held as it is: {}", doubt.message);
        let Some(of) = record.generations.get(&generation) else { return false };
        let health = spec.health.clone().map(|check| HealthCheck { on_failure: OnUnhealthy::Report, ..check });
        let watched = EnclaveSpec { health, ..spec.clone() };
        self.watch(&EnclaveKey { name: name.clone(), generation }, of, &watched);
        self.wait(name, text);
        true
    }
}
