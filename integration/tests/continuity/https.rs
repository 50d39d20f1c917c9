//! Clients of HTTPS while the proxy is restarted, who keep their connections or make a new one for each request: what they are told to
//! ask elsewhere, they ask over a new connection, and nothing is lost.

use crate::{DEADLINE, Host};
use anyhow::Context as _;
use bytes::Bytes;
use enclaved_core::id::Cid;
use enclaved_core::routes::{ListenerKey, Routes};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::Signal;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

/// The enclave's port that speaks HTTP.
pub(crate) const PORT: &str = "8080";
/// How long an answer takes: a part of the drain of a second.
const THOUGHT: Duration = Duration::from_millis(30);
const RESTARTS: usize = 8;

/// The requests that reached the enclave.
static RUN: AtomicUsize = AtomicUsize::new(0);

/// What the enclave does there.
pub(crate) async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let answer = |_| async {
        RUN.fetch_add(1, SeqCst);
        sleep(THOUGHT).await;
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"well"))))
    };
    let service = hyper::service::service_fn(answer);
    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

fn with_site(routes: Routes) -> Routes {
    let mut routes = serde_json::to_value(routes).unwrap();
    // Port 0 twice would be one name in the store of sockets.
    routes["tcp"] = serde_json::json!([]);
    routes["https"] = serde_json::json!({ "listen": "127.0.0.1:0" });
    routes["sites"] = serde_json::json!([{
        "enclave": "signer",
        "domains": ["a.test"],
        "paths": [{ "prefix": "/", "vsock_port": PORT.parse::<u32>().unwrap() }],
        "target": Cid::FIRST,
    }]);
    serde_json::from_value(routes).unwrap()
}

enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

struct Client {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    http2: bool,
    sender: Option<Sender>,
    /// What carries its connections.
    carriers: JoinSet<()>,
}

impl Client {
    fn new(host: &Host, address: SocketAddr, http2: bool) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        let root = host.folder.path().join("state/ca/root.crt");
        roots.add(CertificateDer::from_pem_file(root).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut tls = config.unwrap().with_root_certificates(roots).with_no_client_auth();
        tls.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        Self { address, tls: Arc::new(tls), http2, sender: None, carriers: JoinSet::new() }
    }

    async fn connect(&mut self) -> anyhow::Result<Sender> {
        let stream = TcpStream::connect(self.address).await.context("refused")?;
        let name = ServerName::try_from("a.test")?;
        let io = TokioIo::new(TlsConnector::from(self.tls.clone()).connect(name, stream).await.context("TLS")?);
        if self.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            self.carriers.spawn(async move { drop(connection.await) });
            return Ok(Sender::Http2(sender));
        }
        let (sender, connection) = http1::handshake(io).await?;
        self.carriers.spawn(async move { drop(connection.await) });
        Ok(Sender::Http1(sender))
    }

    /// Asks over the connection that it has, or over a new one if that was closed, or closes while it is asked: then nobody has begun
    /// with it, which the caller checks. (Over HTTP/2 the server says so; over HTTP/1.1 clients rely on it, RFC 9112, 9.3.1.)
    async fn ask(&mut self) -> anyhow::Result<()> {
        loop {
            let kept = match &mut self.sender {
                Some(Sender::Http1(sender)) => sender.ready().await.is_ok(),
                Some(Sender::Http2(sender)) => sender.ready().await.is_ok(),
                None => false,
            };
            if !kept {
                self.sender = Some(self.connect().await?);
            }
            let request = Request::get(if self.http2 { "https://a.test/" } else { "/" }).header("host", "a.test");
            let request = request.body(Empty::new())?;
            let sent = match &mut self.sender {
                Some(Sender::Http1(sender)) => sender.send_request(request).await,
                Some(Sender::Http2(sender)) => sender.send_request(request).await,
                None => anyhow::bail!("no connection"),
            };
            let answer = match sent {
                Ok(answer) => answer,
                Err(_) if kept => {
                    self.sender = None;
                    continue;
                }
                Err(error) => return Err(error).context("over a new one"),
            };
            anyhow::ensure!(answer.status() == 200, "{}", answer.status());
            let body = answer.into_body().collect().await.context("the answer broke off")?.to_bytes();
            anyhow::ensure!(body == "well", "{body:?}");
            return Ok(());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn restarts_lose_no_request_of_clients_that_ask_again_what_was_not_begun() {
    let mut host = Host::new().await;
    host.start();
    let report = host.publish(&with_site(host.routes())).await;
    let https = report.listeners.iter().find(|one| matches!(one.listener, ListenerKey::Https { .. })).unwrap();
    let address = https.address.parse().unwrap();
    let (enough, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for number in 0..8 {
        let mut client = Client::new(&host, address, number % 2 == 0);
        // Half of them have no patience with connections.
        let keeps = number < 4;
        let (enough, asked) = (enough.clone(), asked.clone());
        clients.spawn(async move {
            while !enough.load(SeqCst) {
                let answered = timeout(DEADLINE, client.ask()).await.unwrap();
                answered.unwrap_or_else(|error| panic!("over HTTP/{}: {error:#}", if client.http2 { 2 } else { 1 }));
                asked.fetch_add(1, SeqCst);
                client.sender = client.sender.take().filter(|_| keeps);
            }
            client.carriers.len()
        });
    }
    for _ in 0..RESTARTS {
        let (goal, until) = (asked.load(SeqCst) + 50, Instant::now() + DEADLINE);
        while asked.load(SeqCst) < goal {
            if let Some(ended) = clients.try_join_next() {
                ended.unwrap();
            }
            assert!(Instant::now() < until, "nobody is answered any more");
            sleep(Duration::from_millis(2)).await;
        }
        assert!(host.end(Signal::TERM).success());
        host.start();
    }
    enough.store(true, SeqCst);
    let connections: usize = clients.join_all().await.into_iter().sum();
    assert!(connections >= 8 * RESTARTS, "{connections} connections");
    assert_eq!(RUN.load(SeqCst), asked.load(SeqCst), "requests were begun and given up, or run twice");
}
