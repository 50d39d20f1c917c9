//! Rules of single endpoints, ports and sites: how much they carry, from whom, and what is put before it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// How much one egress endpoint carries. What is left out has the proxy's own bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressLimits {
    /// Connections at a time; more are closed at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// New connections a second. What comes faster waits for its turn, a second at most; more are closed at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_per_second: Option<u32>,
    /// How long each address of the upstream may take to accept a connection, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout_ms: Option<u32>,
    /// When connections end by themselves.
    #[serde(skip_serializing_if = "Ages::is_default")]
    pub ages: Ages,
}

/// When a connection that is carried ends by itself. Counts for connections that are made from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ages {
    /// Seconds without a byte either way. Left out: the proxy's own bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_s: Option<u32>,
    /// Seconds in all, whatever it carries. Left out: no such bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lifetime_s: Option<u32>,
}

impl Ages {
    /// Whether all are the proxy's own.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether one of them is 0, which would carry nothing.
    pub(super) fn has_zero(&self) -> bool {
        [self.idle_s, self.lifetime_s].contains(&Some(0))
    }
}

impl EgressLimits {
    /// Whether all are the proxy's own.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Who may use a raw TCP port, how much, and what the enclave is told of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TcpRules {
    /// What is sent to the enclave before a connection's bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// From where connections are taken; empty: from everywhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<IpNetwork>,
    /// Connections at a time; more are closed at once. Left out: the proxy's own bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Connections of one source at a time: of one IPv4 address, or one IPv6 network of 64 bits. Left out: no such bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections_per_source: Option<u32>,
    /// When connections end by themselves.
    #[serde(skip_serializing_if = "Ages::is_default")]
    pub ages: Ages,
}

impl TcpRules {
    /// Whether there are none.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether connections from there are taken.
    pub fn allows(&self, source: IpAddr) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|network| network.contains(source))
    }
}

/// Who may use HTTPS, how much, and whom it believes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpsRules {
    /// Proxies in front of this one: what they say of a client in `X-Forwarded-*` is passed on, and their connections are not
    /// counted as those of one source. Nobody else's word about a client is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<IpNetwork>,
    /// Where requests in clear are told to come again over HTTPS, if anywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redirect: Option<SocketAddr>,
    /// Connections at a time; more are closed at once. Left out: the proxy's own bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Connections of one source at a time: of one IPv4 address, or one IPv6 network of 64 bits. Left out: the proxy's own
    /// bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections_per_source: Option<u32>,
}

impl HttpsRules {
    /// Whether there are none.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether that peer is a proxy whose word is taken.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(peer))
    }
}

/// What is special about a site.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SiteRules {
    /// It takes names that are no site's, too, and clients that name none. One site at most.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,
    /// Its TLS is the enclave's: nothing is decrypted here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passthrough: Option<Passthrough>,
    /// The certificate for all its domains. Left out: each has one of the internal CA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateFiles>,
    /// For how many seconds browsers are to come over HTTPS alone (`Strict-Transport-Security`). Left out: they are not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hsts_seconds: Option<u64>,
    /// The authorities, in PEM, one of which must have signed the certificate that every client of this site has to show. Left
    /// out: clients show none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
}

impl SiteRules {
    /// Whether there are none.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A certificate on disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    /// The chain in PEM, the site's own certificate first.
    pub cert: PathBuf,
    /// Its key in PEM.
    pub key: PathBuf,
}

/// How an enclave's port speaks HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamHttp {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 in clear, which both sides know beforehand: gRPC.
    H2c,
}

impl UpstreamHttp {
    /// Whether it is what it is where nothing is said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where the TLS connections of a site go, every byte as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passthrough {
    /// The vsock port inside the enclave that answers TLS.
    pub vsock_port: u32,
    /// What is sent to the enclave before a connection's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// How a connection's source is told to the enclave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// By the binary header of the PROXY protocol, version 2.
    V2,
}

/// A network of IP addresses: `10.0.0.0/8`, `2001:db8::/32`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpNetwork {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadIpNetwork {
    /// It has another form.
    #[error("allowed: an IP address, or a network such as 10.0.0.0/8 or 2001:db8::/32")]
    Form,
    /// The address has bits that the prefix does not cover: perhaps one of the two is mistyped.
    #[error("the address has bits outside the prefix; the network is {0}")]
    HostBits(IpNetwork),
}

impl IpNetwork {
    /// Whether the address is of this network. An IPv4 address counts as such in its IPv6 form, too (`::ffff:10.0.0.1`).
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.prefix) == self.address
    }
}

fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
            Ipv4Addr::from(u32::from(address) & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix.into())).unwrap_or(0);
            Ipv6Addr::from(u128::from(address) & mask).into()
        }
    }
}

impl FromStr for IpNetwork {
    type Err = BadIpNetwork;
    fn from_str(text: &str) -> Result<Self, BadIpNetwork> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| BadIpNetwork::Form)?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => longest,
            // Digits alone: a sign would be taken, too.
            Some(prefix) if !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit()) => {
                prefix.parse().ok().filter(|prefix| *prefix <= longest).ok_or(BadIpNetwork::Form)?
            }
            Some(_) => return Err(BadIpNetwork::Form),
        };
        let network = Self { address: masked(address, prefix), prefix };
        if network.address == address { Ok(network) } else { Err(BadIpNetwork::HostBits(network)) }
    }
}

impl fmt::Display for IpNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl From<IpNetwork> for String {
    fn from(network: IpNetwork) -> Self {
        network.to_string()
    }
}

impl TryFrom<String> for IpNetwork {
    type Error = BadIpNetwork;
    fn try_from(text: String) -> Result<Self, BadIpNetwork> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_has_the_addresses_of_its_prefix_and_no_others() {
        let has = |text: &str, address: &str| network(text).contains(address.parse().unwrap());
        assert!(has("10.0.0.0/8", "10.255.1.2") && !has("10.0.0.0/8", "11.0.0.0"));
        assert!(has("10.0.0.0/8", "::ffff:10.1.2.3"), "a socket for both families shows IPv4 so");
        assert!(has("0.0.0.0/0", "1.2.3.4") && !has("0.0.0.0/0", "2001:db8::1"));
        assert!(has("::/0", "2001:db8::1") && !has("::/0", "1.2.3.4"));
        assert!(has("2001:db8::/33", "2001:db8:7fff::1") && !has("2001:db8::/33", "2001:db8:8000::1"));
        assert!(has("192.0.2.7", "192.0.2.7") && !has("192.0.2.7", "192.0.2.6"));
        assert_eq!(network("192.0.2.7").to_string(), "192.0.2.7/32");
    }

    #[test]
    fn what_is_no_network_is_refused_and_a_mistyped_one_gets_the_right_one_named() {
        for text in
            ["", "10.0.0.0/", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/+8", "10.0.0.0/8/8", "a/8", " ::/0"]
        {
            assert_eq!(text.parse::<IpNetwork>(), Err(BadIpNetwork::Form), "{text}");
        }
        let error = "10.1.0.0/8".parse::<IpNetwork>().unwrap_err();
        assert_eq!(error.to_string(), "the address has bits outside the prefix; the network is 10.0.0.0/8");
    }

    proptest! {
        #[test]
        fn a_network_reads_back_as_it_is_written_and_has_its_own_address(bits: u128, v4: bool, prefix in 0_u8..=128) {
            let (address, prefix): (IpAddr, u8) = if v4 {
                #[expect(clippy::cast_possible_truncation, reason = "some bits are as good as others")]
                let bits = bits as u32;
                (Ipv4Addr::from(bits).into(), prefix.min(32))
            } else {
                (Ipv6Addr::from(bits).into(), prefix)
            };
            let network = IpNetwork { address: masked(address, prefix), prefix };
            prop_assert_eq!(network.to_string().parse(), Ok(network));
            // An IPv6 network within the IPv4 range has addresses that count as IPv4.
            prop_assume!(v4 || address.to_canonical().is_ipv6());
            prop_assert!(network.contains(address));
        }
    }
}
