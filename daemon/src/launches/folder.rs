//! The folder of a launch's traces: made and removed as a whole, so that it is never seen in between.

use super::{HIDDEN, fault};
use crate::atomic_file::{self, FileError};
use crate::host::Outcome;
use crate::launch_trace::{LaunchSpec, Trace};
use enclaved_core::id::EnclaveKey;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Makes the folder of a launch, whole: what is in it is on disk before its name is there. False if there is one.
pub(super) fn make_trace(folder: &Path, spec: &LaunchSpec) -> Result<bool, FileError> {
    let trace = folder.join(spec.key.to_string());
    let hidden = folder.join(format!("{HIDDEN}new-{}", spec.key));
    match fs::remove_dir_all(&hidden) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(FileError::io("remove", &hidden)(error)),
    }
    fs::DirBuilder::new().mode(0o700).create(&hidden).map_err(FileError::io("make folder", &hidden))?;
    Trace::new(&hidden).write_spec(spec)?;
    // The folder of a launch is never empty, and a rename replaces only an empty one.
    match fs::rename(&hidden, &trace) {
        Ok(()) => atomic_file::sync_folder(folder).map(|()| true),
        Err(_) if trace.exists() => Ok(false),
        Err(error) => Err(FileError::io("make folder", &trace)(error)),
    }
}

/// Removes the traces of a launch; half-removed ones are never seen.
pub(super) fn remove_trace(folder: &Path, key: &EnclaveKey) -> Outcome<()> {
    let trace = folder.join(key.to_string());
    let hidden = folder.join(format!("{HIDDEN}gone-{key}"));
    let removed = (|| {
        if hidden.exists() {
            fs::remove_dir_all(&hidden).map_err(FileError::io("remove", &hidden))?;
        }
        match fs::rename(&trace, &hidden) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(FileError::io("remove", &trace)(error)),
        }
        atomic_file::sync_folder(folder)?;
        fs::remove_dir_all(&hidden).map_err(FileError::io("remove", &hidden))
    })();
    removed.map_err(|error| fault(&error))
}
