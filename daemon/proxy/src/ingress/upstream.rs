//! HTTP connections into enclaves: made when needed, kept while idle, forgotten when their enclave takes no new requests.

use super::body::{ClientFault, Progress, Upload};
use crate::counters::Live;
use crate::current::Current;
use crate::shared::Shared;
use crate::vsock::{ConnectError, Transport};
use enclaved_core::id::Cid;
use http::{Method, Request, Response};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a connection may take to be ready for the next request once a response has ended.
const SETTLE: Duration = Duration::from_secs(1);

/// Why an enclave gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the enclave's answer is not HTTP/1.1, or it hung up before it answered")]
    Http(#[source] hyper::Error),
    #[error("the enclave did not answer in time")]
    Silent,
    #[error("the request was not sent whole")]
    Client(#[source] ClientFault),
    #[error("the enclave's generation ended")]
    Cut,
}

/// A port of an enclave.
type Key = (Cid, u32);

#[derive(Debug)]
pub(crate) struct Upstreams {
    shared: Arc<Shared>,
    transport: Current<Transport>,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    idle: HashMap<Key, Vec<Idle>>,
    /// Whose connections are kept.
    targets: HashSet<Cid>,
}

#[derive(Debug)]
struct Idle {
    sender: SendRequest<Upload>,
    since: Instant,
}

/// A connection that is answering a request.
#[derive(Debug)]
pub(crate) struct Lease {
    upstreams: Arc<Upstreams>,
    key: Key,
    sender: SendRequest<Upload>,
}

impl Upstreams {
    pub(crate) fn new(shared: Arc<Shared>, transport: Transport) -> Self {
        Self { shared, transport: Current::new(transport), pool: Mutex::default() }
    }

    /// From now on only connections to these are kept, made in this way.
    pub(crate) fn retarget(&self, transport: Transport, targets: HashSet<Cid>) {
        let same = *self.transport.get() == transport;
        self.transport.set(transport);
        let mut pool = self.lock();
        pool.idle.retain(|(cid, _), _| same && targets.contains(cid));
        pool.targets = targets;
    }

    /// How enclaves are reached now.
    pub(crate) fn transport(&self) -> Arc<Transport> {
        self.transport.get()
    }

    /// Closes idle connections, and from now on each when it becomes idle.
    pub(crate) fn keep_none(&self) {
        let mut pool = self.lock();
        pool.idle.clear();
        pool.targets.clear();
    }

    /// Closes what has been idle for too long.
    pub(crate) fn reap(&self) {
        let keep = self.shared.limits.pool_idle;
        self.lock().idle.retain(|_, idle| {
            idle.retain(|idle| idle.since.elapsed() < keep && !idle.sender.is_closed());
            !idle.is_empty()
        });
    }

    /// Sends a request and waits for the head of its response.
    ///
    /// A kept connection may have been closed by the enclave just now. A request that was not sent for that reason is sent
    /// over another; one that may have been is, if repeating it does no harm and it has no body.
    pub(crate) async fn send(
        self: &Arc<Self>,
        live: &Arc<Live>,
        port: u32,
        mut request: Request<Upload>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        let cut = live.cut.child_token();
        let key = (live.cid, port);
        let progress = request.body().progress();
        loop {
            let (mut sender, reused) = match self.take(key) {
                Some(sender) => (sender, true),
                None => tokio::select! {
                    // Cancel-safe: a token stays cancelled.
                    () = cut.cancelled() => return Err(SendError::Cut),
                    // Dropped only where the request is given up.
                    sender = self.connect(live, port) => (sender?, false),
                },
            };
            let spare = if reused { repeatable(&request) } else { None };
            let answer = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => return Err(SendError::Cut),
                // Dropped only where the request is given up.
                answer = self.patient(sender.try_send_request(request), progress.as_deref()) => answer?,
            };
            let mut error = match answer {
                Ok(response) => return Ok((response, Lease { upstreams: self.clone(), key, sender })),
                Err(error) => error,
            };
            if let Some(fault) = progress.as_ref().and_then(|progress| progress.fault()) {
                return Err(SendError::Client(fault));
            }
            request = match (error.take_message(), spare) {
                (Some(unsent), _) if reused => unsent,
                (None, Some(spare)) => spare,
                _ => return Err(SendError::Http(error.into_error())),
            };
        }
    }

    /// Waits for an answer as long as the enclave gives signs of life.
    async fn patient<T>(&self, answer: impl Future<Output = T>, progress: Option<&Progress>) -> Result<T, SendError> {
        let mut answer = pin!(answer);
        let taken = || progress.map_or(0, Progress::taken);
        loop {
            let before = taken();
            match timeout(self.shared.limits.answer, answer.as_mut()).await {
                Ok(answer) => return Ok(answer),
                Err(_) if taken() == before => return Err(SendError::Silent),
                Err(_) => {}
            }
        }
    }

    async fn connect(&self, live: &Live, port: u32) -> Result<SendRequest<Upload>, SendError> {
        let stream = self.transport.get().connect(live.cid, port).await?;
        let head_bytes = self.shared.limits.request_head_bytes;
        let handshake = http1::Builder::new().max_header_size(head_bytes).handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await.map_err(SendError::Http)?;
        let cut = live.cut.child_token();
        self.shared.spawn(async move {
            tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => {}
                // Dropping it closes the connection, which is what cutting means. Its errors reach whoever sent a request.
                result = connection.with_upgrades() => drop(result),
            }
        });
        Ok(sender)
    }

    fn take(&self, key: Key) -> Option<SendRequest<Upload>> {
        let mut pool = self.lock();
        let idle = pool.idle.get_mut(&key)?;
        let usable = |idle: &Idle| idle.sender.is_ready() && idle.since.elapsed() < self.shared.limits.pool_idle;
        std::iter::from_fn(|| idle.pop()).find(usable).map(|idle| idle.sender)
    }

    fn put(&self, key: Key, sender: SendRequest<Upload>) {
        let mut pool = self.lock();
        if pool.targets.contains(&key.0) {
            let idle = pool.idle.entry(key).or_default();
            if idle.len() < self.shared.limits.pool_connections {
                idle.push(Idle { sender, since: Instant::now() });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// The response was read to its end: the connection may serve another request.
    pub(crate) fn give_back(mut self) {
        if self.sender.is_ready() {
            self.upstreams.put(self.key, self.sender);
        } else if !self.sender.is_closed() {
            // Its own task has yet to find that all is done; or the request's body is not through, and never will be.
            let shared = self.upstreams.shared.clone();
            shared.spawn(async move {
                if let Ok(Ok(())) = timeout(SETTLE, self.sender.ready()).await {
                    self.upstreams.put(self.key, self.sender);
                }
            });
        }
    }
}

/// A copy of a request that may be sent twice: one without a body, whose method is idempotent (RFC 9110, 9.2.2).
fn repeatable(request: &Request<Upload>) -> Option<Request<Upload>> {
    let idempotent = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE];
    if !request.body().is_end_stream() || !idempotent.contains(request.method()) {
        return None;
    }
    let mut copy = Request::new(Upload::Empty);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}
