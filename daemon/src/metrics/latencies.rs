//! Histograms that another process counted: they are shown as reported, not added to here.

use enclaved_core::routes::LatencyReport;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One metric, a series for each set of label values. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Latencies {
    desc: Desc,
    series: Arc<Mutex<Vec<Metric>>>,
}

impl Latencies {
    pub(super) fn new(name: &str, help: &str, labels: &[&str]) -> Result<Self, prometheus::Error> {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        let desc = Desc::new(name.to_owned(), help.to_owned(), labels, HashMap::new())?;
        Ok(Self { desc, series: Arc::default() })
    }

    pub(super) fn reset(&self) {
        self.series().clear();
    }

    /// The values in the order of the labels. Where nothing was measured there is no series.
    pub(super) fn set(&self, values: &[&str], report: &LatencyReport) {
        if report.counts.is_empty() {
            return;
        }
        let mut labels: Vec<_> =
            self.desc.variable_labels.iter().zip(values).map(|(name, value)| pair(name, value)).collect();
        labels.sort();
        let (mut buckets, mut sum) = (Vec::new(), 0);
        for (bound, count) in LatencyReport::BOUNDS_MS.iter().zip(&report.counts) {
            sum += count;
            let mut bucket = Bucket::default();
            bucket.set_cumulative_count(sum);
            bucket.set_upper_bound(f64::from(*bound) / 1e3);
            buckets.push(bucket);
        }
        let mut histogram = Histogram::default();
        histogram.set_sample_count(report.counts.iter().sum());
        #[expect(clippy::cast_precision_loss, reason = "a sum, shown with the precision that a float has")]
        histogram.set_sample_sum(report.sum_us as f64 / 1e6);
        histogram.set_bucket(buckets);
        let mut metric = Metric::from_label(labels);
        metric.set_histogram(histogram);
        self.series().push(metric);
    }

    fn series(&self) -> MutexGuard<'_, Vec<Metric>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Latencies {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut family = MetricFamily::default();
        family.set_name(self.desc.fq_name.clone());
        family.set_help(self.desc.help.clone());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(self.series().clone());
        vec![family]
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{Registry, TextEncoder};

    #[test]
    fn a_report_is_shown_as_a_histogram_and_nothing_where_nothing_was_measured() {
        let (registry, latencies) = (Registry::new(), Latencies::new("x_seconds", "X.", &["enclave", "at"]).unwrap());
        registry.register(Box::new(latencies.clone())).unwrap();
        latencies.set(&["signer", "idle"], &LatencyReport::default());
        let mut counts = vec![0; LatencyReport::BOUNDS_MS.len() + 1];
        (counts[0], counts[2], counts[12]) = (3, 4, 5);
        latencies.set(&["signer", "db:1"], &LatencyReport { counts, sum_us: 1_500_000 });
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "# TYPE x_seconds histogram",
            "x_seconds_bucket{at=\"db:1\",enclave=\"signer\",le=\"0.001\"} 3",
            "x_seconds_bucket{at=\"db:1\",enclave=\"signer\",le=\"0.005\"} 7",
            "x_seconds_bucket{at=\"db:1\",enclave=\"signer\",le=\"10\"} 7",
            "x_seconds_bucket{at=\"db:1\",enclave=\"signer\",le=\"+Inf\"} 12",
            "x_seconds_sum{at=\"db:1\",enclave=\"signer\"} 1.5",
            "x_seconds_count{at=\"db:1\",enclave=\"signer\"} 12",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        assert!(!text.contains("idle"));
    }
}
