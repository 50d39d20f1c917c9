//! The service manager (systemd, or whoever set `NOTIFY_SOCKET`): it keeps listening sockets while no proxy runs, and is
//! told how this one does. Without one nothing happens. Which sockets there are, and when a proxy is ready, is decided
//! elsewhere.
//!
//! A socket is kept under a name. Where the name does not say which socket it is, a mark follows it: the file of a Unix
//! socket can have been replaced.

use crate::inherited;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::RwLock;
use tokio::time::timeout;

/// How long the service manager may take to have read what it was sent. It answers within milliseconds, unless it is busy
/// reading its own configuration.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between a name and its mark.
const MARK: char = '@';

/// The service manager, or none.
#[derive(Debug, Default)]
pub struct Manager {
    socket: Option<Arc<UnixDatagram>>,
    watchdog: Option<Duration>,
    /// What it passed and nobody has taken yet, by name.
    passed: Mutex<BTreeMap<String, Kept>>,
    /// What it has to close and could not be told of yet, by name and mark.
    owed: Mutex<BTreeSet<String>>,
    /// Taken for reading to store, for writing to settle what is owed.
    order: RwLock<()>,
}

/// A socket that the service manager kept.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) mark: String,
    pub(crate) socket: OwnedFd,
}

impl Manager {
    /// No service manager.
    pub fn none() -> Self {
        Self::default()
    }

    /// One that is the other end of a socket.
    #[cfg(test)]
    pub(crate) fn heard_by(watchdog: Option<Duration>) -> (Self, UnixDatagram) {
        let (socket, heard) = UnixDatagram::pair().unwrap();
        heard.set_nonblocking(true).unwrap();
        (Self { socket: Some(Arc::new(socket)), watchdog, ..Self::default() }, heard)
    }

    /// As if it were too busy to read: no more fits into its queue, and nobody waits for it.
    #[cfg(test)]
    pub(crate) fn fill(&self) {
        let socket = self.socket.as_ref().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.send(b"X=1").is_ok() {}
    }

    /// The one that started this process, if one did: `NOTIFY_SOCKET`, `LISTEN_FDS`, `LISTEN_FDNAMES`, `LISTEN_PID`,
    /// `WATCHDOG_USEC` and `WATCHDOG_PID` say so. The first call takes the descriptors that were passed; it belongs before
    /// anything that opens descriptors.
    pub fn from_environment() -> Self {
        let passed = inherited::take().unwrap_or_else(|error| {
            tracing::error!(%error, "could not take over the sockets that the service manager kept; opening them anew");
            Vec::new()
        });
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|address| match connect(&address) {
            Ok(socket) => Some(Arc::new(socket)),
            Err(error) => {
                tracing::error!(?address, %error, "could not reach the service manager: it will not learn that this proxy runs, and keep no sockets");
                None
            }
        });
        let manager = Self { socket, watchdog: watchdog(), ..Self::default() };
        manager.take_in(passed);
        manager
    }

    /// Of two that have one name, the later is kept.
    pub(crate) fn take_in(&self, passed: Vec<(String, OwnedFd)>) {
        let mut kept = self.passed();
        for (full, socket) in passed {
            let (name, mark) = full.split_once(MARK).unwrap_or((&full, ""));
            let Some(former) = kept.insert(name.to_owned(), Kept { mark: mark.to_owned(), socket }) else { continue };
            let Some(manager) = &self.socket else { continue };
            tracing::warn!(name, "the service manager kept two sockets of one name; closing the former");
            let mut told = send_now(manager, &removal(&full_name(name, &former.mark)), None);
            // All of a name go at once.
            if former.mark == mark
                && let Some(Kept { socket, .. }) = kept.get(name)
            {
                told = told.and_then(|()| send_now(manager, &storing(&full), Some(socket.as_fd())));
            }
            if let Err(error) = told {
                tracing::warn!(name, %error, "could not have the service manager close the former of two sockets");
            }
        }
    }

    /// Whether there is one.
    pub(crate) fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// How often it wants a sign of life.
    pub(crate) fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.is_there())
    }

    /// What it kept under that name.
    pub(crate) fn take(&self, name: &str) -> Option<Kept> {
        self.passed().remove(name)
    }

    /// Hands it a socket to keep. Whether it has the room, it does not say: that is `FileDescriptorStoreMax=`.
    ///
    /// # Errors
    /// It was not told, and keeps nothing.
    pub(crate) async fn store(&self, name: &str, mark: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        if !self.is_there() {
            return Ok(());
        }
        let full = full_name(name, mark);
        let _order = self.order.read().await;
        // What goes by that name goes first, or this would go with it.
        if self.owed().remove(&full) {
            self.remove(full.clone()).await?;
        }
        self.send(storing(&full), Some(socket.try_clone_to_owned()?)).await
    }

    /// Has it close a socket that it keeps. When this returns it has, unless it is not well; then it is told again later.
    pub(crate) async fn forget(&self, name: &str, mark: &str) {
        // Why not is in the log, and it is owed.
        if self.is_there() && self.remove(full_name(name, mark)).await.is_ok() {
            self.barrier().await;
        }
    }

    /// Tells it again what it could not be told: what it has to close.
    pub(crate) async fn settle(&self) {
        // No socket is stored by a name while that name is on its way out.
        let _order = self.order.write().await;
        let owed = std::mem::take(&mut *self.owed());
        for full in owed {
            drop(self.remove(full).await);
        }
    }

    /// Has it close what it passed and nobody took.
    pub(crate) async fn forget_rest(&self) {
        let rest = std::mem::take(&mut *self.passed());
        if rest.is_empty() {
            return;
        }
        for (name, Kept { mark, socket }) in rest {
            tracing::info!(name, "closing a socket of a former proxy: no route has it any more");
            drop(socket);
            drop(self.remove(full_name(&name, &mark)).await);
        }
        self.barrier().await;
    }

    /// What could not be told is owed.
    async fn remove(&self, full: String) -> io::Result<()> {
        let told = self.send(removal(&full), None).await;
        if let Err(error) = &told {
            tracing::warn!(name = full, %error, "could not have the service manager close a socket; trying again every few seconds");
            self.owed().insert(full);
        }
        told
    }

    /// Tells it something: lines of `NAME=value`.
    pub(crate) async fn tell(&self, text: &str) {
        if let Err(error) = self.send(text.to_owned(), None).await {
            tracing::warn!(%error, text = text.trim_end().replace('\n', " "), "could not tell the service manager");
        }
    }

    /// Waits until it has read all that was sent before: it closes the descriptor that comes with this.
    async fn barrier(&self) {
        let wait = async {
            let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
            self.send("BARRIER=1".to_owned(), Some(theirs)).await?;
            pipe::Receiver::from_owned_fd(ours)?.readable().await
        };
        match timeout(PATIENCE, wait).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "could not wait for the service manager"),
            Err(_) => tracing::warn!("the service manager did not answer within {PATIENCE:?}"),
        }
    }

    /// Sends it one message. Waits for room in its queue, on a thread of its own, for [`PATIENCE`] at most.
    async fn send(&self, text: String, descriptor: Option<OwnedFd>) -> io::Result<()> {
        let Some(socket) = self.socket.clone() else { return Ok(()) };
        let send = move || send_now(&socket, &text, descriptor.as_ref().map(AsFd::as_fd));
        tokio::task::spawn_blocking(send).await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    fn owed(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn passed(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time within which a sign of life must come, if it is this process that should give it.
fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|period| ours && *period > 0).map(Duration::from_micros)
}

fn send_now(socket: &UnixDatagram, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn storing(full: &str) -> String {
    // FDPOLL=0: it must not judge by poll(2) whether a socket is of use.
    format!("FDSTORE=1\nFDPOLL=0\nFDNAME={full}\n")
}

fn removal(full: &str) -> String {
    format!("FDSTOREREMOVE=1\nFDNAME={full}\n")
}

fn connect(address: &OsString) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

fn full_name(name: &str, mark: &str) -> String {
    if mark.is_empty() { name.to_owned() } else { format!("{name}{MARK}{mark}") }
}

/// The name of a socket on that address: names have no colons, for the service manager joins them with colons.
pub(crate) fn ingress_name(address: std::net::SocketAddr) -> String {
    format!("ingress-{}-{}", address.ip().to_string().replace(':', "_"), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_which_address_it_is_without_a_colon() {
        let name = |address: &str| ingress_name(address.parse().unwrap());
        assert_eq!(name("127.0.0.1:9000"), "ingress-127.0.0.1-9000");
        assert_eq!(name("[::]:443"), "ingress-__-443");
        assert_eq!(name("[2001:db8::1]:443"), "ingress-2001_db8__1-443");
    }

    #[tokio::test]
    async fn without_a_service_manager_nothing_is_kept_and_nothing_waits() {
        let manager = Manager::none();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        manager.store("x", "", socket.as_fd()).await.unwrap();
        manager.forget("x", "").await;
        assert!(manager.take("x").is_none() && manager.watchdog().is_none());
    }

    fn said(heard: &UnixDatagram) -> String {
        let mut text = [0; 512];
        let read = heard.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..read]).into_owned()
    }

    #[tokio::test]
    async fn of_two_sockets_with_one_name_the_former_is_taken_out_of_the_store() {
        let (manager, heard) = Manager::heard_by(None);
        let passed = ["link@1", "link@2", "x", "x"].map(|name| (name.to_owned(), tempfile::tempfile().unwrap().into()));
        manager.take_in(passed.into());
        assert_eq!(said(&heard), "FDSTOREREMOVE=1\nFDNAME=link@1\n");
        assert_eq!(said(&heard), "FDSTOREREMOVE=1\nFDNAME=x\n");
        assert_eq!(said(&heard), "FDSTORE=1\nFDPOLL=0\nFDNAME=x\n", "they go together, and one is of use");
        assert_eq!(manager.take("link").unwrap().mark, "2");
        assert!(manager.take("x").is_some() && manager.take("x").is_none());
    }

    fn all_said(heard: &UnixDatagram) -> Vec<String> {
        let mut said = Vec::new();
        let mut text = [0; 512];
        while let Ok(read) = heard.recv(&mut text) {
            said.push(String::from_utf8_lossy(&text[..read]).into_owned());
        }
        said.retain(|text| text != "X=1");
        said
    }

    #[tokio::test]
    async fn what_the_service_manager_could_not_be_told_it_is_told_later_and_before_the_name_is_used_again() {
        let (manager, heard) = Manager::heard_by(None);
        manager.take_in(vec![("x@1".to_owned(), tempfile::tempfile().unwrap().into())]);
        let file = tempfile::tempfile().unwrap();
        manager.fill();
        manager.store("y", "", file.as_fd()).await.unwrap_err();
        manager.forget("y", "").await;
        manager.forget("z", "").await;
        manager.take("x").unwrap();
        manager.forget("x", "1").await;
        manager.store("y", "", file.as_fd()).await.unwrap_err();
        assert_eq!(all_said(&heard), [""; 0]);
        manager.store("y", "", file.as_fd()).await.unwrap();
        let removal = |name| format!("FDSTOREREMOVE=1\nFDNAME={name}\n");
        assert_eq!(all_said(&heard), [removal("y"), "FDSTORE=1\nFDPOLL=0\nFDNAME=y\n".to_owned()]);
        manager.settle().await;
        assert_eq!(all_said(&heard), [removal("x@1"), removal("z")]);
        manager.settle().await;
        assert_eq!(all_said(&heard), [""; 0]);
    }
}
