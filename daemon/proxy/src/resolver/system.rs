//! Names as this host resolves them: the hosts file first, then the nameservers of resolv.conf, with its search domains and
//! options. /etc/nsswitch.conf is not read: what else a host may have there (mDNS, LDAP) does not know the world's services.
//! Both files are read again when they changed, which is looked at before each question; a resolv.conf that can't be used (it is
//! being written, or names no nameserver) leaves the former in force. Nothing is remembered here of what was said.

use super::{Asking, NameError, Said, Source};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use hickory_resolver::{Resolver, TokioResolver, system_conf};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;

/// Once one address family is known, the other may take this much longer: where a network drops questions for AAAA, they
/// are not waited for.
const OTHER_FAMILY: Duration = Duration::from_millis(300);
/// For how long an answer of one family alone is good when the other was late.
const HALF: Duration = Duration::from_secs(5);
/// How long an answer of the hosts file is good: a name that is taken out of it is soon asked for elsewhere.
const OF_HOSTS: Duration = Duration::from_secs(10);
/// Where a negative answer says nothing of how long it is good.
const NEGATIVE: Duration = Duration::from_secs(5);
/// Longest file that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The host's way to resolve names.
#[derive(Debug)]
pub(super) struct System {
    resolv_conf: PathBuf,
    hosts: PathBuf,
    /// The nameservers' port, where it is not 53.
    port: Option<u16>,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    resolv_conf: Stamp,
    hosts: Stamp,
    resolver: Option<TokioResolver>,
    by_name: HashMap<String, Vec<IpAddr>>,
    trouble: Option<String>,
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

impl System {
    pub(super) fn new(resolv_conf: impl Into<PathBuf>, hosts: impl Into<PathBuf>, port: Option<u16>) -> Self {
        Self { resolv_conf: resolv_conf.into(), hosts: hosts.into(), port, loaded: Mutex::default() }
    }

    /// What the files say now.
    fn current(&self) -> MutexGuard<'_, Loaded> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let hosts = stamp(&self.hosts);
        if hosts != loaded.hosts {
            // One that can't be read holds nothing, as one that is not there.
            loaded.by_name = read(&self.hosts).map(|text| parse_hosts(&text)).unwrap_or_default();
            loaded.hosts = hosts;
        }
        let resolv_conf = stamp(&self.resolv_conf);
        if resolv_conf != loaded.resolv_conf || loaded.resolver.is_none() {
            loaded.resolv_conf = resolv_conf;
            match self.load(loaded.resolver.is_some()) {
                Ok(resolver) => (loaded.resolver, loaded.trouble) = (Some(resolver), None),
                Err(trouble) => {
                    let path = self.resolv_conf.display();
                    let trouble = format!("{path} can't be used: {trouble}");
                    if loaded.trouble.as_ref() != Some(&trouble) {
                        tracing::warn!(kept_former = loaded.resolver.is_some(), "{trouble}");
                    }
                    loaded.trouble = Some(trouble);
                }
            }
        }
        loaded
    }

    fn load(&self, there_is_a_former: bool) -> Result<TokioResolver, String> {
        let parsed = match read(&self.resolv_conf) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.to_string()),
            Ok(text) => match system_conf::parse_resolv_conf(&text) {
                Ok(parsed) => Some(parsed),
                Err(error) if there_is_a_former || text.contains("nameserver") => return Err(error.to_string()),
                Err(_) => None,
            },
        };
        // Without a nameserver in the file, or without a file, it is this host: resolv.conf(5).
        let (config, mut options) = match parsed {
            Some(parsed) => parsed,
            None if there_is_a_former => return Err("it is gone".to_owned()),
            None => (
                ResolverConfig::from_parts(
                    None,
                    Vec::new(),
                    vec![NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into())],
                ),
                hickory_resolver::config::ResolverOpts::default(),
            ),
        };
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let config = match self.port {
            Some(port) => at_port(&config, port),
            None => config,
        };
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        builder.build().map_err(|error| error.to_string())
    }

    async fn resolve(&self, hostname: &str) -> Result<Said, NameError> {
        let resolver = {
            let loaded = self.current();
            let name = hostname.trim_end_matches('.').to_ascii_lowercase();
            if let Some(addresses) = loaded.by_name.get(&name) {
                return Ok(Said { addresses: addresses.clone(), ttl: OF_HOSTS });
            }
            let none = || NameError::Failed(loaded.trouble.clone().unwrap_or_default());
            loaded.resolver.clone().ok_or_else(none)?
        };
        let family = |kind| {
            let (resolver, hostname) = (resolver.clone(), hostname.to_owned());
            Box::pin(async move { one_family(&resolver, &hostname, kind).await })
        };
        let (mut v6, mut v4) = (family(RecordType::AAAA), family(RecordType::A));
        // Both are answers of nothing but themselves, so whichever comes first decides how long the other is waited for.
        let (first, second) = tokio::select! {
            // Cancel-safe: both live on outside of this.
            first = &mut v6 => (first, v4),
            first = &mut v4 => (first, v6),
        };
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
}

impl Source for System {
    fn ask<'a>(&'a self, hostname: &'a str) -> Asking<'a> {
        Box::pin(self.resolve(hostname))
    }

    fn changed(&self) -> bool {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let known = loaded.hosts.is_some() || loaded.resolv_conf.is_some();
        known && (stamp(&self.hosts) != loaded.hosts || stamp(&self.resolv_conf) != loaded.resolv_conf)
    }
}

async fn one_family(resolver: &TokioResolver, hostname: &str, kind: RecordType) -> Result<Said, NameError> {
    let lookup = resolver.lookup(hostname, kind).await.map_err(|error| name_error(&error))?;
    let addresses: Vec<IpAddr> = lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect();
    if addresses.is_empty() {
        return Err(NameError::NoAddress { ttl: NEGATIVE });
    }
    // Of the aliases on the way, too: each may change when its own time is over.
    let ttl = lookup.answers().iter().map(|record| record.ttl).min().unwrap_or_default();
    Ok(Said { addresses, ttl: Duration::from_secs(ttl.into()) })
}

fn name_error(error: &NetError) -> NameError {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => {
            let ttl = none.negative_ttl.map_or(NEGATIVE, |ttl| Duration::from_secs(ttl.into()));
            match none.response_code {
                ResponseCode::NXDomain => NameError::NoSuchName { ttl },
                ResponseCode::NoError => NameError::NoAddress { ttl },
                code => NameError::Failed(format!("the nameservers answered {code}")),
            }
        }
        error => NameError::Failed(error.to_string()),
    }
}

fn at_port(config: &ResolverConfig, port: u16) -> ResolverConfig {
    let servers = config.name_servers().iter().map(|server| {
        let at = |mut connection: ConnectionConfig| {
            connection.port = port;
            connection
        };
        let mut server = server.clone();
        server.connections = server.connections.into_iter().map(at).collect();
        server
    });
    ResolverConfig::from_parts(config.domain().cloned(), config.search().to_vec(), servers.collect())
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
mod tests {
    use super::*;
    use crate::resolver::Resolver as Names;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use tempfile::TempDir;
    use tokio::net::UdpSocket;
    use tokio::task::JoinHandle;
    use tokio::time::sleep;

    /// What a nameserver does with a question.
    #[derive(Debug, Clone)]
    enum Does {
        /// Answers with these addresses and this TTL; with nothing where none is of the family that is asked for.
        Answers(&'static [&'static str], u32),
        /// Says that there is no such name.
        Denies,
        /// Says that something is wrong with it.
        Fails,
        /// Says nothing.
        KeepsSilent,
        /// Answers the second question of all, of whichever family, this much later.
        IsSlow(Duration),
        /// Says nothing when asked for AAAA.
        DropsIpv6,
    }

    /// A nameserver on a port of its own, and the files of a host that asks it.
    struct Server {
        does: Arc<Mutex<Does>>,
        questions: Arc<AtomicUsize>,
        dir: TempDir,
        port: u16,
        task: JoinHandle<()>,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    impl Server {
        async fn start(does: Does) -> Self {
            let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
            let port = socket.local_addr().unwrap().port();
            let (does, questions) = (Arc::new(Mutex::new(does)), Arc::new(AtomicUsize::new(0)));
            let (doing, counted) = (does.clone(), questions.clone());
            let task = tokio::spawn(async move {
                let mut packet = [0; 1500];
                loop {
                    let (length, from) = socket.recv_from(&mut packet).await.unwrap();
                    counted.fetch_add(1, SeqCst);
                    let does = doing.lock().unwrap().clone();
                    let (question, socket) = (packet[..length].to_vec(), socket.clone());
                    tokio::spawn(async move {
                        if let Some(answer) = answer(&question, &does).await {
                            socket.send_to(&answer, from).await.unwrap();
                        }
                    });
                }
            });
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("hosts"), "").unwrap();
            let server = Self { does, questions, dir, port, task };
            server.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n");
            server
        }

        fn set(&self, does: Does) {
            *self.does.lock().unwrap() = does;
        }

        /// Replaces a file of the host, as tools do: another file takes its name.
        fn write(&self, name: &str, text: &str) {
            let new = self.dir.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, self.dir.path().join(name)).unwrap();
        }

        fn system(&self) -> System {
            System::new(self.dir.path().join("resolv.conf"), self.dir.path().join("hosts"), Some(self.port))
        }
    }

    async fn answer(question: &[u8], does: &Does) -> Option<Vec<u8>> {
        // Header of 12 bytes, the name up to its zero, type and class; what follows (EDNS) is left out of the answer.
        let end = 12 + question[12..].iter().position(|byte| *byte == 0)? + 5;
        let v6 = question[end - 4..end - 2] == [0, 28];
        let (addresses, ttl, code): (&[&str], u32, u8) = match does {
            Does::Answers(addresses, ttl) => (addresses, *ttl, 0),
            Does::Denies => (&[], 0, 3),
            Does::Fails => (&[], 0, 2),
            Does::KeepsSilent => return None,
            Does::IsSlow(time) => {
                sleep(*time).await;
                (&["10.0.0.1", "2600::1"], 60, 0)
            }
            Does::DropsIpv6 if v6 => return None,
            Does::DropsIpv6 => (&["10.0.0.1"], 60, 0),
        };
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let addresses: Vec<_> = addresses.into_iter().filter(|address| address.is_ipv6() == v6).collect();
        let mut answer = question[..end].to_vec();
        answer[2..4].copy_from_slice(&[0x81, 0x80 | code]);
        answer[6..12].copy_from_slice(&[0, u8::try_from(addresses.len()).unwrap(), 0, 0, 0, 0]);
        for address in addresses {
            let bytes = match address {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            answer.extend_from_slice(&[0xc0, 12, 0, if v6 { 28 } else { 1 }, 0, 1]);
            answer.extend_from_slice(&ttl.to_be_bytes());
            answer.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
            answer.extend_from_slice(&bytes);
        }
        Some(answer)
    }

    fn said(addresses: &[&str], ttl: u64) -> Result<Said, NameError> {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Ok(Said { addresses, ttl: Duration::from_secs(ttl) })
    }

    #[tokio::test]
    async fn both_families_are_asked_for_and_the_shorter_ttl_counts() {
        let server = Server::start(Does::Answers(&["10.0.0.1", "2600::1", "10.0.0.2"], 7)).await;
        let system = server.system();
        assert_eq!(system.resolve("db.example.com").await, said(&["2600::1", "10.0.0.1", "10.0.0.2"], 7));
        assert_eq!(server.questions.load(SeqCst), 2);
        server.set(Does::Answers(&["10.0.0.3"], 60));
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.3"], 60));
    }

    #[tokio::test]
    async fn that_there_is_no_such_name_is_told_from_a_name_without_addresses_and_from_no_answer() {
        let server = Server::start(Does::Denies).await;
        let system = server.system();
        let asked = system.resolve("db.example.com").await.unwrap_err();
        assert!(matches!(asked, NameError::NoSuchName { .. }), "{asked:?}");
        server.set(Does::Answers(&[], 60));
        let asked = system.resolve("db.example.com").await.unwrap_err();
        assert!(matches!(asked, NameError::NoAddress { .. }), "{asked:?}");
        for does in [Does::Fails, Does::KeepsSilent] {
            server.set(does);
            let asked = system.resolve("db.example.com").await.unwrap_err();
            assert!(matches!(asked, NameError::Failed(_)), "{asked:?}");
        }
    }

    #[tokio::test]
    async fn a_network_that_drops_questions_for_ipv6_holds_nothing_up_for_long() {
        let server = Server::start(Does::DropsIpv6).await;
        let asked = timeout(Duration::from_millis(900), server.system().resolve("db.example.com")).await;
        assert_eq!(asked.expect("the dropped question was waited for"), said(&["10.0.0.1"], HALF.as_secs()));
    }

    #[tokio::test]
    async fn the_hosts_file_comes_first_and_each_change_of_it_counts() {
        let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
        let system = server.system();
        assert!(!system.changed(), "nothing was asked yet");
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
        server.write("hosts", "10.7.7.7 db.example.com\n");
        assert!(system.changed());
        assert_eq!(system.resolve("DB.example.com.").await, said(&["10.7.7.7"], OF_HOSTS.as_secs()));
        assert!(!system.changed());
        std::fs::remove_file(server.dir.path().join("hosts")).unwrap();
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
    }

    #[tokio::test]
    async fn a_new_resolv_conf_is_used_and_one_that_is_being_written_is_not() {
        let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
        // Nobody answers on that address.
        server.write("resolv.conf", "nameserver 127.0.0.2\noptions timeout:1 attempts:1\n");
        let system = server.system();
        assert!(matches!(system.resolve("db.example.com").await, Err(NameError::Failed(_))));
        server.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n");
        assert!(system.changed());
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
        for broken in ["", "# nameserver 127.0.0.2\n", "nameserver nonsense\n"] {
            server.write("resolv.conf", broken);
            assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60), "{broken:?}");
        }
        std::fs::remove_file(server.dir.path().join("resolv.conf")).unwrap();
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60), "without the file");
    }

    #[tokio::test]
    async fn a_slow_nameserver_delays_the_first_connection_alone_and_a_dead_one_none() {
        let server = Server::start(Does::IsSlow(Duration::from_millis(300))).await;
        let names = Names::asking(server.system());
        let name = names.name("db.example.com");
        let patience = Duration::from_secs(5);
        let began = std::time::Instant::now();
        assert_eq!(name.addresses(patience).await.unwrap().len(), 2);
        assert!(began.elapsed() >= Duration::from_millis(300));
        server.set(Does::KeepsSilent);
        server.write("resolv.conf", "nameserver 127.0.0.2\n");
        names.look();
        for _ in 0..100 {
            let began = std::time::Instant::now();
            assert_eq!(name.addresses(patience).await.unwrap().len(), 2);
            assert!(began.elapsed() < Duration::from_millis(100), "a connection waited for a dead nameserver");
        }
    }

    #[test]
    fn a_hosts_file_is_read_as_far_as_it_makes_sense() {
        let text = "127.0.0.1 localhost\n# 10.0.0.9 no\n10.0.0.1\tDB.example.com. db # primary\n::1 localhost\nnonsense db\n10.0.0.1 db\nfe80::1%eth0 x\n";
        let hosts = parse_hosts(text);
        let of = |name: &str| hosts.get(name).map(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(of("localhost").unwrap(), ["127.0.0.1", "::1"]);
        assert_eq!(of("db.example.com").unwrap(), ["10.0.0.1"]);
        assert_eq!(of("db").unwrap(), ["10.0.0.1"]);
        assert_eq!((of("no"), of("x")), (None, None));
    }
}
