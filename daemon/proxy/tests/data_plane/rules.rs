//! What single endpoints and ports demand, and how much they carry.

use crate::support::{Enclave, Host, Upstream, cid, egress, soon, tcp_address, tcp_route, traffic};
use enclaved_core::routes::{Ages, Direction, EgressRoute, HostsRoute, ProxyProtocol, Routes};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What a TLS client that wants this server says first.
fn hello(name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

async fn is_hung_up_on(stream: &mut (impl AsyncReadExt + Unpin)) {
    let read = soon("the end", stream.read(&mut [0; 1])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

/// A TLS server for localhost that sends back what it gets; and a client that trusts it. The server knows no key exchange but one
/// that no client offers at once, if `retry`: then it asks for another hello.
async fn tls_server(retry: bool) -> (Upstream, TlsConnector) {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let certificate = own.cert.der().clone();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    if retry {
        provider.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::SECP384R1];
    }
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into();
    let server = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let upstream = Upstream::new(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let (mut reader, mut writer) = tokio::io::split(stream);
            drop(tokio::io::copy(&mut reader, &mut writer).await);
            drop(writer.shutdown().await);
        }
    });
    (upstream.await, TlsConnector::from(Arc::new(client)))
}

fn with_sni(upstream: &Upstream) -> EgressRoute {
    let route = egress(16, 8000, upstream.address);
    EgressRoute { hostname: "localhost".to_owned(), sni: true, ..route }
}

#[tokio::test]
async fn with_sni_tls_for_that_server_passes_whole_also_where_the_server_asks_for_a_second_hello() {
    for retry in [false, true] {
        let host = Host::new().await;
        let (upstream, connector) = tls_server(retry).await;
        host.publish(&Routes { egress: vec![with_sni(&upstream)], ..host.routes() }).await;
        let enclave = host.connect_from(16, 8000).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let enclave = soon("the handshake", connector.connect(name, enclave)).await.unwrap();
        let kind = enclave.get_ref().1.handshake_kind();
        let expected = if retry { HandshakeKind::FullWithHelloRetryRequest } else { HandshakeKind::Full };
        assert_eq!(kind, Some(expected));
        let sent = vec![7; 300_000];
        let (mut reader, mut writer) = tokio::io::split(enclave);
        let writing = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (read, ()) = tokio::join!(soon("the echo", reader.read_to_end(&mut received)), writing);
        read.unwrap();
        assert!(received == sent, "{} bytes came back", received.len());
        let report = host.until("it ended", |report| traffic(report, Direction::Egress).open == 0).await;
        let counted = traffic(&report, Direction::Egress);
        assert!(counted.failed.is_empty() && counted.bytes_from_enclave > 300_000, "{counted:?}");
    }
}

#[tokio::test]
async fn with_sni_what_does_not_begin_as_tls_for_that_server_never_reaches_the_upstream() {
    let host = Host::new().await;
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let route =
        EgressRoute { hostname: "localhost".to_owned(), sni: true, ..egress(16, 8000, upstream.local_addr().unwrap()) };
    host.publish(&Routes { egress: vec![route], ..host.routes() }).await;
    for words in [hello("evil.example.com"), b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        enclave.write_all(&words).await.unwrap();
        is_hung_up_on(&mut enclave).await;
    }
    let report = host.until("all ended", |report| traffic(report, Direction::Egress).open == 0).await;
    let counted = traffic(&report, Direction::Egress);
    assert_eq!((counted.failed["sni_mismatch"], counted.failed["not_tls"], counted.total), (1, 1, 2));
    let nobody = tokio::time::timeout(std::time::Duration::from_millis(100), upstream.accept()).await;
    assert!(nobody.is_err(), "the upstream heard of it");
}

/// What a server says that wants another hello: RFC 8446, 4.1.3, without extensions.
fn retry_request() -> Vec<u8> {
    let random = "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c";
    let random: Vec<u8> = random
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    let message = [&[2, 0, 0, 38, 3, 3], &random[..], &[0, 0x13, 1, 0]].concat();
    [&[22, 3, 3, 0, u8::try_from(message.len()).unwrap()], &message[..]].concat()
}

#[tokio::test]
async fn with_sni_a_second_hello_for_another_server_is_not_passed_on_and_cuts_the_connection() {
    let host = Host::new().await;
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = upstream.local_addr().unwrap();
    let route = EgressRoute { hostname: "localhost".to_owned(), sni: true, ..egress(16, 8000, address) };
    host.publish(&Routes { egress: vec![route], ..host.routes() }).await;
    // Once after the server has asked for it, once before.
    for asked in [true, false] {
        let first = hello("localhost");
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        enclave.write_all(&first).await.unwrap();
        let (mut server, _) = soon("the connection", upstream.accept()).await.unwrap();
        let mut heard = vec![0; first.len()];
        soon("the first hello", server.read_exact(&mut heard)).await.unwrap();
        assert_eq!(heard, first);
        if asked {
            server.write_all(&retry_request()).await.unwrap();
            let mut answer = vec![0; retry_request().len()];
            soon("the server's request", enclave.read_exact(&mut answer)).await.unwrap();
            assert_eq!(answer, retry_request());
        }
        enclave.write_all(&hello("evil.example.com")).await.unwrap();
        is_hung_up_on(&mut enclave).await;
        // Reset, with nothing of the second.
        let end = soon("the reset", server.read_u8()).await.unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset, "{end}");
    }
    host.until("both are counted", |report| traffic(report, Direction::Egress).failed.get("sni_mismatch") == Some(&2))
        .await;
}

#[tokio::test]
async fn an_endpoint_has_as_many_connections_as_it_may_and_another_is_none_the_worse() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    let mut limited = egress(16, 8000, upstream.address);
    limited.limits.max_connections = Some(1);
    let mut other = egress(16, 8001, upstream.address);
    other.hostname = "localhost".to_owned();
    host.publish(&Routes { egress: vec![limited, other], ..host.routes() }).await;
    let mut first = host.connect_from(16, 8000).await.unwrap();
    first.write_all(b"1").await.unwrap();
    assert_eq!(soon("the echo", first.read_u8()).await.unwrap(), b'1');
    is_hung_up_on(&mut host.connect_from(16, 8000).await.unwrap()).await;
    for _ in 0..3 {
        let mut other = host.connect_from(16, 8001).await.unwrap();
        other.write_all(b"2").await.unwrap();
        assert_eq!(soon("the echo", other.read_u8()).await.unwrap(), b'2');
    }
    let report = host.report().await;
    let limited = report.traffic.iter().find(|traffic| traffic.endpoint.starts_with("127.")).unwrap();
    assert_eq!((limited.failed["limit"], limited.open, limited.total), (1, 1, 2));
    drop(first);
    host.until("the first is over", |report| report.traffic.iter().all(|traffic| traffic.open == 0)).await;
    let mut again = host.connect_from(16, 8000).await.unwrap();
    again.write_all(b"3").await.unwrap();
    assert_eq!(soon("the echo", again.read_u8()).await.unwrap(), b'3');
}

#[tokio::test]
async fn a_generation_has_its_connections_whatever_its_predecessor_holds_and_a_changed_limit_counts_those_there_are() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    let generation = |number, limit| {
        let mut route = egress(number, 8000, upstream.address);
        route.limits.max_connections = Some(limit);
        route
    };
    let served = async |number| {
        let mut enclave = host.connect_from(number, 8000).await.unwrap();
        enclave.write_all(b"1").await.unwrap();
        assert_eq!(soon("the echo", enclave.read_u8()).await.unwrap(), b'1');
        enclave
    };
    host.publish(&Routes { egress: vec![generation(16, 1)], ..host.routes() }).await;
    let _pool = served(16).await;
    host.publish(&Routes { egress: vec![generation(16, 1), generation(17, 1)], ..host.routes() }).await;
    let _successor = served(17).await;
    for number in [16, 17] {
        is_hung_up_on(&mut host.connect_from(number, 8000).await.unwrap()).await;
    }
    host.publish(&Routes { egress: vec![generation(17, 2)], ..host.routes() }).await;
    let _second = served(17).await;
    is_hung_up_on(&mut host.connect_from(17, 8000).await.unwrap()).await;
}

#[tokio::test]
async fn connections_that_come_too_fast_wait_for_their_turn_and_too_many_of_them_are_refused() {
    let host = Host::new().await;
    let upstream = Upstream::saying("x").await;
    let mut route = egress(16, 8000, upstream.address);
    route.limits.connections_per_second = Some(2);
    host.publish(&Routes { egress: vec![route], ..host.routes() }).await;
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.push(host.connect_from(16, 8000).await.unwrap());
    }
    let mut served = 0;
    for stream in &mut streams {
        served += soon("words or the end", stream.read(&mut [0; 1])).await.unwrap_or(0);
    }
    drop(streams);
    let report = host.until("all ended", |report| traffic(report, Direction::Egress).open == 0).await;
    let refused = traffic(&report, Direction::Egress).failed["rate"];
    // Now, in half a second, in a second; and one more or so if connecting took long.
    assert!((3..=5).contains(&served), "{served}");
    assert_eq!(served as u64 + refused, 10);
}

#[tokio::test]
async fn an_enclave_reads_the_list_of_its_own_endpoints_and_no_others() {
    let host = Host::new().await;
    let list = |number: u32, document: &str| HostsRoute {
        enclave: format!("app-{number}").parse().unwrap(),
        cid: cid(number),
        vsock_port: 7777,
        document: document.to_owned(),
    };
    let mut routes = Routes { hosts: vec![list(16, "[1]\n"), list(17, "[2]\n")], ..host.routes() };
    let report = host.publish(&routes).await;
    assert!(report.listeners.len() == 2 && report.listeners.iter().all(|listener| listener.error.is_none()));
    let read = async |number| {
        let mut said = String::new();
        let mut enclave = host.connect_from(number, 7777).await.unwrap();
        soon("the list", enclave.read_to_string(&mut said)).await.unwrap();
        said
    };
    assert_eq!((read(16).await.as_str(), read(17).await.as_str()), ("[1]\n", "[2]\n"));
    routes.hosts[0].document = "[3]\n".to_owned();
    host.publish(&routes).await;
    assert_eq!(read(16).await, "[3]\n");
}

#[tokio::test]
async fn a_port_with_the_proxy_protocol_tells_the_enclave_its_client_before_any_byte() {
    let host = Host::new().await;
    let _enclave = Enclave::raw(&host.vsock(), 16, |_, mut stream| async move {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
    });
    let mut route = tcp_route("127.0.0.1:0", Some(16));
    route.rules.proxy_protocol = Some(ProxyProtocol::V2);
    let address = tcp_address(&host.publish(&Routes { tcp: vec![route], ..host.routes() }).await);
    let mut client = TcpStream::connect(address).await.unwrap();
    let source = client.local_addr().unwrap();
    client.write_all(b"words").await.unwrap();
    client.shutdown().await.unwrap();
    let mut seen = Vec::new();
    soon("the answer", client.read_to_end(&mut seen)).await.unwrap();
    let ports = [source.port().to_be_bytes(), address.port().to_be_bytes()].concat();
    let header = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &[127, 0, 0, 1, 127, 0, 0, 1], &ports].concat();
    assert_eq!(seen, [&header[..], b"words"].concat());
    let report = host.until("it is over", |report| traffic(report, Direction::Tcp).open == 0).await;
    assert_eq!(traffic(&report, Direction::Tcp).bytes_to_enclave, 5, "the header is no traffic");
}

#[tokio::test]
async fn a_port_takes_connections_from_where_it_may_and_so_many_of_each_source() {
    let host = Host::new().await;
    let _enclave = Enclave::echoing(&host.vsock(), 16);
    let mut route = tcp_route("127.0.0.1:0", Some(16));
    route.rules.allow = vec!["127.0.0.8/29".parse().unwrap()];
    route.rules.max_connections_per_source = Some(1);
    route.rules.max_connections = Some(2);
    let mut routes = Routes { tcp: vec![route], ..host.routes() };
    let address = tcp_address(&host.publish(&routes).await);
    let from = async |source: &str| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(format!("{source}:0").parse().unwrap()).unwrap();
        socket.connect(address).await.unwrap()
    };
    let works = async |stream: &mut TcpStream| {
        stream.write_all(b"1").await.unwrap();
        assert_eq!(soon("the echo", stream.read_u8()).await.unwrap(), b'1');
    };
    is_hung_up_on(&mut from("127.0.0.1").await).await;
    let mut first = from("127.0.0.9").await;
    works(&mut first).await;
    is_hung_up_on(&mut from("127.0.0.9").await).await;
    let mut second = from("127.0.0.10").await;
    works(&mut second).await;
    is_hung_up_on(&mut from("127.0.0.11").await).await;
    let report = host.until("the refused are over", |report| traffic(report, Direction::Tcp).open == 2).await;
    let failed = &traffic(&report, Direction::Tcp).failed;
    assert_eq!((failed["source_refused"], failed["source_limit"], failed["limit"]), (1, 1, 1));

    // Rules that change leave the socket, and the connections that there are, alone.
    routes.tcp[0].rules.allow.clear();
    assert_eq!(tcp_address(&host.publish(&routes).await), address);
    works(&mut first).await;
    drop((first, second));
    host.until("both are over", |report| traffic(report, Direction::Tcp).open == 0).await;
    works(&mut from("127.0.0.1").await).await;
}

#[tokio::test]
async fn an_upstream_that_never_answers_takes_nothing_from_another_endpoint() {
    let host = Host::with_limits(|limits| limits.egress_connections = 64).await;
    // Nobody accepts there: its queue is full before long, and connecting to it waits.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&dead, 0).unwrap();
    let upstream = Upstream::echoing().await;
    let dead_route = egress(16, 8000, dead.local_addr().unwrap());
    host.publish(&Routes { egress: vec![dead_route, egress(16, 8001, upstream.address)], ..host.routes() }).await;
    let mut waiting: Vec<UnixStream> = Vec::new();
    for _ in 0..60 {
        waiting.push(host.connect_from(16, 8000).await.unwrap());
    }
    for _ in 0..20 {
        let mut stream = host.connect_from(16, 8001).await.unwrap();
        stream.write_all(b"1").await.unwrap();
        assert_eq!(soon("the echo", stream.read_u8()).await.unwrap(), b'1');
    }
}

#[tokio::test]
async fn endpoints_and_ports_end_connections_at_the_silence_and_the_age_that_their_routes_say() {
    let host = Host::new().await;
    let _enclave = Enclave::echoing(&host.vsock(), 16);
    let upstream = Upstream::echoing().await;
    let (silent, old) = (Ages { idle_s: Some(1), lifetime_s: None }, Ages { idle_s: None, lifetime_s: Some(1) });
    let mut routes = host.routes();
    for (number, ages) in [silent, old, Ages::default()].into_iter().enumerate() {
        let mut route = egress(16, 8000 + u32::try_from(number).unwrap(), upstream.address);
        route.limits.ages = ages;
        routes.egress.push(route);
    }
    let mut port = tcp_route("127.0.0.1:0", Some(16));
    port.rules.ages = silent;
    routes.tcp.push(port);
    let address = tcp_address(&host.publish(&routes).await);

    let mut silent = host.connect_from(16, 8000).await.unwrap();
    let mut old = host.connect_from(16, 8001).await.unwrap();
    let mut kept = host.connect_from(16, 8002).await.unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    silent.write_all(b"1").await.unwrap();
    assert_eq!(soon("the echo", silent.read_u8()).await.unwrap(), b'1');
    let talk = async {
        while old.write_all(b"2").await.is_ok() && old.read_u8().await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    soon("the end at its age", talk).await;
    is_hung_up_on(&mut silent).await;
    is_hung_up_on(&mut client).await;
    kept.write_all(b"3").await.unwrap();
    assert_eq!(soon("the echo of one without", kept.read_u8()).await.unwrap(), b'3');
    let failed = |report: &enclaved_core::routes::ProxyReport, reason: &str| {
        report.traffic.iter().filter_map(|traffic| traffic.failed.get(reason)).sum::<u64>()
    };
    host.until("all are counted", |report| (failed(report, "idle"), failed(report, "lifetime")) == (2, 1)).await;
}

#[tokio::test]
async fn an_endpoint_gives_its_upstream_as_long_to_accept_as_its_route_says() {
    let host = Host::new().await;
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&dead, 0).unwrap();
    let address = dead.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_millis(100)) {
        queue.push(stream);
    }
    let mut route = egress(16, 8000, address);
    route.limits.connect_timeout_ms = Some(300);
    host.publish(&Routes { egress: vec![route], ..host.routes() }).await;
    let began = std::time::Instant::now();
    is_hung_up_on(&mut host.connect_from(16, 8000).await.unwrap()).await;
    let took = began.elapsed();
    assert!(took.as_millis() >= 300 && took.as_secs() < 8, "{took:?}, and by itself it is ten seconds");
    let report = host.until("it ended", |report| traffic(report, Direction::Egress).open == 0).await;
    assert_eq!(traffic(&report, Direction::Egress).failed["connect_timeout"], 1);
}
