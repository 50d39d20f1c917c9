//! HTTPS: names, paths, generations, and what passes in both directions.

use crate::support::{Body, Enclave, Host, Upstream, body, cid, egress, https_address, soon, text, traffic};
use bytes::Bytes;
use enclaved_core::routes::{Direction, PathRoute, Routes, UpstreamHttp};
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

/// An application that streams every body back.
async fn echo(_: u32, request: Request<Incoming>) -> Response<Body> {
    Response::new(request.into_body().boxed())
}

/// An application that says which port it is and what request it got.
async fn tell(port: u32, request: Request<Incoming>) -> Response<Body> {
    let mut told = format!("port {port}\n{} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        told += &format!("{name}: {}\n", value.to_str().unwrap());
    }
    Response::new(body(told))
}

#[tokio::test]
async fn a_request_goes_to_the_enclave_through_its_egress_to_an_upstream_and_back() {
    let host = Host::new().await;
    let upstream = Upstream::new(|mut stream| async move {
        let mut request = [0; 5];
        stream.read_exact(&mut request).await.unwrap();
        stream.write_all(b"signed ").await.unwrap();
        stream.write_all(&request).await.unwrap();
    })
    .await;
    let socket = host.vsock().join("16.sock_8000");
    let _enclave = Enclave::http(&host.vsock(), 16, move |_, request| {
        let socket = socket.clone();
        async move {
            let document = request.into_body().collect().await.unwrap().to_bytes();
            let mut upstream = UnixStream::connect(socket).await.unwrap();
            upstream.write_all(&document).await.unwrap();
            let mut signed = Vec::new();
            upstream.read_to_end(&mut signed).await.unwrap();
            Response::new(body(signed))
        }
    });
    let routes = Routes { egress: vec![egress(16, 8000, upstream.address)], ..host.site(&["localhost"], Some(16)) };
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http1(address, "localhost").await;
    let response = client.send(Request::post("/").body(body("paper")).unwrap()).await.unwrap();
    assert_eq!((response.status().as_u16(), text(response).await), (200, "signed paper".to_owned()));
}

#[tokio::test]
async fn the_enclave_sees_one_clean_http_1_1_request_whatever_the_client_speaks() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, tell);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    for mut client in [host.http1(address, "a.test").await, host.http2(address, "a.test").await] {
        let request = Request::get("/path?query=1")
            .header("x-forwarded-for", "10.9.9.9")
            .header("x-request-id", "forged")
            .header("accept", "text/plain")
            .body(body(""))
            .unwrap();
        let told = text(client.send(request).await.unwrap()).await;
        let mut lines: Vec<_> = told.lines().filter(|line| !line.starts_with("x-request-id: ")).collect();
        lines[2..].sort_unstable();
        let expected = [
            "port 8080",
            "GET /path?query=1",
            "accept: text/plain",
            "host: a.test",
            "x-forwarded-for: 127.0.0.1",
            "x-forwarded-host: a.test",
            "x-forwarded-proto: https",
        ];
        assert_eq!(lines, expected);
        assert!(told.contains("x-request-id: ") && !told.contains("forged"), "{told}");
    }
}

#[tokio::test]
async fn paths_and_names_lead_to_their_ports_and_unknown_names_are_misdirected() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, tell);
    let mut routes = host.site(&["a.test", "*.b.test"], Some(16));
    routes.sites[0].paths.push(PathRoute {
        prefix: "/attestation".into(),
        vsock_port: 49502,
        upstream: UpstreamHttp::Http1,
    });
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http1(address, "x.b.test").await;
    for (path, port) in [("/", 8080), ("/attestation", 49502), ("/attestation/doc?n=1", 49502), ("/attestations", 8080)]
    {
        let (status, told) = client.get_text(path).await;
        assert!(status == 200 && told.starts_with(&format!("port {port}\n")), "{path}: {told}");
    }
    let misdirected = Request::get("/").header("host", "c.test").body(body("")).unwrap();
    let response = client.send(misdirected).await.unwrap();
    assert_eq!(response.status(), 421);
    let error = host.tls(address, "c.test", b"h2").await.unwrap_err();
    assert!(error.to_string().contains("UnrecognisedName"), "{error}");
    let report = host.report().await;
    assert_eq!((report.refused["unknown_host"], report.handshake_failures["unknown_name"]), (1, 1));
}

#[tokio::test]
async fn without_a_generation_that_is_ready_the_answer_is_503_with_retry_after_and_a_request_id() {
    let host = Host::new().await;
    let report = host.publish(&host.site(&["a.test"], None)).await;
    let mut client = host.http1(https_address(&report), "a.test").await;
    let response = client.get("/").await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "1");
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let said = text(response).await;
    assert!(said.contains("not ready") && said.contains(&id), "{said}");
    let report = host.report().await;
    let counted = traffic(&report, Direction::Https);
    assert_eq!((counted.failed["no_target"], counted.status_classes["5xx"]), (1, 1));
}

#[tokio::test]
async fn an_enclave_that_is_gone_talks_nonsense_or_hangs_up_is_a_502_and_a_silent_one_a_504() {
    let host = Host::with_limits(|limits| limits.answer = Duration::from_millis(200)).await;
    let report = host.publish(&host.site(&["a.test"], Some(16))).await;
    let mut client = host.http1(https_address(&report), "a.test").await;
    assert_eq!(client.get("/").await.unwrap().status(), 502);
    {
        let _enclave = Enclave::raw(&host.vsock(), 16, |_, mut stream| async move {
            stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
            drop(stream.read_to_end(&mut Vec::new()).await);
        });
        assert_eq!(client.get("/").await.unwrap().status(), 502);
    }
    {
        let _enclave = Enclave::raw(&host.vsock(), 16, |_, _| async {});
        assert_eq!(client.get("/").await.unwrap().status(), 502);
    }
    {
        let _enclave = Enclave::raw(&host.vsock(), 16, |_, stream| async move {
            std::future::pending::<()>().await;
            drop(stream);
        });
        assert_eq!(client.get("/").await.unwrap().status(), 504);
    }
    let report = host.report().await;
    let failed = &traffic(&report, Direction::Https).failed;
    assert_eq!((failed["connect"], failed["bad_answer"], failed["answer_timeout"]), (1, 2, 1));
}

#[tokio::test]
async fn bodies_stream_both_ways_over_both_protocols_and_are_counted_exactly() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, echo);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let sent: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    for mut client in [host.http1(address, "a.test").await, host.http2(address, "a.test").await] {
        let request = Request::post("/").body(body(sent.clone())).unwrap();
        let response = client.send(request).await.unwrap();
        let received = soon("the echo", response.into_body().collect()).await.unwrap().to_bytes();
        assert!(received == sent);
    }
    let report = host.until("both are over", |report| traffic(report, Direction::Https).open == 0).await;
    let counted = traffic(&report, Direction::Https);
    assert_eq!((counted.bytes_to_enclave, counted.bytes_from_enclave), (6_000_000, 6_000_000));
    assert_eq!((counted.total, counted.status_classes["2xx"]), (2, 2));
    assert_eq!((counted.answers.counts.iter().sum::<u64>(), counted.answers.sum_us > 0), (2, true));
}

#[tokio::test]
async fn connections_to_the_enclave_are_kept_and_one_that_it_closed_is_replaced_unnoticed() {
    let host = Host::new().await;
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    // Answers twice on each connection, then hangs up without a word.
    let _enclave = Enclave::raw(&host.vsock(), 16, move |_, mut stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            for _ in 0..2 {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
        }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.http1(address, "a.test").await;
    for _ in 0..10 {
        assert_eq!(client.get_text("/").await, (200, "ok".to_owned()));
    }
    assert_eq!(connections.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn switching_generations_under_load_fails_no_request() {
    let host = Host::new().await;
    let _generations = [Enclave::saying(&host.vsock(), 16, "old"), Enclave::saying(&host.vsock(), 17, "new")];
    let mut routes = host.site(&["a.test"], Some(16));
    routes.live = vec![cid(16), cid(17)];
    let address = https_address(&host.publish(&routes).await);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut clients = JoinSet::new();
    for number in 0..20 {
        let mut client =
            if number % 2 == 0 { host.http1(address, "a.test").await } else { host.http2(address, "a.test").await };
        let stopped = stopped.clone();
        clients.spawn(async move {
            let mut count = 0;
            while !*stopped.borrow() {
                let (status, said) = client.get_text("/").await;
                assert_eq!(status, 200, "{said}");
                count += 1;
            }
            (count, client.get_text("/").await.1)
        });
    }
    for round in 0..20_u32 {
        let target = if round % 2 == 0 { 17 } else { 16 };
        routes.sites[0].target = Some(cid(target));
        host.publish(&routes).await;
    }
    routes.sites[0].target = Some(cid(17));
    host.publish(&routes).await;
    stop.send(true).unwrap();
    let results = soon("all clients", clients.join_all()).await;
    assert!(results.iter().all(|(count, last)| *count > 0 && last == "new"), "{results:?}");
    let report = host.report().await;
    assert!(traffic(&report, Direction::Https).failed.is_empty(), "{report:?}");
}

#[tokio::test]
async fn a_request_in_flight_stays_with_its_generation_and_ends_with_it() {
    let host = Host::new().await;
    let (_endless, silent) = tokio::io::duplex(1);
    let silent = Arc::new(tokio::sync::Mutex::new(silent));
    let _old = Enclave::raw(&host.vsock(), 16, move |_, mut stream| {
        let silent = silent.clone();
        async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nfirst").await.unwrap();
            drop(silent.lock().await.read_u8().await);
        }
    });
    let _new = Enclave::saying(&host.vsock(), 17, "new");
    let mut routes = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http1(address, "a.test").await;
    let mut response = client.get("/").await.unwrap();
    let first = soon("the first part", response.frame()).await.unwrap().unwrap();
    assert_eq!(first.data_ref().unwrap(), "first");

    routes.sites[0].target = Some(cid(17));
    routes.live = vec![cid(16)];
    assert_eq!(host.publish(&routes).await.ingress_open[&cid(16)], 1);
    assert_eq!(host.http1(address, "a.test").await.get_text("/").await.1, "new");
    routes.live.clear();
    host.publish(&routes).await;
    assert!(soon("the cut", response.frame()).await.unwrap().is_err());
}

#[tokio::test]
async fn a_hundred_requests_at_a_time_are_answered_over_both_protocols() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, echo);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut requests = JoinSet::new();
    for number in 0..100_u32 {
        let mut client =
            if number % 2 == 0 { host.http1(address, "a.test").await } else { host.http2(address, "a.test").await };
        requests.spawn(async move {
            for round in 0..5 {
                let sent = format!("{number} {round} ").repeat(1000);
                let response = client.send(Request::post("/").body(body(sent.clone())).unwrap()).await.unwrap();
                assert_eq!(text(response).await, sent);
            }
        });
    }
    soon("all answers", requests.join_all()).await;
    let report = host.until("all are over", |report| traffic(report, Direction::Https).open == 0).await;
    assert_eq!(traffic(&report, Direction::Https).status_classes["2xx"], 500);
    assert_eq!(report.panics, 0);
}

#[tokio::test]
async fn clients_that_never_finish_a_handshake_or_a_head_are_hung_up_on() {
    let host = Host::with_limits(|limits| {
        limits.handshake = Duration::from_millis(200);
        limits.request_head = Duration::from_millis(200);
    })
    .await;
    let address = https_address(&host.publish(&host.site(&["a.test"], None)).await);

    let mut mute = tokio::net::TcpStream::connect(address).await.unwrap();
    assert_eq!(soon("the end of a mute client", mute.read(&mut [0; 1])).await.unwrap(), 0);

    let mut slow = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\nx-slow: ").await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(slow);
    let dripping = async {
        while writer.write_all(b"x").await.is_ok() && writer.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let ended = async { drop(reader.read_to_end(&mut Vec::new()).await) };
    soon("the end of a slow client", async {
        tokio::select! { () = dripping => {}, () = ended => {} }
    })
    .await;

    let mut h2_mute = host.tls(address, "a.test", b"h2").await.unwrap();
    soon("the end of a mute HTTP/2 client", async { drop(h2_mute.read_to_end(&mut Vec::new()).await) }).await;
    let report = host.report().await;
    assert_eq!(report.handshake_failures["timeout"], 1);
}

#[tokio::test]
async fn a_head_that_is_too_large_or_malformed_is_refused_and_never_reaches_the_enclave() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, tell);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let large = format!("GET / HTTP/1.1\r\nhost: a.test\r\nx: {}\r\n\r\n", "x".repeat(40_000));
    let many = format!("GET / HTTP/1.1\r\nhost: a.test\r\n{}\r\n", "x: 1\r\n".repeat(200));
    for (sent, status) in [
        (large.as_str(), "431"),
        (&many, "431"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a.test\r\nhost: a.test\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", "400"),
        ("CONNECT a.test:443 HTTP/1.1\r\nhost: a.test:443\r\n\r\n", "501"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let mut client = host.tls(address, "a.test", b"http/1.1").await.unwrap();
        client.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        soon("the refusal", client.read_exact(&mut answer)).await.unwrap();
        let first_line = sent.lines().next().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {status}"), "{first_line}");
    }
    assert_eq!(traffic(&host.report().await, Direction::Https).total, 0);
}

#[tokio::test]
async fn conflicting_lengths_reach_the_enclave_as_one() {
    let host = Host::new().await;
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    let _enclave = Enclave::raw(&host.vsock(), 16, move |_, mut stream| {
        let sender = sender.clone();
        async move {
            let mut request = Vec::new();
            while !request.ends_with(b"0\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            sender.send(String::from_utf8(request).unwrap()).unwrap();
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    let smuggled = "POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    client.write_all(smuggled.as_bytes()).await.unwrap();
    let request = soon("the request", received.recv()).await.unwrap();
    assert!(request.contains("transfer-encoding: chunked\r\n") && !request.contains("content-length"), "{request}");
    assert!(request.ends_with("\r\n\r\n5\r\nhello\r\n0\r\n\r\n"), "{request}");
}

#[tokio::test]
async fn a_body_of_a_get_is_passed_on() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, echo);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    let request = "GET / HTTP/1.1\r\nhost: a.test\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n5\r\nquery\r\n0\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    drop(soon("the answer", client.read_to_string(&mut answer)).await);
    assert!(answer.contains("query"), "{answer}");
}

#[tokio::test]
async fn a_connection_that_changes_its_protocol_is_carried_both_ways() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, |_, mut request| async move {
        assert_eq!(request.headers()["upgrade"], "shout");
        tokio::spawn(async move {
            let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
            let mut stream = hyper_util::rt::TokioIo::new(upgraded);
            while let Ok(byte) = stream.read_u8().await {
                stream.write_u8(byte.to_ascii_uppercase()).await.unwrap();
            }
        });
        Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "shout")
            .body(body(""))
            .unwrap()
    });
    let mut routes = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http1(address, "a.test").await;
    let request = Request::get("/").header("connection", "Upgrade").header("upgrade", "shout").body(body("")).unwrap();
    let mut response = client.send(request).await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["upgrade"]), (101, &"shout".parse().unwrap()));
    let upgraded = hyper::upgrade::on(&mut response).await.unwrap();
    let mut stream = hyper_util::rt::TokioIo::new(upgraded);
    stream.write_all(b"hey").await.unwrap();
    let mut heard = [0; 3];
    soon("the answer", stream.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"HEY");
    assert_eq!(host.report().await.ingress_open[&cid(16)], 1, "it holds up a drain");
    routes.sites[0].target = None;
    host.publish(&routes).await;
    assert!(soon("the cut", stream.read_u8()).await.is_err());
}

/// Sends bytes over HTTP/1.1 and returns all that comes back until the proxy closes.
async fn exchange(host: &Host, address: std::net::SocketAddr, sent: &str) -> String {
    let mut client = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    client.write_all(sent.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A close without close_notify is an error to rustls, and as good an end as any here.
    drop(soon("the answer", client.read_to_end(&mut answer)).await);
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn the_authority_of_an_absolute_target_wins_over_host() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, tell);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let request = "GET https://a.test:8443/x?y HTTP/1.1\r\nhost: c.test\r\nconnection: close\r\n\r\n";
    let answer = exchange(&host, address, request).await;
    assert!(answer.contains("GET /x?y\n") && answer.contains("\nhost: a.test:8443\n"), "{answer}");
    assert!(!answer.contains("c.test"), "{answer}");
}

#[tokio::test]
async fn the_length_that_head_promises_and_a_body_that_ends_with_the_connection_are_passed_on() {
    let host = Host::new().await;
    let _enclave = Enclave::raw(&host.vsock(), 16, |_, mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let answer: &[u8] = if head.starts_with(b"HEAD") {
            b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"
        } else {
            b"HTTP/1.0 200 OK\r\n\r\nto the end"
        };
        stream.write_all(answer).await.unwrap();
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let answer = exchange(&host, address, "HEAD / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n").await;
    assert!(answer.contains("content-length: 1234\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
    let answer = exchange(&host, address, "GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n").await;
    assert!(answer.ends_with("A\r\nto the end\r\n0\r\n\r\n"), "{answer}");
    let answer = exchange(&host, address, "GET / HTTP/1.0\r\nhost: a.test\r\n\r\n").await;
    assert!(answer.ends_with("\r\n\r\nto the end"), "{answer}");
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, echo);
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.tls(address, "a.test", b"http/1.1").await.unwrap();
    let head =
        "POST / HTTP/1.1\r\nhost: a.test\r\nexpect: 100-continue\r\ncontent-length: 5\r\nconnection: close\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    soon("100 Continue", client.read_exact(&mut interim)).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"hello").await.unwrap();
    let mut answer = Vec::new();
    drop(soon("the answer", client.read_to_end(&mut answer)).await);
    assert!(answer.ends_with(b"hello"), "{}", answer.escape_ascii());
}

/// A body that begins and never ends.
struct Unfinished(Option<Bytes>);

impl hyper::body::Body for Unfinished {
    type Data = Bytes;
    type Error = hyper::Error;
    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.0.take().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
    }
}

#[tokio::test]
async fn an_answer_that_comes_before_the_body_is_through_reaches_the_client() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, |_, _| async {
        Response::builder().status(413).body(body("too much")).unwrap()
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    for mut client in [host.http1(address, "a.test").await, host.http2(address, "a.test").await] {
        let request = Request::post("/").body(Unfinished(Some("begun".into())).boxed()).unwrap();
        let response = client.send(request).await.unwrap();
        assert_eq!((response.status().as_u16(), text(response).await), (413, "too much".to_owned()));
    }
}

#[tokio::test]
async fn garbage_before_and_after_the_handshake_ends_its_own_connection_only() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n",
        b"\x16\x03\x01\xff\xff\x01\x00\xff\xfb\x03\x03",
        &[0; 20_000],
        &[0xff; 20_000],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x04\x00\x00\x00\x00\x00",
    ];
    for sent in garbage {
        let mut plain = tokio::net::TcpStream::connect(address).await.unwrap();
        drop(plain.write_all(sent).await);
        drop(plain.shutdown().await);
        drop(soon("the end of a plain connection", plain.read_to_end(&mut Vec::new())).await);
        for alpn in [&b"h2"[..], b"http/1.1"] {
            let mut client = host.tls(address, "a.test", alpn).await.unwrap();
            drop(client.write_all(sent).await);
            drop(client.shutdown().await);
            drop(soon("the end of a TLS connection", client.read_to_end(&mut Vec::new())).await);
        }
    }
    let mut client = host.http2(address, "a.test").await;
    assert_eq!(client.get_text("/").await, (200, "well".to_owned()));
    let report = host.until("the others are gone", |report| report.https_connections == 1).await;
    assert_eq!((report.panics, report.handshake_failures["not_tls"]), (0, 5));
}

#[tokio::test]
async fn a_client_that_connects_by_address_is_served_by_its_host_header() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let report = host.publish(&host.site(&["a.test", "127.0.0.1"], Some(16))).await;
    let mut client = host.http1(https_address(&report), "127.0.0.1").await;
    assert_eq!(client.get_text("/").await, (200, "well".to_owned()));
    let elsewhere = Request::get("/").header("host", "10.0.0.1").body(body("")).unwrap();
    assert_eq!(client.send(elsewhere).await.unwrap().status(), 421);
}
