//! A second opinion on S3: ministack, written by others, is asked the same questions as our own stand-in, by AWS's client,
//! and must answer the same; and the daemon's image store gets images from it.
//!
//! ministack listens on all addresses. It runs in a network namespace that this program makes for itself (`unshare`), so it
//! needs root, or user namespaces; it ends with it. Prints a line for each test and a summary as cargo's tests do.

use crate::imds::{Imds, Instance};
use crate::processes::Owned;
use crate::s3::{Algorithm, S3, Stored};
use crate::{binaries, eif};
use anyhow::{Context as _, ensure};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, SharedCredentialsProvider};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{
    BucketVersioningStatus, ChecksumAlgorithm, ChecksumMode, CompletedMultipartUpload, CompletedPart,
    VersioningConfiguration,
};
use enclaved::host::{ImageStore as _, image_store::Store};
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::id::EifDigest;
use enclaved_core::image::ExpectedImage;
use enclaved_core::plan::Prefer;
use sha2::{Digest as _, Sha256};
use std::fmt::Debug;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Set in the process that is in the namespace.
const INSIDE: &str = "ENCLAVED_SECOND_OPINION_INSIDE";
const PORT: &str = "4566";
const URL: &str = "http://127.0.0.1:4566";
const BUCKET: &str = "caution-d-0001-images";
const KEY: &str = "signer.eif";
/// The smallest part that S3 takes of an upload in parts.
const PART: usize = 5 << 20;
/// Several parts of any download that is ranged.
const IMAGE: usize = 40 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// The program.
pub fn main() -> ExitCode {
    let done = if std::env::var_os(INSIDE).is_some() { inside() } else { outside() };
    done.unwrap_or_else(|error| {
        eprintln!("second-opinion: {error:#}");
        ExitCode::FAILURE
    })
}

/// Runs this program again where nothing of the network can be reached, nor reaches it.
fn outside() -> anyhow::Result<ExitCode> {
    let program = binaries::of_others("ministack")?;
    let folder = tempfile::tempdir()?;
    let mut command = Command::new("unshare");
    command.arg(if rustix::process::geteuid().is_root() { "-n" } else { "-rn" }).arg(std::env::current_exe()?);
    command.arg(&program).current_dir(folder.path()).env(INSIDE, "1").stdin(Stdio::null());
    command.env("TMPDIR", folder.path()).env("HOME", folder.path());
    // What the image store, which takes its settings from here, is to use.
    command.env("AWS_ENDPOINT_URL", URL).env("AWS_REGION", "us-east-1").env("AWS_EC2_METADATA_DISABLED", "true");
    command.env("AWS_ACCESS_KEY_ID", "AKIASECONDOPINION000").env("AWS_SECRET_ACCESS_KEY", "any");
    command.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    let status = command.status().context("running unshare")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn inside() -> anyhow::Result<ExitCode> {
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("running ip")?;
    ensure!(up.success(), "the namespace's loopback interface can't be used: {up}");
    let program = std::env::args_os().nth(1).context("ministack's path")?;
    let folder = tempfile::tempdir()?;
    let log = std::fs::File::create(folder.path().join("ministack.log"))?;
    let mut command = Command::new(program);
    command.env("GATEWAY_PORT", PORT).env("BIND_HOST", "127.0.0.1").env("SERVICES", "s3").stdin(Stdio::null());
    command.env("S3_DATA_DIR", folder.path().join("s3")).stdout(log.try_clone()?).stderr(log);
    let _ministack = Owned(command.spawn().context("starting ministack")?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let told = runtime.block_on(ask_all(folder.path()));
    if told.is_err() {
        let log = std::fs::read_to_string(folder.path().join("ministack.log")).unwrap_or_default();
        eprintln!("ministack's log:\n{log}");
    }
    let Tally { passed, failed } = told?;
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed;");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Debug, Default)]
struct Tally {
    passed: u32,
    failed: u32,
}

impl Tally {
    fn test(&mut self, name: &str, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                self.passed += 1;
                println!("test {name} ... ok");
            }
            Err(why) => {
                self.failed += 1;
                println!("test {name} ... FAILED\n{why}");
            }
        }
    }
}

async fn ask_all(folder: &Path) -> anyhow::Result<Tally> {
    let imds = Imds::start(Instance::sample()).await?;
    let stand_in = S3::start(&folder.join("stand-in"), imds.credentials()).await?;
    let ours = stand_in.owner();
    let ours = Client::from_conf(ours.config().to_builder().retry_config(RetryConfig::disabled()).build());
    let theirs = client();
    let deadline = Instant::now() + DEADLINE;
    while let Err(error) = theirs.list_buckets().send().await {
        ensure!(Instant::now() < deadline, "ministack does not answer: {error:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    theirs.create_bucket().bucket(BUCKET).send().await.context("making a bucket")?;
    ours.create_bucket().bucket(BUCKET).send().await.context("making a bucket")?;

    let mut tally = Tally::default();
    questions(&mut tally, &ours, &theirs).await?;
    parts(&mut tally, &stand_in, &ours, &theirs).await?;
    versions(&mut tally, &stand_in, &ours, &theirs).await?;
    for (name, outcome) in [
        ("the_image_store_gets_an_image_of_many_parts", image(folder, &theirs, 1).await),
        ("the_image_store_gets_what_was_put_in_its_place", image(folder, &theirs, 2).await),
    ] {
        tally.test(name, outcome.map_err(|error| format!("{error:#}")));
    }
    Ok(tally)
}

fn client() -> Client {
    let credentials = Credentials::new("AKIASECONDOPINION000", "any", None, None, "test");
    let config = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(URL)
        .force_path_style(true)
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .retry_config(RetryConfig::disabled())
        .build();
    Client::from_conf(config)
}

/// What is asked of an object.
#[derive(Debug, Clone, Copy, Default)]
struct Question<'a> {
    range: Option<&'a str>,
    if_match: Option<&'a str>,
    if_none_match: Option<&'a str>,
    version: Option<&'a str>,
    checksums: bool,
}

impl Question<'_> {
    /// The answers to a GET and to a HEAD, as far as they must not differ.
    async fn ask(self, client: &Client) -> [String; 2] {
        let mode = self.checksums.then_some(ChecksumMode::Enabled);
        let own = str::to_owned;
        let get = client.get_object().bucket(BUCKET).key(KEY).set_range(self.range.map(own));
        let get = get.set_if_match(self.if_match.map(own)).set_if_none_match(self.if_none_match.map(own));
        let get = match get.set_version_id(self.version.map(own)).set_checksum_mode(mode.clone()).send().await {
            Ok(answer) => {
                let said = format!(
                    "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
                    answer.content_length,
                    answer.content_range,
                    answer.e_tag,
                    answer.checksum_crc32,
                    answer.checksum_crc32_c,
                    answer.checksum_crc64_nvme,
                    answer.checksum_sha1,
                    answer.checksum_sha256,
                    answer.checksum_type.filter(|_| self.checksums)
                );
                match answer.body.collect().await {
                    Ok(body) => format!("{said} {:02x?}", Sha256::digest(body.to_vec())),
                    Err(error) => format!("{said} {error}"),
                }
            }
            Err(error) => refused(&error),
        };
        let head = client.head_object().bucket(BUCKET).key(KEY).set_range(self.range.map(own));
        let head = head.set_if_match(self.if_match.map(own)).set_if_none_match(self.if_none_match.map(own));
        let head = match head.set_version_id(self.version.map(own)).set_checksum_mode(mode).send().await {
            Ok(answer) => format!(
                "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
                answer.content_length,
                answer.e_tag,
                answer.checksum_crc32,
                answer.checksum_crc32_c,
                answer.checksum_crc64_nvme,
                answer.checksum_sha1,
                answer.checksum_sha256,
                answer.checksum_type.filter(|_| self.checksums)
            ),
            Err(error) => refused(&error),
        };
        [get, head]
    }

    /// Asks both, and compares.
    async fn compare(self, tally: &mut Tally, name: &str, ours: &Client, theirs: &Client) {
        let (ours, theirs) = (self.ask(ours).await, self.ask(theirs).await);
        let answers = ["get", "head"].into_iter().zip(ours.into_iter().zip(theirs));
        // S3 documents that a HEAD honours a range, in its length and by 416; ministack does not look at it.
        let comparable = if self.range.is_some() { 1 } else { 2 };
        for (method, (ours, theirs)) in answers.take(comparable) {
            let outcome = if ours == theirs { Ok(()) } else { Err(format!("  ours:   {ours}\n  theirs: {theirs}")) };
            tally.test(&format!("{method}_{name}"), outcome);
        }
    }
}

fn refused<E: ProvideErrorMetadata + Debug>(error: &SdkError<E>) -> String {
    let status = error.raw_response().map(|response| response.status().as_u16());
    // Some put a code of their own where an answer has no body.
    let code = error.code().filter(|_| !matches!(status, Some(304)));
    format!("{status:?} {code:?}")
}

async fn put(client: &Client, contents: Vec<u8>, checksum: Option<ChecksumAlgorithm>) -> anyhow::Result<String> {
    let put = client.put_object().bucket(BUCKET).key(KEY).body(contents.into()).set_checksum_algorithm(checksum);
    put.send().await.context("putting an object")?.e_tag.context("no ETag")
}

async fn questions(tally: &mut Tally, ours: &Client, theirs: &Client) -> anyhow::Result<()> {
    let contents: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let tag = put(ours, contents.clone(), None).await?;
    let same = put(theirs, contents.clone(), None).await?;
    tally.test("the_etag_is_the_same", if tag == same { Ok(()) } else { Err(format!("{tag} {same}")) });
    let plain = Question::default();
    let good = Question { if_match: Some(&tag), ..plain };
    let bad = Question { if_match: Some("\"00000000000000000000000000000000\""), ..plain };
    for (name, question) in [
        ("of_the_whole", plain),
        ("with_its_etag", good),
        ("with_another_etag", bad),
        ("with_any_etag", Question { if_match: Some("*"), ..plain }),
        ("if_changed_when_it_is_not", Question { if_none_match: Some(&tag), ..plain }),
        ("if_changed_when_it_is", Question { if_none_match: bad.if_match, ..plain }),
        ("of_a_range", Question { range: Some("bytes=1000-1999"), ..good }),
        ("of_a_range_with_another_etag", Question { range: Some("bytes=1000-1999"), ..bad }),
        ("of_a_range_over_the_end", Question { range: Some("bytes=1199990-9999999"), ..good }),
        ("of_a_range_to_the_end", Question { range: Some("bytes=1199990-"), ..good }),
        ("of_the_last_bytes", Question { range: Some("bytes=-10"), ..good }),
        ("of_a_range_beyond_the_end", Question { range: Some("bytes=1200000-"), ..good }),
    ] {
        question.compare(tally, name, ours, theirs).await;
    }
    for algorithm in [
        ChecksumAlgorithm::Crc32,
        ChecksumAlgorithm::Crc32C,
        ChecksumAlgorithm::Crc64Nvme,
        ChecksumAlgorithm::Sha1,
        ChecksumAlgorithm::Sha256,
    ] {
        for client in [ours, theirs] {
            put(client, contents.clone(), Some(algorithm.clone())).await?;
        }
        let name = format!("with_its_{}", algorithm.as_str().to_ascii_lowercase());
        Question { checksums: true, ..plain }.compare(tally, &name, ours, theirs).await;
    }
    Ok(())
}

/// An object that was put in parts.
async fn parts(tally: &mut Tally, stand_in: &S3, ours: &Client, theirs: &Client) -> anyhow::Result<()> {
    let contents = eif::sample("parts", 3, 2 * PART + 1000).to_bytes();
    let algorithm = ChecksumAlgorithm::Sha256;
    let upload = theirs.create_multipart_upload().bucket(BUCKET).key(KEY).checksum_algorithm(algorithm.clone());
    let id = upload.send().await.context("beginning an upload")?.upload_id.context("no upload")?;
    let mut done = CompletedMultipartUpload::builder();
    for (number, part) in (1..).zip(contents.chunks(PART)) {
        let put = theirs.upload_part().bucket(BUCKET).key(KEY).upload_id(&id).part_number(number);
        let put = put.checksum_algorithm(algorithm.clone()).body(part.to_vec().into()).send().await;
        let put = put.context("putting a part")?;
        let part = CompletedPart::builder().part_number(number).set_e_tag(put.e_tag);
        done = done.parts(part.set_checksum_sha256(put.checksum_sha256).build());
    }
    let finish = theirs.complete_multipart_upload().bucket(BUCKET).key(KEY).upload_id(&id);
    finish.multipart_upload(done.build()).send().await.context("ending an upload")?;
    let stored = Stored::Parts { algorithm: Algorithm::Sha256, size: PART as u64 };
    stand_in.controls().put(BUCKET, KEY, contents, stored)?;
    let question = Question { checksums: true, ..Question::default() };
    question.compare(tally, "of_an_upload_in_parts", ours, theirs).await;
    Ok(())
}

async fn versions(tally: &mut Tally, stand_in: &S3, ours: &Client, theirs: &Client) -> anyhow::Result<()> {
    stand_in.controls().keep_versions(BUCKET);
    let on = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    theirs.put_bucket_versioning().bucket(BUCKET).versioning_configuration(on).send().await.context("versions")?;
    let mut old = Vec::new();
    for client in [ours, theirs] {
        let put = client.put_object().bucket(BUCKET).key(KEY).body(b"old".to_vec().into()).send().await?;
        old.push(put.version_id.context("no version")?);
        client.put_object().bucket(BUCKET).key(KEY).body(b"new".to_vec().into()).send().await?;
    }
    // Each names versions in its own way.
    let of = |version| Question { version, ..Question::default() };
    let (ours_old, theirs_old) = (of(old.first().map(String::as_str)), of(old.get(1).map(String::as_str)));
    let (ours_said, theirs_said) = (ours_old.ask(ours).await, theirs_old.ask(theirs).await);
    let differ = format!("  ours:   {ours_said:?}\n  theirs: {theirs_said:?}");
    tally.test("an_old_version_is_read_by_its_id", if ours_said == theirs_said { Ok(()) } else { Err(differ) });
    of(None).compare(tally, "of_the_newest_version", ours, theirs).await;
    Ok(())
}

/// The daemon's image store gets an image from them.
async fn image(folder: &Path, theirs: &Client, seed: u64) -> anyhow::Result<()> {
    let image = eif::sample("signer", seed, IMAGE).to_bytes();
    let digest = EifDigest(Sha256::digest(&image).into());
    put(theirs, image, None).await?;
    let failed = |failure: Failure| anyhow::anyhow!("{failure}");
    let store = Store::new(&folder.join(format!("images-{seed}"))).map_err(failed)?;
    let request = ImageRequest { source: format!("s3://{BUCKET}/{KEY}").parse()?, expected: ExpectedImage::default() };
    let got = store.fetch(&request, Prefer::Cached, Arc::default()).await.map_err(failed)?;
    ensure!(got.digest() == digest, "it is another image: {}", got.digest());
    Ok(())
}
