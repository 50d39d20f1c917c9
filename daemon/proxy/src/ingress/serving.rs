//! HTTP on a connection whose TLS ends here: HTTP/1.1 or HTTP/2 as agreed in the handshake, until the client goes, is idle for
//! too long, or the proxy ends. Where a request goes is decided in `forward`.

use super::client::ClientStream;
use super::client_ca::Checked;
use super::forward::{Connection, forward};
use super::https::{Admitted, Https};
use super::in_flight::{InFlight, Tracked};
use super::tls;
use crate::shared::Shared;
use http::HeaderValue;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// Most headers of one request.
const REQUEST_HEADERS: usize = 100;
/// HTTP/1.1: most that is read ahead of a request's body. (hyper's own bound is 400 KiB for each connection.)
const HTTP1_BUFFER: usize = 64 << 10;
/// HTTP/2: most that a client may send ahead, for one request and for all of a connection.
const HTTP2_STREAM_WINDOW: u32 = 256 << 10;
const HTTP2_CONNECTION_WINDOW: u32 = 1 << 20;
/// HTTP/2: requests that the client took back before they were looked at; with more the connection ends (CVE-2023-44487).
const HTTP2_TAKEN_BACK: usize = 20;
/// HTTP/2: requests that were ended for the client's breach of the protocol; with more the connection ends.
const HTTP2_BREACHES: usize = 1024;
/// HTTP/2: most of a response that waits to be sent.
const HTTP2_SEND_BUFFER: usize = 256 << 10;

impl Https {
    /// Serves a connection to its end.
    pub(crate) async fn serve_http(
        self: Arc<Self>,
        stream: TlsStream<ClientStream<TcpStream>>,
        source: SocketAddr,
        (checked, admitted): (Option<Checked>, Admitted),
    ) {
        let session = stream.get_ref().1;
        let http2 = session.alpn_protocol() == Some(b"h2");
        let client = HeaderValue::from_str(&source.ip().to_canonical().to_string());
        let replaced = checked.as_ref().map(|checked| checked.replaced.child_token());
        let connection = Arc::new(Connection {
            https: self.clone(),
            source,
            client: client.unwrap_or(HeaderValue::from_static("unknown")),
            trusted: self.rules.get().trusts(source.ip()),
            checked,
            server_name: session.server_name().map(str::to_owned),
            tls: session.protocol_version().and_then(tls::version_name),
            admitted,
        });
        let limits = &self.shared.limits;
        let in_flight = InFlight::new();
        let requests = in_flight.clone();
        // Has a permit once anything was asked.
        let asked = Arc::new(Notify::new());
        let asks = asked.clone();
        let service = service_fn(move |request| {
            let (connection, guard) = (connection.clone(), requests.begin());
            asks.notify_one();
            async move {
                let response = forward(&connection, request).await;
                let tracked = if http2 { Tracked::watched } else { Tracked::plain };
                Ok::<_, Infallible>(response.map(|body| tracked(body, guard)))
            }
        });
        let stream = TokioIo::new(stream);
        if http2 {
            let served = http2::Builder::new(Spawner(self.shared.clone()))
                .timer(TokioTimer::new())
                .max_concurrent_streams(limits.http2_streams)
                .max_header_list_size(u32::try_from(limits.request_head_bytes).unwrap_or(u32::MAX))
                .max_pending_accept_reset_streams(HTTP2_TAKEN_BACK)
                .max_local_error_reset_streams(HTTP2_BREACHES)
                .initial_stream_window_size(HTTP2_STREAM_WINDOW)
                .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
                .max_send_buf_size(HTTP2_SEND_BUFFER)
                .keep_alive_interval(limits.client_stall)
                .serve_connection(stream, service);
            // HTTP/2 has no timeout of its own for the next request.
            let idle = || in_flight.none_for(limits.request_head);
            tokio::select! {
                // Dropped only where the other has ended, which it does not.
                () = self.until_closing(served, |served| served.graceful_shutdown(), idle, replaced, &asked) => {}
                // Cancel-safe, as it says.
                () = in_flight.end_stalled(limits.client_stall) => {}
            }
        } else {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.request_head)
                .max_header_size(limits.request_head_bytes)
                .max_headers(REQUEST_HEADERS)
                .max_buf_size(HTTP1_BUFFER)
                .serve_connection(stream, service)
                .with_upgrades();
            let idle = std::future::pending::<()>;
            self.until_closing(served, |served| served.graceful_shutdown(), idle, replaced, &asked).await;
        }
    }

    /// Serves a connection to its end; once the proxy is closing, it is idle, or what its client was let in by counts no more,
    /// only requests in flight. When the proxy is closing, the first request of all may be on its way: `asked` has a permit once it has
    /// come.
    async fn until_closing<C, I>(
        &self,
        served: C,
        close: impl FnOnce(Pin<&mut C>),
        idle: impl Fn() -> I,
        replaced: Option<CancellationToken>,
        asked: &Notify,
    ) where
        C: Future<Output = hyper::Result<()>>,
        I: Future<Output = ()>,
    {
        let (closing, cut) = (self.shared.closing.child_token(), self.shared.cut.child_token());
        let replaced = async {
            match &replaced {
                Some(token) => token.cancelled().await,
                None => std::future::pending().await,
            }
        };
        let mut served = pin!(served);
        let done = |result: hyper::Result<()>| {
            if let Err(error) = result {
                tracing::debug!(%error, "an HTTPS connection broke off");
            }
        };
        let awaits_first = tokio::select! {
            // Cancel-safe: it is pinned outside and polled on below.
            result = served.as_mut() => return done(result),
            // Cancel-safe: a token stays cancelled.
            () = cut.cancelled() => return,
            // Cancel-safe: a token stays cancelled.
            () = closing.cancelled() => true,
            // Cancel-safe: a token stays cancelled.
            () = replaced => false,
            // Cancel-safe: nothing is lost with it.
            () = idle() => false,
        };
        if awaits_first {
            tokio::select! {
                // Cancel-safe: it is pinned outside and polled on below.
                result = served.as_mut() => return done(result),
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => return,
                // Cancel-safe: nobody else takes the permit.
                () = asked.notified() => {}
                // Cancel-safe: nothing is lost with a timer.
                () = sleep(self.shared.limits.first_request) => {}
            }
        }
        close(served.as_mut());
        tokio::select! {
            // Dropped only where the connection is given up.
            result = served => done(result),
            // Cancel-safe: a token stays cancelled.
            () = cut.cancelled() => {}
            // Cancel-safe: nothing is lost with it. A client that does not take part in closing (one that has not even
            // begun to speak HTTP/2) is left alone.
            () = async { sleep(self.shared.limits.handshake).await; idle().await } => {}
        }
    }
}

/// Runs the tasks of an HTTP/2 connection as all others are run.
#[derive(Debug, Clone)]
pub(crate) struct Spawner(pub(crate) Arc<Shared>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Spawner {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}
