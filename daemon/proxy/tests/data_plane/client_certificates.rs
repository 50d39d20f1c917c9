//! Client certificates: who is let in where, what the enclave is told, and that nothing agreed with one site holds for another.

use crate::support::{Enclave, Host, body, https_address, soon};
use enclaved_core::routes::{ProxyReport, Routes};
use http::Response;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, HandshakeKind, NamedGroup};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TLS12: &rustls::SupportedProtocolVersion = &rustls::version::TLS12;
const TLS13: &rustls::SupportedProtocolVersion = &rustls::version::TLS13;

/// Who signs clients' certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

type Identity = (CertificateDer<'static>, PrivateKeyDer<'static>);

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

impl Authority {
    fn new(name: &str) -> Self {
        let (mut params, key) = (params(name), KeyPair::generate().unwrap());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn signs(&self, name: &str) -> Identity {
        self.signs_until(name, rcgen::date_time_ymd(2100, 1, 1))
    }

    fn signs_until(&self, name: &str, until: time::OffsetDateTime) -> Identity {
        let (mut params, key) = (params(name), KeyPair::generate().unwrap());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = until;
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }
}

/// `a.test` demands certificates of this authority; `b.test`, another enclave's, demands none.
struct Scene {
    host: Host,
    authority: Authority,
    file: PathBuf,
    _dir: tempfile::TempDir,
    _enclave: Enclave,
    routes: Routes,
    address: SocketAddr,
}

impl Scene {
    async fn new() -> Self {
        let host = Host::new().await;
        // It says what it was told.
        let enclave = Enclave::http(&host.vsock(), 16, |_, request| async move {
            let names = request.headers().iter().filter(|(name, _)| name.as_str().contains("cert"));
            let told: Vec<_> = names.map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
            Response::new(body(told.join("\n")))
        });
        let dir = tempfile::tempdir().unwrap();
        let (authority, file) = (Authority::new("first"), dir.path().join("clients.pem"));
        std::fs::write(&file, &authority.pem).unwrap();
        let mut routes = host.site(&["a.test"], Some(16));
        let mut other = routes.sites[0].clone();
        (other.enclave, other.domains) = ("other".parse().unwrap(), vec!["b.test".to_owned()]);
        routes.sites.push(other);
        routes.sites[0].rules.client_ca = Some(file.clone());
        let address = https_address(&host.publish(&routes).await);
        Self { host, authority, file, _dir: dir, _enclave: enclave, routes, address }
    }

    fn client(&self, version: &'static rustls::SupportedProtocolVersion, identity: Option<&Identity>) -> ClientConfig {
        let roots = {
            let pem = std::fs::read(self.host.state("ca/root.crt")).unwrap();
            let mut roots = rustls::RootCertStore::empty();
            roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(&pem).unwrap()).unwrap();
            roots
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                builder.with_client_auth_cert(vec![certificate.clone()], key.clone_key()).unwrap()
            }
        }
    }

    /// One request over a connection of its own: how the handshake went, and the answer.
    async fn ask(&self, client: &Arc<ClientConfig>, name: &str, host: &str) -> io::Result<(HandshakeKind, String)> {
        let tcp = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(client.clone()).connect(name, tcp).await?;
        let request = format!(
            "GET / HTTP/1.1\r\nhost: {host}\r\nx-client-cert-subject: CN=admin\r\nx-client-cert-sha256: 00\r\n\
             x_client_cert_subject: CN=admin\r\nconnection: close\r\n\r\n"
        );
        tls.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        soon("the answer", tls.read_to_string(&mut answer)).await?;
        Ok((tls.get_ref().1.handshake_kind().unwrap(), answer))
    }

    async fn refused(&self, client: ClientConfig, cause: &str) {
        let before = self.host.report().await.handshake_failures.get(cause).copied().unwrap_or(0);
        self.ask(&Arc::new(client), "a.test", "a.test").await.unwrap_err();
        let counted = |report: &ProxyReport| report.handshake_failures.get(cause).is_some_and(|now| *now == before + 1);
        self.host.until(cause, counted).await;
    }

    async fn until_replaced(&self, authority: &Authority) {
        std::fs::write(&self.file, &authority.pem).unwrap();
        let identity = authority.signs("new");
        let let_in = async {
            while self.ask(&Arc::new(self.client(TLS13, Some(&identity))), "a.test", "a.test").await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        soon("the new authority counts", let_in).await;
    }
}

#[tokio::test]
async fn a_certificate_is_demanded_for_its_site_alone_and_the_enclave_is_told_whose_it_is() {
    let scene = Scene::new().await;
    let identity = scene.authority.signs("robot, the first");
    let sha256 = aws_sha256(&identity.0);
    for version in [TLS12, TLS13] {
        let client = Arc::new(scene.client(version, Some(&identity)));
        let (_, answer) = scene.ask(&client, "a.test", "a.test").await.unwrap();
        let told = answer.split("\r\n\r\n").nth(1).unwrap();
        let subject = r"x-client-cert-subject=CN=robot\, the first";
        let mut told: Vec<_> = told.lines().collect();
        told.sort_unstable();
        assert_eq!(told, [format!("x-client-cert-sha256={sha256}"), subject.to_owned()], "{version:?}");
        // Neither asked for one, nor told of one that it made up.
        for client in [client, Arc::new(scene.client(version, None))] {
            let (_, answer) = scene.ask(&client, "b.test", "b.test").await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("cert"), "{answer}");
        }
        scene.refused(scene.client(version, None), "no_client_certificate").await;
        let stranger = Authority::new("first").signs("robot, the first");
        scene.refused(scene.client(version, Some(&stranger)), "client_certificate").await;
        let expired = scene.authority.signs_until("robot, the first", rcgen::date_time_ymd(2020, 1, 1));
        scene.refused(scene.client(version, Some(&expired)), "client_certificate").await;
    }
}

fn aws_sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn no_other_way_leads_to_a_site_that_demands_a_certificate() {
    let mut scene = Scene::new().await;
    let status = |answer: io::Result<(HandshakeKind, String)>| answer.unwrap().1[9..12].to_owned();
    let none = Arc::new(scene.client(TLS13, None));
    assert_eq!(status(scene.ask(&none, "b.test", "a.test").await), "421", "by a connection to another site");
    let mut unnamed = scene.client(TLS13, None);
    unnamed.enable_sni = false;
    // The name it checks the certificate by, and does not say.
    scene.ask(&Arc::new(unnamed.clone()), "a.test", "a.test").await.unwrap_err();
    scene.routes.sites.reverse();
    scene.host.publish(&scene.routes).await;
    assert_eq!(status(scene.ask(&Arc::new(unnamed.clone()), "b.test", "a.test").await), "421", "by naming none");
    scene.routes.sites[0].rules.default = true;
    scene.host.publish(&scene.routes).await;
    assert_eq!(status(scene.ask(&Arc::new(unnamed), "b.test", "a.test").await), "421", "by way of the default");
    // One of each site's own authorities: who is let in at one is not at the other.
    let other = Authority::new("other");
    let file = scene.file.with_file_name("other.pem");
    std::fs::write(&file, &other.pem).unwrap();
    scene.routes.sites[0].rules.client_ca = Some(file);
    scene.host.publish(&scene.routes).await;
    let identity = other.signs("x");
    let client = Arc::new(scene.client(TLS13, Some(&identity)));
    assert_eq!(status(scene.ask(&client, "b.test", "b.test").await), "200");
    assert_eq!(status(scene.ask(&client, "b.test", "a.test").await), "421");
    scene.ask(&client, "a.test", "a.test").await.unwrap_err();
}

#[tokio::test]
async fn a_connection_from_before_the_demand_does_not_reach_the_site() {
    let mut scene = Scene::new().await;
    for http2 in [false, true] {
        scene.routes.sites[0].rules.client_ca = None;
        scene.host.publish(&scene.routes).await;
        let mut client = match http2 {
            false => scene.host.http1(scene.address, "a.test").await,
            true => scene.host.http2(scene.address, "a.test").await,
        };
        assert_eq!(client.get_text("/").await.0, 200);
        scene.routes.sites[0].rules.client_ca = Some(scene.file.clone());
        scene.host.publish(&scene.routes).await;
        assert_eq!(client.get_text("/").await.0, 421, "{http2}");
    }
}

#[tokio::test]
async fn authorities_are_read_again_and_broken_ones_replace_nothing() {
    let scene = Scene::new().await;
    let first = scene.authority.signs("first client");
    let client = Arc::new(scene.client(TLS13, Some(&first)));
    for broken in [
        "",
        "-----BEGIN CERTIFICATE-----\nMII",
        &format!("{}-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", scene.authority.pem),
    ] {
        std::fs::write(&scene.file, broken).unwrap();
        let said = |report: &ProxyReport| report.client_authorities[0].error.is_some();
        let report = scene.host.until("it is said", said).await;
        let told = &report.client_authorities[0];
        assert!(told.usable && told.enclave.as_str() == "app", "{told:?}");
        assert!(told.error.as_ref().unwrap().contains("clients.pem"), "{told:?}");
        scene.ask(&client, "a.test", "a.test").await.unwrap();
        scene.refused(scene.client(TLS13, None), "no_client_certificate").await;
        std::fs::write(&scene.file, &scene.authority.pem).unwrap();
        scene.host.until("it is mended", |report| report.client_authorities[0].error.is_none()).await;
    }
    // One that was let in by what counts no more ends with its request.
    let mut kept = connected(&scene, &client).await;
    scene.until_replaced(&Authority::new("second")).await;
    let mut rest = Vec::new();
    soon("the end of the connection", kept.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest.len(), 0);
    scene.refused(scene.client(TLS13, Some(&first)), "client_certificate").await;
}

/// A connection over which one request was answered, and which is kept.
async fn connected(scene: &Scene, client: &Arc<ClientConfig>) -> tokio_rustls::client::TlsStream<TcpStream> {
    let tcp = TcpStream::connect(scene.address).await.unwrap();
    let name = ServerName::try_from("a.test").unwrap();
    let mut tls = tokio_rustls::TlsConnector::from(client.clone()).connect(name, tcp).await.unwrap();
    tls.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n").await.unwrap();
    let (mut answer, mut buffer) = (Vec::new(), [0; 1024]);
    while !answer.windows(22).any(|bytes| bytes == b"x-client-cert-subject=") || !answer.ends_with(b"first client") {
        let read = soon("an answer", tls.read(&mut buffer)).await.unwrap();
        assert_ne!(read, 0);
        answer.extend_from_slice(&buffer[..read]);
    }
    tls
}

#[tokio::test]
async fn a_site_without_good_authorities_takes_nobody_until_it_has_some() {
    let mut scene = Scene::new().await;
    let second = Authority::new("second");
    let file = scene.file.with_file_name("missing.pem");
    scene.routes.sites[0].rules.client_ca = Some(file.clone());
    let report = scene.host.publish(&scene.routes).await;
    assert!(!report.client_authorities[0].usable && report.client_authorities[0].error.is_some());
    let identity = second.signs("x");
    scene.refused(scene.client(TLS13, None), "no_client_ca").await;
    scene.refused(scene.client(TLS12, Some(&identity)), "no_client_ca").await;
    let free = Arc::new(scene.client(TLS13, None));
    assert!(scene.ask(&free, "b.test", "b.test").await.unwrap().1.starts_with("HTTP/1.1 200"));
    scene.file = file;
    scene.until_replaced(&second).await;
}

/// Shows every server what any server gave.
#[derive(Debug)]
struct Shared(ClientSessionMemoryCache);

fn anybody() -> ServerName<'static> {
    ServerName::try_from("anybody.test").unwrap()
}

impl ClientSessionStore for Shared {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.0.set_kx_hint(anybody(), group);
    }
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.kx_hint(&anybody())
    }
    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.0.set_tls12_session(anybody(), value);
    }
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.0.tls12_session(&anybody())
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        self.0.remove_tls12_session(&anybody());
    }
    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(anybody(), value);
    }
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&anybody())
    }
}

#[tokio::test]
async fn a_session_is_resumed_at_its_own_site_under_the_authorities_that_it_began_with_and_nowhere_else() {
    for version in [TLS12, TLS13] {
        let mut scene = Scene::new().await;
        let identity = scene.authority.signs("robot");
        let mut client = scene.client(version, Some(&identity));
        client.resumption = Resumption::store(Arc::new(Shared(ClientSessionMemoryCache::new(32))));
        let client = Arc::new(client);
        let full = |kind| matches!(kind, HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest);
        let kind = async |scene: &Scene, name: &str| scene.ask(&client, name, name).await.unwrap();
        for name in ["a.test", "b.test"] {
            assert!(full(kind(&scene, name).await.0), "{name} {version:?}: nobody else's session counts");
            let (again, answer) = kind(&scene, name).await;
            assert_eq!(again, HandshakeKind::Resumed, "{name} {version:?}");
            assert_eq!(answer.contains("CN=robot"), name == "a.test", "what was agreed is known again: {answer}");
        }
        // The same name, and tickets for it from before there was a demand, and from other authorities.
        assert!(full(kind(&scene, "a.test").await.0));
        scene.routes.sites[0].rules.client_ca = None;
        scene.host.publish(&scene.routes).await;
        assert!(full(kind(&scene, "a.test").await.0), "{version:?}: without the check, one with it is not resumed");
        scene.routes.sites[0].rules.client_ca = Some(scene.file.clone());
        scene.host.publish(&scene.routes).await;
        assert!(full(kind(&scene, "a.test").await.0), "{version:?}: nor the other way");
        scene.until_replaced(&Authority::new("second")).await;
        scene.ask(&client, "a.test", "a.test").await.unwrap_err();
    }
}

#[tokio::test]
async fn a_session_is_not_resumed_once_its_certificate_has_expired() {
    let scene = Scene::new().await;
    for version in [TLS12, TLS13] {
        let soon_over = time::OffsetDateTime::now_utc() + std::time::Duration::from_secs(3);
        let client = Arc::new(scene.client(version, Some(&scene.authority.signs_until("brief", soon_over))));
        let before = scene.host.report().await.handshake_failures.get("client_certificate").copied().unwrap_or(0);
        let mut resumed = 0;
        let expiring = async {
            while let Ok((kind, _)) = scene.ask(&client, "a.test", "a.test").await {
                resumed += usize::from(kind == HandshakeKind::Resumed);
            }
        };
        soon("the end of the session", expiring).await;
        assert!(resumed > 0, "{version:?}");
        let report = scene.host.report().await;
        assert!(report.handshake_failures["client_certificate"] > before, "{version:?}");
    }
}
