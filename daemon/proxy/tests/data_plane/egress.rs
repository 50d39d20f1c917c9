//! Enclaves reach their upstreams.

use crate::support::{Host, Upstream, egress, soon, traffic};
use enclaved_core::routes::{Direction, Routes};
use std::io::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

#[tokio::test]
async fn bytes_pass_both_ways_with_half_close_and_are_counted_exactly() {
    let host = Host::new().await;
    let upstream = Upstream::new(|mut stream| async move {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        // The enclave has closed its direction; the answer comes all the same.
        stream.write_all(&request).await.unwrap();
        stream.write_all(b"and more").await.unwrap();
    })
    .await;
    host.publish(&Routes { egress: vec![egress(16, 8000, upstream.address)], ..host.routes() }).await;
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let request = vec![7; 200_000];
    enclave.write_all(&request).await.unwrap();
    enclave.shutdown().await.unwrap();
    let mut answer = Vec::new();
    soon("the answer", enclave.read_to_end(&mut answer)).await.unwrap();
    assert_eq!((&answer[..200_000], &answer[200_000..]), (&request[..], &b"and more"[..]));
    let report = host.until("the connection ended", |report| traffic(report, Direction::Egress).open == 0).await;
    let counted = traffic(&report, Direction::Egress);
    assert_eq!((counted.bytes_from_enclave, counted.bytes_to_enclave, counted.total), (200_000, 200_008, 1));
    assert!(counted.failed.is_empty(), "{counted:?}");
}

#[tokio::test]
async fn enclaves_on_the_same_vsock_port_reach_their_own_endpoints_and_no_others() {
    let host = Host::new().await;
    let (one, two) = (Upstream::saying("one").await, Upstream::saying("two").await);
    let routes = vec![egress(16, 8000, one.address), egress(17, 8000, two.address), egress(17, 8001, one.address)];
    host.publish(&Routes { egress: routes, ..host.routes() }).await;
    for (cid, vsock_port, expected) in [(16, 8000, "one"), (17, 8000, "two"), (17, 8001, "one")] {
        let mut said = String::new();
        let mut enclave = host.connect_from(cid, vsock_port).await.unwrap();
        soon("the upstream's words", enclave.read_to_string(&mut said)).await.unwrap();
        assert_eq!(said, expected);
    }
    for (cid, vsock_port) in [(16, 8001), (18, 8000)] {
        let error = host.connect_from(cid, vsock_port).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

#[tokio::test]
async fn addresses_that_an_enclave_must_not_reach_are_refused_and_counted() {
    let host = Host::new().await;
    let upstream = Upstream::saying("secret").await;
    let mut route = egress(16, 8000, upstream.address);
    route.allow_addresses.clear();
    route.hostname = "localhost".to_owned();
    host.publish(&Routes { egress: vec![route], ..host.routes() }).await;
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let mut said = String::new();
    soon("the refusal", enclave.read_to_string(&mut said)).await.unwrap();
    assert_eq!(said, "");
    let report = host.until("it is counted", |report| traffic(report, Direction::Egress).open == 0).await;
    assert_eq!(traffic(&report, Direction::Egress).failed["address_refused"], 1);
}

#[tokio::test]
async fn an_upstream_that_is_away_is_counted_and_works_when_it_is_back() {
    let host = Host::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    host.publish(&Routes { egress: vec![egress(16, 8000, address)], ..host.routes() }).await;
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    assert_eq!(soon("the end", enclave.read(&mut [0; 1])).await.unwrap(), 0);
    let report = host.until("it is counted", |report| traffic(report, Direction::Egress).open == 0).await;
    assert_eq!(traffic(&report, Direction::Egress).failed["connect"], 1);
    let listener = TcpListener::bind(address).await.unwrap();
    let _enclave = host.connect_from(16, 8000).await.unwrap();
    soon("the connection", listener.accept()).await.unwrap();
}

#[tokio::test]
async fn resets_pass_from_either_end_to_the_other() {
    let host = Host::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let route = egress(16, 8000, listener.local_addr().unwrap());
    host.publish(&Routes { egress: vec![route], ..host.routes() }).await;

    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    enclave.write_all(b"x").await.unwrap();
    assert_eq!(soon("the enclave's word", upstream.read_u8()).await.unwrap(), b'x');
    upstream.set_zero_linger().unwrap();
    drop(upstream);
    // A Unix socket knows no reset; its end is what there is.
    assert_eq!(soon("the end", enclave.read(&mut [0; 1])).await.unwrap(), 0);

    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    upstream.write_all(b"never read").await.unwrap();
    soon("the words' arrival", enclave.readable()).await.unwrap();
    // Closing with unread bytes resets a Unix socket.
    enclave.write_all(b"x").await.unwrap();
    drop(enclave);
    assert_eq!(soon("the enclave's word", upstream.read_u8()).await.unwrap(), b'x');
    let error = soon("the reset", upstream.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    host.until("both are counted", |report| traffic(report, Direction::Egress).failed.get("reset") == Some(&2)).await;
}

#[tokio::test]
async fn a_hundred_connections_at_a_time_do_not_disturb_each_other() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    host.publish(&Routes { egress: vec![egress(16, 8000, upstream.address)], ..host.routes() }).await;
    let mut connections = JoinSet::new();
    for number in 0..100_u8 {
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        connections.spawn(async move {
            for _ in 0..20 {
                let sent = [number; 5000];
                let mut received = [0; 5000];
                enclave.write_all(&sent).await.unwrap();
                enclave.read_exact(&mut received).await.unwrap();
                assert_eq!(sent, received);
            }
        });
    }
    soon("all echoes", connections.join_all()).await;
    let report = host.until("all have ended", |report| traffic(report, Direction::Egress).open == 0).await;
    let counted = traffic(&report, Direction::Egress);
    assert_eq!((counted.total, counted.bytes_to_enclave), (100, 100 * 20 * 5000));
}

#[tokio::test]
async fn connections_live_on_while_their_cid_does_and_end_with_it() {
    let host = Host::new().await;
    let (one, two) = (Upstream::echoing().await, Upstream::saying("two").await);
    let mut routes = Routes { egress: vec![egress(16, 8000, one.address)], ..host.routes() };
    host.publish(&routes).await;
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    let mut echo = async || {
        enclave.write_all(b"x").await.unwrap();
        soon("the echo", enclave.read_u8()).await
    };
    echo().await.unwrap();
    // Another upstream for the endpoint: for new connections.
    routes.egress = vec![egress(16, 8000, two.address)];
    host.publish(&routes).await;
    echo().await.unwrap();
    // No endpoint at all, but the enclave lives.
    routes = Routes { live: vec![routes.egress[0].cid], ..host.routes() };
    host.publish(&routes).await;
    echo().await.unwrap();
    assert!(host.connect_from(16, 8000).await.is_err(), "the listener outlived its route");
    // Gone.
    host.publish(&host.routes()).await;
    assert!(soon("the cut", enclave.read_u8()).await.is_err());
}
