//! Images on disk: fetched from where the configuration says, measured while they arrive, kept under their SHA-256, and
//! proven anew by every fetch, whether they came from afar or from the cache. What an image must be is core's to say.

mod cache;
mod intake;
mod measure;
mod s3;
mod s3_failure;

use super::{ImageStore, Outcome, Progress};
use cache::{Cache, Incoming};
use enclaved_core::desired::{ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use enclaved_core::id::EifDigest;
use enclaved_core::image::{EifReport, Refusal, VerifiedImage, verify};
pub(crate) use measure::{IntakeError, measure_whole};
use s3::S3;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The images of this host.
#[derive(Debug)]
pub struct Store {
    cache: Arc<Cache>,
    s3: S3,
}

impl Store {
    /// The images in that folder, which is made if need be. What an earlier life was fetching when it ended is removed.
    ///
    /// # Errors
    /// The folder can't be made or read.
    pub fn new(images_dir: &Path) -> Outcome<Self> {
        Ok(Self { cache: Arc::new(Cache::open(images_dir)?), s3: S3::new() })
    }

    /// Where the image of that digest is, once a fetch has proven it.
    pub fn path(&self, digest: &EifDigest) -> PathBuf {
        self.cache.path(digest)
    }

    /// The image of that request from the cache; `None` if it is not there, or not what it was.
    async fn cached(&self, request: &ImageRequest, progress: &Arc<Progress>) -> Outcome<Option<VerifiedImage>> {
        let Some(digest) = self.cache.find(request)? else { return Ok(None) };
        let path = self.cache.path(&digest);
        let spoilt = match File::open(&path) {
            Ok(file) => match measure_whole(file, progress).await {
                Ok(report) if report.digest() == digest => match verify(report, &request.expected) {
                    Ok(image) => return Ok(Some(image)),
                    Err(refusal) => refusal.to_string(),
                },
                Ok(report) => format!("its SHA-256 is {}", report.digest()),
                Err(IntakeError::Eif(error)) => error.to_string(),
                Err(error) => return Err(not_read(&path, &error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => "it is missing".to_owned(),
            Err(error) => return Err(not_read(&path, &IntakeError::Read(error))),
        };
        tracing::warn!(
            "{} is not the image any more that was kept there ({spoilt}); fetching it again",
            path.display()
        );
        self.cache.forget(request, &digest)?;
        progress.restart();
        Ok(None)
    }

    async fn take_file(&self, path: &Path, progress: &Arc<Progress>) -> Outcome<(Incoming, EifReport)> {
        let failed = |error: io::Error| {
            Failure::new(format!("could not read the image {}: {error}", path.display()))
                .with_remedy("check the path, and that the user enclaved may read it")
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Failure::new(format!("the image {} is not a file", path.display())));
        }
        self.cache.check_space(metadata.len())?;
        let (incoming, copy) = self.cache.incoming()?;
        let report = intake::copy(file, copy, progress).await;
        Ok((incoming, report.map_err(|error| not_taken(&format!("file://{}", path.display()), &error))?))
    }
}

impl ImageStore for Store {
    async fn observe(&self) -> Outcome<enclaved_core::observed::ImageCache> {
        Ok(Default::default())
    }
    async fn refresh(&self, _: &ImageRequest, _: &EifDigest, _: Arc<Progress>) -> Outcome<Option<VerifiedImage>> {
        Ok(None)
    }
    async fn prove(&self, _: &VerifiedImage) -> Outcome<super::Proof> {
        Ok(super::Proof::Holds)
    }
    async fn remove(&self, _: &enclaved_core::observed::CacheItem) -> Outcome<()> {
        Ok(())
    }
    async fn fetch(&self, request: &ImageRequest, progress: Arc<Progress>) -> Outcome<VerifiedImage> {
        progress.restart();
        if let Some(image) = self.cached(request, &progress).await? {
            return Ok(image);
        }
        let (incoming, report) = match &request.source {
            ImageSource::File(path) => self.take_file(Path::new(path), &progress).await?,
            ImageSource::S3 { bucket, key } => self.s3.fetch(bucket, key, &self.cache, &progress).await?,
        };
        // A wrong image is not kept: its file goes when `incoming` is dropped.
        let image = verify(report, &request.expected).map_err(|refusal| refused(request, &refusal))?;
        self.cache.keep(incoming, request, &image.digest())?;
        Ok(image)
    }
}

fn refused(request: &ImageRequest, refusal: &Refusal) -> Failure {
    Failure::new(format!(
        "{} is refused: it is not the image that was asked for (its SHA-256 is {}): {}",
        request.source,
        refusal.digest,
        refusal.reason()
    ))
    .with_remedy(refusal.remedy())
}

/// What became of an image that arrived from `source`.
fn not_taken(source: &str, error: &IntakeError) -> Failure {
    match error {
        IntakeError::Eif(error) => Failure::new(format!("{source} is not an image that can be launched: {error}"))
            .with_remedy("run `enclavectl measure` where it was built, and put it in its place again"),
        IntakeError::Write(error) if error.kind() == io::ErrorKind::StorageFull => {
            Failure::new(format!("{source} could not be kept: {error}"))
                .with_remedy("free space on the state folder's file system, or enlarge it")
        }
        error => Failure::new(format!("{source} could not be taken: {error}")),
    }
}

fn not_read(path: &Path, error: &IntakeError) -> Failure {
    Failure::new(format!("could not read the cached image {}: {error}", path.display()))
        .with_remedy("check the disk (`dmesg`), and the owner and permissions of the folder")
}

#[cfg(test)]
mod tests;
