//! The HTTPS port, and what its connections share: sites, certificates, connections into enclaves, limits. What becomes of a
//! connection is in `handshake`, then in `serving` or `passthrough`.

use super::client_ca::ClientCas;
use super::handshake::Begun;
use super::sites::Sites;
use super::sources::{Counted, Sources};
use super::tls;
use super::upstream::Upstreams;
use crate::certificates::{CertificateError, CertificateSource, Wanted};
use crate::counters::Refused;
use crate::current::Current;
use crate::inherited::Unusable;
use crate::listening::Service;
use crate::manager::ingress_name;
use crate::seats::{Seat, Seats};
use crate::shared::Shared;
use crate::tcp::{self, Stalled};
use crate::throttle::Throttle;
use bytes::Bytes;
use enclaved_core::routes::HttpsRules;
use http::HeaderValue;
use rustix::fd::OwnedFd;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

/// All of HTTPS but its socket: it outlives a change of address.
#[derive(Debug)]
pub(crate) struct Https {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sites: Arc<Current<Sites>>,
    pub(crate) upstreams: Arc<Upstreams>,
    pub(crate) certificates: Arc<dyn CertificateSource>,
    pub(crate) failures: Throttle,
    pub(crate) rules: Current<HttpsRules>,
    /// For sites whose clients show no certificate.
    pub(crate) tls: Arc<rustls::ServerConfig>,
    /// For the others.
    pub(crate) client_cas: Arc<ClientCas>,
    port: AtomicU16,
    connections: Seats,
    sources: Arc<Sources>,
    /// Held by the thread that makes certificates.
    making: Arc<tokio::sync::Mutex<()>>,
    limit_reached: Throttle,
    /// Makes request ids differ between processes.
    seed: u32,
    requests: AtomicU64,
}

impl Https {
    pub(crate) fn new(
        shared: Arc<Shared>,
        provider: Arc<CryptoProvider>,
        certificates: Arc<dyn CertificateSource>,
        upstreams: Arc<Upstreams>,
    ) -> Result<Self, rustls::Error> {
        let sites = Arc::new(Current::default());
        let basis = tls::Basis { provider, certificates: certificates.clone(), sites: sites.clone() };
        let tls = basis.config(WebPkiClientVerifier::no_client_auth())?;
        Ok(Self {
            rules: Current::default(),
            port: AtomicU16::new(443),
            connections: Seats::default(),
            sources: Arc::default(),
            shared,
            sites,
            upstreams,
            certificates,
            failures: Throttle::new(),
            tls: Arc::new(tls),
            client_cas: Arc::new(ClientCas::new(basis)),
            making: Arc::default(),
            limit_reached: Throttle::new(),
            seed: u32::try_from(RandomState::new().hash_one(0) >> 32).unwrap_or(0),
            requests: AtomicU64::new(0),
        })
    }

    /// Has certificates for the sites, on a thread that may block: one at a time, however many give up waiting for it.
    pub(crate) async fn maintain_certificates(&self) -> Result<(), CertificateError> {
        let making = self.making.clone().lock_owned().await;
        let (sites, certificates, client_cas) = (self.sites.get(), self.certificates.clone(), self.client_cas.clone());
        let maintain = move || {
            let _making = making;
            // Trouble with one keeps nobody from the other.
            let clients = client_cas.maintain(sites.demands());
            certificates.maintain(sites.domains(), SystemTime::now()).and(clients)
        };
        let result = tokio::task::spawn_blocking(maintain).await;
        result.unwrap_or_else(|error| Err(CertificateError::new("making certificates ended by a defect", error)))
    }

    /// Connections that are open now.
    pub(crate) fn open_connections(&self) -> u64 {
        self.connections.taken()
    }

    /// The port of HTTPS, as bound.
    pub(crate) fn port(&self) -> u16 {
        self.port.load(Relaxed)
    }

    /// The port that HTTPS will have, unless the kernel chooses it.
    pub(crate) fn expect_port(&self, port: u16) {
        if port != 0 {
            self.port.store(port, Relaxed);
        }
    }

    /// The kernel may have chosen it.
    fn note_port(&self, listener: &TcpListener) {
        // A listener has an address; the port that was known before would do, too.
        if let Ok(address) = listener.local_addr() {
            self.port.store(address.port(), Relaxed);
        }
    }

    /// A name for a request: unique on this host, for a long while.
    pub(crate) fn next_request_id(&self) -> HeaderValue {
        let text = format!("{:08x}-{:x}", self.seed, self.requests.fetch_add(1, Relaxed));
        HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or(HeaderValue::from_static("none"))
    }

    async fn serve_connection(self: Arc<Self>, client: TcpStream, source: SocketAddr, admitted: Admitted) {
        let closing = self.shared.closing.child_token();
        let begun = tokio::select! {
            // Cancel-safe: a token stays cancelled, and nothing is lost with a timer. No request can have been read yet.
            () = async { closing.cancelled().await; sleep(self.shared.limits.first_request).await } => return,
            // Dropped only where the connection is given up. On the heap: what it needs is not kept for as long as the
            // connection lives.
            begun = Box::pin(self.begin(client)) => begun,
        };
        match begun {
            // Each on the heap, too: a task has room for the largest of all that it may come to.
            Ok(Begun::Here(stream, checked)) => {
                Box::pin(self.serve_http(*stream, source, (checked, admitted))).await;
            }
            Ok(Begun::There { client, said, backend, passthrough }) => {
                Box::pin(self.pass_through(client, said, source, &backend, passthrough)).await;
            }
            // Scanners and clients without trust in the certificate: counted, and no line in the log.
            Err(cause) => {
                tracing::debug!(client = %source, ?cause, "a TLS handshake failed");
                self.shared.counters.handshakes.count(cause);
            }
        }
    }

    /// Counts a connection, unless there are too many. Those of trusted proxies are many clients'.
    pub(crate) fn admit(&self, source: IpAddr) -> Option<Admitted> {
        let (rules, limits) = (self.rules.get(), &self.shared.limits);
        let limit = rules.max_connections.unwrap_or(limits.https_connections);
        let Some(seat) = self.connections.take(limit.into()) else {
            self.shared.counters.refused.count(Refused::HttpsLimit);
            if let Some(left_out) = self.limit_reached.pass() {
                tracing::warn!(limit, left_out, "too many HTTPS connections; closing new ones");
            }
            return None;
        };
        let limit = if rules.trusts(source) { None } else { Some(self.source_limit(&rules)) };
        let Some(counted) = self.sources.count(source, limit) else {
            self.shared.counters.refused.count(Refused::HttpsSourceLimit);
            if let Some(left_out) = self.limit_reached.pass() {
                let source = source.to_canonical();
                tracing::warn!(%source, limit, left_out, "too many HTTPS connections from one source; closing new ones");
            }
            return None;
        };
        Some(Arc::new((seat, counted)))
    }

    /// Counts a request that goes to an enclave, unless its source has too many in flight: as many as connections, over each of which it
    /// might have one. HTTP/2 has hundreds over a few, and would let one source have all the places of an enclave.
    pub(crate) fn admit_request(&self, admitted: &Admitted, trusted: bool) -> Option<Seat> {
        admitted.1.request((!trusted).then(|| self.source_limit(&self.rules.get())))
    }

    /// Connections of one source, and its requests in flight.
    pub(crate) fn source_limit(&self, rules: &HttpsRules) -> u32 {
        rules.max_connections_per_source.unwrap_or(self.shared.limits.https_source_connections)
    }
}

/// A connection that was counted, for as long as anything of it lives.
pub(crate) type Admitted = Arc<(Seat, Counted)>;

/// The HTTPS socket.
#[derive(Debug)]
pub(crate) struct HttpsPort {
    pub(crate) listen: SocketAddr,
    pub(crate) https: Arc<Https>,
}

/// Why the HTTPS port is not open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Listen(#[from] tcp::ListenError),
    #[error("there are no certificates to serve")]
    Certificates(#[from] CertificateError),
}

impl Service for HttpsPort {
    type Socket = TcpListener;
    type Error = OpenError;

    fn address(&self) -> String {
        self.listen.to_string()
    }

    fn name(&self) -> String {
        ingress_name(self.listen)
    }

    async fn prepare(&self) -> Result<(), OpenError> {
        let limit = self.https.shared.limits.settle;
        let error = match timeout(limit, self.https.maintain_certificates()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            // It goes on by itself.
            Err(late) => CertificateError::new("making or reading certificates takes long", late),
        };
        // One certificate that cannot be read keeps no other site from being served, nor TLS that does not end here.
        let sites = self.https.sites.get();
        let served = |wanted: &Wanted| self.https.certificates.certificate(&wanted.domain).is_some();
        if sites.domains().iter().any(served) || sites.any_passthrough() { Ok(()) } else { Err(error.into()) }
    }

    fn adopt(&self, socket: OwnedFd, _: &str) -> Result<TcpListener, Unusable> {
        tcp::adopt(self.listen, socket, self.https.shared.limits.peer_silence, Stalled::Gone)
            .inspect(|listener| self.https.note_port(listener))
    }

    async fn open(&self) -> Result<TcpListener, OpenError> {
        Ok(tcp::listen(self.listen, self.https.shared.limits.peer_silence, Stalled::Gone)
            .inspect(|listener| self.https.note_port(listener))?)
    }

    fn serve(self: &Arc<Self>, (client, address): (TcpStream, SocketAddr)) {
        let Some(admitted) = self.https.admit(address.ip()) else { return };
        let https = self.https.clone();
        self.https.shared.spawn(async move {
            https.serve_connection(client, address, admitted).await;
        });
    }
}
