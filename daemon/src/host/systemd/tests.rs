//! The supervisor where systemd can't be asked: what can be told by traces and processes is told, and nothing destructive follows from
//! the rest. With systemd it is tried in machines, by the conformance suite of the integration crate.

use super::*;
use crate::launch_trace::{Asked, Exit, LaunchSpec, Moment, Recorded, Trace};
use crate::procfs;
use crate::test_support::{self, Stand, launch_spec};
use enclaved_core::id::{BootId, MemoryMib};
use enclaved_core::observed::{AskedBy, End};
use std::time::SystemTime;

type Known = BTreeMap<EnclaveKey, LaunchRecord>;

fn key() -> EnclaveKey {
    "signer-3".parse().unwrap()
}

fn supervisor(stand: &Stand) -> Systemd {
    let settings = LaunchSettings {
        run_dir: stand.path().to_owned(),
        images_dir: stand.path().join("images"),
        nitro_cli: stand.path().join("nitro-cli"),
    };
    let nowhere = format!("unix:path={}", stand.path().join("no-bus").display());
    Systemd::new(settings, SystemdBus::with_address(nowhere)).unwrap()
}

/// Traces as an earlier life left them, with nobody at work.
fn left(stand: &Stand) -> Trace {
    let trace = Trace::new(stand.path().join("enclaves/signer-3"));
    std::fs::create_dir_all(trace.folder()).unwrap();
    trace.write_spec(&launch_spec(stand, "signer-3")).unwrap();
    trace
}

/// A process that stands for an enclave.
fn sleeper() -> (tokio::process::Child, LaunchRecord) {
    let child = tokio::process::Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap();
    let process = procfs::process(child.id().unwrap()).unwrap().unwrap().identity;
    let at = SystemTime::now().into();
    let record =
        LaunchRecord { enclave_id: "i-0-enc1".to_owned(), process, cpu_ids: vec![1, 3], memory: MemoryMib(512), at };
    (child, record)
}

fn recorded(launch: &LaunchRecord) -> Recorded {
    Recorded { boot_id: procfs::boot_id().unwrap(), launch: launch.clone() }
}

async fn state(systemd: &Systemd) -> Option<InstanceState> {
    systemd.observe(&Known::new()).await.unwrap().remove(&key()).map(|instance| instance.state)
}

async fn end(systemd: &Systemd) -> End {
    match state(systemd).await {
        Some(InstanceState::Ended(end)) => end,
        other => panic!("{other:?}"),
    }
}

fn moment() -> Moment {
    Moment { at: SystemTime::now().into() }
}

fn asked(boot_id: BootId) -> Asked {
    Asked { boot_id, at: moment().at, by: AskedBy::Stop }
}

#[tokio::test]
async fn what_a_launch_came_to_is_unknown_while_systemd_cannot_be_asked_whether_its_helper_works() {
    let stand = Stand::new();
    let trace = left(&stand);
    for _ in 0..2 {
        let Some(InstanceState::Unknown(failure)) = state(&supervisor(&stand)).await else { panic!() };
        assert!(failure.message.contains("not known whether signer-3 runs"), "{failure}");
        assert_eq!(trace.failure().unwrap(), None, "it may be launched yet");
        trace.write_attempt(&moment()).unwrap();
    }
}

#[tokio::test]
async fn an_enclave_that_runs_and_one_that_died_are_told_apart_without_systemd() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let (mut child, record) = sleeper();
    left(&stand).write_record(&recorded(&record)).unwrap();
    assert_eq!(state(&systemd).await, Some(InstanceState::Running(record)));
    child.kill().await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), systemd.changed()).await.unwrap();
    let end = end(&systemd).await;
    assert_eq!((end.launch_failure, end.asked, end.settled), (None, None, false), "how it ended may be told yet");
}

#[tokio::test]
async fn a_launch_that_systemd_cannot_be_asked_for_leaves_no_traces() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let launch = Launch { key: key(), record: test_support::generation(), image: test_support::image() };
    let failure = systemd.launch(&launch).await.unwrap_err();
    assert!(failure.message.contains("starting enclave@signer-3.service"), "{failure}");
    assert!(failure.remedy.unwrap().contains("supervisor = \"direct\""));
    assert_eq!(systemd.observe(&Known::new()).await.unwrap(), BTreeMap::new());
}

#[tokio::test]
async fn an_enclave_is_ended_by_a_signal_where_systemd_cannot_be_asked() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let (mut child, record) = sleeper();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    systemd.stop(&key(), &record).await.unwrap();
    assert!(trace.stop_is_noted());
    child.wait().await.unwrap();
    systemd.stop(&key(), &record).await.unwrap();
    // Its unit may yet have something to say, or to be reset.
    systemd.forget(&key()).await.unwrap_err();
    assert!(trace.folder().exists());
}

#[tokio::test]
async fn a_stop_by_hand_is_told_and_one_of_a_former_boot_is_not() {
    let stand = Stand::new();
    let (mut child, record) = sleeper();
    child.kill().await.unwrap();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    trace.write_asked(&asked(procfs::boot_id().unwrap())).unwrap();
    assert_eq!(end(&supervisor(&stand)).await.asked, Some(AskedBy::Stop));
    trace.write_asked(&asked(BootId("former".to_owned()))).unwrap();
    assert_eq!(end(&supervisor(&stand)).await.asked, None);
}

#[tokio::test]
async fn an_end_is_settled_with_what_is_known_once_it_was_waited_for_long_enough() {
    let stand = Stand::new();
    let (mut child, record) = sleeper();
    child.kill().await.unwrap();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    let (result, code, status) = ("oom-kill".to_owned(), "killed".to_owned(), "KILL".to_owned());
    trace.write_exit(&Exit { at: moment().at, result, code, status, asked: false }).unwrap();
    assert!(!end(&supervisor(&stand)).await.settled);
    let ago = enclaved_core::id::Timestamp::from_millis(moment().at.as_millis() - 11_000);
    trace.write_end(&Moment { at: ago }).unwrap();
    let end = end(&supervisor(&stand)).await;
    assert_eq!(end.account.unwrap(), "its process was killed by SIGKILL, for want of memory");
    assert!(end.settled);
}

#[tokio::test]
async fn traces_of_a_former_boot_are_over_for_good() {
    let stand = Stand::new();
    let trace = left(&stand);
    trace.write_spec(&LaunchSpec { boot_id: BootId("former".to_owned()), ..launch_spec(&stand, "signer-3") }).unwrap();
    trace.write_attempt(&moment()).unwrap();
    let end = end(&supervisor(&stand)).await;
    assert_eq!((end.settled, end.account), (true, None));
}

#[tokio::test]
async fn a_bus_that_is_away_does_not_make_the_loop_spin() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    state(&systemd).await;
    let woken = tokio::time::timeout(Duration::from_millis(300), async {
        loop {
            systemd.changed().await;
            state(&systemd).await;
        }
    });
    woken.await.unwrap_err();
    assert!(lock(&systemd.units).lists <= 3, "{}", lock(&systemd.units).lists);
}

#[test]
fn a_status_of_systemd_itself_is_put_into_words() {
    let service = |code, status| ServiceResult { result: "exit-code".to_owned(), main_pid: 0, code, status };
    assert!(fared(&service(1, 226)).contains("mount namespace (NAMESPACE)"));
    assert!(fared(&service(1, 203)).contains("EXEC"));
    assert_eq!(fared(&service(1, 75)), "exit-code, exit status 75");
    assert_eq!(fared(&service(2, 9)), "exit-code, ended by signal 9");
}
