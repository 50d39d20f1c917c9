//! Looks names up, and finds out who listens on ports: by the kernel's tables, so that nothing is bound, not even for a moment.

use super::{Patient, account, files};
use crate::host::inventory::Roots;
use enclaved_core::desired::Desired;
use enclaved_core::diagnosis::network::{EndpointSeen, Holder, Listening, LowPorts, listening};
use enclaved_core::failure::Failure;
use enclaved_core::observed::Observation::Known;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// A name that takes longer is of no use to an enclave either.
const RESOLVE: Duration = Duration::from_secs(6);
/// Lookups at a time: each occupies a thread for as long as the system's resolver likes.
const LOOKUPS: usize = 32;
/// Lines of the kernel's tables of sockets are 150 bytes; hosts with many connections have long ones.
const MAX_TABLE: u64 = 64 << 20;
/// The user of the proxy, where it is not the daemon's.
const PROXY_USER: &str = "enclaved-proxy";
/// The kernel's default of net.ipv4.ip_unprivileged_port_start.
const LOW_PORTS: u16 = 1024;

/// Looks up the names of all endpoints, each name once, by `lookup` (name, port).
pub(super) async fn endpoints<F, L>(desired: &Desired, lookup: L) -> Vec<EndpointSeen>
where
    L: Fn(String, u16) -> F,
    F: Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static,
{
    // Endpoints that differ in nothing that matters here are one.
    let mut wanted: BTreeMap<(&str, u16, &[IpAddr]), Vec<String>> = BTreeMap::new();
    for (name, spec) in &desired.enclaves {
        for egress in &spec.egress {
            let enclaves = wanted.entry((&egress.hostname, egress.port, &egress.allow_addresses)).or_default();
            if !enclaves.contains(&name.to_string()) {
                enclaves.push(name.to_string());
            }
        }
    }
    let places = Arc::new(Semaphore::new(LOOKUPS));
    let deadline = Instant::now() + RESOLVE;
    let mut lookups = JoinSet::new();
    let mut found: BTreeMap<String, Result<Vec<IpAddr>, String>> = BTreeMap::new();
    let hosts: BTreeMap<&str, u16> = wanted.keys().map(|(host, port, _)| (*host, *port)).collect();
    for (host, port) in hosts {
        if let Ok(address) = host.parse::<IpAddr>() {
            found.insert(host.to_owned(), Ok(vec![address]));
            continue;
        }
        let (host, places, lookup) = (host.to_owned(), Arc::clone(&places), lookup(host.to_owned(), port));
        lookups.spawn(async move {
            let answer = timeout_at(deadline, async {
                let place = places.acquire_owned().await;
                // A task of its own: the place stays taken for as long as the lookup occupies a thread.
                let looking = tokio::spawn(async move {
                    let _place = place;
                    lookup.await
                });
                looking.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
            });
            let late = || Err(format!("no answer within {} s", RESOLVE.as_secs()));
            (host, answer.await.unwrap_or_else(|_| late()))
        });
    }
    while let Some(answered) = lookups.join_next().await {
        if let Ok((host, answer)) = answered {
            found.insert(host, answer);
        }
    }
    let seen = |((host, port, allowed), enclaves): ((&str, u16, &[IpAddr]), Vec<String>)| {
        let addresses = found.get(host).cloned().unwrap_or_else(|| Err("the lookup was cut off".to_owned()));
        let endpoint = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        EndpointSeen { endpoint, enclaves, allowed: allowed.to_vec(), addresses: Known(addresses) }
    };
    wanted.into_iter().map(seen).collect()
}

/// As the proxy looks names up: the system's resolver.
pub(super) async fn by_the_system(host: String, port: u16) -> io::Result<Vec<IpAddr>> {
    Ok(tokio::net::lookup_host((host, port)).await?.map(|address| address.ip()).collect())
}

/// Which of those users' sockets are enclaved's.
pub(super) fn own_users(roots: &Roots, daemon: Option<u32>) -> Vec<u32> {
    daemon.into_iter().chain(account::uid_of(roots, PROXY_USER)).filter(|uid| *uid != 0).collect()
}

/// Who listens on each of those addresses, in their order.
pub(super) fn holders(roots: &Roots, addresses: &[SocketAddr], own_users: &[u32]) -> Result<Vec<Holder>, Failure> {
    // Not /proc/net, which a hardened unit may not have; this is the same.
    let table = |name: &str| files::text(&roots.procfs.join("self/net").join(name), MAX_TABLE);
    let mut sockets = listening(&table("tcp")?);
    // Missing where IPv6 is off.
    sockets.extend(listening(&table("tcp6").unwrap_or_default()));
    let holder = |address: &SocketAddr| {
        let mut holders = sockets.iter().filter(|socket| socket.is_in_the_way_of(*address));
        let held = holders.by_ref().map(|socket| holder(roots, socket, own_users));
        let mut held: Vec<Holder> = held.collect();
        // Somebody else's beside our own would be news.
        held.sort_by_key(|holder| !matches!(holder, Holder::Other(_)));
        held.into_iter().next().unwrap_or(Holder::Nobody)
    };
    Ok(addresses.iter().map(holder).collect())
}

fn holder(roots: &Roots, socket: &Listening, own_users: &[u32]) -> Holder {
    match process_of(roots, socket.inode) {
        Some((_, name)) if name == "enclaved" => Holder::Enclaved,
        Some((pid, name)) => Holder::Other(format!("{name}, process {pid}")),
        // Other users' processes don't show what they hold.
        None if own_users.contains(&socket.uid) => Holder::Enclaved,
        None => Holder::Other(format!("a process of user {} (root can see which)", socket.uid)),
    }
}

/// The process that holds a socket, and its name; `None`: none that may be looked at.
fn process_of(roots: &Roots, inode: u64) -> Option<(u32, String)> {
    let link = format!("socket:[{inode}]");
    for entry in std::fs::read_dir(&roots.procfs).ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = std::fs::read_dir(entry.path().join("fd")) else { continue };
        let holds = |descriptor: &std::fs::DirEntry| {
            std::fs::read_link(descriptor.path()).is_ok_and(|target| target.as_os_str().as_bytes() == link.as_bytes())
        };
        if descriptors.flatten().any(|descriptor| holds(&descriptor)) {
            let name = files::text(&entry.path().join("comm"), 64).unwrap_or_default();
            return Some((pid, name.trim().to_owned()));
        }
    }
    None
}

/// Which ports are low, and whether the proxy may have them where the daemon starts it itself.
pub(super) fn low_ports(roots: &Roots, patient: Patient) -> LowPorts {
    let free_from = files::word(&roots.procfs.join("sys/net/ipv4/ip_unprivileged_port_start"));
    let free_from = free_from.ok().and_then(|word| word.parse().ok()).unwrap_or(LOW_PORTS);
    LowPorts { free_from, may_bind: account::may_bind_low_ports(roots, patient) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::desired::EgressSpec;
    use enclaved_core::routes::EgressLimits;
    use std::net::TcpListener;

    fn desired(endpoints: &[(&str, u16)]) -> Desired {
        let text = "[[enclave]]\nname = \"signer\"\nimage = \"file:///x\"\ncpus = 2\nmemory_mib = 64\n".to_owned();
        let mut desired =
            crate::config::parse(&[crate::config::SourceFile { path: "t.toml".into(), text }]).unwrap().desired;
        let of = |(number, (host, port)): (usize, &(&str, u16))| EgressSpec {
            hostname: (*host).to_owned(),
            port: *port,
            vsock_port: 8000 + u32::try_from(number).unwrap(),
            loopback: None,
            allow_addresses: Vec::new(),
            sni: false,
            limits: EgressLimits::default(),
        };
        desired.enclaves.values_mut().next().unwrap().egress = endpoints.iter().enumerate().map(of).collect();
        desired
    }

    #[tokio::test(start_paused = true)]
    async fn each_name_is_looked_up_once_and_one_that_never_answers_holds_up_no_other() {
        let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let lookup = move |host: String, _| {
            seen.lock().unwrap().push(host.clone());
            async move {
                match host.as_str() {
                    "dead" => std::future::pending().await,
                    "none" => Err(io::Error::other("Name or service not known")),
                    _ => Ok(vec!["52.94.0.1".parse().unwrap()]),
                }
            }
        };
        let wanted = desired(&[("kms", 443), ("kms", 80), ("dead", 1), ("none", 2), ("10.1.1.1", 3)]);
        let found = endpoints(&wanted, lookup).await;
        asked.lock().unwrap().sort();
        assert_eq!(*asked.lock().unwrap(), ["dead", "kms", "none"]);
        let of = |name: &str| found.iter().find(|seen| seen.endpoint == name).unwrap().addresses.clone();
        assert_eq!(of("dead:1"), Known(Err("no answer within 6 s".to_owned())));
        assert_eq!(of("none:2"), Known(Err("Name or service not known".to_owned())));
        for name in ["kms:443", "kms:80", "10.1.1.1:3"] {
            assert!(matches!(of(name), Known(Ok(_))), "{name}");
        }
    }

    #[test]
    fn a_port_that_this_process_holds_is_found_with_its_process_and_a_free_one_is_free() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let held = listener.local_addr().unwrap();
        let roots = Roots::default();
        let free = SocketAddr::new("127.200.7.1".parse().unwrap(), held.port());
        let holders = holders(&roots, &[held, free], &[]).unwrap();
        let Holder::Other(who) = &holders[0] else { panic!("{holders:?}") };
        assert!(who.ends_with(&format!("process {}", std::process::id())), "{who}");
        assert_eq!(holders[1], Holder::Nobody);
    }

    #[test]
    fn the_sockets_of_a_process_called_enclaved_are_its_own_and_so_are_those_of_its_users() {
        let folder = tempfile::tempdir().unwrap();
        let proc = folder.path().join("proc");
        let write = |path: &str, text: &str| {
            let path = proc.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let line = |port: &str, uid: u32, inode: u32| {
            format!("0: 00000000:{port} 00000000:0000 0A 0:0 00:00000000 0 {uid} 0 {inode} 1 0 100 0 0 10 0\n")
        };
        write("self/net/tcp", &format!("head\n{}{}{}", line("01BB", 0, 7), line("0050", 991, 8), line("0016", 5, 9)));
        write("12/comm", "enclaved\n");
        std::fs::create_dir_all(proc.join("12/fd")).unwrap();
        std::os::unix::fs::symlink("socket:[7]", proc.join("12/fd/3")).unwrap();
        let addresses = ["[::]:443", "[::]:80", "[::]:22"].map(|address| address.parse().unwrap());
        let holders = holders(&Roots::below(folder.path()), &addresses, &[991]).unwrap();
        assert_eq!(holders[..2], [Holder::Enclaved, Holder::Enclaved]);
        assert_eq!(holders[2], Holder::Other("a process of user 5 (root can see which)".to_owned()));
    }
}
