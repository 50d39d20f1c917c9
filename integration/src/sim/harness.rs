//! Runs the real reconcile loop on a simulated host: starts it, restarts it when it is killed, and tells whether the
//! host has become what is wanted.

use super::World;
use crate::eif;
use enclaved::asked::FetchAnswer;
use enclaved::events::Events;
use enclaved::metrics::Metrics;
use enclaved::reconciler::{Command, Inputs, LoopError, Report, run};
use enclaved_core::desired::{
    AllocatorMode, Desired, EgressSpec, EnclaveSpec, HealthCheck, HostPolicy, ImageRequest, ImageSource, IngressSpec,
    OnUnhealthy, Probe, RestartPolicy, TcpPort, UpdatePolicy,
};
use enclaved_core::id::{EnclaveKey, EnclaveName, MemoryMib};
use enclaved_core::image::{ExpectedImage, Limits, Measurer, VerifiedImage, verify};
use enclaved_core::ledger::Phase;
use enclaved_core::plan::routing;
use enclaved_core::routes::{EgressLimits, TcpRules};
use enclaved_core::status::{Facts, Status};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A proven image, different for every seed.
///
/// # Panics
/// If the writer makes images that the reader refuses.
#[expect(clippy::expect_used, reason = "a test fixture")]
pub fn image(seed: u64) -> (ImageRequest, VerifiedImage) {
    let bytes = eif::sample("sim", seed, 256).to_bytes();
    let mut measurer = Measurer::new(Limits::default());
    measurer.update(&bytes).expect("the image is well-formed");
    let report = measurer.finish().expect("the image is complete");
    let source = ImageSource::S3 { bucket: "images".to_owned(), key: format!("{seed}.eif"), version: None };
    let request = ImageRequest { source, expected: ExpectedImage::default() };
    (request, verify(report, &ExpectedImage::default()).expect("nothing is asked of it"))
}

/// A configuration with these enclaves: name, image, CPUs, memory in MiB.
///
/// # Panics
/// If a name is none.
#[expect(clippy::expect_used, reason = "a test fixture")]
pub fn desired(enclaves: &[(&str, &ImageRequest, u32, u64)]) -> Desired {
    let mut all = BTreeMap::new();
    for (number, (name, image, cpus, memory)) in enclaves.iter().enumerate() {
        let port = 20_000 + u16::try_from(number).expect("few enclaves");
        let egress = EgressSpec {
            hostname: "kms.example.com".to_owned(),
            port: 443,
            vsock_port: 8000,
            loopback: None,
            allow_addresses: Vec::new(),
            sni: false,
            limits: EgressLimits::default(),
        };
        let check = HealthCheck {
            probe: Probe::Connect { port: 8080 },
            start_period: Duration::from_secs(60),
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            failures: 3,
            on_failure: OnUnhealthy::Report,
        };
        let listen = SocketAddr::from(([127, 0, 0, 1], port));
        let spec = EnclaveSpec {
            image: (*image).clone(),
            image_poll: None,
            cpus: *cpus,
            memory: MemoryMib(*memory),
            debug: false,
            update: UpdatePolicy::Auto,
            restart: RestartPolicy::Always,
            health: Some(check),
            egress: vec![egress],
            hosts_port: None,
            ingress: IngressSpec {
                tcp: vec![TcpPort { listen, vsock_port: 8080, rules: TcpRules::default() }],
                ..IngressSpec::default()
            },
        };
        all.insert(name.parse::<EnclaveName>().expect("a name"), spec);
    }
    let host = HostPolicy { allocator: AllocatorMode::Manage, ..HostPolicy::default() };
    Desired { host, enclaves: all, ..Desired::default() }
}

/// The control process on a simulated host.
#[derive(Debug)]
pub struct Harness {
    /// The host.
    pub world: Arc<World>,
    desired: Desired,
    held: Vec<EnclaveName>,
    process: Option<Process>,
    /// How often the control process was killed.
    pub crashes: u32,
}

#[derive(Debug)]
struct Process {
    task: JoinHandle<Result<(), LoopError>>,
    commands: mpsc::Sender<Command>,
    reports: watch::Receiver<Option<Arc<Report>>>,
    metrics: Metrics,
    _facts: watch::Sender<Facts>,
}

impl Harness {
    /// Not started yet.
    pub fn new(world: Arc<World>, desired: Desired) -> Self {
        Self { world, desired, held: Vec::new(), process: None, crashes: 0 }
    }

    /// Starts the control process; one that runs is killed first.
    ///
    /// # Panics
    /// If the metrics cannot be defined.
    #[expect(clippy::expect_used, reason = "a test fixture")]
    pub async fn start(&mut self) {
        self.kill().await;
        let (commands, receiver) = mpsc::channel(8);
        let (facts, facts_receiver) = watch::channel(Facts::default());
        let (reports_sender, reports) = watch::channel(None);
        let metrics = Metrics::new().expect("metrics are well defined");
        let inputs = Inputs {
            desired: self.desired.clone(),
            boot_id: self.world.boot_id(),
            commands: receiver,
            facts: facts_receiver,
            reports: reports_sender,
            events: Events::new(metrics.clone()),
        };
        let task = tokio::spawn(run(Arc::clone(&self.world), inputs, CancellationToken::new()));
        self.process = Some(Process { task, commands, reports, metrics, _facts: facts });
    }

    /// Kills the control process, as kill -9 would: at whatever it is doing.
    pub async fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.task.abort();
            // It was just aborted, or has ended before; both are an end.
            drop(process.task.await);
        }
    }

    /// How many passes the loop made since the control process was started.
    pub fn passes(&self) -> u64 {
        let text = self.process.as_ref().and_then(|process| process.metrics.render(None).ok()).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("enclaved_reconcile_passes_total "));
        line.and_then(|count| count.parse().ok()).unwrap_or(u64::MAX)
    }

    /// The last status, if there is one.
    pub fn status(&self) -> Option<Status> {
        let report = self.process.as_ref()?.reports.borrow().clone()?;
        Some(report.status.clone())
    }

    /// Asks the control process to end every enclave and then itself; its result.
    ///
    /// # Panics
    /// If it was not started.
    #[expect(clippy::expect_used, reason = "a test fixture")]
    pub async fn terminate(&mut self) -> Result<(), LoopError> {
        let process = self.process.take().expect("it was started");
        process.commands.send(Command::Terminate).await.expect("it takes commands");
        process.task.await.expect("it does not panic")
    }

    /// Waits until the control process ends by itself; why.
    ///
    /// # Panics
    /// If it was not started.
    #[expect(clippy::expect_used, reason = "a test fixture")]
    pub async fn ended(&mut self) -> Result<(), LoopError> {
        let process = self.process.take().expect("it was started");
        process.task.await.expect("it does not panic")
    }

    /// Whether the control process saw what runs, when it looked last.
    pub fn sees(&self) -> bool {
        let report = self.process.as_ref().and_then(|process| process.reports.borrow().clone());
        report.is_some_and(|report| report.unseen.is_none())
    }

    /// Another configuration, now and after every restart.
    pub async fn configure(&mut self, desired: Desired) {
        self.desired = desired.clone();
        if let Some(process) = &self.process {
            // A process that is just being killed reads it at its start.
            drop(process.commands.send(Command::Configure(Box::new(desired))).await);
        }
    }

    /// `enclavectl stop NAME`, again and again until it is said to hold.
    pub async fn hold(&mut self, name: &EnclaveName) {
        self.held.push(name.clone());
        self.ask(|reply| Command::Hold(name.clone(), reply)).await;
    }

    /// From now on it is to be held stopped: somebody did so without the control process.
    pub fn expect_held(&mut self, name: &EnclaveName) {
        self.held.push(name.clone());
    }

    /// `enclavectl start NAME`, again and again until it is said to hold.
    pub async fn release(&mut self, name: &EnclaveName) {
        self.held.retain(|held| held != name);
        self.ask(|reply| Command::Release(name.clone(), reply)).await;
    }

    /// `enclavectl adopt NAME`, once.
    ///
    /// # Errors
    /// It is refused.
    ///
    /// # Panics
    /// If the control process does not run, or does not answer.
    #[expect(clippy::expect_used, reason = "a test fixture")]
    pub async fn accept(&self, name: &EnclaveName) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let commands = &self.process.as_ref().expect("it was started").commands;
        commands.send(Command::Accept(name.clone(), reply)).await.expect("it takes commands");
        answer.await.expect("it answers")
    }

    /// `enclavectl fetch`: asks for an image ahead of its use, and waits for what it comes to.
    ///
    /// # Panics
    /// If the control process does not run, or does not answer.
    #[expect(clippy::expect_used, reason = "a test fixture")]
    pub async fn fetch_ahead(&mut self, request: &ImageRequest) -> FetchAnswer {
        let mut begin = true;
        loop {
            let (reply, answer) = oneshot::channel();
            let commands = self.process.as_ref().expect("it was started").commands.clone();
            let request = Box::new(request.clone());
            commands.send(Command::Fetch { request, begin, reply }).await.expect("it takes commands");
            let answer = tokio::time::timeout(Duration::from_secs(60), answer).await.expect("it answers");
            match answer.expect("it answers").expect("it is fetched") {
                FetchAnswer::Fetching { .. } => begin = false,
                ended => return ended,
            }
            self.pass(Duration::from_millis(300)).await;
        }
    }

    async fn ask(&mut self, command: impl Fn(oneshot::Sender<Result<(), String>>) -> Command) {
        loop {
            let (sender, answer) = oneshot::channel();
            let Some(process) = &self.process else { return };
            let commands = process.commands.clone();
            let asking = async {
                commands.send(command(sender)).await.ok()?;
                answer.await.ok()?.ok()
            };
            let world = Arc::clone(&self.world);
            tokio::select! {
                biased;
                // Asked again after a crash, so nothing is lost.
                answer = asking => if answer.is_some() { return },
                () = world.crashed.notified() => self.crashed().await,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn crashed(&mut self) {
        self.crashes += 1;
        self.kill().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.start().await;
    }

    /// Lets time pass; the control process is started again when it is killed.
    pub async fn pass(&mut self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            let world = Arc::clone(&self.world);
            tokio::select! {
                biased;
                // Both are plain waits.
                () = world.crashed.notified() => self.crashed().await,
                () = tokio::time::sleep_until(until) => return,
            }
        }
    }

    /// Waits until the host is what is wanted.
    ///
    /// # Errors
    /// It is not, after that much simulated time: what is missing.
    pub async fn converge(&mut self, within: Duration) -> Result<Duration, String> {
        let began = Instant::now();
        loop {
            let missing = match self.missing() {
                None => return Ok(began.elapsed()),
                Some(missing) => missing,
            };
            if began.elapsed() > within {
                return Err(missing);
            }
            self.pass(Duration::from_millis(100)).await;
        }
    }

    /// Waits until the host is so.
    ///
    /// # Errors
    /// It is not, after that much simulated time.
    pub async fn until(&mut self, within: Duration, so: impl Fn(&World) -> bool) -> Result<(), String> {
        let began = Instant::now();
        while !so(&self.world) {
            if began.elapsed() > within {
                return Err(format!("the host did not become what it should: {:?}", self.status()));
            }
            self.pass(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// What is still missing, or `None`.
    fn missing(&self) -> Option<String> {
        let Some(process) = &self.process else { return Some("no control process".to_owned()) };
        if process.task.is_finished() {
            return Some("the control process ended by itself".to_owned());
        }
        let Some(report) = process.reports.borrow().clone() else { return Some("no report yet".to_owned()) };
        let status = &report.status;
        if !status.ready {
            return Some(format!("not ready: {:?} {:?}", status.enclaves, status.problems));
        }
        let busy: Vec<_> = status.steps.iter().filter(|step| !step.starts_with("probe ")).collect();
        if !busy.is_empty() {
            return Some(format!("still to do: {busy:?}"));
        }
        let Some(ledger) = self.world.ledger() else { return Some("no ledger".to_owned()) };
        let alive = self.world.alive();
        let ready: BTreeMap<_, _> = ledger
            .generations()
            .filter_map(|(key, record)| match &record.phase {
                Phase::Ready { launch, .. } => Some((key, launch.process.pid)),
                _ => None,
            })
            .collect();
        if alive != ready {
            return Some(format!("alive are {alive:?}, ready in the ledger {ready:?}"));
        }
        let wanted: Vec<_> = self.desired.enclaves.keys().filter(|name| !self.held.contains(name)).collect();
        if !alive.keys().map(|key| &key.name).eq(wanted.iter().copied()) {
            return Some(format!("alive are {alive:?}, wanted {wanted:?}"));
        }
        let runs = |key: &EnclaveKey| {
            self.desired.enclaves.get(&key.name).is_some_and(|spec| self.world.runs(key, &spec.image))
        };
        if !alive.keys().all(runs) {
            return Some(format!("alive are {alive:?}, but not all with the wanted image"));
        }
        let routes = routing::routes(&self.desired, &ledger);
        (self.world.routes().as_ref() != Some(&routes)).then(|| "the proxy serves other routes".to_owned())
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.task.abort();
        }
    }
}
