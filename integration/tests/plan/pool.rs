//! When the allocator is asked for, whatever is in the ledger and on the host, and whatever of it can be seen: it takes away what
//! runs, so never beside anything that runs or may run; it costs what is up, so never for what nobody lacks once anything was
//! launched; and it can fail for as long as the host is up, so never again and again.

use super::{NOW, images, seeds, unknown, wanted, with_images, world};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::desired::{Desired, PoolPolicy};
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, MemoryMib, Timestamp};
use enclaved_core::image_record::ImageFacts;
use enclaved_core::inventory::Inventory;
use enclaved_core::ledger::{Change, Ledger};
use enclaved_core::observed::{InstanceState, JobFailure, JobKey, Observation, Observed, Pool};
use enclaved_core::plan::{Plan, Step, plan};
use enclaved_integration::sim::image;
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;

fn reserve(plan: &Plan) -> Option<(Reservation, Option<Reservation>)> {
    plan.steps.iter().find_map(|step| match step {
        Step::Reserve { wish, least } => Some((wish.clone(), least.clone())),
        _ => None,
    })
}

/// Whether a launch is decided, or taken.
fn decides(plan: &Plan, observed: &Observed) -> bool {
    plan.steps.iter().any(|step| match step {
        Step::Launch(_) => true,
        Step::Record(Change::Launching(key)) => observed.instances.known().is_some_and(|all| !all.contains_key(key)),
        _ => false,
    })
}

/// What else there is on the host than what the ledger knows, and what of it can't be seen.
#[derive(Debug, Clone, Copy)]
struct Host {
    pool: (u32, u64),
    exact: bool,
    /// 0 to 3: enclaves, pool, the whole inventory, or how many enclaves run can't be seen.
    blind: u8,
    /// 0: the job is at work; 1: it is seen at work.
    at_work: u8,
    /// Enclaves of others that run.
    strangers: u32,
    /// Pages in use, by whom is not known.
    used: u64,
    /// One launch of which can't be told whether it runs.
    unclear: bool,
    /// Something was launched in this boot.
    launched: bool,
    /// 0: another boot than the ledger's.
    boot: u8,
}

fn hosts() -> impl Strategy<Value = Host> {
    let pool = prop_oneof![Just((2_u32, 1024_u64)), Just((4, 2048)), Just((6, 4096)), Just((6, 8192))];
    let rare = |most: u32| prop_oneof![4 => Just(0), 1 => 1..=most];
    let flags = (any::<bool>(), 0..9_u8, 0..9_u8, prop::bool::weighted(0.2), any::<bool>(), 0..8_u8);
    (pool, rare(3), rare(64), flags).prop_map(
        |(pool, strangers, used, (exact, blind, at_work, unclear, launched, boot))| Host {
            pool,
            exact,
            blind,
            at_work,
            strangers,
            used: u64::from(used),
            unclear,
            launched,
            boot,
        },
    )
}

impl Host {
    fn lay_out(self, ledger: &mut Ledger, observed: &mut Observed) -> Desired {
        observed.images.extend([image(1), image(2)]);
        with_images(ledger, ImageFacts { size: 1, certificate: None });
        let mut desired = wanted();
        if self.exact {
            desired.host.pool = PoolPolicy::Exact;
        }
        ledger.launched = self.launched;
        if self.boot == 0 {
            ledger.boot_id = Some(BootId("before".to_owned()));
        }
        if let (true, Observation::Known(instances)) = (self.unclear, &mut observed.instances)
            && let Some(instance) = instances.values_mut().next()
        {
            instance.state = InstanceState::Unknown(Failure::new("nobody can tell"));
        }
        if let Observation::Known(Some(inventory)) = &mut observed.inventory {
            let mut changed: Inventory = (**inventory).clone();
            changed.enclaves = if self.blind == 3 { unknown() } else { Observation::Known(self.strangers) };
            if let Observation::Known(nodes) = &mut changed.nodes {
                for node in nodes.values_mut() {
                    if let Observation::Known(pages) = &mut node.hugepages {
                        for pages in pages.values_mut() {
                            pages.free = pages.free.saturating_sub(self.used);
                        }
                    }
                }
            }
            *inventory = Arc::new(changed);
        }
        match self.blind {
            0 => observed.instances = unknown(),
            1 => observed.pool = unknown(),
            2 => observed.inventory = unknown(),
            _ => {}
        }
        match (self.at_work, &mut observed.pool) {
            (0, _) => drop(observed.running.insert(JobKey::Reserve)),
            (1, Observation::Known(Pool::Sized { changing, .. })) => *changing = true,
            _ => {}
        }
        desired
    }
}

/// The world as it is a while later: the same, but for what the allocator came to.
fn tried(ledger: &mut Ledger, wish: &Reservation, at: Timestamp) {
    ledger.apply(Change::PoolTried { wish: wish.clone(), at }, at);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_allocator_is_asked_for_only_while_nothing_runs_or_may_run_and_nothing_is_launched_meanwhile(
        seeds in seeds(), host in hosts(),
    ) {
        let (mut ledger, mut observed) = world(&seeds, host.pool);
        let desired = host.lay_out(&mut ledger, &mut observed);
        let plan = plan(&desired, &observed, &ledger, NOW);
        if matches!(&observed.pool, Observation::Known(Pool::Sized { changing: true, .. })) {
            prop_assert!(!decides(&plan, &observed) && reserve(&plan).is_none(), "{:?}", plan.steps);
        }
        let Some((wish, least)) = reserve(&plan) else { return Ok(()) };
        prop_assert!(!decides(&plan, &observed), "{:?}", plan.steps);
        prop_assert!(host.blind > 3 && host.at_work > 1 && host.boot > 0, "it is asked for in the dark, or twice");
        prop_assert_eq!((host.strangers, host.used), (0, 0));
        let may_run = |state: &InstanceState| !matches!(state, InstanceState::Ended { .. });
        prop_assert!(!observed.instances.known().unwrap().values().any(|one| may_run(&one.state)));
        prop_assert!(!ledger.generations().any(|(_, of)| of.holds_resources()));
        prop_assert!(wish.cpus.count() <= 6 && wish.memory_mib.0 <= 8192);
        prop_assert!(least.as_ref().is_none_or(|least| least.cpus.count() <= wish.cpus.count() && least.memory_mib <= wish.memory_mib));
        // Once anything was launched, only for an enclave that has no room otherwise: here they need 6 CPUs and 3 GiB.
        prop_assert!(!host.launched || host.pool.0 < 6 || host.pool.1 < 3072);
    }

    /// `gaps`: how long after a try that failed the next plan is made, in ms.
    #[test]
    fn what_was_tried_and_could_not_be_had_is_tried_again_ever_more_seldom_or_not_at_all_in_this_boot(
        pool in prop_oneof![Just((2_u32, 1024_u64)), Just((6, 4096))], gaps in prop::collection::vec(0..400_000_u64, 1..30),
        ran in any::<bool>(),
    ) {
        let (mut ledger, mut observed) = world(&[], pool);
        observed.images.extend(images().into_iter().zip([1, 2]).map(|(found, seed)| (image(seed).0, found)));
        with_images(&mut ledger, ImageFacts { size: 1, certificate: None });
        let urgent = pool.0 < 6;
        let (mut now, mut asked, mut last) = (NOW, 0_u32, None::<Timestamp>);
        for gap in gaps {
            now = now.plus(Duration::from_millis(gap));
            let plan = plan(&wanted(), &observed, &ledger, now);
            let Some((wish, _)) = reserve(&plan) else {
                prop_assert!(plan.wake_at.is_none_or(|at| at > now), "it would be looked at again at once");
                continue;
            };
            if let Some(last) = last {
                let pause = Duration::from_secs(5).saturating_mul(1 << (asked - 1).min(10)).min(Duration::from_secs(300));
                prop_assert!(now.since(last) >= pause, "{:?} after try {asked}", now.since(last));
            }
            asked += 1;
            last = Some(now);
            let failure = Failure::new("in pieces");
            observed.failed.insert(JobKey::Reserve, JobFailure { at: now, count: asked, failure });
            if ran {
                tried(&mut ledger, &wish, now);
            }
        }
        prop_assert!(!ran || urgent || asked <= 1, "{asked} tries for what nobody lacks");
    }

    /// The wish can be another one after each try: CPUs come and go, images become known.
    #[test]
    fn a_wish_that_is_never_the_same_is_not_tried_without_a_pause(other in 1_u64..8000, tries in 1..6_u32, gap in 0..40_000_u64) {
        let (mut ledger, observed) = world(&[], (2, 1024));
        let wish = reserve(&plan(&wanted(), &observed, &ledger, NOW)).unwrap().0;
        for number in 0..tries {
            let of_then = Reservation { memory_mib: MemoryMib(other + u64::from(number)), ..wish.clone() };
            tried(&mut ledger, &of_then, NOW);
        }
        let pause = 5_000 << (tries - 1);
        let then = NOW.plus(Duration::from_millis(gap));
        prop_assert_eq!(reserve(&plan(&wanted(), &observed, &ledger, then)).is_some(), gap >= pause);
    }
}
