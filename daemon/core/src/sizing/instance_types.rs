//! The sizes of EC2 instance types that can be parents, from `instance_types.txt`. For advice: what a host really has is in its
//! inventory.

use super::Reserve;
use crate::id::MemoryMib;

const TABLE: &str = include_str!("instance_types.txt");

/// One size of an instance type, as AWS documents it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstanceSize {
    /// `m5.xlarge`
    pub name: &'static str,
    /// vCPUs.
    pub vcpus: u32,
    /// Nominal memory in GiB.
    pub memory_gib: u64,
    /// Threads of a core: 2 with SMT, 1 without.
    pub threads_per_core: u32,
    /// Memory nodes, as assumed: see the table's head.
    pub nodes: u32,
}

impl InstanceSize {
    /// The family: `m5`.
    pub fn family(&self) -> &'static str {
        family(self.name)
    }

    /// What users expect to get of it for enclaves: all but the reserve. What the kernel shows of the memory is a few percent
    /// less, and on sizes with several memory nodes all enclaves must be on one.
    pub fn nominal(&self, reserve: Reserve) -> (u32, MemoryMib) {
        let cpus = self.vcpus.saturating_sub(reserve.cpus.max(self.threads_per_core));
        let memory = (self.memory_gib * 1024).saturating_sub(reserve.memory.0);
        (cpus - cpus.checked_rem(self.threads_per_core).unwrap_or(0), MemoryMib(memory))
    }
}

/// The part of an instance type's name before the dot.
pub fn family(name: &str) -> &str {
    name.split_once('.').map_or(name, |(family, _)| family)
}

/// All sizes in the table, in its order: families together, each from its smallest size up.
pub fn sizes() -> impl Iterator<Item = InstanceSize> {
    // A test reads every line.
    TABLE.lines().filter_map(size)
}

/// The size of that name, if it is in the table.
pub fn find(name: &str) -> Option<InstanceSize> {
    sizes().find(|size| size.name == name)
}

fn size(line: &'static str) -> Option<InstanceSize> {
    let mut fields = line.split_ascii_whitespace();
    let name = fields.next().filter(|name| !name.starts_with('#'))?;
    let vcpus = fields.next()?.parse().ok()?;
    let memory_gib = fields.next()?.parse().ok()?;
    let threads_per_core = fields.next()?.parse().ok()?;
    let nodes = fields.next()?.parse().ok()?;
    fields.next().is_none().then_some(InstanceSize { name, vcpus, memory_gib, threads_per_core, nodes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_line_of_the_table_is_understood_and_none_comes_twice() {
        let lines = TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count();
        let names: BTreeSet<_> = sizes().map(|size| size.name).collect();
        assert_eq!(sizes().count(), lines);
        assert_eq!(names.len(), lines);
        let families: BTreeSet<_> = sizes().map(|size| size.family()).collect();
        let expected = ["m5", "m5a", "m6i", "m6g", "m7i", "m7g", "c5", "c6i", "c6g", "r5", "r6i"];
        assert_eq!(families, expected.into_iter().collect());
    }

    #[test]
    fn every_size_has_the_ratios_of_its_family_and_families_go_up() {
        let mut last: Option<InstanceSize> = None;
        for size in sizes() {
            let per_vcpu = match size.name.as_bytes()[0] {
                b'c' => 2,
                b'm' => 4,
                _ => 8,
            };
            assert_eq!(size.memory_gib, u64::from(size.vcpus) * per_vcpu, "{}", size.name);
            let graviton = size.family().ends_with('g');
            assert_eq!(size.threads_per_core, if graviton { 1 } else { 2 }, "{}", size.name);
            assert!(size.vcpus >= if graviton { 2 } else { 4 }, "{} is too small for a parent", size.name);
            assert_eq!(size.vcpus % (size.nodes * size.threads_per_core), 0, "{}", size.name);
            // xlarge is 4 vCPUs, and the number before it multiplies them.
            let number = size.name.split_once('.').unwrap().1.strip_suffix("xlarge").unwrap_or("");
            if let Ok(times) = number.parse::<u32>() {
                assert_eq!(size.vcpus, 4 * times, "{}", size.name);
            }
            if let Some(last) = last.filter(|last| last.family() == size.family()) {
                assert!(last.vcpus < size.vcpus && last.nodes <= size.nodes, "{} after {}", size.name, last.name);
            }
            last = Some(size);
        }
    }

    #[test]
    fn nominal_capacities_are_those_that_users_know() {
        let known = [
            ("m5.xlarge", 2, 14),
            ("m5.2xlarge", 6, 30),
            ("m5.4xlarge", 14, 62),
            ("m5.8xlarge", 30, 126),
            ("m6g.xlarge", 2, 14),
        ];
        for (name, cpus, gib) in known {
            let size = find(name).unwrap();
            assert_eq!(size.nominal(Reserve::default()), (cpus, MemoryMib(gib * 1024)), "{name}");
        }
        // A reserve of part of a core takes the core.
        let reserve = Reserve { cpus: 3, ..Reserve::default() };
        assert_eq!(find("m5.2xlarge").unwrap().nominal(reserve).0, 4);
        assert_eq!(find("t3.micro"), None);
    }
}
