//! The plan for images: what their jobs found goes into the ledger, what is needed is fetched, sources that are watched are
//! asked again, and what nobody needs leaves the cache.

use super::{Planner, Prefer, Step, restart};
use crate::desired::{EnclaveSpec, ImageRequest};
use crate::id::{EifDigest, EnclaveName, MemoryMib};
use crate::image_record::{ImageFacts, Unfit};
use crate::ledger::{Change, ImageOutcome};
use crate::observed::{CacheItem, JobKey};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What is left of a download that nobody wants (any more) is kept for so long, to go on with.
const UNFINISHED: Duration = Duration::from_secs(24 * 3600);

impl Planner<'_> {
    pub(super) fn images(&mut self) {
        let wanted = |request: &ImageRequest| self.desired.enclaves.values().any(|spec| spec.image == *request);
        let stale: Vec<_> = self
            .ledger
            .images
            .iter()
            .map(|record| &record.request)
            .filter(|request| !wanted(request))
            .cloned()
            .collect();
        for request in stale {
            self.record(Change::ImageForgotten(request));
        }
        // What a job found is recorded here; jobs do not write the ledger.
        for (request, image) in &self.observed.images {
            let (digest, facts) = (image.digest(), ImageFacts::of(image));
            let known = matches!(
                self.ledger.image(request),
                Some(ImageOutcome::Verified { digest: d, facts: f, .. }) if *d == digest && *f == Some(facts)
            );
            if wanted(request) && !known {
                let (request, measurements) = (request.clone(), *image.measurements());
                self.record(Change::ImageVerified { request, digest, measurements, facts });
            }
        }
        for (job, failed) in &self.observed.failed {
            let JobKey::Fetch(request) = job else { continue };
            if self.observed.images.contains_key(request) {
                // It is there all the same: it was asked for once more, or brought by a look at its source.
                continue;
            }
            // By equality, not by order: clocks step.
            let known = matches!(self.ledger.image(request), Some(ImageOutcome::Failed { at, .. }) if *at == failed.at);
            if wanted(request) && !known {
                let (request, failure) = (request.clone(), failed.failure.clone());
                self.record(Change::ImageFailed { request, at: failed.at, failure });
            }
        }
        self.fetch_ahead();
    }

    /// Fetches the image unless that is under way, or failed and pauses.
    pub(super) fn fetch(&mut self, name: &EnclaveName, request: &ImageRequest) {
        let news = |step: &Step| match step {
            Step::Record(Change::ImageVerified { request: of, .. } | Change::ImageFailed { request: of, .. }) => {
                of == request
            }
            _ => false,
        };
        if self.observed.running.contains(&JobKey::Fetch(request.clone())) || self.plan.steps.iter().any(news) {
            return self.wait(name, "its image is being fetched");
        }
        if let Some(ImageOutcome::Failed { at, count, failure }) = self.ledger.image(request)
            && let Some(again) = restart::pause_end(*at, restart::IMAGE.after(*count), self.now)
        {
            self.wait(name, format!("its image could not be had and is tried again at {again}: {failure}"));
            return self.wake(again);
        }
        self.wait(name, "its image is being fetched");
        let prefer = match self.ledger.image(request) {
            Some(ImageOutcome::Verified { digest, .. }) => Prefer::Known(*digest),
            Some(ImageOutcome::Failed { .. }) | None => Prefer::Cached,
        };
        self.start_fetch(request, prefer);
    }

    /// Fetches what somebody wants in the cache ahead of its use. A failure is told, and not tried again.
    fn fetch_ahead(&mut self) {
        for request in &self.observed.asked {
            if !self.observed.running.contains(&JobKey::Fetch(request.clone())) {
                self.start_fetch(request, Prefer::Source);
            }
        }
    }

    fn start_fetch(&mut self, request: &ImageRequest, prefer: Prefer) {
        if !self.cache_is_being_cleaned() && !self.is_to_be_fetched(request) {
            self.plan.steps.push(Step::Fetch { request: request.clone(), prefer });
        }
    }

    fn is_to_be_fetched(&self, request: &ImageRequest) -> bool {
        self.plan.steps.iter().any(|step| matches!(step, Step::Fetch { request: of, .. } if of == request))
    }

    /// Asks the sources that are watched, when it is time. What is there stays in force until something else is proven.
    pub(super) fn refresh(&mut self) {
        // The shortest pause, and the most memory: what fits one of them is worth having.
        let mut watched: BTreeMap<&ImageRequest, (Duration, MemoryMib)> = BTreeMap::new();
        for spec in self.desired.enclaves.values() {
            if let Some(every) = spec.image_poll {
                let (pause, memory) = watched.entry(&spec.image).or_insert((every, spec.memory));
                (*pause, *memory) = (every.min(*pause), spec.memory.max(*memory));
            }
        }
        for (request, (every, memory)) in watched {
            // Before it is verified it is fetched anyway.
            let Some(ImageOutcome::Verified { digest, .. }) = self.ledger.image(request) else { continue };
            let fetching = self.observed.running.contains(&JobKey::Fetch(request.clone()));
            let fetching = fetching || self.is_to_be_fetched(request);
            let job = JobKey::Refresh(request.clone());
            if fetching || self.observed.running.contains(&job) || self.cache_is_being_cleaned() {
                continue;
            }
            let failed = self.observed.failed.get(&job).map(|failed| (failed.at, restart::IMAGE.after(failed.count)));
            let asked = self.observed.refreshed.get(request).map(|at| (*at, Duration::ZERO));
            let pause = |(at, pause): (_, Duration)| restart::pause_end(at, pause.max(every), self.now);
            match failed.into_iter().chain(asked).filter_map(pause).max() {
                Some(due) => self.wake(due),
                None => self.plan.steps.push(Step::Refresh { request: request.clone(), known: *digest, memory }),
            }
        }
    }

    /// Nothing is fetched while something leaves the cache, and the other way round: a fetch may be about to use what is
    /// being removed.
    fn cache_is_being_cleaned(&self) -> bool {
        self.observed.running.iter().any(|job| matches!(job, JobKey::RemoveCached(_)))
    }

    /// Removes from the cache what nobody needs, oldest first, until that is within the limit. What runs, ran last or ran
    /// before that is never removed, nor what was fetched ahead lately; nothing is while it can't be told what runs.
    pub(super) fn collect_images(&mut self) {
        let fetching = |job: &JobKey| matches!(job, JobKey::Fetch(_) | JobKey::Refresh(_));
        let to_fetch = |step: &Step| matches!(step, Step::Fetch { .. } | Step::Refresh { .. });
        if self.observed.running.iter().any(fetching) || self.plan.steps.iter().any(to_fetch) {
            return;
        }
        let Some(cache) = self.observed.cache.known().filter(|_| self.ledger_is_complete()) else { return };
        let wanted = |request: &ImageRequest| self.desired.enclaves.values().any(|spec| spec.image == *request);
        let stale = cache.unfinished.iter().filter(|unfinished| {
            let kept = wanted(&unfinished.request) || self.observed.asked.contains(&unfinished.request);
            !kept && restart::pause_end(unfinished.used, UNFINISHED, self.now).is_none()
        });
        let mut remove: Vec<_> = stale.map(|unfinished| CacheItem::Unfinished(unfinished.request.clone())).collect();
        let needed = self.needed_images();
        let mut others: Vec<_> = cache.images.iter().filter(|image| !needed.contains(&image.digest)).collect();
        others.sort_by_key(|image| (image.used, image.digest));
        let mut bytes = others.iter().fold(0_u64, |sum, image| sum.saturating_add(image.size));
        for image in others {
            if bytes <= self.desired.host.image_cache {
                break;
            }
            bytes = bytes.saturating_sub(image.size);
            remove.push(CacheItem::Image(image.digest));
        }
        for item in remove {
            self.job(&JobKey::RemoveCached(item.clone()), restart::STEP, Step::RemoveCached(item));
        }
    }

    /// The images that are never removed.
    fn needed_images(&self) -> BTreeSet<EifDigest> {
        let running = self.ledger.generations().map(|(_, of)| of.identity.image);
        let last = self.ledger.enclaves.values().flat_map(|enclave| [enclave.image, enclave.previous_image]).flatten();
        let verified = self.ledger.images.iter().filter_map(|record| match record.outcome {
            ImageOutcome::Verified { digest, .. } => Some(digest),
            ImageOutcome::Failed { .. } => None,
        });
        running.chain(last).chain(verified).chain(self.observed.ahead.iter().copied()).collect()
    }

    /// Whether an enclave of that kind could be launched with its image now; what is not known yet is no obstacle.
    pub(super) fn launchable(&mut self, spec: &EnclaveSpec) -> Result<(), Unfit> {
        let Some(ImageOutcome::Verified { facts: Some(facts), .. }) = self.ledger.image(&spec.image) else {
            return Ok(());
        };
        let judged = facts.launchable(spec.memory, self.now);
        if let Err(Unfit { until: Some(until), .. }) = &judged {
            self.wake(*until);
        }
        judged
    }
}
