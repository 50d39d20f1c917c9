//! The link: how the control process hands snapshots over and asks for reports. A Unix socket, a JSON document a line each
//! way, several clients at a time. Nothing that comes in here can end the proxy.

use crate::error_text::chain;
use crate::manager::{Kept, Manager};
use crate::plane::Plane;
use crate::shared::Shared;
use crate::unix_socket::{BindError, BoundSocket};
use enclaved_core::routes::{LinkReply, LinkRequest, limits};
use rustix::fd::AsFd;
use rustix::fs::Mode;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// The name under which the service manager keeps the socket.
pub(crate) const NAME: &str = "link";

/// Clients at a time; more are told so.
const CLIENTS: usize = 32;

/// How long a client may take to send the rest of a line it began, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The group of the socket's directory may connect, others may not.
const MODE: Mode = Mode::from_bits_retain(0o660);

/// The link, opened.
#[derive(Debug)]
pub(crate) struct Link {
    socket: BoundSocket,
    /// Whether the service manager has it, too, if there is one.
    kept: bool,
    clients: Arc<Semaphore>,
}

impl Link {
    /// Takes over the one that the service manager kept, or opens it.
    pub(crate) async fn open(path: &Path, manager: &Manager, kept: Option<Kept>) -> Result<Self, BindError> {
        let clients = Arc::new(Semaphore::new(CLIENTS));
        let link = match Self::adopt(path, manager, kept).await {
            Some(socket) => Self { socket, kept: true, clients },
            None => {
                let mut link = Self { socket: BoundSocket::bind(path, Some(MODE)).await?, kept: false, clients };
                link.store(manager).await;
                link
            }
        };
        tracing::info!(path = %path.display(), "the link is open");
        Ok(link)
    }

    async fn adopt(path: &Path, manager: &Manager, kept: Option<Kept>) -> Option<BoundSocket> {
        let Kept { mark, socket } = kept?;
        match BoundSocket::adopt(path, socket, &mark) {
            Ok(socket) => Some(socket),
            Err(unusable) => {
                tracing::warn!(error = chain(&unusable), "the link that the service manager kept is of no use");
                manager.forget(NAME, &mark).await;
                None
            }
        }
    }

    /// Has the service manager, if there is one, keep it from now on.
    async fn store(&mut self, manager: &Manager) {
        if !manager.is_there() {
            self.kept = true;
        } else if let Err(error) = manager.store(NAME, &self.socket.mark(), self.socket.as_fd()).await {
            tracing::warn!(%error, "the service manager could not be handed the link, which a restart would close; trying again every few seconds");
        } else {
            self.socket.set_kept();
            self.kept = true;
        }
    }

    /// As [`Self::open`], until it succeeds.
    async fn open_eventually(path: &Path, shared: &Shared) -> Self {
        loop {
            sleep(shared.limits.retry).await;
            if let Ok(link) = Self::open(path, &shared.manager, None).await {
                return link;
            }
        }
    }

    /// Serves clients until dropped.
    pub(crate) async fn serve(mut self, plane: Arc<Plane>, shared: Arc<Shared>) {
        let mut retries = interval(shared.limits.retry);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let client = tokio::select! {
                // Cancel-safe: a client is taken and returned at once.
                client = self.socket.accept() => client,
                // Cancel-safe: a tick that is not taken stays, whatever clients come.
                _ = retries.tick(), if !self.kept => {
                    self.store(&shared.manager).await;
                    continue;
                }
            };
            let client = match client {
                Ok(client) => client,
                Err(error) => {
                    tracing::warn!(%error, "the link could not accept a client");
                    sleep(shared.limits.retry).await;
                    continue;
                }
            };
            let (plane, permit, closing) =
                (plane.clone(), self.clients.clone().try_acquire_owned(), shared.closing.child_token());
            let own = shared.clone();
            shared.spawn(async move {
                let served = async {
                    match permit {
                        Ok(_permit) => serve(client, &plane, &own).await,
                        Err(_) => refuse(client, format!("there are {CLIENTS} clients already")).await,
                    }
                };
                tokio::select! {
                    // Cancel-safe: a token stays cancelled.
                    () = closing.cancelled() => {}
                    // Dropped only where the process ends; a snapshot that is half applied is applied by its successor.
                    result = served => {
                        if let Err(error) = result {
                            tracing::debug!(%error, "a client of the link went away");
                        }
                    }
                }
            });
        }
    }
}

async fn serve(client: UnixStream, plane: &Arc<Plane>, shared: &Arc<Shared>) -> io::Result<()> {
    let (reader, mut writer) = client.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let reply = match read_line(&mut reader).await? {
            Line::End => return Ok(()),
            Line::Refused(reason) => {
                // Where the next line begins is not known.
                return send(&mut writer, &LinkReply::Refused { reason }).await;
            }
            Line::Whole(line) => answer(&line, plane, shared).await,
        };
        send(&mut writer, &reply).await?;
    }
}

async fn answer(line: &[u8], plane: &Arc<Plane>, shared: &Arc<Shared>) -> LinkReply {
    match serde_json::from_slice(line) {
        Ok(LinkRequest::Publish { routes }) => {
            // A task of its own: a client that goes away leaves no snapshot half applied.
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let owned = plane.clone();
            shared.spawn(async move {
                // Nobody may be listening any more.
                drop(sender.send(owned.publish(routes).await));
            });
            match receiver.await {
                Ok(Ok(())) => LinkReply::Report(plane.report().await),
                Ok(Err(invalid)) => refused(invalid.to_string()),
                Err(_) => refused("applying the routes ended by a defect of the proxy".to_owned()),
            }
        }
        Ok(LinkRequest::Report) => LinkReply::Report(plane.report().await),
        Ok(LinkRequest::Watch { seen }) => {
            let mut sequence = shared.counters.sequence();
            // The sender lives as long as the counters; and no change in time is an answer, too.
            drop(timeout(limits::WATCH, sequence.wait_for(|sequence| *sequence != seen)).await);
            LinkReply::Report(plane.report().await)
        }
        Err(error) => refused(format!("not a request: {error}")),
    }
}

fn refused(reason: String) -> LinkReply {
    tracing::warn!(reason, "refused a request on the link");
    LinkReply::Refused { reason }
}

async fn refuse(mut client: UnixStream, reason: String) -> io::Result<()> {
    send(&mut client, &refused(reason)).await
}

async fn send(writer: &mut (impl AsyncWriteExt + Unpin), reply: &LinkReply) -> io::Result<()> {
    let mut text = serde_json::to_vec(reply)?;
    text.push(b'\n');
    timeout(PATIENCE, writer.write_all(&text)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[derive(Debug, PartialEq, Eq)]
enum Line {
    Whole(Vec<u8>),
    Refused(String),
    End,
}

/// The next line, however long it takes to begin; once begun it must come in time, and fit.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Line> {
    if reader.fill_buf().await?.is_empty() {
        return Ok(Line::End);
    }
    let mut line = Vec::new();
    let limit = limits::LINK_LINE_BYTES as u64 + 1;
    match timeout(PATIENCE, reader.take(limit).read_until(b'\n', &mut line)).await {
        Ok(result) => drop(result?),
        Err(_) => return Ok(Line::Refused(format!("the line was not complete after {PATIENCE:?}"))),
    }
    if line.last() == Some(&b'\n') {
        Ok(Line::Whole(line))
    } else if line.len() > limits::LINK_LINE_BYTES {
        Ok(Line::Refused(format!("the line is longer than {} bytes", limits::LINK_LINE_BYTES)))
    } else {
        Ok(Line::Refused("the line broke off".to_owned()))
    }
}

/// Serves the link at this path, also if it cannot be opened yet. Never returns; dropping it closes the socket.
pub(crate) async fn run(opened: Option<Link>, path: &Path, plane: Arc<Plane>, shared: Arc<Shared>) {
    let link = match opened {
        Some(link) => link,
        None => Link::open_eventually(path, &shared).await,
    };
    link.serve(plane, shared).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_that_is_too_long_broken_off_or_too_slow_is_refused() {
        let long = vec![b'x'; limits::LINK_LINE_BYTES + 10];
        let Line::Refused(reason) = read_line(&mut &long[..]).await.unwrap() else { panic!("taken whole") };
        assert!(reason.contains("longer than"), "{reason}");
        assert_eq!(read_line(&mut &b"half"[..]).await.unwrap(), Line::Refused("the line broke off".into()));
        assert_eq!(read_line(&mut &b""[..]).await.unwrap(), Line::End);
        assert_eq!(read_line(&mut &b"\n"[..]).await.unwrap(), Line::Whole(b"\n".to_vec()));
        let (mut near, far) = tokio::io::duplex(64);
        near.write_all(b"half").await.unwrap();
        let Line::Refused(reason) = read_line(&mut BufReader::new(far)).await.unwrap() else { panic!("taken whole") };
        assert!(reason.contains("not complete"), "{reason}");
    }
}
