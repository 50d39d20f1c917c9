//! The inside of a stand-in enclave: a process that runs an [`Application`] behind a hybrid vsock socket.
//!
//! It is started by the background process of the stand-in nitro-cli, which writes the application to its standard input
//! and then keeps that open: when it closes, the enclave ends. It listens on `<dir>/<cid>.sock`; a peer says
//! `CONNECT <port>\n`, reads `OK <n>\n`, and is then connected. It calls out by connecting to `<dir>/<cid>.sock_<port>`.
//!
//! The HTTP application answers:
//!
//! | request | answer |
//! |---|---|
//! | `GET /health` | 200 once ready, 503 before |
//! | `GET /stream?bytes=n` | n zero bytes |
//! | `POST /echo` | the request's body, as it comes |
//! | `GET /slow?ms=n` | 200 after n milliseconds |
//! | `GET /attestation` | JSON in place of an attestation document |
//! | `POST /die` | none: the enclave ends |
//! | `POST /freeze` | 200, and from then on no connection is served: a hanging guest |
//! | `* /via/<vsock port>/<path>` | calls out through that port, listed or not |
//! | anything else | calls out through the first listed endpoint, if there is one; [`Answer`] as JSON |

use crate::application::{Application, Egress, MAX_LEN};
use crate::http::{Body, Failed, full, zeros};
use crate::nitro_cli::{Environment, settle};
use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, getppid, pidfd_open};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream, unix::pipe};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// What nitro-cli's background process waits for.
const HEARTBEAT: u8 = 0xB7;
/// Longest request line of the vsock convention: `CONNECT 4294967295\n`.
const MAX_CONNECT: u64 = 32;
/// The limits of a call outward.
const EGRESS_LIMIT: Duration = Duration::from_secs(10);
const EGRESS_MAX_BODY: usize = 1024 * 1024;

/// Which enclave this is.
#[derive(Debug, Clone, clap::Parser)]
pub struct Options {
    /// Folder of the vsock sockets
    #[arg(long)]
    pub dir: PathBuf,
    /// The enclave's CID
    #[arg(long)]
    pub cid: u32,
    /// The enclave's name, as nitro-cli knows it
    #[arg(long)]
    pub name: String,
}

impl Options {
    fn socket(&self) -> PathBuf {
        self.dir.join(format!("{}.sock", self.cid))
    }
}

/// What the application says of a request that it has no other answer for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The application's label: which image this is.
    pub label: String,
    /// The enclave's name.
    pub enclave: String,
    /// The enclave's CID.
    pub cid: u32,
    /// The process that is the enclave.
    pub pid: u32,
    /// The request's method.
    pub method: String,
    /// The request's path and query.
    pub path: String,
    /// The request's headers; of repeated ones the last.
    pub headers: BTreeMap<String, String>,
    /// What calling out gave, where it called out.
    pub upstream: Option<Upstream>,
}

/// What calling out gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upstream {
    /// An answer.
    Answered {
        /// Its status.
        status: u16,
        /// Its body, as text.
        body: String,
    },
    /// None, and why.
    Failed(String),
}

/// The whole program: returns when its life line is closed or the application ends.
///
/// # Errors
/// When it was told no application, or its socket can't be bound.
pub fn main(options: &Options) -> anyhow::Result<()> {
    let environment = Environment::of_this_process();
    // An earlier enclave with this CID may still be ending, and is about to remove its socket.
    let state = environment.state.as_ref().unwrap_or(&options.dir);
    let lock = File::create(state.join(format!("cid-{}.lock", options.cid))).context("creating the CID's lock")?;
    lock.lock().context("waiting for an earlier enclave to end")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let owner = getppid().and_then(|owner| pidfd_open(owner, PidfdFlags::empty()).ok());
    let end = runtime.block_on(run(options));
    if let (Ok(End::Abandoned), Some(owner)) = (&end, owner) {
        // It is ending; what it held is free only when it has ended.
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        let _ignored = poll(&mut [PollFd::new(&owner, PollFlags::IN)], Some(&limit));
    }
    // The background process may have been killed: then nobody else gives back what it held.
    let _ignored = std::fs::remove_file(options.socket());
    let _ignored = settle(&environment);
    end.map(|_| ())
}

/// Why the enclave ends.
enum End {
    /// Its background process has closed the life line, or died.
    Abandoned,
    /// The application was told to.
    FromInside,
}

async fn run(options: &Options) -> anyhow::Result<End> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    let mut life = BufReader::new(pipe::Receiver::from_owned_fd(stdin).context("standard input is not a pipe")?);
    let mut line = Vec::new();
    (&mut life).take(MAX_LEN as u64 + 1).read_until(b'\n', &mut line).await?;
    let application = Application::from_ramdisk(&line).context("no application on standard input")?;
    eprintln!("booting {} as {} with CID {}", application.label, options.name, options.cid);
    sleep(Duration::from_millis(application.boot_millis)).await;

    let path = options.socket();
    // Left behind by one that was killed together with its background process.
    let _ignored = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("binding {}", path.display()))?;
    rustix::io::write(std::io::stdout(), &[HEARTBEAT]).context("sending the heartbeat")?;
    eprintln!("booted");
    let guest = Arc::new(Guest {
        options: options.clone(),
        ready_at: Instant::now() + Duration::from_millis(application.ready_millis),
        application,
        frozen: AtomicBool::new(false),
        dying: Notify::new(),
        accepted: AtomicU64::new(0),
    });
    let mut rest = Vec::new();
    tokio::select! {
        // Not called again after it was cancelled.
        read = life.read_to_end(&mut rest) => { read?; Ok(End::Abandoned) }
        // Not called again.
        () = guest.dying.notified() => Ok(End::FromInside),
        // Not called again.
        failed = accept(&guest, listener) => failed.map(|()| End::FromInside),
    }
}

/// What all connections share.
struct Guest {
    options: Options,
    application: Application,
    ready_at: Instant,
    frozen: AtomicBool,
    dying: Notify,
    accepted: AtomicU64,
}

async fn accept(guest: &Arc<Guest>, listener: UnixListener) -> anyhow::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        let guest = Arc::clone(guest);
        connections.spawn(async move {
            if let Err(error) = connection(&guest, stream).await {
                eprintln!("connection: {error:#}");
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

/// One connection from the host: to which port, and then the service there. A port that nobody serves is closed without
/// an answer, as the convention has it.
async fn connection(guest: &Arc<Guest>, stream: UnixStream) -> anyhow::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    (&mut stream).take(MAX_CONNECT).read_line(&mut line).await?;
    let port: u32 = line
        .strip_prefix("CONNECT ")
        .and_then(|port| port.strip_suffix('\n'))
        .and_then(|port| port.parse().ok())
        .ok_or_else(|| anyhow!("{:?} in place of CONNECT", line.escape_debug()))?;
    if guest.frozen.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
    let is_http = guest.application.http_ports.contains(&port);
    if !is_http && !guest.application.echo_ports.contains(&port) {
        bail!("nothing listens on port {port}");
    }
    let number = guest.accepted.fetch_add(1, Ordering::Relaxed);
    stream.get_mut().write_all(format!("OK {}\n", 1024 + number % 1_000_000).as_bytes()).await?;
    if is_http {
        serve_http(guest, stream).await
    } else {
        let (mut reader, mut writer) = tokio::io::split(stream);
        tokio::io::copy(&mut reader, &mut writer).await?;
        writer.shutdown().await?;
        Ok(())
    }
}

async fn serve_http(guest: &Arc<Guest>, stream: BufReader<UnixStream>) -> anyhow::Result<()> {
    let service = service_fn(|request| {
        let guest = Arc::clone(guest);
        async move { Ok::<_, Infallible>(respond(&guest, request).await) }
    });
    auto::Builder::new(TokioExecutor::new())
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await
        .map_err(|error| anyhow!(error))
}

fn query<T: std::str::FromStr>(uri: &Uri, name: &str) -> Option<T> {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, _)| *key == name).find_map(|(_, value)| value.parse().ok())
}

fn status(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response
}

fn json(status_code: StatusCode, value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut response = status(status_code, bytes);
            response
                .headers_mut()
                .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => status(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn respond(guest: &Guest, request: Request<Incoming>) -> Response<Body> {
    if guest.frozen.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
    let uri = request.uri().clone();
    match (request.method(), uri.path()) {
        (&Method::GET, "/health") if Instant::now() < guest.ready_at => {
            status(StatusCode::SERVICE_UNAVAILABLE, "starting\n")
        }
        (&Method::GET, "/health") => status(StatusCode::OK, "ok\n"),
        (&Method::GET, "/stream") => match query(&uri, "bytes") {
            Some(count) => Response::new(zeros(count)),
            None => status(StatusCode::BAD_REQUEST, "/stream?bytes=n\n"),
        },
        (&Method::POST, "/echo") => {
            Response::new(request.into_body().map_err(|error| -> Failed { Box::new(error) }).boxed())
        }
        (&Method::GET, "/slow") => match query(&uri, "ms") {
            Some(millis) => {
                sleep(Duration::from_millis(millis)).await;
                status(StatusCode::OK, "done\n")
            }
            None => status(StatusCode::BAD_REQUEST, "/slow?ms=n\n"),
        },
        (&Method::GET, "/attestation") => {
            let nonce: Option<String> = query(&uri, "nonce");
            json(
                StatusCode::OK,
                &serde_json::json!({ "simulated": true, "label": guest.application.label, "nonce": nonce }),
            )
        }
        (&Method::POST, "/die") => {
            guest.dying.notify_one();
            std::future::pending().await
        }
        (&Method::POST, "/freeze") => {
            guest.frozen.store(true, Ordering::Relaxed);
            status(StatusCode::OK, "freezing\n")
        }
        _ => answer(guest, &request).await,
    }
}

/// The general answer, with what calling out gave; 502 where that failed.
async fn answer(guest: &Guest, request: &Request<Incoming>) -> Response<Body> {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let (endpoint, upstream_path) = match path.strip_prefix("/via/").and_then(|rest| rest.split_once('/')) {
        Some((port, rest)) => {
            let Ok(vsock_port) = port.parse() else { return status(StatusCode::BAD_REQUEST, "/via/<port>/<path>\n") };
            let listed = guest.application.egress.iter().find(|endpoint| endpoint.vsock_port == vsock_port);
            let endpoint = listed.cloned().unwrap_or_else(|| Egress { vsock_port, host: "unlisted".to_owned() });
            (Some(endpoint), format!("/{rest}"))
        }
        None => (guest.application.egress.first().cloned(), path.to_owned()),
    };
    let upstream = match endpoint {
        Some(endpoint) => Some(match call_out(guest, &endpoint, &upstream_path).await {
            Ok((status, body)) => Upstream::Answered { status, body },
            Err(error) => Upstream::Failed(format!("{error:#}")),
        }),
        None => None,
    };
    let code = if matches!(upstream, Some(Upstream::Failed(_))) { StatusCode::BAD_GATEWAY } else { StatusCode::OK };
    let headers = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let answer = Answer {
        label: guest.application.label.clone(),
        enclave: guest.options.name.clone(),
        cid: guest.options.cid,
        pid: std::process::id(),
        method: request.method().to_string(),
        path: path.to_owned(),
        headers,
        upstream,
    };
    json(code, &answer)
}

/// A GET to an endpoint, through the host.
async fn call_out(guest: &Guest, endpoint: &Egress, path: &str) -> anyhow::Result<(u16, String)> {
    let socket = format!("{}_{}", guest.options.socket().display(), endpoint.vsock_port);
    let call = async {
        let stream = UnixStream::connect(Path::new(&socket)).await.context("connecting to the host")?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let request = Request::get(path).header(hyper::header::HOST, &endpoint.host).body(Empty::new())?;
        let response = sender.send_request(request).await.context("sending the request")?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), EGRESS_MAX_BODY).collect().await.map_err(|e| anyhow!(e))?;
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    timeout(EGRESS_LIMIT, call).await.context("no answer in time")?
}
