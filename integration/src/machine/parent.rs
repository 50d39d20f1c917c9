//! A Nitro parent host in a machine: enclaved installed as its package does it, with the units of this repository; and the
//! stand-ins for nitro-cli, the driver's sysfs and vsock.
//!
//! The daemon is installed and configured, not started.

use super::{DEADLINE, Machine, MachineOptions};
use crate::application::Application;
use crate::nitro_cli::faults::Hazard;
use crate::nitro_cli::{self, Call, Environment, Measured, SETTINGS_FILE};
use crate::nitro_host::{Shape, image};
use anyhow::{Context as _, ensure};
use enclaved_core::status::Status;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// nitro-cli and its settings.
const NITRO: &str = "/opt/nitro";
/// The tree from which sysfs is copied at each boot.
const SYSFS_AT_BOOT: &str = "/opt/nitro/sys";
/// What a boot begins anew with: sysfs, reservations, vsock sockets.
const STANDIN: &str = "/run/standin";
/// Where HTTPS is served, in the machine's network.
pub const HTTPS: &str = "127.0.0.1:443";
/// The vsock port on which the sample application serves HTTP.
pub const HTTP_PORT: u32 = 8080;
/// The vsock port on which the sample application sends back what it receives.
pub const ECHO_PORT: u32 = 7;

/// A sandbox that lets the stand-ins do what the hardware does. A machine's boot id is a file over that of this computer; a unit with
/// a /proc of its own would see the latter, which no reboot of a machine changes.
const DROP_IN: &str = "[Service]\nReadWritePaths=/run/standin\n\
     BindReadOnlyPaths=/run/machine-boot-id:/proc/sys/kernel/random/boot_id\n";
/// The sockets that stand for an enclave's vsock are for the proxy, too.
const FOR_PROXY: &str = "UMask=0007\n";
const TMPFILES: &str = "C /run/machine-boot-id - - - - /proc/sys/kernel/random/boot_id\n\
     d /run/standin 0755 root root\n\
     C /run/standin/sys - - - - /opt/nitro/sys\n\
     Z /run/standin/sys - enclaved ne\n\
     d /run/standin/state 0770 enclaved ne\n\
     d /run/standin/vsock 2770 enclaved enclaved-proxy\n";

/// The stock service that sets CPUs and memory aside, and what it runs.
const ALLOCATOR: &str = "[Unit]\nDescription=Nitro Enclaves Resource Allocator\n\n[Service]\nType=oneshot\n\
     ExecStart=/usr/bin/nitro-enclaves-allocator\nRemainAfterExit=yes\n\n[Install]\nWantedBy=multi-user.target\n";
const ALLOCATOR_SCRIPT: &str = include_str!("allocator.bash");

/// A parent host. It ends with this.
#[derive(Debug)]
pub struct Parent {
    machine: Machine,
}

impl Deref for Parent {
    type Target = Machine;
    fn deref(&self) -> &Machine {
        &self.machine
    }
}

/// Boots a parent host that leaves 6 of its 8 CPUs and 2 GiB to enclaves.
///
/// # Errors
/// As [`Machine::boot`]; or enclaved can't be installed.
pub fn parent_host() -> anyhow::Result<Parent> {
    Parent::boot(&Shape::small(), MachineOptions::default())
}

impl Parent {
    /// Boots a parent host of that shape, with these files besides its own.
    ///
    /// # Errors
    /// As [`parent_host`].
    pub fn boot(shape: &Shape, options: MachineOptions) -> anyhow::Result<Self> {
        let parent = Self { machine: Machine::boot(&standin(installed(options)?, shape))? };
        // What a package does when it has been unpacked.
        parent.run_ok(&["systemd-sysusers"])?;
        parent.run_ok(&["systemd-tmpfiles", "--create"])?;
        parent.run_ok(&["systemctl", "daemon-reload"])?;
        Ok(parent)
    }

    /// The configuration of the host itself, without enclaves.
    pub fn host_config(&self) -> String {
        format!(
            "[host]\nreserve_cpus = 2\nreserve_memory_mib = 64\nallocator = \"verify\"\nsupervisor = \"systemd\"\ndrain = \"2s\"\n\
             sysfs = \"{STANDIN}/sys\"\n\n[nitro]\ncli = \"{NITRO}/nitro-cli\"\n\n\
             [vsock]\ntransport = {{ hybrid = \"{STANDIN}/vsock\" }}\n\n[ingress]\nlisten = \"{HTTPS}\"\n\n"
        )
    }

    /// The configuration of an enclave that runs the sample application from that image.
    pub fn sample_enclave(&self, name: &str, image: &str) -> String {
        format!(
            "[[enclave]]\nname = \"{name}\"\nimage = \"file://{image}\"\ncpus = 2\nmemory_mib = 64\n\
             health = {{ http = {{ port = {HTTP_PORT}, path = \"/health\" }}, start_period = \"20s\", interval = \"200ms\" }}\n\
             ingress = {{ domains = [\"{name}.test\"], http_port = {HTTP_PORT} }}\n\n"
        )
    }

    /// The same, with its echo service on a TCP port of the machine.
    pub fn echoing_enclave(&self, name: &str, image: &str, listen: SocketAddr) -> String {
        let port = format!("ports = [{{ listen = \"{listen}\", vsock_port = {ECHO_PORT} }}]");
        self.sample_enclave(name, image).replace("ingress = { ", &format!("ingress = {{ {port}, "))
    }

    /// The sample application: it serves HTTP and echoes.
    pub fn sample_application(&self, label: &str) -> Application {
        Application { echo_ports: vec![ECHO_PORT], ..Application::http(label, HTTP_PORT) }
    }

    /// Replaces the configuration with the host's own and these enclaves.
    ///
    /// # Errors
    /// It can't be written.
    pub fn configure(&self, enclaves: &str) -> anyhow::Result<()> {
        self.write("/etc/enclaved/enclaved.toml", self.host_config() + enclaves)
    }

    /// Makes an image of an application, as a file of the machine.
    ///
    /// # Errors
    /// It can't be written.
    pub fn put_image(&self, path: &str, application: &Application) -> anyhow::Result<Measured> {
        let bytes = image(application);
        let copy = tempfile::NamedTempFile::new()?;
        fs::write(copy.path(), &bytes)?;
        self.write(path, bytes)?;
        Ok(nitro_cli::measure(copy.path())?)
    }

    /// The status, if the daemon tells one.
    ///
    /// # Errors
    /// It tells something else.
    pub fn status(&self) -> anyhow::Result<Option<Status>> {
        let said = self.run(&["enclavectl", "status", "--json"])?;
        if said.stdout.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(&said.stdout).map(Some).with_context(|| format!("{said:?}"))
    }

    /// Waits for a status like that.
    ///
    /// # Errors
    /// There is none in time; the error shows the last.
    pub fn until(&self, what: &str, like: impl Fn(&Status) -> bool) -> anyhow::Result<Status> {
        let mut last = None;
        let found = self.wait_until(what, DEADLINE, || {
            last = self.status()?;
            Ok(last.clone().filter(&like))
        });
        found.with_context(|| format!("last status: {last:#?}"))
    }

    /// From now on these happen to whoever runs nitro-cli.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn switch_on(&self, hazards: &[Hazard]) -> anyhow::Result<()> {
        self.write(&format!("{STANDIN}/state/faults.json"), serde_json::to_vec(hazards)?)
    }

    /// The nitro-cli commands run since the machine was booted.
    ///
    /// # Errors
    /// The record can't be read.
    pub fn calls(&self) -> anyhow::Result<Vec<Call>> {
        let said = self.run(&["cat", &format!("{STANDIN}/state/calls.jsonl")])?;
        said.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}

/// The programs, and all files of `units/`, where a package puts them.
fn installed(mut options: MachineOptions) -> anyhow::Result<MachineOptions> {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../units");
    for (from, to, kind) in [
        ("", "/usr/lib/systemd/system", "service"),
        ("sysusers.d", "/usr/lib/sysusers.d", "conf"),
        ("tmpfiles.d", "/usr/lib/tmpfiles.d", "conf"),
        ("polkit-1/rules.d", "/usr/share/polkit-1/rules.d", "rules"),
    ] {
        let files = files_of(&units.join(from), kind)?;
        ensure!(!files.is_empty(), "no *.{kind} in {}", units.join(from).display());
        for (name, text) in files {
            options = options.file(format!("{to}/{name}"), 0o644, text);
        }
    }
    Ok(options.program("enclaved", "/usr/bin/enclaved").program("enclavectl", "/usr/bin/enclavectl"))
}

fn files_of(folder: &Path, kind: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == kind) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.push((name, fs::read_to_string(&path)?));
        }
    }
    Ok(files)
}

/// nitro-cli and what it works with.
fn standin(options: MachineOptions, shape: &Shape) -> MachineOptions {
    let at = |name: &str| PathBuf::from(STANDIN).join(name);
    let environment = Environment {
        sysfs: at("sys"),
        sockets: "/run/nitro_enclaves".into(),
        logs: "/var/log/nitro_enclaves".into(),
        vsock: Some(at("vsock")),
        state: Some(at("state")),
        faults: Some(at("state/faults.json")),
        enclave_binary: None,
    };
    let mut settings = String::new();
    for (name, value) in environment.variables() {
        // Writing to a String can't fail.
        let _ignored = writeln!(settings, "{name}={}", value.display());
    }
    let mut options = options
        .program("nitro-cli", format!("{NITRO}/nitro-cli"))
        .program("standin-enclave", format!("{NITRO}/standin-enclave"))
        .file(format!("{NITRO}/{SETTINGS_FILE}"), 0o644, settings)
        .file("/usr/lib/tmpfiles.d/standin.conf", 0o644, TMPFILES)
        .file("/usr/lib/systemd/system/nitro-enclaves-allocator.service", 0o644, ALLOCATOR)
        .file("/usr/bin/nitro-enclaves-allocator", 0o755, ALLOCATOR_SCRIPT)
        .folder("/etc/nitro_enclaves")
        .file("/etc/systemd/system/enclave@.service.d/standin.conf", 0o644, DROP_IN.to_owned() + FOR_PROXY);
    let for_proxy = "[Service]\nReadWritePaths=/run/standin\n";
    options = options.file("/etc/systemd/system/enclaved-proxy.service.d/standin.conf", 0o644, for_proxy);
    for unit in ["enclaved.service", "enclaved-allocator.service"] {
        options = options.file(format!("/etc/systemd/system/{unit}.d/standin.conf"), 0o644, DROP_IN);
    }
    for folder in shape.sysfs_folders() {
        options = options.folder(format!("{SYSFS_AT_BOOT}/{folder}"));
    }
    for (path, text) in shape.sysfs_files() {
        options = options.file(format!("{SYSFS_AT_BOOT}/{path}"), 0o644, text);
    }
    options
}
