//! Bodies on their way through: counted as they pass, never collected.

use super::headers;
use super::upstream::Lease;
use crate::counters::{Open, Traffic};
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

/// A request's body.
#[derive(Debug)]
pub(crate) enum Upload {
    /// There is none.
    Empty,
    /// It comes from the client.
    Stream {
        /// The client's body.
        inner: Incoming,
        /// Whose bytes they are.
        traffic: Arc<Traffic>,
        /// How much the enclave has taken: the sign that it is alive while it does not answer yet.
        taken: Arc<AtomicU64>,
    },
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Stream { inner, traffic, taken } => {
                let mut frame = ready!(Pin::new(inner).poll_frame(cx));
                if let Some(Ok(frame)) = &mut frame {
                    if let Some(data) = frame.data_ref() {
                        let length = data.len() as u64;
                        traffic.to_enclave.fetch_add(length, Relaxed);
                        taken.fetch_add(length, Relaxed);
                    } else if let Some(trailers) = frame.trailers_mut() {
                        headers::trailers_to_enclave(trailers);
                    }
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream { inner, .. } => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream { inner, .. } => inner.size_hint(),
        }
    }
}

/// A response's body.
#[derive(Debug)]
pub(crate) enum Download {
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
    _open: Open,
}

impl Download {
    pub(crate) fn stream(inner: Incoming, traffic: Arc<Traffic>, lease: Lease, open: Open) -> Self {
        Self::Stream(Box::new(Stream { inner, ended: false, traffic, lease: Some(lease), _open: open }))
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Stream(stream) => {
                let frame = ready!(Pin::new(&mut stream.inner).poll_frame(cx));
                match &frame {
                    Some(Ok(frame)) => {
                        let length = frame.data_ref().map_or(0, Bytes::len);
                        stream.traffic.from_enclave.fetch_add(length as u64, Relaxed);
                    }
                    Some(Err(_)) => {}
                    None => stream.ended = true,
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Stream(stream) => stream.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(stream) => stream.inner.size_hint(),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A body of known length is not asked for its end once it is all there.
        if (self.ended || self.inner.is_end_stream())
            && let Some(lease) = self.lease.take()
        {
            lease.give_back();
        }
    }
}
