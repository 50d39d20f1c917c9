//! The objects: every version a file of its own, with the ETag and the checksum that S3 would keep of it. Answers GET and
//! HEAD as S3 does: conditions, ranges, versions, checksums on request. Knows nothing of callers or faults.
//!
//! A request that is being answered keeps its version, as with S3, also when the object is replaced meanwhile.

use super::lock;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};
use hyper::{HeaderMap, header};
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{self, Checksum as _};
use s3s::dto::{
    AcceptRanges, Checksum, ChecksumMode, ChecksumType, CreateBucketInput, CreateBucketOutput, ETag, ETagCondition,
    GetObjectInput, GetObjectOutput, HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput,
    PutObjectInput, PutObjectOutput, Range, StreamingBlob, Timestamp,
};
use s3s::{S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::SystemTime;

/// Read from a file at a time.
const PIECE: usize = 256 * 1024;

/// How S3 can sum an object up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are called what they are")]
pub enum Algorithm {
    Crc32,
    Crc32c,
    Crc64Nvme,
    Sha1,
    Sha256,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Crc32, Self::Crc32c, Self::Crc64Nvme, Self::Sha1, Self::Sha256];

    fn hasher(self) -> ChecksumHasher {
        let mut hasher = ChecksumHasher::default();
        match self {
            Self::Crc32 => hasher.crc32 = Some(crypto::Crc32::default()),
            Self::Crc32c => hasher.crc32c = Some(crypto::Crc32c::default()),
            Self::Crc64Nvme => hasher.crc64nvme = Some(crypto::Crc64Nvme::default()),
            Self::Sha1 => hasher.sha1 = Some(crypto::Sha1::default()),
            Self::Sha256 => hasher.sha256 = Some(crypto::Sha256::default()),
        }
        hasher
    }

    fn digest(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Crc32 => crypto::Crc32::checksum(bytes).to_vec(),
            Self::Crc32c => crypto::Crc32c::checksum(bytes).to_vec(),
            Self::Crc64Nvme => crypto::Crc64Nvme::checksum(bytes).to_vec(),
            Self::Sha1 => crypto::Sha1::checksum(bytes).as_slice().to_vec(),
            Self::Sha256 => crypto::Sha256::checksum(bytes).as_slice().to_vec(),
        }
    }
}

/// What S3 keeps of an object besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// No checksum, as objects have that were put before S3 made its own.
    Plain,
    /// A checksum of the whole object.
    Full(Algorithm),
    /// What comes of an upload in parts of this size: a checksum of the parts' checksums, and an ETag of the same kind.
    Parts {
        /// Of the parts and of the whole.
        algorithm: Algorithm,
        /// In bytes, at least 1; the last part may be smaller.
        size: u64,
    },
    /// A checksum of the whole object that is not that of its bytes: they went bad after they were summed up.
    Wrong(Algorithm),
}

/// What is put there.
#[derive(Debug, Clone)]
pub enum Contents {
    /// These bytes.
    Bytes(Bytes),
    /// Those of a file, which is copied, or linked where that can be.
    File(PathBuf),
}

impl From<Vec<u8>> for Contents {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl From<&Path> for Contents {
    fn from(path: &Path) -> Self {
        Self::File(path.to_owned())
    }
}

/// What S3 says of an object that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// The ETag, in its quotes.
    pub etag: String,
    /// The version's ID, in a bucket with versions.
    pub version: Option<String>,
}

/// A request marked with this is answered with the whole object, whatever range it asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct WholeBody;

/// One version of one object. Its file goes with the last who uses it.
#[derive(Debug)]
struct Version {
    id: Option<String>,
    etag: String,
    size: u64,
    modified: SystemTime,
    checksum: Checksum,
    file: PathBuf,
}

impl Drop for Version {
    fn drop(&mut self) {
        // The folder is a temporary one: it goes with all that is in it.
        let _ignored = fs::remove_file(&self.file);
    }
}

#[derive(Debug, Default)]
struct Bucket {
    versions: bool,
    /// The newest last. In a bucket without versions there is one.
    objects: BTreeMap<String, Vec<Arc<Version>>>,
}

#[derive(Debug)]
pub(super) struct Objects {
    folder: PathBuf,
    next: AtomicU64,
    buckets: Mutex<BTreeMap<String, Bucket>>,
}

impl Objects {
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned(), next: AtomicU64::new(1), buckets: Mutex::default() })
    }

    /// From now on, what is replaced in this bucket stays under its version's ID.
    pub(super) fn keep_versions(&self, bucket: &str) {
        lock(&self.buckets).entry(bucket.to_owned()).or_default().versions = true;
    }

    /// Puts an object there, making the bucket if need be.
    pub(super) fn put(&self, bucket: &str, key: &str, contents: &Contents, stored: Stored) -> io::Result<Put> {
        lock(&self.buckets).entry(bucket.to_owned()).or_default();
        let file = self.new_file();
        match contents {
            Contents::Bytes(bytes) => fs::write(&file, bytes)?,
            Contents::File(path) => fs::hard_link(path, &file).or_else(|_| fs::copy(path, &file).map(drop))?,
        }
        let (etag, checksum) = sums(&file, stored)?;
        self.keep(bucket, key, file, etag, checksum)
    }

    /// Removes an object, with all its versions.
    pub(super) fn remove(&self, bucket: &str, key: &str) {
        if let Some(bucket) = lock(&self.buckets).get_mut(bucket) {
            bucket.objects.remove(key);
        }
    }

    fn new_file(&self) -> PathBuf {
        self.folder.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    fn keep(&self, bucket: &str, key: &str, file: PathBuf, etag: String, checksum: Checksum) -> io::Result<Put> {
        let size = fs::metadata(&file)?.len();
        let mut buckets = lock(&self.buckets);
        let bucket = buckets.get_mut(bucket).ok_or(io::ErrorKind::NotFound)?;
        let id = bucket.versions.then(|| crate::imds::unique(32));
        let put = Put { etag: format!("\"{etag}\""), version: id.clone() };
        let version = Arc::new(Version { id, etag, size, modified: SystemTime::now(), checksum, file });
        let versions = bucket.objects.entry(key.to_owned()).or_default();
        if !bucket.versions {
            versions.clear();
        }
        versions.push(version);
        Ok(put)
    }

    fn find(&self, bucket: &str, key: &str, version: Option<&str>) -> S3Result<Arc<Version>> {
        let buckets = lock(&self.buckets);
        let bucket = buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        let versions = bucket.objects.get(key).ok_or_else(|| s3_error!(NoSuchKey))?;
        let found = match version {
            None => versions.last(),
            Some(id) => versions.iter().find(|version| version.id.as_deref().unwrap_or("null") == id),
        };
        found.cloned().ok_or_else(|| s3_error!(NoSuchVersion))
    }

    async fn take(&self, file: &Path, body: StreamingBlob, hasher: &mut ChecksumHasher) -> S3Result<String> {
        let failed = |error: io::Error| S3Error::internal_error(error);
        let mut out = File::create(file).map_err(failed)?;
        let mut md5 = crypto::Md5::new();
        let mut body = s3s::Body::from(body);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| S3Error::with_source(S3ErrorCode::IncompleteBody, error))?;
            if let Ok(bytes) = frame.into_data() {
                md5.update(&bytes);
                hasher.update(&bytes);
                out.write_all(&bytes).map_err(failed)?;
            }
        }
        Ok(hex(md5.finalize().as_slice()))
    }
}

/// ETag and checksum as S3 makes them of a file.
fn sums(file: &Path, stored: Stored) -> io::Result<(String, Checksum)> {
    let mut md5 = crypto::Md5::new();
    match stored {
        Stored::Plain => {
            pieces(file, PIECE, |piece| md5.update(piece))?;
            Ok((hex(md5.finalize().as_slice()), Checksum::default()))
        }
        Stored::Full(algorithm) | Stored::Wrong(algorithm) => {
            let mut hasher = algorithm.hasher();
            if stored == Stored::Wrong(algorithm) {
                hasher.update(b"what was here before");
            }
            pieces(file, PIECE, |piece| {
                md5.update(piece);
                hasher.update(piece);
            })?;
            Ok((hex(md5.finalize().as_slice()), typed(hasher.finalize(), ChecksumType::FULL_OBJECT)))
        }
        Stored::Parts { algorithm, size } => {
            let mut hasher = algorithm.hasher();
            let mut parts = 0_u64;
            let size = usize::try_from(size).map_err(io::Error::other)?;
            pieces(file, size, |part| {
                md5.update(crypto::Md5::checksum(part).as_slice());
                hasher.update(&algorithm.digest(part));
                parts += 1;
            })?;
            let mut checksum = typed(hasher.finalize(), ChecksumType::COMPOSITE);
            for value in [
                &mut checksum.checksum_crc32,
                &mut checksum.checksum_crc32c,
                &mut checksum.checksum_crc64nvme,
                &mut checksum.checksum_sha1,
                &mut checksum.checksum_sha256,
            ] {
                *value = value.take().map(|value| format!("{value}-{parts}"));
            }
            Ok((format!("{}-{parts}", hex(md5.finalize().as_slice())), checksum))
        }
    }
}

fn typed(checksum: Checksum, kind: &'static str) -> Checksum {
    Checksum { checksum_type: Some(ChecksumType::from_static(kind)), ..checksum }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Goes through a file in pieces of this size; only the last is smaller.
fn pieces(file: &Path, size: usize, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut file = File::open(file)?;
    let mut piece = Vec::new();
    loop {
        piece.clear();
        Read::by_ref(&mut file).take(size as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            return Ok(());
        }
        each(&piece);
    }
}

/// Whether the conditions of a request hold; what S3 answers if not.
fn conditions(version: &Version, matching: Option<&ETagCondition>, other: Option<&ETagCondition>) -> S3Result<()> {
    let is = |condition: &ETagCondition| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(tag) => tag.as_strong() == Some(version.etag.as_str()),
    };
    if matching.is_some_and(|condition| !is(condition)) {
        return Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold"));
    }
    if other.is_some_and(is) {
        let mut headers = HeaderMap::new();
        if let Ok(tag) = format!("\"{}\"", version.etag).parse() {
            headers.insert(header::ETAG, tag);
        }
        let mut unchanged = s3_error!(NotModified);
        unchanged.set_headers(headers);
        return Err(unchanged);
    }
    Ok(())
}

/// The part of an object that is asked for.
struct Part {
    first: u64,
    length: u64,
    /// Set for a part, not for the whole.
    content_range: Option<String>,
}

impl Part {
    fn of(version: &Version, range: Option<Range>) -> S3Result<Self> {
        let Some(range) = range else { return Ok(Self { first: 0, length: version.size, content_range: None }) };
        let found = range.check(version.size)?;
        let content_range = Some(format!("bytes {}-{}/{}", found.start, found.end - 1, version.size));
        Ok(Self { first: found.start, length: found.end - found.start, content_range })
    }

    fn length(&self) -> Option<i64> {
        i64::try_from(self.length).ok()
    }
}

/// The checksum, if it was asked for and stands for all that is sent.
fn checksum_of(version: &Version, part: &Part, mode: Option<&ChecksumMode>) -> Checksum {
    let asked = mode.is_some_and(|mode| mode.as_str() == ChecksumMode::ENABLED);
    if asked && part.length == version.size { version.checksum.clone() } else { Checksum::default() }
}

/// S3 as s3s serves it.
#[derive(Debug, Clone)]
pub(super) struct Service(pub(super) Arc<Objects>);

#[async_trait::async_trait]
impl s3s::S3 for Service {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        lock(&self.0.buckets).entry(req.input.bucket).or_default();
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        if lock(&self.0.buckets).contains_key(&req.input.bucket) {
            return Ok(S3Response::new(HeadBucketOutput::default()));
        }
        Err(s3_error!(NoSuchBucket))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        let body = input.body.ok_or_else(|| s3_error!(IncompleteBody))?;
        if !lock(&self.0.buckets).contains_key(&input.bucket) {
            return Err(s3_error!(NoSuchBucket));
        }
        // The checksum that the caller names, in a header before the body or after it, is checked and kept.
        let named = |name: &str| {
            let algorithm = input.checksum_algorithm.as_ref().map(|algorithm| algorithm.as_str().to_ascii_lowercase());
            let trailer = req.headers.get("x-amz-trailer").and_then(|trailer| trailer.to_str().ok());
            algorithm.as_deref() == Some(name)
                || trailer == Some(&format!("x-amz-checksum-{name}"))
                || req.headers.contains_key(format!("x-amz-checksum-{name}"))
        };
        let names = ["crc32", "crc32c", "crc64nvme", "sha1", "sha256"];
        let chosen = names.iter().zip(Algorithm::ALL).find(|(name, _)| named(name));
        // S3 makes this one itself where the caller names none.
        let (name, algorithm) =
            chosen.map_or(("crc64nvme", Algorithm::Crc64Nvme), |(name, algorithm)| (*name, algorithm));
        let mut hasher = algorithm.hasher();
        let file = self.0.new_file();
        let etag = self.0.take(&file, body, &mut hasher).await?;
        let checksum = hasher.finalize();
        let found = [
            &checksum.checksum_crc32,
            &checksum.checksum_crc32c,
            &checksum.checksum_crc64nvme,
            &checksum.checksum_sha1,
            &checksum.checksum_sha256,
        ];
        let found = found.into_iter().flatten().next().map(String::as_str);
        let header = format!("x-amz-checksum-{name}");
        let text = |headers: &HeaderMap| headers.get(&header).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let after = req.trailing_headers.as_ref().and_then(|trailers| trailers.read(text)).flatten();
        if let Some(said) = text(&req.headers).or(after)
            && Some(said.as_str()) != found
        {
            return Err(s3_error!(BadDigest, "the {name} of the body is not the one that was sent"));
        }
        let checksum = typed(checksum, ChecksumType::FULL_OBJECT);
        let put = self.0.keep(&input.bucket, &input.key, file, etag, checksum).map_err(S3Error::internal_error)?;
        let e_tag = Some(ETag::Strong(put.etag.trim_matches('"').to_owned()));
        Ok(S3Response::new(PutObjectOutput { e_tag, version_id: put.version, ..Default::default() }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let version = self.0.find(&input.bucket, &input.key, input.version_id.as_deref())?;
        conditions(&version, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let range = input.range.filter(|_| req.extensions.get::<WholeBody>().is_none());
        let part = Part::of(&version, range)?;
        let checksum = checksum_of(&version, &part, input.checksum_mode.as_ref());
        let file = File::open(&version.file).map_err(S3Error::internal_error)?;
        let reading = Reading { file, at: part.first, left: part.length, _version: Arc::clone(&version) };
        Ok(S3Response::new(GetObjectOutput {
            accept_ranges: Some(AcceptRanges::from("bytes")),
            body: Some(StreamingBlob::from(s3s::Body::http_body(reading))),
            content_length: part.length(),
            content_range: part.content_range,
            e_tag: Some(ETag::Strong(version.etag.clone())),
            last_modified: Some(Timestamp::from(version.modified)),
            version_id: version.id.clone(),
            checksum_crc32: checksum.checksum_crc32,
            checksum_crc32c: checksum.checksum_crc32c,
            checksum_crc64nvme: checksum.checksum_crc64nvme,
            checksum_sha1: checksum.checksum_sha1,
            checksum_sha256: checksum.checksum_sha256,
            checksum_type: checksum.checksum_type,
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        let version = self.0.find(&input.bucket, &input.key, input.version_id.as_deref())?;
        conditions(&version, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let part = Part::of(&version, input.range)?;
        let checksum = checksum_of(&version, &part, input.checksum_mode.as_ref());
        Ok(S3Response::new(HeadObjectOutput {
            accept_ranges: Some(AcceptRanges::from("bytes")),
            content_length: part.length(),
            content_range: part.content_range,
            e_tag: Some(ETag::Strong(version.etag.clone())),
            last_modified: Some(Timestamp::from(version.modified)),
            version_id: version.id.clone(),
            checksum_crc32: checksum.checksum_crc32,
            checksum_crc32c: checksum.checksum_crc32c,
            checksum_crc64nvme: checksum.checksum_crc64nvme,
            checksum_sha1: checksum.checksum_sha1,
            checksum_sha256: checksum.checksum_sha256,
            checksum_type: checksum.checksum_type,
            ..Default::default()
        }))
    }
}

/// A part of a file on its way. Reads block; they are small and come from the page cache.
struct Reading {
    file: File,
    at: u64,
    left: u64,
    /// Keeps the file.
    _version: Arc<Version>,
}

impl hyper::body::Body for Reading {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let count = usize::try_from(self.left).map_or(PIECE, |left| left.min(PIECE));
        if count == 0 {
            return Poll::Ready(None);
        }
        let mut piece = vec![0; count];
        if let Err(error) = self.file.read_exact_at(&mut piece, self.at) {
            return Poll::Ready(Some(Err(error)));
        }
        self.at += count as u64;
        self.left -= count as u64;
        Poll::Ready(Some(Ok(Frame::data(piece.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
