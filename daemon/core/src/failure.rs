//! What went wrong, in a form that can be kept, shown and counted; and the table of nitro-cli's E-codes with what to do
//! about each. The only home of both.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest message that is kept, in bytes. Messages may hold what a remote party wrote.
pub const MAX_MESSAGE: usize = 2048;

/// Something that failed: what was being done, why it failed, what a person can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// What was being done, and the causes, outermost first.
    pub message: String,
    /// What a person can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// nitro-cli's E-code, where it gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<ECode>,
}

impl Failure {
    /// A failure with a message alone; an overlong one is cut.
    pub fn new(message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE {
            let cut = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(cut);
            message.push('…');
        }
        Self { message, remedy: None, code: None }
    }

    /// A failure from an error and all its causes, joined by `: `.
    pub fn from_error(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Many errors repeat their cause in their own text.
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            cause = error.source();
        }
        Self::new(message)
    }

    /// The same failure with what a person can do about it.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same failure with nitro-cli's E-code, and the table's remedy unless there is one already.
    #[must_use]
    pub fn with_code(mut self, code: ECode) -> Self {
        self.code = Some(code);
        if self.remedy.is_none() {
            self.remedy = code.explain().and_then(|entry| entry.remedy).map(str::to_owned);
        }
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, " ({remedy})")?;
        }
        Ok(())
    }
}

/// An error code of nitro-cli, 0 to 99; written `E26`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ECode(pub u8);

impl fmt::Display for ECode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{:02}", self.0)
    }
}

/// What is known of an E-code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ECodeEntry {
    /// The code.
    pub code: ECode,
    /// What it stands for, in a few words.
    pub meaning: &'static str,
    /// What a person can do, where there is something particular to do.
    pub remedy: Option<&'static str>,
}

impl ECode {
    /// The code that nitro-cli gives over any failure inside its background process: the code before it on stderr says
    /// what happened.
    pub const PROCESS_CONNECTION: Self = Self(39);

    /// The table's entry; `None` for a code that nitro-cli 1.5 does not have.
    pub fn explain(self) -> Option<&'static ECodeEntry> {
        E_CODES.iter().find(|entry| entry.code == self)
    }
}

macro_rules! e_codes {
    ($($code:literal $meaning:literal $(=> $remedy:literal)?;)*) => {
        /// nitro-cli's error codes (1.5; its documentation, "Nitro Enclaves CLI error codes").
        pub const E_CODES: &[ECodeEntry] = &[$(ECodeEntry {
            code: ECode($code),
            meaning: $meaning,
            remedy: e_codes!(@remedy $($remedy)?),
        }),*];
    };
    (@remedy) => { None };
    (@remedy $remedy:literal) => { Some($remedy) };
}

e_codes! {
    0 "unspecified error";
    1 "missing argument";
    2 "conflicting arguments";
    3 "invalid argument";
    4 "socket pair creation failed";
    5 "background process could not be started";
    6 "background process could not detach";
    7 "sockets folder not readable" => "check that /run/nitro_enclaves exists and that the user enclaved is in group ne";
    8 "unusable connection to an enclave process";
    9 "socket could not be closed";
    10 "connecting to an enclave process timed out";
    11 "socket error, mostly an enclave that does not exist";
    12 "epoll failure";
    13 "inotify failure";
    14 "invalid command";
    15 "lock failure";
    16 "thread could not be joined";
    17 "serialization failure";
    18 "permissions" => "check that the user enclaved is in group ne and that /dev/nitro_enclaves and /run/nitro_enclaves belong to it";
    19 "file operation failed" => "the message names the file: a missing /dev/nitro_enclaves means that the instance was started without enclave support; a missing ne_cpus, that the nitro_enclaves driver is not loaded; a log file, that group ne may not write /var/log/nitro_enclaves";
    20 "duplicate CPU id";
    21 "CPU id outside the pool" => "the CPU pool changed: run `systemctl restart nitro-enclaves-allocator` while no enclave runs";
    22 "not enough CPUs in the pool" => "lower cpus, stop another enclave, or enlarge the pool in /etc/nitro_enclaves/allocator.yaml";
    23 "malformed CPU id";
    24 "CPU failure";
    25 "unknown hugepage size";
    26 "memory too small for the image" => "raise memory_mib to at least four times the size of the EIF";
    27 "no hugepages left" => "lower memory_mib, stop another enclave, or raise memory_mib in /etc/nitro_enclaves/allocator.yaml; on fragmented memory, reboot";
    28 "enclave descriptor could not be made";
    29 "ioctl of the driver failed" => "right after an exit this passes on its own; otherwise see the kernel log";
    30 "image load information not available";
    31 "memory region refused by the driver" => "use larger hugepages: the number of regions is limited";
    32 "vCPU refused by the driver" => "whole cores only, both SMT siblings together: use an even number of cpus";
    33 "enclave could not be started by the driver";
    34 "numeric overflow";
    35 "EIF could not be parsed or loaded" => "run `enclavectl measure` on the image";
    36 "enclave did not boot, or its heartbeat did not come" => "another launch at the same time, an expired signing certificate, or an image that does not boot: try it in debug mode and read its console";
    37 "waiting for enclave events failed";
    38 "command not executed by the enclave process";
    39 "enclave process not reachable";
    40 "socket path not usable";
    41 "reply of the enclave process not usable";
    42 "memory could not be mapped";
    43 "memory could not be unmapped";
    44 "console could not be reached" => "the console exists in debug mode only";
    45 "console could not be read";
    46 "console could not be written";
    47 "number could not be parsed";
    48 "EIF could not be built";
    49 "docker image could not be built";
    50 "docker image could not be pulled";
    51 "artifacts path not set";
    52 "blobs path not set";
    53 "clock skew" => "set the host's clock";
    54 "signal could not be masked";
    55 "signal could not be unmasked";
    56 "logger failure" => "check the space and the permissions of /var/log/nitro_enclaves";
    57 "hash could not be made";
    58 "name could not be made unique";
    59 "image signature refused" => "the signature does not fit the image, or its certificate is not valid now";
    60 "signing failed";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_from_0_to_60_is_in_the_table_once() {
        let codes: Vec<u8> = E_CODES.iter().map(|entry| entry.code.0).collect();
        assert_eq!(codes, (0..=60).collect::<Vec<_>>());
    }

    #[test]
    fn an_overlong_message_is_cut_between_characters() {
        let failure = Failure::new("ä".repeat(MAX_MESSAGE));
        assert!(failure.message.len() <= MAX_MESSAGE + '…'.len_utf8());
    }

    #[test]
    fn a_failure_with_a_code_takes_the_tables_remedy_unless_it_has_one() {
        assert!(Failure::new("x").with_code(ECode(26)).remedy.unwrap().contains("four times"));
        assert_eq!(Failure::new("x").with_remedy("y").with_code(ECode(26)).remedy.unwrap(), "y");
    }
}
