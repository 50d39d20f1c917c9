//! One run at a time, and a sign for the daemon that one is at work. The sign is a lock, so that it goes away with the process, however
//! that ends. It is one that only root can hold: whoever may read a file may hold a lock of flock(2) on it, or a shared one of
//! fcntl(2), but an exclusive one of fcntl(2) takes a descriptor that can write.

use enclaved_core::failure::Failure;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::{Flock, FlockType, fcntl_getlk};
use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The daemon looks for a moment only.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// On which file a run that writes its report there holds a lock while it is at work.
fn at_work_file(report: &Path) -> PathBuf {
    report.with_file_name("at-work")
}

/// Whether a run that writes its report there is at work, whoever started it. Without evidence it is not.
pub fn is_at_work(report: &Path) -> bool {
    let Ok(file) = File::open(at_work_file(report)) else { return false };
    // What is in the way of a shared lock is an exclusive one. Nothing is locked by asking.
    matches!(fcntl_getlk(&file, &Flock::from(FlockType::ReadLock)), Ok(Some(_)))
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

/// Shows that this run is at work, for as long as the file is held and this process opens it nowhere else. The file is a new one each
/// time, locked before others can open it: so no lock of theirs is in the way.
pub(super) fn show_at_work(report: &Path) -> Result<File, Failure> {
    let path = at_work_file(report);
    let new = path.with_file_name(".at-work.new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("removing", &new, &error)),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new);
    let file = file.map_err(|error| failed("making", &new, &error))?;
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| failed("locking", &new, &error.into()))?;
    let shown = file.set_permissions(Permissions::from_mode(0o644)).and_then(|()| std::fs::rename(&new, &path));
    shown.map_err(|error| failed("making", &path, &error))?;
    Ok(file)
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
pub(crate) mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::process::{Child, ChildStdout, Command, Stdio};

    /// A lock on a file that another process holds: this one's own are not in its way.
    pub(crate) struct Elsewhere(Child, ChildStdout);

    const HOLD: &str = "ENCLAVED_TEST_HOLDS";

    impl Elsewhere {
        /// The sign of a run that writes its report there (`show`), or a lock such as those who may only read can have.
        pub(crate) fn hold(report: &Path, how: &str) -> Self {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--nocapture", "allocate::lock::tests::only_root_can_show_that_it_is_at_work"])
                .env(HOLD, format!("{how} {}", report.display()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdout = child.stdout.take().unwrap();
            let mut said = String::new();
            while !said.contains("held\n") {
                let mut byte = [0];
                assert_eq!(stdout.read(&mut byte).unwrap(), 1, "it ended: {said}");
                said.push(char::from(byte[0]));
            }
            Self(child, stdout)
        }
    }

    impl Drop for Elsewhere {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _said = self.1.read_to_end(&mut Vec::new());
            let _status = self.0.wait();
        }
    }

    /// What the other process does: it holds the lock until its input ends.
    fn hold(what: &str) {
        let (how, report) = what.split_once(' ').unwrap();
        let report = Path::new(report);
        let reading = || File::open(at_work_file(report)).unwrap();
        let _held = match how {
            "show" => show_at_work(report).unwrap(),
            "flock" => {
                let file = reading();
                file.lock().unwrap();
                file
            }
            "shared" => {
                let file = reading();
                fcntl_lock(&file, FlockOperation::LockExclusive).unwrap_err();
                fcntl_lock(&file, FlockOperation::LockShared).unwrap();
                file
            }
            other => panic!("{other}"),
        };
        std::io::stdout().write_all(b"held\n").unwrap();
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }

    #[test]
    fn only_root_can_show_that_it_is_at_work() {
        if let Ok(what) = std::env::var(HOLD) {
            return hold(&what);
        }
        let folder = tempfile::tempdir().unwrap();
        let report = folder.path().join("report.json");
        assert!(!is_at_work(&report), "there is no file yet");
        let sign = Elsewhere::hold(&report, "show");
        assert!(is_at_work(&report));
        drop(sign);
        assert!(!is_at_work(&report), "it goes with its process");
        // Those who may only read the file show nothing, and are in nobody's way.
        for how in ["flock", "shared"] {
            let _stranger = Elsewhere::hold(&report, how);
            assert!(!is_at_work(&report), "{how}");
            let sign = Elsewhere::hold(&report, "show");
            assert!(is_at_work(&report), "{how}");
            drop(sign);
        }
    }

    #[test]
    fn one_run_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let report = folder.path().join("report.json");
        let first = alone(&report).unwrap();
        assert!(alone(&report).unwrap_err().message.contains("another `enclaved allocate` is at work"));
        drop(first);
        alone(&report).unwrap();
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
