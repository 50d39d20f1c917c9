//! What goes wrong on the way, and stays where it went wrong: upstreams that are silent or slow, floods, shortages.

use crate::support::{DEADLINE, Host, Upstream, egress, soon, traffic};
use enclaved_core::routes::{Direction, LinkReply, LinkRequest, ProxyReport, Routes};
use enclaved_proxy::{Limits, Manager, Options, run_under};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// An address that answers no SYN: its queue is full, and nobody accepts.
struct BlackHole {
    address: SocketAddr,
    _queue: (StdListener, Vec<StdStream>),
}

impl BlackHole {
    fn new() -> Self {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        // A queue of one, and one more that the kernel grants.
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) = StdStream::connect_timeout(&address, Duration::from_millis(100)) {
            queue.push(stream);
            assert!(queue.len() < 16, "the queue does not fill");
        }
        Self { address, _queue: (listener, queue) }
    }
}

async fn echo(enclave: &mut UnixStream) -> std::io::Result<()> {
    enclave.write_all(b"x").await?;
    enclave.read_u8().await.map(|byte| assert_eq!(byte, b'x'))
}

#[tokio::test]
async fn an_upstream_that_swallows_everything_is_given_up_and_holds_up_no_other() {
    let host = Host::with_limits(|limits| limits.connect = Duration::from_millis(500)).await;
    let (hole, upstream) = (BlackHole::new(), Upstream::echoing().await);
    let routes = vec![egress(16, 8000, hole.address), egress(17, 8000, upstream.address)];
    host.publish(&Routes { egress: routes, ..host.routes() }).await;
    let mut swallowed = Vec::new();
    for _ in 0..50 {
        swallowed.push(host.connect_from(16, 8000).await.unwrap());
    }
    let mut enclave = host.connect_from(17, 8000).await.unwrap();
    timeout(Duration::from_millis(400), echo(&mut enclave)).await.expect("another endpoint was held up").unwrap();
    for mut enclave in swallowed {
        assert_eq!(soon("the end", enclave.read(&mut [0])).await.unwrap(), 0);
    }
    let is_hole = |traffic: &&enclaved_core::routes::TrafficReport| traffic.enclave.as_str() == "app-16";
    let report = host
        .until("all are counted", |report| {
            report.traffic.iter().find(is_hole).unwrap().failed.get("connect_timeout") == Some(&50)
        })
        .await;
    let hole = report.traffic.iter().find(is_hole).unwrap();
    assert_eq!(hole.connects.counts.iter().sum::<u64>(), 50);
}

#[tokio::test]
async fn a_sender_whose_peer_reads_nothing_is_stalled_and_other_connections_are_not() {
    let host = Host::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let routes = vec![egress(16, 8000, listener.local_addr().unwrap())];
    host.publish(&Routes { egress: routes, ..host.routes() }).await;
    let mut floods = JoinSet::new();
    let mut unread = Vec::new();
    for _ in 0..10 {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        unread.push(soon("the connection", listener.accept()).await.unwrap());
        floods.spawn(async move {
            let (chunk, mut taken) = (vec![0; 1 << 20], 0);
            while let Ok(written) = timeout(Duration::from_millis(500), enclave.write(&chunk)).await {
                taken += written.unwrap();
                assert!(taken < 64 << 20, "{taken} bytes were taken that nobody reads");
            }
            enclave
        });
    }
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let (mut upstream, _) = soon("the connection beside the floods", listener.accept()).await.unwrap();
    enclave.write_all(b"x").await.unwrap();
    assert_eq!(soon("a byte beside the floods", upstream.read_u8()).await.unwrap(), b'x');
    let flooding = soon("the stalls", floods.join_all()).await;
    assert_eq!(flooding.len(), 10);
    // What was taken arrives when it is read at last.
    let (mut upstream, _) = unread.remove(0);
    let mut read = vec![0; 1 << 20];
    soon("what was held", upstream.read_exact(&mut read)).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_closed_its_direction_and_vanished_is_not_waited_for_forever() {
    let host = Host::with_limits(|limits| limits.relay_half_closed = Duration::from_millis(200)).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    host.publish(&Routes { egress: vec![egress(16, 8000, listener.local_addr().unwrap())], ..host.routes() }).await;
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    enclave.shutdown().await.unwrap();
    assert_eq!(soon("the enclave's end", upstream.read(&mut [0])).await.unwrap(), 0);
    let error = soon("the cut", upstream.read_u8()).await;
    // The end of the enclave's direction was read before; what comes now is the reset.
    assert!(error.is_err());
    host.until("it is counted", |report| traffic(report, Direction::Egress).failed.get("idle") == Some(&1)).await;
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_counted_and_those_below_it_served() {
    let host = Host::with_limits(|limits| limits.egress_connections = 20).await;
    let upstream = Upstream::echoing().await;
    host.publish(&Routes { egress: vec![egress(16, 8000, upstream.address)], ..host.routes() }).await;
    let mut served = Vec::new();
    for _ in 0..20 {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        soon("an echo", echo(&mut enclave)).await.unwrap();
        served.push(enclave);
    }
    for _ in 0..200 {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        assert_eq!(soon("the end", enclave.read(&mut [0])).await.unwrap_or(0), 0);
    }
    let report = host.report().await;
    let counted = traffic(&report, Direction::Egress);
    assert_eq!((counted.failed["limit"], counted.open), (200, 20));
    for enclave in &mut served {
        soon("an echo of one that was served before", echo(enclave)).await.unwrap();
    }
    drop(served);
    host.until("there is room", |report| traffic(report, Direction::Egress).open == 0).await;
    soon("an echo", echo(&mut host.connect_from(16, 8000).await.unwrap())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_short_connections_leave_nothing_behind() {
    let host = Host::new().await;
    // Unlike the other stand-ins it forgets its connections, too.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut upstream = JoinSet::new();
    upstream.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                drop(tokio::io::copy(&mut reader, &mut writer).await);
            });
        }
    });
    host.publish(&Routes { egress: vec![egress(16, 8000, address)], ..host.routes() }).await;
    let path = host.vsock().join("16.sock_8000");
    let round = async |count: usize| {
        let mut clients = JoinSet::new();
        for _ in 0..8 {
            let path = path.clone();
            clients.spawn(async move {
                for _ in 0..count / 8 {
                    echo(&mut UnixStream::connect(&path).await.unwrap()).await.unwrap();
                }
            });
        }
        timeout(DEADLINE, clients.join_all()).await.expect("thousands of connections took too long");
        host.until("all have ended", |report| traffic(report, Direction::Egress).open == 0).await;
        (descriptors(), resident_kib())
    };
    let before = round(400).await;
    let after = round(2_000).await;
    assert!(after.0 <= before.0 + 8, "descriptors: {} before, {} after", before.0, after.0);
    assert!(after.1 <= before.1 + 1024, "memory: {} KiB before, {} KiB after", before.1, after.1);
    assert_eq!(traffic(&host.report().await, Direction::Egress).total, 2_400);
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// In the environment of the proxy's own process, its directory.
const FEW: &str = "ENCLAVED_TEST_FEW_DESCRIPTORS";
/// A proxy needs some twenty for itself.
const DESCRIPTORS: u64 = 48;

#[tokio::test]
async fn without_descriptors_accepting_pauses_is_counted_and_goes_on_when_there_are_some_again() {
    if let Some(dir) = std::env::var_os(FEW) {
        return with_few_descriptors(dir.into()).await;
    }
    let host = Host::without_proxy();
    // The limit is a process's, so the proxy has one of its own: this very test.
    let this = std::env::current_exe().unwrap();
    let name = "faults::without_descriptors_accepting_pauses_is_counted_and_goes_on_when_there_are_some_again";
    let mut proxy = tokio::process::Command::new(this);
    proxy.args(["--exact", name, "--nocapture"]).env(FEW, host.options().state_dir.parent().unwrap());
    let _proxy = proxy.kill_on_drop(true).stdout(std::process::Stdio::null()).spawn().unwrap();
    let upstream = Upstream::echoing().await;
    let began = Instant::now();
    while UnixStream::connect(host.options().link).await.is_err() {
        assert!(began.elapsed() < DEADLINE, "the proxy has no link");
        sleep(Duration::from_millis(10)).await;
    }
    // Kept open, since a new one may not be accepted.
    let mut link = BufReader::new(host.link().await);
    let routes = Routes { egress: vec![egress(16, 8000, upstream.address)], ..host.routes() };
    ask(&mut link, &LinkRequest::Publish { routes }).await;
    let mut first = host.connect_from(16, 8000).await.unwrap();
    soon("an echo", echo(&mut first)).await.unwrap();
    let mut crowd = Vec::new();
    for _ in 0..60 {
        crowd.push(host.connect_from(16, 8000).await.unwrap());
    }
    let began = Instant::now();
    while ask(&mut link, &LinkRequest::Report).await.accept_errors == 0 {
        assert!(began.elapsed() < DEADLINE, "the shortage is not reported");
        sleep(Duration::from_millis(20)).await;
    }
    soon("an echo of a connection that was there before", echo(&mut first)).await.unwrap();
    drop(crowd);
    let began = Instant::now();
    loop {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        if let Ok(Ok(())) = timeout(Duration::from_secs(1), echo(&mut enclave)).await {
            break;
        }
        assert!(began.elapsed() < DEADLINE, "nothing is served though there is room again");
    }
    soon("an echo at last", echo(&mut first)).await.unwrap();
}

async fn ask(link: &mut BufReader<UnixStream>, request: &LinkRequest) -> ProxyReport {
    link.write_all(&serde_json::to_vec(request).unwrap()).await.unwrap();
    link.write_all(b"\n").await.unwrap();
    let mut line = String::new();
    soon("the answer on the link", link.read_line(&mut line)).await.unwrap();
    match serde_json::from_str(&line).unwrap() {
        LinkReply::Report(report) => report,
        LinkReply::Refused { reason } => panic!("refused: {reason}"),
    }
}

async fn with_few_descriptors(dir: PathBuf) {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let few = Some(DESCRIPTORS);
    setrlimit(Resource::Nofile, Rlimit { current: few, maximum: few }).unwrap();
    let options = Options { state_dir: dir.join("state"), link: dir.join("link") };
    // Ended with its parent's test, or after a while without it.
    let proxy = run_under(Manager::none(), options, Limits::default(), CancellationToken::new());
    drop(timeout(DEADLINE * 3, proxy).await);
}

#[tokio::test]
async fn a_name_is_resolved_before_anything_connects_and_its_state_is_reported() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    let mut known = egress(16, 8000, upstream.address);
    known.hostname = "localhost".to_owned();
    let mut unknown = egress(17, 8000, upstream.address);
    unknown.hostname = "does-not-exist.invalid".to_owned();
    host.publish(&Routes { egress: vec![known.clone(), unknown], ..host.routes() }).await;
    let name = |report: &ProxyReport, of: &str| report.names.iter().find(|name| name.hostname == of).cloned();
    let report =
        host.until("it resolves", |report| name(report, "localhost").is_some_and(|name| name.addresses > 0)).await;
    let localhost = name(&report, "localhost").unwrap();
    assert!(!localhost.stale && localhost.error.is_none() && localhost.answer_age_seconds < Some(20), "{localhost:?}");
    soon("an echo", echo(&mut host.connect_from(16, 8000).await.unwrap())).await.unwrap();
    // Whether there is a nameserver here or none: that name has no address.
    let mut enclave = host.connect_from(17, 8000).await.unwrap();
    assert_eq!(soon("the end", enclave.read(&mut [0])).await.unwrap(), 0);
    let report = host.report().await;
    let failed = report.traffic.iter().find(|traffic| traffic.enclave.as_str() == "app-17").unwrap();
    assert_eq!(failed.failed["dns"], 1);
    // A name that no route holds is not kept.
    host.publish(&Routes { egress: vec![known], ..host.routes() }).await;
    host.until("it is forgotten", |report| report.names.len() == 1).await;
}

#[tokio::test]
async fn an_upstream_that_resets_in_the_middle_of_a_flood_ends_that_connection_alone() {
    let host = Host::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    host.publish(&Routes { egress: vec![egress(16, 8000, listener.local_addr().unwrap())], ..host.routes() }).await;
    let mut kept = host.connect_from(16, 8000).await.unwrap();
    let (mut kept_upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    for _ in 0..20 {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        let (mut upstream, _): (TcpStream, _) = soon("the connection", listener.accept()).await.unwrap();
        let flood = tokio::spawn(async move {
            let chunk = vec![0; 1 << 16];
            loop {
                if let Err(error) = enclave.write_all(&chunk).await {
                    return error.kind();
                }
            }
        });
        upstream.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
        upstream.set_zero_linger().unwrap();
        drop(upstream);
        let kind = soon("the end of the flood", flood).await.unwrap();
        assert!(matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{kind}");
    }
    kept.write_all(b"x").await.unwrap();
    assert_eq!(soon("a byte of the other connection", kept_upstream.read_u8()).await.unwrap(), b'x');
}

/// A file that whoever reads it waits for: a disk that hangs. Until dropped.
struct HangingFile(PathBuf);

impl HangingFile {
    fn new(path: PathBuf) -> Self {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        Self(path)
    }
}

impl Drop for HangingFile {
    fn drop(&mut self) {
        // Whoever waits gets the end of an empty file.
        drop(std::fs::OpenOptions::new().read(true).write(true).open(&self.0));
    }
}

#[tokio::test]
async fn a_disk_that_hangs_while_certificates_are_made_holds_up_https_alone() {
    let host = Host::with_limits(|limits| limits.settle = Duration::from_millis(100)).await;
    let upstream = Upstream::echoing().await;
    std::fs::create_dir(host.state("ca")).unwrap();
    let hanging = HangingFile::new(host.state("ca/root.key"));
    let mut routes = host.site(&["a.test"], Some(16));
    for vsock_port in [8000, 8001, 8002] {
        routes.egress = vec![egress(16, vsock_port, upstream.address)];
        let began = Instant::now();
        let report = host.publish(&routes).await;
        assert!(began.elapsed() < Duration::from_secs(5), "publishing waited for the disk");
        let open = report.listeners.iter().filter(|listener| listener.error.is_none()).count();
        assert_eq!((report.listeners.len(), open), (2, 1), "{:?}", report.listeners);
        soon("an echo", echo(&mut host.connect_from(16, vsock_port).await.unwrap())).await.unwrap();
    }
    drop(hanging);
    host.until("HTTPS is open", |report| report.listeners.iter().all(|listener| listener.error.is_none())).await;
}
