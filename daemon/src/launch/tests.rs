//! The helper with a nitro-cli of a few lines of shell: what it leaves in the traces in every turn a launch can take.

use super::*;
use crate::test_support::{Stand, launch_spec, write_script};
use std::path::PathBuf;

/// Where the process that runs only the next test finds its traces.
const TRACE_DIR: &str = "ENCLAVED_TEST_TRACE_DIR";

/// Run with [`TRACE_DIR`] set (see [`helper`]), this test is a launch helper; run as a test, it is one without a launch.
#[tokio::test]
async fn a_folder_without_a_launch_is_refused() {
    match std::env::var_os(TRACE_DIR) {
        Some(folder) => {
            let status = run(Path::new(&folder)).await;
            assert_eq!(format!("{status:?}"), format!("{:?}", ExitCode::SUCCESS));
        }
        None => {
            let folder = tempfile::tempdir().unwrap();
            let error = perform(&Trace::new(folder.path())).await.unwrap_err();
            assert!(matches!(error, LaunchError::NoLaunch(_)), "{error}");
        }
    }
}

/// A program that does what `enclaved launch --trace-dir DIR` does.
pub(crate) fn helper(folder: &Path) -> PathBuf {
    let path = folder.join("helper");
    let this = std::env::current_exe().unwrap();
    write_script(
        &path,
        &format!(
            "[ \"$1\" = --trace-dir ] || exit 64\n{TRACE_DIR}=\"$2\" exec {} --exact launch::tests::a_folder_without_a_launch_is_refused --nocapture",
            this.display()
        ),
    );
    path
}

/// A launch that was asked for, and a nitro-cli whose calls are counted in the file `calls`.
pub(super) fn asked(run_enclave: &str, describe_enclaves: &str) -> (Stand, Trace) {
    let stand = Stand::new();
    stand.nitro_cli(run_enclave, describe_enclaves);
    let trace = Trace::new(stand.path().join("trace"));
    std::fs::create_dir(trace.folder()).unwrap();
    trace.write_spec(&launch_spec(&stand, "signer-3")).unwrap();
    (stand, trace)
}

fn calls(stand: &Stand) -> Vec<String> {
    let text = std::fs::read_to_string(stand.path().join("calls")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn failure(trace: &Trace) -> Failure {
    perform(trace).await.unwrap();
    match trace.outcome().unwrap() {
        Outcome::Failed(failed) => failed.failure,
        other => panic!("{other:?}"),
    }
}

async fn launched(trace: &Trace) -> LaunchRecord {
    perform(trace).await.unwrap();
    match trace.outcome().unwrap() {
        Outcome::Ran(recorded) => recorded.launch,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_launch_leaves_the_record_of_a_live_process_and_is_not_repeated() {
    let (stand, trace) = asked("enclave", "fail");
    let record = launched(&trace).await;
    assert!(procfs::is_alive(record.process).unwrap());
    assert_eq!(launched(&trace).await, record);
    assert_eq!(calls(&stand), ["run-enclave"]);
    assert!(trace.try_lock().unwrap().is_some(), "the lock is given back");
}

#[tokio::test]
async fn a_launch_that_nitro_cli_refuses_leaves_its_reason() {
    let (stand, trace) = asked("echo '[ E26 ] Insufficient memory' >&2; exit 26", "fail");
    assert_eq!(failure(&trace).await.code, Some(ECode(26)));
    assert_eq!(failure(&trace).await.code, Some(ECode(26)));
    assert_eq!(calls(&stand), ["run-enclave"]);
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_is_busy_for_a_moment_is_tried_again() {
    let (stand, trace) =
        asked("[ $(grep -c run-enclave $d/calls) = 3 ] || { echo '[ E29 ] x' >&2; exit 39; }; enclave", "fail");
    launched(&trace).await;
    assert_eq!(calls(&stand), ["run-enclave"; 3]);

    let (stand, trace) = asked("echo '[ E29 ] x' >&2; exit 39", "fail");
    assert_eq!(failure(&trace).await.code, Some(DRIVER_BUSY));
    assert_eq!(calls(&stand), ["run-enclave"; 3]);
}

#[tokio::test]
async fn an_unclear_launch_is_settled_by_what_runs() {
    // The background process runs, and nitro-cli's answer is lost.
    let (_stand, trace) = asked("enclave > $d/answer; exit 101", "describe");
    let record = launched(&trace).await;
    assert!(procfs::is_alive(record.process).unwrap());

    let (_stand, trace) = asked("echo garbage", "echo '[]'");
    assert!(failure(&trace).await.message.contains("not its JSON"), "the first reason is kept");
}

/// What nitro-cli says where an enclave does not answer it, and lists none.
const PARTIAL: &str = "echo '[]'; echo 'Failed connections: 1\n[ E39 ] x' >&2; exit 39";

#[tokio::test]
async fn an_unclear_launch_stays_unclear_while_a_process_of_it_lives_and_nobody_can_be_asked() {
    for describe in ["echo '[ E07 ] x' >&2; exit 7", PARTIAL] {
        let (_stand, trace) = asked("enclave > $d/answer; exit 101", describe);
        for count in 1..=2 {
            let error = perform(&trace).await.unwrap_err();
            assert!(matches!(error, LaunchError::Unresolved(_)), "{error}");
            assert!(matches!(trace.outcome().unwrap(), Outcome::Attempted(_)));
            assert_eq!(trace.resolve().unwrap().unwrap().count, count);
        }
    }
}

#[tokio::test]
async fn a_launch_of_which_no_process_lives_is_over_whoever_else_does_not_answer() {
    for describe in ["echo '[ E07 ] x' >&2; exit 7", PARTIAL] {
        let (_stand, trace) = asked("exit 101", describe);
        let failure = failure(&trace).await;
        assert!(failure.message.contains("101"), "the first reason is kept: {failure}");
    }
}

#[tokio::test]
async fn an_enclave_of_the_same_name_and_another_cid_is_not_taken_over() {
    let (_stand, trace) = asked("enclave | sed s/EnclaveCID.:16/EnclaveCID\\\":99/ > $d/answer; exit 101", "describe");
    let failure = failure(&trace).await;
    assert!(failure.message.contains("CID 99 instead of 16"), "{failure}");
    assert!(failure.remedy.unwrap().contains("terminate-enclave --enclave-id"));
}

#[tokio::test]
async fn a_helper_after_one_that_was_killed_waits_for_the_nitro_cli_it_left_behind() {
    let (stand, trace) =
        asked("touch $d/begun; while [ ! -e $d/go ]; do sleep 0.01; done; enclave > $d/answer", "describe");
    let helper = helper(stand.path());
    let mut first = tokio::process::Command::new(&helper)
        .arg("--trace-dir")
        .arg(trace.folder())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    stand.wait_for("begun").await;
    let noted = || trace.nitro_cli().unwrap().is_some();
    crate::test_support::until("nitro-cli's process is noted", noted).await;
    first.kill().await.unwrap();

    let second = tokio::spawn({
        let trace = trace.clone();
        async move { launched(&trace).await }
    });
    crate::test_support::until("the second helper has the lock", || {
        trace.helper().unwrap() == Some(procfs::own_identity().unwrap())
    })
    .await;
    std::fs::write(stand.path().join("go"), "").unwrap();
    let record = second.await.unwrap();
    assert!(procfs::is_alive(record.process).unwrap());
    assert_eq!(calls(&stand), ["run-enclave", "describe-enclaves"]);
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_launch_without_an_enclave_is_a_failure_that_says_so() {
    let (_stand, trace) = asked("fail", "echo '[]'");
    trace.write_attempt(&Moment { at: now() }).unwrap();
    let begun = Instant::now();
    assert!(failure(&trace).await.message.contains("was interrupted"));
    assert!(begun.elapsed() > Duration::from_secs(200), "nitro-cli might have been about to start");
}

#[tokio::test]
async fn launches_are_serial_on_a_host() {
    let (stand, trace) = asked("enclave", "fail");
    let lock = Lock::wait(&stand.path().join("launch.lock")).unwrap();
    let launch = tokio::spawn({
        let trace = trace.clone();
        async move { launched(&trace).await }
    });
    crate::test_support::until("the helper has begun", || trace.helper().unwrap().is_some()).await;
    assert_eq!(calls(&stand), [""; 0]);
    drop(lock);
    launch.await.unwrap();
}

#[tokio::test]
async fn an_enclave_that_is_still_booting_when_nitro_cli_is_gone_is_waited_for() {
    // nitro-cli is killed; its background process goes on, and is listed only when it has booted.
    let (stand, trace) = asked(
        "enclave > $d/booting; kill -9 $$",
        "if [ -e $d/asked ]; then mv $d/booting $d/answer; describe; else touch $d/asked; echo '[]'; fi",
    );
    let record = launched(&trace).await;
    assert!(procfs::is_alive(record.process).unwrap());
    assert_eq!(calls(&stand), ["run-enclave", "describe-enclaves", "describe-enclaves"]);
}

#[tokio::test(start_paused = true)]
async fn an_enclave_that_never_comes_to_be_listed_is_given_up_after_nitro_clis_patience() {
    let (_stand, trace) = asked("enclave > $d/booting; kill -9 $$", "echo '[]'");
    let begun = Instant::now();
    assert!(failure(&trace).await.message.contains("signal 9"));
    assert!(begun.elapsed() > Duration::from_secs(200));
}

#[tokio::test]
async fn the_process_of_an_earlier_try_is_not_taken_for_that_of_the_next() {
    // nitro-cli can't be started, so no new note takes the place of the old one.
    let (stand, trace) = asked("fail", "echo '[]'");
    trace.write_nitro_cli(&procfs::own_identity().unwrap()).unwrap();
    let spec = trace.spec().unwrap().unwrap();
    let missing = NitroCli::new(stand.path().join("missing"));
    launch(&trace, &spec, &missing).await.unwrap();
    assert!(trace.attempt().unwrap().is_some());
    assert_eq!(trace.nitro_cli().unwrap(), None);
}

/// What the stand's nitro-cli does to end an enclave: it says so.
const TERMINATED: &str = r#"echo "{\"EnclaveID\":\"$3\",\"Terminated\":true}""#;

#[tokio::test]
async fn an_enclave_that_came_up_under_another_name_and_could_not_be_ended_is_ended_by_the_next_helper() {
    let (stand, trace) = asked("enclave | sed s/signer-3/signer-3_1/ | tee $d/answer", "describe");
    std::fs::write(stand.path().join("terminate"), "echo '[ E11 ] x' >&2; exit 11").unwrap();
    let error = perform(&trace).await.unwrap_err();
    assert!(matches!(error, LaunchError::Unresolved(_)), "{error}");
    assert!(matches!(trace.outcome().unwrap(), Outcome::Attempted(_)));
    std::fs::write(stand.path().join("terminate"), TERMINATED).unwrap();
    let failure = failure(&trace).await;
    assert!(failure.message.contains("under the name signer-3_1"), "{failure}");
}

#[tokio::test]
async fn an_enclave_in_the_wrong_mode_is_not_taken_but_ended() {
    let (stand, trace) = asked("enclave | sed s/NONE/DEBUG_MODE/ > $d/answer; exit 101", "describe");
    std::fs::write(stand.path().join("terminate"), TERMINATED).unwrap();
    let failure = failure(&trace).await;
    assert!(failure.message.contains("in debug mode, unlike it was asked to"), "{failure}");
    assert!(stand.path().join("terminated").exists());
}

#[tokio::test]
async fn a_listed_process_that_the_launch_did_not_start_settles_nothing() {
    let own = std::process::id();
    let (_stand, trace) =
        asked(&format!("enclave | sed 's/ProcessID.:[0-9]*/ProcessID\\\":{own}/' > $d/answer; exit 101"), "describe");
    let error = perform(&trace).await.unwrap_err();
    assert!(error.to_string().contains("did not start that process"), "{error}");
}
