//! How fast something gets on: the rate of the last few seconds, for people who wait. Knows no clock; it is told the time.

use crate::host::Progress;
use enclaved_core::status::{FetchStage, FetchStatus};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// The rate is that of so long a time.
const WINDOW: Duration = Duration::from_secs(10);
/// No rate is told before there are points so far apart.
const LEAST: Duration = Duration::from_millis(500);
/// Points are kept at this distance, so that their number is bounded however often one is noted.
const STEP: Duration = Duration::from_millis(100);

/// The points of one undertaking.
#[derive(Debug, Default)]
pub struct Pace {
    stage: FetchStage,
    points: VecDeque<(Instant, u64)>,
}

impl Pace {
    /// How far it is at that time, for people.
    pub fn status(&mut self, at: Instant, of: &Progress) -> FetchStatus {
        let ((bytes, total), stage) = (of.get(), of.stage());
        self.note(at, stage, bytes);
        let bytes_per_second = self.bytes_per_second();
        let eta_seconds = bytes_per_second.and_then(|rate| total.checked_sub(bytes)?.checked_div(rate));
        FetchStatus { stage, bytes, total, bytes_per_second, eta_seconds }
    }

    /// At that time so many bytes were done with. A new stage, or fewer bytes than before, begins anew.
    fn note(&mut self, at: Instant, stage: FetchStage, bytes: u64) {
        if stage != self.stage || self.points.back().is_some_and(|(_, before)| bytes < *before) {
            self.stage = stage;
            self.points.clear();
        }
        // The newest point moves on until it is far enough from the one before it.
        if let [.., (before, _), _] = self.points.make_contiguous()
            && at.saturating_duration_since(*before) < STEP
        {
            self.points.pop_back();
        }
        self.points.push_back((at, bytes));
        while self.points.get(1).is_some_and(|(second, _)| at.saturating_duration_since(*second) >= WINDOW) {
            self.points.pop_front();
        }
    }

    /// The rate; `None` until it can be told.
    fn bytes_per_second(&self) -> Option<u64> {
        let ((from, first), (to, last)) = (self.points.front()?, self.points.back()?);
        let span = to.saturating_duration_since(*from);
        let millis = u64::try_from(span.as_millis()).ok().filter(|_| span >= LEAST)?;
        last.checked_sub(*first)?.checked_mul(1000)?.checked_div(millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(points: impl IntoIterator<Item = (u64, u64)>) -> Pace {
        let (began, mut pace) = (Instant::now(), Pace::default());
        for (millis, bytes) in points {
            pace.note(began + Duration::from_millis(millis), FetchStage::Downloading, bytes);
        }
        pace
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        assert_eq!(noted([(0, 0), (400, 400)]).bytes_per_second(), None, "too early to tell");
        assert_eq!(noted([(0, 0), (1000, 5000)]).bytes_per_second(), Some(5000));
        let slower =
            (0..=600).map(|tenth| (tenth * 100, if tenth < 300 { tenth * 1000 } else { 300_000 + tenth - 300 }));
        assert_eq!(noted(slower).bytes_per_second(), Some(10));
    }

    #[test]
    fn going_back_begins_anew_and_the_points_stay_few() {
        assert_eq!(noted([(0, 0), (1000, 5000), (1500, 10)]).bytes_per_second(), None);
        let pace = noted((0..1_000_000).map(|milli| (milli, milli)));
        assert!(pace.points.len() <= 110, "{}", pace.points.len());
        assert_eq!(pace.bytes_per_second(), Some(1000));
    }
}
