//! One download: ranged requests side by side, each for a part of one and the same object, written to their places in one file.
//! What a failure means and which part is next is core's to say (`core::fetch`); here it is done, and said in the log.
//!
//! The heap holds what arrived and is not written yet: a little over half a MiB for each request, whatever the object's size.

use super::checksum::{Mismatch, Summing};
use super::disk::{Disk, is_full};
use super::measure::{Following, IntakeError};
use super::remote::{Chunks, Look, Opened, Remote, Trouble};
use super::sidecar::Saver;
use super::stamp::Object;
use crate::host::Progress;
use bytes::Bytes;
use enclaved_core::failure::Failure;
use enclaved_core::fetch::{Cause, MAX_LOOKS, Part, Parts, Speed, Tries, Verdict, lags};
use enclaved_core::image::EifReport;
use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

/// Requests at once. By S3's performance guidelines one request brings some 85 to 90 MB/s, which would make these a little over
/// 4 Gbit/s; not measured.
const LANES: usize = 6;
/// The size of a part, where the object is not so large that it must be more.
pub(super) const PART: u64 = 8 << 20;
/// A request that brings nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// A request that brings less than this within [`FLOOR_TIME`] counts as silent: a byte now and then would keep it for ever.
const FLOOR: u64 = 64 << 10;
const FLOOR_TIME: Duration = Duration::from_secs(60);
/// So much is gathered before it is written...
const GATHER: usize = 512 << 10;
/// ...unless it has waited for so long.
const GATHER_TIME: Duration = Duration::from_secs(1);
/// How often finished parts are written down, so that a later life of this process finds them.
const SAVE: Duration = Duration::from_secs(1);

/// Asks what there is, as often as it may help.
///
/// # Errors
/// The last reason.
pub(super) async fn look<R: Remote>(remote: &R) -> Result<Look, Failure> {
    let (mut tries, began) = (Tries::of(MAX_LOOKS), Instant::now());
    loop {
        let looked = timeout(SILENCE, remote.look()).await.unwrap_or_else(|_| Err(silent()));
        let trouble = match looked {
            Ok(look) => return Ok(look),
            Err(trouble) => trouble,
        };
        let pause = match tries.judge(&trouble.cause, 0, began.elapsed(), random()) {
            Verdict::Again(pause) => pause,
            Verdict::Renewed(pause) => {
                remote.renew();
                pause
            }
            Verdict::Anew | Verdict::Final => return Err(given_up(remote, &trouble, &tries, None)),
        };
        let (next, most) = (tries.failed() + 1, tries.most());
        tracing::warn!("{}: asking for it failed: {trouble}; try {next} of {most} in {pause:.1?}", remote.who());
        sleep(pause).await;
    }
}

/// How a download ended that did not bring the object.
#[derive(Debug)]
pub(super) enum End {
    /// It is given up.
    Final(Failure),
    /// The disk has no space for it.
    Full,
    /// What has arrived did not get to the disk, for this reason: nothing of it can be used.
    Unflushed(std::io::Error),
    /// The object is another by now.
    Changed(String),
    /// What has arrived can't be an image, or can't be read: the readers say why.
    Readers,
    /// The source gives no parts after all: it must be got in one piece.
    NoRanges,
    /// It was to be got in one piece, and that broke off: it may be tried from the beginning.
    FromTheBeginning,
}

/// Whoever reads the file behind the download.
#[derive(Debug)]
pub(super) struct Readers {
    pub(super) following: Following,
    pub(super) summing: Option<Summing>,
}

impl Readers {
    fn advance(&self, front: u64) {
        self.following.advance(front);
        if let Some(summing) = &self.summing {
            summing.advance(front);
        }
    }

    /// What came of it, once the file is whole. (If it is not, because nobody could make anything of its beginning, no checksum
    /// is looked at.)
    pub(super) async fn finish(self, size: u64, whole: bool) -> (Result<EifReport, IntakeError>, Summed) {
        let report = self.following.finish(size).await;
        let summed = match self.summing.filter(|_| whole) {
            None => Summed::Unknown,
            Some(summing) => match summing.finish(size).await {
                Ok(Ok(())) => Summed::Right,
                Ok(Err(mismatch)) => Summed::Wrong(mismatch),
                Err(error) => return (Err(error), Summed::Unknown),
            },
        };
        (report, summed)
    }
}

/// Whether the bytes are those that the source has, by its checksum.
#[derive(Debug)]
pub(super) enum Summed {
    Right,
    Wrong(Mismatch),
    /// It has none, or there are not all bytes.
    Unknown,
}

/// A download about to be done.
#[derive(Debug)]
pub(super) struct Download<R> {
    pub(super) remote: Arc<R>,
    pub(super) object: Object,
    pub(super) parts: Parts,
    pub(super) file: Arc<File>,
    pub(super) disk: Disk,
    pub(super) progress: Arc<Progress>,
    /// Writes down which parts are finished; `None`: the object is got in one piece, and nothing of it is kept.
    pub(super) saver: Option<Arc<Saver>>,
}

impl<R: Remote> Download<R> {
    /// Gets it. When this returns `Ok`, every byte is written, though not flushed to disk. `tries` are those in one piece.
    pub(super) async fn run(self, readers: &Readers, tries: &mut Tries) -> Result<(), End> {
        let Self { remote, object, parts, file, disk, progress, saver } = self;
        let in_one_piece = saver.is_none();
        let lanes = if in_one_piece { 1 } else { LANES };
        readers.advance(parts.front());
        let table = Table {
            parts,
            written: BTreeMap::new(),
            paces: vec![None; lanes],
            last: Instant::now(),
            tries: std::mem::take(tries),
            unsaved: false,
        };
        let front = watch::Sender::new(0);
        let work = Arc::new(Work { remote, object, file, disk, progress, table: Mutex::new(table), front });
        let mut at_work = JoinSet::new();
        for lane in 0..lanes {
            let work = Arc::clone(&work);
            at_work.spawn(async move { if in_one_piece { work.whole().await } else { work.lane(lane).await } });
        }
        let ended = work.tend(&mut at_work, readers, saver.as_ref()).await;
        at_work.shutdown().await;
        *tries = std::mem::take(&mut work.table().tries);
        let Some(saver) = saver.filter(|_| matches!(ended, Ok(()) | Err(End::Final(_)))) else { return ended };
        let (file, finished) = (Arc::clone(&work.file), work.table().parts.finished());
        let is_any = !finished.is_empty();
        let saved = tokio::task::spawn_blocking(move || saver.save(&file, &finished)).await;
        let is_saved = saved.map_err(std::io::Error::other).flatten().map_err(End::Unflushed)?;
        match ended {
            Err(End::Final(mut failure)) if is_any && is_saved => {
                failure.message.push_str("; the next fetch goes on from the finished parts");
                Err(End::Final(failure))
            }
            ended => ended,
        }
    }
}

#[derive(Debug)]
struct Work<R> {
    remote: Arc<R>,
    object: Object,
    file: Arc<File>,
    disk: Disk,
    progress: Arc<Progress>,
    table: Mutex<Table>,
    /// How many bytes from the beginning are there without a gap.
    front: watch::Sender<u64>,
}

#[derive(Debug)]
struct Table {
    parts: Parts,
    /// Of parts that are being got, how many bytes are written.
    written: BTreeMap<u64, u64>,
    /// The last request of each lane.
    paces: Vec<Option<Speed>>,
    /// When the last byte was written.
    last: Instant,
    /// Of the whole, where it is got in one piece.
    tries: Tries,
    /// Whether parts have been finished since they were written down.
    unsaved: bool,
}

impl Table {
    fn front(&self) -> u64 {
        let front = self.parts.front();
        front + self.written.get(&(front / self.parts.part())).copied().unwrap_or(0)
    }
}

/// An attempt that did not bring all that was asked for.
enum Short {
    Trouble(Trouble),
    NoRanges,
}

impl From<Trouble> for Short {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl<R: Remote> Work<R> {
    /// Waits for the lanes, and tells the readers and the sidecar how far they are.
    async fn tend(
        &self,
        lanes: &mut JoinSet<Result<(), End>>,
        readers: &Readers,
        saver: Option<&Arc<Saver>>,
    ) -> Result<(), End> {
        let mut front = self.front.subscribe();
        let mut save = interval(SAVE);
        save.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut saving = JoinSet::new();
        let ended = loop {
            tokio::select! {
                // Cancel-safe: a lane that has ended is given by the next call.
                ended = lanes.join_next() => match ended {
                    None => break Ok(()),
                    Some(Ok(Ok(()))) => {}
                    Some(Ok(Err(end))) => break Err(end),
                    Some(Err(error)) => {
                        break Err(End::Final(Failure::new(format!("a bug ended a download: {error}"))));
                    }
                },
                // Cancel-safe: the newest value stays unseen until it is looked at.
                Ok(()) = front.changed() => readers.advance(*front.borrow_and_update()),
                // Cancel-safe: it only looks.
                () = readers.following.failed() => break Err(End::Readers),
                // Cancel-safe: a tick that is not taken comes again.
                _ = save.tick(), if saving.is_empty() => {
                    let finished = {
                        let mut table = self.table();
                        std::mem::take(&mut table.unsaved).then(|| table.parts.finished())
                    };
                    if let (Some(saver), Some(finished)) = (saver, finished) {
                        let (saver, file) = (Arc::clone(saver), Arc::clone(&self.file));
                        saving.spawn_blocking(move || saver.save(&file, &finished));
                    }
                }
                // Cancel-safe: what has ended is given by the next call.
                Some(saved) = saving.join_next() => {
                    if let Err(error) = saved.map_err(std::io::Error::other).flatten() {
                        break Err(End::Unflushed(error));
                    }
                }
            }
        };
        // Two at once would write over each other.
        while let Some(saved) = saving.join_next().await {
            saved.map_err(std::io::Error::other).flatten().map_err(End::Unflushed)?;
        }
        if ended.is_ok() {
            readers.advance(self.table().front());
        }
        ended
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change of it is made as a whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets parts until there are none left.
    async fn lane(&self, lane: usize) -> Result<(), End> {
        loop {
            let Some(part) = self.table().parts.take() else { return Ok(()) };
            let (mut at, mut tries) = (part.bytes.start, Tries::default());
            while at < part.bytes.end {
                let began = at;
                match self.attempt(&part, &mut at, lane, tries.may_lag()).await {
                    Ok(()) => break,
                    Err(Short::NoRanges) => return Err(End::NoRanges),
                    Err(Short::Trouble(trouble)) => {
                        self.after(&trouble, &part, at - began, &mut tries).await?;
                    }
                }
            }
            let mut table = self.table();
            table.written.remove(&part.index);
            table.parts.finish(part.index);
            table.unsaved = true;
            self.front.send_replace(table.front());
        }
    }

    /// Gets all in one piece. (There is one lane, and the table has one part.)
    async fn whole(&self) -> Result<(), End> {
        let Some(part) = self.table().parts.take() else { return Ok(()) };
        let mut at = 0;
        let opened = timeout(SILENCE, self.remote.open(&self.object, None)).await;
        let got = match opened.unwrap_or_else(|_| Err(silent())) {
            Ok(Opened::Range(chunks) | Opened::Whole(chunks)) => self.take(chunks, &part, &mut at, None).await,
            Err(trouble) => Err(trouble),
        };
        match got {
            Ok(()) => {
                self.table().parts.finish(part.index);
                self.front.send_replace(self.object.size);
                Ok(())
            }
            Err(trouble) => {
                let mut tries = std::mem::take(&mut self.table().tries);
                // It begins at nothing, so it has not got on.
                let judged = self.judged(&trouble, &part, at, 0, &mut tries).await;
                self.table().tries = tries;
                judged.and(Err(End::FromTheBeginning))
            }
        }
    }

    /// Asks for what a part still lacks. `at` moves on with what is written.
    async fn attempt(&self, part: &Part, at: &mut u64, lane: usize, may_lag: bool) -> Result<(), Short> {
        let opened = timeout(SILENCE, self.remote.open(&self.object, Some(*at..part.bytes.end))).await;
        match opened.unwrap_or_else(|_| Err(silent()))? {
            Opened::Range(chunks) => Ok(self.take(chunks, part, at, may_lag.then_some(lane)).await?),
            Opened::Whole(_) => Err(Short::NoRanges),
        }
    }

    /// Writes what arrives. `judge` is the lane, if its pace is to be judged.
    async fn take(&self, chunks: R::Chunks, part: &Part, at: &mut u64, judge: Option<usize>) -> Result<(), Trouble> {
        let mut gathered = Gathered::default();
        let taken = self.gather(chunks, part, at, judge, &mut gathered).await;
        // What has come is kept, whatever happened then.
        self.write(&mut gathered, part, at).await?;
        taken?;
        let missing = part.bytes.end - *at;
        if missing > 0 {
            return Err(Trouble::new(Cause::Broken, format!("the answer ended {missing} bytes too early")));
        }
        Ok(())
    }

    async fn gather(
        &self,
        mut chunks: R::Chunks,
        part: &Part,
        at: &mut u64,
        judge: Option<usize>,
        gathered: &mut Gathered,
    ) -> Result<(), Trouble> {
        let (began, first) = (Instant::now(), *at);
        let mut written = began;
        let mut floor = (began, first);
        loop {
            let chunk = match timeout(SILENCE, chunks.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => return Err(Trouble::new(Cause::Broken, error)),
                Ok(None) => return Ok(()),
                Err(_) => return Err(silent()),
            };
            gathered.push(chunk);
            if *at + gathered.bytes > part.bytes.end {
                *gathered = Gathered::default();
                return Err(Trouble::malformed("more bytes came than were asked for"));
            }
            if gathered.bytes >= GATHER as u64 || written.elapsed() >= GATHER_TIME {
                self.write(gathered, part, at).await?;
                written = Instant::now();
            }
            let now_at = *at + gathered.bytes;
            if floor.0.elapsed() >= FLOOR_TIME {
                let came = now_at - floor.1;
                if came < FLOOR && now_at < part.bytes.end {
                    return Err(trickling(came));
                }
                floor = (Instant::now(), now_at);
            }
            let pace = Speed { bytes: now_at - first, within: began.elapsed() };
            if let Some(lane) = judge
                && self.lags(lane, pace)
            {
                return Err(Trouble::new(Cause::Lagging, "it is far slower than the other parts"));
            }
        }
    }

    fn lags(&self, lane: usize, pace: Speed) -> bool {
        let mut table = self.table();
        table.paces[lane] = Some(pace);
        let others: Vec<Speed> =
            table.paces.iter().enumerate().filter(|(of, _)| *of != lane).filter_map(|(_, pace)| *pace).collect();
        lags(pace, &others)
    }

    async fn write(&self, gathered: &mut Gathered, part: &Part, at: &mut u64) -> Result<(), Trouble> {
        let Gathered { chunks, bytes } = std::mem::take(gathered);
        if bytes == 0 {
            return Ok(());
        }
        let (file, disk, mut place) = (Arc::clone(&self.file), self.disk.clone(), *at);
        let written = tokio::task::spawn_blocking(move || {
            chunks.iter().try_for_each(|chunk| {
                disk.write_at(&file, chunk, place)?;
                place += chunk.len() as u64;
                Ok(())
            })
        });
        let written: std::io::Result<()> = written.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        written.map_err(|error| {
            let failure = Failure::new(format!("writing it to disk failed: {error}"));
            let failure = failure.with_remedy("see whether the disk is full or failing (`df`, `dmesg`)");
            let cause = if is_full(&error) { Cause::Full } else { Cause::Local };
            Trouble { cause, failure }
        })?;
        *at += bytes;
        self.progress.add(bytes);
        let mut table = self.table();
        table.written.insert(part.index, *at - part.bytes.start);
        table.last = Instant::now();
        self.front.send_replace(table.front());
        Ok(())
    }

    async fn after(&self, trouble: &Trouble, part: &Part, got: u64, tries: &mut Tries) -> Result<(), End> {
        self.judged(trouble, part, got, got, tries).await
    }

    /// Waits, if it is to be tried again. `got` bytes came, of which `counts` are not lost.
    async fn judged(
        &self,
        trouble: &Trouble,
        part: &Part,
        got: u64,
        counts: u64,
        tries: &mut Tries,
    ) -> Result<(), End> {
        let idle = self.table().last.elapsed();
        let pause = match tries.judge(&trouble.cause, counts, idle, random()) {
            Verdict::Again(pause) => pause,
            Verdict::Renewed(pause) => {
                self.remote.renew();
                pause
            }
            Verdict::Anew => return Err(End::Changed(trouble.to_string())),
            Verdict::Final if trouble.cause == Cause::Full => return Err(End::Full),
            Verdict::Final => {
                let done = { self.table().parts.size().min(self.progress.get().0) };
                return Err(End::Final(given_up(&*self.remote, trouble, tries, Some((done, self.object.size)))));
            }
        };
        let (who, number, count) = (self.remote.who(), part.index + 1, self.table().parts.count());
        let (first, last, length) = (part.bytes.start, part.bytes.end - 1, part.bytes.end - part.bytes.start);
        let (next, most) = (tries.failed() + 1, tries.most());
        tracing::warn!(
            "{who}: part {number} of {count} (bytes {first}-{last}) broke off after {got} of {length} bytes: {trouble}; \
             try {next} of {most} in {pause:.1?}"
        );
        sleep(pause).await;
        Ok(())
    }
}

/// What has arrived and is not written.
#[derive(Debug, Default)]
struct Gathered {
    chunks: Vec<Bytes>,
    bytes: u64,
}

impl Gathered {
    fn push(&mut self, chunk: Bytes) {
        self.bytes += chunk.len() as u64;
        self.chunks.push(chunk);
    }
}

fn silent() -> Trouble {
    silent_by(format!("nothing came for {} s", SILENCE.as_secs()))
}

fn trickling(came: u64) -> Trouble {
    silent_by(format!("no more than {came} bytes came within {} s", FLOOR_TIME.as_secs()))
}

fn silent_by(message: String) -> Trouble {
    let failure = Failure::new(message);
    let failure = failure.with_remedy("see whether something between this host and the source drops connections");
    Trouble { cause: Cause::Silent, failure }
}

fn given_up(remote: &impl Remote, trouble: &Trouble, tries: &Tries, reached: Option<(u64, u64)>) -> Failure {
    let mut message = format!("could not get {}: {trouble}", remote.who());
    if tries.failed() > 1 {
        message.push_str(&format!(" (tried {} times)", tries.failed()));
    }
    if let Some((done, total)) = reached.filter(|(done, _)| *done > 0) {
        message.push_str(&format!("; {done} of {total} bytes had come"));
    }
    Failure { message: Failure::new(message).message, ..trouble.failure.clone() }
}

/// Any number: pauses are spread by it.
fn random() -> u16 {
    u16::try_from(RandomState::new().build_hasher().finish() & 0xffff).unwrap_or(0)
}
