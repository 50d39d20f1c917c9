//! What a ranged, pinned, resuming download relies on, asked of the stand-in S3 by AWS's own client.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{IdentityCache, SharedCredentialsProvider};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::{ChecksumMode, ChecksumType};
use enclaved_integration::imds::{Imds, Instance};
use enclaved_integration::s3::{Algorithm, Controls, Elsewhere, Moment, Right, S3, S3Fault, Stored};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const BUCKET: &str = "caution-d-0001-images";
const KEY: &str = "signer.eif";
const SIZE: u64 = 1_200_000;
/// The parts of a download in these tests: three whole ones.
const PART: u64 = 400_000;

struct Aws {
    imds: Imds,
    s3: S3,
    _folder: TempDir,
}

impl Aws {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let imds = Imds::start(Instance::sample()).await.unwrap();
        let s3 = S3::start(folder.path(), imds.credentials()).await.unwrap();
        s3.controls().put(BUCKET, KEY, contents(1), Stored::Full(Algorithm::Crc64Nvme)).unwrap();
        Self { imds, s3, _folder: folder }
    }

    fn controls(&self) -> &Controls {
        self.s3.controls()
    }

    fn config(&self) -> aws_sdk_s3::config::Builder {
        let imds = aws_config::imds::Client::builder().endpoint(self.imds.endpoint()).unwrap().build();
        let provider = ImdsCredentialsProvider::builder().imds_client(imds).build();
        let client = self.s3.client(SharedCredentialsProvider::new(provider));
        client.config().to_builder().retry_config(RetryConfig::disabled())
    }

    /// A client with the role's credentials, freshly fetched from the metadata service, that tries nothing twice.
    fn role(&self) -> Role {
        Role(Client::from_conf(self.config().build()))
    }

    /// One that asks the metadata service for credentials before every request.
    fn forgetful_role(&self) -> Role {
        Role(Client::from_conf(self.config().identity_cache(IdentityCache::no_cache()).build()))
    }
}

struct Role(Client);

impl Role {
    async fn part(&self, nth: u64, tag: &str) -> Result<GetObjectOutput, String> {
        let (first, last) = (nth * PART, (nth + 1) * PART - 1);
        let request = self.0.get_object().bucket(BUCKET).key(KEY);
        code(request.range(format!("bytes={first}-{last}")).if_match(tag).send().await)
    }

    /// The bytes of a part, or what went wrong, on the way too.
    async fn bytes(&self, nth: u64, tag: &str) -> Result<Vec<u8>, String> {
        let body = self.part(nth, tag).await?.body.collect().await;
        Ok(body.map_err(|error| error.to_string())?.to_vec())
    }

    async fn head(&self) -> HeadObjectOutput {
        let request = self.0.head_object().bucket(BUCKET).key(KEY);
        request.checksum_mode(ChecksumMode::Enabled).send().await.unwrap()
    }

    async fn tag(&self) -> String {
        self.head().await.e_tag.unwrap()
    }
}

fn contents(seed: u32) -> Vec<u8> {
    (0..300_000_u32).flat_map(|number| (number ^ (seed << 20)).to_le_bytes()).collect()
}

fn part_of(contents: &[u8], nth: usize) -> Vec<u8> {
    contents.chunks(usize::try_from(PART).unwrap()).nth(nth).unwrap().to_vec()
}

/// What S3 says, or its status where it says nothing.
fn code<T, E: ProvideErrorMetadata + std::fmt::Debug>(answer: Result<T, SdkError<E>>) -> Result<T, String> {
    answer.map_err(|error| {
        let status = error.raw_response().map(|response| response.status().as_u16());
        match (error.code(), status) {
            (Some(code), _) => code.to_owned(),
            (None, Some(status)) => status.to_string(),
            (None, None) => format!("{error:?}"),
        }
    })
}

#[tokio::test]
async fn get_and_head_honour_if_match_and_if_none_match() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    let get = || role.0.get_object().bucket(BUCKET).key(KEY);
    let head = || role.0.head_object().bucket(BUCKET).key(KEY);
    assert!(get().if_match(&tag).send().await.is_ok());
    assert!(head().if_match(&tag).send().await.is_ok());
    assert_eq!(code(get().if_match("\"x\"").send().await).unwrap_err(), "PreconditionFailed");
    assert_eq!(code(head().if_match("\"x\"").send().await).unwrap_err(), "412");
    assert_eq!(code(get().if_none_match(&tag).send().await).unwrap_err(), "304");
    assert_eq!(code(head().if_none_match(&tag).send().await).unwrap_err(), "304");
    assert!(get().if_none_match("\"x\"").send().await.is_ok());
    assert!(head().if_none_match("\"x\"").send().await.is_ok());
    let statuses: Vec<u16> = aws.s3.answered().iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 200, 200, 412, 412, 304, 304, 200, 200]);
}

#[tokio::test]
async fn a_range_is_a_206_of_what_it_names_and_a_416_beyond_the_end() {
    let aws = Aws::start().await;
    let role = aws.role();
    let get = async |range: &str| {
        let answer = code(role.0.get_object().bucket(BUCKET).key(KEY).range(range).send().await)?;
        let said = (answer.content_range.unwrap(), answer.content_length.unwrap());
        Ok::<_, String>((said, answer.body.collect().await.unwrap().to_vec()))
    };
    let all = contents(1);
    assert_eq!(get("bytes=10-19").await.unwrap(), (("bytes 10-19/1200000".into(), 10), all[10..20].to_vec()));
    assert_eq!(get("bytes=-5").await.unwrap().1, all[1_199_995..]);
    assert_eq!(get("bytes=1199999-9999999").await.unwrap().0, ("bytes 1199999-1199999/1200000".into(), 1));
    assert_eq!(get("bytes=1200000-").await.unwrap_err(), "InvalidRange");
    let head = role.0.head_object().bucket(BUCKET).key(KEY).range("bytes=0-9").send().await.unwrap();
    assert_eq!(head.content_length, Some(10));
    let answered = aws.s3.answered();
    assert_eq!(answered.iter().map(|answer| answer.status).collect::<Vec<_>>(), [206, 206, 206, 416, 206]);
    assert_eq!(answered[0].sent, 10);
}

#[tokio::test]
async fn the_etag_follows_from_the_contents() {
    let aws = Aws::start().await;
    let role = aws.role();
    let first = role.tag().await;
    aws.controls().put(BUCKET, KEY, contents(2), Stored::Plain).unwrap();
    let second = role.tag().await;
    assert_ne!(first, second);
    // The same by whichever way it was put.
    aws.s3.put(BUCKET, KEY, contents(1)).await.unwrap();
    assert_eq!(role.tag().await, first);
    assert_eq!(first.len(), 34, "an MD5 in quotes");
}

#[tokio::test]
async fn head_and_get_say_the_checksum_that_was_stored_and_only_if_asked() {
    let aws = Aws::start().await;
    let role = aws.role();
    let sums = |head: HeadObjectOutput| {
        let sums = [
            head.checksum_crc32,
            head.checksum_crc32_c,
            head.checksum_crc64_nvme,
            head.checksum_sha1,
            head.checksum_sha256,
        ];
        (sums, head.checksum_type)
    };
    // Of "123456789": the check values of the CRCs' definitions, and what `openssl dgst` gives.
    let known = [
        "y/Q5Jg==",
        "4waSgw==",
        "rosUhgp5mIg=",
        "98O8HYCOBHMq32eZZczDTKeuNEE=",
        "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU=",
    ];
    let known = known.map(str::to_owned);
    for (at, algorithm) in Algorithm::ALL.into_iter().enumerate() {
        aws.controls().put(BUCKET, KEY, b"123456789".to_vec(), Stored::Full(algorithm)).unwrap();
        let (found, kind) = sums(role.head().await);
        let expected: Vec<_> = (0..5).map(|index| (index == at).then(|| known[index].clone())).collect();
        assert_eq!(found.to_vec(), expected, "{algorithm:?}");
        assert_eq!(kind, Some(ChecksumType::FullObject));
    }
    let unasked = role.0.head_object().bucket(BUCKET).key(KEY).send().await.unwrap();
    assert_eq!(sums(unasked), ([const { None }; 5], None));
    // AWS's client compares it with what it received.
    let get = || role.0.get_object().bucket(BUCKET).key(KEY).checksum_mode(ChecksumMode::Enabled);
    assert!(get().send().await.unwrap().body.collect().await.is_ok());
    assert!(get().range("bytes=0-3").send().await.unwrap().checksum_sha256.is_none(), "it is not that of the part");

    aws.controls().put(BUCKET, KEY, contents(1), Stored::Plain).unwrap();
    assert_eq!(sums(role.head().await), ([const { None }; 5], None));
}

#[tokio::test]
async fn a_wrong_checksum_is_found_by_who_compares_it() {
    let aws = Aws::start().await;
    let role = aws.role();
    let good = role.head().await;
    aws.controls().put(BUCKET, KEY, contents(1), Stored::Wrong(Algorithm::Crc64Nvme)).unwrap();
    let wrong = role.head().await;
    assert_eq!(wrong.e_tag, good.e_tag);
    assert_ne!(wrong.checksum_crc64_nvme, good.checksum_crc64_nvme);
    let get = role.0.get_object().bucket(BUCKET).key(KEY).checksum_mode(ChecksumMode::Enabled).send().await.unwrap();
    assert!(get.body.collect().await.is_err());
}

#[tokio::test]
async fn an_upload_in_parts_has_a_composite_checksum_and_an_etag_of_its_own_kind() {
    let aws = Aws::start().await;
    let role = aws.role();
    aws.controls().put(BUCKET, KEY, contents(1), Stored::Parts { algorithm: Algorithm::Sha256, size: PART }).unwrap();
    let head = role.head().await;
    assert_eq!(head.checksum_type, Some(ChecksumType::Composite));
    assert!(head.checksum_sha256.unwrap().ends_with("=-3"));
    assert!(head.e_tag.unwrap().ends_with("-3\""));
}

#[tokio::test]
async fn an_upload_whose_checksum_is_not_that_of_its_bytes_is_refused() {
    let aws = Aws::start().await;
    let owner = aws.s3.owner();
    let put = || owner.put_object().bucket(BUCKET).key("x").body(b"123456789".to_vec().into());
    assert!(put().checksum_crc32("y/Q5Jg==").send().await.is_ok());
    assert_eq!(code(put().checksum_crc32("AAAAAA==").send().await).unwrap_err(), "BadDigest");
}

#[tokio::test]
async fn an_old_version_stays_readable_by_its_id_for_who_may_get_versions() {
    let aws = Aws::start().await;
    let role = aws.role();
    assert_eq!(role.head().await.version_id, None, "a bucket without versions names none");
    aws.controls().keep_versions(BUCKET);
    let old = aws.controls().put(BUCKET, KEY, contents(2), Stored::Plain).unwrap().version.unwrap();
    aws.controls().put(BUCKET, KEY, contents(3), Stored::Plain).unwrap();
    let get = async |version: &str| {
        let answer = code(role.0.get_object().bucket(BUCKET).key(KEY).version_id(version).send().await)?;
        assert_eq!(answer.version_id.as_deref(), Some(version));
        Ok::<_, String>(answer.body.collect().await.unwrap().to_vec())
    };
    assert_eq!(get(&old).await.unwrap_err(), "AccessDenied");
    aws.controls().set_rights([Right::GetObject, Right::GetObjectVersion]);
    assert!(get(&old).await.unwrap() == contents(2));
    assert_eq!(get("nobody").await.unwrap_err(), "AccessDenied");
    aws.controls().set_rights([Right::GetObjectVersion, Right::ListBucket]);
    assert_eq!(get("nobody").await.unwrap_err(), "NoSuchVersion");
    assert_eq!(code(role.0.get_object().bucket(BUCKET).key(KEY).send().await).unwrap_err(), "AccessDenied");
    assert_eq!(aws.controls().asked()[1].version.as_deref(), Some(old.as_str()));
}

#[tokio::test]
async fn without_versions_what_was_replaced_is_gone() {
    let aws = Aws::start().await;
    aws.controls().set_rights([Right::GetObject, Right::GetObjectVersion, Right::ListBucket]);
    let role = aws.role();
    aws.controls().remove(BUCKET, KEY);
    assert_eq!(code(role.0.get_object().bucket(BUCKET).key(KEY).send().await).unwrap_err(), "NoSuchKey");
}

#[tokio::test]
async fn an_object_replaced_after_a_range_refuses_the_next_one_that_is_pinned() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().at(Moment::Answered { range: 2 }, |controls| {
        controls.put(BUCKET, KEY, contents(2), Stored::Plain).unwrap();
    });
    assert!(role.bytes(0, &tag).await.unwrap() == part_of(&contents(1), 0));
    assert!(role.bytes(1, &tag).await.unwrap() == part_of(&contents(1), 1));
    assert_eq!(role.bytes(2, &tag).await.unwrap_err(), "PreconditionFailed");
    let tag = role.tag().await;
    assert!(role.bytes(2, &tag).await.unwrap() == part_of(&contents(2), 2));
}

#[tokio::test]
async fn an_object_replaced_midway_in_a_range_is_still_answered_as_it_was() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().at(Moment::Within { range: 1, sent: 100_000 }, |controls| {
        let sent: Vec<u64> = controls.answered().iter().map(|answer| answer.sent).collect();
        assert_eq!(sent, [0, 100_000], "the head, and so much of the range");
        controls.put(BUCKET, KEY, contents(2), Stored::Plain).unwrap();
    });
    assert!(role.bytes(0, &tag).await.unwrap() == part_of(&contents(1), 0));
    assert_eq!(role.bytes(1, &tag).await.unwrap_err(), "PreconditionFailed");
}

#[tokio::test]
async fn credentials_that_end_midway_are_refused_from_then_on_and_new_ones_are_handed_out() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().at(Moment::Asked(3), Controls::expire_credentials);
    assert!(role.bytes(0, &tag).await.is_ok());
    // The client does not know, and goes on with those that it was given for hours.
    for _ in 0..2 {
        assert_eq!(role.bytes(1, &tag).await.unwrap_err(), "ExpiredToken");
    }
    let role = aws.role();
    assert!(role.bytes(1, &tag).await.unwrap() == part_of(&contents(1), 1));
    assert!(role.bytes(2, &tag).await.is_ok());
    let keys: Vec<_> = aws.controls().asked().into_iter().map(|asked| asked.access_key_id.unwrap()).collect();
    let handed_out: Vec<_> = aws.imds.credentials().all().into_iter().map(|one| one.access_key_id).collect();
    assert_eq!(handed_out.len(), 2);
    let (old, new) = (handed_out[0].clone(), handed_out[1].clone());
    assert_eq!(keys, [old.clone(), old.clone(), old.clone(), old, new.clone(), new]);
}

#[tokio::test]
async fn a_download_goes_on_with_new_credentials_when_its_own_end_midway() {
    let aws = Aws::start().await;
    let role = aws.forgetful_role();
    let tag = role.tag().await;
    aws.controls().at(Moment::Within { range: 1, sent: PART / 2 }, Controls::expire_credentials);
    for nth in 0..3 {
        // What was let in is served to its end.
        let expected = part_of(&contents(1), usize::try_from(nth).unwrap());
        assert!(role.bytes(nth, &tag).await.unwrap() == expected);
    }
    let keys: Vec<_> = aws.s3.authenticated().into_iter().map(|request| request.access_key_id).collect();
    assert_eq!(aws.imds.credentials().all().len(), 2);
    assert!(keys[0] == keys[1] && keys[1] != keys[2] && keys[2] == keys[3], "{keys:?}");
}

#[tokio::test]
async fn a_fault_meets_the_range_it_is_meant_for() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().add_fault_at_range(S3Fault::Internal, 2);
    aws.controls()
        .add_fault_when(S3Fault::Unavailable, None, |asked| asked.range.is_some_and(|range| range.contains(2 * PART)));
    assert!(role.bytes(0, &tag).await.is_ok());
    assert_eq!(role.bytes(1, &tag).await.unwrap_err(), "InternalError");
    assert!(role.bytes(1, &tag).await.is_ok());
    assert_eq!(role.bytes(2, &tag).await.unwrap_err(), "SlowDown");
    assert_eq!(role.bytes(2, &tag).await.unwrap_err(), "SlowDown");
    aws.controls().clear_faults();
    assert!(role.bytes(2, &tag).await.is_ok());
    let nth: Vec<_> = aws.controls().asked().iter().map(|asked| asked.nth_range).collect();
    assert_eq!(nth, [None, Some(1), Some(2), Some(3), Some(4), Some(5), Some(6)]);
    let asked = aws.controls().asked().pop().unwrap();
    assert_eq!((asked.bucket.as_str(), asked.key.as_str()), (BUCKET, KEY));
    assert_eq!(asked.if_match, Some(tag));
}

#[tokio::test]
async fn a_range_hangs_breaks_off_or_comes_damaged_as_told() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().add_fault_at_range(S3Fault::Hang, 1);
    let hung = tokio::time::timeout(Duration::from_millis(100), role.part(0, &tag)).await;
    assert!(hung.is_err(), "no answer at all");
    aws.controls().add_fault_at_range(S3Fault::HangAfter { after: 70_000 }, 2);
    let mut body = role.part(0, &tag).await.unwrap().body;
    let mut received = 0;
    while received < 70_000 {
        received += body.next().await.unwrap().unwrap().len();
    }
    assert_eq!(received, 70_000);
    assert!(tokio::time::timeout(Duration::from_millis(100), body.next()).await.is_err(), "and then nothing");
    drop(body);
    aws.controls().add_fault_at_range(S3Fault::BreakOff { after: 70_000 }, 3);
    assert!(role.bytes(0, &tag).await.is_err());
    aws.controls().add_fault_at_range(S3Fault::Corrupt { at: 7 }, 4);
    let corrupt = role.bytes(0, &tag).await.unwrap();
    let good = part_of(&contents(1), 0);
    let differ: Vec<usize> = (0..good.len()).filter(|at| good[*at] != corrupt[*at]).collect();
    assert_eq!(differ, [7]);
    let sent: Vec<u64> = aws.s3.answered().iter().skip(1).map(|answer| answer.sent).collect();
    assert_eq!(sent, [70_000, 70_000, PART]);
}

#[tokio::test]
async fn a_server_that_ignores_a_range_sends_the_whole_with_200() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().add_fault(S3Fault::WholeBody, Some(1));
    let whole = role.part(1, &tag).await.unwrap();
    assert_eq!((whole.content_range, whole.content_length), (None, Some(i64::try_from(SIZE).unwrap())));
    assert!(whole.body.collect().await.unwrap().to_vec() == contents(1));
    assert_eq!(aws.s3.answered().last().unwrap().status, 200);
}

#[tokio::test]
async fn a_bucket_of_another_region_says_which() {
    for (how, status, said) in
        [(Elsewhere::Moved, 301, "PermanentRedirect"), (Elsewhere::Malformed, 400, "AuthorizationHeaderMalformed")]
    {
        let aws = Aws::start().await;
        aws.controls().set_region(BUCKET, "eu-west-1", how);
        let role = aws.role();
        let refused = role.0.get_object().bucket(BUCKET).key(KEY).send().await.unwrap_err();
        assert_eq!(refused.code(), Some(said));
        let response = refused.raw_response().unwrap();
        assert_eq!(response.status().as_u16(), status);
        assert_eq!(response.headers().get("x-amz-bucket-region"), Some("eu-west-1"));
        let head = role.0.head_object().bucket(BUCKET).key(KEY).send().await.unwrap_err();
        assert_eq!(head.raw_response().unwrap().headers().get("x-amz-bucket-region"), Some("eu-west-1"));
        let there = role.0.config().to_builder().region(aws_sdk_s3::config::Region::new("eu-west-1")).build();
        assert!(Client::from_conf(there).get_object().bucket(BUCKET).key(KEY).send().await.is_ok());
    }
}

#[tokio::test]
async fn the_whole_server_keeps_to_its_rate() {
    let aws = Aws::start().await;
    let role = aws.role();
    let tag = role.tag().await;
    aws.controls().set_rate(Some(8_000_000));
    let began = Instant::now();
    let (first, second, third) = tokio::join!(role.bytes(0, &tag), role.bytes(1, &tag), role.bytes(2, &tag));
    assert!([first, second, third].iter().map(|part| part.as_ref().unwrap().len() as u64).sum::<u64>() == SIZE);
    // 1.2 MB; the last pieces are sent before their time has passed.
    assert!(began.elapsed() >= Duration::from_millis(130), "{:?}", began.elapsed());
    assert_eq!(aws.controls().most_at_once(), 3);
    aws.controls().set_rate(None);
}

#[tokio::test]
async fn a_presigned_url_is_served_with_a_range_until_its_credentials_end() {
    use aws_sdk_s3::presigning::PresigningConfig;
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::client::legacy;
    let aws = Aws::start().await;
    let role = aws.role();
    let signed = PresigningConfig::expires_in(Duration::from_secs(60)).unwrap();
    let url = role.0.get_object().bucket(BUCKET).key(KEY).presigned(signed).await.unwrap().uri().to_owned();
    let client = legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http::<Empty<bytes::Bytes>>();
    let get = async || {
        let request = http::Request::get(&url).header("range", "bytes=0-9").body(Empty::new()).unwrap();
        let answer = client.request(request).await.unwrap();
        (answer.status().as_u16(), answer.into_body().collect().await.unwrap().to_bytes())
    };
    assert_eq!(get().await, (206, bytes::Bytes::from(contents(1)[..10].to_vec())));
    assert_eq!(aws.controls().asked()[0].range.map(|range| range.first), Some(0));
    aws.controls().expire_credentials();
    let (status, body) = get().await;
    assert_eq!(status, 400);
    assert!(String::from_utf8_lossy(&body).contains("ExpiredToken"));
}
