//! HTTP on a connection whose TLS ends here: HTTP/1.1 or HTTP/2 as agreed in the handshake, until the client goes, is idle for
//! too long, or the proxy ends. Where a request goes is decided in `forward`.

use super::client::ClientStream;
use super::client_ca::Checked;
use super::forward::{Connection, forward};
use super::https::{Admitted, Https};
use super::in_flight::{InFlight, Tracked};
use super::tls;
use crate::counters::Refused;
use crate::shared::Shared;
use http::HeaderValue;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// Most headers of one request.
const REQUEST_HEADERS: usize = 100;
/// HTTP/1.1: most that is read ahead of a request's body, or waits to be sent of an answer, unless headers may be longer. (hyper's own
/// bound is 400 KiB for each connection.)
const HTTP1_BUFFER: usize = 32 << 10;
/// HTTP/2: most that a client may send ahead, for one request and for all of a connection.
const HTTP2_STREAM_WINDOW: u32 = 256 << 10;
const HTTP2_CONNECTION_WINDOW: u32 = 1 << 20;
/// What the windows of as many connections as are open come to: with more of them, the next has smaller ones.
const HTTP2_WINDOWS: u32 = 64 << 20;
/// But none smaller than that of every new connection (RFC 9113, 6.9.2), which is what nginx and haproxy give at all times.
const HTTP2_SMALLEST_WINDOW: u32 = (64 << 10) - 1;
/// HTTP/2: requests that the client took back before they were looked at; with more the connection ends (CVE-2023-44487).
const HTTP2_TAKEN_BACK: usize = 20;
/// HTTP/2: streams that were ended by this side, for the client's breach of the protocol or because what came was for a stream that is
/// over, as with uploads that are answered early; with more the connection ends.
const HTTP2_ENDED_HERE: usize = 1024;
/// HTTP/2: most of a response that waits to be sent. What is on its way the kernel holds; this only has to keep it busy.
const HTTP2_SEND_BUFFER: usize = 32 << 10;

/// The windows of a new connection, for one request and for all, when so many are open.
fn windows(open: u64) -> (u32, u32) {
    let share = u32::try_from(u64::from(HTTP2_WINDOWS) / open.max(1)).unwrap_or(u32::MAX);
    let connection = share.clamp(HTTP2_SMALLEST_WINDOW, HTTP2_CONNECTION_WINDOW);
    (connection.min(HTTP2_STREAM_WINDOW), connection)
}

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
        let (limits, trusted) = (&self.shared.limits, connection.trusted);
        let in_flight = InFlight::new();
        let requests = in_flight.clone();
        // Has a permit once anything was asked.
        let asked = Arc::new(Notify::new());
        let asks = asked.clone();
        let service = service_fn(move |request| {
            let (connection, guard) = (connection.clone(), requests.begin());
            asks.notify_one();
            async move {
                // On the heap: hyper has room for what this future needs for as long as the connection lives.
                let response = Box::pin(forward(&connection, request)).await;
                let guard = guard.answered();
                let tracked = if http2 { Tracked::watched } else { Tracked::plain };
                Ok::<_, Infallible>(response.map(|body| tracked(body, guard)))
            }
        });
        let stream = TokioIo::new(stream);
        if http2 {
            let (stream_window, connection_window) = windows(self.open_connections());
            // What would be refused anyway is not offered.
            let own = if trusted { u32::MAX } else { self.source_limit(&self.rules.get()) };
            let taken_back = in_flight.too_many_taken_back();
            let served = http2::Builder::new(Spawner(self.shared.clone()))
                .timer(TokioTimer::new())
                .max_concurrent_streams(limits.http2_streams.min(own))
                .max_header_list_size(u32::try_from(limits.request_head_bytes).unwrap_or(u32::MAX))
                .max_pending_accept_reset_streams(HTTP2_TAKEN_BACK)
                .max_local_error_reset_streams(HTTP2_ENDED_HERE)
                .initial_stream_window_size(stream_window)
                .initial_connection_window_size(connection_window)
                .max_send_buf_size(HTTP2_SEND_BUFFER)
                .keep_alive_interval(limits.client_stall)
                .serve_connection(stream, service);
            let served = Box::pin(served);
            // A proxy whose clients are many gives up many of their requests, if an enclave stalls.
            let idle = || async {
                tokio::select! {
                    // HTTP/2 has no timeout of its own for the next request. Cancel-safe, as it says.
                    () = in_flight.none_for(limits.request_head) => {}
                    // Cancel-safe: a token stays cancelled.
                    () = taken_back.cancelled(), if !trusted => {}
                }
            };
            tokio::select! {
                // Dropped only where the other has ended, which it does not.
                () = self.until_closing(served, |served| served.graceful_shutdown(), idle, replaced, &asked) => {}
                // Cancel-safe, as it says.
                () = in_flight.end_stalled(limits.client_stall) => {}
            }
            if taken_back.is_cancelled() && !trusted {
                self.shared.counters.refused.count(Refused::TakenBack);
            }
        } else {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.request_head)
                .max_header_size(limits.request_head_bytes)
                .max_headers(REQUEST_HEADERS)
                .max_buf_size(HTTP1_BUFFER.max(limits.request_head_bytes))
                .serve_connection(stream, service)
                .with_upgrades();
            let served = Box::pin(served);
            let idle = std::future::pending::<()>;
            self.until_closing(served, |served| served.graceful_shutdown(), idle, replaced, &asked).await;
        }
    }

    /// Serves a connection to its end; once the proxy is closing, it is idle, or what its client was let in by counts no more,
    /// only requests in flight. When the proxy is closing, the first request of all may be on its way: `asked` has a permit once it has
    /// come.
    async fn until_closing<C, I>(
        &self,
        // On the heap: it would be kept more than once here.
        mut served: Pin<Box<C>>,
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
        let done = |result: hyper::Result<()>| {
            if let Err(error) = result {
                tracing::debug!(%error, "an HTTPS connection broke off");
            }
        };
        let awaits_first = tokio::select! {
            // Cancel-safe: it is polled on below.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_shrink_as_connections_become_many_and_all_of_them_come_to_less_than_a_gibibyte() {
        assert_eq!(windows(1), (256 << 10, 1 << 20));
        assert_eq!(windows(64), (256 << 10, 1 << 20));
        assert_eq!(windows(256), (256 << 10, 256 << 10));
        assert_eq!(windows(8192), (HTTP2_SMALLEST_WINDOW, HTTP2_SMALLEST_WINDOW));
        let limit = u64::from(crate::Limits::default().https_connections);
        let all: u64 = (1..=limit).map(|open| u64::from(windows(open).1)).sum();
        assert!(all < 700 << 20, "{} MiB", all >> 20);
    }
}
