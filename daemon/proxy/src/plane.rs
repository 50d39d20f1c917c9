//! The plane: what is served at present. A new snapshot is applied as the difference to the last: what did not change is not
//! touched, and connections live on unless their enclave, or the egress endpoint they go to, has left the routes.
//!
//! One owner: snapshots are applied one after another, under a lock that no connection ever takes, and under which nobody waits
//! for a disk.

use crate::certificates::Origin;
use crate::counters::{Live, TrafficKey};
use crate::egress::hosts::Hosts;
use crate::egress::{EgressPort, Endpoint, Grant, Offer};
use crate::error_text::chain;
use crate::ingress::https::{Https, HttpsPort};
use crate::ingress::redirect::RedirectPort;
use crate::ingress::sites::{self, Demand, Sites};
use crate::ingress::tcp::{self, TcpPort};
use crate::listening::Listening;
use crate::saver::Saver;
use crate::seats::Seats;
use crate::shared::Shared;
use crate::store::Store;
use crate::throttle::Throttle;
use crate::vsock::{ListenPoint, Transport};
use bytes::Bytes;
use enclaved_core::id::{Cid, EnclaveName};
use enclaved_core::routes::{
    Direction, EgressRoute, InvalidRoutes, ListenerKey, ListenerReport, ProxyReport, Revision, Routes, TcpRoute,
    TrafficReport,
};
use http::HeaderValue;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
pub(crate) struct Plane {
    shared: Arc<Shared>,
    https: Arc<Https>,
    saver: Arc<Saver>,
    state: Mutex<State>,
    certificate_trouble: Throttle,
}

#[derive(Debug, Default)]
struct State {
    served: Option<(Routes, Revision)>,
    /// The number by which the saver knows `served`; 0: it is of the disk.
    saving: u64,
    lives: BTreeMap<Cid, Arc<Live>>,
    /// What enclaves may reach, each with what ends its connections.
    grants: BTreeMap<Grant, CancellationToken>,
    slots: BTreeMap<Slot, Open>,
}

/// A socket that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Egress(ListenPoint),
    Https(SocketAddr),
    Redirect(SocketAddr),
    Tcp(SocketAddr),
}

#[derive(Debug)]
struct Open {
    listening: Listening,
    service: Service,
}

/// What can be changed of a listener while it listens.
#[derive(Debug)]
enum Service {
    Egress(Arc<EgressPort>),
    Https,
    Redirect,
    Tcp(Arc<TcpPort>),
}

impl Plane {
    pub(crate) fn new(shared: Arc<Shared>, https: Arc<Https>, store: Store) -> Self {
        let saver = Saver::new(store, shared.counters.clone());
        Self { shared, https, saver, state: Mutex::default(), certificate_trouble: Throttle::new() }
    }

    /// Serves the snapshot on disk. Whether there was one.
    pub(crate) async fn restore(&self) -> bool {
        let Some(routes) = self.saver.load() else { return false };
        self.apply(&mut *self.state.lock().await, routes).await;
        self.settled(false).await;
        true
    }

    /// Serves a snapshot from now on. When this returns it is on disk (or the report says why not), and every listener was
    /// opened or failed to; but a disk that hangs is not waited for beyond a limit. A snapshot that makes no sense changes
    /// nothing.
    pub(crate) async fn publish(&self, routes: Routes) -> Result<(), InvalidRoutes> {
        routes.check()?;
        let mut other_domains = false;
        {
            let mut state = self.state.lock().await;
            if state.served.as_ref().is_some_and(|(served, _)| *served == routes) {
                self.saver.again();
                state.slots.values().for_each(|open| open.listening.retry_now());
            } else {
                let revision = routes.revision();
                tracing::info!(%revision, egress = routes.egress.len(), sites = routes.sites.len(), tcp = routes.tcp.len(), "new routes");
                state.saving = self.saver.save(routes.clone());
                other_domains = self.apply(&mut state, routes).await;
            }
        }
        self.settled(other_domains).await;
        Ok(())
    }

    /// Waits, without the lock, for what may have to wait for a disk; for so long, and then it goes on by itself.
    async fn settled(&self, other_domains: bool) {
        let (opening, saving) = {
            let state = self.state.lock().await;
            let opening: Vec<_> = state.slots.values().map(|open| open.listening.opening()).collect();
            (opening, state.saving)
        };
        let all = async {
            for mut opening in opening {
                opening.settled().await;
            }
            // A listener that is opened makes them itself.
            if other_domains {
                self.maintain_certificates().await;
            }
            self.saver.settled(saving).await;
        };
        if timeout(self.shared.limits.settle, all).await.is_err() {
            tracing::warn!(
                "new routes are served, but not all is done yet: a disk, or making certificates, takes long"
            );
        }
        self.shared.counters.changed();
    }

    /// What has to be done from time to time and waits for no disk: idle connections, names, a snapshot that is not on disk
    /// yet, sockets that the service manager could not be told to close.
    pub(crate) async fn maintain(&self) {
        self.https.upstreams.reap();
        self.shared.resolver.look();
        self.shared.access_log.look();
        self.saver.again();
        self.shared.manager.settle().await;
    }

    /// Has certificates made and renewed. Waits for the disk.
    pub(crate) async fn renew(&self) {
        if !self.https.sites.get().domains().is_empty() {
            self.maintain_certificates().await;
        }
    }

    /// Closes every listener, and idle connections into enclaves. Others go on.
    pub(crate) async fn close(&self) {
        self.https.upstreams.keep_none();
        let mut state = self.state.lock().await;
        close_all(std::mem::take(&mut state.slots)).await;
    }

    /// Keeps everybody from it, as one does who waits for a disk.
    #[cfg(test)]
    pub(crate) async fn hold(&self) -> impl Sized + '_ {
        self.state.lock().await
    }

    /// How many listeners there are, and where those should listen that do not.
    pub(crate) async fn listening(&self) -> (usize, Vec<String>) {
        let state = self.state.lock().await;
        let reports = state.slots.values().map(|open| open.listening.report());
        (state.slots.len(), reports.filter_map(|(address, error)| error.map(|_| address)).collect())
    }

    pub(crate) async fn report(&self) -> ProxyReport {
        let state = self.state.lock().await;
        let counters = &self.shared.counters;
        ProxyReport {
            // Before all else: what changes while the rest is read is seen by the next to watch.
            sequence: *counters.sequence().borrow(),
            pid: std::process::id(),
            revision: state.served.as_ref().map(|(_, revision)| *revision),
            listeners: self.listeners(&state),
            ingress_open: state
                .lives
                .iter()
                .map(|(cid, live)| (*cid, live.ingress_open()))
                .filter(|(_, open)| *open > 0)
                .collect(),
            traffic: self.traffic(),
            last_routes_error: self.saver.trouble(),
            accept_errors: counters.accept_errors.load(Relaxed),
            refused: counters.refused.report(),
            https_connections: self.https.open_connections(),
            handshake_failures: counters.handshakes.report(),
            panics: counters.panics.load(Relaxed),
            names: self.shared.resolver.report(),
            certificates: self.https.certificates.report(self.https.sites.get().domains()),
            client_authorities: self.https.client_cas.report(),
            access_log_dropped: self.shared.access_log.dropped(),
            access_log_error: self.shared.access_log.trouble(),
        }
    }

    fn traffic(&self) -> Vec<TrafficReport> {
        let mut traffic = self.shared.counters.report();
        let idle = self.https.upstreams.idle();
        for traffic in traffic.iter_mut().filter(|traffic| traffic.direction == Direction::Https) {
            let upstream = &mut traffic.upstream;
            // Read one after the other: one may have closed in between.
            upstream.idle = idle.get(&traffic.enclave).copied().unwrap_or(0).min(upstream.active);
            upstream.active -= upstream.idle;
        }
        traffic
    }

    fn listeners(&self, state: &State) -> Vec<ListenerReport> {
        let Some((routes, _)) = &state.served else { return Vec::new() };
        let transport = Transport::from(&routes.vsock);
        let hosts = routes.hosts.iter().map(|route| (route.cid, route.vsock_port));
        let egress = routes.egress.iter().map(|route| (route.cid, route.vsock_port)).chain(hosts);
        let egress = egress.map(|(cid, vsock_port)| {
            let slot = Slot::Egress(transport.listen_point(cid, vsock_port));
            (ListenerKey::Egress { cid, vsock_port }, slot)
        });
        let https = routes.https.iter().map(|https| {
            let listen = https.listen;
            (ListenerKey::Https { listen }, Slot::Https(listen))
        });
        let redirect = routes.https.iter().filter_map(|https| https.rules.redirect);
        let redirect = redirect.map(|listen| (ListenerKey::Redirect { listen }, Slot::Redirect(listen)));
        let tcp =
            routes.tcp.iter().map(|TcpRoute { listen, .. }| (ListenerKey::Tcp { listen: *listen }, Slot::Tcp(*listen)));
        let report = |(listener, slot): (ListenerKey, Slot)| {
            let (address, error) = state.slots.get(&slot)?.listening.report();
            Some(ListenerReport { listener, address, error })
        };
        egress.chain(https).chain(redirect).chain(tcp).filter_map(report).collect()
    }

    async fn maintain_certificates(&self) {
        if let Err(error) = self.https.maintain_certificates().await
            && let Some(left_out) = self.certificate_trouble.pass()
        {
            tracing::error!(error = chain(&error), left_out, "could not make or renew certificates");
        }
    }

    /// Whether HTTPS, which listens already, lacks certificates. Waits for no disk, and for listeners of egress alone.
    async fn apply(&self, state: &mut State, routes: Routes) -> bool {
        self.shared.access_log.set(routes.access_log.as_ref());
        let transport = Transport::from(&routes.vsock);
        let same_transport = state.served.as_ref().is_some_and(|(served, _)| served.vsock == routes.vsock);
        let Lost { ended, unserved } = update_lives(&mut state.lives, &routes, &self.shared);
        let revoked = update_grants(&mut state.grants, &routes, &state.lives);

        let wanted = slots(&routes, &transport);
        let stays = |slot: &Slot| wanted.contains(slot) && (same_transport || !matches!(slot, Slot::Egress(_)));
        let (kept, closed): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut state.slots).into_iter().partition(|(slot, _)| stays(slot));
        state.slots = kept;
        // An enclave's successor is served before its own listeners go, which are nobody else's. Every other address may change its
        // use, so it is closed before others are opened.
        let (later, at_once): (BTreeMap<_, _>, BTreeMap<_, _>) =
            closed.into_iter().partition(|(slot, _)| same_transport && matches!(slot, Slot::Egress(_)));
        close_all(at_once).await;
        self.apply_egress(state, &routes, &transport);
        for (_, open) in state.slots.iter().filter(|(slot, _)| matches!(slot, Slot::Egress(_))) {
            open.listening.opening().settled().await;
        }
        close_all(later).await;

        self.apply_tcp(state, &routes, &transport);
        let other_domains = self.apply_https(state, &routes, &transport);

        // Last, so that nothing is cut while a listener still leads there.
        for (Grant { cid, hostname, port, .. }, cut) in revoked {
            if state.lives.contains_key(&cid) {
                tracing::info!(%cid, hostname, port, "the routes have this endpoint no more; cutting its connections");
            }
            cut.cancel();
        }
        for live in ended {
            tracing::info!(cid = %live.cid, "the routes name this CID no more; cutting its connections");
            live.end.cancel();
        }
        for live in unserved {
            if live.ingress_open() > 0 {
                tracing::info!(cid = %live.cid, "this enclave is about to end; cutting the connections to it");
            }
            live.cut.cancel();
        }
        self.shared.counters.forget_unused();
        // Every listener has taken what was kept for it.
        self.shared.manager.forget_rest().await;
        let revision = routes.revision();
        state.served = Some((routes, revision));
        self.shared.counters.changed();
        other_domains
    }

    fn apply_egress(&self, state: &mut State, routes: &Routes, transport: &Transport) {
        let mut points: BTreeMap<ListenPoint, HashMap<Cid, Offer>> = BTreeMap::new();
        for route in &routes.egress {
            let Some(cut) = state.grants.get(&Grant::from(route)) else { continue };
            let point = transport.listen_point(route.cid, route.vsock_port);
            let before = existing_offer(state.slots.get(&Slot::Egress(point)), route.cid);
            let endpoint = existing_endpoint(before.as_ref(), route, cut).unwrap_or_else(|| {
                let name = format!("{}:{}", route.hostname, route.port);
                let traffic = self.shared.counters.traffic(key(&route.enclave, Direction::Egress, name));
                let seats = existing_seats(before.as_ref(), cut);
                Arc::new(Endpoint::new(route.clone(), cut.clone(), traffic, seats, &self.shared))
            });
            points.entry(point).or_default().insert(route.cid, Offer::Endpoint(endpoint));
        }
        for route in &routes.hosts {
            let Some(live) = state.lives.get(&route.cid) else { continue };
            let traffic = self.shared.counters.traffic(key(&route.enclave, Direction::Egress, "hosts".to_owned()));
            let point = transport.listen_point(route.cid, route.vsock_port);
            let before = existing_offer(state.slots.get(&Slot::Egress(point)), route.cid);
            let seats = existing_seats(before.as_ref(), &live.end);
            let hosts = Hosts::new(route.document.clone(), live.end.clone(), traffic, seats);
            points.entry(point).or_default().insert(route.cid, Offer::Hosts(Arc::new(hosts)));
        }
        for (point, offers) in points {
            match state.slots.get(&Slot::Egress(point)) {
                Some(Open { service: Service::Egress(port), listening }) => {
                    port.offers.set(offers);
                    listening.retry_now();
                }
                _ => {
                    let port = EgressPort::new(transport.clone(), point, offers, self.shared.clone());
                    let port = Arc::new(port);
                    let listening = Listening::start(port.clone(), self.shared.clone());
                    state.slots.insert(Slot::Egress(point), Open { listening, service: Service::Egress(port) });
                }
            }
        }
    }

    fn apply_tcp(&self, state: &mut State, routes: &Routes, transport: &Transport) {
        for route in &routes.tcp {
            let name = route.listen.port().to_string();
            let backend = tcp::Backend {
                transport: transport.clone(),
                vsock_port: route.vsock_port,
                target: route.target.and_then(|cid| state.lives.get(&cid).cloned()),
                rules: route.rules.clone(),
                limits: self.shared.limits.aged(route.rules.ages),
                traffic: self.shared.counters.traffic(key(&route.enclave, Direction::Tcp, name)),
            };
            match state.slots.get(&Slot::Tcp(route.listen)) {
                Some(Open { service: Service::Tcp(port), listening }) => {
                    port.backend.set(backend);
                    listening.retry_now();
                }
                _ => {
                    let port = Arc::new(TcpPort::new(route.listen, backend, self.shared.clone()));
                    let listening = Listening::start(port.clone(), self.shared.clone());
                    state.slots.insert(Slot::Tcp(route.listen), Open { listening, service: Service::Tcp(port) });
                }
            }
        }
    }

    /// Whether it listens already, and lacks certificates.
    fn apply_https(&self, state: &mut State, routes: &Routes, transport: &Transport) -> bool {
        let targets: HashSet<_> = routes.sites.iter().filter_map(|site| site.target).collect();
        self.https.upstreams.retarget(transport.clone(), targets);
        let port = routes.https.as_ref().map_or(0, |https| https.listen.port());
        let sites = Sites::new(routes.sites.iter().map(|site| {
            let target = site.target.and_then(|cid| state.lives.get(&cid).cloned());
            let traffic = |direction, name| self.shared.counters.traffic(key(&site.enclave, direction, name));
            let mut backend = match site.rules.passthrough {
                Some(raw) => sites::Backend::raw(raw, target, traffic(Direction::Tcp, port.to_string())),
                None => {
                    let traffic = traffic(Direction::Https, "https".to_owned());
                    sites::Backend::new(site.paths.clone(), target, traffic)
                }
            };
            let hsts = site.rules.hsts_seconds.map(|seconds| format!("max-age={seconds}"));
            let hsts = hsts.and_then(|text| HeaderValue::from_maybe_shared(Bytes::from(text)).ok());
            let origin = site.rules.certificate.clone().map_or(Origin::InternalCa, Origin::Files);
            backend.hsts = hsts;
            let demand = |file: &PathBuf| Arc::new(Demand { enclave: site.enclave.clone(), file: file.clone() });
            backend.client_ca = site.rules.client_ca.as_ref().map(demand);
            sites::Site { domains: site.domains.clone(), default: site.rules.default, origin, backend }
        }));
        self.https.rules.set(routes.https.as_ref().map(|https| https.rules.clone()).unwrap_or_default());
        let before = self.https.sites.get();
        let same_domains = before.domains() == sites.domains() && before.demands() == sites.demands();
        self.https.sites.set(sites);
        let Some(https) = &routes.https else { return false };
        if let Some(listen) = https.rules.redirect {
            match state.slots.get(&Slot::Redirect(listen)) {
                Some(open) => open.listening.retry_now(),
                None => {
                    let port = Arc::new(RedirectPort::new(listen, self.https.clone()));
                    let listening = Listening::start(port, self.shared.clone());
                    state.slots.insert(Slot::Redirect(listen), Open { listening, service: Service::Redirect });
                }
            }
        }
        let slot = Slot::Https(https.listen);
        if let Some(open) = state.slots.get(&slot) {
            open.listening.retry_now();
            return !same_domains;
        }
        self.https.expect_port(https.listen.port());
        let port = Arc::new(HttpsPort { listen: https.listen, https: self.https.clone() });
        let listening = Listening::start(port, self.shared.clone());
        state.slots.insert(slot, Open { listening, service: Service::Https });
        false
    }
}

/// All at once: each may have to wait for the service manager.
async fn close_all(slots: BTreeMap<Slot, Open>) {
    slots.values().for_each(|open| open.listening.stop());
    for (_, open) in slots {
        open.listening.close().await;
    }
}

fn key(enclave: &EnclaveName, direction: Direction, endpoint: String) -> TrafficKey {
    TrafficKey { enclave: enclave.clone(), direction, endpoint }
}

fn slots(routes: &Routes, transport: &Transport) -> BTreeSet<Slot> {
    let hosts = routes.hosts.iter().map(|route| (route.cid, route.vsock_port));
    let egress = routes.egress.iter().map(|route| (route.cid, route.vsock_port)).chain(hosts);
    let egress = egress.map(|(cid, port)| Slot::Egress(transport.listen_point(cid, port)));
    let https = routes.https.iter().map(|https| Slot::Https(https.listen));
    let redirect = routes.https.iter().filter_map(|https| https.rules.redirect).map(Slot::Redirect);
    let tcp = routes.tcp.iter().map(|route| Slot::Tcp(route.listen));
    egress.chain(https).chain(redirect).chain(tcp).collect()
}

/// What routes lead to, or name, no more.
struct Lost {
    /// Named no more.
    ended: Vec<Arc<Live>>,
    /// To which there are to be no connections any more.
    unserved: Vec<Arc<Live>>,
}

/// Takes in the CIDs that are new, and says which take new connections.
fn update_lives(lives: &mut BTreeMap<Cid, Arc<Live>>, routes: &Routes, shared: &Shared) -> Lost {
    let targets: BTreeSet<_> = routes
        .sites
        .iter()
        .filter_map(|site| site.target)
        .chain(routes.tcp.iter().filter_map(|route| route.target))
        .collect();
    let named = routes
        .egress
        .iter()
        .map(|route| route.cid)
        .chain(routes.hosts.iter().map(|route| route.cid))
        .chain(targets.iter().copied())
        .chain(routes.live.iter().copied());
    let named: BTreeSet<_> = named.collect();
    let (stay, ended) = std::mem::take(lives).into_iter().partition(|(cid, _)| named.contains(cid));
    *lives = stay;
    let mut unserved = Vec::new();
    for cid in named {
        let new = |end| Arc::new(Live::new(cid, end, &shared.counters));
        let live = lives.entry(cid).or_insert_with(|| new(shared.cut.child_token()));
        if !targets.contains(&cid) && !routes.live.contains(&cid) {
            unserved.push(live.clone());
        } else if live.cut.is_cancelled() {
            // It is to run on after all. What it connected to was not cut.
            *live = new(live.end.clone());
        }
        live.set_takes_new(targets.contains(&cid));
    }
    let ended: BTreeMap<Cid, Arc<Live>> = ended;
    Lost { ended: ended.into_values().collect(), unserved }
}

/// Takes in what enclaves may reach from now on, and returns what they may not any more.
fn update_grants(
    grants: &mut BTreeMap<Grant, CancellationToken>,
    routes: &Routes,
    lives: &BTreeMap<Cid, Arc<Live>>,
) -> BTreeMap<Grant, CancellationToken> {
    let mut before = std::mem::take(grants);
    for route in &routes.egress {
        let (grant, Some(live)) = (Grant::from(route), lives.get(&route.cid)) else { continue };
        // Two vsock ports may lead to the same upstream; they are one grant.
        if let Entry::Vacant(new) = grants.entry(grant) {
            let cut = before.remove(new.key()).unwrap_or_else(|| live.end.child_token());
            new.insert(cut);
        }
    }
    before
}

/// What that enclave is served there now.
fn existing_offer(slot: Option<&Open>, cid: Cid) -> Option<Offer> {
    let Some(Open { service: Service::Egress(port), .. }) = slot else { return None };
    port.offers.get().get(&cid).cloned()
}

/// The endpoint that is served there now, if it is this very one: then its state lives on.
fn existing_endpoint(before: Option<&Offer>, route: &EgressRoute, cut: &CancellationToken) -> Option<Arc<Endpoint>> {
    let Some(Offer::Endpoint(endpoint)) = before else { return None };
    (endpoint.route == *route && endpoint.cut == *cut).then(|| endpoint.clone())
}

/// Those of what is served there now, if its connections live on: they are counted against the new limit.
fn existing_seats(before: Option<&Offer>, cut: &CancellationToken) -> Seats {
    match before {
        Some(Offer::Endpoint(endpoint)) if endpoint.cut == *cut => endpoint.seats.clone(),
        Some(Offer::Hosts(hosts)) if hosts.cut == *cut => hosts.seats.clone(),
        _ => Seats::default(),
    }
}

#[cfg(test)]
mod tests;
