//! nitro-cli's contract, against outputs of the real one and against everything that it must not be.

use super::*;
use crate::test_support::write_script;
use enclaved_core::failure::ECode;
use tempfile::TempDir;

/// A stand-in that prints what it is told to.
struct Fake {
    folder: TempDir,
}

impl Fake {
    fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nitro-cli");
        write_script(&path, &format!("d={}\n{script}", folder.path().display()));
        Self { folder }
    }

    /// One that does what the captured call did: `(stdout, stderr, exit status)`.
    fn replay(capture: &str) -> Self {
        let (head, rest) = capture.split_once("\n--- stdout\n").unwrap();
        let (stdout, rest) = rest.split_once("--- stderr\n").unwrap();
        let stderr = rest.split_once("--- end").unwrap().0;
        let status = head.split_once("exit=").unwrap().1.split(' ').next().unwrap();
        let fake = Self::new(&format!("cat $d/stdout; cat $d/stderr >&2; exit {status}"));
        std::fs::write(fake.folder.path().join("stdout"), stdout).unwrap();
        std::fs::write(fake.folder.path().join("stderr"), stderr).unwrap();
        fake
    }

    fn cli(&self) -> NitroCli {
        NitroCli::new(self.folder.path().join("nitro-cli"))
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).unwrap()
    }
}

fn request() -> RunRequest {
    RunRequest {
        image: "/images/a b.eif".into(),
        name: "signer-3".to_owned(),
        cid: Cid::FIRST,
        cpus: 2,
        memory: MemoryMib(512),
        debug: false,
        mark: Mark("/run/traces/signer-3".into()),
    }
}

/// The JSON of a good launch, with one of its values replaced.
fn json(name: &str, cid: u64, process: u32) -> String {
    format!(
        r#"{{"EnclaveName":"{name}","EnclaveID":"i-0abc-enc0123","ProcessID":{process},"EnclaveCID":{cid},"NumberOfCPUs":2,"CPUIDs":[1,3],"MemoryMiB":512,"Later":true}}"#
    )
}

async fn run(fake: &Fake) -> Result<LaunchRecord, RunError> {
    fake.cli().run_enclave(&request(), |_| {}).await
}

async fn refused(fake: &Fake) -> Failure {
    match run(fake).await {
        Err(RunError::NotRunning(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

async fn unclear(fake: &Fake) -> Failure {
    match run(fake).await {
        Err(RunError::Unclear(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_launch_passes_every_argument_on_its_own_and_reads_back_process_and_resources() {
    let fake = Fake::new(&format!(
        "for a in \"$@\"; do echo \"$a\" >> $d/args; done\necho 'Start allocating memory...' >&2\n{BACKGROUND}\necho '{}'",
        json("signer-3", 16, 99999).replace("99999", "'$!'")
    ));
    let mut pid = 0;
    let record = fake.cli().run_enclave(&request(), |started| pid = started).await.unwrap();
    assert_eq!(record.process, end_background(&fake));
    assert_eq!((record.enclave_id.as_str(), record.memory), ("i-0abc-enc0123", MemoryMib(512)));
    assert_eq!(record.cpu_ids, [1, 3]);
    assert!(pid > 1);
    let expected = "run-enclave\n--eif-path\n/images/a b.eif\n--cpu-count\n2\n--memory\n512\n--enclave-cid\n16\n--enclave-name\nsigner-3\n";
    assert_eq!(fake.file("args"), expected);
}

/// Starts what stands for the process that owns the enclave; its PID is in the file `pid`.
const BACKGROUND: &str = "sleep 600 </dev/null >/dev/null 2>&1 & echo $! > $d/pid";

fn end_background(fake: &Fake) -> enclaved_core::ledger::ProcessIdentity {
    let identity = procfs::process(fake.file("pid").trim().parse().unwrap()).unwrap().unwrap().identity;
    crate::pidfd::Pidfd::open(identity).unwrap().unwrap().send(rustix::process::Signal::KILL).unwrap();
    identity
}

#[tokio::test]
async fn a_process_that_the_launch_did_not_start_is_not_taken_for_its_enclaves() {
    for process in [std::process::id(), std::os::unix::process::parent_id()] {
        let failure = unclear(&Fake::new(&format!("echo '{}'", json("signer-3", 16, process)))).await;
        assert!(failure.message.contains("this launch did not start that process"), "{failure}");
    }
}

#[tokio::test]
async fn a_code_from_after_the_start_leaves_open_whether_it_runs() {
    for code in ["E36", "E37", "E38", "E99", "E00"] {
        unclear(&Fake::new(&format!("echo '[ {code} ] x' >&2; exit 39"))).await;
    }
    for code in ["E19", "E22", "E26", "E27", "E29", "E35"] {
        refused(&Fake::new(&format!("echo '[ {code} ] x' >&2; exit 39"))).await;
    }
}

#[tokio::test]
async fn the_first_error_code_counts_and_its_details_are_kept() {
    let fake = Fake::replay(include_str!("../../../integration/captures/run-enclave-noeif.txt"));
    let failure = refused(&fake).await;
    assert_eq!(failure.code, Some(ECode(19)));
    assert!(failure.message.contains("File: 'x', failing operation: 'Open'."), "{failure}");
    assert!(
        failure.message.contains("/var/log/nitro_enclaves/err2026-11-20T20:57:06.508203769+00:00.log"),
        "{failure}"
    );
    assert!(!failure.message.contains("E39"), "{failure}");
    assert!(failure.remedy.is_some());

    let fake = Fake::replay(include_str!("../../../integration/captures/run-enclave-real.txt"));
    assert!(refused(&fake).await.message.contains("/sys/module/nitro_enclaves/parameters/ne_cpus"));
}

#[tokio::test]
async fn a_code_without_details_is_told_in_its_own_words() {
    let fake = Fake::replay(include_str!("../../../integration/captures/terminate-id.txt"));
    let failure = fake.cli().terminate_enclave("i-0123456789abcdef0-enc0123456789abcde").await.unwrap_err();
    assert_eq!(failure.code, Some(ECode(11)));
    assert!(failure.message.contains("terminate-enclave failed with E11") && failure.message.contains("Socket error"));

    let fake = Fake::replay(include_str!("../../../integration/captures/nodirs-describe-enclaves.txt"));
    let failure = fake.cli().describe_enclaves().await.unwrap_err();
    assert!(failure.message.contains("'/var/log/nitro_enclaves/nitro_enclaves.log'"), "{failure}");
}

#[tokio::test]
async fn a_lost_connection_to_the_background_process_leaves_open_whether_it_runs() {
    for (script, code) in [
        ("echo '[ E39 ] Enclave process connection failure. Such' >&2; exit 39", Some(ECode(39))),
        ("echo '[ E10 ] x' >&2; exit 39", Some(ECode(10))),
        ("kill -9 $$", None),
        ("echo '{}'; exit 2", None),
        ("echo '{}'; echo '[ E26 ] x' >&2; exit 26", Some(ECode(26))),
        ("echo 'thread main panicked' >&2; exit 101", None),
        ("exit 0", None),
        ("echo 'Hello, world'", None),
        ("echo '{\"EnclaveID\": 3}'", None),
        ("printf '\\377\\376'", None),
    ] {
        let failure = unclear(&Fake::new(script)).await;
        assert_eq!(failure.code, code, "{script}: {failure}");
        assert!(failure.message.contains("nitro-cli run-enclave"), "{failure}");
    }
}

#[tokio::test]
async fn a_signal_garbage_and_refused_arguments_are_told_apart() {
    assert!(unclear(&Fake::new("kill -9 $$")).await.message.contains("ended by signal 9"));
    let failure = unclear(&Fake::new("printf 'a\\033[31m\\377b'")).await;
    assert!(failure.message.contains("not its JSON") && failure.message.contains("a [31m\u{fffd}b"), "{failure}");
    let failure = refused(&Fake::new("echo \"error: unexpected argument '--enclave-cid' found\" >&2; exit 2")).await;
    assert!(
        failure.message.contains("refused its arguments") && failure.message.contains("--enclave-cid"),
        "{failure}"
    );
}

#[tokio::test]
async fn values_that_make_no_sense_are_not_believed() {
    let json = json("signer-3", 16, 7);
    for (from, to) in [
        ("i-0abc-enc0123", "--all"),
        ("i-0abc-enc0123", ""),
        ("i-0abc-enc0123", "a;b"),
        ("\"ProcessID\":7", "\"ProcessID\":1"),
        ("\"ProcessID\":7", "\"ProcessID\":-1"),
        ("\"CPUIDs\":[1,3]", "\"CPUIDs\":\"1,3\""),
    ] {
        let bad = json.replace(from, to);
        assert_ne!(bad, json);
        let failure = unclear(&Fake::new(&format!("echo '{bad}'"))).await;
        assert!(failure.message.contains("not its JSON"), "{failure}");
    }
}

#[tokio::test]
async fn an_enclave_with_another_name_or_cid_is_ended_again() {
    for (name, cid, told) in [("signer-3_1", 16, "signer-3_1"), ("signer-3", 17, "its CID is 17 instead of 16")] {
        let fake = Fake::new(&format!(
            "echo \"$*\" >> $d/calls\ncase $1 in run-enclave) echo '{}';; *) echo '{{\"EnclaveID\":\"i-0abc-enc0123\",\"Terminated\":true}}';; esac",
            json(name, cid, 7)
        ));
        let failure = refused(&fake).await;
        assert!(failure.message.contains(told) && failure.message.contains("ended again"), "{failure}");
        assert!(fake.file("calls").ends_with("\nterminate-enclave --enclave-id i-0abc-enc0123\n"));
    }
}

#[tokio::test]
async fn a_wrong_enclave_that_cannot_be_ended_is_named_with_the_command_that_ends_it() {
    let fake = Fake::new(&format!(
        "case $1 in run-enclave) echo '{}';; *) echo '[ E11 ] Socket error' >&2; exit 11;; esac",
        json("signer-3_1", 16, 7)
    ));
    let failure = unclear(&fake).await;
    assert!(failure.message.contains("could not be ended"), "{failure}");
    assert!(failure.remedy.unwrap().contains("--enclave-id i-0abc-enc0123"));
}

#[tokio::test]
async fn an_enclave_whose_process_is_gone_at_once_does_not_run() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let failure = refused(&Fake::new(&format!("echo '{}'", json("signer-3", 16, child.id())))).await;
    assert!(failure.message.contains("ended right after its launch"), "{failure}");
}

#[tokio::test]
async fn a_missing_executable_says_which_package_has_it() {
    let failure = NitroCli::new("/nonexistent/nitro-cli").describe_enclaves().await.unwrap_err();
    assert!(failure.message.contains("/nonexistent/nitro-cli describe-enclaves"), "{failure}");
    assert!(failure.remedy.unwrap().contains("aws-nitro-enclaves-cli"));
}

#[tokio::test]
async fn output_without_end_is_read_and_not_kept() {
    let failure = unclear(&Fake::new("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; echo x")).await;
    assert!(failure.message.contains("longer than 1 MiB"), "{failure}");
}

#[tokio::test(start_paused = true)]
async fn a_background_process_that_holds_the_outputs_does_not_hold_up_the_answer() {
    // With time paused, the drain's deadline passes as soon as nothing else happens.
    let fake = Fake::new("sleep 600 & echo $! > $d/pid\necho '[]'");
    let description = fake.cli().describe_enclaves().await.unwrap();
    assert_eq!(description, Description { enclaves: vec![], incomplete: None });
    let pid: u32 = fake.file("pid").trim().parse().unwrap();
    let holder = procfs::process(pid).unwrap().unwrap();
    crate::pidfd::Pidfd::open(holder.identity).unwrap().unwrap().send(rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn enclaves_are_described_and_a_partial_list_says_that_it_is_one() {
    let fake = Fake::replay(include_str!("../../../integration/captures/describe-enclaves.txt"));
    assert_eq!(fake.cli().describe_enclaves().await.unwrap().enclaves, []);

    let one = json("signer-3", 16, 7).replace("\"Later\":true", r#""State":"RUNNING","Flags":"DEBUG_MODE""#);
    let fake = Fake::new(&format!("echo '[{one}]'; echo 'Failed connections: 1\n[ E39 ] x' >&2; exit 39"));
    let description = fake.cli().describe_enclaves().await.unwrap();
    assert_eq!(description.enclaves.len(), 1);
    assert_eq!(description.enclaves[0].state, State::Running);
    assert_eq!(description.enclaves[0].flags, Flag::DebugMode);
    assert_eq!(description.incomplete.unwrap().code, Some(ECode(39)));

    let fake = Fake::new("echo '[]'; echo '[ E07 ] x' >&2; exit 7");
    assert_eq!(fake.cli().describe_enclaves().await.unwrap_err().code, Some(ECode(7)));
}

#[tokio::test]
async fn only_an_id_is_passed_to_terminate() {
    let fake = Fake::new("touch $d/called; exit 0");
    for bad in ["", "--all", "a b", &"a".repeat(200)] {
        assert!(fake.cli().terminate_enclave(bad).await.is_err());
    }
    assert!(!fake.folder.path().join("called").exists());
}

#[test]
fn patience_lies_above_what_nitro_cli_grants() {
    let seconds = |image: u64, mib: u64| patience(image, MemoryMib(mib)).as_secs();
    assert_eq!(seconds(1 << 20, 512), 240);
    assert_eq!(seconds(13 << 30, 200 << 10), 5 * 90 + 60);
    assert!(patience(u64::MAX, MemoryMib(u64::MAX)) > Duration::from_secs(1));
}

#[test]
fn nitro_cli_is_not_run_near_the_limit_of_descriptors_nor_where_they_cannot_be_counted() {
    let wide = || Ok((1000, 100_000));
    are_enough("describe-enclaves", (Ok(960), 1024), wide()).unwrap();
    let uncounted = || io::Error::from(io::ErrorKind::PermissionDenied);
    for (own, host, words) in [
        ((Ok(961), 1024), wide(), "961 of 1024 descriptors of this process"),
        ((Err(uncounted()), 1024), wide(), "could not be counted"),
        ((Ok(10), 1024), Ok((99_800, 100_000)), "99800 of 100000 open files of the host"),
        ((Ok(10), 1024), Err(uncounted()), "could not be counted"),
    ] {
        let failure = are_enough("describe-enclaves", own, host).unwrap_err();
        assert!(failure.message.contains(words) && failure.message.contains("was not run"), "{failure}");
        assert!(failure.remedy.unwrap().contains("LimitNOFILE="));
    }
}
