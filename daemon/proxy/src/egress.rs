//! Egress: enclaves reach their endpoints, and only their own. A connection is served when the peer's CID has an endpoint on
//! that vsock port; where the name leads is up to `dial`. On AF_VSOCK a port is one listener for all enclaves, and the peer's
//! CID says whose endpoint is meant.

mod handshake;
mod hello;
pub(crate) mod hosts;
mod rate;
mod records;

use self::handshake::Ended;
use self::hello::Hellos;
use self::hosts::Hosts;
use self::rate::Rate;
use crate::counters::{Failure, Open, Refused, Traffic};
use crate::current::Current;
use crate::dial::Upstream;
use crate::error_text::chain;
use crate::inherited::Unusable;
use crate::limits::Limits;
use crate::listening::{Service, Socket};
use crate::relay::{Broken, relay};
use crate::seats::Seats;
use crate::shared::Shared;
use crate::tcp::ResetOnDrop;
use crate::throttle::{Changes, Throttle};
use crate::vsock::{ListenError, ListenPoint, Listener, Stream, Transport};
use enclaved_core::id::Cid;
use enclaved_core::routes::EgressRoute;
use rustix::fd::{BorrowedFd, OwnedFd};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// What an operator lets an enclave reach. Connections live on for as long as the routes contain it, on whatever vsock port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Grant {
    pub(crate) cid: Cid,
    pub(crate) hostname: String,
    pub(crate) port: u16,
    allow_addresses: BTreeSet<IpAddr>,
    /// What began before only TLS with that name was allowed may be something else.
    sni: bool,
}

impl From<&EgressRoute> for Grant {
    fn from(route: &EgressRoute) -> Self {
        let EgressRoute { cid, hostname, port, allow_addresses, sni, .. } = route;
        let allow_addresses = allow_addresses.iter().copied().collect();
        Self { cid: *cid, hostname: hostname.clone(), port: *port, allow_addresses, sni: *sni }
    }
}

/// One endpoint of one enclave.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) route: EgressRoute,
    /// Ends every connection of its [`Grant`]: that of another CID, or of a changed endpoint, is another.
    pub(crate) cut: CancellationToken,
    traffic: Arc<Traffic>,
    /// Of this enclave's CID on this vsock port alone, while `traffic` is that of all generations.
    pub(crate) seats: Seats,
    limits: Limits,
    upstream: Upstream,
    rate: Rate,
    /// How the last connection was refused or failed before it was one; none if it was not.
    went: Changes<Option<Failure>>,
}

/// What an enclave has on a vsock port of the parent.
#[derive(Debug, Clone)]
pub(crate) enum Offer {
    Endpoint(Arc<Endpoint>),
    Hosts(Arc<Hosts>),
}

impl Endpoint {
    /// Begins to resolve its name, so that it is known when the enclave comes.
    /// `seats` are those of the endpoint that it takes the place of, or new.
    pub(crate) fn new(
        route: EgressRoute,
        cut: CancellationToken,
        traffic: Arc<Traffic>,
        seats: Seats,
        shared: &Shared,
    ) -> Self {
        let rate = Rate::new(route.limits.connections_per_second.unwrap_or(shared.limits.egress_rate));
        let upstream = Upstream::new(&route, &shared.resolver);
        let limits = shared.limits.of_egress(&route.limits);
        Self { route, cut, traffic, seats, limits, upstream, rate, went: Changes::new(None) }
    }

    async fn carry(&self, mut enclave: Stream, turn: Instant, shared: &Shared) {
        // A token of its own: waiting on a shared one takes its lock at every turn.
        let cut = self.cut.child_token();
        let carried = tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = cut.cancelled() => Err((Failure::Cut, None)),
            // Not finished is what it must be when the enclave loses the endpoint: dropping it resets the upstream.
            carried = self.dial_and_relay(&mut enclave, turn, shared) => carried,
        };
        if let Err((failure, text)) = carried {
            self.fail(failure, text.as_deref());
        }
    }

    async fn dial_and_relay(
        &self,
        enclave: &mut Stream,
        turn: Instant,
        shared: &Shared,
    ) -> Result<(), (Failure, Option<String>)> {
        // On the heap: what this needs is not kept for as long as the relay lives.
        let (mut upstream, hellos) = Box::pin(self.reach(enclave, turn, shared)).await?;
        if self.went.now(None).is_some() {
            let EgressRoute { enclave, cid, vsock_port, .. } = &self.route;
            let endpoint = &self.traffic.key().endpoint;
            tracing::info!(%enclave, %cid, vsock_port, %endpoint, "an enclave reaches its endpoint again");
        }
        let ended = match hellos {
            None => relay(enclave, &mut *upstream, &self.traffic, &self.limits).await,
            Some(hellos) => {
                let relay = handshake::relay(enclave, &mut *upstream, hellos, &self.traffic, &self.limits);
                match Box::pin(relay).await {
                    Err(Ended::Refused(error)) => return Err((error.failure(), Some(chain(&error)))),
                    Err(Ended::Broken(broken)) => Err(broken),
                    Ok(()) => Ok(()),
                }
            }
        };
        if matches!(ended, Ok(()) | Err(Broken::Deaf { .. })) {
            upstream.ended_well();
        }
        // Connections end in all ways; that is counted, and no line in the log.
        ended.map_err(|broken| {
            tracing::debug!(endpoint = %self.traffic.key().endpoint, %broken, "a relay broke off");
            (broken.failure(), None)
        })
    }

    /// Connects to the upstream when it is this connection's turn, and if it is what the endpoint takes. Also who judges how
    /// it goes on, where that matters.
    async fn reach(
        &self,
        enclave: &mut Stream,
        turn: Instant,
        shared: &Shared,
    ) -> Result<(ResetOnDrop, Option<Hellos>), (Failure, Option<String>)> {
        if turn > Instant::now() {
            sleep_until(turn).await;
        }
        // Before the upstream hears of it.
        let (hello, hellos) = if self.route.sni {
            let hello = hello::expect(enclave, &self.route.hostname, self.limits.egress_hello).await;
            let (hello, hellos) = hello.map_err(|error| (error.failure(), Some(chain(&error))))?;
            (hello, Some(hellos))
        } else {
            (Vec::new(), None)
        };
        let dialled = self.upstream.dial(&self.traffic.connects, &self.limits, &shared.own_addresses).await;
        let mut upstream = ResetOnDrop::new(dialled.map_err(|error| (error.failure(), Some(chain(&error))))?);
        if !hello.is_empty() {
            let passed = timeout(self.limits.dial, upstream.write_all(&hello)).await;
            passed.map_err(|_| (Failure::Idle, None))?.map_err(|_| (Failure::Reset, None))?;
            self.traffic.from_enclave.fetch_add(hello.len() as u64, Relaxed);
        }
        Ok((upstream, hellos))
    }

    fn fail(&self, failure: Failure, text: Option<&str>) {
        self.traffic.fail(failure);
        if let Some(error) = text
            && let Some(left_out) = self.went.now(Some(failure))
        {
            let EgressRoute { enclave, cid, vsock_port, .. } = &self.route;
            let endpoint = &self.traffic.key().endpoint;
            tracing::warn!(%enclave, %cid, vsock_port, %endpoint, error, left_out, "an enclave could not reach its endpoint");
        }
    }
}

/// A vsock port of the parent, and who has which endpoint on it.
#[derive(Debug)]
pub(crate) struct EgressPort {
    transport: Transport,
    point: ListenPoint,
    pub(crate) offers: Current<HashMap<Cid, Offer>>,
    shared: Arc<Shared>,
    strangers: Throttle,
}

impl EgressPort {
    pub(crate) fn new(
        transport: Transport,
        point: ListenPoint,
        offers: HashMap<Cid, Offer>,
        shared: Arc<Shared>,
    ) -> Self {
        Self { transport, point, offers: Current::new(offers), shared, strangers: Throttle::new() }
    }
}

impl Socket for Listener {
    type Connection = (Stream, Option<Cid>);

    async fn accept(&self) -> io::Result<Self::Connection> {
        Self::accept(self).await
    }

    fn address(&self) -> String {
        Self::address(self)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        Self::descriptor(self)
    }

    fn mark(&self) -> String {
        Self::mark(self)
    }

    fn kept(&mut self) {
        Self::kept(self);
    }

    fn discard(self) {
        Self::discard(self);
    }
}

impl Service for EgressPort {
    type Socket = Listener;
    type Error = ListenError;

    fn address(&self) -> String {
        self.transport.address(self.point)
    }

    fn name(&self) -> String {
        match self.point.cid {
            Some(cid) => format!("egress-{cid}-{}", self.point.port),
            None => format!("egress-any-{}", self.point.port),
        }
    }

    fn adopt(&self, socket: OwnedFd, mark: &str) -> Result<Listener, Unusable> {
        self.transport.adopt(self.point, socket, mark)
    }

    async fn open(&self) -> Result<Listener, ListenError> {
        self.transport.listen(self.point).await
    }

    fn serve(self: &Arc<Self>, (enclave, peer): (Stream, Option<Cid>)) {
        let Some(offer) = peer.and_then(|cid| self.offers.get().get(&cid).cloned()) else {
            self.shared.counters.refused.count(Refused::UnknownPeer);
            if let Some(left_out) = self.strangers.pass() {
                let (peer, point) = (peer.map(Cid::get), self.point);
                tracing::warn!(peer, %point, left_out, "refused a vsock peer that has no endpoint there");
            }
            return;
        };
        let endpoint = match offer {
            Offer::Endpoint(endpoint) => endpoint,
            Offer::Hosts(hosts) => return hosts.serve(enclave, &self.shared),
        };
        let open = Open::egress(&endpoint.traffic);
        let limit =
            endpoint.route.limits.max_connections.map_or(self.shared.limits.egress_connections as u64, u64::from);
        let Some(seat) = endpoint.seats.take(limit) else {
            endpoint.fail(Failure::Limit, Some(&format!("it has {limit} connections already")));
            return;
        };
        let Some(turn) = endpoint.rate.turn() else {
            endpoint.fail(Failure::Rate, Some("it makes new connections faster than its connections_per_second"));
            return;
        };
        let shared = self.shared.clone();
        self.shared.spawn(async move {
            endpoint.carry(enclave, turn, &shared).await;
            drop((seat, open));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::TrafficKey;
    use enclaved_core::routes::{Direction, EgressLimits};
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, UnixStream};

    /// A port as AF_VSOCK has it, one for all enclaves, with an endpoint for CID 16 only.
    async fn port() -> (Arc<EgressPort>, TcpListener) {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = upstream.local_addr().unwrap();
        let shared = Arc::new(Shared::new(Limits::default()));
        let route = EgressRoute {
            enclave: "signer".parse().unwrap(),
            cid: Cid::FIRST,
            vsock_port: 8000,
            hostname: address.ip().to_string(),
            port: address.port(),
            allow_addresses: vec![address.ip()],
            sni: false,
            limits: EgressLimits::default(),
        };
        let key = TrafficKey { enclave: route.enclave.clone(), direction: Direction::Egress, endpoint: "x".into() };
        let endpoint =
            Endpoint::new(route, CancellationToken::new(), shared.counters.traffic(key), Seats::default(), &shared);
        let point = ListenPoint { cid: None, port: 8000 };
        let endpoints = HashMap::from([(Cid::FIRST, Offer::Endpoint(Arc::new(endpoint)))]);
        (Arc::new(EgressPort::new(Transport::AfVsock, point, endpoints, shared)), upstream)
    }

    #[tokio::test]
    async fn on_a_port_shared_by_all_enclaves_only_the_owner_of_an_endpoint_is_served() {
        let (port, upstream) = port().await;
        for stranger in [None, Cid::new(17)] {
            let (mut enclave, host) = UnixStream::pair().unwrap();
            port.serve((Stream::Hybrid(host), stranger));
            assert_eq!(enclave.read(&mut [0; 1]).await.unwrap(), 0, "{stranger:?} was not hung up on");
        }
        assert_eq!(port.shared.counters.refused.report()["unknown_peer"], 2);
        let (_enclave, host) = UnixStream::pair().unwrap();
        port.serve((Stream::Hybrid(host), Some(Cid::FIRST)));
        upstream.accept().await.unwrap();
    }
}
