//! The configuration: TOML files in, [`Config`] out, or everything that is wrong with them.
//!
//! [`form`] says which keys there are, [`structure`] checks types and ranges against it, [`meaning`] judges the rest and makes
//! what is wanted of the host. [`load`] alone touches files; nothing here looks at the host, so that a configuration
//! can be checked anywhere (`enclavectl check`).

mod error;
mod form;
mod meaning;
mod source;
mod structure;
#[cfg(test)]
mod tests;

pub use error::{ConfigError, ConfigErrors, Position};

use enclaved_core::desired::Desired;
use error::Problems;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use source::Tree;
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

/// Where the configuration is, unless something else is said.
pub const DEFAULT_PATH: &str = "/etc/enclaved/enclaved.toml";
/// Where the sockets are, unless the configuration says something else.
pub const DEFAULT_RUN_DIR: &str = "/run/enclaved";
/// Where a proxy has it that this process starts, below `run_dir`.
pub const DIRECT_PROXY_SOCKET: &str = "proxy.sock";
/// Where `enclaved-proxy.service` has the proxy's socket.
pub const UNIT_PROXY_SOCKET: &str = "/run/enclaved-proxy/link.sock";
/// The largest file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// The most files that are read.
pub const MAX_FILES: usize = 64;

/// A configuration that was checked. It can be kept as what it means, too ([`crate::last_good`]): a field that is added needs a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// How the daemon works on this host.
    pub host: HostSettings,
    /// The program nitro-cli: a name to be found in PATH, or an absolute path.
    pub nitro_cli: PathBuf,
    /// Metrics, `/ready` and `/live`.
    pub metrics: MetricsSettings,
    /// Who receives the status, if anyone.
    pub control_plane: Option<ControlPlaneSettings>,
    /// What is wanted of the host.
    pub desired: Desired,
    /// Fingerprint of the files' contents: 12 hexadecimal digits.
    pub revision: String,
    /// The files as they were read, so that this configuration can be kept byte for byte.
    #[serde(skip)]
    pub sources: Vec<SourceFile>,
    /// What is allowed and should be known; each with file, line and column.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// How the daemon works on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSettings {
    /// What supervises the enclaves.
    pub supervisor: SupervisorKind,
    /// What becomes of the enclaves when the daemon stops.
    pub on_stop: OnStop,
    /// Images, ledger, last good configuration.
    pub state_dir: PathBuf,
    /// Sockets and records of this boot; at most 80 bytes long.
    pub run_dir: PathBuf,
    /// The proxy's certificates and last routes.
    pub proxy_state_dir: PathBuf,
    /// The socket on which the proxy takes its routes.
    pub proxy_socket: PathBuf,
    /// Where sysfs is.
    pub sysfs: PathBuf,
}

impl HostSettings {
    /// The socket on which the daemon answers `enclavectl`.
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join(ADMIN_SOCKET)
    }
}

/// The name of the admin socket in the run directory.
pub const ADMIN_SOCKET: &str = "admin.sock";

/// What supervises the enclaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SupervisorKind {
    /// systemd: every enclave is a unit of its own, `enclave@<name>-<generation>.service`, the proxy is
    /// `enclaved-proxy.service`; the daemon starts and stops them over D-Bus.
    #[default]
    Systemd,
    /// The daemon itself, for containers and laptops: it starts enclaves and proxy as processes of their own and watches them.
    /// They outlive it.
    Direct,
}

/// What becomes of the enclaves when the daemon is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnStop {
    /// They go on, with their traffic; the next daemon finds them again.
    #[default]
    Keep,
    /// They are drained and ended: for pods, whose processes end with them.
    Terminate,
}

/// Metrics, `/ready` and `/live`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsSettings {
    /// Address and port; port 0 lets the kernel choose.
    pub listen: SocketAddr,
}

/// Who receives the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlPlaneSettings {
    /// `https://`, or `http://` to a loopback address; without user name, query and fragment.
    pub url: String,
    /// How often the status is sent if nothing changes; 1 s to 1 h.
    pub interval: Duration,
}

/// A configuration file as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it was.
    pub path: PathBuf,
    /// What was in it.
    pub text: String,
}

/// Reads and checks the file at `path` and every `conf.d/*.toml` beside it.
///
/// # Errors
/// A file that can't be read, or everything that is wrong with the files' contents.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    parse(&read(path)?)
}

/// Reads the file at `path` and every `conf.d/*.toml` beside it (names that begin with a dot aside), in the order of their names.
/// At most [`MAX_FILES`] files of [`MAX_FILE_BYTES`] each.
///
/// # Errors
/// The first file that can't be read.
pub fn read(path: &Path) -> Result<Vec<SourceFile>, ConfigErrors> {
    let mut sources = vec![read_file(path)?];
    let dir = path.parent().unwrap_or(Path::new("")).join("conf.d");
    let unreadable = |error: std::io::Error| whole(&dir, format!("the directory can't be read: {error}"));
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(sources),
        Err(error) => return Err(unreadable(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(unreadable)?.file_name();
        let hidden = name.as_encoded_bytes().starts_with(b".");
        if !hidden && Path::new(&name).extension().is_some_and(|extension| extension == "toml") {
            names.push(name);
        }
        if names.len() >= MAX_FILES {
            return Err(whole(&dir, format!("holds {MAX_FILES} files or more; at most {} are allowed", MAX_FILES - 1)));
        }
    }
    names.sort();
    for name in names {
        sources.push(read_file(&dir.join(name))?);
    }
    Ok(sources)
}

/// Checks what was read. Touches no files.
///
/// # Errors
/// Everything that is wrong; where the form of a file is so far off that its meaning can't be judged, everything that is
/// wrong with the form.
pub fn parse(sources: &[SourceFile]) -> Result<Config, ConfigErrors> {
    static SCHEMA: LazyLock<serde_json::Value> = LazyLock::new(|| form::schema().to_value());
    let mut problems = Problems::default();
    let mut tree = Tree::read(sources, &mut problems);
    let mut config = None;
    if problems.is_empty() && structure::check(&mut tree, &SCHEMA, &mut problems) {
        match serde_json::from_value(tree.root.value.to_json()) {
            Ok(form) => config = meaning::config(form, &tree, sources, &mut problems),
            // The schema and the types are made from one source, so this would be a defect of ours; not of the host.
            Err(error) => problems.add(&tree, &source::Path::default(), format!("can't be understood: {error}")),
        }
    }
    let warnings = problems.finish(sources)?;
    match config {
        Some(config) => Ok(Config { warnings, ..config }),
        None => Err(whole(Path::new("(configuration)"), "can't be understood".to_owned())),
    }
}

/// The run directory by the file at `path`, whatever else may be wrong with it; the default where it does not say.
///
/// For tools that look for the daemon's socket: the daemon may run on an older, better configuration.
pub fn run_dir(path: &Path) -> PathBuf {
    let mut problems = Problems::default();
    let tree = read(path).map(|sources| Tree::read(&sources, &mut problems)).ok();
    let at = source::Path::default().key("host").key("run_dir");
    tree.and_then(|tree| tree.text(&at).map(PathBuf::from)).unwrap_or_else(|| DEFAULT_RUN_DIR.into())
}

/// The JSON schema of the configuration file: `config/enclaved.schema.json`.
pub fn schema() -> serde_json::Value {
    form::schema().to_value()
}

fn read_file(path: &Path) -> Result<SourceFile, ConfigErrors> {
    let unreadable = |error: std::io::Error| whole(path, format!("can't be read: {error}"));
    let file = fs::File::open(path).map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(whole(path, "is not a file".to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(whole(path, format!("is larger than {MAX_FILE_BYTES} bytes")));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(SourceFile { path: path.to_owned(), text }),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            let position = Position::of(&String::from_utf8_lossy(error.as_bytes()), valid);
            let message = "not TOML: the text is not UTF-8 here".to_owned();
            let error = ConfigError { file: path.to_owned(), position: Some(position), key: String::new(), message };
            Err(ConfigErrors::one(error))
        }
    }
}

fn whole(path: &Path, message: String) -> ConfigErrors {
    ConfigErrors::one(ConfigError { file: path.to_owned(), position: None, key: String::new(), message })
}

/// Depends on the files' contents and their order, not on where they are.
fn revision(sources: &[SourceFile]) -> String {
    let mut hash = Sha256::new();
    for source in sources {
        hash.update((source.text.len() as u64).to_be_bytes());
        hash.update(&source.text);
    }
    hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}
