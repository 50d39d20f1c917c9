//! Has the daemon fetch images into its cache ahead of an update, and waits until they are there.

use super::CtlError;
use super::client::Client;
use super::text::{mib, progress};
use crate::admin::FetchRequest;
use crate::asked::FetchAnswer;
use enclaved_core::desired::{Desired, ImageRequest, ImageSource};
use enclaved_core::failure::Failure;
use enclaved_core::id::{EnclaveName, MemoryMib};
use enclaved_core::image::ExpectedImage;
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;
use tokio::time::Instant;

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(300);
/// A daemon that has answered once may be silent for so long: it may be restarted.
const SILENCE: Duration = Duration::from_secs(30);
/// Nobody waits longer than a year.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// One image to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    request: ImageRequest,
    /// Who is to run it, and with how much memory.
    by: Vec<(EnclaveName, MemoryMib)>,
}

/// The images of a configuration, each once.
pub(super) fn of_config(desired: &Desired) -> Vec<Wanted> {
    let mut all: Vec<Wanted> = Vec::new();
    for (name, spec) in &desired.enclaves {
        let by = (name.clone(), spec.memory);
        match all.iter_mut().find(|wanted| wanted.request == spec.image) {
            Some(wanted) => wanted.by.push(by),
            None => all.push(Wanted { request: spec.image.clone(), by: vec![by] }),
        }
    }
    all
}

/// Images by their sources alone: any well-formed image will do.
///
/// The texts are parsed here, not by the command line's parser: that shows what it refuses, and a query may be a secret.
pub(super) fn of_sources(texts: &[String]) -> Result<Vec<Wanted>, CtlError> {
    let request = |source| ImageRequest { source, expected: ExpectedImage::default() };
    let wanted = |text: &String| match text.parse::<ImageSource>() {
        Ok(source) => Ok(Wanted { request: request(source), by: Vec::new() }),
        Err(error) => Err(CtlError::Usage(error.to_string())),
    };
    texts.iter().map(wanted).collect()
}

/// What images came to.
#[derive(Debug)]
pub(super) struct Results {
    all: Vec<(Wanted, FetchAnswer)>,
    /// Why the rest was not asked for any more.
    cut: Option<CtlError>,
}

/// Has them fetched one after the other.
pub(super) async fn fetch(client: &Client, wanted: &[Wanted], timeout: Duration, terminal: bool) -> Results {
    let mut results = Results { all: Vec::new(), cut: None };
    if wanted.is_empty() {
        let text = "the configuration has no enclave, so there is no image to fetch";
        results.cut = Some(CtlError::Usage(text.to_owned()));
    }
    let deadline = Instant::now() + timeout.min(LONGEST);
    for one in wanted {
        let show = |line: &str| {
            if terminal {
                // Only for people who watch.
                drop(write!(std::io::stderr(), "\r\x1b[K{line}"));
            }
        };
        let answer = until_ended(client, &one.request, deadline, show).await;
        show("");
        match answer {
            Ok(answer) => results.all.push((one.clone(), answer)),
            Err(error) => {
                results.cut = Some(error);
                break;
            }
        }
    }
    results
}

/// Asks until the fetch has ended, over restarts of the daemon.
async fn until_ended(
    client: &Client,
    request: &ImageRequest,
    deadline: Instant,
    show: impl Fn(&str),
) -> Result<FetchAnswer, CtlError> {
    let mut begin = true;
    let mut heard: Option<Instant> = None;
    loop {
        let asked = client.post_json("/v1/fetch", &FetchRequest { image: request.clone(), begin }).await;
        match asked {
            Ok(answer) => match understood(&answer)? {
                FetchAnswer::Fetching { progress: at } => {
                    (begin, heard) = (false, Some(Instant::now()));
                    show(&format!(
                        "{}: {}",
                        request.source,
                        at.map_or_else(|| "waiting".to_owned(), |at| progress(&at))
                    ));
                }
                ended => return Ok(ended),
            },
            Err(CtlError::TryAgain(_)) if heard.is_some_and(|heard| heard.elapsed() < SILENCE) => {
                show("enclaved does not answer");
            }
            Err(error) => return Err(error),
        }
        if Instant::now() + PAUSE > deadline {
            let text =
                format!("{} is not there yet; enclaved goes on fetching it (`enclavectl status`)", request.source);
            return Err(CtlError::TryAgain(text));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn understood(answer: &Value) -> Result<FetchAnswer, CtlError> {
    serde::Deserialize::deserialize(answer).map_err(|error| {
        CtlError::Bug(format!("enclaved's answer can't be understood ({error}): is it another version?"))
    })
}

/// What is wrong with what an image came to.
fn complaint(wanted: &Wanted, answer: &FetchAnswer) -> Option<String> {
    match answer {
        FetchAnswer::Failed { failure } => Some(format!("{}: {failure}", wanted.request.source)),
        FetchAnswer::Fetched { required_memory_mib: needed, size, .. } => {
            let (name, memory) = wanted.by.iter().find(|(_, memory)| memory < needed)?;
            let message = format!(
                "{} has {} and needs an enclave of {needed}, four times as much; {name} has {memory}",
                wanted.request.source,
                mib(*size)
            );
            let remedy = format!("set memory_mib = {} or more for {name}, or make the image smaller", needed.0);
            Some(Failure::new(message).with_remedy(remedy).to_string())
        }
        FetchAnswer::Fetching { .. } => None,
    }
}

impl Results {
    pub(super) fn in_words(&self) -> String {
        let line = |(wanted, answer): &(Wanted, FetchAnswer)| match answer {
            FetchAnswer::Fetched { digest, size, required_memory_mib, .. } => format!(
                "{}: in the cache, {}, sha256 {digest}, needs memory_mib = {} or more\n",
                wanted.request.source,
                mib(*size),
                required_memory_mib.0
            ),
            FetchAnswer::Fetching { .. } | FetchAnswer::Failed { .. } => String::new(),
        };
        self.all.iter().map(line).collect()
    }

    pub(super) fn in_json(&self) -> Result<String, CtlError> {
        let mut all = Vec::new();
        for (wanted, answer) in &self.all {
            let mut value = serde_json::to_value(answer)
                .map_err(|error| CtlError::Bug(format!("writing what was fetched: {error}")))?;
            if let Some(object) = value.as_object_mut() {
                object.insert("image".into(), json!(wanted.request.source.to_string()));
            }
            all.push(value);
        }
        Ok(format!("{:#}\n", Value::Array(all)))
    }

    /// Whether all of it was had, and can be launched as configured.
    pub(super) fn judged(self) -> Result<(), CtlError> {
        let unfit: Vec<_> = self.all.iter().filter_map(|(wanted, answer)| complaint(wanted, answer)).collect();
        match self.cut {
            Some(error) => Err(error),
            None if unfit.is_empty() => Ok(()),
            None => Err(CtlError::Unfit(unfit.join("\n"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(size: u64) -> FetchAnswer {
        let zero = enclaved_core::id::Pcr([0; 48]);
        let measurements = enclaved_core::id::Measurements { pcr0: zero, pcr1: zero, pcr2: zero, pcr8: None };
        let digest = enclaved_core::id::EifDigest([0xab; 32]);
        let required_memory_mib = enclaved_core::image::required_memory(size);
        FetchAnswer::Fetched { digest, measurements, size, required_memory_mib }
    }

    fn wanted(memory: u64) -> Wanted {
        let mut wanted = of_sources(&["s3://bucket/a.eif".to_owned()]).unwrap().remove(0);
        wanted.by.push(("signer".parse().unwrap(), MemoryMib(memory)));
        wanted
    }

    #[test]
    fn an_enclave_too_small_for_its_image_is_told_before_the_update() {
        let text = complaint(&wanted(1023), &fetched(256 << 20)).unwrap();
        assert!(text.contains("signer has 1023 MiB") && text.contains("memory_mib = 1024"), "{text}");
        assert_eq!(complaint(&wanted(1024), &fetched(256 << 20)), None);
    }

    #[test]
    fn one_that_could_not_be_had_does_not_hide_the_others_nor_its_secret() {
        let failure = Failure::new("403");
        let mut gone = of_sources(&["https://example.com/b.eif?secret".to_owned()]).unwrap().remove(0);
        gone.by.clear();
        let results =
            Results { all: vec![(gone, FetchAnswer::Failed { failure }), (wanted(64), fetched(1))], cut: None };
        assert!(results.in_words().contains("a.eif"));
        let error = results.judged().unwrap_err();
        assert_eq!((error.code(), error.to_string()), (78, "https://example.com/b.eif?…: 403".to_owned()));
        let refused = of_sources(&["http://example.com/b.eif?secret".to_owned()]).unwrap_err();
        assert!(refused.code() == 64 && !refused.to_string().contains("secret"), "{refused}");
    }

    #[test]
    fn what_was_fetched_is_told_in_words_and_in_json() {
        let results = Results { all: vec![(wanted(64), fetched(10 << 20))], cut: None };
        assert_eq!(
            results.in_words(),
            format!(
                "s3://bucket/a.eif: in the cache, 10.0 MiB, sha256 {}, needs memory_mib = 64 or more\n",
                "ab".repeat(32)
            )
        );
        let json: Value = serde_json::from_str(&results.in_json().unwrap()).unwrap();
        assert_eq!((&json[0]["state"], &json[0]["image"]), (&json!("fetched"), &json!("s3://bucket/a.eif")));
    }
}
