//! Files that survive: written whole or not at all, and put aside instead of lost when they are of no use. What is in them is
//! not known here.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// How many bad versions of one file are kept.
const QUARANTINED: u32 = 16;

/// Replaces a file. When this returns, the new content survives a power cut; until then, the old one does.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let new = with_suffix(path, ".new");
    // A leftover of a crash may have another mode.
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// Puts a file aside under the first free name `<name>.bad-<n>`, which is returned. When there are too many, the last is
/// replaced.
pub(crate) fn quarantine(path: &Path) -> io::Result<PathBuf> {
    let names = (1..=QUARANTINED).map(|n| with_suffix(path, &format!(".bad-{n}")));
    let last = with_suffix(path, &format!(".bad-{QUARANTINED}"));
    let target = names.into_iter().find(|name| std::fs::symlink_metadata(name).is_err()).unwrap_or(last);
    std::fs::rename(path, &target)?;
    Ok(target)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_no_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(with_suffix(&path, ".new"), "torn").unwrap();
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn bad_files_are_kept_up_to_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for n in 0..QUARANTINED + 5 {
            std::fs::write(&path, n.to_string()).unwrap();
            quarantine(&path).unwrap();
        }
        assert_eq!(std::fs::read_to_string(dir.path().join("f.bad-1")).unwrap(), "0");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), QUARANTINED as usize);
    }
}
