//! vsock, however this host has it: connecting to a port inside an enclave, and listening for enclaves on a port of the
//! parent. What is spoken over a connection is nobody's business here.
//!
//! With the kernel's AF_VSOCK, a port of the parent is one listener for all enclaves, and an accepted connection says whose
//! it is. With hybrid vsock each enclave has sockets of its own. [`Transport::listen_point`] tells the two apart.

mod hybrid;
mod kernel;

use crate::inherited::Unusable;
pub use crate::unix_socket::BindError;
use crate::unix_socket::BoundSocket;
use enclaved_core::id::Cid;
use enclaved_core::routes::VsockTransport;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_vsock::{VsockListener, VsockStream};

/// How long connecting may take, handshake included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How vsock is reached on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// The kernel's AF_VSOCK.
    AfVsock,
    /// Hybrid vsock over Unix sockets in this directory (see [`VsockTransport::Hybrid`]).
    Hybrid(PathBuf),
}

impl From<&VsockTransport> for Transport {
    fn from(transport: &VsockTransport) -> Self {
        match transport {
            VsockTransport::AfVsock => Self::AfVsock,
            VsockTransport::Hybrid(dir) => Self::Hybrid(dir.clone()),
        }
    }
}

impl Transport {
    /// Connects to a port inside an enclave, within [`CONNECT_TIMEOUT`].
    pub async fn connect(&self, cid: Cid, port: u32) -> Result<Stream, ConnectError> {
        let connect = async {
            match self {
                Self::AfVsock => kernel::connect(cid, port).await.map(Stream::Kernel),
                Self::Hybrid(dir) => hybrid::connect(dir, cid, port).await.map(Stream::Hybrid),
            }
        };
        let timed_out = |_| Err(ConnectError::TimedOut { cid, port });
        tokio::time::timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(timed_out)
    }

    /// Where the host has to listen so that this enclave reaches it on this port.
    pub(crate) fn listen_point(&self, cid: Cid, port: u32) -> ListenPoint {
        match self {
            Self::AfVsock => ListenPoint { cid: None, port },
            Self::Hybrid(_) => ListenPoint { cid: Some(cid), port },
        }
    }

    /// Listens for enclaves on a port of the parent: for one enclave, or for all where the transport has it so.
    pub(crate) async fn listen(&self, point: ListenPoint) -> Result<Listener, ListenError> {
        match (self, point.cid) {
            (Self::AfVsock, None) => kernel::listen(point.port).map(Listener::Kernel),
            (Self::Hybrid(dir), Some(cid)) => Ok(Listener::Hybrid {
                cid,
                socket: BoundSocket::bind(&hybrid::host_path(dir, cid, point.port), None).await?,
            }),
            (Self::AfVsock, Some(_)) | (Self::Hybrid(_), None) => Err(ListenError::WrongPoint(point)),
        }
    }

    /// Takes a socket that listens there already.
    pub(crate) fn adopt(&self, point: ListenPoint, socket: OwnedFd, mark: &str) -> Result<Listener, Unusable> {
        match (self, point.cid) {
            (Self::AfVsock, None) => kernel::adopt(point.port, socket).map(Listener::Kernel),
            (Self::Hybrid(dir), Some(cid)) => {
                let socket = BoundSocket::adopt(&hybrid::host_path(dir, cid, point.port), socket, mark)?;
                Ok(Listener::Hybrid { cid, socket })
            }
            (Self::AfVsock, Some(_)) | (Self::Hybrid(_), None) => Err(Unusable::Elsewhere(point.to_string())),
        }
    }

    /// How [`Self::listen`] will show as an address.
    pub(crate) fn address(&self, point: ListenPoint) -> String {
        match (self, point.cid) {
            (Self::Hybrid(dir), Some(cid)) => hybrid::host_path(dir, cid, point.port).display().to_string(),
            _ => format!("vsock:{}", point.port),
        }
    }
}

/// One listening socket of the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ListenPoint {
    /// The one enclave that can reach it, where the transport has a socket for each.
    pub(crate) cid: Option<Cid>,
    /// The parent's vsock port.
    pub(crate) port: u32,
}

impl fmt::Display for ListenPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cid {
            Some(cid) => write!(f, "vsock port {} for CID {cid}", self.port),
            None => write!(f, "vsock port {}", self.port),
        }
    }
}

/// Why a connection into an enclave could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No enclave has that CID (any more).
    #[error("no enclave has CID {cid}")]
    NoEnclave {
        /// The CID.
        cid: Cid,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The enclave runs, and nothing in it listens on that port.
    #[error("nothing listens on vsock port {port} of CID {cid}")]
    Refused {
        /// The CID.
        cid: Cid,
        /// The port.
        port: u32,
    },
    /// It did not come about in time.
    #[error("connecting to vsock port {port} of CID {cid} took longer than {CONNECT_TIMEOUT:?}")]
    TimedOut {
        /// The CID.
        cid: Cid,
        /// The port.
        port: u32,
    },
    /// The other side of a hybrid socket does not speak the protocol.
    #[error("vsock port {port} of CID {cid} answered \"{answer}\" where `OK <number>` belongs")]
    Handshake {
        /// The CID.
        cid: Cid,
        /// The port.
        port: u32,
        /// What came instead, escaped and cut.
        answer: String,
    },
    /// The path of the enclave's socket cannot be used.
    #[error("the enclave's socket cannot be reached")]
    Path(#[from] BindError),
    /// The operating system refused.
    #[error("could not connect to vsock port {port} of CID {cid}")]
    Io {
        /// The CID.
        cid: Cid,
        /// The port.
        port: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl ConnectError {
    /// Whether the enclave itself is the cause: it is gone, or its port is closed or silent. Otherwise it is this host's
    /// (no descriptors left, say), and nothing is known of the enclave.
    pub fn is_enclaves_fault(&self) -> bool {
        match self {
            Self::NoEnclave { .. } | Self::Refused { .. } | Self::TimedOut { .. } | Self::Handshake { .. } => true,
            Self::Path(_) => false,
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
            }
        }
    }
}

/// Why the parent cannot listen on a vsock port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error(transparent)]
    Unix(#[from] BindError),
    #[error("could not listen on vsock port {port}")]
    Kernel {
        port: u32,
        #[source]
        source: io::Error,
    },
    #[error("the transport has no listener for {0}")]
    WrongPoint(ListenPoint),
}

/// A connection with an enclave.
#[derive(Debug)]
pub enum Stream {
    /// Over AF_VSOCK.
    Kernel(VsockStream),
    /// Over a hybrid socket, handshake done.
    Hybrid(UnixStream),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Hybrid(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Hybrid(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Hybrid(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Kernel(stream) => stream.is_write_vectored(),
            Self::Hybrid(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_flush(cx),
            Self::Hybrid(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Hybrid(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A listening socket of the parent.
#[derive(Debug)]
pub(crate) enum Listener {
    /// AF_VSOCK, for every enclave.
    Kernel(VsockListener),
    /// A hybrid socket, for one enclave.
    Hybrid { cid: Cid, socket: BoundSocket },
}

impl Listener {
    /// The next connection and whose it is; `None` where that CID cannot be an enclave's. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<(Stream, Option<Cid>)> {
        match self {
            Self::Kernel(listener) => {
                let (stream, peer) = kernel::accept(listener).await?;
                Ok((Stream::Kernel(stream), Cid::new(peer)))
            }
            // Only that enclave's side has the socket: its path is the peer's identity.
            Self::Hybrid { cid, socket } => Ok((Stream::Hybrid(socket.accept().await?), Some(*cid))),
        }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Kernel(listener) => match listener.local_addr() {
                Ok(address) => format!("vsock:{}", address.port()),
                Err(error) => format!("vsock: {error}"),
            },
            Self::Hybrid { socket, .. } => socket.path().display().to_string(),
        }
    }

    /// See [`crate::listening::Socket`], also for the rest.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Kernel(listener) => listener.as_fd(),
            Self::Hybrid { socket, .. } => socket.as_fd(),
        }
    }

    pub(crate) fn mark(&self) -> String {
        match self {
            Self::Kernel(_) => String::new(),
            Self::Hybrid { socket, .. } => socket.mark(),
        }
    }

    pub(crate) fn kept(&mut self) {
        match self {
            Self::Kernel(_) => {}
            Self::Hybrid { socket, .. } => socket.set_kept(),
        }
    }

    pub(crate) fn discard(self) {
        match self {
            // shutdown(2) does nothing to such a listener: the port is free when the last descriptor is closed.
            Self::Kernel(listener) => drop(listener),
            Self::Hybrid { socket, .. } => socket.discard(),
        }
    }
}
