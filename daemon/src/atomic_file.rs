//! Files that are whole or not there: written beside their place, flushed to disk, and renamed over it; and reading that
//! can't be made to fill the memory. Knows nothing of what is in them, except that it may be JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system says why.
    #[error("could not {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is longer than anything of its kind can be.
    #[error("{} is longer than {limit} bytes", path.display())]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// How much would have been read.
        limit: u64,
    },
    /// What is in it is not what should be.
    #[error("{} is not understood", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
}

impl FileError {
    /// For `map_err`: puts the operation and the path to an error of the operating system.
    pub fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }

    /// Whether the file can't be used because of what is in it, rather than because it could not be read just now.
    pub fn is_about_contents(&self) -> bool {
        matches!(self, Self::TooLong { .. } | Self::Malformed { .. })
    }
}

/// Puts a file in place of the one at `path`, if there is one: after a crash at any point the old or the new one is there.
/// Only this user can read it (0600).
///
/// # Errors
/// What could not be done; the old file is then still there.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_with_mode(path, bytes, 0o600)
}

/// [`write`] of a file with these permissions, whatever the umask. Whatever is in the place of the temporary file is removed and never
/// opened: a link there leads nowhere, and a pipe holds nothing up.
///
/// # Errors
/// As [`write`].
pub fn write_with_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let temporary = temporary_beside(path);
    let written = (|| {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::io("remove", &temporary)(error));
            }
            _ => {}
        }
        // A new file only: with O_EXCL the kernel follows no link either (open(2)).
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(FileError::io("create", &temporary))?;
        file.write_all(bytes).map_err(FileError::io("write", &temporary))?;
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(FileError::io("set the permissions of", &temporary))?;
        file.sync_all().map_err(FileError::io("flush to disk", &temporary))?;
        fs::rename(&temporary, path).map_err(FileError::io("replace", path))
    })();
    if written.is_err() {
        // The first error is the one to tell; this file is removed by the next try if it can't be removed.
        let _ignored = fs::remove_file(&temporary);
        return written;
    }
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// [`write`] of a value as JSON.
///
/// # Errors
/// As [`write`].
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|source| FileError::Malformed { path: path.to_owned(), source })?;
    bytes.push(b'\n');
    write(path, &bytes)
}

/// The whole file; `None` if there is none.
///
/// # Errors
/// It can't be read, or it is longer than `limit` bytes.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FileError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(FileError::io("read", path))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= limit) {
        Ok(Some(bytes))
    } else {
        Err(FileError::TooLong { path: path.to_owned(), limit })
    }
}

/// [`read`] of a value from JSON.
///
/// # Errors
/// As [`read`], and what is not understood.
pub fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<Option<T>, FileError> {
    let Some(bytes) = read(path, limit)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|source| FileError::Malformed { path: path.to_owned(), source })
}

/// Makes the folder's entries (a new name, a rename, a removal) survive a power cut.
///
/// # Errors
/// It can't be opened or flushed.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    let file = File::open(folder).map_err(FileError::io("open", folder))?;
    file.sync_all().map_err(FileError::io("flush to disk", folder))
}

/// `.<name>.tmp` in the same folder: hidden, so that whoever lists the folder can leave it out.
fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_json(&path, &vec![1, 2, 3]).unwrap();
        write_json(&path, &vec![4]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path, 1024).unwrap(), Some(vec![4]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_gets_the_permissions_that_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write(&path, b"x").unwrap();
        write_with_mode(&path, b"y", 0o646).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o646);
    }

    #[test]
    fn a_link_or_a_pipe_in_the_place_of_the_temporary_file_is_neither_followed_nor_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (path, victim) = (folder.path().join("a"), folder.path().join("victim"));
        fs::write(&victim, "whole").unwrap();
        std::os::unix::fs::symlink(&victim, temporary_beside(&path)).unwrap();
        write(&path, b"x").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "whole");
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, temporary_beside(&path), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        // Opened, it would wait for a reader for ever.
        write(&path, b"y").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "y");
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::create_dir(&path).unwrap();
        let error = write(&path, b"x").unwrap_err();
        assert!(error.to_string().contains("could not replace"), "{error}");
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_file_is_none_and_a_long_or_garbled_one_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        assert!(read(&path, 10).unwrap().is_none());
        fs::write(&path, "0123456789").unwrap();
        assert_eq!(read(&path, 10).unwrap().unwrap().len(), 10);
        let error = read(&path, 9).unwrap_err();
        assert!(error.is_about_contents() && error.to_string().contains("/a is longer than 9 bytes"), "{error}");
        fs::write(&path, "{").unwrap();
        assert!(read_json::<Vec<u32>>(&path, 10).unwrap_err().is_about_contents());
    }
}
