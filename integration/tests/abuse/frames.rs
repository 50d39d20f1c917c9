//! HTTP/2 as no library would speak it: frames by hand, and how a flood of them ends.

use crate::proxy::{DOMAIN, Tls, within};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::{sleep, timeout};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
/// Of no known kind: to be passed over.
pub(crate) const UNKNOWN: u8 = 0xee;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const WHOLE: u8 = END_STREAM | END_HEADERS;

/// The largest window there is, and the first of every connection (RFC 9113, 6.9).
pub(crate) const LARGEST_WINDOW: u32 = (1 << 31) - 1;
const FIRST_WINDOW: u32 = (1 << 16) - 1;

/// How long a client that is not read from waits until it calls that backpressure, and all until they call it the end.
const STALLED: Duration = Duration::from_secs(1);

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The headers of a request, without the table or Huffman's code.
pub(crate) fn head(method: Method, path: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    // `:method`, `:scheme: https`, `:path`, `:authority`.
    let method = if method == Method::Get { 0x82 } else { 0x83 };
    [&[method, 0x87, 0x04][..], &text(path), &[0x01], &text(DOMAIN)].concat()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Post,
}

/// What a client says first; how much it takes of each answer, and of all.
pub(crate) fn preface(stream_window: u32, whole_window: u32) -> Vec<u8> {
    let settings = [&[0, 4][..], &stream_window.to_be_bytes()].concat();
    let mut preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &settings)].concat();
    if let Some(more @ 1..) = whole_window.checked_sub(FIRST_WINDOW) {
        preface.extend(frame(WINDOW_UPDATE, 0, 0, &more.to_be_bytes()));
    }
    preface
}

/// How a flood came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The proxy ended the connection.
    Ended,
    /// The proxy read no more.
    Stalled,
    /// All was taken.
    Taken,
}

/// Whether the client reads what it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    All,
    Nothing,
}

/// Writes these pieces until there are none, or the proxy has had enough.
pub(crate) async fn flood(tls: Tls, reads: Reads, pieces: impl Iterator<Item = Vec<u8>>) -> (End, Flooded) {
    let (mut reader, mut writer) = tokio::io::split(tls);
    let mut sent = 0;
    let writing = async {
        for piece in pieces {
            match timeout(STALLED, async {
                writer.write_all(&piece).await?;
                writer.flush().await
            })
            .await
            {
                Ok(Ok(())) => sent += piece.len(),
                Ok(Err(_)) => return End::Ended,
                Err(_) => return End::Stalled,
            }
        }
        // What it makes of the last of them may take a moment.
        sleep(STALLED).await;
        End::Taken
    };
    let reading = async {
        let mut buffer = vec![0; 16 << 10];
        if reads == Reads::Nothing {
            std::future::pending::<()>().await;
        }
        while let Ok(1..) = reader.read(&mut buffer).await {}
    };
    let end = within("a flood", async {
        tokio::select! {
            end = writing => end,
            () = reading => End::Ended,
        }
    });
    let end = end.await;
    (end, Flooded { sent, _held: (reader, writer) })
}

/// A connection after a flood, open until dropped.
#[derive(Debug)]
pub(crate) struct Flooded {
    /// Bytes that were taken of it.
    pub(crate) sent: usize,
    _held: (ReadHalf<Tls>, WriteHalf<Tls>),
}

/// The next frame: its kind, its stream and its payload. None at the end.
pub(crate) async fn next_frame(tls: &mut Tls) -> Option<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    within("a frame", tls.read_exact(&mut head)).await.ok()?;
    let [a, b, c, kind, _, s @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    within("a frame's payload", tls.read_exact(&mut payload)).await.ok()?;
    Some((kind, u32::from_be_bytes(s), payload))
}
