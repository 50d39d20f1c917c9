//! Hybrid vsock: vsock ports as Unix sockets, as Firecracker, Cloud Hypervisor and vhost-device-vsock have it.
//!
//! Host to enclave: connect to `<dir>/<cid>.sock`, write `CONNECT <port>\n`, read `OK <number>\n`, then the stream. A closed
//! port shows as end of file instead of `OK`. Enclave to host: the enclave's side connects to `<dir>/<cid>.sock_<port>`,
//! where the host listens.

use super::ConnectError;
use crate::unix_socket;
use enclaved_core::id::Cid;
use rustix::net::RecvFlags;
use std::io;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

/// Longest answer to `CONNECT` that is read: `OK 4294967295\n` with room to spare.
const ANSWER_BYTES: usize = 32;

pub(super) fn enclave_path(dir: &Path, cid: Cid) -> PathBuf {
    dir.join(format!("{cid}.sock"))
}

pub(super) fn host_path(dir: &Path, cid: Cid, port: u32) -> PathBuf {
    dir.join(format!("{cid}.sock_{port}"))
}

/// Connects, handshake included. The caller sets the deadline.
pub(super) async fn connect(dir: &Path, cid: Cid, port: u32) -> Result<UnixStream, ConnectError> {
    let path = enclave_path(dir, cid);
    unix_socket::check_length(&path)?;
    let failed = |source| ConnectError::Io { cid, port, source };
    let mut stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Err(ConnectError::NoEnclave { cid, source });
        }
        Err(source) => return Err(failed(source)),
    };
    match stream.write_all(format!("CONNECT {port}\n").as_bytes()).await {
        Ok(()) => {}
        Err(error) if is_closed(&error) => return Err(ConnectError::Refused { cid, port }),
        Err(error) => return Err(failed(error)),
    }
    let answer = match read_line(&stream).await {
        Ok(answer) if answer.is_empty() => return Err(ConnectError::Refused { cid, port }),
        Ok(answer) => answer,
        Err(error) if is_closed(&error) => return Err(ConnectError::Refused { cid, port }),
        Err(error) => return Err(failed(error)),
    };
    if is_ok(&answer) {
        Ok(stream)
    } else {
        Err(ConnectError::Handshake { cid, port, answer: answer.escape_ascii().to_string() })
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn is_ok(line: &[u8]) -> bool {
    let number = line.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
    number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

/// Reads up to and including a newline, or [`ANSWER_BYTES`], or to the end, and not a byte of what follows: that belongs to
/// the stream. Hence a look before each read.
async fn read_line(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(ANSWER_BYTES);
    loop {
        let mut chunk = [0; ANSWER_BYTES];
        let room = ANSWER_BYTES - line.len();
        let seen = receive(stream, &mut chunk[..room], RecvFlags::PEEK).await?;
        let newline = chunk[..seen].iter().position(|byte| *byte == b'\n');
        let wanted = newline.map_or(seen, |at| at + 1);
        // Exactly what was seen is there to be taken.
        let taken = if wanted == 0 { 0 } else { receive(stream, &mut chunk[..wanted], RecvFlags::empty()).await? };
        line.extend_from_slice(&chunk[..taken]);
        if newline.is_some() || taken == 0 || line.len() == ANSWER_BYTES {
            return Ok(line);
        }
    }
}

async fn receive(stream: &UnixStream, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    stream
        .async_io(Interest::READABLE, || {
            rustix::net::recv(stream, &mut *buffer, flags).map(|(read, _)| read).map_err(io::Error::from)
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vsock::{ListenPoint, Transport};
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
    use tokio::net::UnixListener;

    const CID: Cid = Cid::FIRST;

    /// An enclave's side that answers `CONNECT` with these bytes, in one write each, and closes.
    async fn against(answer: &'static [&'static [u8]]) -> Result<Vec<u8>, ConnectError> {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(enclave_path(dir.path(), CID)).unwrap();
        let enclave = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            for part in answer {
                // The other side may have seen enough and gone.
                if stream.write_all(part).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            line
        });
        let mut received = Vec::new();
        let result = match Transport::Hybrid(dir.path().into()).connect(CID, 8080).await {
            Ok(mut stream) => stream.read_to_end(&mut received).await.map(|_| received).map_err(|_| unreachable!()),
            Err(error) => Err(error),
        };
        assert_eq!(enclave.await.unwrap(), "CONNECT 8080\n");
        result
    }

    #[tokio::test]
    async fn bytes_that_follow_ok_belong_to_the_stream_however_they_are_split() {
        assert_eq!(against(&[b"OK 1073741824\nhello"]).await.unwrap(), b"hello");
        assert_eq!(against(&[b"O", b"K 5", b"\n", b"hello"]).await.unwrap(), b"hello");
    }

    #[tokio::test]
    async fn end_of_file_in_place_of_ok_is_a_closed_port() {
        assert!(matches!(against(&[]).await, Err(ConnectError::Refused { port: 8080, .. })));
    }

    #[tokio::test]
    async fn garbage_in_place_of_ok_is_named_and_bounded() {
        for answer in [
            &[&b"HTTP/1.1 200 OK\r\n"[..]][..],
            &[b"OK\n"],
            &[b"OK x\n"],
            &[b"OK 5"],
            &[b"OK 5\r\n"],
            &[b"\n"],
            &[&[b'A'; 100_000]],
            &[b"OK 00000000000000000000000000000000000000000\n"],
            &[b"\xff\x00\n"],
        ] {
            let answer: &'static [&'static [u8]] = Box::leak(answer.to_vec().into_boxed_slice());
            let Err(error) = against(answer).await else { panic!("{answer:?} was taken for OK") };
            assert!(matches!(error, ConnectError::Handshake { .. }), "{error:?}");
            assert!(error.to_string().len() < 300);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_in_place_of_ok_ends_at_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(enclave_path(dir.path(), CID)).unwrap();
        let error = Transport::Hybrid(dir.path().into()).connect(CID, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::TimedOut { .. }) && error.is_enclaves_fault(), "{error:?}");
    }

    #[tokio::test]
    async fn an_enclave_that_is_not_there_is_told_from_a_directory_that_cannot_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let error = Transport::Hybrid(dir.path().into()).connect(CID, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoEnclave { .. }), "{error:?}");
        let long = Transport::Hybrid(dir.path().join("x".repeat(100)));
        let error = long.connect(CID, 1).await.unwrap_err();
        assert!(!error.is_enclaves_fault(), "{error:?}");
    }

    #[tokio::test]
    async fn an_enclave_reaches_the_hosts_port_by_its_own_socket() {
        let dir = tempfile::tempdir().unwrap();
        let transport = Transport::Hybrid(dir.path().into());
        let point = transport.listen_point(CID, 8000);
        assert_eq!(point, ListenPoint { cid: Some(CID), port: 8000 });
        let listener = transport.listen(point).await.unwrap();
        assert_eq!(listener.address(), transport.address(point));
        let _enclave = UnixStream::connect(dir.path().join("16.sock_8000")).await.unwrap();
        assert_eq!(listener.accept().await.unwrap().1, Some(CID));
    }
}
