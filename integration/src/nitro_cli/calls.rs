//! The record of calls: which nitro-cli commands were run on this host, for tests to assert on.

use super::Environment;
use serde::{Deserialize, Serialize};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// One command that was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// When it began, in milliseconds since the epoch.
    pub at_millis: u64,
    /// The process that ran it.
    pub pid: u32,
    /// Its arguments, without the program's name.
    pub args: Vec<String>,
}

impl Call {
    /// The subcommand, or the option that stood in its place.
    pub fn command(&self) -> &str {
        self.args.first().map_or("", String::as_str)
    }
}

/// Adds this process's call. A host without enclaves keeps no record.
pub(super) fn record(environment: &Environment) {
    let Some(state) = &environment.state else { return };
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let call = Call {
        at_millis: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        pid: std::process::id(),
        args: std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect(),
    };
    let append = || -> io::Result<()> {
        fs::create_dir_all(state)?;
        let mut line = serde_json::to_vec(&call)?;
        line.push(b'\n');
        // One write: lines of concurrent calls don't mix.
        OpenOptions::new().create(true).append(true).open(state.join("calls.jsonl"))?.write_all(&line)
    };
    if let Err(error) = append() {
        eprintln!("stand-in nitro-cli: can't record this call in {}: {error}", state.display());
    }
}

/// The calls so far, in the order in which they began.
///
/// # Errors
/// When the record can't be read, or is not what this module writes.
pub fn calls(state_folder: &Path) -> io::Result<Vec<Call>> {
    let text = match fs::read_to_string(state_folder.join("calls.jsonl")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    text.lines().map(|line| serde_json::from_str(line).map_err(io::Error::from)).collect()
}
