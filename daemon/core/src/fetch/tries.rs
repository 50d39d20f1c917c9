//! What the failure of a request means, and how often and after which pauses it is made again.

use std::time::Duration;

/// A part is asked for so often without getting on before the download is given up.
pub const MAX_TRIES: u32 = 8;
/// What the source has is asked so often before that is given up: nothing is lost then, and the reason is to be seen soon.
pub const MAX_LOOKS: u32 = 3;
/// A download is begun anew so often because the object had changed.
pub const MAX_ANEW: u32 = 3;
/// A download of which no byte has come for this long is given up: a request that fails then is the last.
pub const STALL: Duration = Duration::from_secs(90);
/// So often are credentials asked for anew within one part, without it getting on.
const MAX_RENEWALS: u32 = 3;
/// So often is a part asked for again because it lags.
const MAX_LAGS: u32 = 2;
/// A try that brought at least so many bytes got on: it may be tried as often again.
const GOT_ON: u64 = 64 * 1024;
/// Pause after the first failure; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause, before jitter.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// A request is given so much time before its pace is judged.
const SETTLED: Duration = Duration::from_secs(10);
/// A request lags that is so many times slower than the median of the others.
const LAG: u64 = 8;

/// Why a request brought nothing, or not all that it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The source answered with this status, and this code where it gives one (`SlowDown`).
    Refused {
        /// HTTP's.
        status: u16,
        /// S3's.
        code: Option<String>,
    },
    /// The source has another object there by now.
    Changed,
    /// No answer, or no further byte of one, in the time it was given.
    Silent,
    /// Far slower than the others.
    Lagging,
    /// The connection broke off, or could not be made.
    Broken,
    /// The answer makes no sense.
    Malformed,
    /// The disk has no space for it.
    Full,
    /// It has nothing to do with the source: the disk, say.
    Local,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The rest of the part is asked for again after this pause.
    Again(Duration),
    /// As [`Self::Again`], with credentials that are asked for anew.
    Renewed(Duration),
    /// What has been got is of another object: begin anew.
    Anew,
    /// It is given up.
    Final,
}

/// The tries of one part so far, as far as they did not get on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tries {
    most: u32,
    failed: u32,
    renewed: u32,
    lagged: u32,
}

impl Default for Tries {
    /// None yet, of [`MAX_TRIES`].
    fn default() -> Self {
        Self::of(MAX_TRIES)
    }
}

impl Tries {
    /// None yet, of so many.
    pub fn of(most: u32) -> Self {
        Self { most, failed: 0, renewed: 0, lagged: 0 }
    }

    /// How many there may be in a row.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// How many tries in a row have failed without getting on.
    pub fn failed(&self) -> u32 {
        self.failed
    }

    /// What follows from a try that failed. `got` is how many bytes it brought before, `idle` how long ago the last byte of the
    /// whole download came, `random` any number: it spreads the pauses.
    pub fn judge(&mut self, cause: &Cause, got: u64, idle: Duration, random: u16) -> Verdict {
        if got >= GOT_ON {
            // Lagging is bounded on its own: a part that always lags after a while is to be let alone.
            *self = Self { lagged: self.lagged, ..Self::of(self.most) };
        }
        self.failed += 1;
        let again = |tries: &Self| match tries.failed < tries.most && idle < STALL {
            true => Verdict::Again(pause(tries.failed, random)),
            false => Verdict::Final,
        };
        match cause {
            Cause::Changed => Verdict::Anew,
            Cause::Full | Cause::Local => Verdict::Final,
            Cause::Refused { status, code } => match (*status, code.as_deref()) {
                (412 | 416, _) => Verdict::Anew,
                (_, Some("ExpiredToken" | "TokenRefreshRequired" | "RequestExpired")) => {
                    self.renewed += 1;
                    match (self.renewed <= MAX_RENEWALS, again(self)) {
                        (true, Verdict::Again(pause)) => Verdict::Renewed(pause),
                        _ => Verdict::Final,
                    }
                }
                (408 | 429 | 500..=599, _) | (_, Some("RequestTimeout" | "SlowDown")) => again(self),
                _ => Verdict::Final,
            },
            Cause::Lagging => {
                self.lagged += 1;
                // It is not the source's fault: neither counted nor waited for.
                self.failed -= 1;
                Verdict::Again(Duration::ZERO)
            }
            Cause::Silent | Cause::Broken | Cause::Malformed => again(self),
        }
    }

    /// Whether it may be asked for again for lagging.
    pub fn may_lag(&self) -> bool {
        self.lagged < MAX_LAGS
    }
}

/// The pause after the `failed`th failure in a row: half a second, doubling up to 15 s, of which half to all is waited, so that
/// hosts that were cut off together do not come back together. `random` is any number.
pub fn pause(failed: u32, random: u16) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1_u32.checked_shl(failed.saturating_sub(1).min(16)).unwrap_or(u32::MAX));
    let whole = doubled.min(LONGEST_PAUSE);
    whole / 2 + (whole / 2).mul_f64(f64::from(random) / f64::from(u16::MAX))
}

/// How fast a request has been so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speed {
    /// What it has brought.
    pub bytes: u64,
    /// In which time.
    pub within: Duration,
}

impl Speed {
    /// Bytes in a second.
    fn rate(self) -> u128 {
        u128::from(self.bytes) * 1000 / self.within.as_millis().max(1)
    }
}

/// Whether a request is so much slower than the others are (or were, where they have ended) that asking again does better.
pub fn lags(own: Speed, others: &[Speed]) -> bool {
    let mut rates: Vec<u128> = others.iter().map(|pace| pace.rate()).collect();
    rates.sort_unstable();
    let Some(median) = rates.get(rates.len() / 2) else { return false };
    own.within >= SETTLED && own.rate().saturating_mul(u128::from(LAG)) < *median
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Duration = Duration::ZERO;

    fn refused(status: u16, code: Option<&str>) -> Cause {
        Cause::Refused { status, code: code.map(str::to_owned) }
    }

    fn first(cause: &Cause) -> Verdict {
        Tries::default().judge(cause, 0, NOW, u16::MAX)
    }

    #[test]
    fn what_may_pass_is_tried_again_and_what_will_not_is_final_at_once() {
        let half_a_second = Duration::from_millis(500);
        for status in [408, 429, 500, 502, 503, 504] {
            assert_eq!(first(&refused(status, None)), Verdict::Again(half_a_second), "{status}");
        }
        assert_eq!(first(&refused(400, Some("RequestTimeout"))), Verdict::Again(half_a_second));
        for cause in [Cause::Silent, Cause::Broken, Cause::Malformed] {
            assert_eq!(first(&cause), Verdict::Again(half_a_second), "{cause:?}");
        }
        for status in [400, 401, 403, 404, 405, 409, 410] {
            assert_eq!(first(&refused(status, Some("AccessDenied"))), Verdict::Final, "{status}");
        }
        assert_eq!([first(&Cause::Local), first(&Cause::Full)], [Verdict::Final; 2]);
        for cause in [Cause::Changed, refused(412, Some("PreconditionFailed")), refused(416, None)] {
            assert_eq!(first(&cause), Verdict::Anew, "{cause:?}");
        }
    }

    #[test]
    fn expired_credentials_are_renewed_a_few_times() {
        for status in [400, 403] {
            let mut tries = Tries::default();
            let expired = refused(status, Some("ExpiredToken"));
            let verdicts: Vec<Verdict> = (0..4).map(|_| tries.judge(&expired, 0, NOW, 0)).collect();
            assert!(matches!(verdicts[..3], [Verdict::Renewed(_), Verdict::Renewed(_), Verdict::Renewed(_)]));
            assert_eq!(verdicts[3], Verdict::Final);
        }
    }

    #[test]
    fn a_part_that_gets_on_is_tried_as_often_again_and_one_that_does_not_is_given_up() {
        let mut tries = Tries::default();
        for _ in 0..100 {
            assert!(matches!(tries.judge(&Cause::Broken, GOT_ON, NOW, 0), Verdict::Again(_)));
        }
        for _ in 2..MAX_TRIES {
            assert!(matches!(tries.judge(&Cause::Broken, GOT_ON - 1, NOW, 0), Verdict::Again(_)));
        }
        assert_eq!(tries.judge(&Cause::Broken, 0, NOW, 0), Verdict::Final);
    }

    #[test]
    fn a_download_that_stands_still_is_given_up() {
        let mut tries = Tries::default();
        assert!(matches!(tries.judge(&Cause::Silent, 0, STALL - Duration::from_secs(1), 0), Verdict::Again(_)));
        assert_eq!(tries.judge(&Cause::Silent, 0, STALL, 0), Verdict::Final);
    }

    #[test]
    fn a_request_lags_that_is_eight_times_slower_than_the_median_for_a_while() {
        let pace = |bytes, seconds| Speed { bytes, within: Duration::from_secs(seconds) };
        let others = [pace(8000, 1), pace(9000, 1), pace(1, 1)];
        assert!(lags(pace(9_990, 10), &others));
        assert!(!lags(pace(10_000, 10), &others), "an eighth");
        assert!(!lags(pace(1, 9), &others), "it has only begun");
        assert!(!lags(pace(0, 1000), &[]), "there are no others");
        assert!(!lags(pace(0, 1000), &[pace(0, 1)]), "the others have nothing either");
        let mut tries = Tries::default();
        for _ in 0..MAX_LAGS {
            assert!(tries.may_lag());
            assert_eq!(tries.judge(&Cause::Lagging, GOT_ON, NOW, 0), Verdict::Again(NOW));
        }
        assert!(!tries.may_lag());
        assert_eq!(tries.failed(), 0);
    }

    fn cause() -> impl Strategy<Value = Cause> {
        prop_oneof![
            (0_u16..700, prop::option::of(prop_oneof![Just("ExpiredToken".to_owned()), Just("SlowDown".to_owned())]))
                .prop_map(|(status, code)| Cause::Refused { status, code }),
            Just(Cause::Silent),
            Just(Cause::Broken),
            Just(Cause::Malformed),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_a_part_that_does_not_get_on_is_given_up_soon(
            causes in prop::collection::vec((cause(), 0..GOT_ON, any::<u16>()), 8),
        ) {
            let mut tries = Tries::default();
            let mut waited = Duration::ZERO;
            let ended = causes.iter().any(|(cause, got, random)| match tries.judge(cause, *got, NOW, *random) {
                Verdict::Again(pause) | Verdict::Renewed(pause) => { waited += pause; false }
                Verdict::Anew | Verdict::Final => true,
            });
            prop_assert!(ended);
            prop_assert!(waited <= Duration::from_secs(70), "{:?}", waited);
        }

        #[test]
        fn a_pause_is_half_to_all_of_its_step_and_never_longer_than_the_longest(failed in any::<u32>(), random in any::<u16>()) {
            let pause = pause(failed, random);
            prop_assert!(pause >= FIRST_PAUSE / 2 && pause <= LONGEST_PAUSE);
        }
    }
}
