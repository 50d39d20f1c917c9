//! What a configuration means: from the form to what is wanted of the host. Judges everything that types and ranges do
//! not show, and reports all that is wrong, not only the first. Reads no files and looks at no host.

use super::error::Problems;
use super::form::{ControlPlaneForm, DurationText, FileForm, HostForm, HostIngressForm, SocketAddrText};
use super::source::{Path, Tree, quoted};
use super::{
    Config, ControlPlaneSettings, DEFAULT_RUN_DIR, DIRECT_PROXY_SOCKET, HostSettings, MetricsSettings, SourceFile,
    SupervisorKind, UNIT_PROXY_SOCKET,
};
use enclaved_core::desired::{AllocatorMode, Desired, EnclaveSpec, HostPolicy};
use enclaved_core::id::{EnclaveName, MemoryMib};
use enclaved_core::routes::{
    AccessLog, BadAccessLog, BadIpNetwork, HttpsListener, HttpsRules, IpNetwork, VsockTransport, is_host,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

mod enclave;

/// Folders in which Unix sockets are opened: of the 108 bytes that a socket's path may have, the names in them need 27.
const MAX_SOCKET_DIR: usize = 80;
/// Where the proxy's unit lets it write logs (`LogsDirectory=`).
const LOG_DIR: &str = "/var/log/enclaved-proxy";
/// A socket's path itself, with room for the name under which the proxy makes it.
const MAX_SOCKET: usize = 100;

/// The configuration, as far as there were no problems.
pub(super) fn config(form: FileForm, tree: &Tree, sources: &[SourceFile], problems: &mut Problems) -> Option<Config> {
    let mut judge = Judge { tree, sources, problems, listeners: Vec::new() };
    let root = Path::default();
    let (policy, host) = judge.host(form.host, &root.key("host"));
    let nitro_cli = judge.program(form.nitro.cli, &root.key("nitro").key("cli"));
    let vsock = judge.vsock(form.vsock.transport, &root.key("vsock").key("transport"));

    let metrics_at = root.key("metrics").key("listen");
    let metrics = judge.socket_address(&form.metrics.listen, &metrics_at);
    judge.listener(metrics, &metrics_at);
    let https_at = root.key("ingress").key("listen");
    let https = judge.socket_address(&form.ingress.listen, &https_at);
    let rules = judge.https_rules(&form.ingress, &root.key("ingress"));
    let access_log_at = root.key("ingress").key("access_log");
    let access_log =
        form.ingress.access_log.as_ref().map(|text| judge.access_log(text, host.supervisor, &access_log_at));
    if form.enclave.iter().any(|enclave| !enclave.ingress.domains.is_empty()) {
        judge.listener(https, &https_at);
        judge.listener(rules.redirect, &root.key("ingress").key("redirect"));
    }

    let control_plane =
        form.control_plane.and_then(|control_plane| judge.control_plane(control_plane, &root.key("control_plane")));
    let enclaves = judge.enclaves(form.enclave, &root.key("enclave"));
    if !judge.problems.is_empty() {
        return None;
    }
    let has_domains = enclaves.values().any(|enclave| !enclave.ingress.domains.is_empty());
    let https = https.filter(|_| has_domains).map(|listen| HttpsListener { listen, rules });
    Some(Config {
        host,
        nitro_cli,
        metrics: MetricsSettings { listen: metrics? },
        control_plane,
        desired: Desired { host: policy, vsock, https, access_log: access_log.flatten(), enclaves },
        revision: super::revision(sources),
        sources: sources.to_vec(),
        warnings: Vec::new(),
    })
}

/// Judges values and keeps what must be compared with others.
struct Judge<'a> {
    tree: &'a Tree,
    sources: &'a [SourceFile],
    problems: &'a mut Problems,
    listeners: Vec<Listener>,
}

/// A TCP port of the host that is taken.
struct Listener {
    address: SocketAddr,
    path: Path,
}

impl Judge<'_> {
    fn refuse(&mut self, path: &Path, message: impl Into<String>) {
        self.problems.add(self.tree, path, message);
    }

    /// `file:line:column` of another value, to refer to.
    fn place_of(&self, path: &Path) -> String {
        self.tree.place_name(path, self.sources)
    }

    fn host(&mut self, form: HostForm, path: &Path) -> (HostPolicy, HostSettings) {
        let drain = self.duration(&form.drain, Duration::ZERO..=hours(1), &path.key("drain"));
        let by_supervisor = match form.supervisor {
            SupervisorKind::Systemd => AllocatorMode::Manage,
            SupervisorKind::Direct => AllocatorMode::Verify,
        };
        let policy = HostPolicy {
            reserve_cpus: form.reserve_cpus,
            reserve_memory: MemoryMib(form.reserve_memory_mib),
            allocator: form.allocator.unwrap_or(by_supervisor),
            pool: form.pool,
            drain: drain.unwrap_or_default(),
            image_cache: form.image_cache_mib.saturating_mul(1 << 20),
        };
        let dirs = [
            ("state_dir", &form.state_dir),
            ("run_dir", &form.run_dir),
            ("proxy_state_dir", &form.proxy_state_dir),
            ("sysfs", &form.sysfs),
        ];
        for (number, (key, dir)) in dirs.into_iter().enumerate() {
            self.absolute(dir, &path.key(key));
            if let Some((other, _)) = dirs.iter().take(number).find(|(_, other)| *other == dir) {
                let (at, other) = if self.tree.has(&path.key(key)) { (key, *other) } else { (*other, key) };
                self.refuse(&path.key(at), format!("is the same directory as {other}; each needs its own"));
            }
        }
        self.socket_dir(&form.run_dir, &path.key("run_dir"));
        let units = form.supervisor == SupervisorKind::Systemd;
        if units && form.run_dir.as_path() != std::path::Path::new(DEFAULT_RUN_DIR) {
            let text = format!(
                "must be {DEFAULT_RUN_DIR} with supervisor = \"systemd\", the default: the units look for launches there"
            );
            self.refuse(&path.key("run_dir"), text);
        }
        if let Some(socket) = &form.proxy_socket {
            self.absolute(socket, &path.key("proxy_socket"));
            if socket.as_os_str().len() > MAX_SOCKET {
                self.refuse(&path.key("proxy_socket"), format!("is longer than {MAX_SOCKET} bytes"));
            }
        }
        let default_socket = || if units { UNIT_PROXY_SOCKET.into() } else { form.run_dir.join(DIRECT_PROXY_SOCKET) };
        let proxy_socket = form.proxy_socket.clone().unwrap_or_else(default_socket);
        let HostForm { supervisor, on_stop, state_dir, run_dir, proxy_state_dir, sysfs, .. } = form;
        let settings = HostSettings { supervisor, on_stop, state_dir, run_dir, proxy_state_dir, proxy_socket, sysfs };
        (policy, settings)
    }

    fn program(&mut self, program: PathBuf, path: &Path) -> PathBuf {
        let name_only = program.file_name() == Some(program.as_os_str());
        if !name_only && !program.is_absolute() {
            let found = quoted(&program.to_string_lossy());
            self.refuse(
                path,
                format!("is {found}; allowed: a program's name, to be found in PATH, or an absolute path"),
            );
        }
        program
    }

    fn vsock(&mut self, transport: VsockTransport, path: &Path) -> VsockTransport {
        if let VsockTransport::Hybrid(dir) = &transport {
            let path = path.key("hybrid");
            self.absolute(dir, &path);
            self.socket_dir(dir, &path);
        }
        transport
    }

    fn control_plane(&mut self, form: ControlPlaneForm, path: &Path) -> Option<ControlPlaneSettings> {
        let interval = self.duration(&form.interval, Duration::from_secs(1)..=hours(1), &path.key("interval"));
        let url_at = path.key("url");
        let allowed = "https://host[:port][/path], or http:// to a loopback address";
        let url: http::Uri = match form.url.parse() {
            Ok(url) => url,
            Err(_) => {
                self.refuse(&url_at, format!("is {}, which is not a URL; allowed: {allowed}", quoted(&form.url)));
                return None;
            }
        };
        let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
        let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback());
        let plain = url.scheme_str() == Some("http");
        if host.is_empty() || !(plain || url.scheme_str() == Some("https")) || !is_host(host) {
            self.refuse(&url_at, format!("is {}; allowed: {allowed}", quoted(&form.url)));
        } else if plain && !loopback {
            self.refuse(
                &url_at,
                format!("is {}: http:// is allowed to a loopback address only; use https://", quoted(&form.url)),
            );
        } else if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            self.refuse(&url_at, "holds a user name or password; URLs are shown in logs, so neither is allowed");
        } else if url.query().is_some() {
            self.refuse(&url_at, format!("has a query; allowed: {allowed}"));
        }
        Some(ControlPlaneSettings { url: form.url, interval: interval? })
    }

    fn https_rules(&mut self, form: &HostIngressForm, path: &Path) -> HttpsRules {
        let at = path.key("redirect");
        HttpsRules {
            redirect: form.redirect.as_ref().and_then(|text| self.socket_address(text, &at)),
            trusted_proxies: self.networks(&form.trusted_proxies, &path.key("trusted_proxies")),
            max_connections: form.max_connections,
            max_connections_per_source: form.max_connections_per_source,
        }
    }

    fn access_log(&mut self, text: &str, supervisor: SupervisorKind, path: &Path) -> Option<AccessLog> {
        let Ok(to) = text.parse::<AccessLog>() else {
            self.refuse(path, format!("is {}; {BadAccessLog}", quoted(text)));
            return None;
        };
        if let Some(file) = to.file().filter(|_| supervisor == SupervisorKind::Systemd)
            && !(file.starts_with(LOG_DIR) || file.starts_with("/dev"))
        {
            let message = format!(
                "enclaved-proxy.service can write in {LOG_DIR} alone: elsewhere it needs a drop-in with ReadWritePaths="
            );
            self.problems.warn(self.tree, path, message);
        }
        Some(to)
    }

    fn networks(&mut self, texts: &[String], path: &Path) -> Vec<IpNetwork> {
        let network = |(index, text): (usize, &String)| {
            let refuse = |error: BadIpNetwork| {
                self.refuse(&path.index(index), format!("is {}; {error}", quoted(text)));
            };
            text.parse().map_err(refuse).ok()
        };
        texts.iter().enumerate().filter_map(network).collect()
    }

    fn enclaves(&mut self, forms: Vec<super::form::EnclaveForm>, path: &Path) -> BTreeMap<EnclaveName, EnclaveSpec> {
        let mut names: BTreeMap<String, Path> = BTreeMap::new();
        let mut domains = enclave::Domains::default();
        let mut enclaves = BTreeMap::new();
        for (index, form) in forms.into_iter().enumerate() {
            let path = path.index(index);
            if let Some(first) = names.get(&form.name) {
                let first = self.place_of(&first.key("name"));
                self.refuse(&path.key("name"), format!("another enclave has this name, at {first}"));
            } else {
                names.insert(form.name.clone(), path.clone());
            }
            let name: Option<EnclaveName> = self.parsed(&form.name, &path.key("name"));
            if let (Some(spec), Some(name)) = (self.enclave(form, &path, &mut domains), name) {
                enclaves.insert(name, spec);
            }
        }
        enclaves
    }

    /// Takes a TCP port of the host, unless a listener before has it.
    fn listener(&mut self, address: Option<SocketAddr>, path: &Path) {
        let Some(address) = address else { return };
        if let Some(other) = self.listeners.iter().find(|other| collide(other.address, address)) {
            let (owner, place) = (self.tree.label(&other.path), self.place_of(&other.path));
            self.refuse(path, format!("{address} is taken by {owner} ({place})"));
        } else {
            self.listeners.push(Listener { address, path: path.clone() });
        }
    }

    fn socket_address(&mut self, text: &SocketAddrText, path: &Path) -> Option<SocketAddr> {
        let address = text.0.parse().ok();
        if address.is_none() {
            let message = format!(
                "is {}; allowed: an IP address and a port, as \"127.0.0.1:9119\" or \"[::]:443\"",
                quoted(&text.0)
            );
            self.refuse(path, message);
        }
        address
    }

    fn duration(&mut self, text: &DurationText, range: RangeInclusive<Duration>, path: &Path) -> Option<Duration> {
        let duration = humantime::parse_duration(&text.0).ok().filter(|duration| range.contains(duration));
        if duration.is_none() {
            let (min, max) = (humantime::format_duration(*range.start()), humantime::format_duration(*range.end()));
            let message = format!("is {}; allowed: a time with its unit, from {min} to {max}", quoted(&text.0));
            self.refuse(path, message);
        }
        duration
    }

    /// A text that has a type of its own, whose error says what is allowed.
    fn parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, text: &str, path: &Path) -> Option<T> {
        text.parse().map_err(|error: T::Err| self.refuse(path, error.to_string())).ok()
    }

    fn ip(&mut self, text: &str, path: &Path) -> Option<IpAddr> {
        let address = text.parse().ok();
        if address.is_none() {
            self.refuse(path, format!("is {}; allowed: an IP address", quoted(text)));
        }
        address
    }

    fn absolute(&mut self, dir: &std::path::Path, path: &Path) {
        if !dir.is_absolute() {
            let found = quoted(&dir.to_string_lossy());
            self.refuse(path, format!("is {found}; allowed: an absolute path"));
        }
    }

    fn socket_dir(&mut self, dir: &std::path::Path, path: &Path) {
        let length = dir.as_os_str().len();
        if length > MAX_SOCKET_DIR {
            let message = format!(
                "is {length} bytes long; at most {MAX_SOCKET_DIR} are allowed, because the path of a Unix socket in it may have 108"
            );
            self.refuse(path, message);
        }
    }
}

fn hours(hours: u64) -> Duration {
    Duration::from_secs(hours * 3600)
}

/// Whether the kernel would refuse the second of two listeners. (Port 0 lets it choose, but two listeners that are
/// written the same can't be told apart.)
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    if a == b {
        return true;
    }
    let (ip_a, ip_b) = (a.ip().to_canonical(), b.ip().to_canonical());
    // `[::]` takes IPv4 too.
    let covers = |all: IpAddr, one: IpAddr| all.is_unspecified() && (all.is_ipv6() || one.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (ip_a == ip_b || covers(ip_a, ip_b) || covers(ip_b, ip_a))
}
