//! Raw TCP ingress: the bytes of a port go to a vsock port of the enclave untouched.

use super::proxy_protocol;
use super::sources::Sources;
use crate::access_log::{Entry, Protocol};
use crate::counters::{Failure, Live, Open, Traffic};
use crate::current::Current;
use crate::error_text::chain;
use crate::inherited::Unusable;
use crate::limits::Limits;
use crate::listening::Service;
use crate::manager::ingress_name;
use crate::relay::{Broken, relay};
use crate::shared::Shared;
use crate::tcp::{self, ListenError, ResetOnDrop, Stalled};
use crate::throttle::Changes;
use crate::vsock::{CONNECT_TIMEOUT, ConnectError, Transport};
use enclaved_core::routes::{ProxyProtocol, TcpRules};
use rustix::fd::OwnedFd;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// Where a port's connections go now.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) transport: Transport,
    pub(crate) vsock_port: u32,
    /// The generation that takes new connections, if one does.
    pub(crate) target: Option<Arc<Live>>,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) rules: TcpRules,
    pub(crate) limits: Limits,
}

impl Backend {
    fn way<'a>(&'a self, target: &'a Live, entry: &'a Entry) -> Way<'a> {
        let Self { transport, vsock_port, traffic, limits, .. } = self;
        Way { transport, target, vsock_port: *vsock_port, traffic, entry, limits }
    }
}

/// Where one connection goes.
#[derive(Debug)]
pub(crate) struct Way<'a> {
    pub(crate) transport: &'a Transport,
    pub(crate) target: &'a Live,
    pub(crate) vsock_port: u32,
    pub(crate) traffic: &'a Traffic,
    pub(crate) entry: &'a Entry,
    pub(crate) limits: &'a Limits,
}

/// A TCP port.
#[derive(Debug)]
pub(crate) struct TcpPort {
    listen: SocketAddr,
    pub(crate) backend: Current<Backend>,
    shared: Arc<Shared>,
    sources: Arc<Sources>,
    /// How the last connection was refused or failed before it was one; none if it was not.
    went: Changes<Option<Failure>>,
}

impl TcpPort {
    pub(crate) fn new(listen: SocketAddr, backend: Backend, shared: Arc<Shared>) -> Self {
        Self { listen, backend: Current::new(backend), shared, sources: Arc::default(), went: Changes::new(None) }
    }

    async fn carry(
        &self,
        client: TcpStream,
        header: Option<Vec<u8>>,
        backend: &Backend,
        target: &Live,
        mut entry: Entry,
    ) {
        // A token of its own: waiting on a shared one takes its lock at every turn.
        let cut = target.cut.child_token();
        let carried = tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = cut.cancelled() => Err((Failure::Cut, None)),
            // Not finished is what it must be when the enclave is cut off: dropping it resets the client.
            carried = connect_and_relay(client, header, backend.way(target, &entry), || self.reached(backend)) => carried,
        };
        match carried {
            Ok(()) => entry.connection_ends(None),
            Err((failure, text)) => self.fail(backend, &mut entry, failure, text.as_deref()),
        }
    }

    /// Says so, if it was otherwise before.
    fn reached(&self, backend: &Backend) {
        if self.went.now(None).is_some() {
            let (enclave, listen) = (&backend.traffic.key().enclave, self.listen);
            tracing::info!(%enclave, %listen, "clients reach their enclave again");
        }
    }

    fn fail(&self, backend: &Backend, entry: &mut Entry, failure: Failure, text: Option<&str>) {
        backend.traffic.fail(failure);
        entry.connection_ends(Some(failure));
        if let Some(error) = text
            && let Some(left_out) = self.went.now(Some(failure))
        {
            let (enclave, listen) = (&backend.traffic.key().enclave, self.listen);
            tracing::warn!(%enclave, %listen, error, left_out, "a client could not reach its enclave");
        }
    }
}

/// Carries a client's connection into an enclave, which is sent `before` first; `reached` hears of it when the enclave has taken it.
/// How it failed; and a text, where that is worth a line in the log.
pub(crate) async fn connect_and_relay(
    client: TcpStream,
    before: Option<Vec<u8>>,
    way: Way<'_>,
    reached: impl FnOnce(),
) -> Result<(), (Failure, Option<String>)> {
    let mut client = ResetOnDrop::new(client);
    let connected = way.transport.connect(way.target.cid, way.vsock_port).await;
    let mut enclave = connected.map_err(|error| (connect_failure(&error), Some(chain(&error))))?;
    reached();
    if let Some(before) = before {
        // It fits most buffers; an enclave that takes not even that is as good as gone.
        let told = timeout(CONNECT_TIMEOUT, enclave.write_all(&before)).await;
        told.map_err(|_| (Failure::ConnectTimeout, None))?.map_err(|_| (Failure::Reset, None))?;
    }
    let ended = relay(&mut enclave, &mut *client, &way.entry.beside(way.traffic), way.limits).await;
    if matches!(ended, Ok(()) | Err(Broken::Deaf { .. })) {
        client.ended_well();
    }
    // Connections end in all ways; that is counted, and no line in the log.
    ended.map_err(|broken| {
        tracing::debug!(endpoint = %way.traffic.key().endpoint, %broken, "a relay broke off");
        (broken.failure(), None)
    })
}

/// How a failed connection into an enclave is counted.
pub(crate) fn connect_failure(error: &ConnectError) -> Failure {
    if matches!(error, ConnectError::TimedOut { .. }) { Failure::ConnectTimeout } else { Failure::Connect }
}

impl Service for TcpPort {
    type Socket = TcpListener;
    type Error = ListenError;

    fn address(&self) -> String {
        self.listen.to_string()
    }

    fn name(&self) -> String {
        ingress_name(self.listen)
    }

    fn adopt(&self, socket: OwnedFd, _: &str) -> Result<TcpListener, Unusable> {
        tcp::adopt(self.listen, socket, self.shared.limits.peer_silence, Stalled::Paused)
    }

    async fn open(&self) -> Result<TcpListener, ListenError> {
        tcp::listen(self.listen, self.shared.limits.peer_silence, Stalled::Paused)
    }

    fn serve(self: &Arc<Self>, (client, source): (TcpStream, SocketAddr)) {
        let backend = self.backend.get();
        let open = Open::ingress(&backend.traffic, backend.target.as_ref());
        let mut entry = Entry::begin(&self.shared, Protocol::Tcp, source);
        entry.listen(self.listen);
        entry.goes_to(&backend.traffic, backend.target.as_deref(), Some(backend.vsock_port));
        let Some(target) = backend.target.clone() else {
            return self.fail(&backend, &mut entry, Failure::NoTarget, Some("no generation of it is ready"));
        };
        let rules = &backend.rules;
        if !rules.allows(source.ip()) {
            let text = format!("{} is in no network of allow", source.ip().to_canonical());
            return self.fail(&backend, &mut entry, Failure::SourceRefused, Some(&text));
        }
        let limit = rules.max_connections.map_or(self.shared.limits.tcp_connections as u64, u64::from);
        if backend.traffic.open_now() > limit {
            return self.fail(
                &backend,
                &mut entry,
                Failure::Limit,
                Some(&format!("the port has {limit} connections already")),
            );
        }
        let Some(counted) = self.sources.count(source.ip(), rules.max_connections_per_source) else {
            let text = format!("{} has as many connections as one source may have", source.ip().to_canonical());
            return self.fail(&backend, &mut entry, Failure::SourceLimit, Some(&text));
        };
        let header = match (rules.proxy_protocol, client.local_addr()) {
            (None, _) => None,
            (Some(ProxyProtocol::V2), Ok(destination)) => Some(proxy_protocol::v2(source, destination)),
            // The connection is gone already.
            (Some(ProxyProtocol::V2), Err(_)) => return self.fail(&backend, &mut entry, Failure::Reset, None),
        };
        let port = self.clone();
        self.shared.spawn(async move {
            port.carry(client, header, &backend, &target, entry).await;
            drop((open, counted));
        });
    }
}
