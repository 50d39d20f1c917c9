//! Clients that take their time: how long each is waited for, and what it counts as. With shorter limits than a host's; those are
//! asserted in `limits`. What such clients cost in memory is measured in `integration/tests/abuse`.

use crate::abuse;
use crate::support::{Body, Enclave, Host, body, https_address, soon, traffic};
use bytes::Bytes;
use enclaved_core::routes::{Direction, ProxyReport};
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

const SHORT: Duration = Duration::from_millis(400);

/// Reads until the proxy ends the connection; how long that took.
async fn until_its_end(mut client: impl tokio::io::AsyncRead + Unpin) -> Duration {
    let began = Instant::now();
    drop(soon("the end of a slow client", client.read_to_end(&mut Vec::new())).await);
    began.elapsed()
}

/// A client's handshake whose bytes come one at a time.
async fn dribbled_handshake(host: &Host, address: SocketAddr, pause: Duration) -> std::io::Result<()> {
    let (near, far) = duplex(64 << 10);
    let (mut said, mut heard) = tokio::io::split(far);
    let (mut from_proxy, mut to_proxy) = TcpStream::connect(address).await.unwrap().into_split();
    let dribble = async {
        while let Ok(byte) = said.read_u8().await {
            if to_proxy.write_u8(byte).await.is_err() {
                break;
            }
            // Any sleep is a millisecond.
            if !pause.is_zero() {
                sleep(pause).await;
            }
        }
    };
    let config = Arc::new(host.client_config(b"h2"));
    let connecting = tokio_rustls::TlsConnector::from(config).connect(ServerName::try_from("a.test").unwrap(), near);
    let carried = async {
        drop(tokio::io::copy(&mut from_proxy, &mut heard).await);
        heard.shutdown().await.unwrap();
        std::future::pending::<()>().await;
    };
    soon("a dribbled handshake", async {
        tokio::select! {
            connected = connecting => connected.map(drop),
            () = async { tokio::join!(dribble, carried); } => Ok(()),
        }
    })
    .await
}

#[tokio::test]
async fn a_handshake_has_its_time_in_all_however_its_bytes_come() {
    let host = Host::with_limits(|limits| limits.handshake = SHORT).await;
    let address = https_address(&host.publish(&host.site(&["a.test"], None)).await);
    // A hello has some 250 bytes.
    let began = Instant::now();
    assert!(dribbled_handshake(&host, address, Duration::from_millis(10)).await.is_err());
    assert!(began.elapsed() >= SHORT);
    // A hello that says it is long, and a record within it, and then nothing.
    let mut large = TcpStream::connect(address).await.unwrap();
    large.write_all(b"\x16\x03\x01\x40\x00\x01\x00\xff\xfc\x03\x03").await.unwrap();
    assert!(until_its_end(large).await >= SHORT / 2);
    let report = host.until("nobody is there", |report| report.https_connections == 0).await;
    assert_eq!((report.handshake_failures.len(), report.handshake_failures["timeout"]), (1, 2));
    // In time it is a client like others.
    dribbled_handshake(&host, address, Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_asks_for_nothing_ends_when_a_request_is_overdue() {
    let host = Host::with_limits(|limits| {
        limits.request_head = SHORT;
        // How long a client may take to take part in closing, which one that never spoke HTTP/2 does not.
        limits.handshake = SHORT;
    })
    .await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    for alpn in [&b"http/1.1"[..], b"h2"] {
        // It never asked.
        assert!(until_its_end(host.tls(address, "a.test", alpn).await.unwrap()).await >= SHORT / 2);
    }
    for alpn in ["http/1.1", "h2"] {
        let mut client =
            if alpn == "h2" { host.http2(address, "a.test").await } else { host.http1(address, "a.test").await };
        assert_eq!(client.get_text("/").await.0, 200);
        host.until("it was hung up on", |report| report.https_connections == 0).await;
        assert!(client.get("/").await.is_err());
    }
    assert!(traffic(&host.report().await, Direction::Https).failed.is_empty());
}

#[tokio::test]
async fn an_answer_that_a_client_over_http_1_does_not_read_ends_with_its_connection() {
    let host = Host::with_limits(|limits| limits.client_stall = SHORT).await;
    let large = Bytes::from(vec![b'x'; 32 << 20]);
    let _enclave = Enclave::http(&host.vsock(), 16, move |_, _| {
        let large = large.clone();
        async move { Response::new(body(large)) }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut deaf = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    // Two, of which the second waits for the first.
    let request = b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n";
    deaf.write_all(&request.repeat(2)).await.unwrap();
    host.until("it is being answered", |report| traffic(report, Direction::Https).bytes_from_enclave > 0).await;
    let report = host.until("it was hung up on", |report| report.https_connections == 0).await;
    assert_eq!((traffic(&report, Direction::Https).total, traffic(&report, Direction::Https).open), (1, 0));
    drop(deaf);
}

/// An application that answers when it has all.
async fn take(_: u32, request: Request<Incoming>) -> Response<Body> {
    let all = request.into_body().collect().await;
    Response::new(body(format!("{} bytes", all.map_or(0, |all| all.to_bytes().len()))))
}

#[tokio::test]
async fn an_upload_may_be_as_slow_as_it_likes_while_it_goes_on() {
    let host = Host::with_limits(|limits| {
        limits.request_body = SHORT;
        limits.answer = SHORT * 2;
        limits.request_head = SHORT;
    })
    .await;
    let _enclave = Enclave::http(&host.vsock(), 16, take);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut slow = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    slow.write_all(b"POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 10\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let began = Instant::now();
    for _ in 0..10 {
        sleep(SHORT / 2).await;
        slow.write_all(b"x").await.unwrap();
    }
    assert!(began.elapsed() > SHORT * 4);
    let mut answer = String::new();
    drop(soon("the answer", slow.read_to_string(&mut answer)).await);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("10 bytes"), "{answer}");
}

#[tokio::test]
async fn one_source_has_as_many_requests_in_flight_as_connections_unless_it_is_a_trusted_proxy() {
    let host = Host::with_limits(|limits| limits.https_source_connections = 3).await;
    let _enclave = Enclave::http(&host.vsock(), 16, |_, _| std::future::pending());
    let mut routes = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&routes).await);
    let ask = async |count: u32| {
        let mut tls = abuse::connect(&host, address).await;
        let requests: Vec<u8> = (0..count).flat_map(|number| abuse::request(1 + 2 * number)).collect();
        tls.write_all(&requests).await.unwrap();
        tls
    };
    let five = (ask(2).await, ask(3).await);
    let refused = |report: &ProxyReport| traffic(report, Direction::Https).failed.get("source_limit").copied();
    let report = host.until("two are refused", |report| refused(report) == Some(2)).await;
    assert_eq!(traffic(&report, Direction::Https).open, 3);
    drop(five);
    host.until("their places are free", |report| traffic(report, Direction::Https).open == 0).await;
    // What would be refused is not offered: the fourth and the fifth over one connection come to no enclave, and count as nothing.
    let three = ask(5).await;
    host.until("three are with the enclave", |report| traffic(report, Direction::Https).open == 3).await;
    drop(three);
    host.until("their places are free", |report| traffic(report, Direction::Https).open == 0).await;
    routes.https.as_mut().unwrap().rules.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
    host.publish(&routes).await;
    let _five = ask(5).await;
    let report = host.until("all are with the enclave", |report| traffic(report, Direction::Https).open == 5).await;
    assert_eq!(refused(&report), Some(2));
}
