//! Asks nameservers for the addresses of a name: which of them, for how long, and for which names. Knows nothing of files, and
//! remembers nothing of what was said.
//!
//! - A name with a dot is asked for as it stands. Search domains count only for names without one, and the next only once
//!   it is said of both families that the name is not there under the one before: that nobody answers says nothing of a name.
//! - The addresses of both families are those of one and the same name.
//! - The nameserver that answered last is asked first, then the others in their order, each when one before it did not answer the
//!   question, or is silent for [`PATIENCE`]: an error (SERVFAIL, REFUSED) is no answer, that there is no such name is one. So one
//!   that is silent delays one question, and no more. (glibc waits for each in turn: resolv.conf(5).)

use super::{NameError, QUESTION, Said};
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Resolver, TokioResolver};
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// After such a silence of one nameserver the next is asked beside it.
const PATIENCE: Duration = Duration::from_secs(1);

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
    /// Which of them answered last.
    answered: AtomicUsize,
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
        Ok(Self { servers, search, plain_first, rounds, each, answered: AtomicUsize::new(0) })
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
            if let Some(answer) = self.one_round(name, kind, &mut failures).await {
                return answer;
            }
        }
        // In the order of the file, whichever failed first.
        failures.sort_by_key(|(at, _)| *at);
        let failures: Vec<_> = failures.into_iter().map(|(_, failure)| failure).collect();
        Err(NameError::Failed(failures.join("; ")))
    }

    /// Asks each once at most; none if none answered.
    async fn one_round(
        &self,
        name: &Name,
        kind: RecordType,
        failures: &mut Vec<(usize, String)>,
    ) -> Option<Result<Said, NameError>> {
        let last = self.answered.load(Relaxed).min(self.servers.len().saturating_sub(1));
        let others = (0..self.servers.len()).filter(|at| *at != last);
        let mut waiting = (last..self.servers.len()).take(1).chain(others).peekable();
        let (mut asked, mut begin) = (Vec::new(), true);
        let mut next = pin!(sleep(PATIENCE));
        poll_fn(|cx| {
            loop {
                if std::mem::take(&mut begin)
                    && let Some(at) = waiting.next()
                {
                    let (_, server) = &self.servers[at];
                    asked.push((at, Box::pin(timeout(self.each, server.lookup(name.clone(), kind)))));
                    next.as_mut().reset(Instant::now() + PATIENCE);
                }
                let mut number = 0;
                while let Some((at, question)) = asked.get_mut(number) {
                    let Poll::Ready(said) = question.as_mut().poll(cx) else {
                        number += 1;
                        continue;
                    };
                    let at = *at;
                    drop(asked.swap_remove(number));
                    match understood(said.unwrap_or(Err(NetError::Timeout))) {
                        Ok(answer) => {
                            self.answered.store(at, Relaxed);
                            return Poll::Ready(Some(answer));
                        }
                        Err(error) => {
                            failures.push((at, format!("{}: {error}", self.servers[at].0)));
                            begin = true;
                        }
                    }
                }
                if waiting.peek().is_none() {
                    return if asked.is_empty() { Poll::Ready(None) } else { Poll::Pending };
                }
                if !begin && next.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                begin = true;
            }
        })
        .await
    }
}

/// What a nameserver says of the name; an error if that is no answer.
fn understood(said: Result<Lookup, NetError>) -> Result<Result<Said, NameError>, NetError> {
    let lookup = match said {
        Ok(lookup) => lookup,
        Err(error) => return denial(&error).map(Err).ok_or(error),
    };
    let records = lookup.answers();
    let addresses: Vec<IpAddr> = records.iter().filter_map(|record| record.data.ip_addr()).collect();
    if addresses.is_empty() {
        return Ok(Err(NameError::NoAddress { ttl: NEGATIVE }));
    }
    // Of the aliases on the way, too: each may change when its own time is over.
    let ttl = records.iter().map(|record| record.ttl).min().unwrap_or_default();
    Ok(Ok(Said { addresses, ttl: Duration::from_secs(ttl.into()) }))
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
