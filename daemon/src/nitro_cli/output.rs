//! What nitro-cli prints on stdout: its JSON. Fields that are not known are left alone, those that are needed must be
//! there and make sense.

use super::RunRequest;
use super::report::{Captured, printable};
use enclaved_core::failure::Failure;
use enclaved_core::id::{MemoryMib, Pcr, Timestamp};
use enclaved_core::ledger::{LaunchRecord, ProcessIdentity};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// More CPUs than any instance has.
const MAX_CPUS: usize = 4096;
/// More enclaves than any host has (4).
const MAX_ENCLAVES: usize = 256;
/// Longer than any id (`i-` and 17 digits, `-enc` and 15).
const MAX_ID: usize = 128;

/// What `run-enclave` prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Run {
    #[serde(rename = "EnclaveName")]
    name: Option<String>,
    #[serde(rename = "EnclaveID")]
    pub(super) enclave_id: String,
    #[serde(rename = "ProcessID")]
    pub(super) process_id: u32,
    #[serde(rename = "EnclaveCID")]
    cid: u64,
    #[serde(rename = "CPUIDs")]
    cpu_ids: Vec<u32>,
    #[serde(rename = "MemoryMiB")]
    memory_mib: u64,
}

/// What `describe-enclaves` found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The enclaves that answered.
    pub enclaves: Vec<Described>,
    /// Why others may be missing.
    pub incomplete: Option<Failure>,
}

/// One enclave in `describe-enclaves`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Described {
    /// Its name; older versions of nitro-cli give none.
    #[serde(rename = "EnclaveName")]
    pub name: Option<String>,
    /// nitro-cli's id.
    #[serde(rename = "EnclaveID")]
    pub enclave_id: String,
    /// The background process that owns it.
    #[serde(rename = "ProcessID")]
    pub process_id: u32,
    /// Its CID.
    #[serde(rename = "EnclaveCID")]
    pub cid: u64,
    /// Its CPUs.
    #[serde(rename = "CPUIDs")]
    pub cpu_ids: Vec<u32>,
    /// Its memory.
    #[serde(rename = "MemoryMiB")]
    pub memory: MemoryMib,
    /// Its state.
    pub state: State,
    /// Its mode.
    pub flags: Flag,
    /// What nitro-cli's process measured in the image file when it was first asked; older versions give none. Computed by the host:
    /// no attestation.
    pub measurements: Option<HostMeasurements>,
}

/// The measurements in `describe-enclaves`. `HashAlgorithm` beside them is not to be parsed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub struct HostMeasurements {
    /// Kernel, command line and all ramdisks.
    pub pcr0: Option<Pcr>,
    /// Kernel, command line and the first ramdisk.
    pub pcr1: Option<Pcr>,
    /// The other ramdisks.
    pub pcr2: Option<Pcr>,
}

/// The state of an enclave as the driver gives it. It stays `Running` while the inside hangs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub enum State {
    /// It runs.
    #[serde(rename = "RUNNING")]
    Running,
    /// It is being ended.
    #[serde(rename = "TERMINATING")]
    Terminating,
    /// It was never started.
    #[serde(rename = "EMPTY")]
    Empty,
    /// Another word.
    #[serde(untagged)]
    Other(String),
}

/// The mode of an enclave.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub enum Flag {
    /// It attests its measurements.
    #[serde(rename = "NONE")]
    None,
    /// It attests zeros.
    #[serde(rename = "DEBUG_MODE")]
    DebugMode,
    /// Another word.
    #[serde(untagged)]
    Other(String),
}

/// What `terminate-enclave` prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Terminated {
    #[serde(rename = "EnclaveID")]
    pub(super) enclave_id: String,
    pub(super) terminated: bool,
}

impl Run {
    /// In what it differs from what was asked for, if it does.
    pub(super) fn differs_from(&self, request: &RunRequest) -> Option<String> {
        let mut differences = Vec::new();
        match &self.name {
            Some(name) if *name != request.name => differences.push(format!(
                "its name is \"{}\" instead of \"{}\", which nitro-cli does where another enclave has that name",
                printable(name.as_bytes(), 64),
                request.name
            )),
            Some(_) | None => {}
        }
        if self.cid != u64::from(request.cid.get()) {
            differences.push(format!("its CID is {} instead of {}", self.cid, request.cid));
        }
        (!differences.is_empty()).then(|| differences.join(", and "))
    }

    pub(super) fn into_record(self, process: ProcessIdentity, at: Timestamp) -> LaunchRecord {
        LaunchRecord {
            enclave_id: self.enclave_id,
            process,
            cpu_ids: self.cpu_ids,
            memory: MemoryMib(self.memory_mib),
            at,
        }
    }
}

impl Described {
    /// The record of this enclave, as `run-enclave` would have given it.
    pub fn to_record(&self, process: ProcessIdentity, at: Timestamp) -> LaunchRecord {
        LaunchRecord {
            enclave_id: self.enclave_id.clone(),
            process,
            cpu_ids: self.cpu_ids.clone(),
            memory: self.memory,
            at,
        }
    }
}

/// Limits that the JSON's types do not have.
pub(super) trait Plausible {
    /// What is wrong with it.
    fn fault(&self) -> Option<&'static str>;
}

impl Plausible for Run {
    fn fault(&self) -> Option<&'static str> {
        fault_of(&self.enclave_id, self.process_id, &self.cpu_ids)
    }
}

impl Plausible for Terminated {
    fn fault(&self) -> Option<&'static str> {
        (!is_enclave_id(&self.enclave_id)).then_some("EnclaveID is not one")
    }
}

impl Plausible for Vec<Described> {
    fn fault(&self) -> Option<&'static str> {
        if self.len() > MAX_ENCLAVES {
            return Some("there are too many enclaves");
        }
        self.iter().find_map(|enclave| fault_of(&enclave.enclave_id, enclave.process_id, &enclave.cpu_ids))
    }
}

fn fault_of(enclave_id: &str, process_id: u32, cpu_ids: &[u32]) -> Option<&'static str> {
    if !is_enclave_id(enclave_id) {
        Some("EnclaveID is not one")
    } else if process_id < 2 {
        Some("ProcessID is not one")
    } else if cpu_ids.len() > MAX_CPUS {
        Some("there are too many CPUIDs")
    } else {
        None
    }
}

/// Ids become arguments: letters, digits and dashes, not beginning with a dash.
pub(super) fn is_enclave_id(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
    !text.is_empty() && text.len() <= MAX_ID && !text.starts_with('-') && text.chars().all(inner)
}

pub(super) fn parse_list(captured: &Captured) -> Result<Vec<Described>, Failure> {
    parse("describe-enclaves", captured)
}

pub(super) fn parse<T: DeserializeOwned + Plausible>(command: &str, captured: &Captured) -> Result<T, Failure> {
    let unusable = |why: String| {
        let failure = Failure::new(format!(
            "nitro-cli {command} printed something that is not its JSON ({why}): \"{}\"",
            printable(&captured.stdout, 200)
        ));
        failure
            .with_remedy("check that the configured nitro-cli is AWS's, version 1.2 or later (`nitro-cli --version`)")
    };
    if captured.stdout_cut {
        return Err(unusable("it is longer than 1 MiB".to_owned()));
    }
    let value: T = serde_json::from_slice(&captured.stdout).map_err(|error| unusable(error.to_string()))?;
    match value.fault() {
        Some(fault) => Err(unusable(fault.to_owned())),
        None => Ok(value),
    }
}
