//! Counts of the HTTP connections into enclaves. Which of them are idle at present, whoever keeps them knows.

use super::{Failure, Tally, Traffic};
use enclaved_core::routes::UpstreamReport;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// HTTP connections into an enclave.
#[derive(Debug)]
pub(crate) struct UpstreamCounts {
    open: AtomicU64,
    connects: AtomicU64,
    connects_failed: Tally<Failure>,
    reused: AtomicU64,
    repeated: AtomicU64,
}

impl UpstreamCounts {
    pub(super) fn new() -> Self {
        Self {
            open: AtomicU64::new(0),
            connects: AtomicU64::new(0),
            connects_failed: Tally::new(),
            reused: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
        }
    }

    /// One is to be opened.
    pub(crate) fn connects(&self) {
        self.connects.fetch_add(1, Relaxed);
    }

    /// One could not be opened.
    pub(crate) fn connect_failed(&self, failure: Failure) {
        self.connects_failed.count(failure);
    }

    /// A request goes over one that was kept.
    pub(crate) fn reused(&self) {
        self.reused.fetch_add(1, Relaxed);
    }

    /// A request goes a second time.
    pub(crate) fn repeated(&self) {
        self.repeated.fetch_add(1, Relaxed);
    }

    /// Without those that are idle.
    pub(super) fn report(&self) -> UpstreamReport {
        UpstreamReport {
            active: self.open.load(Relaxed),
            idle: 0,
            connects: self.connects.load(Relaxed),
            connects_failed: self.connects_failed.report(),
            reused: self.reused.load(Relaxed),
            repeated: self.repeated.load(Relaxed),
        }
    }
}

/// An HTTP connection into an enclave, counted as open for as long as this exists.
#[derive(Debug)]
pub(crate) struct Upstream(Arc<Traffic>);

impl Upstream {
    pub(crate) fn open(traffic: &Arc<Traffic>) -> Self {
        traffic.upstream.open.fetch_add(1, Relaxed);
        Self(traffic.clone())
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.0.upstream.open.fetch_sub(1, Relaxed);
    }
}
