//! An enclave from its image to the answer to a request, and the checks that it went as it should. What is shown here was
//! seen: in the daemon's status, in the records of the stand-ins, or in the kernel's own lists.

use super::Provoke;
use super::clients::{Admin, Https, page};
use super::stages::Stages;
use crate::binaries;
use crate::eif::Eif;
use crate::enclave::{Answer, Upstream};
use crate::host::{EGRESS_PORT, Machine};
use crate::nitro_cli::{Call, Measured, listening, measure};
use crate::processes::is_alive;
use crate::s3::S3Fault;
use crate::upstream::UpstreamFault;
use anyhow::{Context as _, bail, ensure};
use enclaved::config::ADMIN_SOCKET;
use enclaved_core::status::{EnclaveState, EnclaveStatus, Status};
use std::collections::BTreeSet;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant, SystemTime};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// The enclave's name.
pub(super) const NAME: &str = "signer";
/// Its image in the bucket.
pub(super) const KEY: &str = "signer.eif";
/// Its size without what every image has. An enclave has at least four times as much memory.
const IMAGE_BYTES: usize = 12 << 20;
/// The stand-in S3 sends no faster, so that there is a download to be seen.
const S3_RATE: u64 = 24 << 20;
/// How often is looked for what can't be waited for.
pub(super) const POLL: Duration = Duration::from_millis(5);
/// Longer than this nothing here takes, on the slowest of machines.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// The host, the daemon on it, and what was told so far.
#[derive(Debug)]
pub(super) struct Life<'a> {
    pub(super) machine: &'a Machine,
    pub(super) stages: &'a mut Stages,
    pub(super) admin: Admin,
    /// The control process.
    pub(super) daemon: u32,
    /// The configuration that is in force.
    pub(super) config: String,
    pub(super) measured: Measured,
    /// `enclavectl wait`, from the start of the daemon on.
    wait: Child,
}

/// The registers of an image as a configuration pins them.
pub(super) fn pinned(measured: &Measured) -> String {
    let registers = measured.registers.iter().filter(|(name, _)| name.starts_with("PCR"));
    let pairs: Vec<_> = registers.map(|(name, value)| format!("{} = \"{value}\"", name.to_lowercase())).collect();
    format!("measurements = {{ {} }}\n", pairs.join(", "))
}

/// The first digits, enough to tell images apart.
pub(super) fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

impl<'a> Life<'a> {
    /// Puts the image where it belongs, writes the configuration and starts the daemon.
    pub(super) async fn begin(
        machine: &'a Machine,
        stages: &'a mut Stages,
        provoke: Option<Provoke>,
    ) -> anyhow::Result<Self> {
        let instance =
            "an m5.2xlarge with 6 CPUs and 2 GiB for enclaves, the role \"enclave-host\", S3, a control plane";
        stages.stage("host", format!("simulated in {}: {instance}", machine.path().display()));
        let (bytes, measured) = image(machine, "v1")?;
        let size = bytes.len();
        let put = if provoke == Some(Provoke::ForgedImage) { image(machine, "forged")?.0 } else { bytes };
        machine.s3.put(machine.bucket(), KEY, put).await.context("putting the image into S3")?;
        let pcr0 = measured.registers.get("PCR0").context("the image has no PCR0")?;
        let mib = size / (1 << 20);
        let place = format!("s3://{}/{KEY}", machine.bucket());
        stages.stage("image", format!("EIF of {mib} MiB built and put at {place}; its PCR0 is {}...", short(pcr0)));
        machine.s3.add_fault(S3Fault::Slow { bytes_per_second: S3_RATE }, None);
        match provoke {
            Some(Provoke::S3Forbidden) => {
                machine.s3.clear_faults();
                machine.s3.add_fault(S3Fault::Forbidden, None);
            }
            Some(Provoke::UpstreamDown) => machine.upstream.set_fault(Some(UpstreamFault::Down)),
            Some(Provoke::ForgedImage) | None => {}
        }
        let enclave = machine.sample_enclave(NAME, KEY);
        let config = format!("{}{}\n{}\n", machine.host_config(), enclave.trim_end(), pinned(&measured));
        machine.write_config(&config).context("writing the configuration")?;
        let daemon = machine.start_daemon().context("starting enclaved")?;
        let admin = Admin { socket: machine.run_dir().join(ADMIN_SOCKET) };
        let wait = enclavectl(machine, &admin, &["wait", "--timeout", "60s"])?.spawn();
        let wait = wait.context("starting enclavectl")?;
        Ok(Self { machine, stages, admin, daemon, config, measured, wait })
    }

    /// Runs `enclavectl` to its end.
    pub(super) async fn enclavectl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let output = enclavectl(self.machine, &self.admin, arguments)?.output();
        timeout(PATIENCE, output).await.context("enclavectl does not end")?.context("running enclavectl")
    }

    /// The control process has not ended.
    pub(super) fn check_daemon(&self) -> anyhow::Result<()> {
        match self.machine.wait_for_end(self.daemon, Duration::ZERO).context("looking at enclaved")? {
            None => Ok(()),
            Some(status) => bail!("enclaved ended with {status}"),
        }
    }

    /// The host's side of vsock that is open now.
    pub(super) fn egress(&self) -> Vec<String> {
        listening(&self.machine.nitro.vsock())
    }

    /// The launches so far.
    pub(super) fn launches(&self) -> anyhow::Result<Vec<Call>> {
        let calls = self.machine.nitro.calls().context("reading the record of nitro-cli")?;
        Ok(calls.into_iter().filter(|call| call.command() == "run-enclave").collect())
    }

    /// Follows the daemon until the enclave is ready, telling each stage as it is seen.
    pub(super) async fn until_ready(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut next = Seen::Started;
        while next != Seen::Ready {
            self.check_daemon()?;
            let last = match self.admin.status().await {
                Ok(status) => {
                    self.hopeless(&status)?;
                    next = self.advance(next, &status)?;
                    stand(&status)
                }
                // It is starting.
                Err(error) => format!("{error:#}"),
            };
            ensure!(began.elapsed() < PATIENCE, "not ready after {PATIENCE:?}: {last}");
            sleep(POLL).await;
        }
        let waited = timeout(PATIENCE, self.wait.wait()).await.context("enclavectl wait does not end")??;
        ensure!(waited.success(), "the enclave is ready, and enclavectl wait ended with {waited}");
        self.stages.stage("ready", "its health check answers over vsock; `enclavectl wait` returned");
        Ok(())
    }

    /// What is not going to become better by itself, or not soon.
    fn hopeless(&self, status: &Status) -> anyhow::Result<()> {
        let down = |enclave: &&EnclaveStatus| {
            matches!(enclave.state, EnclaveState::ImageFailed | EnclaveState::Ended | EnclaveState::Waiting)
        };
        match status.enclaves.iter().filter(down).find_map(|enclave| Some((enclave, enclave.last_error.as_ref()?))) {
            Some((enclave, error)) => bail!("{} is {}: {}", enclave.name, enclave.state.as_str(), error.failure),
            None => Ok(()),
        }
    }

    /// Tells the stages that this status proves, from the next one on.
    fn advance(&mut self, mut next: Seen, status: &Status) -> anyhow::Result<Seen> {
        let enclave = &of(status, NAME)?;
        loop {
            next = match next {
                Seen::Started => {
                    let text = format!("enclaved {}, process {}", status.host.version, status.host.pid);
                    ensure!(status.host.pid == self.daemon, "process {} answers, not {}", status.host.pid, self.daemon);
                    self.stages.stage("started", text);
                    Seen::Credentials
                }
                Seen::Credentials => match self.credentials()? {
                    Some((at, text)) => {
                        self.stages.stage_at("credentials", at, text);
                        Seen::Downloaded
                    }
                    None => return Ok(next),
                },
                Seen::Downloaded => {
                    if enclave.pcr0.is_none() {
                        self.download(enclave);
                        return Ok(next);
                    }
                    self.machine.s3.clear_faults();
                    self.downloaded(enclave)?;
                    Seen::Egress
                }
                Seen::Egress => {
                    let open = self.egress();
                    if open.is_empty() && enclave.pid.is_none() {
                        return Ok(next);
                    }
                    self.stages
                        .stage("egress", format!("the proxy listens for the enclave's calls: {}", open.join(", ")));
                    Seen::Launched
                }
                Seen::Launched => {
                    let Some(pid) = enclave.pid else { return Ok(next) };
                    let text = self.launched(enclave, pid)?;
                    self.stages.stage("launched", text);
                    Seen::Booting
                }
                // Told by the caller, who waits for more than this status.
                Seen::Booting if status.ready => return Ok(Seen::Ready),
                Seen::Booting | Seen::Ready => return Ok(next),
            }
        }
    }

    /// The role's credentials, once they were used: when they were handed out, and how.
    fn credentials(&self) -> anyhow::Result<Option<(SystemTime, String)>> {
        let Some(request) = self.machine.s3.authenticated().into_iter().next() else { return Ok(None) };
        let handed_out = self.machine.imds.credentials().of(&request.access_key_id);
        let handed_out =
            handed_out.with_context(|| format!("{} was not handed out to the role", request.access_key_id))?;
        let record = self.machine.imds.record();
        let text = format!(
            "{} from the metadata service by IMDSv2 ({} tokens, {} requests without one), used for {}",
            short(&request.access_key_id),
            record.tokens,
            record.refused_v1,
            request.operation
        );
        Ok(Some((handed_out.since, text)))
    }

    fn download(&mut self, enclave: &EnclaveStatus) {
        let Some(fetch) = enclave.fetch.filter(|fetch| fetch.total > 0) else { return };
        let percent = fetch.bytes * 100 / fetch.total;
        let percent = if self.stages.redraws() { percent } else { percent / 25 * 25 };
        let bar = "#".repeat(usize::try_from(percent / 5).unwrap_or(20));
        let mib = fetch.total >> 20;
        self.stages.progress("downloading", &format!("[{bar:<20}] {percent:>3}% of {mib} MiB"));
    }

    fn downloaded(&mut self, enclave: &EnclaveStatus) -> anyhow::Result<()> {
        let role = self.machine.imds.credentials();
        let path = format!("/{}/{KEY}", self.machine.bucket());
        let is_ours = |request: &&crate::s3::Authenticated| request.key.as_deref() == Some(KEY);
        let requests = self.machine.s3.authenticated();
        let used = requests.iter().filter(is_ours).filter(|request| role.of(&request.access_key_id).is_some()).count();
        ensure!(used > 0, "{path} was had without the role's credentials: {:?}", self.machine.s3.answered());
        let source = enclave.image.as_deref().unwrap_or("the image");
        self.stages
            .stage("downloaded", format!("{source} with these credentials (no faster than {} MiB/s)", S3_RATE >> 20));
        for (register, found) in [("PCR0", &enclave.pcr0), ("PCR1", &enclave.pcr1), ("PCR2", &enclave.pcr2)] {
            let pinned =
                self.measured.registers.get(register).with_context(|| format!("no {register} was measured"))?;
            let found = found.map(|found| found.to_string()).unwrap_or_default();
            ensure!(found == *pinned, "enclaved says that {register} is {found:?}; it is {pinned}");
        }
        let pcr0 = enclave.pcr0.map(|pcr0| pcr0.to_string()).unwrap_or_default();
        let sha256 = enclave.image_digest.map(|digest| digest.to_string()).unwrap_or_default();
        let text = format!(
            "PCR0 {}..., PCR1 and PCR2, measured as it arrived, are the pinned ones; SHA-256 {}...",
            short(&pcr0),
            short(&sha256)
        );
        self.stages.stage("verified", text);
        Ok(())
    }

    /// What the launch was, by nitro-cli's own record of it.
    fn launched(&self, enclave: &EnclaveStatus, pid: u32) -> anyhow::Result<String> {
        let cid = enclave.cid.context("the enclave runs without a CID")?.to_string();
        let launches = self.launches()?;
        let [launch] = launches.as_slice() else { bail!("nitro-cli was asked {} times to launch", launches.len()) };
        let explicit = launch.args.windows(2).any(|pair| pair[0] == "--enclave-cid" && pair[1] == cid);
        ensure!(explicit, "it was launched without --enclave-cid {cid}: {:?}", launch.args);
        self.check_egress_before(launch, &cid)?;
        ensure!(is_alive(pid), "its process {pid} does not run");
        Ok(format!("{} with CID {cid}, nitro-cli's process {pid}; egress listened before", name(enclave)))
    }

    /// Whether egress listened when that launch began.
    pub(super) fn check_egress_before(&self, launch: &Call, cid: &str) -> anyhow::Result<()> {
        let socket = format!("{cid}.sock_{EGRESS_PORT}");
        ensure!(launch.listening.contains(&socket), "{socket} did not listen when nitro-cli began to launch");
        Ok(())
    }

    /// A client of the enclave's service.
    pub(super) fn https(&self) -> anyhow::Result<Https> {
        Https::new(self.machine.ingress(), &self.machine.proxy_state_dir().join("ca/root.crt"))
    }

    /// A request through everything: ingress, enclave, egress, upstream and back. Gives the answer and the TLS version.
    pub(super) async fn request(&self, path: &str) -> anyhow::Result<(Answer, String)> {
        let reply = self.https()?.get(path).await?;
        let text = || String::from_utf8_lossy(&reply.body).into_owned();
        ensure!(reply.status.is_success(), "https://localhost{path} answered {}: {}", reply.status, text());
        let answer: Answer =
            serde_json::from_slice(&reply.body).with_context(|| format!("the answer is {:?}", text()))?;
        ensure!(answer.path == path, "the enclave was asked for {:?}, not for {path:?}", answer.path);
        match &answer.upstream {
            Some(Upstream::Answered { status: 200, .. }) => {}
            other => bail!("the enclave's call to the upstream: {other:?}"),
        }
        let visits = self.machine.upstream.visits();
        ensure!(visits.iter().any(|visit| visit.path == path), "the upstream has not seen {path}");
        Ok((answer, reply.tls))
    }

    /// A request, and what everybody says of the enclave then.
    pub(super) async fn use_it(&mut self) -> anyhow::Result<()> {
        let status = self.admin.status().await?;
        let enclave = of(&status, NAME)?;
        let began = Instant::now();
        let (answer, tls) = self.request("/hello").await?;
        let millis = began.elapsed().as_millis();
        ensure!(Some(answer.cid) == enclave.cid.map(|cid| cid.get()), "CID {} answered: {enclave:?}", answer.cid);
        let said = match &answer.upstream {
            Some(Upstream::Answered { body, .. }) => body.trim_end(),
            Some(Upstream::Failed(_)) | None => "",
        };
        let way = "client -> TLS ingress -> vsock -> application -> vsock -> egress -> upstream, and back";
        let certificate = format!("{tls}, certificate for localhost verified against the proxy's CA");
        self.stages.stage("request", format!("200 in {millis} ms: {way};\n{certificate}; the upstream said {said:?}"));
        self.logged("/hello").await?;
        self.reported(&enclave).await?;
        self.metrics().await?;
        let table = self.enclavectl(&["status"]).await?;
        ensure!(table.status.success(), "enclavectl status: {}", String::from_utf8_lossy(&table.stderr));
        self.stages.stage("status", "what `enclavectl status` says:");
        self.stages.say(&format!("\n{}\n", String::from_utf8_lossy(&table.stdout).trim_end()));
        self.credentials_were_the_roles()
    }

    /// The request's line in the access log.
    async fn logged(&mut self, path: &str) -> anyhow::Result<()> {
        let file = self.machine.access_log();
        let began = Instant::now();
        let line = loop {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            let mut lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            if let Some(line) = lines.find(|line| line["path"] == path) {
                break line;
            }
            ensure!(began.elapsed() < PATIENCE, "the request has no line in {}:\n{text}", file.display());
            sleep(POLL).await;
        };
        let by = line["answered_by"].as_str().unwrap_or_default();
        let text =
            format!("its line of JSON: {} by the {by} with CID {}, {} s", line["status"], line["cid"], line["seconds"]);
        self.stages.stage("access log", text);
        Ok(())
    }

    async fn reported(&mut self, enclave: &EnclaveStatus) -> anyhow::Result<()> {
        let ready = |report: &serde_json::Value| report["ready"] == true && report["enclaves"][0]["state"] == "ready";
        let report = self.machine.control_plane.report_where(PATIENCE, ready).await;
        let report =
            report.with_context(|| format!("no report of a ready host: {:?}", self.machine.control_plane.latest()))?;
        let reported: Status = serde_json::from_value(report.body.clone()).context("the report is no status")?;
        let pcr0 = of(&reported, NAME)?.pcr0;
        ensure!(pcr0 == enclave.pcr0, "PCR0 {pcr0:?} was reported");
        let taken = self.machine.control_plane.reports().len();
        let text = format!("{} {}: ready, with its PCR0 ({taken} reports so far)", report.method, report.path);
        self.stages.stage_at("control plane", report.at, text);
        Ok(())
    }

    async fn metrics(&mut self) -> anyhow::Result<()> {
        let at = self.machine.metrics();
        let began = Instant::now();
        // The proxy's counters come with the next look that the control process takes at it.
        let text = loop {
            let (status, text) = page(at, "/metrics").await?;
            ensure!(status.is_success(), "/metrics answers {status}: {text}");
            match says_all(&text) {
                Ok(()) => break text,
                Err(error) => ensure!(began.elapsed() < PATIENCE, "{error:#}"),
            }
            sleep(POLL).await;
        };
        for path in ["/live", "/ready"] {
            let (status, text) = page(at, path).await?;
            ensure!(status.is_success(), "{path} answers {status}: {text}");
        }
        let series = text.lines().filter(|line| !line.starts_with('#')).count();
        let text = format!("http://{at}/metrics has {series} series of both processes; /live and /ready are 200");
        self.stages.stage("metrics", text);
        Ok(())
    }

    /// Nobody but the role has read from S3, and the metadata service was never asked in the old way.
    fn credentials_were_the_roles(&self) -> anyhow::Result<()> {
        let record = self.machine.imds.record();
        ensure!(record.refused_v1 == 0, "{} requests to the metadata service came without a token", record.refused_v1);
        ensure!(record.tokens > 0, "the metadata service handed no token out");
        let role = self.machine.imds.credentials().all();
        let role: BTreeSet<_> = role.iter().map(|credentials| credentials.access_key_id.as_str()).collect();
        let requests = self.machine.s3.authenticated();
        ensure!(!requests.is_empty(), "the role's credentials went unused");
        match requests.iter().find(|request| !role.contains(request.access_key_id.as_str())) {
            Some(request) => bail!("S3 was asked with credentials that are not the role's: {request:?}"),
            None => Ok(()),
        }
    }
}

/// Which stage is to be seen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Started,
    Credentials,
    Downloaded,
    Egress,
    Launched,
    Booting,
    Ready,
}

/// The sample application in an image of some size, and its measurements.
fn image(machine: &Machine, label: &str) -> anyhow::Result<(Vec<u8>, Measured)> {
    let mut init = b"simulated init".to_vec();
    init.resize(IMAGE_BYTES, 0);
    let ramdisks = vec![init, machine.sample_application(label).to_line()];
    let bytes = Eif::new(*b"simulated kernel", "reboot=k panic=30", ramdisks).to_bytes();
    let file = tempfile::NamedTempFile::new_in(machine.path()).context("making a file for the image")?;
    std::fs::write(file.path(), &bytes).context("writing the image")?;
    let measured = measure(file.path()).context("measuring the image")?;
    Ok((bytes, measured))
}

/// An `enclavectl` of the machine, which ends with whoever waits for it.
fn enclavectl(machine: &Machine, admin: &Admin, arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::from(machine.command_at(&binaries::find("enclavectl")?));
    command.arg("--socket").arg(&admin.socket).args(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// Whether the metrics tell of a ready host, of its enclave, and of the request in and out that its proxy carried.
fn says_all(metrics: &str) -> anyhow::Result<()> {
    let wanted = [
        "enclaved_ready ",
        "enclaved_proxy_up ",
        "enclaved_enclave_ready{enclave=\"signer\"}",
        "enclaved_traffic_total{direction=\"egress\"",
        "enclaved_traffic_total{direction=\"https\"",
    ];
    for series in wanted {
        let mut values =
            metrics.lines().filter(|line| line.starts_with(series)).filter_map(|line| line.rsplit(' ').next());
        let counts = values.any(|value| value.parse::<f64>().is_ok_and(|value| value >= 1.0));
        ensure!(counts, "/metrics has no {series:?} of 1 or more");
    }
    Ok(())
}

/// An enclave of a status.
pub(super) fn of(status: &Status, name: &str) -> anyhow::Result<EnclaveStatus> {
    let found = status.enclaves.iter().find(|enclave| enclave.name.as_str() == name);
    found.cloned().with_context(|| format!("the status names no enclave {name}"))
}

/// Name and generation.
pub(super) fn name(enclave: &EnclaveStatus) -> String {
    match enclave.generation {
        Some(generation) => format!("{}-{generation}", enclave.name),
        None => enclave.name.to_string(),
    }
}

/// Where a host that is not ready stands, in a line.
pub(super) fn stand(status: &Status) -> String {
    let of = |enclave: &EnclaveStatus| {
        let waits = enclave.waiting_for.as_ref().map(|waits| format!(", waiting for {waits}")).unwrap_or_default();
        format!("{} is {}{waits}", enclave.name, enclave.state.as_str())
    };
    let problems = status.problems.iter().map(|problem| format!("{}: {}", problem.about, problem.failure));
    status.enclaves.iter().map(of).chain(problems).collect::<Vec<_>>().join("; ")
}
