//! The host's enclave pool in the simulation: when the allocator is asked, and what waits for it.

use super::scenario::{PATIENCE, name, runtime, world};
use enclaved::host::Effect;
use enclaved_core::desired::{Desired, PoolPolicy, UpdatePolicy};
use enclaved_integration::sim::{Fault, Harness, desired, image};
use std::time::Duration;

fn of(enclaves: &[(&str, u32, u64)], pool: PoolPolicy) -> Desired {
    let image = image(1).0;
    let enclaves: Vec<_> = enclaves.iter().map(|(name, cpus, memory)| (*name, &image, *cpus, *memory)).collect();
    let mut desired = desired(&enclaves);
    desired.enclaves.values_mut().for_each(|spec| spec.update = UpdatePolicy::Recreate);
    desired.host.pool = pool;
    desired
}

fn running(harness: &Harness) -> Vec<String> {
    harness.world.alive().into_keys().map(|key| key.name.to_string()).collect()
}

fn pool_waits(harness: &Harness) -> String {
    harness.status().unwrap().host.pool.unwrap().waiting_for.unwrap_or_default()
}

#[test]
fn everything_is_set_aside_before_the_first_launch_though_the_pool_would_do() {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), of(&[("signer", 2, 1024)], PoolPolicy::All));
        harness.start().await;
        harness.until(PATIENCE, |world| !world.alive().is_empty()).await.unwrap();
        assert_eq!((harness.world.pool(), harness.world.reserves()), ((6, 8192), vec![(6, 8192)]));
        harness.converge(PATIENCE).await.unwrap();
        assert!(harness.status().unwrap().host.pool.unwrap().settled);
        assert_eq!(harness.world.violations(), Vec::<String>::new());
    });
}

#[test]
fn nothing_is_set_aside_where_no_enclave_is_configured_and_everything_with_the_first() {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), of(&[], PoolPolicy::All));
        let before = harness.world.pool();
        harness.start().await;
        harness.pass(PATIENCE).await;
        assert_eq!((harness.world.reserves(), harness.world.pool()), (vec![], before));
        assert_eq!(pool_waits(&harness), "no enclave is configured, so the pool stays as it is");
        assert!(harness.status().unwrap().host.pool.unwrap().settled);
        harness.configure(of(&[("signer", 2, 1024)], PoolPolicy::All)).await;
        harness.until(PATIENCE, |world| !world.alive().is_empty()).await.unwrap();
        assert_eq!(harness.world.pool(), (6, 8192));
        harness.configure(of(&[], PoolPolicy::All)).await;
        harness.until(PATIENCE, |world| world.alive().is_empty()).await.unwrap();
        harness.pass(PATIENCE).await;
        assert_eq!((harness.world.reserves().len(), harness.world.pool()), (1, (6, 8192)), "nor is it given back");
    });
}

#[test]
fn what_cannot_be_set_aside_is_tried_once_a_boot_and_holds_nothing_up_that_has_room() {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), of(&[("signer", 2, 1024)], PoolPolicy::All));
        harness.world.set_in_one_piece(512);
        harness.start().await;
        harness.until(Duration::from_secs(30), |world| !world.alive().is_empty()).await.unwrap();
        harness.pass(PATIENCE).await;
        harness.start().await;
        harness.pass(PATIENCE).await;
        assert_eq!((harness.world.reserves().len(), running(&harness)), (1, vec!["signer".to_owned()]));
        harness.kill().await;
        harness.world.reboot();
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        assert_eq!(harness.world.pool(), (6, 8192), "the stock service has the file");
    });
}

#[test]
fn an_enclave_without_room_waits_until_none_runs_and_says_so_and_gets_it_then() {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), of(&[("signer", 2, 1024)], PoolPolicy::Exact));
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        assert_eq!((harness.world.pool(), harness.world.reserves()), ((2, 1024), vec![]), "it is exact already");
        harness.configure(of(&[("signer", 2, 1024), ("vault", 2, 2048)], PoolPolicy::Exact)).await;
        harness.pass(PATIENCE).await;
        assert_eq!(running(&harness), ["signer"]);
        assert!(
            pool_waits(&harness).contains("1 enclave runs, and the allocator changes the pool only when none does")
        );
        let status = harness.status().unwrap();
        let vault = status.enclaves.iter().find(|enclave| enclave.name == name("vault")).unwrap();
        let why = vault.waiting_for.clone().unwrap();
        assert!(why.contains("4 CPUs and 3072 MiB are needed") && why.contains("`enclavectl stop`"), "{why}");
        harness.hold(&name("signer")).await;
        harness.until(PATIENCE, |world| world.pool() == (4, 3072)).await.unwrap();
        harness.release(&name("signer")).await;
        harness.converge(PATIENCE).await.unwrap();
        assert_eq!(harness.world.violations(), Vec::<String>::new());
    });
}

#[test]
fn an_allocator_that_fails_or_does_nothing_keeps_what_has_room_waiting_for_a_few_tries_only() {
    for effectless in [false, true] {
        runtime().block_on(async {
            let wanted = of(&[("signer", 2, 1024), ("vault", 4, 2048)], PoolPolicy::All);
            let mut harness = Harness::new(world(), wanted);
            harness.world.set_in_one_piece(512);
            harness.world.set_effectless(effectless);
            harness.start().await;
            harness.pass(Duration::from_secs(12)).await;
            assert_eq!(running(&harness), Vec::<String>::new());
            harness.until(Duration::from_secs(120), |world| !world.alive().is_empty()).await.unwrap();
            assert_eq!((harness.world.reserves().len(), running(&harness)), (3, vec!["signer".to_owned()]));
            harness.pass(PATIENCE).await;
            assert_eq!(harness.world.reserves().len(), 3, "not while an enclave runs");
            assert_eq!(harness.world.violations(), Vec::<String>::new());
        });
    }
}

#[test]
fn an_enclave_that_cannot_fit_the_host_is_refused_before_anything_is_tried_and_the_others_go_on() {
    runtime().block_on(async {
        let mut wanted = of(&[("giant", 8, 4096), ("signer", 2, 1024)], PoolPolicy::All);
        wanted.enclaves.get_mut(&name("giant")).unwrap().image = image(2).0;
        let mut harness = Harness::new(world(), wanted);
        harness.start().await;
        harness.until(PATIENCE, |world| !world.alive().is_empty()).await.unwrap();
        harness.pass(Duration::from_secs(60)).await;
        let status = harness.status().unwrap();
        let problem = status.problems.iter().find(|problem| problem.about == "giant").unwrap().failure.to_string();
        assert!(problem.contains("8 CPUs are needed") || problem.contains("10 CPUs are needed"), "{problem}");
        assert!(problem.contains("6 can be had") && problem.contains("the nearest that fits here"), "{problem}");
        assert_eq!(running(&harness), ["signer"]);
        assert_eq!(harness.world.counts()[&Effect::ImageStoreFetch], 1, "its image is not fetched for nothing");
        assert_eq!(harness.world.pool(), (6, 8192));
    });
}

#[test]
fn a_growth_that_nobody_lacks_waits_for_the_next_boot_though_the_only_enclave_dies() {
    runtime().block_on(async {
        let wanted = |policy| of(&[("signer", 2, 1024)], policy);
        let mut harness = Harness::new(world(), wanted(PoolPolicy::Exact));
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        harness.configure(wanted(PoolPolicy::All)).await;
        for _ in 0..3 {
            let victim = harness.world.alive().into_keys().next().unwrap();
            harness.world.kill(&victim);
            harness.until(PATIENCE, |world| world.alive().keys().any(|key| *key != victim)).await.unwrap();
            harness.pass(Duration::from_secs(30)).await;
            assert!(pool_waits(&harness).contains("at the next boot, before anything is launched"));
        }
        harness.hold(&name("signer")).await;
        harness.pass(PATIENCE).await;
        assert_eq!(harness.world.reserves(), vec![], "nor while it is stopped");
        harness.kill().await;
        harness.world.reboot();
        harness.start().await;
        harness.until(PATIENCE, |world| world.pool() == (6, 8192)).await.unwrap();
        assert_eq!(harness.world.violations(), Vec::<String>::new());
    });
}

#[test]
fn room_for_an_update_that_is_nice_to_have_is_never_worth_a_run_of_the_allocator() {
    runtime().block_on(async {
        let wanted = |update, seed| {
            let mut desired = of(&[("signer", 2, 1024)], PoolPolicy::Exact);
            for spec in desired.enclaves.values_mut() {
                (spec.update, spec.image) = (update, image(seed).0);
            }
            desired
        };
        let mut harness = Harness::new(world(), wanted(UpdatePolicy::Recreate, 1));
        harness.start().await;
        harness.converge(PATIENCE).await.unwrap();
        // It would be updated beside itself, and there is room on the host, but not in the pool.
        let before = harness.world.alive();
        harness.configure(wanted(UpdatePolicy::Auto, 2)).await;
        harness.until(PATIENCE, |world| !world.alive().keys().any(|key| before.contains_key(key))).await.unwrap();
        harness.pass(PATIENCE).await;
        assert_eq!((harness.world.alive().len(), harness.world.reserves()), (1, vec![]));
        assert_eq!(harness.world.violations(), Vec::<String>::new());
    });
}

#[test]
fn an_error_that_passes_does_not_cost_the_pool_of_this_boot() {
    for fault in [Fault::FailBefore, Fault::FailAfter] {
        runtime().block_on(async {
            let mut harness = Harness::new(world(), of(&[("signer", 2, 1024)], PoolPolicy::All));
            harness.world.plan_fault(Effect::AllocatorReserve, 1, fault);
            harness.start().await;
            harness.until(PATIENCE, |world| !world.alive().is_empty()).await.unwrap();
            assert_eq!(harness.world.pool(), (6, 8192), "before the launch");
        });
    }
    // Nor does a look that failed.
    runtime().block_on(async {
        let mut harness = Harness::new(world(), of(&[("signer", 2, 1024)], PoolPolicy::All));
        harness.world.plan_fault(Effect::SurveyorObserve, 1, Fault::FailBefore);
        harness.start().await;
        harness.until(PATIENCE, |world| !world.alive().is_empty()).await.unwrap();
        assert_eq!(harness.world.pool(), (6, 8192));
    });
}

#[test]
fn an_allocator_that_never_begins_holds_nothing_up_for_long() {
    runtime().block_on(async {
        let mut harness = Harness::new(world(), of(&[("signer", 2, 1024)], PoolPolicy::All));
        harness.world.set_allocator_away(true);
        harness.start().await;
        harness.until(Duration::from_secs(60), |world| !world.alive().is_empty()).await.unwrap();
        harness.world.set_allocator_away(false);
        harness.pass(PATIENCE).await;
        assert_eq!(harness.world.reserves(), vec![], "all that is wanted has room");
    });
}
