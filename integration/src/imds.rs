//! The instance metadata service: IMDSv2 only, with the role's expiring credentials, and faults that can be switched on.

use crate::http::{Body, BreakOff, Server, full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::json;
use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
/// The longest that a token may live, in seconds.
const MAX_TTL: u64 = 21_600;
/// How many requests are kept on record.
const MAX_RECORD: usize = 10_000;

/// Hexadecimal digits that nobody else has.
pub(crate) fn unique(digits: usize) -> String {
    let mut text = String::new();
    while text.len() < digits {
        text.push_str(&format!("{:016X}", RandomState::new().build_hasher().finish()));
    }
    text.truncate(digits);
    text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A record is as good after a panic as before it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// `i-...`
    pub id: String,
    /// `m5.xlarge` and the like.
    pub instance_type: String,
    /// `us-east-1` and the like.
    pub region: String,
    /// `us-east-1a` and the like.
    pub availability_zone: String,
    /// `ami-...`
    pub ami_id: String,
    /// Twelve digits.
    pub account_id: String,
    /// The address within the VPC.
    pub private_ip: String,
    /// The tags, where the instance shows them.
    pub tags: BTreeMap<String, String>,
    /// The name of the role, if the instance has one.
    pub role: Option<String>,
}

impl Instance {
    /// One as Caution's launch template makes it.
    pub fn sample() -> Self {
        Self {
            id: "i-0123456789abcdef0".to_owned(),
            instance_type: "m5.2xlarge".to_owned(),
            region: "us-east-1".to_owned(),
            availability_zone: "us-east-1a".to_owned(),
            ami_id: "ami-0123456789abcdef0".to_owned(),
            account_id: "123456789012".to_owned(),
            private_ip: "10.0.0.12".to_owned(),
            tags: BTreeMap::from([("caution:deployment-id".to_owned(), "d-0001".to_owned())]),
            role: Some("enclave-host".to_owned()),
        }
    }
}

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImdsFault {
    /// Every connection breaks off.
    Down,
    /// Requests for a token are never answered, as from a container beyond the hop limit.
    NoTokens,
    /// Every token is refused.
    Unauthorized,
    /// The instance has no role.
    NoRole,
    /// The role can't be assumed: `Code` is not `Success`.
    RoleRefused,
    /// Every answer takes this long.
    Slow(Duration),
    /// Credentials that are handed out have expired already.
    ExpiredCredentials,
}

/// Credentials of the role, and when they were handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandedOut {
    /// The access key's ID.
    pub access_key_id: String,
    /// The key that signs.
    pub secret_access_key: String,
    /// The session token that must go with it.
    pub token: String,
    /// Until when they are valid.
    pub expires: SystemTime,
    /// When they were made, which is when they were handed out first.
    pub since: SystemTime,
    /// How often they were handed out.
    pub times: u32,
}

/// The credentials handed out so far; shared with the servers that accept them.
#[derive(Debug, Clone)]
pub struct RoleCredentials(Arc<Mutex<Issuer>>);

#[derive(Debug)]
struct Issuer {
    lifetime: Duration,
    handed_out: Vec<HandedOut>,
    renew: bool,
}

impl RoleCredentials {
    fn new() -> Self {
        let lifetime = Duration::from_secs(6 * 3600);
        Self(Arc::new(Mutex::new(Issuer { lifetime, handed_out: Vec::new(), renew: false })))
    }

    /// All that were handed out, the oldest first.
    pub fn all(&self) -> Vec<HandedOut> {
        lock(&self.0).handed_out.clone()
    }

    /// Valid ones, as another service than this one hands them out to a container.
    pub fn for_container(&self) -> HandedOut {
        self.hand_out(false)
    }

    /// Those with this ID.
    pub fn of(&self, access_key_id: &str) -> Option<HandedOut> {
        lock(&self.0).handed_out.iter().find(|credentials| credentials.access_key_id == access_key_id).cloned()
    }

    /// How long the next ones will be valid.
    pub fn set_lifetime(&self, lifetime: Duration) {
        lock(&self.0).lifetime = lifetime;
    }

    /// The next request gets new ones; earlier ones stay valid until they expire.
    pub fn rotate(&self) {
        lock(&self.0).renew = true;
    }

    /// Those handed out so far end now, whatever was said of them: servers refuse them, and the next request gets new ones.
    pub fn expire(&self) {
        let now = SystemTime::now();
        for credentials in &mut lock(&self.0).handed_out {
            credentials.expires = credentials.expires.min(now);
        }
    }

    fn hand_out(&self, expired: bool) -> HandedOut {
        let now = SystemTime::now();
        let mut issuer = lock(&self.0);
        let lifetime = issuer.lifetime;
        let renew = std::mem::take(&mut issuer.renew) || expired;
        // As the real service: new ones well before the old ones end.
        if let Some(current) = issuer.handed_out.last_mut().filter(|last| !renew && now + lifetime / 2 < last.expires) {
            current.times += 1;
            return current.clone();
        }
        let fresh = HandedOut {
            access_key_id: format!("ASIA{}", unique(16)),
            secret_access_key: unique(40),
            token: format!("IQoJ{}", unique(120)),
            expires: if expired { now - Duration::from_secs(3600) } else { now + lifetime },
            since: now,
            times: 1,
        };
        issuer.handed_out.push(fresh.clone());
        fresh
    }
}

/// What the service has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImdsRecord {
    /// Paths of the answered requests, the oldest first.
    pub paths: Vec<String>,
    /// Tokens handed out.
    pub tokens: u64,
    /// Requests refused because they carried no token: IMDSv1.
    pub refused_v1: u64,
    /// Requests refused because their token was not, or no longer, valid.
    pub refused_tokens: u64,
}

#[derive(Debug)]
struct Shared {
    instance: Mutex<Instance>,
    credentials: RoleCredentials,
    tokens: Mutex<BTreeMap<String, Instant>>,
    record: Mutex<ImdsRecord>,
    fault: Mutex<Option<ImdsFault>>,
    lifecycle_state: Mutex<Option<String>>,
}

/// The running service.
#[derive(Debug)]
pub struct Imds {
    server: Server,
    shared: Arc<Shared>,
}

impl Imds {
    /// Starts it on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start(instance: Instance) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            instance: Mutex::new(instance),
            credentials: RoleCredentials::new(),
            tokens: Mutex::default(),
            record: Mutex::default(),
            fault: Mutex::default(),
            lifecycle_state: Mutex::default(),
        });
        let handler = Arc::clone(&shared);
        let server = Server::start(move |request| respond(Arc::clone(&handler), request)).await?;
        Ok(Self { server, shared })
    }

    /// What `AWS_EC2_METADATA_SERVICE_ENDPOINT` is to be.
    pub fn endpoint(&self) -> String {
        self.server.url()
    }

    /// The role's credentials.
    pub fn credentials(&self) -> RoleCredentials {
        self.shared.credentials.clone()
    }

    /// Switches a fault on, or all off.
    pub fn set_fault(&self, fault: Option<ImdsFault>) {
        *lock(&self.shared.fault) = fault;
    }

    /// Changes what the instance is (its tags, say).
    pub fn change(&self, change: impl FnOnce(&mut Instance)) {
        change(&mut lock(&self.shared.instance));
    }

    /// What `autoscaling/target-lifecycle-state` says; none is an instance outside of any group.
    pub fn set_lifecycle_state(&self, state: Option<&str>) {
        *lock(&self.shared.lifecycle_state) = state.map(str::to_owned);
    }

    /// What it has seen so far.
    pub fn record(&self) -> ImdsRecord {
        lock(&self.shared.record).clone()
    }
}

fn text(status: StatusCode, body: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(full(body.into()));
    *response.status_mut() = status;
    response
}

async fn respond(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, BreakOff> {
    let fault = *lock(&shared.fault);
    match fault {
        Some(ImdsFault::Down) => return Err(BreakOff),
        Some(ImdsFault::Slow(time)) => tokio::time::sleep(time).await,
        Some(ImdsFault::NoTokens) if request.method() == Method::PUT => std::future::pending().await,
        _ => {}
    }
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    if (request.method(), path.as_str()) == (&Method::PUT, "/latest/api/token") {
        if request.headers().contains_key("x-forwarded-for") {
            return Ok(text(StatusCode::FORBIDDEN, ""));
        }
        let ttl = header(TTL_HEADER).and_then(|ttl| ttl.parse().ok()).filter(|ttl| (1..=MAX_TTL).contains(ttl));
        let Some(ttl) = ttl else { return Ok(text(StatusCode::BAD_REQUEST, "")) };
        let token = format!("AQAAA{}==", unique(50));
        lock(&shared.tokens).insert(token.clone(), Instant::now() + Duration::from_secs(ttl));
        lock(&shared.record).tokens += 1;
        let mut response = text(StatusCode::OK, token);
        response.headers_mut().insert(TTL_HEADER, ttl.into());
        return Ok(response);
    }
    if request.method() != Method::GET {
        return Ok(text(StatusCode::METHOD_NOT_ALLOWED, ""));
    }
    let Some(token) = header(TOKEN_HEADER) else {
        lock(&shared.record).refused_v1 += 1;
        return Ok(text(StatusCode::UNAUTHORIZED, ""));
    };
    let valid = lock(&shared.tokens).get(token).is_some_and(|until| Instant::now() < *until);
    if !valid || fault == Some(ImdsFault::Unauthorized) {
        lock(&shared.record).refused_tokens += 1;
        return Ok(text(StatusCode::UNAUTHORIZED, ""));
    }
    {
        let mut record = lock(&shared.record);
        if record.paths.len() < MAX_RECORD {
            record.paths.push(path.clone());
        }
    }
    Ok(lookup(&shared, fault, &path).map_or_else(|| text(StatusCode::NOT_FOUND, ""), |body| text(StatusCode::OK, body)))
}

fn lookup(shared: &Shared, fault: Option<ImdsFault>, path: &str) -> Option<String> {
    const ROLE: &str = "/latest/meta-data/iam/security-credentials";
    let instance = lock(&shared.instance).clone();
    let role = instance.role.as_ref().filter(|_| fault != Some(ImdsFault::NoRole));
    if let Some(asked) = path.strip_prefix(ROLE) {
        let role = role?;
        return match asked.strip_prefix('/') {
            None => Some(role.clone()),
            Some(asked) if asked == role => Some(credentials(shared, fault)),
            Some(_) => None,
        };
    }
    if let Some(tag) = path.strip_prefix("/latest/meta-data/tags/instance") {
        return match tag.strip_prefix('/') {
            None => Some(instance.tags.keys().cloned().collect::<Vec<_>>().join("\n")),
            Some(tag) => instance.tags.get(tag).cloned(),
        };
    }
    match path {
        "/latest/dynamic/instance-identity/document" => Some(document(&instance)),
        "/latest/meta-data/instance-id" => Some(instance.id),
        "/latest/meta-data/instance-type" => Some(instance.instance_type),
        "/latest/meta-data/placement/region" => Some(instance.region),
        "/latest/meta-data/placement/availability-zone" => Some(instance.availability_zone),
        "/latest/meta-data/ami-id" => Some(instance.ami_id),
        "/latest/meta-data/local-ipv4" => Some(instance.private_ip),
        "/latest/meta-data/autoscaling/target-lifecycle-state" => lock(&shared.lifecycle_state).clone(),
        _ => None,
    }
}

fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

fn credentials(shared: &Shared, fault: Option<ImdsFault>) -> String {
    let now = timestamp(SystemTime::now());
    if fault == Some(ImdsFault::RoleRefused) {
        let refusal = json!({
            "Code": "AssumeRoleUnauthorizedAccess",
            "Message": "EC2 cannot assume the role. Please see documentation.",
            "LastUpdated": now,
        });
        return format!("{refusal:#}");
    }
    let credentials = shared.credentials.hand_out(fault == Some(ImdsFault::ExpiredCredentials));
    let answer = json!({
        "Code": "Success",
        "LastUpdated": timestamp(credentials.since),
        "Type": "AWS-HMAC",
        "AccessKeyId": credentials.access_key_id,
        "SecretAccessKey": credentials.secret_access_key,
        "Token": credentials.token,
        "Expiration": timestamp(credentials.expires),
    });
    format!("{answer:#}")
}

fn document(instance: &Instance) -> String {
    let document = json!({
        "accountId": instance.account_id,
        "architecture": "x86_64",
        "availabilityZone": instance.availability_zone,
        "billingProducts": null,
        "devpayProductCodes": null,
        "marketplaceProductCodes": null,
        "imageId": instance.ami_id,
        "instanceId": instance.id,
        "instanceType": instance.instance_type,
        "kernelId": null,
        "pendingTime": "2026-01-01T00:00:00Z",
        "privateIp": instance.private_ip,
        "ramdiskId": null,
        "region": instance.region,
        "version": "2017-09-30",
    });
    format!("{document:#}")
}
