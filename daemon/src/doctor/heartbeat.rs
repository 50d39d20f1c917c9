//! Whether vsock port 9000 of the parent can be had: nitro-cli listens there for the heartbeat of an enclave that boots. Tried by
//! taking it for a moment, while enclaved itself is kept from launching.

use crate::launch_trace::LAUNCH_LOCK;
use enclaved_core::diagnosis::nitro::HeartbeatSeen;
use enclaved_core::failure::Failure;
use std::fs::{OpenOptions, TryLockError};
use std::io;
use std::path::Path;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// nitro-cli's port.
const PORT: u32 = 9000;

/// Takes the port of AF_VSOCK for a moment.
pub(super) fn take() -> io::Result<()> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT)).map(drop)
}

/// Looks, with `take` in the place of [`take`]. No launch of enclaved begins meanwhile; one that is under way holds the port by right.
pub(super) fn look(run_dir: &Path, take: impl FnOnce() -> io::Result<()>) -> Result<HeartbeatSeen, Failure> {
    let path = run_dir.join(LAUNCH_LOCK);
    // Not made here: it is the launches'. Without it there was none since the boot.
    let lock = match OpenOptions::new().write(true).open(&path) {
        Ok(lock) => Some(lock),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            let failure =
                Failure::new(format!("whether a launch is under way can't be told: {}: {error}", path.display()));
            return Err(failure.with_remedy("run it as root"));
        }
    };
    if let Some(lock) = &lock {
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(HeartbeatSeen::Launching),
            Err(TryLockError::Error(error)) => {
                return Err(Failure::new(format!("could not lock {}: {error}", path.display())));
            }
        }
    }
    // The lock ends with its file, after this.
    Ok(match take() {
        Ok(()) => HeartbeatSeen::Free,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => HeartbeatSeen::Held,
        Err(error) => HeartbeatSeen::Refused(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch_trace::Lock;

    #[test]
    fn a_launch_under_way_is_not_disturbed_and_its_port_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::wait(&folder.path().join(LAUNCH_LOCK)).unwrap();
        assert_eq!(look(folder.path(), || panic!("taken")).unwrap(), HeartbeatSeen::Launching);
        drop(lock);
        assert_eq!(look(folder.path(), || Ok(())).unwrap(), HeartbeatSeen::Free);
    }

    #[test]
    fn a_launch_waits_for_the_look_and_no_lock_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        drop(Lock::wait(&folder.path().join(LAUNCH_LOCK)).unwrap());
        let taken = || {
            let file = OpenOptions::new().write(true).open(folder.path().join(LAUNCH_LOCK)).unwrap();
            assert!(matches!(file.try_lock(), Err(TryLockError::WouldBlock)), "a launch could begin now");
            Err(io::ErrorKind::AddrInUse.into())
        };
        assert_eq!(look(folder.path(), taken).unwrap(), HeartbeatSeen::Held);
        drop(Lock::wait(&folder.path().join(LAUNCH_LOCK)).unwrap());
    }

    #[test]
    fn a_kernel_without_vsock_is_said_so_and_no_lock_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let seen = look(folder.path(), || Err(io::Error::other("Address family not supported"))).unwrap();
        assert_eq!(seen, HeartbeatSeen::Refused("Address family not supported".to_owned()));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
