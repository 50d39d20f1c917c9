//! The plan for the host's enclave pool: what is to be set aside, whether it can be now, and which enclaves have no place on this
//! host at all, decided before anything is tried.
//!
//! [`judge`] needs no ledger and no daemon: `enclavectl host` says what it says. What enclaves leave of a pool that is there is
//! another question: `admission`.

use super::{Planner, Step, admission, restart};
use crate::allocator_file::{self, CpuRequest, Reservation};
use crate::desired::{AllocatorMode, Desired, PoolPolicy, UpdatePolicy};
use crate::failure::Failure;
use crate::id::{EnclaveName, MemoryMib, Timestamp};
use crate::inventory::Inventory;
use crate::ledger::{Change, ImageOutcome, Ledger, in_a_row};
use crate::observed::{InstanceState, JobKey, Observation, Observed, Pool};
use crate::sizing::pool::{
    NOT_URGENT, PoolChange, PoolNow, StrayPages, WantedPool, change, in_use, stray_pages, wanted,
};
use crate::sizing::{Admission, Capacity, Demand, Refusal, Reserve, admit};
use std::collections::BTreeMap;
use std::time::Duration;

/// So often the allocator is asked for room that some enclave lacks before those that have room are launched, after which it can be
/// asked only once all have ended.
const PATIENT_TRIES: u32 = 3;
/// So long the first launch in a boot waits for a look at the host.
const UNSEEN: Duration = Duration::from_secs(30);

/// What is said of the pool on a host that is to run nothing.
pub const NO_ENCLAVE: &str = "no enclave is configured, so the pool stays as it is";

/// What became of the pool in a plan, for status and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolPlan {
    /// What is to be set aside, where that is enclaved's to decide.
    pub wanted: Option<Reservation>,
    /// The least that the wanted enclaves need together.
    pub least: Option<Reservation>,
    /// The pool is not what is wanted.
    pub pending: bool,
    /// Why what is wanted is not there yet, or why nothing is wanted.
    pub waits: Option<String>,
    /// The enclaves that do not fit this host, and why.
    pub refused: BTreeMap<EnclaveName, Failure>,
    /// What else an operator should know.
    pub problems: Vec<Failure>,
}

/// A wanted enclave, and what it has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// What is wanted.
    pub demand: Demand,
    /// CPUs and memory of what runs under its name, and goes on if what is wanted has no place.
    pub runs: Option<(u32, MemoryMib)>,
}

/// What a host has for the wanted enclaves, and what its pool is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What of the host can be had; `Err`: what is not known of it and has to be.
    pub capacity: Result<Capacity, Failure>,
    /// The pool as it is.
    pub now: Result<PoolNow, Failure>,
    /// What the enclaves that fit get; `None`: none fits, or none is wanted.
    pub admission: Option<Admission>,
    /// The enclaves that do not fit beside those that run, or come first.
    pub refused: BTreeMap<EnclaveName, Refusal>,
    /// They fit, but not with the room that their updates must have.
    pub no_spare: Option<Refusal>,
    /// What is to be set aside for those that fit.
    pub wanted: Option<WantedPool>,
    /// What is to be done for it.
    pub change: PoolChange,
    /// Hugepages on nodes where no enclave will be.
    pub stray: Vec<StrayPages>,
}

/// Sizes up the host. `running`: how many enclaves run, whoever started them.
pub fn judge(
    policy: PoolPolicy,
    reserve: Reserve,
    inventory: &Inventory,
    candidates: &[Candidate],
    running: &Observation<u32>,
) -> Verdict {
    let mut verdict = Verdict {
        capacity: Capacity::of(inventory, reserve),
        now: PoolNow::of(inventory),
        admission: None,
        refused: BTreeMap::new(),
        no_spare: None,
        wanted: None,
        change: PoolChange::Nothing,
        stray: Vec::new(),
    };
    let Ok(capacity) = &verdict.capacity else { return verdict };
    let chosen = choose(capacity, candidates);
    verdict.admission = if chosen.demands.is_empty() { None } else { admit(capacity, &chosen.demands).ok() };
    // Those that were chosen fit, so this refuses nothing.
    verdict.wanted = wanted(policy, capacity, &chosen.demands).ok().flatten();
    (verdict.refused, verdict.no_spare) = (chosen.refused, chosen.no_spare);
    if let Some(wanted) = &verdict.wanted {
        verdict.stray = stray_pages(inventory, wanted.node).unwrap_or_default();
    }
    if let (Ok(now), Some(wanted)) = (&verdict.now, &verdict.wanted) {
        verdict.change = change(Some(wanted.clone()), now, running, &in_use(inventory, &wanted.wish));
    }
    verdict
}

/// Which enclaves fit together.
#[derive(Default)]
struct Chosen {
    demands: Vec<Demand>,
    refused: BTreeMap<EnclaveName, Refusal>,
    no_spare: Option<Refusal>,
}

/// All of them, if they fit. Otherwise one after the other as long as there is room: those that run first, as nothing that works is
/// to end for one that does not; then by name, so that it is always the same ones. No room for updates keeps none from running.
fn choose(capacity: &Capacity, candidates: &[Candidate]) -> Chosen {
    let demands: Vec<Demand> = candidates.iter().map(|candidate| candidate.demand.clone()).collect();
    let refusal = match admit(capacity, &demands) {
        Ok(_) => return Chosen { demands, ..Chosen::default() },
        Err(refusal) => refusal,
    };
    let modest = |demand: &Demand| {
        let update = if demand.update == UpdatePolicy::BlueGreen { UpdatePolicy::Auto } else { demand.update };
        Demand { update, ..demand.clone() }
    };
    let without: Vec<Demand> = demands.iter().map(modest).collect();
    if admit(capacity, &without).is_ok() {
        return Chosen { demands: without, no_spare: Some(refusal), ..Chosen::default() };
    }
    let mut chosen = Chosen::default();
    let (first, second): (Vec<_>, Vec<_>) = candidates.iter().partition(|candidate| candidate.runs.is_some());
    for Candidate { demand, runs } in first.into_iter().chain(second) {
        chosen.demands.push(modest(demand));
        let Err(refusal) = admit(capacity, &chosen.demands) else { continue };
        chosen.demands.pop();
        chosen.refused.insert(demand.name.clone(), refusal);
        if let Some((cpus, memory)) = *runs {
            // It goes on as it is, and is to find its place again.
            let update = UpdatePolicy::Recreate;
            chosen.demands.push(Demand { cpus, memory, image_size: None, update, ..demand.clone() });
            if admit(capacity, &chosen.demands).is_err() {
                chosen.demands.pop();
            }
        }
    }
    chosen
}

/// The wanted enclaves, as far as sizing goes.
fn candidates(desired: &Desired, ledger: &Ledger) -> Vec<Candidate> {
    let candidate = |(name, spec)| {
        let spec: &crate::desired::EnclaveSpec = spec;
        let size = match ledger.image(&spec.image) {
            Some(ImageOutcome::Verified { facts: Some(facts), .. }) => Some(facts.size),
            _ => None,
        };
        let mut generations = ledger.enclaves.get(name).into_iter().flat_map(|record| record.generations.values());
        let runs = generations.rfind(|of| of.is_current() && of.holds_resources());
        let runs = runs.map(|of| (of.identity.cpus, of.identity.memory));
        Candidate { demand: Demand::of(name, spec, size), runs }
    };
    desired.enclaves.iter().map(candidate).collect()
}

/// How many enclaves run, or may run, as far as anybody can tell: the kernel, the supervisor, the ledger, and what is at work.
fn running(observed: &Observed, ledger: &Ledger, inventory: &Inventory) -> Observation<u32> {
    let instances = match &observed.instances {
        Observation::Known(instances) => instances.values(),
        Observation::Unknown(failure) => return Observation::Unknown(failure.clone()),
    };
    let seen = match &inventory.enclaves {
        Observation::Known(seen) => *seen,
        Observation::Unknown(failure) => return Observation::Unknown(failure.clone()),
    };
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let known = count(instances.filter(|instance| !matches!(instance.state, InstanceState::Ended { .. })).count());
    let decided = count(ledger.generations().filter(|(_, record)| record.holds_resources()).count());
    let starting = count(observed.running.iter().filter(|job| matches!(job, JobKey::Launch(_))).count());
    Observation::Known(seen.max(known).max(decided).max(starting))
}

/// Looks at the host, where it is to be looked at and can be.
pub(super) fn verdict(desired: &Desired, observed: &Observed, ledger: &Ledger) -> Option<Verdict> {
    if desired.host.allocator == AllocatorMode::External {
        return None;
    }
    let inventory = observed.inventory.known()?.as_ref()?;
    let running = running(observed, ledger, inventory);
    let reserve = Reserve::from(&desired.host);
    Some(judge(desired.host.pool, reserve, inventory, &candidates(desired, ledger), &running))
}

impl Planner<'_> {
    fn manages(&self) -> bool {
        self.desired.host.allocator == AllocatorMode::Manage
    }

    /// Why that enclave has no place on this host. What the administrator has set aside is his to give, whatever the reserve.
    pub(super) fn refused(&self, name: &EnclaveName) -> Option<Failure> {
        let verdict = self.verdict.as_ref().filter(|_| self.manages())?;
        verdict.refused.get(name).map(Refusal::failure)
    }

    /// Has the pool changed, where it is to be and can be. Comes before all launches of this plan, which wait for it.
    pub(super) fn pool(&mut self) {
        if matches!(self.observed.pool, Observation::Known(Pool::Sized { changing: true, .. })) {
            self.pool_changes = true;
        }
        if !self.manages() {
            return;
        }
        let recorded = self.note_try();
        let Some(verdict) = &self.verdict else { return };
        let plan = &mut self.plan.pool;
        if self.desired.enclaves.is_empty() {
            // Nor is what is set aside given back: whoever comes next would have to find memory in one piece again.
            plan.waits = Some(NO_ENCLAVE.to_owned());
            return;
        }
        plan.wanted = verdict.wanted.as_ref().map(|wanted| wanted.wish.clone());
        plan.least = verdict.wanted.as_ref().and_then(|wanted| wanted.least.clone());
        plan.pending = verdict.change != PoolChange::Nothing;
        plan.refused = verdict.refused.iter().map(|(name, refusal)| (name.clone(), refusal.failure())).collect();
        if let Err(failure) = &verdict.capacity {
            let message = format!("what of this host enclaves may have is not known: {}", failure.message);
            plan.problems.push(Failure { message, ..failure.clone() });
        }
        if let Some(refusal) = &verdict.no_spare {
            let failure = refusal.failure();
            let message = format!("there is no room for blue-green updates, which wait: {}", failure.message);
            plan.problems.push(Failure { message, ..failure });
        }
        plan.problems.extend(verdict.stray.iter().map(StrayPages::failure));
        let (to, urgent) = match verdict.change.clone() {
            PoolChange::Nothing => return,
            PoolChange::Waits { why, .. } => {
                plan.waits = Some(why);
                return;
            }
            PoolChange::Due { to, urgent } => (to, urgent),
        };
        if self.pool_changes || self.observed.running.contains(&JobKey::Reserve) {
            self.pool_changes = true;
            plan.waits = Some("the allocator is at work".to_owned());
            return;
        }
        // Nobody knows whether the allocator is at work already.
        if self.observed.pool.known().is_none() {
            plan.waits = Some("the enclave pool can't be seen".to_owned());
            self.pool_changes = true;
            return;
        }
        // A ledger of another boot, or one that is about to learn of the last try, says nothing of this one; the next pass does.
        if recorded || self.ledger.boot_id.as_ref() != Some(&self.observed.boot_id) {
            self.pool_changes = true;
            return;
        }
        if !urgent && self.ledger.launched {
            plan.waits = Some(NOT_URGENT.to_owned());
            return;
        }
        if !urgent && self.ledger.pool.as_ref().is_some_and(|tried| tried.wish == to.wish) {
            plan.waits = Some("not all of it could be had in this boot; it is tried again after the next".to_owned());
            return;
        }
        if let Some((again, tries)) = self.pause_of_the_allocator() {
            self.plan.pool.waits = Some(format!("it could not be had; it is tried again at {again}"));
            // Launching what has room would keep the others waiting until it ends.
            self.pool_changes |= tries < PATIENT_TRIES;
            return self.wake(again);
        }
        self.plan.pool.waits = Some("the allocator is asked for it".to_owned());
        self.pool_changes = true;
        self.plan.steps.push(Step::Reserve { wish: to.wish, least: to.least });
    }

    /// Notes what a try came to: it counts for the boot, whether this process sees its end or the next one. One in which the stock
    /// allocator did not run is none. `true` if there is something to note.
    fn note_try(&mut self) -> bool {
        let Some(ended) = &self.observed.reserve_ended else { return false };
        let known = self.ledger.pool.as_ref().is_some_and(|tried| tried.at == ended.at && tried.wish == ended.wish);
        if known || self.ledger.boot_id.as_ref() != Some(&self.observed.boot_id) {
            return false;
        }
        let (wish, at) = (ended.wish.clone(), ended.at);
        self.record(Change::PoolTried { wish, at });
        true
    }

    /// Until when the allocator is not asked again, whatever for, and how often in a row it was asked; `None`: it can be asked.
    fn pause_of_the_allocator(&self) -> Option<(Timestamp, u32)> {
        let tried = self.ledger.pool.as_ref().map(|tried| (tried.at, tried.in_a_row(self.now)));
        // Also what was no try: systemd that can't be reached, say.
        let failed = self.observed.failed.get(&JobKey::Reserve);
        let failed = failed.map(|failed| (failed.at, if in_a_row(failed.at, self.now) { failed.count } else { 0 }));
        let asked = [tried, failed].into_iter().flatten();
        let tries = asked.clone().map(|(_, count)| count).max()?;
        let pause = |(at, count)| restart::pause_end(at, restart::RESERVE.after(count), self.now);
        asked.filter_map(pause).max().map(|again| (again, tries))
    }

    /// Whether a launch that was planned at that time waits for the pool. Not for ever: a try that failed is over, and what fits the
    /// pool as it is goes on.
    pub(super) fn waits_for_the_pool(&mut self, name: &EnclaveName, planned: Timestamp) -> bool {
        if self.pool_changes {
            self.wait(
                name,
                "the host's enclave pool is being changed first, by nitro-enclaves-allocator.service or \
                 enclaved-allocator.service (`systemctl status` of these, `systemctl list-jobs`)",
            );
            return true;
        }
        // With the first launch the time is over in which all of the pool can be set aside: a look that failed is not to cost that.
        let unseen = self.manages() && !self.ledger.launched && self.verdict.is_none();
        if unseen && let Some(until) = restart::pause_end(planned, UNSEEN, self.now) {
            self.wait(name, "what can be set aside for enclaves is looked at first");
            self.wake(until);
            return true;
        }
        false
    }

    /// An enclave has no room in the pool as it is: says why, and what ends that.
    pub(super) fn no_room(&mut self, name: &EnclaveName, shortage: &admission::Shortage) {
        let ending = |(_, of): (_, &crate::ledger::GenerationRecord)| of.holds_resources() && !of.is_current();
        if self.ledger.generations().any(ending) {
            return self.wait(name, format!("{shortage}; a generation that is ending will give some back"));
        }
        let failure = match shortage {
            admission::Shortage::Enclaves => None,
            admission::Shortage::Pool { .. } => self.why_no_room(name),
        };
        let Some(failure) = failure else { return self.wait(name, shortage.to_string()) };
        self.wait(name, format!("{shortage}; {failure}"));
        if !self.plan.pool.problems.contains(&failure) {
            self.plan.pool.problems.push(failure);
        }
    }

    fn why_no_room(&self, name: &EnclaveName) -> Option<Failure> {
        let Observation::Known(Pool::Sized { cpus, memory, memory_free, .. }) = &self.observed.pool else {
            return None;
        };
        let verdict = self.verdict.as_ref();
        if let Some(refusal) = verdict.and_then(|verdict| verdict.refused.get(name)) {
            return Some(refusal.failure());
        }
        let specs = self.desired.enclaves.values();
        let needed = verdict.and_then(|verdict| verdict.wanted.as_ref()?.least.clone()).unwrap_or_else(|| {
            let cpus = specs.clone().fold(0_u32, |sum, spec| sum.saturating_add(spec.cpus));
            let memory = specs.fold(0_u64, |sum, spec| sum.saturating_add(spec.memory.0));
            Reservation { cpus: CpuRequest::Count(cpus), memory_mib: MemoryMib(memory) }
        });
        let has = format!("the enclave pool has {cpus} CPUs and {memory} in hugepages");
        if *cpus >= needed.cpus.count() && *memory >= needed.memory_mib {
            // It was found that it does not fit: so what is there in all is not what is lacking.
            return Some(
                Failure::new(format!(
                    "{has}, which is enough for the {needed} that are needed in all; but {memory_free} of the hugepages are free: \
                     somebody else holds the difference"
                ))
                .with_remedy(
                    "`nitro-cli describe-enclaves` lists all enclaves of this host: end those that are not wanted",
                ),
            );
        }
        let message = format!("{has}; {needed} are needed");
        if self.manages() {
            let why = self.plan.pool.waits.clone().or_else(|| {
                let unknown = |failure: &Failure| format!("the pool can't be changed: {}", failure.message);
                match &self.observed.inventory {
                    Observation::Unknown(failure) => Some(unknown(failure)),
                    Observation::Known(_) => verdict.and_then(|verdict| verdict.capacity.as_ref().err().map(unknown)),
                }
            });
            let remedy = match verdict.map(|verdict| &verdict.change) {
                Some(PoolChange::Waits { .. }) => Some(
                    "`enclavectl stop` the enclaves that run, and `enclavectl start` them once the pool is changed",
                ),
                _ => None,
            };
            let failure = Failure::new(why.map_or_else(|| message.clone(), |why| format!("{message}; {why}")));
            return Some(Failure { remedy: remedy.map(str::to_owned), ..failure });
        }
        Some(Failure::new(message).with_remedy(by_hand(&self.wish_by_hand(&needed, *cpus, *memory))))
    }

    /// What the administrator is told to set aside: what sizing says, or, where it can't say, the sum and never less than there is.
    fn wish_by_hand(&self, needed: &Reservation, cpus: u32, memory: MemoryMib) -> Reservation {
        let wanted = self.verdict.as_ref().and_then(|verdict| verdict.wanted.as_ref());
        wanted.map_or_else(
            || Reservation {
                cpus: CpuRequest::Count(needed.cpus.count().max(cpus)),
                memory_mib: needed.memory_mib.max(memory),
            },
            |wanted| wanted.wish.clone(),
        )
    }
}

/// How an administrator sets that aside.
fn by_hand(wish: &Reservation) -> String {
    format!(
        "put exactly these three lines into {}: {}; end all enclaves and run `systemctl restart nitro-enclaves-allocator`; if the \
         pool then has less than that, reboot",
        allocator_file::PATH,
        lines(wish)
    )
}

/// The lines of the allocator's file that set that aside, in a sentence.
pub fn lines(wish: &Reservation) -> String {
    let text = allocator_file::write(wish);
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("`{line}`")).collect();
    lines.join(", ")
}
