//! Reaching an upstream: takes its addresses, has each judged by the egress policy, and connects to the first that answers, as
//! RFC 8305 has it: families alternate, an address that is slow does not hold up the next. Names are `resolver`'s; what is
//! sent is nobody's business here.
//!
//! Connections begin at one address after another, so that an upstream with several shares its load. An address that failed,
//! or was slower than another, is tried last for [`AVOIDED`]; and the family that last answered is tried first, so that a host
//! without IPv6 tries it no more often than it must.

use crate::counters::{Failure, Latency};
use crate::host_addresses::{HostAddresses, Unknown};
use crate::limits::Limits;
use crate::resolver::{Name, NameError, Resolver};
use crate::tcp::{self, Stalled};
use enclaved_core::egress_policy::{self, OwnRange, Refusal};
use enclaved_core::routes::EgressRoute;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Most addresses that are tried for one connection.
const ADDRESSES: usize = 16;

/// For how long an address that failed is tried after the others.
const AVOIDED: Duration = Duration::from_secs(30);

/// Why an upstream was not reached. The endpoint is named by whoever reports it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(
        "{address} is {refusal}, which an enclave must not reach: if it should, list it in the endpoint's allow_addresses"
    )]
    Refused { address: IpAddr, refusal: Refusal },
    #[error("no address can be judged")]
    OwnAddresses(#[from] Unknown),
    #[error("could not connect to {address}, the last of {tried} tried")]
    Connect {
        address: SocketAddr,
        tried: usize,
        #[source]
        source: io::Error,
    },
    #[error("connecting took longer than the limit")]
    ConnectTimeout,
}

impl DialError {
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Name(_) => Failure::Dns,
            Self::Refused { .. } | Self::OwnAddresses(_) => Failure::AddressRefused,
            Self::Connect { .. } => Failure::Connect,
            Self::ConnectTimeout => Failure::ConnectTimeout,
        }
    }
}

/// Where an endpoint leads, and what was learned of its addresses.
#[derive(Debug)]
pub(crate) struct Upstream {
    at: At,
    port: u16,
    allowed: Vec<IpAddr>,
    /// Which address the next connection begins with.
    turn: AtomicUsize,
    /// The family that answered last is IPv4.
    prefer_v4: AtomicBool,
    /// Addresses that failed, and when.
    avoided: Mutex<Vec<(IpAddr, Instant)>>,
}

#[derive(Debug)]
enum At {
    Address(IpAddr),
    Name(Arc<Name>),
}

impl Upstream {
    /// Begins to resolve its name. Needs a runtime.
    pub(crate) fn new(route: &EgressRoute, resolver: &Resolver) -> Self {
        let EgressRoute { hostname, port, allow_addresses, .. } = route;
        let at = hostname.parse().map_or_else(|_| At::Name(resolver.name(hostname)), At::Address);
        let (turn, prefer_v4, avoided) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::default());
        Self { at, port: *port, allowed: allow_addresses.clone(), turn, prefer_v4, avoided }
    }

    /// Connects. How long that took, once the name was known, is recorded. Cancel-safe: what was begun is dropped.
    pub(crate) async fn dial(
        &self,
        connects: &Latency,
        limits: &Limits,
        own: &HostAddresses,
    ) -> Result<TcpStream, DialError> {
        let deadline = Instant::now() + limits.dial;
        let own = own.get()?;
        let addresses = match &self.at {
            At::Address(address) => permitted(&[*address], &self.allowed, &own)?,
            At::Name(name) => permitted(&name.addresses(limits.resolve).await?, &self.allowed, &own)?,
        };
        let addresses: Vec<_> = self.in_order(addresses).into_iter().map(|ip| SocketAddr::new(ip, self.port)).collect();
        let (began, mut slower) = (Instant::now(), Vec::new());
        let connecting = race(&addresses, limits, TcpStream::connect, &mut slower);
        let connected = timeout_at(deadline, connecting).await.unwrap_or(Err(DialError::ConnectTimeout));
        connects.record(began.elapsed());
        if addresses.len() > 1 {
            self.avoid(&slower);
        }
        let (stream, address) = connected?;
        self.prefer_v4.store(address.is_ipv4(), Relaxed);
        tcp::prepare(&stream, limits.peer_silence, Stalled::Gone);
        Ok(stream)
    }

    /// The order in which to try them.
    fn in_order(&self, addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        if addresses.len() < 2 {
            return addresses;
        }
        let turn = self.turn.fetch_add(1, Relaxed);
        let prefer_v4 = self.prefer_v4.load(Relaxed);
        let (mut first, mut second): (Vec<_>, Vec<_>) =
            addresses.into_iter().partition(|address| address.is_ipv4() == prefer_v4);
        for family in [&mut first, &mut second] {
            let turns = turn.checked_rem(family.len()).unwrap_or(0);
            family.rotate_left(turns);
        }
        let mut addresses = alternating(first, second);
        let mut avoided = self.avoided.lock().unwrap_or_else(PoisonError::into_inner);
        if !avoided.is_empty() {
            avoided.retain(|(_, since)| since.elapsed() < AVOIDED);
            // Stable: the rest of the order stays.
            addresses.sort_by_key(|address| avoided.iter().any(|(avoided, _)| avoided == address));
        }
        addresses.truncate(ADDRESSES);
        addresses
    }

    fn avoid(&self, slower: &[SocketAddr]) {
        if slower.is_empty() {
            return;
        }
        let (mut avoided, now) = (self.avoided.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        avoided.retain(|(address, since)| {
            since.elapsed() < AVOIDED && !slower.iter().any(|slower| slower.ip() == *address)
        });
        avoided.extend(slower.iter().map(|address| (address.ip(), now)));
        let surplus = avoided.len().saturating_sub(4 * ADDRESSES);
        avoided.drain(..surplus);
    }
}

/// The addresses that the policy lets through, in their order; if none, why the first is not.
fn permitted(addresses: &[IpAddr], allowed: &[IpAddr], own: &[OwnRange]) -> Result<Vec<IpAddr>, DialError> {
    let mut first_refusal = None;
    let mut permitted = Vec::with_capacity(addresses.len());
    for address in addresses {
        match egress_policy::check(*address, allowed, own) {
            Ok(()) => permitted.push(*address),
            Err(refusal) => {
                first_refusal.get_or_insert(DialError::Refused { address: *address, refusal });
            }
        }
    }
    match first_refusal {
        Some(refusal) if permitted.is_empty() => Err(refusal),
        _ => Ok(permitted),
    }
}

/// Tries one address after another, each a while after the one before it or at once when that one failed; the first to
/// answer wins, and the others are dropped. Those that failed or were overtaken are added to `slower`.
async fn race<T, A: Future<Output = io::Result<T>>>(
    addresses: &[SocketAddr],
    limits: &Limits,
    attempt: impl Fn(SocketAddr) -> A,
    slower: &mut Vec<SocketAddr>,
) -> Result<(T, SocketAddr), DialError> {
    let mut waiting = addresses.iter().copied();
    let mut running = Vec::new();
    let mut next = pin!(sleep(limits.next_attempt));
    let (mut begin, mut last) = (true, DialError::ConnectTimeout);
    poll_fn(|cx| {
        loop {
            if std::mem::take(&mut begin)
                && let Some(address) = waiting.next()
            {
                running.push((address, Box::pin(timeout(limits.connect, attempt(address)))));
                next.as_mut().reset(Instant::now() + limits.next_attempt);
            }
            let mut at = 0;
            while let Some((address, attempt)) = running.get_mut(at) {
                let address = *address;
                match attempt.as_mut().poll(cx) {
                    Poll::Pending => at += 1,
                    Poll::Ready(Ok(Ok(connected))) => {
                        drop(running.swap_remove(at));
                        // One that was begun later has had less time.
                        let before =
                            |other: &&(SocketAddr, _)| position(addresses, other.0) < position(addresses, address);
                        slower.extend(running.iter().filter(before).map(|(address, _)| *address));
                        return Poll::Ready(Ok((connected, address)));
                    }
                    Poll::Ready(failed) => {
                        last = match failed {
                            Ok(Err(source)) => DialError::Connect { address, tried: slower.len() + 1, source },
                            _ => DialError::ConnectTimeout,
                        };
                        slower.push(address);
                        drop(running.swap_remove(at));
                        begin = true;
                    }
                }
            }
            if waiting.len() == 0 {
                if running.is_empty() {
                    return Poll::Ready(Err(std::mem::replace(&mut last, DialError::ConnectTimeout)));
                }
                return Poll::Pending;
            }
            if !begin && next.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            begin = true;
        }
    })
    .await
}

fn position(addresses: &[SocketAddr], of: SocketAddr) -> usize {
    addresses.iter().position(|address| *address == of).unwrap_or(addresses.len())
}

/// One of each by turns; what one has more than the other comes at the end.
fn alternating(first: Vec<IpAddr>, second: Vec<IpAddr>) -> Vec<IpAddr> {
    let count = first.len().max(second.len());
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    (0..count).flat_map(|_| [first.next(), second.next()]).flatten().collect()
}

#[cfg(test)]
mod tests;
