//! Looks at files: what is at a path and above it, how much room there is, what the kernel's small files say.

use crate::atomic_file;
use crate::host::inventory::Roots;
use enclaved_core::diagnosis::access::{Account, ENTER, Node, NodeKind, PathSeen, WRITE};
use enclaved_core::diagnosis::system::DiskSeen;
use enclaved_core::failure::Failure;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A path, and all folders above it that are there.
pub(super) fn path_seen(path: &Path) -> Result<PathSeen, Failure> {
    let mut above = Vec::new();
    for folder in path.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
        match node(folder) {
            Ok(found) => above.extend(found),
            // Below a folder that may not be entered. That folder itself can be looked at.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(failed(folder, &error)),
        }
    }
    above.reverse();
    let node = node(path).map_err(|error| failed(path, &error))?;
    Ok(PathSeen { path: path.display().to_string(), above, node })
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("could not look at {}: {error}", path.display()))
}

fn node(path: &Path) -> io::Result<Option<Node>> {
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let kind = match found.file_type() {
        kind if kind.is_dir() => NodeKind::Folder,
        kind if kind.is_file() => NodeKind::File,
        _ => NodeKind::Other,
    };
    let (mode, uid, gid) = (found.mode() & 0o7777, found.uid(), found.gid());
    Ok(Some(Node { path: path.display().to_string(), kind, mode, uid, gid }))
}

/// The file system of a folder, which need not be there yet.
pub(super) fn disk(folder: &Path, account: Option<&Account>) -> Result<DiskSeen, Failure> {
    let there = nearest(folder);
    let found = rustix::fs::statvfs(&there).map_err(|error| failed(&there, &error.into()))?;
    // The daemon makes the folder if it may: then what counts is the one above.
    let kept_from = account.map(|account| Ok(account.kept_from(&path_seen(&there)?, WRITE | ENTER))).transpose()?;
    Ok(DiskSeen {
        path: folder.display().to_string(),
        free: found.f_bavail.saturating_mul(found.f_frsize),
        // File systems that make inodes as they go tell none at all.
        free_inodes: (found.f_files > 0).then_some(found.f_favail),
        kept_from: kept_from.flatten(),
    })
}

fn nearest(folder: &Path) -> PathBuf {
    let is_there = |folder: &&Path| std::fs::metadata(folder).is_ok();
    folder.ancestors().find(is_there).unwrap_or(Path::new("/")).to_owned()
}

/// A small file of text.
pub(super) fn text(path: &Path, limit: u64) -> Result<String, Failure> {
    let bytes = atomic_file::read(path, limit).map_err(|error| Failure::from_error(&error))?;
    let bytes = bytes.ok_or_else(|| Failure::new(format!("{} is missing", path.display())))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first word of a small file of the kernel's.
pub(super) fn word(path: &Path) -> Result<String, Failure> {
    let text = text(path, 4096)?;
    let word = text.split_whitespace().next();
    word.map(str::to_owned).ok_or_else(|| Failure::new(format!("{} is empty", path.display())))
}

/// What keeps the clock right, by what it leaves in /run.
pub(super) fn clock_keeper(roots: &Roots) -> Option<String> {
    let is_there = |path: &str| path_seen(&roots.root.join(path)).is_ok_and(|seen| seen.node.is_some());
    // systemd-timesyncd(8): made with the first answer of a time server.
    if is_there("run/systemd/timesync/synchronized") {
        return Some("systemd-timesyncd".to_owned());
    }
    // chronyd's folder is there while it runs, whether or not others may look into it.
    is_there("run/chrony").then(|| "chrony".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::diagnosis::access::READ;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn nobody() -> Account {
        let groups = [65_534].into();
        Account { name: "nobody".to_owned(), uid: 65_534, groups, is_this_process: false, how: "test".to_owned() }
    }

    #[test]
    fn a_path_is_seen_with_all_above_it_and_a_missing_one_with_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "x").unwrap();
        let seen = path_seen(&path).unwrap();
        assert_eq!(seen.above.first().unwrap().path, "/");
        assert_eq!(seen.above.last().unwrap().path, folder.path().display().to_string());
        assert_eq!(seen.node.as_ref().unwrap().kind, NodeKind::File);
        assert!(nobody().kept_from(&seen, READ).unwrap().contains("may not enter"));
        assert_eq!(path_seen(&folder.path().join("no/such/file")).unwrap().node, None);
    }

    #[test]
    fn a_state_folder_has_room_or_is_not_for_this_user() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let seen = disk(&folder.path().join("not/made/yet"), Some(&nobody())).unwrap();
        assert!(seen.free > 0 && seen.path.ends_with("not/made/yet"), "{seen:?}");
        assert!(seen.kept_from.unwrap().contains("may not write to"));
        assert_eq!(disk(folder.path(), None).unwrap().kept_from, None);
    }

    #[test]
    fn the_first_word_of_a_file_is_read_and_an_empty_or_missing_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("current_clocksource");
        assert!(word(&path).unwrap_err().message.contains("is missing"));
        fs::write(&path, "\n").unwrap();
        assert!(word(&path).unwrap_err().message.contains("is empty"));
        fs::write(&path, "tsc\n").unwrap();
        assert_eq!(word(&path).unwrap(), "tsc");
    }

    #[test]
    fn whoever_keeps_the_clock_is_known_by_what_it_leaves_in_run() {
        let folder = tempfile::tempdir().unwrap();
        let roots = Roots::below(folder.path());
        assert_eq!(clock_keeper(&roots), None);
        fs::create_dir_all(folder.path().join("run/chrony")).unwrap();
        assert_eq!(clock_keeper(&roots).as_deref(), Some("chrony"));
        fs::create_dir_all(folder.path().join("run/systemd/timesync")).unwrap();
        fs::write(folder.path().join("run/systemd/timesync/synchronized"), "").unwrap();
        assert_eq!(clock_keeper(&roots).as_deref(), Some("systemd-timesyncd"));
    }
}
