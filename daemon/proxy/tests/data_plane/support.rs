//! A proxy with its neighbours, in a directory of its own. What a test asserts belongs in the test.

use bytes::Bytes;
use enclaved_core::id::Cid;
use enclaved_core::routes::{
    Direction, EgressLimits, EgressRoute, HttpsListener, HttpsRules, LinkReply, LinkRequest, ListenerKey, PathRoute,
    ProxyReport, ROUTES_FORMAT, Routes, Site, SiteRules, TcpRoute, TcpRules, TrafficReport, UpstreamHttp,
    VsockTransport,
};
use enclaved_proxy::{Limits, Manager, Options, ProxyError, run_under};
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// No wait in a test is longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) type Body = BoxBody<Bytes, hyper::Error>;

pub(crate) fn cid(number: u32) -> Cid {
    Cid::new(number).unwrap()
}

pub(crate) fn body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// Waits for a future, but not forever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what} took longer than {DEADLINE:?}"))
}

/// A host: a directory, and a proxy in it that can be stopped and started.
pub(crate) struct Host {
    dir: TempDir,
    limits: Limits,
    proxy: Option<Running>,
}

struct Running {
    task: JoinHandle<Result<(), ProxyError>>,
    stop: CancellationToken,
}

impl Host {
    /// A host whose proxy runs and serves nothing yet.
    pub(crate) async fn new() -> Self {
        Self::with_limits(|_| {}).await
    }

    pub(crate) async fn with_limits(set: impl FnOnce(&mut Limits)) -> Self {
        let mut host = Self::without_proxy();
        set(&mut host.limits);
        host.start().await;
        host
    }

    pub(crate) fn without_proxy() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("vsock")).unwrap();
        let mut limits = Limits::default();
        limits.retry = Duration::from_millis(100);
        limits.maintenance = Duration::from_millis(100);
        limits.drain = Duration::from_millis(300);
        Self { dir, limits, proxy: None }
    }

    pub(crate) fn options(&self) -> Options {
        Options { state_dir: self.dir.path().join("state"), link: self.dir.path().join("link") }
    }

    pub(crate) fn state(&self, file: &str) -> PathBuf {
        self.options().state_dir.join(file)
    }

    pub(crate) fn vsock(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// Starts the proxy and waits until its link answers.
    pub(crate) async fn start(&mut self) {
        self.launch();
        self.until("the link answers", |_| true).await;
    }

    /// Starts the proxy.
    pub(crate) fn launch(&mut self) {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run_under(Manager::none(), self.options(), self.limits.clone(), stop.clone()));
        self.proxy = Some(Running { task, stop });
    }

    /// Asks the proxy to end, and waits for it.
    pub(crate) async fn stop(&mut self) -> Result<(), ProxyError> {
        let proxy = self.proxy.take().unwrap();
        proxy.stop.cancel();
        soon("stopping the proxy", proxy.task).await.unwrap()
    }

    /// Ends the proxy without letting it do anything any more.
    pub(crate) async fn kill(&mut self) {
        let proxy = self.proxy.take().unwrap();
        proxy.task.abort();
        assert!(soon("killing the proxy", proxy.task).await.unwrap_err().is_cancelled());
    }

    pub(crate) async fn link(&self) -> UnixStream {
        UnixStream::connect(self.options().link).await.unwrap()
    }

    pub(crate) async fn request(&self, request: &LinkRequest) -> LinkReply {
        let mut link = self.link().await;
        link.write_all(&serde_json::to_vec(request).unwrap()).await.unwrap();
        link.write_all(b"\n").await.unwrap();
        let mut line = String::new();
        soon("the answer on the link", BufReader::new(link).read_line(&mut line)).await.unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    pub(crate) async fn publish(&self, routes: &Routes) -> ProxyReport {
        match self.request(&LinkRequest::Publish { routes: routes.clone() }).await {
            LinkReply::Report(report) => report,
            LinkReply::Refused { reason } => panic!("refused: {reason}"),
        }
    }

    pub(crate) async fn report(&self) -> ProxyReport {
        match self.request(&LinkRequest::Report).await {
            LinkReply::Report(report) => report,
            LinkReply::Refused { reason } => panic!("refused: {reason}"),
        }
    }

    /// Waits until the proxy reports so.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&ProxyReport) -> bool) -> ProxyReport {
        let wait = async {
            loop {
                if UnixStream::connect(self.options().link).await.is_ok() {
                    let report = self.report().await;
                    if holds(&report) {
                        return report;
                    }
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        match timeout(DEADLINE, wait).await {
            Ok(report) => report,
            Err(_) => panic!("not so after {DEADLINE:?}: {what}"),
        }
    }

    /// An empty snapshot.
    pub(crate) fn routes(&self) -> Routes {
        Routes { format: ROUTES_FORMAT, vsock: VsockTransport::Hybrid(self.vsock()), ..Routes::default() }
    }

    /// A snapshot with HTTPS on any port and one site.
    pub(crate) fn site(&self, domains: &[&str], target: Option<u32>) -> Routes {
        let site = Site {
            enclave: "app".parse().unwrap(),
            domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
            paths: vec![PathRoute { prefix: "/".to_owned(), vsock_port: 8080, upstream: UpstreamHttp::Http1 }],
            target: target.map(cid),
            rules: SiteRules::default(),
        };
        let https = HttpsListener { listen: "127.0.0.1:0".parse().unwrap(), rules: HttpsRules::default() };
        Routes { https: Some(https), sites: vec![site], ..self.routes() }
    }

    /// Connects to an egress endpoint as the enclave of that CID.
    pub(crate) async fn connect_from(&self, cid: u32, vsock_port: u32) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.vsock().join(format!("{cid}.sock_{vsock_port}"))).await
    }

    /// The settings of a client that trusts the internal CA.
    pub(crate) fn client_config(&self, alpn: &[u8]) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.state("ca/root.crt")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        config
    }

    /// A TLS connection to the HTTPS port, trusting the internal CA.
    pub(crate) async fn tls(
        &self,
        address: SocketAddr,
        name: &str,
        alpn: &[u8],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let config = self.client_config(alpn);
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    }

    /// An HTTP/1.1 client on a connection of its own.
    pub(crate) async fn http1(&self, address: SocketAddr, name: &str) -> Client {
        let tls = self.tls(address, name, b"http/1.1").await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.with_upgrades().await) });
        Client { sender: Sender::Http1(sender), name: name.to_owned(), _tasks: tasks }
    }

    /// An HTTP/2 client on a connection of its own.
    pub(crate) async fn http2(&self, address: SocketAddr, name: &str) -> Client {
        let tls = self.tls(address, name, b"h2").await.unwrap();
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls));
        let (sender, connection) = handshake.await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        Client { sender: Sender::Http2(sender), name: name.to_owned(), _tasks: tasks }
    }
}

pub(crate) fn egress(cid_number: u32, vsock_port: u32, upstream: SocketAddr) -> EgressRoute {
    EgressRoute {
        enclave: format!("app-{cid_number}").parse().unwrap(),
        cid: cid(cid_number),
        vsock_port,
        hostname: upstream.ip().to_string(),
        port: upstream.port(),
        allow_addresses: vec![upstream.ip()],
        sni: false,
        limits: EgressLimits::default(),
    }
}

pub(crate) fn tcp_route(listen: &str, target: Option<u32>) -> TcpRoute {
    TcpRoute {
        enclave: "app".parse().unwrap(),
        listen: listen.parse().unwrap(),
        vsock_port: 7000,
        target: target.map(cid),
        rules: TcpRules::default(),
    }
}

/// Where HTTPS listens.
pub(crate) fn https_address(report: &ProxyReport) -> SocketAddr {
    address_of(report, |key| matches!(key, ListenerKey::Https { .. }))
}

/// Where the raw TCP port listens.
pub(crate) fn tcp_address(report: &ProxyReport) -> SocketAddr {
    address_of(report, |key| matches!(key, ListenerKey::Tcp { .. }))
}

fn address_of(report: &ProxyReport, is: impl Fn(&ListenerKey) -> bool) -> SocketAddr {
    let listener = report.listeners.iter().find(|listener| is(&listener.listener)).unwrap();
    assert_eq!(listener.error, None);
    listener.address.parse().unwrap()
}

/// The counters of the only endpoint of that kind.
pub(crate) fn traffic(report: &ProxyReport, direction: Direction) -> &TrafficReport {
    let mut found = report.traffic.iter().filter(|traffic| traffic.direction == direction);
    let traffic = found.next().unwrap();
    assert!(found.next().is_none());
    traffic
}

enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<Body>),
    Http2(hyper::client::conn::http2::SendRequest<Body>),
}

pub(crate) struct Client {
    sender: Sender,
    name: String,
    _tasks: JoinSet<()>,
}

impl Client {
    /// Sends a request for that authority, whatever the connection was made for.
    pub(crate) async fn send_as(
        &mut self,
        authority: &str,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let name = std::mem::replace(&mut self.name, authority.to_owned());
        if matches!(self.sender, Sender::Http2(_)) {
            request.headers_mut().remove("host");
        }
        let response = self.send(request).await;
        self.name = name;
        response
    }

    /// Sends a request; a Host or authority is set if there is none.
    pub(crate) async fn send(&mut self, mut request: Request<Body>) -> Result<Response<Incoming>, hyper::Error> {
        match &mut self.sender {
            Sender::Http1(sender) => {
                if !request.headers().contains_key("host") {
                    request.headers_mut().insert("host", self.name.parse().unwrap());
                }
                sender.ready().await?;
                soon("a response", sender.send_request(request)).await
            }
            Sender::Http2(sender) => {
                let uri = format!("https://{}{}", self.name, request.uri());
                *request.uri_mut() = uri.parse().unwrap();
                sender.ready().await?;
                soon("a response", sender.send_request(request)).await
            }
        }
    }

    pub(crate) async fn get(&mut self, path: &str) -> Result<Response<Incoming>, hyper::Error> {
        self.send(Request::get(path).body(body("")).unwrap()).await
    }

    /// The status and text of a GET.
    pub(crate) async fn get_text(&mut self, path: &str) -> (u16, String) {
        let response = self.get(path).await.unwrap();
        (response.status().as_u16(), text(response).await)
    }
}

pub(crate) async fn text(response: Response<Incoming>) -> String {
    let bytes = soon("a response's body", response.into_body().collect()).await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The enclave's side of hybrid vsock, until dropped.
pub(crate) struct Enclave {
    task: JoinHandle<()>,
    path: PathBuf,
}

impl Enclave {
    /// An enclave in which every port answers with this.
    pub(crate) fn raw<F>(dir: &Path, cid: u32, serve: impl Fn(u32, UnixStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let path = dir.join(format!("{cid}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        let task = tokio::spawn(async move {
            // Connections end with the enclave.
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = Vec::new();
                while line.last() != Some(&b'\n') {
                    line.push(stream.read_u8().await.unwrap());
                }
                let line = String::from_utf8(line).unwrap();
                let port = line.strip_prefix("CONNECT ").unwrap().trim_end().parse().unwrap();
                stream.write_all(b"OK 1024\n").await.unwrap();
                connections.spawn(serve(port, stream));
            }
        });
        Self { task, path }
    }

    /// An enclave in which every port speaks HTTP/1.1 and answers with this.
    pub(crate) fn http<F>(
        dir: &Path,
        cid: u32,
        answer: impl Fn(u32, Request<Incoming>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let answer = Arc::new(answer);
        Self::raw(dir, cid, move |port, stream| {
            let answer = answer.clone();
            async move {
                let service = hyper::service::service_fn(move |request| {
                    let response = answer(port, request);
                    async move { Ok::<_, Infallible>(response.await) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                drop(server.serve_connection(TokioIo::new(stream), service).with_upgrades().await);
            }
        })
    }

    /// An enclave that answers every request with this text.
    pub(crate) fn saying(dir: &Path, cid: u32, text: &'static str) -> Self {
        Self::http(dir, cid, move |_, _| async move { Response::new(body(text)) })
    }

    /// An enclave that sends back what it gets, on every port.
    pub(crate) fn echoing(dir: &Path, cid: u32) -> Self {
        Self::raw(dir, cid, |_, mut stream| async move {
            let (mut reader, mut writer) = stream.split();
            drop(tokio::io::copy(&mut reader, &mut writer).await);
        })
    }
}

impl Drop for Enclave {
    fn drop(&mut self) {
        self.task.abort();
        drop(std::fs::remove_file(&self.path));
    }
}

/// A TCP server on loopback, until dropped.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Upstream {
    pub(crate) async fn new<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream));
            }
        });
        Self { address, task }
    }

    /// Sends back what it gets.
    pub(crate) async fn echoing() -> Self {
        Self::new(|mut stream| async move {
            let (mut reader, mut writer) = stream.split();
            drop(tokio::io::copy(&mut reader, &mut writer).await);
        })
        .await
    }

    /// Says this and hangs up.
    pub(crate) async fn saying(text: &'static str) -> Self {
        Self::new(move |mut stream| async move { stream.write_all(text.as_bytes()).await.unwrap() }).await
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}
