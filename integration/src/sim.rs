//! A simulated host: every port of the daemon, in memory, under paused time, with a fault for any of its effects. What
//! must never happen on a host is checked as it happens, and kept as a violation.
//!
//! It models what the real effects promise, not how they do it.

mod harness;
mod ports;
mod state;

pub use harness::{Harness, desired, image};

use enclaved::host::{Effect, Outcome};
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, Cid, EifDigest, EnclaveKey, EnclaveName};
use enclaved_core::image::VerifiedImage;
use enclaved_core::inventory::Inventory;
use enclaved_core::ledger::Ledger;
use enclaved_core::observed::AskedBy;
use enclaved_core::routes::Routes;
use state::State;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How long nitro-cli takes to launch here.
const LAUNCH: Duration = Duration::from_secs(2);
/// How long an enclave takes from there until it is ready.
const BOOT: Duration = Duration::from_secs(3);
/// How long an enclave takes to end when it is asked to.
const STOP: Duration = Duration::from_secs(2);
/// How long the allocator takes.
const ALLOCATE: Duration = Duration::from_secs(3);
/// How long after an end it is known how it came about.
const ACCOUNT: Duration = Duration::from_millis(300);
/// How old the look can be on which a launch was decided: the loop gives every look ten seconds.
const LOOK: Duration = Duration::from_secs(12);

/// What can go wrong with an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// It does nothing, and says that it failed.
    FailBefore,
    /// It does its work, and says that it failed.
    FailAfter,
    /// It does nothing, and never returns.
    HangBefore,
    /// It does its work, and never returns.
    HangAfter,
    /// The control process is killed just before it.
    CrashBefore,
    /// The control process is killed just after it.
    CrashAfter,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::FailBefore, Self::FailAfter, Self::HangBefore, Self::HangAfter, Self::CrashBefore, Self::CrashAfter];
}

/// The host.
#[derive(Debug)]
pub struct World {
    state: Mutex<State>,
    began: Instant,
    /// Somebody killed the control process.
    pub(crate) crashed: Notify,
    enclaves_changed: Notify,
    proxy_changed: Notify,
}

impl World {
    /// A host with that many enclave CPUs and that much enclave memory (MiB), and as much more as the allocator can add.
    pub fn new(pool: (u32, u64), most: (u32, u64)) -> Arc<Self> {
        let state = State {
            boot_id: BootId("boot-1".to_owned()),
            ledger: None,
            ledger_torn: false,
            launched: BTreeMap::new(),
            proxy: None,
            proxy_died: None,
            routes: None,
            pool,
            most,
            file: pool,
            changing: None,
            changed: Ok(()),
            in_one_piece: u64::MAX,
            effectless: false,
            allocator_away: false,
            watching_breaks: false,
            reserves: Vec::new(),
            surveyed: None,
            images: BTreeMap::new(),
            images_away: false,
            index: BTreeMap::new(),
            known: BTreeMap::new(),
            cached: BTreeMap::new(),
            spoilt: BTreeSet::new(),
            open: BTreeMap::new(),
            foreign: 0,
            sick: false,
            described_otherwise: BTreeSet::new(),
            next_pid: 1000,
            sequence: 0,
            counts: BTreeMap::new(),
            planned: None,
            storm: 0,
            random: 1,
            violations: Vec::new(),
            launches: Vec::new(),
            stops: Vec::new(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            began: Instant::now(),
            crashed: Notify::new(),
            enclaves_changed: Notify::new(),
            proxy_changed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.change();
        state
    }

    /// Does one effect, or what a fault makes of it.
    async fn effect<T>(&self, effect: Effect, act: impl FnOnce(&mut State) -> Outcome<T>) -> Outcome<T> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let fault = self.lock().fault(effect);
        let failed = || Failure::new(format!("{effect:?} failed on purpose"));
        match fault {
            None => return act(&mut self.lock()),
            Some(Fault::FailBefore) => return Err(failed()),
            Some(Fault::FailAfter) => return act(&mut self.lock()).and_then(|_| Err(failed())),
            Some(Fault::HangBefore) => {}
            Some(Fault::HangAfter) => drop(act(&mut self.lock())),
            Some(Fault::CrashBefore) => self.crashed.notify_one(),
            Some(Fault::CrashAfter) => {
                drop(act(&mut self.lock()));
                self.crashed.notify_one();
            }
        }
        std::future::pending().await
    }

    /// Has that effect fail in that way the n-th time it is asked for, counted from 1.
    pub fn plan_fault(&self, effect: Effect, nth: u32, fault: Fault) {
        self.lock().planned = Some((effect, nth, fault));
    }

    /// Has every effect fail with that chance (in 1/1000), in a random way.
    pub fn storm(&self, per_mille: u64, seed: u64) {
        let mut state = self.lock();
        state.storm = per_mille;
        state.random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    }

    /// A random number below `n`, from the storm's seed.
    pub fn random(&self, n: u64) -> u64 {
        self.lock().random() % n
    }

    /// How often each effect was asked for.
    pub fn counts(&self) -> BTreeMap<Effect, u32> {
        self.lock().counts.clone()
    }

    /// What happened that must never happen.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Every launch so far.
    pub fn launches(&self) -> Vec<EnclaveKey> {
        self.lock().launches.clone()
    }

    /// Every enclave that was stopped on request so far.
    pub fn stops(&self) -> Vec<EnclaveKey> {
        self.lock().stops.clone()
    }

    /// The enclaves that run, and their processes.
    pub fn alive(&self) -> BTreeMap<EnclaveKey, u32> {
        self.lock().alive().map(|(key, launched)| (key.clone(), launched.process.process.pid)).collect()
    }

    /// Whether that enclave runs the image that this request is for.
    pub(crate) fn runs(&self, key: &EnclaveKey, request: &ImageRequest) -> bool {
        let state = self.lock();
        let image = state.images.get(request).map(VerifiedImage::digest);
        state.launched.get(key).is_some_and(|launched| Some(launched.record.identity.image) == image)
    }

    /// The ledger on disk.
    pub fn ledger(&self) -> Option<Ledger> {
        self.lock().ledger.clone()
    }

    /// The routes that the proxy serves, if it runs.
    pub fn routes(&self) -> Option<Routes> {
        let state = self.lock();
        state.proxy.and(state.routes.clone())
    }

    /// Puts an image where it can be fetched.
    pub fn put_image(&self, request: ImageRequest, image: VerifiedImage) {
        self.lock().images.insert(request, image);
    }

    /// Something happens to an image on disk.
    pub fn spoil_image(&self, digest: EifDigest) {
        self.lock().spoilt.insert(digest);
    }

    /// The images on disk.
    pub fn cached(&self) -> BTreeSet<EifDigest> {
        self.lock().cached.keys().copied().collect()
    }

    /// Whether no image can be had: neither from its source nor from the cache.
    pub fn set_images_away(&self, away: bool) {
        self.lock().images_away = away;
    }

    /// Connections that go on through the ingress to that CID.
    pub fn set_open(&self, cid: Cid, connections: u64) {
        let mut state = self.lock();
        state.open.insert(cid, connections);
        state.sequence += 1;
        self.proxy_changed.notify_one();
    }

    /// An enclave dies on its own.
    pub fn kill(&self, key: &EnclaveKey) {
        if let Some(launched) = self.lock().launched.get_mut(key) {
            launched.over = Some(Instant::now());
        }
        self.enclaves_changed.notify_one();
    }

    /// An operator stops its unit, restarts it, or the host is about to shut down.
    pub fn end_by_hand(&self, key: &EnclaveKey, asked: AskedBy) {
        if let Some(launched) = self.lock().launched.get_mut(key) {
            launched.over = Some(Instant::now());
            launched.asked = Some(asked);
        }
        self.enclaves_changed.notify_one();
    }

    /// The same, of a unit that was not up yet: that somebody asked for it is noted a while after its end.
    pub fn end_by_hand_noted_late(&self, key: &EnclaveKey, asked: AskedBy) {
        self.end_by_hand(key, asked);
        if let Some(launched) = self.lock().launched.get_mut(key) {
            launched.asked_late = true;
        }
    }

    /// Whoever waits for news of the launches panics at the next call.
    pub fn break_watching(&self) {
        self.lock().watching_breaks = true;
        self.enclaves_changed.notify_one();
    }

    /// Every trace of every launch is removed; the enclaves run on.
    pub fn lose_traces(&self) {
        let mut state = self.lock();
        state.launched.retain(|_, launched| !launched.is_over());
        state.launched.values_mut().for_each(|launched| launched.traceless = true);
    }

    /// Somebody else holds that much of the pool's memory (MiB).
    pub fn set_foreign(&self, memory: u64) {
        self.lock().foreign = memory;
    }

    /// So much memory (MiB) is in one piece until the next boot.
    pub fn set_in_one_piece(&self, memory: u64) {
        self.lock().in_one_piece = memory;
    }

    /// Whether the stock service does nothing and calls that a success.
    pub fn set_effectless(&self, effectless: bool) {
        self.lock().effectless = effectless;
    }

    /// What it is made of.
    pub fn inventory(&self) -> Arc<Inventory> {
        self.lock().inventory()
    }

    /// The allocator can't be started.
    pub fn set_allocator_away(&self, away: bool) {
        self.lock().allocator_away = away;
    }

    /// The pool: CPUs and memory (MiB).
    pub fn pool(&self) -> (u32, u64) {
        self.lock().pool
    }

    /// What the allocator was asked for so far, each time.
    pub fn reserves(&self) -> Vec<(u32, u64)> {
        self.lock().reserves.clone()
    }

    /// Whether every enclave answers its probes badly.
    pub fn set_sick(&self, sick: bool) {
        self.lock().sick = sick;
    }

    /// Whether the planned fault has struck.
    pub fn fault_struck(&self) -> bool {
        self.lock().planned.is_none()
    }

    /// From now on nitro-cli says something else of that enclave than was launched.
    pub fn describe_otherwise(&self, name: EnclaveName) {
        self.lock().described_otherwise.insert(name);
    }

    /// The proxy process dies.
    pub fn kill_proxy(&self) {
        let mut state = self.lock();
        if state.proxy.take().is_some() {
            state.proxy_died = Some(Instant::now());
        }
        self.proxy_changed.notify_one();
    }

    /// The ledger's file is torn.
    pub fn tear_ledger(&self) {
        let mut state = self.lock();
        state.ledger = None;
        state.ledger_torn = true;
    }

    /// The host is rebooted: nothing but the disks stays.
    pub fn reboot(&self) {
        let mut state = self.lock();
        let boot = state.next_pid;
        state.boot_id = BootId(format!("boot-{boot}"));
        state.launched.clear();
        // The stock service reserves what its file says, and memory is in one piece.
        state.changing = None;
        state.in_one_piece = u64::MAX;
        state.pool = state.file;
        state.proxy = None;
        state.proxy_died = None;
        state.open.clear();
    }

    pub(crate) fn boot_id(&self) -> BootId {
        self.lock().boot_id.clone()
    }
}
