//! Clients of a host: HTTPS with the certificate checked, a light load of it, and an observer of the egress listeners.
//! And the tests of what traffic looks like while nothing goes wrong.

use crate::fixture::{DEADLINE, Host};
use bytes::Bytes;
use enclaved_integration::enclave::{Answer, Upstream};
use enclaved_integration::host::{ECHO_PORT, EGRESS_PORT};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

/// A client that trusts the proxy's internal CA and nobody else.
#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    domain: &'static str,
}

impl Client {
    /// A client of the ingress, for that domain.
    pub(crate) fn new(host: &Host, domain: &'static str) -> Self {
        Self::trusting(host, domain, &[CertificateDer::from_pem_file(host.ca()).unwrap()])
    }

    fn trusting(host: &Host, domain: &'static str, roots: &[CertificateDer<'_>]) -> Self {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone().into_owned()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(store).with_no_client_auth();
        Self { address: host.machine.ingress(), tls: Arc::new(config), domain }
    }

    /// The domain that it is a client of.
    pub(crate) fn domain(&self) -> &'static str {
        self.domain
    }

    /// A connection on which that protocol was agreed; none: whatever goes without agreeing.
    pub(crate) async fn connect(&self, protocol: Option<&[u8]>) -> anyhow::Result<TlsStream<TcpStream>> {
        let mut tls = self.tls.clone();
        if let Some(protocol) = protocol {
            Arc::make_mut(&mut tls).alpn_protocols = vec![protocol.to_vec()];
        }
        let stream = TcpStream::connect(self.address).await?;
        Ok(TlsConnector::from(tls).connect(ServerName::try_from(self.domain)?, stream).await?)
    }

    /// A GET on a connection of its own.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<(u16, Bytes)> {
        let exchange = async {
            let stream = self.connect(None).await?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let mut connections = JoinSet::new();
            connections.spawn(connection);
            let request = hyper::Request::get(path).header("host", self.domain).body(Empty::<Bytes>::new())?;
            let answer = sender.send_request(request).await?;
            Ok((answer.status().as_u16(), answer.into_body().collect().await?.to_bytes()))
        };
        timeout(DEADLINE, exchange).await?
    }

    /// What the application says to `GET /`, which calls the upstream; it must succeed.
    pub(crate) async fn answer(&self) -> Answer {
        let (status, body) = self.get("/").await.unwrap();
        assert_eq!(status, 200, "{body:?}");
        serde_json::from_slice(&body).unwrap()
    }
}

/// Requests one after the other, each through ingress, enclave, egress and upstream, until it is ended.
pub(crate) struct Load {
    stop: CancellationToken,
    task: JoinHandle<LoadReport>,
}

/// What became of a load.
#[derive(Debug, Default)]
pub(crate) struct LoadReport {
    /// How many requests were answered with 200, and how often each label answered.
    pub(crate) labels: std::collections::BTreeMap<String, u32>,
    /// What went wrong, request by request.
    pub(crate) failures: Vec<String>,
}

impl Load {
    pub(crate) fn start(client: Client) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut report = LoadReport::default();
            while !stopped.is_cancelled() {
                match client.get("/").await {
                    Ok((200, body)) => {
                        let answer: Answer = serde_json::from_slice(&body).unwrap();
                        *report.labels.entry(answer.label).or_default() += 1;
                    }
                    Ok((status, body)) => report.failures.push(format!("{status}: {body:?}")),
                    Err(error) => report.failures.push(format!("{error:#}")),
                }
                sleep(Duration::from_millis(10)).await;
            }
            report
        });
        Self { stop, task }
    }

    /// Ends it. At least one request was answered, and none failed.
    pub(crate) async fn end(self) -> LoadReport {
        self.stop.cancel();
        let report = self.task.await.unwrap();
        assert_eq!(report.failures, [] as [String; 0], "{:?} were answered", report.labels);
        assert!(!report.labels.is_empty());
        report
    }
}

/// Looks all the time whether some enclave's egress listener can be connected to.
pub(crate) struct EgressWatch {
    stop: CancellationToken,
    task: JoinHandle<(u32, u32)>,
}

impl EgressWatch {
    pub(crate) fn start(host: &Host) -> Self {
        let (folder, stop) = (host.machine.nitro.vsock(), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut looks, mut closed) = (0, 0);
            while !stopped.is_cancelled() {
                looks += 1;
                // Twice: the one that was listed may have made place for the next one meanwhile.
                if !some_is_open(&folder).await && !some_is_open(&folder).await {
                    closed += 1;
                }
                sleep(Duration::from_millis(5)).await;
            }
            (looks, closed)
        });
        Self { stop, task }
    }

    /// Ends it. One listener was open at every look.
    pub(crate) async fn end(self) {
        self.stop.cancel();
        let (looks, closed) = self.task.await.unwrap();
        assert!(looks > 10 && closed == 0, "no egress listener at {closed} of {looks} looks");
    }
}

async fn some_is_open(folder: &PathBuf) -> bool {
    let ending = format!(".sock_{EGRESS_PORT}");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    for path in entries.filter(|path| path.to_str().unwrap().ends_with(&ending)) {
        if UnixStream::connect(path).await.is_ok() {
            return true;
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_over_tls_to_the_enclave_and_on_through_egress_to_the_upstream_and_back() {
    let host = Host::ready().await;
    let (status, body) = Client::new(&host, "localhost").get("/pay?x=1").await.unwrap();
    let answer: Answer = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, answer.label.as_str(), answer.path.as_str()), (200, "v1", "/pay?x=1"));
    let upstream = Upstream::Answered { status: 200, body: "hello from upstream\n".to_owned() };
    assert_eq!(answer.upstream, Some(upstream));
    let visits = host.machine.upstream.visits();
    assert!(visits.iter().any(|visit| visit.path == "/pay?x=1" && visit.host.as_deref() == Some("upstream.test")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_trust_the_internal_ca_or_asks_for_another_name_gets_no_connection() {
    let host = Host::ready().await;
    let stranger = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let error = Client::trusting(&host, "localhost", &[stranger.cert.der().clone()]).get("/").await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    Client::new(&host, "elsewhere.test").get("/").await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_tcp_port_reaches_the_enclave_and_carries_bytes_both_ways() {
    let host = Host::with_image().await;
    let listen = host.machine.tcp(9000);
    let ports = format!("http_port = 8080, ports = [{{ listen = \"{listen}\", vsock_port = {ECHO_PORT} }}] }}");
    let signer = host.signer().replace("http_port = 8080 }", &ports);
    assert!(signer.contains(&ports));
    host.configure(&signer);
    host.start();
    host.until_ready().await;
    let mut stream = TcpStream::connect(listen).await.unwrap();
    let sent: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let (mut reader, mut writer) = stream.split();
    let writing = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let (read, ()) = tokio::join!(timeout(DEADLINE, reader.read_to_end(&mut received)), writing);
    read.unwrap().unwrap();
    assert!(received == sent, "{} bytes came back of {}", received.len(), sent.len());
}
