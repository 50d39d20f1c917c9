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

/// A silent peer is asked for a sign of life after this, then every [`KEEPALIVE_INTERVAL`], [`KEEPALIVE_PROBES`] times: one
/// that is gone is found after two minutes. (Also below the 350 s after which AWS's NAT gateways and load balancers forget
/// a silent connection.)
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// Why a TCP port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("could not listen on {address}")]
pub(crate) struct ListenError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

pub(crate) fn listen(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let open = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Connections of a predecessor that linger in TIME_WAIT do not keep the port from its successor.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        prepare(&socket);
        socket.listen(BACKLOG)
    };
    open().map_err(|source| ListenError { address, source })
}

/// Takes a socket that listens on that address already.
pub(crate) fn adopt(address: SocketAddr, socket: OwnedFd) -> Result<TcpListener, Unusable> {
    Expected::Tcp(address).check(&socket)?;
    prepare(&socket);
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

/// Sets what every connection has: no delay for small writes, keepalive. Connections have it from the socket that accepted
/// them, so it is set on those that listen and those that connect. A socket that refuses an option is used without.
pub(crate) fn prepare(socket: &impl AsFd) {
    let set = || -> rustix::io::Result<()> {
        sockopt::set_tcp_nodelay(socket, true)?;
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "could not set the options of a TCP socket");
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
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let (_client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (connection, _) = accepted.unwrap();
        assert!(connection.nodelay().unwrap() && sockopt::socket_keepalive(&connection).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&connection).unwrap(), KEEPALIVE_IDLE);
        assert_eq!(sockopt::tcp_keepintvl(&connection).unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&connection).unwrap(), KEEPALIVE_PROBES);
    }
}
