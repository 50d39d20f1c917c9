//! A look at where images come from, without getting or changing anything: one small question to each source. For whoever wants to
//! know beforehand whether images can be had.

use super::cache::{ENTRY, IMAGE, request_id};
use super::https::Https;
use super::index::Entry;
use super::local;
use super::remote::Remote;
use super::s3::{Dates, S3};
use crate::host::Outcome;
use enclaved_core::desired::{ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use std::path::Path;
use std::time::Duration;

/// The sources of images, as this host reaches them.
#[derive(Debug)]
pub struct Glance {
    s3: S3,
    https: Https,
    dates: Dates,
}

impl Default for Glance {
    fn default() -> Self {
        Self { s3: S3::new(), https: Https::default(), dates: Dates::default() }
    }
}

impl Glance {
    /// Whose credentials S3 is asked with: `the instance's role x`.
    ///
    /// # Errors
    /// There are none, or no region.
    pub async fn credentials(&self) -> Outcome<String> {
        self.s3.who().await
    }

    /// How many bytes the image has, if it can be had: of an object, S3 says so only to whom it would give it.
    ///
    /// # Errors
    /// Why it can't be had: which object, asked by whom, what was answered, and what a person can do.
    pub async fn size(&self, source: &ImageSource) -> Outcome<u64> {
        match source {
            // By opening it: that is what a fetch begins with.
            ImageSource::File(path) => {
                let path = path.clone();
                super::blocking(move || Ok(local::Source::open(Path::new(&path))?.size())).await
            }
            ImageSource::S3 { bucket, key, version } => {
                let object = self.s3.object(bucket, key, version.as_deref()).await?;
                ask(&object.noting_dates(&self.dates)).await
            }
            ImageSource::Https(url) => ask(&self.https.object(url)?).await,
        }
    }

    /// How far S3's clock was from this host's, by the Date of its last answer; `None`: none came.
    pub fn apart_from_s3(&self) -> Option<Duration> {
        self.dates.apart()
    }
}

async fn ask(remote: &impl Remote) -> Outcome<u64> {
    let named = |failure: Failure| Failure {
        message: format!("could not ask for {}: {}", remote.who(), failure.message),
        ..failure
    };
    Ok(remote.look().await.map_err(|trouble| named(trouble.failure))?.object.size)
}

/// Whether what that request came to before is in that folder of images, so that it can be launched without its source. What can't
/// be read is not there.
pub fn is_cached(images_dir: &Path, request: &ImageRequest) -> bool {
    let entry =
        request_id(request).ok().and_then(|id| Entry::read(&images_dir.join(format!("{id}{ENTRY}"))).ok().flatten());
    entry
        .is_some_and(|entry| entry.request == *request && images_dir.join(format!("{}{IMAGE}", entry.digest)).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::image_store::index::Entry;
    use enclaved_core::id::EifDigest;
    use enclaved_core::image::ExpectedImage;

    fn request(source: &str) -> ImageRequest {
        ImageRequest { source: source.parse().unwrap(), expected: ExpectedImage::default() }
    }

    #[tokio::test]
    async fn a_file_is_opened_and_one_that_is_missing_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.eif");
        std::fs::write(&path, [0; 5]).unwrap();
        let of = |path: &Path| format!("file://{}", path.display()).parse::<ImageSource>().unwrap();
        assert_eq!(Glance::default().size(&of(&path)).await.unwrap(), 5);
        let failure = Glance::default().size(&of(&folder.path().join("b"))).await.unwrap_err();
        assert!(failure.message.contains("could not read the image"), "{failure}");
        assert!(Glance::default().size(&of(folder.path())).await.unwrap_err().message.contains("is not a file"));
    }

    #[test]
    fn an_image_is_cached_if_its_entry_and_its_file_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let request = request("s3://bucket/key");
        assert!(!is_cached(folder.path(), &request));
        let digest = EifDigest([7; 32]);
        let entry = Entry { request: request.clone(), digest, stamp: None };
        let name = format!("{}{ENTRY}", request_id(&request).unwrap());
        crate::atomic_file::write_json(&folder.path().join(name), &entry).unwrap();
        assert!(!is_cached(folder.path(), &request), "its file was removed");
        std::fs::write(folder.path().join(format!("{digest}{IMAGE}")), "x").unwrap();
        assert!(is_cached(folder.path(), &request));
        assert!(!is_cached(folder.path(), &self::request("s3://bucket/other")));
    }
}
