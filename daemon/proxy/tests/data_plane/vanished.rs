//! TCP peers that vanish: no FIN, no RST, nothing comes of them any more. In a network namespace of the test's own, with the peers in
//! another; then the way back is taken from them. The test is its own proxy there, in a process of its own.

use crate::support::{DEADLINE, Enclave, Host, egress, soon, tcp_address, tcp_route, traffic};
use enclaved_core::routes::{Direction, Routes};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

/// Set in the namespace.
const INSIDE: &str = "ENCLAVED_TEST_IN_ITS_OWN_NETWORK";
const NEAR: &str = "10.99.0.1";
const FAR: &str = "10.99.0.2";
/// In place of two minutes.
const SILENCE: Duration = Duration::from_secs(4);

#[test]
fn a_peer_that_vanishes_without_a_word_is_found_idle_or_not_and_its_counterpart_is_told() {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(inside());
    }
    let this = std::env::current_exe().unwrap();
    let name = "vanished::a_peer_that_vanishes_without_a_word_is_found_idle_or_not_and_its_counterpart_is_told";
    let output = in_a_network_of_its_own().arg(this).args(["--exact", name, "--nocapture"]).env(INSIDE, "1").output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "in its own network:\n{said}");
}

/// Runs what follows in a network namespace: with root's rights where that is allowed, else as root of a user namespace.
fn in_a_network_of_its_own() -> Command {
    for rights in [&["--net"][..], &["--net", "--user", "--map-root-user"]] {
        let mut unshare = Command::new("unshare");
        if unshare.args(rights).arg("true").output().is_ok_and(|output| output.status.success()) {
            let mut command = Command::new("unshare");
            command.args(rights);
            return command;
        }
    }
    panic!(
        "neither `unshare --net` nor `unshare --net --user --map-root-user` works here: this test needs a network namespace"
    );
}

/// Another namespace, connected with this one by a cable, as long as this lives.
struct FarAway(Child);

impl FarAway {
    fn new() -> Self {
        run(&["ip", "link", "set", "lo", "up"]);
        let (near, far) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
        run(&["ip", "link", "add", "near", "address", near, "type", "veth", "peer", "name", "far", "address", far]);
        // It ends with its input, which is this process's.
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo && exec cat >/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let there = Self(holder);
        run(&["ip", "link", "set", "far", "netns", &there.0.id().to_string()]);
        run(&["ip", "address", "add", &format!("{NEAR}/30"), "dev", "near"]);
        run(&["ip", "link", "set", "near", "up"]);
        there.run(&["ip", "address", "add", &format!("{FAR}/30"), "dev", "far"]);
        there.run(&["ip", "link", "set", "far", "up"]);
        // As behind a router: that the peer is gone is not seen by its neighbours' silence, either.
        run(&["ip", "neighbour", "replace", FAR, "lladdr", far, "dev", "near", "nud", "permanent"]);
        there.run(&["ip", "neighbour", "replace", NEAR, "lladdr", near, "dev", "far", "nud", "permanent"]);
        there
    }

    fn run(&self, command: &[&str]) {
        run(&[&["nsenter", "--net", "--target", &self.0.id().to_string()], command].concat());
    }

    /// Sockets that are made in this are there.
    fn act<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        let there = || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            act()
        };
        std::thread::scope(|scope| scope.spawn(there).join().unwrap())
    }

    /// From now on nothing that it is sent arrives, and nothing comes back.
    fn vanish(&self) {
        self.run(&["ip", "route", "add", "blackhole", &format!("{NEAR}/32")]);
    }
}

impl Drop for FarAway {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn run(command: &[&str]) {
    let output = Command::new(command[0]).args(&command[1..]).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}; iproute2 and util-linux have these"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Says what it is, and does with its connection what that means, until it is told that the other side is gone.
async fn play(kind: u8, mut stream: UnixStream, vanished: Arc<Notify>) {
    match kind {
        IDLE => {}
        A_LITTLE => {
            vanished.notified().await;
            stream.write_all(b"to nobody").await.unwrap();
        }
        // Until nothing more goes into the buffers between here and there.
        _ => while stream.write_all(&[0; 4096]).await.is_ok() {},
    }
    // In which way it is told is the kernel's affair: a Unix socket is never reset for it.
    drop(stream.read(&mut [0; 1]).await);
}

const IDLE: u8 = b'i';
const A_LITTLE: u8 = b'l';
const FLOOD: u8 = b'f';

async fn inside() {
    let far_away = FarAway::new();
    let host = Host::with_limits(|limits| limits.peer_silence = SILENCE).await;
    let (told, mut ends) = mpsc::unbounded_channel();
    let vanished = Arc::new(Notify::new());
    let (enclaves, notified) = (told.clone(), vanished.clone());
    let _enclave = Enclave::raw(&host.vsock(), 16, move |_, mut stream| {
        let (told, vanished) = (enclaves.clone(), notified.clone());
        async move {
            let kind = stream.read_u8().await.unwrap();
            stream.write_all(&[kind]).await.unwrap();
            play(kind, stream, vanished).await;
            told.send(("client", kind)).unwrap();
        }
    });
    let upstream = far_away.act(|| TcpListener::bind((FAR, 0)).unwrap());
    let egress = vec![egress(16, 8000, upstream.local_addr().unwrap())];
    let tcp = vec![tcp_route(&format!("{NEAR}:0"), Some(16))];
    let port = tcp_address(&host.publish(&Routes { egress, tcp, ..host.routes() }).await);
    let client = |kind: u8| {
        let mut client = TcpStream::connect(port).unwrap();
        client.write_all(&[kind]).unwrap();
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 1);
        client
    };
    let far_client = far_away.act(|| client(IDLE));
    // Those are there, as idle as the other, or not reading.
    let (idle, mut paused) = (client(IDLE), client(FLOOD));
    let mut called = Vec::new();
    for kind in [IDLE, A_LITTLE, FLOOD] {
        let mut outward = host.connect_from(16, 8000).await.unwrap();
        outward.write_all(&[kind]).await.unwrap();
        let upstream = upstream.try_clone().unwrap();
        let (mut connection, _) = tokio::task::spawn_blocking(move || upstream.accept().unwrap()).await.unwrap();
        assert_eq!(connection.read(&mut [0; 1]).unwrap(), 1);
        called.push(connection);
        let (told, vanished) = (told.clone(), vanished.clone());
        tokio::spawn(async move {
            play(kind, outward, vanished).await;
            told.send(("upstream", kind)).unwrap();
        });
    }

    far_away.vanish();
    let since = Instant::now();
    vanished.notify_one();
    let mut found = Vec::new();
    for _ in 0..4 {
        let who = soon("an enclave is told", ends.recv()).await.unwrap();
        let after = since.elapsed();
        println!("{who:?}: found after {after:?}");
        assert!(after > SILENCE / 2 && after < SILENCE * 5 / 2, "{who:?} after {after:?}");
        found.push(who);
    }
    found.sort_unstable();
    assert_eq!(found, [("client", IDLE), ("upstream", FLOOD), ("upstream", IDLE), ("upstream", A_LITTLE)]);
    let over = |report: &_| traffic(report, Direction::Tcp).open == 2 && traffic(report, Direction::Egress).open == 0;
    let report = host.until("only those that are there are open", over).await;
    assert_eq!(traffic(&report, Direction::Tcp).failed["reset"], 1);
    assert_eq!(traffic(&report, Direction::Egress).failed["reset"], 3);
    // These have outlived their probes, and the one its pause: more comes than any buffer holds.
    let rest = (SILENCE * 3 / 2).saturating_sub(since.elapsed());
    tokio::time::sleep(rest).await;
    paused.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut piece = vec![0; 1 << 20];
    for _ in 0..32 {
        paused.read_exact(&mut piece).unwrap();
    }
    for still_there in [idle, paused] {
        still_there.shutdown(std::net::Shutdown::Both).unwrap();
        soon("the end of one that is there", ends.recv()).await.unwrap();
    }
    drop((far_client, called));
}
