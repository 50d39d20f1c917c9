//! How many connections each source has, and how many requests in flight over all of them: one IPv4 address, or one IPv6 network of
//! 64 bits, which is what one customer of a provider has at least. Only sources that have connections take memory.

use crate::seats::{Seat, Seats};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Sources(Mutex<HashMap<IpAddr, Source>>);

#[derive(Debug, Default)]
struct Source {
    connections: u32,
    requests: Seats,
}

/// A connection that counts for its source as long as this exists.
#[derive(Debug)]
pub(crate) struct Counted {
    sources: Arc<Sources>,
    source: IpAddr,
    requests: Seats,
}

impl Sources {
    /// Counts a connection of this address; `None` if its source has as many already.
    pub(crate) fn count(self: &Arc<Self>, address: IpAddr, limit: Option<u32>) -> Option<Counted> {
        let source = source(address);
        let mut counts = self.lock();
        let count = counts.entry(source).or_default();
        if limit.is_some_and(|limit| count.connections >= limit) {
            return None;
        }
        count.connections += 1;
        let requests = count.requests.clone();
        Some(Counted { sources: self.clone(), source, requests })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Source>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    /// Counts a request of this connection; `None` if its source has as many in flight already.
    pub(crate) fn request(&self, limit: Option<u32>) -> Option<Seat> {
        self.requests.take(limit.map_or(u64::MAX, u64::from))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.sources.lock();
        if let Some(count) = counts.get_mut(&self.source) {
            count.connections -= 1;
            if count.connections == 0 {
                counts.remove(&self.source);
            }
        }
    }
}

fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) & (u128::MAX << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_has_its_own_limit_and_leaves_nothing_behind() {
        let sources = Arc::new(Sources::default());
        let count = |address: &str| sources.count(address.parse().unwrap(), Some(2));
        let (one, two) = (count("192.0.2.1"), count("::ffff:192.0.2.1"));
        assert!(one.is_some() && two.is_some() && count("192.0.2.1").is_none());
        assert!(count("192.0.2.2").is_some());
        drop(one);
        assert!(count("192.0.2.1").is_some());
        let (three, four) = (count("2001:db8::1"), count("2001:db8::ffff:2"));
        assert!(
            three.is_some() && four.is_some() && count("2001:db8::3").is_none() && count("2001:db8:0:1::3").is_some()
        );
        let other = count("192.0.2.1").unwrap();
        let (first, second) = (two.as_ref().unwrap().request(Some(2)), other.request(Some(2)));
        assert!(first.is_some() && second.is_some() && two.as_ref().unwrap().request(Some(2)).is_none());
        assert!(three.as_ref().unwrap().request(Some(2)).is_some() && other.request(None).is_some());
        drop(first);
        assert!(other.request(Some(2)).is_some());
        drop((two, three, four, other));
        assert!(sources.lock().is_empty());
    }
}
