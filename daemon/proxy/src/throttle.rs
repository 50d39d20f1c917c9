//! Keeps log lines that a remote can provoke to one an interval, and counts the ones left out.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
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

#[cfg(test)]
mod tests {
    use super::*;

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
