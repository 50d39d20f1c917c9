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
use std::sync::{Arc, Mutex, PoisonError};
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
        let keeper = Keeper {
            address: service.address(),
            service,
            shared,
            status: sender,
            retry: retry.clone(),
            stop: stop.clone(),
            stored: Mutex::default(),
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

    /// Waits until it is known whether the socket could be opened. Cancel-safe.
    pub(crate) async fn settled(&mut self) {
        // An error means that the keeper is gone, which settles it too.
        drop(self.status.wait_for(|status| *status != Status::Opening).await);
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
    /// The mark of the socket that was handed to the service manager.
    stored: Mutex<Option<String>>,
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
            match self.open().await {
                Ok(socket) => {
                    let address = socket.address();
                    tracing::info!(%address, "listening");
                    self.set(Status::Open { address });
                    let accepted = self.accept(&socket).await;
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
    }

    /// The socket that was kept, or a new one, which is kept from now on.
    async fn open(&self) -> Result<S::Socket, S::Error> {
        // What a panic left behind.
        self.forget().await;
        self.service.prepare().await?;
        let (manager, name) = (&self.shared.manager, self.service.name());
        if let Some(Kept { mark, socket }) = manager.take(&name) {
            match self.service.adopt(socket, &mark) {
                Ok(mut socket) => {
                    socket.kept();
                    self.set_stored(mark);
                    return Ok(socket);
                }
                Err(unusable) => {
                    let error = chain(&unusable);
                    tracing::warn!(
                        name,
                        error,
                        "a socket that the service manager kept is of no use; opening a new one"
                    );
                    manager.forget(&name, &mark).await;
                }
            }
        }
        let mut socket = self.service.open().await?;
        if manager.is_there() {
            let mark = socket.mark();
            manager.store(&name, &mark, socket.descriptor()).await;
            socket.kept();
            self.set_stored(mark);
        }
        Ok(socket)
    }

    fn set_stored(&self, mark: String) {
        *self.stored.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
    }

    /// The service manager is to keep the socket no more.
    async fn forget(&self) {
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner).take();
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
mod tests {
    use super::*;
    use crate::limits::Limits;
    use rustix::fd::AsFd;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::time::Instant;

    type Accepts = Arc<Mutex<Vec<Result<(), Option<Errno>>>>>;

    /// Opens and accepts as the script says; an empty script accepts nothing, forever.
    struct Scripted {
        opens: Mutex<Vec<Result<(), &'static str>>>,
        accepts: Accepts,
        served: AtomicUsize,
        panic_at: usize,
    }
    struct ScriptedSocket(Accepts, std::fs::File);

    impl Socket for ScriptedSocket {
        type Connection = ();
        async fn accept(&self) -> io::Result<()> {
            let next = self.0.lock().unwrap().pop();
            match next {
                Some(Ok(())) => Ok(()),
                Some(Err(Some(errno))) => Err(errno.into()),
                Some(Err(None)) => Err(io::Error::other("unheard of")),
                None => std::future::pending().await,
            }
        }
        fn address(&self) -> String {
            "there".to_owned()
        }
        fn descriptor(&self) -> BorrowedFd<'_> {
            self.1.as_fd()
        }
        fn discard(self) {}
    }

    impl Service for Scripted {
        type Socket = ScriptedSocket;
        type Error = io::Error;
        fn address(&self) -> String {
            "wanted".to_owned()
        }
        fn name(&self) -> String {
            "wanted".to_owned()
        }
        fn adopt(&self, _: OwnedFd, _: &str) -> Result<ScriptedSocket, Unusable> {
            Err(Unusable::Silent)
        }
        async fn open(&self) -> io::Result<ScriptedSocket> {
            let next = self.opens.lock().unwrap().pop().unwrap_or(Ok(()));
            let file = std::fs::File::open("/dev/null")?;
            next.map_err(io::Error::other).map(|()| ScriptedSocket(self.accepts.clone(), file))
        }
        fn serve(self: &Arc<Self>, (): ()) {
            let served = self.served.fetch_add(1, Ordering::SeqCst) + 1;
            assert!(served != self.panic_at, "on purpose");
        }
    }

    fn scripted(opens: Vec<Result<(), &'static str>>, accepts: Vec<Result<(), Option<Errno>>>) -> Arc<Scripted> {
        let accepts = Arc::new(Mutex::new(accepts));
        Arc::new(Scripted { opens: Mutex::new(opens), accepts, served: AtomicUsize::new(0), panic_at: usize::MAX })
    }

    async fn until_served(service: &Scripted, count: usize) {
        while service.served.load(Ordering::SeqCst) < count {
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_in_use_is_reported_and_taken_when_it_is_free() {
        let shared = Arc::new(Shared::new(Limits::default()));
        let mut changes = shared.counters.sequence();
        let service = scripted(vec![Ok(()), Err("in use"), Err("in use")], Vec::new());
        let mut listening = Listening::start(service, shared.clone());
        listening.settled().await;
        assert_eq!(listening.report(), ("wanted".to_owned(), Some("in use".to_owned())));
        changes.changed().await.unwrap();
        let start = Instant::now();
        changes.changed().await.unwrap();
        assert_eq!(listening.report(), ("there".to_owned(), None));
        assert_eq!(start.elapsed().as_secs(), 2 * shared.limits.retry.as_secs());
        listening.close().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_that_is_asked_for_happens_at_once() {
        let shared = Arc::new(Shared::new(Limits::default()));
        let mut listening = Listening::start(scripted(vec![Ok(()), Err("in use")], Vec::new()), shared);
        listening.settled().await;
        let start = Instant::now();
        listening.retry_now();
        listening.status.changed().await.unwrap();
        assert_eq!((listening.report().1, start.elapsed()), (None, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn shortages_pause_accepting_and_errors_of_single_connections_do_not() {
        let shared = Arc::new(Shared::new(Limits::default()));
        let script =
            vec![Ok(()), Err(Some(Errno::MFILE)), Err(Some(Errno::NOMEM)), Ok(()), Err(Some(Errno::CONNABORTED))];
        let service = scripted(Vec::new(), script);
        let start = Instant::now();
        let listening = Listening::start(service.clone(), shared.clone());
        until_served(&service, 2).await;
        let waited = start.elapsed();
        assert!(waited >= 2 * SHORTAGE && waited < 3 * SHORTAGE, "{waited:?}");
        assert_eq!(shared.counters.accept_errors.load(Relaxed), 3);
        assert_eq!(listening.report().1, None);
    }

    #[tokio::test(start_paused = true)]
    async fn errors_without_an_end_are_counted_and_pause_accepting_too() {
        let shared = Arc::new(Shared::new(Limits::default()));
        let persistent = [Err(Some(Errno::PERM)); IN_A_ROW as usize + 10];
        let service = scripted(Vec::new(), [&[Ok(())], persistent.as_slice(), &[Ok(())]].concat());
        let start = Instant::now();
        let listening = Listening::start(service.clone(), shared.clone());
        until_served(&service, 2).await;
        let waited = start.elapsed();
        assert!(waited >= 10 * SHORTAGE && waited < 11 * SHORTAGE, "{waited:?}");
        assert_eq!(shared.counters.accept_errors.load(Relaxed), u64::from(IN_A_ROW) + 10);
        assert_eq!(listening.report().1, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_socket_and_a_panic_lead_to_a_new_socket() {
        let shared = Arc::new(Shared::new(Limits::default()));
        let mut service = scripted(Vec::new(), vec![Ok(()), Err(Some(Errno::BADF)), Ok(()), Ok(()), Err(None)]);
        Arc::get_mut(&mut service).unwrap().panic_at = 1;
        let listening = Listening::start(service.clone(), shared.clone());
        until_served(&service, 3).await;
        assert_eq!(shared.counters.panics.load(Relaxed), 1);
        assert_eq!(listening.report().1, None);
    }
}
