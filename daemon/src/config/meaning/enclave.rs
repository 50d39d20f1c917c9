//! What one `[[enclave]]` means.

use super::Judge;
use crate::config::form::{
    DurationText, EgressForm, EnclaveForm, FullPortForm, HealthForm, IngressForm, ListenForm, MeasurementsForm,
    PinsForm, PortForm,
};
use crate::config::source::{Path, quoted};
use enclaved_core::desired::{
    EgressSpec, EnclaveSpec, HealthCheck, ImageRequest, ImageSource, IngressSpec, Probe, TcpPort,
};
use enclaved_core::egress_policy;
use enclaved_core::id::{MemoryMib, Pcr};
use enclaved_core::image::{ExpectedImage, Pins};
use enclaved_core::routes::{
    Ages, CautionRelease, CertificateFiles, EgressLimits, Passthrough, PathRoute, SiteRules, TcpRules, UpstreamHttp,
    is_domain, is_host,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// nitro-cli listens there for an enclave's first sign of life.
const HEARTBEAT_PORT: u32 = 9000;
/// Where TLS that is passed through goes.
const TLS_PORT: u32 = 443;
/// Longest path prefix, in bytes.
const MAX_PREFIX: usize = 1024;

/// Which names are whose.
#[derive(Debug, Default)]
pub(super) struct Domains {
    /// Where each domain was first listed.
    listed: BTreeMap<String, Path>,
    /// Where the enclave for all other names is.
    default: Option<Path>,
}

impl Judge<'_> {
    /// The enclave, unless something is wrong with it.
    pub(super) fn enclave(&mut self, form: EnclaveForm, path: &Path, domains: &mut Domains) -> Option<EnclaveSpec> {
        let source: Option<ImageSource> = self.parsed(&form.image, &path.key("image"));
        let expected = self.expected(form.measurements.as_ref(), form.require_signature, &path.key("measurements"));
        if form.debug_mode {
            let message = "the enclave runs in debug mode: its console can be read and its attestation proves nothing";
            self.problems.warn(self.tree, &path.key("debug_mode"), message);
        } else if expected.any_of().len() == 0 && form.measurements.is_none() {
            if form.require_signature {
                let message = "any signature will do, also that of a key that somebody made for it: pin the signer by pcr8 \
                               in [enclave.measurements]";
                self.problems.warn(self.tree, &path.key("require_signature"), message);
            } else {
                let message = "no measurement is pinned: whoever can write the image decides what runs; \
                               `enclavectl measure FILE` prints what [enclave.measurements] should hold";
                self.problems.warn(self.tree, path, message);
            }
        }
        let image_poll = form.image_poll.as_ref().map(|every| {
            let range = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
            self.duration(every, range, &path.key("image_poll"))
        });
        let health = form.health.map(|health| self.health(&health, &path.key("health")));
        let hosts_at = path.key("hosts_port");
        let egress = self.egress(form.egress, &path.key("egress"), form.hosts_port.map(|port| (port, hosts_at)));
        let ingress = self.ingress(form.ingress, &path.key("ingress"), domains);
        Some(EnclaveSpec {
            image: ImageRequest { source: source?, expected },
            image_poll: match image_poll {
                None => None,
                Some(every) => Some(every?),
            },
            cpus: form.cpus,
            memory: MemoryMib(form.memory_mib),
            debug: form.debug_mode,
            update: form.update,
            restart: form.restart,
            health: match health {
                None => None,
                Some(health) => Some(health?),
            },
            egress,
            hosts_port: form.hosts_port,
            ingress,
        })
    }

    fn expected(&mut self, form: Option<&MeasurementsForm>, signed: bool, path: &Path) -> ExpectedImage {
        let sets: Vec<(&PinsForm, Path)> = match form {
            None => Vec::new(),
            Some(MeasurementsForm::One(set)) => vec![(set, path.clone())],
            Some(MeasurementsForm::AnyOf(sets)) => {
                if sets.is_empty() {
                    self.refuse(path, "is empty: give one set of values at least, or remove it");
                }
                sets.iter().enumerate().map(|(index, set)| (set, path.index(index))).collect()
            }
        };
        let mut seen: BTreeMap<Pins, Path> = BTreeMap::new();
        for (set, path) in sets {
            let pins = self.pins(set, &path);
            if set.is_empty() {
                let message = "holds no value, so any image would be allowed: pin what `enclavectl measure FILE` prints, or \
                               remove it";
                self.refuse(&path, message);
            } else if let Some(first) = seen.get(&pins).filter(|_| !pins.is_empty()) {
                let message = format!("is the same set as the one at {}: remove one of the two", self.place_of(first));
                self.refuse(&path, message);
            } else {
                seen.insert(pins, path);
            }
        }
        ExpectedImage::new(seen.into_keys(), signed)
    }

    fn pins(&mut self, form: &PinsForm, path: &Path) -> Pins {
        let sha256 = form.sha256.as_ref().and_then(|text| self.parsed(text, &path.key("sha256")));
        let mut pcr = |key: &str, text: &Option<String>| {
            let text = text.as_ref()?;
            let pcr: Pcr = self.parsed(text, &path.key(key))?;
            if pcr.0 == [0; 48] {
                let message = "is zero, which is what an enclave in debug mode attests, never what an image measures: \
                               take the value from `enclavectl measure FILE`";
                self.refuse(&path.key(key), message);
            }
            Some(pcr)
        };
        Pins {
            sha256,
            pcr0: pcr("pcr0", &form.pcr0),
            pcr1: pcr("pcr1", &form.pcr1),
            pcr2: pcr("pcr2", &form.pcr2),
            pcr8: pcr("pcr8", &form.pcr8),
        }
    }

    fn health(&mut self, form: &HealthForm, path: &Path) -> Option<HealthCheck> {
        let second = Duration::from_secs(1);
        let tenth = Duration::from_millis(100);
        let start_period = self.duration(&form.start_period, Duration::ZERO..=3600 * second, &path.key("start_period"));
        let interval = self.duration(&form.interval, tenth..=3600 * second, &path.key("interval"));
        let timeout = self.duration(&form.timeout, tenth..=60 * second, &path.key("timeout"));
        let probe = match (&form.http, &form.connect) {
            (Some(http), None) => {
                let good = |byte: u8| byte.is_ascii_graphic() && byte != b'#';
                if !http.path.starts_with('/') || !http.path.bytes().all(good) || http.path.len() > MAX_PREFIX {
                    let message = format!(
                        "is {}; allowed: a path, with or without a query, that begins with / and is visible ASCII",
                        quoted(&http.path)
                    );
                    self.refuse(&path.key("http").key("path"), message);
                }
                Some(Probe::Http { port: http.port, path: http.path.clone() })
            }
            (None, Some(connect)) => Some(Probe::Connect { port: connect.port }),
            (Some(_), Some(_)) => {
                self.refuse(&path.key("connect"), "there is http too; only one of the two is allowed");
                None
            }
            (None, None) => {
                let message =
                    "what to check is missing: http = { port = 8080, path = \"/health\" } or connect = { port = 8080 }";
                self.refuse(path, message);
                None
            }
        };
        Some(HealthCheck {
            probe: probe?,
            start_period: start_period?,
            interval: interval?,
            timeout: timeout?,
            failures: form.failures,
            on_failure: form.on_failure,
        })
    }

    fn egress(&mut self, forms: Vec<EgressForm>, path: &Path, hosts: Option<(u32, Path)>) -> Vec<EgressSpec> {
        let mut vsock_ports = BTreeMap::new();
        if let Some((HEARTBEAT_PORT, at)) = &hosts {
            self.refuse(at, heartbeat());
        }
        let mut loopbacks = BTreeMap::new();
        let mut endpoints = Vec::new();
        for (index, form) in forms.into_iter().enumerate() {
            let path = path.index(index);
            if !is_host(&form.hostname) {
                let message = format!("is {}; allowed: a DNS name or an IP address", quoted(&form.hostname));
                self.refuse(&path.key("hostname"), message);
            }
            let port_at = path.key("vsock_port");
            if form.vsock_port == HEARTBEAT_PORT {
                self.refuse(&port_at, heartbeat());
            } else if let Some((_, at)) = hosts.as_ref().filter(|(port, _)| *port == form.vsock_port) {
                let message =
                    format!("the list of endpoints has vsock port {}, at {}", form.vsock_port, self.place_of(at));
                self.refuse(&port_at, message);
            } else if let Some(first) = vsock_ports.insert(form.vsock_port, port_at.clone()) {
                let message = format!(
                    "another endpoint of this enclave has vsock port {}, at {}",
                    form.vsock_port,
                    self.place_of(&first)
                );
                self.refuse(&port_at, message);
            }
            let loopback_at = path.key("loopback");
            let loopback = form.loopback.as_ref().and_then(|text| self.ip(text, &loopback_at));
            if let Some(address) = loopback {
                if !address.is_loopback() {
                    self.refuse(&loopback_at, format!("is {address}; allowed: an address in 127.0.0.0/8, or ::1"));
                } else if let Some(first) = loopbacks.insert((address, form.port), loopback_at.clone()) {
                    let message = format!(
                        "another endpoint of this enclave has {} too, at {}: give each its own address",
                        SocketAddr::new(address, form.port),
                        self.place_of(&first)
                    );
                    self.refuse(&loopback_at, message);
                }
            }
            let allow_at = path.key("allow_addresses");
            let allowed = form.allow_addresses.iter().enumerate();
            let allow_addresses: Vec<IpAddr> =
                allowed.filter_map(|(index, text)| self.ip(text, &allow_at.index(index))).collect();
            let address = form.hostname.parse::<IpAddr>();
            if let Ok(Err(refusal)) = address.map(|address| egress_policy::check(address, &allow_addresses, &[])) {
                let message = format!(
                    "{} is {refusal}, which is refused unless it is listed: allow_addresses = [\"{}\"]",
                    form.hostname, form.hostname
                );
                self.refuse(&path.key("hostname"), message);
            }
            if form.sni && form.hostname.parse::<IpAddr>().is_ok() {
                let message = format!("needs a name, and hostname is the address {}", form.hostname);
                self.refuse(&path.key("sni"), message);
            }
            let connect = form.connect_timeout.as_ref().and_then(|text| {
                let range = Duration::from_millis(100)..=Duration::from_secs(120);
                self.duration(text, range, &path.key("connect_timeout"))
            });
            let limits = EgressLimits {
                max_connections: form.max_connections,
                connections_per_second: form.connections_per_second,
                connect_timeout_ms: connect.and_then(|connect| u32::try_from(connect.as_millis()).ok()),
                ages: self.ages(form.idle_timeout.as_ref(), form.max_lifetime.as_ref(), &path),
            };
            endpoints.push(EgressSpec {
                sni: form.sni,
                limits,
                hostname: form.hostname,
                port: form.port,
                vsock_port: form.vsock_port,
                loopback,
                allow_addresses,
            });
        }
        endpoints
    }

    fn ingress(&mut self, form: IngressForm, path: &Path, domains: &mut Domains) -> IngressSpec {
        let paths = self.paths(&form, path);
        let site = self.site(&form, path, domains);
        let mut own = Vec::new();
        for (index, domain) in form.domains.iter().enumerate() {
            let at = path.key("domains").index(index);
            let domain = domain.to_ascii_lowercase();
            if !is_domain(&domain) {
                let message = format!(
                    "is {}; allowed: a name as \"api.example.com\" or \"*.example.com\", without scheme and port",
                    quoted(&domain)
                );
                self.refuse(&at, message);
            } else if let Some(first) = domains.listed.get(&domain) {
                let message = format!("the domain {domain} is listed already, at {}", self.place_of(first));
                self.refuse(&at, message);
            } else {
                domains.listed.insert(domain.clone(), at);
                own.push(domain);
            }
        }
        let mut tcp = Vec::new();
        for (index, port) in form.ports.into_iter().enumerate() {
            let at = path.key("ports").index(index);
            let everywhere = |port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
            let (listen, vsock_port, rules, at) = match port {
                PortForm::Same(port) => (Some(everywhere(port)), u32::from(port), TcpRules::default(), at),
                PortForm::Full(form) => {
                    let rules = self.rules(&form, &at);
                    let at = at.key("listen");
                    let listen = match &form.listen {
                        ListenForm::Port(port) => Some(everywhere(*port)),
                        ListenForm::Address(text) => self.socket_address(text, &at),
                    };
                    (listen, form.vsock_port, rules, at)
                }
            };
            self.listener(listen, &at);
            if form.e2e.release() == Some(CautionRelease::Earlier) && vsock_port == CautionRelease::EARLIER_APP {
                self.problems.warn(self.tree, &at, past_e2e("remove this port, if it is the same application"));
            }
            tcp.extend(listen.map(|listen| TcpPort { listen, vsock_port, rules }));
        }
        IngressSpec { domains: own, paths, site, tcp }
    }

    /// When connections end by themselves.
    fn ages(&mut self, idle: Option<&DurationText>, lifetime: Option<&DurationText>, path: &Path) -> Ages {
        const DAY: u64 = 24 * 3600;
        let mut seconds = |text: Option<&DurationText>, key: &str, days: u64| {
            let range = Duration::from_secs(1)..=Duration::from_secs(days * DAY);
            let duration = self.duration(text?, range, &path.key(key))?;
            u32::try_from(duration.as_secs()).ok()
        };
        Ages { idle_s: seconds(idle, "idle_timeout", 30), lifetime_s: seconds(lifetime, "max_lifetime", 365) }
    }

    fn rules(&mut self, form: &FullPortForm, path: &Path) -> TcpRules {
        TcpRules {
            proxy_protocol: form.proxy_protocol,
            allow: self.networks(&form.allow, &path.key("allow")),
            max_connections: form.max_connections,
            max_connections_per_source: form.max_connections_per_source,
            ages: self.ages(form.idle_timeout.as_ref(), form.max_lifetime.as_ref(), path),
        }
    }

    /// What is special about the HTTPS site.
    fn site(&mut self, form: &IngressForm, path: &Path, domains: &mut Domains) -> SiteRules {
        if form.default {
            let at = path.key("default");
            match &domains.default {
                Some(first) => {
                    let message = format!("another enclave takes unknown names already, at {}", self.place_of(first));
                    self.refuse(&at, message);
                }
                None => domains.default = Some(at),
            }
        }
        if form.passthrough {
            let given = [
                ("http_port", form.http_port.is_some()),
                ("routes", !form.routes.is_empty()),
                ("caution", form.caution.release().is_some()),
                ("e2e", form.e2e.release().is_some()),
                ("certificate", form.certificate.is_some()),
                ("hsts", form.hsts.is_some()),
                ("client_ca", form.client_ca.is_some()),
            ];
            for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                let message = "cannot be with passthrough: what is not decrypted has neither paths, headers nor a certificate here; remove one of the two";
                self.refuse(&path.key(key), message);
            }
        } else {
            let given = [("tls_port", form.tls_port.is_some()), ("proxy_protocol", form.proxy_protocol.is_some())];
            for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                self.refuse(&path.key(key), "is of use with passthrough = true only: add it, or remove this");
            }
        }
        if let Some(files) = &form.certificate {
            self.absolute(&files.cert, &path.key("certificate").key("cert"));
            self.absolute(&files.key, &path.key("certificate").key("key"));
        }
        if let Some(file) = &form.client_ca {
            self.absolute(file, &path.key("client_ca"));
        }
        let years = Duration::ZERO..=Duration::from_secs(2 * 366 * 24 * 3600);
        let hsts = form.hsts.as_ref().and_then(|text| self.duration(text, years, &path.key("hsts")));
        let (vsock_port, proxy_protocol) = (form.tls_port.unwrap_or(TLS_PORT), form.proxy_protocol);
        SiteRules {
            default: form.default,
            passthrough: form.passthrough.then_some(Passthrough { vsock_port, proxy_protocol }),
            certificate: form
                .certificate
                .as_ref()
                .map(|files| CertificateFiles { cert: files.cert.clone(), key: files.key.clone() }),
            hsts_seconds: hsts.map(|hsts| hsts.as_secs()),
            client_ca: form.client_ca.clone(),
        }
    }

    /// The HTTPS paths, and whether they fit the domains.
    fn paths(&mut self, form: &IngressForm, path: &Path) -> Vec<PathRoute> {
        let mut places: BTreeMap<String, Path> = BTreeMap::new();
        let mut paths = Vec::new();
        let mut add = |judge: &mut Self, prefix: &str, vsock_port, upstream, at: Path| {
            // "/x/" and "/x" cover the same paths.
            let prefix = match prefix.trim_end_matches('/') {
                "" => "/",
                trimmed => trimmed,
            };
            if let Some(first) = places.insert(prefix.to_owned(), at.clone()) {
                judge.refuse(&at, format!("the path {prefix} has a port already, at {}", judge.place_of(&first)));
            }
            paths.push(PathRoute { prefix: prefix.to_owned(), vsock_port, upstream });
        };
        let (caution, e2e) = (form.caution.release(), form.e2e.release());
        // All paths are its own then, and what else claims them gets around the encryption.
        let all_encrypted = e2e == Some(CautionRelease::Earlier);
        if let Some(port) = form.http_port {
            if all_encrypted {
                self.refuse(&path.key("http_port"), past_e2e("remove http_port"));
            } else {
                add(self, "/", port, UpstreamHttp::Http1, path.key("http_port"));
            }
        }
        for (index, route) in form.routes.iter().enumerate() {
            let at = path.key("routes").index(index).key("path");
            let plain = route.path.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#'));
            if !route.path.starts_with('/') || !plain || route.path.len() > MAX_PREFIX {
                let message = format!(
                    "is {}; allowed: a path that begins with / and is visible ASCII without ? and #",
                    quoted(&route.path)
                );
                self.refuse(&at, message);
            } else if all_encrypted && route.path.trim_end_matches('/').is_empty() {
                self.refuse(&at, past_e2e("remove this route"));
            } else if all_encrypted && route.vsock_port == CautionRelease::EARLIER_APP {
                let remedy = "remove this route, or give the service a port of its own";
                self.refuse(&path.key("routes").index(index).key("vsock_port"), past_e2e(remedy));
            } else {
                add(self, &route.path, route.vsock_port, route.upstream, at);
            }
        }
        if let (Some(one), Some(other)) = (caution, e2e)
            && one != other
        {
            let message = format!(
                "is of the {} release and e2e of the {} one; an image is of one release: write the same for both, or the ports of \
                 this image in routes",
                one.as_str(),
                other.as_str()
            );
            self.refuse(&path.key("caution"), message);
        }
        let presets = [("caution", caution.map(CautionRelease::attestation)), ("e2e", e2e.map(CautionRelease::e2e))];
        for (key, route) in presets {
            if let Some(PathRoute { prefix, vsock_port, upstream }) = route {
                add(self, &prefix, vsock_port, upstream, path.key(key));
            }
        }
        let covered = paths.iter().any(|path| path.prefix == "/");
        if !form.domains.is_empty() && !covered && !form.passthrough {
            let message = "http_port is missing: the vsock port inside the enclave that answers HTTP for these domains";
            self.refuse(path, message);
        }
        if form.domains.is_empty() {
            let given = [
                ("http_port", form.http_port.is_some()),
                ("routes", !form.routes.is_empty()),
                ("caution", form.caution.release().is_some()),
                ("e2e", form.e2e.release().is_some()),
                ("default", form.default),
                ("passthrough", form.passthrough),
                ("certificate", form.certificate.is_some()),
                ("hsts", form.hsts.is_some()),
                ("client_ca", form.client_ca.is_some()),
            ];
            for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                self.refuse(&path.key(key), "is of use with domains only: add domains = [\"...\"], or remove it");
            }
        }
        paths
    }
}

fn past_e2e(remedy: &str) -> String {
    let (steve, app) = (CautionRelease::Earlier.e2e().vsock_port, CautionRelease::EARLIER_APP);
    format!(
        "gets around the encryption: with e2e = \"earlier\" every path goes to vsock port {steve}, where STEVE passes it on to the \
         application on {app}; {remedy}, or change e2e"
    )
}

fn heartbeat() -> String {
    format!("is {HEARTBEAT_PORT}, on which nitro-cli waits for the enclave's first sign of life; take another")
}

impl PinsForm {
    fn is_empty(&self) -> bool {
        let Self { sha256, pcr0, pcr1, pcr2, pcr8 } = self;
        [sha256, pcr0, pcr1, pcr2, pcr8].into_iter().all(Option::is_none)
    }
}
