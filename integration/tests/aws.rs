//! The stand-ins of AWS, used by AWS's own client libraries.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_sdk_s3::config::{Credentials, SharedCredentialsProvider};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use enclaved_integration::imds::{Imds, ImdsFault, Instance};
use enclaved_integration::s3::{S3, S3Fault};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const BUCKET: &str = "caution-d-0001-images";
const KEY: &str = "signer.eif";

struct Aws {
    imds: Imds,
    s3: S3,
    _folder: TempDir,
}

async fn aws() -> Aws {
    let folder = tempfile::tempdir().unwrap();
    let imds = Imds::start(Instance::sample()).await.unwrap();
    let s3 = S3::start(folder.path(), imds.credentials()).await.unwrap();
    s3.put(BUCKET, KEY, contents()).await.unwrap();
    Aws { imds, s3, _folder: folder }
}

fn contents() -> Vec<u8> {
    (0..300_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn imds_client(aws: &Aws) -> aws_config::imds::Client {
    aws_config::imds::Client::builder()
        .endpoint(aws.imds.endpoint())
        .unwrap()
        .max_attempts(1)
        .read_timeout(Duration::from_secs(5))
        .build()
}

/// A client with the role's credentials, fetched from the metadata service.
fn role(aws: &Aws) -> aws_sdk_s3::Client {
    let provider = ImdsCredentialsProvider::builder().imds_client(imds_client(aws)).build();
    let retries_off = aws_sdk_s3::config::retry::RetryConfig::disabled();
    let client = aws.s3.client(SharedCredentialsProvider::new(provider));
    aws_sdk_s3::Client::from_conf(client.config().to_builder().retry_config(retries_off).build())
}

async fn get(client: &aws_sdk_s3::Client) -> Result<GetObjectOutput, String> {
    let answer = client.get_object().bucket(BUCKET).key(KEY).send().await;
    answer.map_err(|error| error.code().map_or_else(|| format!("{error:?}"), str::to_owned))
}

#[tokio::test]
async fn the_role_reads_an_object_with_credentials_from_the_metadata_service_and_is_on_record() {
    let aws = aws().await;
    let body = get(&role(&aws)).await.unwrap().body.collect().await.unwrap().to_vec();
    assert_eq!(body, contents());
    let handed_out = aws.imds.credentials().all();
    assert_eq!(handed_out.len(), 1);
    let used = aws.s3.authenticated();
    assert_eq!(used.len(), 1);
    assert_eq!(
        (used[0].access_key_id.as_str(), used[0].operation.as_str()),
        (handed_out[0].access_key_id.as_str(), "GetObject")
    );
    assert_eq!((used[0].bucket.as_deref(), used[0].key.as_deref()), (Some(BUCKET), Some(KEY)));
    let record = aws.imds.record();
    assert!(record.tokens >= 1 && record.refused_v1 == 0, "{record:?}");
    assert_eq!(record.paths.last().unwrap(), "/latest/meta-data/iam/security-credentials/enclave-host");
}

#[tokio::test]
async fn the_role_may_read_objects_and_nothing_else() {
    let aws = aws().await;
    let client = role(&aws);
    let listed = client.list_objects_v2().bucket(BUCKET).send().await.unwrap_err();
    assert_eq!(listed.code(), Some("AccessDenied"));
    let put = client.put_object().bucket(BUCKET).key("x").body(vec![1].into()).send().await.unwrap_err();
    assert_eq!(put.code(), Some("AccessDenied"));
    let missing = client.get_object().bucket(BUCKET).key("missing").send().await.unwrap_err();
    assert_eq!(missing.code(), Some("AccessDenied"), "a role that may not list learns nothing of what is missing");
}

#[tokio::test]
async fn credentials_that_nobody_handed_out_are_refused_and_so_are_expired_ones() {
    let aws = aws().await;
    get(&role(&aws)).await.unwrap();
    let good = aws.imds.credentials().all().remove(0);
    let with = |id: &str, secret: &str, token: Option<&str>| {
        let credentials = Credentials::new(id, secret, token.map(str::to_owned), None, "test");
        aws.s3.client(SharedCredentialsProvider::new(credentials))
    };
    let code = async |client: aws_sdk_s3::Client| get(&client).await.map(|_| ()).unwrap_err();
    let (id, secret) = (good.access_key_id.as_str(), good.secret_access_key.as_str());
    assert_eq!(code(with("ASIANOBODY", secret, Some(&good.token))).await, "InvalidAccessKeyId");
    assert_eq!(code(with(id, "wrong", Some(&good.token))).await, "SignatureDoesNotMatch");
    assert_eq!(code(with(id, secret, None)).await, "InvalidToken");
    assert_eq!(code(with(id, secret, Some("other"))).await, "InvalidToken");
    assert!(get(&with(id, secret, Some(&good.token))).await.is_ok());

    aws.imds.set_fault(Some(ImdsFault::ExpiredCredentials));
    let client = imds_client(&aws);
    client.get("/latest/meta-data/iam/security-credentials/enclave-host").await.unwrap();
    let expired = aws.imds.credentials().all().remove(1);
    let refused = code(with(&expired.access_key_id, &expired.secret_access_key, Some(&expired.token))).await;
    assert_eq!(refused, "ExpiredToken");
}

#[tokio::test]
async fn credentials_are_rotated_on_demand_and_before_they_expire() {
    let aws = aws().await;
    let client = imds_client(&aws);
    let fetch = async || client.get("/latest/meta-data/iam/security-credentials/enclave-host").await.unwrap();
    fetch().await;
    fetch().await;
    assert_eq!(aws.imds.credentials().all().iter().map(|one| one.times).collect::<Vec<_>>(), [2]);
    aws.imds.credentials().rotate();
    fetch().await;
    assert_eq!(aws.imds.credentials().all().iter().map(|one| one.times).collect::<Vec<_>>(), [2, 1]);
    aws.imds.credentials().set_lifetime(Duration::ZERO);
    aws.imds.credentials().rotate();
    fetch().await;
    fetch().await;
    assert_eq!(aws.imds.credentials().all().len(), 4, "expired ones are not handed out again");
}

#[tokio::test]
async fn a_request_without_a_token_is_refused_and_counted() {
    let aws = aws().await;
    let url = format!("{}/latest/meta-data/instance-id", aws.imds.endpoint());
    let plain = plain_get(&url).await;
    assert_eq!(plain, 401);
    assert_eq!(aws.imds.record().refused_v1, 1);
    let client = imds_client(&aws);
    for (path, expected) in [
        ("/latest/meta-data/instance-id", "i-0123456789abcdef0"),
        ("/latest/meta-data/instance-type", "m5.2xlarge"),
        ("/latest/meta-data/placement/region", "us-east-1"),
        ("/latest/meta-data/ami-id", "ami-0123456789abcdef0"),
        ("/latest/meta-data/tags/instance/caution:deployment-id", "d-0001"),
        ("/latest/meta-data/tags/instance/", "caution:deployment-id"),
        ("/latest/meta-data/iam/security-credentials/", "enclave-host"),
    ] {
        let answer: String = client.get(path).await.unwrap().into();
        assert_eq!(answer, expected, "{path}");
    }
    let document: String = client.get("/latest/dynamic/instance-identity/document").await.unwrap().into();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["accountId"], "123456789012");
    assert!(client.get("/latest/meta-data/autoscaling/target-lifecycle-state").await.is_err());
    aws.imds.set_lifecycle_state(Some("InService"));
    let state: String = client.get("/latest/meta-data/autoscaling/target-lifecycle-state").await.unwrap().into();
    assert_eq!(state, "InService");
}

/// The status of a plain GET, as a program makes it that knows nothing of tokens.
async fn plain_get(url: &str) -> u16 {
    use http_body_util::Empty;
    use hyper_util::client::legacy::Client;
    let client = Client::builder(hyper_util::rt::TokioExecutor::new()).build_http::<Empty<bytes::Bytes>>();
    client.get(url.parse().unwrap()).await.unwrap().status().as_u16()
}

#[tokio::test]
async fn faults_of_the_metadata_service_are_what_they_say() {
    let aws = aws().await;
    let path = "/latest/meta-data/instance-id";
    let credentials = "/latest/meta-data/iam/security-credentials";
    let fails = async |fault, path: &str| {
        aws.imds.set_fault(Some(fault));
        imds_client(&aws).get(path).await.is_err()
    };
    assert!(fails(ImdsFault::Down, path).await);
    assert!(fails(ImdsFault::Unauthorized, path).await);
    assert!(fails(ImdsFault::NoRole, credentials).await);
    let slow = Instant::now();
    assert!(!fails(ImdsFault::Slow(Duration::from_millis(50)), path).await);
    assert!(slow.elapsed() >= Duration::from_millis(100), "token and answer, {:?}", slow.elapsed());
    assert!(!fails(ImdsFault::RoleRefused, &format!("{credentials}/enclave-host")).await);
    assert_eq!(aws.imds.credentials().all(), []);
    aws.imds.set_fault(Some(ImdsFault::NoTokens));
    let token = tokio::time::timeout(Duration::from_millis(50), imds_client(&aws).get(path)).await;
    assert!(token.is_err(), "no answer at all");
    aws.imds.set_fault(None);
    assert!(imds_client(&aws).get(path).await.is_ok());
}

#[tokio::test]
async fn faults_of_s3_happen_so_often_and_in_their_order() {
    let aws = aws().await;
    let client = role(&aws);
    aws.s3.add_fault(S3Fault::Forbidden, Some(1));
    aws.s3.add_fault(S3Fault::NotFound, Some(1));
    aws.s3.add_fault(S3Fault::Unavailable, Some(1));
    aws.s3.add_fault(S3Fault::BreakOff { after: 100_000 }, Some(1));
    aws.s3.add_fault(S3Fault::Corrupt { at: 200_001 }, Some(1));
    assert_eq!(get(&client).await.unwrap_err(), "AccessDenied");
    assert_eq!(get(&client).await.unwrap_err(), "NoSuchKey");
    assert_eq!(get(&client).await.unwrap_err(), "SlowDown");
    let mut broken = get(&client).await.unwrap().body;
    let mut received = 0;
    let end = loop {
        match broken.next().await {
            Some(Ok(bytes)) => received += bytes.len(),
            other => break other,
        }
    };
    assert!(end.is_some_and(|end| end.is_err()), "broken off after {received} bytes, not ended");
    assert!(received <= 100_000);
    let corrupt = get(&client).await.unwrap();
    // The client's own checksum may catch it first; the bytes must not be the right ones.
    if let Ok(body) = corrupt.body.collect().await {
        let body = body.to_vec();
        let differ: Vec<usize> = (0..body.len()).filter(|at| body[*at] != contents()[*at]).collect();
        assert_eq!(differ, [200_001]);
    }
    assert_eq!(get(&client).await.unwrap().body.collect().await.unwrap().to_vec(), contents());
    let statuses: Vec<u16> =
        aws.s3.answered().iter().filter(|answer| answer.method == "GET").map(|answer| answer.status).collect();
    assert_eq!(statuses, [403, 404, 503, 200, 200, 200]);
}

#[tokio::test]
async fn a_download_resumes_by_range_and_only_of_the_same_object() {
    let aws = aws().await;
    let client = role(&aws);
    let tag = get(&client).await.unwrap().e_tag.unwrap();
    let part = async |tag: &str| {
        client.get_object().bucket(BUCKET).key(KEY).range("bytes=1000000-").if_match(tag).send().await
    };
    let rest = part(&tag).await.unwrap();
    assert_eq!(rest.content_range.as_deref(), Some("bytes 1000000-1199999/1200000"));
    assert_eq!(rest.body.collect().await.unwrap().to_vec(), contents()[1_000_000..]);
    assert_eq!(part("\"other\"").await.unwrap_err().code(), Some("PreconditionFailed"));
    assert_eq!(aws.s3.answered().last().unwrap().range.as_deref(), Some("bytes=1000000-"));
}

#[tokio::test]
async fn a_slow_download_is_slow() {
    let aws = aws().await;
    aws.s3.add_fault(S3Fault::Slow { bytes_per_second: 12_000_000 }, None);
    let began = Instant::now();
    let body = get(&role(&aws)).await.unwrap().body.collect().await.unwrap().to_vec();
    assert_eq!(body.len(), contents().len());
    assert!(began.elapsed() >= Duration::from_millis(95), "{:?}", began.elapsed());
}
