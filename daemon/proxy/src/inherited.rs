//! Descriptors that the service manager passed to this process (sd_listen_fds(3)): takes them over, once, and says whether
//! a socket is what it is expected to be. The only file of the project with unsafe code; nothing here opens a socket or
//! decides what becomes of one.

use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getsockname, sockopt};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Descriptors have one owner: who took them.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The descriptors passed to this process, each with its name, close-on-exec from now on. The first call gets them, every
/// other gets none. They are only this process's if `LISTEN_PID` says so.
pub(crate) fn take() -> io::Result<Vec<(String, OwnedFd)>> {
    if TAKEN.swap(true, SeqCst) {
        return Ok(Vec::new());
    }
    let variable = |name| std::env::var(name).ok();
    let passed = numbers(variable("LISTEN_PID"), variable("LISTEN_FDS"), std::process::id())?;
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    Ok(each(passed, &names, own))
}

/// Each with its name; one that is of no use does not keep the others from being taken.
fn each<T>(passed: Range<RawFd>, names: &str, own: impl Fn(RawFd) -> io::Result<T>) -> Vec<(String, T)> {
    let names = names.split(':').chain(std::iter::repeat(""));
    let owned = passed.zip(names).filter_map(|(number, name)| match own(number) {
        Ok(descriptor) => Some((name.to_owned(), descriptor)),
        Err(error) => {
            tracing::error!(number, name, %error, "a descriptor that the service manager passed is of no use; going on without it");
            None
        }
    });
    owned.collect()
}

/// The numbers of the descriptors that are for this process: from 3 on.
fn numbers(pid: Option<String>, count: Option<String>, own_pid: u32) -> io::Result<Range<RawFd>> {
    const FIRST: RawFd = 3;
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(FIRST..FIRST) };
    let bad = |what: &str, text: &str| io::Error::other(format!("{what} is \"{}\"", text.escape_debug()));
    if pid.parse::<u32>().map_err(|_| bad("LISTEN_PID", &pid))? != own_pid {
        return Ok(FIRST..FIRST);
    }
    let end = count.parse::<u16>().map_err(|_| bad("LISTEN_FDS", &count))?;
    Ok(FIRST..FIRST + RawFd::from(end))
}

/// Owns a descriptor by its number, which nobody else may; an error if it is not open.
#[allow(unsafe_code, reason = "the operating system hands descriptors over as numbers")]
fn own(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: Borrowed only to ask whether it is open, and to set close-on-exec. The number is of the range that the service
    // manager passed to this very process (LISTEN_PID), which is occupied from exec on, so that nothing else of this
    // process opens or closes descriptors in it.
    let seen = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_setfd(seen, fcntl_getfd(seen)? | FdFlags::CLOEXEC)?;
    // SAFETY: As before; it is open; and each number is handed out once in the life of the process (TAKEN).
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What a socket should be, so that it can take the place of one that would be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected<'a> {
    /// Bound to that address; with port 0, to any port of it.
    Tcp(SocketAddr),
    /// Bound to that path.
    Unix(&'a Path),
    /// AF_VSOCK; its port is for the one to look at who can read such addresses.
    Vsock,
}

/// Why a socket is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error("it is no socket")]
    NoSocket(#[source] io::Error),
    #[error("it is of another kind: {0}")]
    Kind(String),
    #[error("it does not listen")]
    Silent,
    #[error("it listens on {0}")]
    Elsewhere(String),
    #[error("the file at {} is not its own any more", _0.display())]
    File(PathBuf),
    #[error("it could not be used")]
    Io(#[source] io::Error),
}

impl Expected<'_> {
    /// Whether the socket is that.
    pub(crate) fn check(self, socket: impl AsFd) -> Result<(), Unusable> {
        let socket = socket.as_fd();
        let kind = sockopt::socket_type(socket).map_err(|errno| Unusable::NoSocket(errno.into()))?;
        let failed = |errno: rustix::io::Errno| Unusable::Io(errno.into());
        let family = sockopt::socket_domain(socket).map_err(failed)?;
        let wanted = match self {
            Self::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
            Self::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
            Self::Unix(_) => AddressFamily::UNIX,
            Self::Vsock => AddressFamily::VSOCK,
        };
        if kind != SocketType::STREAM || family != wanted {
            return Err(Unusable::Kind(format!("{kind:?} of {family:?}")));
        }
        if !sockopt::socket_acceptconn(socket).map_err(failed)? {
            return Err(Unusable::Silent);
        }
        let bound = getsockname(socket).map_err(failed)?;
        match self {
            Self::Tcp(wanted) => {
                let bound = SocketAddr::try_from(bound).map_err(failed)?;
                let same = bound.ip() == wanted.ip() && (bound.port() == wanted.port() || wanted.port() == 0);
                if same { Ok(()) } else { Err(Unusable::Elsewhere(bound.to_string())) }
            }
            Self::Unix(wanted) => {
                let bound = SocketAddrUnix::try_from(bound).map_err(failed)?;
                let path = bound.path().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
                if Path::new(&path) == wanted { Ok(()) } else { Err(Unusable::Elsewhere(path)) }
            }
            Self::Vsock => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn a_listening_socket_is_taken_only_for_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (tcp, unix) = (TcpListener::bind("127.0.0.1:0").unwrap(), UnixListener::bind(&path).unwrap());
        let bound = tcp.local_addr().unwrap();
        Expected::Tcp(bound).check(&tcp).unwrap();
        Expected::Tcp("127.0.0.1:0".parse().unwrap()).check(&tcp).unwrap();
        Expected::Unix(&path).check(&unix).unwrap();

        let connected = TcpStream::connect(bound).unwrap();
        assert!(matches!(Expected::Tcp(bound).check(&connected), Err(Unusable::Silent)));
        let other = SocketAddr::new(bound.ip(), bound.port() ^ 1);
        assert!(matches!(Expected::Tcp(other).check(&tcp), Err(Unusable::Elsewhere(at)) if at == bound.to_string()));
        assert!(matches!(Expected::Tcp("[::1]:0".parse().unwrap()).check(&tcp), Err(Unusable::Kind(_))));
        assert!(matches!(Expected::Unix(&path).check(&tcp), Err(Unusable::Kind(_))));
        assert!(matches!(Expected::Vsock.check(&tcp), Err(Unusable::Kind(_))));
        assert!(matches!(Expected::Unix(Path::new("/other")).check(&unix), Err(Unusable::Elsewhere(_))));
        let datagrams = UnixDatagram::bind(dir.path().join("d")).unwrap();
        assert!(matches!(Expected::Unix(&path).check(&datagrams), Err(Unusable::Kind(_))));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Expected::Unix(&path).check(&file), Err(Unusable::NoSocket(_))));
    }

    #[test]
    fn descriptors_are_taken_only_by_the_process_that_they_are_for() {
        let numbers = |pid: Option<&str>, count: Option<&str>| numbers(pid.map(Into::into), count.map(Into::into), 7);
        assert_eq!(numbers(Some("7"), Some("2")).unwrap(), 3..5);
        for (pid, count) in
            [(None, None), (None, Some("2")), (Some("7"), None), (Some("8"), Some("2")), (Some("7"), Some("0"))]
        {
            assert!(numbers(pid, count).unwrap().is_empty(), "{pid:?} {count:?}");
        }
        for (pid, count) in [("x", "2"), ("7", "x"), ("7", "-1"), ("7", "4294967295")] {
            numbers(Some(pid), Some(count)).unwrap_err();
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_costs_no_other() {
        let own = |number| if number == 4 { Err(rustix::io::Errno::BADF.into()) } else { Ok(number) };
        let named = |name: &str, number| (name.to_owned(), number);
        assert_eq!(each(3..7, "a:b:c", own), [named("a", 3), named("c", 5), named("", 6)]);
    }

    #[test]
    fn what_is_not_for_this_process_is_not_taken() {
        // The environment of a test names no descriptors for it; and the second call has nothing in any case.
        assert!(take().unwrap().is_empty());
        assert!(take().unwrap().is_empty());
    }
}
