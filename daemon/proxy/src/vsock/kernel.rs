//! vsock by the kernel's AF_VSOCK: what a Nitro host has. The only file that opens such sockets.

use super::{ConnectError, ListenError};
use crate::inherited::{Expected, Unusable};
use enclaved_core::id::Cid;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::future::poll_fn;
use std::io;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

pub(super) async fn connect(cid: Cid, port: u32) -> Result<VsockStream, ConnectError> {
    VsockStream::connect(VsockAddr::new(cid.get(), port)).await.map_err(|source| classify(cid, port, source))
}

/// vsock(7): a reset answers the connect to a closed port; a CID that nobody has shows as no device, unreachable, or
/// silence until the kernel's own timeout (2 s), depending on the transport underneath.
fn classify(cid: Cid, port: u32, source: io::Error) -> ConnectError {
    match Errno::from_io_error(&source) {
        Some(Errno::CONNRESET | Errno::CONNREFUSED) => ConnectError::Refused { cid, port },
        Some(Errno::NODEV | Errno::NETUNREACH | Errno::HOSTUNREACH) => ConnectError::NoEnclave { cid, source },
        Some(Errno::TIMEDOUT) => ConnectError::TimedOut { cid, port },
        _ => ConnectError::Io { cid, port, source },
    }
}

pub(super) fn listen(port: u32) -> Result<VsockListener, ListenError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map_err(|source| ListenError::Kernel { port, source })
}

/// Takes a socket that listens on that port already.
pub(super) fn adopt(port: u32, socket: OwnedFd) -> Result<VsockListener, Unusable> {
    Expected::Vsock.check(&socket)?;
    // Panics if the runtime can't watch it (no memory); as every panic of a listener, that is caught, and it is opened anew, after
    // the service manager was told to close what it keeps.
    let listener = VsockListener::from(socket);
    let bound = listener.local_addr().map_err(Unusable::Io)?;
    let same = bound.port() == port && bound.cid() == VMADDR_CID_ANY;
    if same { Ok(listener) } else { Err(Unusable::Elsewhere(bound.to_string())) }
}

/// The next connection and its peer's CID. Cancel-safe: a connection is taken off the queue and returned in one poll.
pub(super) async fn accept(listener: &VsockListener) -> io::Result<(VsockStream, u32)> {
    let (stream, peer) = poll_fn(|cx| listener.poll_accept(cx)).await?;
    Ok((stream, peer.cid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_answers_tell_a_closed_port_a_missing_enclave_and_a_sick_host_apart() {
        let classify = |errno: Errno| classify(Cid::FIRST, 8080, errno.into());
        assert!(matches!(classify(Errno::CONNRESET), ConnectError::Refused { .. }));
        assert!(matches!(classify(Errno::NODEV), ConnectError::NoEnclave { .. }));
        assert!(matches!(classify(Errno::TIMEDOUT), ConnectError::TimedOut { .. }));
        assert!(classify(Errno::NETUNREACH).is_enclaves_fault());
        assert!(!classify(Errno::MFILE).is_enclaves_fault());
        assert!(!classify(Errno::ACCESS).is_enclaves_fault());
    }
}
