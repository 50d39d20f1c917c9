//! The server in the world outside that an enclave's application reaches through egress.

use crate::http::{Body, BreakOff, Server, full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode, header};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many requests are kept on record.
const MAX_RECORD: usize = 100_000;

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamFault {
    /// Every connection breaks off.
    Down,
    /// This status in place of 200.
    Status(u16),
    /// Every answer takes this long.
    Slow(Duration),
}

/// A request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    /// The method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The Host header.
    pub host: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    visits: Mutex<Vec<Visit>>,
    fault: Mutex<Option<UpstreamFault>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A record is as good after a panic as before it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The running server.
#[derive(Debug)]
pub struct Upstream {
    server: Server,
    shared: Arc<Shared>,
}

impl Upstream {
    /// Starts it on a free port of the loopback interface; it answers every request with this text.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start(answer: &str) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_handler = Arc::clone(&shared);
        let answer: Arc<str> = answer.into();
        let handler = move |request| respond(Arc::clone(&of_handler), Arc::clone(&answer), request);
        Ok(Self { server: Server::start(handler).await?, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The requests so far.
    pub fn visits(&self) -> Vec<Visit> {
        lock(&self.shared.visits).clone()
    }

    /// Switches a fault on, or all off.
    pub fn set_fault(&self, fault: Option<UpstreamFault>) {
        *lock(&self.shared.fault) = fault;
    }
}

async fn respond(
    shared: Arc<Shared>,
    answer: Arc<str>,
    request: Request<Incoming>,
) -> Result<Response<Body>, BreakOff> {
    {
        let mut visits = lock(&shared.visits);
        if visits.len() < MAX_RECORD {
            let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
            visits.push(Visit {
                method: request.method().to_string(),
                path: request.uri().to_string(),
                host: host.map(str::to_owned),
            });
        }
    }
    let mut response = Response::new(full(answer.to_string()));
    let fault = *lock(&shared.fault);
    match fault {
        Some(UpstreamFault::Down) => return Err(BreakOff),
        Some(UpstreamFault::Status(code)) => {
            *response.status_mut() = StatusCode::from_u16(code).map_err(|_| BreakOff)?;
        }
        Some(UpstreamFault::Slow(time)) => tokio::time::sleep(time).await,
        None => {}
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::TokioExecutor;

    async fn get(upstream: &Upstream) -> Option<(u16, Bytes)> {
        let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
        let answer = client.get(format!("http://{}/x?y", upstream.address()).parse().unwrap()).await.ok()?;
        Some((answer.status().as_u16(), answer.into_body().collect().await.unwrap().to_bytes()))
    }

    #[tokio::test]
    async fn it_answers_and_remembers_and_fails_as_told() {
        let upstream = Upstream::start("hello").await.unwrap();
        assert_eq!(get(&upstream).await, Some((200, Bytes::from("hello"))));
        let host = Some(upstream.address().to_string());
        assert_eq!(upstream.visits(), [Visit { method: "GET".into(), path: "/x?y".into(), host }]);
        upstream.set_fault(Some(UpstreamFault::Status(500)));
        assert_eq!(get(&upstream).await.unwrap().0, 500);
        upstream.set_fault(Some(UpstreamFault::Down));
        assert_eq!(get(&upstream).await, None);
        upstream.set_fault(Some(UpstreamFault::Slow(Duration::MAX)));
        assert!(tokio::time::timeout(Duration::from_millis(50), get(&upstream)).await.is_err());
        upstream.set_fault(None);
        assert!(get(&upstream).await.is_some());
    }
}
