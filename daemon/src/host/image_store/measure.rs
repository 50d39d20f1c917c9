//! Why an image could not be measured.

use enclaved_core::image::EifError;
use std::io;

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
