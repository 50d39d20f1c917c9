//! The stock allocator's service, as little of it as is needed: restart it, and read what it said.

use crate::host::inventory::ALLOCATOR_UNIT;
use crate::systemd_bus::{JobError, SystemdBus, Verb};
use enclaved_core::failure::Failure;
use std::future::Future;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;

/// Moving pages out of the way of large ones can take minutes on a big host that is in use. The unit itself has no limit.
const RESTART_PATIENCE: Duration = Duration::from_mins(10);
const JOURNAL_PATIENCE: Duration = Duration::from_secs(10);
/// As much of the journal as is read.
const MAX_JOURNAL: u64 = 64 * 1024;

/// What is done to the service.
pub trait StockService: Send + Sync {
    /// Restarts it and waits until its job is over. That it says it succeeded proves nothing: look at the pool.
    fn restart(&self) -> impl Future<Output = Result<(), JobError>> + Send;

    /// Its last lines in the journal.
    fn journal(&self, lines: u32) -> impl Future<Output = Result<Vec<String>, Failure>> + Send;
}

/// The service under systemd.
#[derive(Debug, Clone)]
pub struct Systemd(pub SystemdBus);

impl StockService for Systemd {
    async fn restart(&self) -> Result<(), JobError> {
        self.0.run_job(Verb::Restart, ALLOCATOR_UNIT, RESTART_PATIENCE).await
    }

    async fn journal(&self, lines: u32) -> Result<Vec<String>, Failure> {
        let failed = |error: std::io::Error| Failure::new(format!("could not run journalctl: {error}"));
        let mut command = tokio::process::Command::new("journalctl");
        command
            .args(["--unit", ALLOCATOR_UNIT, "--no-pager", "--quiet", "--output", "short-iso", "--lines"])
            .arg(lines.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().ok_or_else(|| Failure::new("journalctl has no output"))?;
        let mut bytes = Vec::new();
        let read = async {
            stdout.take(MAX_JOURNAL).read_to_end(&mut bytes).await?;
            child.wait().await
        };
        match tokio::time::timeout(JOURNAL_PATIENCE, read).await {
            Ok(Ok(_)) => Ok(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(Failure::new(format!("journalctl did not end within {} s", JOURNAL_PATIENCE.as_secs()))),
        }
    }
}
