//! Hazards that can be switched on: what the real nitro-cli has been seen to do to its callers, and worse.
//!
//! The file that `STANDIN_FAULTS` names is read anew by every command. It holds a list, of which the first entry that
//! fits the command is the one that happens; an entry with `times` is used up by happening so often:
//! ```json
//! [
//!   { "on": "run-enclave", "enclave": "signer", "times": 1, "fault": { "fail_inside": { "code": 29 } } },
//!   { "on": "describe-enclaves", "fault": { "hang": { "millis": 60000 } } }
//! ]
//! ```

use super::Environment;
use super::failure::Code;
use serde::{Deserialize, Serialize};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

/// One hazard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// The background process fails with this code, before the enclave starts: the command ends with 39.
    FailInside {
        /// The first code on stderr.
        code: Code,
    },
    /// The command itself fails with this code, before it has done anything, and exits with its number.
    Fail {
        /// The only code on stderr.
        code: Code,
    },
    /// The enclave starts and never reports that it has booted: E36 after this time.
    NeverBoots {
        /// How long the wait takes.
        millis: u64,
    },
    /// Booting takes at least this long.
    SlowBoot {
        /// How long.
        millis: u64,
    },
    /// The enclave dies this long after it has started.
    DieAfter {
        /// How long.
        millis: u64,
    },
    /// Hashing the image takes at least this long, and the first describe waits for it.
    SlowFirstDescribe {
        /// How long.
        millis: u64,
    },
    /// The command waits this long before it does anything.
    Hang {
        /// How long.
        millis: u64,
    },
    /// The command does nothing, prints something that is not JSON, and exits 0.
    Garbage,
    /// The command does nothing, prints nothing, and exits 0.
    Silence,
    /// The command does its work, prints something that is not JSON in place of its answer, and exits 0.
    GarbledAnswer,
    /// The command does its work and prints its answer, then exits with this code.
    SucceedButExit {
        /// The exit code.
        code: u8,
    },
    /// The command does its work, and is killed by SIGKILL before it prints the answer.
    KilledBeforeAnswer,
    /// The command does its work and prints its answer, and is then killed by SIGKILL.
    KilledAfterAnswer,
    /// Every connection to a control socket fails (as when descriptors have run out), so that the sockets are deleted
    /// and their enclaves end.
    ConnectionsFail,
}

/// A hazard and when it happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hazard {
    /// The subcommand it happens to (`run-enclave`), or `any`.
    pub on: String,
    /// Only to enclaves whose name begins so (`run-enclave` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enclave: Option<String>,
    /// How often; none is always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
    /// What happens.
    pub fault: Fault,
}

impl Hazard {
    /// A hazard of a subcommand that happens every time.
    pub fn always(on: &str, fault: Fault) -> Self {
        Self { on: on.to_owned(), enclave: None, times: None, fault }
    }

    /// A hazard of a subcommand that happens the next time only.
    pub fn once(on: &str, fault: Fault) -> Self {
        Self { times: Some(1), ..Self::always(on, fault) }
    }

    fn fits(&self, command: &str, enclave: Option<&str>) -> bool {
        (self.on == "any" || self.on == command)
            && self.times != Some(0)
            && self.enclave.as_ref().is_none_or(|prefix| enclave.is_some_and(|name| name.starts_with(prefix)))
    }
}

/// Replaces the switched-on hazards; commands already running keep what they began with.
///
/// # Errors
/// When the file can't be written.
pub fn switch_on(file: &Path, hazards: &[Hazard]) -> io::Result<()> {
    let _lock = lock(file)?;
    write(file, hazards)
}

fn lock(file: &Path) -> io::Result<fs::File> {
    let lock = OpenOptions::new().create(true).append(true).open(file.with_extension("lock"))?;
    lock.lock()?;
    Ok(lock)
}

fn write(file: &Path, hazards: &[Hazard]) -> io::Result<()> {
    let fresh = file.with_extension("new");
    fs::write(&fresh, serde_json::to_vec_pretty(hazards)?)?;
    fs::rename(fresh, file)
}

/// The hazard that happens to this command now, if any; one of its times is used up.
///
/// # Errors
/// When the file is there and can't be used: a test that believes in its hazard must not pass without it.
pub(super) fn next(environment: &Environment, command: &str, enclave: Option<&str>) -> io::Result<Option<Fault>> {
    let Some(file) = environment.faults.as_ref().filter(|file| file.exists()) else { return Ok(None) };
    let _lock = lock(file)?;
    let mut hazards: Vec<Hazard> = serde_json::from_slice(&fs::read(file)?)?;
    let Some(hazard) = hazards.iter_mut().find(|hazard| hazard.fits(command, enclave)) else { return Ok(None) };
    let fault = hazard.fault.clone();
    if let Some(times) = &mut hazard.times {
        *times = times.saturating_sub(1);
        write(file, &hazards)?;
    }
    Ok(Some(fault))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hazard_happens_to_its_command_as_often_as_it_says() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("faults.json");
        let environment = Environment { faults: Some(file.clone()), ..Environment::of_this_process() };
        let happens = |command, enclave| next(&environment, command, enclave).unwrap();
        assert_eq!(happens("run-enclave", None), None, "no file, no hazard");
        switch_on(
            &file,
            &[
                Hazard { enclave: Some("signer".into()), ..Hazard::once("run-enclave", Fault::Garbage) },
                Hazard::always("any", Fault::Silence),
            ],
        )
        .unwrap();
        assert_eq!(happens("run-enclave", Some("other-1")), Some(Fault::Silence));
        assert_eq!(happens("run-enclave", Some("signer-1")), Some(Fault::Garbage));
        assert_eq!(happens("run-enclave", Some("signer-2")), Some(Fault::Silence));
        fs::write(&file, "[{").unwrap();
        assert!(next(&environment, "run-enclave", None).is_err());
    }

    #[test]
    fn the_example_in_the_documentation_is_read() {
        let example: String = include_str!("faults.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! "))
            .skip_while(|line| *line != "```json")
            .skip(1)
            .take_while(|line| *line != "```")
            .collect();
        assert_eq!(serde_json::from_str::<Vec<Hazard>>(&example).unwrap().len(), 2);
    }
}
