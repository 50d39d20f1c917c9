//! The proxy's sockets under the real systemd: restarted and killed again and again, it refuses nobody.

use enclaved_core::routes::{ROUTES_FORMAT, Routes, TcpRoute, TcpRules};
use enclaved_integration::machine::DEADLINE;
use enclaved_integration::machine::parent::{Parent, parent_host};
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

const UNIT: &str = "enclaved-proxy.service";
const LISTEN: &str = "127.0.0.1:9100";

/// Starts a proxy that finds these routes on its disk: one port, whose enclave is not ready, so that connections are taken and
/// closed.
fn start(parent: &Parent) {
    let port = TcpRoute {
        enclave: "signer".parse().unwrap(),
        listen: LISTEN.parse().unwrap(),
        vsock_port: 7000,
        target: None,
        rules: TcpRules::default(),
    };
    let routes = Routes { format: ROUTES_FORMAT, tcp: vec![port], ..Routes::default() };
    parent.run_ok(&["systemctl", "stop", "enclaved.service", UNIT]).unwrap();
    parent.write("/var/lib/enclaved-proxy/routes.json", serde_json::to_vec(&routes).unwrap()).unwrap();
    parent.run_ok(&["chown", "enclaved-proxy:", "/var/lib/enclaved-proxy/routes.json"]).unwrap();
    parent.run_ok(&["systemctl", "start", UNIT]).unwrap();
}

/// How many connections were made, and how many of them were reset, while this was done. One that is refused, or that nobody
/// takes, fails the test.
fn under_traffic(parent: &Parent, act: impl FnOnce()) -> (usize, usize) {
    let (enough, made, reset) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let address: SocketAddr = LISTEN.parse().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                parent
                    .in_network(|| {
                        while !enough.load(SeqCst) {
                            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
                            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                            match stream.read(&mut [0; 1]) {
                                Ok(read) => assert_eq!(read, 0),
                                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                                    reset.fetch_add(1, SeqCst);
                                }
                                Err(error) => panic!("nobody took it: {error}"),
                            }
                            made.fetch_add(1, SeqCst);
                            std::thread::sleep(Duration::from_millis(5));
                        }
                    })
                    .unwrap();
            });
        }
        // However it ends, the clients do.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        enough.store(true, SeqCst);
        done.unwrap();
    });
    (made.into_inner(), reset.into_inner())
}

#[test]
fn fifty_restarts_of_the_proxy_refuse_no_connection() {
    let parent = parent_host().unwrap();
    start(&parent);
    assert_eq!(parent.property(UNIT, "NFileDescriptorStore").unwrap(), "2", "the port and the link");
    let (made, reset) = under_traffic(&parent, || {
        for _ in 0..50 {
            parent.run_ok(&["systemctl", "restart", UNIT]).unwrap();
        }
    });
    assert!(made >= 50, "{made}");
    assert_eq!(reset, 0, "of {made}");
    assert_eq!(parent.property(UNIT, "NFileDescriptorStore").unwrap(), "2");
}

#[test]
fn a_proxy_that_is_killed_ten_times_refuses_no_connection() {
    let parent = parent_host().unwrap();
    start(&parent);
    let (made, reset) = under_traffic(&parent, || {
        for _ in 0..10 {
            let killed = parent.main_pid(UNIT).unwrap().unwrap();
            parent.run_ok(&["systemctl", "kill", "--signal=KILL", UNIT]).unwrap();
            parent
                .wait_until("it runs again", DEADLINE, || {
                    let active = parent.property(UNIT, "ActiveState")? == "active";
                    Ok(parent.main_pid(UNIT)?.filter(|pid| active && *pid != killed))
                })
                .unwrap();
        }
    });
    assert!(made >= 10, "{made}");
    // Those that were taken and not closed yet.
    assert!(reset <= 30, "{reset} of {made}");
}

#[test]
fn a_stop_closes_the_sockets_and_a_start_opens_them_again() {
    let parent = parent_host().unwrap();
    start(&parent);
    parent.run_ok(&["systemctl", "stop", UNIT]).unwrap();
    let connect = || parent.in_network(|| TcpStream::connect(LISTEN).map(drop)).unwrap();
    assert_eq!(connect().unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    parent.run_ok(&["systemctl", "start", UNIT]).unwrap();
    connect().unwrap();
    assert_eq!(parent.property(UNIT, "StatusText").unwrap(), "1 of 1 listeners open");
}
