//! The connection to systemd, and the signals that come over it: whom they are for, and that they are systemd's own.

use super::failure::is_named;
use super::{ANSWER, BUS, MANAGER, MANAGER_PATH, PROPERTIES, SYSTEMD, UNITS_PATH, call};
use futures_util::StreamExt;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use zbus::names::OwnedUniqueName;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath};

/// So many ends of jobs of one unit can wait to be read. More do not come while one is waited for.
const MAX_ENDS: usize = 64;

/// A connection that was set up.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    /// The connection, or systemd behind it, is not what it was.
    pub(super) lost: CancellationToken,
    pub(super) _reader: Task,
}

/// A task that ends when this is dropped.
#[derive(Debug)]
pub(super) struct Task(pub(super) JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The end of a job: its path, and its result.
pub(super) type JobEnd = (OwnedObjectPath, String);

/// Whom signals are for.
#[derive(Debug, Default)]
pub(super) struct News {
    watched: Mutex<Vec<Watched>>,
    jobs: Mutex<Jobs>,
}

#[derive(Debug)]
pub(super) struct Watched {
    pub(super) prefix: String,
    pub(super) path: String,
    pub(super) changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Jobs {
    next: u64,
    waiting: BTreeMap<u64, (String, mpsc::Sender<JobEnd>)>,
}

/// Waits for the ends of a unit's jobs until it is dropped.
pub(super) struct Waiter {
    news: Arc<News>,
    number: u64,
    pub(super) ends: mpsc::Receiver<JobEnd>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.news.jobs().waiting.remove(&self.number);
    }
}

impl News {
    // No code that holds these can leave them half-changed.
    pub(super) fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn watched(&self) -> MutexGuard<'_, Vec<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait_for(self: &Arc<Self>, unit: &str) -> Waiter {
        let (sender, ends) = mpsc::channel(MAX_ENDS);
        let mut jobs = self.jobs();
        jobs.next += 1;
        let number = jobs.next;
        jobs.waiting.insert(number, (unit.to_owned(), sender));
        Waiter { news: self.clone(), number, ends }
    }

    pub(super) fn ended(&self, unit: &str, end: &JobEnd) {
        // One that does not keep up learns that it can't know.
        self.jobs().waiting.retain(|_, (waits_for, ends)| waits_for != unit || ends.try_send(end.clone()).is_ok());
    }

    pub(super) fn changed(&self, concerns: impl Fn(&Watched) -> bool) {
        for watched in self.watched().iter().filter(|watched| concerns(watched)) {
            watched.changes.send_modify(|count| *count = count.wrapping_add(1));
        }
    }

    /// Takes in a message; false if systemd is another one from now on.
    pub(super) fn take(&self, message: &Message, systemd: &OwnedUniqueName) -> bool {
        let header = message.header();
        let (Some(sender), Some(interface), Some(member)) = (header.sender(), header.interface(), header.member())
        else {
            return true;
        };
        let body = message.body();
        match (interface.as_str(), member.as_str()) {
            (BUS, "NameOwnerChanged") if sender.as_str() == BUS => {
                body.deserialize::<(String, String, String)>().map_or(true, |(name, _, _)| name != SYSTEMD)
            }
            _ if sender.as_str() != systemd.as_str() => true,
            (MANAGER, "JobRemoved") => {
                if let Ok((_, path, unit, result)) = body.deserialize::<(u32, OwnedObjectPath, String, String)>() {
                    self.ended(&unit, &(path, result));
                    self.changed(|watched| unit.starts_with(&watched.prefix));
                }
                true
            }
            (MANAGER, "UnitRemoved" | "UnitNew") => {
                if let Ok((unit, _)) = body.deserialize::<(String, OwnedObjectPath)>() {
                    self.changed(|watched| unit.starts_with(&watched.prefix));
                }
                true
            }
            // All units were read anew.
            (MANAGER, "Reloading") => {
                self.changed(|_| true);
                true
            }
            (PROPERTIES, "PropertiesChanged") => {
                if let Some(path) = header.path() {
                    self.changed(|watched| path.as_str().starts_with(&watched.path));
                }
                true
            }
            _ => true,
        }
    }
}

/// Connects, and has systemd and the bus send the signals that are read here.
pub(super) async fn connect(address: Option<&str>, news: Arc<News>) -> zbus::Result<Link> {
    let builder = address.map_or_else(zbus::connection::Builder::system, zbus::connection::Builder::address);
    let connection = builder.method_timeout(ANSWER).build().await?;
    let messages = MessageStream::from(&connection);
    // Asked for before the name's owner is, so that no change of it is missed.
    add_match(&connection, &format!("sender='{BUS}',member='NameOwnerChanged',arg0='{SYSTEMD}'")).await?;
    let owner = connection.call_method(Some(BUS), "/org/freedesktop/DBus", Some(BUS), "GetNameOwner", &(SYSTEMD,));
    let systemd: OwnedUniqueName = owner.await?.body().deserialize()?;
    let lost = CancellationToken::new();
    // From here on messages come in: one that is not read would be in the way of all others.
    let reading = read(messages, systemd.clone(), news, lost.clone().drop_guard());
    let reader = Task(tokio::spawn(reading));
    let rules = [
        format!("interface='{MANAGER}',path='{MANAGER_PATH}'"),
        format!(
            "interface='{PROPERTIES}',member='PropertiesChanged',path_namespace='{}'",
            UNITS_PATH.trim_end_matches('/')
        ),
    ];
    for rule in rules {
        add_match(&connection, &format!("sender='{}',{rule}", systemd.as_str())).await?;
    }
    // Without a subscriber systemd sends no signals.
    match call(&connection, MANAGER_PATH, MANAGER, "Subscribe", &()).await {
        Ok(_) => {}
        Err(error) if is_named(&error, "AlreadySubscribed") => {}
        Err(error) => return Err(error),
    }
    Ok(Link { connection, lost, _reader: reader })
}

/// Takes in what comes until the connection is lost, or systemd is another one.
async fn read(mut messages: MessageStream, systemd: OwnedUniqueName, news: Arc<News>, lost: DropGuard) {
    while let Some(message) = messages.next().await {
        let Ok(message) = message else { break };
        if message.message_type() == zbus::message::Type::Signal && !news.take(&message, &systemd) {
            tracing::info!("systemd was executed anew");
            break;
        }
    }
    // First of all nobody may use it any more; then they are told that anything may change unseen.
    drop(lost);
    news.changed(|_| true);
}

async fn add_match(connection: &Connection, rule: &str) -> zbus::Result<()> {
    let rule = format!("type='signal',{rule}");
    let answer = connection.call_method(Some(BUS), "/org/freedesktop/DBus", Some(BUS), "AddMatch", &(rule,)).await;
    answer.map(drop)
}
