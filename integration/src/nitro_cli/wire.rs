//! What goes over a control socket: one command, written twice as the real one does, and the replies to it.
//!
//! The listener of a background process reads the first copy and drops a connection where it makes no sense; the process
//! itself reads the second, and ends (its enclave with it) where that one is missing. That is the real one's conduct.

use super::arguments::RunArguments;
use super::failure::{Code, Failure};
use super::faults::Fault;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Longest line, in bytes; images' metadata go through here.
pub(super) const MAX_LINE: u64 = 4 * 1024 * 1024;
/// How long a background process may take to confirm that it has seen a command.
const CONFIRMATION: Duration = Duration::from_secs(3);

/// A command to a background process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Command {
    Run { arguments: RunArguments, fault: Option<Fault> },
    Terminate,
    Describe { metadata: bool },
    Cid,
    IsDebug,
    Name,
    IdByName(String),
}

/// A reply; the last one of a connection that went well is the status.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Reply {
    Confirm,
    Stdout(String),
    Stderr(String),
    Value(u64),
    Status(i32),
}

/// One line of JSON.
pub(super) fn line(message: &impl Serialize) -> Vec<u8> {
    // These types have no map with keys that are no strings and no serializer of their own, so this can't fail; an
    // empty line would be refused by the reader.
    let mut bytes = serde_json::to_vec(message).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn socket(error: &std::io::Error) -> Failure {
    Failure::new(Code::SOCKET, error.to_string())
}

/// A connection to a background process, with a command on its way.
#[derive(Debug)]
pub(super) struct Connection {
    reader: BufReader<UnixStream>,
}

/// All that a background process answered.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) stdout: String,
    pub(super) status: Option<i32>,
}

impl Answer {
    /// The JSON, if it is some.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(&self.stdout).ok()
    }
}

impl Connection {
    /// Sends a command.
    pub(super) fn send(mut stream: UnixStream, command: &Command) -> Result<Self, Failure> {
        let line = line(command);
        stream.write_all(&line).and_then(|()| stream.write_all(&line)).map_err(|error| socket(&error))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    fn receive(&mut self) -> Result<Reply, Failure> {
        let mut line = Vec::new();
        self.reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(|error| socket(&error))?;
        serde_json::from_slice(&line).map_err(|error| Failure::new(Code::SERDE, error.to_string()))
    }

    /// Waits, not long, until the process confirms that it has seen the command.
    pub(super) fn is_confirmed(&mut self) -> bool {
        let limited = self.reader.get_ref().set_read_timeout(Some(CONFIRMATION)).is_ok();
        let confirmed = limited && matches!(self.receive(), Ok(Reply::Confirm));
        confirmed && self.reader.get_ref().set_read_timeout(None).is_ok()
    }

    /// Reads a number, the answer to `Cid` and `IsDebug`.
    pub(super) fn value(&mut self) -> Result<u64, Failure> {
        match self.receive()? {
            Reply::Value(value) => Ok(value),
            other => Err(Failure::new(Code::SOCKET, format!("{other:?} in place of a number"))),
        }
    }

    /// Reads until the process closes the connection; what is meant for stderr is printed as it comes.
    pub(super) fn answer(mut self) -> Answer {
        let mut answer = Answer::default();
        while let Ok(reply) = self.receive() {
            match reply {
                Reply::Stdout(text) => answer.stdout.push_str(&text),
                Reply::Stderr(text) => eprintln!("{text}"),
                Reply::Status(status) => answer.status = Some(status),
                Reply::Confirm | Reply::Value(_) => {}
            }
        }
        answer
    }
}
