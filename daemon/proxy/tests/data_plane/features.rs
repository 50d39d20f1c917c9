//! What of HTTP passes through besides requests and answers of known length, and which certificates clients are shown.

use crate::support::{Body, Client, Enclave, Host, body, cid, https_address, soon, text, traffic};
use bytes::Bytes;
use enclaved_core::routes::{CertificateFiles, Direction, ListenerKey, PathRoute, UpstreamHttp};
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// A body of frames that come one by one.
struct Frames(mpsc::UnboundedReceiver<Frame<Bytes>>);

impl hyper::body::Body for Frames {
    type Data = Bytes;
    type Error = hyper::Error;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

fn frames() -> (mpsc::UnboundedSender<Frame<Bytes>>, Body) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (sender, Frames(receiver).boxed())
}

fn trailers(name: &'static str, value: &str) -> Frame<Bytes> {
    Frame::trailers(HeaderMap::from_iter([(http::HeaderName::from_static(name), value.parse().unwrap())]))
}

/// An enclave that speaks HTTP/2 in clear on every port, and the number of connections to it.
fn grpc_enclave(host: &Host) -> (Enclave, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let enclave = Enclave::raw(&host.vsock(), 16, move |_, stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                let told = format!("{} {} {:?}", request.method(), request.uri(), request.version());
                let seen = request.headers().get("te").map(|te| te.to_str().unwrap().to_owned());
                let asks = request.headers().get("x-forwarded-for").is_some() && seen.as_deref() == Some("trailers");
                let (sender, answer) = frames();
                tokio::spawn(async move {
                    let mut asked = request.into_body();
                    while let Some(Ok(frame)) = asked.frame().await {
                        match frame.into_data() {
                            Ok(data) => sender.send(Frame::data(data)).unwrap(),
                            Err(frame) => {
                                let sum = frame.into_trailers().unwrap();
                                sender.send(trailers("grpc-status", sum["x-sum"].to_str().unwrap())).unwrap();
                                return;
                            }
                        }
                    }
                    drop(sender.send(trailers("grpc-status", if asks { "0" } else { "13" })));
                });
                Ok::<_, Infallible>(Response::builder().header("x-told", told).body(answer).unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            drop(server.serve_connection(TokioIo::new(stream), service).await);
        }
    });
    (enclave, connections)
}

#[tokio::test]
async fn a_grpc_call_streams_both_ways_and_ends_with_its_trailers_over_one_shared_connection() {
    let host = Host::new().await;
    let (_enclave, connections) = grpc_enclave(&host);
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].paths = vec![PathRoute { prefix: "/".into(), vsock_port: 50051, upstream: UpstreamHttp::H2c }];
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http2(address, "a.test").await;
    let (sender, asked) = frames();
    sender.send(Frame::data("one".into())).unwrap();
    let request = Request::post("/pkg.Service/Method").header("te", "trailers").body(asked).unwrap();
    let mut response = client.send(request).await.unwrap();
    assert_eq!(response.headers()["x-told"], "POST http://a.test/pkg.Service/Method HTTP/2.0");
    for message in ["one", "two", "three"] {
        let frame = soon("a message", response.frame()).await.unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap(), message);
        // The next is sent when this has come back.
        match message {
            "one" => sender.send(Frame::data("two".into())).unwrap(),
            "two" => sender.send(Frame::data("three".into())).unwrap(),
            _ => sender.send(trailers("x-sum", "7")).unwrap(),
        }
    }
    let last = soon("the trailers", response.frame()).await.unwrap().unwrap();
    assert_eq!(last.trailers_ref().unwrap()["grpc-status"], "7");
    drop(response);
    for _ in 0..5 {
        let request = Request::post("/again").header("te", "trailers").body(body("x")).unwrap();
        let collected = client.send(request).await.unwrap().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    let report = host.until("all are over", |report| traffic(report, Direction::Https).open == 0).await;
    assert_eq!(traffic(&report, Direction::Https).failed.len(), 0);
}

#[tokio::test]
async fn an_enclave_that_speaks_http2_and_ends_is_a_502_and_its_successor_is_served() {
    let host = Host::new().await;
    let (enclave, _) = grpc_enclave(&host);
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].paths = vec![PathRoute { prefix: "/".into(), vsock_port: 50051, upstream: UpstreamHttp::H2c }];
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http1(address, "a.test").await;
    assert_eq!(client.get_text("/").await.0, 200);
    drop(enclave);
    soon("a 502", async { while client.get_text("/").await.0 != 502 {} }).await;
    let (_again, _) = grpc_enclave(&host);
    assert_eq!(client.get_text("/").await.0, 200);
}

#[tokio::test]
async fn trailers_of_an_answer_reach_clients_of_both_protocols_if_they_ask_for_them() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, |_, _| async {
        let (sender, answer) = frames();
        for frame in [Frame::data(Bytes::from("body")), trailers("x-sum", "1")] {
            sender.send(frame).unwrap();
        }
        Response::builder().header("trailer", "x-sum").body(answer).unwrap()
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    for mut client in [host.http1(address, "a.test").await, host.http2(address, "a.test").await] {
        let request = Request::get("/").header("te", "trailers").body(body("")).unwrap();
        let collected = soon("the answer", client.send(request).await.unwrap().collect()).await.unwrap();
        assert_eq!(collected.trailers().unwrap()["x-sum"], "1");
        assert_eq!(collected.to_bytes(), "body");
    }
}

#[tokio::test]
async fn events_reach_a_client_one_by_one_as_the_enclave_sends_them() {
    let host = Host::new().await;
    let (events, stream) = mpsc::unbounded_channel::<Frame<Bytes>>();
    let stream = Arc::new(std::sync::Mutex::new(Some(stream)));
    let _enclave = Enclave::http(&host.vsock(), 16, move |_, _| {
        let stream = stream.lock().unwrap().take().unwrap();
        async move { Response::builder().header("content-type", "text/event-stream").body(Frames(stream).boxed()).unwrap() }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.http1(address, "a.test").await;
    events.send(Frame::data("data: 0\n\n".into())).unwrap();
    let mut response = client.get("/").await.unwrap();
    for number in 0..5 {
        let event = soon("an event", response.frame()).await.unwrap().unwrap();
        assert_eq!(event.data_ref().unwrap(), &format!("data: {number}\n\n"));
        // No other is sent before this has arrived.
        events.send(Frame::data(format!("data: {}\n\n", number + 1).into())).unwrap();
    }
}

struct Disk {
    files: CertificateFiles,
    roots: rustls::RootCertStore,
}

/// Puts a certificate for `a.test` of an authority of its own on disk.
fn certificate(dir: &Path) -> Disk {
    let made = rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap();
    let files = CertificateFiles { cert: dir.join("crt"), key: dir.join("key") };
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    std::fs::set_permissions(&files.key, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(&files.cert, made.cert.pem()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    Disk { files, roots }
}

/// Whether a client that trusts these accepts what it is shown.
async fn trusted(address: SocketAddr, roots: &rustls::RootCertStore) -> bool {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = "a.test".try_into().unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.is_ok()
}

#[tokio::test]
async fn a_certificate_on_disk_is_served_replaced_when_it_changes_and_kept_while_the_new_one_is_broken() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let dir = tempfile::tempdir().unwrap();
    let first = certificate(dir.path());
    let mut routes = host.site(&["a.test"], Some(16));
    let mut other = routes.sites[0].clone();
    (other.enclave, other.domains) = ("other".parse().unwrap(), vec!["b.test".to_owned()]);
    routes.sites.push(other);
    routes.sites[0].rules.certificate = Some(first.files.clone());
    let report = host.publish(&routes).await;
    let address = https_address(&report);
    assert!(trusted(address, &first.roots).await);
    assert_eq!(report.certificates.len(), 2, "{:?}", report.certificates);
    assert!(report.certificates.iter().all(|certificate| certificate.expires.is_some() && certificate.error.is_none()));

    std::fs::write(&first.files.cert, "-----BEGIN CERTIFICATE-----\nMII").unwrap();
    let report = host.until("it is said", |report| report.certificates.iter().any(|one| one.error.is_some())).await;
    let broken = report.certificates.iter().find(|certificate| certificate.domain == "a.test").unwrap();
    assert!(broken.error.as_ref().unwrap().contains(&*first.files.cert.to_string_lossy()), "{broken:?}");
    assert!(trusted(address, &first.roots).await, "the last good one is served on");
    assert_eq!(host.http1(address, "b.test").await.get_text("/").await.0, 200, "the other site is none the worse");

    let second = certificate(dir.path());
    let good = |report: &enclaved_core::routes::ProxyReport| report.certificates.iter().all(|one| one.error.is_none());
    host.until("it is mended", good).await;
    assert!(trusted(address, &second.roots).await && !trusted(address, &first.roots).await);
}

#[tokio::test]
async fn a_missing_certificate_is_an_alert_for_its_site_alone() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let mut routes = host.site(&["a.test"], Some(16));
    let mut other = routes.sites[0].clone();
    (other.enclave, other.domains) = ("other".parse().unwrap(), vec!["b.test".to_owned()]);
    routes.sites.push(other);
    routes.sites[1].rules.certificate =
        Some(CertificateFiles { cert: "/nowhere/crt".into(), key: "/nowhere/key".into() });
    let address = https_address(&host.publish(&routes).await);
    assert_eq!(host.http1(address, "a.test").await.get_text("/").await.0, 200);
    host.tls(address, "b.test", b"h2").await.unwrap_err();
    let report = host.report().await;
    assert_eq!(report.handshake_failures["no_certificate"], 1);
}

/// What a request in clear is answered.
async fn in_clear(address: SocketAddr, request: &str) -> String {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    drop(soon("the answer", client.read_to_string(&mut answer)).await);
    answer
}

#[tokio::test]
async fn requests_in_clear_are_told_to_come_again_over_https_and_strangers_are_told_nothing() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let mut routes = host.site(&["a.test", "::1"], Some(16));
    let https = routes.https.as_mut().unwrap();
    https.rules.redirect = Some("127.0.0.1:0".parse().unwrap());
    https.listen = "127.0.0.1:0".parse().unwrap();
    let report = host.publish(&routes).await;
    let listener = report.listeners.iter().find(|one| matches!(one.listener, ListenerKey::Redirect { .. })).unwrap();
    let address: SocketAddr = listener.address.parse().unwrap();
    let port = https_address(&report).port();
    for (request, status, location) in [
        ("GET /x?y=1 HTTP/1.1\r\nhost: A.test\r\n\r\n", 308, Some(format!("https://A.test:{port}/x?y=1"))),
        (
            "POST / HTTP/1.0\r\nhost: a.test:80\r\ncontent-length: 1\r\n\r\nx",
            308,
            Some(format!("https://a.test:{port}/")),
        ),
        ("GET / HTTP/1.1\r\nhost: [::1]:80\r\n\r\n", 308, Some(format!("https://[::1]:{port}/"))),
        ("GET //evil.test/ HTTP/1.1\r\nhost: a.test\r\n\r\n", 308, Some(format!("https://a.test:{port}//evil.test/"))),
        ("OPTIONS * HTTP/1.1\r\nhost: a.test\r\n\r\n", 308, Some(format!("https://a.test:{port}/"))),
        ("GET http://evil.test/ HTTP/1.1\r\nhost: a.test\r\n\r\n", 308, Some(format!("https://a.test:{port}/"))),
        ("GET / HTTP/1.1\r\nhost: evil.test\r\n\r\n", 421, None),
        ("GET / HTTP/1.1\r\nhost: a.test\r\nhost: a.test\r\n\r\n", 400, None),
        ("GET / HTTP/1.1\r\n\r\n", 400, None),
        ("nonsense\r\n\r\n", 400, None),
    ] {
        let answer = in_clear(address, request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) || answer.starts_with(&format!("HTTP/1.0 {status} ")),
            "{request}: {answer}"
        );
        let told = answer.lines().find_map(|line| line.strip_prefix("location: ")).map(str::to_owned);
        assert_eq!(told, location, "{request}");
        assert!(answer.contains("connection: close") || location.is_none(), "{answer}");
    }
    routes.https.as_mut().unwrap().rules.redirect = None;
    host.publish(&routes).await;
    TcpStream::connect(address).await.unwrap_err();
}

async fn hsts(client: &mut Client, path: &str) -> Option<String> {
    let response = client.get(path).await.unwrap();
    response.headers().get("strict-transport-security").map(|value| value.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn browsers_are_told_to_come_over_https_alone_unless_the_enclave_tells_them_something_itself() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, |_, request| async move {
        let mut response = Response::new(body("well"));
        if request.uri() == "/own" {
            response.headers_mut().insert("strict-transport-security", "max-age=0".parse().unwrap());
        }
        response
    });
    let mut routes = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http2(address, "a.test").await;
    assert_eq!(hsts(&mut client, "/").await, None);
    routes.sites[0].rules.hsts_seconds = Some(31_536_000);
    host.publish(&routes).await;
    assert_eq!(hsts(&mut client, "/").await.as_deref(), Some("max-age=31536000"));
    assert_eq!(hsts(&mut client, "/own").await.as_deref(), Some("max-age=0"));
}

#[tokio::test]
async fn a_client_that_is_silent_within_its_body_is_told_so_and_is_not_the_enclaves_fault() {
    let host = Host::with_limits(|limits| limits.request_body = std::time::Duration::from_millis(200)).await;
    let _enclave = Enclave::http(&host.vsock(), 16, |_, request| async move {
        drop(request.into_body().collect().await);
        Response::new(body("never"))
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    for mut client in [host.http1(address, "a.test").await, host.http2(address, "a.test").await] {
        let (sender, asked) = frames();
        sender.send(Frame::data("begun".into())).unwrap();
        let response = client.send(Request::post("/").body(asked).unwrap()).await.unwrap();
        assert_eq!(response.status(), 408);
        assert!(text(response).await.contains("did not come in time"));
    }
    let report = host.until("both are over", |report| !report.ingress_open.contains_key(&cid(16))).await;
    let failed = &traffic(&report, Direction::Https).failed;
    assert_eq!((failed["client_body"], failed.len()), (2, 1));
}

#[tokio::test]
async fn a_client_may_be_silent_within_its_body_for_as_long_as_the_answer_is_on_its_way() {
    let patience = std::time::Duration::from_millis(200);
    let host = Host::with_limits(|limits| limits.request_body = patience).await;
    let (_enclave, _) = grpc_enclave(&host);
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].paths = vec![PathRoute { prefix: "/".into(), vsock_port: 50051, upstream: UpstreamHttp::H2c }];
    let mut client = host.http2(https_address(&host.publish(&routes).await), "a.test").await;
    let (sender, asked) = frames();
    let mut response = client.send(Request::post("/").body(asked).unwrap()).await.unwrap();
    for message in ["one", "two"] {
        // The silence is what is tested.
        tokio::time::sleep(patience * 3).await;
        sender.send(Frame::data(message.into())).unwrap();
        let frame = soon("a message", response.frame()).await.unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap(), message);
    }
    sender.send(trailers("x-sum", "2")).unwrap();
    let last = soon("the trailers", response.frame()).await.unwrap().unwrap();
    assert_eq!(last.trailers_ref().unwrap()["grpc-status"], "2");
    drop(response);
    let report = host.until("it is over", |report| traffic(report, Direction::Https).open == 0).await;
    assert_eq!(traffic(&report, Direction::Https).failed.len(), 0);
}
