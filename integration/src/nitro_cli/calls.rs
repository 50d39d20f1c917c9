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
    /// The host's side of vsock as it was then: the sockets that listened, as `<cid>.sock_<port>`.
    #[serde(default)]
    pub listening: Vec<String>,
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
        listening: environment.vsock.as_deref().map(listening).unwrap_or_default(),
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

/// The sockets in a vsock folder on which the host listens now, as `<cid>.sock_<port>`, by the kernel's own list: nobody is
/// connected to, so nobody counts a connection. None if there is no such list.
pub fn listening(vsock_folder: &Path) -> Vec<String> {
    let list = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let mut names: Vec<String> = list.lines().filter_map(|line| listener_in(line, vsock_folder)).collect();
    names.sort_unstable();
    names
}

/// `Num RefCount Protocol Flags Type St Inode Path`
fn listener_in(line: &str, folder: &Path) -> Option<String> {
    /// `__SO_ACCEPTCON`
    const LISTENS: u32 = 1 << 16;
    let mut fields = line.split_ascii_whitespace().skip(3);
    let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
    let path = Path::new(fields.nth(3)?);
    let name = path.file_name()?.to_str()?;
    let is_host_side = path.parent() == Some(folder) && name.contains(".sock_");
    (flags & LISTENS != 0 && is_host_side).then(|| name.to_owned())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn only_what_listens_in_the_folder_is_listed() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(listening(folder.path()), [] as [String; 0]);
        let egress = UnixListener::bind(folder.path().join("16.sock_8000")).unwrap();
        let _enclave = UnixListener::bind(folder.path().join("16.sock")).unwrap();
        let _connected = UnixStream::connect(folder.path().join("16.sock_8000")).unwrap();
        assert_eq!(listening(folder.path()), ["16.sock_8000"]);
        drop(egress);
        assert!(folder.path().join("16.sock_8000").exists(), "the file stays");
        assert_eq!(listening(folder.path()), [] as [String; 0]);
    }
}
