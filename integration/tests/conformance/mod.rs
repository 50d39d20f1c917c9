//! What every supervisor does, with the real launch helper and the stand-in nitro-cli in all its moods: what it says of an
//! enclave is what the host shows of it. The sentences are the same for all; where they are played is each one's own.

use enclaved::host::vsock_prober::VsockProber;
use enclaved::host::{Prober as _, Supervisor};
use enclaved::launches::LaunchSettings;
use enclaved_core::desired::{HealthCheck, OnUnhealthy, Probe};
use enclaved_core::failure::{ECode, Failure};
use enclaved_core::id::{Cid, EnclaveKey, Generation, MemoryMib, Timestamp};
use enclaved_core::image::{ExpectedImage, Limits, Measurer, verify};
use enclaved_core::ledger::{GenerationRecord, Identity, LaunchRecord, Phase, ProcessIdentity};
use enclaved_core::observed::{End, InstanceState};
use enclaved_core::plan::Launch;
use enclaved_core::routes::VsockTransport;
use enclaved_integration::application::Application;
use enclaved_integration::nitro_cli::faults::{self, Fault, Hazard};
use enclaved_integration::nitro_cli::{Code, calls};
use enclaved_integration::nitro_host::image;
use enclaved_integration::processes::{is_alive, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

/// All sentences, by name: each is played by `$play` in its own way.
macro_rules! sentences {
    ($play:ident) => {
        $play! {
            an_enclave_is_launched_answers_and_its_death_is_noticed_at_once
            a_stop_ends_the_enclave_cleanly_and_gives_its_resources_back
            whatever_nitro_cli_does_with_its_answer_an_enclave_that_runs_is_found
            a_launch_without_an_enclave_is_over_and_says_why
            a_driver_that_is_busy_for_a_moment_costs_no_generation
            an_enclave_that_gets_another_name_than_its_own_is_ended_again
            a_launch_survives_the_death_of_the_control_process_and_of_its_helper
            a_generation_with_traces_is_never_launched_again
            an_enclave_outlives_its_supervisor_and_is_found_by_the_next_one
        }
    };
}
pub(crate) use sentences;

/// Where things are on the host.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) launches: LaunchSettings,
    pub(crate) sysfs: PathBuf,
    pub(crate) vsock: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) faults: PathBuf,
}

/// A supervisor on a host, and what it is to launch.
pub(crate) struct Stand<S> {
    places: Places,
    make: Box<dyn Fn(&Places) -> S>,
    supervisor: S,
    launch: Launch,
    /// The host itself, where it ends with the test.
    _host: Box<dyn std::any::Any>,
}

impl<S: Supervisor> Stand<S> {
    pub(crate) fn new(places: Places, host: impl std::any::Any, make: impl Fn(&Places) -> S + 'static) -> Self {
        let file = image(&Application::http("v1", 8080));
        let mut measurer = Measurer::new(Limits::default());
        measurer.update(&file).unwrap();
        let image = verify(measurer.finish().unwrap(), &ExpectedImage::default()).unwrap();
        fs::create_dir_all(&places.launches.images_dir).unwrap();
        fs::write(places.launches.images_dir.join(format!("{}.eif", image.digest())), file).unwrap();
        let identity = Identity { image: image.digest(), cpus: 2, memory: MemoryMib(128), debug: false };
        let record = GenerationRecord {
            cid: Cid::FIRST,
            identity,
            measurements: *image.measurements(),
            egress: Vec::new(),
            phase: Phase::Launching { since: Timestamp::from_millis(1) },
        };
        let launch = Launch { key: "signer-1".parse().unwrap(), record, image };
        Self { supervisor: make(&places), make: Box::new(make), places, launch, _host: Box::new(host) }
    }

    /// The fault befalls the next launch.
    fn fault(&self, fault: Fault) {
        let hazard = Hazard { on: "run-enclave".to_owned(), enclave: None, times: Some(1), fault };
        faults::switch_on(&self.places.faults, &[hazard]).unwrap();
    }

    fn key(&self) -> &EnclaveKey {
        &self.launch.key
    }

    async fn begin(&self) {
        self.supervisor.launch(&self.launch).await.unwrap();
    }

    async fn look(&self) -> Option<InstanceState> {
        let mut all = self.supervisor.observe(&BTreeMap::new()).await.unwrap();
        all.remove(self.key()).map(|instance| instance.state)
    }

    /// Looks until there is something like that, woken by the supervisor alone.
    async fn until_seen<T>(&self, what: &str, like: impl Fn(&Option<InstanceState>) -> Option<T>) -> T {
        let mut last = None;
        let looking = async {
            loop {
                last = Some(self.look().await);
                if let Some(found) = last.as_ref().and_then(&like) {
                    return found;
                }
                self.supervisor.changed().await;
            }
        };
        let found = tokio::time::timeout(DEADLINE, looking).await;
        found.unwrap_or_else(|_| panic!("not seen within {DEADLINE:?}: {what}; last {last:?}"))
    }

    /// Looks until the launch is over.
    async fn settled(&self) -> InstanceState {
        let over = |state: &Option<InstanceState>| state.clone().filter(|state| *state != InstanceState::Launching);
        self.until_seen("the launch is over", over).await
    }

    async fn running(&self) -> LaunchRecord {
        match self.settled().await {
            InstanceState::Running(record) => record,
            other => panic!("{other:?}"),
        }
    }

    async fn launch_failure(&self) -> Failure {
        match self.settled().await {
            InstanceState::Ended(End { launch_failure: Some(failure), asked: None, .. }) => failure,
            other => panic!("{other:?}"),
        }
    }

    /// Looks until an enclave that ran is over.
    async fn ended(&self) {
        self.until_seen("the enclave has ended", |state| match state {
            Some(InstanceState::Running(_)) => None,
            Some(InstanceState::Ended(End { launch_failure: None, .. })) => Some(()),
            other => panic!("{other:?}"),
        })
        .await;
    }

    /// Removes the traces of a launch that is over, as soon as all is known of its end.
    async fn forgotten(&self) {
        self.until_seen("all is known of its end", |state| match state {
            Some(InstanceState::Ended(end)) => end.settled.then_some(()),
            other => panic!("{other:?}"),
        })
        .await;
        self.supervisor.forget(self.key()).await.unwrap();
        assert_eq!(self.look().await, None);
    }

    /// Ends whatever came of the launch, and takes the next number.
    async fn next(&mut self) {
        if let Some(InstanceState::Running(record)) = self.look().await {
            self.supervisor.stop(self.key(), &record).await.unwrap();
            self.ended().await;
        }
        self.forgotten().await;
        self.launch.key.generation = Generation(self.launch.key.generation.0 + 1);
        self.launch.record.cid = self.launch.record.cid.next();
    }

    /// The control process dies, and another one takes over.
    fn restart(&mut self) {
        self.supervisor = (self.make)(&self.places);
    }

    fn nitro_cli(&self) -> Command {
        let mut command = Command::new(&self.places.launches.nitro_cli);
        command.env_clear();
        command
    }

    /// The processes of the enclaves that run, as nitro-cli says.
    fn described(&self) -> Vec<u64> {
        let output = self.nitro_cli().arg("describe-enclaves").output().unwrap();
        let enclaves: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        enclaves.iter().map(|enclave| enclave["ProcessID"].as_u64().unwrap()).collect()
    }

    /// How often nitro-cli was told to launch it.
    fn launches(&self) -> usize {
        let name = self.key().to_string();
        let calls = calls(&self.places.state).unwrap();
        calls.iter().filter(|call| call.command() == "run-enclave" && call.args.contains(&name)).count()
    }

    fn free_hugepages(&self) -> u64 {
        let file = "devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages";
        fs::read_to_string(self.places.sysfs.join(file)).unwrap().trim().parse().unwrap()
    }

    fn trace(&self, file: &str) -> PathBuf {
        self.places.launches.run_dir.join("enclaves").join(self.key().to_string()).join(file)
    }

    fn launch_helper(&self) -> Option<ProcessIdentity> {
        fs::read(self.trace("helper.json")).ok().map(|text| serde_json::from_slice(&text).unwrap())
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) async fn an_enclave_is_launched_answers_and_its_death_is_noticed_at_once<S: Supervisor>(stand: Stand<S>) {
    stand.begin().await;
    let record = stand.running().await;
    assert_eq!(stand.described(), [u64::from(record.process.pid)]);
    assert_eq!(record.memory, MemoryMib(128));
    let check = HealthCheck {
        probe: Probe::Http { port: 8080, path: "/health".to_owned() },
        start_period: Duration::ZERO,
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(10),
        failures: 1,
        on_failure: OnUnhealthy::Report,
    };
    let prober = VsockProber::new(VsockTransport::Hybrid(stand.places.vsock.clone()));
    prober.probe(Cid::FIRST, &check).await.unwrap().unwrap();
    // Nobody but its own process is left of the launch.
    until("the launch helper has ended", || !stand.launch_helper().is_some_and(|helper| is_alive(helper.pid))).await;

    signal(record.process.pid, Signal::KILL).unwrap();
    let killed = Instant::now();
    stand.ended().await;
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    prober.probe(Cid::FIRST, &check).await.unwrap().unwrap_err();
    stand.forgotten().await;
}

pub(crate) async fn a_stop_ends_the_enclave_cleanly_and_gives_its_resources_back<S: Supervisor>(stand: Stand<S>) {
    let free = stand.free_hugepages();
    stand.begin().await;
    let record = stand.running().await;
    assert_eq!(stand.free_hugepages(), free - 64);
    stand.supervisor.forget(stand.key()).await.unwrap_err();
    stand.supervisor.stop(stand.key(), &record).await.unwrap();
    stand.ended().await;
    assert_eq!(stand.free_hugepages(), free);
    stand.supervisor.stop(stand.key(), &record).await.unwrap();
    let asked = stand.until_seen("all is known of its end", |state| match state {
        Some(InstanceState::Ended(end)) if end.settled => Some(end.asked),
        _ => None,
    });
    assert_eq!(asked.await, None, "it was enclaved itself");
    stand.forgotten().await;
    assert!(!stand.trace("").exists());
}

pub(crate) async fn whatever_nitro_cli_does_with_its_answer_an_enclave_that_runs_is_found<S: Supervisor>(
    mut stand: Stand<S>,
) {
    for fault in [
        Fault::GarbledAnswer,
        Fault::SucceedButExit { code: 1 },
        Fault::SucceedButExit { code: 2 },
        Fault::SucceedButExit { code: 39 },
        Fault::KilledBeforeAnswer,
        Fault::KilledAfterAnswer,
        Fault::SlowFirstDescribe { millis: 300 },
        Fault::SlowBoot { millis: 300 },
        Fault::Hang { millis: 300 },
    ] {
        let told = format!("{fault:?}");
        stand.fault(fault);
        stand.begin().await;
        let record = stand.running().await;
        assert_eq!(stand.described(), [u64::from(record.process.pid)], "{told}");
        assert_eq!(stand.launches(), 1, "{told}");
        stand.next().await;
    }
}

pub(crate) async fn a_launch_without_an_enclave_is_over_and_says_why<S: Supervisor>(mut stand: Stand<S>) {
    for (fault, code, words) in [
        (Fault::FailInside { code: Code(26) }, Some(26), "memory too small"),
        (Fault::Fail { code: Code(19) }, Some(19), "file operation failed"),
        (Fault::NeverBoots { millis: 100 }, Some(36), "did not boot"),
        (Fault::Garbage, None, "not its JSON"),
        (Fault::Silence, None, "not its JSON"),
    ] {
        let told = format!("{fault:?}");
        stand.fault(fault);
        stand.begin().await;
        let failure = stand.launch_failure().await;
        assert_eq!(failure.code, code.map(ECode), "{told}: {failure}");
        assert!(failure.message.contains(words), "{told}: {failure}");
        assert_eq!(stand.described(), [0_u64; 0], "{told}");
        stand.next().await;
    }
}

pub(crate) async fn a_driver_that_is_busy_for_a_moment_costs_no_generation<S: Supervisor>(stand: Stand<S>) {
    stand.fault(Fault::FailInside { code: Code(29) });
    stand.begin().await;
    let record = stand.running().await;
    assert_eq!(stand.described(), [u64::from(record.process.pid)]);
    assert_eq!(stand.launches(), 2);
}

pub(crate) async fn an_enclave_that_gets_another_name_than_its_own_is_ended_again<S: Supervisor>(stand: Stand<S>) {
    let image = stand.places.launches.images_dir.join(format!("{}.eif", stand.launch.image.digest()));
    let by_hand = ["run-enclave", "--cpu-count", "2", "--memory", "64", "--enclave-name", "signer-1", "--eif-path"];
    assert!(stand.nitro_cli().args(by_hand).arg(image).output().unwrap().status.success());
    let before = stand.described();
    stand.begin().await;
    let failure = stand.launch_failure().await;
    assert!(
        failure.message.contains("its name is \"signer-1_1\"") && failure.message.contains("ended again"),
        "{failure}"
    );
    assert_eq!(stand.described(), before);
}

pub(crate) async fn a_launch_survives_the_death_of_the_control_process_and_of_its_helper<S: Supervisor>(
    mut stand: Stand<S>,
) {
    stand.fault(Fault::SlowBoot { millis: 1500 });
    stand.begin().await;
    until("nitro-cli is at work", || stand.trace("nitro-cli.json").exists()).await;
    stand.restart();
    assert_eq!(stand.look().await, Some(InstanceState::Launching));
    signal(stand.launch_helper().unwrap().pid, Signal::KILL).unwrap();
    // nitro-cli goes on without it, or not; either way the verdict is what the host shows.
    match stand.settled().await {
        InstanceState::Running(record) => assert_eq!(stand.described(), [u64::from(record.process.pid)]),
        InstanceState::Ended(End { launch_failure: Some(failure), .. }) => {
            assert!(failure.message.contains("interrupted"), "{failure}");
            assert_eq!(stand.described(), [0_u64; 0]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(stand.launches(), 1);
}

pub(crate) async fn a_generation_with_traces_is_never_launched_again<S: Supervisor>(mut stand: Stand<S>) {
    stand.begin().await;
    stand.begin().await;
    let record = stand.running().await;
    stand.restart();
    stand.begin().await;
    assert_eq!(stand.running().await, record);
    signal(record.process.pid, Signal::KILL).unwrap();
    stand.ended().await;
    stand.begin().await;
    stand.ended().await;
    assert_eq!(stand.launches(), 1);
}

pub(crate) async fn an_enclave_outlives_its_supervisor_and_is_found_by_the_next_one<S: Supervisor>(
    mut stand: Stand<S>,
) {
    stand.begin().await;
    let record = stand.running().await;
    stand.restart();
    assert_eq!(stand.look().await, Some(InstanceState::Running(record.clone())));
    // Whatever becomes of the traces, what the ledger knows and runs is running.
    fs::remove_dir_all(stand.trace("")).unwrap();
    let known = BTreeMap::from([(stand.key().clone(), record.clone())]);
    let instances = stand.supervisor.observe(&known).await.unwrap();
    assert_eq!(instances[stand.key()].state, InstanceState::Running(record.clone()));
    stand.supervisor.stop(stand.key(), &record).await.unwrap();
    until("it has ended", || !is_alive(record.process.pid)).await;
}
