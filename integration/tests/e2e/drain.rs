//! Connections of a raw TCP port when a new generation takes over. The port leads to HTTP in the enclave, which says who answers.

use crate::fixture::{DEADLINE, Host, eventually, of};
use enclaved_core::status::Status;
use enclaved_integration::enclave::Answer;
use enclaved_integration::host::HTTP_PORT;
use enclaved_integration::processes::is_alive;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Asks over a connection who answers.
async fn label(stream: &mut TcpStream) -> io::Result<String> {
    let exchange = async {
        stream.write_all(b"GET /who HTTP/1.1\r\nhost: signer\r\n\r\n").await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).await?;
        let answer: Answer = serde_json::from_slice(&body).unwrap();
        Ok(answer.label)
    };
    timeout(DEADLINE, exchange).await.unwrap()
}

/// A host that drains for so long, and the address of its port.
async fn host(drain: &str) -> (Host, SocketAddr) {
    let host = Host::with_image().await;
    host.put("signer-2.eif", &host.application("v2")).await;
    configure(&host, "signer.eif", drain);
    host.start();
    host.until_ready().await;
    let listen = host.machine.tcp(9000);
    (host, listen)
}

fn configure(host: &Host, image: &str, drain: &str) {
    let ports = format!(
        "http_port = 8080, ports = [{{ listen = \"{}\", vsock_port = {HTTP_PORT} }}] }}",
        host.machine.tcp(9000)
    );
    let enclave = host.machine.sample_enclave("signer", image).replace("http_port = 8080 }", &ports);
    let config = host.machine.host_config().replace("drain = \"2s\"", &format!("drain = \"{drain}\""));
    assert!(config.contains(drain) && enclave.contains(&ports));
    host.machine.write_config(&(config + &enclave)).unwrap();
}

/// New connections, one after the other, until it is ended; gives whose answers they had.
fn newcomers(listen: SocketAddr) -> (CancellationToken, JoinHandle<Vec<String>>) {
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let task = tokio::spawn(async move {
        let mut labels = Vec::new();
        while !stopped.is_cancelled() {
            let mut stream = TcpStream::connect(listen).await.unwrap();
            labels.push(label(&mut stream).await.unwrap());
            sleep(Duration::from_millis(5)).await;
        }
        labels
    });
    (stop, task)
}

/// Every newcomer was answered, from one moment on by the new generation alone.
async fn all_went_over((stop, task): (CancellationToken, JoinHandle<Vec<String>>)) {
    stop.cancel();
    let labels = task.await.unwrap();
    let old = labels.iter().take_while(|label| *label == "v1").count();
    assert!(old > 0 && old < labels.len() && labels[old..].iter().all(|label| label == "v2"), "{labels:?}");
}

async fn until_new_connections_go_over(listen: SocketAddr) {
    eventually("new connections go to the new generation", async || {
        let mut stream = TcpStream::connect(listen).await.unwrap();
        (label(&mut stream).await.unwrap() == "v2").then_some(())
    })
    .await;
}

async fn until_alone(host: &Host) -> Status {
    host.until("the new one is alone", |status| of(status, "signer").others.is_empty() && status.ready).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_stays_with_its_generation_until_it_is_done_and_the_old_enclave_ends_right_after() {
    let (host, listen) = host("10m").await;
    let old = of(&host.until_ready().await, "signer").pid.unwrap();
    let newcomers = newcomers(listen);
    let mut kept = TcpStream::connect(listen).await.unwrap();
    assert_eq!(label(&mut kept).await.unwrap(), "v1");
    configure(&host, "signer-2.eif", "10m");
    host.ctl_ok(&["reload"]);
    until_new_connections_go_over(listen).await;
    for _ in 0..20 {
        assert_eq!(label(&mut kept).await.unwrap(), "v1");
        sleep(Duration::from_millis(50)).await;
    }
    assert!(is_alive(old) && !of(&host.status().await.unwrap(), "signer").others.is_empty());
    drop(kept);
    // Long before the deadline.
    let done = Instant::now();
    until_alone(&host).await;
    assert!(!is_alive(old));
    println!("the old generation was gone {:?} after its last connection", done.elapsed());
    all_went_over(newcomers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_outlasts_the_drain_is_reset_at_the_deadline_and_counted_and_new_ones_are_served_throughout()
{
    let (host, listen) = host("2s").await;
    let newcomers = newcomers(listen);
    let mut kept = TcpStream::connect(listen).await.unwrap();
    assert_eq!(label(&mut kept).await.unwrap(), "v1");
    configure(&host, "signer-2.eif", "2s");
    host.ctl_ok(&["reload"]);
    until_new_connections_go_over(listen).await;
    let went_over = Instant::now();
    let error = loop {
        match label(&mut kept).await {
            Ok(label) => assert_eq!(label, "v1"),
            Err(error) => break error,
        }
        sleep(Duration::from_millis(10)).await;
    };
    let lasted = went_over.elapsed();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}: a client could take it for the end");
    assert!((Duration::from_millis(1500)..Duration::from_secs(6)).contains(&lasted), "cut after {lasted:?}");
    until_alone(&host).await;
    let cut =
        "enclaved_traffic_failures_total{direction=\"tcp\",enclave=\"signer\",endpoint=\"9000\",reason=\"cut\"} 1";
    eventually("the cut is counted", async || {
        let (_, metrics) = host.ask_publicly("/metrics").await?;
        metrics.lines().any(|line| line == cut).then_some(())
    })
    .await;
    all_went_over(newcomers).await;
}
