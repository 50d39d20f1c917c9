//! The supervisor where systemd can't be asked: what can be told by traces and processes is told, and nothing destructive follows from
//! the rest. With systemd it is tried in machines, by the conformance suite of the integration crate.

use super::*;
use crate::launch_trace::{Asked, Exit, Failed, LaunchSpec, Moment, Recorded, Trace};
use crate::procfs;
use crate::stop_notes::StopNotes;
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
        stopped_dir: stand.path().join("stopped"),
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

/// How an enclave ended whose process is gone, and who asked for it, by what is known beside the traces.
async fn end_beside(systemd: &Systemd, beside: Beside) -> End {
    let beside = Beside { exits_are_noted: true, ..beside };
    let mut scan = systemd.launches.look(&Known::new(), beside).await.unwrap();
    match scan.instances.remove(&key()).unwrap().state {
        InstanceState::Ended(end) => end,
        other => panic!("{other:?}"),
    }
}

/// Traces of an enclave that ended so many seconds ago.
async fn ended(stand: &Stand, seconds: u64) -> Trace {
    let (mut child, record) = sleeper();
    child.kill().await.unwrap();
    let trace = left(stand);
    trace.write_record(&recorded(&record)).unwrap();
    let ago = enclaved_core::id::Timestamp::from_millis(moment().at.as_millis() - seconds * 1000);
    trace.write_end(&Moment { at: ago }).unwrap();
    trace
}

#[tokio::test]
async fn an_end_is_told_after_a_while_without_systemd_and_stays_open_until_the_unit_is_seen_to_be_over() {
    let stand = Stand::new();
    let trace = ended(&stand, 0).await;
    let (result, code, status) = ("oom-kill".to_owned(), "killed".to_owned(), "KILL".to_owned());
    trace.write_exit(&Exit { at: moment().at, result, code, status, asked: false }).unwrap();
    let early = end(&supervisor(&stand)).await;
    assert_eq!((early.settled, early.account), (false, None));
    let trace = ended(&stand, 11).await;
    assert!(trace.exit().unwrap().is_some());
    let late = end(&supervisor(&stand)).await;
    assert_eq!(late.account.unwrap(), "its process was killed by SIGKILL, for want of memory");
    assert!(!late.settled);
}

#[tokio::test]
async fn an_end_is_settled_by_the_state_of_its_unit_however_long_that_takes() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let trace = ended(&stand, 3600).await;
    let these = BTreeSet::from([key()]);
    let stopping = Beside { busy: these.clone(), standing: these.clone(), ..Beside::default() };
    let not_seen_yet = Beside { standing: these, ..Beside::default() };
    let not_told_yet = Beside { stories: BTreeMap::from([(key(), Story::Coming)]), ..Beside::default() };
    for beside in [stopping, not_seen_yet, not_told_yet] {
        assert!(!end_beside(&systemd, beside.clone()).await.settled, "{beside:?}");
    }
    // Who stopped it is noted last of all.
    trace.write_asked(&asked(procfs::boot_id().unwrap())).unwrap();
    let end = end_beside(&systemd, Beside::default()).await;
    assert_eq!((end.settled, end.asked), (true, Some(AskedBy::Stop)));
}

#[tokio::test]
async fn a_stop_by_hand_outlives_the_boot_and_is_forgotten_with_the_launch() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let notes = StopNotes::new(stand.path().join("stopped"));
    notes.write(&key(), &asked(BootId("former".to_owned()))).unwrap();
    assert_eq!(end(&systemd).await.asked, Some(AskedBy::Stop), "nothing else is left of it");
    let trace = left(&stand);
    trace.write_spec(&LaunchSpec { boot_id: BootId("former".to_owned()), ..launch_spec(&stand, "signer-3") }).unwrap();
    assert_eq!(end(&systemd).await.asked, Some(AskedBy::Stop), "its traces outlived the boot, too");
    systemd.launches.forget(&key()).await.unwrap();
    assert!(!notes.is_noted(&key()).unwrap());
    assert_eq!(state(&systemd).await, None);
}

#[tokio::test]
async fn an_enclave_that_runs_is_not_ended_by_a_note() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    StopNotes::new(stand.path().join("stopped")).write(&key(), &asked(BootId("former".to_owned()))).unwrap();
    let (_child, record) = sleeper();
    let known = Known::from([(key(), record.clone())]);
    let seen = systemd.observe(&known).await.unwrap().remove(&key()).unwrap().state;
    assert_eq!(seen, InstanceState::Running(record.clone()));
    left(&stand).write_record(&recorded(&record)).unwrap();
    assert_eq!(state(&systemd).await, Some(InstanceState::Running(record)));
}

#[tokio::test]
async fn a_launch_that_was_stopped_by_hand_is_over_and_not_begun_again_to_find_that_out() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let trace = left(&stand);
    trace.write_attempt(&moment()).unwrap();
    trace.write_asked(&asked(procfs::boot_id().unwrap())).unwrap();
    let (result, code, status) = ("signal".to_owned(), "killed".to_owned(), "TERM".to_owned());
    trace.write_exit(&Exit { at: moment().at, result, code, status, asked: true }).unwrap();
    let end = end_beside(&systemd, Beside::default()).await;
    assert_eq!(end.asked, Some(AskedBy::Stop));
    assert!(end.launch_failure.unwrap().message.contains("stopped while it was being launched"));
}

#[tokio::test]
async fn a_launch_of_which_it_cannot_be_found_out_what_came_is_unknown_while_its_helper_waits_to_try_again() {
    let stand = Stand::new();
    let systemd = supervisor(&stand);
    let trace = left(&stand);
    trace.write_attempt(&moment()).unwrap();
    trace.write_resolve(&Failed { at: moment().at, count: 1, failure: Failure::new("E07") }).unwrap();
    let seen = async || {
        let beside = Beside { busy: BTreeSet::from([key()]), exits_are_noted: true, ..Beside::default() };
        let mut scan = systemd.launches.look(&Known::new(), beside).await.unwrap();
        scan.instances.remove(&key()).unwrap().state
    };
    let trying = trace.lock().unwrap();
    assert_eq!(seen().await, InstanceState::Launching);
    drop(trying);
    let InstanceState::Unknown(failure) = seen().await else { panic!("it should be unknown") };
    assert!(failure.message.contains("E07"), "{failure}");
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
