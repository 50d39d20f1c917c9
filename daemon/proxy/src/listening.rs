//! Keeps a socket listening: takes over the one that the service manager kept for it, or opens it, tries again while it can't
//! be opened, accepts, and survives shortages. What is done with a connection is its service's business.

use crate::error_text::chain;
use crate::inherited::Unusable;
use crate::manager::Kept;
use crate::shared::Shared;
use crate::throttle::Throttle;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::error::Error;
use std::future::Future;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How long accepting pauses when the process or the host has no descriptors or memory left, or connection after connection
/// fails.
const SHORTAGE: Duration = Duration::from_millis(200);

/// So many errors in a row are those of single connections; more of them, and accepting pauses as in a shortage: what
/// refuses every connection (a security module, a firewall) must not cost a processor.
const IN_A_ROW: u32 = 8;

/// A listening socket.
pub(crate) trait Socket: Send + Sync + 'static {
    type Connection: Send + 'static;

    /// The next connection. Cancel-safe.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;

    /// Where it listens.
    fn address(&self) -> String;

    /// The descriptor, for the service manager to keep.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Tells it from another socket of its service's name, where the name and its address don't.
    fn mark(&self) -> String {
        String::new()
    }

    /// From now on the service manager keeps it, too: what would be in a successor's way stays when this is dropped.
    fn kept(&mut self) {}

    /// Closes it for good, also where another has the descriptor.
    fn discard(self);
}

/// What is done with the connections of a listening socket.
pub(crate) trait Service: Send + Sync + 'static {
    type Socket: Socket;
    type Error: Error + Send + Sync + 'static;

    /// Where it should listen.
    fn address(&self) -> String;

    /// The name under which the service manager keeps the socket: 1 to 200 visible ASCII characters, no colon, no `@`.
    fn name(&self) -> String;

    /// What must be there before a socket is of use.
    fn prepare(&self) -> impl Future<Output = Result<(), Self::Error>> + Send {
        std::future::ready(Ok(()))
    }

    /// Takes a socket that was kept, if it is what [`Self::open`] would open.
    fn adopt(&self, socket: OwnedFd, mark: &str) -> Result<Self::Socket, Unusable>;

    /// Opens the socket.
    fn open(&self) -> impl Future<Output = Result<Self::Socket, Self::Error>> + Send;

    /// Takes a connection. Does not wait: what takes time is a task of its own.
    fn serve(self: &Arc<Self>, connection: <Self::Socket as Socket>::Connection);
}

/// Whether a socket listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Status {
    /// It is being opened for the first time.
    Opening,
    /// It listens there.
    Open { address: String },
    /// It does not, and is tried again.
    Failed { error: String },
}

/// A socket that is kept listening until this is closed or dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    address: String,
    status: watch::Receiver<Status>,
    retry: Arc<Notify>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Listening {
    pub(crate) fn start<S: Service>(service: Arc<S>, shared: Arc<Shared>) -> Self {
        let (sender, status) = watch::channel(Status::Opening);
        let (retry, stop) = (Arc::new(Notify::new()), shared.closing.child_token());
        // At once: whatever comes of it, what nobody took is nobody's, and it is known what the service manager has.
        let kept = shared.manager.take(&service.name());
        let (stored, waiting) = kept.map(|Kept { mark, socket }| (mark, socket)).unzip();
        let keeper = Keeper {
            address: service.address(),
            service,
            shared,
            status: sender,
            retry: retry.clone(),
            stop: stop.clone(),
            stored: Mutex::new(stored),
            waiting: Mutex::new(waiting),
        };
        let address = keeper.address.clone();
        Self { address, status, retry, stop, task: tokio::spawn(supervise(Arc::new(keeper))) }
    }

    /// Where it listens, or should, and why it does not.
    pub(crate) fn report(&self) -> (String, Option<String>) {
        match &*self.status.borrow() {
            Status::Opening => (self.address.clone(), Some("being opened".to_owned())),
            Status::Open { address } => (address.clone(), None),
            Status::Failed { error } => (self.address.clone(), Some(error.clone())),
        }
    }

    /// Its beginning, to be waited for without it.
    pub(crate) fn opening(&self) -> Opening {
        Opening(self.status.clone())
    }

    /// If it could not be opened, it is tried again now.
    pub(crate) fn retry_now(&self) {
        self.retry.notify_one();
    }

    /// Begins to close: [`Self::close`] returns sooner.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// Stops listening; when this returns the address is free, unless the whole proxy ends and the service manager keeps
    /// the socket for its successor. Accepted connections go on.
    pub(crate) async fn close(mut self) {
        self.stop.cancel();
        // The supervisor has nothing that could panic; were it so, the socket would be closed as well.
        drop((&mut self.task).await);
    }
}

/// A socket that may be in the course of being opened.
pub(crate) struct Opening(watch::Receiver<Status>);

impl Opening {
    /// Waits until it is known whether the socket could be opened. Cancel-safe.
    pub(crate) async fn settled(&mut self) {
        // An error means that the keeper is gone, which settles it too.
        drop(self.0.wait_for(|status| *status != Status::Opening).await);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Keeper<S> {
    address: String,
    service: Arc<S>,
    shared: Arc<Shared>,
    status: watch::Sender<Status>,
    retry: Arc<Notify>,
    stop: CancellationToken,
    /// The mark of the socket that the service manager keeps.
    stored: Mutex<Option<String>>,
    /// The socket that it kept, until it is of use.
    waiting: Mutex<Option<OwnedFd>>,
}

/// Starts the listener again should it panic.
async fn supervise<S: Service>(keeper: Arc<Keeper<S>>) {
    let mut tasks = JoinSet::new();
    loop {
        let running = keeper.clone();
        tasks.spawn(async move { running.keep().await });
        match tasks.join_next().await {
            Some(Err(error)) if error.is_panic() => {
                keeper.shared.counters.panics.fetch_add(1, Relaxed);
                keeper.failed("it ended by a defect of the proxy".to_owned());
                keeper.pause().await;
            }
            _ => return,
        }
    }
}

impl<S: Service> Keeper<S> {
    async fn keep(&self) {
        while !self.stop.is_cancelled() {
            if lock(&self.waiting).is_none() {
                // What a panic left behind.
                self.forget().await;
            }
            let prepared = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = self.stop.cancelled() => break,
                // Dropped only where the socket is wanted no more. What it waits for may be a disk that hangs.
                prepared = self.service.prepare() => prepared,
            };
            let opened = match prepared {
                Ok(()) => self.open().await,
                Err(error) => Err(error),
            };
            match opened {
                Ok((mut socket, kept)) => {
                    let address = socket.address();
                    tracing::info!(%address, "listening");
                    self.set(Status::Open { address });
                    let accepted = self.listen(&mut socket, kept).await;
                    let ends = accepted.is_ok() && self.shared.closing.is_cancelled();
                    if !ends {
                        socket.discard();
                        self.forget().await;
                    }
                    if let Err(error) = accepted {
                        self.failed(format!("accepting failed: {error}"));
                        self.pause().await;
                    }
                }
                Err(error) => {
                    self.failed(chain(&error));
                    self.pause().await;
                }
            }
        }
        // One that was never of use, too, waits for the next proxy, if this one ends.
        if !self.shared.closing.is_cancelled() {
            drop(lock(&self.waiting).take());
            self.forget().await;
        }
    }

    /// The socket that was kept, or a new one; and whether it is kept.
    async fn open(&self) -> Result<(S::Socket, bool), S::Error> {
        let kept = lock(&self.waiting).take();
        if let Some(socket) = kept {
            let mark = lock(&self.stored).clone().unwrap_or_default();
            match self.service.adopt(socket, &mark) {
                Ok(mut socket) => {
                    socket.kept();
                    return Ok((socket, true));
                }
                Err(unusable) => {
                    let (name, error) = (self.service.name(), chain(&unusable));
                    tracing::warn!(
                        name,
                        error,
                        "a socket that the service manager kept is of no use; opening a new one"
                    );
                    self.forget().await;
                }
            }
        }
        let mut socket = self.service.open().await?;
        let kept = self.store(&mut socket).await;
        Ok((socket, kept))
    }

    /// Accepts, and meanwhile has the socket kept if that did not succeed at once. As [`Self::accept`].
    async fn listen(&self, socket: &mut S::Socket, mut kept: bool) -> io::Result<()> {
        while !kept {
            tokio::select! {
                // Cancel-safe: a connection is taken and served without a wait between.
                accepted = self.accept(socket) => return accepted,
                // Cancel-safe: nothing is lost with a timer.
                () = sleep(self.shared.limits.retry) => {}
            }
            kept = self.store(socket).await;
        }
        self.accept(socket).await
    }

    /// Has the service manager, if there is one, keep the socket from now on. Whether nothing is left to be done.
    async fn store(&self, socket: &mut S::Socket) -> bool {
        let (manager, name, mark) = (&self.shared.manager, self.service.name(), socket.mark());
        if !manager.is_there() {
            return true;
        }
        if let Err(error) = manager.store(&name, &mark, socket.descriptor()).await {
            tracing::warn!(name, %error, "the service manager could not be handed a socket, which a restart would close; trying again every few seconds");
            return false;
        }
        *lock(&self.stored) = Some(mark);
        socket.kept();
        true
    }

    /// The service manager is to keep the socket no more.
    async fn forget(&self) {
        let stored = lock(&self.stored).take();
        if let Some(mark) = stored {
            self.shared.manager.forget(&self.service.name(), &mark).await;
        }
    }

    /// Accepts until told to stop. An error means that the socket is of no use any more.
    async fn accept(&self, socket: &S::Socket) -> io::Result<()> {
        let (shortages, refusals) = (Throttle::new(), Throttle::new());
        let (address, mut in_a_row) = (&self.address, 0_u32);
        loop {
            let connection = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = self.stop.cancelled() => return Ok(()),
                // Cancel-safe by the contract of `Socket`.
                connection = socket.accept() => connection,
            };
            match connection.map_err(|error| (Trouble::of(&error), error)) {
                Ok(connection) => {
                    in_a_row = 0;
                    self.service.serve(connection);
                }
                Err((Trouble::Connection, error)) => {
                    self.shared.counters.accept_errors.fetch_add(1, Relaxed);
                    if let Some(left_out) = refusals.pass() {
                        tracing::warn!(%address, %error, left_out, "a connection could not be accepted: if this goes on, see what refuses it (a security module, a firewall)");
                    }
                    in_a_row = in_a_row.saturating_add(1);
                    if in_a_row > IN_A_ROW && !self.rest().await {
                        return Ok(());
                    }
                }
                Err((Trouble::Shortage, error)) => {
                    self.shared.counters.accept_errors.fetch_add(1, Relaxed);
                    if let Some(left_out) = shortages.pass() {
                        tracing::error!(%address, %error, left_out, "cannot accept connections: raise the limit of open files, or find what holds them");
                    }
                    if !self.rest().await {
                        return Ok(());
                    }
                }
                Err((Trouble::Socket, error)) => return Err(error),
            }
        }
    }

    /// Pauses accepting; `false` if it was told to stop meanwhile.
    async fn rest(&self) -> bool {
        tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = self.stop.cancelled() => false,
            // Cancel-safe: nothing is lost with a timer.
            () = sleep(SHORTAGE) => true,
        }
    }

    fn failed(&self, error: String) {
        // Every few seconds the same would be said.
        if *self.status.borrow() != (Status::Failed { error: error.clone() }) {
            tracing::error!(address = %self.address, %error, "not listening; trying again every few seconds");
        }
        self.set(Status::Failed { error });
    }

    fn set(&self, new: Status) {
        let changed = self.status.send_if_modified(|status| {
            let changed = *status != new;
            *status = new;
            changed
        });
        if changed {
            self.shared.counters.changed();
        }
    }

    async fn pause(&self) {
        tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = self.stop.cancelled() => {}
            // Cancel-safe: a permit that is not taken stays.
            () = self.retry.notified() => {}
            // Cancel-safe: nothing is lost with a timer.
            () = sleep(self.shared.limits.retry) => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an error of accept(2) is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// The one connection, which is gone already (or what refuses each of them).
    Connection,
    /// Descriptors or memory; waiting helps.
    Shortage,
    /// The socket.
    Socket,
}

impl Trouble {
    /// accept(2) hands pending errors of the new connection out as its own.
    fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::Shortage,
            Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP | Errno::FAULT) | None => Self::Socket,
            Some(_) => Self::Connection,
        }
    }
}

#[cfg(test)]
mod tests;
