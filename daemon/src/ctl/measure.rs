//! Measures an image, with the daemon's own code and as fast as the daemon does.

use super::CtlError;
use crate::host::image_store::{IntakeError, Store, measure_whole};
use crate::host::{ImageStore as _, Progress};
use crate::pace::Pace;
use enclaved_core::desired::{BadImageSource, ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use enclaved_core::id::Timestamp;
use enclaved_core::image::{
    EifReport, ExpectedImage, ImageCertificate, ImageSignature, Validity, os_image_hash, required_memory,
};
use enclaved_core::plan::Prefer;

use serde_json::{Value, json};
use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The measurements of an image, as the part of a configuration that pins them, or as JSON. `now` judges certificates.
pub(super) async fn measure(image: &OsStr, json: bool, now: Timestamp) -> Result<String, Refused> {
    let place = Place::of(image);
    let report = match &place {
        Place::File(path) => read(path).await,
        Place::Remote(url) => fetch_and_measure(url).await,
    };
    match report {
        Ok(report) if json => as_json(&report, now).map_err(Refused::from),
        Ok(report) => Ok(as_text(&place.name(), &report, now)),
        Err(Unmeasured::Image { place, error }) => {
            let output =
                json.then(|| format!("{:#}\n", json!({ "error": error.to_string(), "offset": error.offset() })));
            Err(Refused { output, error: CtlError::Unfit(format!("{place}: {error}")) })
        }
        Err(Unmeasured::Other(error)) => Err(error.into()),
    }
}

/// Why there are no measurements, and what is for stdout in spite of that.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) output: Option<String>,
    pub(super) error: CtlError,
}

impl From<CtlError> for Refused {
    fn from(error: CtlError) -> Self {
        Self { output: None, error }
    }
}

/// Where an image is, by its argument.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    File(PathBuf),
    /// `s3://…` or `https://…`.
    Remote(String),
}

impl Place {
    fn of(argument: &OsStr) -> Self {
        let text = argument.to_str().unwrap_or_default();
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        if scheme.is_some_and(|scheme| ["s3", "https", "http"].contains(&scheme.as_str())) {
            Self::Remote(text.to_owned())
        } else if let Some(path) = text.strip_prefix("file://").filter(|path| path.starts_with('/')) {
            Self::File(path.into())
        } else {
            Self::File(argument.into())
        }
    }

    /// Fit to be shown: what follows the `?` of a presigned URL is a secret.
    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Remote(url) => match url.split_once('?') {
                Some((address, _)) => format!("{address}?…"),
                None => url.clone(),
            },
        }
    }
}

enum Unmeasured {
    /// It is there, and is no good image.
    Image {
        place: String,
        error: enclaved_core::image::EifError,
    },
    Other(CtlError),
}

async fn read(path: &Path) -> Result<EifReport, Unmeasured> {
    let unreadable =
        |error: &dyn std::fmt::Display| Unmeasured::Other(CtlError::Usage(format!("{}: {error}", path.display())));
    let file = File::open(path).map_err(|error| unreadable(&format!("can't be read: {error}")))?;
    measure_whole(file, &Arc::new(Progress::default())).await.map_err(|error| match error {
        IntakeError::Eif(error) => Unmeasured::Image { place: path.display().to_string(), error },
        error @ (IntakeError::Read(_) | IntakeError::Write(_) | IntakeError::Cut(_)) => unreadable(&error),
    })
}

/// Downloads what is at a URL as the daemon does, measures it meanwhile, and keeps nothing of it.
async fn fetch_and_measure(url: &str) -> Result<EifReport, Unmeasured> {
    let source: ImageSource =
        url.parse().map_err(|error: BadImageSource| Unmeasured::Other(CtlError::Usage(error.to_string())))?;
    let later = |failure: &Failure| Unmeasured::Other(CtlError::TryAgain(failure.to_string()));
    // /tmp is often in memory; images are large.
    let parent = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let folder = tempfile::Builder::new()
        .prefix("enclavectl-measure-")
        .tempdir_in(&parent)
        .map_err(|error| later(&Failure::new(format!("could not make a folder in {}: {error}", parent.display()))))?;
    let store = Store::new(folder.path()).map_err(|failure| later(&failure))?;
    let request = ImageRequest { source, expected: ExpectedImage::default() };
    let (progress, name) = (Arc::new(Progress::default()), request.source.to_string());
    tokio::select! {
        // Each ends this function; nothing is waited for again. The folder goes with it.
        fetched = store.fetch(&request, Prefer::Source, Arc::clone(&progress)) => match fetched {
            Ok(image) => Ok(image.report().clone()),
            Err(failure) if store.has_refused(&request) => {
                Err(Unmeasured::Other(CtlError::Unfit(failure.to_string())))
            }
            Err(failure) => Err(later(&failure)),
        },
        never = show(&name, &progress) => match never {},
        interrupted = tokio::signal::ctrl_c() => Err(Unmeasured::Other(CtlError::TryAgain(match interrupted {
            Ok(()) => "interrupted".to_owned(),
            Err(error) => format!("waiting for an interrupt failed: {error}"),
        }))),
    }
}

/// Shows how far a download is, to a person at a terminal; never returns.
async fn show(name: &str, of: &Progress) -> Infallible {
    let mut pace = Pace::default();
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let status = pace.status(Instant::now(), of);
        if std::io::stderr().is_terminal() {
            // Only for people who watch.
            drop(write!(std::io::stderr(), "\r\x1b[K{name}: {}\r", super::text::progress(&status)));
        }
    }
}

fn as_json(report: &EifReport, now: Timestamp) -> Result<String, CtlError> {
    let bug = |error: serde_json::Error| CtlError::Bug(format!("writing the report: {error}"));
    let mut value = serde_json::to_value(report).map_err(bug)?;
    if let Some(object) = value.as_object_mut() {
        object.insert("os_image_hash".into(), json!(hex(&os_image_hash(report.measurements()))));
        object.insert("required_memory_mib".into(), json!(required_memory(report.size()).0));
    }
    if let (Some(signature), Some(object)) = (report.signature(), value.get_mut("signature")) {
        let validity = |value: &mut Value, validity: Validity| {
            if let Some(object) = value.as_object_mut() {
                object.insert("validity".into(), json!(validity));
            }
        };
        validity(object, signature.validity(now));
        let chain = object.get_mut("chain").and_then(Value::as_array_mut).into_iter().flatten();
        for (value, certificate) in chain.zip(&signature.chain) {
            validity(value, certificate.validity(now));
        }
    }
    Ok(format!("{value:#}\n"))
}

/// What is not measured or for people only stands in comments, so that the whole can be pasted into a configuration.
fn as_text(name: &str, report: &EifReport, now: Timestamp) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!("# {name}: a good image, {} ({} bytes)", super::text::mib(report.size()), report.size()));
    line(format!(
        "# EIF version {} for {}; needs memory_mib = {} or more",
        report.version(),
        report.architecture(),
        required_memory(report.size()).0
    ));
    let sections =
        report.sections().iter().map(|section| format!("{} {}", section.kind, super::text::mib(section.size)));
    line(format!("# sections: {}", sections.collect::<Vec<_>>().join(", ")));
    if let Some(metadata) = report.metadata() {
        let said = [
            ("name", &metadata.name),
            ("version", &metadata.version),
            ("built", &metadata.build_time),
            ("by", &metadata.build_tool),
            ("kernel", &metadata.kernel_version),
        ];
        let said: Vec<_> =
            said.iter().filter_map(|(what, value)| Some(format!("{what} {}", value.as_ref()?))).collect();
        if !said.is_empty() {
            line(format!("# says of itself (not measured): {}", said.join(", ")));
        }
    }
    match report.signature() {
        Some(signature) => signed_by(signature, now).into_iter().for_each(&mut line),
        None => line("# not signed".to_owned()),
    }
    line(format!("# OS_IMAGE_HASH {}", hex(&os_image_hash(report.measurements()))));
    line("[enclave.measurements]".to_owned());
    line(format!("sha256 = \"{}\"", report.digest()));
    let measurements = report.measurements();
    let registers = [
        ("pcr0", Some(measurements.pcr0)),
        ("pcr1", Some(measurements.pcr1)),
        ("pcr2", Some(measurements.pcr2)),
        ("pcr8", measurements.pcr8),
    ];
    for (name, value) in registers {
        if let Some(value) = value {
            line(format!("{name} = \"{value}\""));
        }
    }
    text
}

/// The signer and its chain, a line each, and what follows if the signer's certificate is not valid.
fn signed_by(signature: &ImageSignature, now: Timestamp) -> Vec<String> {
    let ImageSignature { subject, issuer, not_before, not_after, algorithm, chain } = signature;
    let validity = signature.validity(now);
    let mut lines = vec![format!(
        "# signed ({algorithm}) by {subject}, issued by {issuer}, {}",
        dates(validity, *not_before, *not_after, now)
    )];
    for ImageCertificate { subject, issuer, not_before, not_after } in chain {
        let validity = Validity::at(now, *not_before, *not_after);
        let dates = dates(validity, *not_before, *not_after, now);
        lines.push(format!("#   its chain (not measured): {subject}, issued by {issuer}, {dates}"));
    }
    match validity {
        Validity::Valid => {}
        Validity::EndsSoon => lines.push(
            "# WARNING: from then on this image does not boot (nitro-cli says E36); sign it again with a newer certificate"
                .to_owned(),
        ),
        Validity::NotYet | Validity::Expired => lines.push(
            "# WARNING: an image does not boot (nitro-cli says E36) while its certificate is not valid; sign it with another"
                .to_owned(),
        ),
    }
    lines
}

fn dates(validity: Validity, not_before: Timestamp, not_after: Timestamp, now: Timestamp) -> String {
    let span = super::text::span;
    match validity {
        Validity::NotYet => format!("NOT VALID YET: from {not_before} to {not_after}"),
        Validity::Valid => format!("valid until {not_after}"),
        Validity::EndsSoon => format!("valid until {not_after}, which is in {}", span(not_after.since(now))),
        Validity::Expired => format!("EXPIRED {} ago, at {not_after}", span(now.since(not_after))),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::eif::sample;

    fn now() -> Timestamp {
        Timestamp::from_millis(0)
    }

    #[tokio::test]
    async fn a_file_that_is_no_image_is_refused_by_name_and_place_also_in_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.eif");
        let mut image = sample("x", 1, 4096).to_bytes();
        image.truncate(2000);
        for (contents, text, offset) in
            [(b"not an image".to_vec(), "not an EIF", 0), (image, "ends at byte 2000", 2000)]
        {
            std::fs::write(&path, contents).unwrap();
            let refused = measure(path.as_os_str(), true, now()).await.unwrap_err();
            assert_eq!(refused.error.code(), 78);
            assert!(refused.error.to_string().contains(&format!("x.eif: {text}")) || offset == 2000, "{refused:?}");
            let json: Value = serde_json::from_str(&refused.output.unwrap()).unwrap();
            assert_eq!(json["offset"], offset);
            assert!(json["error"].as_str().unwrap().contains(text), "{json}");
            assert_eq!(measure(path.as_os_str(), false, now()).await.unwrap_err().output, None);
        }
    }

    #[tokio::test]
    async fn a_file_that_is_not_there_is_named() {
        for argument in ["/nonexistent/x.eif", "file:///nonexistent/x.eif"] {
            let refused = measure(OsStr::new(argument), false, now()).await.unwrap_err();
            assert_eq!(refused.error.code(), 64);
            assert!(refused.error.to_string().starts_with("/nonexistent/x.eif: "), "{refused:?}");
        }
    }

    #[tokio::test]
    async fn a_url_is_told_from_a_file_and_its_query_is_never_shown() {
        assert_eq!(Place::of(OsStr::new("s3://bucket/x.eif")), Place::Remote("s3://bucket/x.eif".to_owned()));
        let shouted = OsStr::new("HTTPS://b/x.eif?X-Amz-Signature=secret");
        assert_eq!(Place::of(shouted).name(), "HTTPS://b/x.eif?…");
        assert_eq!(Place::of(OsStr::new("s3:/x")), Place::File("s3:/x".into()));
        assert_eq!(Place::of(OsStr::new("file://x")), Place::File("file://x".into()));
        let presigned = OsStr::new("https://b.s3.amazonaws.com/x.eif?X-Amz-Signature=secret");
        assert_eq!(Place::of(presigned).name(), "https://b.s3.amazonaws.com/x.eif?…");
        let nobody = OsStr::new("https://127.0.0.1:1/x.eif?X-Amz-Signature=secret");
        let refused = measure(nobody, false, now()).await.unwrap_err();
        assert_eq!(refused.error.code(), 75);
        assert!(!refused.error.to_string().contains("secret"), "{refused:?}");
    }

    #[test]
    fn the_signer_and_its_chain_are_shown_with_what_their_dates_mean() {
        let day = |day: u64| Timestamp::from_millis(day * 24 * 60 * 60 * 1000);
        let chained = ImageCertificate {
            subject: "CN=ca".into(),
            issuer: "CN=root".into(),
            not_before: day(0),
            not_after: day(1000),
        };
        let signature = ImageSignature {
            subject: "CN=me".into(),
            issuer: "CN=ca".into(),
            not_before: day(100),
            not_after: day(200),
            algorithm: enclaved_core::image::SignatureAlgorithm::Es384,
            chain: vec![chained],
        };
        let at = |now| signed_by(&signature, day(now)).join("\n");
        assert_eq!(
            at(150),
            "# signed (ES384) by CN=me, issued by CN=ca, valid until 1970-07-20T00:00:00.000Z\n\
             #   its chain (not measured): CN=ca, issued by CN=root, valid until 1972-09-27T00:00:00.000Z"
        );
        for (now, words) in [(50, "NOT VALID YET"), (195, "which is in 5d"), (203, "EXPIRED 3d ago")] {
            assert!(at(now).contains(words) && at(now).contains("E36"), "{}", at(now));
        }
    }
}
