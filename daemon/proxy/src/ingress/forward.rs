//! One HTTP request: finds its site, sends it to the enclave, gives the answer back, or says why there is none.

use super::body::{ClientFault, Download, Upload};
use super::client_ca::Checked;
use super::headers::{self, Client};
use super::https::{Admitted, Https};
use super::sites::{Backend, host_of};
use super::tcp::connect_failure;
use super::upstream::SendError;
use crate::access_log::{Entry, Protocol};
use crate::counters::{Failure, Live, Open, Reason, Refused, Traffic};
use crate::error_text::chain;
use crate::relay::relay;
use crate::shared::Shared;
use bytes::Bytes;
use enclaved_core::routes::{PathRoute, UpstreamHttp};
use http::header::{
    CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, STRICT_TRANSPORT_SECURITY, TRANSFER_ENCODING,
};
use http::uri::{PathAndQuery, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body, Incoming};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// What is known of the connection that a request came over.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) https: Arc<Https>,
    /// The client's address and port.
    pub(crate) source: SocketAddr,
    /// The address, as a header's value.
    pub(crate) client: HeaderValue,
    /// Whether it is a proxy whose word about a client is taken.
    pub(crate) trusted: bool,
    /// What its certificate was checked against, where the site of its handshake demands that.
    pub(crate) checked: Option<Checked>,
    /// The name in the TLS handshake.
    pub(crate) server_name: Option<String>,
    /// The version of TLS, for people.
    pub(crate) tls: Option<&'static str>,
    /// Held for as long as the connection lives, also in another protocol.
    pub(crate) admitted: Admitted,
}

/// An answer of the proxy's own.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    reason: &'static str,
    failure: Option<Failure>,
}

impl Refusal {
    const fn new(status: StatusCode, reason: &'static str) -> Self {
        Self { status, reason, failure: None }
    }

    const fn failure(status: StatusCode, reason: &'static str, failure: Failure) -> Self {
        Self { status, reason, failure: Some(failure) }
    }

    fn of(error: &SendError) -> Self {
        match error {
            SendError::Connect(error) => {
                let reason = "the enclave could not be connected to";
                Self::failure(StatusCode::BAD_GATEWAY, reason, connect_failure(error))
            }
            SendError::Http(_) => {
                Self::failure(StatusCode::BAD_GATEWAY, "the enclave gave no valid answer", Failure::BadAnswer)
            }
            SendError::Silent => {
                Self::failure(StatusCode::GATEWAY_TIMEOUT, "the enclave did not answer in time", Failure::AnswerTimeout)
            }
            SendError::Client(ClientFault::Broken) => {
                Self::failure(StatusCode::BAD_REQUEST, "the request's body is malformed", Failure::ClientBody)
            }
            SendError::Client(ClientFault::Slow) => {
                let reason = "the request's body did not come in time";
                Self::failure(StatusCode::REQUEST_TIMEOUT, reason, Failure::ClientBody)
            }
            SendError::Cut => {
                Self::failure(StatusCode::BAD_GATEWAY, "the enclave ended while it had the request", Failure::Cut)
            }
        }
    }

    fn answer(&self, request_id: &HeaderValue) -> Response<Download> {
        let id = request_id.to_str().unwrap_or_default();
        let text = format!("{}: {}\nrequest {id}\n", self.status, self.reason);
        let mut response = Response::new(Download::text(Some(Bytes::from(text))));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(headers::X_REQUEST_ID, request_id.clone());
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

const BAD_HOST: Refusal = Refusal::new(StatusCode::BAD_REQUEST, "the Host header is not valid");

/// Answers a request.
pub(crate) async fn forward(connection: &Connection, mut request: Request<Incoming>) -> Response<Download> {
    let https = &connection.https;
    let request_id = https.next_request_id();
    let mut entry = begin(connection, &request, &request_id);
    let (host, backend) = match find(connection, &mut request) {
        Ok(found) => found,
        Err(refusal) => {
            let unknown = refusal.status == StatusCode::MISDIRECTED_REQUEST;
            let refused = if unknown { Refused::UnknownHost } else { Refused::BadRequest };
            https.shared.counters.refused.count(refused);
            entry.answered_here(refusal.status, Some(refused.name()));
            return refusal.answer(&request_id).map(|body| body.logged(entry));
        }
    };
    let traffic = &backend.traffic;
    entry.goes_to(traffic, backend.target.as_deref(), None);
    let began = Instant::now();
    let answer = send(connection, request, host, &backend, &request_id, &mut entry).await;
    let mut response = answer.unwrap_or_else(|refusal| {
        if let Some(failure) = refusal.failure {
            traffic.fail(failure);
        }
        entry.answered_here(refusal.status, refusal.failure.map(Reason::name));
        refusal.answer(&request_id)
    });
    traffic.answers.record(began.elapsed());
    traffic.answered(response.status());
    if let Some(hsts) = &backend.hsts
        && !response.headers().contains_key(STRICT_TRANSPORT_SECURITY)
    {
        response.headers_mut().insert(STRICT_TRANSPORT_SECURITY, hsts.clone());
    }
    response.map(|body| body.logged(entry))
}

/// The request's line in the access log, if there is one.
fn begin(connection: &Connection, request: &Request<Incoming>, request_id: &HeaderValue) -> Entry {
    let mut entry = Entry::begin(&connection.https.shared, Protocol::Https, connection.source);
    entry.request_id(request_id);
    entry.tls(connection.tls);
    entry.asks(request);
    if connection.trusted {
        entry.forwarded(request.headers(), headers::X_FORWARDED_FOR);
    }
    entry
}

/// The authority that a request asks for, and its site. Leaves the request's target as path and query only.
fn find(connection: &Connection, request: &mut Request<Incoming>) -> Result<(HeaderValue, Arc<Backend>), Refusal> {
    let bad = |reason| Refusal::new(StatusCode::BAD_REQUEST, reason);
    match *request.method() {
        Method::CONNECT => return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, "this is not a forward proxy")),
        // It would show a client what proxies tell of it, and what they add.
        Method::TRACE => return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, "requests are not echoed here")),
        _ => {}
    }
    let uri = request.uri();
    // `a.test:443` is for CONNECT alone, `*` for OPTIONS (RFC 9112, 3.2.3 and 3.2.4).
    if uri.authority().is_some() && uri.scheme().is_none() || uri.path() == "*" && request.method() != Method::OPTIONS {
        return Err(bad("the target is not of a form that goes with the method"));
    }
    // hyper has read the body's end from these by now, and a body in another coding would lose it here.
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next()
        && (codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return Err(Refusal::new(
            StatusCode::NOT_IMPLEMENTED,
            "the only transfer coding that is known here is chunked",
        ));
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err(bad("the request has several Host headers"));
    }
    // In HTTP/2 the two must be one (RFC 9113, 8.3.1).
    if let (Version::HTTP_2, Some(authority), Some(header)) = (request.version(), request.uri().authority(), header)
        && !header.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes())
    {
        return Err(bad("the Host header is not the authority"));
    }
    // In HTTP/1.1 a target in absolute form wins over Host (RFC 9112, 3.2.2).
    let host = match (request.uri().authority(), header) {
        (Some(authority), _) => {
            HeaderValue::from_str(authority.as_str()).map_err(|_| bad("the authority is not valid"))?
        }
        (None, Some(host)) => host.clone(),
        (None, None) if request.version() == Version::HTTP_10 => connection
            .server_name
            .as_deref()
            .and_then(|name| HeaderValue::from_str(name).ok())
            .ok_or_else(|| bad("the request has no Host header"))?,
        (None, None) => return Err(bad("the request has no Host header")),
    };
    let name = host.to_str().ok().and_then(host_of).ok_or(BAD_HOST)?;
    let sites = connection.https.sites.get();
    let misdirected = |reason| Refusal::new(StatusCode::MISDIRECTED_REQUEST, reason);
    let backend = sites.find(name).filter(|backend| backend.passthrough.is_none());
    let backend = backend.ok_or_else(|| misdirected("no site of this name is served here"))?;
    // Browsers send requests for one site over a connection to another that shows a certificate for both. What was agreed for
    // one site does not hold for another.
    if let Some(server_name) = &connection.server_name
        && !server_name.eq_ignore_ascii_case(name)
        && !sites.for_client(Some(server_name)).is_some_and(|(_, begun)| Arc::ptr_eq(begun, backend))
    {
        return Err(misdirected("this connection was made to another site"));
    }
    // Nor does what was agreed with nobody (a client that named no site) or before the site demanded it.
    if let Some(demand) = &backend.client_ca {
        let begun = sites.for_client(connection.server_name.as_deref());
        let here = begun.is_some_and(|(_, begun)| Arc::ptr_eq(begun, backend));
        if !here || connection.checked.as_ref().is_none_or(|checked| checked.demand != *demand) {
            return Err(misdirected("this connection was made without the certificate that the site demands"));
        }
    }
    let backend = backend.clone();
    // A load balancer may pass on what its own client wrote there, as AWS's does: it is believed only of this very site.
    if connection.trusted {
        let of_this_site = |host: &HeaderValue| {
            let found = host.to_str().ok().and_then(host_of).and_then(|name| sites.find(name));
            found.is_some_and(|found| Arc::ptr_eq(found, &backend))
        };
        if !request.headers().get_all(headers::X_FORWARDED_HOST).iter().all(of_this_site) {
            request.headers_mut().remove(headers::X_FORWARDED_HOST);
        }
    }
    if request.uri().authority().is_some() {
        let target = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(target);
    }
    Ok((host, backend))
}

async fn send(
    connection: &Connection,
    mut request: Request<Incoming>,
    host: HeaderValue,
    backend: &Backend,
    request_id: &HeaderValue,
    entry: &mut Entry,
) -> Result<Response<Download>, Refusal> {
    let https = &connection.https;
    let traffic = &backend.traffic;
    let open = Open::ingress(traffic, backend.target.as_ref());
    let unavailable = |reason, failure| Refusal::failure(StatusCode::SERVICE_UNAVAILABLE, reason, failure);
    let Some(&PathRoute { vsock_port: port, upstream, .. }) = backend.route(request.uri().path()) else {
        return Err(Refusal::failure(StatusCode::NOT_FOUND, "the site has nothing under this path", Failure::NoPath));
    };
    entry.goes_to(traffic, backend.target.as_deref(), Some(port));
    let Some(live) = &backend.target else {
        return Err(unavailable("the enclave is not ready", Failure::NoTarget));
    };
    // Not `ingress_open`, which counts raw TCP connections too.
    if traffic.open_now() > https.shared.limits.requests_per_enclave {
        return Err(unavailable("the enclave has too many requests in flight", Failure::Limit));
    }
    let Some(place) = https.admit_request(&connection.admitted, connection.trusted) else {
        return Err(unavailable("too many requests from this address are in flight", Failure::SourceLimit));
    };

    let http2 = upstream == UpstreamHttp::H2c;
    let upgrade =
        if request.version() == Version::HTTP_11 && !http2 { headers::upgrade(request.headers()) } else { None };
    let client_upgrade = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    if http2 {
        *request.uri_mut() = whole(&host, request.uri()).ok_or(BAD_HOST)?;
    }
    let client = Client {
        address: &connection.client,
        trusted: connection.trusted,
        // A client of another site may have shown one there.
        certificate: connection.checked.as_ref().filter(|_| backend.client_ca.is_some()).map(|it| &it.certificate),
        host,
        request_id: request_id.clone(),
    };
    headers::to_enclave(request.headers_mut(), client, upgrade.clone());
    if http2 {
        headers::to_http2(request.headers_mut());
    }
    *request.version_mut() = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
    let request = frame(request, traffic, &https.shared);
    entry.uploads(request.body().progress());

    let sent = https.upstreams.send(live, traffic, (port, upstream), request).await;
    let (mut response, lease) = sent.map_err(|error| {
        if !matches!(error, SendError::Client(_))
            && let Some(left_out) = https.failures.pass()
        {
            let (enclave, error) = (&traffic.key().enclave, chain(&error));
            tracing::warn!(%enclave, port, request = ?request_id, error, left_out, "a request got no answer from its enclave");
        }
        Refusal::of(&error)
    })?;
    entry.came_over(lease.reused, lease.repeated);
    // Each hop speaks its own version (RFC 9110, 6.2); what the client does not understand is left out by the server.
    *response.version_mut() = Version::HTTP_11;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let asked = upgrade.as_ref().is_some_and(|asked| headers::changes_to(response.headers(), asked));
        let Some(client_upgrade) = client_upgrade.filter(|_| asked) else {
            let reason = "the enclave changed to another protocol, which nobody asked for";
            return Err(Refusal::failure(StatusCode::BAD_GATEWAY, reason, Failure::BadAnswer));
        };
        let enclave_upgrade = hyper::upgrade::on(&mut response);
        headers::to_client(response.headers_mut(), upgrade);
        entry.answered(response.status());
        let held = (open, connection.admitted.clone(), std::mem::take(entry));
        https.spawn_upgraded(live, traffic, enclave_upgrade, client_upgrade, held);
        return Ok(response.map(|_| Download::text(None)));
    }
    headers::to_client(response.headers_mut(), None);
    entry.answered(response.status());
    Ok(response.map(|body| Download::stream(body, traffic.clone(), lease, (open, place))))
}

/// The target with its authority, as HTTP/2 has it.
fn whole(host: &HeaderValue, target: &Uri) -> Option<Uri> {
    let path = target.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    Uri::builder().scheme(Scheme::HTTP).authority(host.as_bytes()).path_and_query(path).build().ok()
}

/// Says how long the body is, if there is one. Its length, where it is known, is told by its type.
fn frame(mut request: Request<Incoming>, traffic: &Arc<Traffic>, shared: &Arc<Shared>) -> Request<Upload> {
    if request.body().is_end_stream() {
        // Servers may insist on a length where a body is usual (RFC 9110, 8.6).
        if matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH) {
            request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        return request.map(|_| Upload::Empty);
    }
    if request.body().size_hint().exact().is_none() && request.version() == Version::HTTP_11 {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    request.map(|inner| Upload::stream(inner, traffic.clone(), shared.clone()))
}

impl Https {
    /// Carries the bytes of a connection that changed to another protocol (WebSocket), until it ends or its enclave does.
    fn spawn_upgraded(
        &self,
        live: &Live,
        traffic: &Arc<Traffic>,
        enclave: OnUpgrade,
        client: OnUpgrade,
        (open, admitted, mut entry): (Open, Admitted, Entry),
    ) {
        let (shared, traffic, cut) = (self.shared.clone(), traffic.clone(), live.cut.child_token());
        self.shared.spawn(async move {
            let carry = async {
                // Either fails when its connection ends first.
                let (Ok(enclave), Ok(client)) = tokio::join!(enclave, client) else {
                    return Err(Failure::Reset);
                };
                let (mut enclave, mut client) = (TokioIo::new(enclave), TokioIo::new(client));
                let meter = entry.beside(&traffic);
                relay(&mut enclave, &mut client, &meter, &shared.limits).await.map_err(|broken| broken.failure())
            };
            let carried = tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = cut.cancelled() => Err(Failure::Cut),
                // Dropping it closes both ends, which is what cutting means.
                carried = carry => carried,
            };
            if let Err(failure) = carried {
                traffic.fail(failure);
            }
            entry.connection_ends(carried.err());
            drop((open, admitted));
        });
    }
}
