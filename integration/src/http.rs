//! What the HTTP servers among the stand-ins share: bodies, and a server that ends with its handle.

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// Why a body broke off.
pub type Failed = Box<dyn std::error::Error + Send + Sync>;
/// A handler's wish to break the connection off without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakOff;

impl std::fmt::Display for BreakOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken off")
    }
}

impl std::error::Error for BreakOff {}

/// Before a connection breaks off midway, what was written to it so far gets this long to leave.
pub(crate) const PARTING: std::time::Duration = std::time::Duration::from_millis(10);

/// The body of every answer.
pub type Body = BoxBody<Bytes, Failed>;

/// A body that is there already.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// So many zero bytes, made as they are sent.
pub fn zeros(count: u64) -> Body {
    Zeros { left: count }.boxed()
}

struct Zeros {
    left: u64,
}

impl hyper::body::Body for Zeros {
    type Data = Bytes;
    type Error = Failed;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failed>>> {
        static CHUNK: [u8; 65536] = [0; 65536];
        let count = usize::try_from(self.left).map_or(CHUNK.len(), |left| left.min(CHUNK.len()));
        self.left -= count as u64;
        let chunk = CHUNK.get(..count).filter(|chunk| !chunk.is_empty());
        Poll::Ready(chunk.map(|chunk| Ok(Frame::data(Bytes::from_static(chunk)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// A server on the loopback interface; it and its connections end when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    scheme: &'static str,
    task: JoinHandle<()>,
}

/// Serves one connection to its end.
async fn serve<H, F>(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, handler: H)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response<Body>, BreakOff>> + Send + 'static,
{
    let serve = auto::Builder::new(TokioExecutor::new());
    // A peer that goes away in the middle is nothing to report.
    let _ignored = serve.serve_connection(TokioIo::new(stream), service_fn(handler)).await;
}

impl Server {
    /// Listens on a free port of 127.0.0.1 and answers every request with the handler. A handler that fails breaks the
    /// connection off.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start<H, F>(handler: H) -> std::io::Result<Self>
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response<Body>, BreakOff>> + Send + 'static,
    {
        Self::run(None, handler).await
    }

    /// The same with TLS. A handshake that fails ends its connection and nothing else.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start_tls<H, F>(tls: TlsAcceptor, handler: H) -> std::io::Result<Self>
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response<Body>, BreakOff>> + Send + 'static,
    {
        Self::run(Some(tls), handler).await
    }

    async fn run<H, F>(tls: Option<TlsAcceptor>, handler: H) -> std::io::Result<Self>
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response<Body>, BreakOff>> + Send + 'static,
    {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            // Dropped with the task, and the connections with it.
            let mut connections = JoinSet::new();
            loop {
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        eprintln!("stand-in server at {address}: {error}");
                        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                        continue;
                    }
                };
                let handler = handler.clone();
                let tls = tls.clone();
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, handler).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, handler).await;
                            }
                        }
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, scheme, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://` or `https://` and the address.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}
