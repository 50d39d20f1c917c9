//! What the control process answers: the admin API on a Unix socket (status, plan, stop, start, fetch, reload), and `/metrics`,
//! `/live` and `/ready` on a TCP listener. HTTP/1.1 both.
//!
//! Who may use the admin API is decided by the mode of its socket (0660, group of the process). The TCP listener answers
//! anybody and changes nothing.

use crate::metrics::Metrics;
use crate::reconciler::{Command, Report};
use bytes::Bytes;
use enclaved_core::desired::ImageRequest;
use enclaved_core::id::EnclaveName;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// A client has this long for the head of its request.
const HEAD: Duration = Duration::from_secs(10);
/// A connection, with all that is asked on it, takes no longer than this.
const CONNECTION: Duration = Duration::from_secs(60);
/// The longest body of a request, in bytes: an image's address and a few sets of digests.
const MAX_BODY: usize = 64 << 10;
/// Connections at a time on each listener; more wait.
const CONNECTIONS: usize = 128;

/// A request to read the configuration again. Answers with its fingerprint, or why it is refused.
pub type Reload = oneshot::Sender<Result<String, String>>;

/// What the answers are made from.
#[derive(Debug, Clone)]
pub struct Source {
    /// The last report of the loop.
    pub reports: watch::Receiver<Option<Arc<Report>>>,
    /// To the loop.
    pub commands: mpsc::Sender<Command>,
    /// To whoever reads configurations.
    pub reloads: mpsc::Sender<Reload>,
    /// All metrics.
    pub metrics: Metrics,
}

/// The admin socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("opening the admin socket {path}")]
pub struct AdminError {
    path: PathBuf,
    source: std::io::Error,
}

/// Opens the admin socket. A socket file left by a former process is replaced: whoever calls this is the only control
/// process (it holds the lock).
///
/// # Errors
/// It could not be opened.
pub fn open(socket: &Path) -> Result<UnixListener, AdminError> {
    let failed = |source| AdminError { path: socket.to_owned(), source };
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o660);
    std::fs::set_permissions(socket, mode).map_err(failed)?;
    Ok(listener)
}

/// Answers on the admin socket until `stop`.
pub async fn serve_socket(listener: UnixListener, source: Source, stop: CancellationToken) {
    serve(listener, Surface::Admin, source, stop).await;
}

/// Answers `/metrics`, `/live` and `/ready` until `stop`.
pub async fn serve_metrics(listener: TcpListener, source: Source, stop: CancellationToken) {
    serve(listener, Surface::Public, source, stop).await;
}

/// What both kinds of listeners can do. Cancel-safe.
trait Accept: Send + Sync {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    fn next(&self) -> impl Future<Output = std::io::Result<Self::Stream>> + Send;
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    async fn next(&self) -> std::io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    async fn next(&self) -> std::io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

async fn serve(listener: impl Accept, surface: Surface, source: Source, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // Accepting is cancel-safe.
            accepted = listener.next(), if connections.len() < CONNECTIONS => match accepted {
                Ok(stream) => {
                    let source = source.clone();
                    connections.spawn(async move {
                        // A client that does not read its answers shall not hold its place for ever.
                        if tokio::time::timeout(CONNECTION, connection(stream, surface, source)).await.is_err() {
                            debug!(?surface, "a client took too long");
                        }
                    });
                }
                Err(error) => pause(surface, &error).await,
            },
            // Reaping loses nothing: nobody asks what became of a connection.
            Some(_) = connections.join_next() => {}
            // A plain wait.
            () = stop.cancelled() => return,
        }
    }
}

/// Out of descriptors, mostly: accepting again at once would only burn CPU.
async fn pause(surface: Surface, error: &std::io::Error) {
    warn!(?surface, "accepting a connection failed, going on in a second: {error}");
    tokio::time::sleep(Duration::from_secs(1)).await;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Surface {
    Admin,
    Public,
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, surface: Surface, source: Source) {
    let service = service_fn(move |request| {
        let source = source.clone();
        async move { Ok::<_, Infallible>(answer(request, surface, &source).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(16 << 10);
    http.keep_alive(surface == Surface::Admin);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        debug!("a client of the admin API: {error}");
    }
}

async fn answer(request: Request<Incoming>, surface: Surface, source: &Source) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let path = path.as_str();
    let read = matches!(*request.method(), Method::GET | Method::HEAD);
    match path {
        "/metrics" | "/live" | "/ready" if !read => problem(StatusCode::METHOD_NOT_ALLOWED, "use GET"),
        "/metrics" => metrics(source),
        "/live" => live(source),
        "/ready" => ready(source),
        "/v1/status" | "/v1/plan" if surface == Surface::Admin && read => state(path, source),
        "/v1/fetch" if surface == Surface::Admin && *request.method() == Method::POST => fetch(request, source).await,
        "/v1/reload" if surface == Surface::Admin && *request.method() == Method::POST => reload(source).await,
        _ if surface == Surface::Admin && *request.method() == Method::POST => command(path, source).await,
        _ => problem(StatusCode::NOT_FOUND, "there is nothing of that name"),
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    respond(status, "application/json", value.to_string())
}

fn problem(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    json(status, &json!({ "error": text }))
}

fn metrics(source: &Source) -> Response<Full<Bytes>> {
    let report = source.reports.borrow().clone();
    match source.metrics.render(report.as_deref()) {
        Ok(text) => respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// The loop turns.
fn live(source: &Source) -> Response<Full<Bytes>> {
    let turning = source.reports.borrow().as_ref().map(|report| report.turning());
    match turning {
        Some(Ok(())) => respond(StatusCode::OK, "text/plain", "live\n"),
        Some(Err(age)) => {
            let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
            let text = format!("the reconcile loop has not turned for {age}\n");
            respond(StatusCode::SERVICE_UNAVAILABLE, "text/plain", text)
        }
        None => respond(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the reconcile loop has not turned yet\n"),
    }
}

/// Every wanted enclave serves.
fn ready(source: &Source) -> Response<Full<Bytes>> {
    let Some(report) = source.reports.borrow().clone() else {
        return respond(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the host was not looked at yet\n");
    };
    let status = &report.status;
    if status.ready {
        return respond(StatusCode::OK, "text/plain", "ready\n");
    }
    let mut text = String::from("not ready\n");
    for enclave in status.enclaves.iter().filter(|enclave| enclave.wanted && !enclave.ready) {
        let why = enclave.waiting_for.as_deref().unwrap_or("");
        text.push_str(&format!("{}: {} {why}\n", enclave.name, enclave.state.as_str()));
    }
    for problem in &status.problems {
        text.push_str(&format!("{}: {}\n", problem.about, problem.failure));
    }
    respond(StatusCode::SERVICE_UNAVAILABLE, "text/plain", text)
}

fn state(path: &str, source: &Source) -> Response<Full<Bytes>> {
    let Some(report) = source.reports.borrow().clone() else {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "the host was not looked at yet; try again in a moment");
    };
    let status = &report.status;
    if path == "/v1/plan" {
        let mut waits: serde_json::Map<_, _> = status
            .enclaves
            .iter()
            .filter_map(|enclave| Some((enclave.name.to_string(), enclave.waiting_for.clone()?.into())))
            .collect();
        // No enclave's name has a space in it.
        let pool = status.host.pool.as_ref().and_then(|pool| pool.waiting_for.clone());
        waits.extend(pool.map(|why| ("the enclave pool".to_owned(), why.into())));
        return json(StatusCode::OK, &json!({ "steps": status.steps, "waits": waits }));
    }
    match serde_json::to_vec(status) {
        Ok(body) => respond(StatusCode::OK, "application/json", body),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &format!("writing the status: {error}")),
    }
}

async fn reload(source: &Source) -> Response<Full<Bytes>> {
    let (sender, answer) = oneshot::channel();
    if source.reloads.send(sender).await.is_err() {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "enclaved is ending");
    }
    match answer.await {
        Ok(Ok(revision)) => json(StatusCode::OK, &json!({ "revision": revision })),
        Ok(Err(reason)) => problem(StatusCode::UNPROCESSABLE_ENTITY, &reason),
        Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "enclaved is ending"),
    }
}

/// What is asked of `/v1/fetch`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FetchRequest {
    /// Which image, and what it must be.
    pub image: ImageRequest,
    /// Begin, also if it was fetched just now; otherwise only what became of it is told.
    pub begin: bool,
}

/// `/v1/fetch`: fetches an image into the cache. Answers at once; whoever wants to know what became of it asks again.
async fn fetch(request: Request<Incoming>, source: &Source) -> Response<Full<Bytes>> {
    let body = match tokio::time::timeout(HEAD, Limited::new(request.into_body(), MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return problem(StatusCode::BAD_REQUEST, &format!("reading the request: {error}")),
        Err(_) => return problem(StatusCode::REQUEST_TIMEOUT, "the request did not come in time"),
    };
    let FetchRequest { image, begin } = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &format!("the request is not understood: {error}")),
    };
    let (reply, answer) = oneshot::channel();
    if source.commands.send(Command::Fetch { request: Box::new(image), begin, reply }).await.is_err() {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "enclaved is ending");
    }
    match answer.await {
        Ok(Ok(answer)) => match serde_json::to_value(&answer) {
            Ok(answer) => json(StatusCode::OK, &answer),
            Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &format!("writing the answer: {error}")),
        },
        Ok(Err(reason)) => problem(StatusCode::UNPROCESSABLE_ENTITY, &reason),
        Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "enclaved is ending"),
    }
}

/// `/v1/enclaves/NAME/stop`, `/v1/enclaves/NAME/start` and `/v1/enclaves/NAME/adopt`.
async fn command(path: &str, source: &Source) -> Response<Full<Bytes>> {
    let parts = path.strip_prefix("/v1/enclaves/").and_then(|rest| rest.split_once('/'));
    let (name, verb) = match parts {
        Some((name, verb @ ("stop" | "start" | "adopt"))) => (name, verb),
        Some(_) | None => return problem(StatusCode::NOT_FOUND, "there is nothing of that name"),
    };
    let name = match name.parse::<EnclaveName>() {
        Ok(name) => name,
        Err(error) => return problem(StatusCode::NOT_FOUND, &error.to_string()),
    };
    let (sender, answer) = oneshot::channel();
    let command = match verb {
        "stop" => Command::Hold(name, sender),
        "start" => Command::Release(name, sender),
        _ => Command::Accept(name, sender),
    };
    if source.commands.send(command).await.is_err() {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "enclaved is ending");
    }
    match answer.await {
        Ok(Ok(())) => json(StatusCode::OK, &json!({})),
        Ok(Err(reason)) => problem(StatusCode::UNPROCESSABLE_ENTITY, &reason),
        Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "enclaved is ending"),
    }
}
