//! Keeps log lines that a remote can provoke to one an interval, and counts the ones left out.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// The time between two lines of one throttle.
const INTERVAL: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Throttle {
    start: Instant,
    /// Milliseconds after `start` from which the next line may be written.
    next: AtomicU64,
    left_out: AtomicU64,
}

impl Throttle {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), next: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// `Some(n)`: write the line, and say that `n` like it were left out since the last.
    pub(crate) fn pass(&self) -> Option<u64> {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now = millis(self.start.elapsed());
        let next = self.next.load(Relaxed);
        let won = now >= next && self.next.compare_exchange(next, now + millis(INTERVAL), Relaxed, Relaxed).is_ok();
        if won {
            Some(self.left_out.swap(0, Relaxed))
        } else {
            self.left_out.fetch_add(1, Relaxed);
            None
        }
    }
}

/// Has a line written only when how something goes has changed, and one an interval at most.
#[derive(Debug)]
pub(crate) struct Changes<T> {
    /// What was told last.
    told: Mutex<T>,
    throttle: Throttle,
}

impl<T: Copy + PartialEq> Changes<T> {
    /// Begins with what needs no line.
    pub(crate) fn new(told: T) -> Self {
        Self { told: Mutex::new(told), throttle: Throttle::new() }
    }

    /// `Some(n)`: write a line that it is so now, and say that `n` were left out since the last. What could not be told is told
    /// later, if it is still so.
    pub(crate) fn now(&self, so: T) -> Option<u64> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told == so {
            return None;
        }
        let left_out = self.throttle.pass()?;
        *told = so;
        Some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_stays_as_it_is_has_one_line_and_what_changes_often_one_an_interval() {
        let changes = Changes::new("well");
        assert_eq!(changes.now("well"), None);
        assert_eq!(changes.now("ill"), Some(0));
        for _ in 0..100 {
            tokio::time::advance(INTERVAL).await;
            assert_eq!(changes.now("ill"), None);
        }
        assert_eq!(changes.now("well"), Some(0));
        assert_eq!((changes.now("ill"), changes.now("well"), changes.now("ill")), (None, None, None));
        tokio::time::advance(INTERVAL).await;
        assert_eq!(changes.now("ill"), Some(2), "what could not be told in time is told later");
        assert_eq!(changes.now("ill"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn one_line_an_interval_passes_and_the_rest_are_counted() {
        let throttle = Throttle::new();
        assert_eq!(throttle.pass(), Some(0));
        assert_eq!((throttle.pass(), throttle.pass()), (None, None));
        tokio::time::advance(INTERVAL).await;
        assert_eq!(throttle.pass(), Some(2));
        assert_eq!(throttle.pass(), None);
    }
}
