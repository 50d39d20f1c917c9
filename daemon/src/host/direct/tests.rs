//! The supervisor with real helpers (this test binary plays them) and a nitro-cli of a few lines of shell.

use super::*;
use crate::launch::tests::helper;
use crate::launch_trace::{LaunchSpec, Moment, Outcome as Traced, Recorded, STOP_FILE, Trace};
use crate::launches::scan::Scan;
use crate::launches::{LOOK_AGAIN, now};
use crate::pidfd::Pidfd;
use crate::test_support::{self, Stand, launch_spec, until};
use crate::{nitro_cli, procfs};
use enclaved_core::id::{BootId, Timestamp};
use enclaved_core::ledger::GenerationRecord;
use enclaved_core::observed::{End, InstanceState};
use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::Duration;

type Known = BTreeMap<EnclaveKey, LaunchRecord>;

fn key() -> EnclaveKey {
    "signer-3".parse().unwrap()
}

fn settings(stand: &Stand) -> LaunchSettings {
    LaunchSettings {
        run_dir: stand.path().to_owned(),
        images_dir: stand.path().join("images"),
        stopped_dir: stand.path().join("stopped"),
        nitro_cli: stand.path().join("nitro-cli"),
    }
}

fn direct(stand: &Stand) -> Direct {
    let helper = HelperCommand { program: helper(stand.path()), arguments: Vec::new() };
    Direct::new(settings(stand), helper).unwrap()
}

fn launch() -> Launch {
    Launch { key: key(), record: test_support::generation(), image: test_support::image() }
}

async fn state(direct: &Direct, known: &Known) -> Option<InstanceState> {
    direct.observe(known).await.unwrap().remove(&key()).map(|instance| instance.state)
}

/// Observes until there is something else than a launch under way, woken by `changed` alone.
async fn settled(direct: &Direct) -> InstanceState {
    tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            match state(direct, &Known::new()).await {
                Some(InstanceState::Launching) => direct.changed().await,
                Some(state) => return state,
                None => panic!("the launch has no traces"),
            }
        }
    })
    .await
    .unwrap()
}

async fn running(direct: &Direct) -> LaunchRecord {
    match settled(direct).await {
        InstanceState::Running(record) => record,
        other => panic!("{other:?}"),
    }
}

/// Observes until an enclave that ran is over, woken by `changed` alone.
async fn ended(direct: &Direct) -> InstanceState {
    tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            match state(direct, &Known::new()).await {
                Some(InstanceState::Running(_)) => direct.changed().await,
                Some(state @ InstanceState::Ended(End { launch_failure: None, .. })) => return state,
                other => panic!("{other:?}"),
            }
        }
    })
    .await
    .unwrap()
}

async fn launch_failure(direct: &Direct) -> Failure {
    match settled(direct).await {
        InstanceState::Ended(End { launch_failure: Some(failure), .. }) => failure,
        other => panic!("{other:?}"),
    }
}

/// Traces as an earlier life left them, with nobody at work.
fn left(stand: &Stand) -> Trace {
    let trace = Trace::new(stand.path().join("enclaves/signer-3"));
    fs::create_dir_all(trace.folder()).unwrap();
    trace.write_spec(&launch_spec(stand, "signer-3")).unwrap();
    trace
}

/// A process that stands for an enclave.
fn sleeper() -> (tokio::process::Child, LaunchRecord) {
    marked_sleeper("")
}

/// One that the launch with these traces started.
fn marked_sleeper(trace: impl AsRef<std::ffi::OsStr>) -> (tokio::process::Child, LaunchRecord) {
    let child = Command::new("sleep").arg("600").env(nitro_cli::MARK, trace).kill_on_drop(true).spawn().unwrap();
    let process = procfs::process(child.id().unwrap()).unwrap().unwrap().identity;
    let record = LaunchRecord {
        enclave_id: "i-0-enc1".to_owned(),
        process,
        cpu_ids: vec![1, 3],
        memory: enclaved_core::id::MemoryMib(512),
        at: now(),
    };
    (child, record)
}

fn recorded(launch: &LaunchRecord) -> Recorded {
    Recorded { boot_id: procfs::boot_id().unwrap(), launch: launch.clone() }
}

#[tokio::test]
async fn a_launch_is_seen_under_way_then_running_and_its_death_is_noticed() {
    let stand = Stand::new();
    stand.nitro_cli("while [ ! -e $d/go ]; do sleep 0.01; done; enclave", "fail");
    let direct = direct(&stand);
    direct.launch(&launch()).await.unwrap();
    assert_eq!(state(&direct, &Known::new()).await, Some(InstanceState::Launching));
    fs::write(stand.path().join("go"), "").unwrap();
    let record = running(&direct).await;
    let generation = direct.observe(&Known::new()).await.unwrap().remove(&key()).unwrap().generation;
    assert_eq!(generation, Some(GenerationRecord { ..launch().record }));

    Pidfd::open(record.process).unwrap().unwrap().send(Signal::KILL).unwrap();
    let ended = ended(&direct).await;
    assert_eq!(state(&direct, &Known::new()).await, Some(ended), "the time of its end stays");
}

#[tokio::test]
async fn a_generation_with_traces_is_never_launched_again() {
    let stand = Stand::new();
    stand.nitro_cli("enclave", "fail");
    let direct = direct(&stand);
    direct.launch(&launch()).await.unwrap();
    direct.launch(&launch()).await.unwrap();
    running(&direct).await;
    direct.launch(&launch()).await.unwrap();
    // A second supervisor, as after a restart.
    let again = self::direct(&stand);
    again.launch(&launch()).await.unwrap();
    running(&again).await;
    assert_eq!(fs::read_to_string(stand.path().join("calls")).unwrap(), "run-enclave\n");
}

#[tokio::test]
async fn a_failed_launch_is_over_and_says_why() {
    let stand = Stand::new();
    stand.nitro_cli("echo '[ E26 ] x' >&2; exit 26", "fail");
    let direct = direct(&stand);
    direct.launch(&launch()).await.unwrap();
    assert_eq!(launch_failure(&direct).await.code, Some(enclaved_core::failure::ECode(26)));
    direct.forget(&key()).await.unwrap();
    assert_eq!(state(&direct, &Known::new()).await, None);
    direct.forget(&key()).await.unwrap();
}

#[tokio::test]
async fn a_helper_that_cannot_be_started_leaves_no_traces() {
    let stand = Stand::new();
    let helper = HelperCommand { program: "/nonexistent/enclaved".into(), arguments: Vec::new() };
    let direct = Direct::new(settings(&stand), helper).unwrap();
    let failure = direct.launch(&launch()).await.unwrap_err();
    assert!(failure.message.contains("/nonexistent/enclaved"), "{failure}");
    assert_eq!(direct.observe(&Known::new()).await.unwrap(), BTreeMap::new());
}

#[tokio::test]
async fn a_launch_whose_control_process_ends_is_taken_up_by_the_next_one() {
    let stand = Stand::new();
    stand.nitro_cli("while [ ! -e $d/go ]; do sleep 0.01; done; enclave", "fail");
    let first = direct(&stand);
    first.launch(&launch()).await.unwrap();
    let trace = first.launches.trace(&key());
    until("nitro-cli is at work", || trace.nitro_cli().unwrap().is_some()).await;
    drop(first);

    let second = direct(&stand);
    assert_eq!(state(&second, &Known::new()).await, Some(InstanceState::Launching));
    fs::write(stand.path().join("go"), "").unwrap();
    running(&second).await;
}

#[tokio::test]
async fn a_launch_that_was_cut_off_before_nitro_cli_ran_is_a_failure_for_good() {
    let stand = Stand::new();
    stand.nitro_cli("enclave", "fail");
    let trace = left(&stand);
    let direct = direct(&stand);
    assert!(launch_failure(&direct).await.message.contains("before nitro-cli was run"));
    // A helper that comes late finds the verdict, and keeps to it.
    let status =
        Command::new(helper(stand.path())).arg("--trace-dir").arg(trace.folder()).stdout(Stdio::null()).status();
    assert!(status.await.unwrap().success());
    assert!(matches!(trace.outcome().unwrap(), Traced::Failed(_)));
    assert!(!stand.path().join("calls").exists());
}

#[tokio::test]
async fn an_enclave_that_came_of_an_interrupted_launch_is_adopted_by_what_describe_says() {
    let stand = Stand::new();
    stand.nitro_cli("fail", "describe");
    let trace = left(&stand);
    let (_child, record) = marked_sleeper(trace.folder());
    fs::write(
        stand.path().join("answer"),
        format!(
            r#"{{"EnclaveName":"signer-3","EnclaveID":"i-0-enc1","ProcessID":{},"EnclaveCID":16,"NumberOfCPUs":2,"CPUIDs":[1,3],"MemoryMiB":512,"State":"RUNNING","Flags":"NONE"}}"#,
            record.process.pid
        ),
    )
    .unwrap();
    trace.write_attempt(&Moment { at: now() }).unwrap();
    trace.write_unclear(&Failure::new("nitro-cli was ended by signal 9")).unwrap();
    assert_eq!(running(&direct(&stand)).await.process, record.process);
}

#[tokio::test]
async fn while_nobody_can_say_what_came_of_a_launch_that_one_is_unknown_and_the_others_are_not() {
    let stand = Stand::new();
    stand.nitro_cli("fail", "echo '[ E07 ] x' >&2; exit 7");
    let trace = left(&stand);
    trace.write_attempt(&Moment { at: now() }).unwrap();
    trace.write_unclear(&Failure::new("x")).unwrap();
    let (_of_the_launch, _) = marked_sleeper(trace.folder());
    let (_child, record) = sleeper();
    let other: EnclaveKey = "other-1".parse().unwrap();
    let trace = Trace::new(stand.path().join("enclaves/other-1"));
    fs::create_dir_all(trace.folder()).unwrap();
    trace.write_spec(&launch_spec(&stand, "other-1")).unwrap();
    trace.write_record(&recorded(&record)).unwrap();
    let direct = direct(&stand);
    let InstanceState::Unknown(failure) = settled(&direct).await else { panic!("it should be unknown") };
    assert!(failure.message.contains("not known whether signer-3 runs"), "{failure}");
    let instances = direct.observe(&Known::new()).await.unwrap();
    assert_eq!(instances[&other].state, InstanceState::Running(record));
    // It is not asked again at every look.
    assert!(matches!(instances[&key()].state, InstanceState::Unknown(_)));
    assert_eq!(fs::read_to_string(stand.path().join("calls")).unwrap(), "describe-enclaves\n");
    assert!(direct.forget(&key()).await.is_err());
}

#[tokio::test]
async fn traces_of_a_former_boot_tell_of_an_end() {
    let stand = Stand::new();
    let (_child, record) = sleeper();
    let trace = left(&stand);
    trace.write_record(&Recorded { boot_id: BootId("former".to_owned()), launch: record }).unwrap();
    let ended = state(&direct(&stand), &Known::new()).await;
    assert!(matches!(ended, Some(InstanceState::Ended(End { launch_failure: None, .. }))), "{ended:?}");

    let trace = left(&stand);
    fs::remove_file(trace.folder().join("record.json")).unwrap();
    trace.write_spec(&LaunchSpec { boot_id: BootId("former".to_owned()), ..launch_spec(&stand, "signer-3") }).unwrap();
    trace.write_attempt(&Moment { at: now() }).unwrap();
    let direct = direct(&stand);
    let ended = state(&direct, &Known::new()).await;
    assert!(matches!(ended, Some(InstanceState::Ended(End { launch_failure: None, .. }))), "{ended:?}");
    direct.forget(&key()).await.unwrap();
}

#[tokio::test]
async fn an_enclave_that_the_ledger_knows_runs_even_without_traces() {
    let stand = Stand::new();
    let direct = direct(&stand);
    let (_child, record) = sleeper();
    let known = Known::from([(key(), record.clone())]);
    let instances = direct.observe(&known).await.unwrap();
    assert_eq!(instances[&key()], Instance { generation: None, state: InstanceState::Running(record.clone()) });

    let mut reused = record.clone();
    reused.process.start_time -= 1;
    assert_eq!(direct.observe(&Known::from([(key(), reused)])).await.unwrap(), BTreeMap::new());
    // The same PID and the same tick, but launched before this boot, and not by nitro-cli.
    let former = LaunchRecord { at: Timestamp::from_millis(1), ..record };
    assert_eq!(direct.observe(&Known::from([(key(), former)])).await.unwrap(), BTreeMap::new());
}

#[tokio::test]
async fn torn_traces_do_not_hide_an_enclave_that_runs() {
    let stand = Stand::new();
    let (_child, record) = sleeper();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    fs::write(trace.folder().join("launch.json"), "{\"format\": 1").unwrap();
    let direct = direct(&stand);
    let instances = direct.observe(&Known::new()).await.unwrap();
    assert_eq!(instances[&key()], Instance { generation: None, state: InstanceState::Running(record.clone()) });

    // And with its record torn as well, the ledger still knows it.
    trace.write_attempt(&Moment { at: now() }).unwrap();
    fs::write(trace.folder().join("record.json"), "").unwrap();
    let Some(InstanceState::Unknown(failure)) = state(&direct, &Known::new()).await else { panic!("it may run") };
    assert!(failure.remedy.unwrap().contains("describe-enclaves"));
    let known = Known::from([(key(), record.clone())]);
    assert_eq!(state(&direct, &known).await, Some(InstanceState::Running(record)));
    assert!(direct.forget(&key()).await.is_err(), "it runs");
}

#[tokio::test]
async fn what_is_not_a_launch_is_left_alone() {
    let stand = Stand::new();
    let direct = direct(&stand);
    fs::create_dir(stand.path().join("enclaves/lost+found")).unwrap();
    fs::write(stand.path().join("enclaves/README"), "").unwrap();
    assert_eq!(direct.observe(&Known::new()).await.unwrap(), BTreeMap::new());
    assert!(stand.path().join("enclaves/README").exists());
}

#[tokio::test]
async fn traces_stay_while_the_enclave_runs_and_go_when_it_is_over() {
    let stand = Stand::new();
    let (mut child, record) = sleeper();
    left(&stand).write_record(&recorded(&record)).unwrap();
    let direct = direct(&stand);
    let failure = direct.forget(&key()).await.unwrap_err();
    assert!(failure.message.contains(&format!("its process {} runs", record.process.pid)), "{failure}");
    child.kill().await.unwrap();
    direct.forget(&key()).await.unwrap();
    assert!(!stand.path().join("enclaves/signer-3").exists());
}

#[tokio::test]
async fn a_stop_ends_the_process_and_is_a_success_when_it_is_gone() {
    let stand = Stand::new();
    let (mut child, record) = sleeper();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    let direct = direct(&stand);
    direct.observe(&Known::new()).await.unwrap();
    direct.stop(&key(), &record).await.unwrap();
    ended(&direct).await;
    child.wait().await.unwrap();
    direct.stop(&key(), &record).await.unwrap();
}

#[tokio::test]
async fn a_stop_does_not_reach_another_process_with_the_same_pid() {
    let stand = Stand::new();
    let (mut child, record) = sleeper();
    let direct = direct(&stand);
    let mut reused = record.clone();
    reused.process.start_time -= 1;
    direct.stop(&key(), &reused).await.unwrap();
    assert!(child.try_wait().unwrap().is_none());
    assert!(procfs::is_alive(record.process).unwrap());
}

#[tokio::test]
async fn an_enclave_that_does_not_heed_is_ended_through_nitro_cli() {
    let stand = Stand::new();
    stand.nitro_cli("fail", "fail");
    let (child, record) = sleeper();
    // What nitro-cli does when it is told to.
    let done = format!("kill -9 {}; echo '{{\"EnclaveID\":\"i-0-enc1\",\"Terminated\":true}}'", child.id().unwrap());
    fs::write(stand.path().join("terminate"), done).unwrap();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    // It was first asked half a minute ago, by an earlier life.
    let ago = procfs::since_boot().unwrap().as_millis() - 31_000;
    let noted = format!(r#"{{"since_ms":{ago},"asked_ms":{ago},"terminate_ms":null}}"#);
    fs::write(trace.folder().join(STOP_FILE), noted).unwrap();
    let direct = direct(&stand);
    direct.observe(&Known::new()).await.unwrap();
    direct.stop(&key(), &record).await.unwrap();
    ended(&direct).await;
    assert_eq!(fs::read_to_string(stand.path().join("terminated")).unwrap(), "i-0-enc1\n");
}

#[tokio::test]
async fn nothing_wakes_the_caller_while_nothing_changes_and_a_wait_can_be_cut_off() {
    let stand = Stand::new();
    let (mut child, record) = sleeper();
    left(&stand).write_record(&recorded(&record)).unwrap();
    let direct = direct(&stand);
    direct.observe(&Known::new()).await.unwrap();
    for _ in 0..3 {
        let mut changed = std::pin::pin!(direct.changed());
        let woken = poll_fn(|context| Poll::Ready(changed.as_mut().poll(context).is_ready())).await;
        assert!(!woken);
    }
    child.kill().await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), direct.changed()).await.unwrap();
    // Until it is looked at, the news stays news.
    tokio::time::timeout(Duration::from_secs(10), direct.changed()).await.unwrap();
}

#[tokio::test]
async fn what_an_earlier_life_was_making_is_removed_at_the_start() {
    let stand = Stand::new();
    fs::create_dir_all(stand.path().join("enclaves/.new-signer-3/x")).unwrap();
    let direct = direct(&stand);
    assert!(!stand.path().join("enclaves/.new-signer-3").exists());
    assert_eq!(direct.observe(&Known::new()).await.unwrap(), BTreeMap::new());
}

#[tokio::test]
async fn traces_that_cannot_be_read_leave_only_their_own_launch_unknown() {
    let stand = Stand::new();
    let direct = direct(&stand);
    // A folder in the place of a file can't be read as one, whoever one is.
    fs::create_dir_all(left(&stand).folder().join("record.json")).unwrap();
    assert!(matches!(state(&direct, &Known::new()).await, Some(InstanceState::Unknown(_))));
    assert!(direct.launches.shared.state().look_again.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_look_that_fails_again_and_again_is_not_repeated_at_once() {
    let stand = Stand::new();
    let direct = direct(&stand);
    fs::remove_dir(stand.path().join("enclaves")).unwrap();
    direct.launches.shared.bump();
    for _ in 0..3 {
        direct.observe(&Known::new()).await.unwrap_err();
        let before = tokio::time::Instant::now();
        direct.changed().await;
        assert!(before.elapsed() >= LOOK_AGAIN);
    }
}

#[tokio::test]
async fn a_helper_that_does_not_finish_is_started_again_only_after_a_pause() {
    let stand = Stand::new();
    let program = stand.path().join("failing-helper");
    test_support::write_script(&program, &format!("echo x >> {}/helpers; exit 1", stand.path().display()));
    left(&stand).write_attempt(&Moment { at: now() }).unwrap();
    let helper = HelperCommand { program, arguments: Vec::new() };
    let direct = Direct::new(settings(&stand), helper).unwrap();
    let InstanceState::Unknown(failure) = settled(&direct).await else { panic!("it should be unknown") };
    assert!(failure.message.contains("launch helper ended with exit status: 1"), "{failure}");
    assert!(direct.launches.shared.state().look_again.is_some_and(|pause| pause <= Duration::from_secs(1)));
    state(&direct, &Known::new()).await;
    assert_eq!(fs::read_to_string(stand.path().join("helpers")).unwrap(), "x\n");
}

#[tokio::test]
async fn a_helper_that_cannot_be_started_for_one_launch_hides_no_other() {
    let stand = Stand::new();
    left(&stand).write_attempt(&Moment { at: now() }).unwrap();
    let helper = HelperCommand { program: "/nonexistent/enclaved".into(), arguments: Vec::new() };
    let direct = Direct::new(settings(&stand), helper).unwrap();
    direct.observe(&Known::new()).await.unwrap();
    let Some(InstanceState::Unknown(failure)) = state(&direct, &Known::new()).await else { panic!("unknown") };
    assert!(failure.message.contains("/nonexistent/enclaved"), "{failure}");
}

#[tokio::test]
async fn a_stop_that_cannot_be_noted_is_carried_out_and_waits_for_the_end() {
    let stand = Stand::new();
    let (_child, record) = sleeper();
    let trace = left(&stand);
    trace.write_record(&recorded(&record)).unwrap();
    fs::create_dir(trace.folder().join(STOP_FILE)).unwrap();
    let direct = direct(&stand);
    direct.stop(&key(), &record).await.unwrap();
    assert!(!procfs::is_alive(record.process).unwrap());
}

#[tokio::test]
async fn a_long_log_is_put_aside_before_the_next_helper_writes() {
    let stand = Stand::new();
    let trace = left(&stand);
    fs::write(trace.log(), "x".repeat(100)).unwrap();
    trace.cap_log(100).unwrap();
    assert!(trace.log().exists());
    trace.cap_log(99).unwrap();
    assert!(!trace.log().exists());
    trace.cap_log(99).unwrap();
}

#[tokio::test]
async fn a_launch_that_is_forgotten_during_a_look_is_not_in_it() {
    let stand = Stand::new();
    let direct = direct(&stand);
    let scanner = direct.launches.scanner(&Known::new(), Beside::default());
    let trace = left(&stand);
    let mut scan = Scan::default();
    fs::remove_dir_all(trace.folder()).unwrap();
    assert_eq!(scanner.see(&key(), &trace, &mut scan), None);
    assert!(scan.unresolved.is_empty());
}

#[tokio::test]
async fn a_launch_that_is_over_does_not_seem_to_begin_again_while_it_is_being_forgotten() {
    let stand = Stand::new();
    let trace = left(&stand);
    trace.write_attempt(&Moment { at: now() }).unwrap();
    trace.write_end(&Moment { at: now() }).unwrap();
    let direct = direct(&stand);
    let _forgetting = Working::begin(&direct.launches.shared, &key()).unwrap();
    assert!(matches!(state(&direct, &Known::new()).await, Some(InstanceState::Ended(_))));
}

#[tokio::test]
async fn a_clock_that_was_set_back_does_not_keep_a_launch_unknown() {
    let stand = Stand::new();
    stand.nitro_cli("fail", "echo '[]'");
    let trace = left(&stand);
    trace.write_attempt(&Moment { at: now() }).unwrap();
    trace.write_unclear(&Failure::new("lost")).unwrap();
    let later = now().plus(Duration::from_secs(86_400));
    let failed = crate::launch_trace::Failed { at: later, count: 1, failure: Failure::new("x") };
    trace.write_resolve(&failed).unwrap();
    assert_eq!(launch_failure(&direct(&stand)).await.message, "lost");
}
