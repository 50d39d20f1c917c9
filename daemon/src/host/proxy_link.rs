//! The proxy process seen from the control process: requests over its Unix socket, and its start on hosts where nobody
//! else starts it. What is in the snapshots and reports is core's.
//!
//! Every call has a connection of its own: there is nothing to keep in step, and a proxy that was restarted is the same to
//! the next call.

pub mod left_behind;

use super::{Outcome, ProxyLink};
use crate::child_environment;
use crate::systemd_bus::{JobError, SystemdBus, Verb};
use enclaved_core::failure::Failure;
use enclaved_core::routes::{LinkReply, LinkRequest, ProxyReport, Routes, limits};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long a report may take.
const REPORT: Duration = Duration::from_secs(5);
/// How long applying a snapshot may take: every listener is opened, or fails to.
const PUBLISH: Duration = Duration::from_secs(30);
/// How long the proxy may be late with the answer to a watch.
const WATCH_SLACK: Duration = Duration::from_secs(5);
/// How long a proxy that was started may take to answer.
const START: Duration = Duration::from_secs(10);
/// How long systemd may take to start its unit.
const START_UNIT: Duration = Duration::from_secs(15);
/// The proxy's unit.
const UNIT: &str = "enclaved-proxy.service";
/// Pause between two tries to reach one that is not there.
const RETRY: Duration = Duration::from_millis(100);
/// The proxy's exit status when another one runs on the same folder. No other failure has it.
pub const ALREADY_RUNS: u8 = 76;

/// Where the proxy is, and how it is started.
#[derive(Debug, Clone)]
pub struct LinkSettings {
    /// The link's socket.
    pub socket: PathBuf,
    /// How it is started.
    pub start: ProxyStart,
}

/// How a proxy that does not answer is started.
#[derive(Debug, Clone)]
pub enum ProxyStart {
    /// As a process of its own, which outlives this one.
    Spawn {
        /// The executable: this one.
        program: PathBuf,
        /// The proxy's own folder.
        state_dir: PathBuf,
    },
    /// By systemd, which knows where its socket and its folder are.
    Unit(SystemdBus),
}

/// The link to the proxy process.
#[derive(Debug)]
pub struct Link {
    settings: LinkSettings,
    /// What the last observation saw: process and sequence number. None if it saw no proxy.
    seen: Mutex<Option<(u32, u64)>>,
    /// Waits for proxies that are children of this process. Ends with it; the proxy goes on.
    tasks: Mutex<JoinSet<()>>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("could not connect")]
    Connect(#[source] io::Error),
    #[error("the connection broke off")]
    Broken(#[source] io::Error),
    #[error("the connection was closed before the answer was complete")]
    Closed,
    #[error("it did not answer within {0:?}")]
    Late(Duration),
    #[error("the request is {0} bytes long, {max} at most are allowed", max = limits::LINK_LINE_BYTES)]
    TooLong(usize),
    #[error("its answer is longer than {max} bytes", max = limits::LINK_LINE_BYTES)]
    AnswerTooLong,
    #[error("its answer is not understood")]
    Malformed(#[source] serde_json::Error),
    #[error("it refused: {0}")]
    Refused(String),
}

impl Link {
    /// The link of that proxy. Nothing is opened or started yet.
    pub fn new(settings: LinkSettings) -> Self {
        Self { settings, seen: Mutex::new(None), tasks: Mutex::default() }
    }

    fn seen(&self) -> MutexGuard<'_, Option<(u32, u64)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self, doing: &str, error: &LinkError) -> Failure {
        let socket = self.settings.socket.display();
        let text = Failure::from_error(error).message;
        let failure = Failure::new(format!("{doing}: the proxy at {socket}: {text}"));
        match error {
            LinkError::Connect(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                failure.with_remedy("check owner and permissions of the socket and its folder")
            }
            LinkError::Malformed(_) => {
                failure.with_remedy("control process and proxy are of different versions: restart the older one")
            }
            // As serde says it of what a later version knows.
            LinkError::Refused(reason) if reason.contains("unknown field") || reason.contains("unknown variant") => {
                failure.with_remedy(
                    "the proxy is of an earlier version than the control process: `systemctl restart enclaved-proxy`, \
                     or end it where it has no unit",
                )
            }
            _ => failure,
        }
    }

    async fn ask(&self, request: &LinkRequest, patience: Duration) -> Result<ProxyReport, LinkError> {
        ask(&self.settings.socket, request, patience).await
    }

    /// Starts a proxy and gives what it exits with, should it exit. It is not a child to be ended with this process: it
    /// has a session of its own, and goes on.
    fn spawn(&self, program: &Path, state_dir: &Path) -> Outcome<oneshot::Receiver<io::Result<ExitStatus>>> {
        let mut command = Command::new(program);
        child_environment::only_harmless(command.as_std_mut());
        let mut child = command
            .arg("proxy")
            .arg("--state-dir")
            .arg(state_dir)
            .arg("--link")
            .arg(&self.settings.socket)
            .arg("--own-session")
            .stdin(Stdio::null())
            // Its standard output is this one's: the access log, if it is to go there.
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| {
                Failure::new(format!("could not start the proxy process ({}): {error}", program.display()))
            })?;
        tracing::info!("started the proxy process {}", child.id().unwrap_or_default());
        let (sender, exited) = oneshot::channel();
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let status = child.wait().await;
            if let Ok(status) = &status {
                tracing::warn!("the proxy process ended with {status}");
            }
            // Nobody listens any more once it has answered.
            drop(sender.send(status));
        });
        Ok(exited)
    }

    /// Has systemd start it, and waits until it answers.
    async fn start_unit(&self, bus: &SystemdBus) -> Outcome<()> {
        tracing::info!("having systemd start {UNIT}");
        // One that runs is left alone by this.
        bus.run_job(Verb::Start, UNIT, START_UNIT).await.map_err(JobError::into_failure)?;
        if timeout(START, self.answers()).await.is_ok() {
            return Ok(());
        }
        let socket = self.settings.socket.display();
        Err(Failure::new(format!("{UNIT} runs, and the proxy does not answer at {socket} within {START:?}"))
            .with_remedy(format!(
                "is proxy_socket in [host] the one that `systemctl cat {UNIT}` shows? `journalctl -u {UNIT}` says what it does"
            )))
    }

    /// Returns when it answers.
    async fn answers(&self) {
        while self.ask(&LinkRequest::Report, REPORT).await.is_err() {
            sleep(RETRY).await;
        }
    }

    /// Returns when a report differs from what was seen, or no report is to be had.
    async fn differs(&self, seen: (u32, u64)) -> Result<(), LinkError> {
        let mut connection =
            timeout(REPORT, Connection::open(&self.settings.socket)).await.unwrap_or(Err(LinkError::Late(REPORT)))?;
        // A proxy that was restarted meanwhile may have come to the same number: the first look is at once.
        let mut request = LinkRequest::Report;
        let mut patience = REPORT;
        loop {
            let report = timeout(patience, connection.ask(&request)).await.unwrap_or(Err(LinkError::Late(patience)))?;
            if (report.pid, report.sequence) != seen {
                return Ok(());
            }
            request = LinkRequest::Watch { seen: seen.1 };
            patience = limits::WATCH + WATCH_SLACK;
        }
    }
}

impl ProxyLink for Link {
    async fn observe(&self) -> Outcome<ProxyReport> {
        let answer = self.ask(&LinkRequest::Report, REPORT).await;
        *self.seen() = answer.as_ref().ok().map(|report| (report.pid, report.sequence));
        answer.map_err(|error| self.failure("could not learn the state of the proxy", &error))
    }

    async fn start(&self) -> Outcome<()> {
        if self.ask(&LinkRequest::Report, REPORT).await.is_ok() {
            return Ok(());
        }
        let (program, state_dir) = match &self.settings.start {
            ProxyStart::Spawn { program, state_dir } => (program, state_dir),
            ProxyStart::Unit(bus) => return self.start_unit(bus).await,
        };
        let mut exited = self.spawn(program, state_dir)?;
        let answers = async {
            tokio::select! {
                // Cancel-safe: every try begins anew.
                () = self.answers() => Ok(()),
                // Cancel-safe: a status that was not taken stays in the channel.
                status = &mut exited => match status {
                    // One that lost the race for the folder: the one that won will answer.
                    Ok(Ok(status)) if status.code() == Some(i32::from(ALREADY_RUNS)) => {
                        self.answers().await;
                        Ok(())
                    }
                    Ok(Ok(status)) => Err(format!("it ended with {status}")),
                    Ok(Err(error)) => Err(format!("it could not be waited for: {error}")),
                    Err(_) => Err("waiting for it was cut off".to_owned()),
                },
            }
        };
        let why = match timeout(START, answers).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => why,
            Err(_) => format!(
                "it runs, or another one does, and did not answer at {} within {START:?}",
                self.settings.socket.display()
            ),
        };
        Err(Failure::new(format!("the proxy process did not start: {why}"))
            .with_remedy("its own messages, on the standard error of this process, say why"))
    }

    async fn publish(&self, routes: &Routes) -> Outcome<()> {
        let doing = format!("could not publish routes {}", routes.revision());
        let request = LinkRequest::Publish { routes: routes.clone() };
        let report = self.ask(&request, PUBLISH).await.map_err(|error| self.failure(&doing, &error))?;
        let revision = routes.revision();
        if report.revision == Some(revision) {
            return Ok(());
        }
        let serves = report.revision.map_or_else(|| "nothing".to_owned(), |revision| revision.to_string());
        Err(Failure::new(format!("{doing}: the proxy took them and serves {serves}")))
    }

    async fn changed(&self) {
        let seen = *self.seen();
        match seen {
            Some(seen) => {
                // Whether it differs or can't be reached any more: either way there is something new to be seen.
                if let Err(error) = self.differs(seen).await {
                    tracing::debug!("the proxy is not to be seen any more: {error}");
                }
            }
            // That there is none is known: the news is one that answers.
            None => {
                sleep(RETRY).await;
                self.answers().await;
            }
        }
    }
}

/// One connection: any number of requests, one after the other.
struct Connection {
    stream: BufReader<UnixStream>,
}

/// Asks once.
async fn ask(socket: &Path, request: &LinkRequest, patience: Duration) -> Result<ProxyReport, LinkError> {
    let asking = async { Connection::open(socket).await?.ask(request).await };
    timeout(patience, asking).await.unwrap_or(Err(LinkError::Late(patience)))
}

impl Connection {
    async fn open(socket: &Path) -> Result<Self, LinkError> {
        let stream = UnixStream::connect(socket).await.map_err(LinkError::Connect)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    async fn ask(&mut self, request: &LinkRequest) -> Result<ProxyReport, LinkError> {
        let mut line = serde_json::to_vec(request).map_err(LinkError::Malformed)?;
        line.push(b'\n');
        if line.len() > limits::LINK_LINE_BYTES {
            return Err(LinkError::TooLong(line.len()));
        }
        self.stream.get_mut().write_all(&line).await.map_err(LinkError::Broken)?;
        let mut answer = Vec::new();
        // One byte more than is allowed tells a line that is too long from one that broke off.
        let limit = u64::try_from(limits::LINK_LINE_BYTES).unwrap_or(u64::MAX).saturating_add(1);
        (&mut self.stream).take(limit).read_until(b'\n', &mut answer).await.map_err(LinkError::Broken)?;
        if answer.last() != Some(&b'\n') {
            let too_long = answer.len() > limits::LINK_LINE_BYTES;
            return Err(if too_long { LinkError::AnswerTooLong } else { LinkError::Closed });
        }
        match serde_json::from_slice(&answer).map_err(LinkError::Malformed)? {
            LinkReply::Report(report) => Ok(report),
            LinkReply::Refused { reason } => Err(LinkError::Refused(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pidfd::Pidfd;
    use crate::procfs;
    use crate::test_support::{until, write_script};
    use enclaved_core::routes::ROUTES_FORMAT;
    use std::future::Future;
    use std::path::Path;
    use std::sync::Arc;
    use tempfile::TempDir;
    use tokio::net::UnixListener;
    use tokio::sync::watch;

    /// A proxy that answers reports with this sequence number, watches when it changes, and a publish with what it was
    /// handed.
    struct Proxy {
        sequence: watch::Sender<u64>,
        tasks: JoinSet<()>,
    }

    impl Proxy {
        fn open(folder: &Path, pid: u32) -> Self {
            let listener = UnixListener::bind(folder.join("proxy.sock")).unwrap();
            let sequence = watch::Sender::new(7);
            let (sender, mut tasks) = (Arc::new(sequence.clone()), JoinSet::new());
            tasks.spawn(async move {
                let mut clients = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    clients.spawn(serve(stream, pid, sender.subscribe()));
                }
            });
            Self { sequence, tasks }
        }
    }

    async fn serve(stream: UnixStream, pid: u32, mut sequence: watch::Receiver<u64>) {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while stream.read_line(&mut line).await.is_ok_and(|length| length > 0) {
            let mut report = ProxyReport { pid, ..ProxyReport::default() };
            match serde_json::from_str(&line).unwrap() {
                LinkRequest::Report => {}
                LinkRequest::Watch { seen } => {
                    let news = sequence.wait_for(|sequence| *sequence != seen);
                    drop(timeout(limits::WATCH, news).await);
                }
                LinkRequest::Publish { routes } => report.revision = Some(routes.revision()),
            }
            report.sequence = *sequence.borrow();
            stream.write_all(&self::line(&LinkReply::Report(report))).await.unwrap();
            line.clear();
        }
    }

    fn line(reply: &LinkReply) -> Vec<u8> {
        let mut line = serde_json::to_vec(reply).unwrap();
        line.push(b'\n');
        line
    }

    /// Answers every line with these bytes, then hangs up.
    fn answering(folder: &Path, answer: Vec<u8>) -> JoinSet<()> {
        let listener = UnixListener::bind(folder.join("proxy.sock")).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mut stream = BufReader::new(stream);
                stream.read_line(&mut String::new()).await.unwrap();
                // A client that has read enough hangs up first.
                let _gone = stream.write_all(&answer).await;
            }
        });
        tasks
    }

    fn link(folder: &TempDir) -> Link {
        Link::new(LinkSettings {
            socket: folder.path().join("proxy.sock"),
            start: ProxyStart::Spawn {
                program: folder.path().join("enclaved"),
                state_dir: folder.path().join("state"),
            },
        })
    }

    fn routes() -> Routes {
        Routes { format: ROUTES_FORMAT, ..Routes::default() }
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(20), future).await.unwrap()
    }

    #[tokio::test]
    async fn a_report_and_a_snapshot_go_over_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let _proxy = Proxy::open(folder.path(), 42);
        let link = link(&folder);
        let report = link.observe().await.unwrap();
        assert_eq!((report.pid, report.sequence), (42, 7));
        link.publish(&routes()).await.unwrap();
    }

    #[tokio::test]
    async fn a_proxy_that_is_not_there_refuses_or_talks_nonsense_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let link = link(&folder);
        let failure = link.observe().await.unwrap_err();
        assert!(failure.message.contains("proxy.sock: could not connect: No such file"), "{failure}");
        let long = [&vec![b'x'; limits::LINK_LINE_BYTES + 10][..], b"\n"].concat();
        for (answer, expected) in [
            (&line(&LinkReply::Refused { reason: "format 9".to_owned() })[..], "it refused: format 9"),
            (b"{\"report\":{\"sequ", "closed before the answer was complete"),
            (b"", "closed before the answer was complete"),
            (b"hello\n", "its answer is not understood"),
            (&long, "its answer is longer than"),
        ] {
            let proxy = answering(folder.path(), answer.to_vec());
            let failure = link.publish(&routes()).await.unwrap_err();
            assert!(failure.message.contains(expected), "{failure}");
            assert!(failure.message.contains(&format!("routes {}", routes().revision())), "{failure}");
            drop(proxy);
            std::fs::remove_file(folder.path().join("proxy.sock")).unwrap();
        }
    }

    #[tokio::test]
    async fn an_earlier_proxy_that_does_not_know_a_setting_is_told_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let unknown =
            "not a request: unknown field `access_log`, expected one of `format`, `vsock` at line 1 column 80";
        let _proxy = answering(folder.path(), line(&LinkReply::Refused { reason: unknown.to_owned() }));
        let failure = link(&folder).publish(&routes()).await.unwrap_err();
        assert!(failure.remedy.unwrap().contains("systemctl restart enclaved-proxy"));
    }

    #[tokio::test]
    async fn routes_that_the_proxy_does_not_serve_are_not_published() {
        let folder = tempfile::tempdir().unwrap();
        let _proxy = answering(folder.path(), line(&LinkReply::Report(ProxyReport::default())));
        let failure = link(&folder).publish(&routes()).await.unwrap_err();
        assert!(failure.message.contains("serves nothing"), "{failure}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_keeps_silent_is_given_up_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(folder.path().join("proxy.sock")).unwrap();
        let failure = link(&folder).observe().await.unwrap_err();
        assert!(failure.message.contains("did not answer within 5s"), "{failure}");
    }

    #[tokio::test]
    async fn a_change_is_noticed_and_one_before_the_wait_is_not_missed() {
        let folder = tempfile::tempdir().unwrap();
        let proxy = Proxy::open(folder.path(), 42);
        let link = link(&folder);
        link.observe().await.unwrap();
        proxy.sequence.send_replace(8);
        soon(link.changed()).await;
        link.observe().await.unwrap();
        let changed = async {
            link.changed().await;
            *proxy.sequence.borrow()
        };
        let change = async {
            until("the proxy is being watched", || proxy.sequence.receiver_count() > 0).await;
            proxy.sequence.send_replace(9);
        };
        let (seen, ()) = soon(async { tokio::join!(changed, change) }).await;
        assert_eq!(seen, 9);
    }

    #[tokio::test]
    async fn a_proxy_that_ends_and_one_that_takes_its_place_are_changes() {
        let folder = tempfile::tempdir().unwrap();
        let proxy = Proxy::open(folder.path(), 42);
        let link = link(&folder);
        link.observe().await.unwrap();
        drop(proxy.tasks);
        soon(link.changed()).await;
        std::fs::remove_file(folder.path().join("proxy.sock")).unwrap();

        // The next one has come to the same sequence number.
        let _proxy = Proxy::open(folder.path(), 43);
        soon(link.changed()).await;
        link.observe().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn that_there_is_no_proxy_is_not_news_again_and_again() {
        let folder = tempfile::tempdir().unwrap();
        let link = link(&folder);
        link.observe().await.unwrap_err();
        timeout(Duration::from_secs(3600), link.changed()).await.unwrap_err();
    }

    /// Writes `enclaved`; `$d` is the folder, and its calls are in `calls`.
    fn program(folder: &TempDir, body: &str) {
        let d = folder.path().display();
        write_script(
            &folder.path().join("enclaved"),
            &format!("d={d}\necho \"$*\" >> $d/calls\necho $$ > $d/pid\n{body}"),
        );
    }

    #[tokio::test]
    async fn a_proxy_is_started_with_its_folder_and_socket_and_goes_on_without_us() {
        let folder = tempfile::tempdir().unwrap();
        program(&folder, "exec sleep 600");
        let link = link(&folder);
        let started = async {
            until("the proxy was started", || folder.path().join("pid").exists()).await;
            Proxy::open(folder.path(), 42)
        };
        let (result, proxy) = soon(async { tokio::join!(link.start(), started) }).await;
        result.unwrap();
        link.start().await.unwrap();
        let d = folder.path().display();
        let calls = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        assert_eq!(calls, format!("proxy --state-dir {d}/state --link {d}/proxy.sock --own-session\n"));

        drop((link, proxy));
        let pid = std::fs::read_to_string(folder.path().join("pid")).unwrap().trim().parse().unwrap();
        let process = procfs::process(pid).unwrap().unwrap();
        Pidfd::open(process.identity).unwrap().unwrap().send(rustix::process::Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn a_proxy_that_ends_at_once_is_told_with_its_status() {
        let folder = tempfile::tempdir().unwrap();
        for status in [75, 78] {
            program(&folder, &format!("exit {status}"));
            let failure = soon(link(&folder).start()).await.unwrap_err();
            assert!(failure.message.contains(&format!("it ended with exit status: {status}")), "{failure}");
        }
        let missing = tempfile::tempdir().unwrap();
        let failure = link(&missing).start().await.unwrap_err();
        assert!(failure.message.contains("could not start the proxy process"), "{failure}");
    }

    #[tokio::test]
    async fn one_that_finds_another_running_leaves_the_start_to_that_one() {
        let folder = tempfile::tempdir().unwrap();
        program(&folder, "exit 76");
        let link = link(&folder);
        let other = async {
            until("the second proxy gave way", || folder.path().join("pid").exists()).await;
            Proxy::open(folder.path(), 42)
        };
        let (result, _proxy) = soon(async { tokio::join!(link.start(), other) }).await;
        result.unwrap();
    }
}
