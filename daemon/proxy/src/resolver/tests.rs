use super::*;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

/// Says what it was told to, after a while.
#[derive(Debug, Clone)]
struct Oracle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    says: Mutex<(Duration, Result<Said, NameError>)>,
    asked: AtomicUsize,
    changed: AtomicBool,
}

impl Source for Oracle {
    fn ask<'a>(&'a self, _: &'a str) -> Asking<'a> {
        self.0.asked.fetch_add(1, Relaxed);
        let (after, says) = self.0.says.lock().unwrap().clone();
        Box::pin(async move {
            tokio::time::sleep(after).await;
            says
        })
    }

    fn changed(&self) -> bool {
        self.0.changed.swap(false, Relaxed)
    }
}

impl Oracle {
    fn new(after: u64, says: Result<Said, NameError>) -> Self {
        let says = Mutex::new((Duration::from_secs(after), says));
        Self(Arc::new(Inner { says, asked: AtomicUsize::new(0), changed: AtomicBool::new(false) }))
    }

    fn now_says(&self, after: u64, says: Result<Said, NameError>) {
        *self.0.says.lock().unwrap() = (Duration::from_secs(after), says);
    }

    fn asked(&self) -> usize {
        self.0.asked.load(Relaxed)
    }
}

fn said(address: &str, ttl: u64) -> Result<Said, NameError> {
    Ok(Said { addresses: vec![address.parse().unwrap()], ttl: Duration::from_secs(ttl) })
}

fn no_answer() -> Result<Said, NameError> {
    Err(NameError::Failed("no answer".to_owned()))
}

const PATIENCE: Duration = Duration::from_secs(5);

async fn now(name: &Name) -> Result<String, NameError> {
    let began = Instant::now();
    let addresses = name.addresses(PATIENCE).await?;
    assert_eq!(began.elapsed(), Duration::ZERO, "a connection waited though an answer was known");
    Ok(addresses[0].to_string())
}

async fn after(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn only_the_first_connection_ever_waits_and_all_that_wait_share_one_question() {
    let oracle = Oracle::new(2, said("10.0.0.1", 10));
    let resolver = Resolver::asking(oracle.clone());
    let (name, other_endpoint) = (resolver.name("db"), resolver.name("db"));
    let began = Instant::now();
    let (first, second) = tokio::join!(name.addresses(PATIENCE), other_endpoint.addresses(PATIENCE));
    assert_eq!((first.unwrap(), began.elapsed().as_secs()), (second.unwrap(), 2));
    assert_eq!(oracle.asked(), 1);
    // Ten seconds for each answer, which is as long as each is good.
    oracle.now_says(10, said("10.0.0.2", 10));
    for _ in 0..100 {
        after(1).await;
        now(&name).await.unwrap();
    }
    assert_eq!(now(&name).await.unwrap(), "10.0.0.2");
    assert!(oracle.asked() <= 12, "{} questions", oracle.asked());
}

#[tokio::test(start_paused = true)]
async fn a_first_answer_that_takes_too_long_is_not_waited_for_and_used_when_it_comes() {
    let resolver = Resolver::asking(Oracle::new(8, said("10.0.0.1", 10)));
    let (name, began) = (resolver.name("db"), Instant::now());
    assert_eq!(name.addresses(PATIENCE).await.unwrap_err(), NameError::TimedOut);
    assert_eq!(began.elapsed(), PATIENCE);
    after(4).await;
    assert_eq!(now(&name).await.unwrap(), "10.0.0.1");
}

#[tokio::test(start_paused = true)]
async fn the_last_answer_is_served_for_as_long_as_nobody_says_better() {
    let oracle = Oracle::new(0, said("10.0.0.1", 10));
    let resolver = Resolver::asking(oracle.clone());
    let name = resolver.name("db");
    name.addresses(PATIENCE).await.unwrap();
    oracle.now_says(0, no_answer());
    for _ in 0..48 {
        after(3600).await;
        assert_eq!(now(&name).await.unwrap(), "10.0.0.1");
    }
    let report = resolver.report().remove(0);
    assert!(report.stale && report.answer_age_seconds >= Some(48 * 3600 - 60), "{report:?}");
    assert!(report.error.unwrap().contains("no answer"));
    oracle.now_says(0, said("10.0.0.2", 10));
    after(RETRY_MAX.as_secs()).await;
    assert_eq!(now(&name).await.unwrap(), "10.0.0.2");
    let report = resolver.report().remove(0);
    assert!(!report.stale && report.error.is_none() && report.failed > 1000, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_name_that_does_not_exist_any_more_is_not_served_and_found_again_within_half_a_minute() {
    let oracle = Oracle::new(0, said("10.0.0.1", 10));
    let name = Resolver::asking(oracle.clone()).name("db");
    name.addresses(PATIENCE).await.unwrap();
    oracle.now_says(0, Err(NameError::NoSuchName { ttl: Duration::from_secs(86_400) }));
    after(10).await;
    assert!(matches!(now(&name).await, Err(NameError::NoSuchName { .. })));
    let asked = oracle.asked();
    for _ in 0..1000 {
        assert!(now(&name).await.is_err());
    }
    assert_eq!(oracle.asked(), asked, "an answer that is still good was asked for again");
    oracle.now_says(0, said("10.0.0.2", 10));
    after(NEGATIVE_TTL_MAX.as_secs() + 1).await;
    assert_eq!(now(&name).await.unwrap(), "10.0.0.2");
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_good_for_its_ttl_but_not_below_a_second_nor_above_five_minutes() {
    for (ttl, asked_within_an_hour) in [(0, 1800..=3600), (60, 70..=76), (86_400, 14..=16)] {
        let oracle = Oracle::new(0, said("10.0.0.1", ttl));
        let name = Resolver::asking(oracle.clone()).name("db");
        for _ in 0..3600 {
            after(1).await;
            now(&name).await.unwrap();
        }
        assert!(asked_within_an_hour.contains(&oracle.asked()), "TTL {ttl}: asked {} times", oracle.asked());
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_that_nobody_uses_is_asked_for_once_a_minute_and_one_that_no_route_holds_never() {
    let oracle = Oracle::new(0, said("10.0.0.1", 1));
    let resolver = Resolver::asking(oracle.clone());
    let name = resolver.name("db");
    after(3600).await;
    assert!((59..=62).contains(&oracle.asked()), "asked {} times", oracle.asked());
    assert!(!resolver.report()[0].stale, "it is only not asked for");
    drop(name);
    let asked = oracle.asked();
    after(3600).await;
    assert_eq!((oracle.asked(), resolver.report()), (asked, Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn however_many_connections_fail_the_nameservers_are_asked_once_a_second_at_most() {
    let oracle = Oracle::new(0, no_answer());
    let name = Resolver::asking(oracle.clone()).name("db");
    for _ in 0..1000 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        name.addresses(PATIENCE).await.unwrap_err();
    }
    assert!((5..=11).contains(&oracle.asked()), "asked {} times in ten seconds", oracle.asked());
    oracle.now_says(0, said("10.0.0.1", 10));
    name.addresses(PATIENCE).await.unwrap_err();
    after(1).await;
    assert_eq!(now(&name).await.unwrap(), "10.0.0.1", "a connection that failed has the name asked for again at once");
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_hosts_configuration_has_every_name_asked_for_again() {
    let oracle = Oracle::new(0, said("10.0.0.1", 300));
    let resolver = Resolver::asking(oracle.clone());
    let name = resolver.name("db");
    name.addresses(PATIENCE).await.unwrap();
    oracle.now_says(0, said("10.0.0.2", 300));
    resolver.look();
    after(2).await;
    assert_eq!(now(&name).await.unwrap(), "10.0.0.1");
    oracle.0.changed.store(true, Relaxed);
    resolver.look();
    after(2).await;
    assert_eq!(now(&name).await.unwrap(), "10.0.0.2");
}
