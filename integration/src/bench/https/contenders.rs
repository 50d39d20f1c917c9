//! Those who are compared: how each is started, what it has cost so far, and its end.

use super::load::{Backend, PORT};
use crate::bench::contender::{Processes, free_port};
use anyhow::{Context as _, ensure};
use enclaved_core::id::Cid;
use enclaved_core::routes::{ListenerKey, Routes};
use std::ffi::OsString;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a contender may take to listen.
const DEADLINE: Duration = Duration::from_secs(10);
/// The site.
pub(super) const DOMAIN: &str = "bench.test";

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    Enclaved,
    Nginx,
    Haproxy,
    Caddy,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Enclaved => "enclaved proxy",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
        }
    }
}

/// One contender, running.
#[derive(Debug)]
pub(super) struct Contender {
    pub(super) address: SocketAddr,
    /// The certificate that clients trust.
    pub(super) root: PathBuf,
    processes: Processes,
}

impl Contender {
    pub(super) fn start(
        kind: Kind,
        backend: &Backend,
        folder: &Path,
        enclaved: &Path,
        pin: bool,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir_in(folder).context("making a folder")?.keep();
        if kind == Kind::Enclaved {
            return Self::ours(backend, &folder, enclaved, pin);
        }
        let pair = Pair::write(&folder)?;
        let address = free_port()?;
        let command = match kind {
            Kind::Nginx => nginx(address, &pair, backend, &folder)?,
            Kind::Haproxy => haproxy(address, &pair, backend, &folder)?,
            Kind::Caddy | Kind::Enclaved => caddy(address, &pair, backend, &folder)?,
        };
        let processes = Processes::start(kind.name(), &[command], pin, &folder)?;
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            ensure!(began.elapsed() < DEADLINE, "{} does not listen: {}", kind.name(), processes.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { address, root: pair.certificate, processes })
    }

    fn ours(backend: &Backend, folder: &Path, enclaved: &Path, pin: bool) -> anyhow::Result<Self> {
        // As it stands in a proxy's folder: keys that are not written have their defaults.
        let routes: Routes = serde_json::from_value(serde_json::json!({
            "format": enclaved_core::routes::ROUTES_FORMAT,
            "vsock": { "hybrid": backend.vsock },
            "egress": [],
            // All clients are one source here; the others have no limit for that.
            "https": { "listen": free_port()?, "rules": { "max_connections_per_source": 60_000 } },
            "sites": [{
                "enclave": "bench",
                "domains": [DOMAIN],
                "paths": [{ "prefix": "/", "vsock_port": PORT }],
                "target": Cid::FIRST,
            }],
            "tcp": [],
        }))?;
        let (processes, report) = Processes::proxy(enclaved, &[], routes, pin, folder)?;
        let https =
            report.listeners.into_iter().find(|listener| matches!(listener.listener, ListenerKey::Https { .. }));
        let https = https.context("the proxy reports no HTTPS port")?;
        ensure!(https.error.is_none(), "{https:?}");
        let root = folder.join("state/ca/root.crt");
        Ok(Self { address: https.address.parse()?, root, processes })
    }

    pub(super) fn cpu_s(&self) -> anyhow::Result<f64> {
        self.processes.cpu_s()
    }

    pub(super) fn pss_mib(&self) -> anyhow::Result<f64> {
        self.processes.pss_mib()
    }
}

/// A certificate for the site and its key, on P-256.
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
    both: PathBuf,
}

impl Pair {
    fn write(folder: &Path) -> anyhow::Result<Self> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let certificate = rcgen::CertificateParams::new([DOMAIN.to_owned()])?.self_signed(&key)?;
        let at = |name| folder.join(name);
        let pair = Self { certificate: at("site.crt"), key: at("site.key"), both: at("site.pem") };
        fs::write(&pair.certificate, certificate.pem())?;
        fs::write(&pair.key, key.serialize_pem())?;
        fs::write(&pair.both, certificate.pem() + &key.serialize_pem())?;
        Ok(pair)
    }
}

fn nginx(address: SocketAddr, pair: &Pair, backend: &Backend, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let text = format!(
        "daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/log;\nworker_rlimit_nofile 20000;\n\
         events {{ worker_connections 20000; }}\n\
         http {{\n  access_log off;\n  client_body_temp_path {folder}/body;\n  proxy_temp_path {folder}/proxy;\n  \
         fastcgi_temp_path {folder}/fastcgi;\n  uwsgi_temp_path {folder}/uwsgi;\n  scgi_temp_path {folder}/scgi;\n  \
         keepalive_requests 1000000000;\n  keepalive_timeout 1d;\n  client_max_body_size 0;\n  proxy_request_buffering off;\n  \
         upstream backend {{ server unix:{unix}; keepalive 64; keepalive_requests 1000000000; }}\n  \
         server {{\n    listen {address} ssl http2 backlog=4096;\n    server_name {DOMAIN};\n    \
         ssl_certificate {certificate};\n    ssl_certificate_key {key};\n    ssl_protocols TLSv1.2 TLSv1.3;\n    \
         location / {{\n      proxy_pass http://backend;\n      proxy_http_version 1.1;\n      \
         proxy_set_header Connection \"\";\n      proxy_set_header Host $host;\n      \
         proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n      proxy_set_header X-Forwarded-Proto $scheme;\n      \
         proxy_set_header X-Forwarded-Host $host;\n    }}\n  }}\n}}\n",
        folder = folder.display(),
        unix = backend.unix.display(),
        certificate = pair.certificate.display(),
        key = pair.key.display(),
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, text)?;
    Ok(["nginx".into(), "-c".into(), path.into(), "-p".into(), folder.into()].into())
}

fn haproxy(address: SocketAddr, pair: &Pair, backend: &Backend, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let text = format!(
        "global\n  maxconn 9000\n  nbthread 1\n  ssl-default-bind-options ssl-min-ver TLSv1.2\ndefaults\n  mode http\n  \
         maxconn 9000\n  timeout connect 5s\n  timeout client 1d\n  timeout server 1d\n  http-reuse always\n\
         frontend site\n  bind {address} ssl crt {both} alpn h2,http/1.1 backlog 4096\n  option forwardfor\n  \
         http-request set-header X-Forwarded-Proto https\n  http-request set-header X-Forwarded-Host %[req.hdr(host)]\n  \
         default_backend enclave\nbackend enclave\n  server s unix@{unix}\n",
        both = pair.both.display(),
        unix = backend.unix.display(),
    );
    let path = folder.join("haproxy.cfg");
    fs::write(&path, text)?;
    Ok(["haproxy".into(), "-db".into(), "-f".into(), path.into()].into())
}

fn caddy(address: SocketAddr, pair: &Pair, backend: &Backend, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let text = format!(
        "{{\n  admin off\n  auto_https off\n  servers {{\n    protocols h1 h2\n  }}\n}}\n\
         https://{DOMAIN}:{port} {{\n  bind {ip}\n  tls {certificate} {key}\n  reverse_proxy unix/{unix}\n}}\n",
        port = address.port(),
        ip = address.ip(),
        certificate = pair.certificate.display(),
        key = pair.key.display(),
        unix = backend.unix.display(),
    );
    let path = folder.join("Caddyfile");
    fs::write(&path, text)?;
    // Where it keeps what it remembers.
    let mut home = OsString::from("HOME=");
    home.push(folder);
    let mut data = OsString::from("XDG_DATA_HOME=");
    data.push(folder);
    let run = ["caddy", "run", "--adapter", "caddyfile", "--config"].map(OsString::from);
    Ok(["env".into(), home, data].into_iter().chain(run).chain([path.into()]).collect())
}
