//! An answer's body on its way: damaged by a fault, slowed down with all the others, counted, and cut where something is
//! to happen at that moment.

use super::faults::{Moment, S3Fault};
use super::{Controls, lock};
use crate::http::{Body, BreakOff, Failed, PARTING};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until};

/// The size of the pieces in which a slow answer comes.
const SLOW_PIECE: usize = 16 * 1024;

/// The rate of the whole server.
#[derive(Debug, Default)]
pub(super) struct Rate(Mutex<Limit>);

#[derive(Debug, Default)]
struct Limit {
    bytes_per_second: Option<u64>,
    /// When all that was let through so far is through.
    free: Option<Instant>,
}

impl Rate {
    pub(super) fn set(&self, bytes_per_second: Option<u64>) {
        *lock(&self.0) = Limit { bytes_per_second, free: None };
    }

    /// Until when to wait before more is sent, after so many bytes. None without a limit.
    fn after(&self, bytes: usize) -> Option<Instant> {
        let mut limit = lock(&self.0);
        let rate = limit.bytes_per_second?;
        let now = Instant::now();
        let began = limit.free.map_or(now, |free| free.max(now));
        let free = began + time_of(bytes as u64, rate);
        limit.free = Some(free);
        Some(free)
    }

    fn is_limited(&self) -> bool {
        lock(&self.0).bytes_per_second.is_some()
    }
}

fn time_of(bytes: u64, rate: u64) -> Duration {
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate.max(1))
}

/// The body of an answer on its way.
pub(super) struct Outgoing {
    body: Body,
    fault: Option<S3Fault>,
    controls: Controls,
    /// Which ranged GET it answers.
    range: Option<u64>,
    /// How long it is, faults aside.
    total: Option<u64>,
    sent: Arc<AtomicU64>,
    /// When the first piece was sent.
    began: Option<Instant>,
    pause: Option<Pin<Box<Sleep>>>,
    rest: Bytes,
}

impl Outgoing {
    pub(super) fn new(
        body: Body,
        fault: Option<S3Fault>,
        controls: Controls,
        range: Option<u64>,
        sent: Arc<AtomicU64>,
    ) -> Self {
        use hyper::body::Body as _;
        let total = body.size_hint().exact();
        controls.begin_answer();
        Self { body, fault, controls, range, total, sent, began: None, pause: None, rest: Bytes::new() }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// What happens now that so much was sent.
    fn happen(&self) {
        let Some(range) = self.range else { return };
        let sent = self.sent();
        let whole = self.total == Some(sent);
        self.controls.happen(|moment| match moment {
            Moment::Within { range: of, sent: at } => of == range && at <= sent,
            Moment::Answered { range: of } => of == range && whole,
            Moment::Asked(_) => false,
        });
    }

    /// The next piece; nothing, ever, if it hangs.
    fn piece(&mut self) -> Poll<Result<Bytes, Failed>> {
        let sent = self.sent();
        let up_to = |limit: u64, rest: &Bytes| usize::try_from(limit).unwrap_or(usize::MAX).min(rest.len());
        let mut count = self.rest.len();
        if let Some(next) = self.range.and_then(|range| self.controls.next_within(range)).filter(|next| *next > sent) {
            count = up_to(next - sent, &self.rest);
        }
        if self.controls.rate().is_limited() {
            count = count.min(SLOW_PIECE);
        }
        match self.fault {
            Some(S3Fault::BreakOff { after }) if sent >= after => return Poll::Ready(Err(Box::new(BreakOff))),
            Some(S3Fault::HangAfter { after }) if sent >= after => return Poll::Pending,
            Some(S3Fault::BreakOff { after } | S3Fault::HangAfter { after }) => {
                count = count.min(up_to(after - sent, &self.rest));
            }
            Some(S3Fault::Slow { .. }) => count = count.min(SLOW_PIECE),
            _ => {}
        }
        let mut piece = self.rest.split_to(count);
        if matches!(self.fault, Some(S3Fault::BreakOff { after }) if sent + piece.len() as u64 == after) {
            self.pause = Some(Box::pin(sleep_until(Instant::now() + PARTING)));
        }
        match self.fault {
            Some(S3Fault::Slow { bytes_per_second }) => {
                // By what was sent in all, so that timers that are late by a millisecond do not add up.
                let began = *self.began.get_or_insert_with(Instant::now);
                let until = began + time_of(sent + piece.len() as u64, bytes_per_second);
                self.pause = Some(Box::pin(sleep_until(until)));
            }
            Some(S3Fault::Corrupt { at }) => {
                let at = at.checked_sub(sent).and_then(|at| usize::try_from(at).ok());
                if let Some(at) = at.filter(|at| *at < piece.len()) {
                    let mut changed = piece.to_vec();
                    changed[at] ^= 0xff;
                    piece = changed.into();
                }
            }
            _ => {}
        }
        if let Some(until) = self.controls.rate().after(piece.len()) {
            self.pause = Some(Box::pin(sleep_until(until)));
        }
        self.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
        self.happen();
        Poll::Ready(Ok(piece))
    }
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = Failed;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failed>>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        if self.sent() == 0 {
            self.happen();
        }
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
            }
        }
        Poll::Ready(Some(ready!(self.piece()).map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // The announced length stays, whatever the fault: the peer is to notice.
        match self.total {
            Some(total) => SizeHint::with_exact(total.saturating_sub(self.sent())),
            None => SizeHint::new(),
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.controls.end_answer();
    }
}
