//! Commands to all background processes, and what the real nitro-cli makes of their answers and of their absence.

use super::Environment;
use super::failure::{Code, Failure};
use super::wire::{Answer, Command, Connection};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The control socket of an enclave: named by what follows `-enc` in its ID.
pub(super) fn socket_path(environment: &Environment, enclave_id: &str) -> PathBuf {
    let slot = enclave_id.rsplit("-enc").next().unwrap_or(enclave_id);
    environment.sockets.join(slot).with_extension("sock")
}

/// Connects, unless the hazard that all connections fail is switched on.
pub(super) fn connect(path: &Path, connections_fail: bool) -> io::Result<UnixStream> {
    if connections_fail { Err(io::Error::other("too many open files")) } else { UnixStream::connect(path) }
}

/// Connects to every socket in the folder. A socket to which no connection can be made is deleted, whatever the cause,
/// unless it is a lack of permission: this is how the real one ends healthy enclaves of a caller without descriptors.
fn connect_to_all(environment: &Environment, connections_fail: bool) -> Result<Vec<UnixStream>, Failure> {
    let entries = fs::read_dir(&environment.sockets)
        .map_err(|error| Failure::new(Code::SOCKETS_FOLDER, format!("Failed to access sockets directory: {error}")))?;
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let sockets = paths.filter(|path| path.extension().is_some_and(|extension| extension == "sock") && !path.is_dir());
    let connected = sockets.filter_map(|path| match connect(&path, connections_fail) {
        Ok(stream) => Some(stream),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => None,
        Err(_) => {
            // As the real one: a socket that can't be deleted either is left alone.
            let _ignored = fs::remove_file(&path);
            None
        }
    });
    Ok(connected.collect())
}

/// Sends a command to all; gives the connections on which it was confirmed, and the number of those where it was not.
pub(super) fn send_to_all(
    environment: &Environment,
    command: &Command,
    connections_fail: bool,
) -> Result<(Vec<Connection>, usize), Failure> {
    let streams = connect_to_all(environment, connections_fail)?;
    let total = streams.len();
    let sent: Vec<Connection> =
        streams.into_iter().filter_map(|stream| Connection::send(stream, command).ok()).collect();
    let confirmed: Vec<Connection> =
        sent.into_iter().filter_map(|mut connection| connection.is_confirmed().then_some(connection)).collect();
    let failed = total - confirmed.len();
    Ok((confirmed, failed))
}

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One after the other.
    Single,
    /// As one array.
    Array,
}

/// What is to be printed of the answers, and how the command fails, if one is missing or says so.
pub(super) fn gather<T: DeserializeOwned + Serialize>(
    answers: Vec<Answer>,
    failed_before: usize,
    form: Form,
    accepted: &[i32],
) -> (String, Result<(), Failure>) {
    let total = answers.len();
    let whole: Vec<(T, i32)> =
        answers.into_iter().filter_map(|answer| Some((answer.json()?, answer.status?))).collect();
    let failed = failed_before + total - whole.len();
    if failed > 0 {
        eprintln!("Failed connections: {failed}");
    }
    let refused = whole.iter().filter(|(_, status)| !accepted.contains(status)).count();
    let objects: Vec<T> = whole.into_iter().map(|(object, _)| object).collect();
    let printed = match form {
        Form::Array => pretty(&objects),
        Form::Single => objects.iter().map(pretty).collect(),
    };
    let result = if refused > 0 {
        Err(Failure::new(Code::NOT_EXECUTED, format!("Failed to execute {refused} enclave process commands")))
    } else if failed > 0 {
        Err(Failure::new(Code::CONNECTION, format!("Failed to connect to {failed} enclave processes")))
    } else {
        Ok(())
    };
    (printed, result)
}

/// JSON as nitro-cli prints it, with the newline behind it.
pub(super) fn pretty(value: &impl Serialize) -> String {
    // Only this module's plain structures are printed; an empty line would fail every reader of it.
    format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default())
}
