//! What goes wrong, to which requests, and what happens at which moment. What a fault does to a body is in `outgoing`.

use super::{Controls, lock};
use std::fmt;
use std::sync::Mutex;

/// What can happen to a request that reads (GET or HEAD).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum S3Fault {
    /// 403 AccessDenied.
    Forbidden,
    /// 404 NoSuchKey.
    NotFound,
    /// 500 InternalError.
    Internal,
    /// 503 SlowDown.
    Unavailable,
    /// No answer, ever.
    Hang,
    /// Nothing more comes after so many bytes, and the connection stays open.
    HangAfter {
        /// How many are sent.
        after: u64,
    },
    /// The connection breaks off after so many bytes of the object.
    BreakOff {
        /// How many are sent.
        after: u64,
    },
    /// The object comes at about this rate.
    Slow {
        /// Bytes in a second.
        bytes_per_second: u64,
    },
    /// One byte of what is sent is another.
    Corrupt {
        /// Counted from the first that is sent.
        at: u64,
    },
    /// 200 with the whole object, whatever range was asked for.
    WholeBody,
}

/// A request that reads, by another than the owner, as it came: whether it is let in is not known yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// `GET` or `HEAD`.
    pub method: String,
    /// The bucket, as the path names it.
    pub bucket: String,
    /// The key, as the path names it.
    pub key: String,
    /// Which request that reads it is, counted from 1. A client's own retries count too.
    pub nth: u64,
    /// Which GET with a Range it is, counted from 1; none without a Range.
    pub nth_range: Option<u64>,
    /// The bytes that are asked for, if not all.
    pub range: Option<Span>,
    /// The If-Match header.
    pub if_match: Option<String>,
    /// The version that is asked for.
    pub version: Option<String>,
    /// With whose key it is signed.
    pub access_key_id: Option<String>,
}

/// Bytes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The first, counted from 0.
    pub first: u64,
    /// The last; none is up to the end.
    pub last: Option<u64>,
}

impl Span {
    /// That of a Range header, if it names one by its first byte.
    pub(super) fn of(header: &str) -> Option<Self> {
        let (first, last) = header.strip_prefix("bytes=")?.split_once('-')?;
        let last = if last.is_empty() { None } else { Some(last.parse().ok()?) };
        Some(Self { first: first.parse().ok()?, last })
    }

    /// Whether it has that byte.
    pub fn contains(&self, byte: u64) -> bool {
        self.first <= byte && self.last.is_none_or(|last| byte <= last)
    }
}

type Predicate = Box<dyn Fn(&Asked) -> bool + Send>;

struct Rule {
    fault: S3Fault,
    times: Option<u32>,
    applies: Predicate,
}

/// A moment in a download, by the requests of others than the owner, each counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// When so many requests that read have come, before that one is looked at.
    Asked(u64),
    /// When so many bytes of the answer to that ranged GET have been handed to the connection.
    Within {
        /// Which.
        range: u64,
        /// 0 is before the first.
        sent: u64,
    },
    /// When the answer to that ranged GET has been handed to the connection whole.
    Answered {
        /// Which.
        range: u64,
    },
}

type Action = Box<dyn FnOnce(&Controls) + Send>;

/// Faults and moments that are to come.
#[derive(Default)]
pub(super) struct Plans {
    rules: Mutex<Vec<Rule>>,
    moments: Mutex<Vec<(Moment, Action)>>,
}

impl fmt::Debug for Plans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<_> = lock(&self.rules).iter().map(|rule| (rule.fault, rule.times)).collect();
        let moments: Vec<_> = lock(&self.moments).iter().map(|(moment, _)| *moment).collect();
        f.debug_struct("Plans").field("faults", &faults).field("moments", &moments).finish()
    }
}

impl Plans {
    pub(super) fn add_fault(&self, fault: S3Fault, times: Option<u32>, applies: Predicate) {
        lock(&self.rules).push(Rule { fault, times, applies });
    }

    pub(super) fn clear_faults(&self) {
        lock(&self.rules).clear();
    }

    /// The first fault that applies, in the order in which they were switched on.
    pub(super) fn fault(&self, asked: &Asked) -> Option<S3Fault> {
        let mut rules = lock(&self.rules);
        rules.retain(|rule| rule.times != Some(0));
        let rule = rules.iter_mut().find(|rule| (rule.applies)(asked))?;
        if let Some(times) = &mut rule.times {
            *times -= 1;
        }
        Some(rule.fault)
    }

    pub(super) fn at(&self, moment: Moment, action: Action) {
        lock(&self.moments).push((moment, action));
    }

    /// What is to happen at this moment; it is taken out.
    pub(super) fn due(&self, is_now: impl Fn(Moment) -> bool) -> Vec<Action> {
        let mut moments = lock(&self.moments);
        let (due, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut *moments).into_iter().partition(|(at, _)| is_now(*at));
        *moments = rest;
        due.into_iter().map(|(_, action)| action).collect()
    }

    /// After how many bytes the next thing happens within the answer to that ranged GET.
    pub(super) fn next_within(&self, range: u64) -> Option<u64> {
        let within = |moment: &Moment| match moment {
            Moment::Within { range: of, sent } if *of == range => Some(*sent),
            _ => None,
        };
        lock(&self.moments).iter().filter_map(|(moment, _)| within(moment)).min()
    }
}
