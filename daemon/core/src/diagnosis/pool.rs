//! Whether the host has what the enclaves need: as a machine, and set aside for them now and after the next boot. What fits a host is
//! `sizing`'s to say.

use super::{Check, Finding};
use crate::allocator_file;
use crate::desired::UpdatePolicy;
use crate::failure::Failure;
use crate::id::MemoryMib;
use crate::inventory::Inventory;
use crate::observed::Observation::{Known, Unknown};
use crate::sizing::pool::PoolNow;
use crate::sizing::{Capacity, Demand, Reserve, admit};

/// Who sets CPUs and memory aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetAsideBy {
    /// The host's administrator.
    Administrator,
    /// enclaved.
    Enclaved,
    /// Somebody who is not asked: a Kubernetes device plugin.
    Others,
}

/// What the enclaves need of the host, and whose part it is to provide it.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The enclaves.
    pub demands: Vec<Demand>,
    /// What stays with the parent.
    pub reserve: Reserve,
    /// Who sets it aside.
    pub by: SetAsideBy,
}

const OTHERS: &str = "somebody else sets CPUs and memory aside (allocator = \"external\")";
const NONE: &str = "no enclave is configured";

impl Wanted {
    /// Why there is nothing to compare; `None`: there is something.
    fn nothing(&self) -> Option<&'static str> {
        match self.by {
            SetAsideBy::Others => Some(OTHERS),
            SetAsideBy::Administrator | SetAsideBy::Enclaved => self.demands.is_empty().then_some(NONE),
        }
    }

    fn cpus(&self) -> u32 {
        self.demands.iter().fold(0, |sum, demand| sum.saturating_add(demand.cpus))
    }

    fn memory(&self) -> MemoryMib {
        MemoryMib(self.demands.iter().fold(0, |sum, demand| sum.saturating_add(demand.memory.0)))
    }
}

/// Whether the configured enclaves fit the host at all.
pub fn sizing(inventory: &Inventory, wanted: &Wanted) -> Finding {
    let check = Check::Sizing;
    if let Some(why) = wanted.nothing() {
        return Finding::not_needed(check, why);
    }
    let capacity = match Capacity::of(inventory, wanted.reserve) {
        Ok(capacity) => capacity,
        Err(failure) => {
            let failure = Failure::new(format!("what enclaves may have is not known: {}", failure.message));
            return Finding::unknown(check, &failure);
        }
    };
    let refusal = match admit(&capacity, &wanted.demands) {
        Ok(admission) => {
            return Finding::ok(check, format!("{} CPUs and {} fit this host", admission.cpus, admission.memory));
        }
        Err(refusal) => refusal.failure(),
    };
    let in_place = |demand: &Demand| Demand { update: UpdatePolicy::Recreate, ..demand.clone() };
    let in_place: Vec<Demand> = wanted.demands.iter().map(in_place).collect();
    if admit(&capacity, &in_place).is_ok() {
        let remedy = "they are launched; an update waits until both generations fit, or says update = \"recreate\"";
        return Finding::warning(
            check,
            format!("only without room for blue-green updates: {}", refusal.message),
            remedy,
        );
    }
    // Whose pool has room for all is not told that they do not fit: how much the parent keeps is the administrator's to say.
    let has_room = |pool: &PoolNow| pool.cpus.len() >= wanted.cpus() && pool.memory >= wanted.memory();
    let nothing_kept = Reserve { cpus: 0, memory: MemoryMib(0) };
    if wanted.by == SetAsideBy::Administrator
        && PoolNow::of(inventory).as_ref().is_ok_and(has_room)
        && Capacity::of(inventory, nothing_kept).is_ok_and(|capacity| admit(&capacity, &in_place).is_ok())
    {
        let remedy = "they are launched in what the administrator has set aside; give the parent more, or say with reserve_cpus and \
                      reserve_memory_mib that it needs less";
        return Finding::warning(check, format!("only with less left to the parent: {}", refusal.message), remedy);
    }
    Finding::failed(check, &refusal)
}

/// Whether the driver's CPUs are enough.
pub fn cpu_pool(inventory: &Inventory, wanted: &Wanted) -> Finding {
    let has = |pool: &PoolNow| pool.cpus.len() >= wanted.cpus();
    let text = |pool: &PoolNow| format!("{} CPUs of {} needed ({})", pool.cpus.len(), wanted.cpus(), pool.cpus);
    set_aside(Check::CpuPool, inventory, wanted, has, text)
}

/// Whether the hugepages are enough.
pub fn hugepages(inventory: &Inventory, wanted: &Wanted) -> Finding {
    let has = |pool: &PoolNow| pool.memory >= wanted.memory();
    let text = |pool: &PoolNow| format!("{} of {} needed", pool.memory, wanted.memory());
    set_aside(Check::Hugepages, inventory, wanted, has, text)
}

fn set_aside(
    check: Check,
    inventory: &Inventory,
    wanted: &Wanted,
    has: impl Fn(&PoolNow) -> bool,
    text: impl Fn(&PoolNow) -> String,
) -> Finding {
    if let Some(why) = wanted.nothing() {
        return Finding::not_needed(check, why);
    }
    let pool = match PoolNow::of(inventory) {
        Ok(pool) => pool,
        Err(failure) if inventory.driver_loaded == Known(false) => {
            return Finding::failure(check, failure.message, "load the driver first, see the check driver");
        }
        Err(failure) => return Finding::unknown(check, &failure),
    };
    if has(&pool) {
        return Finding::ok(check, text(&pool));
    }
    match wanted.by {
        SetAsideBy::Enclaved => Finding::warning(
            check,
            format!("{}: enclaved has it set aside before it launches", text(&pool)),
            "nothing, unless `enclavectl status` says that it can't be had",
        ),
        SetAsideBy::Administrator | SetAsideBy::Others => Finding::failure(
            check,
            text(&pool),
            format!(
                "put exactly these three lines into {}: `---`, `memory_mib: {}`, `cpu_count: {}` (`enclavectl host` says how much there \
                 could be); end all enclaves and run `systemctl restart nitro-enclaves-allocator`; if it still has less, reboot",
                allocator_file::PATH,
                wanted.memory().0.max(pool.memory.0),
                wanted.cpus().max(pool.cpus.len()),
            ),
        ),
    }
}

/// Whether the stock allocator's service sets it aside, now and after the next boot.
pub fn allocator_service(inventory: &Inventory, wanted: &Wanted) -> Finding {
    let check = Check::AllocatorService;
    if wanted.by == SetAsideBy::Others {
        return Finding::not_needed(check, OTHERS);
    }
    let is_short = [cpu_pool(inventory, wanted), hugepages(inventory, wanted)].iter().any(is_in_the_way);
    // While there is enough, what is wrong here shows after the next boot.
    let bad = |seen: String, remedy: &str| match is_short || wanted.by == SetAsideBy::Enclaved {
        true => Finding::failure(check, seen, remedy),
        false => Finding::warning(check, format!("{seen}; what is set aside now is lost with the next boot"), remedy),
    };
    let service = match &inventory.allocator_service {
        Known(service) => service,
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    if !service.installed {
        return bad(
            "nitro-enclaves-allocator.service is not installed".to_owned(),
            "install aws-nitro-enclaves-cli, which has it",
        );
    }
    if wanted.by == SetAsideBy::Administrator {
        match &inventory.allocator_file {
            Known(Some(report)) => {
                if let Err(reason) = &report.outcome {
                    let seen = format!("the allocator fails on {}: {reason}", allocator_file::PATH);
                    return bad(seen, "correct the file; its parser is strict, see README");
                }
            }
            Known(None) => {
                return bad(
                    format!("{} is missing", allocator_file::PATH),
                    "write it (`enclavectl host` says what into it), then `systemctl restart nitro-enclaves-allocator`",
                );
            }
            Unknown(failure) => return Finding::unknown(check, failure),
        }
        if !service.enabled {
            return bad(
                "nitro-enclaves-allocator.service is not enabled".to_owned(),
                "systemctl enable --now nitro-enclaves-allocator",
            );
        }
    }
    Finding::ok(check, "nitro-enclaves-allocator.service is installed")
}

fn is_in_the_way(finding: &Finding) -> bool {
    finding.outcome == super::Outcome::Failure
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::Outcome;
    use super::*;
    use crate::allocator_file::FileReport;
    use crate::inventory::{AllocatorService, Cpu, CpuSet, Device, Hugepages, Node};
    use crate::observed::Observation;
    use std::collections::BTreeMap;

    /// A host of 8 CPUs in 4 cores and 16 GiB; cores 2 and 3 are in the pool, with 1024 hugepages of 2 MiB.
    pub(crate) fn inventory() -> Inventory {
        let set = |text: &str| text.parse::<CpuSet>().unwrap();
        let cpu = |number: u32| {
            let core = set(&format!("{},{}", number % 4, number % 4 + 4));
            (number, Cpu { online: !matches!(number % 4, 2 | 3), node: Known(0), core: Known(core) })
        };
        let pages = |total| BTreeMap::from([(2048, Hugepages { total, free: total, surplus: 0 })]);
        let node = Node { total_kib: Known(16 << 20), free_kib: Known(12 << 20), hugepages: Known(pages(1024)) };
        let device = Device::Present { mode: 0o660, uid: 0, gid: 991, character_device: true, openable: Ok(()) };
        Inventory {
            instance_type: Known("m5.2xlarge".to_owned()),
            cpus: Known((0..8).map(cpu).collect()),
            nodes: Known(BTreeMap::from([(0, node)])),
            driver_loaded: Known(true),
            pool: Known(set("2,3,6,7")),
            device: Known(device),
            nitro_cli: Known("1.5.2".to_owned()),
            allocator_service: Known(AllocatorService { installed: true, enabled: true }),
            allocator_file: Known(Some(allocator_file::check("---\nmemory_mib: 2048\ncpu_count: 4\n"))),
            enclaves: Known(0),
        }
    }

    fn wanted(by: SetAsideBy, cpus: u32, memory: u64) -> Wanted {
        let demand = Demand {
            name: "signer".parse().unwrap(),
            cpus,
            memory: MemoryMib(memory),
            image_size: None,
            update: UpdatePolicy::Recreate,
        };
        Wanted { demands: vec![demand], reserve: Reserve::default(), by }
    }

    fn administrators(cpus: u32, memory: u64) -> Wanted {
        wanted(SetAsideBy::Administrator, cpus, memory)
    }

    #[test]
    fn enclaves_that_do_not_fit_the_host_fail_and_those_that_fit_without_room_to_update_warn() {
        let host = inventory();
        assert_eq!(sizing(&host, &administrators(4, 2048)).outcome, Outcome::Ok);
        let finding = sizing(&host, &administrators(8, 2048));
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("the nearest that fits here"));
        let mut blue_green = administrators(4, 2048);
        blue_green.demands[0].update = UpdatePolicy::BlueGreen;
        assert_eq!(sizing(&host, &blue_green).outcome, Outcome::Warning);
        let unseen = Inventory { cpus: Unknown(Failure::new("no sysfs")), ..host };
        assert_eq!(sizing(&unseen, &administrators(2, 64)).outcome, Outcome::Unknown);
    }

    #[test]
    fn what_has_room_in_the_administrators_pool_only_warns_that_the_parent_keeps_less_than_its_reserve() {
        let keeps = |by| Wanted { reserve: Reserve { cpus: 6, memory: MemoryMib(2048) }, ..wanted(by, 4, 2048) };
        let finding = sizing(&inventory(), &keeps(SetAsideBy::Administrator));
        assert_eq!(finding.outcome, Outcome::Warning);
        assert!(finding.seen.contains("less left to the parent"), "{}", finding.seen);
        assert_eq!(sizing(&inventory(), &keeps(SetAsideBy::Enclaved)).outcome, Outcome::Failure);
    }

    #[test]
    fn an_image_that_needs_more_memory_than_its_enclave_has_does_not_fit() {
        let mut wanted = administrators(2, 1024);
        wanted.demands[0].image_size = Some(300 << 20);
        assert_eq!(sizing(&inventory(), &wanted).outcome, Outcome::Failure);
    }

    #[test]
    fn a_pool_that_is_short_of_cpus_fails_with_the_lines_that_would_do() {
        let short = Inventory { pool: Known("3,7".parse().unwrap()), ..inventory() };
        assert_eq!(cpu_pool(&inventory(), &administrators(4, 1024)).outcome, Outcome::Ok);
        let finding = cpu_pool(&short, &administrators(4, 1024));
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("`---`, `memory_mib: 2048`, `cpu_count: 4`"));
        assert_eq!(cpu_pool(&short, &wanted(SetAsideBy::Enclaved, 4, 1024)).outcome, Outcome::Warning);
        assert_eq!(cpu_pool(&short, &wanted(SetAsideBy::Others, 4, 1024)).outcome, Outcome::NotNeeded);
    }

    #[test]
    fn hugepages_that_are_not_enough_fail() {
        assert_eq!(hugepages(&inventory(), &administrators(2, 2048)).outcome, Outcome::Ok);
        assert_eq!(hugepages(&inventory(), &administrators(2, 2049)).outcome, Outcome::Failure);
        let unloaded =
            Inventory { driver_loaded: Known(false), pool: Unknown(Failure::new("no driver")), ..inventory() };
        assert_eq!(hugepages(&unloaded, &administrators(2, 64)).outcome, Outcome::Failure);
        let unseen = Inventory { pool: Unknown(Failure::new("not readable")), ..inventory() };
        assert_eq!(hugepages(&unseen, &administrators(2, 64)).outcome, Outcome::Unknown);
    }

    #[test]
    fn an_allocator_that_would_not_run_fails_where_something_is_short_and_warns_where_all_is_there() {
        let service = |installed, enabled| Inventory {
            allocator_service: Known(AllocatorService { installed, enabled }),
            ..inventory()
        };
        assert_eq!(allocator_service(&inventory(), &administrators(2, 64)).outcome, Outcome::Ok);
        assert_eq!(allocator_service(&service(true, false), &administrators(2, 64)).outcome, Outcome::Warning);
        assert_eq!(allocator_service(&service(true, false), &administrators(6, 64)).outcome, Outcome::Failure);
        assert_eq!(allocator_service(&service(false, false), &administrators(6, 64)).outcome, Outcome::Failure);
        let missing = allocator_service(&service(false, false), &wanted(SetAsideBy::Enclaved, 2, 64));
        assert_eq!(missing.outcome, Outcome::Failure, "enclaved could never change what is set aside");
        let broken: Observation<Option<FileReport>> = Known(Some(allocator_file::check("memory_mib: 1\n")));
        let broken = Inventory { allocator_file: broken, ..inventory() };
        assert_eq!(allocator_service(&broken, &administrators(6, 64)).outcome, Outcome::Failure);
        let fileless = Inventory { allocator_file: Known(None), ..inventory() };
        assert_eq!(allocator_service(&fileless, &administrators(6, 64)).outcome, Outcome::Failure);
        assert_eq!(allocator_service(&broken, &wanted(SetAsideBy::Others, 2, 64)).outcome, Outcome::NotNeeded);
    }
}
