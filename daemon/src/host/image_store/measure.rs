//! Measuring bytes on their way: hashed and, where wanted, written, on a thread of their own; memory is bounded by a few
//! chunks, whatever the image's size and however fast it arrives.

use super::super::Progress;
use bytes::Bytes;
use enclaved_core::image::{EifError, EifReport, Limits, Measurer};
use std::fs::File;
use std::io::{self, Read, Write};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Read from disk at a time.
const CHUNK: usize = 1 << 20;
/// Chunks from the network that may wait to be measured; each is 64 KiB or so.
const WAITING: usize = 16;

/// Why an image was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntakeError {
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

/// Takes an image chunk by chunk.
#[derive(Debug)]
pub(super) struct Intake {
    sender: mpsc::Sender<Part>,
    worker: JoinHandle<Result<EifReport, IntakeError>>,
}

enum Part {
    Bytes(Bytes),
    /// All have arrived. A channel that is closed without this was cut off.
    End,
}

/// The intake has ended before the image: [`Intake::finish`] says why.
#[derive(Debug)]
pub(super) struct Stopped;

impl Intake {
    /// Measures, and writes to that file.
    pub(super) fn begin(file: File) -> Self {
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let worker = tokio::task::spawn_blocking(move || {
            let mut taking = Taking::new(Some(file));
            loop {
                match receiver.blocking_recv() {
                    Some(Part::Bytes(bytes)) => taking.take(&bytes)?,
                    Some(Part::End) => return taking.finish(),
                    None => return Err(IntakeError::Cut("nobody waits for it any more".to_owned())),
                }
            }
        });
        Self { sender, worker }
    }

    /// The next bytes; waits while too many are not measured yet.
    pub(super) async fn take(&self, bytes: Bytes) -> Result<(), Stopped> {
        self.sender.send(Part::Bytes(bytes)).await.map_err(|_| Stopped)
    }

    /// After the last bytes, or when the intake has stopped. The file is on disk when this returns a report.
    pub(super) async fn finish(self) -> Result<EifReport, IntakeError> {
        // If it has stopped already, its result says why.
        let _stopped = self.sender.send(Part::End).await;
        self.worker.await.unwrap_or_else(|error| Err(IntakeError::Cut(error.to_string())))
    }
}

/// Measures a file from its beginning, and copies it where wanted. Blocks.
pub(super) fn measure_file(mut file: File, copy: Option<File>, progress: &Progress) -> Result<EifReport, IntakeError> {
    progress.set_total(file.metadata().map_err(IntakeError::Read)?.len());
    let mut taking = Taking::new(copy);
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return taking.finish(),
            Ok(length) => {
                taking.take(&chunk[..length])?;
                progress.add(u64::try_from(length).unwrap_or(u64::MAX));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(IntakeError::Read(error)),
        }
    }
}

struct Taking {
    measurer: Measurer,
    copy: Option<File>,
}

impl Taking {
    fn new(copy: Option<File>) -> Self {
        Self { measurer: Measurer::new(Limits::default()), copy }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), IntakeError> {
        self.measurer.update(bytes)?;
        match &mut self.copy {
            Some(copy) => copy.write_all(bytes).map_err(IntakeError::Write),
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<EifReport, IntakeError> {
        let report = self.measurer.finish()?;
        if let Some(copy) = self.copy {
            copy.sync_all().map_err(IntakeError::Write)?;
        }
        Ok(report)
    }
}
