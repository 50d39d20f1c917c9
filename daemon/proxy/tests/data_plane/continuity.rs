//! Generations of an enclave come and go, and with them the proxy: whoever connects meanwhile is served.

use crate::support::{DEADLINE, Enclave, Host, Upstream, cid, egress, soon, tcp_address, tcp_route};
use enclaved_core::routes::Routes;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::RwLock;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// One connection: connect, a byte each way, close.
async fn exchange<S: AsyncReadExt + AsyncWriteExt + Unpin>(connected: std::io::Result<S>) -> std::io::Result<()> {
    let mut stream = connected?;
    stream.write_all(b"x").await?;
    stream.read_u8().await.map(|byte| assert_eq!(byte, b'x'))
}

#[tokio::test]
async fn two_hundred_connects_each_way_across_twenty_updates_are_all_served() {
    let host = Host::new().await;
    let upstream = Upstream::echoing().await;
    let routes = |generations: &[u32], target: u32| {
        let tcp = vec![tcp_route("127.0.0.1:0", Some(target))];
        let egress = generations.iter().map(|number| egress(*number, 8000, upstream.address)).collect();
        let live = generations.iter().map(|number| cid(*number)).collect();
        Routes { egress, tcp, live, ..host.routes() }
    };
    let mut enclave = Enclave::echoing(&host.vsock(), 16);
    let address = tcp_address(&host.publish(&routes(&[16], 16)).await);
    // Who runs: whoever connects as an enclave holds it, so that none ends in the middle of that.
    let running = Arc::new(RwLock::new(16));
    let (served_in, served_out) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    let (counted, generation, vsock) = (served_out.clone(), running.clone(), host.vsock());
    clients.spawn(async move {
        loop {
            let number = generation.read().await;
            let path = vsock.join(format!("{}.sock_8000", *number));
            exchange(UnixStream::connect(path).await).await.expect("an enclave was refused");
            counted.fetch_add(1, SeqCst);
            drop(number);
            sleep(Duration::from_millis(1)).await;
        }
    });
    let counted = served_in.clone();
    clients.spawn(async move {
        loop {
            exchange(TcpStream::connect(address).await).await.expect("a client was refused");
            counted.fetch_add(1, SeqCst);
            sleep(Duration::from_millis(1)).await;
        }
    });
    let more = async |clients: &mut JoinSet<()>| {
        let goal = (served_in.load(SeqCst) + 10, served_out.load(SeqCst) + 10);
        let enough = async {
            while served_in.load(SeqCst) < goal.0 || served_out.load(SeqCst) < goal.1 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            done = timeout(DEADLINE, enough) => done.expect("nobody is served any more"),
            Some(Err(failed)) = clients.join_next() => panic!("{failed}"),
        }
    };
    for number in 17..37 {
        let former = number - 1;
        // Its endpoints first, then the enclave; then it takes over, and the former ends when it has nothing left to do.
        host.publish(&routes(&[former, number], former)).await;
        let successor = Enclave::echoing(&host.vsock(), number);
        host.publish(&routes(&[former, number], number)).await;
        more(&mut clients).await;
        *soon("the enclave's last word", running.write()).await = number;
        host.until("the former has nothing left to do", |report| !report.ingress_open.contains_key(&cid(former))).await;
        host.publish(&routes(&[number], number)).await;
        enclave = successor;
    }
    more(&mut clients).await;
    drop(enclave);
    let served = (served_in.load(SeqCst), served_out.load(SeqCst));
    assert!(served.0 >= 200 && served.1 >= 200, "{served:?}");
}
