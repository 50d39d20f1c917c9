//! Enclaves reach their upstreams.

use crate::support::{Host, Upstream, egress, soon, traffic};
use enclaved_core::routes::{Direction, EgressRoute, Routes};
use std::io::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
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
async fn connections_live_on_while_their_endpoint_is_in_the_routes_and_end_with_it() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    let endpoint = egress(16, 8000, upstream.address);
    let routes = Routes { egress: vec![endpoint.clone()], live: vec![endpoint.cid], ..host.routes() };
    let narrower = EgressRoute { allow_addresses: Vec::new(), ..endpoint.clone() };
    let elsewhere = EgressRoute { port: 1, ..endpoint.clone() };
    let renamed = EgressRoute { hostname: "localhost".to_owned(), ..endpoint.clone() };
    let of_another = egress(17, 8000, upstream.address);
    let without_it: [(&str, Vec<EgressRoute>); 5] = [
        ("removed", Vec::new()),
        ("narrower", vec![narrower]),
        ("elsewhere", vec![elsewhere]),
        ("renamed", vec![renamed]),
        ("another enclave's", vec![of_another]),
    ];
    for (change, egress_after) in without_it {
        host.publish(&routes).await;
        let mut enclave = host.connect_from(16, 8000).await.unwrap();
        echo(&mut enclave).await.unwrap();
        // Other changes are none of its business: neither another endpoint beside it nor another vsock port for it.
        let beside = egress(16, 8002, "127.0.0.1:1".parse().unwrap());
        host.publish(&Routes { egress: vec![endpoint.clone(), beside], ..routes.clone() }).await;
        echo(&mut enclave).await.unwrap();
        let moved = EgressRoute { vsock_port: 8001, ..endpoint.clone() };
        host.publish(&Routes { egress: vec![moved], ..routes.clone() }).await;
        echo(&mut enclave).await.unwrap();
        host.publish(&Routes { egress: egress_after, ..routes.clone() }).await;
        assert!(soon(change, enclave.read_u8()).await.is_err(), "{change}: a connection outlived its endpoint");
    }
}

#[tokio::test]
async fn connections_end_with_their_cid() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    host.publish(&Routes { egress: vec![egress(16, 8000, upstream.address)], ..host.routes() }).await;
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    echo(&mut enclave).await.unwrap();
    host.publish(&host.routes()).await;
    assert!(soon("the cut", enclave.read_u8()).await.is_err());
    assert!(host.connect_from(16, 8000).await.is_err(), "the listener outlived its route");
}

async fn echo(enclave: &mut UnixStream) -> std::io::Result<()> {
    enclave.write_all(b"x").await?;
    assert_eq!(soon("the echo", enclave.read_u8()).await?, b'x');
    Ok(())
}
