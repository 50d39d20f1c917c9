//! The life of the proxy and of its listeners: restarts, snapshots on disk, ports in use.

use crate::support::{Enclave, Host, Upstream, egress, https_address, soon, tcp_address, tcp_route, traffic};
use enclaved_core::routes::{Direction, ListenerKey, Routes};
use enclaved_proxy::{ProxyError, run};
use http::Response;
use std::os::unix::net::UnixListener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_killed_proxy_serves_the_last_routes_again_without_being_told() {
    let mut host = Host::new().await;
    let upstream = Upstream::echoing().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "hello");
    let mut routes = host.site(&["a.test"], Some(16));
    routes.egress = vec![egress(16, 8000, upstream.address)];
    let before = host.publish(&routes).await;
    let root = std::fs::read(host.state("ca/root.crt")).unwrap();
    host.kill().await;
    assert!(host.connect_from(16, 8000).await.is_err());

    host.launch();
    let report = host.until("the routes are served", |report| report.revision == before.revision).await;
    assert_eq!(report.last_routes_error, None);
    assert!(report.listeners.len() == 2 && report.listeners.iter().all(|listener| listener.error.is_none()));
    assert!(report.sequence > before.sequence);
    assert_eq!(std::fs::read(host.state("ca/root.crt")).unwrap(), root, "clients would have to trust a new root");
    let mut client = host.http1(https_address(&report), "a.test").await;
    assert_eq!(client.get_text("/").await, (200, "hello".to_owned()));
    let mut enclave = host.connect_from(16, 8000).await.unwrap();
    enclave.write_all(b"x").await.unwrap();
    assert_eq!(soon("the echo", enclave.read_u8()).await.unwrap(), b'x');
}

#[tokio::test]
async fn a_successors_egress_is_open_before_that_of_its_predecessor_goes() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    // Many, so that going from one to the other takes its time.
    let endpoints = |cid| (8000..8200).map(|port| egress(cid, port, upstream.address)).collect();
    let of = |cid| Routes { egress: endpoints(cid), ..host.site(&["a.test"], None) };
    for cid in 16..20 {
        host.publish(&of(cid)).await;
        let (routes, next) = (of(cid + 1), std::cell::Cell::new(true));
        let publishing = async {
            host.publish(&routes).await;
            next.set(false);
        };
        let looking = async {
            while next.get() {
                // If the old one has gone, the new one is there.
                let open = host.connect_from(cid, 8000).await.is_ok() || host.connect_from(cid + 1, 8000).await.is_ok();
                assert!(open, "neither {cid} nor {} has its egress", cid + 1);
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(publishing, looking);
    }
}

#[tokio::test]
async fn a_torn_snapshot_is_put_aside_and_reported_until_a_new_one_is_published() {
    let mut host = Host::new().await;
    host.publish(&host.site(&["a.test"], None)).await;
    host.kill().await;
    let whole = std::fs::read(host.state("routes.json")).unwrap();
    std::fs::write(host.state("routes.json"), &whole[..whole.len() / 2]).unwrap();
    host.start().await;
    let report = host.report().await;
    assert_eq!((report.revision, report.listeners.len()), (None, 0));
    let error = report.last_routes_error.unwrap();
    assert!(error.contains("torn") && error.contains("routes.json.bad-1"), "{error}");
    let report = host.publish(&host.site(&["a.test"], None)).await;
    assert_eq!(report.last_routes_error, None);
    assert_eq!(std::fs::read(host.state("routes.json")).unwrap(), whole);
}

#[tokio::test]
async fn routes_that_cannot_be_saved_are_served_and_reported_and_saved_when_possible() {
    let host = Host::new().await;
    std::fs::create_dir_all(host.state("routes.json/in-the-way")).unwrap();
    let routes = host.site(&["a.test"], None);
    let report = host.publish(&routes).await;
    assert_eq!(report.revision, Some(routes.revision()));
    assert!(report.last_routes_error.unwrap().contains("could not be saved"));
    std::fs::remove_dir_all(host.state("routes.json")).unwrap();
    host.until("they were saved", |report| report.last_routes_error.is_none()).await;
    let saved: Routes = serde_json::from_slice(&std::fs::read(host.state("routes.json")).unwrap()).unwrap();
    assert_eq!(saved, routes);
}

#[tokio::test]
async fn a_port_in_use_is_reported_leaves_the_others_alone_and_is_taken_when_free() {
    let host = Host::new().await;
    let blocker = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = blocker.local_addr().unwrap();
    let vsock_blocker = UnixListener::bind(host.vsock().join("16.sock_8000")).unwrap();
    let mut routes = host.site(&["a.test"], None);
    routes.tcp = vec![tcp_route(&address.to_string(), None)];
    routes.egress = vec![egress(16, 8000, address)];
    let report = host.publish(&routes).await;
    for listener in &report.listeners {
        let blocked = !matches!(listener.listener, ListenerKey::Https { .. });
        assert_eq!(listener.error.is_some(), blocked, "{listener:?}");
        assert_eq!(listener.error.as_ref().is_some_and(|error| error.contains("in use")), blocked, "{listener:?}");
    }
    drop((blocker, vsock_blocker));
    let open =
        |report: &enclaved_core::routes::ProxyReport| report.listeners.iter().all(|listener| listener.error.is_none());
    let later = host.until("all listen", open).await;
    assert!(later.sequence > report.sequence);
}

#[tokio::test]
async fn an_address_may_change_its_use_within_one_snapshot() {
    let host = Host::new().await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    host.publish(&Routes { tcp: vec![tcp_route(&address.to_string(), None)], ..host.routes() }).await;
    let mut routes = host.site(&["a.test"], None);
    routes.https.as_mut().unwrap().listen = address;
    assert_eq!(https_address(&host.publish(&routes).await), address);
}

#[tokio::test]
async fn listeners_and_connections_that_a_snapshot_does_not_concern_are_untouched() {
    let host = Host::new().await;
    let _enclave = Enclave::echoing(&host.vsock(), 16);
    let mut routes = Routes { tcp: vec![tcp_route("127.0.0.1:0", Some(16))], ..host.routes() };
    let address = tcp_address(&host.publish(&routes).await);
    let mut client = TcpStream::connect(address).await.unwrap();
    let other = host.site(&["a.test"], None);
    routes = Routes { https: other.https, sites: other.sites, ..routes };
    let report = host.publish(&routes).await;
    // The kernel chose the port; a new socket would have another.
    assert_eq!(tcp_address(&report), address);
    client.write_all(b"x").await.unwrap();
    assert_eq!(soon("the echo", client.read_u8()).await.unwrap(), b'x');
    routes.tcp.clear();
    host.publish(&routes).await;
    assert!(TcpStream::connect(address).await.is_err(), "the listener outlived its route");
}

#[tokio::test]
async fn one_state_directory_has_one_proxy() {
    let host = Host::new().await;
    let error = run(host.options(), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, ProxyError::AlreadyRunning { .. }), "{error}");
    host.report().await;
}

#[tokio::test]
async fn a_link_that_cannot_be_opened_ends_a_proxy_only_if_it_has_nothing_to_serve() {
    let mut host = Host::without_proxy();
    std::fs::write(host.options().link, "in the way").unwrap();
    let error = run(host.options(), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, ProxyError::Link(_)), "{error}");

    std::fs::remove_file(host.options().link).unwrap();
    host.start().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "hello");
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut routes = host.site(&["a.test"], Some(16));
    routes.https.as_mut().unwrap().listen = free;
    host.publish(&routes).await;
    host.stop().await.unwrap();
    std::fs::write(host.options().link, "in the way").unwrap();
    host.launch();
    let served = async {
        while TcpStream::connect(free).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    soon("HTTPS", served).await;
    assert_eq!(host.http1(free, "a.test").await.get_text("/").await, (200, "hello".to_owned()));
    std::fs::remove_file(host.options().link).unwrap();
    host.until("the link is open after all", |report| report.revision.is_some()).await;
}

#[tokio::test]
async fn stopping_lets_requests_in_flight_finish_and_refuses_new_connections() {
    let mut host = Host::with_limits(|limits| limits.drain = crate::support::DEADLINE).await;
    let (release, released) = tokio::sync::watch::channel(false);
    let _enclave = Enclave::http(&host.vsock(), 16, move |_, _| {
        let mut released = released.clone();
        async move {
            released.wait_for(|released| *released).await.unwrap();
            Response::new(crate::support::body("done"))
        }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.http1(address, "a.test").await;
    let mut idle = host.http2(address, "a.test").await;
    let request = tokio::spawn(async move { client.get_text("/").await });
    host.until("the request is in flight", |report| traffic(report, Direction::Https).open == 1).await;
    let refused_then_released = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        release.send(true).unwrap();
    };
    let (stopped, ()) = tokio::join!(host.stop(), refused_then_released);
    stopped.unwrap();
    assert_eq!(request.await.unwrap(), (200, "done".to_owned()));
    assert!(idle.get("/").await.is_err());
}

#[tokio::test]
async fn stopping_cuts_what_does_not_end_in_time() {
    let mut host = Host::new().await;
    let _enclave = Enclave::echoing(&host.vsock(), 16);
    let routes = Routes { tcp: vec![tcp_route("127.0.0.1:0", Some(16))], ..host.routes() };
    let address = tcp_address(&host.publish(&routes).await);
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"x").await.unwrap();
    assert_eq!(soon("the echo", client.read_u8()).await.unwrap(), b'x');
    host.stop().await.unwrap();
    assert!(soon("the cut", client.read_u8()).await.is_err());
}
