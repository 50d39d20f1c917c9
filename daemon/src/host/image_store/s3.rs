//! Images from S3, with whatever credentials the host has: the instance's role, as a rule.

use super::cache::{Cache, Incoming};
use super::intake::Intake;
use super::measure::IntakeError;
use super::not_taken;
use super::s3_failure::{self, Address, Caller, Stage};
use crate::host::{Outcome, Progress};
use crate::imds::Imds;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{ProvideCredentials, SharedCredentialsProvider};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use enclaved_core::failure::Failure;
use enclaved_core::image::EifReport;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

/// How often a download is begun that breaks off midway. (What S3 answers with an error, the SDK tries three times where
/// that may help.)
const TRIES: u32 = 5;
/// Pause after the first broken download; doubles.
const PAUSE: Duration = Duration::from_millis(500);
/// A download that brings nothing for so long has broken off.
const SILENCE: Duration = Duration::from_secs(30);
/// The SDK's other names for an endpoint besides `AWS_ENDPOINT_URL`.
const S3_ENDPOINT: &str = "AWS_ENDPOINT_URL_S3";

/// S3 as this host reaches it.
#[derive(Debug)]
pub(super) struct S3 {
    imds: Imds,
    /// Made by the first fetch: region and credentials may take the metadata service a moment.
    ready: Mutex<Option<Ready>>,
}

#[derive(Debug, Clone)]
struct Ready {
    client: Client,
    credentials: SharedCredentialsProvider,
    region: String,
}

impl S3 {
    pub(super) fn new() -> Self {
        Self { imds: Imds::new(), ready: Mutex::new(None) }
    }

    #[cfg(test)]
    pub(super) fn with(config: &SdkConfig, imds: Imds) -> Self {
        let ready = Ready::from(config).map(|ready| Mutex::new(Some(ready)));
        Self { imds, ready: ready.unwrap_or_default() }
    }

    /// Downloads an object, and measures it on its way.
    pub(super) async fn fetch(
        &self,
        bucket: &str,
        key: &str,
        cache: &Cache,
        progress: &Progress,
    ) -> Outcome<(Incoming, EifReport)> {
        let named = |failure: Failure| Failure {
            message: format!("could not get s3://{bucket}/{key}: {}", failure.message),
            ..failure
        };
        let ready = self.ready().await.map_err(named)?;
        let caller = self.caller(&ready).await.map_err(named)?;
        let address = Address { bucket, key, region: &ready.region };
        let mut tried = 0;
        loop {
            tried += 1;
            progress.restart();
            let broken = match self.attempt(&ready, &address, &caller, cache, progress).await {
                Ok(taken) => return Ok(taken),
                Err(Attempt::Final(failure)) => return Err(failure),
                Err(Attempt::Broken(broken)) => broken,
            };
            let (done, total) = progress.get();
            let text = if total > 0 && done == total {
                format!("the download of {address} came damaged: {broken}")
            } else {
                format!("the download of {address} broke off after {done} of {total} bytes: {broken}")
            };
            if tried == TRIES {
                return Err(Failure::new(format!("{text} (tried {TRIES} times)")).with_remedy(
                    "see whether something between this host and S3 cuts long downloads off, or changes them",
                ));
            }
            let pause = jittered(PAUSE.saturating_mul(1 << (tried - 1)));
            tracing::warn!("{text}; trying again in {pause:?}");
            sleep(pause).await;
        }
    }

    async fn attempt(
        &self,
        ready: &Ready,
        address: &Address<'_>,
        caller: &Caller,
        cache: &Cache,
        progress: &Progress,
    ) -> Result<(Incoming, EifReport), Attempt> {
        let request = ready.client.get_object().bucket(address.bucket).key(address.key);
        let answer = request.send().await.map_err(|error| s3_failure::refused(&error, address, caller));
        let object = answer.map_err(Attempt::Final)?;
        let length = object.content_length().and_then(|length| u64::try_from(length).ok());
        if let Some(length) = length {
            progress.set_total(length);
            cache.check_space(length).map_err(Attempt::Final)?;
        }
        let (incoming, file) = cache.incoming().map_err(Attempt::Final)?;
        let not_taken = |error: IntakeError| Attempt::Final(not_taken(&address.to_string(), &error));
        let intake = Intake::begin(file).map_err(not_taken)?;
        let report = download(object, intake, progress).await?.map_err(not_taken)?;
        Ok((incoming, report))
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
        let client = aws_sdk_s3::config::Builder::from(config).force_path_style(elsewhere).build();
        Some(Self { client: Client::from_conf(client), credentials, region })
    }
}

/// A download that came to nothing.
enum Attempt {
    /// Another try would come to the same.
    Final(Failure),
    /// It broke off midway.
    Broken(String),
}

/// Feeds the body to the intake.
async fn download(
    mut object: GetObjectOutput,
    intake: Intake,
    progress: &Progress,
) -> Result<Result<EifReport, IntakeError>, Attempt> {
    loop {
        match timeout(SILENCE, object.body.next()).await {
            Ok(None) => return Ok(intake.finish().await),
            Ok(Some(Ok(bytes))) => {
                progress.add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                if intake.take(bytes).await.is_err() {
                    // It is no image, or can't be written; there is no use in the rest.
                    return Ok(intake.finish().await);
                }
            }
            Ok(Some(Err(error))) => return Err(Attempt::Broken(Failure::from_error(&error).message)),
            Err(_) => return Err(Attempt::Broken(format!("nothing came for {SILENCE:?}"))),
        }
    }
}

/// Half to one and a half times the pause, so that hosts that were cut off together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() % 1024;
    pause / 2 + pause.mul_f64(f64::from(u16::try_from(random).unwrap_or(512)) / 1024.0)
}
