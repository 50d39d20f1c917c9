//! Puts the last snapshot on disk, on a thread that waits for the disk for as long as it takes: nobody else does. One write at a
//! time; of snapshots that come meanwhile the last is written next. What did not succeed is tried again when asked for.

use crate::counters::Counters;
use crate::store::Store;
use enclaved_core::routes::Routes;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A write that takes longer is told of.
const SLOW: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Saver {
    store: Store,
    counters: Arc<Counters>,
    state: Mutex<State>,
    /// The number of the last snapshot that was written, or could not be.
    tried: watch::Sender<u64>,
    slow: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// The last snapshot. Numbers begin at 1.
    last: Option<Arc<Routes>>,
    number: u64,
    saved: u64,
    /// Since when the disk has been at work.
    writing: Option<Instant>,
    /// It was told that this takes long.
    told: bool,
    trouble: Option<String>,
}

impl Saver {
    pub(crate) fn new(store: Store, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self { store, counters, state: Mutex::default(), tried: watch::Sender::new(0), slow: SLOW })
    }

    /// What is on disk, if it is of use; what is wrong with it is [`Self::trouble`] until something was written.
    pub(crate) fn load(&self) -> Option<Routes> {
        let (routes, trouble) = self.store.load();
        self.state().trouble = trouble;
        routes
    }

    /// Has this snapshot written, soon; the number is for [`Self::settled`].
    pub(crate) fn save(self: &Arc<Self>, routes: Routes) -> u64 {
        let number = {
            let mut state = self.state();
            state.last = Some(Arc::new(routes));
            state.number += 1;
            state.number
        };
        self.again();
        number
    }

    /// Writes what is not on disk yet, and tells of a write that does not end.
    pub(crate) fn again(self: &Arc<Self>) {
        let mut state = self.state();
        match state.writing {
            None if state.saved < state.number => {
                state.writing = Some(Instant::now());
                let saver = self.clone();
                // It owns itself: it ends with its write, and a process that ends does not wait for it.
                drop(tokio::task::spawn_blocking(move || saver.write()));
            }
            Some(since) if since.elapsed() > self.slow && !state.told => {
                state.told = true;
                drop(state);
                tracing::error!("{}", self.late());
                self.counters.changed();
            }
            None | Some(_) => {}
        }
    }

    /// Waits until that snapshot, or a later one, was written or could not be. Cancel-safe.
    pub(crate) async fn settled(&self, number: u64) {
        // The sender lives in this.
        drop(self.tried.subscribe().wait_for(|tried| *tried >= number).await);
    }

    /// What is wrong with what is on disk, or with writing it.
    pub(crate) fn trouble(&self) -> Option<String> {
        let state = self.state();
        match state.writing {
            Some(since) if since.elapsed() > self.slow => Some(self.late()),
            _ => state.trouble.clone(),
        }
    }

    fn late(&self) -> String {
        let (path, slow) = (self.store.path().display(), self.slow);
        format!("the routes are served, but not saved for a restart: the disk has not taken {path} for {slow:?}")
    }

    fn write(&self) {
        loop {
            let (number, routes) = {
                let state = self.state();
                (state.number, state.last.clone())
            };
            let written = routes.map_or(Ok(()), |routes| self.store.save(&routes));
            let trouble = written
                .err()
                .map(|error| format!("the routes are served, but could not be saved for a restart: {error}"));
            let (news, ends) = {
                let mut state = self.state();
                if trouble.is_none() {
                    state.saved = number;
                }
                let told = std::mem::take(&mut state.told);
                let news = told || state.trouble != trouble;
                state.trouble.clone_from(&trouble);
                let ends = state.number == number;
                state.writing = (!ends).then(Instant::now);
                (news, ends)
            };
            if news {
                if let Some(trouble) = &trouble {
                    tracing::error!("{trouble}; trying again every few seconds");
                }
                self.counters.changed();
            }
            self.tried.send_replace(number);
            if ends {
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::id::Cid;
    use enclaved_core::routes::ROUTES_FORMAT;
    use tokio::time::timeout;

    fn routes(cid: u32) -> Routes {
        Routes { format: ROUTES_FORMAT, live: vec![Cid::new(cid).unwrap()], ..Routes::default() }
    }

    #[tokio::test]
    async fn of_what_comes_while_the_disk_hangs_the_last_is_written_when_it_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("routes.json"));
        let disk = store.disk();
        let saver = Saver {
            store,
            counters: Arc::new(Counters::new()),
            state: Mutex::default(),
            tried: watch::Sender::new(0),
            slow: Duration::from_millis(50),
        };
        let (saver, mut changes) = (Arc::new(saver), None);
        let last = {
            let _hangs = disk.lock().await;
            let first = saver.save(routes(16));
            timeout(Duration::from_millis(100), saver.settled(first)).await.unwrap_err();
            let changes = changes.insert(saver.counters.sequence());
            changes.mark_unchanged();
            for _ in 0..2 {
                saver.again();
            }
            assert!(changes.has_changed().unwrap() && saver.trouble().unwrap().contains("routes.json"));
            saver.save(routes(17));
            saver.save(routes(18))
        };
        timeout(Duration::from_secs(20), saver.settled(last)).await.unwrap();
        assert_eq!((saver.trouble(), saver.load()), (None, Some(routes(18))));
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_told_and_written_when_it_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("not-there-yet");
        let saver = Saver::new(Store::new(folder.join("routes.json")), Arc::new(Counters::new()));
        let number = saver.save(routes(16));
        timeout(Duration::from_secs(20), saver.settled(number)).await.unwrap();
        assert!(saver.trouble().unwrap().contains("could not be saved"), "{:?}", saver.trouble());
        std::fs::create_dir(&folder).unwrap();
        saver.again();
        let began = Instant::now();
        while saver.trouble().is_some() {
            assert!(began.elapsed() < Duration::from_secs(20));
            tokio::task::yield_now().await;
        }
        assert_eq!(saver.load(), Some(routes(16)));
    }
}
