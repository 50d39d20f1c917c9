//! Raw TCP ports.

use crate::support::{Enclave, Host, Upstream, cid, egress, soon, tcp_address, tcp_route, traffic};
use enclaved_core::routes::{Direction, Routes};
use std::io::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn bytes_pass_to_the_enclave_and_back_with_half_close() {
    let host = Host::new().await;
    let _enclave = Enclave::raw(&host.vsock(), 16, |port, mut stream| async move {
        let mut request = String::new();
        stream.read_to_string(&mut request).await.unwrap();
        stream.write_all(format!("{port} got {request}").as_bytes()).await.unwrap();
    });
    let routes = Routes { tcp: vec![tcp_route("127.0.0.1:0", Some(16))], ..host.routes() };
    let address = tcp_address(&host.publish(&routes).await);
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"words").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", client.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "7000 got words");
    let report = host.until("it is over", |report| traffic(report, Direction::Tcp).open == 0).await;
    let counted = traffic(&report, Direction::Tcp);
    assert_eq!((counted.total, counted.bytes_to_enclave, counted.bytes_from_enclave), (1, 5, 14));
}

#[tokio::test]
async fn without_a_target_connections_are_accepted_closed_and_counted() {
    let host = Host::new().await;
    let routes = Routes { tcp: vec![tcp_route("127.0.0.1:0", None)], ..host.routes() };
    let address = tcp_address(&host.publish(&routes).await);
    let mut client = TcpStream::connect(address).await.unwrap();
    assert_eq!(soon("the end", client.read(&mut [0; 1])).await.unwrap(), 0);
    let report = host.report().await;
    assert_eq!(traffic(&report, Direction::Tcp).failed["no_target"], 1);
}

#[tokio::test]
async fn a_new_target_takes_new_connections_and_the_old_keeps_its_own_until_it_is_gone() {
    let host = Host::new().await;
    let _old = Enclave::echoing(&host.vsock(), 16);
    let _new = Enclave::raw(&host.vsock(), 17, |_, mut stream| async move { stream.write_all(b"new").await.unwrap() });
    let mut routes = Routes { tcp: vec![tcp_route("127.0.0.1:0", Some(16))], ..host.routes() };
    let report = host.publish(&routes).await;
    let address = tcp_address(&report);
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"1").await.unwrap();
    assert_eq!(soon("the echo", client.read_u8()).await.unwrap(), b'1');

    let old = routes.tcp[0].target.replace(cid(17)).unwrap();
    routes.live = vec![old];
    let report = host.publish(&routes).await;
    assert_eq!(tcp_address(&report), address, "the listener was touched");
    assert_eq!(report.ingress_open[&old], 1);
    let mut said = String::new();
    TcpStream::connect(address).await.unwrap().read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "new");
    client.write_all(b"2").await.unwrap();
    assert_eq!(soon("the echo", client.read_u8()).await.unwrap(), b'2');

    routes.live.clear();
    host.publish(&routes).await;
    let error = soon("the cut", client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_enclave_that_is_to_end_has_its_clients_reset_and_keeps_what_it_connected_to_and_may_come_back() {
    let host = Host::new().await;
    let (_enclave, upstream) = (Enclave::echoing(&host.vsock(), 16), Upstream::echoing().await);
    let tcp = vec![tcp_route("127.0.0.1:0", Some(16))];
    let mut routes = Routes { tcp, egress: vec![egress(16, 8000, upstream.address)], ..host.routes() };
    let address = tcp_address(&host.publish(&routes).await);
    let (mut client, mut outward) =
        (TcpStream::connect(address).await.unwrap(), host.connect_from(16, 8000).await.unwrap());
    client.write_all(b"1").await.unwrap();
    outward.write_all(b"1").await.unwrap();
    assert_eq!(soon("the echo", client.read_u8()).await.unwrap(), b'1');

    routes.tcp[0].target = None;
    host.publish(&routes).await;
    let error = soon("the cut", client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    host.until("it is counted", |report| traffic(report, Direction::Tcp).failed.get("cut") == Some(&1)).await;
    assert_eq!(soon("the echo", outward.read_u8()).await.unwrap(), b'1');

    routes.tcp[0].target = Some(cid(16));
    host.publish(&routes).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"2").await.unwrap();
    outward.write_all(b"3").await.unwrap();
    assert_eq!(soon("the echo", client.read_u8()).await.unwrap(), b'2');
    assert_eq!(soon("the echo", outward.read_u8()).await.unwrap(), b'3');
}
