//! The jobs: slow effects, each under a key that runs at most once at a time. A job reports back by ending; the loop
//! turns that into an observation. Deadlines live here, so that an effect that hangs becomes one that failed.

use crate::host::{
    Allocator, Clock, Host, ImageStore, NotReserved, Outcome, Prober, Progress, Proof, ProxyLink, Supervisor,
};
use crate::pace::Pace;
use enclaved_core::desired::ImageRequest;
use enclaved_core::failure::Failure;
use enclaved_core::id::{EifDigest, EnclaveKey};
use enclaved_core::image::VerifiedImage;
use enclaved_core::image_record::ImageFacts;
use enclaved_core::ledger::ProcessIdentity;
use enclaved_core::observed::JobKey;
use enclaved_core::plan::{Launch, Step};
use enclaved_core::status::{FetchStage, FetchStatus};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;

/// A local step: starting a process, a socket round trip, a few files.
const LOCAL: Duration = Duration::from_secs(30);
/// `enclaved allocate` may compact memory and restart the stock service four times, which has ten minutes each time.
const RESERVE: Duration = Duration::from_mins(45);
/// A download that brings no byte for this long is given up (and tried again). Hashing a cached image of many GiB
/// reports progress too.
const FETCH_STALL: Duration = Duration::from_secs(120);
/// Measuring an image again before its launch: one of 6 GiB from a slow disk.
const PROVE: Duration = Duration::from_secs(600);
/// How often is looked whether a download got on: often enough for a person who watches it.
const FETCH_LOOK: Duration = Duration::from_millis(250);
/// A probe has a deadline of its own; this is the margin over it.
const PROBE_MARGIN: Duration = Duration::from_secs(1);

/// What a job came to.
#[derive(Debug)]
pub enum Done {
    /// Nothing more to say than that it succeeded.
    Ok,
    /// A fetch, or a source that had something new.
    Image(Box<VerifiedImage>),
    /// An image was to be launched that is not on disk any more as it was proven. Nothing was launched.
    Spoilt(EifDigest, Failure),
    /// A probe was made, and found this.
    Health(Result<(), String>),
    /// nitro-cli was asked what runs: in what each, by the process it has, differs from what was launched.
    Described(BTreeMap<EnclaveKey, (ProcessIdentity, Option<Failure>)>),
    /// The pool is not what was asked for.
    NotReserved(NotReserved),
}

/// The jobs at work.
#[derive(Debug)]
pub struct Jobs {
    set: JoinSet<Outcome<Done>>,
    keys: BTreeMap<Id, JobKey>,
    running: BTreeSet<JobKey>,
    progress: BTreeMap<JobKey, Tracked>,
}

/// A download under way.
#[derive(Debug)]
struct Tracked {
    progress: Arc<Progress>,
    pace: Pace,
}

impl Jobs {
    /// None at work.
    pub fn new() -> Self {
        Self { set: JoinSet::new(), keys: BTreeMap::new(), running: BTreeSet::new(), progress: BTreeMap::new() }
    }

    /// The keys at work.
    pub fn running(&self) -> &BTreeSet<JobKey> {
        &self.running
    }

    /// How far the downloads are.
    pub fn fetches(&mut self) -> BTreeMap<ImageRequest, FetchStatus> {
        let now = Instant::now();
        let mut fetches = BTreeMap::new();
        for (key, tracked) in &mut self.progress {
            let status = tracked.pace.status(now, &tracked.progress);
            match key {
                JobKey::Fetch(request) => drop(fetches.insert(request.clone(), status)),
                // What is fetched to be launched is of more interest than what is fetched besides.
                // A look at a source that has nothing new is none either.
                JobKey::Refresh(request) if status.stage != FetchStage::Asking => {
                    fetches.entry(request.clone()).or_insert(status);
                }
                _ => {}
            }
        }
        fetches
    }

    /// Returns when a download has got on, so that somebody may tell; pending forever while there is none.
    pub fn got_on(&self) -> impl Future<Output = ()> + Send + use<> {
        let seen = |tracked: &Tracked| (Arc::clone(&tracked.progress), tracked.progress.get());
        let seen: Vec<_> = self.progress.values().map(seen).collect();
        async move {
            if seen.is_empty() {
                return std::future::pending().await;
            }
            while seen.iter().all(|(progress, seen)| progress.get() == *seen) {
                tokio::time::sleep(FETCH_LOOK).await;
            }
        }
    }

    /// Starts the job of a step. A step whose key is at work, or that is none (a change of the ledger), starts nothing.
    pub fn start<H: Host>(&mut self, host: &Arc<H>, step: &Step) {
        let host = Arc::clone(host);
        match step.clone() {
            Step::Record(_) => {}
            Step::Fetch { request, prefer } => {
                let Some(progress) = self.track(JobKey::Fetch(request.clone())) else { return };
                // It may have to wait for a look at the source that is downloading just what it needs.
                let other = self.progress.get(&JobKey::Refresh(request.clone()));
                let watched = [Some(Arc::clone(&progress)), other.map(|tracked| Arc::clone(&tracked.progress))];
                self.spawn(JobKey::Fetch(request.clone()), async move {
                    let fetch = host.images().fetch(&request, prefer, progress);
                    let image = unless_stalled(&request, &watched, fetch).await?;
                    Ok(Done::Image(Box::new(image)))
                });
            }
            Step::Refresh { request, known, memory } => {
                let Some(progress) = self.track(JobKey::Refresh(request.clone())) else { return };
                self.spawn(JobKey::Refresh(request.clone()), async move {
                    let refresh = host.images().refresh(&request, &known, Arc::clone(&progress));
                    let news = unless_stalled(&request, &[Some(progress), None], refresh).await?;
                    let Some(image) = news else { return Ok(Done::Ok) };
                    // What can't be launched must not take the place of what can, not even in the ledger.
                    match ImageFacts::of(&image).launchable(memory, host.clock().now()) {
                        Ok(()) => Ok(Done::Image(Box::new(image))),
                        Err(unfit) => Err(Failure {
                            message: format!(
                                "{} has a new image (sha256 {}) that can't be launched, the former one stays: {}",
                                request.source,
                                image.digest().short(),
                                unfit.failure.message
                            ),
                            ..unfit.failure
                        }),
                    }
                });
            }
            Step::RemoveCached(item) => self.spawn(JobKey::RemoveCached(item.clone()), async move {
                within(LOCAL, "removing an image from the cache", host.images().remove(&item)).await
            }),
            Step::Reserve { wish, least } => self.spawn(JobKey::Reserve, async move {
                let reserve = host.allocator().reserve(&wish, least.as_ref());
                Ok(match tokio::time::timeout(RESERVE, reserve).await {
                    Ok(Ok(())) => Done::Ok,
                    Ok(Err(not)) => Done::NotReserved(not),
                    Err(_) => {
                        let limit = humantime::format_duration(RESERVE);
                        let late = Failure::new(format!("having the enclave pool changed took longer than {limit}"));
                        Done::NotReserved(NotReserved::tried(late))
                    }
                })
            }),
            Step::StartProxy => self.spawn(JobKey::StartProxy, async move {
                within(LOCAL, "starting the proxy process", host.proxy().start()).await
            }),
            Step::Publish(routes) => self.spawn(JobKey::Publish, async move {
                within(LOCAL, "handing the routes to the proxy", host.proxy().publish(&routes)).await
            }),
            Step::Launch(launch) => {
                self.spawn(JobKey::Launch(launch.key.clone()), async move { launch_proven(&*host, &launch).await })
            }
            Step::Stop { key, launch } => self.spawn(JobKey::Stop(key.clone()), async move {
                within(LOCAL, "stopping the enclave", host.supervisor().stop(&key, &launch)).await
            }),
            Step::Forget(key) => self.spawn(JobKey::Forget(key.clone()), async move {
                within(LOCAL, "removing the traces of an ended enclave", host.supervisor().forget(&key)).await
            }),
            // Without a deadline, as all of nitro-cli: to cut the first answer off can end an enclave.
            Step::Describe(launched) => self.spawn(JobKey::Describe, async move {
                let said = host.supervisor().describe(&launched).await?;
                let process =
                    |key: &EnclaveKey| launched.iter().find(|one| one.key == *key).map(|one| one.launch.process);
                let said =
                    said.into_iter().filter_map(|(key, doubt)| process(&key).map(|process| (key, (process, doubt))));
                Ok(Done::Described(said.collect()))
            }),
            Step::Probe { key, cid, check } => self.spawn(JobKey::Probe(key), async move {
                let limit = check.timeout.saturating_add(PROBE_MARGIN);
                match tokio::time::timeout(limit, host.prober().probe(cid, &check)).await {
                    Ok(outcome) => outcome.map(Done::Health),
                    Err(_) => Ok(Done::Health(Err(format!("no answer within {}", humantime::format_duration(limit))))),
                }
            }),
        }
    }

    /// The progress of a download that is to begin; `None` if it is under way.
    fn track(&mut self, key: JobKey) -> Option<Arc<Progress>> {
        if self.running.contains(&key) {
            return None;
        }
        let progress = Arc::new(Progress::default());
        let tracked = Tracked { progress: Arc::clone(&progress), pace: Pace::default() };
        self.progress.insert(key, tracked);
        Some(progress)
    }

    fn spawn(&mut self, key: JobKey, job: impl Future<Output = Outcome<Done>> + Send + 'static) {
        if self.running.insert(key.clone()) {
            let id = self.set.spawn(job).id();
            self.keys.insert(id, key);
        }
    }

    /// The next job that ends; pending forever while none is at work. Cancel-safe: nothing is lost if it is dropped.
    ///
    /// # Errors
    /// A job panicked: a bug.
    pub async fn ended(&mut self) -> Result<(JobKey, Outcome<Done>), JoinError> {
        loop {
            match self.set.join_next_with_id().await {
                Some(Ok((id, outcome))) => {
                    if let Some(key) = self.finish(id) {
                        return Ok((key, outcome));
                    }
                }
                Some(Err(error)) => return Err(error),
                None => std::future::pending::<()>().await,
            }
        }
    }

    fn finish(&mut self, id: Id) -> Option<JobKey> {
        let key = self.keys.remove(&id)?;
        self.running.remove(&key);
        self.progress.remove(&key);
        Some(key)
    }
}

impl Default for Jobs {
    fn default() -> Self {
        Self::new()
    }
}

async fn within(limit: Duration, doing: &str, effect: impl Future<Output = Outcome<()>>) -> Outcome<Done> {
    match tokio::time::timeout(limit, effect).await {
        Ok(outcome) => outcome.map(|()| Done::Ok),
        Err(_) => Err(Failure::new(format!("{doing} took longer than {}", humantime::format_duration(limit)))),
    }
}

/// Launches an enclave if its image is still on disk as it was proven: nothing else is ever handed to nitro-cli.
async fn launch_proven<H: Host>(host: &H, launch: &Launch) -> Outcome<Done> {
    match tokio::time::timeout(PROVE, host.images().prove(&launch.image)).await {
        Ok(Ok(Proof::Holds)) => {}
        Ok(Ok(Proof::Spoilt(failure))) => return Ok(Done::Spoilt(launch.image.digest(), failure)),
        Ok(Err(failure)) => return Err(failure),
        Err(_) => {
            let limit = humantime::format_duration(PROVE);
            return Err(Failure::new(format!("measuring the image again before its launch took longer than {limit}"))
                .with_remedy("check the disk (`dmesg`, `iostat -x 1`)"));
        }
    }
    within(LOCAL, "launching the enclave", host.supervisor().launch(launch)).await
}

/// Lets a fetch run as long as it makes progress.
async fn unless_stalled<T>(
    request: &ImageRequest,
    watched: &[Option<Arc<Progress>>; 2],
    fetch: impl Future<Output = Outcome<T>>,
) -> Outcome<T> {
    tokio::pin!(fetch);
    let look =
        || watched.each_ref().map(|progress| progress.as_ref().map(|progress| (progress.get(), progress.stage())));
    let mut seen = look();
    loop {
        match tokio::time::timeout(FETCH_STALL, &mut fetch).await {
            Ok(outcome) => return outcome,
            Err(_) if look() == seen => {
                let stall = humantime::format_duration(FETCH_STALL);
                let (bytes, total) = seen[0].map_or((0, 0), |(progress, _)| progress);
                return Err(Failure::new(format!(
                    "fetching {} brought nothing for {stall} (at byte {bytes} of {total})",
                    request.source
                )));
            }
            Err(_) => seen = look(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::desired::ImageSource;
    use enclaved_core::image::ExpectedImage;

    #[tokio::test(start_paused = true)]
    async fn a_download_that_gets_on_is_news_and_one_that_stalls_is_none() {
        let mut jobs = Jobs::new();
        let later = Duration::from_secs(3600);
        assert!(tokio::time::timeout(later, jobs.got_on()).await.is_err(), "there is none");
        let source = ImageSource::File("/a.eif".into());
        let progress = Arc::new(Progress::default());
        let key = JobKey::Fetch(ImageRequest { source, expected: ExpectedImage::default() });
        jobs.progress.insert(key, Tracked { progress: Arc::clone(&progress), pace: Pace::default() });
        assert!(tokio::time::timeout(later, jobs.got_on()).await.is_err(), "it stalls");
        let news = jobs.got_on();
        progress.add(1);
        tokio::time::timeout(FETCH_LOOK, news).await.unwrap();
    }
}
