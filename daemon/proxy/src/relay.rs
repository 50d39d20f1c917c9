//! The relay: carries bytes both ways between an enclave and another end, whatever the two are. One for all uses. Who may
//! be connected with whom is decided before; what the bytes mean is nobody's business here.
//!
//! An end that closes has its own direction ended and nothing else; one that is reset has the other reset. A relay ends when it
//! was silent for too long, sooner if one direction is closed, and if it is configured so when it is too old. While one end
//! takes nothing, nothing is read from the other, so its reset is not seen there: it is asked for every few seconds.
//!
//! An idle relay holds no buffer. Bytes are read into a buffer of the thread and written on in the same turn; only what the
//! other side does not take is kept, in a buffer of the relay's own, and until that is gone nothing more is read: a slow
//! reader stalls its sender and costs one buffer at most ([`Limits::relay_buffer`]).

use crate::counters::{Failure, Meter};
use crate::limits::Limits;
use crate::vsock::Stream;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// How often an end that nothing is read from, because the other takes nothing, is asked whether it still lives.
const LOOK: Duration = Duration::from_secs(5);

/// Chunks that are carried before other tasks get their turn.
const TURNS: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How a relay ended, other than by both ends closing.
#[derive(Debug)]
pub(crate) enum Broken {
    /// An end was reset, or failed: bytes may be lost both ways.
    Reset { end: End, source: io::Error },
    /// An end closed without taking all that was sent to it. What it had sent itself was carried to its end.
    Deaf { end: End, source: io::Error },
    /// Silence for longer than the limits allow.
    Idle,
    /// It is as old as the limits allow.
    TooOld,
}

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Enclave,
    Other,
}

impl Broken {
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Reset { .. } | Self::Deaf { .. } => Failure::Reset,
            Self::Idle => Failure::Idle,
            Self::TooOld => Failure::Lifetime,
        }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset { end: End::Enclave, source } => write!(f, "the enclave's end failed: {source}"),
            Self::Reset { end: End::Other, source } => write!(f, "the other end failed: {source}"),
            Self::Deaf { end, source } => {
                let end = if *end == End::Enclave { "the enclave's end" } else { "the other end" };
                write!(f, "{end} closed before it had taken everything: {source}")
            }
            Self::Idle => f.pad("nothing was said for too long"),
            Self::TooOld => f.pad("it was open for as long as it may be"),
        }
    }
}

/// What an end of a relay is.
pub(crate) trait Carried: AsyncRead + AsyncWrite + Unpin {
    /// How the connection failed, if it did and nobody was told yet. Only asked while nothing is read from it: whoever reads
    /// is told by that.
    fn failed(&self) -> Option<io::Error> {
        None
    }
}

impl Carried for TcpStream {
    fn failed(&self) -> Option<io::Error> {
        self.take_error().ok().flatten()
    }
}

impl Carried for Stream {
    fn failed(&self) -> Option<io::Error> {
        match self {
            Self::Kernel(stream) => sockopt::socket_error(stream).ok()?.err().map(io::Error::from),
            Self::Hybrid(stream) => stream.take_error().ok().flatten(),
        }
    }
}

/// A connection that changed its protocol, which hides the socket.
impl Carried for TokioIo<Upgraded> {}

/// Carries bytes until both ends have closed. Closing in one direction is passed on and leaves the other open. Counts each
/// byte when it has been handed over. The caller drops both ends when this returns.
pub(crate) async fn relay<E, O>(
    enclave: &mut E,
    other: &mut O,
    meter: &impl Meter,
    limits: &Limits,
) -> Result<(), Broken>
where
    E: Carried,
    O: Carried,
{
    let mut inwards = Direction::new(End::Other);
    let mut outwards = Direction::new(End::Enclave);
    let mut quiet = Quiet::new(limits);
    poll_fn(|cx| {
        let (inwards_state, outwards_state) = SCRATCH.with_borrow_mut(|scratch| {
            if scratch.len() != limits.relay_buffer {
                scratch.resize(limits.relay_buffer, 0);
            }
            let inwards = inwards.poll(cx, other, enclave, scratch, &|bytes| meter.inwards(bytes));
            let outwards = outwards.poll(cx, enclave, other, scratch, &|bytes| meter.outwards(bytes));
            (inwards, outwards)
        });
        let (inwards_done, outwards_done) = (settled(inwards_state)?, settled(outwards_state)?);
        if inwards_done && outwards_done {
            return Poll::Ready(inwards.take_broken().or(outwards.take_broken()).map_or(Ok(()), Err));
        }
        let moved = std::mem::take(&mut inwards.moved) | std::mem::take(&mut outwards.moved);
        let (inwards_stall, outwards_stall) = (inwards.stalled(), outwards.stalled());
        loop {
            match ready!(quiet.poll(cx, moved, inwards_done || outwards_done, inwards_stall || outwards_stall)) {
                Due::Look => {
                    if inwards_stall && let Some(source) = other.failed() {
                        return Poll::Ready(Err(Broken::Reset { end: End::Other, source }));
                    }
                    if outwards_stall && let Some(source) = enclave.failed() {
                        return Poll::Ready(Err(Broken::Reset { end: End::Enclave, source }));
                    }
                }
                Due::Idle => return Poll::Ready(Err(Broken::Idle)),
                Due::TooOld => return Poll::Ready(Err(Broken::TooOld)),
            }
        }
    })
    .await
}

fn settled(state: Poll<Result<(), Broken>>) -> Result<bool, Broken> {
    match state {
        Poll::Ready(result) => result.map(|()| true),
        Poll::Pending => Ok(false),
    }
}

/// One direction of a relay.
#[derive(Debug)]
struct Direction {
    /// The end that is read from.
    from: End,
    state: State,
    /// Read and not yet written: `held[sent..]`.
    held: Vec<u8>,
    sent: usize,
    /// Bytes were written that the writer may still hold.
    unflushed: bool,
    /// Bytes were carried since the relay last looked.
    moved: bool,
    /// The writer failed: nothing more can go this way, and the other way says how it ends.
    broken: Option<Broken>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Closing,
    Done,
}

impl Direction {
    fn new(from: End) -> Self {
        Self { from, state: State::Open, held: Vec::new(), sent: 0, unflushed: false, moved: false, broken: None }
    }

    fn take_broken(&mut self) -> Option<Broken> {
        self.broken.take()
    }

    /// Ready when nothing more will go this way; an error ends the whole relay.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        scratch: &mut [u8],
        carried: &dyn Fn(u64),
    ) -> Poll<Result<(), Broken>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..TURNS {
            if self.sent < self.held.len() {
                match Pin::new(&mut *writer).poll_write(cx, &self.held[self.sent..]) {
                    Poll::Pending => return self.flush(cx, writer),
                    Poll::Ready(Ok(written)) if written > 0 => {
                        self.sent += written;
                        self.wrote(written, carried);
                    }
                    Poll::Ready(result) => return self.break_off(result),
                }
                continue;
            }
            match self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Closing => {
                    // Flushes first. An end that is already gone cannot be closed; its other direction tells.
                    drop(ready!(Pin::new(&mut *writer).poll_shutdown(cx)));
                    self.state = State::Done;
                    self.moved = true;
                }
                State::Open => {
                    let mut buffer = ReadBuf::new(scratch);
                    match Pin::new(&mut *reader).poll_read(cx, &mut buffer) {
                        Poll::Pending => {
                            (self.held, self.sent) = (Vec::new(), 0);
                            return self.flush(cx, writer);
                        }
                        Poll::Ready(Err(source)) => {
                            return Poll::Ready(Err(Broken::Reset { end: self.from, source }));
                        }
                        Poll::Ready(Ok(())) if buffer.filled().is_empty() => self.state = State::Closing,
                        Poll::Ready(Ok(())) => match Pin::new(&mut *writer).poll_write(cx, buffer.filled()) {
                            Poll::Pending => self.hold(buffer.filled()),
                            Poll::Ready(Ok(written)) if written > 0 => {
                                self.wrote(written, carried);
                                self.hold(&buffer.filled()[written..]);
                            }
                            Poll::Ready(result) => return self.break_off(result),
                        },
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The writer did not take all that was read, so nothing more is read.
    fn stalled(&self) -> bool {
        self.sent < self.held.len()
    }

    fn hold(&mut self, rest: &[u8]) {
        self.held.clear();
        self.held.extend_from_slice(rest);
        self.sent = 0;
    }

    fn wrote(&mut self, written: usize, carried: &dyn Fn(u64)) {
        carried(written as u64);
        self.moved = true;
        self.unflushed = true;
    }

    /// Nothing more to write for now.
    fn flush<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, writer: &mut W) -> Poll<Result<(), Broken>> {
        if self.unflushed {
            match ready!(Pin::new(writer).poll_flush(cx)) {
                Ok(()) => self.unflushed = false,
                Err(source) => return self.break_off(Err(source)),
            }
        }
        Poll::Pending
    }

    /// The writer takes nothing more. What it has sent before may still be read the other way (a server that answers and
    /// closes without reading the rest of the request), so that direction goes on until it ends by itself.
    fn break_off(&mut self, result: io::Result<usize>) -> Poll<Result<(), Broken>> {
        let end = match self.from {
            End::Enclave => End::Other,
            End::Other => End::Enclave,
        };
        let source = result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
        self.broken = Some(Broken::Deaf { end, source });
        (self.held, self.sent) = (Vec::new(), 0);
        self.state = State::Done;
        Poll::Ready(Ok(()))
    }
}

/// Finds silence and age. The timer is not set again for each byte: when it fires, the last byte's time says whether it is
/// due.
struct Quiet {
    last: Instant,
    ends: Option<Instant>,
    idle: Duration,
    idle_half_closed: Duration,
    /// On the heap, so that a relay can be moved.
    timer: Pin<Box<Sleep>>,
}

/// What is due.
enum Due {
    /// A look at the end that nothing is read from.
    Look,
    Idle,
    TooOld,
}

impl Quiet {
    fn new(limits: &Limits) -> Self {
        let last = Instant::now();
        Self {
            last,
            ends: limits.relay_lifetime.map(|lifetime| last + lifetime),
            idle: limits.relay_idle,
            idle_half_closed: limits.relay_half_closed,
            timer: Box::pin(sleep_until(last + limits.relay_idle)),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, moved: bool, half_closed: bool, stalled: bool) -> Poll<Due> {
        if moved {
            self.last = Instant::now();
        }
        let silent = self.last + if half_closed { self.idle_half_closed } else { self.idle };
        let due = self.ends.map_or(silent, |ends| ends.min(silent));
        let next = |now: Instant| if stalled { due.min(now + LOOK) } else { due };
        // It fires at the latest when something is due; too early does no harm.
        if self.timer.deadline() > due || (stalled && self.timer.deadline() > self.last + LOOK) {
            let next = next(Instant::now());
            if self.timer.deadline() > next {
                self.timer.as_mut().reset(next);
            }
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            self.timer.as_mut().reset(next(now));
            if self.ends.is_some_and(|ends| ends <= now) {
                return Poll::Ready(Due::TooOld);
            } else if silent <= now {
                return Poll::Ready(Due::Idle);
            } else if stalled {
                return Poll::Ready(Due::Look);
            }
        }
    }
}

#[cfg(test)]
mod tests;
