//! The stand-in nitro-cli against the contract of the real one: captured outputs, and the conduct of its processes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

use enclaved_integration::application::Application;
use enclaved_integration::eif::Eif;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};
use enclaved_integration::nitro_cli::{Code, measure};
use enclaved_integration::nitro_host::{NitroHost, Shape, image};
use enclaved_integration::processes::{is_alive, signal};
use enclaved_integration::signing::{Signer, Validity};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn host() -> NitroHost {
    NitroHost::new(&Shape::small()).unwrap()
}

fn eif(host: &NitroHost, application: &Application) -> PathBuf {
    let path = host.path().join(format!("{}.eif", application.label));
    fs::write(&path, image(application)).unwrap();
    path
}

fn app() -> Application {
    Application { echo_ports: vec![7], ..Application::http("v1", 8080) }
}

fn cli(host: &NitroHost, args: &[&str]) -> Output {
    host.command().args(args).output().unwrap()
}

fn run(host: &NitroHost, name: &str, cid: u32) -> Output {
    let eif = eif(host, &app());
    let (cid, eif) = (cid.to_string(), eif.to_str().unwrap());
    let args = ["--eif-path", eif, "--cpu-count", "2", "--memory", "64", "--enclave-cid", &cid, "--enclave-name", name];
    cli(host, &[&["run-enclave"], args.as_slice()].concat())
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn launch(host: &NitroHost, name: &str, cid: u32) -> Value {
    json(&run(host, name, cid))
}

fn pid(enclave: &Value) -> u32 {
    u32::try_from(enclave["ProcessID"].as_u64().unwrap()).unwrap()
}

fn describe(host: &NitroHost) -> Vec<Value> {
    serde_json::from_value(json(&cli(host, &["describe-enclaves"]))).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The codes on stderr, in their order.
fn codes(output: &Output) -> Vec<String> {
    let stderr = text(&output.stderr);
    stderr.lines().filter_map(|line| line.strip_prefix("[ ")?.split_once(" ] ")).map(|(code, _)| code.into()).collect()
}

fn socket_of(host: &NitroHost, enclave: &Value) -> PathBuf {
    let id = enclave["EnclaveID"].as_str().unwrap();
    host.environment().sockets.join(format!("{}.sock", id.rsplit("-enc").next().unwrap()))
}

/// Runs what was captured of the real nitro-cli, and compares all that it did, but for times and this host's folders.
fn assert_as_captured(host: &NitroHost, capture: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("captures").join(capture);
    let captured = fs::read_to_string(path).unwrap();
    let (head, rest) = captured.split_once("--- stdout\n").unwrap();
    let (stdout, rest) = rest.split_once("--- stderr\n").unwrap();
    let stderr = rest.split_once("--- end").unwrap().0;
    let mut head = head.lines();
    let args: Vec<&str> = head.next().unwrap().split(' ').skip(2).collect();
    let code: i32 = head.next().unwrap().strip_prefix("exit=").unwrap().split(' ').next().unwrap().parse().unwrap();
    let output = cli(host, &args);
    let logs = host.environment().logs;
    let normal = |text: &str| {
        let text = text.replace(logs.to_str().unwrap(), "/var/log/nitro_enclaves");
        let text = text.replace(host.sysfs().to_str().unwrap(), "/sys");
        let mut parts = text.split("/err").map(str::to_owned).collect::<Vec<_>>();
        for part in parts.iter_mut().skip(1) {
            let (time, rest) = part.split_once(".log").unwrap();
            assert_eq!(time.len(), "2026-11-20T21:07:44.862702195+00:00".len(), "{time}");
            *part = rest.to_owned();
        }
        parts.join("/err*")
    };
    assert_eq!(output.status.code(), Some(code), "{capture}: {output:?}");
    assert_eq!(normal(&text(&output.stdout)), normal(stdout), "{capture}");
    assert_eq!(normal(&text(&output.stderr)), normal(stderr), "{capture}");
}

#[test]
fn what_was_captured_of_the_real_one_is_what_this_one_prints() {
    let host = host();
    for capture in [
        "version.txt",
        "help.txt",
        "describe-enclaves.txt",
        "terminate-all.txt",
        "terminate-id.txt",
        "describe-eif-missing.txt",
        "run-enclave-noeif.txt",
    ] {
        assert_as_captured(&host, capture);
    }
    fs::remove_dir_all(host.environment().logs).unwrap();
    assert_as_captured(&host, "nodirs-describe-enclaves.txt");
}

#[test]
fn a_host_without_the_driver_refuses_as_captured() {
    let host = host();
    fs::remove_dir_all(host.sysfs().join("module")).unwrap();
    // The capture names its image by a relative path, so there must be one where the command is run.
    let image = Path::new("spike.eif");
    fs::write(host.path().join(image), b"any").unwrap();
    let output = host
        .command()
        .current_dir(host.path())
        .args(["run-enclave", "--eif-path", "spike.eif", "--cpu-count", "2", "--memory", "512"])
        .output()
        .unwrap();
    assert_eq!((output.status.code(), codes(&output)), (Some(39), vec!["E19".to_owned(), "E39".to_owned()]));
    assert!(text(&output.stderr).contains("/module/nitro_enclaves/parameters/ne_cpus', failing operation: 'Open'."));
    assert!(text(&output.stderr).contains("\nFailed connections: 1\n[ E39 ]"));
}

#[test]
fn an_image_is_described_as_captured() {
    let host = host();
    let captured = include_str!("../captures/describe-eif-real.txt");
    let expected = captured.split_once("--- stdout\n").unwrap().1.split_once("--- stderr").unwrap().0;
    let metadata = serde_json::json!({
        "ImageName": "spike", "ImageVersion": "0.1",
        "BuildMetadata": { "BuildTime": "2026-01-01T00:00:00Z", "BuildTool": "spike", "BuildToolVersion": "0.1",
            "OperatingSystem": "Linux", "KernelVersion": "6.12.95" },
        "DockerInfo": {}, "CustomMetadata": { "spike": true },
    });
    let eif = Eif::new(*b"kernel", "quiet", vec![b"init".to_vec()]);
    let path = host.path().join("spike.eif");
    fs::write(&path, eif.with_metadata(serde_json::to_vec(&metadata).unwrap()).to_bytes()).unwrap();
    let output = cli(&host, &["describe-eif", "--eif-path", path.to_str().unwrap()]);
    // Kernel and ramdisk of the captured image are not at hand, so two registers differ.
    let mut expected = expected.to_owned();
    let of_the_capture = expected.split("\"PCR0\": \"").nth(1).unwrap()[..96].to_owned();
    let registers = measure(&path).unwrap().registers;
    assert_eq!(registers["PCR0"], registers["PCR1"]);
    expected = expected.replace(&of_the_capture, &registers["PCR0"]);
    assert_eq!(text(&output.stdout), expected);
}

#[test]
fn a_launch_prints_its_progress_and_the_enclave_and_the_enclave_answers() {
    let host = host();
    let output = run(&host, "signer-1", 16);
    assert_eq!(
        text(&output.stderr),
        "Start allocating memory...\nStarted enclave with enclave-cid: 16, memory: 64 MiB, cpu-ids: [1, 5]\n"
    );
    let enclave = json(&output);
    let id = enclave["EnclaveID"].as_str().unwrap();
    assert!(id.starts_with("i-0123456789abcdef0-enc"), "{id}");
    assert_eq!(
        text(&output.stdout),
        format!(
            "{{\n  \"EnclaveName\": \"signer-1\",\n  \"EnclaveID\": \"{id}\",\n  \"ProcessID\": {},\n  \"EnclaveCID\": 16,\n  \
             \"NumberOfCPUs\": 2,\n  \"CPUIDs\": [\n    1,\n    5\n  ],\n  \"MemoryMiB\": 64\n}}\n",
            pid(&enclave)
        )
    );
    let mut echo = host.connect(16, 7).unwrap();
    echo.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    echo.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
    assert!(host.connect(16, 8).is_err(), "nothing listens there");
    let mut http = host.connect(16, 8080).unwrap();
    http.write_all(b"GET /health HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    http.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
}

#[test]
fn a_description_has_the_keys_in_their_order_and_the_measurements_of_the_image() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    let output = cli(&host, &["describe-enclaves"]);
    let registers = measure(&eif(&host, &app())).unwrap().registers;
    let expected = format!(
        "[\n  {{\n    \"EnclaveName\": \"signer-1\",\n    \"EnclaveID\": {},\n    \"ProcessID\": {},\n    \"EnclaveCID\": 16,\n    \
         \"NumberOfCPUs\": 2,\n    \"CPUIDs\": [\n      1,\n      5\n    ],\n    \"MemoryMiB\": 64,\n    \"State\": \"RUNNING\",\n    \
         \"Flags\": \"NONE\",\n    \"Measurements\": {{\n      \"HashAlgorithm\": \"Sha512_48 {{ .. }}\",\n      \"PCR0\": \"{}\",\n      \
         \"PCR1\": \"{}\",\n      \"PCR2\": \"{}\"\n    }}\n  }}\n]\n",
        enclave["EnclaveID"],
        pid(&enclave),
        registers["PCR0"],
        registers["PCR1"],
        registers["PCR2"],
    );
    assert_eq!(text(&output.stdout), expected);
    assert_eq!(text(&output.stderr), "");
    let with_metadata = json(&cli(&host, &["describe-enclaves", "--metadata"]));
    assert_eq!(with_metadata[0]["Metadata"]["OperatingSystem"], "Linux");
}

#[test]
fn a_termination_ends_the_enclave_and_gives_back_what_it_held() {
    let host = host();
    let before = host.free_hugepages().unwrap();
    let enclave = launch(&host, "signer-1", 16);
    assert_eq!(host.free_hugepages().unwrap(), before - 32);
    let id = enclave["EnclaveID"].as_str().unwrap();
    let output = cli(&host, &["terminate-enclave", "--enclave-id", id]);
    assert_eq!(
        text(&output.stdout),
        format!("{{\n  \"EnclaveName\": \"signer-1\",\n  \"EnclaveID\": \"{id}\",\n  \"Terminated\": true\n}}\n")
    );
    assert_eq!(text(&output.stderr), format!("Successfully terminated enclave {id}.\n"));
    assert_eq!(host.free_hugepages().unwrap(), before);
    assert!(!socket_of(&host, &enclave).exists());
    wait_until("all its processes have ended", || host.processes().is_empty());
    assert_eq!(describe(&host), [] as [Value; 0]);
    // The same CID again, at once.
    launch(&host, "signer-2", 16);
    assert_eq!(json(&cli(&host, &["terminate-enclave", "--all"]))[0]["EnclaveName"], "signer-2");
    launch(&host, "signer-3", 16);
    assert_eq!(json(&cli(&host, &["terminate-enclave", "--enclave-name", "signer-3"]))["Terminated"], true);
    let unknown = cli(&host, &["terminate-enclave", "--enclave-name", "signer-3"]);
    assert_eq!((unknown.status.code(), codes(&unknown)), (Some(58), vec!["E58".to_owned()]));
}

#[test]
fn a_signal_to_the_background_process_ends_its_enclave_cleanly() {
    for number in [Signal::TERM, Signal::INT, Signal::QUIT, Signal::HUP] {
        let host = host();
        let enclave = launch(&host, "signer-1", 16);
        signal(pid(&enclave), number).unwrap();
        wait_until("all its processes have ended", || host.processes().is_empty());
        assert!(!socket_of(&host, &enclave).exists());
        assert!(!host.vsock().join("16.sock").exists());
        assert_eq!(host.free_hugepages().unwrap(), 1024);
    }
}

#[test]
fn the_background_process_lives_on_its_own_and_dies_with_its_enclave() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    let background = pid(&enclave);
    let stat = fs::read_to_string(format!("/proc/{background}/stat")).unwrap();
    let session = stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, background.to_string(), "a session of its own");
    for fd in 0..=2 {
        assert_eq!(fs::read_link(format!("/proc/{background}/fd/{fd}")).unwrap(), Path::new("/dev/null"));
    }
    let inside = host.processes().into_iter().map(i64::from).find(|pid| *pid != i64::from(background)).unwrap();
    signal(u32::try_from(inside).unwrap(), Signal::KILL).unwrap();
    wait_until("the background process has ended", || !is_alive(background));
    assert_eq!(host.free_hugepages().unwrap(), 1024);
    assert_eq!(describe(&host), [] as [Value; 0]);
}

#[test]
fn an_enclave_dies_with_its_background_process_and_what_it_held_is_free_again() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    signal(pid(&enclave), Signal::KILL).unwrap();
    wait_until("all its processes have ended", || !is_alive(pid(&enclave)) && host.processes().is_empty());
    assert_eq!(host.free_hugepages().unwrap(), 1024);
    // The socket is left behind; the next describe deletes it and says nothing.
    assert!(socket_of(&host, &enclave).exists());
    assert_eq!(describe(&host), [] as [Value; 0]);
    assert!(!socket_of(&host, &enclave).exists());
    launch(&host, "signer-2", 16);
}

#[test]
fn a_cid_is_free_again_even_if_everything_was_killed_at_once() {
    let host = host();
    launch(&host, "signer-1", 16);
    // All are stopped first, so that none can clean up after another.
    for pid in host.processes() {
        signal(u32::try_from(pid).unwrap(), Signal::STOP).unwrap();
    }
    assert_eq!(enclaved_integration::processes::end_all(host.path()), [] as [i32; 0]);
    assert!(host.vsock().join("16.sock").exists());
    launch(&host, "signer-2", 16);
    assert!(host.connect(16, 7).is_ok());
    assert_eq!(host.free_hugepages().unwrap(), 1024 - 32);
}

#[test]
fn deleting_the_socket_ends_the_enclave() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    fs::remove_file(socket_of(&host, &enclave)).unwrap();
    wait_until("all its processes have ended", || host.processes().is_empty());
}

#[test]
fn a_caller_without_descriptors_ends_healthy_enclaves() {
    let host = host();
    launch(&host, "signer-1", 16);
    host.switch_on(&[Hazard::once("describe-enclaves", Fault::ConnectionsFail)]).unwrap();
    assert_eq!(describe(&host), [] as [Value; 0]);
    wait_until("all its processes have ended", || host.processes().is_empty());
}

#[test]
fn a_truncated_command_ends_the_enclave_and_a_senseless_one_does_not() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    let socket = socket_of(&host, &enclave);
    drop(UnixStream::connect(&socket).unwrap());
    UnixStream::connect(&socket).unwrap().write_all(b"nonsense\n").unwrap();
    assert_eq!(describe(&host).len(), 1);
    UnixStream::connect(&socket).unwrap().write_all(b"\"Name\"\n").unwrap();
    wait_until("all its processes have ended", || host.processes().is_empty());
}

#[test]
fn a_silent_connection_keeps_a_describe_from_its_answer_and_the_unanswered_describe_ends_the_enclave() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    let silent = UnixStream::connect(socket_of(&host, &enclave)).unwrap();
    let output = cli(&host, &["describe-enclaves"]);
    assert_eq!(output.status.code(), Some(39));
    assert_eq!(text(&output.stdout), "[]\n");
    assert!(text(&output.stderr).starts_with("Failed connections: 1\n[ E39 ]"), "{output:?}");
    // Only now is the describe heard, and its caller has gone.
    drop(silent);
    wait_until("all its processes have ended", || host.processes().is_empty());
}

#[test]
fn a_name_that_is_taken_is_made_unique_without_a_word() {
    let host = host();
    launch(&host, "signer", 16);
    let second = run(&host, "signer", 17);
    assert!(!text(&second.stderr).contains("signer"));
    assert_eq!(json(&second)["EnclaveName"], "signer_1");
}

#[test]
fn launches_at_the_same_time_collide_on_the_heartbeat_port() {
    let host = host();
    host.switch_on(&[Hazard::once("run-enclave", Fault::SlowBoot { millis: 1500 })]).unwrap();
    let eif = eif(&host, &app());
    let args = |cid| {
        ["run-enclave", "--cpu-count", "2", "--memory", "64", "--enclave-cid", cid, "--eif-path", eif.to_str().unwrap()]
    };
    let first = host.command().args(args("16")).stdout(std::process::Stdio::piped()).spawn().unwrap();
    wait_until("the first is booting", || host.free_hugepages().unwrap() < 1024);
    let second = cli(&host, &args("17"));
    assert_eq!((second.status.code(), codes(&second)), (Some(39), vec!["E36".to_owned(), "E39".to_owned()]));
    assert_eq!(json(&first.wait_with_output().unwrap())["EnclaveCID"], 16);
    assert_eq!(json(&cli(&host, &args("17")))["EnclaveCID"], 17);
}

#[test]
fn what_the_host_has_not_got_is_refused_with_the_real_ones_code_first() {
    let host = host();
    launch(&host, "first", 16);
    let small = eif(&host, &app());
    let large = host.path().join("large.eif");
    fs::write(&large, vec![0; 17 * 1024 * 1024]).unwrap();
    let garbage = host.path().join("garbage.eif");
    fs::write(&garbage, b"not an EIF").unwrap();
    let silent = host.path().join("silent.eif");
    let silent_image = Eif::new(*b"kernel", "quiet", vec![b"no application".to_vec()]);
    fs::write(&silent, silent_image.to_bytes()).unwrap();
    let cases: [(&str, &Path, &[&str]); 11] = [
        ("E22", &small, &["--cpu-count", "7", "--memory", "64"]),
        ("E29", &small, &["--cpu-count", "6", "--memory", "64"]),
        ("E29", &small, &["--cpu-count", "1", "--memory", "64"]),
        ("E20", &small, &["--memory", "64", "--cpu-ids", "2", "2"]),
        ("E21", &small, &["--memory", "64", "--cpu-ids", "0", "4"]),
        ("E29", &small, &["--memory", "64", "--cpu-ids", "1", "5"]),
        ("E26", &large, &["--cpu-count", "2", "--memory", "64"]),
        ("E29", &small, &["--cpu-count", "2", "--memory", "32"]),
        ("E27", &small, &["--cpu-count", "2", "--memory", "4096"]),
        ("E59", &garbage, &["--cpu-count", "2", "--memory", "64"]),
        ("E36", &silent, &["--cpu-count", "2", "--memory", "64"]),
    ];
    for (code, image, args) in cases {
        let args = [&["run-enclave", "--eif-path", image.to_str().unwrap()], args].concat();
        let output = cli(&host, &args);
        assert_eq!(output.status.code(), Some(39), "{args:?}: {output:?}");
        assert_eq!(codes(&output), [code, "E39"], "{args:?}");
        assert_eq!(text(&output.stdout), "");
    }
    let cid = run(&host, "again", 16);
    assert_eq!(codes(&cid), ["E29", "E39"], "a CID in use");
    let reserved = run(&host, "again", 3);
    assert_eq!((reserved.status.code(), codes(&reserved)), (Some(3), vec!["E03".to_owned()]));
    assert_eq!(host.free_hugepages().unwrap(), 1024 - 32, "refused launches hold nothing");
    assert_eq!(describe(&host).len(), 1);
}

#[test]
fn a_launch_by_configuration_file_is_a_launch() {
    let host = host();
    let config = host.path().join("config.json");
    let launch_with = |cid: u64| {
        let settings = serde_json::json!({
            "eif_path": eif(&host, &app()), "cpu_count": 2, "memory_mib": 64, "enclave_cid": cid, "enclave_name": "signer-1",
        });
        fs::write(&config, settings.to_string()).unwrap();
        cli(&host, &["run-enclave", "--config", config.to_str().unwrap()])
    };
    // The file's CID is not looked at by nitro-cli itself; the driver refuses it.
    assert_eq!(codes(&launch_with(2)), ["E29", "E39"]);
    assert_eq!(json(&launch_with(20))["EnclaveCID"], 20);
    let automatic = json(&run(&host, "automatic", 0));
    assert_eq!(automatic["EnclaveCID"], 4);
}

#[test]
fn the_first_describe_waits_for_the_hash_and_killing_it_ends_the_enclave() {
    let host = host();
    host.switch_on(&[Hazard::once("run-enclave", Fault::SlowFirstDescribe { millis: 700 })]).unwrap();
    launch(&host, "patient", 16);
    let began = Instant::now();
    assert_eq!(describe(&host).len(), 1);
    assert!(began.elapsed() > Duration::from_millis(300), "{:?}", began.elapsed());

    host.switch_on(&[Hazard::once("run-enclave", Fault::SlowFirstDescribe { millis: 1000 })]).unwrap();
    let impatient = launch(&host, "impatient", 17);
    // As a describe does that is killed once it has been heard, while it waits for the answer.
    let mut describing = UnixStream::connect(socket_of(&host, &impatient)).unwrap();
    describing.write_all(b"{\"Describe\":{\"metadata\":false}}\n").unwrap();
    describing.write_all(b"{\"Describe\":{\"metadata\":false}}\n").unwrap();
    let mut heard = [0; 10];
    describing.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"\"Confirm\"\n");
    drop(describing);
    wait_until("its background process has ended", || !is_alive(pid(&impatient)));
    assert_eq!(describe(&host).len(), 1);
}

#[test]
fn an_enclave_that_is_told_to_dies_from_inside() {
    let host = host();
    let enclave = launch(&host, "signer-1", 16);
    let mut http = host.connect(16, 8080).unwrap();
    http.write_all(b"POST /die HTTP/1.0\r\ncontent-length: 0\r\n\r\n").unwrap();
    assert_eq!(http.read(&mut [0; 1]).unwrap(), 0, "cut off without an answer");
    wait_until("the background process has ended", || !is_alive(pid(&enclave)));
    host.switch_on(&[Hazard::once("run-enclave", Fault::DieAfter { millis: 10 })]).unwrap();
    launch(&host, "signer-2", 16);
    wait_until("all its processes have ended", || host.processes().is_empty());
}

#[test]
fn hazards_of_a_launch_leave_what_they_say() {
    let host = host();
    let hazard = |fault| host.switch_on(&[Hazard::once("run-enclave", fault)]).unwrap();
    hazard(Fault::FailInside { code: Code(28) });
    let output = run(&host, "inside", 16);
    assert_eq!((output.status.code(), codes(&output)), (Some(39), vec!["E28".to_owned(), "E39".to_owned()]));
    hazard(Fault::Fail { code: Code::SPAWN });
    let output = run(&host, "outside", 16);
    assert_eq!((output.status.code(), codes(&output)), (Some(5), vec!["E05".to_owned()]));
    hazard(Fault::NeverBoots { millis: 10 });
    let output = run(&host, "never", 16);
    assert_eq!((output.status.code(), codes(&output)), (Some(39), vec!["E36".to_owned(), "E39".to_owned()]));
    assert!(text(&output.stderr).contains("Started enclave with enclave-cid: 16"));
    hazard(Fault::Garbage);
    let output = run(&host, "garbage", 16);
    assert!(output.status.success() && serde_json::from_slice::<Value>(&output.stdout).is_err());
    hazard(Fault::Silence);
    let output = run(&host, "silence", 16);
    assert!(output.status.success() && output.stdout.is_empty());
    wait_until("nothing of these runs", || host.processes().is_empty());

    hazard(Fault::GarbledAnswer);
    let output = run(&host, "garbled", 16);
    assert!(output.status.success() && serde_json::from_slice::<Value>(&output.stdout).is_err());
    hazard(Fault::SucceedButExit { code: 39 });
    let output = run(&host, "lying", 17);
    assert_eq!(output.status.code(), Some(39));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["EnclaveCID"], 17);
    hazard(Fault::KilledBeforeAnswer);
    let output = run(&host, "unheard", 18);
    assert_eq!((output.status.code(), output.stdout.len()), (None, 0));
    let mut names: Vec<String> =
        describe(&host).iter().map(|one| one["EnclaveName"].as_str().unwrap().into()).collect();
    names.sort();
    assert_eq!(names, ["garbled", "lying", "unheard"]);
    json(&cli(&host, &["terminate-enclave", "--all"]));

    hazard(Fault::KilledAfterAnswer);
    let output = run(&host, "heard", 16);
    assert_eq!(output.status.code(), None);
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["EnclaveName"], "heard");
    assert_eq!(describe(&host).len(), 1);
}

#[test]
fn a_caller_killed_during_boot_leaves_no_enclave() {
    let host = host();
    host.switch_on(&[Hazard::once("run-enclave", Fault::SlowBoot { millis: 500 })]).unwrap();
    let eif = eif(&host, &app());
    let mut caller = host
        .command()
        .args(["run-enclave", "--cpu-count", "2", "--memory", "64", "--eif-path", eif.to_str().unwrap()])
        .spawn()
        .unwrap();
    wait_until("it is booting", || host.free_hugepages().unwrap() < 1024);
    caller.kill().unwrap();
    caller.wait().unwrap();
    wait_until("all its processes have ended", || host.processes().is_empty());
    assert_eq!(host.free_hugepages().unwrap(), 1024);
}

#[test]
fn a_console_is_there_in_debug_mode_only() {
    let host = host();
    let enclave = launch(&host, "closed", 16);
    let id = enclave["EnclaveID"].as_str().unwrap();
    let refused = cli(&host, &["console", "--enclave-id", id]);
    assert_eq!((refused.status.code(), codes(&refused)), (Some(44), vec!["E44".to_owned()]));
    let eif = eif(&host, &app());
    let debug =
        ["run-enclave", "--cpu-count", "2", "--memory", "64", "--debug-mode", "--enclave-name", "open", "--eif-path"];
    json(&cli(&host, &[&debug, [eif.to_str().unwrap()].as_slice()].concat()));
    let flags: Vec<Value> = describe(&host).iter().map(|enclave| enclave["Flags"].clone()).collect();
    assert!(flags.contains(&"DEBUG_MODE".into()) && flags.contains(&"NONE".into()));
    let console = cli(&host, &["console", "--enclave-name", "open", "--disconnect-timeout", "0"]);
    assert!(
        text(&console.stdout).contains("Successfully connected to the console.\nbooting v1 as open"),
        "{console:?}"
    );
}

#[test]
fn a_signed_image_has_a_register_for_its_signer_and_does_not_start_with_an_expired_certificate() {
    let host = host();
    let sign = |validity, ramdisk: &[u8]| {
        let eif = Eif::new(*b"kernel", "quiet", vec![b"init".to_vec(), ramdisk.to_vec()]);
        Signer::new("signer (test)", validity).unwrap().sign(eif).unwrap()
    };
    let path = host.path().join("signed.eif");
    let file = path.to_str().unwrap();
    let run = ["run-enclave", "--cpu-count", "2", "--memory", "64", "--eif-path", file];
    fs::write(&path, sign(Validity::Valid, &app().to_line()).to_bytes()).unwrap();
    let described = json(&cli(&host, &["describe-eif", "--eif-path", file]));
    assert_eq!((&described["IsSigned"], &described["SignatureCheck"]), (&true.into(), &true.into()));
    json(&cli(&host, &run));
    assert_eq!(describe(&host)[0]["Measurements"]["PCR8"], described["Measurements"]["PCR8"]);
    assert_eq!(described["Measurements"]["PCR8"].as_str().unwrap().len(), 96);

    fs::write(&path, sign(Validity::Expired, &app().to_line()).to_bytes()).unwrap();
    assert_eq!(codes(&cli(&host, &run)), ["E59", "E39"]);
    let mut other = sign(Validity::Valid, b"signed");
    other.ramdisks[1] = app().to_line();
    fs::write(&path, other.to_bytes()).unwrap();
    assert_eq!(codes(&cli(&host, &run)), ["E59", "E39"], "signed for another image");
}

#[test]
fn every_command_is_on_record() {
    let host = host();
    cli(&host, &["--version"]);
    cli(&host, &["describe-enclaves"]);
    let calls = host.calls().unwrap();
    assert_eq!(calls.iter().map(|call| call.command()).collect::<Vec<_>>(), ["--version", "describe-enclaves"]);
}

#[test]
fn dropping_a_host_leaves_nothing_behind() {
    let host = host();
    launch(&host, "signer-1", 16);
    let folder = host.path().to_owned();
    drop(host);
    assert!(!folder.exists());
    assert_eq!(enclaved_integration::processes::carrying(&folder), [] as [i32; 0]);
}
