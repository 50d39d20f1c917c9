//! Connections into enclaves that requests share, and what one request's misfortune is to the others.

use crate::support::{Body, Enclave, Host, body, cid, https_address, soon};
use enclaved_core::routes::{PathRoute, Routes, UpstreamHttp};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A request that its enclave refuses to answer.
#[derive(Debug, thiserror::Error)]
#[error("no answer")]
struct NoAnswer;

/// An enclave that speaks HTTP/2 in clear on every port, takes so many requests of a connection at a time, and answers with
/// this; and the number of connections to it.
fn h2c_enclave<F>(
    host: &Host,
    streams: u32,
    answer: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static,
) -> (Enclave, Arc<AtomicUsize>)
where
    F: Future<Output = Result<Response<Body>, NoAnswer>> + Send + 'static,
{
    let (connections, answer) = (Arc::new(AtomicUsize::new(0)), Arc::new(answer));
    let counted = connections.clone();
    let enclave = Enclave::raw(&host.vsock(), 16, move |_, stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        let answer = answer.clone();
        async move {
            let service = hyper::service::service_fn(move |request| answer(request));
            let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            server.max_concurrent_streams(streams);
            drop(server.serve_connection(TokioIo::new(stream), service).await);
        }
    });
    (enclave, connections)
}

/// One site, whose enclave speaks HTTP/2 in clear.
fn h2c_site(host: &Host) -> Routes {
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].paths = vec![PathRoute { prefix: "/".into(), vsock_port: 50051, upstream: UpstreamHttp::H2c }];
    routes
}

#[tokio::test]
async fn a_request_that_its_enclave_resets_is_run_once_and_the_shared_connection_serves_on() {
    let host = Host::new().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let (_enclave, connections) = h2c_enclave(&host, 100, move |request| {
        let counted = counted.clone();
        async move {
            if request.uri().path() != "/resets" {
                return Ok(Response::new(body("well")));
            }
            counted.fetch_add(1, Ordering::SeqCst);
            Err(NoAnswer)
        }
    });
    let mut client = host.http2(https_address(&host.publish(&h2c_site(&host)).await), "a.test").await;
    assert_eq!(client.get_text("/").await.0, 200);
    assert_eq!(client.get("/resets").await.unwrap().status(), 502);
    assert_eq!(client.get_text("/").await.0, 200);
    assert_eq!((runs.load(Ordering::SeqCst), connections.load(Ordering::SeqCst)), (1, 1));
}

#[tokio::test]
async fn a_request_that_makes_its_enclave_hang_up_is_run_twice_at_most_however_many_connections_are_kept() {
    const KEPT: usize = 8;
    let host = Host::new().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let (counted, all_there) = (runs.clone(), Arc::new(tokio::sync::Barrier::new(KEPT)));
    let service = move |request: Request<Incoming>| {
        let (counted, all_there) = (counted.clone(), all_there.clone());
        async move {
            if request.uri().path() != "/hangs-up" {
                // Each has a connection of its own.
                all_there.wait().await;
                return Ok(Response::new(body("well")));
            }
            counted.fetch_add(1, Ordering::SeqCst);
            Err(NoAnswer)
        }
    };
    let _enclave = Enclave::raw(&host.vsock(), 16, move |_, stream| {
        let service = hyper::service::service_fn(service.clone());
        async move {
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut clients = Vec::new();
    for _ in 0..KEPT {
        clients.push(host.http1(address, "a.test").await);
    }
    let mut asked = tokio::task::JoinSet::new();
    for mut client in clients {
        asked.spawn(async move { client.get_text("/").await.0 });
    }
    assert!(soon("the first answers", asked.join_all()).await.into_iter().all(|status| status == 200));
    host.until("all are over", |report| !report.ingress_open.contains_key(&cid(16))).await;
    let mut client = host.http1(address, "a.test").await;
    assert_eq!(client.get("/hangs-up").await.unwrap().status(), 502);
    assert_eq!(runs.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_client_that_reads_none_of_its_many_answers_holds_up_nobody_elses() {
    const UNREAD: usize = 110;
    let host = Host::new().await;
    let (_enclave, _) = h2c_enclave(&host, 1000, |_| async { Ok(Response::new(body(vec![b'x'; 600 << 10]))) });
    let address = https_address(&host.publish(&h2c_site(&host)).await);
    let tls = host.tls(address, "a.test", b"h2").await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let handshake = builder.initial_stream_window_size(0).handshake::<_, Body>(TokioIo::new(tls));
    let (mut greedy, connection) = handshake.await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { drop(connection.await) });
    let mut unread = Vec::new();
    for _ in 0..UNREAD {
        let request = Request::get("https://a.test/").body(body("")).unwrap();
        unread.push(soon("a head", greedy.send_request(request)).await.unwrap());
    }
    for mut client in [host.http1(address, "a.test").await, host.http2(address, "a.test").await] {
        let (status, text) = client.get_text("/").await;
        assert_eq!((status, text.len()), (200, 600 << 10));
    }
    assert!(unread.iter().all(|response| response.status() == 200));
}

#[tokio::test]
async fn a_request_for_which_an_enclave_has_no_room_on_one_connection_goes_over_another() {
    let host = Host::new().await;
    let (_enclave, connections) = h2c_enclave(&host, 2, |request| async move {
        if request.uri().path() == "/long" {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(body("well")))
    });
    let address = https_address(&host.publish(&h2c_site(&host)).await);
    let mut client = host.http2(address, "a.test").await;
    assert_eq!(client.get_text("/").await.0, 200);
    let mut long = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let mut client = host.http2(address, "a.test").await;
        long.spawn(async move { client.get("/long").await.map(|response| response.status()) });
    }
    host.until("both are on their way", |report| report.ingress_open.get(&cid(16)) == Some(&2)).await;
    for _ in 0..3 {
        assert_eq!(client.get_text("/").await.0, 200);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn an_answer_that_a_client_does_not_take_is_over_in_time_though_its_connection_lives() {
    let host = Host::with_limits(|limits| limits.client_stall = Duration::from_millis(500)).await;
    let (_enclave, _) = h2c_enclave(&host, 1000, |_| async { Ok(Response::new(body(vec![b'x'; 600 << 10]))) });
    let mut routes = h2c_site(&host);
    routes.https.as_mut().unwrap().rules.max_connections_per_source = Some(3);
    let address = https_address(&host.publish(&routes).await);
    let tls = host.tls(address, "a.test", b"h2").await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let handshake = builder.initial_stream_window_size(0).handshake::<_, Body>(TokioIo::new(tls));
    let (mut deaf, connection) = handshake.await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { drop(connection.await) });
    let mut unread = Vec::new();
    for _ in 0..3 {
        let request = Request::get("https://a.test/").body(body("")).unwrap();
        unread.push(soon("a head", deaf.send_request(request)).await.unwrap());
    }
    host.until("they hold no place any more", |report| {
        let idle = report.traffic.iter().map(|traffic| traffic.failed.get("idle").copied().unwrap_or(0)).sum::<u64>();
        idle == 3 && !report.ingress_open.contains_key(&cid(16))
    })
    .await;
    assert!(!deaf.is_closed(), "the connection is not at fault");
    // But their source's places: what was handed over before is in memory until their streams end.
    let mut other = host.http2(address, "a.test").await;
    assert_eq!(other.get_text("/").await.0, 503);
    drop((unread, deaf, tasks));
    host.until("the connection is gone", |report| report.https_connections == 1).await;
    // One that reads gets all of it, however many pieces that takes.
    let (status, text) = other.get_text("/").await;
    assert_eq!((status, text.len()), (200, 600 << 10));
}
