//! TCP sockets as the data plane wants them: how they listen, and what is set on each connection. What flows over them is
//! nobody's business here.

use crate::inherited::{Expected, Unusable};
use crate::listening::Socket;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{Shutdown, sockopt};
use std::io;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Connections that may wait to be accepted (the kernel cuts it to net.core.somaxconn).
const BACKLOG: u32 = 4096;

/// A silent peer is asked for a sign of life after half of the time that it may be silent, then so many times in the other half.
const KEEPALIVE_PROBES: u32 = 4;
/// The kernel counts it in seconds, and takes no less.
const SHORTEST: Duration = Duration::from_secs(1);

/// What a peer is that is there, and takes not a byte of what waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stalled {
    /// As silent as one that is gone: the kernel cannot tell them apart, and finds both in the same time. For whoever waits for
    /// the peer, as an enclave does for its database after the other one took over.
    Gone,
    /// A client that pauses, for as long as it likes. One that vanishes while bytes are on their way to it is found by the kernel,
    /// after a quarter of an hour (`tcp_retries2`).
    Paused,
}

/// Why a TCP port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("could not listen on {address}")]
pub(crate) struct ListenError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

/// Its connections may be silent for so long.
pub(crate) fn listen(address: SocketAddr, silence: Duration, stalled: Stalled) -> Result<TcpListener, ListenError> {
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Connections of a predecessor that linger in TIME_WAIT do not keep the port from its successor.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        prepare(&socket, silence, stalled);
        socket.listen(BACKLOG)
    };
    open().map_err(|source| ListenError { address, source })
}

/// Takes a socket that listens on that address already.
pub(crate) fn adopt(
    address: SocketAddr,
    socket: OwnedFd,
    silence: Duration,
    stalled: Stalled,
) -> Result<TcpListener, Unusable> {
    Expected::Tcp(address).check(&socket)?;
    prepare(&socket, silence, stalled);
    let socket = std::net::TcpListener::from(socket);
    socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket)).map_err(Unusable::Io)
}

impl Socket for TcpListener {
    type Connection = (TcpStream, SocketAddr);

    async fn accept(&self) -> io::Result<Self::Connection> {
        Self::accept(self).await
    }

    fn address(&self) -> String {
        self.local_addr().map_or_else(|error| format!("unknown: {error}"), |address| address.to_string())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn discard(self) {
        // Whoever else has the descriptor: clients are refused from now on, and the address is free.
        if let Err(error) = rustix::net::shutdown(&self, Shutdown::Read) {
            tracing::debug!(%error, "could not shut a listening socket down");
        }
    }
}

/// Sets what every connection has: no delay for small writes, and an end when its peer has been silent for so long. Connections
/// have it from the socket that accepted them, so it is set on those that listen and those that connect. A socket that refuses an
/// option is used without.
///
/// While bytes are on their way the kernel sends no keepalive probes, but those bytes again, for a quarter of an hour
/// (`tcp_retries2`); TCP_USER_TIMEOUT ends that earlier, and a stall of a peer that is there with it.
pub(crate) fn prepare(socket: &impl AsFd, silence: Duration, stalled: Stalled) {
    let set = || -> rustix::io::Result<()> {
        sockopt::set_tcp_nodelay(socket, true)?;
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, (silence / 2).max(SHORTEST))?;
        sockopt::set_tcp_keepintvl(socket, (silence / 2 / KEEPALIVE_PROBES).max(SHORTEST))?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
        match stalled {
            Stalled::Gone => {
                sockopt::set_tcp_user_timeout(socket, u32::try_from(silence.as_millis()).unwrap_or(u32::MAX))
            }
            Stalled::Paused => sockopt::set_tcp_user_timeout(socket, 0),
        }
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "could not set the options of a TCP socket");
    }
}

/// Lets the peer of a connection pause, whatever its socket was prepared for.
pub(crate) fn may_pause(connection: &TcpStream) {
    if let Err(error) = sockopt::set_tcp_user_timeout(connection, 0) {
        tracing::debug!(%error, "could not let the peer of a TCP connection pause");
    }
}

/// A connection that is reset when dropped, so that its peer can tell a cut from an end; unless [`Self::ended_well`].
#[derive(Debug)]
pub(crate) struct ResetOnDrop {
    stream: TcpStream,
    reset: bool,
}

impl ResetOnDrop {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, reset: true }
    }

    /// From now on dropping it closes it in the ordinary way.
    pub(crate) fn ended_well(&mut self) {
        self.reset = false;
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if self.reset
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(%error, "could not have a TCP connection reset");
        }
    }
}

impl Deref for ResetOnDrop {
    type Target = TcpStream;
    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl DerefMut for ResetOnDrop {
    fn deref_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_connections_have_the_options_of_the_socket_that_listens() {
        let silence = crate::limits::Limits::default().peer_silence;
        for (stalled, milliseconds) in [(Stalled::Gone, 120_000), (Stalled::Paused, 0)] {
            let listener = listen("127.0.0.1:0".parse().unwrap(), silence, stalled).unwrap();
            let address = listener.local_addr().unwrap();
            let (_client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            let (connection, _) = accepted.unwrap();
            assert!(connection.nodelay().unwrap() && sockopt::socket_keepalive(&connection).unwrap());
            // Two minutes, as operators are told.
            assert_eq!(sockopt::tcp_keepidle(&connection).unwrap(), Duration::from_secs(60));
            assert_eq!(sockopt::tcp_keepintvl(&connection).unwrap(), Duration::from_secs(15));
            assert_eq!(sockopt::tcp_keepcnt(&connection).unwrap(), 4);
            assert_eq!(sockopt::tcp_user_timeout(&connection).unwrap(), milliseconds);
        }
    }
}
