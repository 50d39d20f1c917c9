//! The folder of images. Each is kept once, as `<sha256>.eif`; a small file for each request, named by the request's own
//! SHA-256, says which image it came to. Nothing here is believed without being measured again.
//!
//! | name | what |
//! |---|---|
//! | `<sha256>.eif` | an image; read-only |
//! | `<sha256 of the request>.json` | a request and its image's digest |
//! | `.incoming-<number>` | an image on its way, removed unless it is proven |

use crate::atomic_file::{self, FileError};
use crate::host::Outcome;
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::id::EifDigest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const INCOMING: &str = ".incoming-";
/// A request is an address and a few digests.
const MAX_ENTRY: u64 = 64 * 1024;
/// This much of the file system stays free, for the ledger and the logs.
const SPARE_SPACE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    next: AtomicU64,
}

/// What a request came to.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    request: ImageRequest,
    digest: EifDigest,
}

/// A file for an image on its way. It goes when this is dropped, unless the image was kept.
#[derive(Debug)]
pub(super) struct Incoming {
    path: PathBuf,
}

impl Cache {
    pub(super) fn open(folder: &Path) -> Outcome<Self> {
        let failed = |error: FileError| {
            Failure::from_error(&error).with_remedy("check the owner and the permissions of the state folder")
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(folder).map_err(|error| failed(FileError::io("make folder", folder)(error)))?;
        for entry in fs::read_dir(folder).map_err(|error| failed(FileError::io("list", folder)(error)))? {
            let entry = entry.map_err(|error| failed(FileError::io("list", folder)(error)))?;
            if entry.file_name().to_string_lossy().starts_with(INCOMING) {
                fs::remove_file(entry.path()).map_err(|error| failed(FileError::io("remove", &entry.path())(error)))?;
            }
        }
        Ok(Self { folder: folder.to_owned(), next: AtomicU64::new(1) })
    }

    pub(super) fn path(&self, digest: &EifDigest) -> PathBuf {
        self.folder.join(format!("{digest}.eif"))
    }

    fn entry_path(&self, request: &ImageRequest) -> Outcome<PathBuf> {
        let text = serde_json::to_vec(request)
            .map_err(|error| Failure::new(format!("the request for {} can't be named: {error}", request.source)))?;
        Ok(self.folder.join(format!("{}.json", EifDigest(Sha256::digest(text).into()))))
    }

    /// What that request came to, by its index entry. An entry that is not understood is none.
    pub(super) fn find(&self, request: &ImageRequest) -> Outcome<Option<EifDigest>> {
        match atomic_file::read_json::<Entry>(&self.entry_path(request)?, MAX_ENTRY) {
            Ok(entry) => Ok(entry.filter(|entry| entry.request == *request).map(|entry| entry.digest)),
            Err(error) if error.is_about_contents() => {
                tracing::warn!("an entry of the image cache is not used: {}", Failure::from_error(&error));
                Ok(None)
            }
            Err(error) => Err(Failure::from_error(&error)),
        }
    }

    /// Removes an image that is not what it was.
    pub(super) fn forget(&self, request: &ImageRequest, digest: &EifDigest) -> Outcome<()> {
        for path in [self.path(digest), self.entry_path(request)?] {
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::from_error(&FileError::io("remove", &path)(error))),
            }
        }
        Ok(())
    }

    /// Whether an image of that size can be taken.
    pub(super) fn check_space(&self, bytes: u64) -> Outcome<()> {
        let failed = |error: rustix::io::Errno| {
            Failure::new(format!("could not learn the free space of {}: {error}", self.folder.display()))
        };
        let system = rustix::fs::statvfs(&self.folder).map_err(failed)?;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        if bytes.saturating_add(SPARE_SPACE) <= free {
            return Ok(());
        }
        Err(Failure::new(format!(
            "{} has no space for the image: {} MiB are free, and {} MiB for the image and {} MiB to spare are needed",
            self.folder.display(),
            free / MIB,
            bytes.div_ceil(MIB),
            SPARE_SPACE / MIB
        ))
        .with_remedy(format!(
            "remove images that are no longer used (`ls -lt {}`), or enlarge the file system",
            self.folder.display()
        )))
    }

    /// A new file for an image, to be written to and measured.
    pub(super) fn incoming(&self) -> Outcome<(Incoming, File)> {
        let path = self.folder.join(format!("{INCOMING}{}", self.next.fetch_add(1, Ordering::Relaxed)));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|error| Failure::from_error(&FileError::io("create", &path)(error)))?;
        Ok((Incoming { path }, file))
    }

    /// Keeps an image that was proven, and notes that this request came to it.
    pub(super) fn keep(&self, incoming: Incoming, request: &ImageRequest, digest: &EifDigest) -> Outcome<()> {
        let kept = self.path(digest);
        let keep = || {
            fs::set_permissions(&incoming.path, Permissions::from_mode(0o400))
                .map_err(FileError::io("make read-only", &incoming.path))?;
            // If the same image is there already, its file is replaced by one with the same contents, now proven.
            fs::rename(&incoming.path, &kept).map_err(FileError::io("replace", &kept))?;
            atomic_file::sync_folder(&self.folder)
        };
        keep().map_err(|error| Failure::from_error(&error))?;
        let entry = Entry { request: request.clone(), digest: *digest };
        atomic_file::write_json(&self.entry_path(request)?, &entry).map_err(|error| Failure::from_error(&error))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Ok(()) => {}
            // It was kept under another name.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("could not remove {}: {error}", self.path.display()),
        }
    }
}
