//! The control process put together: the only place that names the concrete effects. Its life is [`run`], on one page.

use crate::admin::{self, Reload, Source};
use crate::allocate;
use crate::config::{self, Config, OnStop, SupervisorKind};
use crate::control_plane::Reporter;
use crate::events::{Event, Events};
use crate::host::allocator::managed::{ManagedAllocator, ManagedSettings, SystemdUnit};
use crate::host::allocator::stock::VerifiedAllocator;
use crate::host::allocator::{ExternalAllocator, SysfsAllocator};
use crate::host::direct::{Direct, HelperCommand};
use crate::host::image_store::Store;
use crate::host::inventory::{Roots, Survey};
use crate::host::ledger_file::LedgerFile;
use crate::host::proxy_link::{Link, LinkSettings, ProxyStart, left_behind};
use crate::host::systemd::Systemd;
use crate::host::vsock_prober::VsockProber;
use crate::host::{Allocator, Clock, Host, NotReserved, Outcome, Supervisor, instance_metadata};
use crate::last_good;
use crate::launch_trace::LAUNCH_LOCK;
use crate::launches::LaunchSettings;
use crate::metrics::Metrics;
use crate::reconciler::{self, Command, Inputs, Report};
use crate::systemd_bus::SystemdBus;
use crate::{doctor, procfs, service_manager};
use anyhow::Context;
use enclaved_core::allocator_file::Reservation;
use enclaved_core::desired::AllocatorMode;
use enclaved_core::failure::Failure;
use enclaved_core::id::{EnclaveKey, Timestamp};
use enclaved_core::ledger::LaunchRecord;
use enclaved_core::observed::{Instance, Pool};
use enclaved_core::plan::restart::Backoff;
use enclaved_core::plan::{Launch, Launched};
use enclaved_core::status::{Facts, HostStatus, Problem};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// So long the metadata service is waited for before reports go out under the host's own name.
const IDENTITY_PATIENCE: Duration = Duration::from_secs(30);
/// Pauses between questions to a metadata service that does not answer.
const IDENTITY_RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
/// A metrics address that is taken is tried again this often.
const METRICS_RETRY: Duration = Duration::from_secs(5);

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Arguments {
    /// The configuration file.
    pub config: PathBuf,
    /// Where the last good configuration is looked for when the file itself does not tell.
    pub state_dir: PathBuf,
}

/// Why the process does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Neither the configuration nor the last good one can be used: exit 78.
    #[error("{refused}\nand there is no former one to go on with: {last_good}")]
    Config {
        /// What is wrong with the configuration.
        refused: config::ConfigErrors,
        /// What is wrong with the last good one.
        last_good: last_good::LastGoodError,
    },
    /// Something that may pass: exit 75.
    #[error(transparent)]
    TryAgain(anyhow::Error),
    /// A bug: exit 70.
    #[error(transparent)]
    Bug(anyhow::Error),
}

/// Runs the control process until it is asked to end.
///
/// # Errors
/// It could not start, or a bug ended it. Enclaves and traffic go on either way.
pub async fn run(arguments: Arguments) -> Result<(), StartError> {
    // First of all: until it is listened for, SIGHUP ends the process.
    let hangup = signal(SignalKind::hangup()).context("listening for SIGHUP").map_err(StartError::TryAgain)?;
    let (config, refused) = configuration(&arguments)?;
    let metrics = Metrics::new().map_err(|error| StartError::Bug(error.into()))?;
    let events = Events::new(metrics.clone());
    let _lock = prepare(&config).map_err(StartError::TryAgain)?;
    let boot_id = procfs::boot_id().context("reading the boot id").map_err(StartError::TryAgain)?;
    let host = RealHost::new(&config).map_err(|failure| StartError::TryAgain(anyhow::anyhow!("{failure}")))?;
    let socket = admin::open(&config.host.admin_socket()).map_err(|error| StartError::TryAgain(error.into()))?;

    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let (commands, command_receiver) = mpsc::channel(16);
    let (reloads, reload_receiver) = mpsc::channel(4);
    let (report_sender, reports) = watch::channel(None);
    let (facts, fact_receiver) = watch::channel(first_facts(&config));
    let (checks, checked) = watch::channel(config.clone());
    let keeper =
        Keeper { arguments, config, commands: commands.clone(), facts: facts.clone(), events: events.clone(), checks };
    match refused {
        None => keeper.in_force(),
        Some(errors) => keeper.refused(&errors.to_string()),
    }
    let config = keeper.config.clone();
    let source = Source { reports: reports.clone(), commands: commands.clone(), reloads, metrics };
    tasks.spawn(admin::serve_socket(socket, source.clone(), stop.clone()));
    tasks.spawn(doctor::watch(checked, facts.clone(), events.clone(), stop.clone()));
    tasks.spawn(serve_metrics(config.metrics.listen, source, facts.clone(), stop.clone()));
    if let Some(socket) = former_proxy(&config) {
        let facts = facts.clone();
        tasks.spawn(left_behind::watch(socket, move |seen| problem(&facts, "former proxy", seen), stop.clone()));
    }
    tasks.spawn(identify(config.clone(), facts, reports.clone(), events.clone(), stop.clone()));
    tasks.spawn(service_manager::feed_watchdog(reports.clone(), stop.clone()));
    tasks.spawn(service_manager::tell(reports.clone(), stop.clone()));
    tasks.spawn(keeper.serve(reload_receiver, hangup, stop.clone()));
    let inputs = Inputs {
        desired: config.desired.clone(),
        boot_id,
        commands: command_receiver,
        facts: fact_receiver,
        reports: report_sender,
        events,
    };
    let mut reconciler = tokio::spawn(reconciler::run(Arc::new(host), inputs, stop.clone()));

    let ended = tokio::select! {
        // The handle is polled again below unless it has ended here.
        ended = &mut reconciler => Some(ended),
        // A plain wait.
        signal = asked_to_end() => {
            info!("{}, ending; {}", signal.map_err(StartError::TryAgain)?, on_stop_text(config.host.on_stop));
            None
        }
        // Cancel-safe: what is not reaped here is reaped with the process.
        error = panicked(&mut tasks) => {
            return Err(StartError::Bug(anyhow::Error::new(error).context("a part of the control process ended")));
        }
    };
    service_manager::stopping();
    let ended = match ended {
        Some(ended) => ended,
        None => {
            if config.host.on_stop == OnStop::Terminate {
                // The loop ends by itself when every enclave has, or when it has taken too long.
                drop(commands.send(Command::Terminate).await);
                // Ends with this function.
                tasks.spawn(service_manager::extend_end(reports));
            } else {
                stop.cancel();
            }
            reconciler.await
        }
    };
    stop.cancel();
    let bug = |error: anyhow::Error| StartError::Bug(error.context("the reconcile loop ended"));
    ended.map_err(|error| bug(error.into()))?.map_err(|error| bug(error.into()))
}

/// Waits until a part of the process panics. Parts that end in an orderly way are not missed.
async fn panicked(tasks: &mut JoinSet<()>) -> tokio::task::JoinError {
    loop {
        match tasks.join_next().await {
            Some(Ok(())) => {}
            Some(Err(error)) => return error,
            None => std::future::pending().await,
        }
    }
}

fn on_stop_text(on_stop: OnStop) -> &'static str {
    match on_stop {
        OnStop::Keep => "enclaves and their traffic go on",
        OnStop::Terminate => "so do the enclaves (on_stop = \"terminate\")",
    }
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// Signals cannot be listened for.
pub async fn asked_to_end() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    tokio::select! {
        // A signal that is not seen here ends nothing that has to be kept.
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    }
}

/// The configuration, or the last good one and what is wrong with the new one.
fn configuration(arguments: &Arguments) -> Result<(Config, Option<config::ConfigErrors>), StartError> {
    match config::load(&arguments.config) {
        Ok(config) => Ok((config, None)),
        Err(refused) => {
            let state_dir = last_good::state_dir_of(&arguments.config).unwrap_or_else(|| arguments.state_dir.clone());
            match last_good::recall(&state_dir) {
                Ok(config) => Ok((config, Some(refused))),
                Err(last_good) => Err(StartError::Config { refused, last_good }),
            }
        }
    }
}

/// Makes the folders, and takes the lock that only one control process can hold.
fn prepare(config: &Config) -> anyhow::Result<std::fs::File> {
    for dir in [&config.host.state_dir, &config.host.run_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("making the folder {}", dir.display()))?;
    }
    let path = config.host.run_dir.join("enclaved.lock");
    let lock = std::fs::File::create(&path).with_context(|| format!("opening {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => {
            anyhow::bail!("another enclaved runs on {} (it holds {})", config.host.run_dir.display(), path.display())
        }
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

fn first_facts(config: &Config) -> Facts {
    let host = HostStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_at: SystemTime::now().into(),
        config_revision: config.revision.clone(),
        ..HostStatus::default()
    };
    Facts { host, ..Facts::default() }
}

/// Serves metrics; an address that is taken is a problem that is shown, not the end.
async fn serve_metrics(listen: SocketAddr, source: Source, facts: watch::Sender<Facts>, stop: CancellationToken) {
    let mut said = false;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => {
                let address = listener.local_addr().map_or_else(|_| listen.to_string(), |address| address.to_string());
                facts.send_modify(|facts| {
                    facts.problems.retain(|problem| problem.about != "metrics");
                    facts.host.metrics = Some(address);
                });
                return admin::serve_metrics(listener, source, stop).await;
            }
            Err(error) if !said => {
                said = true;
                let failure =
                    Failure::new(format!("/metrics, /live and /ready are not served: listening on {listen}: {error}"))
                        .with_remedy("set [metrics] listen to a free address and restart enclaved");
                error!("{failure}");
                let problem = Problem { about: "metrics".to_owned(), failure };
                facts.send_modify(|facts| facts.problems.push(problem));
            }
            Err(_) => {}
        }
        tokio::select! {
            // Both are plain waits.
            () = tokio::time::sleep(METRICS_RETRY) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Learns who this host is, and reports to the control plane under that name, if there is one. A metadata service that is
/// late (it is, on a young instance) is waited for a while, so that a host has one name; after that the host's own name
/// has to do until it answers.
async fn identify(
    config: Config,
    facts: watch::Sender<Facts>,
    reports: watch::Receiver<Option<Arc<Report>>>,
    events: Events,
    stop: CancellationToken,
) {
    let learning = learn_identity(&facts);
    tokio::pin!(learning);
    let learned = tokio::select! {
        // Goes on below where it was.
        id = &mut learning => Some(id),
        // Plain waits.
        () = tokio::time::sleep(IDENTITY_PATIENCE) => None,
        () = stop.cancelled() => return,
    };
    let own_name = || rustix::system::uname().nodename().to_str().map_or_else(|_| "unknown".to_owned(), str::to_owned);
    let id = match learned {
        Some(id) => id,
        None => {
            let name = own_name();
            tokio::select! {
                // A report that is cut off is sent again, under the right name.
                () = report(&config, &name, &facts, &reports, &events, &stop) => return,
                id = &mut learning => id,
            }
        }
    };
    report(&config, &id.unwrap_or_else(own_name), &facts, &reports, &events, &stop).await;
}

/// Asks the metadata service until it answers; gives the instance's id, if it has one.
async fn learn_identity(facts: &watch::Sender<Facts>) -> Option<String> {
    let mut failures: u32 = 0;
    let identity = loop {
        match instance_metadata::identity().await {
            Ok(identity) => break identity,
            Err(failure) => {
                if failures == 0 {
                    warn!("this host's name and tags are not known yet: {failure}");
                }
                failures = failures.saturating_add(1);
                tokio::time::sleep(IDENTITY_RETRY.after(failures)).await;
            }
        }
    };
    let id = identity.instance_id.clone();
    facts.send_modify(|facts| {
        facts.host.instance_id = identity.instance_id;
        facts.host.instance_type = identity.instance_type;
        facts.host.region = identity.region;
        facts.host.availability_zone = identity.availability_zone;
        facts.host.tags = identity.tags;
    });
    id
}

/// Reports under that name until the end.
async fn report(
    config: &Config,
    id: &str,
    facts: &watch::Sender<Facts>,
    reports: &watch::Receiver<Option<Arc<Report>>>,
    events: &Events,
    stop: &CancellationToken,
) {
    let Some(control_plane) = &config.control_plane else { return stop.cancelled().await };
    match Reporter::new(&control_plane.url, id, control_plane.interval) {
        Ok(reporter) => reporter.run(reports.clone(), events.clone(), stop.clone()).await,
        Err(error) => {
            let failure = Failure::from_error(&error);
            error!("nothing is reported to the control plane: {failure}");
            let problem = Problem { about: "control plane".to_owned(), failure };
            facts.send_modify(|facts| facts.problems.push(problem));
        }
    }
}

/// In place of what was said of that before.
fn problem(facts: &watch::Sender<Facts>, about: &str, failure: Option<Failure>) {
    facts.send_modify(|facts| {
        facts.problems.retain(|problem| problem.about != about);
        facts.problems.extend(failure.map(|failure| Problem { about: about.to_owned(), failure }));
    });
}

/// Reads configurations when asked to, and keeps the last good one.
struct Keeper {
    arguments: Arguments,
    /// In force.
    config: Config,
    commands: mpsc::Sender<Command>,
    facts: watch::Sender<Facts>,
    events: Events,
    /// To whoever checks the host for it.
    checks: watch::Sender<Config>,
}

impl Keeper {
    async fn serve(mut self, mut reloads: mpsc::Receiver<Reload>, mut hangup: Signal, stop: CancellationToken) {
        loop {
            tokio::select! {
                // Both are cancel-safe: what is not received now is received by the next call.
                Some(reply) = reloads.recv() => {
                    let answer = self.reload().await;
                    drop(reply.send(answer));
                }
                Some(()) = hangup.recv() => drop(self.reload().await),
                // A plain wait.
                () = stop.cancelled() => return,
            }
        }
    }

    async fn reload(&mut self) -> Result<String, String> {
        service_manager::reloading();
        let answer = match config::load(&self.arguments.config) {
            Ok(config) => {
                self.config = self.with_what_cannot_change(config);
                self.in_force();
                let desired = Box::new(self.config.desired.clone());
                match self.commands.send(Command::Configure(desired)).await {
                    Ok(()) => Ok(self.config.revision.clone()),
                    Err(_) => Err("enclaved is ending".to_owned()),
                }
            }
            Err(errors) => {
                let reason = errors.to_string();
                self.refused(&reason);
                Err(reason)
            }
        };
        service_manager::reloaded();
        answer
    }

    /// Some settings count at the start of the process only. A new value is shown as waiting for a restart.
    fn with_what_cannot_change(&self, new: Config) -> Config {
        let old = &self.config;
        let mut waiting = Vec::new();
        if new.host != old.host || new.desired.host.allocator != old.desired.host.allocator {
            waiting.push("[host] folders, supervisor, allocator or on_stop");
        }
        if new.nitro_cli != old.nitro_cli {
            waiting.push("[nitro] cli");
        }
        if new.metrics != old.metrics {
            waiting.push("[metrics]");
        }
        if new.control_plane != old.control_plane {
            waiting.push("[control_plane]");
        }
        if new.desired.vsock != old.desired.vsock {
            waiting.push("[vsock]");
        }
        self.problem(
            "restart",
            (!waiting.is_empty()).then(|| {
                let text = format!("the new values of {} count after a restart of enclaved", waiting.join(", "));
                Failure::new(text).with_remedy("systemctl restart enclaved; enclaves and traffic go on meanwhile")
            }),
        );
        let mut desired = new.desired;
        desired.vsock = old.desired.vsock.clone();
        desired.host.allocator = old.desired.host.allocator;
        Config {
            host: old.host.clone(),
            nitro_cli: old.nitro_cli.clone(),
            metrics: old.metrics,
            control_plane: old.control_plane.clone(),
            desired,
            ..new
        }
    }

    fn in_force(&self) {
        self.events.emit(&Event::Configured { revision: &self.config.revision });
        for warning in &self.config.warnings {
            warn!("{warning}");
        }
        self.facts.send_modify(|facts| facts.host.config_revision.clone_from(&self.config.revision));
        self.problem("config", None);
        self.checks.send_if_modified(|checked| {
            let is_news = *checked != self.config;
            checked.clone_from(&self.config);
            is_news
        });
        let kept = last_good::keep(&self.config.host.state_dir, &self.config);
        self.problem("last good configuration", kept.err().map(|error| Failure::from_error(&error)));
    }

    fn refused(&self, reason: &str) {
        self.events.emit(&Event::ConfigRefused { reason });
        let failure = Failure::new(format!("{reason}; the last good one ({}) stays in force", self.config.revision))
            .with_remedy("correct the file, then `systemctl reload enclaved`; `enclavectl check` tries it beforehand");
        self.problem("config", Some(failure));
    }

    fn problem(&self, about: &str, failure: Option<Failure>) {
        problem(&self.facts, about, failure);
    }
}

/// The real host.
struct RealHost {
    supervisor: AnySupervisor,
    images: Store,
    allocator: AnyAllocator,
    surveyor: Survey,
    proxy: Link,
    prober: VsockProber,
    ledger: LedgerFile,
    clock: SystemClock,
}

impl RealHost {
    fn new(config: &Config) -> Outcome<Self> {
        let host = &config.host;
        let program = own_program()?;
        let images_dir = host.state_dir.join("images");
        let settings = LaunchSettings {
            run_dir: host.run_dir.clone(),
            images_dir: images_dir.clone(),
            stopped_dir: host.state_dir.join("stopped"),
            nitro_cli: config.nitro_cli.clone(),
        };
        let (supervisor, start) = match host.supervisor {
            SupervisorKind::Direct => {
                let helper = HelperCommand { program: program.clone(), arguments: vec!["launch".into()] };
                let start = ProxyStart::Spawn { program, state_dir: host.proxy_state_dir.clone() };
                (AnySupervisor::Direct(Direct::new(settings, helper)?), start)
            }
            SupervisorKind::Systemd => {
                let bus = booted_with_systemd().map(|()| SystemdBus::new())?;
                (AnySupervisor::Systemd(Systemd::new(settings, bus.clone())?), ProxyStart::Unit(bus))
            }
        };
        let proxy = Link::new(LinkSettings { socket: host.proxy_socket.clone(), start });
        let surveyor = Survey::new(Roots { sysfs: host.sysfs.clone(), ..Roots::default() });
        let (allocator, surveyor) = match config.desired.host.allocator {
            AllocatorMode::Manage => {
                let settings = ManagedSettings {
                    sysfs: host.sysfs.clone(),
                    request: host.run_dir.join(allocate::REQUEST),
                    report: allocate::REPORT.into(),
                    launch_lock: host.run_dir.join(LAUNCH_LOCK),
                };
                let unit = SystemdUnit(SystemdBus::new());
                (AnyAllocator::Managed(ManagedAllocator::new(settings, unit)), surveyor)
            }
            AllocatorMode::Verify => {
                let sysfs = SysfsAllocator::new(&host.sysfs);
                let allocator = match host.supervisor {
                    SupervisorKind::Direct => AnyAllocator::Sysfs(sysfs),
                    SupervisorKind::Systemd => AnyAllocator::Verified(VerifiedAllocator::new(sysfs, SystemdBus::new())),
                };
                (allocator, surveyor)
            }
            AllocatorMode::External => (AnyAllocator::External(ExternalAllocator), Survey::blind()),
        };
        Ok(Self {
            supervisor,
            images: Store::new(&images_dir)?,
            allocator,
            surveyor,
            proxy,
            prober: VsockProber::new(config.desired.vsock.clone()),
            ledger: LedgerFile::new(host.state_dir.join("ledger.json")),
            clock: SystemClock,
        })
    }
}

/// The executable of this process, for the launch helper and the proxy. Not by its name in /proc, which would follow a
/// package upgrade to a file that is being replaced.
fn own_program() -> Outcome<PathBuf> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::new(format!("finding the executable of enclaved: {error}")))?;
    // After an upgrade, Linux shows the path of a running executable with this mark; the new one is at the path itself.
    let text = program.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| program.clone(), |path| Path::new(path).to_owned()))
}

/// Where a proxy could be that was started before systemd came to supervise this host.
fn former_proxy(config: &Config) -> Option<PathBuf> {
    let socket = config.host.run_dir.join(config::DIRECT_PROXY_SOCKET);
    (config.host.supervisor == SupervisorKind::Systemd && socket != config.host.proxy_socket).then_some(socket)
}

/// A bus that is away for a moment is waited for while everything else goes on; a host without systemd is a mistake.
fn booted_with_systemd() -> Outcome<()> {
    match sd_notify::booted() {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(Failure::new(
            "supervisor is \"systemd\", which it is unless the configuration says otherwise, and this host was not booted \
             with systemd (there is no /run/systemd/system)",
        )
        .with_remedy("set supervisor = \"direct\" in [host]")),
    }
}

enum AnySupervisor {
    Direct(Direct),
    Systemd(Systemd),
}

impl Supervisor for AnySupervisor {
    async fn observe(&self, known: &BTreeMap<EnclaveKey, LaunchRecord>) -> Outcome<BTreeMap<EnclaveKey, Instance>> {
        match self {
            Self::Direct(supervisor) => supervisor.observe(known).await,
            Self::Systemd(supervisor) => supervisor.observe(known).await,
        }
    }

    async fn launch(&self, launch: &Launch) -> Outcome<()> {
        match self {
            Self::Direct(supervisor) => supervisor.launch(launch).await,
            Self::Systemd(supervisor) => supervisor.launch(launch).await,
        }
    }

    async fn stop(&self, key: &EnclaveKey, launch: &LaunchRecord) -> Outcome<()> {
        match self {
            Self::Direct(supervisor) => supervisor.stop(key, launch).await,
            Self::Systemd(supervisor) => supervisor.stop(key, launch).await,
        }
    }

    async fn describe(&self, launched: &[Launched]) -> Outcome<BTreeMap<EnclaveKey, Option<Failure>>> {
        match self {
            Self::Direct(supervisor) => supervisor.describe(launched).await,
            Self::Systemd(supervisor) => supervisor.describe(launched).await,
        }
    }

    async fn forget(&self, key: &EnclaveKey) -> Outcome<()> {
        match self {
            Self::Direct(supervisor) => supervisor.forget(key).await,
            Self::Systemd(supervisor) => supervisor.forget(key).await,
        }
    }

    async fn changed(&self) {
        match self {
            Self::Direct(supervisor) => supervisor.changed().await,
            Self::Systemd(supervisor) => supervisor.changed().await,
        }
    }
}

enum AnyAllocator {
    Managed(ManagedAllocator<SystemdUnit>),
    Verified(VerifiedAllocator<SystemdBus>),
    Sysfs(SysfsAllocator),
    External(ExternalAllocator),
}

impl Allocator for AnyAllocator {
    async fn observe(&self) -> Outcome<Pool> {
        match self {
            Self::Managed(allocator) => allocator.observe().await,
            Self::Verified(allocator) => allocator.observe().await,
            Self::Sysfs(allocator) => allocator.observe().await,
            Self::External(allocator) => allocator.observe().await,
        }
    }

    async fn reserve(&self, wish: &Reservation, least: Option<&Reservation>) -> Result<(), NotReserved> {
        match self {
            Self::Managed(allocator) => allocator.reserve(wish, least).await,
            Self::Verified(allocator) => allocator.reserve(wish, least).await,
            Self::Sysfs(allocator) => allocator.reserve(wish, least).await,
            Self::External(allocator) => allocator.reserve(wish, least).await,
        }
    }
}

#[derive(Debug)]
struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        SystemTime::now().into()
    }
}

impl Host for RealHost {
    type Supervisor = AnySupervisor;
    type Images = Store;
    type Allocator = AnyAllocator;
    type Surveyor = Survey;
    type Proxy = Link;
    type Prober = VsockProber;
    type Ledger = LedgerFile;
    type Clock = SystemClock;

    fn supervisor(&self) -> &AnySupervisor {
        &self.supervisor
    }
    fn images(&self) -> &Store {
        &self.images
    }
    fn allocator(&self) -> &AnyAllocator {
        &self.allocator
    }
    fn surveyor(&self) -> &Survey {
        &self.surveyor
    }
    fn proxy(&self) -> &Link {
        &self.proxy
    }
    fn prober(&self) -> &VsockProber {
        &self.prober
    }
    fn ledger(&self) -> &LedgerFile {
        &self.ledger
    }
    fn clock(&self) -> &SystemClock {
        &self.clock
    }
}
