//! The addresses of this host, as the kernel lists them under /proc: those of its interfaces, and whole ranges that it takes
//! for its own (`ip route add local 10.9.0.0/16 dev lo`, as load balancers and Kubernetes have it). The egress policy
//! refuses them.

use enclaved_core::egress_policy::OwnRange;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// IPv4: the routing tables as trees. Not /proc/net, which a hardened unit may not have; this is the same.
const FIB_TRIE: &str = "/proc/self/net/fib_trie";
/// IPv6: one line for each route. Missing where IPv6 is off.
const IPV6_ROUTE: &str = "/proc/self/net/ipv6_route";

/// Flags of an IPv6 route: RTF_LOCAL and RTF_ANYCAST of linux/ipv6_route.h.
const LOCAL: u32 = 0x8000_0000;
const ANYCAST: u32 = 0x0010_0000;

/// How old an answer may be. An interface that comes up is known after this.
const FRESH: Duration = Duration::from_secs(2);

/// Why the host's own addresses are not known.
#[derive(Debug, thiserror::Error)]
#[error("could not read this host's addresses from {file}")]
pub(crate) struct Unknown {
    file: &'static str,
    #[source]
    source: io::Error,
}

#[derive(Debug, Default)]
pub(crate) struct HostAddresses {
    last: Mutex<Option<(Instant, Arc<[OwnRange]>)>>,
}

impl HostAddresses {
    /// The addresses now, or a moment ago. Reads two small files of the kernel's, which does not block.
    pub(crate) fn get(&self) -> Result<Arc<[OwnRange]>, Unknown> {
        self.get_with(read)
    }

    fn get_with(&self, read: impl Fn() -> Result<Vec<OwnRange>, Unknown>) -> Result<Arc<[OwnRange]>, Unknown> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((when, addresses)) if when.elapsed() < FRESH => Ok(addresses.clone()),
            _ => {
                let addresses: Arc<[OwnRange]> = read()?.into();
                *last = Some((Instant::now(), addresses.clone()));
                Ok(addresses)
            }
        }
    }
}

pub(crate) fn read() -> Result<Vec<OwnRange>, Unknown> {
    let mut ranges: Vec<OwnRange> = match std::fs::read_to_string(FIB_TRIE) {
        Ok(text) => parse_fib_trie(&text).collect(),
        Err(source) => return Err(Unknown { file: FIB_TRIE, source }),
    };
    match std::fs::read_to_string(IPV6_ROUTE) {
        Ok(text) => ranges.extend(parse_ipv6_route(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(Unknown { file: IPV6_ROUTE, source }),
    }
    ranges.sort_unstable();
    ranges.dedup();
    Ok(ranges)
}

/// A range is a leaf (`|-- 10.0.0.5`) followed by its lengths and kinds (`/32 host LOCAL`, several lines if several).
fn parse_fib_trie(text: &str) -> impl Iterator<Item = OwnRange> {
    let mut leaf = None;
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse::<Ipv4Addr>().ok();
            return None;
        }
        let mut words = line.strip_prefix('/')?.split_ascii_whitespace();
        let length = words.next()?.parse().ok()?;
        // The last word, after the scope: a type of service may stand behind it.
        if words.any(|word| word == "LOCAL") { Some(OwnRange::new(IpAddr::V4(leaf?), length)) } else { None }
    })
}

/// `<destination> <length> <source> <length> <gateway> <metric> <references> <uses> <flags> <device>`, numbers hexadecimal.
fn parse_ipv6_route(text: &str) -> impl Iterator<Item = OwnRange> {
    text.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [destination, length, _, _, _, _, _, _, flags, _] = words.as_slice() else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let address = Ipv6Addr::from_bits(u128::from_str_radix(destination, 16).ok()?);
        let length = u8::from_str_radix(length, 16).ok()?;
        (flags & (LOCAL | ANYCAST) != 0).then(|| OwnRange::new(address.into(), length))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn range(address: &str, length: u8) -> OwnRange {
        OwnRange::new(address.parse().unwrap(), length)
    }

    #[test]
    fn the_kernels_lists_are_understood() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 10.0.0.0/24 2 0 2\n        |-- 10.0.0.0\n           /24 link UNICAST\n        |-- 10.0.0.5\n           /32 host LOCAL\n        |-- 10.0.0.255\n           /32 link BROADCAST\n     +-- 127.0.0.0/8 2 0 2\n        |-- 127.0.0.0\n           /8 host LOCAL\n        |-- 10.9.0.0\n           /16 host LOCAL\n           /24 link UNICAST\n           /32 host LOCAL tos=4\n";
        let found: Vec<_> = parse_fib_trie(trie).collect();
        let expected = [range("10.0.0.5", 32), range("127.0.0.0", 8), range("10.9.0.0", 16), range("10.9.0.0", 32)];
        assert_eq!(found, expected);
        let routes = "00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000004 00000000 80200001       lo\n20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000400 00000001 00000000 00000001     eth0\n20010db8000100000000000000000000 30 00000000000000000000000000000000 00 00000000000000000000000000000000 00000400 00000001 00000000 80200001       lo\nfe800000000000000000000000000000 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000003 00000000 80300001     eth0\nnonsense\n\n";
        let found: Vec<_> = parse_ipv6_route(routes).collect();
        assert_eq!(found, [range("::1", 128), range("2001:db8:1::", 48), range("fe80::", 128)]);
    }

    #[tokio::test]
    async fn this_machine_has_a_loopback_address() {
        let addresses = HostAddresses::default().get().unwrap();
        assert!(addresses.iter().any(|range| range.contains(Ipv4Addr::LOCALHOST.into())), "{addresses:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_comes_while_the_proxy_runs_is_known_two_seconds_later() {
        let (addresses, now) = (HostAddresses::default(), Cell::new("10.0.0.5"));
        let get = || addresses.get_with(|| Ok(vec![range(now.get(), 32)])).unwrap()[0];
        assert_eq!(get(), range("10.0.0.5", 32));
        now.set("10.0.0.6");
        assert_eq!(get(), range("10.0.0.5", 32));
        tokio::time::advance(FRESH).await;
        assert_eq!(get(), range("10.0.0.6", 32));
    }
}
