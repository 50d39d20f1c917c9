//! A proxy that is stopped, replaced and killed under a service manager that keeps its sockets: nobody who connects is
//! refused.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed; helpers are tests, too")]

mod https;

use enclaved_core::id::Cid;
use enclaved_core::routes::{
    EgressLimits, EgressRoute, LinkReply, LinkRequest, ProxyReport, ROUTES_FORMAT, Routes, TcpRoute, TcpRules,
    VsockTransport,
};
use enclaved_integration::binaries;
use enclaved_integration::service_manager::ServiceManager;
use rustix::fd::OwnedFd;
use rustix::process::Signal;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{JoinSet, block_in_place};
use tokio::time::{sleep, timeout};

const DEADLINE: Duration = Duration::from_secs(20);

/// A proxy under a service manager, an enclave and an upstream that both give back what they get.
struct Host {
    manager: ServiceManager,
    upstream: SocketAddr,
    folder: TempDir,
    _echoes: JoinSet<()>,
}

impl Host {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("vsock")).unwrap();
        let program = binaries::find("enclaved").unwrap();
        let (state, link) = (folder.path().join("state"), folder.path().join("link"));
        let mut command = vec![program.into_os_string(), "proxy".into(), "--drain".into(), "1s".into()];
        command.extend(["--state-dir".into(), state.into(), "--link".into(), link.into()]);
        let manager = ServiceManager::new(folder.path(), command).unwrap();

        let mut echoes = JoinSet::new();
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = upstream.local_addr().unwrap();
        echoes.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = upstream.accept().await {
                connections.spawn(echo(BufReader::new(stream)));
            }
        });
        let enclave = UnixListener::bind(folder.path().join("vsock/16.sock")).unwrap();
        echoes.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = enclave.accept().await {
                connections.spawn(async move {
                    let (mut stream, mut line) = (BufReader::new(stream), String::new());
                    if stream.read_line(&mut line).await.is_ok() && stream.write_all(b"OK 1\n").await.is_ok() {
                        match line.strip_prefix("CONNECT ").map(str::trim_end) {
                            Some(https::PORT) => https::serve(stream).await,
                            _ => echo(stream).await,
                        }
                    }
                });
            }
        });
        Self { manager, upstream: address, folder, _echoes: echoes }
    }

    fn start(&mut self) {
        block_in_place(|| self.manager.start()).unwrap();
    }

    fn end(&mut self, signal: Signal) -> std::process::ExitStatus {
        block_in_place(|| self.manager.end(signal)).unwrap()
    }

    fn wait_until(&self, what: &str, holds: impl Fn(&[String], &[&str]) -> bool) {
        block_in_place(|| self.manager.wait_until(what, holds)).unwrap();
    }

    fn routes(&self) -> Routes {
        let enclave: enclaved_core::id::EnclaveName = "signer".parse().unwrap();
        let mut routes = Routes { format: ROUTES_FORMAT, ..Routes::default() };
        routes.vsock = VsockTransport::Hybrid(self.folder.path().join("vsock"));
        routes.egress.push(EgressRoute {
            enclave: enclave.clone(),
            cid: Cid::FIRST,
            vsock_port: 8000,
            hostname: self.upstream.ip().to_string(),
            port: self.upstream.port(),
            allow_addresses: vec![self.upstream.ip()],
            sni: false,
            limits: EgressLimits::default(),
        });
        let listen = "127.0.0.1:0".parse().unwrap();
        routes.tcp.push(TcpRoute {
            enclave,
            listen,
            vsock_port: 7000,
            target: Some(Cid::FIRST),
            rules: TcpRules::default(),
        });
        routes
    }

    async fn publish(&self, routes: &Routes) -> ProxyReport {
        let mut link = UnixStream::connect(self.folder.path().join("link")).await.unwrap();
        let mut text = serde_json::to_vec(&LinkRequest::Publish { routes: routes.clone() }).unwrap();
        text.push(b'\n');
        link.write_all(&text).await.unwrap();
        let mut line = String::new();
        timeout(DEADLINE, BufReader::new(link).read_line(&mut line)).await.unwrap().unwrap();
        match serde_json::from_str(&line).unwrap() {
            LinkReply::Report(report) => report,
            LinkReply::Refused { reason } => panic!("{reason}"),
        }
    }

    /// Serves [`Self::routes`], and says where clients and where the enclave connect to.
    async fn serve(&mut self) -> (SocketAddr, PathBuf) {
        self.start();
        let report = self.publish(&self.routes()).await;
        let listeners = report.listeners.iter();
        let tcp = listeners.filter_map(|listener| listener.address.parse().ok()).next().unwrap();
        (tcp, self.folder.path().join("vsock/16.sock_8000"))
    }
}

async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut bytes = [0; 64];
    while let Ok(read) = stream.read(&mut bytes).await {
        if read == 0 || stream.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
    stream.write_all(b"word").await?;
    let mut word = [0; 4];
    stream.read_exact(&mut word).await?;
    assert_eq!(&word, b"word");
    Ok(())
}

#[derive(Debug, Default)]
struct Tally {
    connects: AtomicUsize,
    cut: AtomicUsize,
    enough: AtomicBool,
}

/// Connects again and again, as a client and as the enclave, until told that it is enough. A connection that is refused
/// fails the test; what is cut afterwards is counted.
fn traffic(tcp: SocketAddr, unix: PathBuf) -> (Arc<Tally>, JoinSet<()>) {
    let (tally, mut clients) = (Arc::new(Tally::default()), JoinSet::new());
    for number in 0..4 {
        let (tally, unix) = (tally.clone(), unix.clone());
        clients.spawn(async move {
            while !tally.enough.load(SeqCst) {
                let once = async {
                    if number % 2 == 0 {
                        let stream = TcpStream::connect(tcp).await.map_err(|error| panic!("refused: {error}")).unwrap();
                        exchange(stream).await
                    } else {
                        let stream =
                            UnixStream::connect(&unix).await.map_err(|error| panic!("refused: {error}")).unwrap();
                        exchange(stream).await
                    }
                };
                let ended = timeout(DEADLINE, once).await.unwrap_or_else(|_| panic!("no answer within {DEADLINE:?}"));
                tally.connects.fetch_add(1, SeqCst);
                tally.cut.fetch_add(usize::from(ended.is_err()), SeqCst);
                sleep(Duration::from_millis(5)).await;
            }
        });
    }
    (tally, clients)
}

async fn until_connects(tally: &Tally, more: usize, clients: &mut JoinSet<()>) {
    let wanted = tally.connects.load(SeqCst) + more;
    let end = Instant::now() + DEADLINE;
    while tally.connects.load(SeqCst) < wanted {
        // One that failed says why.
        if let Some(ended) = clients.try_join_next() {
            ended.unwrap();
        }
        assert!(Instant::now() < end, "fewer than {more} connections within {DEADLINE:?}");
        sleep(Duration::from_millis(2)).await;
    }
}

async fn finish(tally: &Tally, mut clients: JoinSet<()>) -> (usize, usize) {
    tally.enough.store(true, SeqCst);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    (tally.connects.load(SeqCst), tally.cut.load(SeqCst))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn restarts_under_traffic_refuse_no_connection_and_cut_none_that_ends_in_time() {
    let mut host = Host::new().await;
    let (tcp, unix) = host.serve().await;
    let (tally, mut clients) = traffic(tcp, unix);
    for _ in 0..10 {
        until_connects(&tally, 20, &mut clients).await;
        assert!(host.end(Signal::TERM).success());
        host.start();
    }
    until_connects(&tally, 20, &mut clients).await;
    let (connects, cut) = finish(&tally, clients).await;
    assert!(connects >= 200, "{connects}");
    assert_eq!(cut, 0, "of {connects}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_proxy_that_is_killed_again_and_again_refuses_no_connection() {
    let mut host = Host::new().await;
    let (tcp, unix) = host.serve().await;
    let (tally, mut clients) = traffic(tcp, unix);
    let kills = 10;
    for _ in 0..kills {
        until_connects(&tally, 20, &mut clients).await;
        host.end(Signal::KILL);
        host.start();
    }
    until_connects(&tally, 20, &mut clients).await;
    let (connects, cut) = finish(&tally, clients).await;
    assert!(connects >= 200, "{connects}");
    // Those that were under way: one of each client at most.
    assert!(cut <= 4 * kills, "{cut} of {connects}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_routes_are_served_before_a_restarted_proxy_is_ready() {
    let mut host = Host::new().await;
    let (tcp, unix) = host.serve().await;
    host.end(Signal::KILL);
    // What nobody serves yet waits; nobody publishes any routes.
    let (client, enclave) = (TcpStream::connect(tcp).await.unwrap(), UnixStream::connect(unix).await.unwrap());
    host.start();
    host.wait_until("the status says so", |lines, _| lines.iter().any(|line| line == "STATUS=2 of 2 listeners open"));
    timeout(DEADLINE, exchange(client)).await.unwrap().unwrap();
    timeout(DEADLINE, exchange(enclave)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_outlasts_the_drain_is_cut_and_one_that_ends_within_is_not() {
    let mut host = Host::new().await;
    let (tcp, _) = host.serve().await;
    let (mut long, mut short) = (TcpStream::connect(tcp).await.unwrap(), TcpStream::connect(tcp).await.unwrap());
    for stream in [&mut long, &mut short] {
        exchange(stream).await.unwrap();
    }
    let began = Instant::now();
    let (ended, ()) =
        tokio::join!(tokio::task::spawn_blocking(move || (host.manager.end(Signal::TERM).unwrap(), host)), async {
            sleep(Duration::from_millis(300)).await;
            exchange(&mut short).await.unwrap();
            short.shutdown().await.unwrap();
            assert_eq!(short.read(&mut [0; 1]).await.unwrap(), 0);
        });
    let (status, host) = ended.unwrap();
    assert!(status.success());
    let took = began.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(5)).contains(&took), "{took:?}");
    let error = timeout(DEADLINE, long.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    host.wait_until("it said that it ends", |lines, _| lines.iter().any(|line| line == "STOPPING=1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_leaves_takes_its_socket_out_of_the_store() {
    let mut host = Host::new().await;
    let (tcp, unix) = host.serve().await;
    let starts = |kept: &[&str], name: &str| kept.iter().filter(|kept| kept.starts_with(name)).count();
    host.wait_until("all are kept", |_, kept| {
        kept.len() == 3
            && ["link@", "ingress-127.0.0.1-0", "egress-16-8000@"].iter().all(|name| starts(kept, name) == 1)
    });
    let mut routes = host.routes();
    routes.tcp.clear();
    host.publish(&routes).await;
    // When the routes are published it is so already.
    assert_eq!(host.manager.kept().len(), 2);
    assert_eq!(TcpStream::connect(tcp).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    exchange(UnixStream::connect(&unix).await.unwrap()).await.unwrap();
    routes.egress.clear();
    host.publish(&routes).await;
    assert!(host.manager.kept().iter().all(|name| name.starts_with("link@")));
    assert!(!unix.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_of_no_use_is_closed_and_replaced() {
    let mut host = Host::new().await;
    let (tcp, unix) = host.serve().await;
    host.end(Signal::KILL);
    let kept = host.manager.kept();
    assert_eq!(kept.len(), 3);
    // Another folder for vsock: its sockets' paths differ. And two that no route ever had.
    let folder = host.folder.path().join("vsock2");
    std::fs::rename(host.folder.path().join("vsock"), &folder).unwrap();
    std::os::unix::fs::symlink(&folder, host.folder.path().join("vsock")).unwrap();
    std::fs::remove_file(folder.join("16.sock_8000")).unwrap();
    host.manager.keep("junk", OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stranger = other.local_addr().unwrap();
    host.manager.keep(&format!("ingress-127.0.0.1-{}", stranger.port()), OwnedFd::from(other));
    host.start();
    host.wait_until("only what is of use is kept", |_, now| {
        now.len() == 3
            && !now.contains(&"junk")
            && now.iter().filter(|name| kept.iter().any(|old| old == *name)).count() == 2
    });
    assert_eq!(TcpStream::connect(stranger).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    exchange(TcpStream::connect(tcp).await.unwrap()).await.unwrap();
    exchange(UnixStream::connect(&unix).await.unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_routes_it_is_ready_at_once_and_shows_signs_of_life() {
    let mut host = Host::new().await;
    host.manager.set_watchdog(Duration::from_millis(150));
    host.start();
    host.wait_until("signs of life", |lines, _| {
        lines.iter().filter(|line| *line == "WATCHDOG=1").count() >= 5
            && lines.iter().any(|line| line == "STATUS=no routes, nothing to serve")
    });
    assert!(host.end(Signal::TERM).success());
}
