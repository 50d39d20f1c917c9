//! Generations come and go, and routes change, under load: no enclave is refused a connection outward, and no client's request
//! fails.

use crate::crowd::{Crowd, Tally};
use crate::fixture::{Host, eventually, kill, of};
use crate::traffic::{Client, EgressWatch};
use enclaved_core::status::Status;
use enclaved_integration::guests::Guests;
use enclaved_integration::host::{ECHO_PORT, EGRESS_PORT};
use tokio::net::TcpStream;

/// A host that serves `signer.eif` with the label v1, and has `signer-2.eif` with v2 as well.
async fn two_images(cpus: u32, update: &str) -> Host {
    let host = Host::with_image().await;
    host.put("signer-2.eif", &host.application("v2")).await;
    host.configure(&signer(&host, "signer.eif", cpus, update));
    host.start();
    host.until_ready().await;
    host
}

fn signer(host: &Host, image: &str, cpus: u32, update: &str) -> String {
    let text = host.machine.sample_enclave("signer", image);
    let changed = text.replace("cpus = 2\n", &format!("cpus = {cpus}\nupdate = \"{update}\"\n"));
    assert_ne!(text, changed);
    changed
}

/// Waits until a generation after that of `before` serves alone.
async fn successor(host: &Host, before: &Status) -> Status {
    let former = of(before, "signer").generation;
    host.until("its successor serves alone", |status| {
        let signer = of(status, "signer");
        status.ready && signer.generation > former && signer.others.is_empty()
    })
    .await
}

async fn update(host: &Host, before: &Status, image: &str, cpus: u32, policy: &str) -> Status {
    host.configure(&signer(host, image, cpus, policy));
    host.ctl_ok(&["reload"]);
    successor(host, before).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_enclave_that_lives_is_refused_a_connection_outward_across_deaths_updates_of_each_kind_and_reloads() {
    let host = two_images(2, "auto").await;
    let (guests, listeners) = (Guests::begin(host.machine.nitro.vsock(), EGRESS_PORT), EgressWatch::start(&host));
    let more = async |count: u64| {
        let goal = guests.served() + count;
        eventually("enclaves are served on", async || (guests.served() >= goal).then_some(())).await;
    };
    let mut status = host.until_ready().await;
    for (image, policy) in [("signer-2.eif", "blue-green"), ("signer.eif", "recreate")] {
        more(25).await;
        status = update(&host, &status, image, 2, policy).await;
        more(25).await;
        // What changes nothing of its egress.
        host.configure(
            &(signer(&host, image, 2, policy).replace("[\"localhost\"]", "[\"localhost\", \"other.test\"]")),
        );
        host.ctl_ok(&["reload"]);
        more(25).await;
        // From inside, and by its background process, which is all that the host sees of it.
        let inside = Client::new(&host, "localhost").answer().await.pid;
        kill(if policy == "recreate" { inside } else { of(&status, "signer").pid.unwrap() });
        status = successor(&host, &status).await;
        more(25).await;
    }
    listeners.end().await;
    let outcome = guests.end().unwrap();
    let nothing = [] as [String; 0];
    assert_eq!((&outcome.refused[..], &outcome.broken[..]), (&nothing[..], &nothing[..]), "of {}", outcome.served);
    assert!(outcome.served >= 200, "only {}", outcome.served);
    assert_eq!(outcome.cids.len(), 5, "{:?}", outcome.cids);
}

fn nothing_failed(tally: &Tally) {
    assert_eq!(tally.failures, [] as [String; 0], "{tally:?}");
    assert!(tally.bodies > 20 && tally.slow > 4, "{tally:?}");
    assert_eq!(tally.connections, Crowd::CONNECTIONS, "connections were closed: {tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_with_room_for_both_fail_no_request_over_kept_connections_and_close_none() {
    let host = two_images(2, "auto").await;
    let crowd = Crowd::gather(&Client::new(&host, "localhost")).await;
    let mut status = host.until_ready().await;
    for image in ["signer-2.eif", "signer.eif", "signer-2.eif"] {
        status = update(&host, &status, image, 2, "blue-green").await;
    }
    assert_eq!(Client::new(&host, "localhost").answer().await.label, "v2");
    let tally = crowd.disperse().await;
    nothing_failed(&tally);
    assert!(tally.told_to_wait == 0 && tally.labels.len() == 2, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_without_room_for_both_have_clients_told_to_wait_and_nothing_worse() {
    // Four of six CPUs: one at a time.
    let host = two_images(4, "auto").await;
    let crowd = Crowd::gather(&Client::new(&host, "localhost")).await;
    let mut status = host.until_ready().await;
    for image in ["signer-2.eif", "signer.eif"] {
        status = update(&host, &status, image, 4, "auto").await;
    }
    assert_eq!(Client::new(&host, "localhost").answer().await.label, "v1");
    let tally = crowd.disperse().await;
    nothing_failed(&tally);
    assert!(tally.told_to_wait > 0 && tally.labels.len() == 2, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_that_change_routes_fail_no_request_over_kept_connections_and_close_none() {
    let host = two_images(2, "auto").await;
    let crowd = Crowd::gather(&Client::new(&host, "localhost")).await;
    let before = host.until_ready().await;
    let signer = signer(&host, "signer.eif", 2, "auto");
    let listen = host.machine.tcp(9000);
    let more = signer.replace(
        "domains = [\"localhost\"], http_port = 8080",
        &format!(
            "domains = [\"localhost\", \"other.test\"], http_port = 8080, \
             routes = [{{ path = \"/attestation\", vsock_port = 8080 }}], \
             ports = [{{ listen = \"{listen}\", vsock_port = {ECHO_PORT} }}]"
        ),
    );
    assert_ne!(signer, more);
    for round in 0..6 {
        let extended = round % 2 == 0;
        host.configure(if extended { &more } else { &signer });
        host.ctl_ok(&["reload"]);
        eventually("the port is as configured", async || {
            (TcpStream::connect(listen).await.is_ok() == extended).then_some(())
        })
        .await;
        if extended {
            let other = Client::new(&host, "other.test");
            // Its certificate is made while the others are served.
            let served = eventually("the new name is served", async || other.get("/attestation").await.ok()).await;
            assert_eq!(served.0, 200);
        }
    }
    let tally = crowd.disperse().await;
    nothing_failed(&tally);
    assert!(tally.told_to_wait == 0 && tally.labels.len() == 1, "{tally:?}");
    assert_eq!(of(&host.until_ready().await, "signer").pid, of(&before, "signer").pid);
}
