//! What the host is, what enclaves may have of it, and what is in the way. Looks at the host itself: no daemon is needed, and none
//! is asked.

use super::{CtlError, table};
use crate::config::{self, Config};
use crate::host::inventory::{HostInventory, InventorySource, Roots};
use enclaved_core::allocator_file;
use enclaved_core::desired::{AllocatorMode, HostPolicy};
use enclaved_core::failure::Failure;
use enclaved_core::inventory::{Device, Inventory, Node};
use enclaved_core::observed::Observation::{self, Known, Unknown};
use enclaved_core::plan::pool::{Candidate, Verdict, judge, lines};
use enclaved_core::sizing::pool::{PoolChange, PoolPolicy};
use enclaved_core::sizing::{Capacity, Demand, Reserve};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// All of it, decided.
struct Findings {
    inventory: Inventory,
    mode: AllocatorMode,
    reserve: Reserve,
    verdict: Verdict,
    advice: Vec<String>,
}

/// Looks at the host below `root`, and at the configuration for what is wanted of it.
pub(super) async fn host(config_file: &Path, root: &Path, json: bool) -> Result<String, CtlError> {
    let config = config::load(config_file);
    let mut roots = Roots::below(root);
    let mut nitro_cli = "nitro-cli".into();
    if let Ok(config) = &config {
        nitro_cli = config.nitro_cli.clone();
        if root == Path::new("/") {
            roots.sysfs.clone_from(&config.host.sysfs);
        }
    }
    let inventory = HostInventory::new(roots, nitro_cli).read().await;
    let mut findings = find(inventory, config.as_ref().ok());
    if let Err(errors) = &config {
        let first = errors.to_string();
        let first = first.lines().next().unwrap_or_default();
        findings.advice.push(format!("the configuration can't be used, so nothing is said of its enclaves: {first}"));
    }
    Ok(if json { format!("{:#}\n", as_json(&findings)?) } else { as_text(&findings) })
}

fn find(inventory: Inventory, config: Option<&Config>) -> Findings {
    let policy = config.map_or_else(HostPolicy::default, |config| config.desired.host.clone());
    let reserve = Reserve::from(&policy);
    let enclaves = config.into_iter().flat_map(|config| &config.desired.enclaves);
    let candidates: Vec<Candidate> =
        enclaves.map(|(name, spec)| Candidate { demand: Demand::of(name, spec, None), runs: None }).collect();
    let verdict = judge(policy.pool, reserve, &inventory, &candidates, &inventory.enclaves);
    let mut advice = Vec::new();
    about_the_driver(&inventory, &mut advice);
    about_the_tools(&inventory, &mut advice);
    if policy.allocator != AllocatorMode::External {
        about_the_pool(&inventory, policy.allocator, &verdict, &mut advice);
    }
    Findings { inventory, mode: policy.allocator, reserve, verdict, advice }
}

fn about_the_driver(inventory: &Inventory, advice: &mut Vec<String>) {
    match &inventory.driver_loaded {
        Known(true) => {}
        Known(false) => advice.push(
            "the nitro_enclaves driver is not loaded: start the instance with enclaves enabled (`--enclave-options Enabled=true`), \
             install aws-nitro-enclaves-cli, and run `modprobe nitro_enclaves`"
                .to_owned(),
        ),
        Unknown(failure) => advice.push(format!("whether the driver is loaded is not known: {failure}")),
    }
    match &inventory.device {
        Known(Device::Absent) if inventory.driver_loaded == Known(true) => advice.push(
            "/dev/nitro_enclaves is missing though the driver is loaded: the instance was started without enclaves; stop it and set \
             `aws ec2 modify-instance-attribute --enclave-options` or start another with enclaves enabled"
                .to_owned(),
        ),
        Known(Device::Present { character_device: true, openable: Err(error), .. }) => advice.push(format!(
            "/dev/nitro_enclaves can't be opened by this user ({error}): it belongs to group ne; whoever runs enclaves must be in it"
        )),
        Known(Device::Present { character_device: false, .. }) => {
            advice.push("/dev/nitro_enclaves is no device: remove it and load the driver again".to_owned());
        }
        Known(_) => {}
        Unknown(failure) => advice.push(format!("nothing is known of /dev/nitro_enclaves: {failure}")),
    }
}

fn about_the_tools(inventory: &Inventory, advice: &mut Vec<String>) {
    if let Unknown(failure) = &inventory.nitro_cli {
        advice.push(format!("{failure}: install aws-nitro-enclaves-cli"));
    }
    match &inventory.allocator_service {
        Known(service) if !service.installed => {
            advice.push(
                "nitro-enclaves-allocator.service is not installed: it comes with aws-nitro-enclaves-cli".to_owned(),
            );
        }
        Known(service) if !service.enabled => advice.push(
            "nitro-enclaves-allocator.service is not enabled, so nothing is reserved after a boot: `systemctl enable \
             nitro-enclaves-allocator`"
                .to_owned(),
        ),
        Known(_) => {}
        Unknown(failure) => advice.push(format!("nothing is known of nitro-enclaves-allocator.service: {failure}")),
    }
    match &inventory.allocator_file {
        Known(Some(report)) => {
            if let Err(reason) = &report.outcome {
                advice.push(format!("the allocator fails on {}: {reason}", allocator_file::PATH));
            }
            advice.extend(report.remarks.iter().map(|remark| format!("{}: {remark}", allocator_file::PATH)));
        }
        Known(None) => {}
        Unknown(failure) => advice.push(format!("nothing is known of {}: {failure}", allocator_file::PATH)),
    }
}

fn about_the_pool(inventory: &Inventory, mode: AllocatorMode, verdict: &Verdict, advice: &mut Vec<String>) {
    if let Err(failure) = &verdict.capacity {
        return advice.push(format!("what enclaves may have is not known: {failure}"));
    }
    advice.extend(verdict.refused.iter().map(|(name, refusal)| format!("{name} can't be launched: {refusal}")));
    if let Some(refusal) = &verdict.no_spare {
        advice.push(format!("there is no room for blue-green updates: {refusal}"));
    }
    advice.extend(verdict.stray.iter().map(|stray| stray.failure().to_string()));
    let now = match &verdict.now {
        Ok(now) => now,
        // Said already.
        Err(_) if inventory.driver_loaded == Known(false) => return,
        Err(failure) => return advice.push(format!("what is reserved is not known: {failure}")),
    };
    let (to, why) = match verdict.change.clone() {
        PoolChange::Nothing => return,
        PoolChange::Due { to, .. } => (to, String::new()),
        PoolChange::Waits { to, why, .. } => (to, format!(" ({why})")),
    };
    let all = match to.policy {
        PoolPolicy::Exact if to.least.as_ref() == Some(&to.wish) => "that",
        PoolPolicy::Exact => "that with room for an update",
        PoolPolicy::All => "all that enclaves may have",
    };
    let what = match &to.least {
        Some(least) if !now.has(least) => {
            format!("the configured enclaves need {least}, which is not reserved; {all} ")
        }
        Some(_) => format!("{all} "),
        None => format!("no enclave that fits is configured; {all} "),
    };
    advice.push(match mode {
        AllocatorMode::Manage if to.least.is_none() && verdict.refused.is_empty() => {
            format!("no enclave is configured; with the first one enclaved has {} reserved{why}", to.wish)
        }
        AllocatorMode::Manage => format!("{what}is {}, and enclaved has it reserved{why}", to.wish),
        AllocatorMode::Verify | AllocatorMode::External => format!(
            "{what}would be {} in {}, and `systemctl restart nitro-enclaves-allocator`{why}",
            lines(&to.wish),
            allocator_file::PATH
        ),
    });
}

fn as_json(findings: &Findings) -> Result<Value, CtlError> {
    let bug = |error: serde_json::Error| CtlError::Bug(format!("writing the inventory: {error}"));
    let verdict = &findings.verdict;
    let may_have = match &verdict.capacity {
        Ok(capacity) => {
            let nodes: Vec<Value> = capacity
                .nodes
                .iter()
                .map(|node| {
                    let (cpus, memory) = capacity.budget(node);
                    json!({ "node": node.node, "cpus": cpus, "memory_mib": memory })
                })
                .collect();
            let nominal = capacity.size().map(|size| {
                let (cpus, memory) = size.nominal(capacity.reserve);
                json!({ "cpus": cpus, "memory_mib": memory })
            });
            json!({ "one_of": nodes, "nominal": nominal })
        }
        Err(failure) => json!({ "unknown": failure }),
    };
    let pool = match &verdict.now {
        Ok(now) => json!({ "cpus": now.cpus, "memory_mib": now.memory }),
        Err(failure) => json!({ "unknown": failure }),
    };
    let refused: BTreeMap<_, _> = verdict.refused.iter().map(|(name, refusal)| (name, refusal.failure())).collect();
    let wanted = verdict.wanted.as_ref().map(|wanted| &wanted.wish);
    Ok(json!({
        "inventory": serde_json::to_value(&findings.inventory).map_err(bug)?,
        "reserve": { "cpus": findings.reserve.cpus, "memory_mib": findings.reserve.memory },
        "enclaves_may_have": may_have,
        "pool": pool,
        "pool_wanted": wanted,
        "allocator": findings.mode.as_str(),
        "configured": { "fits": verdict.admission, "refused": refused },
        "advice": findings.advice,
    }))
}

fn as_text(findings: &Findings) -> String {
    let Findings { inventory, reserve, .. } = findings;
    let mut pairs = vec![
        ("instance", said(&inventory.instance_type, String::clone)),
        (
            "CPUs",
            said(&inventory.cpus, |cpus| {
                let online = cpus.values().filter(|cpu| cpu.online).count();
                format!("{} ({online} online)", cpus.len())
            }),
        ),
    ];
    match &inventory.nodes {
        Known(nodes) => pairs.extend(nodes.iter().map(|(number, node)| ("memory", memory(*number, node)))),
        Unknown(failure) => pairs.push(("memory", unknown(failure))),
    }
    pairs.push((
        "driver",
        said(&inventory.driver_loaded, |loaded| if *loaded { "loaded" } else { "not loaded" }.to_owned()),
    ));
    pairs.push(("device", said(&inventory.device, device)));
    pairs.push(("nitro-cli", said(&inventory.nitro_cli, String::clone)));
    pairs.push((
        "allocator",
        said(&inventory.allocator_service, |service| {
            let installed = if service.installed { "installed" } else { "not installed" };
            format!("{installed}, {}", if service.enabled { "enabled" } else { "not enabled" })
        }),
    ));
    pairs.push((
        "its file",
        said(&inventory.allocator_file, |report| match report {
            None => "there is none".to_owned(),
            Some(report) => match &report.outcome {
                Ok(reservation) => format!("reserves {reservation}"),
                Err(_) => "fails".to_owned(),
            },
        }),
    ));
    pairs.push((
        "reserved",
        match &findings.verdict.now {
            Ok(now) if now.cpus.is_empty() => format!("no CPUs, {} in hugepages", now.memory),
            Ok(now) => format!("{} CPUs ({}), {} in hugepages", now.cpus.len(), now.cpus, now.memory),
            Err(failure) => unknown(failure),
        },
    ));
    pairs.push((
        "running",
        said(&inventory.enclaves, |count| format!("{count} {}", if *count == 1 { "enclave" } else { "enclaves" })),
    ));
    pairs.push((
        "may have",
        match &findings.verdict.capacity {
            Ok(capacity) => may_have(capacity, *reserve),
            Err(failure) => unknown(failure),
        },
    ));
    if let Some(admission) = &findings.verdict.admission {
        let spare = admission.spare.map_or_else(String::new, |spare| {
            format!(", of which {} CPUs and {} are for blue-green updates", spare.cpus, spare.memory)
        });
        pairs.push(("configured", format!("{} CPUs and {}{spare}", admission.cpus, admission.memory)));
    }
    if !findings.verdict.refused.is_empty() {
        let names: Vec<_> = findings.verdict.refused.keys().map(ToString::to_string).collect();
        pairs.push(("configured", format!("{} can't be launched", names.join(", "))));
    }
    if let Some(wanted) = findings.verdict.wanted.as_ref().filter(|_| findings.mode == AllocatorMode::Manage) {
        pairs.push(("to reserve", wanted.wish.to_string()));
    }
    let mut text = table::pairs(&pairs);
    for advice in &findings.advice {
        text.push_str(&format!("\n- {advice}\n"));
    }
    text
}

fn may_have(capacity: &Capacity, reserve: Reserve) -> String {
    let of_node = |node| {
        let (cpus, memory) = capacity.budget(node);
        let place = if capacity.nodes.len() > 1 { format!(" on node {}", node.node) } else { String::new() };
        format!("{cpus} CPUs and {memory}{place}")
    };
    let nodes: Vec<String> = capacity.nodes.iter().map(of_node).collect();
    let nominal = capacity.size().map_or_else(String::new, |size| {
        let (cpus, memory) = size.nominal(reserve);
        format!("nominally {cpus} CPUs and {} GiB; ", memory.0 / 1024)
    });
    format!("{} ({nominal}{} CPUs and {} stay with the parent)", nodes.join(", or "), reserve.cpus, reserve.memory)
}

fn memory(number: u32, node: &Node) -> String {
    let mib = |kib: &u64| format!("{} MiB", kib / 1024);
    let pages = said(&node.hugepages, |sizes| {
        let size = |(size, pages): (&u64, &enclaved_core::inventory::Hugepages)| {
            let surplus = if pages.surplus > 0 { format!(", {} surplus", pages.surplus) } else { String::new() };
            format!("{} of {size} KiB ({} free{surplus})", pages.total, pages.free)
        };
        let sizes: Vec<String> = sizes.iter().filter(|(_, pages)| pages.total > 0).map(size).collect();
        if sizes.is_empty() { "none".to_owned() } else { sizes.join(", ") }
    });
    format!("node {number}: {}, {} free; hugepages: {pages}", said(&node.total_kib, mib), said(&node.free_kib, mib))
}

fn device(device: &Device) -> String {
    match device {
        Device::Absent => "/dev/nitro_enclaves is missing".to_owned(),
        Device::Present { mode, uid, gid, openable, .. } => {
            let openable = match openable {
                Ok(()) => "this user can open it".to_owned(),
                Err(error) => format!("this user can't open it: {error}"),
            };
            format!("/dev/nitro_enclaves, mode {mode:04o}, user {uid}, group {gid}; {openable}")
        }
    }
}

fn said<T>(observation: &Observation<T>, text: impl FnOnce(&T) -> String) -> String {
    match observation {
        Known(value) => text(value),
        Unknown(failure) => unknown(failure),
    }
}

fn unknown(failure: &Failure) -> String {
    format!("unknown: {failure}")
}
