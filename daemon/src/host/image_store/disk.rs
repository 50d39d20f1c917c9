//! What the cache does to its disk, one operation at a time, so that a test can end the process between any two of them. No
//! operation here knows what it is for.

use rustix::fs::FallocateFlags;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// The disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) watched: Option<std::sync::Arc<super::tests::crash::Watch>>,
}

/// Tells the test that watches about an operation: before it, so that it can fail, and after it.
macro_rules! operation {
    ($disk:expr, $done:expr, $note:ident($($argument:expr),*)) => {{
        #[cfg(test)]
        if let Some(watch) = &$disk.watched {
            watch.before(stringify!($note))?;
        }
        let done = $done?;
        #[cfg(test)]
        if let Some(watch) = &$disk.watched {
            watch.$note(&done, $($argument),*);
        }
        Ok(done)
    }};
}

/// Whether it failed for want of space.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Disk {
    /// Whether a test keeps the books of what is flushed, so that nothing needs to be.
    fn is_watched(&self) -> bool {
        #[cfg(test)]
        return self.watched.is_some();
        #[cfg(not(test))]
        false
    }

    /// A new, empty file that only this user can read and write; there must be none of that name.
    pub(super) fn create(&self, path: &Path) -> io::Result<File> {
        let create = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        operation!(self, create(), created(path))
    }

    /// Sets space aside, so that what is written later finds it; the file has that size from now on.
    pub(super) fn reserve(&self, file: &File, size: u64) -> io::Result<()> {
        let reserve = || match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(size),
            other => other.map_err(io::Error::from),
        };
        operation!(self, reserve(), changed())
    }

    /// Writes at that place.
    pub(super) fn write_at(&self, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        operation!(self, file.write_all_at(bytes, at), changed())
    }

    /// Returns when all that was written to the file would survive a power cut.
    pub(super) fn sync(&self, file: &File) -> io::Result<()> {
        operation!(self, if self.is_watched() { Ok(()) } else { file.sync_all() }, synced(file))
    }

    /// Lets nobody write it any more.
    pub(super) fn make_read_only(&self, path: &Path) -> io::Result<()> {
        operation!(self, fs::set_permissions(path, Permissions::from_mode(0o400)), changed())
    }

    /// Gives it that name, in place of what has it.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        operation!(self, fs::rename(from, to), renamed(from, to))
    }

    /// Removes a file; succeeds if it is gone already.
    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        let remove = || match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        operation!(self, remove(), removed(path))
    }

    /// Returns when the names in the folder would survive a power cut.
    pub(super) fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let sync = || if self.is_watched() { Ok(()) } else { File::open(folder)?.sync_all() };
        operation!(self, sync(), folder_synced())
    }
}
