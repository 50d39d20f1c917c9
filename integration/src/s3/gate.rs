//! Who is let in, and to what: SigV4 by s3s, the role's credentials as the metadata service hands them out, the role's
//! rights, and the region that a bucket is in.

use super::{Authenticated, Shared, lock, push};
use crate::http::{Body, full};
use crate::imds::unique;
use hyper::{Response, StatusCode, header};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::{GetObjectInput, HeadObjectInput};
use s3s::path::S3Path;
use s3s::{S3Request, S3Result, s3_error};
use std::sync::Arc;
use std::time::SystemTime;

/// What a policy can grant the role. (Nothing else is ever granted.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// `s3:GetObject`: the newest version.
    GetObject,
    /// `s3:GetObjectVersion`: any version, by its ID.
    GetObjectVersion,
    /// `s3:ListBucket`: to learn that an object is not there. (Lists themselves are not served.)
    ListBucket,
}

/// How S3 answers a request that was signed for another region than the bucket's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    /// 301 PermanentRedirect, as other regions answer.
    Moved,
    /// 400 AuthorizationHeaderMalformed, as us-east-1 and the bucket's own host answer.
    Malformed,
}

/// The gate of one server.
#[derive(Clone)]
pub(super) struct Gate(pub(super) Arc<Shared>);

impl Gate {
    fn may(&self, access_key_id: Option<&str>, right: Right) -> S3Result<()> {
        let is_owner = access_key_id == Some(self.0.owner.access_key_id());
        if is_owner || lock(&self.0.rights).contains(&right) { Ok(()) } else { Err(s3_error!(AccessDenied)) }
    }

    fn may_read<T>(&self, request: &S3Request<T>, version: Option<&String>) -> S3Result<()> {
        let right = if version.is_some() { Right::GetObjectVersion } else { Right::GetObject };
        self.may(request.credentials.as_ref().map(|credentials| credentials.access_key.as_str()), right)
    }
}

#[async_trait::async_trait]
impl S3Auth for Gate {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key == self.0.owner.access_key_id() {
            return Ok(self.0.owner.secret_access_key().into());
        }
        let credentials = self.0.role.of(access_key).ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
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
        let is_owner = access_key_id == self.0.owner.access_key_id();
        if !is_owner {
            let credentials = self.0.role.of(&access_key_id).ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
            // A presigned URL carries its token in the query; s3s leaves checking that one to the signature, which covers it.
            let token = cx.headers().get("x-amz-security-token").map(|token| token.as_bytes());
            let presigned = cx.uri().query().is_some_and(|query| query.contains("X-Amz-Security-Token="));
            if token != Some(credentials.token.as_bytes()) && !presigned {
                return Err(s3_error!(InvalidToken));
            }
            if credentials.expires <= SystemTime::now() {
                return Err(s3_error!(ExpiredToken, "The provided token has expired."));
            }
        }
        let (bucket, key) = match cx.s3_path() {
            S3Path::Root => (None, None),
            S3Path::Bucket { bucket } => (Some(bucket.to_string()), None),
            S3Path::Object { bucket, key } => (Some(bucket.to_string()), Some(key.to_string())),
        };
        // Which right reading needs depends on the version that is asked for: see below.
        let may = is_owner || matches!(operation.as_str(), "GetObject" | "HeadObject");
        push(&self.0.authenticated, Authenticated { access_key_id, operation, bucket, key, at: SystemTime::now() });
        if may { Ok(()) } else { Err(s3_error!(AccessDenied)) }
    }

    async fn get_object(&self, req: &mut S3Request<GetObjectInput>) -> S3Result<()> {
        self.may_read(req, req.input.version_id.as_ref())
    }

    async fn head_object(&self, req: &mut S3Request<HeadObjectInput>) -> S3Result<()> {
        self.may_read(req, req.input.version_id.as_ref())
    }
}

/// The credentials' scope of a signed request: `<access key>/<date>/<region>/s3/aws4_request`.
pub(super) fn scope(authorization: Option<&str>, query: Option<&str>) -> Option<Scope> {
    let (text, slash) = match authorization.and_then(|text| text.split("Credential=").nth(1)) {
        Some(text) => (text, "/"),
        None => (query?.split("X-Amz-Credential=").nth(1)?, "%2F"),
    };
    let text = text.split([',', '&', ' ']).next()?;
    let mut fields = text.split(slash);
    Some(Scope { access_key_id: fields.next()?.to_owned(), region: fields.nth(1)?.to_owned() })
}

/// What a signature was made for.
pub(super) struct Scope {
    pub(super) access_key_id: String,
    pub(super) region: String,
}

/// An answer that says no, as S3 writes it. `more` are further elements.
pub(super) fn refusal(status: StatusCode, code: &str, message: &str, more: &str) -> Response<Body> {
    let xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}\
         <RequestId>{}</RequestId></Error>",
        unique(16)
    );
    let mut response = Response::new(full(xml));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/xml"));
    response
}

/// The answer to a request that was signed for another region than the bucket's.
pub(super) fn elsewhere(bucket: &str, home: &str, asked: &str, how: Elsewhere) -> Response<Body> {
    let mut response = match how {
        Elsewhere::Moved => refusal(
            StatusCode::MOVED_PERMANENTLY,
            "PermanentRedirect",
            "The bucket you are attempting to access must be addressed using the specified endpoint. Please send all \
             future requests to this endpoint.",
            &format!("<Endpoint>{bucket}.s3.{home}.amazonaws.com</Endpoint><Bucket>{bucket}</Bucket>"),
        ),
        Elsewhere::Malformed => refusal(
            StatusCode::BAD_REQUEST,
            "AuthorizationHeaderMalformed",
            &format!("The authorization header is malformed; the region '{asked}' is wrong; expecting '{home}'"),
            &format!("<Region>{home}</Region>"),
        ),
    };
    if let Ok(home) = home.parse() {
        response.headers_mut().insert("x-amz-bucket-region", home);
    }
    response
}
