//! What is wanted: the configuration after it was read and checked, without the form it was written in.
//!
//! These types say what the planner needs and no more; reading TOML, its defaults and its error messages live in the
//! daemon's `config`. They are also kept on disk, as the last good configuration: a field that is added needs a default, so that
//! what an earlier version kept can be read.

mod source;

pub use source::{BadImageSource, ImageSource, Url};

use crate::id::{EnclaveName, MemoryMib};
use crate::image::ExpectedImage;
use crate::routes::{AccessLog, EgressLimits, HttpsListener, PathRoute, SiteRules, TcpRules, VsockTransport};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// All that is wanted of this host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Desired {
    /// Rules for the host as a whole.
    pub host: HostPolicy,
    /// How vsock is reached.
    pub vsock: VsockTransport,
    /// Where HTTPS is served; `None` if no enclave has domains.
    pub https: Option<HttpsListener>,
    /// Where requests and raw connections from clients are logged; `None`: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<AccessLog>,
    /// The enclaves, at most 4.
    pub enclaves: BTreeMap<EnclaveName, EnclaveSpec>,
}

/// Rules for the host as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPolicy {
    /// CPUs (vCPUs) that stay with the parent.
    pub reserve_cpus: u32,
    /// Memory that stays with the parent.
    pub reserve_memory: MemoryMib,
    /// Who sets CPUs and memory aside for enclaves.
    pub allocator: AllocatorMode,
    /// How much of them is to be set aside.
    pub pool: PoolPolicy,
    /// How long existing connections may go on after an enclave was asked to stop.
    pub drain: Duration,
    /// How many bytes of images are kept at most, beside those that run or ran last, which are always kept.
    pub image_cache: u64,
}

/// [`HostPolicy::image_cache`] where nothing else is configured: 10 GiB.
pub const IMAGE_CACHE: u64 = 10 << 30;

impl Default for HostPolicy {
    fn default() -> Self {
        Self {
            reserve_cpus: 2,
            reserve_memory: MemoryMib(2048),
            allocator: AllocatorMode::default(),
            pool: PoolPolicy::default(),
            drain: Duration::from_secs(30),
            image_cache: IMAGE_CACHE,
        }
    }
}

/// Who sets the enclaves' CPUs and memory aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AllocatorMode {
    /// enclaved, through `enclaved-allocator.service`, which runs the stock allocator as root.
    #[default]
    Manage,
    /// The host's administrator (`/etc/nitro_enclaves/allocator.yaml`); the daemon looks at the host and says what is
    /// missing, with numbers and the lines that help.
    Verify,
    /// Somebody else, such as a Kubernetes device plugin; the daemon neither sets nor looks at anything.
    External,
}

impl AllocatorMode {
    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Manage => "manage",
            Self::Verify => "verify",
            Self::External => "external",
        }
    }
}

/// How much is set aside for enclaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolPolicy {
    /// Everything beyond the host's reserve, once, early after a boot, while memory is in one piece: neither updates nor growth
    /// ever need the allocator again.
    #[default]
    All,
    /// What the enclaves need. The pool changes with them, for which all of them have to end.
    Exact,
}

impl PoolPolicy {
    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Exact => "exact",
        }
    }
}

/// One wanted enclave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnclaveSpec {
    /// Where its image comes from, and what it must be.
    pub image: ImageRequest,
    /// How often its source is asked whether it has something else by now; `None`: never.
    pub image_poll: Option<Duration>,
    /// vCPUs, whole cores: an even number where the host has SMT.
    pub cpus: u32,
    /// Memory.
    pub memory: MemoryMib,
    /// Debug mode: the console is readable and all PCRs in attestation documents are zero.
    pub debug: bool,
    /// How a changed image or size is brought in.
    pub update: UpdatePolicy,
    /// What follows when the enclave ends on its own.
    pub restart: RestartPolicy,
    /// How it is known to be ready and well; `None`: ready as soon as it runs.
    pub health: Option<HealthCheck>,
    /// What it may reach.
    pub egress: Vec<EgressSpec>,
    /// The parent's vsock port on which it reads the list of its endpoints; `None`: nowhere.
    pub hosts_port: Option<u32>,
    /// What reaches it.
    pub ingress: IngressSpec,
}

/// An image as it is asked for. Two equal requests are one image; another pin or place is another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRequest {
    /// Where the file is.
    pub source: ImageSource,
    /// What it must measure.
    pub expected: ExpectedImage,
}

/// How a changed image or size is brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UpdatePolicy {
    /// Blue-green where both generations fit the host, else recreate.
    #[default]
    Auto,
    /// The new generation is ready before the old one is drained; waits if both do not fit.
    BlueGreen,
    /// The old generation is drained and stopped before the new one starts.
    Recreate,
}

/// What follows when an enclave ends on its own. (An enclave that ends leaves no reason: nitro-cli's process exits 0
/// whatever happened, so there is no "on failure".)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It is launched again, with growing pauses.
    #[default]
    Always,
    /// It stays down until `enclavectl start` or a changed configuration.
    Never,
}

/// How an enclave is known to be ready and well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: Probe,
    /// How long after the boot failures are expected.
    pub start_period: Duration,
    /// Pause between two probes.
    pub interval: Duration,
    /// How long one probe may take.
    pub timeout: Duration,
    /// How many failures in a row make it unhealthy.
    pub failures: u32,
    /// What follows when it is unhealthy, or not ready when the start period ends.
    pub on_failure: OnUnhealthy,
}

/// What follows from bad health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnUnhealthy {
    /// It is shown in status, metrics and `/ready`; the enclave is left alone.
    #[default]
    Report,
    /// The enclave is stopped and launched again.
    Restart,
}

/// What a health check asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// An HTTP GET over vsock; 200 to 399 is well.
    Http {
        /// The enclave's vsock port.
        port: u32,
        /// Path and query, beginning with `/`.
        path: String,
    },
    /// A vsock connection is accepted.
    Connect {
        /// The enclave's vsock port.
        port: u32,
    },
}

/// One endpoint that an enclave may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressSpec {
    /// The upstream: a DNS name or an IP address.
    pub hostname: String,
    /// Its TCP port.
    pub port: u16,
    /// Where the enclave connects to on CID 3.
    pub vsock_port: u32,
    /// The address by which programs inside the enclave know it (for its /etc/hosts).
    pub loopback: Option<IpAddr>,
    /// Addresses that are served although the egress policy would refuse them.
    pub allow_addresses: Vec<IpAddr>,
    /// Only TLS, and only with the hostname as the server's name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sni: bool,
    /// How much it carries.
    #[serde(default, skip_serializing_if = "EgressLimits::is_default")]
    pub limits: EgressLimits,
}

/// The list of endpoints as a JSON document: what `enclavectl hosts --json` prints and what an enclave reads on
/// [`EnclaveSpec::hosts_port`].
pub fn hosts_document(egress: &[EgressSpec]) -> String {
    format!("{:#}\n", serde_json::json!(egress))
}

/// What reaches an enclave.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct IngressSpec {
    /// HTTPS: names it answers to. Empty: no HTTPS.
    pub domains: Vec<String>,
    /// HTTPS: paths by prefix.
    pub paths: Vec<PathRoute>,
    /// HTTPS: what is special about it.
    #[serde(default)]
    pub site: SiteRules,
    /// Raw TCP.
    pub tcp: Vec<TcpPort>,
}

/// A raw TCP port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpPort {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// The enclave's vsock port.
    pub vsock_port: u32,
    /// Who may use it, and how much.
    pub rules: TcpRules,
}
