//! An HTTP/2 connection into an enclave, which requests share: as many as the enclave takes, and none takes from another.

use super::super::body::Upload;
use super::super::serving::Spawner;
use super::lock;
use crate::counters::{Live, Upstream};
use crate::seats::{Seat, Seats};
use crate::shared::Shared;
use crate::vsock::Stream;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http2::{Builder, Connection, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Silence of a connection with requests in flight after which the enclave is asked whether it is there.
const PING: Duration = Duration::from_secs(30);
/// Requests that share a connection, at most.
const STREAMS: u32 = 100;
/// Most that an enclave may send ahead, for one answer and for all of a connection: a client that does not read its answers
/// takes nothing from those of others.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// How long a connection whose request failed may take to be found at its end.
const ENDING: Duration = Duration::from_millis(200);

/// A connection that requests share.
#[derive(Debug, Clone)]
pub(super) struct Http2 {
    sender: SendRequest<Upload>,
    /// The requests that have it.
    seats: Seats,
    /// Asked how many the enclave allows. Its own task owns it.
    connection: Weak<Mutex<Connection<TokioIo<Stream>, Upload, Spawner>>>,
    /// Cancelled when the connection has ended.
    ended: CancellationToken,
}

impl Http2 {
    /// Begins to speak HTTP/2, which the enclave is known to understand.
    pub(super) async fn begin(
        shared: &Arc<Shared>,
        live: &Live,
        stream: TokioIo<Stream>,
        open: Upstream,
    ) -> hyper::Result<Self> {
        let head_bytes = shared.limits.request_head_bytes;
        let handshake = Builder::new(Spawner(shared.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(head_bytes).unwrap_or(u32::MAX))
            .initial_max_send_streams(1)
            .keep_alive_interval(PING)
            .handshake(stream);
        let (sender, connection) = handshake.await?;
        let cut = live.cut.child_token();
        let ended = CancellationToken::new();
        let end = ended.clone().drop_guard();
        let connection = Arc::new(Mutex::new(connection));
        let begun = Self { sender, seats: Seats::default(), connection: Arc::downgrade(&connection), ended };
        shared.spawn(async move {
            let connection = std::future::poll_fn(move |cx| Pin::new(&mut *lock(&connection)).poll(cx));
            tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => {}
                // Dropping it closes the connection, which is what cutting means. Its errors reach whoever sent a request.
                result = connection => drop(result),
            }
            drop((end, open));
        });
        Ok(begun)
    }

    /// How many requests may have it at a time. Until the enclave has said how many it allows, it is one.
    pub(super) fn room(&self) -> u64 {
        let connection = self.connection.upgrade();
        let allowed = connection.map_or(1, |connection| lock(&connection).current_max_send_streams());
        u64::try_from(allowed).unwrap_or(u64::MAX).clamp(1, STREAMS.into())
    }

    /// A place for a request, unless so many have one.
    pub(super) fn seat(&self, room: u64) -> Option<Seat> {
        self.seats.take(room)
    }

    /// How many requests have it.
    pub(super) fn taken(&self) -> u64 {
        self.seats.taken()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    pub(super) async fn send(
        &mut self,
        request: Request<Upload>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Upload>>> {
        self.sender.try_send_request(request).await
    }

    /// Whether it has ended, which its own task may have yet to find out.
    pub(super) async fn has_ended(&self) -> bool {
        timeout(ENDING, self.ended.cancelled()).await.is_ok()
    }
}
