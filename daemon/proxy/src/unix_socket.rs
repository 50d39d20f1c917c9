//! Listening on a Unix socket by path: replaces what a dead process left behind, never what a live one serves, and leaves
//! nothing behind itself, unless the service manager keeps the socket. Who may connect, and what is spoken, is not decided here.

use crate::inherited::{Expected, Unusable};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};

/// Longest path of a Unix socket on Linux, in bytes (`sun_path` is 108 bytes with its final zero).
pub(crate) const PATH_BYTES: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// How long a process that has the socket open may take to say so.
const LIVENESS: Duration = Duration::from_secs(2);

/// Why a Unix socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The path does not fit into a socket address.
    #[error("the socket path {} is {length} bytes long, and a Unix socket's may have {PATH_BYTES}: use a shorter directory", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Another process listens there.
    #[error("{} is in use: another process answers on it", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket has that name.
    #[error("{} exists and is not a socket: move it away", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("could not {operation} the socket {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A listening Unix socket; its file goes with it.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that another's of the same name is left alone.
    identity: Option<Identity>,
    /// The service manager has the socket, too: the file stays.
    kept: bool,
}

/// Device, inode and time of making (in nanoseconds) of a socket's file. A number of an inode is given out again, and the
/// time of making changes with neither owner nor mode.
type Identity = (u64, u64, i128);

impl BoundSocket {
    /// Opens the socket. With a `mode`, the file has it before anyone can connect; without, the umask decides.
    pub(crate) async fn bind(path: &Path, mode: Option<Mode>) -> Result<Self, BindError> {
        check_length(path)?;
        remove_stale(path).await?;
        let failed = |operation, source: io::Error| BindError::Io { operation, path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|error| failed("name", error.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|error| failed("create", error.into()))?;
        rustix::net::bind(&socket, &address).map_err(|error| failed("bind", error.into()))?;
        if let Some(mode) = mode {
            rustix::fs::chmod(path, mode).map_err(|error| failed("set the mode of", error.into()))?;
        }
        rustix::net::listen(&socket, BACKLOG).map_err(|error| failed("listen on", error.into()))?;
        let listener = UnixListener::from_std(StdListener::from(socket)).map_err(|error| failed("watch", error))?;
        Ok(Self { listener, path: path.to_owned(), identity: identity(path), kept: false })
    }

    /// Takes a socket that listens there already; its file must be the one that the mark is of.
    pub(crate) fn adopt(path: &Path, socket: OwnedFd, mark: &str) -> Result<Self, Unusable> {
        Expected::Unix(path).check(&socket)?;
        let identity = identity(path).filter(|identity| mark_of(*identity) == mark);
        if identity.is_none() {
            return Err(Unusable::File(path.to_owned()));
        }
        let socket = StdListener::from(socket);
        let listener = socket.set_nonblocking(true).and_then(|()| UnixListener::from_std(socket));
        Ok(Self { listener: listener.map_err(Unusable::Io)?, path: path.to_owned(), identity, kept: true })
    }

    /// Tells its file from another that came to have its path.
    pub(crate) fn mark(&self) -> String {
        self.identity.map(mark_of).unwrap_or_default()
    }

    /// From now on the file stays when this is dropped.
    pub(crate) fn set_kept(&mut self) {
        self.kept = true;
    }

    /// Closes it, and removes its file.
    pub(crate) fn discard(mut self) {
        self.kept = false;
    }

    /// The next connection. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for BoundSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if !self.kept && self.identity.is_some() && identity(&self.path) == self.identity {
            // Nothing can be done about a file that stays; the next to listen here replaces it.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

pub(crate) fn check_length(path: &Path) -> Result<(), BindError> {
    let length = path.as_os_str().len();
    if length > PATH_BYTES { Err(BindError::PathTooLong { path: path.to_owned(), length }) } else { Ok(()) }
}

async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |operation, source| BindError::Io { operation, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(LIVENESS, UnixStream::connect(path)).await {
        // Refused: the file is there and nobody listens. Anything else (a full queue, no permission) may be someone.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| failed("remove what a dead process left at", error))
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) | Err(_) => Err(BindError::InUse { path: path.to_owned() }),
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let made = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    Some((metadata.dev(), metadata.ino(), made))
}

fn mark_of((device, inode, made): Identity) -> String {
    format!("{device:x}.{inode:x}.{made:x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(StdListener::bind(&path).unwrap());
        let socket = BoundSocket::bind(&path, Some(Mode::from(0o600))).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(BoundSocket::bind(&path, None).await, Err(BindError::InUse { .. })));
        drop(socket);
        assert!(!path.exists(), "the socket's file outlived it");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(BoundSocket::bind(&path, None).await, Err(BindError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn closing_leaves_the_socket_of_a_successor_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let old = BoundSocket::bind(&path, None).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let _new = BoundSocket::bind(&path, None).await.unwrap();
        drop(old);
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_is_kept_leaves_its_file_and_is_taken_over_only_while_the_file_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut old = BoundSocket::bind(&path, None).await.unwrap();
        old.set_kept();
        let (kept, mark) = (old.as_fd().try_clone_to_owned().unwrap(), old.mark());
        drop(old);
        let again = kept.try_clone().unwrap();
        let new = BoundSocket::adopt(&path, kept, &mark).unwrap();
        let client = UnixStream::connect(&path);
        let (accepted, connected) = tokio::join!(new.accept(), client);
        drop((accepted.unwrap(), connected.unwrap()));
        std::fs::remove_file(&path).unwrap();
        let other = BoundSocket::bind(&path, None).await.unwrap();
        assert!(matches!(BoundSocket::adopt(&path, again, &mark), Err(Unusable::File(_))));
        new.discard();
        UnixStream::connect(other.path()).await.unwrap();
    }

    #[tokio::test]
    async fn a_path_of_107_bytes_is_the_longest() {
        let dir = tempfile::tempdir().unwrap();
        let name = "x".repeat(PATH_BYTES - dir.path().as_os_str().len() - 1);
        BoundSocket::bind(&dir.path().join(&name), None).await.unwrap();
        let error = BoundSocket::bind(&dir.path().join(name + "x"), None).await.unwrap_err();
        assert!(matches!(error, BindError::PathTooLong { length: 108, .. }), "{error}");
    }
}
