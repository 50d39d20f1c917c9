//! The routes: everything the data plane needs to carry traffic, as one self-contained snapshot.
//!
//! The control process computes a snapshot and hands it over; the proxy keeps the last one on disk and serves from it
//! alone. What is not in here the proxy does not know: no images, no health, no generations to come. And the report
//! the proxy gives back: what it opened, what it could not open, what it carried.

use crate::id::{Cid, EnclaveName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

mod access_log;
mod caution;
mod check;
mod names;
mod rules;
mod upstream;
pub use access_log::{AccessLog, BadAccessLog};
pub use caution::CautionRelease;
pub use check::InvalidRoutes;
pub use names::{is_domain, is_host};
pub use rules::{
    Ages, BadIpNetwork, CertificateFiles, EgressLimits, HttpsRules, IpNetwork, Passthrough, ProxyProtocol, SiteRules,
    TcpRules, UpstreamHttp,
};
pub use upstream::UpstreamReport;

/// How vsock is reached on this host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum VsockTransport {
    /// The kernel's AF_VSOCK: real Nitro hosts.
    #[default]
    AfVsock,
    /// "Hybrid vsock" over Unix sockets in this directory, as Firecracker, Cloud Hypervisor and vhost-device-vsock
    /// speak it: the enclave's ports at `<dir>/<cid>.sock` (after `CONNECT <port>\n` / `OK <n>\n`), the host's at
    /// `<dir>/<cid>.sock_<port>`.
    Hybrid(PathBuf),
}

/// One snapshot of the routes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Routes {
    /// Version of this format. A proxy refuses a newer one and keeps serving what it has.
    pub format: u32,
    /// How vsock is reached.
    pub vsock: VsockTransport,
    /// What enclaves may reach.
    pub egress: Vec<EgressRoute>,
    /// Where HTTPS is served, if anywhere.
    pub https: Option<HttpsListener>,
    /// HTTPS sites, each the domains of one enclave.
    pub sites: Vec<Site>,
    /// Raw TCP ports.
    pub tcp: Vec<TcpRoute>,
    /// Where enclaves find the list of their own endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<HostsRoute>,
    /// Where requests and raw connections from clients are logged, if anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<AccessLog>,
    /// CIDs of enclaves that are to run on, whether or not a route names them at present: one that drains, one that is not ready.
    /// Connections to an enclave that is neither here nor the target of a route are cut; those that an enclave made, when its CID is
    /// in no route at all; and those to an egress endpoint that is in no route of their CID any more, or with another upstream or
    /// other [`EgressRoute::allow_addresses`].
    #[serde(default)]
    pub live: Vec<Cid>,
}

/// The [`Routes::format`] that this version writes and reads.
pub const ROUTES_FORMAT: u32 = 1;

impl Routes {
    /// The fingerprint of the content: equal snapshots have equal revisions, on every host and in every version.
    pub fn revision(&self) -> Revision {
        // A struct of strings and numbers always serializes; were it not so, an empty text still gives a revision, one
        // that no other snapshot has.
        let text = serde_json::to_vec(self).unwrap_or_default();
        Revision(
            text.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
            }),
        )
    }
}

/// The fingerprint of a snapshot (FNV-1a, 64 bits, over its JSON), written as 16 hexadecimal digits. It tells snapshots
/// apart; it does not authenticate them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
impl From<Revision> for String {
    fn from(revision: Revision) -> Self {
        revision.to_string()
    }
}
impl TryFrom<String> for Revision {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        u64::from_str_radix(&text, 16).map(Self)
    }
}

/// One endpoint that one enclave may reach: a listener for that enclave's CID only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressRoute {
    /// Whose endpoint it is (for counters and log lines).
    pub enclave: EnclaveName,
    /// The only peer that is served.
    pub cid: Cid,
    /// Where the enclave connects to, on the parent's CID 3.
    pub vsock_port: u32,
    /// The upstream: a DNS name or an IP address.
    pub hostname: String,
    /// The upstream's TCP port.
    pub port: u16,
    /// An address inside this list is served although the egress policy would refuse it (an upstream on the host
    /// itself, the metadata service): listed by the operator on purpose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_addresses: Vec<IpAddr>,
    /// Only TLS, and only with [`Self::hostname`] as the server's name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sni: bool,
    /// How much it carries.
    #[serde(default, skip_serializing_if = "EgressLimits::is_default")]
    pub limits: EgressLimits,
}

/// A vsock port of the parent on which one enclave reads the list of its endpoints: a JSON document, and the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostsRoute {
    /// Whose list it is.
    pub enclave: EnclaveName,
    /// The only peer that gets it.
    pub cid: Cid,
    /// Where the enclave connects to, on the parent's CID 3.
    pub vsock_port: u32,
    /// The JSON document.
    pub document: String,
}

/// The one HTTPS listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpsListener {
    /// Address and port; port 0 lets the kernel choose, and the report says which it was.
    pub listen: SocketAddr,
    /// Who may use it, and how much.
    #[serde(default, skip_serializing_if = "HttpsRules::is_default")]
    pub rules: HttpsRules,
}

/// An enclave's domains, and where their requests go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// Whose site it is.
    pub enclave: EnclaveName,
    /// Names in SNI and Host, lower case, without port; `*.example.com` covers one label.
    pub domains: Vec<String>,
    /// Paths by prefix (longest wins; a prefix matches whole segments); the first entry is not special. None with
    /// [`SiteRules::passthrough`].
    pub paths: Vec<PathRoute>,
    /// The generation that takes new requests; `None` while none is ready (503 with Retry-After).
    pub target: Option<Cid>,
    /// What is special about it.
    #[serde(default, skip_serializing_if = "SiteRules::is_default")]
    pub rules: SiteRules,
}

/// Requests whose path begins with a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathRoute {
    /// Begins with `/`; `/` matches all.
    pub prefix: String,
    /// The vsock port inside the enclave that answers HTTP.
    pub vsock_port: u32,
    /// How it speaks HTTP.
    #[serde(default, skip_serializing_if = "UpstreamHttp::is_default")]
    pub upstream: UpstreamHttp,
}

/// A TCP port whose bytes go to a vsock port untouched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpRoute {
    /// Whose port it is.
    pub enclave: EnclaveName,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// The vsock port inside the enclave.
    pub vsock_port: u32,
    /// The generation that takes new connections; while `None`, they are accepted and closed at once, counted.
    pub target: Option<Cid>,
    /// Who may use it, and how much.
    #[serde(default, skip_serializing_if = "TcpRules::is_default")]
    pub rules: TcpRules,
}

/// What the control process asks the proxy over its link socket: one JSON document a line
/// (`{"publish":{"routes":{...}}}`, `"report"`, `{"watch":{"seen":7}}`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LinkRequest {
    /// Apply this snapshot. Answered with [`LinkReply::Report`] once every listener was opened or failed to.
    Publish {
        /// The snapshot.
        routes: Routes,
    },
    /// Report now.
    Report,
    /// Answer with [`LinkReply::Report`] when something differs from the given report sequence number, or after
    /// 10 seconds.
    Watch {
        /// [`ProxyReport::sequence`] of the last report seen.
        seen: u64,
    },
}

/// What the proxy answers: one JSON document a line (`{"report":{...}}`, `{"refused":{"reason":"..."}}`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LinkReply {
    /// The state of the proxy.
    Report(ProxyReport),
    /// The request was refused; nothing changed.
    Refused {
        /// Why.
        reason: String,
    },
}

/// The state of the proxy process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProxyReport {
    /// Grows with every change of listeners or targets, and when the last ingress connection of a CID that takes no new
    /// ones ends (so that the end of a drain is known at once). A new proxy process begins above all numbers of its
    /// predecessors as long as the clock is right; whoever watches compares [`Self::pid`] as well.
    pub sequence: u64,
    /// The proxy's process.
    pub pid: u32,
    /// The snapshot being served; `None` before the first.
    pub revision: Option<Revision>,
    /// Every listener of that snapshot.
    pub listeners: Vec<ListenerReport>,
    /// Ingress connections and requests in flight, by the enclave's CID; a CID that is not here has none.
    pub ingress_open: BTreeMap<Cid, u64>,
    /// Counters since the process started.
    pub traffic: Vec<TrafficReport>,
    /// What is wrong with the snapshot on disk, if anything: it could not be used (and where it was put), or the present
    /// one could not be written (it is served, and would be lost with the process). Cleared by the next one written.
    pub last_routes_error: Option<String>,
    /// Connections that could not be accepted: a shortage of descriptors or memory, or an error of the connection itself.
    pub accept_errors: u64,
    /// What belongs to no enclave and was refused, by reason (`unknown_peer`, `unknown_host`, `https_limit`, …: a fixed
    /// set, see the proxy's counters).
    pub refused: BTreeMap<String, u64>,
    /// Connections to the ports of HTTPS that are open now.
    pub https_connections: u64,
    /// TLS handshakes of HTTPS that came to nothing, by cause (`timeout`, `not_tls`, `certificate_refused`, …: a fixed set,
    /// see the proxy's counters).
    pub handshake_failures: BTreeMap<String, u64>,
    /// Connections and listeners that ended by a defect of the proxy (a panic). Anything but zero is worth a bug report.
    pub panics: u64,
    /// The names of upstreams, each once however many endpoints lead there.
    pub names: Vec<NameReport>,
    /// The certificates of HTTPS, by domain.
    pub certificates: Vec<CertificateReport>,
    /// The authorities of client certificates, by site.
    pub client_authorities: Vec<ClientAuthorityReport>,
    /// Lines that the access log should have and has not: what it is written to did not take them, or not in time.
    pub access_log_dropped: u64,
    /// Why the access log is not written at present, if it should be.
    pub access_log_error: Option<String>,
}

/// What the certificates of a site's clients are checked against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientAuthorityReport {
    /// Whose site it is.
    pub enclave: EnclaveName,
    /// Whether there are authorities to check against: the site takes connections.
    pub usable: bool,
    /// Why what is on disk cannot be used, if so.
    #[serde(default)]
    pub error: Option<String>,
}

/// The certificate of one domain.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CertificateReport {
    /// The domain.
    pub domain: String,
    /// Until when the one that is served is valid, in seconds since 1970; none where there is none.
    pub expires: Option<i64>,
    /// Why a newer one cannot be served, if there is one.
    pub error: Option<String>,
}

/// What is known of an upstream's name. Counters since a route first held it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NameReport {
    /// The name.
    pub hostname: String,
    /// How many addresses new connections choose from.
    pub addresses: usize,
    /// Seconds since these were last said; none where there are none.
    pub answer_age_seconds: Option<u64>,
    /// Whether they are older than their TTL because the last question failed.
    pub stale: bool,
    /// Questions that failed, or were answered with no address.
    pub failed: u64,
    /// How the last question failed, if it did.
    pub error: Option<String>,
    /// How long questions took, answered or not.
    pub lookups: LatencyReport,
}

/// How long something took, by [`LatencyReport::BOUNDS_MS`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencyReport {
    /// For each bound, how many took no longer than it and longer than the one before; and at the end those that took
    /// longer than all. Empty where nothing was measured.
    pub counts: Vec<u64>,
    /// The sum, in microseconds.
    pub sum_us: u64,
}

impl LatencyReport {
    /// The bounds, in milliseconds. From a neighbour's answer to the limits of dialling.
    pub const BOUNDS_MS: [u32; 12] = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 10_000];
}

/// One listener and whether it is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerReport {
    /// What listens.
    pub listener: ListenerKey,
    /// Where, as bound (`127.0.0.1:43210`, `vsock:8000`, a path).
    pub address: String,
    /// Why it is not open, if it is not; it is tried again every few seconds.
    pub error: Option<String>,
}

/// The identity of a listener over snapshots and restarts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ListenerKey {
    /// An egress endpoint of one enclave, or the list of its endpoints.
    Egress {
        /// The peer it serves.
        cid: Cid,
        /// The parent's vsock port.
        vsock_port: u32,
    },
    /// HTTPS.
    Https {
        /// As configured.
        listen: SocketAddr,
    },
    /// Requests in clear, which are told to come again over HTTPS.
    Redirect {
        /// As configured.
        listen: SocketAddr,
    },
    /// A raw TCP port.
    Tcp {
        /// As configured.
        listen: SocketAddr,
    },
}

/// Counters of one use (one egress endpoint, one site, one raw port) of one enclave, since the proxy started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficReport {
    /// Whose traffic.
    pub enclave: EnclaveName,
    /// Which way and kind.
    pub direction: Direction,
    /// The endpoint: `hostname:port` for egress, `https` or the listening port for ingress (for TLS that is passed through, that
    /// of HTTPS).
    pub endpoint: String,
    /// Connections (for HTTPS: requests) open now.
    pub open: u64,
    /// Connections (for HTTPS: requests) accepted.
    pub total: u64,
    /// Bytes towards the enclave (for HTTPS: of bodies and upgraded connections).
    pub bytes_to_enclave: u64,
    /// Bytes from the enclave (for HTTPS: of bodies and upgraded connections).
    pub bytes_from_enclave: u64,
    /// Connections or requests that failed, by reason (`dns`, `connect`, `address_refused`, `timeout`, `no_target`, …:
    /// a fixed set, see the proxy's counters).
    pub failed: BTreeMap<String, u64>,
    /// HTTPS only: answers by status class (`2xx`).
    pub status_classes: BTreeMap<String, u64>,
    /// Egress only: how long it took to connect, name known, until the first address answered or none was left.
    #[serde(default)]
    pub connects: LatencyReport,
    /// HTTPS only: how long requests took, from their headers to those of the answer, whoever gave it.
    #[serde(default)]
    pub answers: LatencyReport,
    /// HTTPS only: the connections into the enclave that carry the requests.
    #[serde(default)]
    pub upstream: UpstreamReport,
}

/// Which way traffic goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the enclave to an upstream.
    Egress,
    /// From clients over HTTPS.
    Https,
    /// From clients over raw TCP.
    Tcp,
}

/// Limits that both processes know. The values are part of the contract between them.
pub mod limits {
    use super::Duration;
    /// Longest line on the link socket, in bytes: a snapshot of four enclaves with hundreds of endpoints fits many times.
    pub const LINK_LINE_BYTES: usize = 4 << 20;
    /// How long [`super::LinkRequest::Watch`] waits for a change.
    pub const WATCH: Duration = Duration::from_secs(10);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_depends_on_content_alone_and_survives_its_text_form() {
        let routes = Routes { format: ROUTES_FORMAT, ..Routes::default() };
        assert_eq!(routes.revision(), routes.clone().revision());
        let other = Routes { vsock: VsockTransport::Hybrid("/run/x".into()), ..routes.clone() };
        assert_ne!(routes.revision(), other.revision());
        let text = serde_json::to_string(&routes.revision()).unwrap();
        assert_eq!(serde_json::from_str::<Revision>(&text).unwrap(), routes.revision());
    }

    #[test]
    fn a_snapshot_of_a_version_that_knew_less_is_read() {
        let text = r#"{"format":1,"vsock":"af_vsock","egress":[],"https":{"listen":"[::]:443"},"sites":[{"enclave":"signer",
            "domains":["a.test"],"paths":[{"prefix":"/","vsock_port":8080}],"target":16}],"tcp":[]}"#;
        let routes: Routes = serde_json::from_str(text).unwrap();
        routes.check().unwrap();
        assert!(routes.sites[0].rules.is_default() && routes.https.as_ref().unwrap().rules.is_default());
        assert!(!serde_json::to_string(&routes).unwrap().contains("access_log"), "an earlier proxy would refuse it");
    }

    #[test]
    fn a_report_of_a_version_that_knew_less_is_read() {
        let text = r#"{"pid":7,"traffic":[{"enclave":"signer","direction":"https","endpoint":"https","open":0,"total":1,
            "bytes_to_enclave":2,"bytes_from_enclave":3,"failed":{},"status_classes":{}}]}"#;
        let report: ProxyReport = serde_json::from_str(text).unwrap();
        assert_eq!(report.traffic[0].upstream, UpstreamReport::default());
        assert_eq!((report.access_log_dropped, report.access_log_error), (0, None));
    }

    #[test]
    fn every_request_and_reply_reads_back_what_it_writes() {
        let requests = [
            LinkRequest::Publish {
                routes: Routes { format: ROUTES_FORMAT, live: vec![Cid::FIRST], ..Routes::default() },
            },
            LinkRequest::Report,
            LinkRequest::Watch { seen: u64::MAX },
        ];
        for request in requests {
            let text = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<LinkRequest>(&text).unwrap(), request, "{text}");
        }
        let report = ProxyReport {
            revision: Some(Revision(7)),
            ingress_open: BTreeMap::from([(Cid::FIRST, 3)]),
            listeners: vec![ListenerReport {
                listener: ListenerKey::Egress { cid: Cid::FIRST, vsock_port: 8000 },
                address: "vsock:8000".into(),
                error: None,
            }],
            traffic: vec![TrafficReport {
                enclave: "signer".parse().unwrap(),
                direction: Direction::Https,
                endpoint: "https".into(),
                open: 1,
                total: 2,
                bytes_to_enclave: 3,
                bytes_from_enclave: 4,
                failed: BTreeMap::from([("no_target".into(), 5)]),
                status_classes: BTreeMap::from([("2xx".into(), 6)]),
                connects: LatencyReport { counts: vec![0, 7], sum_us: 8 },
                answers: LatencyReport { counts: vec![1], sum_us: 9 },
                upstream: UpstreamReport {
                    active: 1,
                    idle: 2,
                    connects: 3,
                    connects_failed: BTreeMap::from([("connect".into(), 4)]),
                    reused: 5,
                    repeated: 6,
                },
            }],
            names: vec![NameReport { hostname: "x".into(), answer_age_seconds: Some(9), ..NameReport::default() }],
            ..ProxyReport::default()
        };
        for reply in [LinkReply::Report(report), LinkReply::Refused { reason: "why".into() }] {
            let text = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<LinkReply>(&text).unwrap(), reply, "{text}");
        }
    }
}
