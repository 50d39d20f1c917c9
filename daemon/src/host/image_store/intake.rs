//! Images on their way: written to their file on a thread of its own, and measured there behind the writing. Memory is bounded by a
//! few chunks, whatever the image's size and however fast it arrives.

use super::super::Progress;
use super::measure::{Following, IntakeError};
use bytes::Bytes;
use enclaved_core::image::EifReport;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Read from disk at a time.
const CHUNK: usize = 1 << 20;
/// Chunks from the network that may wait to be written; each is 64 KiB or so.
const WAITING: usize = 16;

/// Takes an image chunk by chunk.
#[derive(Debug)]
pub(super) struct Intake {
    sender: mpsc::Sender<Bytes>,
    worker: JoinHandle<Result<u64, IntakeError>>,
    following: Arc<Following>,
}

/// The intake has ended before the image: [`Intake::finish`] says why.
#[derive(Debug)]
pub(super) struct Stopped;

impl Intake {
    /// Writes to that file, and measures what is in it.
    pub(super) fn begin(file: File) -> Result<Self, IntakeError> {
        let following = Arc::new(Following::begin(file.try_clone().map_err(IntakeError::Write)?));
        let (sender, mut receiver) = mpsc::channel::<Bytes>(WAITING);
        let measured = Arc::clone(&following);
        let worker = tokio::task::spawn_blocking(move || {
            let mut writing = Writing { file, written: 0, following: measured };
            while let Some(bytes) = receiver.blocking_recv() {
                writing.take(&bytes)?;
            }
            writing.finish()
        });
        Ok(Self { sender, worker, following })
    }

    /// The next bytes; waits while too many are not written yet.
    pub(super) async fn take(&self, bytes: Bytes) -> Result<(), Stopped> {
        tokio::select! {
            // Both are cancel-safe: a token, and a send that has sent nothing unless it is ready.
            biased;
            () = self.following.failed() => Err(Stopped),
            sent = self.sender.send(bytes) => sent.map_err(|_| Stopped),
        }
    }

    /// After the last bytes, or when the intake has stopped. The file is on disk when this returns a report.
    pub(super) async fn finish(self) -> Result<EifReport, IntakeError> {
        drop(self.sender);
        let written = self.worker.await.unwrap_or_else(|error| Err(IntakeError::Cut(error.to_string())))?;
        measured(self.following, written).await
    }
}

/// Copies a file, and measures the copy while it is written.
pub(super) async fn copy(mut from: File, to: File, progress: &Arc<Progress>) -> Result<EifReport, IntakeError> {
    progress.set_total(from.metadata().map_err(IntakeError::Read)?.len());
    let following = Arc::new(Following::begin(to.try_clone().map_err(IntakeError::Write)?));
    let (measured_there, progress) = (Arc::clone(&following), Arc::clone(progress));
    let copying = tokio::task::spawn_blocking(move || {
        let mut writing = Writing { file: to, written: 0, following: measured_there };
        let mut chunk = vec![0; CHUNK];
        // What has failed is not copied to its end.
        while !writing.following.has_failed() {
            match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => {
                    writing.take(&chunk[..length])?;
                    progress.add(u64::try_from(length).unwrap_or(u64::MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(IntakeError::Read(error)),
            }
        }
        writing.finish()
    });
    let written = copying.await.unwrap_or_else(|error| Err(IntakeError::Cut(error.to_string())))?;
    measured(following, written).await
}

/// The report of a file that is written; its writer has ended, so nobody else follows it.
async fn measured(following: Arc<Following>, size: u64) -> Result<EifReport, IntakeError> {
    match Arc::into_inner(following) {
        Some(following) => following.finish(size).await,
        None => Err(IntakeError::Cut("its writer has not ended".to_owned())),
    }
}

struct Writing {
    file: File,
    written: u64,
    following: Arc<Following>,
}

impl Writing {
    fn take(&mut self, bytes: &[u8]) -> Result<(), IntakeError> {
        self.file.write_all(bytes).map_err(IntakeError::Write)?;
        self.written = self.written.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        self.following.advance(self.written);
        Ok(())
    }

    fn finish(self) -> Result<u64, IntakeError> {
        self.file.sync_all().map_err(IntakeError::Write)?;
        Ok(self.written)
    }
}
