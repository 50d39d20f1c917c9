//! What clients of HTTPS see of a proxy that ends: what is under way is finished, what is idle is closed at once, and what comes
//! too late is not begun. Frames of HTTP/2 are read and written by hand.

use crate::abuse::{END_HEADERS, END_STREAM, HEADERS, REQUEST, frame};
use crate::support::{DEADLINE, Enclave, Host, body, https_address, soon, traffic};
use enclaved_core::routes::Direction;
use http::Response;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

/// Within this a connection is closed "at once", and a proxy ends that waits for nobody. Its drain is far longer.
const AT_ONCE: Duration = Duration::from_secs(3);

const DATA: u8 = 0;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const OK: u8 = 0x88;

/// A host that drains for long, and an enclave that answers when it is told to.
struct Draining {
    host: Host,
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    release: watch::Sender<bool>,
    _enclave: Enclave,
}

impl Draining {
    async fn new() -> Self {
        let host = Host::with_limits(|limits| limits.drain = DEADLINE).await;
        let asked = Arc::new(AtomicUsize::new(0));
        let (release, released) = watch::channel(true);
        let count = asked.clone();
        let enclave = Enclave::http(&host.vsock(), 16, move |_, _| {
            count.fetch_add(1, SeqCst);
            let mut released = released.clone();
            async move {
                released.wait_for(|released| *released).await.unwrap();
                Response::new(body("done"))
            }
        });
        let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
        Self { host, address, asked, release, _enclave: enclave }
    }

    async fn tls(&self, protocol: &[u8]) -> TlsStream<TcpStream> {
        self.host.tls(self.address, "a.test", protocol).await.unwrap()
    }

    /// From now on requests are not answered.
    fn hold(&self) {
        self.release.send(false).unwrap();
    }

    async fn until_connections(&self, connections: u64) {
        let all = |report: &enclaved_core::routes::ProxyReport| report.https_connections == connections;
        self.host.until("the connections are accepted", all).await;
    }

    async fn until_in_flight(&self, requests: u64) {
        let all = |report: &_| traffic(report, Direction::Https).open == requests;
        self.host.until("the requests are in flight", all).await;
    }
}

/// A client of HTTP/2 that acknowledges what it must, and is told the rest.
struct Frames(TlsStream<TcpStream>);

#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// The last stream that is answered, and the error.
    GoAway(u32, u32),
    /// The stream, and the first byte of its headers.
    Headers(u32, u8),
    /// The stream, and whether that was the last of it.
    Data(u32, Vec<u8>, bool),
    Pong,
    Closed,
}

impl Frames {
    async fn on(mut tls: TlsStream<TcpStream>) -> Self {
        let settings = frame(SETTINGS, 0, 0, &[]);
        tls.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..]].concat()).await.unwrap();
        Self(tls)
    }

    async fn ask(&mut self, stream: u32) {
        self.0.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, stream, REQUEST)).await.unwrap();
    }

    async fn next(&mut self) -> Said {
        loop {
            let mut head = [0; 9];
            // It closes TLS first, so that nothing can have been cut off.
            if soon("a frame", self.0.read(&mut head[..1])).await.unwrap() == 0 {
                return Said::Closed;
            }
            self.0.read_exact(&mut head[1..]).await.unwrap();
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.0.read_exact(&mut payload).await.unwrap();
            let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
            match head[3] {
                // It may be closed already; then it needs no answer.
                SETTINGS | PING if head[4] & ACK == 0 => {
                    let echo = if head[3] == PING { &payload[..] } else { &[] };
                    drop(self.0.write_all(&frame(head[3], ACK, 0, echo)).await);
                }
                PING => return Said::Pong,
                GOAWAY => return Said::GoAway(number(0), number(4)),
                HEADERS => return Said::Headers(stream, payload[0]),
                DATA => return Said::Data(stream, payload, head[4] & END_STREAM != 0),
                _ => {}
            }
        }
    }

    /// What comes after it was told to go away, which it is: first with room for what is on its way, then for good.
    async fn until_told_to_go(&mut self, last: u32) {
        loop {
            match self.next().await {
                Said::GoAway(stream, 0) if stream == last => return,
                Said::GoAway(stream, 0) if stream == u32::MAX >> 1 => {}
                other => panic!("{other:?} in place of GOAWAY"),
            }
        }
    }
}

#[tokio::test]
async fn a_client_of_http2_is_told_to_go_away_and_has_the_answer_to_what_it_asked_before_and_to_nothing_after() {
    let mut draining = Draining::new().await;
    let mut busy = Frames::on(draining.tls(b"h2").await).await;
    draining.hold();
    busy.ask(1).await;
    draining.until_in_flight(1).await;

    let release = draining.release.clone();
    let client = async {
        busy.until_told_to_go(1).await;
        busy.ask(3).await;
        // By the answer to this it has read what came before.
        busy.0.write_all(&frame(PING, 0, 0, &[7; 8])).await.unwrap();
        assert_eq!(busy.next().await, Said::Pong);
        release.send(true).unwrap();
        assert_eq!(busy.next().await, Said::Headers(1, OK));
        assert_eq!(busy.next().await, Said::Data(1, b"done".to_vec(), true));
        assert_eq!(busy.next().await, Said::Closed);
    };
    let (stopped, ()) = tokio::join!(timeout(AT_ONCE, draining.host.stop()), client);
    stopped.expect("it waited for the drain's end").unwrap();
    assert_eq!(draining.asked.load(SeqCst), 1, "what came too late was begun");

    // Elsewhere it is answered: here by the next proxy.
    draining.host.start().await;
    let address = https_address(&draining.host.until("HTTPS is open", |report| report.revision.is_some()).await);
    let mut again = Frames::on(draining.host.tls(address, "a.test", b"h2").await.unwrap()).await;
    again.ask(1).await;
    assert_eq!(again.next().await, Said::Headers(1, OK));
}

#[tokio::test]
async fn an_answer_over_http1_says_that_the_connection_closes_and_nothing_more_is_answered_over_it() {
    let mut draining = Draining::new().await;
    let mut busy = draining.tls(b"http/1.1").await;
    draining.hold();
    busy.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
    draining.until_in_flight(1).await;
    let (address, release) = (draining.address, draining.release.clone());
    let client = async {
        // By then it has been told to end.
        soon("its port is closed", async { while TcpStream::connect(address).await.is_ok() {} }).await;
        busy.write_all(b"GET /too-late HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
        release.send(true).unwrap();
        let mut answer = String::new();
        soon("the answer", busy.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\ndone"), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    };
    let (stopped, ()) = tokio::join!(timeout(AT_ONCE, draining.host.stop()), client);
    stopped.expect("it waited for the drain's end").unwrap();
    assert_eq!(draining.asked.load(SeqCst), 1, "what came too late was begun");
}

#[tokio::test]
async fn idle_connections_are_closed_at_once_and_those_that_never_asked_when_their_first_request_cannot_be_on_its_way()
{
    let mut draining = Draining::new().await;
    let (mut fresh, mut used) = (draining.tls(b"http/1.1").await, draining.tls(b"http/1.1").await);
    used.write_all(b"HEAD / HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("the answer", used.read_u8()).await.unwrap());
    }
    let mut fresh2 = Frames::on(draining.tls(b"h2").await).await;
    let mut used2 = Frames::on(draining.tls(b"h2").await).await;
    used2.ask(1).await;
    assert_eq!(used2.next().await, Said::Headers(1, OK));
    assert_eq!(used2.next().await, Said::Data(1, b"done".to_vec(), true));
    // In the middle of its handshake.
    let mut silent = TcpStream::connect(draining.address).await.unwrap();
    draining.until_connections(5).await;

    let clients = async {
        assert_eq!(soon("the end", used.read(&mut [0; 1])).await.unwrap(), 0);
        used2.until_told_to_go(1).await;
        assert_eq!(used2.next().await, Said::Closed);
        // Those that never asked are still open.
        timeout(Duration::ZERO, silent.read(&mut [0; 1])).await.unwrap_err();
        timeout(Duration::ZERO, fresh.read(&mut [0; 1])).await.unwrap_err();
        assert_eq!(soon("the end", fresh.read(&mut [0; 1])).await.unwrap(), 0);
        assert_eq!(soon("the end", silent.read(&mut [0; 1])).await.unwrap(), 0);
        fresh2.until_told_to_go(0).await;
        assert_eq!(fresh2.next().await, Said::Closed);
    };
    let (stopped, ()) = tokio::join!(timeout(AT_ONCE, draining.host.stop()), clients);
    stopped.expect("it waited for the drain's end").unwrap();
}

#[tokio::test]
async fn a_first_request_that_is_on_its_way_when_the_proxy_is_told_to_end_is_answered_and_so_is_one_in_a_handshake() {
    let mut draining = Draining::new().await;
    let mut fresh = draining.tls(b"http/1.1").await;
    let early = TcpStream::connect(draining.address).await.unwrap();
    let tls = tokio_rustls::TlsConnector::from(Arc::new(draining.host.client_config(b"http/1.1")));
    let address = draining.address;
    // Both are accepted when the port is closed: it accepts in the order in which they came.
    draining.until_connections(2).await;
    let clients = async {
        soon("its port is closed", async { while TcpStream::connect(address).await.is_ok() {} }).await;
        let mut late = soon("a handshake", tls.connect("a.test".try_into().unwrap(), early)).await.unwrap();
        for stream in [&mut fresh, &mut late] {
            stream.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
            assert!(
                answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("\r\nconnection: close\r\n"),
                "{answer}"
            );
        }
    };
    let (stopped, ()) = tokio::join!(timeout(AT_ONCE, draining.host.stop()), clients);
    stopped.expect("it waited for the drain's end").unwrap();
}
