//! The supervisor for hosts without systemd: every launch helper is a child of this process, in a session of its own, so that
//! it goes on when this process ends; an enclave is asked to end by a signal.
//!
//! What it has in common with the other one stands in [`crate::launches`].

use super::{Outcome, Supervisor};
use crate::atomic_file::FileError;
use crate::child_environment;
use crate::launches::{Beside, LaunchSettings, Launches, Working, fault, reap};
use enclaved_core::failure::Failure;
use enclaved_core::id::EnclaveKey;
use enclaved_core::ledger::LaunchRecord;
use enclaved_core::observed::Instance;
use enclaved_core::plan::{Launch, Launched};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Mutex;
use tokio::process::Command;
use tokio::task::JoinSet;

/// A helper's log that is longer is put aside before the next helper writes to it; so there are two of about that size.
const MAX_LOG: u64 = 256 * 1024;

/// How the launch helper is started: this program and these arguments, then `--trace-dir DIR`.
#[derive(Debug, Clone)]
pub struct HelperCommand {
    /// The executable.
    pub program: PathBuf,
    /// What comes before `--trace-dir`.
    pub arguments: Vec<OsString>,
}

/// The supervisor for hosts without systemd.
#[derive(Debug)]
pub struct Direct {
    launches: Launches,
    helper: HelperCommand,
    /// Waits for the helpers that are children of this process. Ends with it; the helpers go on.
    tasks: Mutex<JoinSet<()>>,
}

impl Direct {
    /// Makes the folders, and takes up whatever traces are there.
    ///
    /// # Errors
    /// The folders can't be made, or `/proc` can't be read.
    pub fn new(settings: LaunchSettings, helper: HelperCommand) -> Outcome<Self> {
        Ok(Self { launches: Launches::new(settings)?, helper, tasks: Mutex::default() })
    }

    /// Starts a helper on a launch's traces, and waits for it in a task.
    fn start_helper(&self, working: Working) -> Outcome<()> {
        let trace = self.launches.trace(&working.key);
        trace.cap_log(MAX_LOG).map_err(|error| fault(&error))?;
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(trace.log())
            .and_then(|log| Ok((log.try_clone()?, log)))
            .map_err(|error| fault(&FileError::io("open", &trace.log())(error)))?;
        let HelperCommand { program, arguments } = &self.helper;
        let mut command = Command::new(program);
        child_environment::without_secrets(command.as_std_mut());
        let mut child = command
            .args(arguments)
            .arg("--trace-dir")
            .arg(trace.folder())
            .stdin(Stdio::null())
            .stdout(log.0)
            .stderr(log.1)
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| {
                Failure::new(format!("could not start the launch helper {}: {error}", program.display()))
            })?;
        reap(&self.tasks).spawn(async move {
            let key = &working.key;
            match child.wait().await {
                Ok(status) if status.success() => drop(working.shared.state().helpers.remove(key)),
                Ok(status) => {
                    let failure = Failure::new(format!("its launch helper ended with {status}"));
                    working.shared.helper_failed(key, failure.with_remedy(format!("see {}", trace.log().display())));
                }
                Err(error) => {
                    let failure = Failure::new(format!("its launch helper could not be waited for: {error}"));
                    working.shared.helper_failed(key, failure);
                }
            }
            drop(working);
        });
        self.launches.shared.bump();
        Ok(())
    }
}

impl Supervisor for Direct {
    async fn observe(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>) -> Outcome<BTreeMap<EnclaveKey, Instance>> {
        drop(reap(&self.tasks));
        let scan = self.launches.look(known, Beside::default()).await?;
        for key in &scan.unresolved {
            // Traces of an attempt on which nobody works any more: the helper finds out what came of it.
            if let Some(working) = Working::begin(&self.launches.shared, key)
                && let Err(failure) = self.start_helper(working)
            {
                self.launches.shared.helper_failed(key, failure);
            }
        }
        Ok(scan.instances)
    }

    async fn launch(&self, launch: &Launch) -> Outcome<()> {
        let Some(working) = self.launches.begin(launch).await? else { return Ok(()) };
        if let Err(failure) = self.start_helper(working) {
            // Nothing was started, so there must be no traces of it.
            self.launches.take_back(&launch.key).await?;
            return Err(failure);
        }
        Ok(())
    }

    async fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> Outcome<()> {
        let Some(stopping) = self.launches.stop(key, launch).await? else { return Ok(()) };
        if stopping.ask {
            stopping.signal(Signal::TERM)?;
        }
        stopping.wait().await;
        Ok(())
    }

    async fn describe(&self, launched: &[Launched]) -> Outcome<BTreeMap<EnclaveKey, Option<Failure>>> {
        self.launches.describe(launched).await
    }

    async fn forget(&self, key: &EnclaveKey) -> Outcome<()> {
        self.launches.forget(key).await
    }

    async fn changed(&self) {
        self.launches.changed().await;
    }
}

#[cfg(test)]
mod tests;
