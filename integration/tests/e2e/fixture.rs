//! A host for one test: a simulated machine with an image in its bucket, the daemon on it, and ways to look at it from
//! outside. No test's expectations.

use enclaved_core::status::{EnclaveState, EnclaveStatus, Status};
use enclaved_integration::application::Application;
use enclaved_integration::host::{Machine, Options};
use enclaved_integration::nitro_cli::Call;
use enclaved_integration::processes;
use rustix::process::Signal;
use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};

/// Everything on a host happens within this time, also on a machine with much else to do.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// How often is looked at what can't be waited for.
const POLL: Duration = Duration::from_millis(10);

/// Waits until there is something, and gives it.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        sleep(POLL).await;
    }
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The host. If its test fails, it prints what the daemon and its children logged.
pub(crate) struct Host {
    pub(crate) machine: Machine,
    daemon: Cell<u32>,
}

impl Host {
    /// A machine that is off: nothing in its bucket, no configuration, no daemon.
    pub(crate) async fn empty() -> Self {
        Self { machine: Machine::start(Options::default()).await.unwrap(), daemon: Cell::new(0) }
    }

    /// A host whose one enclave, `signer`, serves.
    pub(crate) async fn ready() -> Self {
        let host = Self::with_image().await;
        host.configure(&host.signer());
        host.start();
        host.until_ready().await;
        host
    }

    /// A host with `signer.eif` in its bucket and nothing else.
    pub(crate) async fn with_image() -> Self {
        let host = Self::empty().await;
        host.put("signer.eif", &host.application("v1")).await;
        host
    }

    /// The application that most tests run.
    pub(crate) fn application(&self, label: &str) -> Application {
        self.machine.sample_application(label)
    }

    /// Puts an image into the bucket; gives its PCR0.
    pub(crate) async fn put(&self, key: &str, application: &Application) -> String {
        self.machine.put_image(key, application).await.unwrap().registers["PCR0"].clone()
    }

    /// The configuration of the enclave `signer`.
    pub(crate) fn signer(&self) -> String {
        self.machine.sample_enclave("signer", "signer.eif")
    }

    /// Writes a configuration with these enclaves.
    pub(crate) fn configure(&self, enclaves: &str) {
        self.machine.write_config(&(self.machine.host_config() + enclaves)).unwrap();
    }

    /// Starts the daemon.
    pub(crate) fn start(&self) -> u32 {
        self.started(self.machine.start_daemon().unwrap())
    }

    /// From now on that process is the daemon.
    pub(crate) fn started(&self, pid: u32) -> u32 {
        self.daemon.set(pid);
        pid
    }

    /// The process of the daemon that was started last.
    pub(crate) fn daemon(&self) -> u32 {
        self.daemon.get()
    }

    /// Kills the daemon with SIGKILL; returns when it is gone.
    pub(crate) fn kill_daemon(&self) {
        self.machine.signal(self.daemon(), Signal::KILL).unwrap();
        assert!(self.machine.wait_for_end(self.daemon(), DEADLINE).unwrap().is_some());
    }

    /// Has the daemon read its configuration again, as `systemctl reload` does.
    pub(crate) fn hang_up(&self) {
        self.machine.signal(self.daemon(), Signal::HUP).unwrap();
    }

    /// What the daemon answers to a GET on its admin socket; none if nobody answers.
    async fn ask(&self, path: &str) -> Option<(u16, String)> {
        get(UnixStream::connect(self.machine.run_dir().join("admin.sock")).await.ok()?, path).await
    }

    /// What the daemon answers to a GET on the address of its metrics; none if nobody answers.
    pub(crate) async fn ask_publicly(&self, path: &str) -> Option<(u16, String)> {
        get(TcpStream::connect(self.machine.metrics()).await.ok()?, path).await
    }

    /// The status, if the daemon tells one.
    pub(crate) async fn status(&self) -> Option<Status> {
        let (code, body) = self.ask("/v1/status").await?;
        (code == 200).then(|| serde_json::from_str(&body).unwrap())
    }

    /// Waits for a status like that.
    pub(crate) async fn until(&self, what: &str, like: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let status = self.status().await;
            match status {
                Some(status) if like(&status) => return status,
                last if Instant::now() > deadline => panic!("not within {DEADLINE:?}: {what}; last: {last:#?}"),
                Some(_) | None => sleep(POLL).await,
            }
        }
    }

    /// Waits until all is ready.
    pub(crate) async fn until_ready(&self) -> Status {
        self.until("all is ready", |status| status.ready && !status.enclaves.is_empty()).await
    }

    /// Waits for a status of `signer` like that.
    pub(crate) async fn until_signer(&self, what: &str, like: impl Fn(&EnclaveStatus) -> bool) -> EnclaveStatus {
        let status = self.until(what, |status| status.enclaves.iter().any(|e| e.name.as_str() == "signer" && like(e)));
        of(&status.await, "signer").clone()
    }

    /// Waits until `signer` is in that state.
    pub(crate) async fn until_signer_is(&self, state: EnclaveState) -> EnclaveStatus {
        self.until_signer(&format!("signer is {}", state.as_str()), |signer| signer.state == state).await
    }

    /// Runs `enclavectl` with the machine's configuration.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Said {
        let mut command = self.machine.command("enclavectl").unwrap();
        let output = command.arg("--config").arg(self.machine.config_file()).args(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Said { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Runs `enclavectl`, which must succeed; gives what it printed.
    pub(crate) fn ctl_ok(&self, arguments: &[&str]) -> String {
        let said = self.ctl(arguments);
        assert_eq!(said.code, Some(0), "enclavectl {arguments:?}: {said:?}");
        said.stdout
    }

    /// The launches that nitro-cli was asked for.
    pub(crate) fn launches(&self) -> Vec<Call> {
        self.machine.nitro.calls().unwrap().into_iter().filter(|call| call.command() == "run-enclave").collect()
    }

    /// The lines of the log with that text.
    pub(crate) fn log_lines(&self, text: &str) -> Vec<String> {
        self.machine.log().lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }

    /// The proxy's root certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.machine.proxy_state_dir().join("ca/root.crt")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of the daemon and its children\n{}----", self.machine.log());
            eprintln!("nitro-cli: {:#?}", self.machine.nitro.calls());
        }
    }
}

/// A GET; none if the connection broke off before the answer was complete.
async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> Option<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let exchange = async {
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        assert_eq!(length, body.len().to_string());
        Some((head.split(' ').nth(1)?.parse().unwrap(), body.to_owned()))
    };
    timeout(DEADLINE, exchange).await.unwrap()
}

/// One enclave of a status.
pub(crate) fn of<'a>(status: &'a Status, name: &str) -> &'a EnclaveStatus {
    status.enclaves.iter().find(|enclave| enclave.name.as_str() == name).unwrap()
}

/// Kills a process with SIGKILL.
pub(crate) fn kill(pid: u32) {
    processes::signal(pid, Signal::KILL).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_leaves_no_process_and_no_file_behind_even_if_its_daemon_was_killed() {
    let host = Host::ready().await;
    let folder = host.machine.path().to_owned();
    // Daemon, proxy, nitro-cli's background process and the enclave in it.
    assert!(processes::carrying(&folder).len() >= 4);
    host.kill_daemon();
    drop(host);
    assert_eq!(processes::carrying(&folder), [] as [i32; 0]);
    assert!(!folder.exists());
}
