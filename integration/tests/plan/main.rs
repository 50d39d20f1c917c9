//! The planner, for any ledger and any observation: what it must never do, and that it comes to an end.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod pool;

use enclaved_core::desired::Desired;
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, Cid, EnclaveKey, Generation, MemoryMib, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::image_record::{ImageFacts, ImageOutcome, ImageRecord, ValidityPeriod};
use enclaved_core::ledger::{
    Change, GenerationRecord, HeldBy, Identity, LaunchRecord, Ledger, Phase, ProcessIdentity, StopReason,
};
use enclaved_core::observed::{
    AskedBy, CacheItem, CachedImage, End, HealthReport, ImageCache, Instance, InstanceState, JobFailure, JobKey,
    Observation, Observed, Pool, Unfinished,
};
use enclaved_core::plan::{Plan, Step, plan, routing};
use enclaved_core::routes::ProxyReport;
use enclaved_integration::sim::{World, desired, image};
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
    let seed = (0..3_usize, 1..5_u32, 0..7_u8, 0..2_usize, 0..100_u64, 0..8_u8);
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
            3 => Some(InstanceState::Ended(End::noticed(NOW))),
            5 => Some(InstanceState::Ended(End { settled: false, ..End::noticed(NOW) })),
            6 => Some(InstanceState::Ended(End { asked: Some(AskedBy::Stop), ..End::noticed(NOW) })),
            7 => Some(InstanceState::Ended(End { asked: Some(AskedBy::Restart), ..End::noticed(NOW) })),
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
            changing: false,
        }),
        inventory: Observation::Known(Some(World::new(pool, (6, 8192)).inventory())),
        proxy: Observation::Known(ProxyReport::default()),
        images: BTreeMap::new(),
        cache: Observation::Known(ImageCache::default()),
        refreshed: BTreeMap::new(),
        asked: BTreeSet::new(),
        ahead: BTreeSet::new(),
        health: BTreeMap::new(),
        described: BTreeMap::new(),
        running: BTreeSet::new(),
        failed: BTreeMap::new(),
        succeeded: BTreeMap::new(),
        reserve_ended: None,
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
            Step::Fetch { request, .. } => {
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
                    instance.state = InstanceState::Ended(End::noticed(now));
                }
            }
            Step::Forget(key) => {
                let gone = instances.remove(key).unwrap();
                let over = matches!(&gone.state, InstanceState::Ended(end) if end.settled);
                assert!(over, "{key} is forgotten while it runs, or before it is known how it ended");
            }
            Step::Probe { key, .. } => {
                observed.health.insert(key.clone(), HealthReport { at: now, result: Ok(()), streak: 1 });
            }
            Step::Refresh { request, .. } => {
                observed.refreshed.insert(request.clone(), now);
            }
            Step::RemoveCached(item) => {
                if let Observation::Known(cache) = &mut observed.cache {
                    cache.images.retain(|image| CacheItem::Image(image.digest) != *item);
                    cache.unfinished.retain(|left| CacheItem::Unfinished(left.request.clone()) != *item);
                }
            }
            Step::Describe(launched) => {
                for one in launched {
                    observed.described.insert(one.key.clone(), (one.launch.process, None));
                }
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

/// Images on disk, the first two of which are the enclaves', and what downloads have left.
fn full_cache(used: &[u64]) -> ImageCache {
    let image = |(number, used): (u64, &u64)| CachedImage {
        digest: image(number).1.digest(),
        size: 10,
        used: Timestamp::from_millis(*used),
    };
    let long_ago = Timestamp::from_millis(NOW.as_millis() - 25 * 3600 * 1000);
    let old = Unfinished { request: image_of_nobody(), size: 5, used: long_ago };
    let young = Unfinished { request: enclaved_integration::sim::image(7).0, size: 5, used: NOW };
    let unfinished = vec![old, young];
    ImageCache { images: (1..).zip(used).map(image).collect(), unfinished }
}

fn image_of_nobody() -> enclaved_core::desired::ImageRequest {
    image(9).0
}

/// A ledger that knows both images, with these facts of the first.
fn with_images(ledger: &mut Ledger, facts: ImageFacts) {
    for (seed, facts) in [(1, facts), (2, ImageFacts { size: 1, certificate: None })] {
        let (request, image) = image(seed);
        let (digest, measurements) = (image.digest(), *image.measurements());
        let outcome = ImageOutcome::Verified { at: NOW, digest, measurements, facts: Some(facts) };
        ledger.images.push(ImageRecord { request, outcome });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_ended_launched_forgotten_or_cut_off_while_the_enclaves_cannot_be_seen(seeds in seeds()) {
        let (ledger, mut observed) = world(&seeds, (6, 8192));
        observed.instances = unknown();
        for step in plan(&wanted(), &observed, &ledger, NOW).steps {
            let harmless = matches!(step, Step::Fetch { .. } | Step::StartProxy)
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

    #[test]
    fn no_image_that_runs_or_ran_last_leaves_the_cache_and_the_rest_goes_oldest_first_down_to_the_limit(
        seeds in seeds(), used in prop::collection::vec(0..5_u64, 6), limit in 0..60_u64,
    ) {
        let (mut ledger, mut observed) = world(&seeds, (6, 8192));
        with_images(&mut ledger, ImageFacts { size: 1, certificate: None });
        let cache = full_cache(&used);
        observed.cache = Observation::Known(cache.clone());
        observed.running.insert(JobKey::Probe(EnclaveKey { name: NAMES[0].parse().unwrap(), generation: Generation(9) }));
        // Fetched ahead, a moment ago.
        observed.ahead.insert(image(3).1.digest());
        let mut desired = wanted();
        desired.host.image_cache = limit;
        let plan = plan(&desired, &observed, &ledger, NOW);
        let removed: Vec<_> = plan.steps.iter().filter_map(|step| match step {
            Step::RemoveCached(item) => Some(item.clone()),
            _ => None,
        }).collect();
        let fetches = plan.steps.iter().any(|step| matches!(step, Step::Fetch { .. }));
        if fetches {
            prop_assert_eq!(removed, vec![], "a fetch may be about to use it");
            return Ok(());
        }
        let unfinished: Vec<_> = removed.iter().filter(|item| matches!(item, CacheItem::Unfinished(_))).collect();
        prop_assert_eq!(unfinished, [&CacheItem::Unfinished(image_of_nobody())]);
        let gone = |image: &CachedImage| removed.contains(&CacheItem::Image(image.digest));
        let kept: Vec<_> = cache.images.iter().filter(|image| !gone(image)).collect();
        for digest in [1, 2, 3].map(|seed| image(seed).1.digest()) {
            prop_assert!(kept.iter().any(|image| image.digest == digest), "a needed image is removed");
        }
        let bytes: u64 = kept.iter().skip(3).map(|image| image.size).sum();
        prop_assert!(bytes <= limit, "{bytes} of {limit} bytes are kept");
        prop_assert!(removed.len() == 1 || bytes + 10 > limit, "more is removed than the limit asks for");
        let newest_gone = cache.images.iter().filter(|image| gone(image)).map(|image| image.used).max();
        let oldest_kept = kept.iter().skip(3).map(|image| image.used).min();
        prop_assert!(newest_gone.zip(oldest_kept).is_none_or(|(gone, kept)| gone <= kept), "a newer one went first");
    }

    /// (An image can be there although a fetch of it failed: asked for once more, or brought by a look at its source.)
    #[test]
    fn a_failed_fetch_of_an_image_that_is_there_changes_nothing(seeds in seeds(), failed in any::<bool>()) {
        let (mut ledger, mut observed) = world(&seeds, (6, 8192));
        with_images(&mut ledger, ImageFacts::of(&image(1).1));
        observed.images.extend([image(1)]);
        let failure = JobFailure { at: NOW, count: 1, failure: Failure::new("403") };
        observed.failed.insert(JobKey::Fetch(image(1).0), failure.clone());
        if failed {
            ledger.apply(Change::ImageFailed { request: image(1).0, at: NOW, failure: failure.failure }, NOW);
        }
        let changes = |ledger: &Ledger| -> Vec<Change> {
            let steps = plan(&wanted(), &observed, ledger, NOW).steps;
            let of_images = |step| match step {
                Step::Record(change @ (Change::ImageVerified { .. } | Change::ImageFailed { .. })) => Some(change),
                _ => None,
            };
            steps.into_iter().filter_map(of_images).collect()
        };
        for change in changes(&ledger) {
            prop_assert!(failed, "{change}");
            ledger.apply(change, NOW);
        }
        prop_assert_eq!(changes(&ledger), vec![]);
    }

    #[test]
    fn nothing_that_works_is_ended_for_an_image_that_cannot_be_launched_and_no_such_image_is_launched(
        seeds in seeds(), expired in any::<bool>(),
    ) {
        let (mut ledger, mut observed) = world(&seeds, (6, 8192));
        let second = |seconds: u64| Timestamp::from_millis(NOW.as_millis() - seconds * 1000);
        let certificate = expired.then(|| ValidityPeriod { not_before: second(20), not_after: second(10) });
        with_images(&mut ledger, ImageFacts { size: if expired { 1 } else { 257 << 20 }, certificate });
        // As if they were being fetched again: what the ledger knows of them counts.
        observed.running = [image(1).0, image(2).0].map(JobKey::Fetch).into();
        let plan = plan(&wanted(), &observed, &ledger, NOW);
        let signer = |key: &EnclaveKey| key.name.as_str() == NAMES[0];
        let newest = ledger.enclaves.get(&NAMES[0].parse().unwrap()).and_then(|of| of.generations.iter().rev().find(|(_, of)| of.is_current()));
        for step in &plan.steps {
            match step {
                Step::Record(Change::Planned { key, .. }) => prop_assert!(!signer(key), "{step}"),
                Step::Record(Change::Launching(key)) if observed.instances.known().is_some_and(|all| !all.contains_key(key)) => {
                    prop_assert!(!signer(key), "{step}");
                }
                Step::Launch(launch) => prop_assert!(!signer(&launch.key), "{step}"),
                Step::Record(Change::Draining { key, .. } | Change::Stopping { key, .. }) if signer(key) => {
                    let ready = matches!(ledger.generation(key).map(|of| &of.phase), Some(Phase::Ready { .. }));
                    let serves = newest.is_some_and(|(generation, _)| *generation == key.generation);
                    prop_assert!(!(ready && serves), "{step}");
                }
                _ => {}
            }
        }
        if seeds.iter().all(|seed| seed.name != 0) {
            let why = plan.waits.iter().find(|(name, _)| name.as_str() == NAMES[0]).map(|(_, why)| why.clone());
            let why = why.unwrap_or_default();
            prop_assert!(why.contains(if expired { "expired" } else { "memory_mib = 1028" }), "{why}");
        }
    }

    #[test]
    fn a_stop_by_hand_holds_what_was_meant_to_go_on_and_counts_as_no_failure(seeds in seeds()) {
        let (mut ledger, observed) = world(&seeds, (6, 8192));
        let before = ledger.clone();
        for step in plan(&wanted(), &observed, &ledger, NOW).steps {
            if let Step::Record(change) = step { ledger.apply(change, NOW) }
        }
        for (name, enclave) in &before.enclaves {
            let asked = |generation: &Generation| {
                let key = EnclaveKey { name: name.clone(), generation: *generation };
                match observed.instances.known().and_then(|all| all.get(&key)).map(|instance| &instance.state) {
                    Some(InstanceState::Ended(end)) => end.asked,
                    _ => None,
                }
            };
            let went_on = |of: &GenerationRecord| {
                matches!(of.phase, Phase::Launching { .. } | Phase::Booting { .. } | Phase::Ready { .. })
            };
            let stopped = enclave.generations.iter().any(|(generation, of)| {
                went_on(of) && asked(generation) == Some(AskedBy::Stop)
            });
            let now = &ledger.enclaves[name];
            prop_assert_eq!(now.held_since.is_some(), stopped, "{}", name);
            if let Some(end) = &now.last_end {
                prop_assert_eq!(asked(&end.generation), None, "what was asked for is a failure");
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
            let held: Vec<_> = ledger.enclaves.iter().filter(|(_, of)| of.held_since.is_some()).map(|(name, _)| name.clone()).collect();
            for name in held {
                prop_assert_eq!(ledger.enclaves[&name].held_by, HeldBy::Systemctl);
                ledger.apply(Change::Released(name), now);
            }
            if let Observation::Known(instances) = &mut observed.instances {
                for instance in instances.values_mut() {
                    if let InstanceState::Ended(end) = &mut instance.state {
                        (end.settled, end.account) = (true, Some("it exited".to_owned()));
                    }
                }
            }
            now = next.wake_at.unwrap_or(now).plus(Duration::from_millis(1));
        }
    }
}

#[test]
fn an_enclave_that_is_to_end_does_when_the_proxy_has_cut_its_connections_and_waits_for_no_other_proxy() {
    let seed = Seed { name: 0, generation: 1, phase: 5, image: 0, age: 0, seen: 1 };
    let (ledger, mut observed) = world(&[seed], (6, 8192));
    let routes = routing::routes(&wanted(), &ledger);
    assert_eq!(routes.live, []);
    let ends = |observed: &Observed, now| {
        let plan = plan(&wanted(), observed, &ledger, now);
        plan.steps.iter().any(|step| matches!(step, Step::Stop { .. }))
    };
    let former = ProxyReport::default();
    observed.proxy = Observation::Known(former.clone());
    assert!(!ends(&observed, NOW), "its connections are not cut yet");
    observed.proxy = Observation::Known(ProxyReport { revision: Some(routes.revision()), ..former.clone() });
    assert!(ends(&observed, NOW));
    observed.proxy = unknown();
    assert!(ends(&observed, NOW), "there is no proxy");
    observed.proxy = Observation::Known(former);
    assert!(ends(&observed, NOW.plus(Duration::from_secs(1))), "the proxy takes no routes");
}

#[test]
fn an_end_is_explained_once_when_more_is_known_of_it_and_only_then_forgotten() {
    let seed = Seed { name: 0, generation: 1, phase: 3, image: 0, age: 5, seen: 5 };
    let (mut ledger, mut observed) = world(&[seed], (6, 8192));
    let key: EnclaveKey = "signer-1".parse().unwrap();
    let mut steps = |observed: &Observed| -> Vec<String> {
        let steps = plan(&wanted(), observed, &ledger, NOW).steps;
        for step in &steps {
            if let Step::Record(change) = step {
                ledger.apply(change.clone(), NOW);
            }
        }
        let about = |step: &String| step.contains("signer-1");
        steps.iter().map(ToString::to_string).filter(about).collect()
    };
    let gone = "its process is gone: the enclave crashed, powered off, or was ended from outside";
    assert_eq!(steps(&observed), [format!("note that signer-1 ended: {gone}")]);
    assert_eq!(steps(&observed), [""; 0], "more will be known");
    let known = End { account: Some("killed by SIGKILL".to_owned()), ..End::noticed(NOW) };
    let Observation::Known(instances) = &mut observed.instances else { panic!() };
    instances.get_mut(&key).unwrap().state = InstanceState::Ended(known);
    assert_eq!(steps(&observed), ["note how signer-1 ended: its process is gone: killed by SIGKILL"]);
    assert_eq!(steps(&observed), ["remove the traces of signer-1"]);
    assert_eq!(ledger.enclaves[&key.name].restarts, 1);
}
