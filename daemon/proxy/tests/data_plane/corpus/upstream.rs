//! An application that keeps every byte it gets, reads requests strictly, and answers each with 200.

use crate::support::Enclave;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

#[derive(Clone)]
pub(super) struct Recorder {
    /// What each connection said, in the order of connections.
    said: Arc<Mutex<Vec<Vec<u8>>>>,
    open: Arc<watch::Sender<usize>>,
}

impl Recorder {
    pub(super) fn new() -> Self {
        Self { said: Arc::default(), open: Arc::new(watch::Sender::new(0)) }
    }

    /// An enclave that is this on every port.
    pub(super) fn enclave(&self, dir: &Path, cid: u32) -> Enclave {
        let recorder = self.clone();
        Enclave::raw(dir, cid, move |_, stream| recorder.clone().serve(stream))
    }

    /// Serves one connection.
    pub(super) async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send) {
        let number = {
            let mut said = self.said.lock().unwrap();
            said.push(Vec::new());
            said.len() - 1
        };
        self.open.send_modify(|open| *open += 1);
        let mut connection = Connection { stream, said: &self.said, number, read: 0 };
        // However it ends.
        while connection.request().await.is_some() {}
        self.open.send_modify(|open| *open -= 1);
    }

    /// All that was said, once nobody says more.
    pub(super) async fn all(&self) -> Vec<u8> {
        self.open.subscribe().wait_for(|open| *open == 0).await.unwrap();
        self.said.lock().unwrap().concat()
    }
}

struct Connection<'a, S> {
    stream: S,
    said: &'a Mutex<Vec<Vec<u8>>>,
    number: usize,
    /// Where the present request begins in what was said.
    read: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// One request, and its answer. `None` when there is no more, or nothing that can be understood.
    async fn request(&mut self) -> Option<()> {
        let head = self.until(b"\r\n\r\n").await?.to_ascii_lowercase();
        let value = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            line.map(str::to_owned)
        };
        if value("transfer-encoding").is_some() {
            loop {
                let size = self.until(b"\r\n").await?;
                let size = usize::from_str_radix(size.trim_end(), 16).ok()?;
                if size == 0 {
                    break;
                }
                self.take(size + 2).await?;
            }
            while self.until(b"\r\n").await? != "\r\n" {}
        } else if let Some(length) = value("content-length") {
            self.take(length.parse().ok()?).await?;
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        self.stream.write_all(answer).await.ok()
    }

    async fn until(&mut self, end: &[u8]) -> Option<String> {
        loop {
            let found = {
                let said = self.said.lock().unwrap();
                let new = &said[self.number][self.read..];
                let at = new.windows(end.len()).position(|window| window == end);
                at.map(|at| new[..at + end.len()].to_vec())
            };
            if let Some(found) = found {
                self.read += found.len();
                return Some(String::from_utf8_lossy(&found).into_owned());
            }
            self.more().await?;
        }
    }

    async fn take(&mut self, length: usize) -> Option<()> {
        while self.said.lock().unwrap()[self.number].len() < self.read + length {
            self.more().await?;
        }
        self.read += length;
        Some(())
    }

    async fn more(&mut self) -> Option<()> {
        let mut buffer = [0; 4096];
        let read = self.stream.read(&mut buffer).await.ok().filter(|read| *read > 0)?;
        self.said.lock().unwrap()[self.number].extend_from_slice(&buffer[..read]);
        Some(())
    }
}
