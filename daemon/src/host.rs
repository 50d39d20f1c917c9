//! The ports: all that the control process does to its host, as narrow traits. The reconciler and the executor know
//! these traits alone; what stands behind them on a real host lives in the modules below (siblings that never import
//! each other), what stands behind them in a simulation lives in the integration crate.
//!
//! Every method here is an [`Effect`], and every effect can fail, hang, or succeed without our learning of it: so every
//! one is idempotent, or is asked for only after the intent is in the ledger.

pub mod allocator;
pub mod direct;
pub mod image_store;
pub mod instance_metadata;
pub mod inventory;
pub mod ledger_file;
pub mod proxy_link;
pub mod systemd;
pub mod vsock_prober;

use enclaved_core::allocator_file::Reservation;
use enclaved_core::desired::{HealthCheck, ImageRequest};
use enclaved_core::failure::Failure;
use enclaved_core::id::{Cid, EifDigest, EnclaveKey, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::inventory::Inventory;
use enclaved_core::ledger::{LaunchRecord, Ledger};
use enclaved_core::observed::{CacheItem, ImageCache, Instance, Pool};
use enclaved_core::plan::{Launch, Launched, Prefer};
use enclaved_core::routes::{ProxyReport, Routes};
pub use enclaved_core::status::FetchStage;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

/// What an effect comes to. A [`Failure`] says what was being done, why it failed and what a person can do.
pub type Outcome<T> = Result<T, Failure>;

/// Launches enclaves, ends them, and knows which there are.
pub trait Supervisor: Send + Sync + 'static {
    /// Every launch of which there are traces, and how far each is. `known` are the processes that the ledger knows: an
    /// enclave whose process still runs is reported as running even if its other traces are lost.
    fn observe(
        &self,
        known: &BTreeMap<EnclaveKey, LaunchRecord>,
    ) -> impl Future<Output = Outcome<BTreeMap<EnclaveKey, Instance>>> + Send;

    /// Begins to launch a generation, and returns without waiting for its boot. A generation of which there are traces
    /// is not launched again, whatever became of it: the call then succeeds and does nothing.
    fn launch(&self, launch: &Launch) -> impl Future<Output = Outcome<()>> + Send;

    /// Asks that enclave to end, by the process that owns it (never by a PID that may be somebody else's by now).
    /// Succeeds if it is gone already.
    fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> impl Future<Output = Outcome<()>> + Send;

    /// Asks nitro-cli what runs, and says in what each of these differs from what was launched (`None`: in nothing). One of which
    /// nothing can be said, because it ends just now, is left out. Takes as long as nitro-cli does, and is not to be cut off.
    fn describe(
        &self,
        launched: &[Launched],
    ) -> impl Future<Output = Outcome<BTreeMap<EnclaveKey, Option<Failure>>>> + Send;

    /// Removes the traces of a generation that is over. Refused while its enclave runs.
    fn forget(&self, key: &EnclaveKey) -> impl Future<Output = Outcome<()>> + Send;

    /// Returns as soon as a launch or an enclave may have changed its state since the last [`Self::observe`]. It carries
    /// no facts: whoever is woken looks.
    fn changed(&self) -> impl Future<Output = ()> + Send;
}

/// Gets images, proves them and keeps them. What leaves the cache is the plan's to say.
pub trait ImageStore: Send + Sync + 'static {
    /// What the cache holds.
    fn observe(&self) -> impl Future<Output = Outcome<ImageCache>> + Send;

    /// Gets the image, from the cache if what is preferred is there, and verifies it. Only what was proven in this call is
    /// returned.
    fn fetch(
        &self,
        request: &ImageRequest,
        prefer: Prefer,
        progress: Arc<Progress>,
    ) -> impl Future<Output = Outcome<VerifiedImage>> + Send;

    /// Asks the source whether it has something else by now than the image `known`; if so, gets and verifies that. `None`:
    /// it has not. Whoever calls says what he knows, because an earlier answer may not have reached him. After a failure (what
    /// is there now may be refused, too) everything is as it was; an object that was refused is not downloaded again until it
    /// changes.
    fn refresh(
        &self,
        request: &ImageRequest,
        known: &EifDigest,
        progress: Arc<Progress>,
    ) -> impl Future<Output = Outcome<Option<VerifiedImage>>> + Send;

    /// Whether the cached file is still the one that was proven: by inode, size and times if these are as they were at
    /// its proof, else by measuring it again.
    fn prove(&self, image: &VerifiedImage) -> impl Future<Output = Outcome<Proof>> + Send;

    /// Removes it from the cache. Succeeds if it is gone already.
    fn remove(&self, item: &CacheItem) -> impl Future<Output = Outcome<()>> + Send;
}

/// What looking at a proven image again has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// It is what it was.
    Holds,
    /// It is not; what is left of it is not used any more, so that a fetch gets it anew.
    Spoilt(Failure),
}

/// Has the host's enclave resources.
pub trait Allocator: Send + Sync + 'static {
    /// The resources as they are.
    fn observe(&self) -> impl Future<Output = Outcome<Pool>> + Send;

    /// Has the pool changed to the wish, or at the least to that; returns when that is over. Refused while an enclave runs. What
    /// came of it is to be looked at: a success whose answer was lost is a success.
    fn reserve(
        &self,
        wish: &Reservation,
        least: Option<&Reservation>,
    ) -> impl Future<Output = Result<(), NotReserved>> + Send;
}

/// Why the pool is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReserved {
    /// Why.
    pub failure: Failure,
    /// Whether the allocator ran for it, or may have. If not, it was no try: nothing has changed, and nothing was learnt.
    pub ran: bool,
}

impl NotReserved {
    /// The allocator ran, or may have, and this came of it.
    pub fn tried(failure: Failure) -> Self {
        Self { failure, ran: true }
    }

    /// It did not come to that.
    pub fn not_tried(failure: Failure) -> Self {
        Self { failure, ran: false }
    }
}

/// Looks at what the host is made of.
pub trait Surveyor: Send + Sync + 'static {
    /// All of it, as far as sizing needs it; `None`: it is not to be looked at.
    fn observe(&self) -> impl Future<Output = Outcome<Option<Arc<Inventory>>>> + Send;
}

/// The proxy process.
pub trait ProxyLink: Send + Sync + 'static {
    /// What it reports.
    fn observe(&self) -> impl Future<Output = Outcome<ProxyReport>> + Send;

    /// Starts it, unless it runs.
    fn start(&self) -> impl Future<Output = Outcome<()>> + Send;

    /// Hands it a snapshot; returns when it is on the proxy's disk and every listener was opened or failed to.
    fn publish(&self, routes: &Routes) -> impl Future<Output = Outcome<()>> + Send;

    /// Returns as soon as its report may have changed since the last [`Self::observe`], or it may be gone.
    fn changed(&self) -> impl Future<Output = ()> + Send;
}

/// Asks enclaves how they are.
pub trait Prober: Send + Sync + 'static {
    /// One probe. `Ok(Err(text))`: the enclave does not answer well. `Err`: it could not be asked, for a reason that is
    /// the host's (no descriptors left, say), so nothing is known.
    fn probe(&self, cid: Cid, check: &HealthCheck) -> impl Future<Output = Outcome<Result<(), String>>> + Send;
}

/// Keeps the ledger.
pub trait LedgerStore: Send + Sync + 'static {
    /// The ledger as last saved. One that can't be read is put aside (never deleted), and the failure says where.
    fn load(&self) -> impl Future<Output = Outcome<LoadedLedger>> + Send;

    /// Returns when it is on disk (fsync, rename).
    fn save(&self, ledger: &Ledger) -> impl Future<Output = Outcome<()>> + Send;
}

/// A ledger, and what was wrong with its file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadedLedger {
    /// The ledger; empty if there was none, or none that could be read.
    pub ledger: Ledger,
    /// Why the file could not be used, and where it was put.
    pub problem: Option<Failure>,
}

/// Tells the time.
pub trait Clock: Send + Sync + 'static {
    /// Wall-clock time now.
    fn now(&self) -> Timestamp;
}

/// The host: one implementation of each port. `app` names the real ones.
pub trait Host: Send + Sync + 'static {
    /// Launches and ends enclaves.
    type Supervisor: Supervisor;
    /// Gets images.
    type Images: ImageStore;
    /// Has resources.
    type Allocator: Allocator;
    /// Looks at what the host is made of.
    type Surveyor: Surveyor;
    /// The proxy process.
    type Proxy: ProxyLink;
    /// Asks enclaves.
    type Prober: Prober;
    /// Keeps the ledger.
    type Ledger: LedgerStore;
    /// Tells the time.
    type Clock: Clock;

    /// Launches and ends enclaves.
    fn supervisor(&self) -> &Self::Supervisor;
    /// Gets images.
    fn images(&self) -> &Self::Images;
    /// Has resources.
    fn allocator(&self) -> &Self::Allocator;
    /// Looks at what the host is made of.
    fn surveyor(&self) -> &Self::Surveyor;
    /// The proxy process.
    fn proxy(&self) -> &Self::Proxy;
    /// Asks enclaves.
    fn prober(&self) -> &Self::Prober;
    /// Keeps the ledger.
    fn ledger(&self) -> &Self::Ledger;
    /// Tells the time.
    fn clock(&self) -> &Self::Clock;
}

/// How far a fetch is; written by the image store, read by the status.
#[derive(Debug, Default)]
pub struct Progress {
    stage: std::sync::atomic::AtomicU8,
    done: std::sync::atomic::AtomicU64,
    total: std::sync::atomic::AtomicU64,
}

impl Progress {
    /// Sets how many bytes there are in all.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, std::sync::atomic::Ordering::Relaxed);
    }

    /// Adds bytes that have arrived.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    }

    /// Takes back bytes that are to be got again.
    pub fn sub(&self, bytes: u64) {
        use std::sync::atomic::Ordering::Relaxed;
        // The closure always gives a value, so there is always an update.
        let _before = self.done.fetch_update(Relaxed, Relaxed, |done| Some(done.saturating_sub(bytes)));
    }

    /// Says what is being done.
    pub fn set_stage(&self, stage: FetchStage) {
        let number = match stage {
            FetchStage::Asking => 0,
            FetchStage::Downloading => 1,
            FetchStage::Measuring => 2,
        };
        self.stage.store(number, std::sync::atomic::Ordering::Relaxed);
    }

    /// What is being done.
    pub fn stage(&self) -> FetchStage {
        match self.stage.load(std::sync::atomic::Ordering::Relaxed) {
            0 => FetchStage::Asking,
            1 => FetchStage::Downloading,
            _ => FetchStage::Measuring,
        }
    }

    /// Begins again at nothing (a retry).
    pub fn restart(&self) {
        self.done.store(0, std::sync::atomic::Ordering::Relaxed);
    }

    /// Bytes that have arrived, and bytes in all (0 while that is unknown).
    pub fn get(&self) -> (u64, u64) {
        use std::sync::atomic::Ordering::Relaxed;
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }
}

/// Every method of the ports above, for the fault sweep: an effect that is missing there fails a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // The names are `<port><method>`.
pub enum Effect {
    SupervisorObserve,
    SupervisorLaunch,
    SupervisorStop,
    SupervisorDescribe,
    SupervisorForget,
    SupervisorChanged,
    ImageStoreObserve,
    ImageStoreFetch,
    ImageStoreRefresh,
    ImageStoreProve,
    ImageStoreRemove,
    AllocatorObserve,
    AllocatorReserve,
    SurveyorObserve,
    ProxyLinkObserve,
    ProxyLinkStart,
    ProxyLinkPublish,
    ProxyLinkChanged,
    ProberProbe,
    LedgerStoreLoad,
    LedgerStoreSave,
}

impl Effect {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::SupervisorObserve,
        Self::SupervisorLaunch,
        Self::SupervisorStop,
        Self::SupervisorDescribe,
        Self::SupervisorForget,
        Self::SupervisorChanged,
        Self::ImageStoreObserve,
        Self::ImageStoreFetch,
        Self::ImageStoreRefresh,
        Self::ImageStoreProve,
        Self::ImageStoreRemove,
        Self::AllocatorObserve,
        Self::AllocatorReserve,
        Self::SurveyorObserve,
        Self::ProxyLinkObserve,
        Self::ProxyLinkStart,
        Self::ProxyLinkPublish,
        Self::ProxyLinkChanged,
        Self::ProberProbe,
        Self::LedgerStoreLoad,
        Self::LedgerStoreSave,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads this very file, so that a method cannot be added to a port and left out of the sweep.
    #[test]
    fn every_method_of_every_port_is_an_effect() {
        let mut found = Vec::new();
        let mut port = "";
        for line in include_str!("host.rs").lines() {
            if let Some(rest) = line.strip_prefix("pub trait ") {
                port = rest.split(':').next().unwrap();
            } else if let Some(rest) = line.strip_prefix("    fn ").filter(|_| !["Host", "Clock", ""].contains(&port)) {
                let method = rest.split('(').next().unwrap();
                found.push(format!("{port}{}{}", method[..1].to_uppercase(), &method[1..]).to_lowercase());
            } else if line == "}" {
                port = "";
            }
        }
        let effects: Vec<String> = Effect::ALL.iter().map(|effect| format!("{effect:?}").to_lowercase()).collect();
        assert_eq!(found, effects);
    }
}
