//! The folder of images: its names, what is made, kept and removed in it. Nothing here is believed without being measured
//! again.
//!
//! | name | what |
//! |---|---|
//! | `<sha256>.eif` | an image; read-only; it was proven before it got that name |
//! | `<sha256 of a request>.json` | what that request came to ([`index`](super::index)) |
//! | `<random>.partial` | an image on its way |
//! | `<sha256 of a request>.resume` | which parts of it are there ([`sidecar`](super::sidecar)); without one it goes at the next start |
//! | `.<name>.tmp` | a small file on its way |

use super::disk::Disk;
use super::index::Entry;
use super::sidecar::Resume;
use super::stamp::FileStamp;
use crate::atomic_file::FileError;
use crate::host::Outcome;
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::id::EifDigest;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const IMAGE: &str = ".eif";
pub(super) const ENTRY: &str = ".json";
pub(super) const RESUME: &str = ".resume";
const PARTIAL: &str = ".partial";
/// What an image on its way was called before downloads could be continued.
const INCOMING: &str = ".incoming-";
const TEMPORARY: &str = ".tmp";
/// This much of the file system stays free, for the ledger and the logs.
const SPARE_SPACE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// The folder.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    disk: Disk,
    /// Images as they were when this process proved them.
    proven: Mutex<BTreeMap<EifDigest, FileStamp>>,
    /// Held by whoever puts an image in its place, or removes one for what it was found to be: between the look and the deed
    /// nobody may put another there.
    placing: Mutex<()>,
}

/// A file for an image on its way. It goes when this is dropped, unless the image was kept, or it can be continued.
#[derive(Debug)]
pub(super) struct Incoming {
    path: PathBuf,
    file: Arc<File>,
    disk: Disk,
    goes: bool,
}

impl Incoming {
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn name(&self) -> &str {
        // All names in the folder that this makes are ASCII.
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// It stays when it is dropped.
    pub(super) fn resumable(mut self) -> Self {
        self.goes = false;
        self
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.goes
            && let Err(error) = self.disk.remove(&self.path)
        {
            tracing::warn!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// Whether that is the name of a file for an image on its way.
pub(super) fn is_partial_name(name: &str) -> bool {
    let random = name.strip_suffix(PARTIAL).unwrap_or_default();
    random.len() == 16 && random.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Cache {
    /// Opens the folder, which is made if need be, and removes what no life of this process can use any more.
    pub(super) fn open(folder: &Path, disk: Disk) -> Outcome<Self> {
        let failed = |error: FileError| {
            Failure::from_error(&error).with_remedy("check the owner and the permissions of the state folder")
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(folder).map_err(|error| failed(FileError::io("make folder", folder)(error)))?;
        let cache = Self { folder: folder.to_owned(), disk, proven: Mutex::default(), placing: Mutex::default() };
        cache.sweep().map_err(failed)?;
        Ok(cache)
    }

    /// Removes small files that were never finished, downloads that can't be continued, and entries without an image.
    fn sweep(&self) -> Result<(), FileError> {
        let names = self.names()?;
        let mut continued = BTreeSet::new();
        for name in names.iter().filter(|name| name.ends_with(RESUME)) {
            let path = self.folder.join(name);
            match Resume::read(&path)? {
                Some(resume) if names.contains(&resume.file) => {
                    continued.insert(resume.file);
                }
                Some(_) | None => self.sweep_away(&path)?,
            }
        }
        for name in &names {
            let path = self.folder.join(name);
            let goes = (name.starts_with('.') && name.ends_with(TEMPORARY))
                || name.starts_with(INCOMING)
                || (is_partial_name(name) && !continued.contains(name));
            let leads_nowhere = || match Entry::read(&path)? {
                Some(entry) => Ok(!names.contains(&format!("{}{IMAGE}", entry.digest))),
                None => Ok(true),
            };
            if goes || (name.ends_with(ENTRY) && leads_nowhere()?) {
                self.sweep_away(&path)?;
            }
        }
        Ok(())
    }

    fn sweep_away(&self, path: &Path) -> Result<(), FileError> {
        self.disk.remove(path).map_err(FileError::io("remove", path))
    }

    /// The names in the folder, but for those that are not text, which are nobody's here.
    pub(super) fn names(&self) -> Result<BTreeSet<String>, FileError> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.folder).map_err(FileError::io("list", &self.folder))? {
            let entry = entry.map_err(FileError::io("list", &self.folder))?;
            names.extend(entry.file_name().into_string().ok());
        }
        Ok(names)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    pub(super) fn path(&self, digest: &EifDigest) -> PathBuf {
        self.folder.join(format!("{digest}{IMAGE}"))
    }

    pub(super) fn entry_path(&self, request: &ImageRequest) -> Outcome<PathBuf> {
        Ok(self.folder.join(format!("{}{ENTRY}", request_id(request)?)))
    }

    pub(super) fn resume_path(&self, request: &ImageRequest) -> Outcome<PathBuf> {
        Ok(self.folder.join(format!("{}{RESUME}", request_id(request)?)))
    }

    /// Removes a file, and returns when it would stay away after a power cut.
    pub(super) fn remove_file(&self, path: &Path) -> Outcome<()> {
        let removed = self.disk.remove(path).map_err(FileError::io("remove", path));
        removed.and_then(|()| self.sync_folder()).map_err(|error| Failure::from_error(&error))
    }

    fn sync_folder(&self) -> Result<(), FileError> {
        self.disk.sync_folder(&self.folder).map_err(FileError::io("flush to disk", &self.folder))
    }

    /// Puts a small file in place of the one of that name: after a crash at any point the old or the new one is there.
    pub(super) fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<(), FileError> {
        let malformed = |source| FileError::Malformed { path: path.to_owned(), source };
        let bytes = serde_json::to_vec(value).map_err(malformed)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Of its own, so that two at once can't spoil each other's.
        let temporary = self.folder.join(format!(".{name}.{}{TEMPORARY}", random_name()));
        let written = (|| {
            let file = self.disk.create(&temporary).map_err(FileError::io("create", &temporary))?;
            self.disk.write_at(&file, &bytes, 0).map_err(FileError::io("write", &temporary))?;
            self.disk.sync(&file).map_err(FileError::io("flush to disk", &temporary))?;
            self.disk.rename(&temporary, path).map_err(FileError::io("replace", path))
        })();
        if written.is_err() {
            // The first error is the one to tell; the file goes at the next start.
            let _ignored = self.disk.remove(&temporary);
            return written;
        }
        self.sync_folder()
    }

    /// Whether an image of that size can be taken.
    pub(super) fn check_space(&self, bytes: u64) -> Outcome<()> {
        if bytes.saturating_add(SPARE_SPACE) <= self.free()? { Ok(()) } else { Err(self.no_space(bytes)) }
    }

    fn free(&self) -> Outcome<u64> {
        let failed = |error: rustix::io::Errno| {
            Failure::new(format!("could not learn the free space of {}: {error}", self.folder.display()))
        };
        let system = rustix::fs::statvfs(&self.folder).map_err(failed)?;
        Ok(system.f_bavail.saturating_mul(system.f_frsize))
    }

    /// That so many bytes that are still to come of an image have no room, with the numbers.
    pub(super) fn no_space(&self, bytes: u64) -> Failure {
        let free = match self.free() {
            Ok(free) => format!("{} MiB are free", free / MIB),
            Err(failure) => failure.message,
        };
        Failure::new(format!(
            "{} has no space for the image: {free}, and {} MiB for what is to come of it and {} MiB to spare are needed",
            self.folder.display(),
            bytes.div_ceil(MIB),
            SPARE_SPACE / MIB
        ))
        .with_remedy(format!(
            "remove images that are no longer used (`ls -lt {}`), or enlarge the file system",
            self.folder.display()
        ))
    }

    /// A new file for an image, to be written to and read from.
    pub(super) fn incoming(&self) -> Outcome<Incoming> {
        let path = self.folder.join(format!("{}{PARTIAL}", random_name()));
        let file = self.disk.create(&path);
        let file = file.map_err(|error| Failure::from_error(&FileError::io("create", &path)(error)))?;
        Ok(Incoming { path, file: Arc::new(file), disk: self.disk.clone(), goes: true })
    }

    /// The file of a download that goes on; `None` if it is not there, has another size, or can't be written to: one that was
    /// about to be kept when the process ended is read-only already.
    ///
    /// # Errors
    /// What is missing to open any file at all: it may be there the next time.
    pub(super) fn reopen(&self, name: &str, size: u64) -> Result<Option<Incoming>, FileError> {
        let path = self.folder.join(name);
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if is_shortage(&error) => return Err(FileError::io("open", &path)(error)),
            Err(error) => {
                tracing::warn!("a download is not continued: {} can't be opened: {error}", path.display());
                return Ok(None);
            }
        };
        let found = file.metadata().map_err(FileError::io("look at", &path))?;
        let incoming = Incoming { path, file: Arc::new(file), disk: self.disk.clone(), goes: false };
        Ok((found.is_file() && found.len() == size).then_some(incoming))
    }

    /// Keeps an image that was measured and verified, and remembers the file as it was proven. `measured` is how it was when it
    /// was written last, before its measuring ended. If the same image is there already and its proof holds, that one stays, since others may be at it, and
    /// this one goes; else it is replaced.
    pub(super) fn keep(&self, incoming: Incoming, measured: &FileStamp, digest: &EifDigest) -> Outcome<()> {
        let kept = self.path(digest);
        let _placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(proven), Ok(there)) = (self.proof(digest), fs::metadata(&kept))
            && proven == FileStamp::of(&there)
        {
            return Ok(());
        }
        let keep = || {
            self.disk.make_read_only(&incoming.path).map_err(FileError::io("make read-only", &incoming.path))?;
            self.disk.rename(&incoming.path, &kept).map_err(FileError::io("replace", &kept))?;
            self.sync_folder()?;
            incoming.file.metadata().map_err(FileError::io("look at", &kept))
        };
        let now = FileStamp::of(&keep().map_err(|error| Failure::from_error(&error))?);
        let _resumable = incoming.resumable();
        if now.has_contents_of(measured) {
            self.note_proof(digest, now);
            Ok(())
        } else {
            self.forget_image(digest)?;
            Err(Failure::new(format!("{} was written to while it was measured", kept.display()))
                .with_remedy("see what else writes to the folder of images"))
        }
    }

    /// Remembers that a file was proven as it is.
    pub(super) fn note_proof(&self, digest: &EifDigest, stamp: FileStamp) {
        self.proven.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest, stamp);
    }

    /// As the file was when this process proved it.
    pub(super) fn proof(&self, digest: &EifDigest) -> Option<FileStamp> {
        self.proven.lock().unwrap_or_else(PoisonError::into_inner).get(digest).copied()
    }

    /// Removes the image of that digest and all that leads to it, if it still is the file that was found to be something else;
    /// says whether it was.
    pub(super) fn forget_spoilt(&self, digest: &EifDigest, found: &FileStamp) -> Outcome<bool> {
        let _placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(there) if FileStamp::of(&there).is_file_of(found) => self.forget_image(digest).map(|()| true),
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Failure::from_error(&FileError::io("look at", &path)(error))),
        }
    }

    /// Removes an image and all that leads to it.
    pub(super) fn forget_image(&self, digest: &EifDigest) -> Outcome<()> {
        self.proven.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
        self.remove_file(&self.path(digest))?;
        for (path, entry) in self.entries()? {
            if entry.digest == *digest {
                self.remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether this process or this host has too little of something to open files, whichever they are.
fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// The name of a request in the folder.
pub(super) fn request_id(request: &ImageRequest) -> Outcome<EifDigest> {
    let text = serde_json::to_vec(request)
        .map_err(|error| Failure::new(format!("the request for {} can't be named: {error}", request.source)))?;
    Ok(EifDigest(Sha256::digest(text).into()))
}

fn random_name() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn only_a_shortage_of_this_host_lets_a_download_wait_to_be_continued() {
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert!(is_shortage(&errno.into()), "{errno}");
        }
        for errno in [Errno::ACCESS, Errno::PERM, Errno::LOOP, Errno::ISDIR, Errno::TXTBSY, Errno::IO] {
            assert!(!is_shortage(&errno.into()), "{errno}");
        }
    }
}
