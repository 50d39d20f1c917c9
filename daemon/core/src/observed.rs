//! What is there: the host as it was seen in one pass of the loop. Values only; looking happens in the daemon's `host`.
//!
//! What could not be seen is `Unknown`, never absent (invariant 2): nothing destructive may follow from it.

use crate::allocator_file::Reservation;
use crate::desired::ImageRequest;
use crate::failure::Failure;
use crate::id::{BootId, EifDigest, EnclaveKey, EnclaveName, MemoryMib, Timestamp};
use crate::image::VerifiedImage;
use crate::inventory::Inventory;
use crate::ledger::{GenerationRecord, LaunchRecord, ProcessIdentity};
use crate::routes::ProxyReport;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// Something that was looked at: seen, or not to be seen just now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation<T> {
    /// It is so.
    Known(T),
    /// It could not be found out, for this reason.
    Unknown(Failure),
}

impl<T> Observation<T> {
    /// The value, if it is known. Whoever calls this must do nothing destructive on `None`.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown(_) => None,
        }
    }
}

/// The host in one pass of the loop.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Which boot of the host this is.
    pub boot_id: BootId,
    /// Every launch the supervisor has traces of.
    pub instances: Observation<BTreeMap<EnclaveKey, Instance>>,
    /// The enclave resources of the host.
    pub pool: Observation<Pool>,
    /// What the host is made of; `None`: that is not looked at.
    pub inventory: Observation<Option<Arc<Inventory>>>,
    /// The proxy process.
    pub proxy: Observation<ProxyReport>,
    /// Images that were verified since this process started.
    pub images: BTreeMap<ImageRequest, VerifiedImage>,
    /// What the image cache holds.
    pub cache: Observation<ImageCache>,
    /// When the source of each image was last asked, with success, whether it has something else by now.
    pub refreshed: BTreeMap<ImageRequest, Timestamp>,
    /// Images that somebody wants in the cache, beside those of the configuration.
    pub asked: BTreeSet<ImageRequest>,
    /// Images that were fetched lately because somebody asked for them ahead of their use.
    pub ahead: BTreeSet<EifDigest>,
    /// The last probe of each generation.
    pub health: BTreeMap<EnclaveKey, HealthReport>,
    /// What nitro-cli said of generations that run, by the process that each had then: in what it differs from what was launched.
    pub described: BTreeMap<EnclaveKey, (ProcessIdentity, Option<Failure>)>,
    /// Jobs at work now.
    pub running: BTreeSet<JobKey>,
    /// Jobs that failed, and have not succeeded since.
    pub failed: BTreeMap<JobKey, JobFailure>,
    /// When each job succeeded last, as far as it was in the last while.
    pub succeeded: BTreeMap<JobKey, Timestamp>,
    /// The last time that this process had the allocator try something, once that is over. What did not get as far as the stock
    /// allocator is no try.
    pub reserve_ended: Option<ReserveEnded>,
}

/// The allocator tried something, and it is over, with success or without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReserveEnded {
    /// What was asked for.
    pub wish: Reservation,
    /// When it was over.
    pub at: Timestamp,
}

/// One launch, as its traces on the host show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// What was to be launched, as the supervisor was told; `None` if that trace can't be read.
    pub generation: Option<GenerationRecord>,
    /// How far it is.
    pub state: InstanceState,
}

/// How far a launch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstanceState {
    /// The launch helper is at work; nitro-cli may or may not have started the enclave.
    Launching,
    /// The enclave's process is there: same PID, same start time.
    Running(LaunchRecord),
    /// It cannot be told whether it runs (nitro-cli does not answer, traces contradict each other). It may: so it keeps its
    /// name, its CID and its resources, and is neither ended nor forgotten.
    Unknown(Failure),
    /// It is over: the launch failed, or the enclave's process is gone.
    Ended(End),
}

/// The end of a launch, as far as the supervisor knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// When it was noticed.
    pub at: Timestamp,
    /// Why the launch failed; `None` if the enclave ran and its process is gone.
    pub launch_failure: Option<Failure>,
    /// Who asked for it in this boot, if it was not enclaved itself.
    pub asked: Option<AskedBy>,
    /// How the enclave's process ended: its exit status, its last words. `None` while, or where, that can't be known.
    pub account: Option<String>,
    /// Whether all is known that will ever be. Until then the traces must stay; the supervisor wakes the loop.
    pub settled: bool,
}

impl End {
    /// An end of which nothing is known but that it was.
    pub fn noticed(at: Timestamp) -> Self {
        Self { at, launch_failure: None, asked: None, account: None, settled: true }
    }
}

/// Who asked the service manager to end an enclave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskedBy {
    /// Somebody stopped its unit: they want it to stay stopped.
    Stop,
    /// Somebody restarted its unit: they want it to be launched anew.
    Restart,
    /// Everything is being stopped, because the host shuts down; or it can't be told why.
    Shutdown,
}

/// The enclave resources of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pool {
    /// Somebody else hands them out (Kubernetes' device plugin): nitro-cli will say what does not fit.
    External,
    /// The driver's CPU pool and the hugepages.
    Sized {
        /// CPUs in the driver's pool, used or not.
        cpus: u32,
        /// Memory in hugepages, used or not.
        memory: MemoryMib,
        /// Memory in hugepages that nobody uses.
        memory_free: MemoryMib,
        /// The allocator is just changing it: these numbers say nothing of what will be there.
        changing: bool,
    },
}

/// The images on this host's disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageCache {
    /// Whole ones.
    pub images: Vec<CachedImage>,
    /// Downloads that were begun, under way or not.
    pub unfinished: Vec<Unfinished>,
}

/// One image on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedImage {
    /// Its SHA-256, by its name: whether the file is still that is for a proof to say.
    pub digest: EifDigest,
    /// Its size on disk, in bytes.
    pub size: u64,
    /// When it was last fetched or asked for.
    pub used: Timestamp,
}

/// A download that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// What was asked for.
    pub request: ImageRequest,
    /// Its size on disk, in bytes.
    pub size: u64,
    /// When it got on last.
    pub used: Timestamp,
}

/// Something in the image cache.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CacheItem {
    /// A whole image.
    Image(EifDigest),
    /// What a download has left.
    Unfinished(ImageRequest),
}

impl fmt::Display for CacheItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(digest) => write!(f, "the image {}", digest.short()),
            Self::Unfinished(request) => write!(f, "the unfinished download of {}", request.source),
        }
    }
}

/// The probes of one generation so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthReport {
    /// When the last probe ended.
    pub at: Timestamp,
    /// What it found; `Err` says what was wrong.
    pub result: Result<(), String>,
    /// How many in a row had this result.
    pub streak: u32,
}

/// What a job is about. A key runs at most once at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobKey {
    /// Fetch and verify an image.
    Fetch(ImageRequest),
    /// Ask an image's source whether it has something else by now; if so, fetch and verify that.
    Refresh(ImageRequest),
    /// Remove something from the image cache.
    RemoveCached(CacheItem),
    /// Ask the allocator for resources.
    Reserve,
    /// Start the proxy process.
    StartProxy,
    /// Hand a snapshot of the routes to the proxy.
    Publish,
    /// Launch a generation.
    Launch(EnclaveKey),
    /// End a generation.
    Stop(EnclaveKey),
    /// Remove the traces of a generation.
    Forget(EnclaveKey),
    /// Probe a generation's health.
    Probe(EnclaveKey),
    /// Ask nitro-cli what runs.
    Describe,
}

/// A job that failed, so that it is tried again with growing pauses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFailure {
    /// When it failed last.
    pub at: Timestamp,
    /// How often in a row.
    pub count: u32,
    /// The last reason.
    pub failure: Failure,
}

impl Observed {
    /// Whether nothing of this enclave is at work just now.
    pub fn idle(&self, name: &EnclaveName) -> bool {
        !self.running.iter().any(|job| match job {
            JobKey::Launch(key) | JobKey::Stop(key) | JobKey::Forget(key) => key.name == *name,
            _ => false,
        })
    }
}
