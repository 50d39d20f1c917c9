//! The real `enclavectl` against the daemon's real admin API (with a made-up status), and on files.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use enclaved::admin::{self, Reload, Source};
use enclaved::metrics::Metrics;
use enclaved::reconciler::{Command, Report};
use enclaved_core::status::{EnclaveState, Status};
use enclaved_integration::binaries;
use enclaved_integration::eif::{self, damage};
use enclaved_integration::signing::{Signer, Validity};
use serde_json::json;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// What a command came to.
#[derive(Debug)]
struct Done {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs `enclavectl`; it is killed if the test ends before it does.
async fn enclavectl<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Done {
    let mut command = tokio::process::Command::new(binaries::find("enclavectl").unwrap());
    let output = command.args(args).kill_on_drop(true).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn status(states: &[(&str, EnclaveState)]) -> Status {
    let enclaves: Vec<_> = states
        .iter()
        .map(|(name, state)| {
            json!({
                "name": name, "generation": 1, "state": state, "ready": *state == EnclaveState::Ready, "wanted": true,
                "cpus": 2, "memory_mib": 64, "debug": false, "health": { "state": "none" }, "restarts": 0,
            })
        })
        .collect();
    serde_json::from_value(json!({
        "at": "2026-01-01T00:00:00.000Z",
        "ready": states.iter().all(|(_, state)| *state == EnclaveState::Ready),
        "host": {
            "boot_id": "b", "version": "0", "pid": 1, "started_at": "2026-01-01T00:00:00.000Z", "config_revision": "r",
        },
        "proxy": { "running": true, "pid": 2, "current": true, "listeners_open": 0, "listeners_failed": 0 },
        "problems": [],
        "enclaves": enclaves,
        "steps": ["launch signer-2"],
    }))
    .unwrap()
}

/// The admin API over a folder of its own, on a thread of its own; what it is told is written down.
struct Daemon {
    dir: TempDir,
    reports: watch::Sender<Option<Arc<Report>>>,
    told: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(status: Status) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s");
        let (reports, seen) = watch::channel(None);
        let told = Arc::new(Mutex::new(Vec::new()));
        let stop = CancellationToken::new();
        let (opened, open) = std::sync::mpsc::channel();
        let (heard, stopped) = (Arc::clone(&told), stop.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (commands, to_loop) = mpsc::channel(1);
                let (reloads, to_reader) = mpsc::channel(1);
                let source = Source { reports: seen, commands, reloads, metrics: Metrics::new().unwrap() };
                let socket = admin::open(&path).unwrap();
                opened.send(()).unwrap();
                tokio::join!(admin::serve_socket(socket, source, stopped), answer(to_loop, to_reader, &heard));
            });
        });
        open.recv().unwrap();
        let daemon = Self { dir, reports, told, stop, thread: Some(thread) };
        daemon.show(status);
        daemon
    }

    fn show(&self, status: Status) {
        let made = tokio::time::Instant::now();
        self.reports.send_replace(Some(Arc::new(Report { status, proxy: None, unseen: None, made })));
    }

    async fn ctl(&self, args: &[&str]) -> Done {
        let socket = self.dir.path().join("s");
        enclavectl([OsStr::new("--socket"), socket.as_os_str()].into_iter().chain(args.iter().map(OsStr::new))).await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.cancel();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the admin API panicked");
    }
}

/// Answers for the loop and for the reader of configurations, until the admin API is gone.
async fn answer(
    mut to_loop: mpsc::Receiver<Command>,
    mut to_reader: mpsc::Receiver<Reload>,
    told: &Mutex<Vec<String>>,
) {
    loop {
        tokio::select! {
            // Receiving from a channel is cancel-safe, both times.
            Some(command) = to_loop.recv() => match command {
                Command::Hold(name, reply) => {
                    told.lock().unwrap().push(format!("hold {name}"));
                    reply.send(Ok(())).unwrap();
                }
                Command::Release(name, reply) => {
                    told.lock().unwrap().push(format!("release {name}"));
                    reply.send(Ok(())).unwrap();
                }
                other => told.lock().unwrap().push(format!("{other:?}")),
            },
            Some(reply) = to_reader.recv() => reply.send(Err("t.toml:1:1: unknown key \"x\"".to_owned())).unwrap(),
            else => return,
        }
    }
}

fn file(dir: &TempDir, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, contents).unwrap();
    path
}

#[tokio::test]
async fn status_shows_the_enclaves_as_a_table_and_as_json() {
    let daemon = Daemon::start(status(&[("signer", EnclaveState::Ready), ("ledger", EnclaveState::Booting)]));
    let table = daemon.ctl(&["status"]).await;
    assert_eq!(table.code, Some(0), "{table:?}");
    assert!(table.out.contains("\nsigner    1  ready"), "{table:?}");
    let json = daemon.ctl(&["status", "--json"]).await;
    let json: Status = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json.enclaves.len(), 2);
    let one = daemon.ctl(&["status", "ledger", "--json"]).await;
    let one: Status = serde_json::from_str(&one.out).unwrap();
    assert_eq!(one.enclaves.len(), 1);
    let unknown = daemon.ctl(&["status", "singer"]).await;
    assert_eq!(unknown.code, Some(64));
    assert_eq!(unknown.err, "enclavectl: there is no enclave \"singer\"; there are: signer, ledger\n");
}

#[tokio::test]
async fn wait_shows_each_change_and_returns_when_the_last_enclave_is_ready() {
    let daemon = Daemon::start(status(&[("signer", EnclaveState::Launching)]));
    let mut command = tokio::process::Command::new(binaries::find("enclavectl").unwrap());
    command.arg("--socket").arg(daemon.dir.path().join("s")).args(["wait", "--timeout", "60s", "--progress"]);
    let mut waiting = command.stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(waiting.stderr.take().unwrap()).lines();
    for (shown, next) in [("launching", EnclaveState::Booting), ("booting", EnclaveState::Ready)] {
        assert_eq!(lines.next_line().await.unwrap().unwrap(), format!("signer: {shown}"));
        daemon.show(status(&[("signer", next)]));
    }
    assert_eq!(waiting.wait().await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn wait_says_at_its_timeout_what_is_not_ready() {
    let daemon = Daemon::start(status(&[("signer", EnclaveState::Booting)]));
    let done = daemon.ctl(&["wait", "--timeout", "0s"]).await;
    assert_eq!(done.code, Some(75), "{done:?}");
    assert_eq!(done.err, "enclavectl: not ready after 0s\n  signer: booting\n");
}

#[tokio::test]
async fn stop_and_start_reach_the_loop_and_only_for_enclaves_that_there_are() {
    let daemon = Daemon::start(status(&[("signer", EnclaveState::Ready)]));
    assert_eq!(daemon.ctl(&["stop", "signer"]).await.code, Some(0));
    assert_eq!(daemon.ctl(&["start", "signer"]).await.code, Some(0));
    assert_eq!(daemon.ctl(&["stop", "other"]).await.code, Some(64));
    assert_eq!(*daemon.told.lock().unwrap(), ["hold signer", "release signer"]);
}

#[tokio::test]
async fn a_refused_reload_prints_the_reason_and_exits_with_78() {
    let daemon = Daemon::start(status(&[]));
    let done = daemon.ctl(&["reload"]).await;
    assert_eq!(done.code, Some(78));
    assert_eq!(done.err, "enclavectl: refused\nt.toml:1:1: unknown key \"x\"\n");
}

#[tokio::test]
async fn the_plan_is_printed_in_steps() {
    let daemon = Daemon::start(status(&[]));
    assert_eq!(daemon.ctl(&["plan"]).await.out, "1. launch signer-2\n");
}

#[tokio::test]
async fn a_daemon_that_does_not_run_is_said_so_with_the_remedy() {
    let dir = TempDir::new().unwrap();
    let config =
        file(&dir, "c.toml", format!("[host]\nsupervisor = \"direct\"\nrun_dir = \"{}\"", dir.path().display()));
    let done = enclavectl([OsStr::new("status"), OsStr::new("--config"), config.as_os_str()]).await;
    assert_eq!(done.code, Some(75));
    assert!(done.err.contains(&format!("nothing answers on {}/admin.sock", dir.path().display())), "{done:?}");
    assert!(done.err.contains("systemctl start enclaved"), "{done:?}");
}

#[tokio::test]
async fn check_accepts_a_good_file_with_its_warnings_and_refuses_a_bad_one_with_its_errors() {
    let dir = TempDir::new().unwrap();
    let enclave = "[[enclave]]\nname = \"signer\"\nimage = \"file:///x\"\ncpus = 2\nmemory_mib = 64\n";
    let good = enclavectl([OsStr::new("check"), file(&dir, "good.toml", enclave).as_os_str()]).await;
    assert_eq!(good.code, Some(0), "{good:?}");
    assert!(good.out.contains("good.toml: ok: 1 enclave in 1 file"), "{good:?}");
    assert!(good.err.contains("no measurement is pinned"), "{good:?}");
    let bad =
        enclavectl([OsStr::new("check"), file(&dir, "bad.toml", enclave.replace("cpus", "cpu")).as_os_str()]).await;
    assert_eq!(bad.code, Some(78));
    assert!(
        bad.err.contains("bad.toml:4:1: [[enclave]] \"signer\": unknown key \"cpu\"; did you mean \"cpus\"?"),
        "{bad:?}"
    );
}

#[tokio::test]
async fn check_and_hosts_speak_json_too() {
    let dir = TempDir::new().unwrap();
    let enclave = "[[enclave]]\nname = \"signer\"\nimage = \"file:///x\"\ncpus = 2\nmemory_mib = 64\n";
    let egress = "[[enclave.egress]]\nhostname = \"a.example\"\nvsock_port = 8000\n";
    let good = file(&dir, "good.toml", format!("{enclave}{egress}"));
    let json = async |args: &[&OsStr]| {
        let done = enclavectl(args.iter().chain([&OsStr::new("--json")])).await;
        (done.code, serde_json::from_str::<serde_json::Value>(&done.out).unwrap())
    };
    let (code, checked) = json(&[OsStr::new("check"), good.as_os_str()]).await;
    assert_eq!((code, &checked["ok"], &checked["enclaves"][0]), (Some(0), &json!(true), &json!("signer")));
    let config = [OsStr::new("--config"), good.as_os_str(), OsStr::new("hosts"), OsStr::new("signer")];
    let (code, endpoints) = json(&config).await;
    assert_eq!((code, &endpoints[0]["vsock_port"]), (Some(0), &json!(8000)));
    let bad = file(&dir, "bad.toml", "[host]\nx = 1");
    let (code, checked) = json(&[OsStr::new("check"), bad.as_os_str()]).await;
    assert_eq!((code, &checked["ok"], &checked["errors"][0]["line"]), (Some(78), &json!(false), &json!(2)));
}

#[tokio::test]
async fn what_measure_prints_is_a_configuration_that_pins_the_image() {
    let dir = TempDir::new().unwrap();
    let image = eif::sample("signer", 1, 100_000).with_metadata(eif::metadata("signer", "1.2")).to_bytes();
    let path = file(&dir, "x.eif", &image);
    let text = enclavectl([OsStr::new("measure"), path.as_os_str()]).await;
    assert_eq!(text.code, Some(0), "{text:?}");
    let json = enclavectl([OsStr::new("measure"), path.as_os_str(), OsStr::new("--json")]).await;
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["size"], image.len());
    let enclave = "[[enclave]]\nname = \"signer\"\nimage = \"file:///x\"\ncpus = 2\nmemory_mib = 64\n";
    let config = enclaved::config::SourceFile { path: "t".into(), text: format!("{enclave}{}", text.out) };
    let config = enclaved::config::parse(&[config]).unwrap();
    assert_eq!(config.warnings, Vec::<String>::new());
    let expected = &config.desired.enclaves.values().next().unwrap().image.expected;
    let expected = expected.any_of().next().unwrap();
    assert_eq!(json["measurements"]["pcr0"], expected.pcr0.unwrap().to_string());
    assert_eq!(json["digest"], expected.sha256.unwrap().to_string());
    assert!(text.out.contains(&format!("OS_IMAGE_HASH {}", json["os_image_hash"].as_str().unwrap())), "{text:?}");
    assert!(text.out.contains("name signer, version 1.2"), "{text:?}");
    assert!(text.out.contains("\n# sections: kernel 256 bytes, command line 60 bytes, metadata section "), "{text:?}");
}

#[tokio::test]
async fn a_damaged_image_is_refused() {
    let dir = TempDir::new().unwrap();
    let image = eif::sample("signer", 1, 10_000).to_bytes();
    for damaged in [damage::bad_crc(image.clone()), damage::truncated(image.clone(), 1), damage::flipped(image)] {
        let done = enclavectl([OsStr::new("measure"), file(&dir, "x.eif", damaged).as_os_str()]).await;
        assert_eq!(done.code, Some(78), "{done:?}");
        assert!(done.err.contains("x.eif: ") && done.out.is_empty(), "{done:?}");
    }
}

#[tokio::test]
async fn a_damaged_image_is_told_to_programs_with_its_place() {
    let dir = TempDir::new().unwrap();
    let image = damage::two_faced(eif::sample("signer", 1, 10_000).to_bytes());
    let done = enclavectl([OsStr::new("measure"), file(&dir, "x.eif", image).as_os_str(), OsStr::new("--json")]).await;
    assert_eq!(done.code, Some(78), "{done:?}");
    let json: serde_json::Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(json["offset"], 36);
    assert!(json["error"].as_str().unwrap().starts_with("the header's offset of section 1 (at byte 36)"), "{json}");
}

#[tokio::test]
async fn a_signed_image_is_shown_with_its_signer_and_whether_its_certificate_is_still_valid() {
    let dir = TempDir::new().unwrap();
    for (validity, state, words) in [
        (Validity::Valid, "valid", "issued by CN=signer, valid until 2060-01-01T00:00:00.000Z\n"),
        (Validity::Expired, "expired", "ago, at 2021-01-01T00:00:00.000Z\n# WARNING: "),
    ] {
        let signer = Signer::new("signer", validity).unwrap();
        let image = signer.sign(eif::sample("signer", 1, 10_000)).unwrap().to_bytes();
        let path = file(&dir, "x.eif", image);
        let done = enclavectl([OsStr::new("measure"), path.as_os_str()]).await;
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(done.out.contains("# signed (ES384) by CN=signer, ") && done.out.contains(words), "{done:?}");
        assert!(done.out.contains("\npcr8 = \""), "{done:?}");
        let json = enclavectl([OsStr::new("measure"), path.as_os_str(), OsStr::new("--json")]).await;
        let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
        assert_eq!(
            (&json["signature"]["subject"], &json["signature"]["validity"]),
            (&json!("CN=signer"), &json!(state))
        );
    }
}

#[tokio::test]
async fn a_wrong_command_line_exits_with_64_and_help_with_0() {
    assert_eq!(enclavectl(["stutas"]).await.code, Some(64));
    assert_eq!(enclavectl(Vec::<&str>::new()).await.code, Some(64));
    let help = enclavectl(["--help"]).await;
    assert_eq!(help.code, Some(0));
    assert!(help.out.contains("Exit codes:"), "{help:?}");
    assert_eq!(enclavectl(["--version"]).await.code, Some(0));
}
