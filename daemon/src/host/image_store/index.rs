//! The index of the cache: what each request came to, and what its source had then; and the cache as the planner sees it.

use super::cache::{Cache, ENTRY, IMAGE, RESUME};
use super::sidecar::Resume;
use super::stamp::Stamp;
use crate::atomic_file::{self, FileError};
use crate::host::Outcome;
use enclaved_core::desired::{ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use enclaved_core::id::{EifDigest, Timestamp};
use enclaved_core::observed::{CachedImage, ImageCache, Unfinished};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A request is an address and a few digests; a URL may be long.
const MAX_ENTRY: u64 = 64 * 1024;

/// What a request came to. The file's mtime says when it was asked for last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) request: ImageRequest,
    pub(super) digest: EifDigest,
    /// What the source had then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stamp: Option<Stamp>,
}

impl Entry {
    /// Reads one; `None` if there is none, or none that is understood.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, FileError> {
        match atomic_file::read_json(path, MAX_ENTRY) {
            Ok(entry) => Ok(entry),
            Err(error) if error.is_about_contents() => {
                tracing::warn!("an entry of the image cache is not used: {}", Failure::from_error(&error));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl Cache {
    /// What that request came to.
    pub(super) fn entry(&self, request: &ImageRequest) -> Outcome<Option<Entry>> {
        let entry = Entry::read(&self.entry_path(request)?).map_err(|error| Failure::from_error(&error))?;
        Ok(entry.filter(|entry| entry.request == *request))
    }

    /// All that is understood, by path.
    pub(super) fn entries(&self) -> Outcome<Vec<(PathBuf, Entry)>> {
        let told = |error: FileError| Failure::from_error(&error);
        let mut entries = Vec::new();
        for name in self.names().map_err(told)?.iter().filter(|name| name.ends_with(ENTRY)) {
            let path = self.folder().join(name);
            if let Some(entry) = Entry::read(&path).map_err(told)? {
                entries.push((path, entry));
            }
        }
        Ok(entries)
    }

    /// The image that was taken from that place, whatever was asked of it then, when the source had just that there.
    pub(super) fn taken_from(&self, source: &ImageSource, stamp: &Stamp) -> Outcome<Option<EifDigest>> {
        let same = |entry: &Entry| {
            is_same_place(&entry.request.source, source)
                && entry.stamp.as_ref().is_some_and(|then| then.is(stamp) == Some(true))
        };
        Ok(self.entries()?.into_iter().find(|(_, entry)| same(entry)).map(|(_, entry)| entry.digest))
    }

    /// Notes what a request came to.
    pub(super) fn note(&self, request: &ImageRequest, digest: &EifDigest, stamp: Option<Stamp>) -> Outcome<()> {
        let entry = Entry { request: request.clone(), digest: *digest, stamp };
        let path = self.entry_path(request)?;
        self.write_json(&path, &entry).map_err(|error| Failure::from_error(&error))
    }

    /// Notes that an image was asked for now. That it can't be noted only makes it look older.
    pub(super) fn note_use(&self, digest: &EifDigest) {
        let noted = self.entries().map_err(|failure| failure.message).and_then(|entries| {
            entries.iter().filter(|(_, entry)| entry.digest == *digest).try_for_each(|(path, _)| {
                let touched = File::options().append(true).open(path);
                let touched = touched.and_then(|file| file.set_modified(SystemTime::now()));
                touched.map_err(|error| format!("could not touch {}: {error}", path.display()))
            })
        });
        if let Err(text) = noted {
            tracing::debug!("{text}");
        }
    }

    /// The cache as it is.
    pub(super) fn observe(&self) -> Outcome<ImageCache> {
        let told = |error: FileError| Failure::from_error(&error);
        let mut used: BTreeMap<EifDigest, SystemTime> = BTreeMap::new();
        for (path, entry) in self.entries()? {
            if let Some(modified) = look(&path).map_err(told)?.and_then(|entry| entry.modified().ok()) {
                let used = used.entry(entry.digest).or_insert(modified);
                *used = (*used).max(modified);
            }
        }
        let mut cache = ImageCache::default();
        for name in self.names().map_err(told)? {
            let path = self.folder().join(&name);
            if let Some(digest) = name.strip_suffix(IMAGE).and_then(|digest| digest.parse::<EifDigest>().ok()) {
                let Some(found) = look(&path).map_err(told)? else { continue };
                let used = used.get(&digest).copied().or_else(|| found.modified().ok());
                let used = used.map_or(Timestamp::from_millis(0), Timestamp::from);
                cache.images.push(CachedImage { digest, size: found.len(), used });
            } else if name.ends_with(RESUME)
                && let Some(resume) = Resume::read(&path).map_err(told)?
            {
                let data = look(&self.folder().join(&resume.file)).map_err(told)?;
                // As `stat` has it: blocks of 512 bytes, whatever the file system's are.
                let size = data.map_or(0, |data| data.blocks().saturating_mul(512));
                let used = look(&path).map_err(told)?.and_then(|sidecar| sidecar.modified().ok());
                let used = used.map_or(Timestamp::from_millis(0), Timestamp::from);
                cache.unfinished.push(Unfinished { request: resume.request, size, used });
            }
        }
        Ok(cache)
    }
}

/// Whether two sources are the same place: URLs differ in their query with every signing.
fn is_same_place(one: &ImageSource, other: &ImageSource) -> bool {
    match (one, other) {
        (ImageSource::Https(_), ImageSource::Https(_)) => one.to_string() == other.to_string(),
        _ => one == other,
    }
}

/// What the kernel says of a file; `None` if it is not there (any more).
fn look(path: &Path) -> Result<Option<Metadata>, FileError> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::io("look at", path)(error)),
    }
}
