//! How long to wait before something is tried again: always a function of the ledger (or of the jobs' failures) and of
//! the time, so that it means the same after a restart.

use crate::id::Timestamp;
use std::time::Duration;

/// Pauses that double from `first` up to `most`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    most: Duration,
}

/// Launches. Not below one second: a launch right after an exit can fail with E29 (aws-nitro-enclaves-cli #433).
pub const LAUNCH: Backoff = Backoff { first: Duration::from_secs(1), most: Duration::from_secs(300) };
/// Images: a role can be minutes young, an object can appear; a host of a fleet must not hammer S3.
pub const IMAGE: Backoff = Backoff { first: Duration::from_secs(2), most: Duration::from_secs(300) };
/// Cheap local steps (the proxy, the supervisor).
pub const STEP: Backoff = Backoff { first: Duration::from_millis(200), most: Duration::from_secs(15) };
/// Asking nitro-cli again what runs: each question loads every enclave's process.
pub const DESCRIBE: Backoff = Backoff { first: Duration::from_secs(60), most: Duration::from_secs(3600) };
/// Asking the allocator again.
pub const RESERVE: Backoff = Backoff { first: Duration::from_secs(5), most: Duration::from_secs(300) };

/// A step that succeeded and is still asked for (an enclave that takes its time to end, memory that others hold) is not
/// taken again before this.
pub const AGAIN: Duration = Duration::from_secs(1);

impl Backoff {
    /// Pauses that double from `first` up to `most`.
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self { first, most }
    }

    /// The pause after that many failures in a row; none after none.
    pub fn after(self, failures: u32) -> Duration {
        match failures {
            0 => Duration::ZERO,
            n => self.first.saturating_mul(1 << (n - 1).min(20)).min(self.most),
        }
    }
}

/// A time that lies this far ahead was written before the clock was set back.
const SET_BACK: Duration = Duration::from_secs(60);

/// When the pause that began at `since` ends; `None` if it is over. A pause that began in the future is over too: the
/// host's clock was set back, and nothing shall stay down until it has caught up.
pub fn pause_end(since: Timestamp, pause: Duration, now: Timestamp) -> Option<Timestamp> {
    let end = since.plus(pause);
    (now < end && since <= now.plus(SET_BACK)).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_in_time_and_does_not_outlast_a_clock_that_was_set_back() {
        let at = |seconds: u64| Timestamp::from_millis(1_800_000_000_000 + seconds * 1000);
        let pause = Duration::from_secs(10);
        assert_eq!(pause_end(at(0), pause, at(9)), Some(at(10)));
        assert_eq!(pause_end(at(0), pause, at(10)), None);
        assert_eq!(pause_end(at(5), pause, at(4)), Some(at(15)), "a clock that was slewed");
        assert_eq!(pause_end(at(3600), pause, at(0)), None, "a clock that was set back by an hour");
    }

    #[test]
    fn pauses_double_from_the_first_to_the_most_and_stay_there() {
        let seconds = |n| LAUNCH.after(n).as_secs();
        assert_eq!([0, 1, 2, 3, 9, 10, 1000, u32::MAX].map(seconds), [0, 1, 2, 4, 256, 300, 300, 300]);
    }
}
