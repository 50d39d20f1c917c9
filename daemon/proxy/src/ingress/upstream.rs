//! HTTP connections into enclaves: made when needed, kept while idle, forgotten when their enclave takes no new requests. How several
//! requests share one is in `http2`.

mod http2;

use super::body::{Answering, ClientFault, Progress, Upload};
use super::tcp::connect_failure;
use crate::counters::{Failure, Live, Traffic, Upstream};
use crate::current::Current;
use crate::seats::Seat;
use crate::shared::Shared;
use crate::vsock::{ConnectError, Transport};
use enclaved_core::id::{Cid, EnclaveName};
use enclaved_core::routes::UpstreamHttp;
use http::{Method, Request, Response};
use http2::Http2;
use hyper::body::{Body, Incoming};
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use std::collections::{BTreeMap, HashMap, HashSet};
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

/// Most that is read ahead of an answer over HTTP/1.1, or of a request's body to be written. (hyper's own bound is 400 KiB.)
const HTTP1_BUFFER: usize = 32 << 10;

/// A port of an enclave, and what it speaks.
type Key = (Cid, u32, UpstreamHttp);

/// A connection.
#[derive(Debug)]
enum Sender {
    /// For one request at a time.
    Http1(http1::SendRequest<Upload>),
    /// For as many as the enclave takes.
    Http2 { shared: Http2, _seat: Option<Seat> },
}

impl Sender {
    fn is_ready(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_ready(),
            Self::Http2 { shared, .. } => shared.is_ready(),
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2 { shared, .. } => shared.is_closed(),
        }
    }

    async fn send(&mut self, request: Request<Upload>) -> Result<Response<Incoming>, TrySendError<Request<Upload>>> {
        match self {
            Self::Http1(sender) => sender.try_send_request(request).await,
            Self::Http2 { shared, .. } => shared.send(request).await,
        }
    }

    /// Whether a request failed because its connection ended, rather than by itself.
    async fn has_ended(&self) -> bool {
        match self {
            Self::Http1(_) => true,
            Self::Http2 { shared, .. } => shared.has_ended().await,
        }
    }

    /// Of one that is kept: whether it carries no request at present.
    fn is_idle(&self) -> bool {
        match self {
            Self::Http1(_) => true,
            Self::Http2 { shared, .. } => shared.taken() == 0,
        }
    }
}

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
    sender: Sender,
    since: Instant,
    /// Whose it is.
    traffic: Arc<Traffic>,
}

/// A connection that is answering a request.
#[derive(Debug)]
pub(crate) struct Lease {
    upstreams: Arc<Upstreams>,
    key: Key,
    sender: Sender,
    traffic: Arc<Traffic>,
    /// It was kept from an earlier request.
    pub(crate) reused: bool,
    /// The request was sent over another one before.
    pub(crate) repeated: bool,
    _answering: Answering,
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
        pool.idle.retain(|(cid, ..), _| same && targets.contains(cid));
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
            idle.retain_mut(|idle| {
                if !idle.sender.is_idle() {
                    idle.since = Instant::now();
                }
                idle.since.elapsed() < keep && !idle.sender.is_closed()
            });
            !idle.is_empty()
        });
    }

    /// How many are kept that carry nothing at present.
    pub(crate) fn idle(&self) -> BTreeMap<EnclaveName, u64> {
        let mut idle = BTreeMap::new();
        for kept in self.lock().idle.values().flatten() {
            if kept.sender.is_idle() && !kept.sender.is_closed() {
                *idle.entry(kept.traffic.key().enclave.clone()).or_default() += 1;
            }
        }
        idle
    }

    /// Sends a request and waits for the head of its response.
    ///
    /// A kept connection may have been closed by the enclave just now. A request that was not sent for that reason is sent
    /// over a new one; one that may have been is, if repeating it does no harm and it has no body. Once: what an enclave
    /// hangs up on every time is not to be run as often as there are connections.
    pub(crate) async fn send(
        self: &Arc<Self>,
        live: &Arc<Live>,
        traffic: &Arc<Traffic>,
        (port, speaks): (u32, UpstreamHttp),
        mut request: Request<Upload>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        let cut = live.cut.child_token();
        let key = (live.cid, port, speaks);
        let progress = request.body().progress();
        let mut again = false;
        loop {
            let kept = if again { None } else { self.take(key) };
            let (mut sender, reused) = match kept {
                Some(sender) => (sender, true),
                None => tokio::select! {
                    // Cancel-safe: a token stays cancelled.
                    () = cut.cancelled() => return Err(SendError::Cut),
                    // Dropped only where the request is given up.
                    sender = self.connect(live, traffic, key) => (sender?, false),
                },
            };
            if reused {
                traffic.upstream.reused();
            }
            let spare = if reused { repeatable(&request) } else { None };
            let answer = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => return Err(SendError::Cut),
                // Dropped only where the request is given up.
                answer = self.patient(sender.send(request), progress.as_deref()) => answer?,
            };
            let mut error = match answer {
                Ok(response) => {
                    let (traffic, _answering) = (traffic.clone(), Answering::new(progress));
                    let lease =
                        Lease { upstreams: self.clone(), key, sender, traffic, reused, repeated: again, _answering };
                    return Ok((response, lease));
                }
                Err(error) => error,
            };
            if let Some(fault) = progress.as_ref().and_then(|progress| progress.fault()) {
                return Err(SendError::Client(fault));
            }
            request = match (error.take_message(), spare) {
                (Some(unsent), _) if reused => unsent,
                (None, Some(spare)) if sender.has_ended().await => spare,
                _ => return Err(SendError::Http(error.into_error())),
            };
            traffic.upstream.repeated();
            again = true;
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

    /// Opens a connection, and counts how that went.
    async fn connect(&self, live: &Live, traffic: &Arc<Traffic>, key: Key) -> Result<Sender, SendError> {
        traffic.upstream.connects();
        let opened = self.open(live, traffic, key).await;
        if let Err(error) = &opened {
            let failure = match error {
                SendError::Connect(error) => connect_failure(error),
                _ => Failure::BadAnswer,
            };
            traffic.upstream.connect_failed(failure);
        }
        opened
    }

    async fn open(&self, live: &Live, traffic: &Arc<Traffic>, key: Key) -> Result<Sender, SendError> {
        let (_, port, speaks) = key;
        let stream = TokioIo::new(self.transport.get().connect(live.cid, port).await?);
        let open = Upstream::open(traffic);
        if speaks == UpstreamHttp::H2c {
            let shared = Http2::begin(&self.shared, live, stream, open).await.map_err(SendError::Http)?;
            let seat = shared.seat(u64::MAX);
            // Those that come from now on share it, as many as there is room for, until it is closed.
            self.put(key, Sender::Http2 { shared: shared.clone(), _seat: None }, traffic.clone());
            return Ok(Sender::Http2 { shared, _seat: seat });
        }
        let head_bytes = self.shared.limits.request_head_bytes;
        let mut builder = http1::Builder::new();
        builder.max_header_size(head_bytes).max_buf_size(HTTP1_BUFFER.max(head_bytes));
        let handshake = builder.handshake(stream);
        let (sender, connection) = handshake.await.map_err(SendError::Http)?;
        let cut = live.cut.child_token();
        self.shared.spawn(async move {
            tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => {}
                // Dropping it closes the connection, which is what cutting means. Its errors reach whoever sent a request.
                result = connection.with_upgrades() => drop(result),
            }
            drop(open);
        });
        Ok(Sender::Http1(sender))
    }

    fn take(&self, key: Key) -> Option<Sender> {
        let mut pool = self.lock();
        let idle = pool.idle.get_mut(&key)?;
        if key.2 == UpstreamHttp::H2c {
            idle.retain(|idle| !idle.sender.is_closed());
            // The first that has room, so that the others become idle.
            for idle in idle.iter_mut() {
                if let Sender::Http2 { shared, .. } = &idle.sender
                    && let Some(seat) = shared.seat(shared.room())
                {
                    idle.since = Instant::now();
                    return Some(Sender::Http2 { shared: shared.clone(), _seat: Some(seat) });
                }
            }
            if idle.len() < self.shared.limits.pool_connections {
                return None;
            }
            // There are as many as there may be: it has to wait for one.
            let shared = idle.iter().filter_map(|idle| match &idle.sender {
                Sender::Http2 { shared, .. } => Some(shared),
                Sender::Http1(_) => None,
            });
            let shared = shared.min_by_key(|shared| shared.taken())?.clone();
            let seat = shared.seat(u64::MAX);
            return Some(Sender::Http2 { shared, _seat: seat });
        }
        let usable = |idle: &Idle| idle.sender.is_ready() && idle.since.elapsed() < self.shared.limits.pool_idle;
        std::iter::from_fn(|| idle.pop()).find(usable).map(|idle| idle.sender)
    }

    fn put(&self, key: Key, sender: Sender, traffic: Arc<Traffic>) {
        let mut pool = self.lock();
        if pool.targets.contains(&key.0) {
            let idle = pool.idle.entry(key).or_default();
            if idle.len() < self.shared.limits.pool_connections {
                idle.push(Idle { sender, since: Instant::now(), traffic });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        lock(&self.pool)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lease {
    /// The response was read to its end: the connection may serve another request.
    pub(crate) fn give_back(self) {
        let Sender::Http1(mut sender) = self.sender else { return };
        if sender.is_ready() {
            self.upstreams.put(self.key, Sender::Http1(sender), self.traffic);
        } else if !sender.is_closed() {
            // Its own task has yet to find that all is done; or the request's body is not through, and never will be.
            let shared = self.upstreams.shared.clone();
            shared.spawn(async move {
                if let Ok(Ok(())) = timeout(SETTLE, sender.ready()).await {
                    self.upstreams.put(self.key, Sender::Http1(sender), self.traffic);
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
