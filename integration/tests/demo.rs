//! The demo as a person runs it: what it shows, what it says when something fails, and that it leaves nothing behind
//! however it ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use enclaved_integration::binaries;
use enclaved_integration::processes::{carrying, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Nothing here takes longer, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(120);

const STAGES: [&str; 13] = [
    "host",
    "image",
    "started",
    "credentials",
    "downloaded",
    "verified",
    "egress",
    "launched",
    "ready",
    "request",
    "access log",
    "control plane",
    "metrics",
];
const CHAOS: [&str; 6] =
    ["enclave killed", "control killed", "proxy killed", "image refused", "config refused", "control ended"];

/// A demo at work. A test that fails kills it, and what it started ends with it.
struct Demo {
    child: Child,
    stdout: Receiver<String>,
    /// All that it has said so far.
    said: String,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        Self::run(&[&["--no-build"], arguments].concat())
    }

    fn run(arguments: &[&str]) -> Self {
        let mut command = Command::new(binaries::find("demo").unwrap());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        let (sender, stdout) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        Self { child, stdout, said: String::new() }
    }

    /// Reads until a line has that in it.
    fn until(&mut self, text: &str) -> String {
        let began = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(began.elapsed());
            let line = self.stdout.recv_timeout(left).unwrap_or_else(|_| panic!("no {text:?} in:\n{}", self.said));
            self.said.push_str(&line);
            self.said.push('\n');
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Where its machine is; the machine is there.
    fn folder(&mut self) -> PathBuf {
        let line = self.until("simulated in /tmp/encl-");
        let folder = line.split_once("simulated in ").unwrap().1.split_once(':').unwrap().0;
        assert!(Path::new(folder).is_dir(), "{folder}");
        folder.into()
    }

    fn signal(&self, which: Signal) {
        signal(self.child.id(), which).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            self.said.extend(self.stdout.try_iter().map(|line| line + "\n"));
            if let Some(status) = self.child.try_wait().unwrap() {
                // What it said is complete when its output is closed.
                self.said.extend(self.stdout.iter().map(|line| line + "\n"));
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "it does not end:\n{}", self.said);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // It has ended, unless the test has failed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[track_caller]
fn assert_nothing_left(folder: &Path) {
    assert_eq!(carrying(folder), [] as [i32; 0]);
    assert!(!folder.exists(), "{} is left behind", folder.display());
}

/// The summary, and where everything was.
fn summary(demo: &Demo) -> (Value, PathBuf) {
    let summary: Value = serde_json::from_str(&demo.said).unwrap_or_else(|error| panic!("{error}:\n{}", demo.said));
    let folder = summary["folder"].as_str().unwrap_or_else(|| panic!("{summary:#}"));
    assert!(folder.starts_with("/tmp/encl-"), "{folder}");
    let folder = folder.into();
    (summary, folder)
}

#[test]
fn once_it_tells_the_life_of_an_enclave_with_the_time_of_each_stage() {
    let mut demo = Demo::start(&["--once"]);
    let folder = demo.folder();
    assert_eq!(demo.end().code(), Some(0), "{}", demo.said);
    assert_nothing_left(&folder);
    let (_, table) = demo.said.split_once("\nSTAGE ").unwrap_or_else(|| panic!("no summary in:\n{}", demo.said));
    for stage in STAGES.into_iter().chain(["status", "total"]) {
        let line = table.lines().find(|line| line.starts_with(stage)).unwrap_or_else(|| panic!("no {stage}:\n{table}"));
        let seconds = line.strip_suffix(" s").and_then(|line| line.rsplit(' ').next()).unwrap();
        assert!(seconds.parse::<f64>().unwrap() < PATIENCE.as_secs_f64(), "{line}");
    }
    // The table of `enclavectl status`.
    let row = demo.said.lines().find(|line| line.starts_with("signer ")).unwrap();
    assert!(row.contains(" ready ") && row.contains(" healthy "), "{row}");
}

#[test]
fn with_chaos_every_part_is_killed_and_comes_back_and_the_summary_is_json() {
    let mut demo = Demo::start(&["--once", "--chaos", "--json"]);
    assert_eq!(demo.end().code(), Some(0), "{}", demo.said);
    let (summary, folder) = summary(&demo);
    assert_nothing_left(&folder);
    assert_eq!((&summary["ok"], &summary["failure"]), (&Value::Bool(true), &Value::Null));
    let names: Vec<_> =
        summary["stages"].as_array().unwrap().iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    let expected: Vec<_> = STAGES.into_iter().chain(["status"]).chain(CHAOS).collect();
    assert_eq!(names, expected);
    let seconds = |value: &Value| value["seconds"].as_f64().unwrap();
    let sum: f64 = summary["stages"].as_array().unwrap().iter().map(seconds).sum();
    assert!(sum <= seconds(&summary) + 0.1, "{sum} s of {}", seconds(&summary));
}

/// Something goes wrong: the demo fails, says why, and leaves nothing behind.
#[track_caller]
fn fails(what: &str, after: &str, reasons: &[&str]) {
    let mut demo = Demo::start(&["--once", "--json", "--provoke", what]);
    assert_eq!(demo.end().code(), Some(1), "{}", demo.said);
    let (summary, folder) = summary(&demo);
    assert_nothing_left(&folder);
    assert_eq!(summary["ok"], Value::Bool(false));
    assert_eq!(summary["stages"].as_array().unwrap().last().unwrap()["name"], after);
    let failure = summary["failure"].as_str().unwrap();
    for reason in reasons {
        assert!(failure.contains(reason), "{failure}");
    }
    let log = summary["log"].as_array().unwrap();
    assert!(log.iter().any(|line| line.as_str().unwrap().contains("configuration is in force")), "{log:?}");
}

#[test]
fn a_role_that_may_not_read_the_image_is_the_reason_of_the_failure() {
    fails("s3-forbidden", "started", &["signer is image-failed", "s3://", "AccessDenied"]);
}

#[test]
fn an_image_that_is_not_the_measured_one_is_the_reason_of_the_failure() {
    fails("forged-image", "credentials", &["signer is image-failed", "PCR0"]);
}

#[test]
fn an_upstream_that_answers_nobody_is_the_reason_of_the_failure() {
    fails("upstream-down", "ready", &["502"]);
}

#[test]
fn it_stays_up_through_the_death_of_the_control_process_until_ctrl_c() {
    let mut demo = Demo::start(&[]);
    let folder = demo.folder();
    let curl = demo.until("curl --cacert ");
    assert!(curl.contains(&format!("{}/proxy/ca/root.crt https://localhost:", folder.display())), "{curl}");
    let kill = demo.until("# the control process");
    let pid: u32 = kill.split_whitespace().nth(2).unwrap().parse().unwrap();
    signal(pid, Signal::KILL).unwrap();
    demo.until("the control process ended (signal: 9");
    demo.until("another control process answers");
    demo.signal(Signal::INT);
    assert_eq!(demo.end().code(), Some(0), "{}", demo.said);
    assert_nothing_left(&folder);
}

#[test]
fn interrupted_in_the_middle_it_leaves_nothing_behind() {
    let mut demo = Demo::start(&["--once"]);
    let folder = demo.folder();
    demo.until("started");
    demo.signal(Signal::TERM);
    assert_eq!(demo.end().code(), Some(130), "{}", demo.said);
    assert_nothing_left(&folder);
}

#[test]
fn killed_it_leaves_nothing_behind() {
    let mut demo = Demo::start(&[]);
    let folder = demo.folder();
    demo.until("launched");
    demo.signal(Signal::KILL);
    demo.end();
    let began = Instant::now();
    while folder.exists() || !carrying(&folder).is_empty() {
        assert!(began.elapsed() < PATIENCE, "{} and {:?} are left behind", folder.display(), carrying(&folder));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_wrong_command_line_is_a_usage_error_and_help_is_none() {
    assert_eq!(Demo::start(&["--twice"]).end().code(), Some(64));
    // As `cargo demo -- --help` has it.
    let mut demo = Demo::run(&["--", "--help"]);
    assert_eq!(demo.end().code(), Some(0));
    assert!(demo.said.contains("--once") && demo.said.contains("Examples:") && !demo.said.contains("--provoke"));
}
