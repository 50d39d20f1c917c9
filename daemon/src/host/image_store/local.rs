//! Images from files of this very host, baked into a machine or container image: copied, so that what is launched can't change,
//! and measured behind the copy.

use super::cache::Incoming;
use super::disk::Disk;
use super::measure::{Following, IntakeError};
use super::stamp::FileStamp;
use crate::host::{FetchStage, Outcome, Progress};
use enclaved_core::failure::Failure;
use enclaved_core::image::EifReport;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// Copied at a time.
const CHUNK: usize = 1 << 20;

/// A file that an image is to be taken from.
#[derive(Debug)]
pub(super) struct Source {
    path: PathBuf,
    file: File,
    stamp: FileStamp,
    size: u64,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.display().to_string();
    move |error| {
        Failure::new(format!("could not read the image {path}: {error}"))
            .with_remedy("check the path, and that the user enclaved may read it")
    }
}

/// What is there now.
pub(super) fn look(path: &Path) -> Outcome<FileStamp> {
    Ok(FileStamp::of(&std::fs::metadata(path).map_err(failed(path))?))
}

impl Source {
    pub(super) fn open(path: &Path) -> Outcome<Self> {
        // Opening something else than a file (a pipe, say) may wait forever.
        let is_file = std::fs::metadata(path).map_err(failed(path))?.is_file();
        if !is_file {
            return Err(
                Failure::new(format!("the image {} is not a file", path.display())).with_remedy("check the path")
            );
        }
        let file = File::open(path).map_err(failed(path))?;
        let found = file.metadata().map_err(failed(path))?;
        Ok(Self { path: path.to_owned(), stamp: FileStamp::of(&found), size: found.len(), file })
    }

    pub(super) fn stamp(&self) -> FileStamp {
        self.stamp
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Copies it and measures the copy. The stamp is the copy's, when it was flushed to disk.
    pub(super) async fn copy(
        self,
        to: &Incoming,
        disk: &Disk,
        progress: &Arc<Progress>,
    ) -> Outcome<(Result<EifReport, IntakeError>, FileStamp)> {
        let Self { path, mut file, stamp, size } = self;
        progress.set_total(size);
        progress.set_stage(FetchStage::Downloading);
        let following = Following::begin(File::open(to.path()).map_err(failed(to.path()))?);
        let (front, mut moved) = watch::channel(0);
        let (into, disk, copied) = (Arc::clone(to.file()), disk.clone(), Arc::clone(progress));
        let mut copying = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK];
            let mut at = 0;
            loop {
                let length = match file.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(IntakeError::Read(error)),
                };
                disk.write_at(&into, &chunk[..length], at).map_err(IntakeError::Write)?;
                let length = u64::try_from(length).unwrap_or(u64::MAX);
                at += length;
                copied.add(length);
                // Nobody follows any more: it is no image, or nobody waits for it.
                if front.send(at).is_err() {
                    break;
                }
            }
            disk.sync(&into).map_err(IntakeError::Write)?;
            let after = FileStamp::of(&file.metadata().map_err(IntakeError::Read)?);
            let copy = FileStamp::of(&into.metadata().map_err(IntakeError::Read)?);
            Ok((after, copy))
        });
        let copied = loop {
            tokio::select! {
                // Cancel-safe: the task's end is given once, and then the loop is left.
                copied = &mut copying => {
                    break copied.unwrap_or_else(|error| Err(IntakeError::Cut(error.to_string())));
                }
                // Cancel-safe: the newest value stays unseen until it is looked at.
                Ok(()) = moved.changed() => following.advance(*moved.borrow_and_update()),
                // Cancel-safe: it only looks. Without a receiver the copying ends.
                () = following.failed() => {
                    drop(moved);
                    let copied = copying.await;
                    break copied.unwrap_or_else(|error| Err(IntakeError::Cut(error.to_string())));
                }
            }
        };
        match copied {
            Ok((after, copy)) => {
                // Before what the reader says: a file that somebody is still writing need not be an image yet.
                if after != stamp {
                    let failure = Failure::new(format!("{} was written to while it was read", path.display()));
                    return Err(
                        failure.with_remedy("put images in their place by renaming them, when they are complete")
                    );
                }
                progress.set_stage(FetchStage::Measuring);
                progress.restart();
                following.report_to(progress);
                let report = following.finish(size).await;
                Ok((report, copy))
            }
            Err(error) => Ok((Err(error), stamp)),
        }
    }
}
