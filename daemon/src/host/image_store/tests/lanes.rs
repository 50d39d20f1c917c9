//! A download's time: silence, laggards, pauses, under paused time against a source in memory.

use super::*;
use crate::host::image_store::download::{Download, End, Readers, look};
use crate::host::image_store::measure::Following;
use crate::host::image_store::remote::{Chunks, Look, Opened, Remote, Trouble};
use crate::host::image_store::stamp::Object;
use bytes::Bytes;
use enclaved_core::fetch::{MAX_TRIES, Tries};
use std::ops::Range;
use std::time::Duration;
use tokio::time::{Instant, sleep};

const PART: u64 = 64 << 10;
const GOES_ON: &str = "the next fetch goes on from the finished parts";

/// What a request does.
#[derive(Debug, Clone, Copy)]
enum Does {
    Serve,
    /// Never answers.
    Hang,
    /// Answers and then sends nothing.
    Stop,
    /// So many bytes in a second.
    Slow(u64),
}

struct Source {
    bytes: Bytes,
    does: Box<dyn Fn(u64, usize) -> Does + Send + Sync>,
    asked: Mutex<Vec<(Range<u64>, Instant)>>,
}

impl Source {
    fn new(does: impl Fn(u64, usize) -> Does + Send + Sync + 'static) -> Arc<Self> {
        let bytes = sample("signer", 1, 600_000).to_bytes();
        Arc::new(Self { bytes: bytes.into(), does: Box::new(does), asked: Mutex::default() })
    }

    fn object(&self) -> Object {
        Object { etag: Some("\"a\"".to_owned()), modified: None, size: self.bytes.len() as u64, version: None }
    }
}

struct Pieces {
    bytes: Bytes,
    does: Does,
}

impl Chunks for Pieces {
    async fn next(&mut self) -> Option<Result<Bytes, String>> {
        if self.bytes.is_empty() {
            return None;
        }
        match self.does {
            Does::Serve => {}
            Does::Slow(rate) => sleep(Duration::from_secs_f64(1000.0 / rate as f64)).await,
            Does::Hang | Does::Stop => std::future::pending().await,
        }
        Some(Ok(self.bytes.split_to(self.bytes.len().min(1000))))
    }
}

impl Remote for Source {
    type Chunks = Pieces;

    async fn look(&self) -> Result<Look, Trouble> {
        match (self.does)(0, 0) {
            Does::Hang => std::future::pending().await,
            _ => Ok(Look { object: self.object(), checksum: None, ranges: true }),
        }
    }

    async fn open(&self, _: &Object, range: Option<Range<u64>>) -> Result<Opened<Pieces>, Trouble> {
        let range = range.unwrap_or(0..self.bytes.len() as u64);
        let before = {
            let mut asked = self.asked.lock().unwrap();
            asked.push((range.clone(), Instant::now()));
            asked.iter().filter(|(one, _)| one.start / PART == range.start / PART).count() - 1
        };
        let does = (self.does)(range.start / PART, before);
        if matches!(does, Does::Hang) {
            std::future::pending::<()>().await;
        }
        let place = |at: u64| usize::try_from(at).unwrap();
        let bytes = self.bytes.slice(place(range.start)..place(range.end));
        Ok(Opened::Range(Pieces { bytes, does }))
    }

    fn renew(&self) {}

    fn who(&self) -> String {
        "memory".to_owned()
    }
}

/// Downloads in parts; how long it took. (Paused time stands still while something is written, and passes else.)
async fn download(source: &Arc<Source>) -> (Result<Vec<u8>, End>, Duration) {
    download_in(source, Some(PART), Tries::default()).await
}

async fn download_in(source: &Arc<Source>, part: Option<u64>, mut tries: Tries) -> (Result<Vec<u8>, End>, Duration) {
    let folder = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(folder.path(), Disk::default()).unwrap());
    let object = source.object();
    let begun = cache.begin_download(&request("s3://bucket/a.eif"), &object, part).unwrap();
    let readers = Readers { following: Following::begin(File::open(begun.incoming.path()).unwrap()), summing: None };
    let download = Download {
        remote: Arc::clone(source),
        parts: begun.parts,
        object,
        file: Arc::clone(begun.incoming.file()),
        disk: Disk::default(),
        progress: Arc::default(),
        saver: begun.saver,
    };
    let began = Instant::now();
    let result = download.run(&readers, &mut tries).await;
    let took = began.elapsed();
    (result.map(|()| fs::read(begun.incoming.path()).unwrap()), took)
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_silent_is_made_again_after_half_a_minute() {
    for silent in [Does::Hang, Does::Stop] {
        let source = Source::new(move |part, before| if (part, before) == (3, 0) { silent } else { Does::Serve });
        let (result, took) = download(&source).await;
        assert_eq!(result.unwrap(), source.bytes);
        let seconds = took.as_secs();
        assert!((30..33).contains(&seconds), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_went_silent_altogether_is_given_up_after_a_minute_and_a_half() {
    let source = Source::new(|part, _| if part < 4 { Does::Serve } else { Does::Stop });
    let (result, took) = download(&source).await;
    let Err(End::Final(failure)) = result else { panic!("{result:?}") };
    for part in ["could not get memory", "nothing came for 30 s", "tried 3 times", "bytes had come", GOES_ON] {
        assert!(failure.message.contains(part), "{failure}");
    }
    assert!(failure.remedy.is_some());
    let seconds = took.as_secs();
    // So that its reason is told, before the job is ended for standing still.
    assert!((90..110).contains(&seconds), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn that_the_next_fetch_goes_on_is_said_only_where_finished_parts_are_kept() {
    // No part is finished, or all is got in one piece, of which nothing is kept.
    for (part, most) in [(Some(PART), MAX_TRIES), (None, 1)] {
        let source = Source::new(|_, _| Does::Slow(50));
        let (result, _) = download_in(&source, part, Tries::of(most)).await;
        let Err(End::Final(failure)) = result else { panic!("{result:?}") };
        assert!(failure.message.contains("bytes had come") && !failure.message.contains(GOES_ON), "{failure}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_far_slower_than_the_others_is_made_again_from_where_it_is() {
    let source = Source::new(|part, before| match (part, before) {
        (2, 0) => Does::Slow(1000),
        _ => Does::Slow(20_000),
    });
    let (result, took) = download(&source).await;
    assert_eq!(result.unwrap(), source.bytes);
    assert!(took < Duration::from_secs(25), "{took:?}");
    let asked = source.asked.lock().unwrap();
    let part: Vec<u64> = asked.iter().map(|(range, _)| range.start).filter(|start| start / PART == 2).collect();
    assert!(part.len() == 2 && part[1] > 2 * PART, "{part:?}");
}

#[tokio::test(start_paused = true)]
async fn requests_that_are_all_slow_are_let_alone() {
    let source = Source::new(|_, _| Does::Slow(5000));
    let (result, _) = download(&source).await;
    assert_eq!(result.unwrap(), source.bytes);
    assert_eq!(source.asked.lock().unwrap().len() as u64, source.object().size.div_ceil(PART));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_brings_next_to_nothing_is_made_again_after_a_minute_though_no_other_is_faster() {
    let source = Source::new(|_, _| Does::Slow(500));
    let (result, _) = download(&source).await;
    assert_eq!(result.unwrap(), source.bytes);
    let asked = source.asked.lock().unwrap();
    let (first, again) = {
        let mut of_first = asked.iter().filter(|(range, _)| range.start / PART == 0);
        (of_first.next().unwrap(), of_first.next().expect("it brought 30000 bytes in a minute"))
    };
    assert!(again.0.start >= 29_000, "{again:?}");
    let seconds = again.1.duration_since(first.1).as_secs();
    assert!((60..64).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn a_source_that_does_not_say_what_it_has_is_given_up() {
    let source = Source::new(|_, _| Does::Hang);
    let began = Instant::now();
    let failure = look(&*source).await.unwrap_err();
    assert!(failure.message.contains("could not get memory: nothing came for 30 s"), "{failure}");
    assert!(began.elapsed() < Duration::from_secs(100), "{:?}", began.elapsed());
}
