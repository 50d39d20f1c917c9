//! Figures: medians, tables, JSON.

use super::run::Cost;
use serde::Serialize;
use std::fmt;

const MIB: f64 = 1024.0 * 1024.0;

/// One contender's rounds.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// Who, and what it did.
    pub(super) what: String,
    /// The medians.
    pub(super) median: Cost,
    /// Every round, in order.
    pub(super) rounds: Vec<Cost>,
}

/// A comparison.
#[derive(Debug, Serialize)]
pub(super) struct Table {
    /// What is compared.
    pub(super) title: String,
    /// Bytes that every contender went through in a round.
    pub(super) size: u64,
    /// The contenders.
    pub(super) rows: Vec<Row>,
}

impl Row {
    pub(super) fn new(what: &str, rounds: Vec<Cost>) -> Self {
        let of = |value: fn(&Cost) -> f64| median(rounds.iter().map(value).collect());
        let median = Cost {
            wall_s: of(|cost| cost.wall_s),
            user_s: of(|cost| cost.user_s),
            system_s: of(|cost| cost.system_s),
            peak_rss_mib: of(|cost| cost.peak_rss_mib),
            peak_anonymous_mib: of(|cost| cost.peak_anonymous_mib),
        };
        Self { what: what.to_owned(), median, rounds }
    }
}

impl Row {
    /// The medians in one line.
    pub(super) fn said(&self) -> String {
        let cost = &self.median;
        let cpu = cost.user_s + cost.system_s;
        format!("{}: {:.2} s, {cpu:.2} s of CPU, {:.0} MiB at its peak", self.what, cost.wall_s, cost.peak_rss_mib)
    }

    /// What both cost one after the other, by their medians.
    pub(super) fn and_then(&self, next: &Self) -> Self {
        let (one, two) = (&self.median, &next.median);
        let median = Cost {
            wall_s: one.wall_s + two.wall_s,
            user_s: one.user_s + two.user_s,
            system_s: one.system_s + two.system_s,
            peak_rss_mib: one.peak_rss_mib.max(two.peak_rss_mib),
            peak_anonymous_mib: one.peak_anonymous_mib.max(two.peak_anonymous_mib),
        };
        Self { what: format!("{}, then {}", self.what, next.what), median, rounds: Vec::new() }
    }
}

/// The middle one, or the mean of the two in the middle. 0 of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => 0.0,
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.what.len()).max().unwrap_or_default().max(20);
        writeln!(f, "{}", self.title)?;
        let heads = format!(
            "{:>8}{:>8}{:>8}{:>8}{:>10}{:>10}{:>8}",
            "wall s", "CPU s", "user s", "sys s", "peak MiB", "anon MiB", "MiB/s"
        );
        writeln!(f, "  {:width$}{heads}", "what")?;
        for Row { what, median: cost, .. } in &self.rows {
            #[expect(clippy::cast_precision_loss, reason = "sizes of files are far below 2^53")]
            let rate = self.size as f64 / MIB / cost.wall_s.max(1e-9);
            writeln!(
                f,
                "  {what:width$}{:>8.2}{:>8.2}{:>8.2}{:>8.2}{:>10.0}{:>10.0}{rate:>8.0}",
                cost.wall_s,
                cost.user_s + cost.system_s,
                cost.user_s,
                cost.system_s,
                cost.peak_rss_mib,
                cost.peak_anonymous_mib,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }
}
