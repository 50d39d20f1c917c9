//! Gets images: from S3 with the instance role, or from a file; measures and verifies them.

use super::{ImageStore, Outcome, Progress};
use enclaved_core::desired::{ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use enclaved_core::image::{Limits, Measurer, VerifiedImage, verify};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncReadExt;

/// Images in a folder, each under its digest.
#[derive(Debug)]
pub struct Store {
    images_dir: PathBuf,
}

impl Store {
    /// In that folder.
    ///
    /// # Errors
    /// It can't be made.
    pub fn new(images_dir: &Path) -> Outcome<Self> {
        std::fs::create_dir_all(images_dir)
            .map_err(|error| Failure::new(format!("making the image folder: {error}")))?;
        Ok(Self { images_dir: images_dir.to_owned() })
    }
}

impl ImageStore for Store {
    async fn fetch(&self, request: &ImageRequest, progress: Arc<Progress>) -> Outcome<VerifiedImage> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::new(format!("fetching {}: {}", request.source, Failure::from_error(error).message))
        };
        let mut reader: Box<dyn tokio::io::AsyncRead + Send + Unpin> = match &request.source {
            ImageSource::File(path) => Box::new(tokio::fs::File::open(path).await.map_err(|error| failed(&error))?),
            ImageSource::S3 { bucket, key } => {
                let client = aws_sdk_s3::Client::new(&aws_config::load_from_env().await);
                let object =
                    client.get_object().bucket(bucket).key(key).send().await.map_err(|error| failed(&error))?;
                progress.set_total(object.content_length().and_then(|length| u64::try_from(length).ok()).unwrap_or(0));
                Box::new(object.body.into_async_read())
            }
        };
        let mut measurer = Measurer::new(Limits::default());
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 1 << 18];
        loop {
            let length = reader.read(&mut chunk).await.map_err(|error| failed(&error))?;
            if length == 0 {
                break;
            }
            measurer.update(&chunk[..length]).map_err(|error| failed(&error))?;
            bytes.extend_from_slice(&chunk[..length]);
            progress.add(length as u64);
        }
        let report = measurer.finish().map_err(|error| failed(&error))?;
        let image = verify(report, &request.expected).map_err(|error| failed(&error))?;
        let path = self.images_dir.join(format!("{}.eif", image.digest()));
        crate::atomic_file::write(&path, &bytes).map_err(|error| failed(&error))?;
        Ok(image)
    }
}
