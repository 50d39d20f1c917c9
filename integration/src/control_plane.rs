//! The control plane: takes status reports at any path, keeps them for tests to look at, and misbehaves on demand.

use crate::http::{Body, BreakOff, Server, full, zeros};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::timeout;

/// The longest report that is taken, in bytes.
const MAX_REPORT: usize = 4 * 1024 * 1024;
/// How many reports are kept: the last ones.
const MAX_RECORD: usize = 1000;

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlPlaneFault {
    /// Every connection breaks off.
    Down,
    /// This status in place of 200; the report is not kept.
    Status(u16),
    /// No answer; the report is not kept.
    Hang,
    /// 200, and an answer that is no JSON.
    Garbage,
    /// 200, and an answer of so many bytes.
    Huge(u64),
}

/// A report that was taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// POST or PUT.
    pub method: String,
    /// Where it was sent.
    pub path: String,
    /// The Authorization header, where there was one.
    pub authorization: Option<String>,
    /// The report.
    pub body: Value,
    /// When it came.
    pub at: SystemTime,
}

#[derive(Debug)]
struct Shared {
    reports: Mutex<VecDeque<Report>>,
    refused: Mutex<u64>,
    fault: Mutex<Option<ControlPlaneFault>>,
    count: watch::Sender<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A record is as good after a panic as before it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    server: Server,
    shared: Arc<Shared>,
}

impl ControlPlane {
    /// Starts it on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            reports: Mutex::default(),
            refused: Mutex::default(),
            fault: Mutex::default(),
            count: watch::Sender::new(0),
        });
        let of_handler = Arc::clone(&shared);
        let server = Server::start(move |request| respond(Arc::clone(&of_handler), request)).await?;
        Ok(Self { server, shared })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Switches a fault on, or all off.
    pub fn set_fault(&self, fault: Option<ControlPlaneFault>) {
        *lock(&self.shared.fault) = fault;
    }

    /// The reports, the oldest first.
    pub fn reports(&self) -> Vec<Report> {
        lock(&self.shared.reports).iter().cloned().collect()
    }

    /// The last report.
    pub fn latest(&self) -> Option<Report> {
        lock(&self.shared.reports).back().cloned()
    }

    /// Requests that were no reports: another method, no JSON, too long.
    pub fn refused(&self) -> u64 {
        *lock(&self.shared.refused)
    }

    /// The first report, of those that there are and those that come in time, that fulfils the condition.
    pub async fn report_where(&self, time: Duration, condition: impl Fn(&Value) -> bool) -> Option<Report> {
        let mut count = self.shared.count.subscribe();
        let look = async {
            loop {
                count.borrow_and_update();
                if let Some(report) = lock(&self.shared.reports).iter().find(|report| condition(&report.body)) {
                    return Some(report.clone());
                }
                // The sender lives as long as this handle.
                count.changed().await.ok()?;
            }
        };
        timeout(time, look).await.ok().flatten()
    }
}

fn status(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

async fn respond(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, BreakOff> {
    let fault = *lock(&shared.fault);
    match fault {
        Some(ControlPlaneFault::Down) => return Err(BreakOff),
        Some(ControlPlaneFault::Hang) => std::future::pending().await,
        Some(ControlPlaneFault::Status(code)) => {
            return Ok(status(StatusCode::from_u16(code).map_err(|_| BreakOff)?, full("{\"error\":\"simulated\"}")));
        }
        Some(ControlPlaneFault::Garbage | ControlPlaneFault::Huge(_)) | None => {}
    }
    let (parts, body) = request.into_parts();
    let report = match parts.method {
        Method::POST | Method::PUT => Limited::new(body, MAX_REPORT).collect().await.ok(),
        _ => None,
    };
    let body = report.and_then(|body| serde_json::from_slice(&body.to_bytes()).ok());
    let Some(body) = body else {
        *lock(&shared.refused) += 1;
        return Ok(status(StatusCode::BAD_REQUEST, full("a report is a POST or PUT of JSON\n")));
    };
    let authorization = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let report = Report {
        method: parts.method.to_string(),
        path: parts.uri.to_string(),
        authorization: authorization.map(str::to_owned),
        body,
        at: SystemTime::now(),
    };
    {
        let mut reports = lock(&shared.reports);
        if reports.len() == MAX_RECORD {
            reports.pop_front();
        }
        reports.push_back(report);
    }
    shared.count.send_modify(|count| *count += 1);
    Ok(status(
        StatusCode::OK,
        match fault {
            Some(ControlPlaneFault::Garbage) => full("<html>\0\u{fffd} Gateway"),
            Some(ControlPlaneFault::Huge(bytes)) => zeros(bytes),
            _ => full("{}"),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::Full;
    use hyper_util::client::legacy::{Client, connect::HttpConnector};
    use hyper_util::rt::TokioExecutor;

    fn client() -> Client<HttpConnector, Full<Bytes>> {
        Client::builder(TokioExecutor::new()).build_http()
    }

    async fn send(plane: &ControlPlane, method: Method, body: &str) -> Option<(u16, Bytes)> {
        let request = Request::builder().method(method).uri(format!("{}/v1/hosts/i-1/status", plane.url()));
        let request = request.header("authorization", "Bearer x").body(Full::from(body.to_owned())).unwrap();
        let answer = client().request(request).await.ok()?;
        let status = answer.status().as_u16();
        Some((status, answer.into_body().collect().await.unwrap().to_bytes()))
    }

    #[tokio::test]
    async fn a_report_is_kept_with_its_path_and_waited_for() {
        let plane = ControlPlane::start().await.unwrap();
        let waiting = plane.report_where(Duration::from_secs(10), |body| body["state"] == "ready");
        let sending = async {
            assert_eq!(send(&plane, Method::POST, "{\"state\":\"starting\"}").await.unwrap().0, 200);
            assert_eq!(send(&plane, Method::PUT, "{\"state\":\"ready\"}").await.unwrap().0, 200);
        };
        let (report, ()) = tokio::join!(waiting, sending);
        let report = report.unwrap();
        assert_eq!((report.method.as_str(), report.path.as_str()), ("PUT", "/v1/hosts/i-1/status"));
        assert_eq!(report.authorization.as_deref(), Some("Bearer x"));
        assert_eq!(plane.reports().len(), 2);
        assert_eq!(plane.report_where(Duration::ZERO, |body| body["state"] == "gone").await, None);
    }

    #[tokio::test]
    async fn what_is_no_report_is_refused() {
        let plane = ControlPlane::start().await.unwrap();
        assert_eq!(send(&plane, Method::GET, "").await.unwrap().0, 400);
        assert_eq!(send(&plane, Method::POST, "{").await.unwrap().0, 400);
        assert_eq!((plane.refused(), plane.latest()), (2, None));
    }

    #[tokio::test]
    async fn faults_are_what_they_say() {
        let plane = ControlPlane::start().await.unwrap();
        plane.set_fault(Some(ControlPlaneFault::Status(500)));
        assert_eq!(send(&plane, Method::POST, "{}").await.unwrap().0, 500);
        plane.set_fault(Some(ControlPlaneFault::Down));
        assert_eq!(send(&plane, Method::POST, "{}").await, None);
        plane.set_fault(Some(ControlPlaneFault::Hang));
        assert!(timeout(Duration::from_millis(50), send(&plane, Method::POST, "{}")).await.is_err());
        assert_eq!(plane.latest(), None);
        plane.set_fault(Some(ControlPlaneFault::Garbage));
        let (status, body) = send(&plane, Method::POST, "{}").await.unwrap();
        assert!(status == 200 && serde_json::from_slice::<Value>(&body).is_err());
        plane.set_fault(Some(ControlPlaneFault::Huge(10_000_000)));
        assert_eq!(send(&plane, Method::POST, "{}").await.unwrap().1.len(), 10_000_000);
        assert_eq!(plane.reports().len(), 2);
    }
}
