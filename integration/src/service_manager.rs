//! A service manager for one service: starts its process with the sockets that it keeps for it, hears what it is told on a
//! notify socket, and starts it again. What systemd does with a `Type=notify` unit that has `FileDescriptorStoreMax=`, and
//! no more of it.

use anyhow::Context as _;
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No wait for the service is longer.
const DEADLINE: Duration = Duration::from_secs(20);

/// Descriptors on their way to a process have numbers from here on: above all that it finds its own under.
const HIGH: i32 = 200;

/// Between clearing close-on-exec and setting it again, no other process may be started by this one.
static SPAWNING: Mutex<()> = Mutex::new(());

/// The service manager.
#[derive(Debug)]
pub struct ServiceManager {
    command: Vec<OsString>,
    environment: Vec<(String, String)>,
    notify: PathBuf,
    state: Arc<State>,
    process: Option<Child>,
    ear: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    /// What was said since the process was started, line by line.
    lines: Vec<String>,
    kept: Vec<(String, OwnedFd)>,
    end: bool,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServiceManager {
    /// A service that is not started yet; its notify socket is made in this folder.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub fn new(folder: &Path, command: Vec<OsString>) -> anyhow::Result<Self> {
        let notify = folder.join("notify");
        let socket = UnixDatagram::bind(&notify).with_context(|| format!("binding {}", notify.display()))?;
        let state = Arc::new(State::default());
        let heard = state.clone();
        let ear = std::thread::spawn(move || while hear(&socket, &heard).is_some() {});
        Ok(Self { command, environment: Vec::new(), notify, state, process: None, ear: Some(ear) })
    }

    /// As `WatchdogSec=`.
    pub fn set_watchdog(&mut self, period: Duration) {
        self.environment.push(("WATCHDOG_USEC".to_owned(), period.as_micros().to_string()));
    }

    /// Puts a descriptor into the store, as if a former process had.
    pub fn keep(&self, name: &str, descriptor: OwnedFd) {
        self.state.lock().kept.push((name.to_owned(), descriptor));
    }

    /// The names of what it keeps.
    pub fn kept(&self) -> Vec<String> {
        self.state.lock().kept.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Starts the process and waits until it is ready.
    ///
    /// # Errors
    /// When it can't be started, or is not ready in time.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let mut heard = self.state.lock();
        heard.lines.clear();
        let spawning = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        let passed =
            heard.kept.iter().map(|(_, kept)| fcntl_dupfd_cloexec(kept, HIGH)).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<_> = heard.kept.iter().map(|(name, _)| name.as_str()).collect();
        // The shell puts each where it belongs, and is the process that its LISTEN_PID names.
        let mut script = String::new();
        for (descriptor, place) in passed.iter().zip(3..) {
            let number = std::os::fd::AsRawFd::as_raw_fd(descriptor);
            script.push_str(&format!("exec {place}<&{number} {number}<&-\n"));
            fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        script.push_str("export LISTEN_PID=$$\nexec \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]).args(&self.command).stdin(Stdio::null());
        command.env("NOTIFY_SOCKET", &self.notify).envs(self.environment.iter().cloned());
        if !passed.is_empty() {
            command.env("LISTEN_FDS", passed.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        let process = command.spawn().context("starting the service");
        for descriptor in &passed {
            fcntl_setfd(descriptor, FdFlags::CLOEXEC)?;
        }
        drop((spawning, passed, heard));
        self.process = Some(process?);
        self.wait_until("the service is ready", |lines, _| lines.iter().any(|line| line == "READY=1"))
    }

    /// Waits until what was said since the start, and the names of what is kept, are so.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn wait_until(&self, what: &str, holds: impl Fn(&[String], &[&str]) -> bool) -> anyhow::Result<()> {
        let end = Instant::now() + DEADLINE;
        let mut heard = self.state.lock();
        loop {
            let kept: Vec<_> = heard.kept.iter().map(|(name, _)| name.as_str()).collect();
            if holds(&heard.lines, &kept) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                anyhow::bail!("not so after {DEADLINE:?}: {what}; kept {kept:?}; heard {:?}", heard.lines);
            }
            heard = self.state.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends the process a signal and waits for its end.
    ///
    /// # Errors
    /// When it does not run, or does not end in time.
    pub fn end(&mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        let mut process = self.process.take().context("the service does not run")?;
        crate::processes::signal(process.id(), signal)?;
        let end = Instant::now() + DEADLINE;
        while Instant::now() < end {
            if let Some(status) = process.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.process = Some(process);
        anyhow::bail!("the service did not end within {DEADLINE:?}")
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            let _ignored = process.kill();
            let _ignored = process.wait();
        }
        self.state.lock().end = true;
        // Wakes the one who listens.
        let _ignored = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"END=1", &self.notify));
        if let Some(ear) = self.ear.take() {
            let _ignored = ear.join();
        }
    }
}

/// One message; `None` at the end.
fn hear(socket: &UnixDatagram, state: &State) -> Option<()> {
    let mut text = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = {
        let mut parts = [IoSliceMut::new(&mut text)];
        recvmsg(socket.as_fd(), &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes
    };
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors: Vec<_> = descriptors.flatten().collect();
    let text = String::from_utf8_lossy(&text[..length]).into_owned();
    let mut heard = state.lock();
    if heard.end {
        return None;
    }
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
    if text.lines().any(|line| line == "FDSTORE=1") {
        heard.kept.extend(descriptors.into_iter().map(|descriptor| (name.clone(), descriptor)));
    } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
        heard.kept.retain(|(kept, _)| *kept != name);
    }
    // (What came with BARRIER=1 is closed with this.)
    heard.lines.extend(text.lines().map(str::to_owned));
    drop(heard);
    state.changed.notify_all();
    Some(())
}
