//! The requests of one connection that are in flight, each until its answer was taken; and the answers that a client of HTTP/2 takes
//! no more. It may open no window for a stream and be well otherwise, so the connection does not tell, as it does over HTTP/1.1
//! (`client`); and what it does not take holds a place among its enclave's requests.

use super::body::Download;
use crate::seats::Seat;
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Most of an answer that is handed over at once: whoever takes that much in time is slow, and not gone.
const PIECE: usize = 16 << 10;

/// Requests that a client may take back while their enclaves have them, however few others it makes: a page that is left takes back all
/// that it had asked for. With more, a connection ends that takes back more than it lets be answered: each costs its enclave a
/// connection, and its sender a few bytes.
const TAKEN_BACK: u64 = 500;

/// The requests of one connection that are in flight.
#[derive(Debug, Clone)]
pub(super) struct InFlight(Arc<Mutex<Flights>>);

#[derive(Debug)]
struct Flights {
    count: usize,
    last: Instant,
    /// Answers whose taking is watched.
    answers: BTreeMap<u64, Arc<Mutex<Answer>>>,
    next: u64,
    /// Requests so far, and those of them that were taken back before there was an answer.
    begun: u64,
    taken_back: u64,
    /// Cancelled when that is too many.
    too_many_taken_back: CancellationToken,
}

/// An answer, as long as its stream is there.
#[derive(Debug)]
enum Answer {
    OnItsWay(Held),
    /// Not taken. Its enclave is rid of it; its client is not, as what was handed over before waits for it in memory.
    Ended(#[expect(dead_code, reason = "a place is held by being there")] Option<Seat>),
}

/// An answer on its way.
#[derive(Debug)]
struct Held {
    body: Download,
    /// Of a frame that was too large to be handed over at once.
    rest: Option<Bytes>,
    /// Since when the client has not asked for more; `None`: it waits for the enclave.
    since: Option<Instant>,
    _guard: Guard,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl InFlight {
    pub(super) fn new() -> Self {
        let flights = Flights {
            count: 0,
            last: Instant::now(),
            answers: BTreeMap::new(),
            next: 0,
            begun: 0,
            taken_back: 0,
            too_many_taken_back: CancellationToken::new(),
        };
        Self(Arc::new(Mutex::new(flights)))
    }

    pub(super) fn begin(&self) -> Guard {
        let mut flights = self.change(|count| count + 1);
        flights.begun += 1;
        drop(flights);
        Guard { of: self.clone(), answered: false }
    }

    /// Cancelled when the client has taken back too many requests.
    pub(super) fn too_many_taken_back(&self) -> CancellationToken {
        lock(&self.0).too_many_taken_back.clone()
    }

    fn change(&self, change: impl FnOnce(usize) -> usize) -> MutexGuard<'_, Flights> {
        let mut flights = lock(&self.0);
        flights.count = change(flights.count);
        flights.last = Instant::now();
        flights
    }

    /// Returns when there has been none for so long. Cancel-safe.
    pub(super) async fn none_for(&self, limit: Duration) {
        loop {
            let due = {
                let flights = lock(&self.0);
                match flights.count {
                    0 if flights.last.elapsed() >= limit => return,
                    0 => flights.last + limit,
                    _ => Instant::now() + limit,
                }
            };
            sleep_until(due).await;
        }
    }

    /// Ends answers of which nothing was taken for so long; goes on for ever. Their requests are over then, and their streams when the
    /// client asks for more or the connection ends. Cancel-safe.
    pub(super) async fn end_stalled(&self, limit: Duration) {
        loop {
            let answers: Vec<_> = lock(&self.0).answers.values().cloned().collect();
            let now = Instant::now();
            let mut due = now + limit;
            for answer in answers {
                let mut answer = lock(&answer);
                let Answer::OnItsWay(Held { body, since: Some(since), .. }) = &mut *answer else { continue };
                if *since + limit > now {
                    due = due.min(*since + limit);
                    continue;
                }
                let seat = body.not_taken();
                let ended = std::mem::replace(&mut *answer, Answer::Ended(seat));
                // It ends its request, which is counted under another lock.
                drop(answer);
                drop(ended);
            }
            sleep_until(due).await;
        }
    }
}

/// A request in flight, until this is dropped.
#[derive(Debug)]
pub(super) struct Guard {
    of: InFlight,
    answered: bool,
}

impl Guard {
    /// There is an answer.
    pub(super) fn answered(mut self) -> Self {
        self.answered = true;
        self
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut flights = self.of.change(|count| count.saturating_sub(1));
        flights.taken_back += u64::from(!self.answered);
        if flights.taken_back > TAKEN_BACK && flights.taken_back > flights.begun / 2 {
            flights.too_many_taken_back.cancel();
        }
    }
}

/// Why an answer breaks off.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("the enclave's answer broke off")]
    Enclave(#[source] hyper::Error),
    #[error("the client did not take the answer in time")]
    NotTaken,
}

/// An answer's body, which keeps its request in flight.
#[derive(Debug)]
pub(super) enum Tracked {
    Plain { body: Download, _guard: Guard },
    Watched(Watched),
}

/// One whose taking is watched.
#[derive(Debug)]
pub(super) struct Watched {
    number: u64,
    of: InFlight,
    answer: Arc<Mutex<Answer>>,
}

impl Tracked {
    pub(super) fn plain(body: Download, guard: Guard) -> Self {
        Self::Plain { body, _guard: guard }
    }

    /// One that [`InFlight::end_stalled`] ends.
    pub(super) fn watched(body: Download, guard: Guard) -> Self {
        let of = guard.of.clone();
        let held = Held { body, rest: None, since: Some(Instant::now()), _guard: guard };
        let answer = Arc::new(Mutex::new(Answer::OnItsWay(held)));
        let mut flights = lock(&of.0);
        let number = flights.next;
        flights.next += 1;
        flights.answers.insert(number, answer.clone());
        drop(flights);
        Self::Watched(Watched { number, of, answer })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let forgotten = lock(&self.of.0).answers.remove(&self.number);
        if let Answer::OnItsWay(Held { body, rest: Some(rest), .. }) = &mut *lock(&self.answer) {
            body.left_by_its_client(rest.len() as u64);
        }
        // Under no lock: the request's end is counted under the same.
        drop(forgotten);
    }
}

impl Held {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        self.since = None;
        let mut data = match self.rest.take() {
            Some(rest) => rest,
            None => match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(AnswerError::Enclave(error)))),
                None => return Poll::Ready(None),
            },
        };
        if data.len() > PIECE {
            self.rest = Some(data.split_off(PIECE));
        }
        self.since = Some(Instant::now());
        Poll::Ready(Some(Ok(Frame::data(data))))
    }
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        match self.get_mut() {
            Self::Plain { body, .. } => {
                Pin::new(body).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(AnswerError::Enclave)))
            }
            Self::Watched(watched) => match &mut *lock(&watched.answer) {
                Answer::OnItsWay(held) => held.poll(cx),
                Answer::Ended(_) => Poll::Ready(Some(Err(AnswerError::NotTaken))),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Plain { body, .. } => body.is_end_stream(),
            Self::Watched(watched) => match &*lock(&watched.answer) {
                Answer::OnItsWay(held) => held.rest.is_none() && held.body.is_end_stream(),
                Answer::Ended(_) => false,
            },
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Plain { body, .. } => body.size_hint(),
            Self::Watched(watched) => match &*lock(&watched.answer) {
                Answer::OnItsWay(Held { body, rest: None, .. }) => body.size_hint(),
                // Asked for before the first frame alone.
                Answer::OnItsWay(_) | Answer::Ended(_) => SizeHint::default(),
            },
        }
    }
}
