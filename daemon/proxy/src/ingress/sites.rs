//! Which site a request is for, and which vsock port of it: by name, then by path. Pure.

use crate::certificates::{Origin, Wanted};
use crate::counters::{Live, Traffic};
use enclaved_core::id::EnclaveName;
use enclaved_core::routes::{Passthrough, PathRoute};
use http::HeaderValue;
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;

/// That the clients of a site have to show certificates.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Demand {
    /// Whose site it is. Two that trust the same authorities are two for their clients, too.
    pub(crate) enclave: EnclaveName,
    /// The authorities, in PEM.
    pub(crate) file: PathBuf,
}

/// The domains of one enclave.
#[derive(Debug)]
pub(crate) struct Backend {
    /// Longest prefix first.
    paths: Vec<PathRoute>,
    /// Where its TLS connections go as they are, if they are not ended here.
    pub(crate) passthrough: Option<Passthrough>,
    /// What its clients' certificates are checked against, if they have to show any.
    pub(crate) client_ca: Option<Arc<Demand>>,
    /// What its answers tell browsers in `Strict-Transport-Security`, if anything.
    pub(crate) hsts: Option<HeaderValue>,
    /// The generation that takes new requests, if one does.
    pub(crate) target: Option<Arc<Live>>,
    pub(crate) traffic: Arc<Traffic>,
}

impl Backend {
    pub(crate) fn new(mut paths: Vec<PathRoute>, target: Option<Arc<Live>>, traffic: Arc<Traffic>) -> Self {
        for path in &mut paths {
            // "/a/" and "/a" cover the same whole segments; "/" becomes "", which covers all.
            path.prefix.truncate(path.prefix.trim_end_matches('/').len());
        }
        paths.sort_by_key(|path| std::cmp::Reverse(path.prefix.len()));
        Self { paths, passthrough: None, client_ca: None, hsts: None, target, traffic }
    }

    /// One whose TLS is the enclave's.
    pub(crate) fn raw(passthrough: Passthrough, target: Option<Arc<Live>>, traffic: Arc<Traffic>) -> Self {
        Self { paths: Vec::new(), passthrough: Some(passthrough), client_ca: None, hsts: None, target, traffic }
    }

    /// What answers this path.
    pub(crate) fn route(&self, path: &str) -> Option<&PathRoute> {
        let covers = |route: &&PathRoute| {
            path.strip_prefix(route.prefix.as_str()).is_some_and(|rest| {
                // `*` (OPTIONS for the whole server) has no segments and goes where `/` goes.
                route.prefix.is_empty() || rest.is_empty() || rest.starts_with('/')
            })
        };
        self.paths.iter().find(covers)
    }
}

/// All sites.
#[derive(Debug, Default)]
pub(crate) struct Sites {
    by_domain: HashMap<String, Arc<Backend>>,
    /// Of the sites whose TLS is ended here, in the order of the routes.
    domains: Vec<Wanted>,
    /// What clients have to show.
    demands: BTreeSet<Demand>,
    /// The site for names that are no site's, and the domain whose certificate it shows then.
    default: Option<(String, Arc<Backend>)>,
}

/// A site as the routes have it.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) domains: Vec<String>,
    /// It takes names that are no site's, too.
    pub(crate) default: bool,
    /// Where its certificates come from.
    pub(crate) origin: Origin,
    pub(crate) backend: Backend,
}

impl Sites {
    pub(crate) fn new(sites: impl IntoIterator<Item = Site>) -> Self {
        let mut all = Self::default();
        for Site { domains, default, origin, backend } in sites {
            all.demands.extend(backend.client_ca.as_deref().cloned());
            let backend = Arc::new(backend);
            all.by_domain.extend(domains.iter().map(|domain| (domain.clone(), backend.clone())));
            if default {
                all.default =
                    unnamed(domains.iter().map(String::as_str)).map(|domain| (domain.to_owned(), backend.clone()));
            }
            if backend.passthrough.is_none() {
                all.domains.extend(domains.into_iter().map(|domain| Wanted { domain, origin: origin.clone() }));
            }
        }
        all
    }

    /// Whether there is TLS that does not end here.
    pub(crate) fn any_passthrough(&self) -> bool {
        self.by_domain.values().any(|backend| backend.passthrough.is_some())
    }

    /// Every domain that needs a certificate.
    pub(crate) fn domains(&self) -> &[Wanted] {
        &self.domains
    }

    /// Every check of clients' certificates that is wanted.
    pub(crate) fn demands(&self) -> &BTreeSet<Demand> {
        &self.demands
    }

    /// The site for a client by what it says in its handshake, and the domain whose certificate it is shown.
    ///
    /// Who names nobody gets the site for unknown names; where there is none, some site's certificate, and its requests are
    /// judged by their Host.
    pub(crate) fn for_client(&self, server_name: Option<&str>) -> Option<(&str, &Arc<Backend>)> {
        let Some(name) = server_name else {
            let default = self.default.as_ref().map(|(domain, backend)| (domain.as_str(), backend));
            let domains = self.domains.iter().map(|wanted| wanted.domain.as_str());
            return default.or_else(|| unnamed(domains).and_then(|domain| self.exact(domain)));
        };
        self.exact(name).or_else(|| self.default.as_ref().map(|(domain, backend)| (domain.as_str(), backend)))
    }

    /// The site of a host name without port.
    pub(crate) fn find(&self, host: &str) -> Option<&Arc<Backend>> {
        let found = self.exact(host).map(|(_, backend)| backend);
        found.or_else(|| self.default.as_ref().map(|(_, backend)| backend))
    }

    /// The site of a host name without port, in either case: an exact domain, else a wildcard for its first label. Also the
    /// domain that matched.
    fn exact(&self, host: &str) -> Option<(&str, &Arc<Backend>)> {
        let host = host.strip_suffix('.').unwrap_or(host);
        let host = if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(host.to_ascii_lowercase())
        } else {
            Cow::Borrowed(host)
        };
        let found = self.by_domain.get_key_value(host.as_ref()).or_else(|| {
            let (label, parent) = host.split_once('.')?;
            if label.is_empty() { None } else { self.by_domain.get_key_value(&format!("*.{parent}")) }
        });
        found.map(|(domain, backend)| (domain.as_str(), backend))
    }
}

/// The domain for a client that names none in its handshake: an address, as who connects by address does just that; else the
/// first that is no wildcard; else the first.
fn unnamed<'a>(domains: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let address = domains.clone().find(|domain| domain.parse::<IpAddr>().is_ok());
    let plain = || domains.clone().find(|domain| !domain.starts_with('*'));
    address.or_else(plain).or_else(|| domains.clone().next())
}

/// The host of an authority (`example.com:8443`, `[::1]:443`) without its port. `None` if it is not one: what a host must not
/// hold, an application could take for something else.
pub(crate) fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        (host, if rest.is_empty() { "" } else { rest.strip_prefix(':')? })
    } else {
        let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if host.is_empty() || !host.bytes().all(plain) {
            return None;
        }
        (host, port)
    };
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (digits && (port.is_empty() || port.parse::<u16>().is_ok())).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::TrafficKey;
    use enclaved_core::routes::{Direction, UpstreamHttp};

    fn backend(paths: &[(&str, u32)]) -> Backend {
        let route = |(prefix, vsock_port): &(&str, u32)| PathRoute {
            prefix: (*prefix).into(),
            vsock_port: *vsock_port,
            upstream: UpstreamHttp::Http1,
        };
        let key = TrafficKey { enclave: "signer".parse().unwrap(), direction: Direction::Https, endpoint: "x".into() };
        Backend::new(paths.iter().map(route).collect(), None, Arc::new(Traffic::new(key)))
    }

    fn port(backend: &Backend, path: &str) -> Option<u32> {
        backend.route(path).map(|route| route.vsock_port)
    }

    #[test]
    fn the_longest_prefix_of_whole_segments_wins() {
        let backend = backend(&[("/", 1), ("/attestation", 2), ("/attestation/deep/", 3)]);
        for (path, expected) in [
            ("/", 1),
            ("/attestation", 2),
            ("/attestation/", 2),
            ("/attestation/x", 2),
            ("/attestations", 1),
            ("/attestation/deep", 3),
            ("/attestation/deep/er", 3),
            ("/attestation/deeper", 2),
            ("*", 1),
            ("", 1),
        ] {
            assert_eq!(port(&backend, path), Some(expected), "{path}");
        }
        assert_eq!(port(&self::backend(&[("/only", 1)]), "/other"), None);
    }

    fn site(domains: &[&str], port: u32) -> Site {
        let domains = domains.iter().map(|domain| (*domain).to_owned()).collect();
        Site { domains, default: false, origin: Origin::InternalCa, backend: backend(&[("/", port)]) }
    }

    #[test]
    fn an_exact_domain_wins_over_a_wildcard_which_covers_one_label() {
        let sites = Sites::new([site(&["*.example.com"], 1), site(&["a.example.com", "127.0.0.1"], 2)]);
        let port_of = |host| sites.find(host).and_then(|backend| port(backend, "/"));
        for (host, expected) in [
            ("a.example.com", Some(2)),
            ("A.Example.COM.", Some(2)),
            ("b.example.com", Some(1)),
            ("b.a.example.com", None),
            (".example.com", None),
            ("example.com", None),
            ("*.example.com", Some(1)),
            ("127.0.0.1", Some(2)),
            ("", None),
        ] {
            assert_eq!(port_of(host), expected, "{host}");
        }
        assert_eq!(sites.for_client(None).unwrap().0, "127.0.0.1");
        assert_eq!(sites.for_client(Some("x.example.com")).unwrap().0, "*.example.com");
        assert!(sites.for_client(Some("x.example.org")).is_none());
        let sites = Sites::new([site(&["*.example.com", "a.test"], 1)]);
        assert_eq!(sites.for_client(None).unwrap().0, "a.test");
    }

    #[test]
    fn names_that_are_no_sites_go_to_the_default_with_a_certificate_that_it_has() {
        let sites = [site(&["127.0.0.1"], 1), Site { default: true, ..site(&["*.b.test", "b.test"], 2) }];
        let sites = Sites::new(sites);
        for name in [None, Some("c.test")] {
            let (domain, backend) = sites.for_client(name).unwrap();
            assert_eq!((domain, port(backend, "/")), ("b.test", Some(2)), "{name:?}");
        }
        assert_eq!(port(sites.find("10.0.0.1").unwrap(), "/"), Some(2));
        assert_eq!(port(sites.find("127.0.0.1").unwrap(), "/"), Some(1));
    }

    #[test]
    fn a_site_whose_tls_is_the_enclaves_needs_no_certificate_and_is_nobodys_guess() {
        let raw = Passthrough { vsock_port: 443, proxy_protocol: None };
        let raw = Site { backend: Backend { passthrough: Some(raw), ..backend(&[]) }, ..site(&["127.0.0.1"], 1) };
        let sites = Sites::new([raw]);
        assert!(sites.domains().is_empty() && sites.for_client(None).is_none());
        assert!(sites.for_client(Some("127.0.0.1")).unwrap().1.passthrough.is_some());
    }

    #[test]
    fn a_host_is_read_from_an_authority_and_nonsense_is_none() {
        for (authority, host) in [
            ("example.com", Some("example.com")),
            ("example.com:8443", Some("example.com")),
            ("example.com:", Some("example.com")),
            ("[::1]:443", Some("::1")),
            ("[::1]", Some("::1")),
            ("[::1", None),
            ("[::1]x", None),
            ("example.com:x", None),
            ("a:1:2", None),
            ("user@example.com", None),
            ("a.test:65535", Some("a.test")),
            ("a.test:65536", None),
            ("a.test/x", None),
            ("a.test\\b", None),
            ("a,b", None),
            ("a%2eb", None),
            ("*.a.test", None),
            ("[::1%25lo]:443", None),
            ("[a.test]", None),
            ("a b", None),
            ("", None),
            (":443", None),
        ] {
            assert_eq!(host_of(authority), host, "{authority}");
        }
    }
}
