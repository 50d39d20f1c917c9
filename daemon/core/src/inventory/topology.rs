//! Which CPUs make a core. The kernel says so of online CPUs only: a CPU in the driver's pool is offline and has no topology
//! folder. Its siblings follow from the numbering of the online ones, where that leaves no doubt.

use super::{Cpu, CpuSet};
use crate::failure::Failure;
use crate::observed::Observation;
use std::collections::BTreeMap;

/// What was read of one CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenCpu {
    /// Whether it is online.
    pub online: bool,
    /// Its NUMA node.
    pub node: Observation<u32>,
    /// The threads of its core that are online, from its topology folder; `None`: it has none, as it is offline.
    pub siblings: Option<Observation<CpuSet>>,
}

/// Puts the CPUs together to cores.
pub fn topology(seen: BTreeMap<u32, SeenCpu>) -> BTreeMap<u32, Cpu> {
    let numbering = Numbering::of(&seen);
    let core_of = |number: u32, cpu: &SeenCpu| match &cpu.siblings {
        Some(Observation::Known(siblings)) if !siblings.contains(number) => {
            unknown(format!("the kernel says that CPU {number} is not among its own siblings ({siblings})"))
        }
        // A sibling that says otherwise makes both doubtful.
        Some(Observation::Known(siblings)) => {
            let agrees = |other: u32| {
                let listed = seen.get(&other).and_then(|other| other.siblings.as_ref()?.known());
                listed == Some(siblings)
            };
            match siblings.iter().find(|other| !agrees(*other)) {
                None => Observation::Known(siblings.clone()),
                Some(other) => {
                    unknown(format!("CPU {number} names {other} as a thread of its core, but not the other way round"))
                }
            }
        }
        Some(Observation::Unknown(failure)) => Observation::Unknown(failure.clone()),
        None if cpu.online => unknown(format!("the kernel shows no topology of CPU {number}, which is online")),
        None => inferred(number, &numbering, &seen),
    };
    let cores: Vec<_> = seen.iter().map(|(number, cpu)| (*number, core_of(*number, cpu))).collect();
    let cpus = seen.into_iter().zip(cores);
    cpus.map(|((number, cpu), (_, core))| (number, Cpu { online: cpu.online, node: cpu.node, core })).collect()
}

/// How the threads of a core are numbered.
enum Numbering {
    /// One thread a core.
    Single,
    /// Two: n and n + stride, in blocks of two strides.
    Pairs { stride: u32 },
    /// Not the same for all, or not to be seen.
    Unclear,
}

impl Numbering {
    fn of(seen: &BTreeMap<u32, SeenCpu>) -> Self {
        let mut found = None;
        for cpu in seen.values().filter(|cpu| cpu.online) {
            let Some(Observation::Known(siblings)) = &cpu.siblings else { return Self::Unclear };
            let numbers: Vec<u32> = siblings.iter().collect();
            let stride = match numbers.as_slice() {
                [_] => 0,
                [first, second] if lower_half(*first, second - first) => second - first,
                _ => return Self::Unclear,
            };
            if *found.get_or_insert(stride) != stride {
                return Self::Unclear;
            }
        }
        match found {
            None => Self::Unclear,
            Some(0) => Self::Single,
            Some(stride) => Self::Pairs { stride },
        }
    }
}

/// Whether that CPU is the first of the two of its core.
fn lower_half(cpu: u32, stride: u32) -> bool {
    cpu.checked_div(stride).is_some_and(|block| block.is_multiple_of(2))
}

/// The core of an offline CPU, if all of it is offline and the numbering leaves no doubt.
fn inferred(number: u32, numbering: &Numbering, seen: &BTreeMap<u32, SeenCpu>) -> Observation<CpuSet> {
    let doubt = |why: &str| {
        unknown(format!("CPU {number} is offline, and which other CPU is of its core can't be told: {why}"))
    };
    let core = match numbering {
        Numbering::Unclear => return doubt("the CPUs that are online are not numbered alike"),
        Numbering::Single => CpuSet::new([number]),
        Numbering::Pairs { stride } => {
            let other =
                if lower_half(number, *stride) { number.checked_add(*stride) } else { number.checked_sub(*stride) };
            let there = other.and_then(|other| Some((other, seen.get(&other)?)));
            let node = |cpu: Option<&SeenCpu>| cpu.and_then(|cpu| cpu.node.known().copied());
            match there {
                Some((other, cpu))
                    if !cpu.online && cpu.siblings.is_none() && node(Some(cpu)) == node(seen.get(&number)) =>
                {
                    CpuSet::new([number, other])
                }
                _ => return doubt("the one that should be is online, on another node or not there"),
            }
        }
    };
    core.map_or_else(|| doubt("its number is out of range"), Observation::Known)
}

fn unknown<T>(message: String) -> Observation<T> {
    Observation::Unknown(Failure::new(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn online(node: u32, siblings: &[u32]) -> SeenCpu {
        let siblings = Observation::Known(CpuSet::new(siblings.iter().copied()).unwrap());
        SeenCpu { online: true, node: Observation::Known(node), siblings: Some(siblings) }
    }

    fn offline(node: u32) -> SeenCpu {
        SeenCpu { online: false, node: Observation::Known(node), siblings: None }
    }

    fn core(cpus: &BTreeMap<u32, Cpu>, cpu: u32) -> Option<Vec<u32>> {
        cpus[&cpu].core.known().map(|core| core.iter().collect())
    }

    #[test]
    fn offline_siblings_follow_from_the_numbering_of_those_that_are_online() {
        // m5.xlarge with its second core in the pool.
        let cpus =
            topology([(0, online(0, &[0, 2])), (1, offline(0)), (2, online(0, &[0, 2])), (3, offline(0))].into());
        assert_eq!(core(&cpus, 1), Some(vec![1, 3]));
        assert_eq!(core(&cpus, 3), Some(vec![1, 3]));
        // Neighbours: 2 and 3, never 3 and 4.
        let cpus = topology(
            [
                (0, online(0, &[0, 1])),
                (1, online(0, &[0, 1])),
                (2, offline(0)),
                (3, offline(0)),
                (4, offline(0)),
                (5, offline(0)),
            ]
            .into(),
        );
        assert_eq!((core(&cpus, 3), core(&cpus, 4)), (Some(vec![2, 3]), Some(vec![4, 5])));
        // One thread a core.
        let cpus = topology([(0, online(0, &[0])), (1, offline(0))].into());
        assert_eq!(core(&cpus, 1), Some(vec![1]));
    }

    #[test]
    fn what_the_numbering_leaves_open_is_unknown() {
        // Cores of one and of two threads, as laptops have them.
        let cpus =
            topology([(0, online(0, &[0, 1])), (1, online(0, &[0, 1])), (2, online(0, &[2])), (3, offline(0))].into());
        assert_eq!(core(&cpus, 3), None);
        // Half a core offline.
        let cpus =
            topology([(0, online(0, &[0, 2])), (1, offline(0)), (2, online(0, &[0, 2])), (3, online(0, &[3]))].into());
        assert_eq!(core(&cpus, 1), None);
        // The other one on another node.
        let cpus =
            topology([(0, online(0, &[0, 2])), (1, offline(0)), (2, online(0, &[0, 2])), (3, offline(1))].into());
        assert_eq!(core(&cpus, 1), None);
    }

    #[test]
    fn siblings_that_contradict_each_other_are_not_believed() {
        let cpus = topology([(0, online(0, &[0, 1])), (1, online(0, &[1]))].into());
        assert_eq!((core(&cpus, 0), core(&cpus, 1)), (None, Some(vec![1])));
        let cpus = topology([(0, online(0, &[1])), (1, online(0, &[1]))].into());
        assert_eq!(core(&cpus, 0), None);
    }

    fn seen() -> impl Strategy<Value = BTreeMap<u32, SeenCpu>> {
        let siblings = prop::option::of(prop::collection::btree_set(0_u32..12, 0..4));
        let cpu = (any::<bool>(), 0_u32..2, siblings).prop_map(|(online, node, siblings)| SeenCpu {
            online,
            node: Observation::Known(node),
            siblings: siblings.map(|siblings| Observation::Known(CpuSet::new(siblings).unwrap())),
        });
        prop::collection::btree_map(0_u32..12, cpu, 0..12)
    }

    proptest! {
        #[test]
        fn known_cores_hold_their_cpu_and_never_overlap(seen in seen()) {
            let cpus = topology(seen.clone());
            prop_assert_eq!(cpus.len(), seen.len());
            for (number, cpu) in &cpus {
                let Some(core) = cpu.core.known() else { continue };
                prop_assert!(core.contains(*number));
                for other in core.iter().filter_map(|other| cpus[&other].core.known()) {
                    prop_assert_eq!(other, core);
                }
            }
        }
    }
}
