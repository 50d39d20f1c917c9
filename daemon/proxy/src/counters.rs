//! What the data plane counts, and the report made of it. Counting is a relaxed atomic addition; only adding an endpoint
//! takes a lock. Nothing here decides anything.

mod upstream;

pub(crate) use upstream::{Upstream, UpstreamCounts};

use enclaved_core::id::{Cid, EnclaveName};
use enclaved_core::routes::{Direction, LatencyReport, TrafficReport};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A fixed set of reasons that things are counted by.
pub(crate) trait Reason: Copy + 'static {
    const ALL: &'static [Self];
    fn name(self) -> &'static str;
    fn index(self) -> usize;
}

macro_rules! reasons {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $type { $($(#[$variant_doc])* $variant,)* }
        impl Reason for $type {
            const ALL: &'static [Self] = &[$(Self::$variant,)*];
            fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

reasons! {
    /// How a connection or request of an enclave failed.
    Failure {
        /// The upstream's name did not resolve.
        Dns = "dns",
        /// The upstream's name resolved to addresses that an enclave must not reach.
        AddressRefused = "address_refused",
        /// The other end could not be connected to.
        Connect = "connect",
        /// Connecting took too long.
        ConnectTimeout = "connect_timeout",
        /// Too many at a time.
        Limit = "limit",
        /// Too many new ones for too long.
        Rate = "rate",
        /// It did not begin as TLS does, where only TLS is allowed.
        NotTls = "not_tls",
        /// TLS that asked for no server by name, where one is demanded.
        NoServerName = "no_sni",
        /// TLS that asked for another server.
        OtherServerName = "sni_mismatch",
        /// It did not say in time which server it wants.
        HelloTimeout = "hello_timeout",
        /// It came from where nobody is let in from.
        SourceRefused = "source_refused",
        /// Too many from one source.
        SourceLimit = "source_limit",
        /// No generation of the enclave takes connections.
        NoTarget = "no_target",
        /// One end reset the connection.
        Reset = "reset",
        /// Nothing was said for too long.
        Idle = "idle",
        /// The connection was as old as one may become.
        Lifetime = "lifetime",
        /// The enclave's generation, or its endpoint, left the routes.
        Cut = "cut",
        /// The enclave's answer was not HTTP, or broke off.
        BadAnswer = "bad_answer",
        /// The client's body was malformed, broke off, or did not come in time.
        ClientBody = "client_body",
        /// The enclave did not answer in time.
        AnswerTimeout = "answer_timeout",
        /// No path of the site matches.
        NoPath = "no_path",
    }
}

reasons! {
    /// Why something that belongs to no enclave was refused.
    Refused {
        /// A vsock peer that has no endpoint there.
        UnknownPeer = "unknown_peer",
        /// A request whose host is no site's, or not that of its connection.
        UnknownHost = "unknown_host",
        /// Too many HTTPS connections.
        HttpsLimit = "https_limit",
        /// Too many HTTPS connections from one source.
        HttpsSourceLimit = "https_source_limit",
        /// A request that HTTP does not allow.
        BadRequest = "bad_request",
        /// An HTTP/2 connection that took back most of its requests.
        TakenBack = "taken_back",
    }
}

reasons! {
    /// Why a TLS handshake came to nothing.
    Handshake {
        /// It took too long.
        Timeout = "timeout",
        /// The client closed or reset the connection before the end.
        Closed = "closed",
        /// It did not begin as TLS does.
        NotTls = "not_tls",
        /// A name that is no site's.
        UnknownName = "unknown_name",
        /// The site has no certificate that can be served.
        NoCertificate = "no_certificate",
        /// Client and proxy have no version, cipher, key exchange or application protocol in common.
        Incompatible = "incompatible",
        /// The client showed no certificate where one is demanded.
        NoClientCertificate = "no_client_certificate",
        /// The client's certificate is of no authority that counts, has expired, or is not its own.
        ClientCertificate = "client_certificate",
        /// The site demands certificates of its clients, and there is nothing to check them against.
        NoClientCa = "no_client_ca",
        /// The client does not accept the certificate.
        CertificateRefused = "certificate_refused",
        /// Anything else: what a client sent makes no sense.
        Other = "other",
    }
}

/// One count for each reason.
#[derive(Debug)]
pub(crate) struct Tally<R> {
    counts: Box<[AtomicU64]>,
    reasons: PhantomData<fn(R)>,
}

impl<R: Reason> Tally<R> {
    fn new() -> Self {
        Self { counts: R::ALL.iter().map(|_| AtomicU64::new(0)).collect(), reasons: PhantomData }
    }

    pub(crate) fn count(&self, reason: R) {
        self.counts[reason.index()].fetch_add(1, Relaxed);
    }

    /// The counts that are not zero, by name.
    pub(crate) fn report(&self) -> BTreeMap<String, u64> {
        let counts = R::ALL.iter().map(|reason| (reason.name(), self.counts[reason.index()].load(Relaxed)));
        counts.filter(|(_, count)| *count > 0).map(|(name, count)| (name.to_owned(), count)).collect()
    }
}

/// How long something took, counted by bounds.
#[derive(Debug, Default)]
pub(crate) struct Latency {
    counts: [AtomicU64; LatencyReport::BOUNDS_MS.len() + 1],
    sum_us: AtomicU64,
}

impl Latency {
    pub(crate) fn record(&self, took: Duration) {
        let within = |bound: &u32| took <= Duration::from_millis((*bound).into());
        let at = LatencyReport::BOUNDS_MS.iter().position(within).unwrap_or(LatencyReport::BOUNDS_MS.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn report(&self) -> LatencyReport {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let measured = counts.iter().any(|count| *count > 0);
        LatencyReport { counts: if measured { counts } else { Vec::new() }, sum_us: self.sum_us.load(Relaxed) }
    }
}

/// Which traffic: the identity of one [`TrafficReport`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TrafficKey {
    pub(crate) enclave: EnclaveName,
    pub(crate) direction: Direction,
    pub(crate) endpoint: String,
}

/// The counters of one use of one enclave.
#[derive(Debug)]
pub(crate) struct Traffic {
    key: TrafficKey,
    open: AtomicU64,
    total: AtomicU64,
    pub(crate) to_enclave: AtomicU64,
    pub(crate) from_enclave: AtomicU64,
    /// How long connecting to an upstream took.
    pub(crate) connects: Latency,
    /// How long requests took to be answered.
    pub(crate) answers: Latency,
    /// The connections that carry requests.
    pub(crate) upstream: UpstreamCounts,
    failed: Tally<Failure>,
    status: [AtomicU64; 5],
}

impl Traffic {
    pub(crate) fn new(key: TrafficKey) -> Self {
        Self {
            key,
            open: AtomicU64::new(0),
            total: AtomicU64::new(0),
            to_enclave: AtomicU64::new(0),
            from_enclave: AtomicU64::new(0),
            connects: Latency::default(),
            answers: Latency::default(),
            upstream: UpstreamCounts::new(),
            failed: Tally::new(),
            status: Default::default(),
        }
    }

    pub(crate) fn key(&self) -> &TrafficKey {
        &self.key
    }

    pub(crate) fn fail(&self, failure: Failure) {
        self.failed.count(failure);
    }

    /// Counts an answer's status.
    pub(crate) fn answered(&self, status: http::StatusCode) {
        if let Some(count) = self.status.get(usize::from(status.as_u16() / 100).wrapping_sub(1)) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// Connections open now.
    pub(crate) fn open_now(&self) -> u64 {
        self.open.load(Relaxed)
    }

    fn report(&self) -> TrafficReport {
        let classes = self.status.iter().zip(1..).map(|(count, class)| (format!("{class}xx"), count.load(Relaxed)));
        TrafficReport {
            enclave: self.key.enclave.clone(),
            direction: self.key.direction,
            endpoint: self.key.endpoint.clone(),
            open: self.open_now(),
            total: self.total.load(Relaxed),
            bytes_to_enclave: self.to_enclave.load(Relaxed),
            bytes_from_enclave: self.from_enclave.load(Relaxed),
            failed: self.failed.report(),
            status_classes: classes.filter(|(_, count)| *count > 0).collect(),
            connects: self.connects.report(),
            answers: self.answers.report(),
            upstream: self.upstream.report(),
        }
    }
}

/// What counts the bytes of a relay.
pub(crate) trait Meter {
    /// Bytes were carried towards the enclave.
    fn inwards(&self, bytes: u64);
    /// Bytes were carried from the enclave.
    fn outwards(&self, bytes: u64);
}

impl Meter for Traffic {
    fn inwards(&self, bytes: u64) {
        self.to_enclave.fetch_add(bytes, Relaxed);
    }

    fn outwards(&self, bytes: u64) {
        self.from_enclave.fetch_add(bytes, Relaxed);
    }
}

impl<M: Meter> Meter for Arc<M> {
    fn inwards(&self, bytes: u64) {
        M::inwards(self, bytes);
    }

    fn outwards(&self, bytes: u64) {
        M::outwards(self, bytes);
    }
}

/// A connection or request counted as open for as long as this exists.
#[derive(Debug)]
pub(crate) struct Open {
    traffic: Arc<Traffic>,
    /// Whose drain it holds up, if it is ingress.
    drain: Option<Arc<Live>>,
}

impl Open {
    /// A connection that an enclave made.
    pub(crate) fn egress(traffic: &Arc<Traffic>) -> Self {
        Self::new(traffic, None)
    }

    /// A connection or request to this generation of an enclave, or to none.
    pub(crate) fn ingress(traffic: &Arc<Traffic>, target: Option<&Arc<Live>>) -> Self {
        if let Some(live) = target {
            live.ingress_open.fetch_add(1, SeqCst);
        }
        Self::new(traffic, target.cloned())
    }

    /// Whether the generation of an enclave that it is for has ended.
    pub(crate) fn is_cut(&self) -> bool {
        self.drain.as_ref().is_some_and(|live| live.cut.is_cancelled())
    }

    fn new(traffic: &Arc<Traffic>, drain: Option<Arc<Live>>) -> Self {
        traffic.open.fetch_add(1, Relaxed);
        traffic.total.fetch_add(1, Relaxed);
        Self { traffic: traffic.clone(), drain }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.traffic.open.fetch_sub(1, Relaxed);
        if let Some(live) = &self.drain
            && live.ingress_open.fetch_sub(1, SeqCst) == 1
            && !live.takes_new.load(SeqCst)
        {
            live.counters.changed();
        }
    }
}

/// One generation of an enclave, as long as the routes name its CID.
#[derive(Debug)]
pub(crate) struct Live {
    /// The CID.
    pub(crate) cid: Cid,
    /// Ends every connection of this CID.
    pub(crate) end: CancellationToken,
    /// Ends those to it: clients' connections, and requests.
    pub(crate) cut: CancellationToken,
    /// Whether a route leads new connections here.
    takes_new: AtomicBool,
    ingress_open: AtomicU64,
    counters: Arc<Counters>,
}

impl Live {
    pub(crate) fn new(cid: Cid, end: CancellationToken, counters: &Arc<Counters>) -> Self {
        let (takes_new, ingress_open) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { cid, cut: end.child_token(), end, takes_new, ingress_open, counters: counters.clone() }
    }

    /// Says whether a route leads new connections here. After `false`, the end of the last one is a change to report.
    pub(crate) fn set_takes_new(&self, takes_new: bool) {
        self.takes_new.store(takes_new, SeqCst);
    }

    /// Ingress connections and requests in flight.
    pub(crate) fn ingress_open(&self) -> u64 {
        self.ingress_open.load(SeqCst)
    }
}

/// The counters of the process.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) accept_errors: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) refused: Tally<Refused>,
    pub(crate) handshakes: Tally<Handshake>,
    sequence: watch::Sender<u64>,
    traffic: Mutex<BTreeMap<TrafficKey, Arc<Traffic>>>,
}

impl Counters {
    pub(crate) fn new() -> Self {
        // Above the numbers of every predecessor, which began earlier and counted fewer than one change a microsecond.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros());
        Self {
            accept_errors: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            refused: Tally::new(),
            handshakes: Tally::new(),
            sequence: watch::Sender::new(u64::try_from(since).unwrap_or(0)),
            traffic: Mutex::default(),
        }
    }

    /// Something changed that whoever watches wants to know at once.
    pub(crate) fn changed(&self) {
        self.sequence.send_modify(|sequence| *sequence += 1);
    }

    /// The number of the last change.
    pub(crate) fn sequence(&self) -> watch::Receiver<u64> {
        self.sequence.subscribe()
    }

    /// The counters of this key; they go on where they were if it existed before.
    pub(crate) fn traffic(&self, key: TrafficKey) -> Arc<Traffic> {
        let mut traffic = self.lock();
        traffic.entry(key).or_insert_with_key(|key| Arc::new(Traffic::new(key.clone()))).clone()
    }

    /// Forgets what no route and no connection uses any more, so that years of changing endpoints need no memory.
    pub(crate) fn forget_unused(&self) {
        self.lock().retain(|_, traffic| Arc::strong_count(traffic) > 1);
    }

    pub(crate) fn report(&self) -> Vec<TrafficReport> {
        self.lock().values().map(|traffic| traffic.report()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TrafficKey, Arc<Traffic>>> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(endpoint: &str) -> TrafficKey {
        TrafficKey { enclave: "signer".parse().unwrap(), direction: Direction::Https, endpoint: endpoint.to_owned() }
    }

    #[test]
    fn the_end_of_a_drain_is_a_change_and_other_ends_are_not() {
        let counters = Arc::new(Counters::new());
        let live = Arc::new(Live::new(Cid::FIRST, CancellationToken::new(), &counters));
        let traffic = counters.traffic(key("https"));
        let mut sequence = counters.sequence();
        live.set_takes_new(true);
        drop(Open::ingress(&traffic, Some(&live)));
        assert!(!sequence.has_changed().unwrap(), "a busy enclave would wake the control process with each request");
        let (first, second) = (Open::ingress(&traffic, Some(&live)), Open::ingress(&traffic, Some(&live)));
        live.set_takes_new(false);
        drop(first);
        assert!(!sequence.has_changed().unwrap());
        drop(second);
        assert!(sequence.has_changed().unwrap());
        sequence.mark_unchanged();
        assert_eq!((live.ingress_open(), traffic.open_now()), (0, 0));
    }

    #[test]
    fn what_took_as_long_as_a_bound_is_counted_with_it_and_what_took_longer_with_the_next() {
        let latency = Latency::default();
        assert_eq!(latency.report(), LatencyReport::default());
        for micros in [0, 1000, 1001, 10_000_000, 10_000_001] {
            latency.record(Duration::from_micros(micros));
        }
        let LatencyReport { counts, sum_us } = latency.report();
        assert_eq!((counts[0], counts[1], counts[11], counts[12]), (2, 1, 1, 1));
        assert_eq!((counts.iter().sum::<u64>(), sum_us), (5, 20_002_002));
    }

    #[test]
    fn counters_survive_as_long_as_someone_uses_them() {
        let counters = Counters::new();
        let used = counters.traffic(key("a"));
        used.fail(Failure::Dns);
        used.answered(http::StatusCode::SERVICE_UNAVAILABLE);
        drop(counters.traffic(key("b")));
        counters.forget_unused();
        let report = counters.report();
        assert_eq!(report.len(), 1);
        assert_eq!(report[0].failed, BTreeMap::from([("dns".to_owned(), 1)]));
        assert_eq!(report[0].status_classes, BTreeMap::from([("5xx".to_owned(), 1)]));
    }
}
