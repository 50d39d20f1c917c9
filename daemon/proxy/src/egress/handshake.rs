//! A relay that begins as a TLS handshake: until the server's hello is there, each hello of the client is judged; from then on it
//! is a relay like any other. Bytes are looked at as they pass: none is changed, and none waits.

use super::hello::{HelloError, Hellos};
use super::records::{Kind, Records};
use crate::counters::Traffic;
use crate::limits::Limits;
use crate::relay::{self, Broken, Carried};
use std::io;
use std::pin::Pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The random value of a server's hello that asks the client for another one: RFC 8446, 4.1.3.
const RETRY: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2, 0xa2, 0x11,
    0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// What is read of a server's message: type, length, version and random value.
const HEAD: usize = 4 + 2 + 32;

/// How a relay ended that began as a handshake.
#[derive(Debug)]
pub(super) enum Ended {
    Broken(Broken),
    /// The client is not to go on.
    Refused(HelloError),
}

/// As [`relay::relay`]; the first hello of the client was judged already, and passed on.
pub(super) async fn relay<E: Carried, O: Carried>(
    client: &mut E,
    server: &mut O,
    hellos: Hellos,
    traffic: &Traffic,
    limits: &Limits,
) -> Result<(), Ended> {
    let seen = Seen::default();
    let mut client = Watched { end: client, listening: Some(hellos), seen: &seen };
    let mut server = Watched { end: server, listening: Some(Answers::default()), seen: &seen };
    let ended = relay::relay(&mut client, &mut server, traffic, limits).await;
    match seen.refused.into_inner() {
        Some(error) => Err(Ended::Refused(error)),
        None => ended.map_err(Ended::Broken),
    }
}

/// What the two ends know of each other.
#[derive(Debug, Default)]
struct Seen {
    /// No hello of the client can follow.
    over: AtomicBool,
    refused: OnceLock<HelloError>,
}

/// Who listens to what an end says. Says whether the handshake has come so far that nobody needs to listen.
trait Listen: Unpin {
    fn hear(&mut self, bytes: &[u8]) -> Result<bool, HelloError>;
}

impl Listen for Hellos {
    fn hear(&mut self, bytes: &[u8]) -> Result<bool, HelloError> {
        self.take(bytes).map(|()| false)
    }
}

/// Waits for the hello of the server that is no request for another of the client.
#[derive(Debug, Default)]
struct Answers {
    records: Records,
    head: Vec<u8>,
    /// Bytes of a message that are of no interest.
    skip: usize,
}

impl Listen for Answers {
    fn hear(&mut self, mut bytes: &[u8]) -> Result<bool, HelloError> {
        let no_tls = |_| HelloError::Answer;
        while let Some((kind, mut part)) = self.records.next(&mut bytes).map_err(no_tls)? {
            match kind {
                // A warning may come before the hello, and after a fatal one nothing comes.
                Kind::Alert | Kind::ChangeCipherSpec => {}
                Kind::ApplicationData => return Err(HelloError::Answer),
                Kind::Handshake => {
                    while !part.is_empty() {
                        if self.message(&mut part)? {
                            return Ok(true);
                        }
                    }
                }
            }
        }
        Ok(false)
    }
}

impl Answers {
    /// Takes in a byte of a message, or what is of no interest. Whether that was all that is waited for.
    fn message(&mut self, part: &mut &[u8]) -> Result<bool, HelloError> {
        let skipped = self.skip.min(part.len());
        (*part, self.skip) = (&part[skipped..], self.skip - skipped);
        let Some((byte, rest)) = part.split_first() else { return Ok(false) };
        *part = rest;
        self.head.push(*byte);
        match self.head.as_slice() {
            // HelloRequest: empty, and of no account to a client that has just said hello.
            [0, 0, 0, 0] => self.head.clear(),
            [0] | [0, 0] | [0, 0, 0] => {}
            [2, rest @ ..] if rest.len() < HEAD - 1 => {}
            [2, high, middle, low, _, _, random @ ..] => {
                let length = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
                if random != RETRY {
                    return Ok(true);
                }
                self.skip = length.checked_sub(HEAD - 4).ok_or(HelloError::Answer)?;
                self.head.clear();
            }
            _ => return Err(HelloError::Answer),
        }
        Ok(false)
    }
}

/// An end that is listened to.
struct Watched<'a, T, L> {
    end: &'a mut T,
    listening: Option<L>,
    seen: &'a Seen,
}

impl<T, L: Listen> Watched<'_, T, L> {
    fn hear(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.seen.over.load(Relaxed) {
            self.listening = None;
        }
        let Some(listening) = &mut self.listening else { return Ok(()) };
        match listening.hear(bytes) {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.seen.over.store(true, Relaxed);
                self.listening = None;
                Ok(())
            }
            Err(error) => {
                let text = error.to_string();
                // The first to be refused is the reason.
                drop(self.seen.refused.set(error));
                Err(io::Error::other(text))
            }
        }
    }
}

impl<T: AsyncRead + Unpin, L: Listen> AsyncRead for Watched<'_, T, L> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut *self.end).poll_read(cx, buffer))?;
        if self.listening.is_some() {
            self.hear(&buffer.filled()[before..])?;
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin, L: Unpin> AsyncWrite for Watched<'_, T, L> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.end).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.end).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.end).poll_shutdown(cx)
    }
}

impl<T: Carried, L: Listen> Carried for Watched<'_, T, L> {
    fn failed(&self) -> Option<io::Error> {
        self.end.failed()
    }
}

#[cfg(test)]
mod tests {
    use super::super::records::record;
    use super::*;

    /// A server's hello of that length, with that random value.
    fn hello(random: [u8; 32]) -> Vec<u8> {
        [&[2, 0, 0, 60, 3, 3], &random[..], &[7; 26]].concat()
    }

    /// After how many bytes the server's hello is known to be there.
    fn known_after(bytes: &[u8]) -> Result<Option<usize>, HelloError> {
        let mut answers = Answers::default();
        for (at, byte) in bytes.iter().enumerate() {
            if answers.hear(&[*byte])? {
                return Ok(Some(at + 1));
            }
        }
        Ok(None)
    }

    #[test]
    fn only_a_servers_hello_that_asks_for_no_other_ends_the_watch() {
        let (retry, plain) = (record(22, &hello(RETRY)), record(22, &hello([1; 32])));
        let known = 5 + HEAD;
        assert_eq!(known_after(&plain).unwrap(), Some(known));
        assert_eq!(known_after(&retry).unwrap(), None);
        assert_eq!(known_after(&[&retry[..], &plain].concat()).unwrap(), Some(retry.len() + known));
        let (warning, compatible) = (record(21, &[1, 112]), record(20, &[1]));
        let all = [&warning[..], &retry, &compatible, &plain].concat();
        assert_eq!(known_after(&all).unwrap(), Some(all.len() - plain.len() + known));
        // Both in one record, after a request to say hello.
        let both = record(22, &[&[0; 4][..], &hello(RETRY), &hello([1; 32])].concat());
        assert_eq!(known_after(&both).unwrap(), Some(5 + 4 + 64 + HEAD));
        let mut whole = Answers::default();
        assert!(whole.hear(&all).unwrap(), "in one piece as in many");
    }

    #[test]
    fn an_upstream_that_speaks_something_else_is_told_at_once() {
        let certificate = record(22, &[11, 0, 0, 3, 0, 0, 0]);
        let short = record(22, &[&[2, 0, 0, 8, 3, 3], &RETRY[..]].concat());
        for other in [&b"HTTP/1.1 400"[..], b"SSH-2.0", &record(23, b"x"), &certificate, &short] {
            assert!(matches!(known_after(other), Err(HelloError::Answer)), "{other:?}");
        }
    }
}
