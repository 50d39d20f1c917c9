//! The access log: which lines there are, what they say, and what none says.

use crate::support::{Enclave, Host, body, cid, https_address, soon, tcp_address, tcp_route, text, traffic};
use enclaved_core::routes::{AccessLog, Direction, IpNetwork, ListenerKey, Passthrough, ProxyReport, Routes};
use http::{Request, Response};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

/// A log's file, in a folder of its own.
struct Log {
    path: PathBuf,
    _dir: TempDir,
}

impl Log {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { path: dir.path().join("access.log"), _dir: dir }
    }

    fn to(&self) -> Option<AccessLog> {
        Some(AccessLog::File(self.path.clone()))
    }

    fn read(&self) -> String {
        std::fs::read_to_string(&self.path).unwrap_or_default()
    }

    /// Its lines, once there are so many.
    async fn lines(&self, number: usize) -> Vec<Value> {
        let whole = || self.read().matches('\n').count();
        soon("the lines", async {
            while whole() < number {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        let text = self.read();
        let lines: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), number, "{text}");
        lines
    }
}

fn logged(log: &Log, routes: Routes) -> Routes {
    Routes { access_log: log.to(), ..routes }
}

/// The values of these keys.
fn of<const N: usize>(line: &Value, keys: [&str; N]) -> Value {
    keys.iter().map(|key| line[key].clone()).collect()
}

#[tokio::test]
async fn a_request_has_one_line_that_says_whose_it_was_and_how_it_went_and_none_of_its_secrets() {
    let (host, log) = (Host::new().await, Log::new());
    let _enclave = Enclave::http(&host.vsock(), 16, |_, request| async move {
        let id = request.headers()["x-request-id"].clone();
        drop(request.into_body().collect().await);
        Response::builder().header("x-seen", id).header("set-cookie", "secret").body(body("well, secret")).unwrap()
    });
    let address = https_address(&host.publish(&logged(&log, host.site(&["a.test"], Some(16)))).await);
    let mut ids = Vec::new();
    for (mut client, path) in [
        (host.http1(address, "a.test").await, "/x%20y/z?token=secret"),
        (host.http2(address, "a.test").await, "/?secret"),
    ] {
        let request = Request::post(path)
            .header("authorization", "Bearer secret")
            .header("cookie", "session=secret")
            .header("x-api-key", "secret")
            .header("referer", "https://a.test/?secret")
            .header("x-forwarded-for", "198.51.100.7")
            .header("user-agent", http::HeaderValue::from_bytes(b"an \"agent\" \\ \xff").unwrap())
            .body(body("a secret"))
            .unwrap();
        let response = client.send(request).await.unwrap();
        ids.push(response.headers()["x-seen"].to_str().unwrap().to_owned());
        text(response).await;
        // The next request goes over the same connection.
        host.until("it is kept", |report| traffic(report, Direction::Https).upstream.idle == 1).await;
    }
    // Nor where a name and a password may stand, though they must not.
    for head in ["GET https://a:secret@a.test/ HTTP/1.1\r\nhost: a.test", "GET / HTTP/1.1\r\nhost: a:secret@a.test"] {
        let mut tls = host.tls(address, "a.test", b"http/1.1").await.unwrap();
        tls.write_all(format!("{head}\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon("an answer", tls.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    let lines = log.lines(4).await;
    assert!(lines[2..].iter().all(|line| line["host"] == "a.test" && line["status"] == 400), "{lines:?}");
    for (number, (line, id)) in lines.iter().zip(&ids).enumerate() {
        let said = of(line, ["protocol", "client", "host", "enclave", "cid", "vsock_port", "method", "tls", "status"]);
        assert_eq!(said, json!(["https", "127.0.0.1", "a.test", "app", 16, 8080, "POST", "1.3", 200]));
        let said = of(line, ["bytes_in", "bytes_out", "answered_by", "ended"]);
        assert_eq!(said, json!([8, 12, "enclave", "whole"]));
        let said = of(line, ["request_id", "upstream_reused", "upstream_repeated"]);
        assert_eq!(said, json!([id, number == 1, false]));
        assert_eq!(line["user_agent"], "an \"agent\" \\ \u{fffd}");
        let (head, all) = (line["head_seconds"].as_f64().unwrap(), line["seconds"].as_f64().unwrap());
        assert!(head > 0.0 && head <= all && all < 20.0, "{line}");
        let time = line["time"].as_str().unwrap();
        assert!(time.len() == "2000-01-01T00:00:00.000Z".len() && time.ends_with('Z'), "{time}");
        assert_eq!(line.get("forwarded_for"), None, "nobody trusts that client");
    }
    assert_eq!(of(&lines[0], ["path", "http"]), json!(["/x%20y/z", "1.1"]));
    assert_eq!(of(&lines[1], ["path", "http"]), json!(["/", "2"]));
    assert!(!log.read().contains("secret") && !log.read().contains("198.51"), "{}", log.read());
}

#[tokio::test]
async fn the_proxys_own_answers_have_lines_with_the_reason_that_they_are_counted_by() {
    let (host, log) = (Host::new().await, Log::new());
    let mut routes = logged(&log, host.site(&["a.test"], None));
    routes.sites[0].paths[0].prefix = "/only".to_owned();
    routes.https.as_mut().unwrap().rules.redirect = Some("127.0.0.1:0".parse().unwrap());
    let report = host.publish(&routes).await;
    let address = https_address(&report);
    let mut client = host.http1(address, "a.test").await;
    let expect = [
        ("HEAD", "/only", "a.test", 503, "no_target"),
        ("GET", "/only", "a.test", 503, "no_target"),
        ("GET", "/other", "a.test", 404, "no_path"),
        ("GET", "/only", "b.test", 421, "unknown_host"),
        ("TRACE", "/only", "a.test", 501, "bad_request"),
    ];
    for (method, path, name, status, _) in expect {
        let request = Request::builder().method(method).uri(path).body(body("")).unwrap();
        let response = client.send_as(name, request).await.unwrap();
        assert_eq!(response.status(), status);
        text(response).await;
    }
    let redirect = report.listeners.iter().find(|one| matches!(one.listener, ListenerKey::Redirect { .. })).unwrap();
    let mut clear = TcpStream::connect(&redirect.address).await.unwrap();
    clear.write_all(b"GET /x?secret HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
    drop(soon("the redirect", clear.read_to_end(&mut Vec::new())).await);
    let lines = log.lines(6).await;
    for (line, (method, path, name, status, reason)) in lines.iter().zip(expect) {
        let said = of(line, ["method", "path", "host", "status", "reason", "answered_by", "ended"]);
        assert_eq!(said, json!([method, path, name, status, reason, "proxy", "whole"]), "{line}");
        assert_eq!((line["bytes_out"].as_u64().unwrap() == 0, line.get("upstream_reused")), (method == "HEAD", None));
    }
    let said = of(&lines[5], ["protocol", "path", "status", "answered_by", "ended"]);
    assert_eq!(said, json!(["http", "/x", 308, "proxy", "whole"]));
    assert!(!log.read().contains("secret"));
}

#[tokio::test]
async fn a_line_says_how_an_answer_ended_that_was_not_whole() {
    let (host, log) = (Host::new().await, Log::new());
    let _enclave = Enclave::raw(&host.vsock(), 16, |_, mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        if head.starts_with("GET /silent") {
            return std::future::pending().await;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n0123456789").await.unwrap();
        if head.starts_with("GET /stays") {
            std::future::pending().await
        }
    });
    let mut routes = logged(&log, host.site(&["a.test"], Some(16)));
    let address = https_address(&host.publish(&routes).await);

    let mut client = host.http1(address, "a.test").await;
    let response = client.get("/breaks").await.unwrap();
    response.into_body().collect().await.unwrap_err();
    let mut client = host.http2(address, "a.test").await;
    drop(tokio::time::timeout(Duration::from_millis(100), client.get("/silent")).await);
    drop(client);
    log.lines(2).await;
    let mut client = host.http1(address, "a.test").await;
    let mut response = client.get("/stays/for-its-client").await.unwrap();
    response.frame().await.unwrap().unwrap();
    drop((response, client));
    log.lines(3).await;
    let mut client = host.http1(address, "a.test").await;
    let mut response = client.get("/stays").await.unwrap();
    response.frame().await.unwrap().unwrap();
    routes.sites[0].target = None;
    host.publish(&routes).await;
    drop(response.into_body().collect().await);

    let lines = log.lines(4).await;
    let said: Vec<_> = lines.iter().map(|line| of(line, ["path", "status", "bytes_out", "ended"])).collect();
    let expected = [
        json!(["/breaks", 200, 10, "enclave"]),
        json!(["/silent", null, 0, "client"]),
        json!(["/stays/for-its-client", 200, 10, "client"]),
        json!(["/stays", 200, 10, "cut"]),
    ];
    assert_eq!(said, expected);
}

#[tokio::test]
async fn what_a_trusted_proxy_says_of_its_client_stands_beside_its_own_address() {
    let (host, log) = (Host::new().await, Log::new());
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let mut routes = logged(&log, host.site(&["a.test"], Some(16)));
    let everybody: IpNetwork = "127.0.0.1".parse().unwrap();
    routes.https.as_mut().unwrap().rules.trusted_proxies = vec![everybody];
    let address = https_address(&host.publish(&routes).await);
    let request = Request::get("/").header("x-forwarded-for", "10.0.0.1").header("x-forwarded-for", "198.51.100.7");
    let mut client = host.http1(address, "a.test").await;
    text(client.send(request.body(body("")).unwrap()).await.unwrap()).await;
    let lines = log.lines(1).await;
    assert_eq!(of(&lines[0], ["client", "forwarded_for"]), json!(["127.0.0.1", "10.0.0.1, 198.51.100.7"]));
}

#[tokio::test]
async fn raw_connections_passed_through_ones_and_those_that_change_their_protocol_have_a_line_each_when_they_end() {
    let (host, log) = (Host::new().await, Log::new());
    let _echo = Enclave::echoing(&host.vsock(), 16);
    let _shouts = Enclave::http(&host.vsock(), 17, |_, mut request| async move {
        tokio::spawn(async move {
            let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
            let mut stream = hyper_util::rt::TokioIo::new(upgraded);
            while let Ok(byte) = stream.read_u8().await {
                stream.write_all(&[byte; 2]).await.unwrap();
            }
        });
        Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "shout")
            .body(body(""))
            .unwrap()
    });
    let mut routes = logged(&log, host.site(&["a.test"], Some(17)));
    let mut raw = routes.sites[0].clone();
    (raw.enclave, raw.domains, raw.target) = ("raw".parse().unwrap(), vec!["raw.test".to_owned()], Some(cid(16)));
    raw.paths.clear();
    raw.rules.passthrough = Some(Passthrough { vsock_port: 8443, proxy_protocol: None });
    routes.sites.push(raw);
    routes.tcp = vec![tcp_route("127.0.0.1:0", Some(16))];
    let report = host.publish(&routes).await;

    let listen = tcp_address(&report);
    let mut tcp = TcpStream::connect(listen).await.unwrap();
    tcp.write_all(b"hello").await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut heard = Vec::new();
    soon("the echo", tcp.read_to_end(&mut heard)).await.unwrap();
    assert_eq!(heard, b"hello");
    log.lines(1).await;

    // Its own hello is no answer.
    host.tls(https_address(&report), "raw.test", b"h2").await.unwrap_err();
    log.lines(2).await;

    let mut client = host.http1(https_address(&report), "a.test").await;
    let request = Request::get("/").header("connection", "Upgrade").header("upgrade", "shout").body(body("")).unwrap();
    let mut response = client.send(request).await.unwrap();
    let mut stream = hyper_util::rt::TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    stream.write_all(b"hey").await.unwrap();
    soon("the answer", stream.read_exact(&mut [0; 6])).await.unwrap();
    drop((stream, response, client));

    routes.tcp[0].target = None;
    host.publish(&routes).await;
    let mut refused = TcpStream::connect(listen).await.unwrap();
    drop(soon("the refusal", refused.read(&mut [0; 1])).await);

    let mut lines = log.lines(4).await;
    // The last two end each by itself.
    lines.sort_by_key(|line| line.get("reason").is_some_and(|reason| reason == "no_target"));
    let keys = ["protocol", "enclave", "cid", "vsock_port", "bytes_in", "bytes_out", "ended"];
    assert_eq!(of(&lines[0], keys), json!(["tcp", "app", 16, 7000, 5, 5, "whole"]));
    assert_eq!(lines[0]["listen"], "127.0.0.1:0", "as it is configured");
    assert_eq!(of(&lines[1], ["protocol", "enclave", "vsock_port"]), json!(["tls", "raw", 8443]));
    assert!(lines[1]["bytes_in"].as_u64().unwrap() > 100, "{}", lines[1]);
    let said = of(&lines[2], ["protocol", "status", "bytes_in", "bytes_out", "answered_by", "path"]);
    assert_eq!(said, json!(["https", 101, 3, 6, "enclave", "/"]));
    let said = of(&lines[3], ["protocol", "cid", "reason", "ended"]);
    assert_eq!(said, json!(["tcp", null, "no_target", "refused"]));
}

#[tokio::test]
async fn it_is_switched_and_moved_by_new_routes_without_the_loss_of_a_request_or_a_line() {
    let (host, first, second) = (Host::new().await, Log::new(), Log::new());
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let off = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&logged(&first, off.clone())).await);
    let mut client = host.http2(address, "a.test").await;
    for number in 0..60 {
        if number % 5 == 0 {
            let log = if number % 10 == 0 { &first } else { &second };
            host.publish(&logged(log, off.clone())).await;
        }
        assert_eq!(client.get_text("/").await, (200, "well".to_owned()));
    }
    soon("all lines", async {
        while [&first, &second].map(|log| log.read().matches('\n').count()).iter().sum::<usize>() < 60 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(second.read().matches('\n').count() >= 20);
    host.publish(&off).await;
    let before = [first.read(), second.read()];
    assert_eq!(client.get_text("/").await.0, 200);
    // Long enough for a line that there should not be.
    sleep(Duration::from_millis(300)).await;
    assert_eq!([first.read(), second.read()], before);
    assert_eq!(host.report().await.access_log_dropped, 0);
}

#[tokio::test]
async fn a_place_that_cannot_be_written_is_told_and_keeps_nobody_from_being_served() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let full = Some(AccessLog::File("/dev/full".into()));
    let address = https_address(&host.publish(&Routes { access_log: full, ..host.site(&["a.test"], Some(16)) }).await);
    let mut client = host.http2(address, "a.test").await;
    for _ in 0..10 {
        assert_eq!(client.get_text("/").await, (200, "well".to_owned()));
    }
    let told = |report: &ProxyReport| report.access_log_error.as_ref().is_some_and(|error| error.contains("/dev/full"));
    host.until("all are counted, and why", |report| report.access_log_dropped == 10 && told(report)).await;
}

#[tokio::test]
async fn a_proxy_that_ends_writes_the_lines_of_what_it_carried() {
    let (mut host, log) = (Host::new().await, Log::new());
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let address = https_address(&host.publish(&logged(&log, host.site(&["a.test"], Some(16)))).await);
    let mut client = host.http1(address, "a.test").await;
    assert_eq!(client.get_text("/").await.0, 200);
    host.stop().await.unwrap();
    assert_eq!(log.read().matches('\n').count(), 1, "without waiting for more lines");
    assert!(Path::new(&log.path).is_file());
}
