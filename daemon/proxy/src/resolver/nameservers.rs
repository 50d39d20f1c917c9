//! Asks nameservers for the addresses of a name: which of them, for how long, and for which names. Knows nothing of files, and
//! remembers nothing of what was said.
//!
//! - A name with a dot is asked for as it stands. Search domains count only for names without one, and the next only once
//!   it is said of both families that the name is not there under the one before: that nobody answers says nothing of a name.
//! - The addresses of both families are those of one and the same name.
//! - The nameservers are asked in their order, each in turn only if those before it did not answer the question: an error
//!   (SERVFAIL, REFUSED) is no answer, that there is no such name is one. So does glibc: resolv.conf(5).

use super::{NameError, QUESTION, Said};
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Resolver, TokioResolver};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::timeout;

/// Once one address family is known, the other may take this much longer: where a network drops questions for AAAA, they
/// are not waited for.
const OTHER_FAMILY: Duration = Duration::from_millis(300);
/// For how long an answer of one family alone is good when the other was late.
pub(super) const HALF: Duration = Duration::from_secs(5);
/// Where a negative answer says nothing of how long it is good.
const NEGATIVE: Duration = Duration::from_secs(5);
/// Most nameservers that are asked; further ones are left out, as glibc does: resolv.conf(5).
const MOST: usize = 3;
/// Most rounds over all of them, whatever `attempts` says: as glibc has it.
const ROUNDS: usize = 5;

/// The nameservers of a host, in their order.
pub(super) struct Nameservers {
    servers: Vec<(IpAddr, TokioResolver)>,
    search: Vec<Name>,
    /// A name without a dot is asked for as it stands before it is searched for (`ndots:0`).
    plain_first: bool,
    /// How often all of them are asked (`attempts`), at least once.
    rounds: usize,
    /// How long each of them may take.
    each: Duration,
}

impl Nameservers {
    /// As a resolv.conf has it; at that port, if one is given.
    pub(super) fn new(config: &ResolverConfig, mut options: ResolverOpts, port: Option<u16>) -> Result<Self, NetError> {
        let servers = &config.name_servers()[..config.name_servers().len().min(MOST)];
        // The last of them has its turn within the time for a question.
        let turn = QUESTION / u32::try_from(servers.len().max(1)).unwrap_or(u32::MAX);
        let each = options.timeout.min(turn);
        let rounds = options.attempts.clamp(1, ROUNDS);
        let plain_first = options.ndots == 0;
        options.timeout = each;
        // Repetitions are rounds over all of them.
        options.attempts = 0;
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let one = |server: &NameServerConfig| {
            let mut server = server.clone();
            if let Some(port) = port {
                server.connections.iter_mut().for_each(|connection| connection.port = port);
            }
            let ip = server.ip;
            // Without domains of its own: which names are asked for is decided here.
            let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
            let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
            *builder.options_mut() = options.clone();
            Ok((ip, builder.build()?))
        };
        let servers = servers.iter().map(one).collect::<Result<_, NetError>>()?;
        let search = match config.search() {
            [] => config.domain().cloned().into_iter().collect(),
            search => search.to_vec(),
        };
        Ok(Self { servers, search, plain_first, rounds, each })
    }

    /// The addresses of a name, IPv6 first. Cancel-safe: a question that is dropped is forgotten.
    pub(super) async fn ask(&self, hostname: &str) -> Result<Said, NameError> {
        let mut denied: Option<NameError> = None;
        for name in self.candidates(hostname)? {
            match self.both_families(&name).await {
                Err(error) if error.negative().is_some() => {
                    denied = Some(match denied {
                        Some(before) => both_denied(before, error),
                        None => error,
                    });
                }
                known_or_failed => return known_or_failed,
            }
        }
        Err(denied.unwrap_or_else(|| NameError::Failed("no name is left to ask for".to_owned())))
    }

    /// The names that a hostname may stand for, in the order in which they are asked for.
    fn candidates(&self, hostname: &str) -> Result<Vec<Name>, NameError> {
        let invalid = |error: &dyn std::fmt::Display| NameError::Failed(error.to_string());
        let mut plain = Name::from_utf8(hostname).map_err(|error| invalid(&error))?;
        let absolute = hostname.contains('.') || plain.is_localhost();
        let searched = self.search.iter().filter(|_| !absolute);
        // One that gets too long is no name.
        let searched = searched.filter_map(|domain| plain.clone().append_domain(domain).ok());
        let mut names: Vec<Name> = searched.collect();
        plain.set_fqdn(true);
        names.insert(if self.plain_first { 0 } else { names.len() }, plain);
        Ok(names)
    }

    async fn both_families(&self, name: &Name) -> Result<Said, NameError> {
        let mut v6 = Box::pin(self.one_family(name, RecordType::AAAA));
        let mut v4 = Box::pin(self.one_family(name, RecordType::A));
        // Both are answers of nothing but themselves, so whichever comes first decides how long the other is waited for.
        let first_is_v6;
        let first = tokio::select! {
            // Cancel-safe: both live on outside of this.
            first = &mut v6 => { first_is_v6 = true; first }
            first = &mut v4 => { first_is_v6 = false; first }
        };
        let second = async move { if first_is_v6 { v4.await } else { v6.await } };
        match first {
            Ok(mut first) => match timeout(OTHER_FAMILY, second).await {
                Ok(Ok(mut second)) => {
                    first.ttl = first.ttl.min(second.ttl);
                    first.addresses.append(&mut second.addresses);
                    first.addresses.sort_by_key(|address| address.is_ipv4());
                    Ok(first)
                }
                // That there is none of the other family is the ordinary case.
                Ok(Err(error)) if error.negative().is_some() => Ok(first),
                Ok(Err(_)) | Err(_) => Ok(Said { ttl: first.ttl.min(HALF), ..first }),
            },
            Err(first) => match second.await {
                Ok(second) if first.negative().is_some() => Ok(second),
                Ok(second) => Ok(Said { ttl: second.ttl.min(HALF), ..second }),
                // Only if both families are said not to be there it is known that there is no address.
                Err(second) if first.negative().is_some() => Err(second),
                Err(_) => Err(first),
            },
        }
    }

    /// What the first nameserver that answers says.
    async fn one_family(&self, name: &Name, kind: RecordType) -> Result<Said, NameError> {
        let mut failures = Vec::new();
        for _ in 0..self.rounds {
            failures.clear();
            for (ip, server) in &self.servers {
                let asked = timeout(self.each, server.lookup(name.clone(), kind)).await;
                match asked.unwrap_or(Err(NetError::Timeout)) {
                    Ok(lookup) => {
                        let records = lookup.answers();
                        let addresses: Vec<IpAddr> =
                            records.iter().filter_map(|record| record.data.ip_addr()).collect();
                        if addresses.is_empty() {
                            return Err(NameError::NoAddress { ttl: NEGATIVE });
                        }
                        // Of the aliases on the way, too: each may change when its own time is over.
                        let ttl = records.iter().map(|record| record.ttl).min().unwrap_or_default();
                        return Ok(Said { addresses, ttl: Duration::from_secs(ttl.into()) });
                    }
                    Err(error) => match denial(&error) {
                        Some(denial) => return Err(denial),
                        None => failures.push(format!("{ip}: {error}")),
                    },
                }
            }
        }
        Err(NameError::Failed(failures.join("; ")))
    }
}

/// What an error says of the name, if it is an answer.
fn denial(error: &NetError) -> Option<NameError> {
    let NetError::Dns(DnsError::NoRecordsFound(none)) = error else { return None };
    let ttl = none.negative_ttl.map_or(NEGATIVE, |ttl| Duration::from_secs(ttl.into()));
    match none.response_code {
        ResponseCode::NXDomain => Some(NameError::NoSuchName { ttl }),
        ResponseCode::NoError => Some(NameError::NoAddress { ttl }),
        _ => None,
    }
}

/// What two denials say together: a name that exists without an address says more than one that does not exist.
fn both_denied(first: NameError, second: NameError) -> NameError {
    let ttl = first.negative().into_iter().chain(second.negative()).min().unwrap_or(NEGATIVE);
    match (first, second) {
        (NameError::NoAddress { .. }, _) | (_, NameError::NoAddress { .. }) => NameError::NoAddress { ttl },
        _ => NameError::NoSuchName { ttl },
    }
}
