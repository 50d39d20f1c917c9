//! Lines that wait for the thread that writes them: so many bytes at most. The lock is held for copying a line, or for taking all of
//! them, never while anything is written.

use super::sink::Sink;
use crate::counters::Counters;
use crate::throttle::Changes;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most that waits, in bytes; as much again may be on its way to the disk. Some 10,000 lines.
const WAITING: usize = 4 << 20;
/// So much is written at once, without waiting for more.
const BATCH: usize = 64 << 10;
/// How long a line may wait for others.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Queue {
    lines: Mutex<Lines>,
    /// There are some, or no more will come.
    ready: Condvar,
    dropped: Arc<AtomicU64>,
    counters: Arc<Counters>,
    state: Mutex<State>,
    /// Whether it was told that lines are lost.
    lost: Changes<bool>,
    /// A write that takes longer is told of.
    slow: Duration,
}

#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    closed: bool,
}

#[derive(Debug, Default)]
struct State {
    trouble: Option<String>,
    /// Since when something has been written.
    writing: Option<Instant>,
}

/// No more lines are taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Closed;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub(super) fn new(dropped: Arc<AtomicU64>, counters: Arc<Counters>, slow: Duration) -> Self {
        let (lines, state, lost) = (Mutex::default(), Mutex::default(), Changes::new(false));
        Self { lines, ready: Condvar::new(), dropped, counters, state, lost, slow }
    }

    /// Takes a line, or drops it if too many wait.
    pub(super) fn push(&self, line: &[u8]) -> Result<(), Closed> {
        let mut lines = lock(&self.lines);
        if lines.closed {
            return Err(Closed);
        }
        let before = lines.bytes.len();
        let after = before + line.len();
        if after > WAITING {
            self.dropped.fetch_add(1, Relaxed);
            return Ok(());
        }
        lines.bytes.extend_from_slice(line);
        drop(lines);
        if before == 0 || (before < BATCH && after >= BATCH) {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// Waits for lines and takes all that there are. False: there are none, and no more will come.
    fn take(&self, batch: &mut Vec<u8>) -> bool {
        batch.clear();
        // What a crowd needed once is not kept for ever.
        batch.shrink_to(2 * BATCH);
        let lines = lock(&self.lines);
        let some = self.ready.wait_while(lines, |lines| lines.bytes.is_empty() && !lines.closed);
        let some = some.unwrap_or_else(PoisonError::into_inner);
        let more = self.ready.wait_timeout_while(some, PAUSE, |lines| lines.bytes.len() < BATCH && !lines.closed);
        let (mut lines, _) = more.unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut lines.bytes, batch);
        !batch.is_empty()
    }

    /// Writes lines until no more will come.
    pub(super) fn write_to(&self, mut sink: Sink) {
        let mut batch = Vec::new();
        while self.take(&mut batch) {
            lock(&self.state).writing = Some(Instant::now());
            let written = sink.write(&batch);
            lock(&self.state).writing = None;
            match written {
                Ok(()) => self.went(None, 0),
                Err(failed) => self.went(Some(failed.error), failed.lost),
            }
        }
    }

    /// Takes no more lines. Those that wait are written.
    pub(super) fn close(&self) {
        lock(&self.lines).closed = true;
        self.ready.notify_one();
    }

    /// Nobody writes any: it takes none.
    pub(super) fn give_up(&self, trouble: String) {
        self.close();
        self.went(Some(trouble), 0);
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.lines).closed
    }

    /// Tells of a write that does not end.
    pub(super) fn look(&self) {
        if let Some(late) = self.late() {
            self.tell(Some(&late));
        }
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.late().or_else(|| lock(&self.state).trouble.clone())
    }

    fn late(&self) -> Option<String> {
        let writing = lock(&self.state).writing?;
        let slow = self.slow;
        (writing.elapsed() > slow).then(|| format!("what it is written to has taken nothing for {slow:?}"))
    }

    fn went(&self, trouble: Option<String>, lost: u64) {
        // In this order: whoever sees that lines are lost can see why.
        let before = std::mem::replace(&mut lock(&self.state).trouble, trouble.clone());
        self.dropped.fetch_add(lost, Release);
        self.tell(trouble.as_deref());
        if before != trouble {
            self.counters.changed();
        }
    }

    fn tell(&self, trouble: Option<&str>) {
        let Some(left_out) = self.lost.now(trouble.is_some()) else { return };
        match trouble {
            Some(error) => tracing::error!(error, left_out, "the access log is not written: its lines are lost"),
            None => tracing::info!(dropped = self.dropped.load(Relaxed), "the access log is written again"),
        }
        self.counters.changed();
    }
}
