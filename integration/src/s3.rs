//! An S3 server: s3s-fs behind SigV4, accepting the role's credentials as the metadata service hands them out, with a
//! layer of faults in front and a record of who asked for what.
//!
//! The role may read objects and nothing else, as on a real deployment: an object that is not there is therefore a 403
//! to it, unless it is also allowed to list. The owner, who puts the images there, may do everything.

use crate::http::{Body, BreakOff, Failed, Server, full};
use crate::imds::{RoleCredentials, unique};
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, SharedCredentialsProvider};
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::{Method, Request, Response, StatusCode, header};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::path::S3Path;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Result, s3_error};
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, Sleep, sleep_until};

/// How many requests are kept on record.
const MAX_RECORD: usize = 10_000;
/// What the role may do.
const ROLE_MAY: [&str; 2] = ["GetObject", "HeadObject"];
/// The size of the pieces in which a slow answer comes.
const SLOW_PIECE: usize = 16 * 1024;

/// What can happen to a request that reads (GET or HEAD).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum S3Fault {
    /// 403 AccessDenied.
    Forbidden,
    /// 404 NoSuchKey.
    NotFound,
    /// 503 SlowDown.
    Unavailable,
    /// No answer, ever.
    Hang,
    /// The connection breaks off after so many bytes of the object.
    BreakOff {
        /// How many are sent.
        after: u64,
    },
    /// The object comes at about this rate.
    Slow {
        /// Bytes in a second.
        bytes_per_second: u64,
    },
    /// One byte of what is sent is another.
    Corrupt {
        /// Counted from the first that is sent.
        at: u64,
    },
}

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
    /// The status that was sent.
    pub status: u16,
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<VecDeque<(S3Fault, Option<u32>)>>,
    authenticated: Mutex<Vec<Authenticated>>,
    answered: Mutex<Vec<Answered>>,
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

/// The running server.
#[derive(Debug)]
pub struct S3 {
    server: Server,
    shared: Arc<Shared>,
    owner: Credentials,
}

impl S3 {
    /// Starts it over a folder, on a free port of the loopback interface.
    ///
    /// # Errors
    /// When the folder can't be used or no port can be bound.
    pub async fn start(folder: &Path, role: RoleCredentials) -> io::Result<Self> {
        let owner = Credentials::new(format!("AKIA{}", unique(16)), unique(40), None, None, "owner");
        let shared = Arc::new(Shared::default());
        let files = s3s_fs::FileSystem::new(folder).map_err(|error| io::Error::other(format!("{error:?}")))?;
        let mut builder = S3ServiceBuilder::new(files);
        let gate = Gate { role, owner: owner.clone(), shared: Arc::clone(&shared) };
        builder.set_auth(gate.clone());
        builder.set_access(gate);
        let service = builder.build();
        let of_handler = Arc::clone(&shared);
        let server = Server::start(move |request| respond(Arc::clone(&of_handler), service.clone(), request)).await?;
        Ok(Self { server, shared, owner })
    }

    /// What `AWS_ENDPOINT_URL_S3` is to be.
    pub fn endpoint(&self) -> String {
        self.server.url()
    }

    /// Puts an object there as its owner, making the bucket if it is not there.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn put(&self, bucket: &str, key: &str, contents: impl Into<ByteStream>) -> anyhow::Result<()> {
        let client = self.client(SharedCredentialsProvider::new(self.owner.clone()));
        if client.head_bucket().bucket(bucket).send().await.is_err() {
            client.create_bucket().bucket(bucket).send().await?;
        }
        client.put_object().bucket(bucket).key(key).body(contents.into()).send().await?;
        Ok(())
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

    /// Switches a fault on, for so many reading requests or, with none, for all that follow. Faults happen in the order
    /// in which they were switched on.
    pub fn add_fault(&self, fault: S3Fault, times: Option<u32>) {
        lock(&self.shared.faults).push_back((fault, times));
    }

    /// Switches all faults off.
    pub fn clear_faults(&self) {
        lock(&self.shared.faults).clear();
    }

    /// The authenticated requests of others than the owner.
    pub fn authenticated(&self) -> Vec<Authenticated> {
        let all = lock(&self.shared.authenticated).clone();
        all.into_iter().filter(|request| request.access_key_id != self.owner.access_key_id()).collect()
    }

    /// All answers, the owner's requests included.
    pub fn answered(&self) -> Vec<Answered> {
        lock(&self.shared.answered).clone()
    }
}

/// Who is let in, and to what.
#[derive(Clone)]
struct Gate {
    role: RoleCredentials,
    owner: Credentials,
    shared: Arc<Shared>,
}

#[async_trait::async_trait]
impl S3Auth for Gate {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key == self.owner.access_key_id() {
            return Ok(self.owner.secret_access_key().into());
        }
        let credentials = self.role.of(access_key).ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
        Ok(credentials.secret_access_key.into())
    }
}

#[async_trait::async_trait]
impl S3Access for Gate {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let access_key_id = match cx.credentials() {
            Some(credentials) => credentials.access_key.clone(),
            None => return Err(s3_error!(AccessDenied)),
        };
        let operation = cx.s3_op().name().to_owned();
        if access_key_id != self.owner.access_key_id() {
            let credentials = self.role.of(&access_key_id).ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
            let token = cx.headers().get("x-amz-security-token").map(|token| token.as_bytes());
            if token != Some(credentials.token.as_bytes()) {
                return Err(s3_error!(InvalidToken));
            }
            if credentials.expires < SystemTime::now() {
                return Err(s3_error!(ExpiredToken));
            }
        }
        let (bucket, key) = match cx.s3_path() {
            S3Path::Root => (None, None),
            S3Path::Bucket { bucket } => (Some(bucket.to_string()), None),
            S3Path::Object { bucket, key } => (Some(bucket.to_string()), Some(key.to_string())),
        };
        let is_owner = access_key_id == self.owner.access_key_id();
        let may = is_owner || ROLE_MAY.contains(&operation.as_str());
        push(
            &self.shared.authenticated,
            Authenticated { access_key_id, operation, bucket, key, at: SystemTime::now() },
        );
        if may { Ok(()) } else { Err(s3_error!(AccessDenied)) }
    }
}

fn refusal(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>\
         <RequestId>{}</RequestId></Error>",
        unique(16)
    );
    let mut response = Response::new(full(xml));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/xml"));
    response
}

fn next_fault(shared: &Shared) -> Option<S3Fault> {
    let mut faults = lock(&shared.faults);
    faults.retain(|(_, times)| *times != Some(0));
    let (fault, times) = faults.front_mut()?;
    if let Some(times) = times {
        *times -= 1;
    }
    Some(*fault)
}

async fn respond(
    shared: Arc<Shared>,
    service: S3Service,
    request: Request<Incoming>,
) -> Result<Response<Body>, BreakOff> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (range, if_match) = (text(header::RANGE), text(header::IF_MATCH));
    let is_owner = text(header::AUTHORIZATION).is_some_and(|authorization| authorization.contains("Credential=AKIA"));
    let reads = matches!(method, Method::GET | Method::HEAD) && !is_owner;
    let response = match if reads { next_fault(&shared) } else { None } {
        Some(S3Fault::Hang) => std::future::pending().await,
        Some(S3Fault::Forbidden) => refusal(StatusCode::FORBIDDEN, "AccessDenied", "Access Denied"),
        Some(S3Fault::NotFound) => refusal(StatusCode::NOT_FOUND, "NoSuchKey", "The specified key does not exist."),
        Some(S3Fault::Unavailable) => {
            refusal(StatusCode::SERVICE_UNAVAILABLE, "SlowDown", "Please reduce your request rate.")
        }
        fault => {
            let response = service.call(request.map(s3s::Body::from)).await.map_err(|_| BreakOff)?;
            let response = response.map(|body| body.map_err(|error| -> Failed { error }).boxed());
            let response = as_the_role_sees_it(response, reads, if_match.as_deref());
            response.map(|body| damage(body, fault))
        }
    };
    let status = response.status().as_u16();
    push(&shared.answered, Answered { method: method.to_string(), path, range, status });
    Ok(response)
}

/// What s3s-fs leaves out: without the right to list, an object that is not there is forbidden; If-Match is honoured.
fn as_the_role_sees_it(response: Response<Body>, reads: bool, if_match: Option<&str>) -> Response<Body> {
    if reads && response.status() == StatusCode::NOT_FOUND {
        return refusal(StatusCode::FORBIDDEN, "AccessDenied", "Access Denied");
    }
    let tag = response.headers().get(header::ETAG).and_then(|tag| tag.to_str().ok());
    match (if_match, tag) {
        (Some(wanted), Some(tag)) if response.status().is_success() && wanted != "*" && wanted != tag => refusal(
            StatusCode::PRECONDITION_FAILED,
            "PreconditionFailed",
            "At least one of the pre-conditions you specified did not hold",
        ),
        _ => response,
    }
}

fn damage(body: Body, fault: Option<S3Fault>) -> Body {
    match fault {
        Some(fault @ (S3Fault::BreakOff { .. } | S3Fault::Slow { .. } | S3Fault::Corrupt { .. })) => {
            Damaged { body, fault, sent: 0, began: None, pause: None, rest: Bytes::new() }.boxed()
        }
        _ => body,
    }
}

/// A body to which something happens on its way.
struct Damaged {
    body: Body,
    fault: S3Fault,
    sent: u64,
    /// When the first piece was sent.
    began: Option<Instant>,
    pause: Option<Pin<Box<Sleep>>>,
    rest: Bytes,
}

impl Damaged {
    fn piece(&mut self) -> Result<Bytes, Failed> {
        let piece = match self.fault {
            S3Fault::BreakOff { after } => {
                let left = after.saturating_sub(self.sent);
                if left == 0 {
                    return Err(Box::new(BreakOff));
                }
                let count = usize::try_from(left).unwrap_or(usize::MAX).min(self.rest.len());
                self.rest.split_to(count)
            }
            S3Fault::Slow { bytes_per_second } => {
                let piece = self.rest.split_to(self.rest.len().min(SLOW_PIECE));
                // By what was sent in all, so that timers that are late by a millisecond do not add up.
                let micros = (self.sent + piece.len() as u64).saturating_mul(1_000_000) / bytes_per_second.max(1);
                let began = *self.began.get_or_insert_with(Instant::now);
                self.pause = Some(Box::pin(sleep_until(began + Duration::from_micros(micros))));
                piece
            }
            S3Fault::Corrupt { at } => {
                let piece = std::mem::take(&mut self.rest);
                match at.checked_sub(self.sent).and_then(|at| usize::try_from(at).ok()).filter(|at| *at < piece.len()) {
                    Some(at) => {
                        let mut changed = piece.to_vec();
                        changed[at] ^= 0xff;
                        changed.into()
                    }
                    None => piece,
                }
            }
            _ => std::mem::take(&mut self.rest),
        };
        self.sent += piece.len() as u64;
        Ok(piece)
    }
}

impl hyper::body::Body for Damaged {
    type Data = Bytes;
    type Error = Failed;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failed>>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
            }
        }
        Poll::Ready(Some(self.piece().map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        // The announced length stays: the peer is to notice.
        self.body.size_hint()
    }
}
