//! Running nitro-cli: the only place where its arguments, its JSON and its error blocks are known.
//!
//! What it prints is taken as the word of a stranger: bounded, strictly read, compared with what was asked for. It is
//! never killed, whatever the time it takes: a `run-enclave` or a first `describe-enclaves` that is cut off can take a
//! healthy enclave with it. Whoever waits here for long has a task of its own for it.

mod output;
mod report;

pub use output::{Described, Description, Flag, State};

use crate::child_environment;
use crate::procfs;
use enclaved_core::failure::Failure;
use enclaved_core::id::{Cid, MemoryMib, Timestamp};
use enclaved_core::ledger::LaunchRecord;
use output::Run;
use report::Captured;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// Most that is kept of each of its two outputs; what comes after is read and dropped.
const MAX_OUTPUT: usize = 1 << 20;
/// Whoever inherited its outputs and holds them open after its end is not waited for longer than this.
const DRAIN: Duration = Duration::from_secs(2);
/// So many descriptors must be free. nitro-cli takes any failed connection to an enclave's socket for a dead enclave and
/// deletes the socket, which ends the enclave: one that has run out of descriptors kills healthy enclaves.
const SPARE_DESCRIPTORS: u64 = 64;
/// The same for the whole host.
const SPARE_HOST_FILES: u64 = 256;

/// nitro-cli, at a given path.
#[derive(Debug, Clone)]
pub struct NitroCli {
    executable: PathBuf,
}

/// What `run-enclave` is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRequest {
    /// The image file.
    pub image: PathBuf,
    /// The name by which the enclave is found again.
    pub name: String,
    /// Its CID.
    pub cid: Cid,
    /// vCPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: MemoryMib,
    /// Debug mode.
    pub debug: bool,
    /// By this its processes are known: it is put into their environment ([`Mark`]).
    pub mark: Mark,
}

/// What tells the processes that one launch brings about from all others: they inherit it, also those that outlive
/// nitro-cli itself. Unique to the launch: the folder of its traces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark(pub PathBuf);

/// The variable that holds the [`Mark`].
pub(crate) const MARK: &str = "ENCLAVED_LAUNCH";

impl Mark {
    /// Whether any process of that launch lives.
    ///
    /// # Errors
    /// `/proc` can't be listed.
    pub fn is_alive(&self) -> io::Result<bool> {
        procfs::any_has_variable(MARK, self.0.as_os_str())
    }

    /// The process of that PID, which nitro-cli named as the one that owns the launch's enclave; `None` if it is gone.
    ///
    /// # Errors
    /// It can't be looked at, or it is not of this launch.
    pub fn owner(&self, pid: u32) -> Result<Option<procfs::Process>, Failure> {
        let look = |error: io::Error| Failure::new(format!("could not look at the enclave's process {pid}: {error}"));
        let Some(process) = procfs::process(pid).map_err(look)? else { return Ok(None) };
        match procfs::has_variable(pid, MARK, self.0.as_os_str()) {
            Ok(true) => Ok(Some(process)),
            // Unless it ended between the two looks.
            Ok(false) if procfs::process(pid).map_err(look)?.is_none() => Ok(None),
            Ok(false) => Err(Failure::new(format!(
                "nitro-cli says that process {pid} (\"{}\") runs the enclave, but this launch did not start that process",
                process.name.escape_debug()
            ))
            .with_remedy("see what `nitro-cli describe-enclaves` lists, and end what should not run")),
            Err(error) => Err(look(error)),
        }
    }
}

/// A `run-enclave` that did not give a running enclave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunError {
    /// No enclave runs.
    NotRunning(Failure),
    /// An enclave may run: only `describe-enclaves` can tell.
    Unclear(Failure),
}

impl NitroCli {
    /// The nitro-cli at that path; a bare name is looked for in `PATH`.
    pub fn new(executable: impl Into<PathBuf>) -> Self {
        Self { executable: executable.into() }
    }

    /// Launches an enclave, and returns when it has booted (its heartbeat came). `started` is called with the PID of
    /// nitro-cli itself as soon as that runs.
    ///
    /// Not to be dropped before its end: nitro-cli would go on, and its answer would be lost.
    ///
    /// # Errors
    /// See [`RunError`]. An enclave that came up with another name or CID than asked for was terminated, or may run.
    pub async fn run_enclave(
        &self,
        request: &RunRequest,
        started: impl FnOnce(u32) + Send,
    ) -> Result<LaunchRecord, RunError> {
        let mut arguments: Vec<OsString> =
            vec!["run-enclave".into(), "--eif-path".into(), request.image.clone().into()];
        for (option, value) in [
            ("--cpu-count", request.cpus.to_string()),
            ("--memory", request.memory.0.to_string()),
            ("--enclave-cid", request.cid.to_string()),
            ("--enclave-name", request.name.clone()),
        ] {
            arguments.extend([option.into(), value.into()]);
        }
        if request.debug {
            arguments.push("--debug-mode".into());
        }
        let captured = self.run(&arguments, Some(&request.mark), started).await.map_err(|error| match error {
            CallError::NotStarted(failure) => RunError::NotRunning(failure),
            CallError::Lost(failure) => RunError::Unclear(failure),
        })?;
        if !captured.status.success() {
            let report = report::failure("run-enclave", &captured);
            return Err(if report.says_nothing_runs {
                RunError::NotRunning(report.failure)
            } else {
                RunError::Unclear(report.failure)
            });
        }
        let run: Run = output::parse("run-enclave", &captured).map_err(RunError::Unclear)?;
        let at = Timestamp::from(SystemTime::now());
        if let Some(difference) = run.differs_from(request) {
            return Err(self.end_wrong_enclave(&run, &difference).await);
        }
        match request.mark.owner(run.process_id) {
            Ok(Some(process)) => Ok(run.into_record(process.identity, at)),
            Ok(None) => Err(RunError::NotRunning(
                Failure::new(format!(
                    "the enclave ended right after its launch: nitro-cli said that process {} runs it, and that is gone",
                    run.process_id
                ))
                .with_remedy("launch it in debug mode and read its console"),
            )),
            Err(failure) => Err(RunError::Unclear(failure)),
        }
    }

    /// The enclaves that run on the host, whoever launched them. Slow after a launch: nitro-cli then hashes the image.
    ///
    /// Not to be dropped before its end, nor called often (see the head of this file).
    ///
    /// # Errors
    /// It could not be run, or failed, or printed something else.
    pub async fn describe_enclaves(&self) -> Result<Description, Failure> {
        let captured = self.run(&["describe-enclaves".into()], None, |_| {}).await.map_err(CallError::into_failure)?;
        if captured.status.success() {
            let enclaves = output::parse_list(&captured)?;
            return Ok(Description { enclaves, incomplete: None });
        }
        // With an enclave process that did not answer, the others are listed all the same.
        let report = report::failure("describe-enclaves", &captured);
        match output::parse_list(&captured) {
            Ok(enclaves) if report.partial => Ok(Description { enclaves, incomplete: Some(report.failure) }),
            Ok(_) | Err(_) => Err(report.failure),
        }
    }

    /// Ends the enclave of that id.
    ///
    /// # Errors
    /// It could not be run, or failed, or did not say that the enclave is terminated.
    pub async fn terminate_enclave(&self, enclave_id: &str) -> Result<(), Failure> {
        if !output::is_enclave_id(enclave_id) {
            return Err(Failure::new(format!("\"{}\" is not the id of an enclave", enclave_id.escape_debug())));
        }
        let arguments = ["terminate-enclave".into(), "--enclave-id".into(), enclave_id.into()];
        let captured = self.run(&arguments, None, |_| {}).await.map_err(CallError::into_failure)?;
        if !captured.status.success() {
            return Err(report::failure("terminate-enclave", &captured).failure);
        }
        let terminated: output::Terminated = output::parse("terminate-enclave", &captured)?;
        if terminated.terminated && terminated.enclave_id == enclave_id {
            Ok(())
        } else {
            Err(Failure::new(format!("nitro-cli terminate-enclave did not say that {enclave_id} is terminated")))
        }
    }

    async fn end_wrong_enclave(&self, run: &Run, difference: &str) -> RunError {
        let message = format!("nitro-cli launched another enclave than it was asked for: {difference}");
        let remedy = "end the enclave that is in the way: `nitro-cli describe-enclaves` shows it";
        match self.terminate_enclave(&run.enclave_id).await {
            Ok(()) => RunError::NotRunning(Failure::new(format!("{message}; it was ended again")).with_remedy(remedy)),
            Err(failure) => RunError::Unclear(
                Failure::new(format!("{message}; it could not be ended: {}", failure.message))
                    .with_remedy(format!("run `nitro-cli terminate-enclave --enclave-id {}`", run.enclave_id)),
            ),
        }
    }

    async fn run(
        &self,
        arguments: &[OsString],
        mark: Option<&Mark>,
        started: impl FnOnce(u32),
    ) -> Result<Captured, CallError> {
        let command = arguments.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        enough_descriptors(&command).map_err(CallError::NotStarted)?;
        let mut command_line = Command::new(&self.executable);
        child_environment::without_secrets(command_line.as_std_mut());
        if let Some(mark) = mark {
            command_line.env(MARK, &mark.0);
        }
        let mut child = command_line
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| CallError::NotStarted(self.not_started(&command, &error)))?;
        if let Some(pid) = child.id() {
            started(pid);
        }
        let (mut stdout, mut stderr) = (Output::default(), Output::default());
        let reading = {
            let (out, err) = (child.stdout.take(), child.stderr.take());
            let (stdout, stderr) = (&mut stdout, &mut stderr);
            async move { tokio::join!(stdout.fill(out), stderr.fill(err)) }
        };
        let status = {
            tokio::pin!(reading);
            let mut closed = false;
            let status = tokio::select! {
                // Cancel-safe as documented: a later wait gives the same status.
                status = child.wait() => status,
                // Pinned outside: goes on where it was.
                _ = &mut reading => {
                    closed = true;
                    child.wait().await
                }
            };
            if !closed {
                // What is still in the pipes is there at once; somebody else may hold their other ends open for good.
                let _timed_out = tokio::time::timeout(DRAIN, reading).await;
            }
            status
        };
        let status = status.map_err(|error| {
            CallError::Lost(Failure::new(format!("could not wait for nitro-cli {command}: {error}")))
        })?;
        Ok(Captured { status, stdout: stdout.kept, stderr: stderr.kept, stdout_cut: stdout.cut })
    }

    fn not_started(&self, command: &str, error: &io::Error) -> Failure {
        let path = self.executable.display();
        let failure = Failure::new(format!("could not run {path} {command}: {error}"));
        match error.kind() {
            io::ErrorKind::NotFound => failure.with_remedy(format!(
                "install the package aws-nitro-enclaves-cli, or set its path in the configuration (it is {path})"
            )),
            io::ErrorKind::PermissionDenied => {
                failure.with_remedy(format!("check that {path} may be executed by this user"))
            }
            _ => failure,
        }
    }
}

/// How long `run-enclave` can take by its own rules: the boot wait that nitro-cli grants an image and a memory of that
/// size, and what the memory takes to be filled. Beyond it something hangs.
pub fn patience(image_bytes: u64, memory: MemoryMib) -> Duration {
    const STEP: u64 = 90;
    const IMAGE_STEP: u64 = 6 << 30;
    const MEMORY_STEP_MIB: u64 = 100 << 10;
    let steps = image_bytes.div_ceil(IMAGE_STEP).saturating_add(memory.0.div_ceil(MEMORY_STEP_MIB));
    Duration::from_secs(steps.saturating_mul(STEP).max(180)).saturating_add(Duration::from_secs(60))
}

/// Why there is no answer of nitro-cli.
enum CallError {
    /// It was not started.
    NotStarted(Failure),
    /// It was started; what became of it is not known.
    Lost(Failure),
}

impl CallError {
    fn into_failure(self) -> Failure {
        match self {
            Self::NotStarted(failure) | Self::Lost(failure) => failure,
        }
    }
}

fn enough_descriptors(command: &str) -> Result<(), Failure> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    are_enough(command, (procfs::open_descriptors(), limit), procfs::host_files())
}

/// `own`: descriptors of this process that are open, and may be; `host`: open files of the host, and how many may be.
fn are_enough(command: &str, own: (io::Result<u64>, u64), host: io::Result<(u64, u64)>) -> Result<(), Failure> {
    let refuse = |what: String| {
        Err(Failure::new(format!(
            "nitro-cli {command} was not run: {what}; without descriptors it ends healthy enclaves"
        ))
        .with_remedy("find out who holds so many files open, or raise the limit (LimitNOFILE=, fs.file-max)"))
    };
    match own {
        (Ok(open), limit) if open.saturating_add(SPARE_DESCRIPTORS) > limit => {
            return refuse(format!("{open} of {limit} descriptors of this process are in use"));
        }
        (Ok(_), _) => {}
        (Err(error), _) => return refuse(format!("the open descriptors could not be counted: {error}")),
    }
    match host {
        Ok((open, limit)) if open.saturating_add(SPARE_HOST_FILES) > limit => {
            refuse(format!("{open} of {limit} open files of the host are in use"))
        }
        Ok(_) => Ok(()),
        Err(error) => refuse(format!("the host's open files could not be counted: {error}")),
    }
}

#[derive(Default)]
struct Output {
    kept: Vec<u8>,
    cut: bool,
}

impl Output {
    /// Reads to the end, and keeps the beginning. A writer is never held up by what is not kept.
    async fn fill(&mut self, source: Option<impl AsyncRead + Unpin>) {
        let Some(mut source) = source else { return };
        let mut chunk = vec![0; 8192];
        loop {
            match source.read(&mut chunk).await {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    let room = MAX_OUTPUT.saturating_sub(self.kept.len()).min(length);
                    self.kept.extend_from_slice(&chunk[..room]);
                    self.cut |= room < length;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
