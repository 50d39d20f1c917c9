//! Those who are compared: how each is started, what it has cost so far, and its end.

use super::load::{Backend, Far, Way};
use super::splice::Place;
use crate::bench::contender::{Processes, free_port};
use anyhow::{Context as _, bail, ensure};
use enclaved_core::routes::{
    EgressLimits, EgressRoute, ListenerKey, ROUTES_FORMAT, Routes, TcpRoute, TcpRules, VsockTransport,
};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use vsock::VMADDR_CID_LOCAL;

/// How long a contender may take to listen.
const DEADLINE: Duration = Duration::from_secs(10);
/// A port of enclaved's takes 4096 connections; two take as many as are held here.
pub(super) const PORTS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    Enclaved,
    Nginx,
    Haproxy,
    Socat,
    Splice,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Enclaved => "enclaved proxy",
            Self::Nginx => "nginx stream",
            Self::Haproxy => "haproxy",
            Self::Socat => "socat",
            Self::Splice => "by splice(2)",
        }
    }
}

/// Where clients connect.
#[derive(Debug, Clone)]
pub(super) enum Front {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// A port of this very kernel.
    Vsock(u32),
}

/// One contender, running.
#[derive(Debug)]
pub(super) struct Contender {
    pub(super) kind: Kind,
    /// All of them lead to the backend.
    pub(super) fronts: Vec<Front>,
    pub(super) processes: Processes,
}

impl Contender {
    pub(super) fn start(
        kind: Kind,
        buffer_kib: Option<u32>,
        backend: &Backend,
        folder: &Path,
        enclaved: &Path,
        pin: bool,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir_in(folder).context("making a folder")?.keep();
        if kind == Kind::Enclaved {
            return Self::ours(buffer_kib, backend, &folder, enclaved, pin);
        }
        let fronts = fronts(backend, &folder)?;
        let commands = match kind {
            Kind::Nginx => vec![nginx(&fronts, backend, &folder)?],
            Kind::Haproxy => vec![haproxy(&fronts, backend, &folder)?],
            Kind::Splice => vec![splice(&fronts, backend)?],
            Kind::Enclaved | Kind::Socat => fronts.iter().map(|front| socat(front, backend)).collect(),
        };
        let processes = Processes::start(kind.name(), &commands, pin, &folder)?;
        let contender = Self { kind, fronts, processes };
        contender.until_it_listens().with_context(|| contender.processes.said())?;
        Ok(contender)
    }

    fn ours(
        buffer_kib: Option<u32>,
        backend: &Backend,
        folder: &Path,
        enclaved: &Path,
        pin: bool,
    ) -> anyhow::Result<Self> {
        let buffer = buffer_kib.map(|kib| ["--relay-buffer".into(), (kib * 1024).to_string().into()]);
        let vsock = match backend.far {
            Far::Unix => VsockTransport::Hybrid(backend.vsock.clone()),
            Far::Vsock => VsockTransport::AfVsock,
        };
        let cid = backend.cid()?;
        let enclave: enclaved_core::id::EnclaveName = "bench".parse().context("the enclave's name")?;
        let mut routes = Routes { format: ROUTES_FORMAT, vsock, live: vec![cid], ..Routes::default() };
        for number in 0..PORTS {
            match backend.way {
                Way::Ingress => routes.tcp.push(TcpRoute {
                    enclave: enclave.clone(),
                    listen: free_port()?,
                    vsock_port: super::load::ENCLAVES_PORT,
                    target: Some(cid),
                    rules: TcpRules::default(),
                }),
                Way::Egress => routes.egress.push(EgressRoute {
                    enclave: enclave.clone(),
                    cid,
                    vsock_port: free_vsock_port(),
                    // An upstream takes as many as a port, so the two are known by different names.
                    hostname: if number == 0 { backend.tcp.ip().to_string() } else { "localhost".to_owned() },
                    port: backend.tcp.port(),
                    allow_addresses: vec![backend.tcp.ip()],
                    sni: false,
                    // As the others have none.
                    limits: EgressLimits { connections_per_second: Some(1_000_000), ..EgressLimits::default() },
                }),
            }
        }
        let buffer = buffer.as_ref().map_or(&[][..], |buffer| &buffer[..]);
        let (processes, report) = Processes::proxy(enclaved, buffer, routes, pin, folder)?;
        let mut fronts = Vec::new();
        for listener in report.listeners {
            ensure!(listener.error.is_none(), "{listener:?}");
            fronts.push(match listener.listener {
                ListenerKey::Tcp { .. } => Front::Tcp(listener.address.parse()?),
                ListenerKey::Egress { vsock_port, .. } if backend.far == Far::Vsock => Front::Vsock(vsock_port),
                _ => Front::Unix(listener.address.into()),
            });
        }
        Ok(Self { kind: Kind::Enclaved, fronts, processes })
    }

    fn until_it_listens(&self) -> anyhow::Result<()> {
        for front in &self.fronts {
            let began = Instant::now();
            while super::load::connect(front).is_err() {
                ensure!(began.elapsed() < DEADLINE, "{} does not listen on {front:?}", self.kind.name());
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }
}

fn fronts(backend: &Backend, folder: &Path) -> anyhow::Result<Vec<Front>> {
    let front = |number: usize| {
        Ok(match (backend.way, backend.far) {
            (Way::Ingress, _) => Front::Tcp(free_port()?),
            (Way::Egress, Far::Vsock) => Front::Vsock(free_vsock_port()),
            (Way::Egress, Far::Unix) => Front::Unix(folder.join(format!("front{number}"))),
        })
    };
    (0..PORTS).map(front).collect()
}

/// One that no contender has had.
fn free_vsock_port() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(8000);
    NEXT.fetch_add(1, Relaxed)
}

fn nginx(fronts: &[Front], backend: &Backend, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let mut text = format!(
        "load_module {module};\ndaemon off;\nmaster_process off;\npid {0}/pid;\nerror_log {0}/log;\n\
         worker_rlimit_nofile 20000;\nevents {{ worker_connections 20000; }}\nstream {{\n  proxy_timeout 1d;\n  proxy_half_close on;\n",
        folder.display()
    );
    let to = match backend.way {
        Way::Ingress => format!("unix:{}", backend.unix.display()),
        Way::Egress => backend.tcp.to_string(),
    };
    for front in fronts {
        let listen = match front {
            Front::Tcp(address) => format!("{address} backlog=4096"),
            Front::Unix(path) => format!("unix:{} backlog=4096", path.display()),
            Front::Vsock(_) => bail!("nginx has no AF_VSOCK"),
        };
        writeln!(text, "  server {{ listen {listen}; proxy_pass {to}; }}")?;
    }
    text.push_str("}\n");
    let path = folder.join("nginx.conf");
    fs::write(&path, text)?;
    Ok(["nginx".into(), "-c".into(), path.into(), "-p".into(), folder.into()].into())
}

fn haproxy(fronts: &[Front], backend: &Backend, folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let mut text = String::from(
        "global\n  maxconn 9000\n  nbthread 1\ndefaults\n  mode tcp\n  maxconn 9000\n  timeout connect 5s\n  \
         timeout client 1d\n  timeout server 1d\nlisten bench\n",
    );
    for front in fronts {
        match front {
            Front::Tcp(address) => writeln!(text, "  bind {address} backlog 4096")?,
            Front::Unix(path) => writeln!(text, "  bind unix@{} backlog 4096", path.display())?,
            Front::Vsock(_) => bail!("haproxy has no AF_VSOCK"),
        }
    }
    match backend.way {
        Way::Ingress => writeln!(text, "  server s unix@{}", backend.unix.display())?,
        Way::Egress => writeln!(text, "  server s {}", backend.tcp)?,
    }
    let path = folder.join("haproxy.cfg");
    fs::write(&path, text)?;
    Ok(["haproxy".into(), "-db".into(), "-f".into(), path.into()].into())
}

fn socat(front: &Front, backend: &Backend) -> Vec<OsString> {
    let listen = match front {
        Front::Tcp(address) => {
            format!("TCP-LISTEN:{},bind={},fork,reuseaddr,nodelay,backlog=4096", address.port(), address.ip())
        }
        Front::Unix(path) => format!("UNIX-LISTEN:{},fork,backlog=4096", path.display()),
        Front::Vsock(port) => format!("VSOCK-LISTEN:{port},fork,backlog=4096"),
    };
    let to = match (backend.way, backend.far) {
        (Way::Ingress, Far::Unix) => format!("UNIX-CONNECT:{}", backend.unix.display()),
        (Way::Ingress, Far::Vsock) => format!("VSOCK-CONNECT:{}:{}", VMADDR_CID_LOCAL, super::load::ENCLAVES_PORT),
        (Way::Egress, _) => format!("TCP:{},nodelay", backend.tcp),
    };
    // The same buffer as ours.
    ["socat".into(), "-b".into(), "65536".into(), listen.into(), to.into()].into()
}

fn splice(fronts: &[Front], backend: &Backend) -> anyhow::Result<Vec<OsString>> {
    let to = match backend.way {
        Way::Ingress => Front::Unix(backend.unix.clone()),
        Way::Egress => Front::Tcp(backend.tcp),
    };
    let mut command: Vec<OsString> =
        vec![std::env::current_exe().context("finding this program")?.into(), "splice".into()];
    for front in fronts {
        command.extend([Place(front.clone()), Place(to.clone())].map(|place| place.to_string().into()));
    }
    Ok(command)
}
