//! Notes of stops by hand, one file a launch, in a folder that outlives the boot: unlike the traces of the launch. Who stops an
//! enclave's unit while enclaved does not run, and reboots then, wants it to stay stopped. A note goes when the hold is in the ledger.

use crate::atomic_file::{self, FileError};
use crate::launch_trace::Asked;
use enclaved_core::id::EnclaveKey;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// No note is longer.
const MAX_FILE: u64 = 4096;
const SUFFIX: &str = ".json";

/// The folder of the notes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopNotes(PathBuf);

impl StopNotes {
    /// The notes in that folder, which need not exist.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    fn path(&self, key: &EnclaveKey) -> PathBuf {
        self.0.join(format!("{key}{SUFFIX}"))
    }

    /// Writes a note; it is on disk then.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self, key: &EnclaveKey, asked: &Asked) -> Result<(), FileError> {
        atomic_file::write_json(&self.path(key), asked)
    }

    /// The note of that launch. One that is there and can't be understood counts: that there is one is what it says.
    ///
    /// # Errors
    /// It can't be read.
    pub fn is_noted(&self, key: &EnclaveKey) -> Result<bool, FileError> {
        match atomic_file::read(&self.path(key), MAX_FILE) {
            Ok(note) => Ok(note.is_some()),
            Err(error) if error.is_about_contents() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The launches of which there are notes.
    ///
    /// # Errors
    /// The folder can't be listed.
    pub fn keys(&self) -> Result<Vec<EnclaveKey>, FileError> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(FileError::io("list", &self.0)(error)),
        };
        let mut keys = Vec::new();
        for entry in entries {
            let name = entry.map_err(FileError::io("list", &self.0))?.file_name();
            let key = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).and_then(|key| key.parse().ok());
            keys.extend(key);
        }
        Ok(keys)
    }

    /// Removes the note of that launch, if there is one.
    ///
    /// # Errors
    /// It can't be removed, or the removal not be made to last.
    pub fn remove(&self, key: &EnclaveKey) -> Result<(), FileError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Ok(()) => atomic_file::sync_folder(&self.0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(FileError::io("remove", &path)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::id::{BootId, Timestamp};
    use enclaved_core::observed::AskedBy;

    #[test]
    fn a_note_is_there_until_it_is_removed_and_other_files_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let notes = StopNotes::new(folder.path().join("stopped"));
        let (one, other): (EnclaveKey, EnclaveKey) = ("signer-3".parse().unwrap(), "vault-1".parse().unwrap());
        assert_eq!(notes.keys().unwrap(), []);
        notes.remove(&one).unwrap();
        fs::create_dir(notes.folder()).unwrap();
        let asked = Asked { boot_id: BootId("b".to_owned()), at: Timestamp::from_millis(5), by: AskedBy::Stop };
        notes.write(&one, &asked).unwrap();
        fs::write(notes.folder().join("README"), "").unwrap();
        fs::write(notes.folder().join("vault-1.json"), "{\"boot").unwrap();
        let mut keys = notes.keys().unwrap();
        keys.sort();
        assert_eq!(keys, [one.clone(), other.clone()]);
        assert!(notes.is_noted(&one).unwrap() && notes.is_noted(&other).unwrap());
        notes.remove(&one).unwrap();
        assert!(!notes.is_noted(&one).unwrap());
    }
}
