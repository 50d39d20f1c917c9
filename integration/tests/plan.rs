//! The planner, for any ledger and any observation: what it must never do, and that it comes to an end.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use enclaved_core::desired::Desired;
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, Cid, EnclaveKey, Generation, MemoryMib, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::ledger::{
    Change, GenerationRecord, Identity, LaunchRecord, Ledger, Phase, ProcessIdentity, StopReason,
};
use enclaved_core::observed::{HealthReport, Instance, InstanceState, Observation, Observed, Pool};
use enclaved_core::plan::{Plan, Step, plan, routing};
use enclaved_core::routes::ProxyReport;
use enclaved_integration::sim::{desired, image};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const NAMES: [&str; 3] = ["signer", "vault", "old"];
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

/// Two of the names are wanted; "old" is not.
fn wanted() -> Desired {
    desired(&[("signer", &image(1).0, 2, 1024), ("vault", &image(2).0, 4, 2048)])
}

fn images() -> [VerifiedImage; 2] {
    [image(1).1, image(2).1]
}

fn launch_record(number: u32) -> LaunchRecord {
    LaunchRecord {
        enclave_id: format!("i-0-enc{number}"),
        process: ProcessIdentity { pid: number, start_time: 1 },
        cpu_ids: Vec::new(),
        memory: MemoryMib(1024),
        at: NOW,
    }
}

/// One generation in the ledger, and what is seen of it.
#[derive(Debug, Clone)]
struct Seed {
    name: usize,
    generation: u32,
    phase: u8,
    image: usize,
    age: u64,
    seen: u8,
}

fn seeds() -> impl Strategy<Value = Vec<Seed>> {
    let seed = (0..3_usize, 1..5_u32, 0..7_u8, 0..2_usize, 0..100_u64, 0..5_u8);
    let seed =
        seed.prop_map(|(name, generation, phase, image, age, seen)| Seed { name, generation, phase, image, age, seen });
    prop::collection::vec(seed, 0..6)
}

fn key(seed: &Seed) -> EnclaveKey {
    EnclaveKey { name: NAMES[seed.name].parse().unwrap(), generation: Generation(seed.generation) }
}

fn record(seed: &Seed, cid: Cid, number: u32) -> GenerationRecord {
    let image = &images()[seed.image];
    let since = Timestamp::from_millis(NOW.as_millis() - seed.age * 1000);
    let launch = launch_record(number);
    let why = StopReason::Replaced;
    let phase = match seed.phase {
        0 => Phase::Planned { since, not_before: since },
        1 => Phase::Launching { since },
        2 => Phase::Booting { since, launch },
        3 => Phase::Ready { since, launch },
        4 => Phase::Draining { since, until: since.plus(Duration::from_secs(30)), launch, why },
        5 => Phase::Stopping { since, launch: Some(launch), why },
        _ => Phase::Ended { at: since },
    };
    let (cpus, memory) = if seed.name == 1 { (4, 2048) } else { (2, 1024) };
    let identity = Identity { image: image.digest(), cpus, memory: MemoryMib(memory), debug: false };
    GenerationRecord { cid, identity, measurements: *image.measurements(), egress: Vec::new(), phase }
}

fn world(seeds: &[Seed], pool: (u32, u64)) -> (Ledger, Observed) {
    let mut ledger = Ledger { boot_id: Some(BootId("b".to_owned())), ..Ledger::default() };
    let mut instances = BTreeMap::new();
    for (number, seed) in (100..).zip(seeds) {
        let (key, record) = (key(seed), record(seed, ledger.free_cid(), number));
        if ledger.generation(&key).is_some() {
            continue;
        }
        let state = match seed.seen {
            0 => Some(InstanceState::Launching),
            1 | 2 => Some(InstanceState::Running(launch_record(number))),
            3 => Some(InstanceState::Ended { at: NOW, launch_failure: None }),
            _ => None,
        };
        if let Some(state) = state {
            instances.insert(key.clone(), Instance { generation: Some(record.clone()), state });
        }
        ledger.apply(Change::Adopted { key, record }, NOW);
    }
    let observed = Observed {
        boot_id: BootId("b".to_owned()),
        instances: Observation::Known(instances),
        pool: Observation::Known(Pool::Sized {
            cpus: pool.0,
            memory: MemoryMib(pool.1),
            memory_free: MemoryMib(pool.1),
        }),
        proxy: Observation::Known(ProxyReport::default()),
        images: BTreeMap::new(),
        health: BTreeMap::new(),
        running: BTreeSet::new(),
        failed: BTreeMap::new(),
        succeeded: BTreeMap::new(),
    };
    (ledger, observed)
}

fn unknown<T>() -> Observation<T> {
    Observation::Unknown(Failure::new("not to be seen"))
}

/// Does at once, and without fail, what the plan says.
fn carry_out(plan: &Plan, ledger: &mut Ledger, observed: &mut Observed, now: Timestamp) {
    let Observation::Known(instances) = &mut observed.instances else { panic!("instances are known here") };
    for step in &plan.steps {
        match step {
            Step::Record(change) => ledger.apply(change.clone(), now),
            Step::Fetch(request) => {
                let found = [image(1), image(2)].into_iter().find(|(known, _)| known == request);
                observed.images.extend(found);
            }
            Step::Publish(routes) => {
                let revision = Some(routes.revision());
                observed.proxy = Observation::Known(ProxyReport { revision, ..ProxyReport::default() });
            }
            Step::Launch(launch) => {
                let state = InstanceState::Running(launch_record(launch.record.cid.get() + 1000));
                let instance = Instance { generation: Some(launch.record.clone()), state };
                assert!(instances.insert(launch.key.clone(), instance).is_none(), "{} is launched twice", launch.key);
            }
            Step::Stop { key, .. } => {
                if let Some(instance) = instances.get_mut(key) {
                    instance.state = InstanceState::Ended { at: now, launch_failure: None };
                }
            }
            Step::Forget(key) => {
                let gone = instances.remove(key).unwrap();
                assert!(matches!(gone.state, InstanceState::Ended { .. }), "{key} is forgotten while it runs");
            }
            Step::Probe { key, .. } => {
                observed.health.insert(key.clone(), HealthReport { at: now, result: Ok(()), streak: 1 });
            }
            Step::Reserve { .. } | Step::StartProxy => {}
        }
    }
    // A launch helper at work comes to an end by itself.
    for (key, instance) in instances.iter_mut() {
        if matches!(instance.state, InstanceState::Launching) {
            let number = ledger.generation(key).map_or(1, |record| record.cid.get());
            instance.state = InstanceState::Running(launch_record(number + 5000));
        }
    }
}

/// No two generations have one CID.
fn check_cids(ledger: &Ledger) -> Result<(), TestCaseError> {
    let cids: Vec<_> = ledger.generations().map(|(_, record)| record.cid).collect();
    prop_assert_eq!(cids.iter().collect::<BTreeSet<_>>().len(), cids.len(), "two generations have one CID");
    Ok(())
}

/// Every launch that the plan decides (not one that it only sees) is the only one, and keeps the budgets.
fn check_launches(plan: &Plan, ledger: &Ledger, observed: &Observed, pool: (u32, u64)) -> Result<(), TestCaseError> {
    let seen = |key| observed.instances.known().is_some_and(|all| all.contains_key(key));
    let mut after = ledger.clone();
    for step in &plan.steps {
        let Step::Record(change) = step else { continue };
        after.apply(change.clone(), NOW);
        if matches!(change, Change::Launching(key) if !seen(key)) {
            check_budgets(&after, pool)?;
        }
    }
    Ok(())
}

fn check_budgets(ledger: &Ledger, pool: (u32, u64)) -> Result<(), TestCaseError> {
    let launching = ledger.generations().filter(|(_, record)| matches!(record.phase, Phase::Launching { .. }));
    prop_assert!(launching.count() <= 1, "two launches at a time");
    let held: Vec<_> =
        ledger.generations().map(|(_, record)| record).filter(|record| record.holds_resources()).collect();
    prop_assert!(held.iter().map(|record| record.identity.cpus).sum::<u32>() <= pool.0, "CPUs are over budget");
    prop_assert!(held.iter().map(|record| record.identity.memory.0).sum::<u64>() <= pool.1, "memory is over budget");
    prop_assert!(held.len() <= 4, "more than four enclaves");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_ended_launched_forgotten_or_cut_off_while_the_enclaves_cannot_be_seen(seeds in seeds()) {
        let (ledger, mut observed) = world(&seeds, (6, 8192));
        observed.instances = unknown();
        for step in plan(&wanted(), &observed, &ledger, NOW).steps {
            let harmless = matches!(step, Step::Fetch(_) | Step::StartProxy)
                || matches!(step, Step::Record(Change::ImageForgotten(_) | Change::ImageVerified { .. } | Change::Endpoints { .. }));
            prop_assert!(harmless, "{step}");
        }
    }

    #[test]
    fn nothing_is_launched_without_a_known_proxy_and_a_known_pool(seeds in seeds(), which in 0..2) {
        let (ledger, mut observed) = world(&seeds, (6, 8192));
        observed.images.extend([image(1), image(2)]);
        if which == 0 { observed.proxy = unknown() } else { observed.pool = unknown() }
        for step in plan(&wanted(), &observed, &ledger, NOW).steps {
            // A ledger older than the traces only follows what is there.
            let followed = matches!(&step, Step::Record(Change::Launching(key)) if
                observed.instances.known().is_some_and(|all| all.contains_key(key)));
            prop_assert!(followed || !matches!(step, Step::Record(Change::Launching(_))), "{step}");
            prop_assert!(which != 0 || !matches!(step, Step::Launch(_)), "{step}");
        }
    }

    #[test]
    fn what_drains_is_not_ended_early_because_the_proxy_cannot_be_asked(seeds in seeds()) {
        let (ledger, mut observed) = world(&seeds, (6, 8192));
        observed.proxy = unknown();
        for step in plan(&wanted(), &observed, &ledger, NOW).steps {
            if let Step::Record(Change::Stopping { key, .. }) = &step
                && let Some(Phase::Draining { until, .. }) = ledger.generation(key).map(|record| &record.phase)
            {
                prop_assert!(*until <= NOW, "{step}");
            }
        }
    }

    /// From any state of the ledger and the host: the budgets hold at every step that the planner decides, and in the end
    /// exactly what is wanted runs, and the plan is empty.
    #[test]
    fn every_state_comes_to_what_is_wanted_and_then_the_plan_is_empty(seeds in seeds()) {
        let pool = (6, 8192);
        let (mut ledger, mut observed) = world(&seeds, pool);
        let desired = wanted();
        let mut now = NOW;
        for pass in 0..200 {
            let next = plan(&desired, &observed, &ledger, now);
            let only_probes = next.steps.iter().all(|step| matches!(step, Step::Probe { .. }));
            if only_probes && next.waits.is_empty() {
                let ready = ledger.generations().filter(|(_, of)| matches!(of.phase, Phase::Ready { .. }));
                let names: Vec<_> = ready.map(|(key, _)| key.name.to_string()).collect();
                prop_assert_eq!(names, ["signer", "vault"]);
                let alive = observed.instances.known().map_or(0, BTreeMap::len);
                prop_assert_eq!(alive, 2);
                let routes = routing::routes(&desired, &ledger);
                prop_assert_eq!(observed.proxy.known().and_then(|report| report.revision), Some(routes.revision()));
                break;
            }
            prop_assert!(pass < 199, "no end: {:?} {:?}\n{ledger:?}", next.steps, next.waits);
            check_launches(&next, &ledger, &observed, pool)?;
            carry_out(&next, &mut ledger, &mut observed, now);
            check_cids(&ledger)?;
            now = next.wake_at.unwrap_or(now).plus(Duration::from_millis(1));
        }
    }
}
