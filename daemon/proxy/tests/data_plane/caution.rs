//! What Caution's clients and services say to each other reaches the other side as it was said: STEVE encrypts bodies end to end and
//! has headers of its own.

use crate::support::{Enclave, Host, body, https_address, soon};
use enclaved_core::routes::{CautionRelease, PathRoute, Routes, UpstreamHttp};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body_util::BodyExt;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// End-to-end headers whose bytes matter: odd case, several of a name, inner spaces, bytes that are no ASCII, and codings that are
/// nobody's to change on the way.
const HEADERS: [(&str, &[u8]); 15] = [
    ("X-Steve-Session", b"AbC/+=="),
    ("x-STEVE-part", b"one"),
    ("Accept", b"*/*;q=0.5, Application/OCTET-stream"),
    ("X-Steve-Part", b"TWO,  three"),
    ("Content-Type", b"application/x-Steve; Boundary=\"A  b\""),
    ("Content-Encoding", b"GZip"),
    ("Accept-Encoding", b"br;q=1.0, gzip"),
    ("x-steve-part", b"one"),
    ("Authorization", b"Bearer aB.cD-_="),
    ("Cookie", b"a=B; c=\"d\""),
    ("X-Odd", b"caf\xe9 \xff"),
    ("X-Empty", b""),
    ("Range", b"bytes=0-1"),
    ("If-None-Match", b"W/\"x\", \"Y\""),
    ("User-Agent", b"steve/0"),
];

/// Added on the way, or said in the protocol's own form.
const OURS: [&str; 8] = [
    "host",
    "content-length",
    "transfer-encoding",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-request-id",
    "connection",
];

type Headers = BTreeMap<String, Vec<Vec<u8>>>;

/// The values of each name, in their order.
fn sorted<'a>(headers: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Headers {
    let mut all = Headers::new();
    for (name, value) in headers {
        all.entry(name.to_ascii_lowercase()).or_default().push(value.to_vec());
    }
    all.retain(|name, _| !OURS.contains(&name.as_str()));
    all
}

/// Every byte value, not repeating in step with any buffer.
fn secret(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 7 + at / 251 + at / 65_537) % 256).unwrap()).collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Got {
    port: u32,
    line: String,
    headers: Headers,
    body: Vec<u8>,
}

async fn until(stream: &mut UnixStream, end: &[u8]) -> Option<Vec<u8>> {
    let mut read = Vec::new();
    while !read.ends_with(end) {
        read.push(stream.read_u8().await.ok()?);
    }
    Some(read)
}

async fn request(port: u32, stream: &mut UnixStream) -> Option<Got> {
    let head = until(stream, b"\r\n\r\n").await?;
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let line = String::from_utf8(lines.next().unwrap().to_vec()).unwrap();
    let fields: Vec<_> = lines
        .filter(|line| !line.is_empty())
        .map(|line| {
            let colon = line.iter().position(|byte| *byte == b':').unwrap();
            (std::str::from_utf8(&line[..colon]).unwrap(), line[colon + 1..].strip_prefix(b" ").unwrap_or_default())
        })
        .collect();
    let field = |name: &str| fields.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| *value);
    let mut body = Vec::new();
    if let Some(length) = field("content-length") {
        body.resize(std::str::from_utf8(length).unwrap().parse().unwrap(), 0);
        stream.read_exact(&mut body).await.ok()?;
    } else if field("transfer-encoding").is_some() {
        loop {
            let size = String::from_utf8(until(stream, b"\r\n").await?).unwrap();
            let mut chunk = vec![0; usize::from_str_radix(size.trim_end(), 16).unwrap() + 2];
            stream.read_exact(&mut chunk).await.ok()?;
            if chunk.len() == 2 {
                break;
            }
            body.extend_from_slice(&chunk[..chunk.len() - 2]);
        }
    }
    Some(Got { port, line, headers: sorted(fields), body })
}

/// An enclave that keeps what it gets on any port, and answers each request with the same headers and another body.
fn enclave(host: &Host, got: UnboundedSender<Got>) -> Enclave {
    Enclave::raw(&host.vsock(), 16, move |port, mut stream| {
        let got = got.clone();
        async move {
            while let Some(request) = request(port, &mut stream).await {
                let mut answer = b"HTTP/1.1 203 As It Is\r\n".to_vec();
                for (name, value) in HEADERS {
                    answer.extend_from_slice(&[name.as_bytes(), b": ", value, b"\r\n"].concat());
                }
                let body = secret(100_000);
                answer.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
                answer.extend_from_slice(&body);
                got.send(request).unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        }
    })
}

/// The site of an image with all of Caution's services of that release.
fn routes(host: &Host, release: CautionRelease) -> Routes {
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].paths = vec![release.attestation(), release.e2e()];
    if release == CautionRelease::Current {
        let app = PathRoute { prefix: "/".to_owned(), vsock_port: 8083, upstream: UpstreamHttp::Http1 };
        routes.sites[0].paths.push(app);
    }
    routes
}

async fn as_it_was_said(release: CautionRelease, paths: &[(&str, u32)]) {
    let host = Host::new().await;
    let (sender, mut got): (_, UnboundedReceiver<Got>) = unbounded_channel();
    let _enclave = enclave(&host, sender);
    let address = https_address(&host.publish(&routes(&host, release)).await);
    let sent = secret(300_000);
    let expected = |path: &str, port| Got {
        port,
        line: format!("POST {path} HTTP/1.1"),
        headers: sorted(HEADERS),
        body: sent.clone(),
    };
    for (path, port) in paths {
        // As it is written on the wire, of known length and in chunks.
        for chunked in [false, true] {
            let mut tls = host.tls(address, "a.test", b"http/1.1").await.unwrap();
            let mut head = format!("POST {path} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n").into_bytes();
            for (name, value) in HEADERS {
                head.extend_from_slice(&[name.as_bytes(), b": ", value, b"\r\n"].concat());
            }
            let framed = if chunked {
                head.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                let chunks = sent.chunks(70_001);
                let chunks = chunks.map(|chunk| [format!("{:X}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat());
                [chunks.collect::<Vec<_>>().concat(), b"0\r\n\r\n".to_vec()].concat()
            } else {
                head.extend_from_slice(format!("Content-Length: {}\r\n\r\n", sent.len()).as_bytes());
                sent.clone()
            };
            tls.write_all(&[head, framed].concat()).await.unwrap();
            let mut answer = Vec::new();
            soon("the answer", tls.read_to_end(&mut answer)).await.unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 203 "), "{}", String::from_utf8_lossy(&answer[..100]));
            assert!(answer.ends_with(&secret(100_000)), "the answer's body");
            assert!(soon("the request", got.recv()).await.unwrap() == expected(path, *port), "{path} {chunked}");
        }
        let mut client = host.http2(address, "a.test").await;
        let mut request = Request::post(*path).body(body(sent.clone())).unwrap();
        for (name, value) in HEADERS {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().append(name, HeaderValue::from_bytes(value).unwrap());
        }
        let response = client.send(request).await.unwrap();
        let of = |headers: &HeaderMap| sorted(headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())));
        assert_eq!((response.status().as_u16(), of(response.headers())), (203, with_date(sorted(HEADERS), &response)));
        assert!(soon("the body", response.collect()).await.unwrap().to_bytes() == secret(100_000));
        assert!(soon("the request", got.recv()).await.unwrap() == expected(path, *port), "{path} over HTTP/2");
    }
}

/// The server adds a date where an answer has none (RFC 9110, 6.6.1).
fn with_date<B>(mut headers: Headers, response: &http::Response<B>) -> Headers {
    let date = response.headers()["date"].as_bytes().to_vec();
    headers.insert("date".to_owned(), vec![date]);
    headers
}

#[tokio::test]
async fn end_to_end_traffic_of_the_current_release_reaches_its_ports_untouched() {
    let paths = [("/e2p", 49500), ("/e2p/x%2Fy?q=%7B&Q=a+b", 49500), ("/app?e2p", 8083), ("/attestation", 49502)];
    as_it_was_said(CautionRelease::Current, &paths).await;
}

#[tokio::test]
async fn end_to_end_traffic_of_earlier_releases_reaches_one_port_from_all_paths_untouched() {
    let paths = [("/", 8080), ("/e2p/x%2Fy?q=%7B&Q=a+b", 8080), ("/app?e2p", 8080), ("/attestation/doc?n=1", 8082)];
    as_it_was_said(CautionRelease::Earlier, &paths).await;
}
