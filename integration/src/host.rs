//! A whole simulated machine: the Nitro host, AWS's services, the control plane and the world outside, with the files
//! and the environment that the daemon gets there.
//!
//! The daemon is started as a program, with nothing in its environment but what the machine gives it. Each machine has a
//! loopback address of its own, so that machines that run at the same time can have the same ports.

use crate::application::{Application, Egress};
use crate::binaries;
use crate::control_plane::ControlPlane;
use crate::imds::{Imds, Instance, unique};
use crate::nitro_cli::{Measured, measure};
use crate::nitro_host::{NitroHost, Shape, image};
use crate::s3::S3;
use crate::upstream::Upstream;
use rustix::process::Signal;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The vsock port on which the sample application calls out.
pub const EGRESS_PORT: u32 = 8000;
/// The vsock port on which the sample application serves HTTP.
pub const HTTP_PORT: u32 = 8080;
/// The vsock port on which the sample application sends back what it receives.
pub const ECHO_PORT: u32 = 7;

const INGRESS_PORT: u16 = 8443;
const METRICS_PORT: u16 = 9119;
/// How often something is looked at that can't be waited for.
const POLL: Duration = Duration::from_millis(5);

/// What kind of machine.
#[derive(Debug, Clone)]
pub struct Options {
    /// What is set aside for enclaves.
    pub shape: Shape,
    /// What the metadata service says of it.
    pub instance: Instance,
    /// Where the daemon is to serve; none: a loopback address of its own.
    pub address: Option<Ipv4Addr>,
}

impl Default for Options {
    fn default() -> Self {
        Self { shape: Shape::small(), instance: Instance::sample(), address: None }
    }
}

/// The simulated machine. When it is dropped, every process on it is ended and every file of it is removed.
#[derive(Debug)]
pub struct Machine {
    /// The host's Nitro side; it owns the folder in which everything is.
    pub nitro: NitroHost,
    /// The metadata service.
    pub imds: Imds,
    /// The S3 server.
    pub s3: S3,
    /// The control plane.
    pub control_plane: ControlPlane,
    /// The server that enclaves reach through egress.
    pub upstream: Upstream,
    ingress: SocketAddr,
    metrics: SocketAddr,
    bucket: String,
    children: Mutex<Vec<Child>>,
}

impl Machine {
    /// Sets the machine up and starts all of its servers, but not the daemon.
    ///
    /// # Errors
    /// When programs have not been built, folders can't be written or ports not be bound.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let nitro = NitroHost::new(&options.shape)?;
        for name in ["etc/conf.d", "var", "proxy", "run", "s3", "home"] {
            fs::create_dir_all(nitro.path().join(name))?;
        }
        let bucket = match options.instance.tags.get("caution:deployment-id") {
            Some(id) => format!("caution-{id}-images"),
            None => "images".to_owned(),
        };
        let imds = Imds::start(options.instance).await?;
        let s3 = S3::start(&nitro.path().join("s3"), imds.credentials()).await?;
        let (ingress, metrics) = addresses(options.address)?;
        Ok(Self {
            imds,
            s3,
            control_plane: ControlPlane::start().await?,
            upstream: Upstream::start("hello from upstream\n").await?,
            ingress,
            metrics,
            bucket,
            children: Mutex::default(),
            nitro,
        })
    }

    /// The folder in which everything is.
    pub fn path(&self) -> &Path {
        self.nitro.path()
    }

    /// The configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.path().join("etc/enclaved.toml")
    }

    /// The daemon's state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.path().join("var")
    }

    /// The proxy's state folder.
    pub fn proxy_state_dir(&self) -> PathBuf {
        self.path().join("proxy")
    }

    /// Where requests are logged.
    pub fn access_log(&self) -> PathBuf {
        self.path().join("access.log")
    }

    /// The folder of sockets and records.
    pub fn run_dir(&self) -> PathBuf {
        self.path().join("run")
    }

    /// What the daemon and its children have written to their standard outputs.
    pub fn log_file(&self) -> PathBuf {
        self.path().join("daemon.log")
    }

    /// Where HTTPS is served.
    pub fn ingress(&self) -> SocketAddr {
        self.ingress
    }

    /// Where metrics are served.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// An address on which the daemon may serve a raw TCP port.
    pub fn tcp(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ingress.ip(), port)
    }

    /// The bucket of this deployment's images.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Makes an image of an application and puts it into the bucket.
    ///
    /// # Errors
    /// When the S3 server refuses it.
    pub async fn put_image(&self, key: &str, application: &Application) -> anyhow::Result<Measured> {
        let bytes = image(application);
        let copy = tempfile::NamedTempFile::new_in(self.path())?;
        fs::write(copy.path(), &bytes)?;
        self.s3.put(&self.bucket, key, bytes).await?;
        Ok(measure(copy.path())?)
    }

    /// The application that calls the upstream, serves HTTP and echoes.
    pub fn sample_application(&self, label: &str) -> Application {
        Application {
            echo_ports: vec![ECHO_PORT],
            egress: vec![Egress { vsock_port: EGRESS_PORT, host: "upstream.test".to_owned() }],
            ..Application::http(label, HTTP_PORT)
        }
    }

    /// The configuration of the host itself, without enclaves.
    pub fn host_config(&self) -> String {
        format!(
            "[host]\nreserve_cpus = 2\nreserve_memory_mib = 64\nallocator = \"verify\"\nsupervisor = \"direct\"\n\
             drain = \"2s\"\nstate_dir = {:?}\nrun_dir = {:?}\nproxy_state_dir = {:?}\nsysfs = {:?}\n\n\
             [nitro]\ncli = {:?}\n\n[vsock]\ntransport = {{ hybrid = {:?} }}\n\n[ingress]\nlisten = \"{}\"\naccess_log = {:?}\n\n\
             [metrics]\nlisten = \"{}\"\n\n[control_plane]\nurl = \"{}\"\ninterval = \"1s\"\n\n",
            self.state_dir(),
            self.run_dir(),
            self.proxy_state_dir(),
            self.nitro.sysfs(),
            self.nitro.nitro_cli(),
            self.nitro.vsock(),
            self.ingress,
            self.access_log(),
            self.metrics,
            self.control_plane.url(),
        )
    }

    /// The configuration of an enclave that runs the sample application from the bucket.
    pub fn sample_enclave(&self, name: &str, key: &str) -> String {
        let upstream = self.upstream.address();
        format!(
            "[[enclave]]\nname = \"{name}\"\nimage = \"s3://{}/{key}\"\ncpus = 2\nmemory_mib = 64\n\
             health = {{ http = {{ port = {HTTP_PORT}, path = \"/health\" }}, start_period = \"20s\", interval = \"200ms\" }}\n\
             egress = [{{ hostname = \"{}\", port = {}, vsock_port = {EGRESS_PORT}, allow_addresses = [\"{}\"] }}]\n\
             ingress = {{ domains = [\"localhost\"], http_port = {HTTP_PORT} }}\n\n",
            self.bucket,
            upstream.ip(),
            upstream.port(),
            upstream.ip(),
        )
    }

    /// Replaces the configuration file, in one step.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write_config(&self, text: &str) -> io::Result<()> {
        let fresh = self.path().join("etc/enclaved.toml.new");
        fs::write(&fresh, text)?;
        fs::rename(fresh, self.config_file())
    }

    /// The environment of the daemon and of all that is run here.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let folder = |name: &str| self.path().join(name).display().to_string();
        vec![
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
            // Every descendant carries the machine's path in its environment by this, and is ended with it.
            ("HOME", folder("home")),
            ("TMPDIR", folder("home")),
            ("RUST_BACKTRACE", "1".to_owned()),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", self.imds.endpoint()),
            ("AWS_ENDPOINT_URL_S3", self.s3.endpoint()),
        ]
    }

    /// A program of this workspace, on this machine.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn command(&self, program: &str) -> io::Result<Command> {
        Ok(self.command_at(&binaries::find(program)?))
    }

    /// Any program, on this machine.
    pub fn command_at(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().envs(self.variables()).current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// Starts a program that is to run on its own: its output goes to the log file, it has a process group of its own.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_program(&self, mut command: Command) -> io::Result<u32> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_file())?;
        let child = command.stdout(log.try_clone()?).stderr(log).process_group(0).spawn()?;
        let pid = child.id();
        self.children.lock().unwrap_or_else(PoisonError::into_inner).push(child);
        Ok(pid)
    }

    /// Starts the daemon with the machine's configuration file; gives its process.
    ///
    /// # Errors
    /// When it has not been built or can't be started.
    pub fn start_daemon(&self) -> io::Result<u32> {
        let mut command = self.command("enclaved")?;
        command.arg("--config").arg(self.config_file());
        self.start_program(command)
    }

    /// Sends a signal to a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, pid: u32, signal: Signal) -> io::Result<()> {
        crate::processes::signal(pid, signal)
    }

    /// Waits until a program started here ends; none if it has not in that time.
    ///
    /// # Errors
    /// When it was not started by [`Self::start_program`], or was waited for before.
    pub fn wait_for_end(&self, pid: u32, time: Duration) -> io::Result<Option<ExitStatus>> {
        let began = Instant::now();
        loop {
            {
                let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
                let index = children.iter().position(|child| child.id() == pid).ok_or(io::ErrorKind::NotFound)?;
                if children.get_mut(index).map_or(Ok(None), Child::try_wait)?.is_some() {
                    return children.remove(index).wait().map(Some);
                }
            }
            if began.elapsed() > time {
                return Ok(None);
            }
            sleep(POLL);
        }
    }

    /// The log so far, for a failing test to print.
    pub fn log(&self) -> String {
        fs::read(self.log_file()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The folder's owner does it again; here, before children are waited for.
        let _left = crate::processes::end_all(self.nitro.path());
        for child in self.children.get_mut().unwrap_or_else(PoisonError::into_inner) {
            let _ignored = child.kill();
            let _ignored = child.wait();
        }
    }
}

/// Where the daemon serves HTTPS and metrics.
fn addresses(wanted: Option<Ipv4Addr>) -> io::Result<(SocketAddr, SocketAddr)> {
    if let Some(ip) = wanted {
        // Below the ports that the kernel gives to connections: one of those may be taken between now and the daemon's start.
        for _ in 0..100 {
            let random = u16::from_str_radix(&unique(4), 16).map_err(io::Error::other)?;
            let at = |port| SocketAddr::new(IpAddr::V4(ip), port);
            let (ingress, metrics) = (at(10_240 + random % 20_000), at(10_240 + random % 20_000 + 1));
            if TcpListener::bind(ingress).is_ok() && TcpListener::bind(metrics).is_ok() {
                return Ok((ingress, metrics));
            }
        }
        return Err(io::ErrorKind::AddrInUse.into());
    }
    // All of 127.0.0.0/8 is this host.
    for _ in 0..100 {
        let random = u32::from_str_radix(&unique(6), 16).map_err(io::Error::other)?;
        let ip = Ipv4Addr::from(0x7f00_0000 | random);
        let at = |port| SocketAddr::new(IpAddr::V4(ip), port);
        if TcpListener::bind(at(INGRESS_PORT)).is_ok() && TcpListener::bind(at(METRICS_PORT)).is_ok() {
            return Ok((at(INGRESS_PORT), at(METRICS_PORT)));
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}
