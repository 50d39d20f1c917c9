//! One port for all names: TLS that ends here and TLS that is the enclave's, told apart by the first words of a client.

use crate::support::{Body, Enclave, Host, body, https_address, soon, text, traffic};
use enclaved_core::routes::{Direction, Passthrough, ProxyProtocol, ProxyReport, Routes, Site, SiteRules};
use http::{Request, Response};
use hyper::body::Incoming;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UnixStream};

/// A site whose TLS is that of the enclave with this CID.
fn raw_site(domain: &str, target: Option<u32>, proxy_protocol: Option<ProxyProtocol>) -> Site {
    Site {
        enclave: "raw".parse().unwrap(),
        domains: vec![domain.to_owned()],
        paths: Vec::new(),
        target: target.map(crate::support::cid),
        rules: SiteRules {
            passthrough: Some(Passthrough { vsock_port: 8443, proxy_protocol }),
            ..SiteRules::default()
        },
    }
}

/// `a.test` ended here, by CID 16; `raw.test` passed through, to CID 17.
fn both(host: &Host, proxy_protocol: Option<ProxyProtocol>) -> Routes {
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites.push(raw_site("raw.test", Some(17), proxy_protocol));
    routes
}

/// The TLS of an enclave that certifies itself.
struct OwnTls {
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
}

impl OwnTls {
    /// Its client offers so many bytes of application protocols, of which the enclave takes the last.
    fn new(padding: usize) -> Self {
        let key = rcgen::generate_simple_self_signed(["raw.test".to_owned()]).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let (certificate, private) = (
            key.cert.der().clone(),
            PrivateKeyDer::from_pem_slice(key.signing_key.serialize_pem().as_bytes()).unwrap(),
        );
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], private)
            .unwrap();
        server.alpn_protocols = vec![b"own".to_vec()];
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![vec![b'x'; 200]; padding / 200];
        client.alpn_protocols.push(b"own".to_vec());
        Self { server: server.into(), client: client.into() }
    }

    /// An enclave that sends back in TLS what it gets, and says what came before TLS.
    fn enclave(&self, host: &Host, before: usize) -> (Enclave, tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>) {
        let (sender, heard) = tokio::sync::mpsc::unbounded_channel();
        let acceptor = tokio_rustls::TlsAcceptor::from(self.server.clone());
        let enclave = Enclave::raw(&host.vsock(), 17, move |port, mut stream: UnixStream| {
            let (sender, acceptor) = (sender.clone(), acceptor.clone());
            async move {
                assert_eq!(port, 8443);
                let mut header = vec![0; before];
                stream.read_exact(&mut header).await.unwrap();
                sender.send(header).unwrap();
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut said = vec![0; 5];
                stream.read_exact(&mut said).await.unwrap();
                said.reverse();
                stream.write_all(&said).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        (enclave, heard)
    }

    /// Speaks with the enclave through the proxy, of which it sends pieces of this size.
    async fn speak(&self, address: SocketAddr, piece: usize) -> String {
        let stream = in_pieces(address, piece).await;
        let name = ServerName::try_from("raw.test").unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(self.client.clone()).connect(name, stream).await.unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"own"[..]));
        tls.write_all(b"hello").await.unwrap();
        let mut answer = String::new();
        soon("the enclave's answer", tls.read_to_string(&mut answer)).await.unwrap();
        answer
    }
}

/// A connection whose bytes go out in pieces of this size, each in a segment of its own.
async fn in_pieces(address: SocketAddr, piece: usize) -> DuplexStream {
    let tcp = TcpStream::connect(address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let (near, far) = tokio::io::duplex(64 << 10);
    let (mut from_client, mut to_client) = tokio::io::split(far);
    let (mut from_proxy, mut to_proxy) = tcp.into_split();
    tokio::spawn(async move {
        let mut buffer = vec![0; piece];
        while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
            if to_proxy.write_all(&buffer[..read]).await.is_err() {
                break;
            }
            // The proxy sees each by itself, as far as that can be had.
            tokio::task::yield_now().await;
        }
    });
    tokio::spawn(async move {
        drop(tokio::io::copy(&mut from_proxy, &mut to_client).await);
        drop(to_client.shutdown().await);
    });
    near
}

#[tokio::test]
async fn tls_of_one_name_ends_in_the_enclave_and_of_another_here_on_the_same_port() {
    let host = Host::new().await;
    let own = OwnTls::new(0);
    let (_raw, mut heard) = own.enclave(&host, 0);
    let _http = Enclave::saying(&host.vsock(), 16, "decrypted here");
    let address = https_address(&host.publish(&both(&host, None)).await);
    assert_eq!(own.speak(address, 64 << 10).await, "olleh");
    assert_eq!(heard.recv().await.unwrap(), b"");
    assert_eq!(host.http2(address, "a.test").await.get_text("/").await.1, "decrypted here");
    let report = host.until("both are over", |report| report.traffic.iter().all(|traffic| traffic.open == 0)).await;
    let raw = traffic(&report, Direction::Tcp);
    assert_eq!((raw.enclave.as_str(), raw.total, raw.failed.len()), ("raw", 1, 0));
    assert!(raw.bytes_to_enclave > 200 && raw.bytes_from_enclave > 200, "the first words are counted, too: {raw:?}");
    assert_eq!(report.handshake_failures.len(), 0, "{:?}", report.handshake_failures);
}

#[tokio::test]
async fn a_hello_of_any_size_in_any_number_of_segments_is_passed_on_and_understood() {
    let host = Host::new().await;
    for (padding, piece) in [(0, 1), (2000, 100), (2000, 1448), (12_000, 1448), (12_000, 64 << 10)] {
        let own = OwnTls::new(padding);
        let (_raw, _heard) = own.enclave(&host, 0);
        let address = https_address(&host.publish(&both(&host, None)).await);
        assert_eq!(own.speak(address, piece).await, "olleh", "{padding} bytes more, in pieces of {piece}");
    }
    // And one whose TLS ends here.
    let _http = Enclave::saying(&host.vsock(), 16, "decrypted here");
    let address = https_address(&host.publish(&both(&host, None)).await);
    for (padding, piece) in [(0, 1), (2000, 100), (12_000, 1448)] {
        let mut config = host.client_config(b"http/1.1");
        config.alpn_protocols.splice(0..0, vec![vec![b'x'; 200]; padding / 200]);
        let stream = in_pieces(address, piece).await;
        let name = ServerName::try_from("a.test").unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        tls.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        drop(soon("the answer", tls.read_to_end(&mut answer)).await);
        assert!(answer.ends_with(b"decrypted here"), "{padding} bytes more, in pieces of {piece}");
    }
}

#[tokio::test]
async fn an_enclave_with_tls_of_its_own_may_learn_the_clients_address() {
    let host = Host::new().await;
    let own = OwnTls::new(2000);
    let (_raw, mut heard) = own.enclave(&host, 28);
    let address = https_address(&host.publish(&both(&host, Some(ProxyProtocol::V2))).await);
    assert_eq!(own.speak(address, 1448).await, "olleh");
    let header = heard.recv().await.unwrap();
    assert_eq!(&header[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    assert_eq!(&header[16..24], &[127, 0, 0, 1, 127, 0, 0, 1]);
    assert_eq!(u16::from_be_bytes([header[26], header[27]]), address.port());
}

#[tokio::test]
async fn an_enclave_with_tls_of_its_own_that_is_not_ready_is_an_alert_and_counted() {
    let host = Host::new().await;
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites.push(raw_site("raw.test", None, None));
    let address = https_address(&host.publish(&routes).await);
    let error = host.tls(address, "raw.test", b"h2").await.unwrap_err();
    assert!(error.to_string().contains("InternalError"), "{error}");
    let report = host.until("it is over", |report| traffic(report, Direction::Tcp).open == 0).await;
    assert_eq!(traffic(&report, Direction::Tcp).failed["no_target"], 1);
}

#[tokio::test]
async fn requests_for_a_site_are_misdirected_on_a_connection_to_another() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let mut routes = host.site(&["a.test", "*.a.test"], Some(16));
    let mut other = routes.sites[0].clone();
    (other.enclave, other.domains) = ("other".parse().unwrap(), vec!["b.test".to_owned()]);
    routes.sites.push(other);
    routes.sites.push(raw_site("raw.test", Some(16), None));
    let address = https_address(&host.publish(&routes).await);
    for (name, asked, status) in [
        ("a.test", "A.test:8443", 200),
        ("a.test", "x.a.test", 200),
        ("a.test", "b.test", 421),
        ("b.test", "a.test", 421),
        ("a.test", "raw.test", 421),
        ("a.test", "c.test", 421),
    ] {
        for mut client in [host.http1(address, name).await, host.http2(address, name).await] {
            let request = Request::get("/").header("host", asked).body(body("")).unwrap();
            let response = client.send_as(asked, request).await.unwrap();
            assert_eq!(response.status(), status, "{asked} over a connection to {name}");
        }
    }
}

async fn tell_host(_: u32, request: Request<Incoming>) -> Response<Body> {
    Response::new(body(request.headers()["host"].to_str().unwrap().to_owned()))
}

#[tokio::test]
async fn the_default_site_takes_every_other_name_and_clients_that_name_none() {
    let host = Host::new().await;
    let _enclave = Enclave::http(&host.vsock(), 16, tell_host);
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].rules.default = true;
    let address = https_address(&host.publish(&routes).await);
    // Its certificate is that of a name it has; who insists on another is told by that.
    let error = host.tls(address, "c.test", b"http/1.1").await.unwrap_err();
    assert!(error.to_string().contains("certificate not valid for name"), "{error}");
    let report = host.until("it is counted", |report| !report.handshake_failures.is_empty()).await;
    assert_eq!(report.handshake_failures["certificate_refused"], 1);
    let mut client = host.http1(address, "a.test").await;
    for asked in ["a.test", "c.test", "10.0.0.1:8443"] {
        let request = Request::get("/").header("host", asked).body(body("")).unwrap();
        let response = client.send_as(asked, request).await.unwrap();
        assert_eq!((response.status().as_u16(), text(response).await), (200, asked.to_owned()));
    }
}

#[tokio::test]
async fn the_default_site_may_be_one_with_tls_of_its_own() {
    let host = Host::new().await;
    let own = OwnTls::new(0);
    let (_raw, _heard) = own.enclave(&host, 0);
    let mut routes = both(&host, None);
    routes.sites[1].domains = vec!["other.test".to_owned()];
    routes.sites[1].rules.default = true;
    let address = https_address(&host.publish(&routes).await);
    assert_eq!(own.speak(address, 1448).await, "olleh");
}

#[tokio::test]
async fn connections_of_one_source_and_of_all_have_limits_and_a_trusted_proxy_is_not_one_source() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "well");
    let mut routes = host.site(&["a.test"], Some(16));
    routes.https.as_mut().unwrap().rules.max_connections_per_source = Some(2);
    let address = https_address(&host.publish(&routes).await);
    let refused = |report: &ProxyReport, reason| report.refused.get(reason).copied().unwrap_or(0);
    let first = host.http1(address, "a.test").await;
    let mut second = host.http1(address, "a.test").await;
    let mut third = TcpStream::connect(address).await.unwrap();
    assert_eq!(soon("the end of the third", third.read(&mut [0; 1])).await.unwrap_or(0), 0);
    assert_eq!(refused(&host.report().await, "https_source_limit"), 1);
    assert_eq!(second.get_text("/").await.0, 200);
    drop(first);
    routes.https.as_mut().unwrap().rules.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    routes.https.as_mut().unwrap().rules.max_connections = Some(4);
    host.publish(&routes).await;
    let mut kept = Vec::new();
    let refusal = async {
        while let Ok(connection) = host.tls(address, "a.test", b"http/1.1").await {
            kept.push(connection);
        }
    };
    soon("the limit of all", refusal).await;
    // The first one's end may not be seen yet.
    assert!((2..=3).contains(&kept.len()), "{}", kept.len());
    assert!(refused(&host.report().await, "https_limit") >= 1);
}

#[tokio::test]
async fn handshakes_that_come_to_nothing_are_told_apart() {
    let host = Host::with_limits(|limits| limits.handshake = Duration::from_millis(300)).await;
    let address = https_address(&host.publish(&host.site(&["a.test"], None)).await);
    // It goes without a word; it speaks HTTP; it is silent; it knows only an old cipher; it trusts nobody; it asks for a stranger.
    drop(TcpStream::connect(address).await.unwrap());
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
    let mut alert = Vec::new();
    drop(plain.read_to_end(&mut alert).await);
    assert_eq!((alert.len(), &alert[..2]), (7, &[21, 3][..]), "an alert, and no page: {alert:?}");
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(soon("the end of a silent client", silent.read(&mut [0; 1])).await.unwrap(), 0);
    let error = host.tls(address, "a.test", b"spdy/3").await.unwrap_err();
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    let provider = host.client_config(b"h2").crypto_provider().clone();
    let mut strangers = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    strangers.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("a.test").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(strangers)).connect(name, tcp).await.unwrap_err();
    host.tls(address, "c.test", b"h2").await.unwrap_err();
    let report = host.until("all are counted", |report| report.handshake_failures.values().sum::<u64>() == 6).await;
    let causes = ["certificate_refused", "closed", "incompatible", "not_tls", "timeout", "unknown_name"];
    assert!(report.handshake_failures.keys().eq(causes), "{:?}", report.handshake_failures);
}
