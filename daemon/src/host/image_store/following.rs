//! Measuring a file, also while it is still being written.

use super::front::{Follower, Sink};
use super::measure::IntakeError;
use crate::host::Progress;
use enclaved_core::image::{EifReport, Limits, Measurer};
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

/// Read from disk at a time.
const CHUNK: usize = 1 << 20;

/// Measures a file that is still being written, from its beginning up to a front that moves on. Dropping it ends its thread.
#[derive(Debug)]
pub(super) struct Following(Follower<EifReport>);

impl Following {
    /// Begins with a file that is open for reading.
    pub(super) fn begin(file: File) -> Self {
        Self(Follower::begin(file, Measuring(Measurer::new(Limits::default()))))
    }

    /// So many bytes are written from the beginning without a gap; never goes back.
    pub(super) fn advance(&self, front: u64) {
        self.0.advance(front);
    }

    /// Returns as soon as what has arrived can't be an image. Cancel-safe.
    pub(super) async fn failed(&self) {
        self.0.failed().await;
    }

    /// The file is whole.
    pub(super) async fn finish(self, size: u64) -> Result<EifReport, IntakeError> {
        self.0.finish(size).await
    }
}

struct Measuring(Measurer);

impl Sink for Measuring {
    type Output = EifReport;

    fn take(&mut self, bytes: &[u8]) -> Result<(), IntakeError> {
        Ok(self.0.update(bytes)?)
    }

    fn finish(self) -> Result<EifReport, IntakeError> {
        Ok(self.0.finish()?)
    }
}

/// Measures a file that is there.
pub(super) async fn measure_whole(file: File, progress: &Arc<Progress>) -> Result<EifReport, IntakeError> {
    let progress = Arc::clone(progress);
    let measured = tokio::task::spawn_blocking(move || read_whole(file, &progress)).await;
    measured.unwrap_or_else(|error| Err(IntakeError::Cut(error.to_string())))
}

fn read_whole(mut file: File, progress: &Progress) -> Result<EifReport, IntakeError> {
    progress.set_total(file.metadata().map_err(IntakeError::Read)?.len());
    let mut measuring = Measuring(Measurer::new(Limits::default()));
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return measuring.finish(),
            Ok(length) => {
                measuring.take(&chunk[..length])?;
                progress.add(u64::try_from(length).unwrap_or(u64::MAX));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(IntakeError::Read(error)),
        }
    }
}
