//! Whether a snapshot of the routes makes sense. A snapshot that does not is refused as a whole and nothing changes; what
//! can only be found out by trying (a port in use, a name that does not resolve) is no subject here.

use super::{AccessLog, EgressRoute, HostsRoute, ROUTES_FORMAT, Routes, Site, VsockTransport, is_domain, is_host};
use std::collections::HashSet;

/// Why a snapshot cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidRoutes(String);

/// Longest path prefix, in bytes.
const PREFIX_BYTES: usize = 1024;

macro_rules! refuse {
    ($($text:tt)*) => { return Err(InvalidRoutes(format!($($text)*))) };
}

impl Routes {
    /// Checks what the types do not: the format, names and prefixes, and that no two routes claim the same place.
    pub fn check(&self) -> Result<(), InvalidRoutes> {
        if self.format != ROUTES_FORMAT {
            refuse!(
                "the snapshot has format {}, this proxy serves format {ROUTES_FORMAT}: run the same version of both processes",
                self.format
            );
        }
        if let VsockTransport::Hybrid(dir) = &self.vsock
            && !dir.is_absolute()
        {
            refuse!("the directory of the hybrid vsock transport, \"{}\", is not absolute", dir.display());
        }
        if let Some(file) = self.access_log.as_ref().filter(|to| !to.is_sensible()).and_then(AccessLog::file) {
            refuse!("the access log is to go to \"{}\", which is no absolute path of a file", file.display());
        }
        self.check_egress()?;
        self.check_hosts()?;
        self.check_listeners()?;
        self.check_sites()
    }

    fn check_egress(&self) -> Result<(), InvalidRoutes> {
        let mut seen = HashSet::new();
        for EgressRoute { enclave, cid, vsock_port, hostname, port, sni, limits, .. } in &self.egress {
            if !vsock_port_exists(*vsock_port) {
                refuse!("an egress endpoint of {enclave} listens on vsock port {vsock_port}, which does not exist");
            }
            if *port == 0 {
                refuse!("the egress endpoint {hostname} of {enclave} has TCP port 0");
            }
            if *sni && hostname.parse::<std::net::IpAddr>().is_ok() {
                refuse!("the egress endpoint {hostname} of {enclave} is an address, which TLS has no server name for");
            }
            let bounds = [limits.max_connections, limits.connections_per_second, limits.connect_timeout_ms];
            if bounds.contains(&Some(0)) || limits.ages.has_zero() {
                refuse!("the egress endpoint {hostname} of {enclave} has a limit of 0");
            }
            if !is_host(hostname) {
                refuse!(
                    "an egress endpoint of {enclave} has the hostname \"{}\", which is neither a DNS name nor an IP address",
                    hostname.escape_debug()
                );
            }
            if !seen.insert((cid, vsock_port)) {
                refuse!("two egress endpoints of {enclave} listen on vsock port {vsock_port} for CID {cid}");
            }
        }
        Ok(())
    }

    /// Egress endpoints and lists of endpoints share the parent's vsock ports.
    fn check_hosts(&self) -> Result<(), InvalidRoutes> {
        let mut seen: HashSet<_> = self.egress.iter().map(|route| (route.cid, route.vsock_port)).collect();
        for HostsRoute { enclave, cid, vsock_port, .. } in &self.hosts {
            if !vsock_port_exists(*vsock_port) {
                refuse!("the list of endpoints of {enclave} is on vsock port {vsock_port}, which does not exist");
            }
            if !seen.insert((*cid, *vsock_port)) {
                refuse!(
                    "the list of endpoints of {enclave} shares vsock port {vsock_port} with something else for CID {cid}"
                );
            }
        }
        Ok(())
    }

    fn check_listeners(&self) -> Result<(), InvalidRoutes> {
        // With port 0 the kernel chooses: HTTPS and a raw port do not meet there.
        let https = self.https.iter().map(|https| https.listen).filter(|listen| listen.port() != 0);
        let mut seen: HashSet<_> = https.collect();
        let redirect = self.https.iter().filter_map(|https| https.rules.redirect).filter(|listen| listen.port() != 0);
        for listen in redirect {
            if !seen.insert(listen) {
                refuse!("two listeners share {listen}");
            }
        }
        for route in &self.tcp {
            if !vsock_port_exists(route.vsock_port) {
                refuse!(
                    "TCP {} of {} leads to vsock port {}, which does not exist",
                    route.listen,
                    route.enclave,
                    route.vsock_port
                );
            }
            let bounds = [route.rules.max_connections, route.rules.max_connections_per_source];
            if bounds.contains(&Some(0)) || route.rules.ages.has_zero() {
                refuse!("TCP {} of {} has a limit of 0", route.listen, route.enclave);
            }
            if !seen.insert(route.listen) {
                refuse!("two listeners share {}", route.listen);
            }
        }
        Ok(())
    }

    fn check_sites(&self) -> Result<(), InvalidRoutes> {
        if let Some(https) = &self.https
            && [https.rules.max_connections, https.rules.max_connections_per_source].contains(&Some(0))
        {
            refuse!("HTTPS has a limit of 0");
        }
        if self.sites.iter().filter(|site| site.rules.default).count() > 1 {
            refuse!("two sites are the one for unknown names");
        }
        let mut seen = HashSet::new();
        for Site { enclave, domains, paths, rules, .. } in &self.sites {
            if domains.is_empty() {
                refuse!("the site of {enclave} has no domains");
            }
            if let Some(files) = &rules.certificate
                && !(files.cert.is_absolute() && files.key.is_absolute())
            {
                refuse!("the certificate of {enclave} is at a path that is not absolute");
            }
            if rules.client_ca.as_ref().is_some_and(|file| !file.is_absolute()) {
                refuse!("the authorities of the clients of {enclave} are at a path that is not absolute");
            }
            if rules.client_ca.is_some() && rules.passthrough.is_some() {
                refuse!("clients of {enclave} are to show certificates, and their TLS is not ended here");
            }
            if paths.is_empty() != rules.passthrough.is_some() {
                refuse!("the site of {enclave} has no paths, or both paths and TLS of its own");
            }
            if let Some(passthrough) = rules.passthrough
                && !vsock_port_exists(passthrough.vsock_port)
            {
                refuse!("TLS of {enclave} goes to vsock port {}, which does not exist", passthrough.vsock_port);
            }
            for domain in domains {
                if !is_domain(domain) {
                    refuse!(
                        "the site of {enclave} has the domain \"{}\": a lower-case DNS name, `*.` and a DNS name, or an IP address",
                        domain.escape_debug()
                    );
                }
                if !seen.insert(domain) {
                    refuse!("the domain {domain} is listed twice");
                }
            }
            let mut prefixes = HashSet::new();
            for path in paths {
                let prefix = path.prefix.escape_debug();
                let plain = path.prefix.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#'));
                if !path.prefix.starts_with('/') || !plain || path.prefix.len() > PREFIX_BYTES {
                    refuse!(
                        "the site of {enclave} has the path \"{prefix}\": begins with /, visible ASCII without ? and #"
                    );
                }
                if !vsock_port_exists(path.vsock_port) {
                    refuse!(
                        "the path {prefix} of {enclave} leads to vsock port {}, which does not exist",
                        path.vsock_port
                    );
                }
                if !prefixes.insert(path.prefix.trim_end_matches('/')) {
                    refuse!("the path {prefix} of {enclave} is listed twice");
                }
            }
        }
        Ok(())
    }
}

/// 0 means nothing, 2^32-1 means any port, to bind(2).
fn vsock_port_exists(port: u32) -> bool {
    port != 0 && port != u32::MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Cid;
    use crate::routes::{CertificateFiles, UpstreamHttp};
    use crate::routes::{
        EgressLimits, HttpsListener, HttpsRules, Passthrough, PathRoute, SiteRules, TcpRoute, TcpRules,
    };

    fn good() -> Routes {
        let path = |prefix: &str| PathRoute { prefix: prefix.into(), vsock_port: 8080, upstream: UpstreamHttp::Http1 };
        Routes {
            format: ROUTES_FORMAT,
            vsock: VsockTransport::Hybrid("/run/x".into()),
            egress: vec![EgressRoute {
                enclave: "signer".parse().unwrap(),
                cid: Cid::FIRST,
                vsock_port: 8000,
                hostname: "kms.us-east-1.amazonaws.com".into(),
                port: 443,
                allow_addresses: Vec::new(),
                sni: true,
                limits: EgressLimits {
                    max_connections: Some(1),
                    connections_per_second: Some(1),
                    ..EgressLimits::default()
                },
            }],
            hosts: vec![HostsRoute {
                enclave: "signer".parse().unwrap(),
                cid: Cid::FIRST,
                vsock_port: 8001,
                document: "[]".into(),
            }],
            https: Some(HttpsListener { listen: "127.0.0.1:443".parse().unwrap(), rules: HttpsRules::default() }),
            sites: vec![Site {
                enclave: "signer".parse().unwrap(),
                domains: vec!["a.example.com".into(), "*.example.org".into(), "127.0.0.1".into()],
                paths: vec![path("/"), path("/attestation")],
                target: None,
                rules: SiteRules::default(),
            }],
            tcp: vec![TcpRoute {
                enclave: "signer".parse().unwrap(),
                listen: "127.0.0.1:9000".parse().unwrap(),
                vsock_port: 9000,
                target: Some(Cid::FIRST),
                rules: TcpRules::default(),
            }],
            access_log: Some(AccessLog::Stdout),
            live: Vec::new(),
        }
    }

    fn raw(vsock_port: u32) -> Passthrough {
        Passthrough { vsock_port, proxy_protocol: None }
    }

    #[test]
    fn a_sensible_snapshot_and_an_empty_one_pass() {
        good().check().unwrap();
        let mut routes = good();
        routes.sites[0].paths.clear();
        routes.sites[0].rules.passthrough = Some(raw(443));
        routes.check().unwrap();
        Routes { format: ROUTES_FORMAT, ..Routes::default() }.check().unwrap();
    }

    #[test]
    fn each_kind_of_nonsense_is_refused_with_its_name() {
        type Spoil = fn(&mut Routes);
        let cases: &[(&str, Spoil)] = &[
            ("format 2", |r| r.format = 2),
            ("format 0", |r| r.format = 0),
            ("not absolute", |r| r.vsock = VsockTransport::Hybrid("run".into())),
            ("no absolute path", |r| r.access_log = Some(AccessLog::File("access.log".into()))),
            ("two egress endpoints", |r| r.egress.push(r.egress[0].clone())),
            ("vsock port 0", |r| r.egress[0].vsock_port = 0),
            ("vsock port 4294967295", |r| r.egress[0].vsock_port = u32::MAX),
            ("TCP port 0", |r| r.egress[0].port = 0),
            ("hostname \"\"", |r| r.egress[0].hostname.clear()),
            ("hostname \"a b\"", |r| r.egress[0].hostname = "a b".into()),
            ("hostname \"a..b\"", |r| r.egress[0].hostname = "a..b".into()),
            ("hostname \"a\\n\"", |r| r.egress[0].hostname = "a\n".into()),
            ("no server name", |r| r.egress[0].hostname = "192.0.2.1".into()),
            ("limit of 0", |r| r.egress[0].limits.connections_per_second = Some(0)),
            ("limit of 0", |r| r.egress[0].limits.connect_timeout_ms = Some(0)),
            ("limit of 0", |r| r.egress[0].limits.ages.idle_s = Some(0)),
            ("limit of 0", |r| r.tcp[0].rules.max_connections_per_source = Some(0)),
            ("limit of 0", |r| r.tcp[0].rules.ages.lifetime_s = Some(0)),
            ("with something else", |r| r.hosts[0].vsock_port = r.egress[0].vsock_port),
            ("with something else", |r| r.hosts.push(r.hosts[0].clone())),
            ("vsock port 0", |r| r.hosts[0].vsock_port = 0),
            ("two listeners", |r| r.tcp.push(r.tcp[0].clone())),
            ("two listeners", |r| r.tcp[0].listen = r.https.as_ref().unwrap().listen),
            ("vsock port 0", |r| r.tcp[0].vsock_port = 0),
            ("no domains", |r| r.sites[0].domains.clear()),
            ("no paths", |r| r.sites[0].paths.clear()),
            ("both paths and TLS", |r| r.sites[0].rules.passthrough = Some(raw(443))),
            ("vsock port 0", |r| {
                r.sites[0].paths.clear();
                r.sites[0].rules.passthrough = Some(raw(0));
            }),
            ("two listeners", |r| {
                let https = r.https.as_mut().unwrap();
                https.rules.redirect = Some(https.listen);
            }),
            ("not absolute", |r| {
                r.sites[0].rules.certificate = Some(CertificateFiles { cert: "/crt".into(), key: "key".into() });
            }),
            ("not absolute", |r| r.sites[0].rules.client_ca = Some("clients.pem".into())),
            ("not ended here", |r| {
                r.sites[0].rules.client_ca = Some("/clients.pem".into());
                r.sites[0].rules.passthrough = Some(raw(443));
            }),
            ("unknown names", |r| {
                r.sites[0].rules.default = true;
                r.sites.push(Site { domains: vec!["b.test".into()], ..r.sites[0].clone() });
            }),
            ("limit of 0", |r| r.https.as_mut().unwrap().rules.max_connections_per_source = Some(0)),
            ("domain \"A.example\"", |r| r.sites[0].domains[0] = "A.example".into()),
            ("domain \"*\"", |r| r.sites[0].domains[0] = "*".into()),
            ("domain \"a.*.b\"", |r| r.sites[0].domains[0] = "a.*.b".into()),
            ("domain \"a:443\"", |r| r.sites[0].domains[0] = "a:443".into()),
            ("listed twice", |r| r.sites.push(r.sites[0].clone())),
            ("path \"x\"", |r| r.sites[0].paths[0].prefix = "x".into()),
            ("path \"/a?b\"", |r| r.sites[0].paths[0].prefix = "/a?b".into()),
            ("listed twice", |r| r.sites[0].paths[0].prefix = "/attestation/".into()),
            ("vsock port 0", |r| r.sites[0].paths[0].vsock_port = 0),
        ];
        for (names, spoil) in cases {
            let mut routes = good();
            spoil(&mut routes);
            let error = routes.check().expect_err(names).to_string();
            assert!(error.contains(names), "{error:?} does not name {names:?}");
        }
    }
}
