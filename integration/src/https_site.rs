//! The real `enclaved proxy` with HTTPS sites on loopback, for clients of others: its routes come over its link, its certificates
//! from its internal CA, and behind it stand ordinary servers on loopback, over a bridge from hybrid vsock.
//!
//! Here is what stands around the clients; what they ask, and what they must be answered, is in the tests.

use crate::bench::contender::{Processes, ask, free_port};
use crate::processes::Owned;
use anyhow::{Context as _, bail, ensure};
use enclaved_core::id::Cid;
use enclaved_core::routes::{LinkRequest, ListenerKey, ProxyReport, ROUTES_FORMAT, Routes, UpstreamHttp};
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::runtime::Runtime;

/// For how long browsers are told to come over HTTPS alone.
pub const HSTS: &str = "max-age=31536000";
/// Longest line of the vsock convention: `CONNECT 4294967295\n`.
const MAX_CONNECT: u64 = 32;
/// How long one client may take for all that it does.
const PATIENCE: Duration = Duration::from_secs(100);

/// One site.
#[derive(Debug, Clone, Copy)]
pub struct Site {
    /// Its name.
    pub domain: &'static str,
    /// The port of the server behind it, on loopback.
    pub port: u16,
    /// How that speaks HTTP.
    pub upstream: UpstreamHttp,
}

/// What carries a bridge, and the servers behind it that are written here.
///
/// # Errors
/// When it can't have a thread.
pub fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

/// The proxy, serving. It ends with this, and leaves nothing.
#[derive(Debug)]
pub struct HttpsSites {
    /// Where HTTPS is served.
    pub https: SocketAddr,
    /// Where requests in clear are told to come again.
    pub clear: SocketAddr,
    /// The certificate of the internal CA.
    pub root: PathBuf,
    proxy: Processes,
    _runtime: Runtime,
    // Dropped last: the proxy has its state there.
    folder: TempDir,
}

impl HttpsSites {
    /// Starts the proxy with these sites, and returns once it serves them. The bridge is carried by the runtime, which ends with
    /// this.
    ///
    /// # Errors
    /// When the proxy is not built or does not serve; with what it printed.
    pub fn start(sites: &[Site], runtime: Runtime) -> anyhow::Result<Self> {
        Self::start_before(sites, runtime, bridge)
    }

    /// The same before an enclave of the caller's own, which gets the socket that hybrid vsock has for it.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_before<F>(
        sites: &[Site],
        runtime: Runtime,
        enclave: impl FnOnce(UnixListener) -> F,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let folder = tempfile::tempdir().context("making a folder")?;
        let vsock = folder.path().join("vsock");
        fs::create_dir(&vsock)?;
        let socket = vsock.join(format!("{}.sock", Cid::FIRST));
        let listener = runtime.block_on(async { UnixListener::bind(socket) })?;
        runtime.spawn(enclave(listener));
        let sites: Vec<_> = sites
            .iter()
            .map(|site| {
                serde_json::json!({
                    "enclave": "app",
                    "domains": [site.domain],
                    "paths": [{ "prefix": "/", "vsock_port": site.port, "upstream": site.upstream }],
                    "target": Cid::FIRST,
                    "rules": { "hsts_seconds": 31_536_000 },
                })
            })
            .collect();
        let routes: Routes = serde_json::from_value(serde_json::json!({
            "format": ROUTES_FORMAT,
            "vsock": { "hybrid": vsock },
            "egress": [],
            "https": { "listen": free_port()?, "rules": { "redirect": free_port()? } },
            "sites": sites,
            "tcp": [],
        }))?;
        let enclaved = crate::binaries::find("enclaved")?;
        let (proxy, report) = Processes::proxy(&enclaved, &[], routes, false, folder.path())?;
        let address = |of: fn(&ListenerKey) -> bool| {
            let found = report.listeners.iter().find(|report| of(&report.listener)).context("a port is missing")?;
            ensure!(found.error.is_none(), "{found:?}: {}", proxy.said());
            Ok(found.address.parse::<SocketAddr>()?)
        };
        let https = address(|key| matches!(key, ListenerKey::Https { .. }))?;
        let clear = address(|key| matches!(key, ListenerKey::Redirect { .. }))?;
        let root = folder.path().join("state/ca/root.crt");
        Ok(Self { https, clear, root, proxy, _runtime: runtime, folder })
    }

    /// Where a test puts its files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The base of a site's URLs.
    pub fn url(&self, domain: &str) -> String {
        format!("https://{domain}:{}", self.https.port())
    }

    /// What the proxy's process takes of the machine's memory, in MiB.
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory_mib(&self) -> anyhow::Result<f64> {
        self.proxy.pss_mib()
    }

    /// What it has cost so far, in seconds of a processor.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_s(&self) -> anyhow::Result<f64> {
        self.proxy.cpu_s()
    }

    /// What it reports of itself.
    ///
    /// # Errors
    /// When its link does not answer.
    pub fn report(&self) -> anyhow::Result<ProxyReport> {
        ask(&self.folder.path().join("link"), &LinkRequest::Report)
    }

    /// What the proxy printed.
    pub fn said(&self) -> String {
        self.proxy.said()
    }
}

/// Takes what comes first on a connection to an enclave, `CONNECT <port>`, and lets it begin.
///
/// # Errors
/// When that is not what comes.
pub async fn accept_hybrid(stream: &mut UnixStream) -> anyhow::Result<u32> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        ensure!(line.len() as u64 <= MAX_CONNECT, "no CONNECT");
        line.push(stream.read_u8().await?);
    }
    let line = String::from_utf8(line)?;
    let port = line.strip_prefix("CONNECT ").context("no CONNECT")?.trim_end().parse()?;
    stream.write_all(b"OK 1\n").await?;
    Ok(port)
}

/// Carries connections from the enclave's vsock ports to the loopback ports of the same numbers.
async fn bridge(listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        // What goes wrong here is noticed by the client whose connection it carries.
        tokio::spawn(async move { drop(carry(stream).await) });
    }
}

async fn carry(stream: UnixStream) -> anyhow::Result<()> {
    let mut stream = tokio::io::BufReader::new(stream);
    let mut line = String::new();
    (&mut stream).take(MAX_CONNECT).read_line(&mut line).await?;
    let port: u16 = line.strip_prefix("CONNECT ").context("no CONNECT")?.trim_end().parse()?;
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    server.set_nodelay(true)?;
    stream.get_mut().write_all(b"OK 1\n").await?;
    tokio::io::copy_bidirectional(&mut stream, &mut server).await?;
    Ok(())
}

/// A program of others, which has nothing of this process's environment: no proxies, no settings in somebody's home.
#[derive(Debug)]
pub struct Program {
    command: Command,
    package: &'static str,
}

/// How a program ended, and what it printed.
#[derive(Debug, Clone)]
pub struct Said {
    /// What it was.
    pub what: String,
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Said {
    /// That it succeeded; otherwise with all that it said.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.code == Some(0), "{self}");
        self
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, code, stdout, stderr } = self;
        write!(f, "{what}: exit {code:?}\n-- stdout\n{stdout}\n-- stderr\n{stderr}")
    }
}

impl Program {
    /// A program, and the Debian package that has it.
    pub fn new(program: &str, package: &'static str) -> Self {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        command.env("HOME", "/nonexistent").stdin(Stdio::null());
        Self { command, package }
    }

    /// A script for Debian's Python, which has Debian's packages.
    pub fn python(script: &Path, package: &'static str) -> Self {
        // No bytecode in the tree.
        Self::new("/usr/bin/python3", package).arg("-B").arg(script)
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<T: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.command.args(arguments);
        self
    }

    /// What it reads, to its end.
    #[must_use]
    pub fn stdin(mut self, from: impl Into<Stdio>) -> Self {
        self.command.stdin(from);
        self
    }

    /// Runs it to its end; a client that hangs is ended.
    ///
    /// # Errors
    /// When it is not installed, or does not end in time.
    pub fn run(self) -> anyhow::Result<Said> {
        self.run_within(PATIENCE)
    }

    /// The same with another time.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_within(mut self, patience: Duration) -> anyhow::Result<Said> {
        let mut running = self.start()?;
        let (mut stdout, mut stderr) = (running.0.stdout.take(), running.0.stderr.take());
        let began = Instant::now();
        std::thread::scope(|scope| {
            let stdout = scope.spawn(|| read(stdout.as_mut()));
            let stderr = scope.spawn(|| read(stderr.as_mut()));
            let ended = loop {
                if let Some(status) = running.0.try_wait()? {
                    break Some(status);
                }
                if began.elapsed() > patience {
                    running.0.kill()?;
                    running.0.wait()?;
                    break None;
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            let text = |reader: std::thread::ScopedJoinHandle<'_, String>| reader.join().unwrap_or_default();
            let (stdout, stderr) = (text(stdout), text(stderr));
            let Some(status) = ended else {
                bail!("{:?} did not end within {patience:?}: {stdout}\n{stderr}", self.command.get_program());
            };
            let what = format!("{:?} of Debian's {}", self.command.get_program(), self.package);
            Ok(Said { what, code: status.code(), stdout, stderr })
        })
    }

    /// Starts a server that prints the port it listens on as its first line, and ends when its standard input does.
    ///
    /// # Errors
    /// When it is not installed, or prints no port.
    pub fn serve(mut self) -> anyhow::Result<ForeignServer> {
        self.command.stdin(Stdio::piped()).stderr(Stdio::inherit());
        let mut running = Owned(self.spawn()?);
        let stdin = running.0.stdin.take();
        let mut stdout = BufReader::new(running.0.stdout.take().context("no output")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let port = line
            .trim()
            .parse()
            .with_context(|| format!("{line:?} in place of a port; is Debian's {} installed?", self.package))?;
        Ok(ForeignServer { port, _running: running, _stdin: stdin, _stdout: stdout })
    }

    /// Starts it; what it reads and prints goes through pipes.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn start(&mut self) -> anyhow::Result<Owned> {
        self.command.stderr(Stdio::piped());
        self.spawn().map(Owned)
    }

    fn spawn(&mut self) -> anyhow::Result<Child> {
        let (program, package) = (self.command.get_program().to_owned(), self.package);
        let started = self.command.stdout(Stdio::piped()).spawn();
        started.with_context(|| format!("running {}; it is in Debian's {package}", program.display()))
    }
}

fn read(from: Option<&mut impl std::io::Read>) -> String {
    let mut bytes = Vec::new();
    // What was read until it broke off is shown.
    drop(from.map(|from| from.read_to_end(&mut bytes)));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A server of others on loopback, which ends with this.
#[derive(Debug)]
pub struct ForeignServer {
    /// Where it listens on 127.0.0.1.
    pub port: u16,
    _running: Owned,
    _stdin: Option<ChildStdin>,
    _stdout: BufReader<ChildStdout>,
}
