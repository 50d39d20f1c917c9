//! What the unit tests of several modules need: scripts, and a host whose nitro-cli is one.

#[path = "../../integration/src/eif.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    unfulfilled_lint_expectations,
    reason = "written for another crate, and not all of it is used here"
)]
pub(crate) mod eif;
pub(crate) mod http;

use crate::launch_trace::{FORMAT, LaunchSpec};
use crate::{pidfd::Pidfd, procfs};
use enclaved_core::id::{Cid, EifDigest, EnclaveKey, Measurements, MemoryMib, Pcr, Timestamp};
use enclaved_core::image::{ExpectedImage, Limits, Measurer, VerifiedImage, verify};
use enclaved_core::ledger::{GenerationRecord, Identity, Phase};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Writes a shell script that can be executed at once.
///
/// Another process writes it: a file that this one has open for writing may, for a moment, be open in a child that some
/// other test is just starting, and what is open for writing can't be executed.
pub(crate) fn write_script(path: &Path, body: &str) {
    let mut writer =
        Command::new("install").args(["-m", "700", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
    writer.stdin.take().unwrap().write_all(format!("#!/bin/sh\n{body}\n").as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success());
}

/// Waits for something that another task or process brings about.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "waited in vain until {what}");
        tokio::task::yield_now().await;
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A folder with a nitro-cli whose enclaves are sleeping processes; all that was started there ends with it.
pub(crate) struct Stand {
    folder: TempDir,
}

impl Stand {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes `nitro-cli`: shell for its two commands. `$d` is the folder; `enclave` starts one and prints its JSON;
    /// `describe` prints the list of the one whose JSON is in `$d/answer`; `fail` must not be reached.
    pub(crate) fn nitro_cli(&self, run_enclave: &str, describe_enclaves: &str) {
        let body = format!(
            r#"d={folder}
echo "$1" >> $d/calls
enclave() {{
    setsid sleep 600 </dev/null >/dev/null 2>&1 &
    echo $! >> $d/pids
    printf '{{"EnclaveName":"%s","EnclaveID":"i-0-enc%s","ProcessID":%s,"EnclaveCID":%s,"NumberOfCPUs":2,"CPUIDs":[1,3],"MemoryMiB":512,"State":"RUNNING","Flags":"NONE"}}\n' "$name" $! $! "$cid"
}}
describe() {{ echo '['; cat $d/answer; echo ']'; }}
fail() {{ echo "unexpected $command" >&2; exit 99; }}
command=$1
cid=${{9}}
name=${{11}}
case $command in
run-enclave) {run_enclave} ;;
describe-enclaves) {describe_enclaves} ;;
terminate-enclave) echo "$3" >> $d/terminated; [ ! -e $d/terminate ] || . $d/terminate ;;
*) fail ;;
esac"#,
            folder = self.path().display()
        );
        write_script(&self.path().join("nitro-cli"), &body);
    }

    pub(crate) async fn wait_for(&self, file: &str) {
        let path = self.path().join(file);
        until(&format!("{} is there", path.display()), || path.exists()).await;
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        // Whatever may still be starting enclaves finds its folder gone afterwards.
        let pids = std::fs::read_to_string(self.path().join("pids")).unwrap_or_default();
        for pid in pids.lines().filter_map(|line| line.parse().ok()) {
            // On its way to be a sleep it has other names.
            let ours = |name: &str| ["sleep", "setsid", "nitro-cli"].contains(&name);
            let process = procfs::process(pid).ok().flatten().filter(|process| ours(&process.name));
            if let Some(process) = process.and_then(|process| Pidfd::open(process.identity).ok().flatten()) {
                let _ignored = process.send(rustix::process::Signal::KILL);
            }
        }
    }
}

/// A generation with CID 16.
pub(crate) fn generation() -> GenerationRecord {
    let zero = Pcr([0; 48]);
    GenerationRecord {
        cid: Cid::FIRST,
        identity: Identity { image: EifDigest([7; 32]), cpus: 2, memory: MemoryMib(512), debug: false },
        measurements: Measurements { pcr0: zero, pcr1: zero, pcr2: zero, pcr8: None },
        egress: Vec::new(),
        phase: Phase::Launching { since: Timestamp::from_millis(1) },
    }
}

/// A launch on that stand, in this boot.
pub(crate) fn launch_spec(stand: &Stand, key: &str) -> LaunchSpec {
    LaunchSpec {
        format: FORMAT,
        boot_id: procfs::boot_id().unwrap(),
        at: std::time::SystemTime::now().into(),
        key: key.parse::<EnclaveKey>().unwrap(),
        generation: generation(),
        image: stand.path().join("image.eif"),
        patience_s: 240,
        nitro_cli: stand.path().join("nitro-cli"),
        host_lock: stand.path().join("launch.lock"),
        stop_notes: Some(stand.path().join("stopped")),
    }
}

/// A small image, proven to be what it is.
pub(crate) fn image() -> VerifiedImage {
    let mut measurer = Measurer::new(Limits::default());
    measurer.update(&eif::sample("signer", 1, 4096).to_bytes()).unwrap();
    verify(measurer.finish().unwrap(), &ExpectedImage::default()).unwrap()
}
