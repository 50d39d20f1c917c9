//! What the access log is written to: a file, made again when it was moved away or removed, or the standard output. Everything here
//! may block for as long as a disk does. Lines are whole in the file, whatever failed: what was written of a torn one is taken back.

use crate::error_text::chain;
use enclaved_core::routes::AccessLog;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The standard output may be a pipe that others made non-blocking.
const AGAIN: Duration = Duration::from_millis(20);
/// Who may read a file that is made here: its owner and its group.
const MODE: u32 = 0o640;

#[derive(Debug)]
pub(super) struct Sink {
    to: AccessLog,
    open: Option<Open>,
    /// What is there ends within a line.
    torn: bool,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Device and inode, if it has a path that may come to mean another file.
    id: Option<(u64, u64)>,
    /// It can be cut back.
    regular: bool,
}

/// Not all was written.
#[derive(Debug)]
pub(super) struct Failed {
    /// Lines that are not there.
    pub(super) lost: u64,
    pub(super) error: String,
}

#[derive(Debug, thiserror::Error)]
#[error("could not {operation} {}", place.display())]
struct SinkError {
    operation: &'static str,
    place: PathBuf,
    #[source]
    source: io::Error,
}

impl Sink {
    pub(super) fn new(to: AccessLog) -> Self {
        Self { to, open: None, torn: false }
    }

    /// Writes lines. What could not be written is lost.
    pub(super) fn write(&mut self, lines: &[u8]) -> Result<(), Failed> {
        let lost = |rest: &[u8], error: &SinkError| {
            let lost = rest.iter().filter(|byte| **byte == b'\n').count();
            Failed { lost: u64::try_from(lost).unwrap_or(u64::MAX), error: chain(error) }
        };
        self.open().map_err(|error| lost(lines, &error))?;
        let Some(Open { file, regular, .. }) = &mut self.open else { return Ok(()) };
        let failed = |operation, source| SinkError {
            operation,
            place: self.to.file().map_or_else(|| "the standard output".into(), Path::to_owned),
            source,
        };
        if self.torn {
            // One broken line, rather than a whole one lost behind it.
            write(file, b"\n").map_err(|(_, error)| lost(lines, &failed("write to", error)))?;
            self.torn = false;
        }
        let Err((written, error)) = write(file, lines) else { return Ok(()) };
        let whole = lines[..written].iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let piece = u64::try_from(written - whole).unwrap_or(u64::MAX);
        self.torn = piece > 0 && !(*regular && take_back(file, piece).is_ok());
        let failed = lost(&lines[whole..], &failed("write to", error));
        // It may be another one by the next time: a file system that was mounted anew.
        self.open = None;
        Err(failed)
    }

    /// Opens it, unless it is open and still what its path means.
    fn open(&mut self) -> Result<(), SinkError> {
        let Some(path) = self.to.file() else {
            if self.open.is_none() {
                let place = || PathBuf::from("the standard output");
                let file = io::stdout().as_fd().try_clone_to_owned();
                let file = file.map_err(|source| SinkError { operation: "take", place: place(), source })?;
                self.open = Some(Open { file: file.into(), id: None, regular: false });
            }
            return Ok(());
        };
        let now = std::fs::metadata(path).ok().map(|now| (now.dev(), now.ino()));
        if self.open.as_ref().is_some_and(|open| now.is_some() && open.id == now) {
            return Ok(());
        }
        self.open = None;
        let failed = |operation, source| SinkError { operation, place: path.to_owned(), source };
        // To be read, too: for its last byte; and a pipe can be opened then before anybody reads it.
        let file = OpenOptions::new().read(true).append(true).create(true).mode(MODE).open(path);
        let mut file = file.map_err(|source| failed("open", source))?;
        let about = file.metadata().map_err(|source| failed("look at", source))?;
        let regular = about.is_file();
        // A process that was killed may have left half a line.
        self.torn = regular && about.len() > 0 && last_byte(&mut file).is_some_and(|byte| byte != b'\n');
        self.open = Some(Open { file, id: Some((about.dev(), about.ino())), regular });
        Ok(())
    }
}

/// How much was written before it failed.
fn write(file: &mut File, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(AGAIN),
            Err(error) => return Err((written, error)),
        }
    }
    Ok(())
}

fn take_back(file: &File, piece: u64) -> io::Result<()> {
    let length = file.metadata()?.len();
    file.set_len(length.checked_sub(piece).ok_or(io::ErrorKind::InvalidData)?)
}

/// Appending is not impaired by where it was read.
fn last_byte(file: &mut File) -> Option<u8> {
    let mut byte = [0];
    file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut byte)).ok()?;
    Some(byte[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_of_a_torn_line_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "whole\nto").unwrap();
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        take_back(&file, 2).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole\n");
        take_back(&file, 100).unwrap_err();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole\n", "somebody else has cut it meanwhile");
    }
}
