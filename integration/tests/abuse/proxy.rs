//! The real `enclaved proxy` with one site, an enclave behind it that is as slow as its clients like, and what a test asks of the
//! proxy while they do their worst. What they do is in the tests.

use bytes::Bytes;
use enclaved_core::routes::{ProxyReport, UpstreamHttp};
use enclaved_integration::http::{Body, full, zeros};
use enclaved_integration::https_site::{HttpsSites, Site, accept_hybrid, runtime};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UnixListener};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The site's name.
pub(crate) const DOMAIN: &str = "app.test";
/// No wait in a test is longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// Nobody who asks for little waits longer, whatever others do.
const SERVED_WITHIN: Duration = Duration::from_secs(5);

pub(crate) type Tls = TlsStream<TcpStream>;

/// The proxy, serving.
pub(crate) struct Proxy {
    sites: HttpsSites,
    pub(crate) clients: Clients,
}

/// Who connects to it.
#[derive(Clone)]
pub(crate) struct Clients {
    https: SocketAddr,
    config: ClientConfig,
}

/// Starts the proxy, and has a test's clients come.
pub(crate) fn run(test: impl AsyncFnOnce(&Proxy)) {
    let proxy = Proxy::start();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test(&proxy));
}

impl Proxy {
    fn start() -> Self {
        raise_descriptor_limit();
        let site = Site { domain: DOMAIN, port: 8080, upstream: UpstreamHttp::Http1 };
        let sites = HttpsSites::start_before(&[site], runtime().unwrap(), enclave).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&sites.root).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        let https = sites.https;
        Self { sites, clients: Clients { https, config } }
    }

    pub(crate) async fn tls(&self, protocol: &[u8], source: Ipv4Addr) -> Tls {
        self.clients.tls(protocol, source).await
    }

    /// That a client with nothing to do with the others is answered on a new connection. How long it took.
    pub(crate) async fn serves(&self) -> Duration {
        let began = Instant::now();
        let asking = async {
            let mut tls = self.tls(b"http/1.1", Ipv4Addr::new(127, 9, 9, 9)).await;
            let request = format!("GET / HTTP/1.1\r\nhost: {DOMAIN}\r\nconnection: close\r\n\r\n");
            tls.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            tls.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = timeout(SERVED_WITHIN, asking).await.expect("another client is not served");
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("well"), "{answer}");
        began.elapsed()
    }

    pub(crate) fn memory_mib(&self) -> f64 {
        self.sites.memory_mib().unwrap()
    }

    pub(crate) fn report(&self) -> ProxyReport {
        self.sites.report().unwrap()
    }

    /// Waits until the proxy does next to nothing: less than a twentieth of a processor.
    pub(crate) async fn rests(&self) {
        const LOOK: Duration = Duration::from_millis(400);
        let began = Instant::now();
        loop {
            let before = self.sites.cpu_s().unwrap();
            sleep(LOOK).await;
            let used = self.sites.cpu_s().unwrap() - before;
            if used <= LOOK.as_secs_f64() / 20.0 {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "{used} s of a processor in {LOOK:?}, with nothing to do");
        }
    }

    /// Waits until the proxy reports so.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&ProxyReport) -> bool) {
        let began = Instant::now();
        loop {
            let report = self.report();
            if holds(&report) {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "not so after {DEADLINE:?}: {what}: {report:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Clients {
    /// A connection whose handshake has not begun, from that address of this machine.
    pub(crate) async fn tcp(&self, source: Ipv4Addr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        // What a client does not read fills the proxy's side sooner.
        socket.set_recv_buffer_size(16 << 10).unwrap();
        socket.bind((source, 0).into()).unwrap();
        within("a TCP connection", socket.connect(self.https)).await.unwrap()
    }

    pub(crate) async fn tls(&self, protocol: &[u8], source: Ipv4Addr) -> Tls {
        let mut config = self.config.clone();
        config.alpn_protocols = vec![protocol.to_vec()];
        let name = ServerName::try_from(DOMAIN).unwrap();
        let connecting = TlsConnector::from(Arc::new(config)).connect(name, self.tcp(source).await);
        within("a TLS handshake", connecting).await.unwrap()
    }
}

/// Waits, but not for ever.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what} took longer than {DEADLINE:?}"))
}

/// Both ends of thousands of connections, but the proxy's, are this process's.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

async fn enclave(listener: UnixListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            // What goes wrong here is noticed by the client whose connection it carries.
            if accept_hybrid(&mut stream).await.is_ok() {
                let server = hyper::server::conn::http1::Builder::new();
                drop(server.serve_connection(TokioIo::new(stream), service_fn(answer)).await);
            }
        });
    }
}

/// `/` says a word, `/big` more than anybody takes, `/take` takes a body, `/hold` neither takes one nor answers.
async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let body = match request.uri().path() {
        "/big" => zeros(1 << 30),
        "/hold" => {
            let _held = request;
            std::future::pending().await
        }
        "/take" => {
            let mut body = request.into_body();
            let mut count = 0;
            while let Some(Ok(frame)) = body.frame().await {
                count += frame.data_ref().map_or(0, Bytes::len);
            }
            full(count.to_string())
        }
        _ => full("well"),
    };
    Ok(Response::new(body))
}
