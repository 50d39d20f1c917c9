//! How an enclave is made to end: asked, asked by another way, killed. Which of these comes when; nothing is done here.

use enclaved_core::id::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long each way is given to work. nitro-cli ends an enclave within a second or two.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long until it is asked once more in the same way.
const REPEAT: Duration = Duration::from_secs(10);

/// How far the ending of an enclave is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StopFile {
    /// When it was first asked (SIGTERM to nitro-cli's process, which ends its enclave and itself).
    since: Timestamp,
    /// When it was last asked.
    asked: Timestamp,
    /// When nitro-cli was told to end it.
    terminate: Option<Timestamp>,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopStep {
    /// It was asked a moment ago.
    Wait,
    /// SIGTERM to its process.
    Ask,
    /// `nitro-cli terminate-enclave`.
    Terminate,
    /// SIGKILL to its process: the driver ends the enclave with it.
    Kill,
}

/// The next step, and what is to be noted before it is taken.
pub(crate) fn next(noted: Option<StopFile>, now: Timestamp) -> (StopStep, StopFile) {
    let Some(stop) = noted else {
        return (StopStep::Ask, StopFile { since: now, asked: now, terminate: None });
    };
    match stop.terminate {
        Some(at) if now.since(at) >= PATIENCE => (StopStep::Kill, stop),
        Some(_) => (StopStep::Wait, stop),
        None if now.since(stop.since) >= PATIENCE => (StopStep::Terminate, StopFile { terminate: Some(now), ..stop }),
        None if now.since(stop.asked) >= REPEAT => (StopStep::Ask, StopFile { asked: now, ..stop }),
        None => (StopStep::Wait, stop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_enclave_is_asked_then_terminated_then_killed_and_never_the_other_way_round() {
        let mut noted = None;
        let mut steps = Vec::new();
        for second in 0..=62 {
            let (step, next) = next(noted, Timestamp::from_millis(1_000_000 + second * 1000));
            noted = Some(next);
            if step != StopStep::Wait {
                steps.push((second, step));
            }
        }
        use StopStep::{Ask, Kill, Terminate};
        assert_eq!(steps, [(0, Ask), (10, Ask), (20, Ask), (30, Terminate), (60, Kill), (61, Kill), (62, Kill)]);
    }

    #[test]
    fn a_clock_that_goes_back_only_makes_it_wait() {
        let (_, noted) = next(None, Timestamp::from_millis(1_000_000));
        assert_eq!(next(Some(noted), Timestamp::from_millis(5)), (StopStep::Wait, noted));
    }
}
