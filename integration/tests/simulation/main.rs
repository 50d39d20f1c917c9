//! The real reconcile loop on a simulated host, under paused time: every effect in every way it can fail, at every
//! place of a launch, a death, a stop and an update; and long random storms.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod pool;

use enclaved::asked::FetchAnswer;
use enclaved::host::Effect;
use enclaved_core::desired::{Desired, HostPolicy, ImageRequest, OnUnhealthy, PoolPolicy, RestartPolicy, UpdatePolicy};
use enclaved_core::id::{EnclaveKey, EnclaveName, MemoryMib};
use enclaved_core::observed::AskedBy;
use enclaved_integration::sim::{Fault, Harness, World, desired, image};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Long enough for the longest deadline and the longest pause after it.
const PATIENCE: Duration = Duration::from_secs(3600);
/// An effect that is asked for all the time is broken only the first few times.
const OCCURRENCES: u32 = 4;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

fn name(text: &str) -> EnclaveName {
    text.parse().unwrap()
}

/// What the host has for enclaves, and how much of it is set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setup {
    /// Room for updates beside what runs, all of it set aside.
    Roomy,
    /// No room for updates.
    Tight,
    /// Room for updates; set aside is what is needed.
    Exact,
}

impl Setup {
    const ALL: [Self; 3] = [Self::Roomy, Self::Tight, Self::Exact];

    /// A host on which two enclaves fit only after the allocator made room, and the second image is for updates.
    fn world(self) -> Arc<World> {
        self.world_of((2, 1024))
    }

    /// A host whose pool has that many CPUs and MiB at first.
    fn world_of(self, pool: (u32, u64)) -> Arc<World> {
        let world = World::new(pool, if self == Self::Tight { (4, 3072) } else { (6, 8192) });
        put_images(&world);
        world
    }

    fn desired(self, desired: Desired) -> Desired {
        let pool = if self == Self::Exact { PoolPolicy::Exact } else { PoolPolicy::All };
        Desired { host: HostPolicy { pool, ..desired.host.clone() }, ..desired }
    }
}

fn world() -> Arc<World> {
    Setup::Roomy.world()
}

fn put_images(world: &World) {
    for seed in [1, 2, 3] {
        let (request, image) = image(seed);
        world.put_image(request, image);
    }
}

fn two(seed: u64) -> Desired {
    let (first, _) = image(1);
    let (second, _) = image(seed);
    desired(&[("signer", &second, 2, 1024), ("vault", &first, 2, 2048)])
}

/// The effect was not asked for that often after the fault was armed.
const NO_FAULT: &str = "the fault did not strike";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scenario {
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
    const ALL: [Self; 7] =
        [Self::Launch, Self::Deaths, Self::Stops, Self::Update, Self::ByHand, Self::NewObject, Self::Cache];

    /// The effects that strike while it is played and faults are armed.
    fn effects(self) -> BTreeSet<Effect> {
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
    async fn play(self, setup: Setup, harness: &mut Harness, arm: impl Fn(&World)) -> Result<(), String> {
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
fn on_a_ready_host(test: impl AsyncFnOnce(&mut Harness)) {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), two(1));
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        test(&mut harness).await;
    });
}

/// So many launches and stops, and not one more: nothing was lost, nothing doubled.
fn named(alive: &BTreeMap<EnclaveKey, u32>, name: &str) -> EnclaveKey {
    alive.keys().find(|key| key.name.as_str() == name).unwrap().clone()
}

fn once_each(world: &World, launches: usize, stops: usize) -> Result<(), String> {
    let (launched, stopped) = (world.launches(), world.stops());
    if launched.len() == launches && stopped.len() == stops {
        return Ok(());
    }
    Err(format!("launched {launched:?} and stopped {stopped:?}, where {launches} and {stops} would do"))
}

fn check(scenario: Scenario, setup: Setup, arm: impl Fn(&World)) -> Result<BTreeMap<Effect, u32>, String> {
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
fn sweep(scenario: Scenario, setup: Setup) {
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

#[test]
fn a_launch_comes_to_what_is_wanted_whatever_fails_in_it() {
    sweep(Scenario::Launch, Setup::Roomy);
}

#[test]
fn a_launch_without_room_for_updates_comes_to_what_is_wanted_whatever_fails_in_it() {
    sweep(Scenario::Launch, Setup::Tight);
}

#[test]
fn a_launch_with_an_exact_pool_comes_to_what_is_wanted_whatever_fails_in_it() {
    sweep(Scenario::Launch, Setup::Exact);
}

#[test]
fn deaths_and_a_reboot_are_mended_whatever_fails_meanwhile() {
    sweep(Scenario::Deaths, Setup::Roomy);
}

#[test]
fn stops_and_starts_come_to_what_is_wanted_whatever_fails_in_them() {
    sweep(Scenario::Stops, Setup::Exact);
}

#[test]
fn an_update_comes_to_what_is_wanted_whatever_fails_in_it() {
    sweep(Scenario::Update, Setup::Roomy);
}

#[test]
fn an_update_in_the_place_of_what_runs_comes_to_what_is_wanted_whatever_fails_in_it() {
    sweep(Scenario::Update, Setup::Tight);
}

#[test]
fn stops_and_restarts_by_hand_count_as_asked_whatever_fails_meanwhile() {
    sweep(Scenario::ByHand, Setup::Tight);
}

#[test]
fn a_changed_object_is_brought_in_whatever_fails_meanwhile() {
    sweep(Scenario::NewObject, Setup::Tight);
}

#[test]
fn the_cache_is_kept_and_a_spoilt_image_replaced_whatever_fails_meanwhile() {
    sweep(Scenario::Cache, Setup::Roomy);
}

#[test]
fn no_effect_of_the_ports_is_left_out_of_the_sweeps() {
    let swept: BTreeSet<_> = Scenario::ALL.into_iter().flat_map(Scenario::effects).collect();
    assert_eq!(swept, BTreeSet::from(Effect::ALL));
}

#[test]
fn an_image_is_fetched_once_and_a_failed_fetch_is_not_repeated_at_once() {
    let counts = check(Scenario::Launch, Setup::Roomy, |_| {}).unwrap();
    // Both enclaves run the same image.
    assert_eq!(counts[&Effect::ImageStoreFetch], 1);
    runtime().block_on(async {
        let mut harness = Harness::new(world(), two(1));
        harness.world.set_images_away(true);
        harness.start().await;
        harness.pass(Duration::from_secs(60)).await;
        // A fetch takes a second here; the pauses are 2, 4, 8, 16 and 32 seconds.
        let fetches = harness.world.counts()[&Effect::ImageStoreFetch];
        assert!((4..=6).contains(&fetches), "{fetches} fetches in a minute");
    });
}

#[test]
fn what_is_fetched_ahead_stays_for_its_use_and_one_that_cannot_be_had_disturbs_nothing() {
    on_a_ready_host(async |harness| {
        let mut small = two(1);
        small.host.image_cache = 0;
        harness.configure(small).await;
        assert!(matches!(harness.fetch_ahead(&image(2).0).await, FetchAnswer::Fetched { .. }));
        harness.pass(Duration::from_secs(600)).await;
        assert!(harness.world.cached().contains(&image(2).1.digest()));

        let (before, passes) = (harness.world.alive(), harness.passes());
        harness.world.set_images_away(true);
        // Also of the image that runs.
        for seed in [1, 3] {
            assert!(matches!(harness.fetch_ahead(&image(seed).0).await, FetchAnswer::Failed { .. }));
        }
        harness.pass(Duration::from_secs(60)).await;
        let passes = harness.passes() - passes;
        assert!(passes < 400, "{passes} passes in a minute");
        harness.converge(PATIENCE).await.unwrap();
        assert_eq!(harness.world.alive(), before);
    });
}

#[test]
fn a_torn_ledger_costs_no_enclave() {
    on_a_ready_host(async |harness| {
        let (before, routes) = (harness.world.alive(), harness.world.routes());
        harness.kill().await;
        harness.world.tear_ledger();
        harness.start().await;
        harness.pass(Duration::from_secs(1)).await;
        harness.converge(PATIENCE).await.unwrap();
        assert_eq!(harness.world.alive(), before);
        assert_eq!(harness.world.routes(), routes);
        assert_eq!(harness.world.violations(), Vec::<String>::new());
    });
}

#[test]
fn an_enclave_whose_traces_are_lost_runs_on_and_can_still_be_stopped() {
    on_a_ready_host(async |harness| {
        let before = harness.world.alive();
        harness.kill().await;
        harness.world.lose_traces();
        harness.start().await;
        harness.pass(Duration::from_secs(60)).await;
        assert_eq!(harness.world.alive(), before);
        harness.hold(&name("signer")).await;
        harness.pass(Duration::from_secs(60)).await;
        let signer = before.into_keys().find(|key| key.name == name("signer")).unwrap();
        assert_eq!(harness.world.stops(), [signer], "it was not asked to end");
    });
}

#[test]
fn the_loop_rests_while_nothing_can_be_done_and_while_an_enclave_takes_its_time_to_end() {
    on_a_ready_host(async |harness| {
        let idle = harness.passes();
        harness.pass(Duration::from_secs(60)).await;
        // Two wake-ups a second by the simulated ports, the ticks, and two probes every five seconds.
        let bound = |passes| assert!(passes < 400, "{passes} passes in a minute");
        bound(harness.passes() - idle);
        // All memory is held by somebody else, and the allocator's sums say that there is enough.
        harness.world.set_foreign(100_000);
        let victim = harness.world.alive().into_keys().next().unwrap();
        harness.world.kill(&victim);
        let short = harness.passes();
        harness.pass(Duration::from_secs(60)).await;
        bound(harness.passes() - short);
        let waits = harness.status().unwrap().enclaves.into_iter().find_map(|enclave| enclave.waiting_for);
        assert!(waits.unwrap().contains("free"), "the shortage is not said");
    });
}

#[test]
fn restart_never_leaves_a_dead_enclave_down_until_it_is_started_but_repeats_a_failed_launch() {
    runtime().block_on(async {
        let mut wanted = two(1);
        wanted.enclaves.values_mut().for_each(|spec| spec.restart = RestartPolicy::Never);
        let mut harness = Harness::new(world(), wanted);
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        let victim = harness.world.alive().into_keys().next().unwrap();
        harness.world.kill(&victim);
        harness.pass(PATIENCE).await;
        assert_eq!(harness.world.alive().len(), 1);
        harness.release(&victim.name).await;
        harness.converge(PATIENCE).await.unwrap();
        harness.kill().await;
        harness.world.reboot();
        harness.start().await;
        harness.converge(PATIENCE).await.expect("a reboot is no end of its own");
    });
}

#[test]
fn an_unhealthy_enclave_fails_readiness_and_is_relaunched_only_where_the_configuration_says_so() {
    for (on_failure, relaunched) in [(OnUnhealthy::Report, false), (OnUnhealthy::Restart, true)] {
        runtime().block_on(async {
            let mut wanted = two(1);
            for spec in wanted.enclaves.values_mut() {
                spec.health.as_mut().unwrap().on_failure = on_failure;
            }
            let mut harness = Harness::new(world(), wanted);
            harness.start().await;
            harness.converge(PATIENCE).await.unwrap();
            harness.world.set_sick(true);
            harness.pass(Duration::from_secs(90)).await;
            assert!(!harness.status().unwrap().ready);
            assert_eq!(harness.world.stops().is_empty(), !relaunched);
            harness.world.set_sick(false);
            harness.converge(PATIENCE).await.unwrap();
        });
    }
}

#[test]
fn nothing_that_works_is_ended_for_an_image_that_cannot_be_had_any_more() {
    runtime().block_on(async {
        let mut wanted = two(1);
        wanted.enclaves.values_mut().for_each(|spec| spec.update = UpdatePolicy::Recreate);
        let mut harness = Harness::new(world(), wanted.clone());
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        let before = harness.world.alive();
        // After a restart no image is proven, and S3 is away; only then another size is asked for.
        harness.world.set_images_away(true);
        wanted.enclaves.values_mut().for_each(|spec| spec.memory = MemoryMib(1536));
        harness.configure(wanted).await;
        harness.start().await;
        harness.pass(Duration::from_secs(600)).await;
        assert_eq!(harness.world.alive(), before);
        harness.world.set_images_away(false);
        harness.pass(Duration::from_secs(600)).await;
        harness.converge(PATIENCE).await.unwrap();
        assert_ne!(harness.world.alive(), before);
    });
}

#[test]
fn endpoints_follow_the_configuration_at_once_but_a_generation_that_is_replaced_keeps_its_own() {
    runtime().block_on(async {
        // Room for both generations at a time.
        let mut harness = Harness::new(Setup::Roomy.world_of((6, 8192)), two(1));
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        let port = |wanted: &mut Desired, port| {
            wanted.enclaves.get_mut(&name("signer")).unwrap().egress[0].vsock_port = port;
        };
        let open = |harness: &Harness| -> Vec<(u32, u32)> {
            let routes = harness.world.routes().unwrap();
            let signer = routes.egress.iter().filter(|egress| egress.enclave == name("signer"));
            signer.map(|egress| (egress.cid.get(), egress.vsock_port)).collect()
        };
        let (mut same, mut update) = (two(1), two(2));
        port(&mut same, 8001);
        harness.configure(same).await;
        harness.pass(Duration::from_secs(1)).await;
        assert_eq!(open(&harness), [(16, 8001)]);
        port(&mut update, 8002);
        harness.configure(update).await;
        harness.pass(Duration::from_secs(4)).await;
        assert_eq!(open(&harness), [(16, 8001), (18, 8002)]);
        harness.converge(PATIENCE).await.unwrap();
        assert_eq!(open(&harness), [(18, 8002)]);
    });
}

#[test]
fn ending_all_with_the_process_keeps_what_an_operator_holds() {
    on_a_ready_host(async |harness| {
        harness.hold(&name("signer")).await;
        harness.converge(PATIENCE).await.unwrap();
        harness.terminate().await.unwrap();
        assert!(harness.world.alive().is_empty());
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        assert!(harness.world.alive().keys().all(|key| key.name == name("vault")));
    });
}

#[test]
fn a_host_that_cannot_be_seen_keeps_every_enclave_and_every_route() {
    on_a_ready_host(async |harness| {
        let (before, routes) = (harness.world.alive(), harness.world.routes());
        // Every effect fails, for an hour.
        harness.world.storm(1000, 7);
        harness.pass(PATIENCE).await;
        assert_eq!(harness.world.alive(), before);
        assert_eq!(harness.world.routes().or(routes.clone()), routes);
        assert!(!harness.sees(), "it does not take itself for one that has adopted them");
        harness.world.storm(0, 7);
        harness.pass(PATIENCE).await;
        assert!(harness.sees());
    });
}

#[test]
fn what_nitro_cli_describes_otherwise_than_it_was_launched_is_held_as_it_is_until_an_operator_decides() {
    on_a_ready_host(async |harness| {
        let before = harness.world.alive();
        harness.world.describe_otherwise(name("signer"));
        harness.pass(Duration::from_secs(70)).await;
        let told =
            harness.status().unwrap().problems.into_iter().find(|problem| problem.about == "signer").unwrap().failure;
        assert!(told.message.contains("debug instead of no debug"), "{told}");
        assert!(told.remedy.unwrap().contains("enclavectl adopt signer"));
        // Neither an update nor a restart of enclaved ends it, nor is nitro-cli asked again.
        harness.configure(two(2)).await;
        harness.pass(Duration::from_secs(600)).await;
        harness.kill().await;
        harness.start().await;
        harness.pass(Duration::from_secs(600)).await;
        assert_eq!(harness.world.alive(), before);
        assert_eq!(harness.world.counts()[&Effect::SupervisorDescribe], 1);
        harness.accept(&name("signer")).await.unwrap();
        harness.converge(PATIENCE).await.unwrap();
        assert_ne!(harness.world.alive(), before, "the update that waited is brought in");
        harness.accept(&name("signer")).await.unwrap_err();
    });
}

#[test]
fn a_held_enclave_stays_down_over_reload_and_reboot_until_it_is_started() {
    on_a_ready_host(async |harness| {
        harness.hold(&name("signer")).await;
        harness.converge(PATIENCE).await.unwrap();
        harness.configure(two(1)).await;
        harness.kill().await;
        harness.world.reboot();
        harness.start().await;
        harness.pass(Duration::from_secs(60)).await;
        harness.converge(PATIENCE).await.unwrap();
        assert!(harness.world.alive().keys().all(|key| key.name != name("signer")));
        harness.release(&name("signer")).await;
        harness.converge(PATIENCE).await.unwrap();
        assert!(harness.world.alive().keys().any(|key| key.name == name("signer")));
    });
}

#[test]
fn a_stop_by_hand_that_is_noted_only_after_the_end_holds_all_the_same_and_is_no_failure() {
    for (asked, held) in [(AskedBy::Stop, true), (AskedBy::Restart, false), (AskedBy::Shutdown, false)] {
        on_a_ready_host(async |harness| {
            let signer = harness.world.alive().into_keys().find(|key| key.name == name("signer")).unwrap();
            harness.world.end_by_hand_noted_late(&signer, asked);
            harness.pass(Duration::from_millis(200)).await;
            assert!(harness.status().unwrap().enclaves[0].restarts == 1, "a death, as far as is known");
            if held {
                harness.expect_held(&signer.name);
            }
            harness.pass(Duration::from_secs(5)).await;
            harness.converge(PATIENCE).await.unwrap();
            let ledger = harness.world.ledger().unwrap();
            let signer = &ledger.enclaves[&signer.name];
            assert_eq!((signer.restarts, signer.failures, &signer.last_end), (0, 0, &None));
            assert_eq!(signer.held_since.is_some(), held);
            if held {
                harness.release(&name("signer")).await;
                harness.converge(PATIENCE).await.unwrap();
            }
        });
    }
}

#[test]
fn a_loop_that_nothing_wakes_any_more_ends_and_says_so() {
    on_a_ready_host(async |harness| {
        harness.world.break_watching();
        let ended = tokio::time::timeout(PATIENCE, harness.ended()).await.unwrap();
        assert!(matches!(ended, Err(enclaved::reconciler::LoopError::Watcher(Some(_)))), "{ended:?}");
    });
}

#[test]
fn draining_waits_for_connections_but_not_for_ever() {
    on_a_ready_host(async |harness| {
        let ledger = harness.world.ledger().unwrap();
        let (signer, record) = ledger.generations().find(|(key, _)| key.name == name("signer")).unwrap();
        harness.world.set_open(record.cid, 3);
        harness.hold(&signer.name).await;
        harness.pass(Duration::from_secs(20)).await;
        assert!(harness.world.alive().contains_key(&signer), "ended with connections open, before the deadline");
        harness.pass(Duration::from_secs(18)).await;
        assert!(!harness.world.alive().contains_key(&signer), "still there after the deadline");
    });
}

/// One storm: faults everywhere, deaths, reloads, holds, reboots; then calm, and the host must become what is wanted.
/// A request whose object is replaced from time to time.
fn watched_request() -> ImageRequest {
    image(4).0
}

/// One of two enclaves follows its object, and no image is kept longer than needed.
fn watched() -> Desired {
    let mut watched = two(1);
    watched.host.image_cache = 0;
    for spec in watched.enclaves.values_mut().take(1) {
        spec.image = watched_request();
        spec.image_poll = Some(Duration::from_secs(10));
    }
    watched
}

fn storm(seed: u64) -> Result<(), String> {
    let setup = Setup::ALL[usize::try_from(seed % 3).unwrap()];
    runtime().block_on(async {
        let mut harness = Harness::new(setup.world(), setup.desired(two(1)));
        harness.world.put_image(watched_request(), image(1).1);
        harness.world.storm(20, seed);
        harness.start().await;
        for _ in 0..30 {
            let pause = Duration::from_millis(harness.world.random(20_000));
            harness.pass(pause).await;
            match harness.world.random(15) {
                0 => harness.configure(setup.desired(two(1))).await,
                1 => harness.configure(setup.desired(two(2))).await,
                2 => harness.configure(setup.desired(desired(&[("vault", &image(1).0, 2, 2048)]))).await,
                3 => harness.world.kill_proxy(),
                4 => {
                    harness.kill().await;
                    harness.world.reboot();
                    harness.start().await;
                }
                5 => harness.world.set_images_away(harness.world.random(2) == 0),
                6 | 7 => harness.configure(setup.desired(watched())).await,
                8 => {
                    let (_, image) = image(1 + harness.world.random(3));
                    harness.world.put_image(watched_request(), image);
                }
                9 => harness.world.cached().into_iter().take(1).for_each(|digest| harness.world.spoil_image(digest)),
                10 => harness.world.set_in_one_piece(512 + harness.world.random(8192)),
                11 => harness.world.set_effectless(harness.world.random(2) == 0),
                12 => {
                    let asked = [AskedBy::Stop, AskedBy::Restart, AskedBy::Shutdown];
                    let asked = asked[usize::try_from(harness.world.random(3)).unwrap()];
                    let alive: Vec<_> = harness.world.alive().into_keys().collect();
                    if let Some(victim) = alive.last() {
                        harness.world.end_by_hand(victim, asked);
                    }
                }
                _ => {
                    let alive: Vec<_> = harness.world.alive().into_keys().collect();
                    if let Some(victim) = alive.first() {
                        harness.world.kill(victim);
                    }
                }
            }
        }
        harness.world.storm(0, seed);
        harness.world.set_images_away(false);
        harness.world.set_in_one_piece(u64::MAX);
        harness.world.set_effectless(false);
        harness.configure(setup.desired(two(1))).await;
        harness.pass(Duration::from_secs(1)).await;
        // One may be left without room as long as the other runs; the remedy is what the status says.
        for name in ["signer", "vault"].map(name) {
            harness.hold(&name).await;
        }
        harness.until(PATIENCE, |world| world.alive().is_empty()).await?;
        // The longest pause between two tries.
        harness.pass(Duration::from_secs(310)).await;
        for name in ["signer", "vault"].map(name) {
            harness.release(&name).await;
        }
        harness.converge(4 * PATIENCE).await?;
        match harness.world.violations() {
            none if none.is_empty() => Ok(()),
            violations => Err(format!("{violations:?}")),
        }
    })
}

#[test]
fn after_any_storm_the_host_becomes_what_is_wanted() {
    // More of them in the slow lane. A seed that fails here fails again.
    let storms = std::env::var("ENCLAVED_STORMS").map_or(40, |text| text.parse().expect("a number"));
    let failed: Vec<_> =
        (1..=storms).filter_map(|seed| storm(seed).err().map(|error| format!("seed {seed}: {error}"))).collect();
    assert!(
        failed.is_empty(),
        "{} of {storms} storms failed:\n{}",
        failed.len(),
        failed[..failed.len().min(6)].join("\n")
    );
}
