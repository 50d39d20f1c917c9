//! The plan for images: what their jobs found goes into the ledger, what is needed is fetched, sources that are watched are
//! asked again, and what nobody needs leaves the cache.

use super::{Planner, Step, restart};
use crate::desired::{EnclaveSpec, ImageRequest};
use crate::id::{EifDigest, EnclaveName};
use crate::image_record::{ImageFacts, Unfit};
use crate::ledger::{Change, ImageOutcome};
use crate::observed::{CacheItem, JobKey};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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
            // By equality, not by order: clocks step.
            let known = matches!(self.ledger.image(request), Some(ImageOutcome::Failed { at, .. }) if *at == failed.at);
            if wanted(request) && !known {
                let (request, failure) = (request.clone(), failed.failure.clone());
                self.record(Change::ImageFailed { request, at: failed.at, failure });
            }
        }
        self.fetch_ahead();
        self.refresh();
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
        self.start_fetch(request);
    }

    /// Fetches what somebody wants in the cache ahead of its use. A failure is told, and not tried again.
    fn fetch_ahead(&mut self) {
        for request in &self.observed.asked {
            if !self.observed.running.contains(&JobKey::Fetch(request.clone())) {
                self.start_fetch(request);
            }
        }
    }

    fn start_fetch(&mut self, request: &ImageRequest) {
        let step = Step::Fetch(request.clone());
        if !self.cache_is_being_cleaned() && !self.plan.steps.contains(&step) {
            self.plan.steps.push(step);
        }
    }

    /// Asks the sources that are watched, when it is time. What is there stays in force until something else is proven.
    fn refresh(&mut self) {
        let mut watched: BTreeMap<&ImageRequest, Duration> = BTreeMap::new();
        for spec in self.desired.enclaves.values() {
            if let Some(every) = spec.image_poll {
                let pause = watched.entry(&spec.image).or_insert(every);
                *pause = every.min(*pause);
            }
        }
        for (request, every) in watched {
            // Before it is verified it is fetched anyway.
            let Some(ImageOutcome::Verified { digest, .. }) = self.ledger.image(request) else { continue };
            let fetching = self.observed.running.contains(&JobKey::Fetch(request.clone()));
            let job = JobKey::Refresh(request.clone());
            if fetching || self.observed.running.contains(&job) || self.cache_is_being_cleaned() {
                continue;
            }
            let failed = self.observed.failed.get(&job).map(|failed| (failed.at, restart::IMAGE.after(failed.count)));
            let asked = self.observed.refreshed.get(request).map(|at| (*at, Duration::ZERO));
            let pause = |(at, pause): (_, Duration)| restart::pause_end(at, pause.max(every), self.now);
            match failed.into_iter().chain(asked).filter_map(pause).max() {
                Some(due) => self.wake(due),
                None => self.plan.steps.push(Step::Refresh { request: request.clone(), known: *digest }),
            }
        }
    }

    /// Nothing is fetched while something leaves the cache, and the other way round: a fetch may be about to use what is
    /// being removed.
    fn cache_is_being_cleaned(&self) -> bool {
        self.observed.running.iter().any(|job| matches!(job, JobKey::RemoveCached(_)))
    }

    /// Removes from the cache what nobody needs, oldest first, until it is within its limit. What runs, ran last or ran
    /// before that is never removed; nothing is while it can't be told what runs.
    pub(super) fn collect_images(&mut self) {
        let fetching = |job: &JobKey| matches!(job, JobKey::Fetch(_) | JobKey::Refresh(_));
        let to_fetch = |step: &Step| matches!(step, Step::Fetch(_) | Step::Refresh { .. });
        if self.observed.running.iter().any(fetching) || self.plan.steps.iter().any(to_fetch) {
            return;
        }
        let Some(cache) = self.observed.cache.known().filter(|_| self.ledger_is_complete()) else { return };
        let wanted = |request: &ImageRequest| self.desired.enclaves.values().any(|spec| spec.image == *request);
        let stale = cache.unfinished.iter().filter(|unfinished| !wanted(&unfinished.request));
        let mut remove: Vec<_> = stale.map(|unfinished| CacheItem::Unfinished(unfinished.request.clone())).collect();
        let needed = self.needed_images();
        let mut bytes = cache.images.iter().fold(0_u64, |sum, image| sum.saturating_add(image.size));
        let mut others: Vec<_> = cache.images.iter().filter(|image| !needed.contains(&image.digest)).collect();
        others.sort_by_key(|image| (image.used, image.digest));
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
        running.chain(last).chain(verified).collect()
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
