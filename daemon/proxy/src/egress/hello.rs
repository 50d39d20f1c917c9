//! What a TLS client says in clear: each of its hellos is judged by the server's name in it, and every byte is passed on as it
//! came. There may be two hellos in one handshake (RFC 8446, 4.1.2: the second answers a server that asks for it); which of
//! the two names a server goes by is its own affair, so both must be right.
//!
//! What nobody here can see, and what is therefore not judged: what is encrypted. That is the HTTP request and its Host; a TLS
//! 1.2 session that is negotiated anew (RFC 5746), where a server still allows that; and with encrypted client hello the name
//! inside of it: the one that can be seen, that of the server in front, counts.

use super::records::{Kind, NoRecord, PLAIN, Records};
use crate::counters::Failure;
use rustls::server::Acceptor;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// Longest hello. Post-quantum key shares take about 1.2 KB each.
const HELLO_BYTES: usize = 32 << 10;

/// Most hellos of one handshake: a server may ask for another one once.
const HELLOS: u32 = 2;

/// Why a connection is not one with that server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("it does not begin as TLS does")]
    NotTls,
    #[error("its TLS hello makes no sense")]
    Senseless(#[source] rustls::Error),
    #[error("it closed before it had said which server it wants")]
    Closed,
    #[error("it said {HELLO_BYTES} bytes without saying which server it wants")]
    TooLong,
    #[error("it did not say within {0:?} which server it wants")]
    TooSlow(Duration),
    #[error("it does not say which server it wants: TLS without SNI")]
    NoName,
    #[error("it asks for the server {0}")]
    OtherName(String),
    #[error("it says hello more often than TLS has it")]
    Again,
    #[error("the upstream does not answer as TLS does")]
    Answer,
    #[error("it could not be read")]
    Io(#[source] io::Error),
}

impl From<NoRecord> for HelloError {
    fn from(NoRecord: NoRecord) -> Self {
        Self::NotTls
    }
}

impl HelloError {
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::NotTls | Self::Senseless(_) | Self::Closed | Self::TooLong | Self::Again | Self::Answer => {
                Failure::NotTls
            }
            Self::TooSlow(_) => Failure::HelloTimeout,
            Self::NoName => Failure::NoServerName,
            Self::OtherName(_) => Failure::OtherServerName,
            Self::Io(_) => Failure::Reset,
        }
    }
}

/// Judges the hellos of one client.
#[derive(Debug)]
pub(super) struct Hellos {
    hostname: String,
    records: Records,
    /// The hello that is being said. Never longer than [`HELLO_BYTES`].
    message: Vec<u8>,
    judged: u32,
}

impl Hellos {
    pub(super) fn new(hostname: &str) -> Self {
        Self { hostname: hostname.to_owned(), records: Records::default(), message: Vec::new(), judged: 0 }
    }

    /// Takes in what the client says. After an error none of it may be passed on: what came before is no whole hello.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), HelloError> {
        while let Some((kind, mut part)) = self.records.next(&mut bytes)? {
            match kind {
                Kind::Handshake => {
                    while !part.is_empty() {
                        self.hear(&mut part)?;
                    }
                }
                _ if self.judged == 0 => return Err(HelloError::NotTls),
                // Early data, and what goes before a second hello.
                Kind::ChangeCipherSpec | Kind::Alert | Kind::ApplicationData => {}
            }
        }
        Ok(())
    }

    /// Takes in a piece of a message, up to its end.
    fn hear(&mut self, part: &mut &[u8]) -> Result<(), HelloError> {
        let wanted = match self.message.as_slice() {
            [] | [_] | [_, _] | [_, _, _] => 4,
            [_, high, middle, low, ..] => {
                4 + (usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low))
            }
        };
        if wanted > HELLO_BYTES {
            return Err(HelloError::TooLong);
        }
        let (piece, rest) = part.split_at((wanted - self.message.len()).min(part.len()));
        *part = rest;
        self.message.extend_from_slice(piece);
        match self.message.first() {
            // ClientHello
            Some(1) => {}
            // What else a client says in clear it says after the server's hello, when nobody listens here any more.
            _ => return Err(HelloError::NotTls),
        }
        if self.judged == HELLOS {
            return Err(HelloError::Again);
        }
        // An empty hello has no end of its own to be seen at, and no sense.
        if self.message.len() == wanted && wanted > 4 {
            let message = std::mem::take(&mut self.message);
            judge(name(&message)?.as_deref(), &self.hostname)?;
            self.judged += 1;
        } else if self.message == [1, 0, 0, 0] {
            return Err(HelloError::NotTls);
        }
        Ok(())
    }
}

/// Reads until it is known that the client wants this server; everything that was read, and who judges what follows.
pub(super) async fn expect(
    client: &mut (impl AsyncRead + Unpin),
    hostname: &str,
    patience: Duration,
) -> Result<(Vec<u8>, Hellos), HelloError> {
    timeout(patience, read(client, hostname)).await.unwrap_or(Err(HelloError::TooSlow(patience)))
}

async fn read(client: &mut (impl AsyncRead + Unpin), hostname: &str) -> Result<(Vec<u8>, Hellos), HelloError> {
    let (mut hellos, mut bytes) = (Hellos::new(hostname), Vec::with_capacity(4 << 10));
    while hellos.judged == 0 {
        let known = bytes.len();
        // With records of one byte each, and some that follow.
        let room = (6 * HELLO_BYTES).saturating_sub(known) as u64;
        if room == 0 {
            return Err(HelloError::TooLong);
        }
        if (&mut *client).take(room).read_buf(&mut bytes).await.map_err(HelloError::Io)? == 0 {
            return Err(HelloError::Closed);
        }
        hellos.take(&bytes[known..])?;
    }
    Ok((bytes, hellos))
}

/// The server's name in a whole hello.
fn name(message: &[u8]) -> Result<Option<String>, HelloError> {
    let mut acceptor = Acceptor::default();
    for part in message.chunks(PLAIN) {
        let length = u16::try_from(part.len()).map_err(|_| HelloError::TooLong)?;
        let record = [&[22, 3, 1], &length.to_be_bytes()[..], part].concat();
        let mut record = record.as_slice();
        while !record.is_empty() {
            if acceptor.read_tls(&mut record).map_err(HelloError::Io)? == 0 {
                return Err(HelloError::TooLong);
            }
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => return Ok(accepted.client_hello().server_name().map(str::to_owned)),
            Err((error, _)) => return Err(HelloError::Senseless(error)),
        }
    }
    Err(HelloError::NotTls)
}

fn judge(name: Option<&str>, hostname: &str) -> Result<(), HelloError> {
    let name = name.ok_or(HelloError::NoName)?;
    let bare = |name: &str| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if bare(name) == bare(hostname) { Ok(()) } else { Err(HelloError::OtherName(name.to_owned())) }
}

#[cfg(test)]
mod tests;
