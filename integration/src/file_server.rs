//! A plain file server, HTTP or HTTPS, as presigned URLs and ordinary web servers look to a client: GETs with ranges and
//! ETags, redirects, and the manners of servers that can do less. Files are in memory.

use crate::http::{Body, BreakOff, Failed, PARTING, Server, full};
use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::header::HeaderName;
use hyper::{Method, Request, Response, StatusCode, header};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;

/// How many requests are kept on record.
const MAX_RECORD: usize = 10_000;

/// What a server can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manners {
    /// Without, a Range is ignored and the whole file is sent with 200.
    pub ranges: bool,
    /// Without, there is no ETag, and If-Match and If-Range find none.
    pub etags: bool,
    /// Without, answers have no Content-Length: they are chunked.
    pub lengths: bool,
    /// Without, a HEAD is a 403, as with a URL that was presigned for GET.
    pub heads: bool,
}

impl Manners {
    /// All that a good server can.
    pub const GOOD: Self = Self { ranges: true, etags: true, lengths: true, heads: true };
    /// S3 behind a URL that was presigned for GET.
    pub const PRESIGNED: Self = Self { heads: false, ..Self::GOOD };
}

/// What can happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFault {
    /// This status in place of the file.
    Status(u16),
    /// The connection breaks off after so many bytes of the file.
    BreakOff {
        /// How many are sent.
        after: u64,
    },
    /// No answer, ever.
    Hang,
}

/// A request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRequest {
    /// The method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The Range header, where there was one.
    pub range: Option<String>,
    /// The If-Match or If-Range header, where there was one.
    pub condition: Option<String>,
}

/// What is at a path.
#[derive(Debug, Clone)]
enum Place {
    File { contents: Bytes, etag: String },
    Redirect { to: String },
}

#[derive(Debug)]
struct Shared {
    places: Mutex<BTreeMap<String, Place>>,
    manners: Mutex<Manners>,
    faults: Mutex<VecDeque<(FileFault, u32)>>,
    /// The query that is let in, if one is asked for.
    secret: Mutex<Option<String>>,
    requests: Mutex<Vec<FileRequest>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A record is as good after a panic as before it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The running server.
#[derive(Debug)]
pub struct FileServer {
    server: Server,
    shared: Arc<Shared>,
    authority: Option<String>,
}

impl FileServer {
    /// Starts one without TLS on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start(manners: Manners) -> std::io::Result<Self> {
        let (shared, handler) = prepare(manners);
        Ok(Self { server: Server::start(handler).await?, shared, authority: None })
    }

    /// Starts one with TLS, for 127.0.0.1 and localhost, with a certificate of an authority of its own.
    ///
    /// # Errors
    /// When no certificate can be made or no port can be bound.
    pub async fn start_tls(manners: Manners) -> anyhow::Result<Self> {
        let (authority, tls) = certificates().context("making the certificates of a file server")?;
        let (shared, handler) = prepare(manners);
        let server = Server::start_tls(TlsAcceptor::from(Arc::new(tls)), handler).await?;
        Ok(Self { server, shared, authority: Some(authority) })
    }

    /// The certificate of its authority, in PEM: what `SSL_CERT_FILE` is to hold. None without TLS.
    pub fn authority(&self) -> Option<&str> {
        self.authority.as_deref()
    }

    /// The URL of a path (`/images/signer.eif`), with the query that is asked for.
    pub fn url(&self, path: &str) -> String {
        let query = lock(&self.shared.secret).as_ref().map(|secret| format!("?{secret}")).unwrap_or_default();
        format!("{}{path}{query}", self.server.url())
    }

    /// Puts a file there, or replaces it.
    pub fn put(&self, path: &str, contents: impl Into<Bytes>) {
        let contents = contents.into();
        let digest = Sha256::digest(&contents);
        let etag = format!("\"{}\"", digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>());
        lock(&self.shared.places).insert(path.to_owned(), Place::File { contents, etag });
    }

    /// Answers that path with a redirect (302).
    pub fn redirect(&self, path: &str, to: impl Into<String>) {
        lock(&self.shared.places).insert(path.to_owned(), Place::Redirect { to: to.into() });
    }

    /// Changes what it can do.
    pub fn set_manners(&self, manners: Manners) {
        *lock(&self.shared.manners) = manners;
    }

    /// From now on every request needs this query, as one needs its signature; others are a 403. A new one is how a
    /// presigned URL ends.
    pub fn set_secret(&self, query: &str) {
        *lock(&self.shared.secret) = Some(query.to_owned());
    }

    /// Switches a fault on for so many requests, after those that are on already.
    pub fn add_fault(&self, fault: FileFault, times: u32) {
        lock(&self.shared.faults).push_back((fault, times));
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<FileRequest> {
        lock(&self.shared.requests).clone()
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, BreakOff>> + Send>>;

fn prepare(manners: Manners) -> (Arc<Shared>, impl Fn(Request<Incoming>) -> Answer + Clone + Send + Sync + 'static) {
    let shared = Arc::new(Shared {
        places: Mutex::default(),
        manners: Mutex::new(manners),
        faults: Mutex::default(),
        secret: Mutex::default(),
        requests: Mutex::default(),
    });
    let of_handler = Arc::clone(&shared);
    (shared, move |request| Box::pin(respond(Arc::clone(&of_handler), request)))
}

/// An authority's certificate, and a server's configuration with one that it has signed.
fn certificates() -> anyhow::Result<(String, ServerConfig)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "stand-in authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&key)?.pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate()?;
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    Ok((authority, config))
}

fn next_fault(shared: &Shared) -> Option<FileFault> {
    let mut faults = lock(&shared.faults);
    faults.retain(|(_, times)| *times > 0);
    let (fault, times) = faults.front_mut()?;
    *times -= 1;
    Some(*fault)
}

async fn respond(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, BreakOff> {
    let text = |name: HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (range, if_match, if_range) = (text(header::RANGE), text(header::IF_MATCH), text(header::IF_RANGE));
    {
        let mut requests = lock(&shared.requests);
        if requests.len() < MAX_RECORD {
            requests.push(FileRequest {
                method: request.method().to_string(),
                path: request.uri().to_string(),
                range: range.clone(),
                condition: if_match.clone().or_else(|| if_range.clone()),
            });
        }
    }
    let status = |code: u16| {
        let mut response = Response::new(full("no"));
        *response.status_mut() = StatusCode::from_u16(code).map_err(|_| BreakOff)?;
        Ok(response)
    };
    let fault = next_fault(&shared);
    match fault {
        Some(FileFault::Hang) => std::future::pending().await,
        Some(FileFault::Status(code)) => return status(code),
        Some(FileFault::BreakOff { .. }) | None => {}
    }
    let manners = *lock(&shared.manners);
    let is_head = request.method() == Method::HEAD;
    if (is_head && !manners.heads)
        || lock(&shared.secret).as_ref().is_some_and(|secret| request.uri().query() != Some(secret))
    {
        return status(403);
    }
    let place = lock(&shared.places).get(request.uri().path()).cloned();
    let (contents, etag) = match place {
        None => return status(404),
        Some(Place::Redirect { to }) => {
            let mut response = status(302)?;
            response.headers_mut().insert(header::LOCATION, to.parse().map_err(|_| BreakOff)?);
            return Ok(response);
        }
        Some(Place::File { contents, etag }) => (contents, etag),
    };
    let is_it = |tag: &str| manners.etags && (tag == "*" || tag == etag);
    if if_match.is_some_and(|tag| !is_it(&tag)) {
        return status(412);
    }
    let wanted = range.filter(|_| manners.ranges && if_range.is_none_or(|tag| is_it(&tag)));
    let total = contents.len();
    let mut response = match wanted.as_deref().map(|range| part(range, total)) {
        None => Response::new(contents),
        Some(None) => {
            let mut response = status(416)?;
            let all = format!("bytes */{total}").parse().map_err(|_| BreakOff)?;
            response.headers_mut().insert(header::CONTENT_RANGE, all);
            return Ok(response);
        }
        Some(Some((first, last))) => {
            let mut response = Response::new(contents.slice(first..=last));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let part = format!("bytes {first}-{last}/{total}").parse().map_err(|_| BreakOff)?;
            response.headers_mut().insert(header::CONTENT_RANGE, part);
            response
        }
    };
    if manners.etags {
        response.headers_mut().insert(header::ETAG, etag.parse().map_err(|_| BreakOff)?);
    }
    if manners.ranges {
        response.headers_mut().insert(header::ACCEPT_RANGES, header::HeaderValue::from_static("bytes"));
    }
    let after = match fault {
        Some(FileFault::BreakOff { after }) => Some(usize::try_from(after).unwrap_or(usize::MAX)),
        _ => None,
    };
    Ok(response
        .map(|rest| Sending { length: manners.lengths.then_some(rest.len()), rest, after, parting: None }.boxed()))
}

/// First and last byte of a Range, if there are such.
fn part(range: &str, total: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let end = total.checked_sub(1)?;
    let (first, last) = match (first, last) {
        ("", last) => (total.saturating_sub(last.parse().ok()?), end),
        (first, "") => (first.parse().ok()?, end),
        (first, last) => (first.parse().ok()?, last.parse::<usize>().ok()?.min(end)),
    };
    (first <= last).then_some((first, last))
}

/// A file on its way.
struct Sending {
    rest: Bytes,
    /// What is announced, if anything is.
    length: Option<usize>,
    /// How many bytes are sent before the connection breaks off.
    after: Option<usize>,
    parting: Option<Pin<Box<Sleep>>>,
}

impl hyper::body::Body for Sending {
    type Data = Bytes;
    type Error = Failed;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failed>>> {
        const PIECE: usize = 16 * 1024;
        let mut count = self.rest.len().min(PIECE);
        if let Some(after) = &mut self.after {
            if *after == 0 {
                let parting = self.parting.get_or_insert_with(|| Box::pin(tokio::time::sleep(PARTING)));
                return parting.as_mut().poll(cx).map(|()| Some(Err(Box::new(BreakOff).into())));
            }
            count = count.min(*after);
            *after -= count;
        }
        let piece = self.rest.split_to(count);
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        match self.length {
            Some(_) => SizeHint::with_exact(self.rest.len() as u64),
            None => SizeHint::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Empty;
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::TokioExecutor;
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, ServerName};

    const PATH: &str = "/images/signer.eif";

    fn contents() -> Vec<u8> {
        (0..25_000_u32).flat_map(u32::to_le_bytes).collect()
    }

    async fn server(manners: Manners) -> FileServer {
        let server = FileServer::start(manners).await.unwrap();
        server.put(PATH, contents());
        server
    }

    struct Got {
        status: u16,
        headers: hyper::HeaderMap,
        /// None if it broke off.
        body: Option<Bytes>,
    }

    impl Got {
        fn header(&self, name: &str) -> Option<&str> {
            self.headers.get(name).map(|value| value.to_str().unwrap())
        }
    }

    async fn ask(method: Method, url: &str, headers: &[(&str, &str)]) -> Got {
        let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = client.request(request.body(Empty::new()).unwrap()).await.unwrap();
        let (parts, body) = answer.into_parts();
        let body = body.collect().await.ok().map(http_body_util::Collected::to_bytes);
        Got { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    async fn get(server: &FileServer, headers: &[(&str, &str)]) -> Got {
        ask(Method::GET, &server.url(PATH), headers).await
    }

    #[tokio::test]
    async fn ranges_and_conditions_are_honoured() {
        let server = server(Manners::PRESIGNED).await;
        let whole = get(&server, &[]).await;
        assert_eq!((whole.status, whole.header("content-length")), (200, Some("100000")));
        assert!(whole.body.as_ref().unwrap()[..] == contents());
        let tag = whole.header("etag").unwrap().to_owned();
        let part = get(&server, &[("range", "bytes=10-19"), ("if-match", &tag)]).await;
        assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 10-19/100000")));
        assert!(part.body.unwrap()[..] == contents()[10..20]);
        assert_eq!(
            get(&server, &[("range", "bytes=-5")]).await.header("content-range"),
            Some("bytes 99995-99999/100000")
        );
        assert_eq!(get(&server, &[("range", "bytes=100000-")]).await.status, 416);
        assert_eq!(get(&server, &[("range", "bytes=0-1"), ("if-range", "\"x\"")]).await.status, 200);
        server.put(PATH, "another");
        assert_eq!(get(&server, &[("range", "bytes=0-1"), ("if-match", &tag)]).await.status, 412);
        assert_eq!(ask(Method::HEAD, &server.url(PATH), &[]).await.status, 403, "it was presigned for GET");
        assert_eq!(server.requests()[1].condition.as_deref(), Some(tag.as_str()));
    }

    #[tokio::test]
    async fn a_server_can_ignore_ranges_and_leave_out_lengths_and_etags() {
        let server = server(Manners { ranges: false, etags: false, lengths: false, heads: true }).await;
        let whole = get(&server, &[("range", "bytes=10-19")]).await;
        assert_eq!((whole.status, whole.header("content-length"), whole.header("etag")), (200, None, None));
        assert_eq!(whole.header("transfer-encoding"), Some("chunked"));
        assert!(whole.body.unwrap()[..] == contents());
    }

    #[tokio::test]
    async fn a_redirect_names_where_and_a_url_ends_with_its_secret() {
        let server = server(Manners::GOOD).await;
        server.redirect("/old", server.url(PATH));
        let moved = ask(Method::GET, &server.url("/old"), &[]).await;
        assert_eq!((moved.status, moved.header("location")), (302, Some(server.url(PATH).as_str())));
        server.set_secret("X-Amz-Signature=1");
        let url = server.url(PATH);
        assert_eq!(ask(Method::GET, &url, &[]).await.status, 200);
        server.set_secret("X-Amz-Signature=2");
        assert_eq!(ask(Method::GET, &url, &[]).await.status, 403);
        assert_eq!(ask(Method::GET, &server.url("/nowhere"), &[]).await.status, 404);
    }

    #[tokio::test]
    async fn faults_happen_so_often_and_in_their_order() {
        let server = server(Manners::GOOD).await;
        server.add_fault(FileFault::Status(503), 1);
        server.add_fault(FileFault::BreakOff { after: 50_000 }, 1);
        server.add_fault(FileFault::Hang, 1);
        assert_eq!(get(&server, &[]).await.status, 503);
        assert!(get(&server, &[]).await.body.is_none());
        assert!(tokio::time::timeout(std::time::Duration::from_millis(50), get(&server, &[])).await.is_err());
        assert!(get(&server, &[]).await.body.is_some());
    }

    #[tokio::test]
    async fn its_certificate_is_good_to_who_trusts_its_authority() {
        let server = FileServer::start_tls(Manners::GOOD).await.unwrap();
        server.put(PATH, contents());
        assert!(server.url(PATH).starts_with("https://127.0.0.1:"));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(server.authority().unwrap().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = tokio::net::TcpStream::connect(server.server.address()).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(ServerName::try_from("127.0.0.1").unwrap(), stream).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = Request::get(PATH).header("host", "127.0.0.1").body(Empty::<Bytes>::new()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert!(answer.into_body().collect().await.unwrap().to_bytes()[..] == contents());
        drop(sender);
        connection.await.unwrap().unwrap();
    }
}
