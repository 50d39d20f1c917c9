//! Which site a request is for, and which vsock port of it: by name, then by path. Pure.

use crate::counters::{Live, Traffic};
use enclaved_core::routes::PathRoute;
use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// The domains of one enclave.
#[derive(Debug)]
pub(crate) struct Backend {
    /// Longest prefix first.
    paths: Vec<PathRoute>,
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
        Self { paths, target, traffic }
    }

    /// The vsock port that answers this path.
    pub(crate) fn port(&self, path: &str) -> Option<u32> {
        let covers = |route: &&PathRoute| {
            path.strip_prefix(route.prefix.as_str()).is_some_and(|rest| {
                // `*` (OPTIONS for the whole server) has no segments and goes where `/` goes.
                route.prefix.is_empty() || rest.is_empty() || rest.starts_with('/')
            })
        };
        self.paths.iter().find(covers).map(|route| route.vsock_port)
    }
}

/// All sites.
#[derive(Debug, Default)]
pub(crate) struct Sites {
    by_domain: HashMap<String, Arc<Backend>>,
    domains: Vec<String>,
}

impl Sites {
    pub(crate) fn new(sites: impl IntoIterator<Item = (Vec<String>, Backend)>) -> Self {
        let mut all = Self::default();
        for (domains, backend) in sites {
            let backend = Arc::new(backend);
            all.by_domain.extend(domains.iter().map(|domain| (domain.clone(), backend.clone())));
            all.domains.extend(domains);
        }
        all
    }

    /// Every domain, in the order of the routes.
    pub(crate) fn domains(&self) -> &[String] {
        &self.domains
    }

    /// The domain for a client that names none in its handshake: an address, as who connects by address does just that; else
    /// the first that is no wildcard; else the first.
    pub(crate) fn unnamed(&self) -> Option<&str> {
        let address = self.domains.iter().find(|domain| domain.parse::<IpAddr>().is_ok());
        let plain = || self.domains.iter().find(|domain| !domain.starts_with('*'));
        address.or_else(plain).or(self.domains.first()).map(String::as_str)
    }

    /// The site of a host name without port, in either case: an exact domain, else a wildcard for its first label. Also the
    /// domain that matched.
    pub(crate) fn find(&self, host: &str) -> Option<(&str, &Arc<Backend>)> {
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

/// The host of an authority (`example.com:8443`, `[::1]:443`) without its port. `None` if it is not one.
pub(crate) fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        (host, if rest.is_empty() { "" } else { rest.strip_prefix(':')? })
    } else {
        authority.split_once(':').unwrap_or((authority, ""))
    };
    let plain = !host.is_empty() && !host.contains(['@', '/', '?', '#', ' ']);
    (plain && port.bytes().all(|byte| byte.is_ascii_digit())).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::TrafficKey;
    use enclaved_core::routes::Direction;

    fn backend(paths: &[(&str, u32)]) -> Backend {
        let route =
            |(prefix, vsock_port): &(&str, u32)| PathRoute { prefix: (*prefix).into(), vsock_port: *vsock_port };
        let key = TrafficKey { enclave: "signer".parse().unwrap(), direction: Direction::Https, endpoint: "x".into() };
        Backend::new(paths.iter().map(route).collect(), None, Arc::new(Traffic::new(key)))
    }

    #[test]
    fn the_longest_prefix_of_whole_segments_wins() {
        let backend = backend(&[("/", 1), ("/attestation", 2), ("/attestation/deep/", 3)]);
        for (path, port) in [
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
            assert_eq!(backend.port(path), Some(port), "{path}");
        }
        assert_eq!(self::backend(&[("/only", 1)]).port("/other"), None);
    }

    #[test]
    fn an_exact_domain_wins_over_a_wildcard_which_covers_one_label() {
        let sites = Sites::new([
            (vec!["*.example.com".into()], backend(&[("/", 1)])),
            (vec!["a.example.com".into(), "127.0.0.1".into()], backend(&[("/", 2)])),
        ]);
        let port = |host| sites.find(host).and_then(|(_, backend)| backend.port("/"));
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
            assert_eq!(port(host), expected, "{host}");
        }
        assert_eq!(sites.unnamed(), Some("127.0.0.1"));
        let sites = Sites::new([(vec!["*.example.com".into(), "a.test".into()], backend(&[("/", 1)]))]);
        assert_eq!(sites.unnamed(), Some("a.test"));
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
            ("a b", None),
            ("", None),
            (":443", None),
        ] {
            assert_eq!(host_of(authority), host, "{authority}");
        }
    }
}
