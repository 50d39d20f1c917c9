//! systemd over D-Bus: jobs for units, how units are, and news of them. The only place that talks to the bus; knows nothing of
//! what the units are for.
//!
//! Nothing here waits without a limit, and nothing that is not a unit's name reaches the bus as one. A connection that was
//! lost is made anew by whoever needs it next. Signals are believed only if systemd itself sent them: on the system bus
//! anybody may send anybody a signal.

mod failure;
mod link;
mod name;
mod waiting;

use enclaved_core::failure::Failure;
use failure::{about, bus_failure, is_named, no_systemd, of_job, refused};
use link::{Link, News, Task, Watched, connect};
use name::{check_name, check_prefix, label};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use zbus::{Connection, Message, OwnedObjectPath, OwnedVariant};

const BUS: &str = "org.freedesktop.DBus";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// Below it, every unit has an object of its own.
const UNITS_PATH: &str = "/org/freedesktop/systemd1/unit/";

/// How long connecting may take, with everything that is set up then.
const CONNECT: Duration = Duration::from_secs(10);
/// How long systemd may take for an answer. It answers within milliseconds, but not while it reloads hundreds of units.
const ANSWER: Duration = Duration::from_secs(25);
/// Pauses before a lost bus is looked for again by whoever waits for news.
const RECONNECT: Duration = Duration::from_secs(1);
const RECONNECT_MAX: Duration = Duration::from_secs(30);

/// One connection to the system's service manager; made when first used, made anew after it was lost. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SystemdBus(Arc<Inner>);

/// What is done to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Start it, unless it runs.
    Start,
    /// Stop it.
    Stop,
    /// Stop it if it runs, then start it.
    Restart,
}

impl Verb {
    fn method(self) -> &'static str {
        match self {
            Self::Start => "StartUnit",
            Self::Stop => "StopUnit",
            Self::Restart => "RestartUnit",
        }
    }

    fn doing(self) -> &'static str {
        match self {
            Self::Start => "starting",
            Self::Stop => "stopping",
            Self::Restart => "restarting",
        }
    }
}

/// Why a job was not done, or what came of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// It did not run: systemd can't be reached or refused, there is no such unit, it is masked. Nothing has changed.
    #[error("{0}")]
    NotRun(Failure),
    /// It ran and failed.
    #[error("{0}")]
    Failed(Failure),
    /// It runs, or ran, or will run: whether is not known. Nothing may be done on top of that.
    #[error("{0}")]
    Unknown(Failure),
}

impl JobError {
    /// Why.
    pub fn into_failure(self) -> Failure {
        match self {
            Self::NotRun(failure) | Self::Failed(failure) | Self::Unknown(failure) => failure,
        }
    }
}

/// How a unit is, in systemd's own words (`systemctl show`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitState {
    /// `loaded`, `not-found`, `masked`, `bad-setting`, `error`.
    pub load: String,
    /// `active`, `reloading`, `inactive`, `failed`, `activating`, `deactivating`.
    pub active: String,
    /// `running`, `start`, `stop-sigterm`, `dead` and many more.
    pub sub: String,
    /// Its type, if there is a job for it: `start`, `stop`, `restart`.
    pub job: Option<String>,
}

/// How a service fared (`systemctl show`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceResult {
    /// `success`, `exit-code`, `signal`, `timeout`, `resources`, `protocol`, `oom-kill` and more.
    pub result: String,
    /// Its main process; 0 if it has none.
    pub main_pid: u32,
    /// How the last main process ended: 1 by exiting, 2 by a signal, 3 by a signal with a dump; 0 if none has.
    pub code: i32,
    /// Its exit status or its signal. Above 200 systemd itself failed to run it (systemd.exec(5), "Process Exit Codes").
    pub status: i32,
}

#[derive(Debug)]
struct Inner {
    /// Elsewhere than on the system bus.
    address: Option<String>,
    /// Held while a connection is made, so that there is one.
    link: tokio::sync::Mutex<Option<Link>>,
    news: Arc<News>,
    /// Looks for a lost bus while somebody waits for news. Ends with this.
    keeper: Mutex<Option<Task>>,
}

/// A unit as systemd lists it (org.freedesktop.systemd1(5), "ListUnits"): its name first, its job's path last.
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

impl Default for SystemdBus {
    fn default() -> Self {
        Self::new()
    }
}

impl SystemdBus {
    /// The service manager behind the system bus. Nothing is opened yet.
    pub fn new() -> Self {
        Self::at(None)
    }

    /// The service manager behind the bus at that D-Bus address.
    pub fn with_address(address: impl Into<String>) -> Self {
        Self::at(Some(address.into()))
    }

    fn at(address: Option<String>) -> Self {
        let inner = Inner { address, link: Default::default(), news: Default::default(), keeper: Default::default() };
        Self(Arc::new(inner))
    }

    /// Enqueues a job (mode "replace": it takes the place of one that contradicts it) and waits until it is over, `patience` at
    /// the longest. That systemd calls it done says nothing of what the unit did.
    ///
    /// # Errors
    /// As [`JobError`] says.
    pub async fn run_job(&self, verb: Verb, unit: &str, patience: Duration) -> Result<(), JobError> {
        let mut asked = false;
        let over = timeout(patience, self.run(verb, unit, &mut asked)).await;
        let seconds = patience.as_secs();
        match over {
            Ok(result) => result,
            Err(_) if asked => Err(JobError::Unknown(
                Failure::new(format!("{} {unit} was not over within {seconds} s", verb.doing()))
                    .with_remedy(format!("`systemctl status {unit}` says what it does")),
            )),
            Err(_) => Err(JobError::NotRun(Failure::new(format!(
                "{} {unit}: systemd could not be asked within {seconds} s",
                verb.doing()
            )))),
        }
    }

    /// `asked` is set before systemd is asked to: from then on it may run.
    async fn run(&self, verb: Verb, unit: &str, asked: &mut bool) -> Result<(), JobError> {
        let doing = || format!("{} {unit}", verb.doing());
        check_name(unit).map_err(|failure| JobError::NotRun(about(&doing(), failure)))?;
        let linked = self.0.link().await;
        let (connection, lost) = linked.map_err(|failure| JobError::NotRun(about(&doing(), failure)))?;
        // The job may be over before the call that made it returns.
        let mut waiter = self.0.news.wait_for(unit);
        *asked = true;
        let job = enqueue(&connection, verb, unit).await?;
        loop {
            let end = tokio::select! {
                biased;
                // Cancel-safe: an end that is not received stays in the channel.
                end = waiter.ends.recv() => end,
                // Cancel-safe: what was lost stays lost.
                () = lost.cancelled() => None,
            };
            match end {
                Some((path, result)) if path == job => return of_job(verb, unit, &result),
                Some(_) => {}
                None => break,
            }
        }
        Err(JobError::Unknown(
            Failure::new(format!("{}: the connection to systemd was lost meanwhile", doing()))
                .with_remedy(format!("`systemctl status {unit}` says what became of it")),
        ))
    }

    /// Enqueues a job (mode "replace") and does not wait for it.
    ///
    /// # Errors
    /// It is not enqueued, or whether it is is not known.
    pub async fn enqueue(&self, verb: Verb, unit: &str) -> Result<(), JobError> {
        let not_run = |failure| JobError::NotRun(about(&format!("{} {unit}", verb.doing()), failure));
        check_name(unit).map_err(not_run)?;
        let connection = self.connection().await.map_err(not_run)?;
        enqueue(&connection, verb, unit).await.map(drop)
    }

    /// How that unit is; `None` if systemd has no such unit in memory (it never ran, or is over and nobody refers to it).
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn unit(&self, unit: &str) -> Result<Option<UnitState>, Failure> {
        check_name(unit)?;
        let mut units = self.list(unit).await?;
        Ok(units.remove(unit))
    }

    /// How all units are whose names begin with `prefix`: those that systemd has in memory.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn units(&self, prefix: &str) -> Result<BTreeMap<String, UnitState>, Failure> {
        check_prefix(prefix)?;
        self.list(&format!("{prefix}*")).await
    }

    async fn list(&self, pattern: &str) -> Result<BTreeMap<String, UnitState>, Failure> {
        let units = self.listed(pattern).await?;
        let state = |(name, _, load, active, sub, _, _, job, job_type, _): Listed| {
            (name, UnitState { load, active, sub, job: (job != 0).then_some(job_type) })
        };
        Ok(units.into_iter().map(state).collect())
    }

    async fn listed(&self, pattern: &str) -> Result<Vec<Listed>, Failure> {
        let doing = || format!("asking systemd how {pattern} is");
        let body: (&[&str], &[&str]) = (&[], &[pattern]);
        let connection = self.connection().await.map_err(|failure| about(&doing(), failure))?;
        let answer = call(&connection, MANAGER_PATH, MANAGER, "ListUnitsByPatterns", &body).await;
        let units = answer.and_then(|answer| answer.body().deserialize());
        units.map_err(|error| bus_failure(&doing(), &error))
    }

    /// How that service fared. One that systemd does not have in memory shows the values of one that never ran.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn service(&self, unit: &str) -> Result<ServiceResult, Failure> {
        check_name(unit)?;
        let doing = || format!("asking systemd how {unit} fared");
        let connection = self.connection().await.map_err(|failure| about(&doing(), failure))?;
        let path = format!("{UNITS_PATH}{}", label(unit));
        let get = async |name: &str| -> Result<OwnedVariant, zbus::Error> {
            call(&connection, &path, PROPERTIES, "Get", &(SERVICE, name)).await?.body().deserialize()
        };
        let all = async {
            let (result, main_pid, code, status) =
                tokio::try_join!(get("Result"), get("MainPID"), get("ExecMainCode"), get("ExecMainStatus"))?;
            Ok::<_, zbus::Error>(ServiceResult {
                result: String::try_from(result)?,
                main_pid: u32::try_from(main_pid)?,
                code: i32::try_from(code)?,
                status: i32::try_from(status)?,
            })
        };
        all.await.map_err(|error| bus_failure(&doing(), &error))
    }

    /// How the system as a whole is: `running`, `degraded`, `starting`, `maintenance`, `stopping` and more.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn system_state(&self) -> Result<String, Failure> {
        let doing = "asking systemd how the system is";
        let connection = self.connection().await.map_err(|failure| about(doing, failure))?;
        let answer = call(&connection, MANAGER_PATH, PROPERTIES, "Get", &(MANAGER, "SystemState")).await;
        let state = answer.and_then(|answer| answer.body().deserialize::<OwnedVariant>());
        let state = state.and_then(String::try_from);
        state.map_err(|error| bus_failure(doing, &error))
    }

    /// Forgets that the unit failed, so that systemd need not keep it. Succeeds if it did not, or there is no such unit.
    ///
    /// # Errors
    /// systemd can't be asked, or refuses.
    pub async fn reset_failed(&self, unit: &str) -> Result<(), Failure> {
        let doing = || format!("resetting {unit}");
        check_name(unit).map_err(|failure| about(&doing(), failure))?;
        let connection = self.connection().await.map_err(|failure| about(&doing(), failure))?;
        match call(&connection, MANAGER_PATH, MANAGER, "ResetFailedUnit", &(unit,)).await {
            Ok(_) => Ok(()),
            Err(error) if is_named(&error, "NoSuchUnit") => Ok(()),
            Err(error) => Err(bus_failure(&doing(), &error)),
        }
    }

    /// A number that grows whenever a unit whose name begins with `prefix` may have changed its state: also when the bus was
    /// lost, and when it was found again. It carries no facts. Must be called where tokio runs.
    ///
    /// # Errors
    /// That is not the beginning of a unit's name.
    pub fn changes(&self, prefix: &str) -> Result<watch::Receiver<u64>, Failure> {
        check_prefix(prefix)?;
        let receiver = {
            let mut watched = self.0.news.watched();
            match watched.iter().find(|watched| watched.prefix == prefix) {
                Some(watched) => watched.changes.subscribe(),
                None => {
                    let (changes, receiver) = watch::channel(0);
                    let path = format!("{UNITS_PATH}{}", label(prefix));
                    watched.push(Watched { prefix: prefix.to_owned(), path, changes });
                    receiver
                }
            }
        };
        let mut keeper = self.0.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        keeper.get_or_insert_with(|| Task(tokio::spawn(keep_connected(Arc::downgrade(&self.0)))));
        Ok(receiver)
    }

    /// Whether systemd answers.
    ///
    /// # Errors
    /// It does not, and why, and what to do.
    pub async fn check(&self) -> Result<(), Failure> {
        self.connection().await.map(drop)
    }

    async fn connection(&self) -> Result<Connection, Failure> {
        self.0.link().await.map(|(connection, _)| connection)
    }
}

impl Inner {
    /// The connection, and what is cancelled when it is lost.
    async fn link(&self) -> Result<(Connection, CancellationToken), Failure> {
        let late = || no_systemd(Failure::new(format!("systemd did not answer within {} s", CONNECT.as_secs())));
        let linking = async {
            let mut link = self.link.lock().await;
            if let Some(link) = link.as_ref().filter(|link| !link.lost.is_cancelled() && !link.connection.is_closed()) {
                return Ok((link.connection.clone(), link.lost.clone()));
            }
            *link = None;
            let new = connect(self.address.as_deref(), self.news.clone()).await?;
            let found = (new.connection.clone(), new.lost.clone());
            *link = Some(new);
            // While there was none, anything may have changed.
            self.news.changed(|_| true);
            Ok(found)
        };
        match timeout(CONNECT, linking).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(no_systemd(bus_failure("connecting to systemd", &error))),
            Err(_) => Err(late()),
        }
    }
}

/// Finds a lost bus again, so that news come in. Ends with the one for whom it does.
async fn keep_connected(bus: Weak<Inner>) {
    let mut pause = RECONNECT;
    loop {
        let Some(inner) = bus.upgrade() else { return };
        let linked = inner.link().await;
        drop(inner);
        match linked {
            Ok((_, lost)) => {
                pause = RECONNECT;
                lost.cancelled().await;
                tracing::info!("the connection to systemd was lost, and is looked for again");
            }
            Err(failure) => {
                tracing::debug!("{failure}");
                pause = (pause * 2).min(RECONNECT_MAX);
            }
        }
        tokio::time::sleep(pause).await;
    }
}

async fn call<B: serde::Serialize + zbus::DynamicType>(
    connection: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    body: &B,
) -> zbus::Result<Message> {
    connection.call_method(Some(SYSTEMD), path, Some(interface), method, body).await
}

async fn enqueue(connection: &Connection, verb: Verb, unit: &str) -> Result<OwnedObjectPath, JobError> {
    let doing = format!("{} {unit}", verb.doing());
    let job = call(connection, MANAGER_PATH, MANAGER, verb.method(), &(unit, "replace")).await;
    match job.and_then(|job| job.body().deserialize()) {
        Ok(job) => Ok(job),
        Err(error) if refused(&error) => Err(JobError::NotRun(bus_failure(&doing, &error))),
        Err(error) => Err(JobError::Unknown(bus_failure(&doing, &error))),
    }
}

#[cfg(test)]
mod tests;
