//! Reports the status to the control plane: `PUT <url>/v1/hosts/<id>/status`, JSON as in `config/status.schema.json`,
//! whenever something of note changed and at least once an interval.
//!
//! Only the newest status is ever sent, so a control plane that is away costs no memory. What it answers is not read
//! beyond its status code.

use crate::events::{Event, Events};
use crate::reconciler::Report;
use bytes::Bytes;
use enclaved_core::failure::Failure;
use enclaved_core::plan::restart::Backoff;
use enclaved_core::status::{EnclaveState, Status};
use http::{Method, Request, Uri, header};
use http_body_util::Full;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long the control plane may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Changes that come within this time make one report.
const GATHER: Duration = Duration::from_millis(200);
/// Pauses after failures.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// The reporter could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    /// No trust in anybody.
    #[error("reading the system's certificate authorities, which the control plane's certificate is checked against")]
    Roots(#[source] std::io::Error),
    /// The address is none.
    #[error("\"{url}\" is no address for a control plane")]
    Url {
        /// As configured.
        url: String,
        /// Why.
        source: http::uri::InvalidUri,
    },
}

/// Sends the status.
#[derive(Debug)]
pub struct Reporter {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    target: Uri,
    interval: Duration,
}

impl Reporter {
    /// For the control plane at `url`, as the host of that id.
    ///
    /// # Errors
    /// See [`ControlPlaneError`].
    pub fn new(url: &str, id: &str, interval: Duration) -> Result<Self, ControlPlaneError> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(provider)
            .map_err(ControlPlaneError::Roots)?
            .https_or_http()
            .enable_http1()
            .build();
        let target = format!("{}/v1/hosts/{}/status", url.trim_end_matches('/'), path_segment(id));
        let target = target.parse().map_err(|source| ControlPlaneError::Url { url: url.to_owned(), source })?;
        Ok(Self { client: Client::builder(TokioExecutor::new()).build(connector), target, interval })
    }

    /// Reports until `stop`.
    pub async fn run(self, mut reports: watch::Receiver<Option<Arc<Report>>>, events: Events, stop: CancellationToken) {
        let mut told: Option<Digest> = None;
        let mut due = Instant::now();
        let mut failures: u32 = 0;
        let mut fate: Option<bool> = None;
        tokio::select! {
            // Nothing is consumed by waiting.
            first = reports.wait_for(Option::is_some) => if first.is_err() { return },
            // A plain wait.
            () = stop.cancelled() => return,
        }
        loop {
            tokio::select! {
                // A change that is not seen now is seen by the next call.
                changed = reports.changed() => if changed.is_err() { return },
                // Plain waits.
                () = tokio::time::sleep_until(due) => {}
                () = stop.cancelled() => return,
            }
            let Some(report) = reports.borrow_and_update().clone() else { continue };
            let news = told.as_ref() != Some(&Digest::of(&report.status));
            if Instant::now() < due && (!news || failures > 0) {
                continue;
            }
            if news && failures == 0 {
                // The next changes are mostly close behind.
                tokio::time::sleep(GATHER).await;
            }
            let Some(report) = reports.borrow_and_update().clone() else { continue };
            let outcome = self.send(&report.status).await;
            let same_as_before = fate == Some(outcome.is_ok());
            events.emit(&Event::ControlPlane { failure: outcome.as_ref().err(), same_as_before });
            fate = Some(outcome.is_ok());
            if outcome.is_ok() {
                (failures, told) = (0, Some(Digest::of(&report.status)));
                due = Instant::now() + self.interval;
            } else {
                failures = failures.saturating_add(1);
                due = Instant::now() + RETRY.after(failures);
            }
        }
    }

    async fn send(&self, status: &Status) -> Result<(), Failure> {
        let doing = || format!("reporting to the control plane at {}", self.target);
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let cause = Failure::from_error(error);
            Failure::new(format!("{}: {}", doing(), cause.message))
        };
        let body = serde_json::to_vec(status).map_err(|error| failed(&error))?;
        let request = Request::builder()
            .method(Method::PUT)
            .uri(self.target.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| failed(&error))?;
        let answer = tokio::time::timeout(ANSWER, self.client.request(request)).await;
        match answer {
            Ok(Ok(response)) if response.status().is_success() => Ok(()),
            Ok(Ok(response)) => Err(Failure::new(format!("{}: it answered {}", doing(), response.status()))),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => {
                Err(Failure::new(format!("{}: no answer within {}", doing(), humantime::format_duration(ANSWER))))
            }
        }
    }
}

/// What makes a report worth sending at once.
#[derive(Debug, PartialEq)]
struct Digest {
    ready: bool,
    problems: Vec<String>,
    enclaves: Vec<(String, EnclaveState, u32, u64)>,
}

impl Digest {
    fn of(status: &Status) -> Self {
        let enclaves = status.enclaves.iter().map(|enclave| {
            let generation = enclave.generation.map_or(0, |generation| generation.0);
            (enclave.name.to_string(), enclave.state, generation, enclave.restarts)
        });
        let problems = status.problems.iter().map(|problem| format!("{}: {}", problem.about, problem.failure));
        Self { ready: status.ready, problems: problems.collect(), enclaves: enclaves.collect() }
    }
}

/// An id from elsewhere must not change the path it stands in.
fn path_segment(id: &str) -> String {
    id.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_leave_its_place_in_the_path() {
        assert_eq!(path_segment("i-0123"), "i-0123");
        assert_eq!(path_segment("../x?y#z/ä"), "___x_y_z__");
    }
}
