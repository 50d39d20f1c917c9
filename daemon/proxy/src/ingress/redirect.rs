//! The port for requests in clear: each is told to come again over HTTPS, if the site is served there. Nothing is passed on.

use super::https::Https;
use super::sites::host_of;
use crate::access_log::{Ended, Entry, Protocol};
use crate::counters::{Reason, Refused};
use crate::inherited::Unusable;
use crate::listening::Service;
use crate::manager::ingress_name;
use crate::tcp::{self, ListenError, Stalled};
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, LOCATION};
use http::{Request, Response, StatusCode};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::fd::OwnedFd;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// A client asks once and goes; this is for its answer, too.
const PATIENCE: Duration = Duration::from_secs(20);
/// As small as hyper has it.
const BUFFER: usize = 8 << 10;

/// The port.
#[derive(Debug)]
pub(crate) struct RedirectPort {
    listen: SocketAddr,
    https: Arc<Https>,
}

impl RedirectPort {
    pub(crate) fn new(listen: SocketAddr, https: Arc<Https>) -> Self {
        Self { listen, https }
    }

    fn answer(&self, request: &Request<Incoming>, source: SocketAddr) -> Response<Words> {
        let mut entry = Entry::begin(&self.https.shared, Protocol::Http, source);
        entry.asks(request);
        let (mut response, refused) = self.decide(request);
        if let Some(refused) = refused {
            self.https.shared.counters.refused.count(refused);
        }
        entry.answered_here(response.status(), refused.map(Reason::name));
        response.body_mut().entry = entry;
        response
    }

    fn decide(&self, request: &Request<Incoming>) -> (Response<Words>, Option<Refused>) {
        let said = |status, words: &'static str| {
            let text = Some(Bytes::from_static(words.as_bytes()));
            let mut response = Response::new(Words { text, entry: Entry::default() });
            *response.status_mut() = status;
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            // It comes again elsewhere.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
            response
        };
        let mut hosts = request.headers().get_all(HOST).iter();
        let host = hosts.next().filter(|_| hosts.next().is_none()).and_then(|host| host.to_str().ok());
        let Some(host) = host.and_then(host_of) else {
            let text = "the request has no valid Host header\n";
            return (said(StatusCode::BAD_REQUEST, text), Some(Refused::BadRequest));
        };
        if self.https.sites.get().find(host).is_none() {
            let text = "no site of this name is served here\n";
            return (said(StatusCode::MISDIRECTED_REQUEST, text), Some(Refused::UnknownHost));
        }
        let port = self.https.port();
        let port = if port == 443 { String::new() } else { format!(":{port}") };
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let target = if target.starts_with('/') { target } else { "/" };
        let location = HeaderValue::from_maybe_shared(Bytes::from(format!("https://{host}{port}{target}")));
        let Ok(location) = location else {
            return (said(StatusCode::BAD_REQUEST, "the target is not valid\n"), Some(Refused::BadRequest));
        };
        let mut response = said(StatusCode::PERMANENT_REDIRECT, "this is served over HTTPS\n");
        response.headers_mut().insert(LOCATION, location);
        (response, None)
    }

    async fn serve_one(self: Arc<Self>, client: TcpStream, source: SocketAddr) {
        let (port, limits) = (self.clone(), &self.https.shared.limits);
        let service = service_fn(move |request: Request<Incoming>| {
            let response = port.answer(&request, source);
            async move { Ok::<_, Infallible>(response) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.request_head.min(PATIENCE))
            .max_header_size(limits.request_head_bytes.min(BUFFER))
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(client), service);
        let closing = self.https.shared.closing.child_token();
        tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = closing.cancelled() => {}
            // Dropped only where the connection is given up.
            served = timeout(PATIENCE, served) => drop(served),
        }
    }
}

impl Service for RedirectPort {
    type Socket = TcpListener;
    type Error = ListenError;

    fn address(&self) -> String {
        self.listen.to_string()
    }

    fn name(&self) -> String {
        ingress_name(self.listen)
    }

    fn adopt(&self, socket: OwnedFd, _: &str) -> Result<TcpListener, Unusable> {
        tcp::adopt(self.listen, socket, self.https.shared.limits.peer_silence, Stalled::Gone)
    }

    async fn open(&self) -> Result<TcpListener, ListenError> {
        tcp::listen(self.listen, self.https.shared.limits.peer_silence, Stalled::Gone)
    }

    fn serve(self: &Arc<Self>, (client, address): (TcpStream, SocketAddr)) {
        let Some(admitted) = self.https.admit(address.ip()) else { return };
        let port = self.clone();
        self.https.shared.spawn(async move {
            port.serve_one(client, address).await;
            drop(admitted);
        });
    }
}

/// A few words.
#[derive(Debug)]
struct Words {
    text: Option<Bytes>,
    entry: Entry,
}

impl Body for Words {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let text = self.text.take();
        self.entry.wrote(text.as_ref().map_or(0, Bytes::len) as u64);
        Poll::Ready(text.map(|text| Ok(Frame::data(text))))
    }

    fn is_end_stream(&self) -> bool {
        self.text.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.text.as_ref().map_or(0, Bytes::len) as u64)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.text.is_none() || self.entry.is_head_only() {
            self.entry.ends(Ended::Whole);
        }
    }
}
