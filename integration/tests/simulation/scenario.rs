//! What is played on the simulated host: scenarios, the hosts that they are played on, and the sweep of every fault through one. No test of
//! its own.

use enclaved::host::Effect;
use enclaved_core::desired::{Desired, HostPolicy, ImageRequest, PoolPolicy};
use enclaved_core::id::{EnclaveKey, EnclaveName};
use enclaved_core::observed::AskedBy;
use enclaved_integration::sim::{Fault, Harness, World, desired, image};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Long enough for the longest deadline and the longest pause after it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);
/// An effect that is asked for all the time is broken only the first few times.
pub(crate) const OCCURRENCES: u32 = 4;

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

pub(crate) fn name(text: &str) -> EnclaveName {
    text.parse().unwrap()
}

/// What the host has for enclaves, and how much of it is set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setup {
    /// Room for updates beside what runs, all of it set aside.
    Roomy,
    /// No room for updates.
    Tight,
    /// Room for updates; set aside is what is needed.
    Exact,
}

impl Setup {
    pub(crate) const ALL: [Self; 3] = [Self::Roomy, Self::Tight, Self::Exact];

    /// A host on which two enclaves fit only after the allocator made room, and the second image is for updates.
    pub(crate) fn world(self) -> Arc<World> {
        self.world_of((2, 1024))
    }

    /// A host whose pool has that many CPUs and MiB at first.
    pub(crate) fn world_of(self, pool: (u32, u64)) -> Arc<World> {
        let world = World::new(pool, if self == Self::Tight { (4, 3072) } else { (6, 8192) });
        put_images(&world);
        world
    }

    pub(crate) fn desired(self, desired: Desired) -> Desired {
        let pool = if self == Self::Exact { PoolPolicy::Exact } else { PoolPolicy::All };
        Desired { host: HostPolicy { pool, ..desired.host.clone() }, ..desired }
    }
}

pub(crate) fn world() -> Arc<World> {
    Setup::Roomy.world()
}

pub(crate) fn put_images(world: &World) {
    for seed in [1, 2, 3] {
        let (request, image) = image(seed);
        world.put_image(request, image);
    }
}

pub(crate) fn two(seed: u64) -> Desired {
    let (first, _) = image(1);
    let (second, _) = image(seed);
    desired(&[("signer", &second, 2, 1024), ("vault", &first, 2, 2048)])
}

/// A request whose object is replaced from time to time.
pub(crate) fn watched_request() -> ImageRequest {
    image(4).0
}

/// One of two enclaves follows its object, and no image is kept longer than needed.
pub(crate) fn watched() -> Desired {
    let mut watched = two(1);
    watched.host.image_cache = 0;
    for spec in watched.enclaves.values_mut().take(1) {
        spec.image = watched_request();
        spec.image_poll = Some(Duration::from_secs(10));
    }
    watched
}

/// The effect was not asked for that often after the fault was armed.
pub(crate) const NO_FAULT: &str = "the fault did not strike";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scenario {
    /// Two enclaves, from nothing.
    Launch,
    /// One of two dies, later the proxy, later the host is rebooted.
    Deaths,
    /// One is held and released, then removed and brought back.
    Stops,
    /// One gets another image.
    Update,
    /// Units are stopped and restarted by hand.
    ByHand,
    /// Its source gets another image, and is watched.
    NewObject,
    /// One gets one image after the other, and old ones leave the cache; then its image is spoilt, and it dies.
    Cache,
}

impl Scenario {
    pub(crate) const ALL: [Self; 7] =
        [Self::Launch, Self::Deaths, Self::Stops, Self::Update, Self::ByHand, Self::NewObject, Self::Cache];

    /// The effects that strike while it is played and faults are armed.
    pub(crate) fn effects(self) -> BTreeSet<Effect> {
        use Effect::*;
        let always = [
            SupervisorObserve,
            SupervisorLaunch,
            SupervisorChanged,
            ImageStoreObserve,
            ImageStoreProve,
            AllocatorObserve,
            SurveyorObserve,
            ProxyLinkObserve,
            ProxyLinkPublish,
            ProxyLinkChanged,
            ProberProbe,
            LedgerStoreSave,
        ];
        let more: &[Effect] = match self {
            Self::Launch => &[ImageStoreFetch, AllocatorReserve, ProxyLinkStart, LedgerStoreLoad],
            Self::Deaths => &[SupervisorDescribe, SupervisorForget, ImageStoreFetch, ProxyLinkStart, LedgerStoreLoad],
            Self::Stops => &[SupervisorStop, SupervisorForget],
            Self::Update => &[SupervisorStop, SupervisorForget, ImageStoreFetch],
            Self::ByHand => &[SupervisorForget, ImageStoreFetch, LedgerStoreLoad],
            Self::NewObject => {
                &[SupervisorStop, SupervisorForget, ImageStoreFetch, ImageStoreRefresh, ImageStoreRemove]
            }
            Self::Cache => &[SupervisorStop, SupervisorForget, ImageStoreFetch, ImageStoreRemove],
        };
        always.into_iter().chain(more.iter().copied()).collect()
    }

    /// Plays it; faults strike while it is played. Returns an error where the host does not become what is wanted.
    pub(crate) async fn play(self, setup: Setup, harness: &mut Harness, arm: impl Fn(&World)) -> Result<(), String> {
        if self == Self::Launch {
            arm(&harness.world);
            harness.start().await;
            harness.converge(PATIENCE).await?;
            return once_each(&harness.world, 2, 0);
        }
        harness.start().await;
        harness.converge(PATIENCE).await?;
        arm(&harness.world);
        let before = harness.world.alive();
        match self {
            Self::Launch => {}
            Self::Deaths => {
                harness.pass(Duration::from_secs(70)).await;
                let victim = before.keys().next().unwrap().clone();
                harness.world.kill(&victim);
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                for (key, pid) in before.iter().filter(|(key, _)| **key != victim) {
                    if harness.world.alive().get(key) != Some(pid) {
                        return Err(format!("{key} did not outlive the death of {victim}"));
                    }
                }
                let before = harness.world.alive();
                harness.world.kill_proxy();
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                if harness.world.alive() != before {
                    return Err("an enclave did not outlive the proxy".to_owned());
                }
                once_each(&harness.world, 3, 0)?;
                harness.kill().await;
                harness.world.reboot();
                harness.start().await;
                harness.pass(Duration::from_secs(2)).await;
                harness.converge(PATIENCE).await?;
            }
            Self::Stops => {
                harness.hold(&name("signer")).await;
                harness.converge(PATIENCE).await?;
                harness.release(&name("signer")).await;
                harness.converge(PATIENCE).await?;
                harness.configure(setup.desired(desired(&[("vault", &image(1).0, 2, 2048)]))).await;
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                harness.configure(setup.desired(two(1))).await;
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                let vault = |alive: BTreeMap<_, u32>| {
                    alive.into_iter().find(|(key, _): &(EnclaveKey, _)| key.name.as_str() == "vault")
                };
                if vault(harness.world.alive()) != vault(before) {
                    return Err("vault did not outlive what was done to signer".to_owned());
                }
            }
            Self::Update => {
                harness.configure(setup.desired(two(2))).await;
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                // The traces of the one that was replaced go when it is known how it ended.
                harness.pass(Duration::from_secs(2)).await;
                harness.converge(PATIENCE).await?;
                once_each(&harness.world, 3, 1)?;
            }
            Self::ByHand => {
                let (signer, vault) = (named(&before, "signer"), named(&before, "vault"));
                harness.world.end_by_hand(&signer, AskedBy::Stop);
                harness.expect_held(&name("signer"));
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                harness.kill().await;
                harness.start().await;
                harness.pass(Duration::from_secs(20)).await;
                if harness.world.alive() != BTreeMap::from([(vault.clone(), before[&vault])]) {
                    return Err(
                        "it was launched again though somebody stopped it, or the other one suffered".to_owned()
                    );
                }
                harness.release(&name("signer")).await;
                harness.converge(PATIENCE).await?;
                harness.world.end_by_hand(&vault, AskedBy::Restart);
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                let ledger = harness.world.ledger().unwrap();
                if ledger.enclaves.values().any(|enclave| enclave.last_end.is_some()) {
                    return Err("what an operator asked for counts as a failure".to_owned());
                }
                once_each(&harness.world, 4, 0)?;
            }
            Self::NewObject => {
                harness.world.put_image(watched_request(), image(1).1);
                harness.configure(setup.desired(watched())).await;
                harness.pass(Duration::from_secs(12)).await;
                harness.converge(PATIENCE).await?;
                // The same image under another name is no reason for a launch.
                once_each(&harness.world, 2, 0)?;
                harness.world.put_image(watched_request(), image(2).1);
                harness.pass(Duration::from_secs(11)).await;
                harness.converge(PATIENCE).await?;
                once_each(&harness.world, 3, 1)?;
            }
            Self::Cache => {
                let mut launches = 2;
                for seed in [2, 3, 1] {
                    let mut desired = setup.desired(two(seed));
                    desired.host.image_cache = 0;
                    harness.configure(desired).await;
                    harness.pass(Duration::from_millis(200)).await;
                    harness.converge(PATIENCE).await?;
                    launches += 1;
                }
                let kept = BTreeSet::from([image(1).1.digest(), image(3).1.digest()]);
                harness.until(PATIENCE, |world| world.cached() == kept).await?;
                once_each(&harness.world, launches, 3)?;
                harness.world.spoil_image(image(1).1.digest());
                let victim = harness.world.alive().keys().next().unwrap().clone();
                harness.world.kill(&victim);
                harness.pass(Duration::from_millis(200)).await;
                harness.converge(PATIENCE).await?;
                once_each(&harness.world, launches + 1, 3)?;
            }
        }
        Ok(())
    }
}

/// A host with two enclaves that serve, under paused time.
pub(crate) fn on_a_ready_host(test: impl AsyncFnOnce(&mut Harness)) {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), two(1));
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        test(&mut harness).await;
    });
}

pub(crate) fn named(alive: &BTreeMap<EnclaveKey, u32>, name: &str) -> EnclaveKey {
    alive.keys().find(|key| key.name.as_str() == name).unwrap().clone()
}

/// So many launches and stops, and not one more: nothing was lost, nothing doubled.
pub(crate) fn once_each(world: &World, launches: usize, stops: usize) -> Result<(), String> {
    let (launched, stopped) = (world.launches(), world.stops());
    if launched.len() == launches && stopped.len() == stops {
        return Ok(());
    }
    Err(format!("launched {launched:?} and stopped {stopped:?}, where {launches} and {stops} would do"))
}

pub(crate) fn check(scenario: Scenario, setup: Setup, arm: impl Fn(&World)) -> Result<BTreeMap<Effect, u32>, String> {
    runtime().block_on(async {
        let mut harness = Harness::new(setup.world(), setup.desired(two(1)));
        scenario.play(setup, &mut harness, arm).await?;
        if !harness.world.fault_struck() {
            return Err(NO_FAULT.to_owned());
        }
        match harness.world.violations() {
            none if none.is_empty() => Ok(harness.world.counts()),
            violations => Err(format!("{violations:?}")),
        }
    })
}

/// Plays a scenario with every fault of every effect it has, at each of the first times that it is asked for.
pub(crate) fn sweep(scenario: Scenario, setup: Setup) {
    let mut swept = BTreeSet::new();
    let (mut runs, mut failed) = (0, Vec::new());
    let counts = check(scenario, setup, |_| {}).unwrap_or_else(|error| panic!("{scenario:?} without a fault: {error}"));
    for (effect, count) in counts {
        for nth in 1..=count.min(OCCURRENCES) {
            for fault in Fault::ALL {
                // Faults are counted from where the scenario arms them; the counts begin with the world.
                let arm = move |world: &World| {
                    let so_far = world.counts().get(&effect).copied().unwrap_or(0);
                    world.plan_fault(effect, so_far + nth, fault);
                };
                match check(scenario, setup, arm) {
                    Err(error) if error == NO_FAULT => continue,
                    Err(error) => failed.push(format!("{effect:?} number {nth}, {fault:?}: {error}")),
                    Ok(_) => {}
                }
                runs += 1;
                swept.insert((effect, fault));
            }
        }
    }
    let effects: BTreeSet<_> = swept.iter().map(|(effect, _)| *effect).collect();
    println!(
        "swept {} effects x {} fault modes in {runs} runs of {scenario:?}, {setup:?}",
        effects.len(),
        Fault::ALL.len()
    );
    let shown = failed[..failed.len().min(12)].join("\n");
    assert!(failed.is_empty(), "{} of {runs} runs failed:\n{shown}", failed.len());
    assert_eq!(swept.len(), effects.len() * Fault::ALL.len(), "an effect was not swept in every way");
    assert_eq!(effects, scenario.effects());
}
