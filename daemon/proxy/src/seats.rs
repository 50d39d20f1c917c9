//! How many there are of what has a limit: connections of one offer to one enclave, of HTTPS, requests of one source or over one shared
//! connection. Reports count otherwise: for an enclave's name, over all its generations.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What one limit counts. A clone counts the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seats(Arc<AtomicU64>);

/// One of them, for as long as this exists.
#[derive(Debug)]
pub(crate) struct Seat(Arc<AtomicU64>);

impl Seats {
    /// How many are taken.
    pub(crate) fn taken(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// One more, unless there are so many already.
    pub(crate) fn take(&self, limit: u64) -> Option<Seat> {
        let more = |taken: u64| (taken < limit).then_some(taken + 1);
        self.0.fetch_update(Relaxed, Relaxed, more).ok().map(|_| Seat(self.0.clone()))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_is_free_again_when_its_connection_ended_and_seats_are_nobody_elses() {
        let (seats, others) = (Seats::default(), Seats::default());
        let (first, _second) = (seats.take(2).unwrap(), seats.clone().take(2).unwrap());
        assert!(seats.take(2).is_none());
        let _other = others.take(1).unwrap();
        assert_eq!((seats.taken(), others.taken()), (2, 1));
        drop(first);
        let _third = seats.take(2).unwrap();
        assert!(seats.take(2).is_none() && seats.take(0).is_none());
    }
}
