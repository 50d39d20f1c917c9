//! What S3's refusals, and failures of the way to it, are called; and what a person can do. Words only: what is tried again, and
//! when, is decided elsewhere.

use crate::imds::{Imds, MetadataError, ROLE};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use enclaved_core::failure::Failure;
use serde::Deserialize;
use std::error::Error;
use std::fmt;

/// Where an object is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) bucket: String,
    pub(super) key: String,
    /// `None`: the newest.
    pub(super) version: Option<String>,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)?;
        match &self.version {
            Some(version) => write!(f, "?versionId={version}"),
            None => Ok(()),
        }
    }
}

/// By whom S3 is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Caller {
    /// The instance's role.
    Role(String),
    /// Other credentials (of the environment, a profile, a container), by the key's id, which is no secret.
    Key(String),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Role(role) => write!(f, "the instance's role {role}"),
            Self::Key(id) => write!(f, "the access key {id}"),
        }
    }
}

impl Caller {
    /// The instance's role, if these are its credentials.
    pub(super) async fn of(access_key_id: &str, imds: &Imds) -> Self {
        #[derive(Deserialize)]
        struct Credentials {
            #[serde(rename = "AccessKeyId")]
            access_key_id: String,
        }
        let key = Self::Key(access_key_id.to_owned());
        let Ok(Some(role)) = imds.role().await else { return key };
        let Ok(Some(answer)) = imds.get(&format!("{ROLE}{role}")).await else { return key };
        match serde_json::from_str::<Credentials>(&answer) {
            Ok(credentials) if credentials.access_key_id == access_key_id => Self::Role(role),
            Ok(_) | Err(_) => key,
        }
    }
}

/// What is missing for asking S3 at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Which region.
    Region,
    /// As whom.
    Credentials,
}

/// There is no region, or there are no credentials: `said` is what the SDK makes of it, `role` what the metadata service
/// says when it is asked for the instance's role.
pub(super) fn incomplete(stage: Stage, said: Option<String>, role: Result<Option<String>, MetadataError>) -> Failure {
    let (what, elsewhere) = match stage {
        Stage::Region => ("S3's region is not known", "AWS_REGION"),
        Stage::Credentials => ("there are no credentials for S3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    };
    let said = said.map(|said| format!(" ({said})")).unwrap_or_default();
    match (role, stage) {
        (Err(error), _) => Failure::new(format!("{what}: {error}{said}")).with_remedy(error.remedy()),
        (Ok(None), Stage::Credentials) => Failure::new(format!("{what}: the instance has no role{said}")).with_remedy(
            "attach an instance profile whose role may read the image (`aws ec2 associate-iam-instance-profile`)",
        ),
        (Ok(Some(role)), Stage::Credentials) => {
            Failure::new(format!("{what}: those of the instance's role {role} can't be used{said}")).with_remedy(
                "see whether the role still exists and trusts ec2.amazonaws.com, and whether the host's clock is right",
            )
        }
        (Ok(_), Stage::Region) => Failure::new(format!("{what}: the instance metadata service does not say it{said}"))
            .with_remedy(format!("set {elsewhere} in the environment")),
    }
}

/// S3 did not give the object: why, and what a person can do. Which object, and to whom, is for the caller to say.
pub(super) fn refused<E: ProvideErrorMetadata + Error + 'static>(
    error: &SdkError<E>,
    address: &Address,
    region: &str,
    caller: &Caller,
) -> Failure {
    let SdkError::ServiceError(service) = error else { return unreachable_s3(error, region) };
    let response = service.raw();
    let status = response.status().as_u16();
    // Answers without a body (of some gateways) have no code.
    let code = service.err().code().unwrap_or_default();
    let said = service.err().message().unwrap_or_default();
    let words = [code, said].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(": ");
    let request = response.headers().get("x-amz-request-id");
    let request = request.map(|id| format!(", request id {id}")).unwrap_or_default();
    let separator = if words.is_empty() { "" } else { " " };
    let message = format!("S3 answered {status}{separator}{words} in region {region}{request}");
    let other_region = response.headers().get("x-amz-bucket-region").filter(|other| *other != region);
    Failure::new(message).with_remedy(remedy(status, code, address, caller, other_region))
}

fn remedy(status: u16, code: &str, address: &Address, caller: &Caller, other_region: Option<&str>) -> String {
    let Address { bucket, key, version } = address;
    // A given version is another permission.
    let (action, gone) = match version {
        Some(_) => ("s3:GetObjectVersion", "object, or no such version of it"),
        None => ("s3:GetObject", "object"),
    };
    match (status, code) {
        (301 | 307, _) | (400, "AuthorizationHeaderMalformed") | (_, "PermanentRedirect") => match other_region {
            Some(region) => format!("the bucket is in region {region}: set AWS_REGION={region}"),
            None => "the bucket is in another region: set AWS_REGION to that one".to_owned(),
        },
        (_, "RequestTimeTooSkewed") => "set the host's clock (`chronyc tracking`)".to_owned(),
        (_, "ExpiredToken" | "TokenRefreshRequired") => {
            "the credentials have expired: see whether the host's clock is right, or renew those in the environment".to_owned()
        }
        (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken") => {
            "the credentials are not valid: correct or remove those in the environment; the role's are used without them"
                .to_owned()
        }
        (404, "NoSuchBucket") => format!("there is no bucket {bucket}: check its name"),
        (404, "NoSuchVersion") => format!("there is no such version of {key}: check `aws s3api list-object-versions`"),
        (404, _) => format!("there is no object {key} in the bucket: check the key (`aws s3 ls s3://{bucket}/`)"),
        (401 | 403, "InvalidObjectState") => "the object is archived: restore it to a storage class that can be read".to_owned(),
        (401 | 403, _) => format!(
            "one of two: {caller} may not read it (it needs {action} on arn:aws:s3:::{bucket}/{key}, and kms:Decrypt if it is \
             encrypted with a KMS key; a bucket policy or a VPC endpoint policy may deny it, too), or there is no such \
             {gone}, which S3 says only to callers with s3:ListBucket"
        ),
        (429 | 500..=599, _) => "S3 is overloaded or out of order; it is tried again".to_owned(),
        _ => "see S3's error codes for what it means".to_owned(),
    }
}

/// No answer, or none of S3's.
fn unreachable_s3<E: Error + 'static>(error: &SdkError<E>, region: &str) -> Failure {
    let remedy = match error {
        SdkError::DispatchFailure(_) | SdkError::TimeoutError(_) => format!(
            "see whether this host reaches S3 in region {region}: DNS, route (internet, NAT or an S3 gateway endpoint), security \
             group"
        ),
        SdkError::ResponseError(_) => {
            "see whether something else than S3 answers at that address (a proxy?)".to_owned()
        }
        _ => "check AWS_REGION, AWS_ENDPOINT_URL and the bucket's name".to_owned(),
    };
    Failure::from_error(error).with_remedy(remedy)
}
