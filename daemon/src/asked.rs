//! Images that an operator wants in the cache ahead of their use (`enclavectl fetch`), and what became of them. Kept by the
//! reconcile loop, in memory only: after a restart they are asked for again.

use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::id::{EifDigest, Measurements, MemoryMib, Timestamp};
use enclaved_core::image::VerifiedImage;
use enclaved_core::plan::restart;
use enclaved_core::status::FetchStatus;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What was fetched ahead stays in the cache for its use at least this long, whatever the cache's limit.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How many are remembered: an operator asks for a handful. The results of earlier ones make room for new ones.
const MOST: usize = 16;

/// How far a fetch is that was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum FetchAnswer {
    /// It is under way.
    Fetching {
        /// How far; absent before it has begun.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        progress: Option<FetchStatus>,
    },
    /// It is in the cache, and proven.
    Fetched {
        /// The file's SHA-256.
        digest: EifDigest,
        /// Its measurements.
        measurements: Measurements,
        /// Its size, in bytes.
        size: u64,
        /// The least memory of an enclave with it.
        required_memory_mib: MemoryMib,
    },
    /// It could not be had, or is not what was asked for.
    Failed {
        /// Why.
        failure: Failure,
    },
}

/// What was asked for, in the order of asking.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    all: BTreeMap<ImageRequest, Entry>,
    count: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    /// When it was there, or could not be had.
    ended: Timestamp,
    /// `None` while it is wanted and not there.
    result: Option<FetchAnswer>,
}

impl Asked {
    /// What is still to be fetched.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = &ImageRequest> {
        self.all.iter().filter(|(_, entry)| entry.result.is_none()).map(|(request, _)| request)
    }

    /// Asks for an image, or for what became of it.
    ///
    /// # Errors
    /// Too many are under way.
    pub(crate) fn ask(
        &mut self,
        request: &ImageRequest,
        begin: bool,
        progress: Option<FetchStatus>,
    ) -> Result<FetchAnswer, String> {
        if let Some(entry) = self.all.get(request) {
            match &entry.result {
                None => return Ok(FetchAnswer::Fetching { progress }),
                Some(result) if !begin => return Ok(result.clone()),
                Some(_) => {}
            }
        }
        self.all.remove(request);
        if self.all.len() >= MOST {
            let over = self.all.iter().filter(|(_, entry)| entry.result.is_some());
            let Some(oldest) = over.min_by_key(|(_, entry)| entry.number).map(|(request, _)| request.clone()) else {
                return Err(format!("{MOST} images are being fetched already; wait until one is there"));
            };
            self.all.remove(&oldest);
        }
        self.count += 1;
        self.all.insert(request.clone(), Entry { number: self.count, ended: Timestamp::from_millis(0), result: None });
        Ok(FetchAnswer::Fetching { progress })
    }

    /// The images that were fetched, for as long as they are kept for their use.
    pub(crate) fn fetched(&self, now: Timestamp) -> BTreeSet<EifDigest> {
        let kept = self.all.values().filter(|entry| restart::pause_end(entry.ended, KEPT, now).is_some());
        let digest = |entry: &Entry| match &entry.result {
            Some(FetchAnswer::Fetched { digest, .. }) => Some(*digest),
            _ => None,
        };
        kept.filter_map(digest).collect()
    }

    /// A fetch has ended, whoever wanted it; whether it was asked for here.
    pub(crate) fn ended(
        &mut self,
        request: &ImageRequest,
        outcome: Result<&VerifiedImage, &Failure>,
        at: Timestamp,
    ) -> bool {
        let entry = self.all.get_mut(request).filter(|entry| entry.result.is_none());
        let asked = entry.is_some();
        if let Some(entry) = entry {
            entry.ended = at;
            entry.result = Some(match outcome {
                Ok(image) => FetchAnswer::Fetched {
                    digest: image.digest(),
                    measurements: *image.measurements(),
                    size: image.size(),
                    required_memory_mib: image.required_memory(),
                },
                Err(failure) => FetchAnswer::Failed { failure: failure.clone() },
            });
        }
        asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(number: usize) -> ImageRequest {
        let source = format!("s3://images/{number}.eif").parse().unwrap();
        ImageRequest { source, expected: enclaved_core::image::ExpectedImage::default() }
    }

    fn ended(asked: &mut Asked, number: usize) {
        asked.ended(&request(number), Err(&Failure::new("gone")), Timestamp::from_millis(1));
    }

    #[test]
    fn a_result_is_told_until_it_is_asked_for_anew() {
        let mut asked = Asked::default();
        let fetching = Ok(FetchAnswer::Fetching { progress: None });
        let failed = Ok(FetchAnswer::Failed { failure: Failure::new("gone") });
        assert_eq!(asked.ask(&request(1), true, None), fetching);
        assert_eq!(asked.wanted().count(), 1);
        ended(&mut asked, 1);
        assert_eq!(asked.wanted().count(), 0);
        assert_eq!(asked.ask(&request(1), false, None), failed);
        assert_eq!(asked.ask(&request(1), true, None), fetching);
        assert_eq!(asked.wanted().count(), 1);
    }

    #[test]
    fn what_was_fetched_is_kept_for_a_day() {
        let at = |hours: u64| Timestamp::from_millis(1_800_000_000_000 + hours * 3_600_000);
        let mut asked = Asked::default();
        asked.ask(&request(1), true, None).unwrap();
        let digest = EifDigest([1; 32]);
        let zero = enclaved_core::id::Pcr([0; 48]);
        let entry = asked.all.get_mut(&request(1)).unwrap();
        entry.ended = at(0);
        entry.result = Some(FetchAnswer::Fetched {
            digest,
            measurements: Measurements { pcr0: zero, pcr1: zero, pcr2: zero, pcr8: None },
            size: 1,
            required_memory_mib: MemoryMib(64),
        });
        assert_eq!(asked.fetched(at(23)), BTreeSet::from([digest]));
        assert_eq!(asked.fetched(at(25)), BTreeSet::new());
    }

    #[test]
    fn only_so_many_are_remembered_and_what_is_under_way_is_never_forgotten() {
        let mut asked = Asked::default();
        for number in 0..MOST {
            asked.ask(&request(number), true, None).unwrap();
        }
        asked.ask(&request(MOST), true, None).unwrap_err();
        ended(&mut asked, 3);
        asked.ask(&request(MOST), true, None).unwrap();
        assert_eq!((asked.all.len(), asked.wanted().count()), (MOST, MOST));
        assert!(!asked.all.contains_key(&request(3)));
    }
}
