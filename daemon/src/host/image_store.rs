//! Images on disk: fetched from where the configuration says, measured while they arrive, kept under their SHA-256, and
//! proven anew by every fetch, whether they came from afar or from the cache. What an image must be is core's to say
//! (`core::image`), and so is how a download goes (`core::fetch`).
//!
//! | file | subject |
//! |---|---|
//! | `download` | one download: requests side by side into one file |
//! | `remote`, `s3`, `https` | places that images are got from |
//! | `glance` | whether an image could be had, without getting it |
//! | `cache`, `index`, `sidecar`, `stamp` | the folder, what requests came to, what can be continued, what is still what it was |
//! | `measure`, `front`, `checksum` | reading behind a download: measurements and checksum |
//! | `disk` | every operation on the disk, so that a test can end the process after each |

mod cache;
mod checksum;
mod disk;
mod download;
mod front;
mod glance;
mod https;
mod index;
mod local;
mod measure;
mod remote;
mod s3;
mod s3_failure;
mod sidecar;
mod stamp;
mod taking;
#[cfg(test)]
mod tests;

use super::{FetchStage, ImageStore, Outcome, Progress, Proof};
use cache::Cache;
use disk::Disk;
use enclaved_core::desired::{ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use enclaved_core::id::EifDigest;
use enclaved_core::image::{VerifiedImage, verify};
use enclaved_core::observed::{CacheItem, ImageCache};
use enclaved_core::plan::Prefer;
pub use glance::{Glance, is_cached};
use https::Https;
use index::Entry;
pub(crate) use measure::{IntakeError, measure_whole};
use s3::S3;
use stamp::{FileStamp, Stamp};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use taking::Refused;
use tokio::sync::OwnedMutexGuard;

/// So many refused objects are remembered.
const MAX_REFUSED: usize = 64;
/// A cached image that is touched each time it is measured is measured so often.
const MAX_MEASURED: u32 = 3;

/// The images of this host.
#[derive(Debug)]
pub struct Store {
    cache: Arc<Cache>,
    s3: S3,
    https: Https,
    /// The size of the parts that objects are got in, in bytes.
    part: u64,
    /// Requests that are being worked on, each by one at a time.
    busy: Mutex<BTreeMap<ImageRequest, Arc<tokio::sync::Mutex<()>>>>,
    /// What was refused, and of which object.
    refused: Mutex<BTreeMap<ImageRequest, Refused>>,
}

impl Store {
    /// The images in that folder, which is made if need be. Of what an earlier life was fetching when it ended, that stays which
    /// can be continued.
    ///
    /// # Errors
    /// The folder can't be made or read.
    pub fn new(images_dir: &Path) -> Outcome<Self> {
        Self::on(images_dir, Disk::default())
    }

    fn on(images_dir: &Path, disk: Disk) -> Outcome<Self> {
        Ok(Self {
            cache: Arc::new(Cache::open(images_dir, disk)?),
            s3: S3::new(),
            https: Https::default(),
            part: download::PART,
            busy: Mutex::default(),
            refused: Mutex::default(),
        })
    }

    /// Where the image of that digest is, once a fetch has proven it.
    pub fn path(&self, digest: &EifDigest) -> PathBuf {
        self.cache.path(digest)
    }

    /// Whether what the source of that request has was got, and is not what it must be: then another try comes to the same.
    pub fn has_refused(&self, request: &ImageRequest) -> bool {
        lock(&self.refused).contains_key(request)
    }

    /// The lock of a request; those that nobody holds are forgotten.
    fn lock_of(&self, request: &ImageRequest) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = lock(&self.busy);
        busy.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(busy.entry(request.clone()).or_default())
    }

    async fn busy_with(&self, request: &ImageRequest) -> OwnedMutexGuard<()> {
        self.lock_of(request).lock_owned().await
    }

    /// The image of that request from the cache: the one that it came to before, or that it pins by its SHA-256; `None` if it
    /// is not there, or not what it was.
    async fn cached(&self, request: &ImageRequest, progress: &Arc<Progress>) -> Outcome<Option<VerifiedImage>> {
        let known = self.cache.entry(request)?;
        let Some(digest) = known.as_ref().map(|entry| entry.digest).or(pinned(request)) else {
            return Ok(None);
        };
        let image = self.cached_as(request, &digest, progress).await?;
        if known.is_none() && image.is_some() {
            self.cache.note(request, &digest, None)?;
        }
        Ok(image)
    }

    /// The image of that digest from the cache, if it is there, is what it was, and is what is asked for.
    async fn cached_as(
        &self,
        request: &ImageRequest,
        digest: &EifDigest,
        progress: &Arc<Progress>,
    ) -> Outcome<Option<VerifiedImage>> {
        match self.measured(digest, progress).await? {
            Found::Image(report) => match verify(*report, &request.expected) {
                Ok(image) => {
                    self.cache.note_use(digest);
                    Ok(Some(image))
                }
                // By its SHA-256 it is what was pinned, so what the source has is refused as well; that is told with its name.
                Err(refusal) => {
                    tracing::warn!("the cached image {digest} is not used for {}: {refusal}", request.source);
                    Ok(None)
                }
            },
            Found::Nothing => Ok(None),
            Found::Spoilt(_) => {
                progress.restart();
                Ok(None)
            }
        }
    }

    /// Measures the cached image of that digest. One that is not what it was is removed.
    async fn measured(&self, digest: &EifDigest, progress: &Arc<Progress>) -> Outcome<Found> {
        for _ in 0..MAX_MEASURED {
            let Some(kept) = self.open_kept(digest)? else { return Ok(Found::Nothing) };
            let failed = |error| not_read(&kept.path, &IntakeError::Read(error));
            let file = kept.file.try_clone().map_err(failed)?;
            progress.set_stage(FetchStage::Measuring);
            let result = measure_whole(file, progress).await;
            if let Some(found) = self.judge(digest, &kept, result)? {
                return Ok(found);
            }
            progress.restart();
        }
        let path = self.cache.path(digest);
        let message = format!("{} was changed each of the {MAX_MEASURED} times it was measured", path.display());
        Err(Failure::new(message).with_remedy("see what else writes to the folder of images"))
    }

    /// The cached image of that digest, about to be measured; `None` if there is none.
    fn open_kept(&self, digest: &EifDigest) -> Outcome<Option<Kept>> {
        let path = self.cache.path(digest);
        let opened = File::open(&path).and_then(|file| Ok((FileStamp::of(&file.metadata()?), file)));
        match opened {
            Ok((before, file)) => Ok(Some(Kept { path, file, before })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(not_read(&path, &IntakeError::Read(error))),
        }
    }

    /// What has been found, by how the measuring went; `None`: the file was replaced or touched meanwhile (by a fetch of the same
    /// image, by a backup), so that it is to be measured again.
    fn judge(
        &self,
        digest: &EifDigest,
        kept: &Kept,
        result: Result<enclaved_core::image::EifReport, IntakeError>,
    ) -> Outcome<Option<Found>> {
        let Kept { path, file, before } = kept;
        let spoilt = match result {
            Ok(report) if report.digest() != *digest => format!("its SHA-256 is {}", report.digest()),
            Ok(report) => {
                let now = file.metadata().map_err(|error| not_read(path, &IntakeError::Read(error)))?;
                if FileStamp::of(&now) != *before {
                    return Ok(None);
                }
                self.cache.note_proof(digest, *before);
                return Ok(Some(Found::Image(Box::new(report))));
            }
            Err(IntakeError::Eif(error)) => error.to_string(),
            Err(error) => return Err(not_read(path, &error)),
        };
        if !self.cache.forget_spoilt(digest, before)? {
            return Ok(None);
        }
        let message = format!("{} is not the image any more that was kept there ({spoilt})", path.display());
        tracing::warn!("{message}; it is removed, to be fetched again");
        let failure =
            Failure::new(message).with_remedy("it is fetched again; see whether the disk is failing (`dmesg`)");
        Ok(Some(Found::Spoilt(failure)))
    }

    /// Gets what the source has now, verifies and keeps it.
    async fn get(&self, request: &ImageRequest, progress: &Arc<Progress>, ask: Ask) -> Outcome<VerifiedImage> {
        match &request.source {
            ImageSource::File(path) => self.take_file(Path::new(path), request, progress).await,
            ImageSource::S3 { bucket, key, version } => {
                let remote = self.s3.object(bucket, key, version.as_deref()).await?;
                self.download(Arc::new(remote), request, progress, ask).await
            }
            ImageSource::Https(url) => {
                let remote = self.https.object(url)?;
                self.download(Arc::new(remote), request, progress, ask).await
            }
        }
    }

    /// What the source has now, without getting it.
    async fn look(&self, source: &ImageSource) -> Outcome<Stamp> {
        Ok(match source {
            ImageSource::File(path) => Stamp::File(local::look(Path::new(path))?),
            ImageSource::S3 { bucket, key, version } => {
                let remote = self.s3.object(bucket, key, version.as_deref()).await?;
                Stamp::Object(download::look(&remote).await?.object)
            }
            ImageSource::Https(url) => Stamp::Object(download::look(&self.https.object(url)?).await?.object),
        })
    }

    /// What was refused of just that object.
    fn refusal(&self, request: &ImageRequest, stamp: &Stamp, ask: Ask) -> Option<Failure> {
        let refused = lock(&self.refused);
        let refused = refused.get(request).filter(|refused| refused.stamp.is(stamp) == Some(true))?;
        // What came damaged may have been damaged on its way: whoever needs it tries again.
        (ask == Ask::IfChanged || !refused.damaged).then(|| refused.failure.clone())
    }

    fn remember(&self, request: &ImageRequest, refused: Refused) {
        let mut all = lock(&self.refused);
        if all.len() >= MAX_REFUSED {
            all.pop_first();
        }
        all.insert(request.clone(), refused);
    }
}

/// Who asks for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// Somebody who needs it.
    ToHave,
    /// Somebody who has one already.
    IfChanged,
}

/// A file of the cache that is being measured.
struct Kept {
    path: PathBuf,
    file: File,
    /// As it was before.
    before: FileStamp,
}

/// What there is in the cache under a digest.
enum Found {
    /// The image.
    Image(Box<enclaved_core::image::EifReport>),
    /// Nothing.
    Nothing,
    /// Something else. It has been removed.
    Spoilt(Failure),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in them is changed as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs what may take the disk a while where it holds nobody up.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Outcome<T> + Send + 'static) -> Outcome<T> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|error| Err(Failure::new(format!("a bug ended work on the image cache: {error}"))))
}

/// One pinned SHA-256 says which image it is, wherever it comes from. Of several, the source says which it is by now.
fn pinned(request: &ImageRequest) -> Option<EifDigest> {
    let mut pinned = request.expected.any_of();
    pinned.next().filter(|_| pinned.len() == 0).and_then(|pins| pins.sha256)
}

fn not_read(path: &Path, error: &IntakeError) -> Failure {
    Failure::new(format!("could not read the cached image {}: {error}", path.display()))
        .with_remedy("check the disk (`dmesg`), and the owner and permissions of the folder")
}

impl ImageStore for Store {
    async fn observe(&self) -> Outcome<ImageCache> {
        let cache = Arc::clone(&self.cache);
        blocking(move || cache.observe()).await
    }

    async fn fetch(&self, request: &ImageRequest, prefer: Prefer, progress: Arc<Progress>) -> Outcome<VerifiedImage> {
        progress.restart();
        // Without waiting for somebody who looks for a newer one: what is there can be launched meanwhile.
        if let Prefer::Known(digest) = prefer
            && let Some(image) = self.cached_as(request, &digest, &progress).await?
        {
            return Ok(image);
        }
        let from_cache = prefer != Prefer::Source || pinned(request).is_some();
        if from_cache && let Some(image) = self.cached(request, &progress).await? {
            return Ok(image);
        }
        let _busy = self.busy_with(request).await;
        if from_cache && let Some(image) = self.cached(request, &progress).await? {
            return Ok(image);
        }
        self.get(request, &progress, Ask::ToHave).await
    }

    async fn refresh(
        &self,
        request: &ImageRequest,
        known: &EifDigest,
        progress: Arc<Progress>,
    ) -> Outcome<Option<VerifiedImage>> {
        progress.restart();
        let _busy = self.busy_with(request).await;
        let entry = self.cache.entry(request)?;
        // Something newer was brought in earlier, and whoever asks never learnt of it.
        if entry.as_ref().is_some_and(|entry| entry.digest != *known)
            && let Some(image) = self.cached(request, &progress).await?
        {
            return Ok(Some(image));
        }
        if let Some(Entry { stamp, .. }) = &entry {
            // A version of an object is never another.
            if stamp.is_some() && matches!(&request.source, ImageSource::S3 { version: Some(_), .. }) {
                return Ok(None);
            }
            progress.set_stage(FetchStage::Asking);
            let now = self.look(&request.source).await?;
            if let Some(stamp) = stamp {
                match stamp.is(&now) {
                    Some(true) => return Ok(None),
                    Some(false) => {}
                    None => {
                        let message = format!(
                            "{} can't be watched: its server sends neither ETag nor Last-Modified",
                            request.source
                        );
                        return Err(Failure::new(message).with_remedy("remove image_poll, or use another source"));
                    }
                }
            }
            if let Some(failure) = self.refusal(request, &now, Ask::IfChanged) {
                return Err(failure);
            }
        }
        let image = self.get(request, &progress, Ask::IfChanged).await?;
        Ok((image.digest() != *known).then_some(image))
    }

    async fn prove(&self, image: &VerifiedImage) -> Outcome<Proof> {
        let digest = image.digest();
        let path = self.cache.path(&digest);
        let proven = self.cache.proof(&digest);
        let now = match std::fs::metadata(&path) {
            Ok(found) => Some(FileStamp::of(&found)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(not_read(&path, &IntakeError::Read(error))),
        };
        let found = if now.is_some() && now == proven {
            return Ok(Proof::Holds);
        } else {
            self.measured(&digest, &Arc::default()).await?
        };
        match found {
            Found::Image(_) => {
                self.cache.note_use(&digest);
                Ok(Proof::Holds)
            }
            Found::Spoilt(failure) => Ok(Proof::Spoilt(failure)),
            Found::Nothing => {
                self.cache.forget_image(&digest)?;
                let failure = Failure::new(format!("the image {} is gone", path.display()));
                Ok(Proof::Spoilt(failure.with_remedy("it is fetched again; see what removes files there")))
            }
        }
    }

    async fn remove(&self, item: &CacheItem) -> Outcome<()> {
        let cache = Arc::clone(&self.cache);
        match item {
            CacheItem::Image(digest) => {
                let digest = *digest;
                blocking(move || cache.forget_image(&digest)).await
            }
            CacheItem::Unfinished(request) => {
                let Ok(busy) = self.lock_of(request).try_lock_owned() else {
                    return Err(Failure::new(format!("{} is being fetched just now", request.source)));
                };
                let request = request.clone();
                blocking(move || {
                    let _busy = busy;
                    cache.discard_download(&request)
                })
                .await
            }
        }
    }
}
