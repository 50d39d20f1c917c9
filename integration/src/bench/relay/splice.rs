//! A relay by splice(2), to compare with: it does nothing else that a relay must do (no limits, no counters, no end when it is
//! told), so that what it costs is the least that this method can cost. Each direction has a pipe of its own.

use super::contenders::Front;
use anyhow::{Context as _, bail};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{Shutdown, shutdown, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use std::io;
use std::path::PathBuf;
use tokio::io::unix::AsyncFd;
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
    super::load::raise_descriptor_limit();
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
                tokio::spawn(relay(tcp(stream), to.clone()));
            }
        }
        Front::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            // The standard library's queue of 128 is too short for a crowd.
            rustix::net::listen(&listener, 4096)?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(relay(stream.into_std().map(OwnedFd::from), to.clone()));
            }
        }
        Front::Vsock(_) => bail!("AF_VSOCK knows no splice(2)"),
    }
}

fn tcp(stream: TcpStream) -> io::Result<OwnedFd> {
    sockopt::set_tcp_nodelay(&stream, true)?;
    stream.into_std().map(OwnedFd::from)
}

/// What becomes of one connection is seen at its ends.
async fn relay(client: io::Result<OwnedFd>, to: Front) -> io::Result<()> {
    let server = match to {
        Front::Tcp(address) => tcp(TcpStream::connect(address).await?)?,
        Front::Unix(path) => UnixStream::connect(path).await?.into_std()?.into(),
        Front::Vsock(_) => return Err(io::ErrorKind::Unsupported.into()),
    };
    let (client, server) = (AsyncFd::register(client?)?, AsyncFd::register(server)?);
    tokio::try_join!(pump(&client, &server), pump(&server, &client)).map(|((), ())| ())
}

async fn pump(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let (taken, given) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    let moved = |from: &dyn AsFd, to: &dyn AsFd, most| Ok(splice(from.as_fd(), None, to.as_fd(), None, most, flags)?);
    loop {
        let mut held = loop {
            let mut ready = from.readable().await?;
            if let Ok(result) = ready.try_io(|from| moved(from.get_ref(), &given, AT_ONCE)) {
                break result?;
            }
        };
        if held == 0 {
            // An end that is gone already is closed.
            let _gone = shutdown(to.get_ref(), Shutdown::Write);
            return Ok(());
        }
        while held > 0 {
            let mut ready = to.writable().await?;
            if let Ok(result) = ready.try_io(|to| moved(&taken, to.get_ref(), held)) {
                held -= result?;
            }
        }
    }
}
