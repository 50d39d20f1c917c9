//! Bodies on their way through: counted as they pass, never collected.

use super::headers;
use super::upstream::Lease;
use crate::access_log::{Ended, Entry};
use crate::counters::{Failure, Open, Traffic};
use crate::seats::Seat;
use crate::shared::Shared;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, sleep, timeout};

/// How long a client may take to say that a body has ended, all of which is there.
const END: Duration = Duration::from_secs(5);

/// A request's body.
#[derive(Debug)]
pub(crate) enum Upload {
    /// There is none.
    Empty,
    /// It comes from the client.
    Stream(Box<FromClient>),
}

/// A body that comes from the client.
#[derive(Debug)]
pub(crate) struct FromClient {
    /// Until this is dropped.
    inner: Option<Incoming>,
    shared: Arc<Shared>,
    traffic: Arc<Traffic>,
    progress: Arc<Progress>,
    /// Runs while the client is waited for.
    timer: Option<Pin<Box<Sleep>>>,
}

/// How far a request's body has come, for whoever waits for the answer.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Bytes that the enclave has taken: the sign that it is alive while it does not answer yet.
    taken: AtomicU64,
    /// Whether the answer is on its way, which both ends may let go on for as long as they like (gRPC streams).
    answering: AtomicBool,
    fault: OnceLock<ClientFault>,
}

/// The answer to a request is on its way for as long as this exists.
#[derive(Debug)]
pub(crate) struct Answering(Option<Arc<Progress>>);

impl Answering {
    pub(crate) fn new(progress: Option<Arc<Progress>>) -> Self {
        if let Some(progress) = &progress {
            progress.answering.store(true, Relaxed);
        }
        Self(progress)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(progress) = &self.0 {
            progress.answering.store(false, Relaxed);
        }
    }
}

/// Why the rest of a request's body will not come. The client's doing, not the enclave's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClientFault {
    #[error("the client's body is malformed, or it went before the end")]
    Broken,
    #[error("the client was silent for too long within the body")]
    Slow,
}

impl Progress {
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    pub(crate) fn fault(&self) -> Option<ClientFault> {
        self.fault.get().copied()
    }
}

impl Upload {
    pub(crate) fn stream(inner: Incoming, traffic: Arc<Traffic>, shared: Arc<Shared>) -> Self {
        let inner = Some(inner);
        Self::Stream(Box::new(FromClient { inner, shared, traffic, progress: Arc::default(), timer: None }))
    }

    /// `None` where there is no body.
    pub(crate) fn progress(&self) -> Option<Arc<Progress>> {
        match self {
            Self::Empty => None,
            Self::Stream(body) => Some(body.progress.clone()),
        }
    }
}

impl FromClient {
    fn fail(&self, fault: ClientFault) -> Poll<Option<Result<Frame<Bytes>, ClientFault>>> {
        Poll::Ready(Some(Err(*self.progress.fault.get_or_init(|| fault))))
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ClientFault>>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(inner).poll_frame(cx) else {
            // How long the client may say nothing while no answer is on its way.
            let patience = self.shared.limits.request_body;
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(patience)));
            loop {
                ready!(timer.as_mut().poll(cx));
                if !self.progress.answering.load(Relaxed) {
                    return self.fail(ClientFault::Slow);
                }
                // Looked at again later: once the answer has ended, silence counts as before.
                timer.as_mut().reset(Instant::now() + patience);
            }
        };
        self.timer = None;
        let mut frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(_)) => return self.fail(ClientFault::Broken),
            None => return Poll::Ready(None),
        };
        if let Some(data) = frame.data_ref() {
            let length = data.len() as u64;
            self.traffic.to_enclave.fetch_add(length, Relaxed);
            self.progress.taken.fetch_add(length, Relaxed);
        } else if let Some(trailers) = frame.trailers_mut() {
            headers::trailers_to_enclave(trailers);
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = ClientFault;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ClientFault>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Stream(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream(body) => body.inner.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream(body) => body.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint),
        }
    }
}

/// In HTTP/2 the end of a body of known length may come after all of it, in a frame of its own, and after the answer. A body that
/// is dropped before its end has the client told to send no more (RFC 9113, 8.1), which some take for a failed request: this one
/// waits for it.
impl Drop for FromClient {
    fn drop(&mut self) {
        let all_there = |inner: &Incoming| inner.size_hint().exact() == Some(0) && !inner.is_end_stream();
        // Without a runtime nothing is answered any more.
        if let Some(mut inner) = self.inner.take().filter(all_there)
            && Handle::try_current().is_ok()
        {
            let cut = self.shared.cut.child_token();
            self.shared.spawn(async move {
                let end = async { while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut inner).poll_frame(cx)).await {} };
                // Either way the body is dropped, and with it the wait.
                drop(timeout(END, cut.run_until_cancelled(end)).await);
            });
        }
    }
}

/// A response's body.
#[derive(Debug)]
pub(crate) struct Download {
    from: From,
    /// Of the access log. It ends with this.
    entry: Entry,
}

#[derive(Debug)]
enum From {
    /// The proxy's own words.
    Text(Option<Bytes>),
    /// It comes from the enclave.
    Stream(Box<Stream>),
}

/// A body that comes from the enclave.
#[derive(Debug)]
pub(crate) struct Stream {
    inner: Incoming,
    ended: bool,
    traffic: Arc<Traffic>,
    /// The connection it comes over, to be given back when all of it has been read.
    lease: Option<Lease>,
    /// The request is in flight until its response has been handed over.
    open: Open,
    /// Its place among those of its source.
    seat: Option<Seat>,
}

impl Download {
    /// The proxy's own words; none if there are none.
    pub(crate) fn text(text: Option<Bytes>) -> Self {
        Self { from: From::Text(text), entry: Entry::default() }
    }

    pub(crate) fn stream(inner: Incoming, traffic: Arc<Traffic>, lease: Lease, (open, seat): (Open, Seat)) -> Self {
        let stream = Stream { inner, ended: false, traffic, lease: Some(lease), open, seat: Some(seat) };
        Self { from: From::Stream(Box::new(stream)), entry: Entry::default() }
    }

    /// The same, with its line in the access log.
    pub(crate) fn logged(mut self, entry: Entry) -> Self {
        self.entry = entry;
        self
    }

    /// Its client takes no more of it, which ends it. What it takes still is its source's place.
    pub(crate) fn not_taken(&mut self) -> Option<Seat> {
        let From::Stream(stream) = &mut self.from else { return None };
        stream.traffic.fail(Failure::Idle);
        self.entry.not_taken();
        stream.seat.take()
    }

    /// Its client has gone, or wants it no more; so many bytes that were read of it were not even handed over.
    pub(crate) fn left_by_its_client(&mut self, bytes: u64) {
        self.entry.not_written(bytes);
        self.entry.ends(Ended::Client);
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Self { from, entry } = self.get_mut();
        match from {
            From::Text(text) => {
                let text = text.take();
                entry.wrote(text.as_ref().map_or(0, Bytes::len) as u64);
                Poll::Ready(text.map(|text| Ok(Frame::data(text))))
            }
            From::Stream(stream) => {
                let frame = ready!(Pin::new(&mut stream.inner).poll_frame(cx));
                match &frame {
                    Some(Ok(frame)) => {
                        let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                        stream.traffic.from_enclave.fetch_add(length, Relaxed);
                        entry.wrote(length);
                    }
                    Some(Err(_)) => entry.ends(if stream.open.is_cut() { Ended::Cut } else { Ended::Enclave }),
                    None => stream.ended = true,
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.from {
            From::Text(text) => text.is_none(),
            From::Stream(stream) => stream.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.from {
            From::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            From::Stream(stream) => stream.inner.size_hint(),
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let whole = match &self.from {
            From::Text(text) => text.is_none() || self.entry.is_head_only(),
            From::Stream(stream) => stream.is_whole(),
        };
        // Otherwise whoever should have taken it did not.
        if whole {
            self.entry.ends(Ended::Whole);
        }
    }
}

impl Stream {
    /// A body of known length is not asked for its end once it is all there.
    fn is_whole(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_whole()
            && let Some(lease) = self.lease.take()
        {
            lease.give_back();
        }
    }
}
