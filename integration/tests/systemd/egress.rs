//! Enclaves call out while everything around them changes: generations, the control process, and the proxy, whose sockets systemd
//! keeps. None that lives is refused a connection.

use enclaved_core::status::Status;
use enclaved_integration::guests::Guests;
use enclaved_integration::machine::DEADLINE;
use enclaved_integration::machine::parent::{Parent, parent_host};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;

const PROXY: &str = "enclaved-proxy.service";
/// In the machine's network.
const UPSTREAM: &str = "127.0.0.1:9100";
const VSOCK_PORT: u32 = 8000;
const V1: &str = "/srv/v1.eif";
const V2: &str = "/srv/v2.eif";

/// What an enclave calls: it answers every request with 200, as long as this process lives.
fn upstream(parent: &Parent) {
    let listener = parent.in_network(|| TcpListener::bind(UPSTREAM)).unwrap().unwrap();
    thread::spawn(move || {
        // What is cut with a proxy fails here, too.
        for stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let _ignored = (&stream).write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok");
        }
    });
}

fn configure(parent: &Parent, image: &str, update: &str) {
    let egress = format!(
        "cpus = 2\nupdate = \"{update}\"\negress = [{{ hostname = \"127.0.0.1\", port = 9100, \
         vsock_port = {VSOCK_PORT}, allow_addresses = [\"127.0.0.1\"] }}]\n"
    );
    parent.configure(&parent.sample_enclave("signer", image).replace("cpus = 2\n", &egress)).unwrap();
}

/// Waits until a generation after that serves alone.
fn successor(parent: &Parent, before: &Status) -> Status {
    let former = before.enclaves[0].generation;
    let like = |status: &Status| {
        status.ready && status.enclaves.iter().all(|signer| signer.generation > former && signer.others.is_empty())
    };
    parent.until("its successor serves alone", like).unwrap()
}

#[test]
fn no_enclave_that_lives_is_refused_a_connection_across_its_own_restarts_updates_and_those_of_both_processes() {
    let parent = parent_host().unwrap();
    for (path, label) in [(V1, "v1"), (V2, "v2")] {
        parent.put_image(path, &parent.sample_application(label)).unwrap();
    }
    upstream(&parent);
    configure(&parent, V1, "auto");
    parent.run_ok(&["systemctl", "enable", "--now", "enclaved"]).unwrap();
    let mut status = parent.until("signer is ready", |status| status.ready && status.enclaves.len() == 1).unwrap();
    let stored = || parent.property(PROXY, "NFileDescriptorStore").unwrap();
    assert_eq!(stored(), "3", "egress, HTTPS, and the link");

    let folder = PathBuf::from(format!("/proc/{}/root/run/standin/vsock", parent.init().unwrap()));
    let guests = Guests::begin(folder, VSOCK_PORT);
    let more = |what: &str| {
        let goal = guests.served() + 15;
        parent.wait_until(what, DEADLINE, || Ok((guests.served() >= goal).then_some(()))).unwrap();
    };
    let proxy = || parent.main_pid(PROXY).unwrap();
    let mut kills = 0;
    for (image, update) in [(V2, "blue-green"), (V1, "recreate")] {
        more("it is served");
        let before = proxy();
        parent.run_ok(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", PROXY]).unwrap();
        kills += 1;
        let another = || Ok(proxy().filter(|_| proxy() != before));
        parent.wait_until("another process is the proxy", DEADLINE, another).unwrap();
        more("it is served after the proxy was killed");
        parent.run_ok(&["systemctl", "restart", PROXY]).unwrap();
        more("it is served after the proxy was restarted");
        configure(&parent, image, update);
        parent.run_ok(&["systemctl", "reload", "enclaved"]).unwrap();
        // The proxy that knows the new generation from its disk alone is another one.
        parent.run_ok(&["systemctl", "restart", PROXY]).unwrap();
        status = successor(&parent, &status);
        more("it is served after an update");
        let signer = format!("enclave@signer-{}", status.enclaves[0].generation.unwrap());
        parent.run_ok(&["systemctl", "kill", "--signal=KILL", &signer]).unwrap();
        status = successor(&parent, &status);
        more("it is served after it died");
        parent.run_ok(&["systemctl", "restart", "enclaved"]).unwrap();
        more("it is served after the control process was restarted");
        parent.until("it is ready again", |status| status.ready).unwrap();
    }
    let outcome = guests.end().unwrap();
    assert_eq!(outcome.refused, [] as [String; 0], "{outcome:?}");
    // What was under way when the proxy was killed.
    assert!(outcome.broken.len() <= kills, "{outcome:?}");
    assert!(outcome.served >= 200, "{outcome:?}");
    assert_eq!(outcome.cids.len(), 5, "{outcome:?}");
    assert_eq!(stored(), "3", "sockets of generations that are gone are kept");
}
