//! What hostile HTTP/2 clients do: frames written by hand. The connection ends, and others are served on. More of them, and what they
//! cost the process, in `integration/tests/abuse`.

use crate::support::{Enclave, Host, https_address, soon};
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

pub(crate) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// `:method: GET`, `:scheme: https`, `:path: /`, and `:authority: a.test` without the table or Huffman's code.
pub(crate) const REQUEST: &[u8] = b"\x82\x87\x84\x01\x06a.test";

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub(crate) async fn connect(host: &Host, address: SocketAddr) -> TlsStream<TcpStream> {
    let mut tls = host.tls(address, "a.test", b"h2").await.unwrap();
    let settings = frame(4, 0, 0, &[]);
    tls.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..]].concat()).await.unwrap();
    tls
}

/// A request on that stream.
pub(crate) fn request(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, stream, REQUEST)
}

/// Sends these frames until the proxy has had enough; how many it was sent before it ended the connection.
async fn flood(tls: TlsStream<TcpStream>, most: u32, frames: impl Fn(u32) -> Vec<u8>) -> u32 {
    let (mut reader, mut writer) = tokio::io::split(tls);
    let ended = async {
        let mut buffer = [0; 4096];
        while let Ok(1..) = reader.read(&mut buffer).await {}
    };
    let mut sent = 0;
    let sending = async {
        while sent < most && writer.write_all(&frames(sent)).await.is_ok() && writer.flush().await.is_ok() {
            sent += 1;
        }
        std::future::pending::<()>().await;
    };
    let either = async {
        tokio::select! {
            () = ended => {}
            () = sending => {}
        }
    };
    soon("the end of the connection", either).await;
    sent
}

#[tokio::test]
async fn floods_of_resets_and_of_headers_without_an_end_end_their_connection_alone() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut other = host.http2(address, "a.test").await;
    let most = 100_000;

    // Requests that are taken back at once, a hundred in each write.
    let resets = |round: u32| {
        let one = |number: u32| {
            let stream = 1 + 2 * (round * 100 + number);
            [request(stream), frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())].concat()
        };
        (0..100).flat_map(one).collect()
    };
    let sent = flood(connect(&host, address).await, most, resets).await;
    assert!(sent < most, "{sent}");
    assert_eq!(other.get_text("/").await, (200, "well".to_owned()));

    let endless = |round: u32| match round {
        0 => frame(HEADERS, END_STREAM, 1, REQUEST),
        // `x: ` and 4,000 bytes, of which no table keeps anything.
        _ => frame(CONTINUATION, 0, 1, &[&b"\x00\x01x\x7f\xa1\x1e"[..], &[b'y'; 4000]].concat()),
    };
    let sent = flood(connect(&host, address).await, most, endless).await;
    assert!(sent < 1000, "{sent} frames were taken");
    assert_eq!(other.get_text("/").await, (200, "well".to_owned()));
    host.until("only one is open", |report| report.https_connections == 1).await;
}
