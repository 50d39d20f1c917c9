//! Clients of an echo service, in the network of a machine, for as long as this lives: new connections without a pause, and, if
//! wanted, one that lasts. Counts, and says what failed; judges nothing.

use super::Machine;
use anyhow::{Context as _, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::Duration;

/// Between two connections.
const PAUSE: Duration = Duration::from_millis(5);
/// An echo takes no longer, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is sent.
const WORDS: [u8; 64] = [b'e'; 64];

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// New connections that were echoed to.
    pub served: u64,
    /// Why others were not made.
    pub refused: Vec<String>,
    /// Why others, which were made, were not echoed to.
    pub broken: Vec<String>,
    /// Why the one that lasts ended.
    pub cut: Option<String>,
}

/// The clients.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<Outcome>>,
}

impl Traffic {
    /// Begins; returns when the first connection was served.
    ///
    /// # Errors
    /// The machine is not up, or nothing was served in time.
    pub fn begin(machine: &Machine, to: SocketAddr) -> anyhow::Result<Self> {
        Self::with(machine, to, true)
    }

    /// Begins without a connection that lasts.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn of_short_connections(machine: &Machine, to: SocketAddr) -> anyhow::Result<Self> {
        Self::with(machine, to, false)
    }

    fn with(machine: &Machine, to: SocketAddr, one_lasts: bool) -> anyhow::Result<Self> {
        let network = File::open(format!("/proc/{}/ns/net", machine.init()?))?;
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (stop, served) = (stop.clone(), served.clone());
            move || {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(clients(to, one_lasts, &stop, &served))
            }
        });
        let traffic = Self { stop, served, thread };
        let before = traffic.served();
        machine
            .wait_until("the first connection is served", PATIENCE, || Ok((traffic.served() > before).then_some(())))?;
        Ok(traffic)
    }

    /// How many new connections were served so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Ends; gives what came of it.
    ///
    /// # Errors
    /// The clients could not work at all.
    pub fn end(self) -> anyhow::Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().map_err(|_| anyhow!("the clients panicked"))?;
        ended.context("entering the network of the machine")
    }
}

fn clients(to: SocketAddr, one_lasts: bool, stop: &AtomicBool, served: &AtomicU64) -> Outcome {
    let mut outcome = Outcome::default();
    let mut lasting = one_lasts.then(|| connect(to));
    while !stop.load(Ordering::Relaxed) {
        match connect(to).map(|mut stream| echo(&mut stream)) {
            Ok(Ok(())) => {
                outcome.served += 1;
                served.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Err(error)) => outcome.broken.push(error.to_string()),
            Err(error) => outcome.refused.push(error.to_string()),
        }
        if let Some(connected) = &mut lasting {
            let echoed = match connected {
                Ok(stream) => echo(stream),
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            };
            if let Err(error) = echoed {
                outcome.cut = Some(error.to_string());
                lasting = None;
            }
        }
        sleep(PAUSE);
    }
    outcome
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn echo(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(&WORDS)?;
    let mut back = [0; WORDS.len()];
    stream.read_exact(&mut back)?;
    if back == WORDS { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
