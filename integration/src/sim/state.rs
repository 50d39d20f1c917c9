//! What the simulated host is made of, how it goes on by itself while time passes, and what must never happen to it.

use super::{ACCOUNT, ALLOCATE, Fault, LAUNCH, LOOK};
use enclaved::host::{Effect, Outcome};
use enclaved_core::desired::{HostPolicy, ImageRequest};
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, Cid, EifDigest, EnclaveKey, EnclaveName, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::inventory::{Cpu, CpuSet, Hugepages, Inventory, Node};
use enclaved_core::ledger::{GenerationRecord, LaunchRecord, Ledger, ProcessIdentity};
use enclaved_core::observed::AskedBy;
use enclaved_core::observed::Observation::{self, Known};
use enclaved_core::plan::Launch;
use enclaved_core::routes::Routes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::time::Instant;

/// A launch on the simulated host.
#[derive(Debug, Clone)]
pub(super) struct Launched {
    pub(super) record: GenerationRecord,
    pub(super) process: LaunchRecord,
    pub(super) up_at: Instant,
    /// From when on it is over.
    pub(super) over: Option<Instant>,
    /// Who ended it, if the control process did not.
    pub(super) asked: Option<AskedBy>,
    /// That is noted only when all is known of its end.
    pub(super) asked_late: bool,
    /// Its traces are lost; only its process tells that it runs.
    pub(super) traceless: bool,
}

impl Launched {
    /// Whether it is known how it ended.
    pub(super) fn is_told(&self) -> bool {
        self.over.is_some_and(|over| over + ACCOUNT <= Instant::now())
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.is_some_and(|over| over <= Instant::now())
    }
}

/// The pool, and how many enclaves run.
pub(super) type Surveyed = ((u32, u64), usize);

/// The allocator at work.
#[derive(Debug)]
pub(super) struct Changing {
    pub(super) until: Instant,
    pub(super) wish: (u32, u64),
    pub(super) least: Option<(u32, u64)>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) boot_id: BootId,
    pub(super) ledger: Option<Ledger>,
    pub(super) ledger_torn: bool,
    pub(super) launched: BTreeMap<EnclaveKey, Launched>,
    pub(super) proxy: Option<u32>,
    /// When it was killed last.
    pub(super) proxy_died: Option<Instant>,
    pub(super) routes: Option<Routes>,
    pub(super) pool: (u32, u64),
    pub(super) most: (u32, u64),
    /// What the stock allocator's file asks for: the pool after a boot.
    pub(super) file: (u32, u64),
    /// The allocator is at work, whoever waits for it.
    pub(super) changing: Option<Changing>,
    /// What it came to last.
    pub(super) changed: Outcome<()>,
    /// Memory that can be had as hugepages (MiB): the rest is in pieces.
    pub(super) in_one_piece: u64,
    /// The stock service says that it succeeded, and does nothing.
    pub(super) effectless: bool,
    /// The allocator can't be started.
    pub(super) allocator_away: bool,
    /// Waiting for news of the launches panics.
    pub(super) watching_breaks: bool,
    /// What the allocator was asked for, each time.
    pub(super) reserves: Vec<(u32, u64)>,
    /// The last inventory, and of what: pool and enclaves that run.
    pub(super) surveyed: Option<(Surveyed, Arc<Inventory>)>,
    /// What the sources have.
    pub(super) images: BTreeMap<ImageRequest, VerifiedImage>,
    pub(super) images_away: bool,
    /// What each request came to, by the cache's index.
    pub(super) index: BTreeMap<ImageRequest, VerifiedImage>,
    /// Every image that was ever on disk.
    pub(super) known: BTreeMap<EifDigest, VerifiedImage>,
    /// The images on disk, and when they were used last.
    pub(super) cached: BTreeMap<EifDigest, Timestamp>,
    /// Those on disk that are not what they were.
    pub(super) spoilt: BTreeSet<EifDigest>,
    pub(super) open: BTreeMap<Cid, u64>,
    /// Hugepage memory that somebody else holds.
    pub(super) foreign: u64,
    pub(super) sick: bool,
    /// Enclaves of which nitro-cli says something else than was launched.
    pub(super) described_otherwise: BTreeSet<EnclaveName>,
    pub(super) next_pid: u32,
    pub(super) sequence: u64,
    pub(super) counts: BTreeMap<Effect, u32>,
    pub(super) planned: Option<(Effect, u32, Fault)>,
    /// Chance of a fault for every effect, in 1/1000, and the random numbers for it.
    pub(super) storm: u64,
    pub(super) random: u64,
    pub(super) violations: Vec<String>,
    pub(super) launches: Vec<EnclaveKey>,
    pub(super) stops: Vec<EnclaveKey>,
}

impl State {
    pub(super) fn random(&mut self) -> u64 {
        // xorshift64: enough to spread faults, and the same on every machine.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    pub(super) fn fault(&mut self, effect: Effect) -> Option<Fault> {
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
    pub(super) fn keep(&mut self, request: &ImageRequest, image: &VerifiedImage, at: Timestamp) {
        self.index.insert(request.clone(), image.clone());
        self.cached.insert(image.digest(), at);
        self.known.insert(image.digest(), image.clone());
        self.spoilt.remove(&image.digest());
    }

    /// `enclaved allocate` is started: it looks for itself whether an enclave runs, and goes on whoever waits for it.
    pub(super) fn begin_change(&mut self, wish: (u32, u64), least: Option<(u32, u64)>) -> Outcome<()> {
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
    pub(super) fn change(&mut self) {
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
    pub(super) fn inventory(&mut self) -> Arc<Inventory> {
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

    pub(super) fn survey(&self) -> Inventory {
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

    pub(super) fn alive(&self) -> impl Iterator<Item = (&EnclaveKey, &Launched)> {
        self.launched.iter().filter(|(_, launched)| !launched.is_over())
    }

    pub(super) fn launch(&mut self, launch: &Launch, now: Instant, at: Timestamp) {
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
