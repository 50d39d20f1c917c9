//! Every metric of enclaved, for both processes: names, help texts, labels. The only place where a metric has a name.
//!
//! Counters of events grow as the events happen. What describes a state (enclaves, pool, proxy, traffic) is taken from
//! the last report of the loop when Prometheus asks, so that a series never says something that `enclavectl status`
//! does not.

mod latencies;

use crate::reconciler::Report;
use enclaved_core::diagnosis::Check;
use enclaved_core::routes::{Direction, ListenerKey, NameReport, ProxyReport, TrafficReport, UpstreamReport};
use enclaved_core::status::{EnclaveState, EnclaveStatus, Health, Status};
use latencies::Latencies;
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::sync::{Arc, Mutex, PoisonError};

/// All metrics of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    registry: Registry,
    /// Held while the state series are replaced and read, so that a scrape never sees half of them.
    scrape: Mutex<()>,
    passes: IntCounter,
    pass_seconds: Histogram,
    jobs: IntCounterVec,
    ends: IntCounterVec,
    ledger_failures: IntCounter,
    reloads: IntCounterVec,
    config_ok: IntGauge,
    control_plane: IntCounterVec,
    allocator_runs: IntCounterVec,
    state: StateSeries,
}

/// The series that are replaced at every scrape.
#[derive(Debug)]
struct StateSeries {
    ready: IntGauge,
    problems: IntGauge,
    check_failed: IntGaugeVec,
    start_time: Gauge,
    pool_cpus: IntGaugeVec,
    pool_memory: IntGaugeVec,
    pool_settled: IntGaugeVec,
    enclave_state: IntGaugeVec,
    enclave_ready: IntGaugeVec,
    enclave_since: GaugeVec,
    enclave_generation: IntGaugeVec,
    enclave_cpus: IntGaugeVec,
    enclave_memory: IntGaugeVec,
    enclave_healthy: IntGaugeVec,
    enclave_debug: IntGaugeVec,
    enclave_info: IntGaugeVec,
    certificate_expiry: IntGaugeVec,
    polled: IntGaugeVec,
    cache_bytes: IntGaugeVec,
    cache_images: IntGaugeVec,
    fetch_rate: IntGaugeVec,
    fetch_eta: IntGaugeVec,
    fetch_bytes: IntGaugeVec,
    fetch_size: IntGaugeVec,
    proxy_up: IntGauge,
    proxy_current: IntGauge,
    listener_open: IntGaugeVec,
    accept_errors: IntCounterVec,
    panics: IntCounterVec,
    refused: IntCounterVec,
    handshake_failures: IntCounterVec,
    open: IntGaugeVec,
    total: IntCounterVec,
    bytes: IntCounterVec,
    failures: IntCounterVec,
    responses: IntCounterVec,
    connect_seconds: Latencies,
    name_age: IntGaugeVec,
    name_stale: IntGaugeVec,
    name_addresses: IntGaugeVec,
    name_failures: IntCounterVec,
    name_seconds: Latencies,
    https_connections: IntGauge,
    https_seconds: Latencies,
    https_certificate_expiry: IntGaugeVec,
    https_certificate_failed: IntGaugeVec,
    https_client_ca_failed: IntGaugeVec,
    upstream_connections: IntGaugeVec,
    upstream_connects: IntCounterVec,
    upstream_connect_failures: IntCounterVec,
    upstream_reused: IntCounterVec,
    upstream_repeated: IntCounterVec,
    access_log_dropped: IntCounterVec,
}

/// A metric was defined twice or with a bad name: a bug that any start of the process shows.
#[derive(Debug, thiserror::Error)]
#[error("defining the metrics failed; this is a bug")]
pub struct MetricsError(#[from] prometheus::Error);

/// Registers a metric as it is made.
fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: Result<C, prometheus::Error>,
) -> Result<C, prometheus::Error> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

impl Metrics {
    /// Defines all metrics.
    ///
    /// # Errors
    /// A bug, see [`MetricsError`].
    pub fn new() -> Result<Self, MetricsError> {
        let r = Registry::new();
        let counter = |name: &str, help: &str| add(&r, IntCounter::new(name, help));
        let counters =
            |name: &str, help: &str, labels: &[&str]| add(&r, IntCounterVec::new(Opts::new(name, help), labels));
        let gauge = |name: &str, help: &str| add(&r, IntGauge::new(name, help));
        let gauges = |name: &str, help: &str, labels: &[&str]| add(&r, IntGaugeVec::new(Opts::new(name, help), labels));
        let enclave = &["enclave"];
        let traffic = &["enclave", "direction", "endpoint"];
        let name = &["hostname"];
        let state = StateSeries {
            ready: gauge("enclaved_ready", "1 if every wanted enclave serves and nothing is degraded.")?,
            problems: gauge("enclaved_problems", "Problems that `enclavectl status` lists.")?,
            check_failed: gauges(
                "enclaved_check_failed",
                "1 if a check of `enclavectl doctor` fails; none until the control process has made them.",
                &["check"],
            )?,
            start_time: add(&r, Gauge::new("enclaved_start_time_seconds", "When the control process started."))?,
            pool_cpus: gauges(
                "enclaved_pool_cpus",
                "CPUs for enclaves: total and free of what is set aside, and what is wanted of it where enclaved manages it.",
                &["state"],
            )?,
            pool_memory: gauges(
                "enclaved_pool_memory_bytes",
                "Hugepage memory for enclaves: total and free of what is set aside, and what is wanted of it.",
                &["state"],
            )?,
            pool_settled: gauges(
                "enclaved_pool_settled",
                "1 if what is set aside for enclaves is what is wanted; only where enclaved manages it.",
                &[],
            )?,
            enclave_state: gauges(
                "enclaved_enclave_state",
                "1 for the state an enclave is in.",
                &["enclave", "state"],
            )?,
            enclave_ready: gauges("enclaved_enclave_ready", "1 if the enclave serves.", enclave)?,
            enclave_since: add(
                &r,
                GaugeVec::new(
                    Opts::new("enclaved_enclave_state_since_seconds", "When the enclave entered its state."),
                    enclave,
                ),
            )?,
            enclave_generation: gauges("enclaved_enclave_generation", "Number of the enclave's launch.", enclave)?,
            enclave_cpus: gauges("enclaved_enclave_cpus", "CPUs of the enclave.", enclave)?,
            enclave_memory: gauges("enclaved_enclave_memory_bytes", "Memory of the enclave.", enclave)?,
            enclave_healthy: gauges("enclaved_enclave_healthy", "1 if the last health probe was good.", enclave)?,
            enclave_debug: gauges("enclaved_enclave_debug_mode", "1 if its attestation proves nothing.", enclave)?,
            enclave_info: gauges(
                "enclaved_enclave_info",
                "The image an enclave runs; measurements are computed by the host, not attested.",
                &["enclave", "image_sha256", "pcr0"],
            )?,
            certificate_expiry: gauges(
                "enclaved_image_certificate_expiry_timestamp_seconds",
                "Until when the certificate is valid that an enclave's image is signed with: from then on it can't be launched.",
                enclave,
            )?,
            polled: gauges(
                "enclaved_image_polled_timestamp_seconds",
                "When the source of an enclave's image was last asked for a new one.",
                enclave,
            )?,
            cache_bytes: gauges("enclaved_image_cache_bytes", "Images on disk, unfinished downloads included.", &[])?,
            cache_images: gauges("enclaved_image_cache_images", "Whole images on disk.", &[])?,
            fetch_rate: gauges(
                "enclaved_image_fetch_bytes_per_second",
                "How fast a download under way was lately.",
                enclave,
            )?,
            fetch_eta: gauges("enclaved_image_fetch_eta_seconds", "How long the rest of a download takes.", enclave)?,
            fetch_bytes: gauges("enclaved_image_fetched_bytes", "Bytes of a download under way.", enclave)?,
            fetch_size: gauges("enclaved_image_fetch_size_bytes", "Size of a download under way.", enclave)?,
            proxy_up: gauge("enclaved_proxy_up", "1 if the proxy process answers.")?,
            proxy_current: gauge("enclaved_proxy_routes_current", "1 if the proxy serves the wanted routes.")?,
            listener_open: gauges(
                "enclaved_proxy_listener_open",
                "1 if a listener is open; cid is that of the enclave it is for, where it is for one.",
                &["kind", "address", "cid"],
            )?,
            accept_errors: counters(
                "enclaved_proxy_accept_errors_total",
                "Connections that could not be accepted: a shortage of descriptors or memory, or an error of their own.",
                &[],
            )?,
            panics: counters("enclaved_proxy_panics_total", "Connections that ended by a bug in the proxy.", &[])?,
            refused: counters(
                "enclaved_proxy_refused_total",
                "Connections and requests that belong to no enclave: unknown peers, unknown hosts, too many.",
                &["reason"],
            )?,
            handshake_failures: counters(
                "enclaved_https_handshake_failures_total",
                "TLS handshakes that came to nothing, by cause.",
                &["cause"],
            )?,
            open: gauges("enclaved_traffic_open", "Open connections; for HTTPS, requests.", traffic)?,
            total: counters("enclaved_traffic_total", "Accepted connections; for HTTPS, requests.", traffic)?,
            bytes: counters(
                "enclaved_traffic_bytes_total",
                "Bytes carried to and from enclaves.",
                &["enclave", "direction", "endpoint", "to"],
            )?,
            failures: counters(
                "enclaved_traffic_failures_total",
                "Connections or requests that failed.",
                &["enclave", "direction", "endpoint", "reason"],
            )?,
            responses: counters(
                "enclaved_https_responses_total",
                "Answers over HTTPS by status class.",
                &["enclave", "class"],
            )?,
            connect_seconds: add(
                &r,
                Latencies::new(
                    "enclaved_egress_connect_duration_seconds",
                    "How long connecting to an upstream took, its name known, until an address answered or none was left.",
                    &["enclave", "endpoint"],
                ),
            )?,
            name_age: gauges("enclaved_dns_answer_age_seconds", "Age of what an upstream's name resolved to.", name)?,
            name_stale: gauges(
                "enclaved_dns_answer_stale",
                "1 if new connections use addresses whose time is over, because resolving the name fails.",
                name,
            )?,
            name_addresses: gauges("enclaved_dns_addresses", "Addresses known for an upstream's name.", name)?,
            name_failures: counters(
                "enclaved_dns_failures_total",
                "Lookups of an upstream's name that failed or found nothing.",
                name,
            )?,
            name_seconds: add(
                &r,
                Latencies::new(
                    "enclaved_dns_lookup_duration_seconds",
                    "How long a lookup of an upstream's name took. No connection waits for any but the first.",
                    name,
                ),
            )?,
            https_connections: gauge("enclaved_https_connections_open", "Connections to the ports of HTTPS.")?,
            https_seconds: add(
                &r,
                Latencies::new(
                    "enclaved_https_request_duration_seconds",
                    "How long HTTPS requests took, from their headers to those of the answer, whoever gave it.",
                    enclave,
                ),
            )?,
            https_certificate_expiry: gauges(
                "enclaved_https_certificate_expiry_timestamp_seconds",
                "Until when the certificate is valid that clients of a domain are shown.",
                &["domain"],
            )?,
            https_certificate_failed: gauges(
                "enclaved_https_certificate_failed",
                "1 if there is a certificate for a domain that can't be served: see `enclavectl status`.",
                &["domain"],
            )?,
            https_client_ca_failed: gauges(
                "enclaved_https_client_ca_failed",
                "1 if an enclave's `client_ca` can't be used: see `enclavectl status`.",
                enclave,
            )?,
            upstream_connections: gauges(
                "enclaved_upstream_connections",
                "Open HTTP connections into an enclave: active ones carry a request, idle ones are kept for the next.",
                &["enclave", "state"],
            )?,
            upstream_connects: counters(
                "enclaved_upstream_connects_total",
                "Tries to open an HTTP connection into an enclave.",
                enclave,
            )?,
            upstream_connect_failures: counters(
                "enclaved_upstream_connect_failures_total",
                "Tries to open an HTTP connection into an enclave that failed.",
                &["enclave", "reason"],
            )?,
            upstream_reused: counters(
                "enclaved_upstream_reused_total",
                "Requests that were sent to an enclave over a connection that was kept.",
                enclave,
            )?,
            upstream_repeated: counters(
                "enclaved_upstream_repeats_total",
                "Requests that were sent to an enclave a second time, because it had closed the kept connection.",
                enclave,
            )?,
            access_log_dropped: counters(
                "enclaved_access_log_dropped_total",
                "Lines of the access log that were lost: what it is written to did not take them, or not in time.",
                &[],
            )?,
        };
        let info = gauges("enclaved_build_info", "The running version.", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let buckets = vec![0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0];
        let pass_seconds = HistogramOpts::new("enclaved_reconcile_duration_seconds", "Duration of a pass of the loop.")
            .buckets(buckets);
        let inner = Inner {
            scrape: Mutex::new(()),
            passes: counter("enclaved_reconcile_passes_total", "Passes of the reconcile loop.")?,
            pass_seconds: add(&r, Histogram::with_opts(pass_seconds))?,
            jobs: counters("enclaved_jobs_total", "Ended jobs.", &["job", "outcome"])?,
            ends: counters("enclaved_enclave_ends_total", "Ends of enclaves.", &["enclave", "asked"])?,
            ledger_failures: counter("enclaved_ledger_failures_total", "Failures to read or write the ledger.")?,
            reloads: counters("enclaved_config_reloads_total", "Configurations read.", &["outcome"])?,
            config_ok: gauge(
                "enclaved_config_last_reload_successful",
                "1 if the last configuration read is in force.",
            )?,
            control_plane: counters("enclaved_control_plane_reports_total", "Status reports sent.", &["outcome"])?,
            allocator_runs: counters(
                "enclaved_allocator_runs_total",
                "Runs of the allocator that enclaved asked for.",
                &["outcome"],
            )?,
            state,
            registry: r,
        };
        // Series that alerts are written on exist from the start.
        for outcome in ["ok", "failed"] {
            inner.reloads.with_label_values(&[outcome]).inc_by(0);
            inner.control_plane.with_label_values(&[outcome]).inc_by(0);
            inner.allocator_runs.with_label_values(&[outcome]).inc_by(0);
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    pub(crate) fn pass(&self, took: std::time::Duration) {
        self.inner.passes.inc();
        self.inner.pass_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn job(&self, job: &str, ok: bool) {
        self.inner.jobs.with_label_values(&[job, outcome(ok)]).inc();
    }

    pub(crate) fn end(&self, enclave: &str, asked: bool) {
        self.inner.ends.with_label_values(&[enclave, if asked { "yes" } else { "no" }]).inc();
    }

    pub(crate) fn ledger_failure(&self) {
        self.inner.ledger_failures.inc();
    }

    pub(crate) fn reload(&self, ok: bool) {
        self.inner.reloads.with_label_values(&[outcome(ok)]).inc();
        self.inner.config_ok.set(i64::from(ok));
    }

    pub(crate) fn allocator_run(&self, ok: bool) {
        self.inner.allocator_runs.with_label_values(&[outcome(ok)]).inc();
    }

    pub(crate) fn control_plane(&self, ok: bool) {
        self.inner.control_plane.with_label_values(&[outcome(ok)]).inc();
    }

    /// The exposition of all metrics in Prometheus' text format.
    ///
    /// # Errors
    /// A bug: a metric that cannot be written.
    pub fn render(&self, report: Option<&Report>) -> Result<String, MetricsError> {
        // A scrape that panicked left series that this one replaces.
        let _scrape = self.inner.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(report) = report {
            self.inner.state.set(&report.status, report.proxy.as_ref());
        }
        Ok(TextEncoder::new().encode_to_string(&self.inner.registry.gather())?)
    }
}

fn outcome(ok: bool) -> &'static str {
    if ok { "ok" } else { "failed" }
}

fn int(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// Milliseconds are exact in a float until the year 287396.
#[expect(clippy::cast_precision_loss, reason = "exact for all times that RFC 3339 can write")]
fn seconds(at: enclaved_core::id::Timestamp) -> f64 {
    at.as_millis() as f64 / 1000.0
}

impl StateSeries {
    fn set(&self, status: &Status, proxy: Option<&ProxyReport>) {
        self.ready.set(i64::from(status.ready));
        self.problems.set(int(status.problems.len()));
        self.start_time.set(seconds(status.host.started_at));
        self.reset();
        if status.host.checked_at.is_some() {
            for check in Check::ALL {
                let failed = status.host.failed_checks.contains(check);
                self.check_failed.with_label_values(&[check.as_str()]).set(i64::from(failed));
            }
        }
        let host = &status.host;
        let wanted = host.pool.as_ref();
        for (state, cpus, memory) in [
            ("total", host.pool_cpus, host.pool_memory_mib),
            ("free", host.pool_cpus_free, host.pool_memory_free_mib),
            ("wanted", wanted.and_then(|pool| pool.wanted_cpus), wanted.and_then(|pool| pool.wanted_memory_mib)),
        ] {
            if let Some(cpus) = cpus {
                self.pool_cpus.with_label_values(&[state]).set(i64::from(cpus));
            }
            if let Some(memory) = memory {
                self.pool_memory.with_label_values(&[state]).set(int(memory.0 << 20));
            }
        }
        if let Some(pool) = wanted {
            self.pool_settled.with_label_values::<&str>(&[]).set(i64::from(pool.settled));
        }
        if let Some(bytes) = status.host.image_cache_bytes {
            self.cache_bytes.with_label_values::<&str>(&[]).set(int(bytes));
        }
        if let Some(images) = status.host.image_cache_images {
            self.cache_images.with_label_values::<&str>(&[]).set(int(images));
        }
        for enclave in &status.enclaves {
            self.enclave(enclave);
        }
        self.proxy_up.set(i64::from(status.proxy.running));
        self.proxy_current.set(i64::from(status.proxy.current));
        if let Some(report) = proxy {
            self.proxy(report);
        }
    }

    fn reset(&self) {
        let gauges = [
            &self.check_failed,
            &self.pool_cpus,
            &self.pool_memory,
            &self.pool_settled,
            &self.enclave_state,
            &self.enclave_ready,
            &self.enclave_generation,
            &self.enclave_cpus,
            &self.enclave_memory,
            &self.enclave_healthy,
            &self.enclave_debug,
            &self.enclave_info,
            &self.certificate_expiry,
            &self.polled,
            &self.cache_bytes,
            &self.cache_images,
            &self.fetch_rate,
            &self.fetch_eta,
            &self.fetch_bytes,
            &self.fetch_size,
            &self.listener_open,
            &self.open,
            &self.name_age,
            &self.name_stale,
            &self.name_addresses,
            &self.https_certificate_expiry,
            &self.https_certificate_failed,
            &self.https_client_ca_failed,
            &self.upstream_connections,
        ];
        gauges.iter().for_each(|series| series.reset());
        self.enclave_since.reset();
        let counters = [
            &self.accept_errors,
            &self.panics,
            &self.refused,
            &self.handshake_failures,
            &self.total,
            &self.bytes,
            &self.failures,
            &self.responses,
            &self.name_failures,
            &self.upstream_connects,
            &self.upstream_connect_failures,
            &self.upstream_reused,
            &self.upstream_repeated,
            &self.access_log_dropped,
        ];
        counters.iter().for_each(|series| series.reset());
        self.connect_seconds.reset();
        self.name_seconds.reset();
        self.https_seconds.reset();
        self.https_connections.set(0);
    }

    fn enclave(&self, enclave: &EnclaveStatus) {
        let name = enclave.name.as_str();
        for state in EnclaveState::ALL {
            self.enclave_state.with_label_values(&[name, state.as_str()]).set(i64::from(state == enclave.state));
        }
        self.enclave_ready.with_label_values(&[name]).set(i64::from(enclave.ready));
        if let Some(since) = enclave.since {
            self.enclave_since.with_label_values(&[name]).set(seconds(since));
        }
        if let Some(generation) = enclave.generation {
            self.enclave_generation.with_label_values(&[name]).set(i64::from(generation.0));
        }
        self.enclave_cpus.with_label_values(&[name]).set(i64::from(enclave.cpus));
        self.enclave_memory.with_label_values(&[name]).set(int(enclave.memory_mib.0 << 20));
        if !matches!(enclave.health, Health::None | Health::Unknown) {
            self.enclave_healthy.with_label_values(&[name]).set(i64::from(enclave.health == Health::Healthy));
        }
        self.enclave_debug.with_label_values(&[name]).set(i64::from(enclave.debug));
        if let (Some(digest), Some(pcr0)) = (enclave.image_digest, enclave.pcr0) {
            self.enclave_info.with_label_values(&[name, &digest.to_string(), &pcr0.to_string()]).set(1);
        }
        let stamp = |at: enclaved_core::id::Timestamp| int(at.as_millis() / 1000);
        if let Some(at) = enclave.image_certificate_expires {
            self.certificate_expiry.with_label_values(&[name]).set(stamp(at));
        }
        if let Some(at) = enclave.image_polled_at {
            self.polled.with_label_values(&[name]).set(stamp(at));
        }
        if let Some(fetch) = enclave.fetch {
            self.fetch_bytes.with_label_values(&[name]).set(int(fetch.bytes));
            self.fetch_size.with_label_values(&[name]).set(int(fetch.total));
            if let Some(rate) = fetch.bytes_per_second {
                self.fetch_rate.with_label_values(&[name]).set(int(rate));
            }
            if let Some(eta) = fetch.eta_seconds {
                self.fetch_eta.with_label_values(&[name]).set(int(eta));
            }
        }
    }

    fn proxy(&self, report: &ProxyReport) {
        self.accept_errors.with_label_values::<&str>(&[]).inc_by(report.accept_errors);
        self.panics.with_label_values::<&str>(&[]).inc_by(report.panics);
        for (reason, count) in &report.refused {
            self.refused.with_label_values(&[reason]).inc_by(*count);
        }
        self.access_log_dropped.with_label_values::<&str>(&[]).inc_by(report.access_log_dropped);
        self.https_connections.set(int(report.https_connections));
        for (cause, count) in &report.handshake_failures {
            self.handshake_failures.with_label_values(&[cause]).inc_by(*count);
        }
        for listener in &report.listeners {
            let (kind, cid) = match listener.listener {
                ListenerKey::Egress { cid, .. } => ("egress", cid.to_string()),
                ListenerKey::Https { .. } => ("https", String::new()),
                ListenerKey::Redirect { .. } => ("redirect", String::new()),
                ListenerKey::Tcp { .. } => ("tcp", String::new()),
            };
            let open = i64::from(listener.error.is_none());
            self.listener_open.with_label_values(&[kind, &listener.address, &cid]).set(open);
        }
        for traffic in &report.traffic {
            self.traffic(traffic);
        }
        for name in &report.names {
            self.name(name);
        }
        for certificate in &report.certificates {
            let labels = [certificate.domain.as_str()];
            if let Some(expires) = certificate.expires {
                self.https_certificate_expiry.with_label_values(&labels).set(expires);
            }
            self.https_certificate_failed.with_label_values(&labels).set(i64::from(certificate.error.is_some()));
        }
        for authority in &report.client_authorities {
            let failed = i64::from(authority.error.is_some());
            self.https_client_ca_failed.with_label_values(&[authority.enclave.as_str()]).set(failed);
        }
    }

    fn name(&self, name: &NameReport) {
        let labels = [name.hostname.as_str()];
        if let Some(age) = name.answer_age_seconds {
            self.name_age.with_label_values(&labels).set(int(age));
        }
        self.name_stale.with_label_values(&labels).set(i64::from(name.stale));
        self.name_addresses.with_label_values(&labels).set(int(name.addresses));
        self.name_failures.with_label_values(&labels).inc_by(name.failed);
        self.name_seconds.set(&labels, &name.lookups);
    }

    fn traffic(&self, traffic: &TrafficReport) {
        let direction = match traffic.direction {
            Direction::Egress => "egress",
            Direction::Https => "https",
            Direction::Tcp => "tcp",
        };
        let labels = [traffic.enclave.as_str(), direction, &traffic.endpoint];
        let [enclave, _, endpoint] = labels;
        self.open.with_label_values(&labels).set(int(traffic.open));
        self.total.with_label_values(&labels).inc_by(traffic.total);
        for (to, bytes) in [("enclave", traffic.bytes_to_enclave), ("peer", traffic.bytes_from_enclave)] {
            self.bytes.with_label_values(&[enclave, direction, endpoint, to]).inc_by(bytes);
        }
        for (reason, count) in &traffic.failed {
            self.failures.with_label_values(&[enclave, direction, endpoint, reason]).inc_by(*count);
        }
        for (class, count) in &traffic.status_classes {
            self.responses.with_label_values(&[enclave, class]).inc_by(*count);
        }
        self.connect_seconds.set(&[enclave, endpoint], &traffic.connects);
        if traffic.direction == Direction::Https {
            self.https_seconds.set(&[enclave], &traffic.answers);
            self.upstream(enclave, &traffic.upstream);
        }
    }

    fn upstream(&self, enclave: &str, upstream: &UpstreamReport) {
        for (state, count) in [("active", upstream.active), ("idle", upstream.idle)] {
            self.upstream_connections.with_label_values(&[enclave, state]).set(int(count));
        }
        self.upstream_connects.with_label_values(&[enclave]).inc_by(upstream.connects);
        for (reason, count) in &upstream.connects_failed {
            self.upstream_connect_failures.with_label_values(&[enclave, reason]).inc_by(*count);
        }
        self.upstream_reused.with_label_values(&[enclave]).inc_by(upstream.reused);
        self.upstream_repeated.with_label_values(&[enclave]).inc_by(upstream.repeated);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::routes::LatencyReport;
    use std::collections::BTreeMap;

    #[test]
    fn every_metric_has_the_prefix_and_counters_end_in_total() {
        let metrics = Metrics::new().unwrap();
        let text = metrics.render(None).unwrap();
        for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
            let mut words = line.split(' ').skip(2);
            let (name, kind) = (words.next().unwrap(), words.next().unwrap());
            assert!(name.starts_with("enclaved_"), "{name}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
        }
    }

    #[test]
    fn an_endpoint_shows_what_it_carried_why_it_failed_and_how_long_names_and_connects_took() {
        let latency = |bucket: usize, sum_us| {
            let mut counts = vec![0; LatencyReport::BOUNDS_MS.len() + 1];
            counts[bucket] = 2;
            LatencyReport { counts, sum_us }
        };
        let traffic = TrafficReport {
            enclave: "signer".parse().unwrap(),
            direction: Direction::Egress,
            endpoint: "db.example.com:5432".to_owned(),
            open: 3,
            total: 7,
            bytes_to_enclave: 100,
            bytes_from_enclave: 200,
            failed: [("dns".to_owned(), 1), ("limit".to_owned(), 2)].into(),
            status_classes: BTreeMap::default(),
            connects: latency(1, 3000),
            answers: LatencyReport::default(),
            upstream: UpstreamReport::default(),
        };
        let name = NameReport {
            hostname: "db.example.com".to_owned(),
            addresses: 2,
            answer_age_seconds: Some(90),
            stale: true,
            failed: 4,
            error: None,
            lookups: latency(11, 8_000_000),
        };
        let report = ProxyReport { traffic: vec![traffic], names: vec![name], ..ProxyReport::default() };
        let metrics = Metrics::new().unwrap();
        metrics.inner.state.set(&Status::default(), Some(&report));
        let text = metrics.render(None).unwrap();
        let of = "direction=\"egress\",enclave=\"signer\",endpoint=\"db.example.com:5432\"";
        let (to, name) = ("enclave=\"signer\",endpoint=\"db.example.com:5432\"", "hostname=\"db.example.com\"");
        let lines = [
            format!("enclaved_traffic_open{{direction=\"egress\",{to}}} 3"),
            format!("enclaved_traffic_total{{{of}}} 7"),
            format!("enclaved_traffic_bytes_total{{{of},to=\"enclave\"}} 100"),
            format!("enclaved_traffic_bytes_total{{{of},to=\"peer\"}} 200"),
            format!("enclaved_traffic_failures_total{{{of},reason=\"dns\"}} 1"),
            format!("enclaved_traffic_failures_total{{{of},reason=\"limit\"}} 2"),
            format!("enclaved_egress_connect_duration_seconds_bucket{{{to},le=\"0.001\"}} 0"),
            format!("enclaved_egress_connect_duration_seconds_bucket{{{to},le=\"0.002\"}} 2"),
            format!("enclaved_egress_connect_duration_seconds_sum{{{to}}} 0.003"),
            format!("enclaved_dns_answer_age_seconds{{{name}}} 90"),
            format!("enclaved_dns_answer_stale{{{name}}} 1"),
            format!("enclaved_dns_addresses{{{name}}} 2"),
            format!("enclaved_dns_failures_total{{{name}}} 4"),
            format!("enclaved_dns_lookup_duration_seconds_bucket{{{name},le=\"10\"}} 2"),
            format!("enclaved_dns_lookup_duration_seconds_count{{{name}}} 2"),
        ];
        for line in lines {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn the_connections_into_an_enclave_are_shown_by_state_and_how_they_are_used() {
        let upstream = UpstreamReport {
            active: 3,
            idle: 5,
            connects: 9,
            connects_failed: [("connect".to_owned(), 1)].into(),
            reused: 70,
            repeated: 2,
        };
        let traffic = TrafficReport {
            enclave: "signer".parse().unwrap(),
            direction: Direction::Https,
            endpoint: "https".to_owned(),
            open: 0,
            total: 0,
            bytes_to_enclave: 0,
            bytes_from_enclave: 0,
            failed: BTreeMap::new(),
            status_classes: BTreeMap::new(),
            connects: LatencyReport::default(),
            answers: LatencyReport::default(),
            upstream,
        };
        let report = ProxyReport { traffic: vec![traffic], access_log_dropped: 4, ..ProxyReport::default() };
        let metrics = Metrics::new().unwrap();
        metrics.inner.state.set(&Status::default(), Some(&report));
        let text = metrics.render(None).unwrap();
        for line in [
            "enclaved_upstream_connections{enclave=\"signer\",state=\"active\"} 3",
            "enclaved_upstream_connections{enclave=\"signer\",state=\"idle\"} 5",
            "enclaved_upstream_connects_total{enclave=\"signer\"} 9",
            "enclaved_upstream_connect_failures_total{enclave=\"signer\",reason=\"connect\"} 1",
            "enclaved_upstream_reused_total{enclave=\"signer\"} 70",
            "enclaved_upstream_repeats_total{enclave=\"signer\"} 2",
            "enclaved_access_log_dropped_total 4",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
    }
}
