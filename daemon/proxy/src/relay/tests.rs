use super::*;
use crate::counters::{Traffic, TrafficKey};
use enclaved_core::routes::Direction as Way;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

impl Carried for DuplexStream {}

fn traffic() -> Arc<Traffic> {
    let key = TrafficKey { enclave: "signer".parse().unwrap(), direction: Way::Egress, endpoint: "x:1".into() };
    Arc::new(Traffic::new(key))
}

/// A relay between two pipes; their far ends, and the relay's end.
fn relayed(pipe: usize) -> (DuplexStream, DuplexStream, Arc<Traffic>, JoinHandle<Result<(), Broken>>) {
    let (enclave, mut enclave_end) = duplex(pipe);
    let (other, mut other_end) = duplex(pipe);
    let traffic = traffic();
    let counted = traffic.clone();
    let relay =
        tokio::spawn(async move { relay(&mut enclave_end, &mut other_end, &counted, &Limits::default()).await });
    (enclave, other, traffic, relay)
}

fn carried(traffic: &Traffic) -> (u64, u64) {
    (traffic.to_enclave.load(Relaxed), traffic.from_enclave.load(Relaxed))
}

#[tokio::test]
async fn bytes_arrive_whole_and_in_order_both_ways_and_are_counted_exactly() {
    // A pipe smaller than a chunk, so that writes are partial.
    let (mut enclave, mut other, traffic, relay) = relayed(1000);
    let pattern = |len: usize| (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect::<Vec<_>>();
    let (request, answer) = (pattern(300_001), pattern(1_234_567));
    let (mut received_request, mut received_answer) = (Vec::new(), Vec::new());
    let (mut enclave_read, mut enclave_write) = tokio::io::split(&mut enclave);
    let (mut other_read, mut other_write) = tokio::io::split(&mut other);
    tokio::join!(
        async {
            enclave_write.write_all(&request).await.unwrap();
            enclave_write.shutdown().await.unwrap();
        },
        async {
            other_write.write_all(&answer).await.unwrap();
            other_write.shutdown().await.unwrap();
        },
        async { other_read.read_to_end(&mut received_request).await.unwrap() },
        async { enclave_read.read_to_end(&mut received_answer).await.unwrap() },
    );
    relay.await.unwrap().unwrap();
    assert!(received_request == request && received_answer == answer);
    assert_eq!(carried(&traffic), (1_234_567, 300_001));
}

#[tokio::test]
async fn closing_one_direction_leaves_the_other_open() {
    let (mut enclave, mut other, _, relay) = relayed(64);
    enclave.write_all(b"request").await.unwrap();
    enclave.shutdown().await.unwrap();
    let mut request = Vec::new();
    other.read_to_end(&mut request).await.unwrap();
    assert_eq!(request, b"request");
    other.write_all(b"late answer").await.unwrap();
    drop(other);
    let mut answer = Vec::new();
    enclave.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"late answer");
    relay.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_stops_stalls_its_sender_at_a_bounded_amount() {
    let (mut enclave, _other, _, _relay) = relayed(1000);
    let mut sent = 0;
    while let Ok(Ok(written)) = tokio::time::timeout(Duration::from_secs(1), enclave.write(&[0; 4096])).await {
        sent += written;
        assert!(
            sent <= 2 * 1000 + Limits::default().relay_buffer,
            "{sent} bytes were taken from the sender, and nobody reads them"
        );
    }
    assert!(sent >= 1000);
}

#[tokio::test(start_paused = true)]
async fn silence_ends_a_relay_at_the_limit_and_every_byte_puts_it_off() {
    let (mut enclave, mut other, _, relay) = relayed(64);
    let start = Instant::now();
    let limit = Limits::default().relay_idle;
    tokio::time::sleep(limit / 2).await;
    enclave.write_all(b"x").await.unwrap();
    other.read_u8().await.unwrap();
    assert!(matches!(relay.await.unwrap(), Err(Broken::Idle)));
    assert_eq!(start.elapsed().as_secs(), (limit + limit / 2).as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_relay_is_reaped_sooner() {
    let (mut enclave, _other, _, relay) = relayed(64);
    let start = Instant::now();
    enclave.shutdown().await.unwrap();
    assert!(matches!(relay.await.unwrap(), Err(Broken::Idle)));
    assert_eq!(start.elapsed().as_secs(), Limits::default().relay_half_closed.as_secs());
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(connect, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

#[tokio::test]
async fn a_reset_ends_the_relay_at_once() {
    let (enclave, mut enclave_end) = duplex(64);
    let (mut other_end, other) = tcp_pair().await;
    let traffic = traffic();
    other.set_zero_linger().unwrap();
    drop(other);
    let limits = Limits::default();
    let relay = relay(&mut enclave_end, &mut other_end, &traffic, &limits);
    let result = tokio::time::timeout(Duration::from_secs(10), relay).await.expect("the relay goes on after a reset");
    assert!(matches!(result, Err(Broken::Reset { end: End::Other, .. })), "{result:?}");
    drop(enclave);
}

#[tokio::test(start_paused = true)]
async fn a_reset_is_noticed_also_while_the_other_end_takes_nothing() {
    // Nobody reads at the enclave's end, so the relay reads no more than a chunk of the flood.
    let (_enclave, mut enclave_end) = duplex(64);
    let (mut other_end, mut other) = tcp_pair().await;
    other.write_all(&[0; 4 * (64 << 10)]).await.unwrap();
    let (traffic, limits) = (traffic(), Limits::default());
    let mut relay = Box::pin(relay(&mut enclave_end, &mut other_end, &traffic, &limits));
    let alive = tokio::time::timeout(LOOK * 3, &mut relay).await;
    assert!(alive.is_err(), "a slow reader alone ends nothing: {alive:?}");
    other.set_zero_linger().unwrap();
    drop(other);
    let result = tokio::time::timeout(LOOK * 2, relay).await.expect("the reset was not noticed");
    assert!(matches!(result, Err(Broken::Reset { end: End::Other, .. })), "{result:?}");
}

#[tokio::test(start_paused = true)]
async fn a_relay_ends_at_the_age_it_is_given_though_bytes_flow() {
    let (mut enclave, mut enclave_end) = duplex(64);
    let (mut other, mut other_end) = duplex(64);
    let limits = Limits { relay_lifetime: Some(Duration::from_secs(60)), ..Limits::default() };
    let (start, traffic) = (Instant::now(), traffic());
    let talk = async {
        loop {
            enclave.write_all(b"x").await.unwrap();
            other.read_u8().await.unwrap();
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    };
    let ended = tokio::select! {
        ended = relay(&mut enclave_end, &mut other_end, &traffic, &limits) => ended,
        () = talk => unreachable!(),
    };
    assert!(matches!(ended, Err(Broken::TooOld)));
    assert_eq!(start.elapsed().as_secs(), 60);
}

#[tokio::test]
async fn a_relay_is_small() {
    let (mut enclave_end, _enclave) = duplex(64);
    let (mut other_end, _other) = tcp_pair().await;
    let (traffic, limits) = (traffic(), Limits::default());
    let relay = relay(&mut enclave_end, &mut other_end, &traffic, &limits);
    // Eight thousand of them are idle on a busy host; beside this each has its two sockets.
    assert!(size_of_val(&relay) <= 512, "{} bytes", size_of_val(&relay));
}

#[tokio::test]
async fn an_answer_sent_before_closing_without_reading_still_arrives() {
    let (mut enclave, mut other, _, relay) = relayed(16);
    other.write_all(b"no, thank you").await.unwrap();
    drop(other);
    let mut answer = Vec::new();
    // The request does not fit: the relay fails to write it, and must not throw the answer away for that.
    let writing = enclave.write_all(&[0; 100]).await;
    enclave.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"no, thank you", "{writing:?}");
    drop(enclave);
    assert!(matches!(relay.await.unwrap(), Err(Broken::Deaf { end: End::Other, .. })));
}

#[tokio::test]
async fn an_idle_relay_holds_no_buffer() {
    let (mut left, mut left_end) = duplex(1000);
    let (mut right_end, mut right) = duplex(1000);
    let mut direction = Direction::new(End::Enclave);
    let mut scratch = vec![0; 64 << 10];
    left.write_all(&[7; 1000]).await.unwrap();
    let mut poll = |direction: &mut Direction| {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(direction.poll(&mut cx, &mut left_end, &mut right_end, &mut scratch, &|_| ()).is_pending());
    };
    poll(&mut direction);
    left.write_all(&[7; 500]).await.unwrap();
    poll(&mut direction);
    assert_eq!(direction.held.len(), 500, "the pipe is full, the rest is held");
    let mut received = vec![0; 1500];
    right.read_exact(&mut received[..1000]).await.unwrap();
    poll(&mut direction);
    right.read_exact(&mut received[1000..]).await.unwrap();
    assert_eq!(direction.held.capacity(), 0);
    assert_eq!(received, vec![7; 1500]);
}
