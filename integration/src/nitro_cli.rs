//! A stand-in for AWS's `nitro-cli` that keeps the contract of version 1.5.2 without Nitro hardware and without root.
//!
//! What is the same as with the real one: arguments and exit codes, JSON on stdout, progress and error blocks on
//! stderr, one error log file for each error, one background process per enclave that owns it and stays in its caller's
//! cgroup, the control sockets and what becomes of a process whose socket is deleted, one heartbeat port, names made
//! unique, host-computed measurements, CPUs and hugepages taken and given back. An "enclave" is a process of its own
//! (`standin-enclave`, see [`crate::enclave`]) that runs the application found in the image's last ramdisk
//! ([`crate::application`]) and speaks the hybrid vsock convention.
//!
//! # Settings
//! From the environment; what is not set there is looked for in the file `nitro-cli.env` (lines `NAME=value`) beside the
//! path by which it was started, so that a daemon needs nothing but the path of its nitro-cli to run it:
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `NITRO_CLI_SOCKETS_PATH` | folder of the control sockets | `/run/nitro_enclaves` |
//! | `NITRO_CLI_LOGS_PATH` | folder of the logs | `/var/log/nitro_enclaves` |
//! | `STANDIN_SYSFS` | root of the tree with `module/nitro_enclaves/parameters/ne_cpus`, `devices/system/node/node0/hugepages/...`, `devices/system/cpu/cpuN/topology/thread_siblings_list` (absent: no SMT), `devices/virtual/dmi/id/board_asset_tag` | `/sys` |
//! | `STANDIN_VSOCK_DIR` | folder of the enclaves' vsock sockets; unset means that the host has no `/dev/nitro_enclaves` | unset |
//! | `STANDIN_STATE_DIR` | reservations, record of calls, consoles | `state` in the vsock folder |
//! | `STANDIN_FAULTS` | hazards that are switched on, see [`faults`] | none |
//! | `STANDIN_ENCLAVE_BIN` | the program that is the inside of an enclave | `standin-enclave` beside this one |
//!
//! # What it does not do
//! `build-enclave`, `pcr`, `explain` and `sign-eif` refuse; `describe-eif` does not show the signing certificate; the host
//! has one NUMA node.

mod accounts;
mod arguments;
mod background;
mod broadcast;
mod calls;
mod failure;
pub mod faults;
mod foreground;
mod image;
mod output;
mod wire;

pub use accounts::settle;
pub use calls::{Call, calls, listening};
pub use failure::{Code, VERSION};
pub(crate) use image::pcr0;
pub use image::{Image, Measured, measure};

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// The variable that names the root of the host's sysfs tree.
pub const SYSFS: &str = "STANDIN_SYSFS";
/// The variable that names the folder of the enclaves' vsock sockets.
pub const VSOCK_DIR: &str = "STANDIN_VSOCK_DIR";
/// The variable that names the folder of reservations and records.
pub const STATE_DIR: &str = "STANDIN_STATE_DIR";
/// The variable that names the file of switched-on hazards.
pub const FAULTS: &str = "STANDIN_FAULTS";
/// The variable that names the program that is the inside of an enclave.
pub const ENCLAVE_BIN: &str = "STANDIN_ENCLAVE_BIN";
/// nitro-cli's own variable for the folder of the control sockets.
pub const SOCKETS: &str = "NITRO_CLI_SOCKETS_PATH";
/// nitro-cli's own variable for the folder of its logs.
pub const LOGS: &str = "NITRO_CLI_LOGS_PATH";
/// The name of the settings file beside the executable.
pub const SETTINGS_FILE: &str = "nitro-cli.env";

/// The places that this stand-in works with; see the module's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// Root of the sysfs tree.
    pub sysfs: PathBuf,
    /// Folder of the control sockets.
    pub sockets: PathBuf,
    /// Folder of the logs.
    pub logs: PathBuf,
    /// Folder of the vsock sockets; none means a host without enclaves.
    pub vsock: Option<PathBuf>,
    /// Folder of reservations, calls and consoles; there whenever `vsock` is.
    pub state: Option<PathBuf>,
    /// File of hazards.
    pub faults: Option<PathBuf>,
    /// The inside of an enclave.
    pub enclave_binary: Option<PathBuf>,
}

impl Environment {
    /// Reads the settings of this process.
    pub fn of_this_process() -> Self {
        let file = std::env::args_os()
            .next()
            .and_then(|path| std::fs::read_to_string(PathBuf::from(path).with_file_name(SETTINGS_FILE)).ok())
            .unwrap_or_default();
        let beside: BTreeMap<&str, &str> =
            file.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')).collect();
        let look =
            |name: &str| std::env::var_os(name).or_else(|| beside.get(name).map(OsString::from)).map(PathBuf::from);
        let vsock = look(VSOCK_DIR);
        Self {
            sysfs: look(SYSFS).unwrap_or_else(|| "/sys".into()),
            sockets: look(SOCKETS).unwrap_or_else(|| "/run/nitro_enclaves".into()),
            logs: look(LOGS).unwrap_or_else(|| "/var/log/nitro_enclaves".into()),
            state: look(STATE_DIR).or_else(|| vsock.as_ref().map(|folder| folder.join("state"))),
            vsock,
            faults: look(FAULTS),
            enclave_binary: look(ENCLAVE_BIN),
        }
    }

    /// The settings as variables, for a process that is to work in the same places.
    pub fn variables(&self) -> Vec<(&'static str, PathBuf)> {
        let mut variables =
            vec![(SYSFS, self.sysfs.clone()), (SOCKETS, self.sockets.clone()), (LOGS, self.logs.clone())];
        let optional = [
            (VSOCK_DIR, &self.vsock),
            (STATE_DIR, &self.state),
            (FAULTS, &self.faults),
            (ENCLAVE_BIN, &self.enclave_binary),
        ];
        variables.extend(optional.into_iter().filter_map(|(name, value)| value.clone().map(|value| (name, value))));
        variables
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    let environment = Environment::of_this_process();
    let mode = std::env::args_os().nth(1);
    match mode.as_ref().and_then(|mode| mode.to_str()) {
        Some(background::DETACH) => background::detach(&environment),
        Some(background::PROCESS) => background::main(&environment),
        _ => foreground::main(&environment),
    }
}
