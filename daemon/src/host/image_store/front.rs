//! Reading a file that is still being written, from its beginning up to a front that moves on: one thread a reader, from the
//! page cache as a rule. What is made of the bytes is the reader's.

use super::measure::IntakeError;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use tokio::sync::oneshot;

/// Read at a time.
const CHUNK: usize = 1 << 20;

/// Takes the file's bytes in order.
pub(super) trait Sink: Send + 'static {
    /// What it comes to.
    type Output: Send + 'static;
    /// The next bytes.
    fn take(&mut self, bytes: &[u8]) -> Result<(), IntakeError>;
    /// There are no more.
    fn finish(self) -> Result<Self::Output, IntakeError>;
}

/// How far the file is written.
#[derive(Debug, Clone, Copy)]
struct Front {
    /// Bytes from the beginning without a gap.
    bytes: u64,
    /// No more are to come: there are that many.
    end: Option<u64>,
    /// Nobody waits for the reader any more.
    left: bool,
}

type Shared = Arc<(Mutex<Front>, Condvar)>;

/// A reader at work. Dropping it ends its thread.
#[derive(Debug)]
pub(super) struct Follower<T> {
    front: Shared,
    /// What the worker comes to; `None`: it has been waited for.
    outcome: Option<oneshot::Receiver<Result<T, IntakeError>>>,
}

impl<T: Send + 'static> Follower<T> {
    /// Follows that file, which is open for reading.
    pub(super) fn begin(file: File, mut sink: impl Sink<Output = T>) -> Self {
        let front: Shared = Arc::new((Mutex::new(Front { bytes: 0, end: None, left: false }), Condvar::new()));
        let of_worker = Arc::clone(&front);
        let (send, outcome) = oneshot::channel();
        // A thread of its own: it lives as long as the download, and works most of that time.
        let started = std::thread::Builder::new().name("image-reader".to_owned()).spawn(move || {
            let result = follow(&of_worker, &file, &mut sink).and_then(|()| sink.finish());
            // Nobody may wait for it any more.
            let _unheard = send.send(result);
        });
        if let Err(error) = started {
            // Whoever waits learns that it is over: its end of the channels is gone.
            tracing::error!("could not start a thread that reads an image: {error}");
        }
        Self { front, outcome: Some(outcome) }
    }

    /// So many bytes are written from the beginning without a gap.
    pub(super) fn advance(&self, bytes: u64) {
        self.change(|front| front.bytes = front.bytes.max(bytes));
    }

    /// The file is whole, and has that size.
    pub(super) async fn finish(mut self, size: u64) -> Result<T, IntakeError> {
        self.change(|front| *front = Front { bytes: size, end: Some(size), left: false });
        let cut = || IntakeError::Cut("the thread that reads it ended early, or could not be started".to_owned());
        match self.outcome.take() {
            Some(outcome) => outcome.await.unwrap_or_else(|_| Err(cut())),
            None => Err(cut()),
        }
    }
}

impl<T> Follower<T> {
    fn change(&self, change: impl FnOnce(&mut Front)) {
        change(&mut self.front.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.front.1.notify_all();
    }
}

impl<T> Drop for Follower<T> {
    fn drop(&mut self) {
        if self.outcome.is_some() {
            self.change(|front| front.left = true);
        }
    }
}

fn follow(front: &Shared, file: &File, sink: &mut impl Sink) -> Result<(), IntakeError> {
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    loop {
        let (seen, changed) = (&front.0, &front.1);
        let now = {
            let mut now = seen.lock().unwrap_or_else(PoisonError::into_inner);
            while now.bytes <= at && now.end.is_none() && !now.left {
                now = changed.wait(now).unwrap_or_else(PoisonError::into_inner);
            }
            *now
        };
        if now.left {
            return Err(IntakeError::Cut("nobody waits for it any more".to_owned()));
        }
        if now.end.is_some_and(|end| at >= end) {
            return Ok(());
        }
        let wanted = usize::try_from(now.bytes - at).unwrap_or(usize::MAX).min(CHUNK);
        match file.read_at(&mut chunk[..wanted], at) {
            Ok(0) => return Err(IntakeError::Read(io::ErrorKind::UnexpectedEof.into())),
            Ok(length) => {
                sink.take(&chunk[..length])?;
                at += u64::try_from(length).unwrap_or(u64::MAX);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(IntakeError::Read(error)),
        }
    }
}
