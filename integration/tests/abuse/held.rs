//! Connections of every kind that are held for as long as their clients can: what each costs at most, and that all of them together
//! stay within that. How many of them is the caller's: a few hundred in the default lane, thousands in the slow one.

use crate::frames::{DATA, END_HEADERS, HEADERS, Method, WHOLE, frame, head, preface};
use crate::proxy::{Clients, DOMAIN, Proxy, Tls, within};
use std::net::Ipv4Addr;
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How a client holds its connection, and what that may cost at most: see ARCHITECTURE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// It has begun its handshake, and says no more.
    Handshake,
    /// It has had its answer over HTTP/1.1, and asks no more.
    Idle,
    /// The same over HTTP/2.
    IdleHttp2,
    /// Its request's headers go on and on, just not to their limit.
    HalfHeaders,
    /// It reads nothing of a large answer.
    Answer,
    /// The same over HTTP/2, of two.
    AnswersHttp2,
    /// Its upload is not taken, and goes on and on.
    Upload,
    /// The same over HTTP/2, of two.
    UploadsHttp2,
}

impl Holds {
    const ALL: [Self; 8] = [
        Self::Handshake,
        Self::Idle,
        Self::IdleHttp2,
        Self::HalfHeaders,
        Self::Answer,
        Self::AnswersHttp2,
        Self::Upload,
        Self::UploadsHttp2,
    ];

    fn most_kib(self) -> f64 {
        match self {
            Self::Handshake => 64.0,
            Self::Idle => 40.0,
            Self::IdleHttp2 => 56.0,
            Self::HalfHeaders => 40.0 + 64.0,
            Self::Answer => 40.0 + 216.0,
            Self::AnswersHttp2 => 56.0 + 2.0 * 192.0,
            Self::Upload => 40.0 + 216.0,
            Self::UploadsHttp2 => 56.0 + 2.0 * 192.0,
        }
    }
}

/// Connections that are made at a time.
const AT_A_TIME: usize = 32;

/// A connection that is held.
#[expect(dead_code, reason = "it is only held")]
enum Held {
    Tcp(TcpStream),
    Tls(Box<Tls>),
}

/// What fits, and no more.
async fn push(tls: &mut Tls, pieces: impl Iterator<Item = Vec<u8>>) {
    const FULL: std::time::Duration = std::time::Duration::from_millis(50);
    for piece in pieces {
        let pushed = timeout(FULL, async {
            tls.write_all(&piece).await?;
            tls.flush().await
        });
        if !matches!(pushed.await, Ok(Ok(()))) {
            return;
        }
    }
}

async fn hold(proxy: Clients, how: Holds, source: Ipv4Addr) -> Held {
    let asking = |path: &str, more: &str| format!("{path} HTTP/1.1\r\nhost: {DOMAIN}\r\n{more}");
    let streams = || (1..).step_by(2);
    let mut tls = match how {
        Holds::Handshake => {
            let mut tcp = proxy.tcp(source).await;
            // A record of 16 KiB, of which a part comes.
            tcp.write_all(&[&[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3][..], &[0; 12_000]].concat()).await.unwrap();
            return Held::Tcp(tcp);
        }
        Holds::Idle | Holds::HalfHeaders | Holds::Answer | Holds::Upload => proxy.tls(b"http/1.1", source).await,
        Holds::IdleHttp2 | Holds::AnswersHttp2 | Holds::UploadsHttp2 => proxy.tls(b"h2", source).await,
    };
    match how {
        Holds::Handshake => {}
        Holds::Idle => {
            tls.write_all(asking("GET /", "\r\n").as_bytes()).await.unwrap();
            within("an answer", tls.read(&mut [0; 1024])).await.unwrap();
        }
        Holds::HalfHeaders => {
            let half = asking("GET /", &format!("x: {}", "y".repeat(30_000)));
            tls.write_all(half.as_bytes()).await.unwrap();
        }
        Holds::Answer => tls.write_all(asking("GET /big", "\r\n").as_bytes()).await.unwrap(),
        Holds::Upload => {
            tls.write_all(asking("POST /hold", "content-length: 100000000\r\n\r\n").as_bytes()).await.unwrap();
            push(&mut tls, std::iter::repeat_n(vec![b'u'; 16 << 10], 24)).await;
        }
        Holds::IdleHttp2 => {
            tls.write_all(&preface(65_535, 65_535)).await.unwrap();
            tls.write_all(&frame(HEADERS, WHOLE, 1, &head(Method::Get, "/"))).await.unwrap();
            within("an answer", tls.read(&mut [0; 1024])).await.unwrap();
        }
        Holds::AnswersHttp2 => {
            tls.write_all(&preface(1 << 20, 2 << 20)).await.unwrap();
            let asking = streams().take(2).map(|stream| frame(HEADERS, WHOLE, stream, &head(Method::Get, "/big")));
            push(&mut tls, asking).await;
        }
        Holds::UploadsHttp2 => {
            tls.write_all(&preface(65_535, 65_535)).await.unwrap();
            let begin =
                streams().take(2).map(|stream| frame(HEADERS, END_HEADERS, stream, &head(Method::Post, "/hold")));
            push(&mut tls, begin).await;
            // No more than the smallest window, which the proxy may have given to this one.
            let pieces = streams().take(2).map(|stream| frame(DATA, 0, stream, &[b'u'; 16_000]));
            push(&mut tls, pieces).await;
        }
    }
    tls.flush().await.unwrap();
    Held::Tls(Box::new(tls))
}

/// Holds so many connections of each kind, and what they cost is what that kind may.
pub(crate) async fn hold_of_each_kind(proxy: &Proxy, count: u32) {
    proxy.serves().await;
    let first = proxy.memory_mib();
    let (mut held, mut most, mut before) = (Vec::new(), 0.0, first);
    for (number, how) in (0..).zip(Holds::ALL) {
        let began = Instant::now();
        let mut holding = JoinSet::new();
        for client in 0..count {
            // Few enough for one source.
            let source = Ipv4Addr::new(127, 10 + number, 0, 1 + u8::try_from(client / 100).unwrap());
            holding.spawn(hold(proxy.clients.clone(), how, source));
            if holding.len() >= AT_A_TIME {
                held.extend(holding.join_next().await.map(Result::unwrap));
            }
        }
        held.extend(holding.join_all().await);
        // What is on its way comes to where it is held.
        proxy.rests().await;
        proxy.serves().await;
        let now = proxy.memory_mib();
        let each = (now - before) * 1024.0 / f64::from(count);
        eprintln!("{how:?}: {each:.1} KiB each, of {:.0} at most ({:.0?})", how.most_kib(), began.elapsed());
        assert!(each <= how.most_kib(), "{how:?}: {each:.1} KiB each, {:.1} MiB in all", now - first);
        most += how.most_kib() * f64::from(count) / 1024.0;
        before = now;
    }
    let all = proxy.memory_mib() - first;
    eprintln!("{} connections: {all:.0} MiB of {most:.0} at most", held.len());
    assert!(all <= most, "{all:.0} MiB");
    assert_eq!(proxy.report().panics, 0);
    drop(held);
    // An upload over HTTP/1.1 that is not taken is not read either, and its end not seen until the enclave had its time to answer.
    proxy.until("the others are over", |report| report.https_connections <= u64::from(count)).await;
}
