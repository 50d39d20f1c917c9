//! The form of the configuration file: which tables and keys there are, their types, ranges and defaults. The doc
//! comments here are the reference; they make `config/enclaved.schema.json`, by which editors check a file while it is
//! written and [`structure`](super::structure) checks it when it is read.
//!
//! No judgement of values beyond type and range: that is [`meaning`](super::meaning)'s.

use super::{OnStop, SupervisorKind};
use enclaved_core::desired::{AllocatorMode, PoolPolicy};
use enclaved_core::desired::{OnUnhealthy, RestartPolicy, UpdatePolicy};
use enclaved_core::id::{EifDigest, EnclaveName, Pcr};
use enclaved_core::routes::{CautionRelease, ProxyProtocol, UpstreamHttp, VsockTransport};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Deserialize;
use std::borrow::Cow;
use std::net::IpAddr;
use std::path::PathBuf;

/// The configuration of enclaved, which runs AWS Nitro Enclaves on their parent instance.
///
/// It is read from one file (`/etc/enclaved/enclaved.toml`) and from every `conf.d/*.toml` beside it, in the order of
/// their names. A file in `conf.d` may add enclaves and set what no other file sets; nothing overrides anything.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "enclaved.toml")]
pub(super) struct FileForm {
    /// The host as a whole.
    pub host: HostForm,
    /// AWS's nitro-cli, through which enclaves are launched.
    pub nitro: NitroForm,
    /// How vsock, the only wire between the host and its enclaves, is reached.
    pub vsock: VsockForm,
    /// Where HTTPS for the enclaves' domains is served.
    pub ingress: HostIngressForm,
    /// The metrics for Prometheus, `/ready` and `/live`.
    pub metrics: MetricsForm,
    /// The control plane that receives this host's status. Left out: there is none.
    pub control_plane: Option<ControlPlaneForm>,
    /// The enclaves, 4 at most: a parent instance can have no more.
    #[schemars(length(max = 4))]
    pub enclave: Vec<EnclaveForm>,
}

/// The host as a whole.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct HostForm {
    /// vCPUs that stay with the parent instance, whatever the enclaves ask for.
    #[schemars(range(min = 1, max = 1024))]
    pub reserve_cpus: u32,
    /// Memory in MiB that stays with the parent instance.
    #[schemars(range(min = 64, max = 16_777_216))]
    pub reserve_memory_mib: u64,
    /// Who sets the enclaves' CPUs and memory aside. Left out: `"manage"`; with `supervisor = "direct"`, where there may be no
    /// systemd to run the allocator, `"verify"`.
    pub allocator: Option<AllocatorMode>,
    /// How much of them is set aside, where enclaved does that (`allocator = "manage"`).
    pub pool: PoolPolicy,
    /// What supervises the enclaves.
    pub supervisor: SupervisorKind,
    /// What becomes of the enclaves when the daemon is asked to stop.
    pub on_stop: OnStop,
    /// How much of the disk images may take, in MiB, beside those that run or ran last: these are always kept. What was not
    /// used for longest is removed first.
    #[schemars(range(min = 0, max = 16_777_216))]
    pub image_cache_mib: u64,
    /// How long connections and requests under way may go on before an enclave is stopped; 0s to 1h.
    pub drain: DurationText,
    /// Where images, the ledger and the last good configuration are kept.
    pub state_dir: PathBuf,
    /// Sockets and records of this boot. At most 80 bytes long: Unix sockets are opened in it.
    pub run_dir: PathBuf,
    /// Where the proxy process keeps certificates and its last routes.
    pub proxy_state_dir: PathBuf,
    /// The socket on which the proxy process takes its routes; at most 100 bytes long. Left out: `proxy.sock` in `run_dir`;
    /// with `supervisor = "systemd"`, where `enclaved-proxy.service` has it, `/run/enclaved-proxy/link.sock`.
    pub proxy_socket: Option<PathBuf>,
    /// Where the host's sysfs is: elsewhere in a container that has the host's mounted.
    pub sysfs: PathBuf,
}

impl Default for HostForm {
    fn default() -> Self {
        Self {
            reserve_cpus: 2,
            reserve_memory_mib: 2048,
            image_cache_mib: enclaved_core::desired::IMAGE_CACHE >> 20,
            allocator: None,
            pool: PoolPolicy::default(),
            supervisor: SupervisorKind::default(),
            on_stop: OnStop::default(),
            drain: "30s".into(),
            state_dir: "/var/lib/enclaved".into(),
            run_dir: super::DEFAULT_RUN_DIR.into(),
            proxy_state_dir: "/var/lib/enclaved-proxy".into(),
            proxy_socket: None,
            sysfs: "/sys".into(),
        }
    }
}

/// AWS's nitro-cli, through which enclaves are launched.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct NitroForm {
    /// The program: its name, to be found in PATH, or its absolute path.
    pub cli: PathBuf,
}

impl Default for NitroForm {
    fn default() -> Self {
        Self { cli: "nitro-cli".into() }
    }
}

/// How vsock, the only wire between the host and its enclaves, is reached.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct VsockForm {
    /// `"af_vsock"` on Nitro hosts; `{ hybrid = "/dir" }` where enclaves are machines under QEMU or Firecracker.
    pub transport: VsockTransport,
}

/// Where HTTPS for the enclaves' domains is served.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct HostIngressForm {
    /// Address and port; opened if any enclave has domains. `[::]` takes IPv4 too.
    pub listen: SocketAddrText,
    /// Address and port on which requests in clear are told to come again over HTTPS (308): `"[::]:80"`. Left out: none.
    pub redirect: Option<SocketAddrText>,
    /// Networks and addresses of proxies and load balancers in front of this host: what they say of a client in
    /// `X-Forwarded-*` reaches the enclave, and their connections do not count as those of one source. What anybody else says
    /// there is removed.
    #[schemars(length(max = 256), example = ["10.0.0.0/8"])]
    pub trusted_proxies: Vec<String>,
    /// Connections at a time, of all domains; more are closed at once. Left out: 8192.
    #[schemars(range(min = 1, max = 65536))]
    pub max_connections: Option<u32>,
    /// Connections of one IPv4 address, or of one IPv6 network of 64 bits, at a time, and requests in flight over all of them; more are
    /// closed at once, or answered 503. Left out: 1024.
    #[schemars(range(min = 1, max = 65536))]
    pub max_connections_per_source: Option<u32>,
    /// Where each request, and each raw connection, from clients is logged, as a line of JSON: the absolute path of a file, which
    /// `enclaved-proxy` must be able to write to, or `"stdout"`, which is the journal under systemd. Left out: nowhere.
    #[schemars(example = "/var/log/enclaved-proxy/access.log")]
    pub access_log: Option<String>,
}

impl Default for HostIngressForm {
    fn default() -> Self {
        Self {
            listen: "[::]:443".into(),
            redirect: None,
            trusted_proxies: Vec::new(),
            max_connections: None,
            max_connections_per_source: None,
            access_log: None,
        }
    }
}

/// The metrics for Prometheus, `/ready` and `/live`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct MetricsForm {
    /// Address and port.
    pub listen: SocketAddrText,
}

impl Default for MetricsForm {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9119".into() }
    }
}

/// The control plane that receives this host's status.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ControlPlaneForm {
    /// Where the status is sent to. `https://`; `http://` to a loopback address only.
    #[schemars(example = "https://control.example.com")]
    pub url: String,
    /// How often it is sent if nothing changes; 1s to 1h.
    #[serde(default = "interval")]
    pub interval: DurationText,
}

fn interval() -> DurationText {
    "30s".into()
}

/// One enclave.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EnclaveForm {
    /// Its name on this host: 1 to 32 characters of a-z, 0-9 and -, beginning and ending with a letter or digit.
    #[schemars(with = "EnclaveName")]
    pub name: String,
    /// Its image (EIF): `s3://bucket/key`, read with the instance's role (`?versionId=` after it for one version of the
    /// object); `https://host/path`, a presigned URL, say, whose query is kept out of logs; or `file:///absolute/path`.
    #[schemars(regex(pattern = "^(s3://[^/]+/.+|https?://[^/]+.*|file:///.+)$"), example = "s3://bucket/signer.eif")]
    pub image: String,
    /// How often the image's source is asked whether there is something else by now; 1s to 24h. What is new is verified
    /// like any other image, and brought in as `update` says. Left out: only a changed configuration brings a new image.
    pub image_poll: Option<DurationText>,
    /// vCPUs: whole cores, so an even number where the instance has two threads a core.
    #[schemars(range(min = 1, max = 1024))]
    pub cpus: u32,
    /// Memory in MiB: at least four times the size of the image.
    #[schemars(range(min = 64, max = 16_777_216))]
    pub memory_mib: u64,
    /// Runs it in debug mode: its console can be read, and its attestation proves nothing (all PCRs are zero).
    #[serde(default)]
    pub debug_mode: bool,
    /// How a changed image or size is brought in.
    #[serde(default)]
    pub update: UpdatePolicy,
    /// What follows when it ends on its own.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// What the image must be: one that differs is refused. `enclavectl measure FILE` prints the values. What is left out
    /// is not checked. As an array of tables (`[[enclave.measurements]]`, 8 at most) it allows several images: one that fits
    /// one of them as a whole is taken.
    pub measurements: Option<MeasurementsForm>,
    /// Refuses an image that is not signed. Who may sign it is pinned by `pcr8`.
    #[serde(default)]
    pub require_signature: bool,
    /// How it is known to be ready and well. Left out: it is taken to be ready as soon as it runs.
    pub health: Option<HealthForm>,
    /// What it may reach. It reaches nothing else.
    #[serde(default)]
    #[schemars(length(max = 256))]
    pub egress: Vec<EgressForm>,
    /// The parent's vsock port (on CID 3) on which the enclave reads the list of its own endpoints, the JSON that
    /// `enclavectl hosts NAME --json` prints: it connects, reads to the end, and sends nothing. Left out: nowhere.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub hosts_port: Option<u32>,
    /// What reaches it.
    #[serde(default)]
    pub ingress: IngressForm,
}

/// What an image must be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum MeasurementsForm {
    // First, because serde would also take an array for the fields of a table.
    /// Several sets of values, of which one must fit.
    AnyOf(#[schemars(length(max = 8))] Vec<PinsForm>),
    /// One set.
    One(PinsForm),
}

/// The values of an image; at least one.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PinsForm {
    /// SHA-256 of the whole file: 64 hexadecimal digits. Pins every byte.
    #[schemars(with = "Option<EifDigest>")]
    pub sha256: Option<String>,
    /// Measurement of the kernel, the command line and all ramdisks: 96 hexadecimal digits.
    #[schemars(with = "Option<Pcr>")]
    pub pcr0: Option<String>,
    /// Measurement of the kernel, the command line and the first ramdisk.
    #[schemars(with = "Option<Pcr>")]
    pub pcr1: Option<String>,
    /// Measurement of the ramdisks after the first: the application.
    #[schemars(with = "Option<Pcr>")]
    pub pcr2: Option<String>,
    /// Measurement of the certificate that the image is signed with.
    #[schemars(with = "Option<Pcr>")]
    pub pcr8: Option<String>,
}

/// How an enclave is known to be ready and well: either `http` or `connect`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct HealthForm {
    /// An HTTP GET over vsock; an answer of 200 to 399 is well.
    pub http: Option<HttpProbeForm>,
    /// A vsock connection that is accepted is well.
    pub connect: Option<ConnectProbeForm>,
    /// How long after its start failures are expected; 0s to 1h.
    pub start_period: DurationText,
    /// The pause between two checks; 100ms to 1h.
    pub interval: DurationText,
    /// How long one check may take; 100ms to 1m.
    pub timeout: DurationText,
    /// How many failures in a row make it unhealthy.
    #[schemars(range(min = 1, max = 100))]
    pub failures: u32,
    /// What follows when it is unhealthy, or not ready when the start period ends.
    pub on_failure: OnUnhealthy,
}

impl Default for HealthForm {
    fn default() -> Self {
        Self {
            http: None,
            connect: None,
            start_period: "60s".into(),
            interval: "5s".into(),
            timeout: "2s".into(),
            failures: 3,
            on_failure: OnUnhealthy::default(),
        }
    }
}

/// A check by HTTP.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HttpProbeForm {
    /// The enclave's vsock port.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub port: u32,
    /// Path and query, beginning with `/`.
    #[serde(default = "root")]
    #[schemars(regex(pattern = "^/"), example = "/health")]
    pub path: String,
}

fn root() -> String {
    "/".into()
}

/// A check by connecting.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ConnectProbeForm {
    /// The enclave's vsock port.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub port: u32,
}

/// One endpoint that an enclave may reach.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EgressForm {
    /// A DNS name or an IP address.
    #[schemars(example = "kms.us-east-1.amazonaws.com")]
    pub hostname: String,
    /// Its TCP port.
    #[serde(default = "https_port")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// Where the enclave connects to, on the parent's CID 3. 9000 is nitro-cli's own.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub vsock_port: u32,
    /// The loopback address by which programs inside the enclave know it: `enclavectl hosts NAME` prints the lines for
    /// the enclave's /etc/hosts.
    #[schemars(with = "Option<IpAddr>")]
    pub loopback: Option<String>,
    /// Addresses to connect to although they are the host's own, loopback, link-local or a metadata service's: these are
    /// refused unless they are listed here.
    #[serde(default)]
    #[schemars(with = "Vec<IpAddr>", length(max = 64))]
    pub allow_addresses: Vec<String>,
    /// Takes only TLS connections, and only those that ask for `hostname` as the server's name (SNI), in clear, in each hello of a
    /// handshake. What is encrypted is not seen: the Host of a request, a renegotiation of TLS 1.2, the inner name of an
    /// encrypted client hello.
    #[serde(default)]
    pub sni: bool,
    /// Connections at a time; more are closed at once. Left out: 4096.
    #[schemars(range(min = 1, max = 65536))]
    pub max_connections: Option<u32>,
    /// New connections a second. What comes faster waits for its turn, a second at most; more are closed at once. Left
    /// out: 1000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections_per_second: Option<u32>,
    /// How long each address of `hostname` may take to accept a connection; 100ms to 2m. Left out: 10s.
    pub connect_timeout: Option<DurationText>,
    /// A connection on which no byte went either way for so long is closed; 1s to 30days. Left out: 24h, and 10m where one side has
    /// closed its direction. (An upstream that is gone, or takes not a byte of what waits for it, is found within two minutes, however
    /// long this is.)
    pub idle_timeout: Option<DurationText>,
    /// A connection that is so old is closed, whatever it carries; 1s to 365days. Left out: connections may become as old as they
    /// like.
    pub max_lifetime: Option<DurationText>,
}

fn https_port() -> u16 {
    443
}

/// What reaches an enclave.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct IngressForm {
    /// Names under which HTTPS requests are for this enclave; `*.example.com` covers one label.
    #[schemars(length(max = 256))]
    pub domains: Vec<String>,
    /// The vsock port inside the enclave that answers HTTP: requests that no route covers go there.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub http_port: Option<u32>,
    /// Other vsock ports for paths that begin with a prefix, in whole segments; the longest wins.
    #[schemars(length(max = 256))]
    pub routes: Vec<RouteForm>,
    /// Raw TCP ports: `9000`, or `{ listen = 5432, vsock_port = 15432, allow = ["10.0.0.0/8"] }`.
    #[schemars(length(max = 256))]
    pub ports: Vec<PortForm>,
    /// The certificate for these domains, which you keep. Left out: one of enclaved's own CA, which clients have to be told to
    /// trust.
    pub certificate: Option<CertificateForm>,
    /// For how long browsers that were here once are to come over HTTPS alone (`Strict-Transport-Security`); 0s to 2 years.
    /// It cannot be taken back before. Left out: they are not told.
    pub hsts: Option<DurationText>,
    /// Authorities in PEM. Every client of these domains must show a certificate that one of them has signed; the enclave is told
    /// which in `X-Client-Cert-Subject` and `X-Client-Cert-Sha256`. Read again when it changes; what can't be used replaces nothing.
    /// `enclaved-proxy` must be able to read it: not in /etc/enclaved. Left out: clients show none.
    #[schemars(example = "/etc/enclaved-proxy/clients.pem")]
    pub client_ca: Option<PathBuf>,
    /// Takes requests for names that no enclave has, too, and clients that name none in their TLS handshake. One enclave at
    /// most; without one, unknown names are refused.
    pub default: bool,
    /// Passes the TLS connections for these domains to the enclave as they are, which then has certificate and key: nothing is
    /// decrypted here, and there are neither paths nor headers.
    pub passthrough: bool,
    /// The vsock port inside the enclave that answers TLS, with `passthrough`. Left out: 443.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub tls_port: Option<u32>,
    /// What the enclave is sent before the bytes of a connection, with `passthrough`: `"v2"`, the binary header of the PROXY
    /// protocol. Left out: nothing.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Caution's attestation service, by the release that the image is of. `"current"` or `true`: the same as
    /// `routes = [{ path = "/attestation", vsock_port = 49502 }]`. `"earlier"`: the same with 8082. Left out, or `false`: none.
    pub caution: PresetForm,
    /// Caution's end-to-end encryption (STEVE), by the release that the image is of. `"current"` or `true`: the same as
    /// `routes = [{ path = "/e2p", vsock_port = 49500 }]`. `"earlier"`: every path goes to 8080, from where STEVE passes it on to the
    /// application, and there is no `http_port`. Left out, or `false`: none.
    pub e2e: PresetForm,
}

/// Whether an image has one of Caution's services, and of which release it is.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum PresetForm {
    /// `true` is the current release.
    Switch(bool),
    /// A release by name.
    Of(CautionRelease),
}

impl Default for PresetForm {
    fn default() -> Self {
        Self::Switch(false)
    }
}

impl PresetForm {
    /// The release; none: the image does not have it.
    pub(super) fn release(self) -> Option<CautionRelease> {
        match self {
            Self::Switch(on) => on.then_some(CautionRelease::Current),
            Self::Of(release) => Some(release),
        }
    }
}

/// A certificate on disk. Both files are read again when they change; what can't be used replaces nothing.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CertificateForm {
    /// The chain in PEM, the domains' own certificate first. `enclaved-proxy` must be able to read it: not in /etc/enclaved.
    #[schemars(example = "/etc/enclaved-proxy/api.crt")]
    pub cert: PathBuf,
    /// Its key in PEM, which the user `enclaved-proxy` can read and not everybody.
    #[schemars(example = "/etc/enclaved-proxy/api.key")]
    pub key: PathBuf,
}

/// HTTPS requests whose path begins with a prefix.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RouteForm {
    /// Begins with `/`; covers itself and everything below it.
    #[schemars(regex(pattern = "^/"), example = "/attestation")]
    pub path: String,
    /// The vsock port inside the enclave that answers HTTP.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub vsock_port: u32,
    /// How it speaks HTTP: `"http1"`, or `"h2c"`, which is HTTP/2 in clear without a beginning in HTTP/1.1 (gRPC).
    #[serde(default)]
    pub upstream: UpstreamHttp,
}

/// A raw TCP port.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum PortForm {
    /// The same number outside (TCP, on every address) and inside (vsock).
    Same(#[schemars(range(min = 1, max = 65535))] u16),
    /// Different ones, or a particular address.
    Full(FullPortForm),
}

/// A raw TCP port whose two sides differ.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FullPortForm {
    /// Where clients connect: a port (on every address), or address and port.
    pub listen: ListenForm,
    /// The vsock port inside the enclave.
    #[schemars(range(min = 1, max = 4_294_967_294_u32))]
    pub vsock_port: u32,
    /// What the enclave is sent before the bytes of a connection, to learn where it comes from: `"v2"`, the binary header of
    /// the PROXY protocol. Left out: nothing.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Networks and addresses from which connections are taken. Left out: from everywhere.
    #[serde(default)]
    #[schemars(length(max = 256), example = ["10.0.0.0/8"])]
    pub allow: Vec<String>,
    /// Connections at a time; more are closed at once. Left out: 4096.
    #[schemars(range(min = 1, max = 65536))]
    pub max_connections: Option<u32>,
    /// Connections of one IPv4 address, or of one IPv6 network of 64 bits, at a time; more are closed at once. Left out: no
    /// such limit.
    #[schemars(range(min = 1, max = 65536))]
    pub max_connections_per_source: Option<u32>,
    /// A connection on which no byte went either way for so long is closed; 1s to 30days. Left out: 24h, and 10m where one side has
    /// closed its direction.
    pub idle_timeout: Option<DurationText>,
    /// A connection that is so old is closed, whatever it carries; 1s to 365days. Left out: connections may become as old as they
    /// like.
    pub max_lifetime: Option<DurationText>,
}

/// Where clients connect.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum ListenForm {
    /// A TCP port on every address.
    Port(#[schemars(range(min = 1, max = 65535))] u16),
    /// Address and port: `"127.0.0.1:5432"`.
    Address(SocketAddrText),
}

/// A span of time: a number with a unit.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct DurationText(pub String);

/// An IP address and a port.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct SocketAddrText(pub String);

/// A text whose schema says what it must look like.
macro_rules! text_form {
    ($type:ident, $name:literal, $description:literal, $example:literal, $pattern:literal) => {
        impl From<&str> for $type {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                schemars::json_schema!({
                    "type": "string",
                    "description": $description,
                    "examples": [$example],
                    "pattern": $pattern,
                })
            }
        }
    };
}
text_form!(
    DurationText,
    "Duration",
    "A span of time: a number with a unit, such as \"500ms\", \"30s\" or \"5m\".",
    "30s",
    "^[0-9]+ ?[a-zµ]+( ?[0-9]+ ?[a-zµ]+)*$"
);
text_form!(
    SocketAddrText,
    "SocketAddress",
    "An IP address and a port, such as \"127.0.0.1:9119\" or \"[::]:443\".",
    "[::]:443",
    "^(\\[[0-9a-fA-F:.]+\\]|[0-9.]+):[0-9]+$"
);

/// The schema of the file, without the nulls that TOML does not have.
pub(super) fn schema() -> Schema {
    let mut settings = schemars::generate::SchemaSettings::draft2020_12().for_deserialize();
    settings.transforms.push(Box::new(schemars::transform::RecursiveTransform(without_null)));
    settings.into_generator().into_root_schema_for::<FileForm>()
}

fn without_null(schema: &mut Schema) {
    use serde_json::{Value, json};
    let Some(object) = schema.as_object_mut() else { return };
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|kind| kind != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(variants)) = object.get_mut("anyOf") {
        variants.retain(|variant| *variant != json!({ "type": "null" }));
        if let [Value::Object(only)] = variants.as_mut_slice() {
            let only = std::mem::take(only);
            object.remove("anyOf");
            for (key, value) in only {
                object.entry(key).or_insert(value);
            }
        }
    }
    if object.get("default") == Some(&Value::Null) {
        object.remove("default");
    }
}
