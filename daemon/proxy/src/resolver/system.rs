//! Names as this host resolves them: the hosts file first, then the nameservers of resolv.conf (`nameservers`).
//! /etc/nsswitch.conf is not read: what else a host may have there (mDNS, LDAP) does not know the world's services.
//! Both files are read again when they changed, which is looked at before each question; what was read before stays in force
//! while a file can't be read, and a resolv.conf that can't be used (it is being written, or names no nameserver) leaves the
//! former in force, too. Nothing is remembered here of what was said.

use super::nameservers::Nameservers;
use super::{Asking, NameError, Said, Source};
use hickory_resolver::config::{NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::system_conf;
use std::collections::HashMap;
use std::io::ErrorKind::NotFound;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long an answer of the hosts file is good: a name that is taken out of it is soon asked for elsewhere.
const OF_HOSTS: Duration = Duration::from_secs(10);
/// Longest file that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The host's way to resolve names.
#[derive(Debug)]
pub(super) struct System {
    resolv_conf: PathBuf,
    hosts: PathBuf,
    /// The nameservers' port, where it is not 53.
    port: Option<u16>,
    /// How files are read.
    read: fn(&Path) -> std::io::Result<String>,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// The files that were read, or found to make no sense; those that could not be read are tried again.
    resolv_conf: Stamp,
    hosts: Stamp,
    /// The files that were told of last: see [`Source::changed`]. Nothing before the first question.
    told: Option<(Stamp, Stamp)>,
    nameservers: Option<Arc<Nameservers>>,
    by_name: HashMap<String, Vec<IpAddr>>,
    hosts_trouble: Option<String>,
    trouble: Option<String>,
    /// The resolv.conf could not be read at the last question.
    unread: bool,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("hosts", &self.by_name).field("trouble", &self.trouble).finish_non_exhaustive()
    }
}

/// Which file it is, and which state of it: device, inode, size, times. Nothing where there is none, or none was looked at.
type Stamp = Option<(u64, u64, u64, [i64; 4])>;

fn stamp(path: &Path) -> Stamp {
    let found = std::fs::metadata(path).ok()?;
    let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
    Some((found.dev(), found.ino(), found.len(), times))
}

/// Why a resolv.conf can't be used.
enum Unusable {
    /// It could not be read, which says nothing of what stands in it.
    Unread(String),
    /// It says nothing that can be used, and will not until it changes.
    Senseless(String),
}

impl System {
    pub(super) fn new(resolv_conf: impl Into<PathBuf>, hosts: impl Into<PathBuf>, port: Option<u16>) -> Self {
        let (resolv_conf, hosts) = (resolv_conf.into(), hosts.into());
        Self { resolv_conf, hosts, port, read, loaded: Mutex::default() }
    }

    /// What the files say now.
    fn current(&self) -> MutexGuard<'_, Loaded> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        // The stamps are those of before the files are read: a later change is seen at the next question.
        let (hosts, resolv_conf) = (stamp(&self.hosts), stamp(&self.resolv_conf));
        loaded.told.get_or_insert((hosts, resolv_conf));
        if hosts != loaded.hosts {
            self.load_hosts(&mut loaded, hosts);
        }
        if resolv_conf != loaded.resolv_conf || loaded.nameservers.is_none() {
            self.load_resolv_conf(&mut loaded, resolv_conf);
        }
        loaded
    }

    fn load_hosts(&self, loaded: &mut Loaded, seen: Stamp) {
        let by_name = match (self.read)(&self.hosts) {
            Ok(text) => parse_hosts(&text),
            Err(error) if error.kind() == NotFound => HashMap::new(),
            Err(error) => {
                let trouble = format!("{} can't be read: {error}", self.hosts.display());
                if loaded.hosts_trouble.as_ref() != Some(&trouble) {
                    tracing::warn!("{trouble}; what was read of it before stays in force");
                }
                loaded.hosts_trouble = Some(trouble);
                return;
            }
        };
        (loaded.by_name, loaded.hosts) = (by_name, seen);
        if loaded.hosts_trouble.take().is_some() {
            // It was told of when it could not be read yet.
            loaded.told = Some((None, None));
        }
    }

    fn load_resolv_conf(&self, loaded: &mut Loaded, seen: Stamp) {
        let trouble = match self.nameservers(loaded.nameservers.is_some()) {
            Ok(nameservers) => {
                (loaded.nameservers, loaded.resolv_conf) = (Some(Arc::new(nameservers)), seen);
                loaded.trouble = None;
                if std::mem::take(&mut loaded.unread) {
                    loaded.told = Some((None, None));
                }
                return;
            }
            Err(Unusable::Unread(trouble)) => {
                loaded.unread = true;
                trouble
            }
            Err(Unusable::Senseless(trouble)) => {
                (loaded.resolv_conf, loaded.unread) = (seen, false);
                trouble
            }
        };
        let trouble = format!("{} can't be used: {trouble}", self.resolv_conf.display());
        if loaded.trouble.as_ref() != Some(&trouble) {
            tracing::warn!(kept_former = loaded.nameservers.is_some(), "{trouble}");
        }
        loaded.trouble = Some(trouble);
    }

    fn nameservers(&self, there_is_a_former: bool) -> Result<Nameservers, Unusable> {
        let senseless = |error: &dyn std::fmt::Display| Unusable::Senseless(error.to_string());
        let parsed = match (self.read)(&self.resolv_conf) {
            Err(error) if error.kind() == NotFound => None,
            Err(error) => return Err(Unusable::Unread(error.to_string())),
            Ok(text) => match system_conf::parse_resolv_conf(&text) {
                Ok(parsed) => Some(parsed),
                Err(error) if there_is_a_former || text.contains("nameserver") => return Err(senseless(&error)),
                Err(_) => None,
            },
        };
        // Without a nameserver in the file, or without a file, it is this host: resolv.conf(5).
        let (config, options) = match parsed {
            Some(parsed) => parsed,
            None if there_is_a_former => return Err(senseless(&"it is gone")),
            None => {
                let this_host = vec![NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into())];
                (ResolverConfig::from_parts(None, Vec::new(), this_host), ResolverOpts::default())
            }
        };
        Nameservers::new(&config, options, self.port).map_err(|error| senseless(&error))
    }

    async fn resolve(&self, hostname: &str) -> Result<Said, NameError> {
        let nameservers = {
            let loaded = self.current();
            let name = hostname.trim_end_matches('.').to_ascii_lowercase();
            if let Some(addresses) = loaded.by_name.get(&name) {
                return Ok(Said { addresses: addresses.clone(), ttl: OF_HOSTS });
            }
            let none = || NameError::Failed(loaded.trouble.clone().unwrap_or_default());
            loaded.nameservers.clone().ok_or_else(none)?
        };
        nameservers.ask(hostname).await
    }
}

impl Source for System {
    fn ask<'a>(&'a self, hostname: &'a str) -> Asking<'a> {
        Box::pin(self.resolve(hostname))
    }

    fn changed(&self) -> bool {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (stamp(&self.hosts), stamp(&self.resolv_conf));
        // Before the first question there is nothing that could be asked again.
        loaded.told.as_mut().is_some_and(|told| std::mem::replace(told, now) != now)
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// hosts(5): an address, its names, `#` and what follows is left out. A line that makes no sense is left out, too.
fn parse_hosts(text: &str) -> HashMap<String, Vec<IpAddr>> {
    let mut by_name: HashMap<String, Vec<IpAddr>> = HashMap::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) else { continue };
        for name in words {
            let addresses = by_name.entry(name.trim_end_matches('.').to_ascii_lowercase()).or_default();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    by_name
}

#[cfg(test)]
mod tests;
