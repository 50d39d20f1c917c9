//! How fast an endpoint takes new connections: each has its turn, and who would wait too long for it is sent away.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// How long a connection may wait for its turn.
pub(crate) const WAIT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Rate {
    interval: Duration,
    next: Mutex<Instant>,
}

impl Rate {
    /// So many a second.
    pub(crate) fn new(per_second: u32) -> Self {
        Self { interval: Duration::from_secs(1) / per_second.max(1), next: Mutex::new(Instant::now()) }
    }

    /// When it is this connection's turn; `None` if that is too far away.
    pub(crate) fn turn(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = (*next).max(now);
        if turn - now > WAIT {
            return None;
        }
        *next = turn + self.interval;
        Some(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn turns_are_evenly_spaced_and_a_second_of_them_at_most_is_given_ahead() {
        let (rate, start) = (Rate::new(4), Instant::now());
        let turns: Vec<_> = std::iter::from_fn(|| rate.turn()).map(|turn| (turn - start).as_millis()).collect();
        assert_eq!(turns, [0, 250, 500, 750, 1000]);
        advance(Duration::from_millis(250)).await;
        assert_eq!(rate.turn().map(|turn| (turn - start).as_millis()), Some(1250));
        assert_eq!(rate.turn(), None);
        advance(Duration::from_secs(60)).await;
        assert_eq!(rate.turn(), Some(Instant::now()), "a pause is no debt");
    }
}
