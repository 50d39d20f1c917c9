//! Measuring files on threads: core's three lanes, each on one of its own, each reading for itself from the page cache, up to a
//! front that moves on while the file is still being written. Memory is three pieces, whatever the file's size. What the lanes
//! compute, and which error counts where several fail, is core's to say; getting and writing files is not done here.

use super::super::Progress;
use enclaved_core::image::{ApplicationShare, EifError, EifReport, FileShare, ImageShare, Lane, Lanes, Limits, Share};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Read and measured at a time: small enough to stay in a core's cache between the two, large enough that waking a thread for it
/// costs nothing.
const PIECE: u64 = 256 << 10;
/// How far ahead of the slowest a lane may be. What one lane has read the others find in the page cache, also where the host
/// keeps no more than a GiB or two for itself.
const LEAD: u64 = 128 << 20;
const LANES: usize = 3;
/// The lane of the file as a whole; the others are the chains.
const FILE: usize = 0;

/// Why an image was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntakeError {
    /// It is none.
    #[error("{0}")]
    Eif(#[from] EifError),
    /// It could not be read.
    #[error("reading it failed: {0}")]
    Read(io::Error),
    /// It could not be written.
    #[error("writing it failed: {0}")]
    Write(io::Error),
    /// Nobody waits for it any more, or a thread ended early.
    #[error("it was cut off: {0}")]
    Cut(String),
}

/// Measures a file that is still being written, from its beginning up to a front that moves on. Dropping it ends its threads,
/// each after the piece that it is at.
#[derive(Debug)]
pub(super) struct Following {
    owner: Owner,
    lanes: Spawned,
}

/// What a lane comes to: itself, with whatever it has found.
type Ended<S> = oneshot::Receiver<Result<Lane<S>, IntakeError>>;

#[derive(Debug)]
struct Spawned {
    file: Ended<FileShare>,
    image: Ended<ImageShare>,
    application: Ended<ApplicationShare>,
}

impl Following {
    /// Begins with nothing of the file being there. `file` is open for reading.
    pub(super) fn begin(file: File) -> Self {
        let shared =
            Arc::new(Shared { file, state: Mutex::default(), moved: Condvar::new(), failed: CancellationToken::new() });
        let Lanes { file, image, application } = Lanes::new(Limits::default());
        let lanes = Spawned {
            file: spawn(&shared, FILE, "measure-file", file),
            image: spawn(&shared, 1, "measure-pcr0", image),
            application: spawn(&shared, 2, "measure-pcr2", application),
        };
        Self { owner: Owner(shared), lanes }
    }

    /// So many bytes from the file's beginning are written and will not change any more. Never goes back: a smaller number than
    /// an earlier one does nothing.
    pub(super) fn advance(&self, front: u64) {
        let shared = &self.owner.0;
        let mut state = shared.state();
        let before = state.front;
        state.front = before.max(front);
        // Lanes take whole pieces while there is more to come.
        if state.front / PIECE != before / PIECE {
            shared.moved.notify_all();
        }
    }

    /// From now on that is the progress of the slowest lane, with what it has done already. The total and the beginning are the
    /// caller's affair.
    pub(super) fn report_to(&self, progress: &Arc<Progress>) {
        let mut state = self.owner.0.state();
        state.progress = Some(Arc::clone(progress));
        state.report();
    }

    /// Resolves as soon as there is no use in writing more: what has arrived can't be an image, or can't be read back.
    /// [`Self::finish`] says why.
    pub(super) fn failed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.owner.0.failed.clone().cancelled_owned()
    }

    /// The file is whole, and has `size` bytes; or it has failed.
    ///
    /// # Errors
    /// That it can't be read, or what is wrong with it: of several faults the one that is first in the file.
    pub(super) async fn finish(self, size: u64) -> Result<EifReport, IntakeError> {
        {
            let shared = &self.owner.0;
            let mut state = shared.state();
            state.front = state.front.max(size);
            state.whole = true;
            shared.moved.notify_all();
        }
        let Spawned { file, image, application } = self.lanes;
        // A lane that can't read says so, whatever the others say; the others then stop where they are.
        let (file, image, application) = (ended(file).await, ended(image).await, ended(application).await);
        Ok(Lanes { file: file?, image: image?, application: application? }.join()?)
    }
}

/// Measures a file that is there. The progress is that of the slowest lane; its total is set first, its beginning is the
/// caller's affair.
///
/// # Errors
/// That it can't be read, that it is being written to, or what is wrong with it.
pub(crate) async fn measure_whole(file: File, progress: &Arc<Progress>) -> Result<EifReport, IntakeError> {
    let size = file.metadata().map_err(IntakeError::Read)?.len();
    progress.set_total(size);
    let following = Following::begin(file);
    following.report_to(progress);
    let shared = Arc::clone(&following.owner.0);
    let report = following.finish(size).await?;
    let now = shared.file.metadata().map_err(IntakeError::Read)?.len();
    if now != size {
        let message =
            format!("it had {size} bytes when that began and has {now} bytes now: something is writing to it");
        return Err(IntakeError::Read(io::Error::other(message)));
    }
    Ok(report)
}

async fn ended<S>(lane: Ended<S>) -> Result<Lane<S>, IntakeError> {
    lane.await.unwrap_or_else(|_| Err(IntakeError::Cut("a measuring thread ended early".to_owned())))
}

/// Ends the threads when it is dropped.
#[derive(Debug)]
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.state().stopped = true;
        self.0.moved.notify_all();
    }
}

/// What the threads and their owner share.
#[derive(Debug)]
struct Shared {
    file: File,
    state: Mutex<State>,
    /// The front or a lane has moved, or the end has come.
    moved: Condvar,
    failed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    /// How far each lane is, in bytes; `u64::MAX` for one that goes no further.
    positions: [u64; LANES],
    /// How much of the file is there.
    front: u64,
    /// Whether that is all of it.
    whole: bool,
    /// Whether all is over.
    stopped: bool,
    /// Where the slowest lane's position is reported, if anywhere.
    progress: Option<Arc<Progress>>,
    /// How much of that position has been added to the progress.
    reported: u64,
}

impl State {
    fn slowest(&self) -> u64 {
        self.positions.into_iter().min().unwrap_or(u64::MAX)
    }

    /// Adds to the progress what it lacks.
    fn report(&mut self) {
        let slowest = self.slowest();
        if let Some(progress) = &self.progress
            && slowest != u64::MAX
            && slowest > self.reported
        {
            progress.add(slowest - self.reported);
            self.reported = slowest;
        }
    }

    /// Up to where the lane may read now.
    fn limit(&self) -> u64 {
        let there = if self.whole { self.front } else { self.front - self.front % PIECE };
        there.min(self.slowest().saturating_add(LEAD))
    }
}

impl Shared {
    /// A thread that panicked leaves nothing half done here.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lane has come to `position`. Waits until there is more for it, and says up to where; `None`: it is over.
    fn more(&self, lane: usize, position: u64) -> Option<u64> {
        let mut state = self.state();
        let before = state.slowest();
        state.positions[lane] = position;
        if state.slowest() != before {
            // Whoever waited for the slowest.
            self.moved.notify_all();
        }
        state.report();
        loop {
            if state.stopped || (state.whole && position >= state.front) {
                return None;
            }
            let limit = state.limit();
            if limit > position {
                return Some(limit);
            }
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Runs a lane to its end. `Ok` also if it finds that this is no image, or if it is stopped before its end.
    fn run<S: Share>(&self, index: usize, lane: &mut Lane<S>) -> Result<Found, IntakeError> {
        let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or(usize::MAX)];
        let mut position = 0;
        while let Some(limit) = self.more(index, position) {
            let wanted = usize::try_from((limit - position).min(PIECE)).unwrap_or(buffer.len());
            let piece = &mut buffer[..wanted];
            self.file.read_exact_at(piece, position).map_err(IntakeError::Read)?;
            if lane.update(piece).is_err() {
                return Ok(Found::Fault);
            }
            position = lane.position();
        }
        Ok(Found::Nothing)
    }
}

/// What a lane has found by its end, other than measurements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// The file is no image. Where and why, the lane keeps to itself until all are joined.
    Fault,
}

/// Runs a lane on a thread of its own, which ends by itself: with the file, with a failure, or with its owner.
fn spawn<S: Share + Send + 'static>(shared: &Arc<Shared>, index: usize, name: &str, mut lane: Lane<S>) -> Ended<S> {
    let (sender, receiver) = oneshot::channel();
    let of_thread = Arc::clone(shared);
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // If this panics, all is over.
        let mut leaving = Leaving { shared: &of_thread, index, all_over: true };
        let found = of_thread.run(index, &mut lane);
        // What a chain finds the file's lane finds too, or something before it: that is for it to say, so that the answer does
        // not depend on who is faster.
        leaving.all_over = match found {
            Ok(Found::Nothing) => false,
            Ok(Found::Fault) => index == FILE,
            Err(_) => true,
        };
        drop(leaving);
        // Nobody may be waiting any more.
        drop(sender.send(found.map(|_| lane)));
    });
    match started {
        Ok(_ends_by_itself) => receiver,
        Err(error) => {
            drop(Leaving { shared, index, all_over: true });
            let (sender, receiver) = oneshot::channel();
            drop(sender.send(Err(IntakeError::Cut(format!("no thread could be started to measure it: {error}")))));
            receiver
        }
    }
}

/// Says that a lane goes no further, however it ends.
struct Leaving<'a> {
    shared: &'a Shared,
    index: usize,
    /// Whether the others need not go on either.
    all_over: bool,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state();
            state.positions[self.index] = u64::MAX;
            state.stopped |= self.all_over;
            self.shared.moved.notify_all();
        }
        if self.all_over {
            self.shared.failed.cancel();
        }
    }
}

#[cfg(test)]
mod tests;
