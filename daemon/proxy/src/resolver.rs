//! Names of upstreams: what they resolve to now, or last did. Names are kept, not looked up when a connection comes: each name
//! that a route holds has a task that asks for it again before its answer runs out, so that a slow resolver keeps no
//! connection waiting while any answer is known. Who is asked is `system`'s, how is `nameservers`'; which addresses may be used
//! is `dial`'s.
//!
//! - An answer is good for its TTL, within [`TTL_MIN`] and [`TTL_MAX`]. A name that is in use is asked for again when four
//!   fifths of that are over; one that is not, once a minute at most: the first to use it again may get an answer so old.
//! - When asking fails (no answer, SERVFAIL, no nameserver), the last answer is served for as long as it takes. How old it is
//!   stands in the report, and the first failure in the log.
//! - That a name does not exist, or has no address, is an answer too: it replaces the last, and is believed for its TTL within
//!   [`TTL_MIN`] and [`NEGATIVE_TTL_MAX`].
//! - One question for a name is under way at a time, however many endpoints and connections want it. What no route holds any
//!   more is forgotten, and never asked for.

mod nameservers;
mod system;

use crate::counters::Latency;
use crate::throttle::Throttle;
use enclaved_core::routes::NameReport;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

/// Bounds of how long an answer is good. Some services live on a TTL of a second; none should be able to keep an address
/// for longer than five minutes after it was changed.
const TTL_MIN: Duration = Duration::from_secs(1);
const TTL_MAX: Duration = Duration::from_secs(300);
/// A name that someone forgot to add is found this long after it was added.
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(30);
/// How often a name is asked for that nothing connects to. It is known when something does.
const UNUSED: Duration = Duration::from_secs(60);
/// The pause after a failure doubles from the first to the second.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How long one question may take, with all nameservers and repetitions.
const QUESTION: Duration = Duration::from_secs(15);
/// Most addresses of a name that are kept.
const ADDRESSES: usize = 64;

/// What the nameservers, or the hosts file, said.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    addresses: Vec<IpAddr>,
    ttl: Duration,
}

/// Why a name has no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    /// The nameservers say that there is no such name.
    #[error("the name does not exist")]
    NoSuchName { ttl: Duration },
    /// It exists, and has neither A nor AAAA records.
    #[error("the name has no address")]
    NoAddress { ttl: Duration },
    /// It is not known.
    #[error("the name could not be resolved: {0}")]
    Failed(String),
    /// The first question is still under way.
    #[error("resolving the name took longer than the limit")]
    TimedOut,
}

impl NameError {
    /// For how long an answer without addresses is believed; none where it is no answer.
    fn negative(&self) -> Option<Duration> {
        match self {
            Self::NoSuchName { ttl } | Self::NoAddress { ttl } => Some((*ttl).clamp(TTL_MIN, NEGATIVE_TTL_MAX)),
            Self::Failed(_) | Self::TimedOut => None,
        }
    }
}

type Asking<'a> = Pin<Box<dyn Future<Output = Result<Said, NameError>> + Send + 'a>>;

/// Who knows names.
trait Source: fmt::Debug + Send + Sync {
    /// Asks for a name. Cancel-safe: a question that is dropped is forgotten.
    fn ask<'a>(&'a self, hostname: &'a str) -> Asking<'a>;

    /// Whether it would ask elsewhere now than when this was asked last, or at the first question. A change is told once.
    fn changed(&self) -> bool;
}

/// All names of the routes.
#[derive(Debug)]
pub(crate) struct Resolver {
    source: Arc<dyn Source>,
    names: Mutex<BTreeMap<String, Weak<Name>>>,
}

impl Resolver {
    /// Asks as this host is configured: /etc/hosts first, then the nameservers of /etc/resolv.conf.
    pub(crate) fn of_the_system() -> Self {
        Self::asking(system::System::new("/etc/resolv.conf", "/etc/hosts", None))
    }

    fn asking(source: impl Source + 'static) -> Self {
        Self { source: Arc::new(source), names: Mutex::default() }
    }

    /// The name, which is kept resolved for as long as somebody holds this. Needs a runtime.
    pub(crate) fn name(&self, hostname: &str) -> Arc<Name> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.retain(|_, name| name.strong_count() > 0);
        if let Some(name) = names.get(hostname).and_then(Weak::upgrade) {
            return name;
        }
        let name = Arc::new(Name::start(hostname, self.source.clone()));
        names.insert(hostname.to_owned(), Arc::downgrade(&name));
        name
    }

    /// If the host's configuration changed, all names are asked for again now.
    pub(crate) fn look(&self) {
        if self.source.changed() {
            tracing::info!("the host resolves names in another way than before: asking for all of them again");
            self.live().iter().for_each(|name| name.shared.wanted.notify_one());
        }
    }

    pub(crate) fn report(&self) -> Vec<NameReport> {
        self.live().iter().map(|name| name.shared.report(&name.hostname)).collect()
    }

    fn live(&self) -> Vec<Arc<Name>> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.values().filter_map(Weak::upgrade).collect()
    }
}

/// A name, kept resolved until dropped.
#[derive(Debug)]
pub(crate) struct Name {
    hostname: String,
    shared: Arc<Kept>,
    task: JoinHandle<()>,
}

/// What a name and its task share.
#[derive(Debug)]
struct Kept {
    known: watch::Sender<Known>,
    /// Ask now, or soon.
    wanted: Notify,
    /// Somebody wanted its addresses since the last question.
    used: AtomicBool,
    asked: Latency,
    failed: AtomicU64,
    lines: Throttle,
}

#[derive(Debug, Clone, Default)]
struct Known {
    /// The last that was said, if that was an address.
    answer: Option<Answer>,
    /// How the last question failed, if it did.
    trouble: Option<NameError>,
}

#[derive(Debug, Clone)]
struct Answer {
    addresses: Arc<[IpAddr]>,
    since: Instant,
    good_until: Instant,
}

impl Name {
    fn start(hostname: &str, source: Arc<dyn Source>) -> Self {
        let shared = Arc::new(Kept {
            known: watch::Sender::new(Known::default()),
            wanted: Notify::new(),
            used: AtomicBool::new(true),
            asked: Latency::default(),
            failed: AtomicU64::new(0),
            lines: Throttle::new(),
        });
        let task = tokio::spawn(supervise(hostname.to_owned(), shared.clone(), source));
        Self { hostname: hostname.to_owned(), shared, task }
    }

    /// Its addresses, at once if any are known or the last question failed; else when the first question is answered, or
    /// the time is over. Cancel-safe.
    pub(crate) async fn addresses(&self, patience: Duration) -> Result<Arc<[IpAddr]>, NameError> {
        let shared = &self.shared;
        shared.used.store(true, Relaxed);
        if let Some(known) = shared.addresses() {
            return known;
        }
        let mut watching = shared.known.subscribe();
        let first = watching.wait_for(|known| known.answer.is_some() || known.trouble.is_some());
        // The sender lives in this name.
        if !matches!(timeout(patience, first).await, Ok(Ok(_))) {
            return Err(NameError::TimedOut);
        }
        shared.addresses().unwrap_or(Err(NameError::TimedOut))
    }
}

/// Keeps a name, and begins again should that panic: what is known of it is served meanwhile.
async fn supervise(hostname: String, shared: Arc<Kept>, source: Arc<dyn Source>) {
    // Ends its task when this is dropped.
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        tasks.spawn(keep(hostname.clone(), shared.clone(), source.clone()));
        match tasks.join_next().await {
            Some(Err(error)) if error.is_panic() => {
                tracing::error!(hostname, "keeping a name resolved ended by a defect of the proxy; beginning again");
                tokio::time::sleep(TTL_MIN).await;
            }
            _ => return,
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kept {
    /// What is known now; asks for better where that is not as good as it should be.
    fn addresses(&self) -> Option<Result<Arc<[IpAddr]>, NameError>> {
        let known = self.known.borrow();
        match (&known.answer, &known.trouble) {
            (Some(answer), _) => {
                if answer.good_until <= Instant::now() {
                    self.wanted.notify_one();
                }
                Some(Ok(answer.addresses.clone()))
            }
            (None, Some(trouble)) => {
                if trouble.negative().is_none() {
                    self.wanted.notify_one();
                }
                Some(Err(trouble.clone()))
            }
            (None, None) => None,
        }
    }

    /// Takes in what was said, and says for how long that is good; none after a failure.
    fn learn(&self, hostname: &str, said: Result<Said, NameError>) -> Option<Duration> {
        let now = Instant::now();
        let before = self.known.borrow().clone();
        match said {
            Ok(Said { mut addresses, ttl }) => {
                addresses.truncate(ADDRESSES);
                let ttl = ttl.clamp(TTL_MIN, TTL_MAX);
                if before.trouble.is_some() {
                    tracing::info!(hostname, ?addresses, "the name resolves again");
                }
                let answer = Answer { addresses: addresses.into(), since: now, good_until: now + ttl };
                self.known.send_replace(Known { answer: Some(answer), trouble: None });
                Some(ttl)
            }
            Err(trouble) => {
                self.failed.fetch_add(1, Relaxed);
                let negative = trouble.negative();
                let answer = before.answer.filter(|_| negative.is_none());
                let age_seconds = answer.as_ref().map(|answer| now.duration_since(answer.since).as_secs());
                let same =
                    before.trouble.as_ref().map(std::mem::discriminant) == Some(std::mem::discriminant(&trouble));
                if !same && let Some(left_out) = self.lines.pass() {
                    tracing::warn!(hostname, error = %trouble, age_seconds, left_out, "an upstream's name does not resolve; its last answer, if one is still believed, is served on");
                }
                self.known.send_replace(Known { answer, trouble: Some(trouble) });
                negative
            }
        }
    }

    fn report(&self, hostname: &str) -> NameReport {
        let known = self.known.borrow();
        let (answer, now) = (known.answer.as_ref(), Instant::now());
        NameReport {
            hostname: hostname.to_owned(),
            addresses: answer.map_or(0, |answer| answer.addresses.len()),
            answer_age_seconds: answer.map(|answer| now.duration_since(answer.since).as_secs()),
            stale: known.trouble.is_some() && answer.is_some_and(|answer| answer.good_until <= now),
            failed: self.failed.load(Relaxed),
            error: known.trouble.as_ref().map(ToString::to_string),
            lookups: self.asked.report(),
        }
    }
}

/// Asks for the name again and again; ends by being aborted.
async fn keep(hostname: String, kept: Arc<Kept>, source: Arc<dyn Source>) {
    let mut failures = 0_u32;
    loop {
        let began = Instant::now();
        let used = kept.used.swap(false, Relaxed);
        let asked = timeout(QUESTION, source.ask(&hostname)).await;
        let said = asked.unwrap_or_else(|_| Err(NameError::Failed(format!("no answer within {QUESTION:?}"))));
        kept.asked.record(began.elapsed());
        let answered = said.is_ok();
        let now = Instant::now();
        let next = match kept.learn(&hostname, said) {
            Some(ttl) => {
                failures = 0;
                now + match (answered, used) {
                    (true, true) => ttl * 4 / 5,
                    (true, false) => ttl.max(UNUSED),
                    (false, _) => ttl,
                }
            }
            None => {
                failures = failures.saturating_add(1);
                now + RETRY_MAX.min(RETRY_MIN * 2_u32.saturating_pow(failures - 1))
            }
        };
        tokio::select! {
            // Cancel-safe: nothing is lost with a timer.
            () = sleep_until(next) => {}
            // Cancel-safe: a permit that is not taken stays.
            () = kept.wanted.notified() => {}
        }
        // Whoever wants it, and how often: not more than one question a second.
        sleep_until(began + RETRY_MIN).await;
    }
}

#[cfg(test)]
mod tests;
