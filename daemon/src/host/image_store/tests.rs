//! The store with files, with a cache that goes bad, and with an S3 of canned answers. What is more than that has files of its
//! own.

mod caching;
pub(super) mod crash;
mod downloads;
mod lanes;
mod server;
mod web;

use super::*;
use crate::imds::ROLE;
use crate::test_support::eif::{damage, sample};
use crate::test_support::http::{Answer, Server};
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::config::{Credentials, SharedCredentialsProvider};
use enclaved_core::id::Pcr;
use enclaved_core::image::{ExpectedImage, Pins};
use std::fs;
use std::sync::Mutex;
use tempfile::TempDir;

fn image() -> Vec<u8> {
    sample("signer", 1, 300_000).to_bytes()
}

fn request(source: &str) -> ImageRequest {
    ImageRequest { source: source.parse().unwrap(), expected: ExpectedImage::default() }
}

/// A store, and a file that images come from.
struct Stand {
    folder: TempDir,
    store: Store,
}

impl Stand {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("images")).unwrap();
        Self { folder, store }
    }

    /// One whose S3 is that server, and whose metadata service says that.
    fn with_s3(server: &Server, imds: &str) -> Self {
        Self::with_s3_at(&server.url(), imds)
    }

    fn with_s3_at(url: &str, imds: &str) -> Self {
        let mut stand = Self::new();
        let config = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("eu-central-1"))
            .endpoint_url(url)
            .credentials_provider(SharedCredentialsProvider::new(Credentials::new(
                "AKIATEST", "secret", None, None, "test",
            )))
            .build();
        stand.store.s3 = S3::with(&config, crate::imds::Imds::at(imds).unwrap());
        stand
    }

    /// From now on on that disk.
    fn on_disk(&mut self, disk: Disk) {
        self.store.cache = Arc::new(Cache::open(&self.folder.path().join("images"), disk).unwrap());
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("signer.eif")
    }

    fn request(&self) -> ImageRequest {
        request(&format!("file://{}", self.source().display()))
    }

    async fn fetch(&self, request: &ImageRequest) -> Outcome<VerifiedImage> {
        self.store.fetch(request, Prefer::Cached, Arc::default()).await
    }

    /// What is in the folder of images, by kind.
    fn kept(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join("images")).unwrap();
        let kind = |name: &str| name.rsplit_once('.').unwrap().1.to_owned();
        let mut kinds: Vec<String> = entries.map(|entry| kind(entry.unwrap().file_name().to_str().unwrap())).collect();
        kinds.sort();
        kinds
    }
}

const NOWHERE: &str = "http://127.0.0.1:1";

#[tokio::test]
async fn an_image_is_taken_from_a_file_proven_and_kept_under_its_digest() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let progress = Arc::new(Progress::default());
    let fetched = stand.store.fetch(&stand.request(), Prefer::Cached, progress.clone()).await.unwrap();
    assert_eq!(fetched.name(), Some("signer"));
    let size = u64::try_from(image().len()).unwrap();
    assert_eq!((progress.get(), progress.stage()), ((size, size), FetchStage::Measuring));
    assert_eq!(fs::read(stand.store.path(&fetched.digest())).unwrap(), image());
    assert_eq!(stand.kept(), ["eif", "json"]);
}

#[tokio::test]
async fn a_cached_image_is_proven_again_without_its_source() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let first = stand.fetch(&stand.request()).await.unwrap();
    fs::remove_file(stand.source()).unwrap();
    assert_eq!(stand.fetch(&stand.request()).await.unwrap(), first);
    // As after a restart.
    let again = Store::new(&stand.folder.path().join("images")).unwrap();
    assert_eq!(again.fetch(&stand.request(), Prefer::Cached, Arc::default()).await.unwrap(), first);
}

#[tokio::test]
async fn a_cached_image_that_went_bad_is_found_and_fetched_again() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let fetched = stand.fetch(&stand.request()).await.unwrap();
    let kept = stand.store.path(&fetched.digest());
    let other = sample("other", 2, 4096).to_bytes();
    let spoilt = [damage::flipped(image()), damage::truncated(image(), 7), Vec::new(), other];
    for spoilt in spoilt {
        fs::remove_file(&kept).unwrap();
        fs::write(&kept, spoilt).unwrap();
        assert_eq!(stand.fetch(&stand.request()).await.unwrap(), fetched);
        assert_eq!(fs::read(&kept).unwrap(), image());
    }
    fs::remove_file(&kept).unwrap();
    assert_eq!(stand.fetch(&stand.request()).await.unwrap(), fetched);

    // With its source away, a spoilt one is not used either.
    fs::remove_file(&kept).unwrap();
    fs::write(&kept, damage::flipped(image())).unwrap();
    fs::remove_file(stand.source()).unwrap();
    assert!(stand.fetch(&stand.request()).await.is_err());
    assert_eq!(stand.kept(), [""; 0]);
}

#[tokio::test]
async fn an_index_that_went_bad_or_names_another_request_is_not_believed() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let fetched = stand.fetch(&stand.request()).await.unwrap();
    let entry = fs::read_dir(stand.folder.path().join("images")).unwrap().map(|entry| entry.unwrap().path());
    let entry = entry.into_iter().find(|path| path.extension().is_some_and(|end| end == "json")).unwrap();
    let other = fs::read_to_string(&entry).unwrap().replace("signer.eif", "other.eif");
    fs::write(stand.source(), sample("signer", 2, 4096).to_bytes()).unwrap();
    for spoilt in ["", "{", other.as_str()] {
        fs::write(&entry, spoilt).unwrap();
        assert_ne!(stand.fetch(&stand.request()).await.unwrap().digest(), fetched.digest());
    }
}

#[tokio::test]
async fn a_wrong_image_is_refused_with_both_values_and_not_kept() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let expected = Pins { pcr0: Some(Pcr([0xab; 48])), ..Pins::default() }.into();
    let failure = stand.fetch(&ImageRequest { expected, ..stand.request() }).await.unwrap_err();
    assert!(failure.message.contains(&"ab".repeat(48)) && failure.message.contains("PCR0 is "), "{failure}");
    assert!(failure.remedy.unwrap().contains("enclavectl measure"));
    assert_eq!(stand.kept(), [""; 0]);
}

#[tokio::test]
async fn what_is_no_image_is_refused_with_the_reason_and_not_kept() {
    let stand = Stand::new();
    for (bytes, reason) in [
        (damage::truncated(image(), 1), "truncated"),
        (damage::bad_crc(image()), "CRC"),
        (damage::two_faced(image()), "offset"),
        (b"<html>".repeat(200), "not an EIF"),
        (Vec::new(), "is empty"),
    ] {
        fs::write(stand.source(), bytes).unwrap();
        let failure = stand.fetch(&stand.request()).await.unwrap_err();
        assert!(failure.message.contains(reason) && failure.message.contains("signer.eif"), "{failure}");
        assert_eq!(stand.kept(), [""; 0]);
    }
}

#[tokio::test]
async fn a_source_that_is_missing_or_no_file_is_named() {
    let stand = Stand::new();
    let failure = stand.fetch(&stand.request()).await.unwrap_err();
    assert!(failure.message.contains("signer.eif: No such file"), "{failure}");
    fs::create_dir(stand.source()).unwrap();
    assert!(stand.fetch(&stand.request()).await.unwrap_err().message.contains("is not a file"));
}

#[tokio::test]
async fn a_source_that_is_still_being_written_is_told_as_such_and_not_remembered_as_no_image() {
    let mut stand = Stand::new();
    fs::write(stand.source(), damage::truncated(image(), 1000)).unwrap();
    // Its writer goes on before the copy is flushed.
    let (source, written) = (stand.source(), std::sync::Once::new());
    stand.on_disk(crash::Watch::intervening(move |kind| {
        if kind == "synced" {
            written.call_once(|| fs::write(&source, image()).unwrap());
        }
        Ok(())
    }));
    let failure = stand.fetch(&stand.request()).await.unwrap_err();
    assert!(failure.message.contains("signer.eif was written to while it was read"), "{failure}");
    assert!(failure.remedy.unwrap().contains("renaming"));
    assert!(!stand.store.has_refused(&stand.request()));
    stand.fetch(&stand.request()).await.unwrap();
}

#[tokio::test]
async fn space_is_checked_before_an_image_is_taken() {
    let stand = Stand::new();
    let failure = stand.store.cache.check_space(u64::MAX / 4).unwrap_err();
    assert!(failure.message.contains("MiB are free"), "{failure}");
    // A sparse file, larger than any image.
    let file = File::create(stand.source()).unwrap();
    if file.set_len(1 << 43).is_ok() {
        let failure = stand.fetch(&stand.request()).await.unwrap_err();
        assert!(failure.message.contains("8796093022208 bytes: an image has 68719476736 at most"), "{failure}");
    }
}

#[tokio::test]
async fn what_an_earlier_life_left_and_none_can_use_is_removed_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let names = [".incoming-1", ".a.json.0.tmp", "0123456789abcdef.partial", "a.resume", "a.json"];
    for name in names {
        fs::write(folder.path().join(name), "half").unwrap();
    }
    fs::write(folder.path().join("other"), "").unwrap();
    Store::new(folder.path()).unwrap();
    assert_eq!(names.map(|name| folder.path().join(name).exists()), [false; 5]);
    assert!(folder.path().join("other").exists());
}

#[tokio::test]
async fn an_image_is_taken_from_s3() {
    let server = Server::open(|_| Answer::ok(image())).await;
    let stand = Stand::with_s3(&server, NOWHERE);
    let progress = Arc::new(Progress::default());
    let request = request("s3://caution-abc-images/a/signer.eif");
    let fetched = stand.store.fetch(&request, Prefer::Cached, progress.clone()).await.unwrap();
    assert_eq!(fs::read(stand.store.path(&fetched.digest())).unwrap(), image());
    let size = u64::try_from(image().len()).unwrap();
    assert_eq!(progress.get(), (size, size));
    stand.fetch(&request).await.unwrap();
    let asked = server.requests();
    assert_eq!(asked.len(), 2, "the second time it comes from the cache: {asked:?}");
    assert!(asked[0].starts_with("HEAD /caution-abc-images/a/signer.eif"), "{asked:?}");
    assert!(asked[1].starts_with("GET /caution-abc-images/a/signer.eif"), "{asked:?}");
}

#[tokio::test]
async fn a_download_that_is_no_image_is_given_up_at_once() {
    let server = Server::open(|_| Answer::ok(vec![b'x'; 4 << 20])).await;
    let stand = Stand::with_s3(&server, NOWHERE);
    let failure = stand.fetch(&request("s3://bucket/signer.eif")).await.unwrap_err();
    assert!(failure.message.contains("s3://bucket/signer.eif is not an image"), "{failure}");
    assert_eq!(server.requests().len(), 2, "one look and one download");
    assert_eq!(stand.kept(), [""; 0]);
}

fn error(status: u16, code: &str, message: &str) -> Answer {
    let body = format!(r#"<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"#);
    Answer::status(status, body).with_header("content-type", "application/xml").with_header("x-amz-request-id", "REQ1")
}

async fn s3_failure(answer: Answer, imds: &str) -> (Failure, usize) {
    let server = Server::open(move |_| answer.clone()).await;
    let stand = Stand::with_s3(&server, imds);
    let failure = stand.fetch(&request("s3://caution-abc-images/signer.eif")).await.unwrap_err();
    (failure, server.requests().len())
}

#[tokio::test]
async fn a_403_names_bucket_key_and_role_and_both_causes_and_is_not_repeated() {
    let imds = Server::metadata(|path| match path.strip_prefix(ROLE) {
        Some("") => Answer::ok("caution-images"),
        Some("caution-images") => Answer::ok(r#"{"AccessKeyId":"AKIATEST","SecretAccessKey":"x"}"#),
        _ => Answer::status(404, ""),
    })
    .await;
    let (failure, tries) = s3_failure(error(403, "AccessDenied", "Access Denied"), &imds.url()).await;
    for part in ["s3://caution-abc-images/signer.eif", "403 AccessDenied", "role caution-images", "REQ1"] {
        assert!(failure.message.contains(part), "{failure}");
    }
    let remedy = failure.remedy.unwrap();
    assert!(remedy.contains("s3:GetObject on arn:aws:s3:::caution-abc-images/signer.eif"), "{remedy}");
    assert!(remedy.contains("s3:ListBucket"), "{remedy}");
    assert_eq!(tries, 2, "the second asks for the reason, which a HEAD does not get");
}

#[tokio::test]
async fn other_credentials_than_the_roles_are_named_by_their_key() {
    let imds = Server::metadata(|path| match path.strip_prefix(ROLE) {
        Some("") => Answer::ok("caution-images"),
        Some("caution-images") => Answer::ok(r#"{"AccessKeyId":"ASIAOTHER"}"#),
        _ => Answer::status(404, ""),
    })
    .await;
    let (failure, _) = s3_failure(error(403, "InvalidAccessKeyId", "no such key"), &imds.url()).await;
    assert!(failure.message.contains("the access key AKIATEST"), "{failure}");
    assert!(failure.remedy.unwrap().contains("credentials are not valid"));
}

#[tokio::test]
async fn a_404_says_whether_bucket_or_object_is_missing_and_is_not_repeated() {
    let (failure, tries) = s3_failure(error(404, "NoSuchKey", "gone"), NOWHERE).await;
    assert!(failure.remedy.unwrap().contains("no object signer.eif in the bucket"));
    assert_eq!(tries, 2);
    let (failure, _) = s3_failure(error(404, "NoSuchBucket", "gone"), NOWHERE).await;
    assert!(failure.remedy.unwrap().contains("no bucket caution-abc-images"));
}

#[tokio::test]
async fn a_wrong_clock_is_told_with_what_helps() {
    let (failure, _) = s3_failure(error(403, "RequestTimeTooSkewed", "clock"), NOWHERE).await;
    assert!(failure.remedy.unwrap().contains("clock"));
}

#[tokio::test]
async fn missing_credentials_are_explained_by_what_the_metadata_service_says() {
    use s3_failure::{Stage, incomplete};
    let imds = |url: &str| crate::imds::Imds::at(url).unwrap();
    let said = || Some("the credential provider was not enabled".to_owned());

    let failure = incomplete(Stage::Credentials, said(), imds(NOWHERE).role().await);
    assert!(failure.message.contains("the instance metadata service did not answer"), "{failure}");
    assert!(failure.remedy.unwrap().contains("HttpPutResponseHopLimit"));

    let without_role = Server::metadata(|_| Answer::status(404, "")).await;
    let failure = incomplete(Stage::Credentials, said(), imds(&without_role.url()).role().await);
    assert!(failure.message.contains("the instance has no role"), "{failure}");
    let failure = incomplete(Stage::Region, None, imds(&without_role.url()).role().await);
    assert!(failure.remedy.unwrap().contains("AWS_REGION"));

    let disabled = Server::metadata(|_| Answer::status(403, "")).await;
    let failure = incomplete(Stage::Credentials, said(), imds(&disabled.url()).role().await);
    assert!(failure.message.contains("answered 403"), "{failure}");

    let with_role = Server::metadata(|_| Answer::ok("caution-images")).await;
    let failure = incomplete(Stage::Credentials, said(), imds(&with_role.url()).role().await);
    assert!(failure.message.contains("role caution-images can't be used"), "{failure}");
}
