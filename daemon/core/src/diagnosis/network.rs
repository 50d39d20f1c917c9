//! Names of endpoints, judged as the proxy judges them, and the ports that enclaved listens on.

use super::{Check, Finding, Outcome};
use crate::egress_policy::{self, OwnRange};
use crate::observed::Observation::{self, Known, Unknown};
use std::net::{IpAddr, SocketAddr};

/// One egress endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSeen {
    /// Name or address, and port: `kms.us-east-1.amazonaws.com:443`.
    pub endpoint: String,
    /// The enclaves that list it.
    pub enclaves: Vec<String>,
    /// Addresses that are served whatever they are.
    pub allowed: Vec<IpAddr>,
    /// What its name leads to, or why to nothing.
    pub addresses: Observation<Result<Vec<IpAddr>, String>>,
}

/// The endpoints, given this host's own addresses.
pub fn egress_dns(endpoints: &[EndpointSeen], own: &Observation<Vec<OwnRange>>) -> Vec<Finding> {
    let check = Check::EgressDns;
    if endpoints.is_empty() {
        return vec![Finding::not_needed(check, "no enclave has egress endpoints")];
    }
    let own = match own {
        Known(own) => own,
        Unknown(failure) => return vec![Finding::unknown(check, failure)],
    };
    let findings: Vec<_> = endpoints.iter().map(|endpoint| of_endpoint(endpoint, own)).collect();
    let good = findings.iter().filter(|finding| finding.outcome == Outcome::Ok).count();
    let mut told: Vec<_> = findings.into_iter().filter(|finding| finding.outcome != Outcome::Ok).collect();
    if good > 0 {
        let noun = if good == 1 { "endpoint leads" } else { "endpoints lead" };
        told.push(Finding::ok(check, format!("{good} {noun} to addresses that enclaves may reach")));
    }
    told
}

fn of_endpoint(endpoint: &EndpointSeen, own: &[OwnRange]) -> Finding {
    let check = Check::EgressDns;
    let whose = endpoint.enclaves.join(", ");
    let finding = match &endpoint.addresses {
        Unknown(failure) => Finding::unknown(check, failure),
        Known(Err(why)) => Finding::failure(
            check,
            format!("its name does not resolve: {why} (enclave {whose})"),
            "check the name in the configuration, /etc/resolv.conf, and whether this host reaches its resolver",
        ),
        Known(Ok(addresses)) => {
            let judged =
                addresses.iter().map(|address| (address, egress_policy::check(*address, &endpoint.allowed, own)));
            let refused: Vec<String> =
                judged.filter_map(|(address, verdict)| Some(format!("{address} is {}", verdict.err()?))).collect();
            let remedy = "if the enclave is to reach it, list the address in the endpoint's allow_addresses; otherwise correct the \
                          name, or what DNS says of it";
            match (addresses.len(), refused.len()) {
                (0, _) => {
                    Finding::failure(check, format!("its name has no address (enclave {whose})"), "check the name")
                }
                (_, 0) => Finding::ok(check, format!("{} addresses", addresses.len())),
                (all, bad) if all == bad => {
                    let text = format!("no address of it may be reached: {} (enclave {whose})", refused.join("; "));
                    Finding::failure(check, text, remedy)
                }
                _ => Finding::warning(check, format!("not reached: {} (enclave {whose})", refused.join("; ")), remedy),
            }
        }
    };
    finding.about(&endpoint.endpoint)
}

/// An address that enclaved is to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenSeen {
    /// For what: `HTTPS`.
    pub what: String,
    /// Where.
    pub address: SocketAddr,
    /// Who listens there.
    pub holder: Observation<Holder>,
}

/// Who listens on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// Nobody.
    Nobody,
    /// enclaved itself.
    Enclaved,
    /// Somebody else: `nginx, process 12`.
    Other(String),
}

/// What decides who may listen on low ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LowPorts {
    /// Ports from this on are anybody's (`net.ipv4.ip_unprivileged_port_start`).
    pub free_from: u16,
    /// Whether the proxy may bind lower ones; `None`: not known, as it does not run.
    pub may_bind: Option<bool>,
}

/// The ports.
pub fn listening_ports(ports: &[ListenSeen], low: LowPorts) -> Vec<Finding> {
    let check = Check::ListeningPorts;
    let findings: Vec<_> = ports.iter().map(|port| of_port(port, low)).collect();
    let mut told: Vec<_> = findings.into_iter().filter(|finding| finding.outcome != Outcome::Ok).collect();
    if told.len() < ports.len() {
        let good: Vec<String> = ports
            .iter()
            .filter(|port| !told.iter().any(|finding| finding.about.as_ref() == Some(&name(port))))
            .map(|port| format!("{} ({})", port.address, port.what))
            .collect();
        told.push(Finding::ok(check, format!("free, or enclaved's own: {}", good.join(", "))));
    }
    told
}

fn name(port: &ListenSeen) -> String {
    port.address.to_string()
}

fn of_port(port: &ListenSeen, low: LowPorts) -> Finding {
    let check = Check::ListeningPorts;
    let number = port.address.port();
    let finding = match &port.holder {
        Unknown(failure) => Finding::unknown(check, failure),
        Known(Holder::Enclaved) => Finding::ok(check, "enclaved's own"),
        Known(Holder::Other(who)) => Finding::failure(
            check,
            format!("the port for {} is held by {who}", port.what),
            format!("end it, give it another port, or change the configuration (`ss -lntp 'sport = :{number}'`)"),
        ),
        Known(Holder::Nobody) if number != 0 && number < low.free_from && low.may_bind == Some(false) => {
            Finding::failure(
                check,
                format!("the port for {} is below {}, and enclaved may not listen there", port.what, low.free_from),
                "AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit",
            )
        }
        Known(Holder::Nobody) => Finding::ok(check, "free"),
    };
    finding.about(name(port))
}

/// A TCP socket that listens, as `/proc/net/tcp` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
    /// Whose it is: the user's number.
    pub uid: u32,
    /// Its number, by which its process can be found.
    pub inode: u64,
}

impl Listening {
    /// Whether nobody else can listen there while this one does. (An IPv6 socket for all addresses is taken to be for IPv4, too,
    /// which is the kernel's default.)
    pub fn is_in_the_way_of(&self, address: SocketAddr) -> bool {
        let (one, other) = (self.address.ip().to_canonical(), address.ip().to_canonical());
        self.address.port() == address.port()
            && address.port() != 0
            && match (one.is_unspecified(), other.is_unspecified()) {
                (false, false) => one == other,
                (true, false) => one.is_ipv6() || other.is_ipv4(),
                (false, true) => other.is_ipv6() || one.is_ipv4(),
                (true, true) => true,
            }
    }
}

/// Reads `/proc/net/tcp` or `/proc/net/tcp6`; lines that are none are left out (proc(5)).
pub fn listening(text: &str) -> Vec<Listening> {
    const LISTEN: &str = "0A";
    let of_line = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let address = socket_address(fields.next()?)?;
        let state = fields.nth(1)?;
        let uid = fields.nth(3)?.parse().ok()?;
        let inode = fields.nth(1)?.parse().ok()?;
        (state == LISTEN).then_some(Listening { address, uid, inode })
    };
    text.lines().skip(1).filter_map(of_line).collect()
}

/// Words of 32 bits in the byte order of the host, then the port.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match address.len() {
        8 => Some(SocketAddr::new(word(0)?.into(), port)),
        32 => {
            let mut bytes = [0; 16];
            for (chunk, at) in bytes.chunks_exact_mut(4).zip([0, 8, 16, 24]) {
                chunk.copy_from_slice(&word(at)?);
            }
            Some(SocketAddr::new(bytes.into(), port))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Failure;

    fn endpoint(addresses: Result<&[&str], &str>, allowed: &[&str]) -> EndpointSeen {
        let parsed = |all: &[&str]| all.iter().map(|address| address.parse().unwrap()).collect::<Vec<IpAddr>>();
        EndpointSeen {
            endpoint: "kms:443".to_owned(),
            enclaves: vec!["signer".to_owned()],
            allowed: parsed(allowed),
            addresses: Known(addresses.map(parsed).map_err(str::to_owned)),
        }
    }

    fn outcome(endpoint: EndpointSeen) -> Outcome {
        let own = Known(vec!["10.0.0.5".parse::<IpAddr>().unwrap().into()]);
        egress_dns(&[endpoint], &own)[0].outcome
    }

    #[test]
    fn an_endpoint_without_an_address_that_may_be_reached_fails() {
        assert_eq!(outcome(endpoint(Ok(&["52.94.0.1"]), &[])), Outcome::Ok);
        assert_eq!(outcome(endpoint(Err("Name or service not known"), &[])), Outcome::Failure);
        assert_eq!(outcome(endpoint(Ok(&[]), &[])), Outcome::Failure);
        assert_eq!(outcome(endpoint(Ok(&["127.0.0.1", "10.0.0.5"]), &[])), Outcome::Failure);
        assert_eq!(outcome(endpoint(Ok(&["127.0.0.1", "52.94.0.1"]), &[])), Outcome::Warning);
        assert_eq!(outcome(endpoint(Ok(&["127.0.0.1"]), &["127.0.0.1"])), Outcome::Ok);
        let late = EndpointSeen { addresses: Unknown(Failure::new("too slow")), ..endpoint(Ok(&[]), &[]) };
        assert_eq!(outcome(late), Outcome::Unknown);
    }

    #[test]
    fn good_endpoints_are_one_line_and_bad_ones_a_line_each() {
        let bad = EndpointSeen { endpoint: "db:5432".to_owned(), ..endpoint(Err("x"), &[]) };
        let good = || endpoint(Ok(&["52.94.0.1"]), &[]);
        let findings = egress_dns(&[good(), bad, good()], &Known(Vec::new()));
        assert_eq!(findings.len(), 2);
        assert_eq!(findings[0].name(), "egress_dns db:5432");
        assert_eq!(findings[1].seen, "2 endpoints lead to addresses that enclaves may reach");
    }

    fn port(address: &str, holder: Holder) -> ListenSeen {
        ListenSeen { what: "HTTPS".to_owned(), address: address.parse().unwrap(), holder: Known(holder) }
    }

    const LOW: LowPorts = LowPorts { free_from: 1024, may_bind: Some(true) };

    #[test]
    fn a_port_that_another_program_holds_fails_and_names_it() {
        let other = Holder::Other("nginx, process 12".to_owned());
        let ports =
            [port("[::]:443", other), port("127.0.0.1:9119", Holder::Enclaved), port("0.0.0.0:7", Holder::Nobody)];
        let findings = listening_ports(&ports, LOW);
        assert_eq!(findings.len(), 2);
        assert_eq!(findings[0].outcome, Outcome::Failure);
        assert!(findings[0].seen.contains("nginx, process 12"), "{}", findings[0].seen);
        assert_eq!(findings[1].seen, "free, or enclaved's own: 127.0.0.1:9119 (HTTPS), 0.0.0.0:7 (HTTPS)");
    }

    #[test]
    fn a_low_port_fails_where_it_is_known_that_it_may_not_be_bound() {
        let outcome =
            |may_bind, holder| listening_ports(&[port("[::]:443", holder)], LowPorts { may_bind, ..LOW })[0].outcome;
        assert_eq!(outcome(Some(false), Holder::Nobody), Outcome::Failure);
        assert_eq!(outcome(Some(false), Holder::Enclaved), Outcome::Ok, "it did bind it");
        assert_eq!(outcome(None, Holder::Nobody), Outcome::Ok);
        assert_eq!(outcome(Some(true), Holder::Nobody), Outcome::Ok);
    }

    #[test]
    fn sockets_that_listen_are_read_from_the_kernels_tables() {
        let v4 = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:239F 00000000:0000 0A 00000000:00000000 00:00000000 00000000   990        0 4242 1 0 100 0 0 10 0\n   \
            1: 0100007F:239F 0100007F:8888 01 00000000:00000000 00:00000000 00000000     0        0 4243 1 0 100 0 0 10 0\n";
        let v6 = "  sl\n   0: 00000000000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A \
            00000000:00000000 00:00000000 00000000     0        0 7 1 0 100 0 0 10 0\nrubbish\n";
        let all = [listening(v4), listening(v6)].concat();
        let of = |address: &str, uid, inode| Listening { address: address.parse().unwrap(), uid, inode };
        // As a little-endian host writes them.
        if cfg!(target_endian = "little") {
            assert_eq!(all, [of("127.0.0.1:9119", 990, 4242), of("[::1]:443", 0, 7)]);
        }
    }

    #[test]
    fn a_socket_is_in_the_way_of_the_same_address_and_of_all_addresses() {
        let is = |held: &str, wanted: &str| {
            let held = Listening { address: held.parse().unwrap(), uid: 0, inode: 1 };
            held.is_in_the_way_of(wanted.parse().unwrap())
        };
        assert!(is("127.0.0.1:443", "127.0.0.1:443"));
        assert!(is("0.0.0.0:443", "127.0.0.1:443"));
        assert!(is("[::]:443", "127.0.0.1:443"));
        assert!(is("127.0.0.1:443", "[::]:443"));
        assert!(is("0.0.0.0:443", "[::]:443"));
        assert!(is("[::ffff:127.0.0.1]:443", "127.0.0.1:443"));
        assert!(!is("127.0.0.1:443", "127.0.0.2:443"));
        assert!(!is("127.0.0.1:443", "127.0.0.1:444"));
        assert!(!is("0.0.0.0:443", "[::1]:443"));
        assert!(!is("127.0.0.1:0", "127.0.0.1:0"));
    }
}
