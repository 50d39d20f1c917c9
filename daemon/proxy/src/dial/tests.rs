use super::*;
use crate::shared::Shared;
use enclaved_core::id::Cid;
use std::collections::HashSet;
use tokio::net::TcpListener;

fn route(hostname: &str, port: u16, allow: &[&str]) -> EgressRoute {
    EgressRoute {
        enclave: "signer".parse().unwrap(),
        cid: Cid::FIRST,
        vsock_port: 8000,
        hostname: hostname.to_owned(),
        port,
        sni: false,
        limits: enclaved_core::routes::EgressLimits::default(),
        allow_addresses: ips(allow),
    }
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn upstream(hostname: &str, port: u16, allow: &[&str]) -> (Upstream, Shared) {
    let shared = Shared::new(Limits::default());
    (Upstream::new(&route(hostname, port, allow), &shared.resolver), shared)
}

async fn dial_with(hostname: &str, port: u16, allow: &[&str]) -> Result<TcpStream, DialError> {
    let (upstream, shared) = upstream(hostname, port, allow);
    upstream.dial(&Latency::default(), &shared.limits, &shared.own_addresses).await
}

fn numbered(count: u8) -> Vec<SocketAddr> {
    (0..count).map(|number| ([10, 0, 0, number], 443).into()).collect()
}

#[tokio::test]
async fn a_name_that_leads_to_the_host_is_refused_unless_the_address_is_listed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    for hostname in ["localhost", "127.0.0.1", "::ffff:127.0.0.1"] {
        let error = dial_with(hostname, port, &[]).await.unwrap_err();
        assert!(matches!(error, DialError::Refused { .. }), "{hostname}: {error:?}");
        assert_eq!(error.failure(), Failure::AddressRefused);
    }
    dial_with("localhost", port, &["127.0.0.1"]).await.unwrap();
    dial_with("127.0.0.1", port, &["127.0.0.1"]).await.unwrap();
}

#[tokio::test]
async fn an_address_that_refuses_is_passed_over_at_once_and_remembered() {
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead_address = dead.local_addr().unwrap();
    drop(dead);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let live_address = listener.local_addr().unwrap();
    let (limits, mut slower) = (Limits::default(), Vec::new());
    let addresses = [dead_address, live_address];
    let (stream, address) = race(&addresses, &limits, TcpStream::connect, &mut slower).await.unwrap();
    assert_eq!((stream.peer_addr().unwrap(), address), (live_address, live_address));
    assert_eq!(slower, [dead_address]);
    let error = race(&[dead_address], &limits, TcpStream::connect, &mut slower).await.unwrap_err();
    assert_eq!(error.failure(), Failure::Connect);
}

#[tokio::test(start_paused = true)]
async fn silent_addresses_hold_up_the_one_that_answers_by_a_quarter_of_a_second_each() {
    let limits = Limits::default();
    for silent in [0_u8, 1, 2, 5, 15] {
        let addresses = numbered(silent + 1);
        let answers = *addresses.last().unwrap();
        let attempt = |address| async move {
            if address != answers {
                std::future::pending::<()>().await;
            }
            Ok(())
        };
        let (start, mut slower) = (Instant::now(), Vec::new());
        let ((), reached) = race(&addresses, &limits, attempt, &mut slower).await.unwrap();
        assert_eq!(reached, answers);
        assert_eq!(start.elapsed(), limits.next_attempt * silent.into());
        assert_eq!(slower.len(), usize::from(silent), "those before it were overtaken");
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_slow_still_wins_over_one_that_is_slower_and_the_loser_is_dropped() {
    let addresses = numbered(3);
    let dropped = Arc::new(AtomicUsize::new(0));
    struct Witness(Arc<AtomicUsize>);
    impl Drop for Witness {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
        }
    }
    let first = addresses[0];
    let attempt = |address| {
        let witness = Witness(dropped.clone());
        async move {
            let _witness = witness;
            sleep(if address == first { Duration::from_millis(600) } else { Duration::from_secs(5) }).await;
            Ok(())
        }
    };
    let (start, mut slower) = (Instant::now(), Vec::new());
    let ((), reached) = race(&addresses, &Limits::default(), attempt, &mut slower).await.unwrap();
    assert_eq!((reached, start.elapsed().as_millis()), (first, 600));
    assert_eq!((dropped.load(Relaxed), slower.len()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn where_nobody_answers_that_is_known_when_the_last_address_had_its_time() {
    let limits = Limits::default();
    let (addresses, start) = (numbered(4), Instant::now());
    let attempt = |_| std::future::pending::<io::Result<()>>();
    let error = race(&addresses, &limits, attempt, &mut Vec::new()).await.unwrap_err();
    assert_eq!(error.failure(), Failure::ConnectTimeout);
    assert_eq!(start.elapsed(), limits.next_attempt * 3 + limits.connect);
}

#[tokio::test]
async fn connections_begin_at_every_address_in_turn_with_families_alternating() {
    let (upstream, _) = upstream("10.0.0.1", 443, &[]);
    let all = ips(&["2600::1", "2600::2", "2600::3", "10.0.0.1", "10.0.0.2"]);
    let order = upstream.in_order(all.clone());
    assert_eq!(order, ips(&["2600::1", "10.0.0.1", "2600::2", "10.0.0.2", "2600::3"]));
    let firsts: HashSet<_> = (0..5).map(|_| upstream.in_order(all.clone())[0]).collect();
    assert_eq!(firsts, ips(&["2600::1", "2600::2", "2600::3"]).into_iter().collect());
    upstream.prefer_v4.store(true, Relaxed);
    let firsts: HashSet<_> = (0..4).map(|_| upstream.in_order(all.clone())[0]).collect();
    assert_eq!(firsts, ips(&["10.0.0.1", "10.0.0.2"]).into_iter().collect());
}

#[tokio::test(start_paused = true)]
async fn an_address_that_failed_is_tried_last_for_half_a_minute() {
    let (upstream, _) = upstream("10.0.0.1", 443, &[]);
    let all = ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    upstream.avoid(&["10.0.0.2:443".parse().unwrap()]);
    for _ in 0..4 {
        assert_eq!(upstream.in_order(all.clone())[2], all[1]);
    }
    tokio::time::advance(AVOIDED).await;
    let firsts: HashSet<_> = (0..3).map(|_| upstream.in_order(all.clone())[0]).collect();
    assert_eq!(firsts.len(), 3);
    // However many fail, only so many are remembered.
    upstream.avoid(&numbered(255));
    assert_eq!(upstream.avoided.lock().unwrap().len(), 4 * ADDRESSES);
}

#[test]
fn only_addresses_that_the_policy_lets_through_are_tried() {
    let addresses = ips(&["169.254.169.254", "10.0.0.9"]);
    assert_eq!(permitted(&addresses, &[], &[]).unwrap(), addresses[1..]);
    let error = permitted(&addresses, &[], &[addresses[1].into()]).unwrap_err();
    assert!(matches!(error, DialError::Refused { refusal: Refusal::Metadata, .. }), "{error:?}");
}
