//! What is told of the connections into an enclave that carry requests.

use crate::support::{Enclave, Host, body, https_address, soon, text, traffic};
use enclaved_core::routes::{Direction, ProxyReport, UpstreamHttp, UpstreamReport};
use http::Response;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

fn upstream(report: &ProxyReport) -> &UpstreamReport {
    &traffic(report, Direction::Https).upstream
}

async fn until(host: &Host, what: &str, like: &UpstreamReport) {
    host.until(what, |report| upstream(report) == like).await;
}

#[tokio::test]
async fn connections_are_active_while_they_carry_a_request_and_idle_until_the_next() {
    let host = Host::new().await;
    let gate = Arc::new(Semaphore::new(0));
    let passed = gate.clone();
    let enclave = Enclave::http(&host.vsock(), 16, move |_, _| {
        let passed = passed.clone();
        async move {
            passed.acquire().await.unwrap().forget();
            Response::new(body("well"))
        }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let (mut one, mut other) = (host.http1(address, "a.test").await, host.http1(address, "a.test").await);
    let both = async { tokio::join!(one.get_text("/"), other.get_text("/")) };
    let open = async {
        until(&host, "both are active", &UpstreamReport { active: 2, connects: 2, ..UpstreamReport::default() }).await;
        gate.add_permits(3);
    };
    tokio::join!(both, open);
    until(&host, "both are idle", &UpstreamReport { idle: 2, connects: 2, ..UpstreamReport::default() }).await;
    assert_eq!(one.get_text("/").await.0, 200);
    until(&host, "one was used", &UpstreamReport { idle: 2, connects: 2, reused: 1, ..UpstreamReport::default() })
        .await;

    drop(enclave);
    until(&host, "they ended", &UpstreamReport { connects: 2, reused: 1, ..UpstreamReport::default() }).await;
    assert_eq!(one.get_text("/").await.0, 502);
    let report = host.report().await;
    let told = upstream(&report);
    assert_eq!((told.connects, told.connects_failed.get("connect")), (3, Some(&1)), "{told:?}");
}

#[tokio::test]
async fn a_request_that_is_sent_again_is_counted() {
    let host = Host::new().await;
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let _enclave = Enclave::raw(&host.vsock(), 16, move |_, mut stream| {
        let number = counted.fetch_add(1, Ordering::SeqCst);
        async move {
            for answers in 0.. {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                // The first connection hangs up on its second request.
                if (number, answers) == (0, 1) {
                    return;
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
        }
    });
    let address = https_address(&host.publish(&host.site(&["a.test"], Some(16))).await);
    let mut client = host.http1(address, "a.test").await;
    assert_eq!(client.get_text("/").await.0, 200);
    until(&host, "it is kept", &UpstreamReport { idle: 1, connects: 1, ..UpstreamReport::default() }).await;
    assert_eq!(client.get_text("/").await.0, 200);
    let after = UpstreamReport { idle: 1, connects: 2, reused: 1, repeated: 1, ..UpstreamReport::default() };
    until(&host, "it was sent again", &after).await;
}

#[tokio::test]
async fn a_connection_that_requests_share_is_one() {
    let host = Host::new().await;
    let gate = Arc::new(Semaphore::new(0));
    let passed = gate.clone();
    let _enclave = Enclave::raw(&host.vsock(), 16, move |_, stream| {
        let passed = passed.clone();
        async move {
            let service = hyper::service::service_fn(move |_| {
                let passed = passed.clone();
                async move {
                    passed.acquire().await.unwrap().forget();
                    Ok::<_, Infallible>(Response::new(body("well")))
                }
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            drop(server.serve_connection(TokioIo::new(stream), service).await);
        }
    });
    let mut routes = host.site(&["a.test"], Some(16));
    routes.sites[0].paths[0].upstream = UpstreamHttp::H2c;
    let address = https_address(&host.publish(&routes).await);
    gate.add_permits(1);
    assert_eq!(host.http2(address, "a.test").await.get_text("/").await.0, 200);
    until(&host, "it is idle", &UpstreamReport { idle: 1, connects: 1, ..UpstreamReport::default() }).await;
    let (mut one, mut other) = (host.http2(address, "a.test").await, host.http2(address, "a.test").await);
    let both = async { tokio::join!(one.get("/"), other.get("/")) };
    let used = UpstreamReport { active: 1, connects: 1, reused: 2, ..UpstreamReport::default() };
    let open = async {
        until(&host, "both share it", &used).await;
        gate.add_permits(2);
    };
    let ((one, other), ()) = soon("both", async { tokio::join!(both, open) }).await;
    for response in [one, other] {
        assert_eq!(text(response.unwrap()).await, "well");
    }
    until(&host, "it is idle again", &UpstreamReport { active: 0, idle: 1, ..used }).await;
}
