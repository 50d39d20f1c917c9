//! Applications in enclaves that call out again and again, over the hybrid transport, for as long as this lives. Counts, and says
//! what failed; judges nothing.
//!
//! The listening socket of an egress endpoint is `<cid>.sock_<port>`: it belongs to a generation, as the CID does, and a successor
//! has another. So a connection is refused if an enclave that lives can't make it. Whether one lives is asked of its own socket,
//! `<cid>.sock`; what an enclave loses with its own end is nobody's loss.

use anyhow::anyhow;
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::Duration;

/// Between two rounds of calls.
const PAUSE: Duration = Duration::from_millis(5);
/// An answer takes no longer, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(10);
/// An enclave that is being ended is gone within this.
const LAST_BREATH: Duration = Duration::from_secs(1);
const REQUEST: &[u8] = b"GET /guest HTTP/1.1\r\nhost: upstream.test\r\nconnection: close\r\n\r\n";

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Connections over which the upstream answered.
    pub served: u64,
    /// Why others were not made.
    pub refused: Vec<String>,
    /// Why others, which were made, had no answer.
    pub broken: Vec<String>,
    /// Of which enclaves.
    pub cids: BTreeSet<u32>,
}

/// The applications.
#[derive(Debug)]
pub struct Guests {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<Outcome>,
}

impl Guests {
    /// Begins: every enclave whose socket is in that folder calls the HTTP server behind that vsock port.
    pub fn begin(folder: PathBuf, port: u32) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (stop, served) = (stop.clone(), served.clone());
            move || calls(&folder, port, &stop, &served)
        });
        Self { stop, served, thread }
    }

    /// How many calls were answered so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Ends; gives what came of it.
    ///
    /// # Errors
    /// A defect.
    pub fn end(self) -> anyhow::Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the applications panicked"))
    }
}

fn calls(folder: &Path, port: u32, stop: &AtomicBool, served: &AtomicU64) -> Outcome {
    let mut outcome = Outcome::default();
    while !stop.load(Ordering::Relaxed) {
        for cid in cids(folder) {
            let connected = UnixStream::connect(folder.join(format!("{cid}.sock_{port}")));
            let (failures, error) = match connected.map(call) {
                Ok(Ok(())) => {
                    outcome.served += 1;
                    outcome.cids.insert(cid);
                    served.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Ok(Err(error)) => (&mut outcome.broken, error),
                Err(error) => (&mut outcome.refused, error),
            };
            if lives_on(folder, cid) {
                failures.push(format!("CID {cid}: {error}"));
            }
        }
        sleep(PAUSE);
    }
    outcome
}

/// The enclaves that have a socket.
fn cids(folder: &Path) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".sock")?.parse().ok()).collect()
}

/// Whether it is neither gone nor about to be.
fn lives_on(folder: &Path, cid: u32) -> bool {
    (0..10).all(|_| {
        sleep(LAST_BREATH / 10);
        UnixStream::connect(folder.join(format!("{cid}.sock"))).is_ok()
    })
}

fn call(mut stream: UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(REQUEST)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 200 ") {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("{:?}", String::from_utf8_lossy(&answer))))
}
