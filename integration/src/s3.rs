//! An S3 server: s3s's SigV4 and wire format in front of a folder of objects, accepting the role's credentials as the
//! metadata service hands them out, with faults and moments in between, and a record of who asked for what.
//!
//! The role may read objects and nothing else, as on a real deployment: an object that is not there is therefore a 403
//! to it, unless it is also allowed to list. The owner, who puts the images there, may do everything.
//!
//! | file | what |
//! |---|---|
//! | `objects` | versions, ETags, checksums, conditions, ranges |
//! | `gate` | signatures, credentials, rights, regions |
//! | `faults` | which fault meets which request, what happens at which moment |
//! | `outgoing` | an answer's body on its way |

mod faults;
mod gate;
mod objects;
mod outgoing;

use crate::http::{Body, BreakOff, Failed, Server};
use crate::imds::{RoleCredentials, unique};
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, SharedCredentialsProvider};
use aws_sdk_s3::primitives::ByteStream;
use faults::Plans;
pub use faults::{Asked, Moment, S3Fault, Span};
pub use gate::{Elsewhere, Right};
use gate::{Gate, elsewhere, refusal, scope};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::HeaderName;
use hyper::{Method, Request, Response, StatusCode, header};
pub use objects::{Algorithm, Contents, Put, Stored};
use objects::{Objects, Service, WholeBody};
use outgoing::{Outgoing, Rate};
use s3s::service::{S3Service, S3ServiceBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// How many requests are kept on record.
const MAX_RECORD: usize = 10_000;

/// A request that was signed with credentials that are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authenticated {
    /// Whose.
    pub access_key_id: String,
    /// `GetObject` and the like.
    pub operation: String,
    /// The bucket, where it names one.
    pub bucket: Option<String>,
    /// The key, where it names one.
    pub key: Option<String>,
    /// When.
    pub at: SystemTime,
}

/// An answer, faults included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The method.
    pub method: String,
    /// The path: bucket and key.
    pub path: String,
    /// The Range header, where there was one.
    pub range: Option<String>,
    /// The If-Match header, where there was one.
    pub if_match: Option<String>,
    /// With whose key it was signed.
    pub access_key_id: Option<String>,
    /// The status that was sent.
    pub status: u16,
    /// How many bytes of its body have been handed to the connection by now.
    pub sent: u64,
}

#[derive(Debug)]
struct Shared {
    objects: Arc<Objects>,
    role: RoleCredentials,
    owner: Credentials,
    plans: Plans,
    rights: Mutex<BTreeSet<Right>>,
    regions: Mutex<BTreeMap<String, (String, Elsewhere)>>,
    rate: Rate,
    /// Requests of others than the owner that read; those of them that are ranged GETs.
    counts: Mutex<(u64, u64)>,
    /// Answers on their way, and the most that there were at once.
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
    asked: Mutex<Vec<Asked>>,
    authenticated: Mutex<Vec<Authenticated>>,
    answered: Mutex<Vec<(Answered, Arc<AtomicU64>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A record is as good after a panic as before it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn push<T>(record: &Mutex<Vec<T>>, entry: T) {
    let mut record = lock(record);
    if record.len() < MAX_RECORD {
        record.push(entry);
    }
}

/// Everything about a server that can be changed while it runs, and at a given moment.
#[derive(Debug, Clone)]
pub struct Controls(Arc<Shared>);

impl Controls {
    /// Puts an object there, or replaces it, making the bucket if need be.
    ///
    /// # Errors
    /// When the file can't be written or read.
    pub fn put(&self, bucket: &str, key: &str, contents: impl Into<Contents>, stored: Stored) -> io::Result<Put> {
        self.0.objects.put(bucket, key, &contents.into(), stored)
    }

    /// Removes an object.
    pub fn remove(&self, bucket: &str, key: &str) {
        self.0.objects.remove(bucket, key);
    }

    /// From now on, what is replaced in this bucket stays readable by its version's ID.
    pub fn keep_versions(&self, bucket: &str) {
        self.0.objects.keep_versions(bucket);
    }

    /// What the role may do; at first it may get objects.
    pub fn set_rights(&self, rights: impl IntoIterator<Item = Right>) {
        *lock(&self.0.rights) = rights.into_iter().collect();
    }

    /// The bucket is in that region, and what is signed for another is answered like this. (At first, a bucket is in every
    /// region.)
    pub fn set_region(&self, bucket: &str, region: &str, how: Elsewhere) {
        lock(&self.0.regions).insert(bucket.to_owned(), (region.to_owned(), how));
    }

    /// All answers together come at this rate.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        self.0.rate.set(bytes_per_second);
    }

    /// The credentials that the metadata service has handed out so far are refused from now on (ExpiredToken); it hands out
    /// new ones to who asks it again.
    pub fn expire_credentials(&self) {
        self.0.role.expire();
    }

    /// Switches a fault on, for so many reading requests or, with none, for all that follow. Of several that apply, the one
    /// that was switched on first happens.
    pub fn add_fault(&self, fault: S3Fault, times: Option<u32>) {
        self.0.plans.add_fault(fault, times, Box::new(|_| true));
    }

    /// The same for those requests alone to which this applies.
    pub fn add_fault_when(
        &self,
        fault: S3Fault,
        times: Option<u32>,
        applies: impl Fn(&Asked) -> bool + Send + 'static,
    ) {
        self.0.plans.add_fault(fault, times, Box::new(applies));
    }

    /// Switches a fault on for one ranged GET, counted from 1 since the start.
    pub fn add_fault_at_range(&self, fault: S3Fault, nth: u64) {
        self.add_fault_when(fault, Some(1), move |asked| asked.nth_range == Some(nth));
    }

    /// Switches all faults off.
    pub fn clear_faults(&self) {
        self.0.plans.clear_faults();
    }

    /// Does this at that moment, once.
    pub fn at(&self, moment: Moment, action: impl FnOnce(&Self) + Send + 'static) {
        self.0.plans.at(moment, Box::new(action));
    }

    /// The reading requests of others than the owner, also those that were refused or are still waiting.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.0.asked).clone()
    }

    /// The authenticated requests of others than the owner.
    pub fn authenticated(&self) -> Vec<Authenticated> {
        let all = lock(&self.0.authenticated).clone();
        all.into_iter().filter(|request| request.access_key_id != self.0.owner.access_key_id()).collect()
    }

    /// All answers, the owner's requests included.
    pub fn answered(&self) -> Vec<Answered> {
        let answered = lock(&self.0.answered);
        let now = |(answer, sent): &(Answered, Arc<AtomicU64>)| Answered {
            sent: sent.load(Ordering::Relaxed),
            ..answer.clone()
        };
        answered.iter().map(now).collect()
    }

    /// The most answers that were on their way at once.
    pub fn most_at_once(&self) -> usize {
        self.0.most_under_way.load(Ordering::Relaxed)
    }

    fn happen(&self, is_now: impl Fn(Moment) -> bool) {
        for action in self.0.plans.due(is_now) {
            action(self);
        }
    }

    fn next_within(&self, range: u64) -> Option<u64> {
        self.0.plans.next_within(range)
    }

    fn rate(&self) -> &Rate {
        &self.0.rate
    }

    fn begin_answer(&self) {
        let now = self.0.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.most_under_way.fetch_max(now, Ordering::Relaxed);
    }

    fn end_answer(&self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The running server.
#[derive(Debug)]
pub struct S3 {
    server: Server,
    controls: Controls,
}

impl S3 {
    /// Starts it over a folder, on a free port of the loopback interface.
    ///
    /// # Errors
    /// When the folder can't be used or no port can be bound.
    pub async fn start(folder: &Path, role: RoleCredentials) -> io::Result<Self> {
        let objects = Arc::new(Objects::new(folder)?);
        let shared = Arc::new(Shared {
            objects: Arc::clone(&objects),
            role,
            owner: Credentials::new(format!("AKIA{}", unique(16)), unique(40), None, None, "owner"),
            plans: Plans::default(),
            rights: Mutex::new(BTreeSet::from([Right::GetObject])),
            regions: Mutex::default(),
            rate: Rate::default(),
            counts: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
            asked: Mutex::default(),
            authenticated: Mutex::default(),
            answered: Mutex::default(),
        });
        let mut builder = S3ServiceBuilder::new(Service(objects));
        builder.set_auth(Gate(Arc::clone(&shared)));
        builder.set_access(Gate(Arc::clone(&shared)));
        let service = builder.build();
        let controls = Controls(shared);
        let of_handler = controls.clone();
        let server = Server::start(move |request| respond(of_handler.clone(), service.clone(), request)).await?;
        Ok(Self { server, controls })
    }

    /// What `AWS_ENDPOINT_URL_S3` is to be.
    pub fn endpoint(&self) -> String {
        self.server.url()
    }

    /// What can be changed while it runs.
    pub fn controls(&self) -> &Controls {
        &self.controls
    }

    /// Puts an object there as its owner, through S3's own interface, making the bucket if it is not there.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn put(&self, bucket: &str, key: &str, contents: impl Into<ByteStream>) -> anyhow::Result<()> {
        let client = self.owner();
        if client.head_bucket().bucket(bucket).send().await.is_err() {
            client.create_bucket().bucket(bucket).send().await?;
        }
        client.put_object().bucket(bucket).key(key).body(contents.into()).send().await?;
        Ok(())
    }

    /// A client of this server that may do everything.
    pub fn owner(&self) -> aws_sdk_s3::Client {
        self.client(SharedCredentialsProvider::new(self.controls.0.owner.clone()))
    }

    /// A client of this server.
    pub fn client(&self, credentials: SharedCredentialsProvider) -> aws_sdk_s3::Client {
        let config = aws_sdk_s3::config::Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(self.endpoint())
            .credentials_provider(credentials)
            .build();
        aws_sdk_s3::Client::from_conf(config)
    }

    /// See [`Controls::add_fault`].
    pub fn add_fault(&self, fault: S3Fault, times: Option<u32>) {
        self.controls.add_fault(fault, times);
    }

    /// See [`Controls::clear_faults`].
    pub fn clear_faults(&self) {
        self.controls.clear_faults();
    }

    /// See [`Controls::authenticated`].
    pub fn authenticated(&self) -> Vec<Authenticated> {
        self.controls.authenticated()
    }

    /// See [`Controls::answered`].
    pub fn answered(&self) -> Vec<Answered> {
        self.controls.answered()
    }
}

/// A request as it came, as far as the layer in front of s3s reads it.
struct Came {
    method: Method,
    path: String,
    range: Option<String>,
    if_match: Option<String>,
    access_key_id: Option<String>,
    region: Option<String>,
    version: Option<String>,
}

impl Came {
    fn of(request: &Request<Incoming>) -> Self {
        let text = |name: HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
        let query = request.uri().query();
        let version = query.and_then(|query| query.split('&').find_map(|field| field.strip_prefix("versionId=")));
        let (access_key_id, region) =
            scope(text(header::AUTHORIZATION), query).map(|scope| (scope.access_key_id, scope.region)).unzip();
        Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            range: text(header::RANGE).map(str::to_owned),
            if_match: text(header::IF_MATCH).map(str::to_owned),
            access_key_id,
            region,
            version: version.map(str::to_owned),
        }
    }

    fn bucket_and_key(&self) -> (&str, &str) {
        let path = self.path.trim_start_matches('/');
        path.split_once('/').unwrap_or((path, ""))
    }
}

impl Controls {
    /// Counts a reading request of another than the owner, and puts it on record.
    fn count(&self, came: &Came) -> Option<Asked> {
        let is_owner = came.access_key_id.as_deref() == Some(self.0.owner.access_key_id());
        if is_owner || !matches!(came.method, Method::GET | Method::HEAD) {
            return None;
        }
        let is_range = came.method == Method::GET && came.range.is_some();
        let (nth, ranges) = {
            let mut counts = lock(&self.0.counts);
            counts.0 += 1;
            counts.1 += u64::from(is_range);
            *counts
        };
        let (bucket, key) = came.bucket_and_key();
        let asked = Asked {
            method: came.method.to_string(),
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            nth,
            nth_range: is_range.then_some(ranges),
            range: came.range.as_deref().and_then(Span::of),
            if_match: came.if_match.clone(),
            version: came.version.clone(),
            access_key_id: came.access_key_id.clone(),
        };
        push(&self.0.asked, asked.clone());
        Some(asked)
    }

    /// The refusal of a request that was signed for another region than its bucket's.
    fn elsewhere(&self, came: &Came) -> Option<Response<Body>> {
        let (bucket, _) = came.bucket_and_key();
        let (home, how) = lock(&self.0.regions).get(bucket)?.clone();
        let asked = came.region.as_ref().filter(|asked| **asked != home)?;
        Some(elsewhere(bucket, &home, asked, how))
    }
}

async fn respond(
    controls: Controls,
    service: S3Service,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, BreakOff> {
    let came = Came::of(&request);
    let asked = controls.count(&came);
    if let Some(asked) = &asked {
        let nth = asked.nth;
        controls.happen(|moment| moment == Moment::Asked(nth));
    }
    let fault = asked.as_ref().and_then(|asked| controls.0.plans.fault(asked));
    let response = match fault {
        Some(S3Fault::Hang) => std::future::pending().await,
        Some(S3Fault::Forbidden) => refusal(StatusCode::FORBIDDEN, "AccessDenied", "Access Denied", ""),
        Some(S3Fault::NotFound) => refusal(StatusCode::NOT_FOUND, "NoSuchKey", "The specified key does not exist.", ""),
        Some(S3Fault::Internal) => refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalError",
            "We encountered an internal error. Please try again.",
            "",
        ),
        Some(S3Fault::Unavailable) => {
            refusal(StatusCode::SERVICE_UNAVAILABLE, "SlowDown", "Please reduce your request rate.", "")
        }
        fault => match asked.as_ref().and_then(|_| controls.elsewhere(&came)) {
            Some(elsewhere) => elsewhere,
            None => {
                if fault == Some(S3Fault::WholeBody) {
                    request.extensions_mut().insert(WholeBody);
                }
                let response = service.call(request.map(s3s::Body::from)).await.map_err(|_| BreakOff)?;
                let response = response.map(|body| body.map_err(|error| -> Failed { error }).boxed());
                controls.as_s3_answers(response, asked.as_ref())
            }
        },
    };
    let sent = Arc::new(AtomicU64::new(0));
    let answer = Answered {
        method: came.method.to_string(),
        path: came.path,
        range: came.range,
        if_match: came.if_match,
        access_key_id: came.access_key_id,
        status: response.status().as_u16(),
        sent: 0,
    };
    push(&controls.0.answered, (answer, Arc::clone(&sent)));
    let fault = fault.filter(|_| response.status().is_success());
    let range = asked.and_then(|asked| asked.nth_range);
    Ok(response.map(|body| Outgoing::new(body, fault, controls, range, sent).boxed()))
}

impl Controls {
    /// What s3s leaves out: without the right to list, an object that is not there is forbidden; a HEAD of a range is a 206.
    fn as_s3_answers(&self, mut response: Response<Body>, asked: Option<&Asked>) -> Response<Body> {
        let may_list = lock(&self.0.rights).contains(&Right::ListBucket);
        if asked.is_some() && !may_list && response.status() == StatusCode::NOT_FOUND {
            return refusal(StatusCode::FORBIDDEN, "AccessDenied", "Access Denied", "");
        }
        if response.status() == StatusCode::OK && response.headers().contains_key(header::CONTENT_RANGE) {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        response
    }
}
