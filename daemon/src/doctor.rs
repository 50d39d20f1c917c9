//! Looks at everything that a launch needs, and says what is in its way: for `enclavectl doctor`, and for the daemon at its start. It
//! only looks: nothing on the host is changed or begun, and enclaves are not asked anything. What was seen means what
//! `enclaved_core::diagnosis` says it means. Every look has a limit in time, all go on at once, and so the whole ends in time.
//!
//! | file | looks at |
//! |---|---|
//! | `account` | whom the host is judged for |
//! | `files` | folders, disk, clock source |
//! | `bus` | systemd, polkit |
//! | `metadata` | the metadata service |
//! | `network` | names of endpoints, ports |
//! | `heartbeat` | vsock port 9000 |
//! | `watch` | the daemon's own checks: made at its start, repeated until they pass |

mod account;
mod bus;
mod files;
mod heartbeat;
mod metadata;
mod network;
mod watch;

pub use heartbeat::Vsock;
pub use watch::watch;

use crate::config::{Config, SupervisorKind};
use crate::host::image_store::{self, Glance};
use crate::host::inventory::{HostInventory, InventorySource, Roots};
use enclaved_core::desired::{AllocatorMode, ImageRequest, ImageSource};
use enclaved_core::diagnosis::access::{Account, PathSeen, READ};
use enclaved_core::diagnosis::cloud::{self, ImageSeen, MetadataSeen};
use enclaved_core::diagnosis::network::{EndpointSeen, Holder, ListenSeen};
use enclaved_core::diagnosis::pool::{self, SetAsideBy, Wanted};
use enclaved_core::diagnosis::rights::{self, BusSeen, PolkitSeen, Right};
use enclaved_core::diagnosis::system::{self, ClockSeen};
use enclaved_core::diagnosis::{Check, Diagnosis, Finding, network as judge_network, nitro};
use enclaved_core::failure::Failure;
use enclaved_core::inventory::Inventory;
use enclaved_core::observed::Observation::{self, Known, Unknown};
use enclaved_core::routes::VsockTransport;
use enclaved_core::sizing::Demand;
use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;
use tokio::time::timeout;

/// A look at files.
const FILES: Duration = Duration::from_secs(3);
/// A look at the host as a whole, nitro-cli's version included, and at the bus.
const LOCAL: Duration = Duration::from_secs(8);
/// A look at something afar. Credentials come before images, and the user before all: with [`FILES`] and twice this, 15 s in all.
const AFAR: Duration = Duration::from_secs(6);
/// The metadata service, whose looks have limits of their own; and names, of which there may be many.
const QUESTIONS: Duration = Duration::from_secs(11);

/// For whom the checks are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patient {
    /// For the process that makes them: the daemon.
    Itself,
    /// For a daemon that runs.
    Running {
        /// Its process.
        daemon: u32,
    },
    /// For a daemon that does not run.
    NotRunning,
}

/// Where to look; elsewhere in tests.
#[derive(Debug, Clone)]
pub struct Places {
    /// The host's files.
    pub roots: Roots,
    /// The metadata service; `None`: not to be asked.
    pub metadata: Option<String>,
    /// The bus.
    pub bus: BusAddress,
    /// What is done with AF_VSOCK.
    pub vsock: Vsock,
}

/// Which bus systemd and polkit are on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusAddress {
    /// The system's.
    System,
    /// One at that D-Bus address.
    At(String),
}

impl Default for Places {
    fn default() -> Self {
        Self {
            roots: Roots::default(),
            metadata: metadata::endpoint(),
            bus: BusAddress::System,
            vsock: Vsock::default(),
        }
    }
}

/// Makes the checks.
#[derive(Debug)]
pub struct Doctor {
    config: Config,
    places: Places,
    patient: Patient,
    glance: Glance,
}

/// Which checks are made.
#[derive(Debug, Clone, Copy)]
struct Scope<'a>(Option<&'a BTreeSet<Check>>);

impl Scope<'_> {
    fn any(self, checks: &[Check]) -> bool {
        self.0.is_none_or(|wanted| checks.iter().any(|check| wanted.contains(check)))
    }
}

/// All that was seen; `None`: not looked at.
struct Seen {
    account: Observation<Account>,
    inventory: Option<Observation<Inventory>>,
    sockets: Observation<PathSeen>,
    logs: Observation<PathSeen>,
    bus: Option<(Observation<BusSeen>, Observation<PolkitSeen>)>,
    metadata: Option<Observation<MetadataSeen>>,
    images: Option<Images>,
    endpoints: Option<Observation<Vec<EndpointSeen>>>,
    heartbeat: Option<Observation<nitro::HeartbeatSeen>>,
    ports: Option<Observation<Vec<Holder>>>,
    clock: Observation<ClockSeen>,
    clock_source: Observation<String>,
    descriptors: Observation<system::DescriptorsSeen>,
    disk: Observation<system::DiskSeen>,
}

/// The images, and whose credentials S3 was asked with; `None`: no image comes from there.
struct Images {
    credentials: Option<Observation<Result<String, Failure>>>,
    seen: Vec<(ImageRequest, ImageSeen)>,
    apart_from_s3: Option<Duration>,
}

impl Doctor {
    /// For that configuration.
    pub fn new(config: Config, patient: Patient, mut places: Places) -> Self {
        if places.roots.sysfs == Path::new("/sys") {
            places.roots.sysfs.clone_from(&config.host.sysfs);
        }
        Self { config, places, patient, glance: Glance::default() }
    }

    /// Makes all checks, or those. Also says for whom the host is judged, for people.
    pub async fn examine(&self, only: Option<&BTreeSet<Check>>) -> (Diagnosis, String) {
        let scope = Scope(only);
        let seen = self.look(scope).await;
        let mut findings = self.judge(&seen);
        findings.retain(|finding| scope.any(&[finding.check]));
        let judged_for = match &seen.account {
            Known(account) => format!("user {}: {}", account.name, account.how),
            Unknown(failure) => format!("nobody that is known: {}", failure.message),
        };
        (Diagnosis::of(findings), judged_for)
    }

    async fn look(&self, scope: Scope<'_>) -> Seen {
        let roots = &self.places.roots;
        let account = self.account().await;
        let folder = |path: &str| roots.root.join(path);
        let (sockets, logs) = (folder("run/nitro_enclaves"), folder("var/log/nitro_enclaves"));
        let (state_dir, user) = (self.config.host.state_dir.clone(), account.known().cloned());
        let patient = self.patient;
        let for_clock = roots.clone();
        let (source, limits) =
            (roots.sysfs.join("devices/system/clocksource/clocksource0/current_clocksource"), roots.clone());
        let (
            inventory,
            sockets,
            logs,
            bus,
            metadata,
            images,
            endpoints,
            heartbeat,
            ports,
            keeper,
            clock_source,
            descriptors,
            disk,
        ) = tokio::join!(
            when(scope.any(&NITRO), within("the look at the host", LOCAL, self.inventory())),
            aside("the look at nitro-cli's sockets", move || files::path_seen(&sockets)),
            aside("the look at nitro-cli's logs", move || files::path_seen(&logs)),
            when(scope.any(&[Check::Bus, Check::Polkit]), self.bus(&account)),
            when(
                scope.any(&CLOUD),
                within("the metadata service", QUESTIONS, metadata::ask(self.places.metadata.as_deref()))
            ),
            when(scope.any(&CLOUD), self.images(&account)),
            when(scope.any(&[Check::EgressDns]), self.endpoints()),
            when(scope.any(&[Check::HeartbeatPort]) && self.needs_heartbeat().is_ok(), self.heartbeat()),
            when(scope.any(&[Check::ListeningPorts]), self.holders(&account)),
            aside("the look for what keeps the clock", move || Ok(files::clock_keeper(&for_clock))),
            aside("the look at the clock source", move || files::word(&source)),
            aside("the look at the limit of descriptors", move || account::descriptors(&limits, patient)),
            aside("the look at the disk", move || files::disk(&state_dir, user.as_ref())),
        );
        let clock = clock(keeper, metadata.as_ref(), images.as_ref());
        Seen {
            account,
            inventory,
            sockets,
            logs,
            bus,
            metadata,
            images,
            endpoints,
            heartbeat,
            ports,
            clock,
            clock_source,
            descriptors,
            disk,
        }
    }

    fn judge(&self, seen: &Seen) -> Vec<Finding> {
        let mut findings = Vec::new();
        let rights = self.rights();
        if let Some(inventory) = &seen.inventory {
            self.judge_nitro(inventory, seen, &mut findings);
        }
        match (&seen.heartbeat, self.needs_heartbeat()) {
            (_, Err(why)) => findings.push(Finding::not_needed(Check::HeartbeatPort, why)),
            (Some(heartbeat), Ok(())) => findings.push(nitro::heartbeat_port(heartbeat)),
            (None, Ok(())) => {}
        }
        if let Some((bus, polkit)) = &seen.bus {
            findings.push(rights::bus(bus, &rights));
            findings.push(rights::polkit(polkit, &rights));
        }
        if let Some(images) = &seen.images {
            let has_credentials = matches!(&images.credentials, None | Some(Known(Ok(_))));
            findings.extend(seen.metadata.as_ref().map(|metadata| cloud::metadata(metadata, !has_credentials)));
            findings.push(cloud::role_credentials(images.credentials.as_ref()));
            let seen: Vec<ImageSeen> = images.seen.iter().map(|(_, seen)| seen.clone()).collect();
            findings.extend(cloud::images(&seen));
        }
        let to_fetch = |(_, image): &(ImageRequest, ImageSeen)| match &image.size {
            Known(Ok(size)) if !image.cached => *size,
            _ => 0,
        };
        let image_bytes = seen.images.iter().flat_map(|images| &images.seen).map(to_fetch).fold(0, u64::saturating_add);
        findings.push(system::disk(&seen.disk, image_bytes));
        match &seen.endpoints {
            Some(Known(endpoints)) => {
                let own = enclaved_proxy::own_addresses();
                let own = observed(own.map_err(|error| Failure::from_error(&error)));
                findings.extend(judge_network::egress_dns(endpoints, &own));
            }
            Some(Unknown(failure)) => findings.push(Finding::unknown(Check::EgressDns, failure)),
            None => {}
        }
        if let Some(holders) = &seen.ports {
            let of = |(number, (what, address)): (usize, (String, SocketAddr))| {
                let holder = match holders {
                    Known(holders) => Known(holders.get(number).cloned().unwrap_or(Holder::Nobody)),
                    Unknown(failure) => Unknown(failure.clone()),
                };
                ListenSeen { what, address, holder }
            };
            let ports: Vec<_> = self.listens().into_iter().enumerate().map(of).collect();
            // A proxy of its own unit has rights of its own, which the daemon's say nothing of.
            let low = match self.config.host.supervisor {
                SupervisorKind::Direct => network::low_ports(&self.places.roots, self.patient),
                SupervisorKind::Systemd => network::low_ports(&self.places.roots, Patient::NotRunning),
            };
            findings.extend(judge_network::listening_ports(&ports, low));
        }
        findings.push(system::clock_source(&seen.clock_source));
        findings.push(system::clock_drift(&seen.clock));
        findings.push(system::file_descriptors(&seen.descriptors));
        findings
    }

    /// Driver, device, nitro-cli and what is set aside.
    fn judge_nitro(&self, inventory: &Observation<Inventory>, seen: &Seen, findings: &mut Vec<Finding>) {
        let inventory = match inventory {
            Known(inventory) => inventory,
            Unknown(failure) => return findings.extend(NITRO.map(|check| Finding::unknown(check, failure))),
        };
        match self.uses_driver() {
            Ok(()) => findings.extend([
                nitro::driver(inventory),
                nitro::device(inventory),
                nitro::device_group(inventory, &seen.account),
                nitro::sockets_folder(&seen.sockets, &seen.account),
                nitro::log_folder(&seen.logs, &seen.account),
            ]),
            Err(why) => findings.extend(DRIVER.map(|check| Finding::not_needed(check, why))),
        }
        let wanted = self.wanted(seen.images.as_ref());
        findings.extend([
            nitro::nitro_cli(inventory),
            pool::sizing(inventory, &wanted),
            pool::cpu_pool(inventory, &wanted),
            pool::hugepages(inventory, &wanted),
            pool::allocator_service(inventory, &wanted),
        ]);
    }

    fn wanted(&self, images: Option<&Images>) -> Wanted {
        let size = |request: &ImageRequest| {
            let seen = &images?.seen.iter().find(|(of, _)| of == request)?.1;
            seen.size.known()?.as_ref().ok().copied()
        };
        let enclaves = self.config.desired.enclaves.iter();
        Wanted {
            demands: enclaves.map(|(name, spec)| Demand::of(name, spec, size(&spec.image))).collect(),
            reserve: (&self.config.desired.host).into(),
            by: match self.config.desired.host.allocator {
                AllocatorMode::Manage => SetAsideBy::Enclaved,
                AllocatorMode::Verify => SetAsideBy::Administrator,
                AllocatorMode::External => SetAsideBy::Others,
            },
        }
    }

    /// What the daemon has to be allowed by polkit: nothing, unless systemd runs its enclaves or its allocator.
    fn rights(&self) -> Vec<Right> {
        let mut rights = match self.config.host.supervisor {
            SupervisorKind::Direct => Vec::new(),
            SupervisorKind::Systemd => vec![
                Right { verb: "start", unit: "enclave@doctor-1.service" },
                Right { verb: "stop", unit: "enclave@doctor-1.service" },
                Right { verb: "start", unit: "enclaved-proxy.service" },
            ],
        };
        if self.config.desired.host.allocator == AllocatorMode::Manage {
            rights.push(Right { verb: "start", unit: crate::allocate::ALLOCATE_UNIT });
        }
        rights
    }

    /// Whether enclaves are the driver's; if not, why.
    fn uses_driver(&self) -> Result<(), &'static str> {
        match self.config.desired.vsock {
            VsockTransport::AfVsock => Ok(()),
            VsockTransport::Hybrid(_) => Err("enclaves are no Nitro enclaves here (transport = { hybrid = … })"),
        }
    }

    fn needs_heartbeat(&self) -> Result<(), &'static str> {
        self.uses_driver()?;
        if self.config.desired.enclaves.is_empty() { Err("no enclave is configured") } else { Ok(()) }
    }

    async fn account(&self) -> Observation<Account> {
        let (roots, patient) = (self.places.roots.clone(), self.patient);
        aside("the look for the daemon's user", move || account::account(&roots, patient)).await
    }

    async fn inventory(&self) -> Inventory {
        HostInventory::new(self.places.roots.clone(), &self.config.nitro_cli).read().await
    }

    async fn bus(&self, account: &Observation<Account>) -> (Observation<BusSeen>, Observation<PolkitSeen>) {
        let rights = self.rights();
        if rights.is_empty() {
            let nobody = || Failure::new("not asked");
            return (Unknown(nobody()), Unknown(nobody()));
        }
        let connection = async {
            match &self.places.bus {
                BusAddress::System => bus::system().await,
                BusAddress::At(address) => zbus::connection::Builder::address(address.as_str()).build().await,
            }
        };
        let look = bus::look(connection, self.patient, account, &rights, &self.places.roots);
        match within("the look at systemd and polkit", LOCAL, look).await {
            Known((systemd, polkit)) => (Known(systemd), polkit),
            Unknown(failure) => (Unknown(failure.clone()), Unknown(failure)),
        }
    }

    async fn images(&self, account: &Observation<Account>) -> Images {
        let requests: BTreeSet<&ImageRequest> = self.config.desired.enclaves.values().map(|spec| &spec.image).collect();
        let is_s3 = |request: &&ImageRequest| matches!(request.source, ImageSource::S3 { .. });
        let credentials = match requests.iter().copied().any(|request| is_s3(&request)) {
            true => Some(within("the look for credentials", AFAR, self.glance.credentials()).await),
            false => None,
        };
        let images_dir = self.config.host.state_dir.join("images");
        let looks = requests.into_iter().map(|request| {
            let (credentials, images_dir) = (&credentials, images_dir.clone());
            async move { (request.clone(), self.image(request, credentials.as_ref(), account, images_dir).await) }
        });
        let seen = futures_util::future::join_all(looks).await;
        Images { credentials, seen, apart_from_s3: self.glance.apart_from_s3() }
    }

    async fn image(
        &self,
        request: &ImageRequest,
        credentials: Option<&Observation<Result<String, Failure>>>,
        account: &Observation<Account>,
        images_dir: PathBuf,
    ) -> ImageSeen {
        let size = async {
            match (&request.source, credentials) {
                (ImageSource::S3 { .. }, Some(Known(Err(_)))) => {
                    let failure = Failure::new("without credentials S3 is not asked");
                    Known(Err(failure.with_remedy("see the check role_credentials")))
                }
                (ImageSource::S3 { .. }, Some(Unknown(failure))) => Unknown(failure.clone()),
                (source, _) => within("the look at the image", AFAR, self.glance.size(source)).await,
            }
        };
        let of = request.clone();
        let cached = aside("the look at the cache", move || Ok(image_store::is_cached(&images_dir, &of)));
        let (size, cached) = tokio::join!(size, cached);
        // What root can read the daemon may not be able to.
        let kept_from = match (&request.source, account) {
            (ImageSource::File(path), Known(account)) if !account.is_this_process && matches!(size, Known(Ok(_))) => {
                let path = PathBuf::from(path);
                let seen = aside("the look at the image's folder", move || files::path_seen(&path)).await;
                seen.known().and_then(|seen| account.kept_from(seen, READ))
            }
            _ => None,
        };
        let cached = cached.known().copied().unwrap_or(false);
        ImageSeen { source: request.source.to_string(), size, cached, kept_from }
    }

    async fn endpoints(&self) -> Observation<Vec<EndpointSeen>> {
        within("looking up the endpoints", QUESTIONS, network::endpoints(&self.config.desired, network::by_the_system))
            .await
    }

    async fn heartbeat(&self) -> Observation<nitro::HeartbeatSeen> {
        let (run_dir, roots, vsock) = (self.config.host.run_dir.clone(), self.places.roots.clone(), self.places.vsock);
        aside("the look at vsock port 9000", move || heartbeat::look(&run_dir, &roots, vsock)).await
    }

    /// All addresses that are listened on, and for what.
    fn listens(&self) -> Vec<(String, SocketAddr)> {
        let desired = &self.config.desired;
        let mut all = vec![("metrics".to_owned(), self.config.metrics.listen)];
        all.extend(desired.https.as_ref().map(|https| ("HTTPS".to_owned(), https.listen)));
        for (name, spec) in &desired.enclaves {
            all.extend(spec.ingress.tcp.iter().map(|port| (format!("enclave {name}"), port.listen)));
        }
        all
    }

    async fn holders(&self, account: &Observation<Account>) -> Observation<Vec<Holder>> {
        let roots = self.places.roots.clone();
        let daemon = account.known().map(|account| account.uid);
        let addresses: Vec<SocketAddr> = self.listens().into_iter().map(|(_, address)| address).collect();
        aside("the look at ports", move || {
            let own = network::own_users(&roots, daemon);
            network::holders(&roots, &addresses, &own)
        })
        .await
    }
}

/// Checks that the driver is behind.
const DRIVER: [Check; 5] = [Check::Driver, Check::Device, Check::DeviceGroup, Check::SocketsFolder, Check::LogFolder];
/// Checks that are judged by the inventory.
const NITRO: [Check; 10] = [
    Check::Driver,
    Check::Device,
    Check::DeviceGroup,
    Check::SocketsFolder,
    Check::LogFolder,
    Check::NitroCli,
    Check::Sizing,
    Check::CpuPool,
    Check::Hugepages,
    Check::AllocatorService,
];
/// Checks for which AWS is asked: who it is, what the images are, what time it is.
const CLOUD: [Check; 6] =
    [Check::Metadata, Check::RoleCredentials, Check::Image, Check::Sizing, Check::ClockDrift, Check::Disk];

fn clock(
    keeper: Observation<Option<String>>,
    metadata: Option<&Observation<MetadataSeen>>,
    images: Option<&Images>,
) -> Observation<ClockSeen> {
    let mut seen = ClockSeen { kept_by: keeper.known().cloned().flatten(), apart: Vec::new() };
    if let Some(Known(MetadataSeen::Answers { apart: Some(apart), .. })) = metadata {
        seen.apart.push(("the metadata service".to_owned(), *apart));
    }
    seen.apart.extend(images.and_then(|images| images.apart_from_s3).map(|apart| ("S3".to_owned(), apart)));
    Known(seen)
}

/// Boxed: together these looks are a type too large for the compiler.
type Looking<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

fn when<'a, T: Send + 'a>(wanted: bool, look: impl Future<Output = T> + Send + 'a) -> Looking<'a, Option<T>> {
    Box::pin(async move { if wanted { Some(look.await) } else { None } })
}

/// What came of it in time.
async fn within<T>(what: &str, limit: Duration, look: impl Future<Output = T>) -> Observation<T> {
    match timeout(limit, look).await {
        Ok(seen) => Known(seen),
        Err(_) => Unknown(Failure::new(format!("{what} did not end within {} s", limit.as_secs()))),
    }
}

/// What came of it in time, on a thread of its own: what hangs there (a dead disk) hangs by itself.
async fn aside<T: Send + 'static>(
    what: &str,
    look: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Observation<T> {
    match within(what, FILES, tokio::task::spawn_blocking(look)).await {
        Known(Ok(seen)) => observed(seen),
        Known(Err(error)) => Unknown(Failure::new(format!("{what} was cut off: {error}"))),
        Unknown(failure) => Unknown(failure),
    }
}

fn observed<T>(result: Result<T, Failure>) -> Observation<T> {
    match result {
        Ok(value) => Known(value),
        Err(failure) => Unknown(failure),
    }
}
