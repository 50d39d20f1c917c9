//! What is written down of a download beside its data, so that a later life of this process goes on with it: which object, and
//! which of its parts are on disk. It is believed only as far as it makes sense; what it says is there is hashed like all else.

use super::cache::{Cache, Incoming, is_partial_name};
use super::disk::is_full;
use super::stamp::Object;
use crate::atomic_file::{self, FileError};
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::fetch::Parts;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The form of the file.
const FORMAT: u32 = 1;
/// Ten thousand parts, every second of them finished, and a request.
const MAX_LENGTH: u64 = 256 * 1024;

/// A download that can be continued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Resume {
    format: u32,
    pub(super) request: ImageRequest,
    /// The name of the file with its data.
    pub(super) file: String,
    pub(super) object: Object,
    /// The size of a part, in bytes.
    part: u64,
    /// Finished parts: first, one past the last.
    finished: Vec<(u64, u64)>,
}

impl Resume {
    pub(super) fn new(request: &ImageRequest, file: &str, object: &Object, part: u64) -> Self {
        Self {
            format: FORMAT,
            request: request.clone(),
            file: file.to_owned(),
            object: object.clone(),
            part,
            finished: Vec::new(),
        }
    }

    /// Reads one; `None` if there is none, or none that makes sense.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, FileError> {
        match atomic_file::read_json::<Self>(path, MAX_LENGTH) {
            Ok(read) => Ok(read.filter(|resume| resume.makes_sense())),
            Err(error) if error.is_about_contents() => {
                tracing::warn!("a download is not continued: {}", Failure::from_error(&error));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn makes_sense(&self) -> bool {
        let resumable = self.format == FORMAT && is_partial_name(&self.file) && self.object.strong_etag().is_some();
        resumable && self.parts().is_some()
    }

    /// The table of its parts; `None` if that can't be one.
    pub(super) fn parts(&self) -> Option<Parts> {
        Parts::restore(self.object.size, self.part, &self.finished).ok()
    }
}

/// Writes down which parts of one download are finished.
#[derive(Debug)]
pub(super) struct Saver {
    cache: Arc<Cache>,
    path: PathBuf,
    resume: Resume,
}

impl Saver {
    pub(super) fn new(cache: Arc<Cache>, path: PathBuf, resume: Resume) -> Self {
        Self { cache, path, resume }
    }

    /// Flushes the data first, then writes down that they are there; says whether that could be written down. That it could not
    /// costs only what could have been continued.
    ///
    /// # Errors
    /// The data can't be flushed. Linux says so once for an open file: whoever tries again is told that all is well, and reads
    /// from memory what never got to the disk. So what was downloaded is worth nothing then.
    pub(super) fn save(&self, file: &File, finished: &[(u64, u64)]) -> io::Result<bool> {
        self.cache.disk().sync(file)?;
        let resume = Resume { finished: finished.to_vec(), ..self.resume.clone() };
        let written = self.cache.write_json(&self.path, &resume);
        if let Err(error) = &written {
            tracing::warn!("could not write down how far a download is: {}", Failure::from_error(error));
        }
        Ok(written.is_ok())
    }
}

/// Where a download goes, begun or continued.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) incoming: Incoming,
    pub(super) parts: Parts,
    /// Bytes that are on disk already.
    pub(super) reused: u64,
    /// `None`: it is got in one piece, and can't be continued.
    pub(super) saver: Option<Arc<Saver>>,
}

impl Cache {
    /// Goes on with what there is of that object for that request, else begins: space is set aside for all of it. What there is
    /// of another object goes.
    ///
    /// # Errors
    /// The disk's, and that there is no space.
    pub(super) fn begin_download(
        self: &Arc<Self>,
        request: &ImageRequest,
        object: &Object,
        part: Option<u64>,
    ) -> Result<Begun, Failure> {
        let told = |error: FileError| Failure::from_error(&error);
        let path = self.resume_path(request)?;
        if part.is_some()
            && let Some(resume) = Resume::read(&path).map_err(told)?
            && resume.request == *request
            && resume.object.is(object) == Some(true)
            && let Some(parts) = resume.parts()
            && let Some(incoming) = self.reopen(&resume.file, object.size).map_err(told)?
        {
            let missing = missing(incoming.file(), object.size);
            if missing > 0 {
                self.check_space(missing)?;
            }
            let resume = Resume { object: object.clone(), ..resume };
            let reused = parts.done();
            let saver = Some(Arc::new(Saver::new(Arc::clone(self), path, resume)));
            return Ok(Begun { incoming, parts, reused, saver });
        }
        self.discard_download(request)?;
        self.check_space(object.size)?;
        let incoming = self.incoming()?;
        let reserved = self.disk().reserve(incoming.file(), object.size);
        reserved.map_err(|error| match is_full(&error) {
            true => self.no_space(object.size),
            false => told(FileError::io("set space aside for", incoming.path())(error)),
        })?;
        let size = part.unwrap_or(object.size);
        let parts = Parts::new(object.size, size).map_err(|error| Failure::from_error(&error))?;
        let Some(part) = part else { return Ok(Begun { incoming, parts, reused: 0, saver: None }) };
        let resume = Resume::new(request, incoming.name(), object, part);
        self.write_json(&path, &resume).map_err(told)?;
        // From here on the sidecar knows it.
        let incoming = incoming.resumable();
        let saver = Some(Arc::new(Saver::new(Arc::clone(self), path, resume)));
        Ok(Begun { incoming, parts, reused: 0, saver })
    }

    /// Removes what there is of a download: what says so first, so that nothing is left that refers to what is not there.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn discard_download(&self, request: &ImageRequest) -> Result<(), Failure> {
        let path = self.resume_path(request)?;
        let resume = Resume::read(&path).map_err(|error| Failure::from_error(&error))?;
        self.remove_file(&path)?;
        match resume {
            Some(resume) => self.remove_file(&self.folder().join(resume.file)),
            None => Ok(()),
        }
    }
}

/// How much space a file of that size still needs: all for which it has none set aside. (What the kernel does not say of it
/// is taken for missing.)
pub(super) fn missing(file: &File, size: u64) -> u64 {
    // As `stat` has it: blocks of 512 bytes, whatever the file system's are.
    let there = file.metadata().map_or(0, |found| found.blocks().saturating_mul(512));
    size.saturating_sub(there)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resume() -> Resume {
        let request = ImageRequest { source: "s3://bucket/a.eif".parse().unwrap(), expected: Default::default() };
        let object = Object { etag: Some("\"a\"".to_owned()), modified: None, size: 25, version: None };
        Resume { finished: vec![(1, 3)], ..Resume::new(&request, "0123456789abcdef.partial", &object, 10) }
    }

    #[test]
    fn a_sidecar_is_read_as_it_was_written_and_one_that_makes_no_sense_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.resume");
        let read = |resume: &Resume| {
            atomic_file::write_json(&path, resume).unwrap();
            Resume::read(&path).unwrap()
        };
        assert_eq!(read(&resume()), Some(resume()));
        assert_eq!(resume().parts().unwrap().done(), 15);
        let weak = Object { etag: Some("W/\"a\"".to_owned()), ..resume().object };
        for bad in [
            Resume { format: 2, ..resume() },
            Resume { file: "../../etc/passwd".to_owned(), ..resume() },
            Resume { file: "0123456789abcdef.eif".to_owned(), ..resume() },
            Resume { object: weak, ..resume() },
            Resume { part: 0, ..resume() },
            Resume { finished: vec![(0, 4)], ..resume() },
        ] {
            assert_eq!(read(&bad), None, "{bad:?}");
        }
        for bad in ["", "{", "[]", "null"] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(Resume::read(&path).unwrap(), None, "{bad}");
        }
    }
}
