//! One run at a time, and a sign for the daemon that one is at work. The sign is a lock, so that it goes away with the process, however
//! that ends; and one of its own, as whoever may read a file may hold a lock on it.

use enclaved_core::failure::Failure;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The daemon looks for a moment only.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// On which file a run that writes its report there holds a lock while it is at work.
pub fn at_work_file(report: &Path) -> PathBuf {
    report.with_file_name("at-work")
}

/// Held for as long as the command runs.
pub(super) fn alone(report: &Path) -> Result<File, Failure> {
    let path = report.with_file_name("lock");
    let file = open(&path, 0o600)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::new(format!("another `enclaved allocate` is at work (it holds {})", path.display())))
        }
        Err(TryLockError::Error(error)) => Err(failed("locking", &path, &error)),
    }
}

/// Shows that this run is at work, for as long as the file is held. Somebody else's lock on it is no reason not to work.
pub(super) async fn show_at_work(report: &Path) -> Result<File, Failure> {
    let path = at_work_file(report);
    let file = open(&path, 0o644)?;
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if tokio::time::Instant::now() < until => tokio::time::sleep(PAUSE).await,
            Err(TryLockError::WouldBlock) => {
                tracing::warn!("somebody holds a lock on {}: the daemon does not see that this runs", path.display());
                return Ok(file);
            }
            Err(TryLockError::Error(error)) => return Err(failed("locking", &path, &error)),
        }
    }
}

/// Keeps every launch of enclaved from beginning for as long as the file is held. `None`: nobody has ever launched.
///
/// The file is the daemon's, in a folder of the daemon's: it is only opened for reading, and a link or a pipe in its place is refused.
///
/// # Errors
/// A launch is under way, or that can't be told.
pub(super) async fn no_launch(path: &Path) -> Result<Option<File>, Failure> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("opening", path, &error)),
    };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(Failure::new(format!("{} is no file", path.display())));
    }
    // A look of the daemon's holds it for a moment, too.
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) if tokio::time::Instant::now() < until => tokio::time::sleep(PAUSE).await,
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(format!(
                    "an enclave is being launched (its launch holds {}); what is reserved changes only while none is",
                    path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(failed("locking", path, &error)),
        }
    }
}

/// The folder is root's alone, so nobody else put anything in their places.
fn open(path: &Path, mode: u32) -> Result<File, Failure> {
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(mode).open(path);
    opened.map_err(|error| failed("opening", path, &error))
}

fn failed(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("{doing} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_run_at_a_time_and_its_sign_goes_with_it_but_a_stranger_holds_none_up() {
        let folder = tempfile::tempdir().unwrap();
        let report = folder.path().join("report.json");
        let first = alone(&report).unwrap();
        assert!(alone(&report).unwrap_err().message.contains("another `enclaved allocate` is at work"));
        drop(first);
        let _again = alone(&report).unwrap();

        let seen = || File::open(at_work_file(&report)).unwrap().try_lock_shared().is_err();
        let sign = show_at_work(&report).await.unwrap();
        assert!(seen());
        drop(sign);
        assert!(!seen());
        // Nobody outside the daemon's group can get at it.
        let stranger = File::open(at_work_file(&report)).unwrap();
        stranger.lock_shared().unwrap();
        show_at_work(&report).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn no_launch_begins_while_the_lock_is_held_and_one_under_way_is_not_disturbed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("launch.lock");
        assert!(no_launch(&path).await.unwrap().is_none(), "and none is made: it is the daemon's");
        assert!(!path.exists());
        let launch = open(&path, 0o600).unwrap();
        launch.lock().unwrap();
        assert!(no_launch(&path).await.unwrap_err().message.contains("an enclave is being launched"));
        drop(launch);
        let held = no_launch(&path).await.unwrap();
        assert!(open(&path, 0o600).unwrap().try_lock().is_err(), "a launch waits");
        drop(held);
        open(&path, 0o600).unwrap().try_lock().unwrap();
        std::fs::rename(&path, folder.path().join("other")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("other"), &path).unwrap();
        assert!(no_launch(&path).await.is_err(), "its folder is the daemon's, who could have root hold any file");
    }
}
