//! Numbers as people read them. Pure.

use enclaved_core::status::{FetchStage, FetchStatus};
use std::time::Duration;

/// A span of time in its two largest units: `5s`, `2m 10s`, `3h 12m`, `4d 3h`.
pub(super) fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let two = |large: u64, unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit} {small}{small_unit}"),
    };
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => two(minutes, "m", seconds % 60, "s"),
        (0, _, _) => two(hours, "h", minutes % 60, "m"),
        _ => two(days, "d", hours % 24, "h"),
    }
}

/// A number of bytes in MiB with one decimal: `12.3 MiB`.
pub(super) fn mib(bytes: u64) -> String {
    const TENTH: u128 = (1 << 20) / 10;
    let tenths = (u128::from(bytes) * 10 + (1 << 19)) >> 20;
    if u128::from(bytes) < TENTH && bytes > 0 {
        format!("{bytes} bytes")
    } else {
        format!("{}.{} MiB", tenths / 10, tenths % 10)
    }
}

/// How far a download is: `3.0 MiB of 12.0 MiB (25%), 1.5 MiB/s, 6s left`.
pub(super) fn progress(fetch: &FetchStatus) -> String {
    let done = match (u128::from(fetch.bytes) * 100).checked_div(u128::from(fetch.total)) {
        Some(percent) => format!("{} of {} ({percent}%)", mib(fetch.bytes), mib(fetch.total)),
        None => mib(fetch.bytes),
    };
    let mut text = match fetch.stage {
        FetchStage::Asking => return "asking for it".to_owned(),
        FetchStage::Downloading => done,
        FetchStage::Measuring => format!("measured {done}"),
    };
    if let Some(rate) = fetch.bytes_per_second {
        text.push_str(&format!(", {}/s", mib(rate)));
    }
    if let Some(eta) = fetch.eta_seconds {
        text.push_str(&format!(", {} left", span(Duration::from_secs(eta))));
    }
    text
}

/// The first characters of a text, on one line, with `…` if there is more.
pub(super) fn cut(text: &str, max: usize) -> String {
    let line = text.lines().next().unwrap_or_default();
    let short: String = line.chars().take(max).collect();
    if short.len() == text.len() { short } else { format!("{}…", short.trim_end()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_tells_how_much_how_fast_and_how_long() {
        let mut fetch =
            FetchStatus { stage: FetchStage::Downloading, bytes: 3 << 20, total: 12 << 20, ..FetchStatus::default() };
        assert_eq!(progress(&fetch), "3.0 MiB of 12.0 MiB (25%)");
        (fetch.bytes_per_second, fetch.eta_seconds) = (Some(3 << 19), Some(6));
        assert_eq!(progress(&fetch), "3.0 MiB of 12.0 MiB (25%), 1.5 MiB/s, 6s left");
        assert_eq!(progress(&FetchStatus::default()), "asking for it");
        let unknown = FetchStatus { stage: FetchStage::Downloading, bytes: 1 << 20, ..FetchStatus::default() };
        assert_eq!(progress(&unknown), "1.0 MiB");
        let huge =
            FetchStatus { stage: FetchStage::Measuring, bytes: u64::MAX, total: u64::MAX, ..FetchStatus::default() };
        assert_eq!(progress(&huge).rsplit(' ').next(), Some("(100%)"));
    }

    #[test]
    fn a_span_shows_its_two_largest_units() {
        let cases = [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (130, "2m 10s"),
            (3600, "1h"),
            (11_525, "3h 12m"),
            (86_400, "1d"),
            (86_400 * 4 + 3 * 3600 + 59, "4d 3h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn bytes_are_rounded_to_tenths_of_a_mib() {
        let cases = [
            (0, "0.0 MiB"),
            (5, "5 bytes"),
            (1 << 20, "1.0 MiB"),
            (12_345_678, "11.8 MiB"),
            (u64::MAX, "17592186044416.0 MiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(mib(bytes), text);
        }
    }

    #[test]
    fn a_long_or_many_lined_text_is_cut_with_a_mark() {
        assert_eq!(cut("short", 5), "short");
        assert_eq!(cut("longer", 5), "longe…");
        assert_eq!(cut("äöüß", 2), "äö…");
        assert_eq!(cut("one\ntwo", 50), "one…");
    }
}
