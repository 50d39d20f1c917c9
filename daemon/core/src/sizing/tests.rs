//! Sizing as a whole: hosts by the table and hosts of any shape.

use super::pool::{PoolChange, PoolNow, PoolPolicy, WantedPool, change, kernel_arguments, wanted, within};
use super::*;
use crate::allocator_file::{CpuRequest, Reservation};
use crate::failure::Failure;
use crate::inventory::CpuSet;
use crate::observed::Observation;
use proptest::prelude::*;

const GIB: u64 = 1024;

fn host(name: &str) -> Capacity {
    Capacity::nominal(&instance_types::find(name).unwrap(), Reserve::default())
}

fn demand(name: &str, cpus: u32, memory: u64, update: UpdatePolicy) -> Demand {
    Demand { name: name.parse().unwrap(), cpus, memory: MemoryMib(memory), image_size: None, update }
}

fn recreate(name: &str, cpus: u32, memory: u64) -> Demand {
    demand(name, cpus, memory, UpdatePolicy::Recreate)
}

fn refused(capacity: &Capacity, demands: &[Demand]) -> Refusal {
    admit(capacity, demands).expect_err("it should not fit")
}

#[test]
fn an_enclave_fits_with_room_for_its_update_where_there_is_some() {
    let admission = admit(&host("m5.2xlarge"), &[demand("signer", 2, 1024, UpdatePolicy::Auto)]).unwrap();
    assert_eq!((admission.cpus, admission.memory), (4, MemoryMib(2048)));
    assert!(admission.has_spare_for(&admission.shares[0]));
    // Without room it is taken all the same, to be updated in place of itself; not if it insists.
    let admission = admit(&host("m5.xlarge"), &[demand("signer", 2, 1024, UpdatePolicy::Auto)]).unwrap();
    assert_eq!((admission.cpus, admission.spare), (2, None));
    let refusal = refused(&host("m5.xlarge"), &[demand("signer", 2, 1024, UpdatePolicy::BlueGreen)]);
    assert_eq!(refusal.breaches, [Breach::Cpus { needed: 4, spare: 2, available: 2 }]);
    let remedy = refusal.failure().remedy.unwrap();
    assert!(remedy.contains("signer with cpus = 2, memory_mib = 1024, update = \"recreate\""), "{remedy}");
    assert!(remedy.contains("m5.2xlarge is the smallest m5"), "{remedy}");
}

#[test]
fn a_refusal_says_the_rule_the_numbers_and_both_ways_out() {
    let failure = refused(&host("m5.xlarge"), &[recreate("signer", 6, 20 * GIB)]).failure();
    let expected = "the enclaves do not fit this host: 6 CPUs are needed, 2 can be had; 20480 MiB of memory are needed, 13312 \
                    MiB can be had (m5.xlarge with 4 CPUs and 15360 MiB, of which 2 CPUs and 2048 MiB stay with the parent; \
                    nominally 16 GiB, so 2 CPUs and 14 GiB for enclaves)";
    assert_eq!(failure.message, expected);
    let expected = "the nearest that fits here: signer with cpus = 2, memory_mib = 13312, update = \"recreate\"; m5.2xlarge is \
                    the smallest m5 with room for what is wanted";
    assert_eq!(failure.remedy.unwrap(), expected);
}

#[test]
fn half_a_core_and_too_little_memory_are_refused_with_what_would_do() {
    let mut demand = recreate("signer", 3, 1024);
    demand.image_size = Some(300 << 20);
    let refusal = refused(&host("m5.4xlarge"), &[demand.clone()]);
    let text = refusal.to_string();
    assert!(text.contains("signer wants 3 CPUs; an enclave has whole cores, here of 2 CPUs each"), "{text}");
    assert!(
        text.contains("signer has 1024 MiB of memory and needs 1200 MiB: four times its image of 300 MiB"),
        "{text}"
    );
    assert!(text.contains("signer with cpus = 4, memory_mib = 1200"), "{text}");
    assert_eq!(refusal.family, FamilyAdvice::NotNeeded);
    // Without SMT every number of CPUs is whole cores.
    demand.memory = MemoryMib(1200);
    admit(&host("m6g.2xlarge"), &[demand]).unwrap();
    let text = refused(&host("m5.xlarge"), &[recreate("a", 0, 63)]).to_string();
    assert!(text.contains("a wants 0 CPUs") && text.contains("needs 64 MiB, the least for any enclave"), "{text}");
}

#[test]
fn four_enclaves_are_the_most_and_a_fifth_generation_is_one_too_many() {
    let four = |update| ["a", "b", "c", "d"].map(|name| demand(name, 2, 1024, update));
    let admission = admit(&host("m5.8xlarge"), &four(UpdatePolicy::Auto)).unwrap();
    assert_eq!(admission.spare, None);
    let text = refused(&host("m5.8xlarge"), &four(UpdatePolicy::BlueGreen)).to_string();
    assert!(text.contains("at most 4 enclaves; 4 are wanted, and a blue-green update needs one more"), "{text}");
    let mut five = four(UpdatePolicy::Recreate).to_vec();
    five.push(recreate("e", 2, 1024));
    let refusal = refused(&host("m5.8xlarge"), &five);
    assert_eq!(refusal.nearest, None);
    assert!(refusal.to_string().contains("no sizes of so many enclaves fit here; no m5 has room"), "{refusal}");
}

#[test]
fn several_enclaves_take_whole_large_pages_and_one_alone_does_not() {
    let memory = |demands: &[Demand]| admit(&host("m5.4xlarge"), demands).unwrap().memory.0;
    assert_eq!(memory(&[recreate("a", 2, 1537)]), 1538);
    // Three pages of 1 GiB would be made of 3 GiB, of which the first enclave takes two.
    assert_eq!(memory(&[recreate("a", 2, 1536), recreate("b", 2, 1536)]), 4096);
    // Less than one large page: only small ones are made.
    assert_eq!(memory(&[recreate("a", 2, 256), recreate("b", 2, 257)]), 514);
    // The second generation counts as an enclave.
    assert_eq!(memory(&[demand("a", 2, 1536, UpdatePolicy::BlueGreen)]), 4096);
    let refusal = refused(&host("m5.xlarge"), &[recreate("a", 1, 6656), recreate("b", 1, 6656)]).to_string();
    assert!(refusal.contains("14336 MiB of memory are needed, 13312 MiB can be had"), "{refusal}");
    assert!(refusal.contains("13312 MiB would fit, but each enclave takes whole pages of 1024 MiB"), "{refusal}");
}

#[test]
fn on_a_host_with_two_nodes_everything_is_on_one_of_them() {
    let big = host("m5.24xlarge");
    let admission = admit(&big, &[recreate("a", 48, 100 * GIB)]).unwrap();
    assert_eq!(admission.node, 1, "the node without CPU 0 has more");
    let wanted = wanted(PoolPolicy::Exact, &big, &[recreate("a", 2, 512)]).unwrap().unwrap();
    assert_eq!(wanted.wish.cpus, CpuRequest::Pool("47,95".parse().unwrap()));
    let text = refused(&big, &[recreate("a", 50, 512)]).to_string();
    assert!(text.contains("50 CPUs are needed, 48 can be had") && text.contains("on memory node 1"), "{text}");
}

#[test]
fn on_two_nodes_a_pool_is_judged_by_count_and_node_and_the_one_that_is_there_is_preferred() {
    let mut big = host("m5.24xlarge");
    let on = |node: u32, cpus: &str, memory: u64| PoolNow {
        cpus: cpus.parse().unwrap(),
        node: Some(node),
        memory: MemoryMib(memory),
    };
    let small = [recreate("a", 2, 512)];
    // Other CPUs than would be chosen are as good, on whatever node they are.
    let exact = |big: &Capacity| wanted(PoolPolicy::Exact, big, &small).unwrap().unwrap();
    assert_eq!(wish(&exact(&big)), (CpuRequest::Pool("47,95".parse().unwrap()), 512));
    let there = on(1, "30,78", 512);
    assert!(there.is(&exact(&big)) && there.has(&exact(&big).wish));
    let elsewhere = on(0, "1,49", 512);
    assert!(elsewhere.has(exact(&big).least.as_ref().unwrap()), "the enclave has room in it");
    let moved = change(Some(exact(&big)), &elsewhere, &NONE_RUNS, &NOTHING_USED);
    assert!(matches!(moved, PoolChange::Due { urgent: false, .. }));
    // With the node of the pool that is there first, as an inventory gives it, nothing has to move.
    big.nodes.sort_by_key(|node| node.node != 0);
    assert_eq!(change(Some(exact(&big)), &elsewhere, &NONE_RUNS, &NOTHING_USED), PoolChange::Nothing);
    // But for an enclave that has no room there.
    let large = wanted(PoolPolicy::Exact, &big, &[recreate("a", 48, 512)]).unwrap().unwrap();
    assert_eq!(large.node, 1);
}

#[test]
fn the_room_for_an_update_is_wished_for_but_it_is_not_the_least() {
    let host = host("m5.2xlarge");
    for update in [UpdatePolicy::Auto, UpdatePolicy::BlueGreen] {
        let exact = wanted(PoolPolicy::Exact, &host, &[demand("a", 2, 256, update)]).unwrap().unwrap();
        assert_eq!(wish(&exact), (CpuRequest::Count(4), 512));
        assert_eq!(exact.least.as_ref().unwrap().cpus, CpuRequest::Count(2));
        assert_eq!(exact.least.as_ref().unwrap().memory_mib, MemoryMib(256));
        let without = change(Some(exact), &pool(2, 256), &NONE_RUNS, &NOTHING_USED);
        assert!(matches!(without, PoolChange::Due { urgent: false, .. }), "{without:?}");
    }
}

#[test]
fn a_host_that_is_no_known_instance_gets_no_advice_on_families() {
    let laptop = Capacity { instance_type: None, ..host("m5.xlarge") };
    let refusal = refused(&laptop, &[recreate("a", 8, 512)]);
    assert_eq!(refusal.family, FamilyAdvice::Unknown);
    assert!(refusal.failure().message.contains("(a host with 4 CPUs and 15360 MiB"), "{refusal}");
}

fn pool(cpus: u32, memory: u64) -> PoolNow {
    PoolNow { cpus: CpuSet::new(1..=cpus).unwrap(), node: Some(0), memory: MemoryMib(memory) }
}

fn wish(wanted: &WantedPool) -> (CpuRequest, u64) {
    (wanted.wish.cpus.clone(), wanted.wish.memory_mib.0)
}

const NONE_RUNS: Observation<u32> = Observation::Known(0);
const NOTHING_USED: Result<MemoryMib, Failure> = Ok(MemoryMib(0));

#[test]
fn a_pool_of_all_takes_everything_beyond_the_reserve_whatever_the_enclaves_need() {
    let host = host("m5.2xlarge");
    let of_all = |demands: &[Demand]| wanted(PoolPolicy::All, &host, demands).unwrap().unwrap();
    let all = of_all(&[recreate("a", 2, 512)]);
    assert_eq!(wish(&all), (CpuRequest::Count(6), 28_672));
    assert_eq!(all.least.as_ref().unwrap().memory_mib, MemoryMib(512));
    assert_eq!((wish(&of_all(&[])), of_all(&[]).least), (wish(&all), None));
    // It is good enough with a little less memory, but not with less than the enclaves need, and not with more than is allowed.
    for (now, is) in
        [(pool(6, 28_672), true), (pool(6, 27_000), true), (pool(6, 26_000), false), (pool(4, 28_672), false)]
    {
        assert_eq!(now.is(&all), is, "{now:?}");
    }
    assert!(!pool(6, 30_000).is(&all));
    assert!(!pool(6, 28_000).is(&of_all(&[recreate("a", 2, 28_600)])));
}

#[test]
fn an_exact_pool_follows_the_enclaves() {
    let host = host("m5.2xlarge");
    let exact = |demands: &[Demand]| wanted(PoolPolicy::Exact, &host, demands).unwrap();
    let one = exact(&[recreate("a", 2, 512)]).unwrap();
    assert_eq!(wish(&one), (CpuRequest::Count(2), 512));
    assert_eq!(exact(&[]), None);
    assert!(pool(2, 512).is(&one) && pool(2, 1024).is(&one));
    assert!(!pool(2, 510).is(&one) && !pool(4, 512).is(&one) && !pool(2, 4096).is(&one));
}

#[test]
fn a_change_waits_while_an_enclave_runs_or_may_run() {
    let host = host("m5.2xlarge");
    let wanted = || wanted(PoolPolicy::All, &host, &[recreate("a", 2, 1024)]).unwrap();
    assert_eq!(change(wanted(), &pool(6, 28_672), &Observation::Known(1), &NOTHING_USED), PoolChange::Nothing);
    assert_eq!(change(None, &pool(0, 0), &NONE_RUNS, &NOTHING_USED), PoolChange::Nothing);
    assert!(matches!(change(wanted(), &pool(2, 512), &NONE_RUNS, &NOTHING_USED), PoolChange::Due { urgent: true, .. }));
    let PoolChange::Waits { urgent, why, .. } = change(wanted(), &pool(2, 512), &Observation::Known(2), &NOTHING_USED)
    else {
        panic!()
    };
    assert!(urgent && why.contains("2 enclaves run, and the allocator changes the pool only when none does"), "{why}");
    // What is wanted has room already: only the rest is not reserved yet.
    let waits = change(wanted(), &pool(2, 1024), &Observation::Known(1), &NOTHING_USED);
    let PoolChange::Waits { urgent: false, why, .. } = waits else { panic!() };
    assert!(why.ends_with("so it is changed at the next boot, before anything is launched"), "{why}");
    let unknown = Observation::Unknown(Failure::new("no /proc"));
    let PoolChange::Waits { why, .. } = change(wanted(), &pool(2, 512), &unknown, &NOTHING_USED) else { panic!() };
    assert!(why.contains("not known (no /proc)"), "{why}");
    let PoolChange::Waits { why, .. } = change(wanted(), &pool(2, 512), &NONE_RUNS, &Err(Failure::new("no sysfs")))
    else {
        panic!()
    };
    assert!(why.contains("not known (no sysfs)"), "{why}");
    // An enclave that boots has taken its memory before anything else tells of it.
    let PoolChange::Waits { why, .. } = change(wanted(), &pool(2, 512), &NONE_RUNS, &Ok(MemoryMib(64))) else {
        panic!()
    };
    assert!(why.contains("64 MiB of the hugepages are in use, by whom is not known"), "{why}");
}

#[test]
fn what_is_beyond_the_bounds_is_refused_whoever_asks() {
    let reservation = |cpus: CpuRequest, memory: u64| Reservation { cpus, memory_mib: MemoryMib(memory) };
    let pool = |list: &str| CpuRequest::Pool(list.parse().unwrap());
    let refused = |host: &str, cpus: CpuRequest, memory: u64, part: &str| {
        let failure = within(&self::host(host), &reservation(cpus, memory)).unwrap_err();
        assert!(failure.message.contains(part), "{failure}");
    };
    within(&host("m5.2xlarge"), &reservation(CpuRequest::Count(6), 28_672)).unwrap();
    within(&host("m5.2xlarge"), &reservation(pool("1-3,5-7"), 28_672)).unwrap();
    refused(
        "m5.2xlarge",
        CpuRequest::Count(8),
        512,
        "leave the parent 2 CPUs and 2048 MiB; there are 6 CPUs and 28672 MiB",
    );
    refused("m5.2xlarge", CpuRequest::Count(6), 28_674, "28674 MiB can't be reserved");
    refused("m5.2xlarge", CpuRequest::Count(3), 512, "whole cores, here of 2 each");
    refused("m5.2xlarge", CpuRequest::Count(0), 512, "whole cores");
    refused("m5.2xlarge", CpuRequest::Count(2), 0, "some memory");
    refused("m5.2xlarge", pool("0,4"), 512, "without CPU 0's");
    refused("m5.2xlarge", pool("1,6"), 512, "whole cores of one memory node");
    refused("m5.2xlarge", pool("8,9"), 512, "whole cores of one memory node");
    refused("m5.24xlarge", pool("1,24,49,72"), 512, "one memory node");
}

#[test]
fn the_kernels_command_line_names_large_pages_first() {
    let arguments = |memory, pages: &[u64], node| kernel_arguments(MemoryMib(memory), pages, node);
    assert_eq!(arguments(13_500, &[2, 1024], None), "hugepagesz=1G hugepages=13 hugepagesz=2M hugepages=94");
    assert_eq!(arguments(511, &[2, 1024], None), "hugepagesz=2M hugepages=256");
    assert_eq!(arguments(4096, &[2, 1024], Some(1)), "hugepagesz=1G hugepages=1:4");
    // A kernel with base pages of 64 KiB has these and none of 1 GiB.
    assert_eq!(arguments(1026, &[2, 512], None), "hugepagesz=512M hugepages=2 hugepagesz=2M hugepages=1");
}

/// A host of any shape: nodes with cores of one or two threads, numbered as EC2 does.
#[derive(Debug, Clone)]
struct Shape {
    threads: u32,
    /// Cores and memory of each node. CPU 0 is on the first.
    nodes: Vec<(u32, u64)>,
    reserve: Reserve,
    large_pages: bool,
}

impl Shape {
    fn capacity(&self) -> Capacity {
        let cores: u32 = self.nodes.iter().map(|(cores, _)| cores).sum();
        let mut first = 0;
        let mut nodes = Vec::new();
        for (number, (count, memory)) in self.nodes.iter().enumerate() {
            let of_node = first..first + count;
            let core = |core: u32| CpuSet::new((0..self.threads).map(|thread| core + thread * cores)).unwrap();
            nodes.push(NodeCapacity {
                node: number.try_into().unwrap(),
                cores: of_node.filter(|core| *core != 0).rev().map(core).collect(),
                memory: MemoryMib(*memory),
                pages_mib: if self.large_pages { vec![2, 1024] } else { vec![2] },
            });
            first += count;
        }
        Capacity::new(cores * self.threads, self.threads, self.reserve, nodes, None)
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    let nodes = prop::collection::vec((1_u32..17, 512_u64..40_000), 1..4);
    let reserve = (1_u32..6, 64_u64..4096).prop_map(|(cpus, memory)| Reserve { cpus, memory: MemoryMib(memory) });
    (1_u32..3, nodes, reserve, any::<bool>()).prop_map(|(threads, nodes, reserve, large_pages)| Shape {
        threads,
        nodes,
        reserve,
        large_pages,
    })
}

fn demands() -> impl Strategy<Value = Vec<Demand>> {
    let update = prop_oneof![Just(UpdatePolicy::Auto), Just(UpdatePolicy::BlueGreen), Just(UpdatePolicy::Recreate)];
    let cpus = prop_oneof![9 => 1_u32..9, 1 => any::<u32>()];
    let memory = prop_oneof![9 => 32_u64..9000, 1 => any::<u64>()];
    let one = (cpus, memory, prop::option::of(0_u64..(1 << 30)), update);
    prop::collection::vec(one, 0..6).prop_map(|all| {
        let named = all.into_iter().zip(["a", "b", "c", "d", "e", "f"]);
        named
            .map(|((cpus, memory, image_size, update), name)| Demand {
                image_size,
                ..demand(name, cpus, memory, update)
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn what_is_admitted_is_within_the_budget_and_whole(shape in shapes(), demands in demands()) {
        let capacity = shape.capacity();
        let Ok(admission) = admit(&capacity, &demands) else { return Ok(()) };
        let node = capacity.nodes.iter().find(|node| node.node == admission.node).unwrap();
        prop_assert!(admission.memory.0 + shape.reserve.memory.0 <= node.memory.0 || demands.is_empty());
        prop_assert!(admission.cpus + shape.reserve.cpus <= capacity.cpus || demands.is_empty());
        let spare = admission.spare.unwrap_or_default();
        prop_assert!(demands.len() + usize::from(admission.spare.is_some()) <= 4);
        prop_assert_eq!(admission.shares.iter().map(|share| share.cpus).sum::<u32>() + spare.cpus, admission.cpus);
        prop_assert_eq!(admission.shares.iter().map(|share| share.memory.0).sum::<u64>() + spare.memory.0, admission.memory.0);
        for (share, demand) in admission.shares.iter().zip(&demands) {
            prop_assert!(share.cpus % shape.threads == 0 && share.cpus == demand.cpus);
            prop_assert!(share.memory >= demand.memory && share.memory.0 % 2 == 0);
            prop_assert!(demand.update != UpdatePolicy::BlueGreen || admission.has_spare_for(share));
        }
    }

    #[test]
    fn reserved_cpus_are_whole_cores_of_one_node_without_cpu_0s(shape in shapes(), demands in demands(), all in any::<bool>()) {
        let capacity = shape.capacity();
        let policy = if all { PoolPolicy::All } else { PoolPolicy::Exact };
        let Ok(Some(wanted)) = wanted(policy, &capacity, &demands) else { return Ok(()) };
        let node = capacity.nodes.iter().find(|node| node.node == wanted.node).unwrap();
        for reservation in [Some(&wanted.wish), wanted.least.as_ref()].into_iter().flatten() {
            prop_assert!(reservation.cpus.count() > 0 && reservation.cpus.count() % shape.threads == 0);
            prop_assert!(reservation.cpus.count() + shape.reserve.cpus <= capacity.cpus);
            prop_assert!(reservation.memory_mib.0 + shape.reserve.memory.0 <= node.memory.0);
            match &reservation.cpus {
                CpuRequest::Count(_) => prop_assert_eq!(capacity.nodes.len(), 1),
                CpuRequest::Pool(cpus) => {
                    let whole = node.cores.iter().filter(|core| core.is_subset(cpus)).map(CpuSet::len).sum::<u32>();
                    prop_assert_eq!(whole, cpus.len());
                    prop_assert!(!cpus.contains(0));
                }
            }
        }
        for reservation in [Some(&wanted.wish), wanted.least.as_ref()].into_iter().flatten() {
            prop_assert_eq!(within(&capacity, reservation), Ok(()));
        }
        // What is asked for is what is then found good.
        let cpus = match &wanted.wish.cpus {
            CpuRequest::Count(count) => CpuSet::new(1..=*count).unwrap(),
            CpuRequest::Pool(cpus) => cpus.clone(),
        };
        let now = PoolNow { cpus, node: Some(wanted.node), memory: wanted.wish.memory_mib };
        prop_assert!(wanted.least.as_ref().is_none_or(|least| least.cpus.count() != wanted.wish.cpus.count() || now.has(least)));
        prop_assert_eq!(change(Some(wanted), &now, &NONE_RUNS, &NOTHING_USED), PoolChange::Nothing);
    }

    #[test]
    fn a_bigger_host_never_refuses_what_a_smaller_one_takes(
        shape in shapes(),
        demands in demands(),
        more in prop::collection::vec((0_u32..4, 0_u64..4096), 3),
        one_node_more in prop::option::of((1_u32..9, 64_u64..9000)),
    ) {
        let mut bigger = shape.clone();
        for (node, (cores, memory)) in bigger.nodes.iter_mut().zip(more) {
            *node = (node.0 + cores, node.1 + memory);
        }
        bigger.nodes.extend(one_node_more);
        if admit(&shape.capacity(), &demands).is_ok() {
            prop_assert!(admit(&bigger.capacity(), &demands).is_ok());
        }
    }

    #[test]
    fn what_a_refusal_offers_is_admitted(shape in shapes(), demands in demands()) {
        let capacity = shape.capacity();
        let Err(refusal) = admit(&capacity, &demands) else { return Ok(()) };
        prop_assert!(!refusal.breaches.is_empty());
        prop_assert!(!refusal.to_string().is_empty());
        if let Some(nearest) = refusal.nearest {
            prop_assert!(admit(&capacity, &nearest.enclaves).is_ok());
            prop_assert_eq!(nearest.enclaves.len(), demands.len());
        }
    }

    #[test]
    fn a_size_that_is_recommended_has_room_and_is_the_smallest_that_has(
        demands in demands(), number in 0..instance_types::sizes().count(),
    ) {
        let size = instance_types::sizes().nth(number).unwrap();
        let capacity = Capacity::nominal(&size, Reserve::default());
        let Err(refusal) = admit(&capacity, &demands) else { return Ok(()) };
        let has_room = |size| admit(&Capacity::nominal(&size, Reserve::default()), &mended(&capacity, &demands)).is_ok();
        let family: Vec<_> = instance_types::sizes().filter(|other| other.family() == size.family()).collect();
        if let FamilyAdvice::NoSize(_) = refusal.family {
            prop_assert!(!family.iter().any(|size| has_room(*size)));
        }
        if let FamilyAdvice::Size(better) = refusal.family {
            prop_assert_eq!(better.family(), size.family());
            prop_assert!(has_room(better));
            prop_assert_eq!(family.into_iter().find(|size| has_room(*size)), Some(better));
            prop_assert!((better.vcpus, better.memory_gib) > (size.vcpus, size.memory_gib) || better.nodes != size.nodes);
        }
    }
}
