//! From a download to a proven image in the cache: what is done before it, what is made of what came, and what is begun anew.

use super::disk::is_full;
use super::download::{self, Download, End, Readers, Summed};
use super::measure::{Following, IntakeError};
use super::remote::{Look, Remote};
use super::sidecar::{Begun, missing};
use super::stamp::{FileStamp, Stamp};
use super::{Ask, Found, Store, blocking};
use crate::atomic_file::FileError;
use crate::host::{FetchStage, Outcome, Progress};
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::fetch::{MAX_ANEW, Tries, part_size};
use enclaved_core::image::{EifError, EifReport, Limits, Refusal, VerifiedImage, verify};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// An object that was refused.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) stamp: Stamp,
    pub(super) failure: Failure,
    /// It is no whole image; the bytes may have been changed on their way.
    pub(super) damaged: bool,
}

/// What came of getting an object once.
enum Got {
    /// All of it, and what it is.
    Report(Box<EifReport>, FileStamp, super::cache::Incoming),
    /// Something else than the source has, for this reason.
    Damaged(String),
    /// No image, or none that could be read. `certain`: these are the bytes that the source has.
    NoImage { error: IntakeError, certain: bool },
    /// The disk has no space for the rest, as this says.
    Full(Failure),
    /// It could not be flushed to disk.
    Unflushed(io::Error),
    /// The object was replaced meanwhile.
    Changed(String),
    /// The source gives no parts after all.
    NoRanges,
    /// It broke off, and can't be continued.
    FromTheBeginning,
}

/// What was begun anew so far.
#[derive(Debug, Default)]
struct Anew {
    changed: u32,
    damaged: bool,
    in_one_piece: bool,
    /// Tries in one piece.
    tries: Tries,
}

impl Store {
    /// Gets what that remote has now, unless the cache has just that, and verifies and keeps it.
    pub(super) async fn download<R: Remote>(
        &self,
        remote: Arc<R>,
        request: &ImageRequest,
        progress: &Arc<Progress>,
        ask: Ask,
    ) -> Outcome<VerifiedImage> {
        let mut anew = Anew::default();
        loop {
            progress.restart();
            progress.set_stage(FetchStage::Asking);
            let look = download::look(&*remote).await?;
            let object = look.object.clone();
            check_size(&remote.who(), object.size)?;
            let stamp = Stamp::Object(object.clone());
            if let Some(failure) = self.refusal(request, &stamp, ask) {
                return Err(failure);
            }
            if let Some(image) = self.have_already(request, &stamp, progress).await? {
                return Ok(image);
            }
            match self.get_once(&remote, request, look, progress, &mut anew).await? {
                Got::Report(report, measured, incoming) => {
                    let image = match verify(*report, &request.expected) {
                        Ok(image) => image,
                        Err(refusal) => {
                            let failure = refused(request, &refusal);
                            self.discard(request).await?;
                            self.remember(request, Refused { stamp, failure: failure.clone(), damaged: false });
                            return Err(failure);
                        }
                    };
                    let (cache, request, digest) = (Arc::clone(&self.cache), request.clone(), image.digest());
                    blocking(move || {
                        cache.keep(incoming, &measured, &digest)?;
                        cache.note(&request, &digest, Some(stamp))?;
                        cache.discard_download(&request)
                    })
                    .await?;
                    return Ok(image);
                }
                Got::Damaged(reason) => {
                    self.discard(request).await?;
                    let text = format!("the download of {} came damaged: {reason}", remote.who());
                    if std::mem::replace(&mut anew.damaged, true) {
                        let failure = Failure::new(format!("{text} (fetched twice)"));
                        let failure = failure.with_remedy(
                            "run `enclavectl measure` where the image was built, and put it in its place again; if it is right \
                             there, see whether something between this host and the source, or this host's disk, changes it",
                        );
                        self.remember(request, Refused { stamp, failure: failure.clone(), damaged: true });
                        return Err(failure);
                    }
                    tracing::warn!("{text}; fetching it anew");
                }
                Got::NoImage { error, certain } => {
                    let failure = not_taken(&request.source.to_string(), &error);
                    // That it could not be read to its end says nothing of what came: the next fetch goes on with it.
                    if matches!(error, IntakeError::Eif(_)) {
                        self.discard(request).await?;
                        self.remember(request, Refused { stamp, failure: failure.clone(), damaged: !certain });
                    }
                    return Err(failure);
                }
                Got::Full(failure) => {
                    self.discard(request).await?;
                    return Err(failure);
                }
                Got::Unflushed(error) => {
                    self.discard(request).await?;
                    return Err(not_taken(&request.source.to_string(), &IntakeError::Write(error)));
                }
                Got::Changed(reason) => {
                    self.discard(request).await?;
                    anew.changed += 1;
                    let who = remote.who();
                    let text = format!("{who} was replaced while it was being fetched ({reason})");
                    if anew.changed > MAX_ANEW {
                        let failure = Failure::new(format!("could not get {text} (begun anew {MAX_ANEW} times)"));
                        return Err(failure.with_remedy("see what keeps writing it; it is tried again"));
                    }
                    tracing::warn!("{text}; beginning anew ({} of {MAX_ANEW})", anew.changed);
                }
                Got::NoRanges => {
                    self.discard(request).await?;
                    tracing::info!("{} is got in one piece: its server gives no parts of it", remote.who());
                    anew.in_one_piece = true;
                }
                Got::FromTheBeginning => {}
            }
        }
    }

    /// The image in the cache that was taken from there when the source had just that; `None` if there is none.
    async fn have_already(
        &self,
        request: &ImageRequest,
        stamp: &Stamp,
        progress: &Arc<Progress>,
    ) -> Outcome<Option<VerifiedImage>> {
        let Some(digest) = self.cache.taken_from(&request.source, stamp)? else { return Ok(None) };
        match self.measured(&digest, progress).await? {
            Found::Nothing | Found::Spoilt(_) => {
                progress.restart();
                Ok(None)
            }
            Found::Image(report) => match verify(*report, &request.expected) {
                Ok(image) => {
                    self.cache.note(request, &digest, Some(stamp.clone()))?;
                    tracing::info!("{} is in the cache already, as {digest}", request.source);
                    Ok(Some(image))
                }
                Err(refusal) => Err(refused(request, &refusal)),
            },
        }
    }

    async fn discard(&self, request: &ImageRequest) -> Outcome<()> {
        let (cache, request) = (Arc::clone(&self.cache), request.clone());
        blocking(move || cache.discard_download(&request)).await
    }

    async fn get_once<R: Remote>(
        &self,
        remote: &Arc<R>,
        request: &ImageRequest,
        look: Look,
        progress: &Arc<Progress>,
        anew: &mut Anew,
    ) -> Outcome<Got> {
        let Look { object, checksum, ranges } = look;
        let size = object.size;
        let part = (ranges && !anew.in_one_piece).then(|| part_size(size, self.part));
        let Begun { incoming, parts, reused, saver } = {
            let (cache, request, object) = (Arc::clone(&self.cache), request.clone(), object.clone());
            blocking(move || cache.begin_download(&request, &object, part)).await?
        };
        if reused > 0 {
            tracing::info!("{}: going on with {reused} of {size} bytes that are on disk", remote.who());
        }
        progress.set_total(size);
        progress.add(reused);
        progress.set_stage(FetchStage::Downloading);
        let reader = || {
            File::open(incoming.path())
                .map_err(|error| Failure::from_error(&FileError::io("open", incoming.path())(error)))
        };
        let summing = match checksum {
            Some(checksum) => Some(super::checksum::Summing::begin(reader()?, checksum)),
            None => None,
        };
        let readers = Readers { following: Following::begin(reader()?), summing };
        let file = Arc::clone(incoming.file());
        let disk = self.cache.disk().clone();
        let download =
            Download { remote: Arc::clone(remote), object, parts, file, disk, progress: Arc::clone(progress), saver };
        // While what has come still takes its space.
        let full = || Got::Full(self.cache.no_space(missing(incoming.file(), size)));
        let whole = match download.run(&readers, &mut anew.tries).await {
            Ok(()) => true,
            Err(End::Final(failure)) => return Err(failure),
            Err(End::Full) => return Ok(full()),
            Err(End::Unflushed(error)) if is_full(&error) => return Ok(full()),
            Err(End::Unflushed(error)) => return Ok(Got::Unflushed(error)),
            Err(End::Changed(reason)) => return Ok(Got::Changed(reason)),
            Err(End::NoRanges) => return Ok(Got::NoRanges),
            Err(End::FromTheBeginning) => return Ok(Got::FromTheBeginning),
            // Their error comes below.
            Err(End::Readers) => false,
        };
        // From here on nothing arrives: what gets on is the reading behind it.
        progress.set_stage(FetchStage::Measuring);
        progress.restart();
        readers.following.report_to(progress);
        let (file, disk) = (Arc::clone(incoming.file()), self.cache.disk().clone());
        let flushed = blocking(move || Ok(disk.sync(&file).and_then(|()| file.metadata())));
        let (flushed, (report, summed)) = tokio::join!(flushed, readers.finish(size, whole));
        let flushed = match flushed? {
            Ok(flushed) => flushed,
            Err(error) if is_full(&error) => return Ok(full()),
            Err(error) => return Ok(Got::Unflushed(error)),
        };
        let certain = match summed {
            Summed::Wrong(mismatch) => return Ok(Got::Damaged(mismatch.to_string())),
            Summed::Right => true,
            Summed::Unknown => false,
        };
        match report {
            Ok(report) => Ok(Got::Report(Box::new(report), FileStamp::of(&flushed), incoming)),
            // Parts from an earlier life may not be what was written; and no image is built with a wrong CRC.
            Err(IntakeError::Eif(error)) if !certain && (reused > 0 || matches!(error, EifError::Crc { .. })) => {
                Ok(Got::Damaged(error.to_string()))
            }
            Err(error) => Ok(Got::NoImage { error, certain }),
        }
    }

    /// Copies an image, and measures it on its way.
    pub(super) async fn take_file(
        &self,
        path: &Path,
        request: &ImageRequest,
        progress: &Arc<Progress>,
    ) -> Outcome<VerifiedImage> {
        progress.restart();
        let taken = super::local::Source::open(path)?;
        check_size(&request.source.to_string(), taken.size())?;
        let stamp = Stamp::File(taken.stamp());
        if let Some(failure) = self.refusal(request, &stamp, Ask::ToHave) {
            return Err(failure);
        }
        if let Some(image) = self.have_already(request, &stamp, progress).await? {
            return Ok(image);
        }
        self.cache.check_space(taken.size())?;
        let incoming = self.cache.incoming()?;
        let (report, measured) = taken.copy(&incoming, self.cache.disk(), progress).await?;
        let report = report.map_err(|error| {
            let failure = not_taken(&request.source.to_string(), &error);
            if matches!(error, IntakeError::Eif(_)) {
                self.remember(request, Refused { stamp: stamp.clone(), failure: failure.clone(), damaged: false });
            }
            failure
        })?;
        let image = verify(report, &request.expected).map_err(|refusal| {
            let failure = refused(request, &refusal);
            self.remember(request, Refused { stamp: stamp.clone(), failure: failure.clone(), damaged: false });
            failure
        })?;
        let (cache, request, digest) = (Arc::clone(&self.cache), request.clone(), image.digest());
        blocking(move || {
            cache.keep(incoming, &measured, &digest)?;
            cache.note(&request, &digest, Some(stamp))
        })
        .await?;
        Ok(image)
    }
}

/// Whether something of that size can be an image at all.
fn check_size(source: &str, size: u64) -> Outcome<()> {
    let limit = Limits::default().file;
    if size == 0 {
        let failure = Failure::new(format!("{source} is empty"));
        return Err(failure.with_remedy("put the image in its place again"));
    }
    if size > limit {
        let failure = Failure::new(format!("{source} has {size} bytes: an image has {limit} at most"));
        return Err(failure.with_remedy("check what is at that address"));
    }
    Ok(())
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
        IntakeError::Write(error) if is_full(error) => Failure::new(format!("{source} could not be kept: {error}"))
            .with_remedy("free space on the state folder's file system, or enlarge it"),
        error => {
            Failure::new(format!("{source} could not be taken: {error}")).with_remedy("check the disk (`dmesg`, `df`)")
        }
    }
}
