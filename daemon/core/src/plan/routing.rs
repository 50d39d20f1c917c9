//! The routes that follow from what is wanted and what the ledger says of each generation.

use crate::desired::{Desired, EgressSpec, hosts_document};
use crate::id::{Cid, EnclaveName};
use crate::ledger::{EnclaveRecord, GenerationRecord, Ledger, Phase};
use crate::routes::{EgressRoute, HostsRoute, ROUTES_FORMAT, Routes, Site, TcpRoute};

/// The snapshot for the proxy. It depends on nothing that is observed: an observation that fails changes no route.
pub fn routes(desired: &Desired, ledger: &Ledger) -> Routes {
    let mut routes = Routes {
        format: ROUTES_FORMAT,
        vsock: desired.vsock.clone(),
        egress: egress(desired, ledger),
        https: desired.https.clone(),
        sites: Vec::new(),
        tcp: Vec::new(),
        hosts: Vec::new(),
        access_log: desired.access_log.clone(),
        live: live(ledger),
    };
    for (name, spec) in &desired.enclaves {
        let target = ledger.enclaves.get(name).and_then(target);
        if !spec.ingress.domains.is_empty() {
            routes.sites.push(Site {
                enclave: name.clone(),
                domains: spec.ingress.domains.clone(),
                paths: spec.ingress.paths.clone(),
                target,
                rules: spec.ingress.site.clone(),
            });
        }
        routes.tcp.extend(spec.ingress.tcp.iter().map(|port| TcpRoute {
            enclave: name.clone(),
            listen: port.listen,
            vsock_port: port.vsock_port,
            target,
            rules: port.rules.clone(),
        }));
        if let Some(vsock_port) = spec.hosts_port {
            let generations = ledger.enclaves.get(name).into_iter().flat_map(|enclave| enclave.generations.values());
            let live = generations.filter(|record| !matches!(record.phase, Phase::Ended { .. }));
            // The new port may be that of an endpoint which an older generation still has.
            let free = live.filter(|record| record.egress.iter().all(|endpoint| endpoint.vsock_port != vsock_port));
            routes.hosts.extend(free.map(|record| HostsRoute {
                enclave: name.clone(),
                cid: record.cid,
                vsock_port,
                document: hosts_document(&record.egress),
            }));
        }
    }
    routes
}

/// The generations to which connections must not be cut, whether or not they take new ones. One that is being stopped is none: its
/// clients are told before it is gone.
fn live(ledger: &Ledger) -> Vec<Cid> {
    let generations = ledger.enclaves.values().flat_map(|enclave| enclave.generations.values());
    let over = |record: &&GenerationRecord| matches!(record.phase, Phase::Stopping { .. } | Phase::Ended { .. });
    generations.filter(|record| !over(record)).map(|record| record.cid).collect()
}

/// The newest generation that is ready.
fn target(record: &EnclaveRecord) -> Option<Cid> {
    let ready = record.generations.values().rev().find(|record| matches!(record.phase, Phase::Ready { .. }));
    ready.map(|record| record.cid)
}

fn egress(desired: &Desired, ledger: &Ledger) -> Vec<EgressRoute> {
    let mut routes = Vec::new();
    for (name, enclave) in &ledger.enclaves {
        let spec = desired.enclaves.get(name);
        for (generation, record) in &enclave.generations {
            // An ended one keeps its listeners until its successor has its own, so that an endpoint is open throughout.
            let newest = enclave.generations.last_key_value().is_some_and(|(last, _)| last == generation);
            let wanted = spec.is_some() && enclave.held_since.is_none();
            if matches!(record.phase, Phase::Ended { .. }) && !(newest && wanted) {
                continue;
            }
            routes.extend(record.egress.iter().map(|endpoint| route(name, record.cid, endpoint)));
        }
    }
    routes
}

fn route(enclave: &EnclaveName, cid: Cid, endpoint: &EgressSpec) -> EgressRoute {
    EgressRoute {
        enclave: enclave.clone(),
        cid,
        vsock_port: endpoint.vsock_port,
        hostname: endpoint.hostname.clone(),
        port: endpoint.port,
        allow_addresses: endpoint.allow_addresses.clone(),
        sni: endpoint.sni,
        limits: endpoint.limits,
    }
}
