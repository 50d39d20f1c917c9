//! The traces of one launch: the files in its folder, which outlive every process that takes part in it. They are what
//! the supervisor and the launch helper know of each other; neither decides anything here.
//!
//! | file | written by | says |
//! |---|---|---|
//! | `launch.json` | supervisor, before anything else | what is to be launched |
//! | `lock` | (locked by the helper while it works) | whether a helper is at work |
//! | `helper.json` | helper | its process |
//! | `attempt.json` | helper, before nitro-cli | from now on an enclave may run |
//! | `nitro-cli.json` | helper | the process of nitro-cli itself |
//! | `unclear.json` | helper | why it is not clear whether the enclave runs |
//! | `resolve.json` | helper | how often, and why, that could not be found out |
//! | `record.json` | helper | the enclave's process: it runs, or ran |
//! | `failure.json` | helper, or the supervisor holding the lock | it did not come to run |
//! | `stop.json` | supervisor | since when it has been asked to end |
//! | `asked.json` | unit, when it is stopped | that somebody else asked for it to end |
//! | `exit.json` | unit, after its processes ended | how they did |
//! | `end.json` | supervisor | when its end was noticed |
//! | `launch.log`, `launch.log.old` | helper | what it said, and nitro-cli |
//!
//! Every one but the log and the lock is whole or not there.

use crate::atomic_file::{self, FileError};
use enclaved_core::failure::Failure;
use enclaved_core::id::{BootId, EnclaveKey, Timestamp};
use enclaved_core::ledger::{GenerationRecord, LaunchRecord, ProcessIdentity};
use enclaved_core::observed::AskedBy;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The [`LaunchSpec::format`] that this version writes and reads. Fields that another version added are ignored in all files here, as in
/// the ledger ([`enclaved_core::ledger::LEDGER_FORMAT`]).
pub const FORMAT: u32 = 1;
/// The supervisor's note that it asks the enclave to end.
pub const STOP_FILE: &str = "stop.json";
/// No file here is longer: a record with hundreds of egress endpoints fits many times.
const MAX_FILE: u64 = 1 << 20;

/// `launch.json`: what is to be launched, and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// Version of this format.
    pub format: u32,
    /// The boot of the host in which it was asked for.
    pub boot_id: BootId,
    /// When.
    pub at: Timestamp,
    /// Which generation; also its name in nitro-cli.
    pub key: EnclaveKey,
    /// Its record, as the ledger had it.
    pub generation: GenerationRecord,
    /// The image file.
    pub image: PathBuf,
    /// Beyond so many seconds nitro-cli hangs.
    pub patience_s: u64,
    /// nitro-cli.
    pub nitro_cli: PathBuf,
    /// The lock that makes launches serial on this host.
    pub host_lock: PathBuf,
    /// The folder of the notes of stops by hand ([`crate::stop_notes`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_notes: Option<PathBuf>,
}

impl LaunchSpec {
    /// Beyond this time nitro-cli hangs.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_s)
    }
}

/// `record.json`: it runs, or ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The boot of the host in which it was launched: a PID means nothing in another.
    pub boot_id: BootId,
    /// The enclave.
    pub launch: LaunchRecord,
}

/// `failure.json`, `resolve.json`: what failed and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// When (the last time).
    pub at: Timestamp,
    /// How often.
    pub count: u32,
    /// Why (the last time).
    pub failure: Failure,
}

/// `attempt.json`, `end.json`: when something was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// When.
    pub at: Timestamp,
}

/// `asked.json`: somebody who is not enclaved had the service manager end it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The boot of the host in which that was: in the next one it means nothing.
    pub boot_id: BootId,
    /// When.
    pub at: Timestamp,
    /// Who, or what for.
    pub by: AskedBy,
}

/// `exit.json`: how the unit of a launch ended, as the service manager says it (systemd.exec(5), `$SERVICE_RESULT`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// When that was noted.
    pub at: Timestamp,
    /// `success`, `exit-code`, `signal`, `timeout`, `oom-kill` and more; empty if it was not said.
    pub result: String,
    /// `exited`, `killed` or `dumped`; empty if no main process ended.
    pub code: String,
    /// Exit status, or name of the signal.
    pub status: String,
    /// Somebody asked for the end: enclaved, or whoever [`Asked`] names.
    pub asked: bool,
}

/// How far the helper has got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The enclave came to run.
    Ran(Recorded),
    /// It did not.
    Failed(Failed),
    /// nitro-cli was begun to be run; what came of it is not known.
    Attempted(Moment),
    /// Nothing was begun.
    Nothing,
}

/// The folder of one launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    folder: PathBuf,
}

macro_rules! files {
    ($($(#[$doc:meta])* $read:ident / $write:ident: $type:ty = $name:literal;)*) => {
        impl Trace {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// It can't be read, or not be understood ([`FileError::is_about_contents`]).
                pub fn $read(&self) -> Result<Option<$type>, FileError> {
                    self.read($name)
                }

                #[doc = concat!("Writes `", $name, "`.")]
                ///
                /// # Errors
                /// It can't be written.
                pub fn $write(&self, value: &$type) -> Result<(), FileError> {
                    atomic_file::write_json(&self.folder.join($name), value)
                }
            )*
        }
    };
}

files! {
    /// What is to be launched.
    spec / write_spec: LaunchSpec = "launch.json";
    /// The helper's process.
    helper / write_helper: ProcessIdentity = "helper.json";
    /// When nitro-cli was begun to be run.
    attempt / write_attempt: Moment = "attempt.json";
    /// The process of nitro-cli itself.
    nitro_cli / write_nitro_cli: ProcessIdentity = "nitro-cli.json";
    /// Why it is not clear whether the enclave runs.
    unclear / write_unclear: Failure = "unclear.json";
    /// Why that could not be found out.
    resolve / write_resolve: Failed = "resolve.json";
    /// The enclave.
    record / write_record: Recorded = "record.json";
    /// Why it did not come to run.
    failure / write_failure: Failed = "failure.json";
    /// Who else asked for its end.
    asked / write_asked: Asked = "asked.json";
    /// How its unit ended.
    exit / write_exit: Exit = "exit.json";
    /// When its end was noticed.
    end / write_end: Moment = "end.json";
}

impl Trace {
    /// The traces in that folder, which need not exist.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the helper's words go.
    pub fn log(&self) -> PathBuf {
        self.folder.join("launch.log")
    }

    /// Puts a log that has grown beyond that many bytes aside, over the one that was put aside before.
    ///
    /// # Errors
    /// It can't be looked at or renamed.
    pub fn cap_log(&self, limit: u64) -> Result<(), FileError> {
        let log = self.log();
        match std::fs::metadata(&log) {
            Ok(metadata) if metadata.len() > limit => {
                std::fs::rename(&log, self.folder.join("launch.log.old")).map_err(FileError::io("rename", &log))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(FileError::io("look at", &log)(error)),
        }
    }

    /// Removes what an earlier try noted of its nitro-cli, so that a later one is never taken for it.
    ///
    /// # Errors
    /// It can't be removed, or the removal not be made to last.
    pub fn clear_nitro_cli(&self) -> Result<(), FileError> {
        let path = self.folder.join("nitro-cli.json");
        match std::fs::remove_file(&path) {
            Ok(()) => atomic_file::sync_folder(&self.folder),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(FileError::io("remove", &path)(error)),
        }
    }

    /// How far the helper has got. To be believed only by whoever has the lock: otherwise it may be further already.
    ///
    /// # Errors
    /// A file can't be read just now. One that is not understood counts as not there: it is found out anew.
    pub fn outcome(&self) -> Result<Outcome, FileError> {
        if let Some(record) = usable(self.record())? {
            return Ok(Outcome::Ran(record));
        }
        if let Some(failed) = usable(self.failure())? {
            return Ok(Outcome::Failed(failed));
        }
        match self.attempt() {
            Ok(None) => Ok(Outcome::Nothing),
            Ok(Some(attempt)) => Ok(Outcome::Attempted(attempt)),
            // That there is one is what counts.
            Err(error) if error.is_about_contents() => Ok(Outcome::Attempted(Moment { at: Timestamp::default() })),
            Err(error) => Err(error),
        }
    }

    /// Waits until nobody else works on this launch. Blocks.
    ///
    /// # Errors
    /// The lock can't be had at all.
    pub fn lock(&self) -> Result<Lock, FileError> {
        Lock::wait(&self.folder.join("lock"))
    }

    /// The lock, unless somebody works on this launch.
    ///
    /// # Errors
    /// It can't be found out.
    pub fn try_lock(&self) -> Result<Option<Lock>, FileError> {
        let path = self.folder.join("lock");
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(FileError::io("lock", &path)(error)),
        }
    }

    /// Whether what came of the launch is known for good.
    pub fn is_over(&self) -> bool {
        matches!(self.outcome(), Ok(Outcome::Ran(_) | Outcome::Failed(_)))
    }

    /// Whether enclaved itself asked for its end.
    pub fn stop_is_noted(&self) -> bool {
        self.folder.join(STOP_FILE).exists()
    }

    /// Reads a file that belongs to the supervisor alone.
    ///
    /// # Errors
    /// As the others.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, FileError> {
        atomic_file::read_json(&self.folder.join(name), MAX_FILE)
    }
}

/// Holds a lock file until it is dropped, or its process ends for whatever reason. Children do not inherit it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// What every launch holds while it is under way, in the daemon's run directory: launches are serial.
pub const LAUNCH_LOCK: &str = "launch.lock";

impl Lock {
    /// Makes the file, for those who may only read it.
    ///
    /// # Errors
    /// It can't be made.
    pub fn make(path: &Path) -> Result<(), FileError> {
        open_lock(path).map(drop)
    }

    /// Waits for the lock on that file. Blocks.
    ///
    /// # Errors
    /// It can't be opened or locked.
    pub fn wait(path: &Path) -> Result<Self, FileError> {
        let file = open_lock(path)?;
        file.lock().map_err(FileError::io("lock", path))?;
        Ok(Self { _file: file })
    }
}

fn open_lock(path: &Path) -> Result<File, FileError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(FileError::io("open", path))
}

/// What is not understood counts as not there.
fn usable<T>(read: Result<Option<T>, FileError>) -> Result<Option<T>, FileError> {
    match read {
        Err(error) if error.is_about_contents() => Ok(None),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_that_is_not_understood_is_to_be_found_out_anew() {
        let folder = tempfile::tempdir().unwrap();
        let trace = Trace::new(folder.path());
        assert_eq!(trace.outcome().unwrap(), Outcome::Nothing);
        trace.write_attempt(&Moment { at: Timestamp::from_millis(5) }).unwrap();
        std::fs::write(folder.path().join("record.json"), "{\"boot").unwrap();
        assert_eq!(trace.outcome().unwrap(), Outcome::Attempted(Moment { at: Timestamp::from_millis(5) }));
        std::fs::write(folder.path().join("attempt.json"), "").unwrap();
        assert!(matches!(trace.outcome().unwrap(), Outcome::Attempted(_)));
    }

    #[test]
    fn one_lock_is_held_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let trace = Trace::new(folder.path());
        let lock = trace.lock().unwrap();
        assert!(trace.try_lock().unwrap().is_none());
        drop(lock);
        assert!(trace.try_lock().unwrap().is_some());
    }
}
