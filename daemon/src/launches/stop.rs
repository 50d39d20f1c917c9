//! How an enclave is made to end: asked, asked by another way, killed. Which of these comes when; nothing is done here.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long each way is given to work. nitro-cli ends an enclave within a second or two.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long until it is asked once more in the same way.
const REPEAT: Duration = Duration::from_secs(10);

/// How far the ending of an enclave is. All times are since the boot, in ms: the clock may be set meanwhile, and no such file means
/// anything in another boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StopFile {
    /// When it was first asked (SIGTERM to nitro-cli's process, which ends its enclave and itself).
    since_ms: u64,
    /// When it was last asked.
    asked_ms: u64,
    /// When nitro-cli was told to end it.
    terminate_ms: Option<u64>,
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

/// The next step, and what is to be noted before it is taken. `now` is the time since the boot.
pub(crate) fn next(noted: Option<StopFile>, now: Duration) -> (StopStep, StopFile) {
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let over =
        |since_ms: u64, pause: Duration| now_ms.saturating_sub(since_ms) >= pause.as_millis().try_into().unwrap_or(0);
    // What was noted later than now was noted in another boot.
    let Some(stop) = noted.filter(|stop| stop.asked_ms.max(stop.terminate_ms.unwrap_or(0)) <= now_ms) else {
        return (StopStep::Ask, StopFile { since_ms: now_ms, asked_ms: now_ms, terminate_ms: None });
    };
    match stop.terminate_ms {
        Some(at) if over(at, PATIENCE) => (StopStep::Kill, stop),
        Some(_) => (StopStep::Wait, stop),
        None if over(stop.since_ms, PATIENCE) => (StopStep::Terminate, StopFile { terminate_ms: Some(now_ms), ..stop }),
        None if over(stop.asked_ms, REPEAT) => (StopStep::Ask, StopFile { asked_ms: now_ms, ..stop }),
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
            let (step, next) = next(noted, Duration::from_secs(1000 + second));
            noted = Some(next);
            if step != StopStep::Wait {
                steps.push((second, step));
            }
        }
        use StopStep::{Ask, Kill, Terminate};
        assert_eq!(steps, [(0, Ask), (10, Ask), (20, Ask), (30, Terminate), (60, Kill), (61, Kill), (62, Kill)]);
    }

    #[test]
    fn what_was_noted_in_another_boot_only_makes_it_begin_anew() {
        let (_, noted) = next(None, Duration::from_secs(1000));
        assert_eq!(next(Some(noted), Duration::from_secs(5)), next(None, Duration::from_secs(5)));
    }
}
