//! The load: clients, and the backend behind every contender. Nothing here is measured.

use super::contenders::{Contender, Front};
use anyhow::{Context as _, ensure};
use enclaved_core::id::Cid;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use vsock::VMADDR_CID_LOCAL;

/// Clients at a time while connections are made.
const CLIENTS: u32 = 8;
/// What is written and read at once.
const CHUNK: usize = 128 << 10;
/// No single wait is longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first byte of a connection whose bytes are only counted; others are sent back.
const DISCARD: u8 = b'd';

/// Which way connections are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Way {
    Ingress,
    Egress,
}

/// What leads to the enclave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Far {
    /// Hybrid vsock, and for those who don't speak it a plain Unix socket.
    Unix,
    /// AF_VSOCK of a kernel whose vsock leads to itself.
    Vsock,
}

/// The enclave's vsock port.
pub(super) const ENCLAVES_PORT: u32 = 7000;

/// What stands behind the contenders: an echo, or for [`DISCARD`] a sink that says at the end how much it got. It serves
/// until the program ends.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) way: Way,
    pub(super) far: Far,
    /// The folder of the hybrid vsock; the enclave is [`Cid::FIRST`].
    pub(super) vsock: PathBuf,
    /// The same over a plain Unix socket.
    pub(super) unix: PathBuf,
    /// The same over TCP.
    pub(super) tcp: SocketAddr,
}

impl Backend {
    pub(super) fn start(way: Way, far: Far, folder: &Path) -> anyhow::Result<Self> {
        if far == Far::Vsock {
            let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
            ensure!(cpu.contains("User Mode Linux"), "AF_VSOCK of a real machine is not opened by a comparison");
        }
        let (vsock, unix) = (folder.join("vsock"), folder.join("backend"));
        std::fs::create_dir(&vsock)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (enclave, plain, tcp, vsocks) = runtime.block_on(async {
            let enclave = listen_unix(&vsock.join(format!("{}.sock", Cid::FIRST)))?;
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
            let vsocks = match (far, way) {
                (Far::Unix, _) | (_, Way::Egress) => None,
                (Far::Vsock, Way::Ingress) => {
                    let address = tokio_vsock::VsockAddr::new(VMADDR_CID_LOCAL, ENCLAVES_PORT);
                    Some(tokio_vsock::VsockListener::bind(address)?)
                }
            };
            Ok::<_, anyhow::Error>((enclave, listen_unix(&unix)?, socket.listen(4096)?, vsocks))
        })?;
        let address = tcp.local_addr()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                if let Some(listener) = vsocks {
                    tokio::spawn(serve_vsock(listener));
                }
                serve(enclave, plain, tcp).await;
            });
        });
        Ok(Self { way, far, vsock, unix, tcp: address })
    }

    /// The enclave's.
    pub(super) fn cid(&self) -> anyhow::Result<Cid> {
        match self.far {
            Far::Unix => Ok(Cid::FIRST),
            Far::Vsock => Cid::new(VMADDR_CID_LOCAL)
                .context("CID 1 is no enclave's in this build: it lacks the feature enclaved-proxy/loopback-cid"),
        }
    }
}

fn listen_unix(path: &Path) -> anyhow::Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // The standard library's queue of 128 is too short for a crowd: connect(2) would say EAGAIN.
    listen(&socket, 4096)?;
    Ok(UnixListener::from_std(socket.into())?)
}

async fn serve_vsock(listener: tokio_vsock::VsockListener) {
    loop {
        // One that fails is the client's to notice.
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream));
        }
    }
}

async fn serve(enclave: UnixListener, plain: UnixListener, tcp: TcpListener) {
    loop {
        tokio::select! {
            // Cancel-safe, as tokio says of all accepts.
            accepted = enclave.accept() => if let Ok((mut stream, _)) = accepted {
                tokio::spawn(async move {
                    // `CONNECT 7000\n`, which comes in one piece from whoever is measured here.
                    let mut line = [0; 64];
                    if stream.read(&mut line).await.is_ok() && stream.write_all(b"OK 1\n").await.is_ok() {
                        answer(stream).await;
                    }
                });
            },
            accepted = plain.accept() => if let Ok((stream, _)) = accepted {
                tokio::spawn(answer(stream));
            },
            accepted = tcp.accept() => if let Ok((stream, _)) = accepted {
                let _without = stream.set_nodelay(true);
                tokio::spawn(answer(stream));
            },
        }
    }
}

/// What comes after a connection's end, or failure, is the client's to notice.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut small = [0; 1024];
    let Ok(count) = stream.read(&mut small).await else { return };
    if small[..count].first() == Some(&DISCARD) {
        let (mut buffer, mut total) = (vec![0; CHUNK], count as u64);
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            total += count as u64;
        }
        let _gone = stream.write_all(&total.to_le_bytes()).await;
        return;
    }
    let mut count = count;
    while count > 0 && stream.write_all(&small[..count]).await.is_ok() {
        count = stream.read(&mut small).await.unwrap_or(0);
    }
}

/// A client's connection.
#[derive(Debug)]
pub(super) enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
    Vsock(vsock::VsockStream),
}

pub(super) fn connect(front: &Front) -> io::Result<Client> {
    match front {
        Front::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(Client::Tcp(stream))
        }
        Front::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(Client::Unix(stream))
        }
        Front::Vsock(port) => {
            let stream = vsock::VsockStream::connect_with_cid_port(VMADDR_CID_LOCAL, *port)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(Client::Vsock(stream))
        }
    }
}

impl Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
            Self::Vsock(stream) => stream.read(buffer),
        }
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
            Self::Vsock(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Client {
    fn close_writing(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(std::net::Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(std::net::Shutdown::Write),
            Self::Vsock(stream) => stream.shutdown(std::net::Shutdown::Write),
        }
    }

    fn exchange(&mut self) -> io::Result<()> {
        self.write_all(b"x")?;
        self.read_exact(&mut [0])
    }
}

/// Makes that many connections, some at a time: connect, a byte each way, close. How long it took.
pub(super) fn connections(contender: &Contender, count: u32) -> anyhow::Result<Duration> {
    let began = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let share = count / CLIENTS + u32::from(client < count % CLIENTS);
                let front = &contender.fronts[client as usize % contender.fronts.len()];
                scope.spawn(move || (0..share).try_for_each(|_| connect(front)?.exchange()))
            })
            .collect();
        clients.into_iter().try_for_each(|client| match client.join() {
            Ok(result) => result.context("a connection"),
            Err(_) => anyhow::bail!("a client panicked"),
        })
    })?;
    Ok(began.elapsed())
}

/// Sends that many bytes to the backend over one connection, and waits until it has them. How long it took.
pub(super) fn one_way(contender: &Contender, size: u64) -> anyhow::Result<Duration> {
    let front = contender.fronts.first().context("no port")?;
    let mut client = connect(front)?;
    let chunk = vec![DISCARD; CHUNK];
    let began = Instant::now();
    let mut left = size;
    while left > 0 {
        let count = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        client.write_all(&chunk[..count])?;
        left -= count as u64;
    }
    client.close_writing()?;
    let mut total = [0; 8];
    client.read_exact(&mut total).context("the backend's count")?;
    ensure!(u64::from_le_bytes(total) == size, "{} of {size} bytes arrived", u64::from_le_bytes(total));
    Ok(began.elapsed())
}

/// How long each of that many exchanges of 64 bytes took, one after another over one connection.
pub(super) fn round_trips(contender: &Contender, count: u32) -> anyhow::Result<Vec<Duration>> {
    let front = contender.fronts.first().context("no port")?;
    let (mut client, mut buffer) = (connect(front)?, [b'x'; 64]);
    let mut trip = || {
        let began = Instant::now();
        client.write_all(&buffer)?;
        client.read_exact(&mut buffer)?;
        Ok(began.elapsed())
    };
    (0..count).map(|_| trip()).collect()
}

/// Opens that many connections, each with a byte each way, and keeps them.
pub(super) fn hold(contender: &Contender, count: usize) -> anyhow::Result<Vec<Client>> {
    let fronts = contender.fronts.iter().cycle();
    let held = fronts.take(count).map(|front| {
        let mut client = connect(front)?;
        client.exchange()?;
        Ok(client)
    });
    held.collect::<io::Result<Vec<_>>>().context("opening idle connections")
}
