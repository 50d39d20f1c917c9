//! Images from S3, with whatever credentials the host has: the instance's role, as a rule. The SDK finds region, credentials,
//! endpoint, FIPS and dualstack; what is asked for and how often is the download's.

use super::checksum::Checksum;
use super::remote::{Chunks, Head, Look, Opened, Remote, Trouble, token};
use super::s3_failure::{self, Address, Caller, Stage};
use super::stamp::Object;
use crate::host::Outcome;
use crate::imds::Imds;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{
    ConfigBag, IdentityCache, Intercept, ProvideCredentials, Region, ResponseChecksumValidation, RuntimeComponents,
    SharedCredentialsProvider, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::primitives::{ByteStream, DateTime, DateTimeFormat};
use aws_sdk_s3::types::{ChecksumMode, ChecksumType};
use aws_smithy_checksums::ChecksumAlgorithm;
use bytes::Bytes;
use enclaved_core::failure::Failure;
use enclaved_core::fetch::Cause;
use enclaved_core::id::Timestamp;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex as Lock, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::Mutex;

/// The SDK's other name for an endpoint besides `AWS_ENDPOINT_URL`.
const S3_ENDPOINT: &str = "AWS_ENDPOINT_URL_S3";
/// So many buckets' regions are remembered; an enclave has one, and a host has four enclaves.
const MAX_REGIONS: usize = 64;

/// S3 as this host reaches it.
#[derive(Debug)]
pub(super) struct S3 {
    imds: Imds,
    /// Made by the first fetch: region and credentials may take the metadata service a moment.
    ready: Mutex<Option<Ready>>,
    /// Buckets that are in other regions than this host.
    regions: Arc<Lock<BTreeMap<String, String>>>,
}

#[derive(Debug, Clone)]
struct Ready {
    config: aws_sdk_s3::Config,
    credentials: SharedCredentialsProvider,
    region: String,
}

impl S3 {
    pub(super) fn new() -> Self {
        Self { imds: Imds::new(), ready: Mutex::new(None), regions: Arc::default() }
    }

    #[cfg(test)]
    pub(super) fn with(config: &SdkConfig, imds: Imds) -> Self {
        let ready = Ready::from(config).map(|ready| Mutex::new(Some(ready)));
        Self { imds, ready: ready.unwrap_or_default(), regions: Arc::default() }
    }

    /// An object, as it can be got now.
    ///
    /// # Errors
    /// There is no region, or there are no credentials.
    pub(super) async fn object(&self, bucket: &str, key: &str, version: Option<&str>) -> Outcome<S3Object> {
        let version = version.map(str::to_owned);
        let address = Address { bucket: bucket.to_owned(), key: key.to_owned(), version };
        let named =
            |failure: Failure| Failure { message: format!("could not get {address}: {}", failure.message), ..failure };
        let ready = self.ready().await.map_err(named)?;
        let caller = self.caller(&ready).await.map_err(named)?;
        let region = lock(&self.regions).get(bucket).cloned().unwrap_or(ready.region);
        let config = ready.config.to_builder().region(Region::new(region.clone())).build();
        let now = Lock::new(Now { client: Client::from_conf(config), region });
        Ok(S3Object { address, caller, now, regions: Arc::clone(&self.regions) })
    }

    /// Whose credentials S3 is asked with.
    ///
    /// # Errors
    /// There is no region, or there are no credentials.
    pub(super) async fn who(&self) -> Outcome<String> {
        let ready = self.ready().await?;
        Ok(self.caller(&ready).await?.to_string())
    }

    async fn ready(&self) -> Outcome<Ready> {
        let mut ready = self.ready.lock().await;
        if let Some(ready) = &*ready {
            return Ok(ready.clone());
        }
        let config = aws_config::defaults(BehaviorVersion::latest()).load().await;
        match Ready::from(&config) {
            Some(new) => {
                *ready = Some(new.clone());
                Ok(new)
            }
            // Looked for anew by the next fetch: the metadata service may only be late.
            None => Err(s3_failure::incomplete(Stage::Region, None, self.imds.role().await)),
        }
    }

    /// Who asks S3. Finds out, before S3 is asked, whether there are credentials at all, and if not, why.
    async fn caller(&self, ready: &Ready) -> Outcome<Caller> {
        match ready.credentials.provide_credentials().await {
            Ok(credentials) => Ok(Caller::of(credentials.access_key_id(), &self.imds).await),
            Err(error) => {
                let error = Failure::from_error(&error).message;
                Err(s3_failure::incomplete(Stage::Credentials, Some(error), self.imds.role().await))
            }
        }
    }
}

impl Ready {
    /// None without region or credentials.
    fn from(config: &SdkConfig) -> Option<Self> {
        let region = config.region()?.to_string();
        let credentials = config.credentials_provider()?;
        // What is not AWS itself seldom has a host name for every bucket.
        let elsewhere = config.endpoint_url().is_some() || std::env::var_os(S3_ENDPOINT).is_some();
        let config = aws_sdk_s3::config::Builder::from(config)
            .force_path_style(elsewhere)
            // Tries, silence and checksums are the download's: so each try is told once, and all of them are bounded together.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .identity_cache(IdentityCache::lazy().build())
            .build();
        Some(Self { config, credentials, region })
    }
}

fn lock<T>(mutex: &Lock<T>) -> MutexGuard<'_, T> {
    // What is in them is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One object in S3.
#[derive(Debug)]
pub(super) struct S3Object {
    address: Address,
    caller: Caller,
    now: Lock<Now>,
    regions: Arc<Lock<BTreeMap<String, String>>>,
}

/// How S3 is asked now.
#[derive(Debug, Clone)]
struct Now {
    client: Client,
    region: String,
}

/// How far S3's clock was from this host's, by the Date of its last answer.
#[derive(Debug, Clone, Default)]
pub(super) struct Dates(Arc<Lock<Option<Duration>>>);

impl Dates {
    pub(super) fn apart(&self) -> Option<Duration> {
        *lock(&self.0)
    }
}

impl Intercept for Dates {
    fn name(&self) -> &'static str {
        "Dates"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let date = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok());
        if let Some(seconds) = date.and_then(|date| u64::try_from(date.secs()).ok()) {
            let (date, now) =
                (Timestamp::from_millis(seconds.saturating_mul(1000)), Timestamp::from(SystemTime::now()));
            *lock(&self.0) = Some(now.since(date).max(date.since(now)));
        }
        Ok(())
    }
}

impl S3Object {
    /// The same object; the dates of all answers are noted there.
    pub(super) fn noting_dates(self, dates: &Dates) -> Self {
        {
            let mut now = lock(&self.now);
            let config = now.client.config().to_builder().interceptor(dates.clone()).build();
            now.client = Client::from_conf(config);
        }
        self
    }

    fn now(&self) -> Now {
        lock(&self.now).clone()
    }

    /// Whether the answer says that the bucket is in another region; that one is asked from now on.
    fn moved<E>(&self, error: &SdkError<E>, asked: &Now) -> bool {
        let Some(region) = error.raw_response().and_then(|response| response.headers().get("x-amz-bucket-region"))
        else {
            return false;
        };
        let in_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if region == asked.region || region.is_empty() || region.len() > 64 || !region.bytes().all(in_name) {
            return false;
        }
        let mut now = lock(&self.now);
        if now.region != region {
            tracing::info!("bucket {} is in region {region}, not in {}: asking there", self.address.bucket, now.region);
            let config = now.client.config().to_builder().region(Region::new(region.to_owned())).build();
            *now = Now { client: Client::from_conf(config), region: region.to_owned() };
            let mut regions = lock(&self.regions);
            if regions.len() < MAX_REGIONS {
                regions.insert(self.address.bucket.clone(), region.to_owned());
            }
        }
        true
    }

    fn trouble<E: ProvideErrorMetadata + std::error::Error + 'static>(
        &self,
        error: &SdkError<E>,
        asked: &Now,
    ) -> Trouble {
        let cause = match error {
            SdkError::ServiceError(service) => Cause::Refused {
                status: service.raw().status().as_u16(),
                code: service.err().code().map(str::to_owned),
            },
            SdkError::TimeoutError(_) => Cause::Silent,
            _ => Cause::Broken,
        };
        Trouble { cause, failure: s3_failure::refused(error, &self.address, &asked.region, &self.caller) }
    }

    /// Asks for the object, or these bytes of it, and of no other than the one with that ETag.
    async fn get(&self, range: Option<&Range<u64>>, etag: Option<&str>) -> Result<GetObjectOutput, Trouble> {
        let range = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let ask = async |now: &Now| {
            let Address { bucket, key, version } = &self.address;
            let get = now.client.get_object().bucket(bucket).key(key).set_version_id(version.clone());
            get.set_range(range.clone()).set_if_match(etag.map(str::to_owned)).send().await
        };
        let now = self.now();
        match ask(&now).await {
            Err(error) if self.moved(&error, &now) => {
                let now = self.now();
                ask(&now).await.map_err(|error| self.trouble(&error, &now))
            }
            answer => answer.map_err(|error| self.trouble(&error, &now)),
        }
    }

    /// Asks for what there is to be known of the object. `None`: S3 does not say why not, its answer to this has no body.
    async fn head(&self) -> Option<HeadObjectOutput> {
        let ask = async |now: &Now| {
            let Address { bucket, key, version } = &self.address;
            let head = now.client.head_object().bucket(bucket).key(key).set_version_id(version.clone());
            head.checksum_mode(ChecksumMode::Enabled).send().await
        };
        let now = self.now();
        match ask(&now).await {
            Err(error) if self.moved(&error, &now) => ask(&self.now()).await.ok(),
            answer => answer.ok(),
        }
    }
}

impl Remote for S3Object {
    type Chunks = ByteStream;

    async fn look(&self) -> Result<Look, Trouble> {
        let no_length = || Trouble::malformed("the answer does not say how long the object is");
        if let Some(head) = self.head().await {
            let size = head.content_length().and_then(|length| u64::try_from(length).ok()).ok_or_else(no_length)?;
            let object = Object {
                etag: head.e_tag().and_then(token),
                modified: head.last_modified().and_then(date),
                size,
                version: head.version_id().and_then(token),
            };
            let ranges = object.strong_etag().is_some();
            return Ok(Look { checksum: checksum(&head), ranges, object });
        }
        // The same question, to which S3's answer has the reason.
        let got = self.get(Some(&(0..1)), None).await?;
        let length = || got.content_length().and_then(|length| u64::try_from(length).ok());
        let size = match got.content_range() {
            Some(range) => super::remote::content_range(range).map(|(_, size)| size),
            None => length(),
        };
        let object = Object {
            etag: got.e_tag().and_then(token),
            modified: got.last_modified().and_then(date),
            size: size.ok_or_else(no_length)?,
            version: got.version_id().and_then(token),
        };
        let ranges = got.content_range().is_some() && object.strong_etag().is_some();
        Ok(Look { object, checksum: None, ranges })
    }

    async fn open(&self, object: &Object, range: Option<Range<u64>>) -> Result<Opened<ByteStream>, Trouble> {
        let got = self.get(range.as_ref(), object.strong_etag()).await?;
        let head = Head {
            status: if got.content_range().is_some() { 206 } else { 200 },
            etag: got.e_tag().map(str::to_owned),
            content_range: got.content_range().map(str::to_owned),
            content_length: got.content_length().and_then(|length| u64::try_from(length).ok()),
        };
        let is_range = head.fits(object, range.as_ref())?;
        Ok(if is_range { Opened::Range(got.body) } else { Opened::Whole(got.body) })
    }

    fn renew(&self) {
        tracing::info!("the credentials for {} have expired: asking for others", self.address);
        let mut now = lock(&self.now);
        // The SDK keeps credentials until they are about to expire, by its own clock; a new cache asks for them at once.
        let config = now.client.config().to_builder().identity_cache(IdentityCache::lazy().build()).build();
        now.client = Client::from_conf(config);
    }

    fn who(&self) -> String {
        format!("{} (as {})", self.address, self.caller)
    }
}

impl Chunks for ByteStream {
    async fn next(&mut self) -> Option<Result<Bytes, String>> {
        ByteStream::next(self).await.map(|chunk| chunk.map_err(|error| Failure::from_error(&error).message))
    }
}

fn date(date: &DateTime) -> Option<String> {
    date.fmt(DateTimeFormat::HttpDate).ok()
}

/// The best checksum of the whole object that S3 has. (It has one for every object put there since 2025.)
fn checksum(head: &HeadObjectOutput) -> Option<Checksum> {
    if matches!(head.checksum_type(), Some(ChecksumType::Composite)) {
        return None;
    }
    [
        (ChecksumAlgorithm::Sha256, head.checksum_sha256()),
        (ChecksumAlgorithm::Crc64Nvme, head.checksum_crc64_nvme()),
        (ChecksumAlgorithm::Crc32c, head.checksum_crc32_c()),
        (ChecksumAlgorithm::Crc32, head.checksum_crc32()),
        (ChecksumAlgorithm::Sha1, head.checksum_sha1()),
    ]
    .into_iter()
    .find_map(|(algorithm, value)| Checksum::whole(algorithm, &token(value?)?))
}
