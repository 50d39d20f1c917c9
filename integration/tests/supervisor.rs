//! The supervisor for hosts without systemd, with the real launch helper and the stand-in nitro-cli in all its moods: what
//! the supervisor says of an enclave is what the host shows of it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

use enclaved::host::direct::{Direct, DirectSettings, HelperCommand};
use enclaved::host::vsock_prober::VsockProber;
use enclaved::host::{Prober as _, Supervisor as _};
use enclaved_core::desired::{HealthCheck, OnUnhealthy, Probe};
use enclaved_core::failure::{ECode, Failure};
use enclaved_core::id::{Cid, EnclaveKey, MemoryMib, Timestamp};
use enclaved_core::image::{ExpectedImage, Limits, Measurer, verify};
use enclaved_core::ledger::{GenerationRecord, Identity, LaunchRecord, Phase, ProcessIdentity};
use enclaved_core::observed::InstanceState;
use enclaved_core::plan::Launch;
use enclaved_core::routes::VsockTransport;
use enclaved_integration::application::Application;
use enclaved_integration::binaries;
use enclaved_integration::nitro_cli::Code;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};
use enclaved_integration::nitro_host::{NitroHost, Shape, image};
use enclaved_integration::processes::{is_alive, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

struct Stand {
    host: NitroHost,
    direct: Direct,
    launch: Launch,
}

fn supervisor(host: &NitroHost) -> Direct {
    Direct::new(DirectSettings {
        run_dir: host.path().join("run"),
        images_dir: host.path().join("images"),
        nitro_cli: host.nitro_cli(),
        helper: HelperCommand { program: binaries::find("enclaved").unwrap(), arguments: vec!["launch".into()] },
    })
    .unwrap()
}

impl Stand {
    fn new() -> Self {
        let host = NitroHost::new(&Shape::small()).unwrap();
        let file = image(&Application::http("v1", 8080));
        let mut measurer = Measurer::new(Limits::default());
        measurer.update(&file).unwrap();
        let image = verify(measurer.finish().unwrap(), &ExpectedImage::default()).unwrap();
        fs::create_dir(host.path().join("images")).unwrap();
        fs::write(host.path().join(format!("images/{}.eif", image.digest())), file).unwrap();
        let identity = Identity { image: image.digest(), cpus: 2, memory: MemoryMib(128), debug: false };
        let record = GenerationRecord {
            cid: Cid::FIRST,
            identity,
            measurements: *image.measurements(),
            egress: Vec::new(),
            phase: Phase::Launching { since: Timestamp::from_millis(1) },
        };
        let direct = supervisor(&host);
        Self { host, direct, launch: Launch { key: "signer-1".parse().unwrap(), record, image } }
    }

    fn with(fault: Fault) -> Self {
        let stand = Self::new();
        stand.fault(fault);
        stand
    }

    fn fault(&self, fault: Fault) {
        let hazard = Hazard { on: "run-enclave".to_owned(), enclave: None, times: Some(1), fault };
        self.host.switch_on(&[hazard]).unwrap();
    }

    fn key(&self) -> &EnclaveKey {
        &self.launch.key
    }

    async fn state(&self) -> InstanceState {
        self.direct.observe(&BTreeMap::new()).await.unwrap().remove(self.key()).unwrap().state
    }

    /// Looks until the launch is over, woken by the supervisor alone.
    async fn settled(&self) -> InstanceState {
        let settled = async {
            loop {
                match self.state().await {
                    InstanceState::Launching => self.direct.changed().await,
                    state => return state,
                }
            }
        };
        tokio::time::timeout(DEADLINE, settled).await.unwrap()
    }

    async fn running(&self) -> LaunchRecord {
        match self.settled().await {
            InstanceState::Running(record) => record,
            other => panic!("{other:?}"),
        }
    }

    async fn launch_failure(&self) -> Failure {
        match self.settled().await {
            InstanceState::Ended { launch_failure: Some(failure), .. } => failure,
            other => panic!("{other:?}"),
        }
    }

    /// Looks until an enclave that ran is over, woken by the supervisor alone.
    async fn ended(&self) {
        let ended = async {
            loop {
                match self.state().await {
                    InstanceState::Running(_) => self.direct.changed().await,
                    InstanceState::Ended { launch_failure: None, .. } => return,
                    other => panic!("{other:?}"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, ended).await.unwrap();
    }

    /// The processes of the enclaves that run, as nitro-cli says.
    fn described(&self) -> Vec<u64> {
        let output = self.host.command().arg("describe-enclaves").output().unwrap();
        let enclaves: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        enclaves.iter().map(|enclave| enclave["ProcessID"].as_u64().unwrap()).collect()
    }

    fn calls(&self, command: &str) -> usize {
        self.host.calls().unwrap().iter().filter(|call| call.args.first().is_some_and(|arg| arg == command)).count()
    }

    fn launch_helper(&self) -> Option<ProcessIdentity> {
        let file = self.host.path().join("run/enclaves/signer-1/helper.json");
        fs::read(file).ok().map(|text| serde_json::from_slice(&text).unwrap())
    }

    fn trace(&self, file: &str) -> bool {
        self.host.path().join("run/enclaves/signer-1").join(file).exists()
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_enclave_is_launched_answers_and_its_death_is_noticed_at_once() {
    let stand = Stand::new();
    stand.direct.launch(&stand.launch).await.unwrap();
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
    let prober = VsockProber::new(VsockTransport::Hybrid(stand.host.vsock()));
    prober.probe(Cid::FIRST, &check).await.unwrap().unwrap();
    // Nobody but its own process is left of the launch.
    until("the launch helper has ended", || !stand.launch_helper().is_some_and(|helper| is_alive(helper.pid))).await;

    signal(record.process.pid, Signal::KILL).unwrap();
    let killed = Instant::now();
    stand.ended().await;
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    prober.probe(Cid::FIRST, &check).await.unwrap().unwrap_err();
    stand.direct.forget(stand.key()).await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_the_enclave_cleanly_and_gives_its_resources_back() {
    let stand = Stand::new();
    let free = stand.host.free_hugepages().unwrap();
    stand.direct.launch(&stand.launch).await.unwrap();
    let record = stand.running().await;
    assert_eq!(stand.host.free_hugepages().unwrap(), free - 64);
    stand.direct.forget(stand.key()).await.unwrap_err();
    stand.direct.stop(stand.key(), &record).await.unwrap();
    stand.ended().await;
    assert_eq!(stand.host.free_hugepages().unwrap(), free);
    stand.direct.stop(stand.key(), &record).await.unwrap();
    stand.direct.forget(stand.key()).await.unwrap();
    assert!(!stand.trace(""));
}

#[tokio::test]
async fn whatever_nitro_cli_does_with_its_answer_an_enclave_that_runs_is_found() {
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
        let stand = Stand::with(fault);
        stand.direct.launch(&stand.launch).await.unwrap();
        let record = stand.running().await;
        assert_eq!(stand.described(), [u64::from(record.process.pid)], "{told}");
        assert_eq!(stand.calls("run-enclave"), 1, "{told}");
    }
}

#[tokio::test]
async fn a_launch_without_an_enclave_is_over_and_says_why() {
    for (fault, code, words) in [
        (Fault::FailInside { code: Code(26) }, Some(26), "memory too small"),
        (Fault::Fail { code: Code(19) }, Some(19), "file operation failed"),
        (Fault::NeverBoots { millis: 100 }, Some(36), "did not boot"),
        (Fault::Garbage, None, "not its JSON"),
        (Fault::Silence, None, "not its JSON"),
    ] {
        let told = format!("{fault:?}");
        let stand = Stand::with(fault);
        stand.direct.launch(&stand.launch).await.unwrap();
        let failure = stand.launch_failure().await;
        assert_eq!(failure.code, code.map(ECode), "{told}: {failure}");
        assert!(failure.message.contains(words), "{told}: {failure}");
        assert_eq!(stand.described(), [0_u64; 0], "{told}");
        stand.direct.forget(stand.key()).await.unwrap();
    }
}

#[tokio::test]
async fn a_driver_that_is_busy_for_a_moment_costs_no_generation() {
    let stand = Stand::with(Fault::FailInside { code: Code(29) });
    stand.direct.launch(&stand.launch).await.unwrap();
    let record = stand.running().await;
    assert_eq!(stand.described(), [u64::from(record.process.pid)]);
    assert_eq!(stand.calls("run-enclave"), 2);
}

#[tokio::test]
async fn an_enclave_that_gets_another_name_than_its_own_is_ended_again() {
    let stand = Stand::new();
    let image = stand.host.path().join(format!("images/{}.eif", stand.launch.image.digest()));
    let by_hand = ["run-enclave", "--cpu-count", "2", "--memory", "64", "--enclave-name", "signer-1", "--eif-path"];
    assert!(stand.host.command().args(by_hand).arg(image).output().unwrap().status.success());
    let before = stand.described();
    stand.direct.launch(&stand.launch).await.unwrap();
    let failure = stand.launch_failure().await;
    assert!(
        failure.message.contains("its name is \"signer-1_1\"") && failure.message.contains("ended again"),
        "{failure}"
    );
    assert_eq!(stand.described(), before);
}

#[tokio::test]
async fn a_launch_survives_the_death_of_the_control_process_and_of_its_helper() {
    let mut stand = Stand::with(Fault::SlowBoot { millis: 1500 });
    stand.direct.launch(&stand.launch).await.unwrap();
    until("nitro-cli is at work", || stand.trace("nitro-cli.json")).await;
    stand.direct = supervisor(&stand.host);
    assert_eq!(stand.state().await, InstanceState::Launching);
    signal(stand.launch_helper().unwrap().pid, Signal::KILL).unwrap();
    // nitro-cli goes on without it, or not; either way the verdict is what the host shows.
    match stand.settled().await {
        InstanceState::Running(record) => assert_eq!(stand.described(), [u64::from(record.process.pid)]),
        InstanceState::Ended { launch_failure: Some(failure), .. } => {
            assert!(failure.message.contains("interrupted"), "{failure}");
            assert_eq!(stand.described(), [0_u64; 0]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(stand.calls("run-enclave"), 1);
}
