//! Reaching an upstream: resolves its name, has each address judged by the egress policy, and connects to the first that
//! answers, one after another. What is sent there is nobody's business here.

use crate::counters::Failure;
use crate::host_addresses::Unknown;
use crate::limits::Limits;
use crate::shared::Shared;
use crate::tcp;
use enclaved_core::egress_policy::{self, Refusal};
use enclaved_core::routes::EgressRoute;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

/// Lookups of one endpoint at a time. The system's resolver occupies a thread for each, for as long as it likes; this keeps
/// one endpoint with a dead resolver from taking them all.
pub(crate) const LOOKUPS: usize = 4;

/// Lookups of all endpoints at a time. They share the threads for blocking work (512) with everything else that needs one,
/// such as saving the routes; with a dead resolver, a few hundred endpoints would take them all.
pub(crate) const LOOKUPS_IN_ALL: usize = 64;

/// Most addresses of an upstream that are considered.
const ADDRESSES: usize = 16;

/// Why an upstream was not reached. The endpoint is named by whoever reports it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("the name does not resolve")]
    Resolve(#[source] io::Error),
    #[error("the name has no address")]
    NoAddress,
    #[error("resolving the name took longer than the limit")]
    ResolveTimeout,
    #[error(
        "{address} is {refusal}, which an enclave must not reach: if it should, list it in the endpoint's allow_addresses"
    )]
    Refused { address: IpAddr, refusal: Refusal },
    #[error("no address can be judged")]
    OwnAddresses(#[from] Unknown),
    #[error("could not connect to {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("connecting took longer than the limit")]
    ConnectTimeout,
}

impl DialError {
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Resolve(_) | Self::NoAddress | Self::ResolveTimeout => Failure::Dns,
            Self::Refused { .. } | Self::OwnAddresses(_) => Failure::AddressRefused,
            Self::Connect { .. } => Failure::Connect,
            Self::ConnectTimeout => Failure::ConnectTimeout,
        }
    }
}

/// Connects to a route's upstream. Cancel-safe: what was begun is dropped.
pub(crate) async fn dial(
    route: &EgressRoute,
    lookups: &Arc<Semaphore>,
    shared: &Shared,
) -> Result<TcpStream, DialError> {
    let deadline = Instant::now() + shared.limits.dial;
    let dial = async {
        let addresses = resolve(route, lookups, shared).await?;
        let addresses = permitted(&addresses, route, &shared.own_addresses.get()?)?;
        let stream = first_to_answer(&addresses, deadline, &shared.limits, TcpStream::connect).await?;
        tcp::prepare(&stream);
        Ok(stream)
    };
    timeout_at(deadline, dial).await.unwrap_or(Err(DialError::ConnectTimeout))
}

async fn resolve(route: &EgressRoute, lookups: &Arc<Semaphore>, shared: &Shared) -> Result<Vec<SocketAddr>, DialError> {
    if let Ok(address) = route.hostname.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, route.port)]);
    }
    let (host, port) = (route.hostname.clone(), route.port);
    let lookup = async {
        // The endpoint's first: one with a dead resolver waits for itself, and holds up no more than its share of the others.
        let own = lookups.clone().acquire_owned().await.map_err(|_| DialError::ResolveTimeout)?;
        let permit = shared.lookups.clone().acquire_owned().await.map_err(|_| DialError::ResolveTimeout)?;
        // A task of its own: after a timeout, the permits stay with the lookup that still occupies a thread. It ends when
        // the resolver gives up.
        let task = tokio::spawn(async move {
            let _permits = (own, permit);
            let addresses = tokio::net::lookup_host((host, port)).await?;
            let mut addresses = alternating(addresses.collect());
            addresses.truncate(ADDRESSES);
            Ok(addresses)
        });
        task.await.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(DialError::Resolve)
    };
    let addresses = timeout(shared.limits.resolve, lookup).await.unwrap_or(Err(DialError::ResolveTimeout))?;
    if addresses.is_empty() { Err(DialError::NoAddress) } else { Ok(addresses) }
}

/// The addresses that the policy lets through, in their order; if none, why the first is not.
fn permitted(addresses: &[SocketAddr], route: &EgressRoute, own: &[IpAddr]) -> Result<Vec<SocketAddr>, DialError> {
    let mut first_refusal = None;
    let mut permitted = Vec::with_capacity(addresses.len());
    for address in addresses {
        match egress_policy::check(address.ip(), &route.allow_addresses, own) {
            Ok(()) => permitted.push(*address),
            Err(refusal) => {
                first_refusal.get_or_insert(DialError::Refused { address: address.ip(), refusal });
            }
        }
    }
    match first_refusal {
        Some(refusal) if permitted.is_empty() => Err(refusal),
        _ => Ok(permitted),
    }
}

/// Tries one address after another until one answers. Each gets its share of the time that is left, so that none is left
/// out because those before it are silent.
async fn first_to_answer<T, A: Future<Output = io::Result<T>>>(
    addresses: &[SocketAddr],
    deadline: Instant,
    limits: &Limits,
    attempt: impl Fn(SocketAddr) -> A,
) -> Result<T, DialError> {
    let mut last = DialError::NoAddress;
    for (tried, address) in addresses.iter().enumerate() {
        let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        let share = deadline.saturating_duration_since(Instant::now()) / left;
        match timeout(share.min(limits.connect), attempt(*address)).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(source)) => last = DialError::Connect { address: *address, source },
            Err(_) => last = DialError::ConnectTimeout,
        }
    }
    Err(last)
}

/// Alternates between the address families, and keeps the resolver's order otherwise: a family that leads nowhere is then
/// at most every other attempt.
fn alternating(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let count = addresses.len();
    let first_is_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_ipv6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    // A family that is used up leaves its turns to the other.
    (0..count).flat_map(|_| [first.next(), second.next()]).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::id::Cid;
    use std::time::Duration;
    use tokio::net::TcpListener;

    fn route(hostname: &str, port: u16, allow: &[&str]) -> EgressRoute {
        EgressRoute {
            enclave: "signer".parse().unwrap(),
            cid: Cid::FIRST,
            vsock_port: 8000,
            hostname: hostname.to_owned(),
            port,
            sni: false,
            limits: enclaved_core::routes::EgressLimits::default(),
            allow_addresses: allow.iter().map(|address| address.parse().unwrap()).collect(),
        }
    }

    async fn dial_with(route: &EgressRoute) -> Result<TcpStream, DialError> {
        dial(route, &Arc::new(Semaphore::new(LOOKUPS)), &Shared::new(Limits::default())).await
    }

    #[tokio::test]
    async fn a_name_that_leads_to_the_host_is_refused_unless_the_address_is_listed() {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = upstream.local_addr().unwrap().port();
        for hostname in ["localhost", "127.0.0.1", "::ffff:127.0.0.1"] {
            let error = dial_with(&route(hostname, port, &[])).await.unwrap_err();
            assert!(matches!(error, DialError::Refused { .. }), "{hostname}: {error:?}");
            assert_eq!(error.failure(), Failure::AddressRefused);
        }
        dial_with(&route("localhost", port, &["127.0.0.1"])).await.unwrap();
        dial_with(&route("127.0.0.1", port, &["127.0.0.1"])).await.unwrap();
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_is_passed_over() {
        let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dead_address = dead.local_addr().unwrap();
        drop(dead);
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let live_address = upstream.local_addr().unwrap();
        let connect = async |addresses: &[SocketAddr]| {
            let deadline = Instant::now() + Limits::default().dial;
            first_to_answer(addresses, deadline, &Limits::default(), TcpStream::connect).await
        };
        let stream = connect(&[dead_address, live_address]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), live_address);
        let error = connect(&[dead_address]).await.unwrap_err();
        assert_eq!(error.failure(), Failure::Connect);
    }

    #[tokio::test(start_paused = true)]
    async fn every_address_is_tried_within_the_time_for_all_and_none_for_longer_than_its_limit() {
        let limits = Limits::default();
        for silent in [0, 1, 2, 5, ADDRESSES - 1] {
            let addresses: Vec<SocketAddr> =
                (0..=silent).map(|number| ([10, 0, 0, u8::try_from(number).unwrap()], 443).into()).collect();
            let answers = *addresses.last().unwrap();
            let attempt = |address| async move {
                if address != answers {
                    std::future::pending::<()>().await;
                }
                Ok(address)
            };
            let start = Instant::now();
            let reached = first_to_answer(&addresses, start + limits.dial, &limits, attempt).await;
            assert_eq!(reached.unwrap(), answers);
            let (took, silent) = (start.elapsed(), u32::try_from(silent).unwrap());
            assert!(took < limits.dial && took <= limits.connect * silent, "{silent} before it: {took:?}");
        }
    }

    #[test]
    fn families_alternate_in_the_resolvers_order_beginning_with_its_first() {
        let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let resolved = addresses(&["[2600::1]:1", "[2600::2]:1", "[2600::3]:1", "10.0.0.1:1", "10.0.0.2:1"]);
        let expected = addresses(&["[2600::1]:1", "10.0.0.1:1", "[2600::2]:1", "10.0.0.2:1", "[2600::3]:1"]);
        assert_eq!(alternating(resolved), expected);
        let resolved = addresses(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "[2600::1]:1"]);
        let expected = addresses(&["10.0.0.1:1", "[2600::1]:1", "10.0.0.2:1", "10.0.0.3:1"]);
        assert_eq!(alternating(resolved), expected);
        assert_eq!(alternating(addresses(&["[::1]:1", "[::2]:1"])), addresses(&["[::1]:1", "[::2]:1"]));
        assert_eq!(alternating(Vec::new()), Vec::new());
    }

    #[tokio::test]
    async fn only_addresses_that_the_policy_lets_through_are_tried() {
        let addresses = ["169.254.169.254:80".parse().unwrap(), "10.0.0.9:80".parse().unwrap()];
        let route = route("x", 80, &[]);
        assert_eq!(permitted(&addresses, &route, &[]).unwrap(), addresses[1..]);
        let error = permitted(&addresses, &route, &["10.0.0.9".parse().unwrap()]).unwrap_err();
        assert!(matches!(error, DialError::Refused { refusal: Refusal::Metadata, .. }), "{error:?}");
    }

    #[test]
    fn lookups_without_an_end_leave_threads_for_other_work() {
        // A single thread for blocking work, which stands for a resolver that answers nobody.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let mut shared = Shared::new(Limits { resolve: Duration::from_millis(5), ..Limits::default() });
            let (release, released) = std::sync::mpsc::channel::<()>();
            let dead = tokio::task::spawn_blocking(move || released.recv());
            let route = route("localhost", 1, &[]);
            let mut endpoints = Vec::new();
            for _ in 0..LOOKUPS_IN_ALL + 1 {
                let endpoint = Arc::new(Semaphore::new(LOOKUPS));
                let error = dial(&route, &endpoint, &shared).await.unwrap_err();
                assert!(matches!(error, DialError::ResolveTimeout), "{error:?}");
                endpoints.push(endpoint);
            }
            let running = endpoints.iter().filter(|endpoint| endpoint.available_permits() < LOOKUPS).count();
            assert_eq!(running, LOOKUPS_IN_ALL, "these hold a thread, or wait for one");
            drop(release);
            dead.await.unwrap().unwrap_err();
            // They end, and new ones begin.
            let all = u32::try_from(LOOKUPS_IN_ALL).unwrap();
            let ended = timeout(Duration::from_secs(20), shared.lookups.acquire_many(all)).await;
            drop(ended.unwrap().unwrap());
            shared.limits = Limits::default();
            let error = dial(&route, &endpoints[0], &shared).await.unwrap_err();
            assert!(matches!(error, DialError::Refused { .. }), "{error:?}");
        });
    }

    #[tokio::test]
    async fn a_name_that_cannot_exist_fails_as_dns() {
        let error = dial_with(&route("does-not-exist.invalid", 443, &[])).await.unwrap_err();
        assert_eq!(error.failure(), Failure::Dns);
    }
}
