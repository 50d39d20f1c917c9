//! A relay by splice(2), to compare with: it does nothing else that a relay must do (no limits, no counters, no end when it is
//! told), so that what it costs is the least that this method can cost. Each direction has a pipe of its own.

use super::contenders::Front;
use anyhow::{Context as _, bail};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use std::io;
use std::path::PathBuf;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// A pipe's size as it is: sixteen pages, 64 KiB.
const AT_ONCE: usize = 64 << 10;

/// The same on a command line: `tcp:127.0.0.1:9000`, `unix:/path`.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Place(pub(super) Front);

impl std::str::FromStr for Place {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text.split_once(':') {
            Some(("tcp", address)) => Ok(Self(Front::Tcp(address.parse()?))),
            Some(("unix", path)) => Ok(Self(Front::Unix(PathBuf::from(path)))),
            _ => bail!("neither tcp:ADDRESS nor unix:PATH"),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Front::Tcp(address) => write!(f, "tcp:{address}"),
            Front::Unix(path) => write!(f, "unix:{}", path.display()),
            Front::Vsock(port) => write!(f, "vsock:{port}"),
        }
    }
}

/// Relays until it is killed.
pub(in crate::bench) fn serve(pairs: &[(Place, Place)]) -> anyhow::Result<()> {
    crate::bench::contender::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut listening = tokio::task::JoinSet::new();
        for (listen, to) in pairs.iter().cloned() {
            listening.spawn(accept(listen.0, to.0));
        }
        match listening.join_next().await {
            Some(ended) => ended.context("a listener panicked")?,
            None => Ok(()),
        }
    })
}

async fn accept(listen: Front, to: Front) -> anyhow::Result<()> {
    match listen {
        Front::Tcp(address) => {
            let listener = TcpListener::bind(address).await?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(relay(End::Tcp(stream), to.clone()));
            }
        }
        Front::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            // The standard library's queue of 128 is too short for a crowd.
            rustix::net::listen(&listener, 4096)?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(relay(End::Unix(stream), to.clone()));
            }
        }
        Front::Vsock(_) => bail!("AF_VSOCK knows no splice(2)"),
    }
}

/// An end of a relay.
#[derive(Debug)]
enum End {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl End {
    async fn connect(to: &Front) -> io::Result<Self> {
        match to {
            Front::Tcp(address) => TcpStream::connect(address).await.map(Self::Tcp),
            Front::Unix(path) => UnixStream::connect(path).await.map(Self::Unix),
            Front::Vsock(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Does it when the socket is ready for that; again when it was not, after all.
    async fn when<T>(&self, ready: Interest, mut act: impl FnMut(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        loop {
            let tried = match self {
                Self::Tcp(stream) => {
                    stream.ready(ready).await?;
                    stream.try_io(ready, || act(stream.as_fd()))
                }
                Self::Unix(stream) => {
                    stream.ready(ready).await?;
                    stream.try_io(ready, || act(stream.as_fd()))
                }
            };
            match tried {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    fn close_writing(&self) -> rustix::io::Result<()> {
        match self {
            Self::Tcp(stream) => shutdown(stream, Shutdown::Write),
            Self::Unix(stream) => shutdown(stream, Shutdown::Write),
        }
    }
}

/// What becomes of one connection is seen at its ends.
async fn relay(client: End, to: Front) -> io::Result<()> {
    let server = End::connect(&to).await?;
    for end in [&client, &server] {
        if let End::Tcp(stream) = end {
            stream.set_nodelay(true)?;
        }
    }
    tokio::try_join!(pump(&client, &server), pump(&server, &client)).map(|((), ())| ())
}

async fn pump(from: &End, to: &End) -> io::Result<()> {
    let (taken, given) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    loop {
        let take = |from: BorrowedFd<'_>| Ok(splice(from, None, &given, None, AT_ONCE, flags)?);
        let mut held = from.when(Interest::READABLE, take).await?;
        if held == 0 {
            // An end that is gone already is closed.
            let _gone = to.close_writing();
            return Ok(());
        }
        while held > 0 {
            let give = |to: BorrowedFd<'_>| Ok(splice(&taken, None, to, None, held, flags)?);
            held -= to.when(Interest::WRITABLE, give).await?;
        }
    }
}
