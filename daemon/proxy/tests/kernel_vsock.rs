//! The data plane over real AF_VSOCK sockets, on a kernel of its own (`integration/test --lane vsock`), whose vsock leads back to
//! itself: every peer there is CID 1, so one enclave can be played, and strangers to its endpoints are told by routes that name
//! another. Never run on a machine's own vsock: each test makes sure of that first.

#[path = "data_plane/support.rs"]
#[expect(dead_code, reason = "what is for hybrid vsock and for HTTP is not used here")]
mod support;

use enclaved_core::routes::{Direction, Routes, TcpRoute, VsockTransport};
use enclaved_proxy::{Limits, Manager, Options, run_under};
use rustix::fd::AsRawFd;
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use support::{DEADLINE, Host, Upstream, egress, https_address, soon, tcp_address, tcp_route, traffic};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_LOCAL, VsockAddr, VsockListener, VsockStream};

/// Who connects and who listens here.
const ENCLAVE: u32 = VMADDR_CID_LOCAL;

/// A proxy on this kernel, which is not the machine's.
async fn host() -> Host {
    make_sure_of_the_kernel();
    Host::new().await
}

fn make_sure_of_the_kernel() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(cpu.contains("User Mode Linux"), "AF_VSOCK of a real machine is not opened by tests");
}

fn routes(host: &Host) -> Routes {
    Routes { vsock: VsockTransport::AfVsock, ..host.routes() }
}

async fn connect(port: u32) -> std::io::Result<VsockStream> {
    soon("connecting over vsock", VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, port))).await
}

fn listen(port: u32) -> VsockListener {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_LOCAL, port)).unwrap()
}

/// Sends back whatever comes until the end.
async fn echo(mut stream: VsockStream) {
    let mut buffer = vec![0; 65_536];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
    drop(stream.shutdown(std::net::Shutdown::Write));
}

#[tokio::test]
async fn an_enclave_reaches_its_upstream_with_half_close_and_every_byte_is_counted() {
    let host = host().await;
    let upstream = Upstream::new(|mut stream| async move {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        // The enclave has closed its direction; the answer comes all the same.
        stream.write_all(&request).await.unwrap();
        stream.write_all(b"and more").await.unwrap();
    })
    .await;
    host.publish(&Routes { egress: vec![egress(ENCLAVE, 8000, upstream.address)], ..routes(&host) }).await;
    let mut enclave = connect(8000).await.unwrap();
    let request = vec![7; 3_000_000];
    soon("sending", enclave.write_all(&request)).await.unwrap();
    enclave.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    soon("the answer", enclave.read_to_end(&mut answer)).await.unwrap();
    assert!(answer[..3_000_000] == request && &answer[3_000_000..] == b"and more");
    let report = host.until("the connection ended", |report| traffic(report, Direction::Egress).open == 0).await;
    let counted = traffic(&report, Direction::Egress);
    assert_eq!((counted.bytes_from_enclave, counted.bytes_to_enclave, counted.total), (3_000_000, 3_000_008, 1));
}

#[tokio::test]
async fn a_connection_from_another_cid_than_the_endpoints_is_hung_up_on_and_counted() {
    let host = host().await;
    let upstream = Upstream::saying("secret").await;
    host.publish(&Routes { egress: vec![egress(16, 8010, upstream.address)], ..routes(&host) }).await;
    let mut stranger = connect(8010).await.unwrap();
    let mut said = Vec::new();
    drop(soon("the end", stranger.read_to_end(&mut said)).await);
    assert_eq!(said, b"");
    host.until("it was counted", |report| report.refused.get("unknown_peer") == Some(&1)).await;
}

#[tokio::test]
async fn clients_of_a_raw_port_reach_the_enclave_and_its_bytes_come_back() {
    let host = host().await;
    let listener = listen(8020);
    let enclave = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(echo(stream));
        }
    });
    let tcp = TcpRoute { vsock_port: 8020, ..tcp_route("127.0.0.1:0", Some(ENCLAVE)) };
    let published = Routes { tcp: vec![tcp], live: vec![support::cid(ENCLAVE)], ..routes(&host) };
    let report = host.publish(&published).await;
    let mut clients = JoinSet::new();
    for number in 0..50_u8 {
        let address = tcp_address(&report);
        clients.spawn(async move {
            let mut client = TcpStream::connect(address).await.unwrap();
            let (mut reader, mut writer) = client.split();
            let sent = vec![number; 100_000];
            let writing = async {
                writer.write_all(&sent).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let mut received = Vec::new();
            let (read, ()) = tokio::join!(soon("the echo", reader.read_to_end(&mut received)), writing);
            read.unwrap();
            assert!(received == sent, "{} bytes came back", received.len());
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    enclave.abort();
}

#[tokio::test]
async fn a_port_on_which_nothing_listens_closes_the_client_and_is_counted_as_the_enclaves() {
    let host = host().await;
    let tcp = TcpRoute { vsock_port: 8030, ..tcp_route("127.0.0.1:0", Some(ENCLAVE)) };
    let published = Routes { tcp: vec![tcp], live: vec![support::cid(ENCLAVE)], ..routes(&host) };
    let report = host.publish(&published).await;
    let mut client = TcpStream::connect(tcp_address(&report)).await.unwrap();
    let mut said = Vec::new();
    drop(soon("the end", client.read_to_end(&mut said)).await);
    assert_eq!(said, b"");
    host.until("it was counted", |report| traffic(report, Direction::Tcp).failed.values().sum::<u64>() == 1).await;
}

#[tokio::test]
async fn https_reaches_the_enclave() {
    let host = host().await;
    let listener = listen(8080);
    let enclave = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 1024];
            if stream.read(&mut head).await.is_ok() {
                drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello").await);
            }
        }
    });
    let site = host.site(&["a.test"], Some(ENCLAVE));
    let report =
        host.publish(&Routes { vsock: VsockTransport::AfVsock, live: vec![support::cid(ENCLAVE)], ..site }).await;
    let mut client = host.http1(https_address(&report), "a.test").await;
    assert_eq!(client.get_text("/").await, (200, "hello".to_owned()));
    enclave.abort();
}

#[tokio::test]
async fn an_enclave_that_floods_is_stopped_by_an_upstream_that_does_not_read() {
    let host = host().await;
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = upstream.local_addr().unwrap();
    host.publish(&Routes { egress: vec![egress(ENCLAVE, 8040, address)], ..routes(&host) }).await;
    let mut enclave = connect(8040).await.unwrap();
    let (accepted, _) = soon("the upstream's side", upstream.accept()).await.unwrap();
    let chunk = vec![1; 1 << 20];
    let mut sent = 0_usize;
    // Buffers of the kernel and of the relay fill up, and then nothing goes on.
    while let Ok(written) = tokio::time::timeout(Duration::from_secs(2), enclave.write(&chunk)).await {
        sent += written.unwrap();
        assert!(sent < 64 << 20, "{sent} bytes were taken of which nobody has read one");
    }
    // It goes on when the upstream reads.
    let mut accepted = accepted;
    let mut rest = vec![0; 1 << 20];
    let mut read = 0;
    while read < sent {
        read += soon("what was sent", accepted.read(&mut rest)).await.unwrap();
    }
    assert_eq!(read, sent);
}

#[tokio::test]
async fn a_listener_that_is_given_up_is_free_at_once_and_can_be_had_again() {
    let host = host().await;
    let upstream = Upstream::saying("again").await;
    let with = Routes { egress: vec![egress(ENCLAVE, 8050, upstream.address)], ..routes(&host) };
    for _ in 0..20 {
        let report = host.publish(&with).await;
        assert!(report.listeners.iter().all(|listener| listener.error.is_none()), "{:?}", report.listeners);
        let mut said = String::new();
        let mut enclave = connect(8050).await.unwrap();
        soon("the upstream's words", enclave.read_to_string(&mut said)).await.unwrap();
        assert_eq!(said, "again");
        host.publish(&routes(&host)).await;
        assert!(connect(8050).await.is_err());
    }
}

#[tokio::test]
async fn thousands_of_short_connections_leave_nothing_behind() {
    let host = host().await;
    let upstream = Upstream::saying("x").await;
    host.publish(&Routes { egress: vec![egress(ENCLAVE, 8060, upstream.address)], ..routes(&host) }).await;
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let one = async || {
        let mut said = String::new();
        connect(8060).await.unwrap().read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "x");
    };
    one().await;
    let before = descriptors();
    for _ in 0..2000 {
        soon("a short connection", one()).await;
    }
    host.until("all have ended", |report| traffic(report, Direction::Egress).open == 0).await;
    // Other tests run beside this one: some are theirs.
    assert!(descriptors() < before + 200, "{before} before, {} after", descriptors());
}

/// In the environment of a proxy in a process of its own: its directory.
const PASSED: &str = "ENCLAVED_TEST_PASSED_SOCKET";

#[tokio::test]
async fn a_listener_that_was_kept_is_served_by_the_next_proxy_with_all_who_waited_in_it() {
    if let Some(dir) = std::env::var_os(PASSED).map(PathBuf::from) {
        let options = Options { state_dir: dir.join("state"), link: dir.join("link") };
        // Ended with its parent's test, or after a while without it.
        let proxy = run_under(Manager::from_environment(), options, Limits::default(), CancellationToken::new());
        return drop(tokio::time::timeout(DEADLINE * 3, proxy).await);
    }
    make_sure_of_the_kernel();
    let host = Host::without_proxy();
    let upstream = Upstream::saying("kept").await;
    // What a service manager holds, and passes as descriptor 3.
    let kept = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, 8070)).unwrap();
    fcntl_setfd(&kept, fcntl_getfd(&kept).unwrap() - FdFlags::CLOEXEC).unwrap();
    let start = || {
        let script = format!("export LISTEN_PID=$$; exec 3<&{}; exec \"$0\" \"$@\"", kept.as_raw_fd());
        let name = "a_listener_that_was_kept_is_served_by_the_next_proxy_with_all_who_waited_in_it";
        let mut proxy = tokio::process::Command::new("bash");
        proxy.arg("-c").arg(script).arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]);
        proxy.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "egress-any-8070");
        proxy.env(PASSED, host.options().state_dir.parent().unwrap());
        proxy.kill_on_drop(true).stdout(Stdio::null()).spawn().unwrap()
    };
    let is_served = async |mut enclave: VsockStream| {
        let mut said = String::new();
        soon("the upstream's words", enclave.read_to_string(&mut said)).await.unwrap();
        assert_eq!(said, "kept");
    };

    // Nobody else can have the port: who serves it has this very socket.
    let waiting = connect(8070).await.unwrap();
    let mut proxy = start();
    host.until("the proxy runs", |_| true).await;
    let report = host.publish(&Routes { egress: vec![egress(ENCLAVE, 8070, upstream.address)], ..routes(&host) }).await;
    assert!(report.listeners.iter().all(|listener| listener.error.is_none()), "{:?}", report.listeners);
    is_served(waiting).await;
    is_served(connect(8070).await.unwrap()).await;

    soon("the proxy's death", proxy.kill()).await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..20 {
        waiting.push(connect(8070).await.expect("a connection was refused while there was no proxy"));
    }
    // From its routes on disk, without anybody's word.
    let _proxy = start();
    for enclave in waiting {
        is_served(enclave).await;
    }
}

#[tokio::test]
async fn the_kernel_tells_who_listens_without_anybody_listening_for_it() {
    let _host = host().await;
    let port = 9000;
    assert!(!enclaved_proxy::vsock_listeners().unwrap().contains(&port));
    let listener = listen(port);
    assert!(enclaved_proxy::vsock_listeners().unwrap().contains(&port));
    drop(listener);
    assert!(!enclaved_proxy::vsock_listeners().unwrap().contains(&port));
}
