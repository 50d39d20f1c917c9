//! What goes wrong, in nitro-cli's own words: the error codes, the block on stderr, the log file of each error.
//!
//! The texts of the codes that this stand-in can come upon by itself are nitro-cli 1.5.2's, so that whoever classifies
//! its stderr can be tested with them; those that only a switched-on hazard produces are short.

use super::Environment;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The version whose contract this is.
pub const VERSION: &str = "1.5.2";

/// An error code: the number after `E`, which is also the exit code of a command that fails with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Code(pub u8);

impl Code {
    /// An argument is not what it must be.
    pub const INVALID_ARGUMENT: Self = Self(3);
    /// The background process could not be started.
    pub const SPAWN: Self = Self(5);
    /// The folder of the control sockets can't be read.
    pub const SOCKETS_FOLDER: Self = Self(7);
    /// A control socket failed; also: no enclave of that ID.
    pub const SOCKET: Self = Self(11);
    /// A configuration file or a reply is not the JSON it should be.
    pub const SERDE: Self = Self(17);
    /// A file could not be opened, read or written.
    pub const FILE: Self = Self(19);
    /// A CPU is listed twice.
    pub const DUPLICATE_CPU: Self = Self(20);
    /// A CPU is not in the pool.
    pub const CPU_NOT_IN_POOL: Self = Self(21);
    /// The pool is smaller than the number of CPUs asked for.
    pub const INSUFFICIENT_CPUS: Self = Self(22);
    /// The pool file holds something that is no CPU number.
    pub const MALFORMED_CPU: Self = Self(23);
    /// Less memory was asked for than the image needs.
    pub const MEMORY_TOO_SMALL: Self = Self(26);
    /// The hugepages for the memory are not there.
    pub const NO_HUGEPAGES: Self = Self(27);
    /// The driver refused.
    pub const IOCTL: Self = Self(29);
    /// The image can't be read.
    pub const EIF: Self = Self(35);
    /// The enclave did not report that it has booted.
    pub const BOOT: Self = Self(36);
    /// A background process answered with an error.
    pub const NOT_EXECUTED: Self = Self(38);
    /// A background process gave no valid answer.
    pub const CONNECTION: Self = Self(39);
    /// No console.
    pub const CONSOLE: Self = Self(44);
    /// No enclave, or several, of that name.
    pub const NAME: Self = Self(58);
    /// The image's signature can't be checked.
    pub const SIGNATURE: Self = Self(59);
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "E{:02}", self.0)
    }
}

/// A failure of a command: its code, what the message is completed with, and what was being done, innermost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// Which error.
    pub(super) code: Code,
    details: Vec<String>,
    steps: Vec<String>,
}

impl Failure {
    /// A failure with its cause, which is only written to the error log.
    pub(super) fn new(code: Code, cause: impl Into<String>) -> Self {
        Self { code, details: Vec::new(), steps: vec![cause.into()] }
    }

    /// Completes the message: the file and the operation, the argument and its value.
    #[must_use]
    pub(super) fn about(mut self, details: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.details.extend(details.into_iter().map(Into::into));
        self
    }

    /// A file operation that failed.
    pub(super) fn file(path: &Path, operation: &str, error: &std::io::Error) -> Self {
        Self::new(Code::FILE, format!("{operation}: {error}")).about([path.display().to_string(), operation.to_owned()])
    }

    /// Names the step in which it happened.
    #[must_use]
    pub(super) fn during(mut self, step: &str) -> Self {
        self.steps.push(step.to_owned());
        self
    }

    /// Writes the error's log file and gives the block for stderr, without the newline at its end.
    pub(super) fn block(&self, environment: &Environment) -> String {
        let mut block = format!(
            "[ {} ] {}\n\nFor more details, please visit https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html#{}",
            self.code,
            self.description(),
            self.code
        );
        // As the real one: where the log can't be written, the block ends without naming it.
        if let Ok(path) = self.write_log(&environment.logs) {
            // Writing to a String can't fail.
            let _ignored = write!(
                block,
                "\n\nIf you open a support ticket, please provide the error log found at \"{}\"",
                path.display()
            );
        }
        block
    }

    fn write_log(&self, folder: &Path) -> std::io::Result<PathBuf> {
        fs::create_dir_all(folder)?;
        let time = humantime::format_rfc3339_nanos(SystemTime::now()).to_string().replace('Z', "+00:00");
        let path = folder.join(format!("err{time}.log"));
        let steps: String = self.steps.iter().rev().map(|step| format!("\n    {step}")).collect();
        fs::write(
            &path,
            format!(
                "  Action: Stand-in\n  Subactions:{steps}\n  Root error file: standin\n  Root error line: 0\n  Version: {VERSION}"
            ),
        )?;
        Ok(path)
    }

    fn detail(&self, index: usize) -> &str {
        // The placeholder is the real one's too: a bad CID is reported as "MISSING_INFO".
        self.details.get(index).map_or("MISSING_INFO", String::as_str)
    }

    fn description(&self) -> String {
        let (a, b) = (self.detail(0), self.detail(1));
        match self.code {
            Code::INVALID_ARGUMENT => {
                format!("Invalid argument provided. The parameter `{a}` is not a valid integer (`{b}`)")
            }
            Code::SPAWN => "Process spawn failure. Such error appears when the main Nitro CLI process fails to spawn the enclave process, in order to complete a `run-enclave` command.".to_owned(),
            Code::SOCKETS_FOLDER => "Read from disk failure. Such error appears when the Nitro CLI process fails to read the content of the enclave sockets directory (usually '/run/nitro_enclaves/') in order to perform a `describe-enclave` operation. Check that the directory exists and it has proper permissions, or run the Nitro Enclaves configuration script in order to (re)configure the environment.".to_owned(),
            Code::SOCKET => "Socket error. This is used as an error for catching any other socket operation errors not covered by previous custom errors.".to_owned(),
            Code::SERDE => "Serde error. Such error appears when serializing / deserializing a command or response fails.".to_owned(),
            Code::FILE => {
                let text = "File operation failure. Such error appears when the system fails to perform the requested file operations, such as opening the EIF file when launching an enclave, or seeking to a specific offset in the EIF file, or writing to the log file.";
                if self.details.len() < 2 { text.to_owned() } else { format!("{text}\nFile: '{a}', failing operation: '{b}'.") }
            }
            Code::DUPLICATE_CPU => format!("Invalid CPU configuration. User provided `{a}` contains same CPU(s) (CPU(s) {b}) multiple times."),
            Code::CPU_NOT_IN_POOL => format!("No such CPU available in the pool. User provided `{a}` contains CPU {b}, which is not available in the pool.\nYou can add a specific CPU to the CPU pool by editing the `cpu_pool` value from '/etc/nitro_enclaves/allocator.yaml' and then enable the nitro-enclaves-allocator.service."),
            Code::INSUFFICIENT_CPUS => format!("Insufficient CPUs available in the pool. User provided `{a}` is {b}, which is more than the configured CPU pool size.\nYou can increase the CPU pool size by editing the `cpu_count` value from '/etc/nitro_enclaves/allocator.yaml' and then enable the nitro-enclaves-allocator.service."),
            Code::MALFORMED_CPU => "Malformed CPU ID error. Such error appears when a `lscpu` line is malformed and reports an invalid online CPUs list.".to_owned(),
            Code::MEMORY_TOO_SMALL if self.details.len() < 3 => format!("Insufficient memory requested. User provided `{a}` is {b} MB, and memory should be greater than 0 MB."),
            Code::MEMORY_TOO_SMALL => format!("Insufficient memory requested. User provided `{a}` is {b} MB, but based on the EIF file size, the minimum memory should be {} MB", self.detail(2)),
            Code::NO_HUGEPAGES => format!("Insufficient memory available. User provided `{a}` is {b} MB, which is more than the available hugepage memory.\nYou can increase the available memory by editing the `memory_mib` value from '/etc/nitro_enclaves/allocator.yaml' and then restart the nitro-enclaves-allocator.service."),
            Code::IOCTL => "Ioctl failure. Such error is used as a general ioctl error and appears whenever an ioctl fails. In this case, the error backtrace provides detailed information on what specifically failed during the ioctl.".to_owned(),
            Code::EIF => "EIF file parsing error. Such errors appear when attempting to fill a memory region with a section of the EIF file, but reading the entire section fails. This might indicate that the required hugepages are not available.".to_owned(),
            Code::BOOT => "Enclave boot failure. Such error appears when attempting to receive the `ready` signal from a freshly booted enclave. It arises in several contexts, for instance, when the enclave is booted from an invalid EIF file and the enclave process immediately exits, failing to submit the `ready` signal. In this case, the error backtrace provides detailed information on what specifically failed during the enclave boot process.".to_owned(),
            Code::NOT_EXECUTED => "Enclave process command not executed error. Such error appears when at least one enclave fails to provide the description information.".to_owned(),
            Code::CONNECTION => "Enclave process connection failure. Such error appears when the enclave manager fails to connect to at least one enclave process for retrieving the description information.".to_owned(),
            Code::CONSOLE => "Enclave console connection failure. Such error appears when the Nitro CLI process fails to establish a connection to a running enclave's console.".to_owned(),
            Code::NAME => "Naming error. Such error appears when trying to perform an enclave operation using the enclave name and the name is invalid.".to_owned(),
            Code::SIGNATURE => "EIF signature checker error. Such error appears when validation of the signing certificate fails.".to_owned(),
            Code(other) => format!("Error {other} of the stand-in's hazards."),
        }
    }
}

/// Appends one line to `nitro_enclaves.log`, creating it as the real one does: writable by everyone.
///
/// # Errors
/// E19 naming the log file, if it can't be opened or written.
pub(super) fn log(environment: &Environment, who: &str, message: &str) -> Result<(), Failure> {
    let path = environment.logs.join("nitro_enclaves.log");
    let open = || -> std::io::Result<()> {
        let fresh = !path.exists();
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        if fresh {
            file.set_permissions(fs::Permissions::from_mode(0o766))?;
        }
        let time = humantime::format_rfc3339_millis(SystemTime::now());
        file.write_all(format!("[{who}:{}][INFO][{time}][standin:0] {message}\n", std::process::id()).as_bytes())
    };
    open().map_err(|error| Failure::file(&path, "Open", &error).during("Failed to open log file"))
}
