//! One line of the access log, from a request's beginning to the end of its answer, however it ends: dropping it writes it.
//!
//! What a client said is bounded in length, and written by a JSON serializer. Never in here: queries, bodies, cookies, and what
//! authorizes anybody. Not the query, because links carry secrets there (signed addresses, tokens of sessions and resets).

use super::AccessLogs;
use crate::counters::{Failure, Live, Meter, Reason, Traffic};
use crate::ingress::body::Progress;
use crate::shared::Shared;
use enclaved_core::id::Timestamp;
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Method, Request, StatusCode, Version};
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

/// Most of what a client said that is kept, in bytes.
const PATH: usize = 2048;
const HOST_NAME: usize = 255;
const AGENT: usize = 512;
const FORWARDED: usize = 512;
const METHOD: usize = 32;

/// A line to be; nothing at all while the log is off.
#[derive(Debug, Default)]
pub(crate) struct Entry(Option<Box<Facts>>);

/// What a connection is to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Protocol {
    /// A request whose TLS ends here.
    Https,
    /// A request in clear, which is told to come again.
    Http,
    /// A TLS connection that is passed through.
    Tls,
    /// A connection to a raw port.
    Tcp,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ended {
    /// All of the answer was handed over; both ends of a connection have closed.
    Whole,
    /// The client went, or took no more.
    Client,
    /// The enclave's answer broke off.
    Enclave,
    /// The enclave's generation ended, or the proxy did.
    Cut,
    /// A connection broke off: `reason` says why.
    Broken,
    /// A connection was not carried: `reason` says why.
    Refused,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answerer {
    Enclave,
    Proxy,
}

#[derive(Debug)]
struct Facts {
    shared: Arc<Shared>,
    at: SystemTime,
    began: Instant,
    protocol: Protocol,
    client: SocketAddr,
    listen: Option<SocketAddr>,
    forwarded_for: Option<String>,
    request_id: Option<HeaderValue>,
    asked: Option<Asked>,
    tls: Option<&'static str>,
    enclave: Option<String>,
    cid: Option<u32>,
    vsock_port: Option<u32>,
    answer: Option<Answer>,
    reason: Option<&'static str>,
    kept: Option<(bool, bool)>,
    upload: Option<Arc<Progress>>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    ended: Option<Ended>,
}

/// What a request asks for.
#[derive(Debug)]
struct Asked {
    host: Option<String>,
    method: String,
    path: String,
    version: &'static str,
    agent: Option<String>,
    /// Its answer has no body, whatever is handed over for one.
    head_only: bool,
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    by: Answerer,
    after: Duration,
}

/// The names here are documented in README.md and stay.
#[derive(Debug, Serialize)]
struct Line<'a> {
    time: String,
    protocol: Protocol,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
    client: String,
    client_port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    forwarded_for: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    enclave: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vsock_port: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    bytes_in: u64,
    bytes_out: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    head_seconds: Option<f64>,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    answered_by: Option<Answerer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream_reused: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream_repeated: Option<bool>,
    ended: Ended,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<&'a str>,
}

impl Entry {
    /// Begins a line, if there is to be one.
    pub(crate) fn begin(shared: &Arc<Shared>, protocol: Protocol, client: SocketAddr) -> Self {
        if !shared.access_log.is_on() {
            return Self(None);
        }
        Self(Some(Box::new(Facts {
            shared: shared.clone(),
            at: SystemTime::now(),
            began: Instant::now(),
            protocol,
            client,
            listen: None,
            forwarded_for: None,
            request_id: None,
            asked: None,
            tls: None,
            enclave: None,
            cid: None,
            vsock_port: None,
            answer: None,
            reason: None,
            kept: None,
            upload: None,
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            ended: None,
        })))
    }

    fn with(&mut self, note: impl FnOnce(&mut Facts)) {
        if let Some(facts) = &mut self.0 {
            note(facts);
        }
    }

    /// What was asked, before anything of it is changed.
    pub(crate) fn asks<B>(&mut self, request: &Request<B>) {
        self.with(|facts| {
            let (uri, headers) = (request.uri(), request.headers());
            let host = uri.authority().map(|authority| authority.as_str().as_bytes());
            let host = host.or_else(|| headers.get(HOST).map(HeaderValue::as_bytes));
            facts.asked = Some(Asked {
                host: host.map(|host| text(without_user(host), HOST_NAME)),
                method: text(request.method().as_str().as_bytes(), METHOD),
                path: text(uri.path().as_bytes(), PATH),
                version: match request.version() {
                    Version::HTTP_10 => "1.0",
                    Version::HTTP_2 => "2",
                    _ => "1.1",
                },
                agent: headers.get(USER_AGENT).map(|agent| text(agent.as_bytes(), AGENT)),
                head_only: *request.method() == Method::HEAD,
            });
        });
    }

    /// What a proxy whose word is taken says of its client.
    pub(crate) fn forwarded(&mut self, headers: &HeaderMap, name: HeaderName) {
        self.with(|facts| {
            let said: Vec<_> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
            facts.forwarded_for = (!said.is_empty()).then(|| text(&said.join(&b", "[..]), FORWARDED));
        });
    }

    pub(crate) fn request_id(&mut self, id: &HeaderValue) {
        self.with(|facts| facts.request_id = Some(id.clone()));
    }

    pub(crate) fn tls(&mut self, version: Option<&'static str>) {
        self.with(|facts| facts.tls = version);
    }

    pub(crate) fn listen(&mut self, listen: SocketAddr) {
        self.with(|facts| facts.listen = Some(listen));
    }

    /// Whose it is, and which generation's.
    pub(crate) fn goes_to(&mut self, traffic: &Traffic, live: Option<&Live>, vsock_port: Option<u32>) {
        self.with(|facts| {
            facts.enclave = Some(traffic.key().enclave.to_string());
            facts.cid = live.map(|live| live.cid.get());
            facts.vsock_port = vsock_port;
        });
    }

    /// How far the request's body has come is read there.
    pub(crate) fn uploads(&mut self, progress: Option<Arc<Progress>>) {
        self.with(|facts| facts.upload = progress);
    }

    /// Over which connection it was answered: one that was kept; a second one.
    pub(crate) fn came_over(&mut self, reused: bool, repeated: bool) {
        self.with(|facts| facts.kept = Some((reused, repeated)));
    }

    pub(crate) fn answered(&mut self, status: StatusCode) {
        self.with(|facts| facts.answer = Some(Answer { status, by: Answerer::Enclave, after: facts.began.elapsed() }));
    }

    /// The proxy's own answer, and what it is counted as.
    pub(crate) fn answered_here(&mut self, status: StatusCode, reason: Option<&'static str>) {
        self.with(|facts| {
            facts.answer = Some(Answer { status, by: Answerer::Proxy, after: facts.began.elapsed() });
            facts.reason = reason;
        });
    }

    /// How it ended, if that is not known yet.
    pub(crate) fn ends(&mut self, ended: Ended) {
        self.with(|facts| {
            facts.ended.get_or_insert(ended);
        });
    }

    /// Whether it has ended as all is well, or because of this.
    pub(crate) fn connection_ends(&mut self, failure: Option<Failure>) {
        use Failure::{Connect, ConnectTimeout, Cut, Limit, NoTarget, SourceLimit, SourceRefused};
        self.with(|facts| {
            facts.reason = failure.map(Reason::name);
            facts.ended = Some(match failure {
                None => Ended::Whole,
                Some(Cut) => Ended::Cut,
                Some(Connect | ConnectTimeout | Limit | NoTarget | SourceLimit | SourceRefused) => Ended::Refused,
                Some(_) => Ended::Broken,
            });
        });
    }

    /// The client took no more of the answer, for so long that it was ended.
    pub(crate) fn not_taken(&mut self) {
        self.with(|facts| {
            facts.reason = Some(Failure::Idle.name());
            facts.ended = Some(Ended::Client);
        });
    }

    pub(crate) fn read(&self, bytes: u64) {
        if let Some(facts) = &self.0 {
            facts.bytes_in.fetch_add(bytes, Relaxed);
        }
    }

    pub(crate) fn wrote(&self, bytes: u64) {
        if let Some(facts) = &self.0 {
            facts.bytes_out.fetch_add(bytes, Relaxed);
        }
    }

    /// So many of these bytes were not written after all.
    pub(crate) fn not_written(&self, bytes: u64) {
        if let Some(facts) = &self.0 {
            facts.bytes_out.fetch_sub(bytes, Relaxed);
        }
    }

    /// Whether its answer has no body by its method.
    pub(crate) fn is_head_only(&self) -> bool {
        self.0.as_ref().and_then(|facts| facts.asked.as_ref()).is_some_and(|asked| asked.head_only)
    }

    /// Counts the bytes of a relay for both.
    pub(crate) fn beside<'a>(&'a self, traffic: &'a Traffic) -> impl Meter + 'a {
        Beside { traffic, entry: self }
    }
}

struct Beside<'a> {
    traffic: &'a Traffic,
    entry: &'a Entry,
}

impl Meter for Beside<'_> {
    fn inwards(&self, bytes: u64) {
        self.traffic.inwards(bytes);
        self.entry.read(bytes);
    }

    fn outwards(&self, bytes: u64) {
        self.traffic.outwards(bytes);
        self.entry.wrote(bytes);
    }
}

impl Drop for Facts {
    fn drop(&mut self) {
        let logs: &AccessLogs = &self.shared.access_log;
        if !logs.is_on() {
            return;
        }
        // Nobody said how: whoever held it was dropped, which follows from the client's end, or from the proxy's.
        let dropped = if self.shared.cut.is_cancelled() { Ended::Cut } else { Ended::Client };
        let (asked, answer) = (self.asked.as_ref(), self.answer.as_ref());
        let line = Line {
            time: Timestamp::from(self.at).to_string(),
            protocol: self.protocol,
            request_id: self.request_id.as_ref().and_then(|id| id.to_str().ok()),
            client: self.client.ip().to_canonical().to_string(),
            client_port: self.client.port(),
            forwarded_for: self.forwarded_for.as_deref(),
            listen: self.listen,
            host: asked.and_then(|asked| asked.host.as_deref()),
            enclave: self.enclave.as_deref(),
            cid: self.cid,
            vsock_port: self.vsock_port,
            method: asked.map(|asked| asked.method.as_str()),
            path: asked.map(|asked| asked.path.as_str()),
            http: asked.map(|asked| asked.version),
            tls: self.tls,
            status: answer.map(|answer| answer.status.as_u16()),
            bytes_in: self.bytes_in.load(Relaxed) + self.upload.as_ref().map_or(0, |upload| upload.taken()),
            bytes_out: self.bytes_out.load(Relaxed),
            head_seconds: answer.map(|answer| seconds(answer.after)),
            seconds: seconds(self.began.elapsed()),
            answered_by: answer.map(|answer| answer.by),
            reason: self.reason,
            upstream_reused: self.kept.map(|(reused, _)| reused),
            upstream_repeated: self.kept.map(|(_, repeated)| repeated),
            ended: self.ended.unwrap_or(dropped),
            user_agent: asked.and_then(|asked| asked.agent.as_deref()),
        };
        let mut bytes = Vec::with_capacity(1024);
        // Texts, numbers and a vector always serialize.
        if serde_json::to_writer(&mut bytes, &line).is_ok() {
            bytes.push(b'\n');
            logs.push(&bytes);
        }
    }
}

/// With the precision of microseconds.
fn seconds(took: Duration) -> f64 {
    Duration::from_micros(u64::try_from(took.as_micros()).unwrap_or(u64::MAX)).as_secs_f64()
}

/// A name and a password may stand before the host. Such a request is refused, and its line says so without them.
fn without_user(host: &[u8]) -> &[u8] {
    host.rsplit(|byte| *byte == b'@').next().unwrap_or_default()
}

/// What a client said, as text of bounded length. A terminal does as control characters say, so there are none.
fn text(said: &[u8], most: usize) -> String {
    let kept = String::from_utf8_lossy(&said[..said.len().min(most)]);
    let mut text =
        if kept.contains(char::is_control) { kept.replace(char::is_control, "\u{fffd}") } else { kept.into_owned() };
    if said.len() > most {
        text.push('…');
    }
    text
}
