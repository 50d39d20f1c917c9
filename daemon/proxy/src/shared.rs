//! What every part of the data plane shares: bounds, counters, the tasks of its connections and the ways to end them.

use crate::access_log::AccessLogs;
use crate::counters::Counters;
use crate::host_addresses::HostAddresses;
use crate::limits::Limits;
use crate::manager::Manager;
use crate::resolver::Resolver;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) manager: Manager,
    pub(crate) counters: Arc<Counters>,
    pub(crate) access_log: AccessLogs,
    pub(crate) own_addresses: HostAddresses,
    /// The names of upstreams.
    pub(crate) resolver: Resolver,
    /// Nothing new from now on; requests in flight are finished.
    pub(crate) closing: CancellationToken,
    /// Every connection ends now.
    pub(crate) cut: CancellationToken,
    /// The tasks of all connections. They outlive the listener that accepted them.
    pub(crate) tasks: TaskTracker,
}

impl Shared {
    #[cfg(test)]
    pub(crate) fn new(limits: Limits) -> Self {
        Self::under(Manager::none(), limits)
    }

    pub(crate) fn under(manager: Manager, limits: Limits) -> Self {
        let counters = Arc::new(Counters::new());
        Self {
            limits,
            manager,
            access_log: AccessLogs::new(counters.clone()),
            counters,
            own_addresses: HostAddresses::default(),
            resolver: Resolver::of_the_system(),
            closing: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Runs the task of one connection. It must end soon after [`Self::cut`], or a child of it, is cancelled. Should it
    /// panic, it alone ends, and is counted.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let witness = PanicWitness(self.counters.clone());
        self.tasks.spawn(async move {
            let _witness = witness;
            task.await;
        });
    }
}

/// Dropped while its task unwinds, it counts that.
struct PanicWitness(Arc<Counters>);

impl Drop for PanicWitness {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panics.fetch_add(1, Relaxed);
            tracing::error!("a connection ended by a defect of the proxy; the panic's message stands before this line");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_its_own_connection_and_is_counted() {
        let shared = Shared::new(Limits::default());
        shared.spawn(async { panic!("on purpose") });
        let (sender, receiver) = tokio::sync::oneshot::channel();
        shared.spawn(async move { sender.send(()).unwrap() });
        receiver.await.unwrap();
        shared.tasks.close();
        shared.tasks.wait().await;
        assert_eq!(shared.counters.panics.load(Relaxed), 1);
    }
}
