//! How many connections each source has: one IPv4 address, or one IPv6 network of 64 bits, which is what one customer of a
//! provider has at least. Only sources that have connections take memory.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Sources(Mutex<HashMap<IpAddr, u32>>);

/// A connection that counts for its source as long as this exists.
#[derive(Debug)]
pub(crate) struct Counted {
    sources: Arc<Sources>,
    source: IpAddr,
}

impl Sources {
    /// Counts a connection of this address; `None` if its source has as many already.
    pub(crate) fn count(self: &Arc<Self>, address: IpAddr, limit: Option<u32>) -> Option<Counted> {
        let source = source(address);
        let mut counts = self.lock();
        let count = counts.entry(source).or_default();
        if limit.is_some_and(|limit| *count >= limit) {
            return None;
        }
        *count += 1;
        Some(Counted { sources: self.clone(), source })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.sources.lock();
        if let Some(count) = counts.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
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
        drop((two, three, four));
        assert!(sources.lock().is_empty());
    }
}
