//! Those who are compared: how each is set up and started, and what it has cost so far.

use super::application::Application;
use crate::processes::Owned;
use anyhow::{Context as _, bail, ensure};
use enclaved_core::id::Cid;
use enclaved_core::routes::{
    HttpsListener, HttpsRules, LinkReply, LinkRequest, PathRoute, ROUTES_FORMAT, Routes, Site, SiteRules, UpstreamHttp,
    VsockTransport,
};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a contender may take to listen.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    Enclaved,
    Nginx,
    Haproxy,
    Caddy,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Enclaved, Self::Nginx, Self::Haproxy, Self::Caddy];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Enclaved => "enclaved proxy",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
        }
    }
}

/// One contender, running: one process, on one processor.
#[derive(Debug)]
pub(super) struct Contender {
    pub(super) address: SocketAddr,
    process: Owned,
}

impl Contender {
    pub(super) fn start(
        kind: Kind,
        application: &Application,
        folder: &Path,
        enclaved: &Path,
        pin: bool,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir_in(folder).context("making a folder")?.keep();
        let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr())?;
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
        fs::write(folder.join("crt"), made.cert.pem())?;
        fs::write(folder.join("key"), made.signing_key.serialize_pem())?;
        fs::write(folder.join("both"), made.cert.pem() + &made.signing_key.serialize_pem())?;
        let command = match kind {
            Kind::Enclaved => ours(enclaved, &folder),
            Kind::Nginx => nginx(address, application, &folder)?,
            Kind::Haproxy => haproxy(address, application, &folder)?,
            Kind::Caddy => caddy(address, application, &folder)?,
        };
        let contender = Self { address, process: spawn(&command, pin, &folder)? };
        if kind == Kind::Enclaved {
            publish(&folder.join("link"), routes(address, application)?)?;
        }
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            ensure!(began.elapsed() < DEADLINE, "{} does not listen: {}", kind.name(), said(&folder));
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(contender)
    }

    /// CPU seconds so far, user and system.
    pub(super) fn cpu_s(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.0.id()))?;
        let (_, fields) = stat.rsplit_once(')').context("/proc/<pid>/stat without a name")?;
        let mut ticks = 0_u32;
        // utime and stime, fields 14 and 15 of all, proc_pid_stat(5).
        for field in fields.split_ascii_whitespace().skip(11).take(2) {
            ticks += field.parse::<u32>()?;
        }
        // USER_HZ is 100 on every architecture that this runs on.
        Ok(f64::from(ticks) / 100.0)
    }

    /// The proportional set.
    pub(super) fn pss_mib(&self) -> anyhow::Result<f64> {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.process.0.id()))?;
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
        Ok(f64::from(pss.trim().trim_end_matches(" kB").parse::<u32>()?) / 1024.0)
    }
}

fn spawn(command: &[OsString], pin: bool, folder: &Path) -> anyhow::Result<Owned> {
    let to_log = || fs::File::options().create(true).append(true).open(folder.join("log"));
    let pinned = [OsString::from("taskset"), "-c".into(), "0".into()];
    let mut words = pinned.iter().filter(|_| pin).chain(command);
    let program = words.next().context("no program")?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(to_log()?).stderr(to_log()?);
    // Caddy keeps a state of its own somewhere.
    command.env("XDG_DATA_HOME", folder).env("XDG_CONFIG_HOME", folder).env("HOME", folder);
    Ok(Owned(command.spawn().with_context(|| format!("starting {}", program.display()))?))
}

fn said(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}

fn ours(enclaved: &Path, folder: &Path) -> Vec<OsString> {
    let (state, link) = (folder.join("state"), folder.join("link"));
    [enclaved.into(), "proxy".into(), "--state-dir".into(), state.into(), "--link".into(), link.into()].into()
}

fn routes(address: SocketAddr, application: &Application) -> anyhow::Result<Routes> {
    let site = Site {
        enclave: "bench".parse().context("the enclave's name")?,
        domains: vec![address.ip().to_string()],
        paths: vec![PathRoute { prefix: "/".to_owned(), vsock_port: 8080, upstream: UpstreamHttp::Http1 }],
        target: Some(Cid::FIRST),
        rules: SiteRules::default(),
    };
    Ok(Routes {
        format: ROUTES_FORMAT,
        vsock: VsockTransport::Hybrid(application.vsock.clone()),
        https: Some(HttpsListener { listen: address, rules: HttpsRules::default() }),
        sites: vec![site],
        ..Routes::default()
    })
}

fn publish(link: &Path, routes: Routes) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(link) {
            Ok(stream) => break stream,
            Err(error) => ensure!(began.elapsed() < DEADLINE, "the proxy has no link: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut line = serde_json::to_vec(&LinkRequest::Publish { routes })?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match serde_json::from_str(&answer)? {
        LinkReply::Report(report) => {
            ensure!(report.listeners.iter().all(|listener| listener.error.is_none()), "{:?}", report.listeners);
            Ok(())
        }
        LinkReply::Refused { reason } => bail!("the proxy refused the routes: {reason}"),
    }
}

fn nginx(listen: SocketAddr, application: &Application, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let (dir, unix) = (folder.display(), application.unix.display());
    let text = format!(
        "daemon off; master_process off; pid {dir}/pid; error_log {dir}/log; worker_rlimit_nofile 20000;
        events {{ worker_connections 10000; }}
        http {{
            access_log off; keepalive_requests 1000000000; client_max_body_size 0;
            client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c; uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e;
            upstream application {{ server unix:{unix}; keepalive 64; keepalive_requests 1000000000; }}
            server {{
                listen {listen} ssl http2 backlog=4096; ssl_certificate {dir}/crt; ssl_certificate_key {dir}/key;
                ssl_protocols TLSv1.2 TLSv1.3;
                location / {{
                    proxy_pass http://application; proxy_http_version 1.1; proxy_request_buffering off;
                    proxy_set_header Connection \"\"; proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr;
                }}
            }}
        }}"
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, text)?;
    Ok(["nginx".into(), "-c".into(), path.into(), "-p".into(), folder.into()].into())
}

fn haproxy(listen: SocketAddr, application: &Application, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let text = format!(
        "global\n  maxconn 5000\n  nbthread 1\n  tune.ssl.default-dh-param 2048\ndefaults\n  mode http\n  timeout connect 5s\n  \
         timeout client 1m\n  timeout server 1m\n  option forwardfor\nfrontend f\n  bind {listen} backlog 4096 ssl crt {}/both alpn \
         h2,http/1.1\n  default_backend b\nbackend b\n  http-reuse always\n  server s unix@{}\n",
        folder.display(),
        application.unix.display()
    );
    let path = folder.join("haproxy.cfg");
    fs::write(&path, text)?;
    Ok(["haproxy".into(), "-db".into(), "-f".into(), path.into()].into())
}

fn caddy(listen: SocketAddr, application: &Application, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let (dir, unix) = (folder.display(), application.unix.display());
    let text = format!(
        "{{\n  admin off\n  auto_https off\n  default_sni 127.0.0.1\n}}\nhttps://{listen} {{\n  tls {dir}/crt {dir}/key\n  \
         reverse_proxy unix/{unix}\n}}\n"
    );
    let path = folder.join("Caddyfile");
    fs::write(&path, text)?;
    Ok(["caddy".into(), "run".into(), "--config".into(), path.into(), "--adapter".into(), "caddyfile".into()].into())
}
