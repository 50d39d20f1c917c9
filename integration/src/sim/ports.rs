//! The ports of the daemon, as the simulated host has them.

use super::state::Launched;
use super::{ACCOUNT, BOOT, STOP, World};
use enclaved::host::{
    Allocator, Clock, Effect, Host, ImageStore, LedgerStore, LoadedLedger, NotReserved, Outcome, Prober, Progress,
    Proof, ProxyLink, Supervisor, Surveyor,
};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::desired::{HealthCheck, ImageRequest};
use enclaved_core::failure::Failure;
use enclaved_core::id::{Cid, EifDigest, EnclaveKey, MemoryMib, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::inventory::Inventory;
use enclaved_core::ledger::{LaunchRecord, Ledger};
use enclaved_core::observed::{CacheItem, CachedImage, End, ImageCache, Instance, InstanceState, Pool};
use enclaved_core::plan::{self, Launch, Prefer};
use enclaved_core::routes::{ListenerKey, ListenerReport, ProxyReport, Routes};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

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
