//! The clients of the demo: of the daemon's admin API, of its metrics, and of the enclave's HTTPS service as the world sees
//! it. They know how to ask; what an answer means is not theirs.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use enclaved_core::status::Status;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// An answer may take this long.
const ANSWER: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

async fn get<S>(stream: S, host: &str, path: &str) -> anyhow::Result<(StatusCode, Bytes)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let request = Request::get(path).header(header::HOST, host).body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(anyhow::Error::from_boxed)?.to_bytes()))
    };
    timeout(ANSWER, exchange).await.context("no answer in time")?
}

/// The daemon's admin API.
#[derive(Debug)]
pub(super) struct Admin {
    pub(super) socket: PathBuf,
}

impl Admin {
    /// The status of the host.
    pub(super) async fn status(&self) -> anyhow::Result<Status> {
        let asked = async {
            let stream = UnixStream::connect(&self.socket).await?;
            let (status, body) = get(stream, "localhost", "/v1/status").await?;
            if status != StatusCode::OK {
                bail!("{status}: {}", String::from_utf8_lossy(&body));
            }
            Ok(serde_json::from_slice(&body)?)
        };
        asked.await.with_context(|| format!("asking enclaved on {}", self.socket.display()))
    }
}

/// A page of the daemon's metrics listener.
pub(super) async fn page(at: SocketAddr, path: &str) -> anyhow::Result<(StatusCode, String)> {
    let asked = async {
        let (status, body) = get(TcpStream::connect(at).await?, &at.to_string(), path).await?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    let asked: anyhow::Result<_> = asked.await;
    asked.with_context(|| format!("asking http://{at}{path}"))
}

/// What came of a request to the enclave's service.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    /// `TLSv1_3` and the like.
    pub(super) tls: String,
}

/// A client of the enclave's service, who trusts one root certificate and nobody else.
#[derive(Debug)]
pub(super) struct Https {
    at: SocketAddr,
    config: Arc<ClientConfig>,
}

impl Https {
    pub(super) fn new(at: SocketAddr, root: &Path) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_file(root);
        roots.add(certificate.with_context(|| format!("reading the certificate {}", root.display()))?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { at, config: Arc::new(config) })
    }

    /// A request to `https://localhost:<port>`, on a connection of its own.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Reply> {
        let asked = async {
            let stream = TcpStream::connect(self.at).await.context("connecting")?;
            let name = ServerName::try_from("localhost")?;
            let stream = TlsConnector::from(self.config.clone()).connect(name, stream).await.context("TLS")?;
            let tls = stream.get_ref().1.protocol_version().map_or_else(String::new, |version| format!("{version:?}"));
            let (status, body) = get(stream, &format!("localhost:{}", self.at.port()), path).await?;
            anyhow::Ok(Reply { status, body, tls })
        };
        let asked = timeout(ANSWER, asked).await.context("no answer in time").flatten();
        asked.with_context(|| format!("requesting https://localhost:{}{path} at {}", self.at.port(), self.at))
    }
}
