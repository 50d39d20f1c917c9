//! The load: clients, and the backend behind every contender. Nothing here is measured.

use super::Work;
use super::contenders::{Contender, DOMAIN};
use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use enclaved_core::id::Cid;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::convert::Infallible;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

const SMALL: usize = 1 << 10;
const LARGE: usize = 100 << 10;
const UPLOAD: usize = 1 << 20;
/// Clients at a time while connections are made.
const CONNECTING: u32 = 8;
/// No single wait is longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The vsock port of the backend.
pub(super) const PORT: u32 = 8080;

/// What stands behind the contenders. It serves until the program ends.
#[derive(Debug)]
pub(super) struct Backend {
    /// The folder of the hybrid vsock; the enclave is [`Cid::FIRST`].
    pub(super) vsock: PathBuf,
    /// The same over a plain Unix socket.
    pub(super) unix: PathBuf,
}

impl Backend {
    pub(super) fn start(folder: &Path) -> anyhow::Result<Self> {
        let (vsock, unix) = (folder.join("vsock"), folder.join("backend"));
        std::fs::create_dir(&vsock)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (enclave, plain) = runtime.block_on(async {
            let enclave = UnixListener::bind(vsock.join(format!("{}.sock", Cid::FIRST)))?;
            Ok::<_, anyhow::Error>((enclave, UnixListener::bind(&unix)?))
        })?;
        std::thread::spawn(move || runtime.block_on(serve(enclave, plain)));
        Ok(Self { vsock, unix })
    }
}

async fn serve(enclave: UnixListener, plain: UnixListener) {
    let (small, large) = (Bytes::from(vec![b's'; SMALL]), Bytes::from(vec![b'l'; LARGE]));
    loop {
        let (small, large) = (small.clone(), large.clone());
        tokio::select! {
            // Cancel-safe, as tokio says of all accepts.
            accepted = enclave.accept() => if let Ok((mut stream, _)) = accepted {
                tokio::spawn(async move {
                    // `CONNECT 8080\n`, which comes in one piece from whoever is measured here.
                    let mut line = [0; 64];
                    if stream.read(&mut line).await.is_ok() && stream.write_all(b"OK 1\n").await.is_ok() {
                        answer(stream, small, large).await;
                    }
                });
            },
            accepted = plain.accept() => if let Ok((stream, _)) = accepted {
                tokio::spawn(answer(stream, small, large));
            },
        }
    }
}

async fn answer(stream: UnixStream, small: Bytes, large: Bytes) {
    let respond = hyper::service::service_fn(move |request: Request<Incoming>| {
        let (small, large) = (small.clone(), large.clone());
        async move {
            let (status, body) = match request.uri().path() {
                "/small" => (StatusCode::OK, small),
                "/large" => (StatusCode::OK, large),
                "/upload" => match count(request.into_body()).await {
                    Some(UPLOAD) => (StatusCode::OK, small),
                    _ => (StatusCode::BAD_REQUEST, Bytes::new()),
                },
                _ => (StatusCode::NOT_FOUND, Bytes::new()),
            };
            let mut response = Response::new(Full::new(body));
            *response.status_mut() = status;
            Ok::<_, Infallible>(response)
        }
    });
    // A connection that fails is noticed by the client whose request it carried.
    let _ended = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), respond).await;
}

async fn count(mut body: Incoming) -> Option<usize> {
    let mut total = 0;
    while let Some(frame) = body.frame().await {
        total += frame.ok()?.data_ref().map_or(0, Bytes::len);
    }
    Some(total)
}

/// The clients.
#[derive(Debug)]
pub(super) struct Load {
    upload: PathBuf,
    clients: u32,
}

impl Load {
    pub(super) fn new(folder: &Path, clients: u32) -> anyhow::Result<Self> {
        let upload = folder.join("upload");
        std::fs::write(&upload, vec![b'u'; UPLOAD])?;
        Ok(Self { upload, clients })
    }

    /// Does a work that many times, and fails unless each came to what it should. How long it took.
    pub(super) fn run(&self, contender: &Contender, work: Work, count: u32) -> anyhow::Result<Duration> {
        let upload: [&std::ffi::OsStr; 2] = ["-d".as_ref(), self.upload.as_os_str()];
        match work {
            Work::Small => self.h2load(contender, "/small", count, &["--h1".as_ref()]),
            Work::SmallHttp2 => self.h2load(contender, "/small", count, &["-m".as_ref(), "4".as_ref()]),
            Work::Large => self.h2load(contender, "/large", count, &["--h1".as_ref()]),
            Work::Upload => self.h2load(contender, "/upload", count, &["--h1".as_ref(), upload[0], upload[1]]),
            Work::Handshake => connections(contender, count),
        }
    }

    fn h2load(
        &self,
        contender: &Contender,
        path: &str,
        count: u32,
        more: &[&std::ffi::OsStr],
    ) -> anyhow::Result<Duration> {
        let port = contender.address.port();
        let mut command = Command::new("h2load");
        command.args(["-n", &count.to_string(), "-c", &self.clients.min(count).to_string(), "-t", "1"]).args(more);
        command.arg(format!("--connect-to={}", contender.address)).arg(format!("https://{DOMAIN}:{port}{path}"));
        let began = Instant::now();
        let output = command.output().context("running h2load (Debian: nghttp2-client)")?;
        let wall = began.elapsed();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success()
                && said.contains(&format!(" {count} succeeded, 0 failed, 0 errored, 0 timeout"))
                && said.contains(&format!("status codes: {count} 2xx,")),
            "h2load: not every request was answered:\n{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(wall)
    }

    /// Opens that many connections, each with a request, and keeps them.
    pub(super) fn hold(&self, contender: &Contender, count: usize) -> anyhow::Result<Vec<Client>> {
        let config = config(&contender.root)?;
        (0..count).map(|_| Client::connect(contender, &config).and_then(Client::get)).collect()
    }
}

/// Makes that many connections, some at a time: TCP, a full handshake, a request, close. How long it took.
fn connections(contender: &Contender, count: u32) -> anyhow::Result<Duration> {
    let config = config(&contender.root)?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CONNECTING)
            .map(|client| {
                let share = count / CONNECTING + u32::from(client < count % CONNECTING);
                let config = &config;
                scope.spawn(move || (0..share).try_for_each(|_| Client::connect(contender, config)?.get().map(drop)))
            })
            .collect();
        clients.into_iter().try_for_each(|client| match client.join() {
            Ok(result) => result.context("a connection"),
            Err(_) => bail!("a client panicked"),
        })
    })?;
    Ok(began.elapsed())
}

/// One key exchange for all, and no session that could be taken up again.
fn config(root: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::X25519];
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(root).with_context(|| root.display().to_string())? {
        roots.add(certificate?)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(provider));
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A connection.
#[derive(Debug)]
pub(super) struct Client(BufReader<StreamOwned<ClientConnection, TcpStream>>);

impl Client {
    fn connect(contender: &Contender, config: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(contender.address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let session = ClientConnection::new(config.clone(), ServerName::try_from(DOMAIN)?)?;
        Ok(Self(BufReader::new(StreamOwned::new(session, socket))))
    }

    /// One request, whose answer is read to its end.
    fn get(mut self) -> anyhow::Result<Self> {
        write!(self.0.get_mut(), "GET /small HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n")?;
        self.0.get_mut().flush()?;
        let (mut line, mut length) = (String::new(), None);
        self.0.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 200 "), "the answer is {line:?}");
        while line != "\r\n" {
            line.clear();
            ensure!(self.0.read_line(&mut line)? > 0, "the answer ends in its headers");
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = Some(value.trim().parse::<usize>()?);
            }
        }
        ensure!(length == Some(SMALL), "the answer has {length:?} bytes");
        self.0.read_exact(&mut [0; SMALL])?;
        Ok(self)
    }
}
