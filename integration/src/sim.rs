//! A simulated host: every port of the daemon, in memory, under paused time, with a fault for any of its effects. What
//! must never happen on a host is checked as it happens, and kept as a violation.
//!
//! It models what the real effects promise, not how they do it.

mod harness;

pub use harness::{Harness, desired, image};

use enclaved::host::{
    Allocator, Clock, Effect, Host, ImageStore, LedgerStore, LoadedLedger, NotReserved, Outcome, Prober, Progress,
    Proof, ProxyLink, Supervisor, Surveyor,
};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::desired::{HealthCheck, HostPolicy, ImageRequest};
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, Cid, EifDigest, EnclaveKey, EnclaveName, MemoryMib, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::inventory::{Cpu, CpuSet, Hugepages, Inventory, Node};
use enclaved_core::ledger::{GenerationRecord, LaunchRecord, Ledger, ProcessIdentity};
use enclaved_core::observed::Observation::{self, Known};
use enclaved_core::observed::{AskedBy, CacheItem, CachedImage, End, ImageCache, Instance, InstanceState, Pool};
use enclaved_core::plan::{self, Launch, Prefer};
use enclaved_core::routes::{ListenerKey, ListenerReport, ProxyReport, Routes};
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

/// A launch on the simulated host.
#[derive(Debug, Clone)]
struct Launched {
    record: GenerationRecord,
    process: LaunchRecord,
    up_at: Instant,
    /// From when on it is over.
    over: Option<Instant>,
    /// Who ended it, if the control process did not.
    asked: Option<AskedBy>,
    /// That is noted only when all is known of its end.
    asked_late: bool,
    /// Its traces are lost; only its process tells that it runs.
    traceless: bool,
}

impl Launched {
    /// Whether it is known how it ended.
    fn is_told(&self) -> bool {
        self.over.is_some_and(|over| over + ACCOUNT <= Instant::now())
    }

    fn is_over(&self) -> bool {
        self.over.is_some_and(|over| over <= Instant::now())
    }
}

/// The pool, and how many enclaves run.
type Surveyed = ((u32, u64), usize);

/// The allocator at work.
#[derive(Debug)]
struct Changing {
    until: Instant,
    wish: (u32, u64),
    least: Option<(u32, u64)>,
}

#[derive(Debug)]
struct State {
    boot_id: BootId,
    ledger: Option<Ledger>,
    ledger_torn: bool,
    launched: BTreeMap<EnclaveKey, Launched>,
    proxy: Option<u32>,
    /// When it was killed last.
    proxy_died: Option<Instant>,
    routes: Option<Routes>,
    pool: (u32, u64),
    most: (u32, u64),
    /// What the stock allocator's file asks for: the pool after a boot.
    file: (u32, u64),
    /// The allocator is at work, whoever waits for it.
    changing: Option<Changing>,
    /// What it came to last.
    changed: Outcome<()>,
    /// Memory that can be had as hugepages (MiB): the rest is in pieces.
    in_one_piece: u64,
    /// The stock service says that it succeeded, and does nothing.
    effectless: bool,
    /// The allocator can't be started.
    allocator_away: bool,
    /// Waiting for news of the launches panics.
    watching_breaks: bool,
    /// What the allocator was asked for, each time.
    reserves: Vec<(u32, u64)>,
    /// The last inventory, and of what: pool and enclaves that run.
    surveyed: Option<(Surveyed, Arc<Inventory>)>,
    /// What the sources have.
    images: BTreeMap<ImageRequest, VerifiedImage>,
    images_away: bool,
    /// What each request came to, by the cache's index.
    index: BTreeMap<ImageRequest, VerifiedImage>,
    /// Every image that was ever on disk.
    known: BTreeMap<EifDigest, VerifiedImage>,
    /// The images on disk, and when they were used last.
    cached: BTreeMap<EifDigest, Timestamp>,
    /// Those on disk that are not what they were.
    spoilt: BTreeSet<EifDigest>,
    open: BTreeMap<Cid, u64>,
    /// Hugepage memory that somebody else holds.
    foreign: u64,
    sick: bool,
    /// Enclaves of which nitro-cli says something else than was launched.
    described_otherwise: BTreeSet<EnclaveName>,
    next_pid: u32,
    sequence: u64,
    counts: BTreeMap<Effect, u32>,
    planned: Option<(Effect, u32, Fault)>,
    /// Chance of a fault for every effect, in 1/1000, and the random numbers for it.
    storm: u64,
    random: u64,
    violations: Vec<String>,
    launches: Vec<EnclaveKey>,
    stops: Vec<EnclaveKey>,
}

impl State {
    fn random(&mut self) -> u64 {
        // xorshift64: enough to spread faults, and the same on every machine.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn fault(&mut self, effect: Effect) -> Option<Fault> {
        let count = self.counts.entry(effect).or_insert(0);
        *count += 1;
        if let Some((of, nth, fault)) = self.planned
            && of == effect
            && nth == *count
        {
            self.planned = None;
            return Some(fault);
        }
        if self.storm > 0 && self.random() % 1000 < self.storm {
            let modes = Fault::ALL.len() as u64;
            return usize::try_from(self.random() % modes).ok().map(|n| Fault::ALL[n]);
        }
        None
    }

    /// An image was fetched and proven.
    fn keep(&mut self, request: &ImageRequest, image: &VerifiedImage, at: Timestamp) {
        self.index.insert(request.clone(), image.clone());
        self.cached.insert(image.digest(), at);
        self.known.insert(image.digest(), image.clone());
        self.spoilt.remove(&image.digest());
    }

    /// `enclaved allocate` is started: it looks for itself whether an enclave runs, and goes on whoever waits for it.
    fn begin_change(&mut self, wish: (u32, u64), least: Option<(u32, u64)>) -> Outcome<()> {
        if self.allocator_away {
            return Err(Failure::new("systemd can't be reached"));
        }
        let runs = self.alive().next().map(|(key, _)| key.clone());
        if let Some(key) = runs {
            self.violations.push(format!("the pool is to be changed while {key} runs"));
            return Err(Failure::new("an enclave runs"));
        }
        if self.changing.is_some() {
            self.violations.push("the pool is to be changed twice at a time".to_owned());
            return Err(Failure::new("the allocator is at work"));
        }
        if wish.0 > self.most.0 || wish.1 > self.most.1 {
            self.violations.push(format!("{wish:?} is more than the host has"));
            return Err(Failure::new("the host is too small"));
        }
        self.reserves.push(wish);
        self.changing = Some(Changing { until: Instant::now() + ALLOCATE, wish, least });
        Ok(())
    }

    /// What the allocator comes to, once its time is over: the wish, or the least, or the pool as it was.
    fn change(&mut self) {
        let Some(Changing { wish, least, .. }) = self.changing.take_if(|changing| changing.until <= Instant::now())
        else {
            return;
        };
        self.file = wish;
        let had = [Some(wish), least].into_iter().flatten().find(|(_, memory)| *memory <= self.in_one_piece);
        self.changed = match had {
            _ if self.effectless => Ok(()),
            Some(had) => {
                self.pool = had;
                Ok(())
            }
            None => Err(Failure::new("memory is in pieces")),
        };
    }

    /// The host as its inventory: one memory node, two threads a core, the pool's cores from above.
    fn inventory(&mut self) -> Arc<Inventory> {
        let of = (self.pool, self.alive().count());
        match &self.surveyed {
            Some((last, inventory)) if *last == of => Arc::clone(inventory),
            _ => {
                let inventory = Arc::new(self.survey());
                self.surveyed = Some((of, Arc::clone(&inventory)));
                inventory
            }
        }
    }

    fn survey(&self) -> Inventory {
        let cores = (self.most.0 + 2) / 2;
        let core = |number: u32| CpuSet::new([number % cores, number % cores + cores]).unwrap_or_default();
        let in_pool = |number: u32| number % cores >= cores - self.pool.0 / 2;
        let cpu = |number: u32| {
            let cpu = Cpu { online: !in_pool(number), node: Known(0), core: Known(core(number)) };
            (number, cpu)
        };
        let pages = |total: u64| Hugepages { total, free: total, surplus: 0 };
        let hugepages = BTreeMap::from([(1 << 20, pages(self.pool.1 / 1024)), (2048, pages(self.pool.1 % 1024 / 2))]);
        let total_kib = Known((self.most.1 + HostPolicy::default().reserve_memory.0) * 1024);
        let node = Node { total_kib, free_kib: Known(0), hugepages: Known(hugepages) };
        fn unseen<T>() -> Observation<T> {
            Observation::Unknown(Failure::new("nobody looks at it"))
        }
        Inventory {
            instance_type: unseen(),
            cpus: Known((0..cores * 2).map(cpu).collect()),
            nodes: Known(BTreeMap::from([(0, node)])),
            driver_loaded: Known(true),
            pool: Known(CpuSet::new((0..cores * 2).filter(|number| in_pool(*number))).unwrap_or_default()),
            device: unseen(),
            nitro_cli: unseen(),
            allocator_service: unseen(),
            allocator_file: unseen(),
            enclaves: Known(u32::try_from(self.alive().count()).unwrap_or(u32::MAX)),
        }
    }

    fn alive(&self) -> impl Iterator<Item = (&EnclaveKey, &Launched)> {
        self.launched.iter().filter(|(_, launched)| !launched.is_over())
    }

    fn launch(&mut self, launch: &Launch, now: Instant, at: Timestamp) {
        if self.launched.contains_key(&launch.key) {
            return;
        }
        let mut wrong = Vec::new();
        let (key, record) = (&launch.key, &launch.record);
        for (other, running) in self.alive() {
            if running.record.cid == record.cid {
                wrong.push(format!("{key} has the CID of {other}"));
            }
            if running.up_at > now {
                wrong.push(format!("{key} is launched while {other} is being launched"));
            }
        }
        let cpus: u32 = self.alive().map(|(_, running)| running.record.identity.cpus).sum();
        let memory: u64 = self.alive().map(|(_, running)| running.record.identity.memory.0).sum();
        if cpus + record.identity.cpus > self.pool.0 || memory + record.identity.memory.0 > self.pool.1 {
            wrong.push(format!("{key} does not fit the pool"));
        }
        if self.alive().filter(|(other, _)| other.name == key.name).count() > 1 {
            wrong.push(format!("{key} is a third enclave of that name"));
        }
        if launch.image.digest() != record.identity.image {
            wrong.push(format!("{key} is launched with another image than decided"));
        }
        let digest = launch.image.digest();
        if !self.cached.contains_key(&digest) || self.spoilt.contains(&digest) {
            wrong.push(format!("{key} is launched though its image is not on disk as it was proven"));
        }
        let served = |port| {
            // Nobody can know of a proxy that died after the look on which the launch was decided.
            let died_just_now = self.proxy_died.is_some_and(|died| now - died < LOOK);
            let routes = self.routes.as_ref().filter(|_| self.proxy.is_some() || died_just_now);
            routes.into_iter().flat_map(|routes| &routes.egress).any(|e| e.cid == record.cid && e.vsock_port == port)
        };
        for endpoint in record.egress.iter().filter(|endpoint| !served(endpoint.vsock_port)) {
            wrong.push(format!("{key} is launched before its egress port {} listens", endpoint.vsock_port));
        }
        if self.changing.is_some() {
            wrong.push(format!("{key} is launched while the pool is being changed"));
        }
        self.violations.append(&mut wrong);
        self.next_pid += 1;
        let process = LaunchRecord {
            enclave_id: format!("i-0-enc{}", self.next_pid),
            process: ProcessIdentity { pid: self.next_pid, start_time: u64::from(self.next_pid) },
            cpu_ids: Vec::new(),
            memory: record.identity.memory,
            at,
        };
        self.launches.push(key.clone());
        let launched = Launched {
            record: record.clone(),
            process,
            up_at: now + LAUNCH,
            over: None,
            asked: None,
            asked_late: false,
            traceless: false,
        };
        self.launched.insert(key.clone(), launched);
    }
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

impl Supervisor for World {
    async fn observe(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>) -> Outcome<BTreeMap<EnclaveKey, Instance>> {
        let (now, at) = (Instant::now(), self.now());
        self.effect(Effect::SupervisorObserve, |state| {
            let instance = |launched: &Launched| {
                let generation = (!launched.traceless).then(|| launched.record.clone());
                let state = match launched.over {
                    Some(over) if over <= now => {
                        let early = now < over + ACCOUNT;
                        let asked = launched.asked.filter(|_| !(early && launched.asked_late));
                        let settled = asked.is_some() || !early;
                        let account = settled.then(|| "it exited with status 0".to_owned());
                        InstanceState::Ended(End { asked, account, settled, ..End::noticed(at) })
                    }
                    _ if now < launched.up_at => InstanceState::Launching,
                    _ => InstanceState::Running(launched.process.clone()),
                };
                Instance { generation, state }
            };
            let traced = |key: &EnclaveKey, launched: &Launched| {
                !launched.traceless || (known.contains_key(key) && !launched.is_over())
            };
            let seen = state.launched.iter().filter(|(key, launched)| traced(key, launched));
            Ok(seen.map(|(key, launched)| (key.clone(), instance(launched))).collect())
        })
        .await
    }

    async fn launch(&self, launch: &Launch) -> Outcome<()> {
        let (now, at) = (Instant::now(), self.now());
        self.effect(Effect::SupervisorLaunch, |state| {
            state.launch(launch, now, at);
            Ok(())
        })
        .await?;
        self.enclaves_changed.notify_one();
        Ok(())
    }

    async fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> Outcome<()> {
        self.effect(Effect::SupervisorStop, |state| {
            if let Some(launched) = state.launched.get_mut(key)
                && launched.process.process == launch.process
                && launched.over.is_none()
            {
                launched.over = Some(Instant::now() + STOP);
                state.stops.push(key.clone());
            }
            Ok(())
        })
        .await?;
        self.enclaves_changed.notify_one();
        Ok(())
    }

    async fn describe(&self, launched: &[plan::Launched]) -> Outcome<BTreeMap<EnclaveKey, Option<Failure>>> {
        self.effect(Effect::SupervisorDescribe, |state| {
            let youngest =
                state.launched.values().filter(|launched| !launched.is_over()).map(|launched| launched.up_at).max();
            if youngest.is_some_and(|up| up.elapsed() < Duration::from_secs(30)) {
                state.violations.push("nitro-cli is asked while an enclave is young".to_owned());
            }
            let runs = |one: &&plan::Launched| state.launched.get(&one.key).is_some_and(|launched| !launched.is_over());
            let said = launched.iter().filter(runs).map(|one| {
                let otherwise = state.described_otherwise.contains(&one.key.name);
                (one.key.clone(), otherwise.then(|| Failure::new("its mode is debug instead of no debug")))
            });
            Ok(said.collect())
        })
        .await
    }

    async fn forget(&self, key: &EnclaveKey) -> Outcome<()> {
        self.effect(Effect::SupervisorForget, |state| {
            let early = |launched: &Launched| (launched.asked.is_none() || launched.asked_late) && !launched.is_told();
            if state.launched.get(key).is_some_and(|launched| launched.is_over() && early(launched)) {
                state.violations.push(format!("{key} is to be forgotten before it is known how it ended"));
            }
            if state.launched.get(key).is_some_and(|launched| !launched.is_over()) {
                state.violations.push(format!("{key} is to be forgotten while it runs"));
                return Err(Failure::new("it runs"));
            }
            state.launched.remove(key);
            Ok(())
        })
        .await
    }

    async fn changed(&self) {
        assert!(!self.lock().watching_breaks, "it was asked to break");
        // A fault here means that no wake-up comes; the loop's own tick must do.
        if self.effect(Effect::SupervisorChanged, |_| Ok(())).await.is_ok() {
            tokio::select! {
                biased;
                // Both only wake up.
                () = self.enclaves_changed.notified() => {}
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
        }
    }
}

impl ImageStore for World {
    async fn observe(&self) -> Outcome<ImageCache> {
        self.effect(Effect::ImageStoreObserve, |state| {
            let image =
                |(digest, used): (&EifDigest, &Timestamp)| CachedImage { digest: *digest, size: 1, used: *used };
            Ok(ImageCache { images: state.cached.iter().map(image).collect(), unfinished: Vec::new() })
        })
        .await
    }

    async fn fetch(&self, request: &ImageRequest, prefer: Prefer, progress: Arc<Progress>) -> Outcome<VerifiedImage> {
        progress.set_total(1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let at = self.now();
        self.effect(Effect::ImageStoreFetch, |state| {
            let good = |image: &&VerifiedImage| {
                state.cached.contains_key(&image.digest()) && !state.spoilt.contains(&image.digest())
            };
            let known = |digest: &EifDigest| state.known.get(digest).filter(good);
            let kept = match &prefer {
                Prefer::Known(digest) => known(digest).or_else(|| state.index.get(request).filter(good)),
                Prefer::Cached => state.index.get(request).filter(good),
                Prefer::Source => None,
            };
            let image = kept.or_else(|| state.images.get(request)).filter(|_| !state.images_away).cloned();
            let image = image.ok_or_else(|| Failure::new("there is no such image"))?;
            state.keep(request, &image, at);
            Ok(image)
        })
        .await
    }

    async fn refresh(
        &self,
        request: &ImageRequest,
        known: &EifDigest,
        progress: Arc<Progress>,
    ) -> Outcome<Option<VerifiedImage>> {
        progress.set_total(1);
        let at = self.now();
        self.effect(Effect::ImageStoreRefresh, |state| {
            let there = state.images.get(request).filter(|_| !state.images_away).cloned();
            let there = there.ok_or_else(|| Failure::new("there is no such image"))?;
            state.keep(request, &there, at);
            Ok((there.digest() != *known).then_some(there))
        })
        .await
    }

    async fn prove(&self, image: &VerifiedImage) -> Outcome<Proof> {
        self.effect(Effect::ImageStoreProve, |state| {
            let digest = image.digest();
            if state.spoilt.remove(&digest) || !state.cached.contains_key(&digest) {
                state.cached.remove(&digest);
                return Ok(Proof::Spoilt(Failure::new("it is not what it was")));
            }
            Ok(Proof::Holds)
        })
        .await
    }

    async fn remove(&self, item: &CacheItem) -> Outcome<()> {
        self.effect(Effect::ImageStoreRemove, |state| {
            let CacheItem::Image(digest) = item else { return Ok(()) };
            let used = state.alive().find(|(_, launched)| launched.record.identity.image == *digest);
            if let Some((key, _)) = used {
                let violation = format!("the image of {key} is removed while it runs");
                state.violations.push(violation);
            }
            state.cached.remove(digest);
            state.spoilt.remove(digest);
            Ok(())
        })
        .await
    }
}

impl Allocator for World {
    async fn observe(&self) -> Outcome<Pool> {
        self.effect(Effect::AllocatorObserve, |state| {
            let used: u64 = state.alive().map(|(_, launched)| launched.record.identity.memory.0).sum();
            let memory_free = MemoryMib(state.pool.1.saturating_sub(used + state.foreign));
            let changing = state.changing.is_some();
            Ok(Pool::Sized { cpus: state.pool.0, memory: MemoryMib(state.pool.1), memory_free, changing })
        })
        .await
    }

    async fn reserve(&self, wish: &Reservation, least: Option<&Reservation>) -> Result<(), NotReserved> {
        let pair = |reservation: &Reservation| (reservation.cpus.count(), reservation.memory_mib.0);
        let (wish, least) = (pair(wish), least.map(pair));
        let begun = self.effect(Effect::AllocatorReserve, |state| state.begin_change(wish, least)).await;
        begun.map_err(NotReserved::not_tried)?;
        while self.lock().changing.is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.lock().changed.clone().map_err(NotReserved::tried)
    }
}

impl Surveyor for World {
    async fn observe(&self) -> Outcome<Option<Arc<Inventory>>> {
        self.effect(Effect::SurveyorObserve, |state| Ok(Some(state.inventory()))).await
    }
}

impl ProxyLink for World {
    async fn observe(&self) -> Outcome<ProxyReport> {
        self.effect(Effect::ProxyLinkObserve, |state| {
            let Some(pid) = state.proxy else { return Err(Failure::new("the proxy is not there")) };
            let listeners = state.routes.iter().flat_map(|routes| &routes.egress).map(|egress| ListenerReport {
                listener: ListenerKey::Egress { cid: egress.cid, vsock_port: egress.vsock_port },
                address: format!("vsock:{}", egress.vsock_port),
                error: None,
            });
            Ok(ProxyReport {
                sequence: state.sequence,
                pid,
                revision: state.routes.as_ref().map(Routes::revision),
                listeners: listeners.collect(),
                ingress_open: state.open.clone(),
                ..ProxyReport::default()
            })
        })
        .await
    }

    async fn start(&self) -> Outcome<()> {
        self.effect(Effect::ProxyLinkStart, |state| {
            if state.proxy.is_none() {
                state.next_pid += 1;
                state.proxy = Some(state.next_pid);
            }
            Ok(())
        })
        .await
    }

    async fn publish(&self, routes: &Routes) -> Outcome<()> {
        self.effect(Effect::ProxyLinkPublish, |state| {
            if state.proxy.is_none() {
                return Err(Failure::new("the proxy is not there"));
            }
            let has = |routes: &Routes, cid| routes.egress.iter().any(|egress| egress.cid == cid);
            let cut: Vec<_> = state
                .alive()
                .filter(|(_, launched)| state.routes.as_ref().is_some_and(|old| has(old, launched.record.cid)))
                .filter(|(_, launched)| !has(routes, launched.record.cid))
                .map(|(key, _)| format!("{key} runs and is cut off from its egress"))
                .collect();
            state.violations.extend(cut);
            state.routes = Some(routes.clone());
            state.sequence += 1;
            Ok(())
        })
        .await
    }

    async fn changed(&self) {
        if self.effect(Effect::ProxyLinkChanged, |_| Ok(())).await.is_ok() {
            tokio::select! {
                biased;
                // Both only wake up.
                () = self.proxy_changed.notified() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }
}

impl Prober for World {
    async fn probe(&self, cid: Cid, _: &HealthCheck) -> Outcome<Result<(), String>> {
        let now = Instant::now();
        self.effect(Effect::ProberProbe, |state| {
            let found = state.alive().find(|(_, launched)| launched.record.cid == cid);
            Ok(match found {
                Some((_, launched)) if now >= launched.up_at + BOOT && !state.sick => Ok(()),
                Some(_) => Err("connection refused".to_owned()),
                None => Err("no such enclave".to_owned()),
            })
        })
        .await
    }
}

impl LedgerStore for World {
    async fn load(&self) -> Outcome<LoadedLedger> {
        self.effect(Effect::LedgerStoreLoad, |state| {
            let torn = std::mem::take(&mut state.ledger_torn);
            let problem = torn.then(|| Failure::new("the ledger was torn and is put aside"));
            Ok(LoadedLedger { ledger: state.ledger.clone().unwrap_or_default(), problem })
        })
        .await
    }

    async fn save(&self, ledger: &Ledger) -> Outcome<()> {
        self.effect(Effect::LedgerStoreSave, |state| {
            state.ledger = Some(ledger.clone());
            Ok(())
        })
        .await
    }
}

impl Clock for World {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_800_000_000_000).plus(self.began.elapsed())
    }
}

impl Host for World {
    type Supervisor = Self;
    type Images = Self;
    type Allocator = Self;
    type Surveyor = Self;
    type Proxy = Self;
    type Prober = Self;
    type Ledger = Self;
    type Clock = Self;

    fn supervisor(&self) -> &Self {
        self
    }
    fn images(&self) -> &Self {
        self
    }
    fn allocator(&self) -> &Self {
        self
    }
    fn surveyor(&self) -> &Self {
        self
    }
    fn proxy(&self) -> &Self {
        self
    }
    fn prober(&self) -> &Self {
        self
    }
    fn ledger(&self) -> &Self {
        self
    }
    fn clock(&self) -> &Self {
        self
    }
}
