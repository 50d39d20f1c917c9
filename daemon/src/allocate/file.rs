//! The stock allocator's file on disk: replaced as a whole, and never at the cost of one that somebody else wrote.

use crate::atomic_file::{self, FileError};
use enclaved_core::allocator_file::{self, Reservation};
use enclaved_core::failure::Failure;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How many files of others are kept. More is not somebody's editing.
const MAX_BACKUPS: u32 = 100;

/// Writes the file, unless it is there already. Returns where the former one was kept, if it was somebody else's.
pub(super) fn write(path: &Path, reservation: &Reservation) -> Result<Option<PathBuf>, Failure> {
    let wanted = allocator_file::write(reservation);
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .map_err(|error| Failure::new(format!("could not make {}: {error}", folder.display())))?;
        only_ours(folder).map_err(|failure| {
            failure.with_remedy(format!(
                "`chown root {0} && chmod go-w {0}`, if nobody else has to write there",
                folder.display()
            ))
        })?;
    }
    let there = atomic_file::read(path, allocator_file::MAX_FILE).map_err(|error| Failure::from_error(&error))?;
    if there.as_deref() == Some(wanted.as_bytes()) {
        return Ok(None);
    }
    let ours = |bytes: &Vec<u8>| allocator_file::is_ours(&String::from_utf8_lossy(bytes));
    let backup = match there.filter(|bytes| !ours(bytes)) {
        Some(bytes) => Some(keep(path, &bytes)?),
        None => None,
    };
    // The stock allocator and nitro-cli's users read it.
    atomic_file::write_with_mode(path, wanted.as_bytes(), 0o644).map_err(|error| Failure::from_error(&error))?;
    Ok(backup)
}

/// The file as it is, to be put back; `None`: there is none.
pub(super) fn former(path: &Path) -> Result<Option<Vec<u8>>, Failure> {
    atomic_file::read(path, allocator_file::MAX_FILE).map_err(|error| Failure::from_error(&error))
}

/// Puts back what was there, or that nothing was, in the place of what was written here.
pub(super) fn put_back(path: &Path, wrote: &Reservation, before: Option<&[u8]>) -> Result<(), Failure> {
    if former(path)?.as_deref() != Some(allocator_file::write(wrote).as_bytes()) {
        return Ok(());
    }
    let put = match before {
        Some(bytes) => atomic_file::write_with_mode(path, bytes, 0o644),
        None => match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(FileError::io("remove", path)(error)),
            _ => Ok(()),
        },
    };
    put.map_err(|error| Failure::from_error(&error))
}

/// Copies it beside itself, under a name that no other content has.
fn keep(path: &Path, bytes: &[u8]) -> Result<PathBuf, Failure> {
    for number in 0..MAX_BACKUPS {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".before-enclaved");
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let backup = path.with_file_name(name);
        let there =
            atomic_file::read(&backup, allocator_file::MAX_FILE).map_err(|error| Failure::from_error(&error))?;
        match there {
            Some(there) if there == bytes => return Ok(backup),
            Some(_) => {}
            None => {
                atomic_file::write_with_mode(&backup, bytes, 0o644).map_err(|error| Failure::from_error(&error))?;
                return Ok(backup);
            }
        }
    }
    Err(Failure::new(format!(
        "{} is not replaced: there are {MAX_BACKUPS} former ones beside it already",
        path.display()
    ))
    .with_remedy("remove the files whose names end in .before-enclaved that nobody needs"))
}

/// That only this user can write in that folder: a link that somebody else puts there could lead a write of root's anywhere.
pub(super) fn only_ours(folder: &Path) -> Result<(), Failure> {
    let metadata = fs::symlink_metadata(folder)
        .map_err(|error| Failure::new(format!("could not look at {}: {error}", folder.display())))?;
    let me = rustix::process::geteuid().as_raw();
    if metadata.is_dir() && metadata.uid() == me && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{} must be a folder in which only its owner, who runs this, can write",
        folder.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::allocator_file::CpuRequest;
    use enclaved_core::id::MemoryMib;

    #[test]
    fn what_somebody_else_has_written_meanwhile_is_not_replaced_by_what_was_there_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("allocator.yaml");
        let wrote = Reservation { cpus: CpuRequest::Count(2), memory_mib: MemoryMib(1024) };
        for before in [None, Some(&b"---\nmemory_mib: 512\ncpu_count: 2\n"[..])] {
            write(&path, &wrote).unwrap();
            put_back(&path, &wrote, before).unwrap();
            assert_eq!(former(&path).unwrap().as_deref(), before);
            fs::write(&path, "---\nmemory_mib: 2048\ncpu_count: 4\n").unwrap();
            put_back(&path, &wrote, before).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "---\nmemory_mib: 2048\ncpu_count: 4\n");
        }
    }
}
