//! Whether vsock port 9000 of the parent can be had: nitro-cli listens there for the heartbeat of an enclave that boots, enclaved's or
//! one that is launched by hand. The kernel is asked who listens, so nothing is in the way of any launch. Only where it can't tell
//! (it has no vsock_diag) is the port taken for a moment, and only while no nitro-cli is seen at work.

use crate::host::inventory::Roots;
use crate::launch_trace::LAUNCH_LOCK;
use enclaved_core::diagnosis::nitro::HeartbeatSeen;
use enclaved_core::failure::Failure;
use enclaved_core::inventory::parse::{listening_below, numbered};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::collections::BTreeSet;
use std::fs::{OpenOptions, TryLockError};
use std::io;
use std::path::Path;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// nitro-cli's port.
const PORT: u32 = 9000;

/// What is done with AF_VSOCK; elsewhere in tests.
#[derive(Debug, Clone, Copy)]
pub struct Vsock {
    /// Makes a socket, and does nothing with it.
    pub open: fn() -> io::Result<()>,
    /// The ports on which somebody listens.
    pub listeners: fn() -> io::Result<BTreeSet<u32>>,
    /// Takes the port for a moment.
    pub take: fn() -> io::Result<()>,
}

impl Default for Vsock {
    fn default() -> Self {
        Self { open, listeners: enclaved_proxy::vsock_listeners, take }
    }
}

fn open() -> io::Result<()> {
    Ok(socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None).map(drop)?)
}

fn take() -> io::Result<()> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT)).map(drop)
}

/// Looks. No launch of enclaved begins meanwhile; one that is under way holds the port by right.
pub(super) fn look(run_dir: &Path, roots: &Roots, vsock: Vsock) -> Result<HeartbeatSeen, Failure> {
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
    if let Err(error) = (vsock.open)() {
        return Ok(HeartbeatSeen::Refused(error.to_string()));
    }
    match (vsock.listeners)() {
        Ok(ports) if ports.contains(&PORT) => return Ok(HeartbeatSeen::Held),
        Ok(_) => return Ok(HeartbeatSeen::Free),
        Err(error) => tracing::debug!("the kernel does not tell who listens on vsock: {error}"),
    }
    if nitro_cli_boots(&roots.procfs) {
        return Ok(HeartbeatSeen::Launching);
    }
    Ok(match (vsock.take)() {
        Ok(()) => HeartbeatSeen::Free,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => HeartbeatSeen::Held,
        Err(error) => HeartbeatSeen::Refused(error.to_string()),
    })
}

/// Whether there are more processes of nitro-cli than enclaves that have booted, each of which has one, with a socket. Also if that
/// can't be told: another user's processes may be hidden.
fn nitro_cli_boots(procfs: &Path) -> bool {
    let Ok(sockets) = std::fs::read_to_string(procfs.join("net/unix")) else { return true };
    let booted = listening_below(&sockets, "/run/nitro_enclaves");
    let (Ok(entries), true) = (std::fs::read_dir(procfs), procfs.join("1/comm").exists()) else { return true };
    let processes = entries.filter_map(|entry| entry.ok()).filter(|entry| {
        let process = entry.file_name().to_str().is_some_and(|name| numbered(name, "").is_some());
        process && std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim_end() == "nitro-cli")
    });
    u32::try_from(processes.count()).unwrap_or(u32::MAX) > booted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch_trace::Lock;
    use std::fs;
    use tempfile::TempDir;

    const NOT_TAKEN: Vsock = Vsock { open: || Ok(()), listeners: || Ok(BTreeSet::new()), take: || panic!("taken") };
    const UNTOLD: Vsock = Vsock { listeners: || Err(io::ErrorKind::NotFound.into()), take: || Ok(()), ..NOT_TAKEN };

    /// A host on which these processes run, of which two have an enclave that has booted.
    fn host(processes: &[&str]) -> (TempDir, Roots) {
        let folder = tempfile::tempdir().unwrap();
        let roots = Roots::below(folder.path());
        for (number, name) in (1..).zip(processes) {
            fs::create_dir_all(roots.procfs.join(format!("{number}"))).unwrap();
            fs::write(roots.procfs.join(format!("{number}/comm")), format!("{name}\n")).unwrap();
        }
        fs::create_dir_all(roots.procfs.join("net")).unwrap();
        let line = |name: &str| format!("0: 00000002 00000000 00010000 0001 01 47 /run/nitro_enclaves/{name}.sock\n");
        fs::write(roots.procfs.join("net/unix"), format!("Num\n{}{}", line("a"), line("b"))).unwrap();
        (folder, roots)
    }

    fn seen(vsock: Vsock) -> HeartbeatSeen {
        let (folder, roots) = host(&["systemd", "nitro-cli", "nitro-cli"]);
        look(folder.path(), &roots, vsock).unwrap()
    }

    #[test]
    fn a_launch_under_way_is_not_disturbed_and_its_port_not_taken() {
        let (folder, roots) = host(&["systemd"]);
        let lock = Lock::wait(&folder.path().join(LAUNCH_LOCK)).unwrap();
        assert_eq!(look(folder.path(), &roots, NOT_TAKEN).unwrap(), HeartbeatSeen::Launching);
        drop(lock);
        assert_eq!(look(folder.path(), &roots, NOT_TAKEN).unwrap(), HeartbeatSeen::Free);
        drop(Lock::wait(&folder.path().join(LAUNCH_LOCK)).unwrap());
    }

    #[test]
    fn the_kernel_is_asked_who_listens_and_the_port_is_not_taken() {
        assert_eq!(seen(NOT_TAKEN), HeartbeatSeen::Free);
        assert_eq!(seen(Vsock { listeners: || Ok([7, 9000].into()), ..NOT_TAKEN }), HeartbeatSeen::Held);
    }

    #[test]
    fn where_the_kernel_cannot_tell_the_port_is_taken_unless_nitro_cli_may_be_about_to_need_it() {
        assert_eq!(seen(UNTOLD), HeartbeatSeen::Free);
        assert_eq!(seen(Vsock { take: || Err(io::ErrorKind::AddrInUse.into()), ..UNTOLD }), HeartbeatSeen::Held);
        // A third process of nitro-cli, without a socket: an enclave boots that was launched by hand.
        let by_hand = Vsock { take: || panic!("taken"), ..UNTOLD };
        let (folder, roots) = host(&["systemd", "nitro-cli", "nitro-cli", "nitro-cli"]);
        assert_eq!(look(folder.path(), &roots, by_hand).unwrap(), HeartbeatSeen::Launching);
        // Processes of others are hidden.
        fs::remove_dir_all(roots.procfs.join("1")).unwrap();
        assert_eq!(look(folder.path(), &roots, by_hand).unwrap(), HeartbeatSeen::Launching);
    }

    #[test]
    fn a_kernel_without_vsock_is_said_so_and_no_lock_is_made() {
        let (folder, roots) = host(&["systemd"]);
        let none = Vsock { open: || Err(io::Error::other("Address family not supported")), ..NOT_TAKEN };
        let seen = look(folder.path(), &roots, none).unwrap();
        assert_eq!(seen, HeartbeatSeen::Refused("Address family not supported".to_owned()));
        assert!(!folder.path().join(LAUNCH_LOCK).exists());
    }
}
