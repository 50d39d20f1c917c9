//! The data plane of enclaved: a process that carries traffic between enclaves and the world as the routes say, and reports
//! what it carried. It knows routes and counters; nothing of images, health, AWS or systemd.
//!
//! [`run`] is its life on one page. `plane` holds what is served and applies snapshots; `listening` keeps sockets open;
//! `egress` and `ingress` serve them; `relay` carries the bytes; `link` is how the control process reaches it. [`vsock`] is
//! of use to the control process, too, which asks enclaves how they are.

mod access_log;
mod certificates;
mod counters;
mod current;
mod dial;
mod durable;
mod egress;
mod error_text;
mod hello;
mod host_addresses;
mod ingress;
mod inherited;
mod limits;
mod link;
mod listening;
mod manager;
mod plane;
mod relay;
mod resolver;
mod saver;
mod seats;
mod shared;
mod store;
mod tcp;
mod telling;
mod throttle;
mod unix_socket;
pub mod vsock;
mod vsock_listeners;

pub use limits::Limits;
pub use manager::Manager;

use certificates::Sources;
use certificates::files::FileCertificates;
use certificates::internal_ca::InternalCa;
use enclaved_core::egress_policy::OwnRange;
use ingress::https::Https;
use ingress::tls;
use ingress::upstream::Upstreams;
use link::Link;
use plane::Plane;
use shared::Shared;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use vsock::Transport;

/// How long connections have to end once they were cut.
const CUT: Duration = Duration::from_secs(2);
/// How long the last lines of the access log may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The addresses of this host, and ranges that it routes to itself, which the egress policy refuses.
///
/// # Errors
/// The kernel's tables could not be read.
pub fn own_addresses() -> io::Result<Vec<OwnRange>> {
    host_addresses::read().map_err(io::Error::other)
}

pub use vsock_listeners::vsock_listeners;

/// Where a proxy keeps its state and is reached.
#[derive(Debug, Clone)]
pub struct Options {
    /// Holds the last routes (`routes.json`) and the internal CA (`ca/root.crt`); made if missing.
    pub state_dir: PathBuf,
    /// The Unix socket of the link. Its directory must exist.
    pub link: PathBuf,
}

/// Why a proxy cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// Another one serves from the same state directory.
    #[error("another proxy serves from {}: stop it first", state_dir.display())]
    AlreadyRunning {
        /// The directory.
        state_dir: PathBuf,
    },
    /// The state directory cannot be used.
    #[error("could not {operation} {}", path.display())]
    State {
        /// What was being done.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The link cannot be opened, and there are no routes on disk to serve without it.
    #[error("could not open the link")]
    Link(#[source] vsock::BindError),
    /// The TLS library refuses its settings.
    #[error("could not set up TLS")]
    Tls(#[source] rustls::Error),
}

/// Runs the data plane until it is told to stop; then lets requests in flight finish for a short while.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), ProxyError> {
    run_under(Manager::none(), options, Limits::default(), shutdown).await
}

/// As [`run`], under a service manager that keeps listening sockets for a successor, and with bounds of one's own.
pub async fn run_under(
    manager: Manager,
    options: Options,
    limits: Limits,
    shutdown: CancellationToken,
) -> Result<(), ProxyError> {
    let _lock = lock(&options.state_dir)?;
    raise_descriptor_limit();

    let shared = Arc::new(Shared::under(manager, limits));
    // However this function ends, also by being dropped: no connection outlives it.
    let _cut = shared.cut.clone().drop_guard();
    let provider = tls::provider();
    let certificates = Arc::new(Sources(vec![
        Box::new(InternalCa::new(options.state_dir.join("ca"), provider.clone())),
        Box::new(FileCertificates::new(provider.clone())),
    ]));
    let upstreams = Arc::new(Upstreams::new(shared.clone(), Transport::AfVsock));
    let https = Https::new(shared.clone(), provider, certificates, upstreams).map_err(ProxyError::Tls)?;
    let store = Store::new(options.state_dir.join("routes.json"));
    let plane = Arc::new(Plane::new(shared.clone(), Arc::new(https), store));

    // Before the routes are served: they take what is theirs, and the rest is closed.
    let kept_link = shared.manager.take(link::NAME);
    // Traffic before anything else: it needs nobody's word.
    let serving = plane.restore().await;
    let link = match Link::open(&options.link, &shared.manager, kept_link).await {
        Ok(link) => Some(link),
        Err(error) if !serving => return Err(ProxyError::Link(error)),
        Err(error) => {
            let error = error_text::chain(&error);
            tracing::error!(
                error,
                "could not open the link; serving the last routes and trying again every few seconds"
            );
            None
        }
    };
    // Every listener is open, or failed and is tried again.
    shared.manager.tell("READY=1\n").await;
    tokio::select! {
        // Cancel-safe: a token stays cancelled.
        () = shutdown.cancelled() => {}
        // None returns; dropping them closes the link and ends maintenance between two rounds or within one, none of
        // which leaves anything half done on disk.
        () = link::run(link, &options.link, plane.clone(), shared.clone()) => {}
        () = maintain(&plane, shared.limits.maintenance) => {}
        () = telling::tell(&plane, &shared) => {}
    }

    // New connections wait in the sockets that the service manager keeps, if there is one, for the next proxy.
    tracing::info!("ending: no new connections; requests in flight may finish");
    shared.manager.tell("STOPPING=1\nSTATUS=ending: requests in flight may finish\n").await;
    shared.closing.cancel();
    plane.close().await;
    shared.tasks.close();
    if timeout(shared.limits.drain, shared.tasks.wait()).await.is_err() {
        tracing::warn!(open = shared.tasks.len(), "cutting the connections that are still open");
        shared.cut.cancel();
        if timeout(CUT, shared.tasks.wait()).await.is_err() {
            tracing::error!(open = shared.tasks.len(), "some connections did not end");
        }
    }
    shared.access_log.finish(LAST_LINES).await;
    Ok(())
}

async fn maintain(plane: &Plane, period: Duration) {
    let rounds = || {
        let mut rounds = interval(period);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        rounds
    };
    let (mut quick, mut slow) = (rounds(), rounds());
    let quick = async {
        loop {
            quick.tick().await;
            plane.maintain().await;
        }
    };
    // A disk that hangs holds up certificates alone.
    let slow = async {
        loop {
            slow.tick().await;
            plane.renew().await;
        }
    };
    tokio::join!(quick, slow);
}

/// Takes the state directory for this process, for as long as the file stays open.
fn lock(state_dir: &Path) -> Result<File, ProxyError> {
    let failed = |operation, path: &Path, source| ProxyError::State { operation, path: path.to_owned(), source };
    std::fs::create_dir_all(state_dir).map_err(|error| failed("make the state directory", state_dir, error))?;
    let path = state_dir.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| failed("open the lock file", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ProxyError::AlreadyRunning { state_dir: state_dir.to_owned() }),
        Err(TryLockError::Error(error)) => Err(failed("lock", &path, error)),
    }
}

/// A connection takes two descriptors, and the usual soft limit is 1024. What the unit file allows is used.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "could not raise the limit of open files");
        }
    }
}
