//! The access log: one line of JSON for each request, and for each raw connection, from clients. Switched on and off by the routes.
//!
//! A request pays for its own line and for handing it over, never for what the line is written to: lines wait in memory
//! (`queue`) for the one thread that writes them (`sink`), so many at most; what finds no place is dropped and counted. What a
//! line says, and what none ever says, is in `entry`.

mod entry;
mod queue;
mod sink;
#[cfg(test)]
mod tests;

pub(crate) use entry::{Ended, Entry, Protocol};

use crate::counters::Counters;
use crate::current::Current;
use enclaved_core::routes::AccessLog;
use queue::{Closed, Queue};
use sink::Sink;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::timeout;

/// Writers that may be at work at a time: those of former places that hang on them, and the present one. With more, lines are
/// dropped until one of them ends.
const WRITERS: usize = 4;
/// A write that takes longer is told of.
const SLOW: Duration = Duration::from_secs(5);

/// Where lines go at present.
#[derive(Debug)]
pub(crate) struct AccessLogs {
    /// Whether anywhere: all that a request looks at while it is off.
    on: AtomicBool,
    queue: Current<Option<Arc<Queue>>>,
    state: Mutex<State>,
    dropped: Arc<AtomicU64>,
    counters: Arc<Counters>,
    /// A write that takes longer is told of.
    slow: Duration,
}

#[derive(Debug, Default)]
struct State {
    to: Option<AccessLog>,
    /// Of each thread that may still write: closed when it has ended.
    writers: Vec<oneshot::Receiver<()>>,
}

impl State {
    fn forget_ended(&mut self) {
        self.writers.retain_mut(|writer| matches!(writer.try_recv(), Err(TryRecvError::Empty)));
    }
}

impl AccessLogs {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self {
            on: AtomicBool::new(false),
            queue: Current::new(None),
            state: Mutex::default(),
            dropped: Arc::default(),
            counters,
            slow: SLOW,
        }
    }

    /// From now on lines go there. What was handed over before is written to where they went before.
    pub(crate) fn set(&self, to: Option<&AccessLog>) {
        let mut state = self.state();
        if state.to.as_ref() == to {
            return;
        }
        state.to = to.cloned();
        self.renew(&mut state);
    }

    /// Looks after what does not go as it should: a disk that hangs is told of, a writer that could not be started is tried
    /// again.
    pub(crate) fn look(&self) {
        let Some(queue) = &*self.queue.get() else { return };
        if queue.is_closed() {
            let mut state = self.state();
            state.forget_ended();
            // Otherwise nothing has changed, and that was told.
            if state.writers.len() < WRITERS {
                self.renew(&mut state);
            }
        } else {
            queue.look();
        }
    }

    /// Has what waits written, and waits for that so long at most. Nothing is logged any more.
    pub(crate) async fn finish(&self, patience: Duration) {
        self.set(None);
        let writers = std::mem::take(&mut self.state().writers);
        let all = async {
            for writer in writers {
                // It never says anything: it is dropped.
                drop(writer.await);
            }
        };
        if timeout(patience, all).await.is_err() {
            tracing::error!("the last lines of the access log could not be written in time");
        }
    }

    fn renew(&self, state: &mut State) {
        state.forget_ended();
        let new = state.to.as_ref().map(|to| {
            let queue = Arc::new(Queue::new(self.dropped.clone(), self.counters.clone(), self.slow));
            match self.start(&queue, to, state.writers.len()) {
                Ok(ended) => state.writers.push(ended),
                Err(trouble) => queue.give_up(trouble),
            }
            queue
        });
        self.on.store(new.is_some(), Relaxed);
        let old = self.queue.get();
        self.queue.set(new);
        // After that: whoever finds it closed finds the new one in its place.
        if let Some(old) = &*old {
            old.close();
        }
    }

    fn start(&self, queue: &Arc<Queue>, to: &AccessLog, writers: usize) -> Result<oneshot::Receiver<()>, String> {
        if writers >= WRITERS {
            return Err(format!("{writers} writers hang on where it was written to before"));
        }
        let (done, ended) = oneshot::channel();
        let (queue, sink) = (queue.clone(), Sink::new(to.clone()));
        // A thread of its own: it ends when the queue is closed and empty, and a process that ends does not wait for it.
        let thread = std::thread::Builder::new().name("access-log".to_owned()).spawn(move || {
            queue.write_to(sink);
            drop(done);
        });
        match thread {
            Ok(_) => Ok(ended),
            Err(error) => Err(format!("a thread for it could not be started: {error}")),
        }
    }

    /// Whether lines are wanted.
    fn is_on(&self) -> bool {
        self.on.load(Relaxed)
    }

    /// Hands a line over, its line feed included.
    fn push(&self, line: &[u8]) {
        // It may be another's turn by now.
        for _ in 0..3 {
            let Some(queue) = &*self.queue.get() else { return };
            let Err(Closed) = queue.push(line) else { return };
        }
        self.dropped.fetch_add(1, Relaxed);
    }

    /// Lines that were lost.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Acquire)
    }

    /// Why lines are lost at present, if they are.
    pub(crate) fn trouble(&self) -> Option<String> {
        (*self.queue.get()).as_ref().and_then(|queue| queue.trouble())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AccessLogs {
    fn drop(&mut self) {
        self.set(None);
    }
}
