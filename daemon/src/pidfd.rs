//! Processes that are not (or may not be) our children, held by descriptor: a signal can't reach whoever has the PID by
//! then, and the end is noticed at once. No `/proc` parsing here, no decisions.

use crate::procfs;
use enclaved_core::ledger::ProcessIdentity;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;

/// A process that was alive when it was opened.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens exactly that process; `None` if it is gone, even if another has its PID by now.
    ///
    /// # Errors
    /// No descriptors left, no permission, `/proc` not readable: nothing is known of the process.
    pub fn open(identity: ProcessIdentity) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Only now is it sure that the PID can't pass on to somebody else between the two looks.
        Ok(procfs::is_alive(identity)?.then_some(Self(descriptor)))
    }

    /// Sends a signal; succeeds if the process is gone already.
    ///
    /// # Errors
    /// No permission.
    pub fn send(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended. Cancel-safe: nothing is consumed.
    ///
    /// # Errors
    /// The descriptor can't be watched.
    pub async fn ended(self) -> io::Result<()> {
        #[expect(
            deprecated,
            reason = "its successor is unsafe; an OwnedFd keeps what that asks for, and unsafe is denied"
        )]
        let descriptor = AsyncFd::with_interest(self.0, tokio::io::Interest::READABLE)?;
        // A pidfd becomes readable when its process ends, and stays so.
        descriptor.readable().await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_end_of_a_process_that_was_signalled_is_noticed() {
        let mut child = tokio::process::Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap();
        let identity = procfs::process(child.id().unwrap()).unwrap().unwrap().identity;
        let process = Pidfd::open(identity).unwrap().unwrap();
        process.send(Signal::TERM).unwrap();
        tokio::time::timeout(Duration::from_secs(10), process.ended()).await.unwrap().unwrap();
        assert!(Pidfd::open(identity).unwrap().is_none(), "a zombie counts as gone");
        child.wait().await.unwrap();
        assert!(Pidfd::open(identity).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_pid_that_was_given_to_another_process_is_not_opened() {
        let own = procfs::own_identity().unwrap();
        assert!(Pidfd::open(own).unwrap().is_some());
        assert!(Pidfd::open(ProcessIdentity { start_time: own.start_time - 1, ..own }).unwrap().is_none());
        assert!(Pidfd::open(ProcessIdentity { pid: 0, start_time: 0 }).unwrap().is_none());
        assert!(Pidfd::open(ProcessIdentity { pid: u32::MAX, start_time: 0 }).unwrap().is_none());
    }
}
