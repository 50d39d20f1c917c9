//! The addresses of this host's interfaces, as the kernel lists them under /proc. The egress policy refuses them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// IPv4: the routing table as a tree. Not /proc/net, which a hardened unit may not have; this is the same.
const FIB_TRIE: &str = "/proc/self/net/fib_trie";
/// IPv6: one line for each address. Missing where IPv6 is off.
const IF_INET6: &str = "/proc/self/net/if_inet6";

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
    last: Mutex<Option<(Instant, Arc<[IpAddr]>)>>,
}

impl HostAddresses {
    /// The addresses now, or a moment ago. Reads two small files of the kernel's, which does not block.
    pub(crate) fn get(&self) -> Result<Arc<[IpAddr]>, Unknown> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((when, addresses)) if when.elapsed() < FRESH => Ok(addresses.clone()),
            _ => {
                let addresses: Arc<[IpAddr]> = read()?.into();
                *last = Some((Instant::now(), addresses.clone()));
                Ok(addresses)
            }
        }
    }
}

pub(crate) fn read() -> Result<Vec<IpAddr>, Unknown> {
    let mut addresses: Vec<IpAddr> = match std::fs::read_to_string(FIB_TRIE) {
        Ok(text) => parse_fib_trie(&text).map(IpAddr::from).collect(),
        Err(source) => return Err(Unknown { file: FIB_TRIE, source }),
    };
    addresses.sort_unstable();
    addresses.dedup();
    match std::fs::read_to_string(IF_INET6) {
        Ok(text) => addresses.extend(parse_if_inet6(&text).map(IpAddr::from)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(Unknown { file: IF_INET6, source }),
    }
    Ok(addresses)
}

/// An address is a leaf (`|-- 10.0.0.5`) followed by its kind (`/32 host LOCAL`).
fn parse_fib_trie(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut leaf = None;
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
            None
        } else if line == "/32 host LOCAL" {
            leaf
        } else {
            None
        }
    })
}

/// An address is the first word: 32 hexadecimal digits.
fn parse_if_inet6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    let address = |line: &str| u128::from_str_radix(line.split_ascii_whitespace().next()?, 16).ok();
    text.lines().filter_map(move |line| address(line).map(Ipv6Addr::from_bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_are_understood() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 10.0.0.0/24 2 0 2\n        |-- 10.0.0.0\n           /24 link UNICAST\n        |-- 10.0.0.5\n           /32 host LOCAL\n        |-- 10.0.0.255\n           /32 link BROADCAST\n     +-- 127.0.0.0/8 2 0 2\n        |-- 127.0.0.0\n           /8 host LOCAL\n        |-- 127.0.0.1\n           /32 host LOCAL\n";
        let found: Vec<_> = parse_fib_trie(trie).collect();
        assert_eq!(found, [Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::LOCALHOST]);
        let inet6 = "00000000000000000000000000000001 01 80 10 80       lo\nfe8000000000000000163efffe000001 02 40 20 80     eth0\nnonsense\n\n";
        let found: Vec<_> = parse_if_inet6(inet6).collect();
        assert_eq!(found, [Ipv6Addr::LOCALHOST, "fe80::16:3eff:fe00:1".parse::<Ipv6Addr>().unwrap()]);
    }

    #[tokio::test]
    async fn this_machine_has_a_loopback_address() {
        let addresses = HostAddresses::default().get().unwrap();
        assert!(addresses.contains(&Ipv4Addr::LOCALHOST.into()), "{addresses:?}");
    }
}
