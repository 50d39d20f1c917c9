//! The ledger on disk: one file, replaced as a whole, flushed before a save returns. One that can't be
//! used is put aside under another name and never removed. What is in it is core's.

use super::{LedgerStore, LoadedLedger, Outcome};
use crate::atomic_file::{self, FileError};
use enclaved_core::failure::Failure;
use enclaved_core::id::Timestamp;
use enclaved_core::ledger::{LEDGER_FORMAT, Ledger};
use serde::Deserialize;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// No ledger is longer: four enclaves with hundreds of egress endpoints and a dozen generations fit many times.
const MAX_FILE: u64 = 16 << 20;

/// The ledger in a file.
#[derive(Debug)]
pub struct LedgerFile {
    path: PathBuf,
    /// Gives each save its number.
    next: AtomicU64,
    /// The number of the last one on disk. A save that was overtaken must not put back what is older.
    written: Arc<Mutex<u64>>,
}

impl LedgerFile {
    /// The ledger in that file (`<state_dir>/ledger.json`), whose folder must exist by the time it is used.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), next: AtomicU64::new(1), written: Arc::default() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl LedgerStore for LedgerFile {
    async fn load(&self) -> Outcome<LoadedLedger> {
        let path = self.path.clone();
        let loaded = tokio::task::spawn_blocking(move || load(&path)).await;
        loaded.map_err(|error| Failure::new(format!("reading the ledger was cut off: {error}")))?
    }

    async fn save(&self, ledger: &Ledger) -> Outcome<()> {
        let (path, written) = (self.path.clone(), self.written.clone());
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let ledger = ledger.clone();
        // Once begun it goes on, even if nobody waits for it any more; so saves can overlap.
        let saved = tokio::task::spawn_blocking(move || {
            let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
            if *written < number {
                atomic_file::write_json(&path, &ledger).map_err(|error| not_saved(&error))?;
                *written = number;
            }
            Ok(())
        })
        .await;
        saved.map_err(|error| Failure::new(format!("saving the ledger was cut off: {error}")))?
    }
}

fn not_saved(error: &FileError) -> Failure {
    let failure = Failure::from_error(error);
    Failure { message: format!("the ledger could not be saved: {}", failure.message), ..failure }.with_remedy(
        "check the folder's space (`df`), owner and permissions; nothing is launched or stopped until it can be",
    )
}

fn load(path: &Path) -> Outcome<LoadedLedger> {
    let unusable = match atomic_file::read(path, MAX_FILE) {
        Ok(None) => return Ok(LoadedLedger::default()),
        Ok(Some(bytes)) => match parse(&bytes) {
            Ok(ledger) => return Ok(LoadedLedger { ledger: marked(ledger), problem: None }),
            Err(why) => why,
        },
        Err(error) if error.is_about_contents() => error.to_string(),
        Err(error) => {
            let failure = Failure::from_error(&error);
            return Err(failure.with_remedy("check the owner and the permissions of the state folder"));
        }
    };
    let aside = put_aside(path).map_err(|error| Failure::from_error(&error))?;
    let message = format!(
        "the ledger {} can't be used ({unusable}); it was put aside as {}, and what runs is taken over by its traces, where they can be read",
        path.display(),
        aside.display()
    );
    let remedy = "enclaves that were held stopped are no longer held; `enclavectl stop` holds them again";
    Ok(LoadedLedger { ledger: Ledger::default(), problem: Some(Failure::new(message).with_remedy(remedy)) })
}

/// With the mark that something was launched, which an earlier version did not write.
fn marked(mut ledger: Ledger) -> Ledger {
    let launched = ledger.generations().any(|(_, generation)| generation.holds_resources());
    ledger.launched |= launched;
    ledger
}

fn parse(bytes: &[u8]) -> Result<Ledger, String> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    // A later version may have changed anything but this field.
    match serde_json::from_slice::<Format>(bytes) {
        Ok(Format { format }) if format > LEDGER_FORMAT => Err(format!(
            "a later version of enclaved wrote it, in format {format}; this one reads up to {LEDGER_FORMAT}"
        )),
        _ => serde_json::from_slice(bytes).map_err(|error| error.to_string()),
    }
}

/// Renames it to `<name>.bad-<time>`.
fn put_aside(path: &Path) -> Result<PathBuf, FileError> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let name = format!("{name}.bad-{}", Timestamp::from(SystemTime::now()));
    let free = (0_u32..).map(|number| match number {
        0 => path.with_file_name(&name),
        number => path.with_file_name(format!("{name}.{number}")),
    });
    for aside in free {
        // A hard link, unlike a rename, never replaces what is there.
        match fs::hard_link(path, &aside) {
            Ok(()) => {
                fs::remove_file(path).map_err(FileError::io("remove", path))?;
                atomic_file::sync_folder(path.parent().unwrap_or(Path::new("/")))?;
                return Ok(aside);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(FileError::io("put aside", path)(error)),
        }
    }
    Err(FileError::io("put aside", path)(io::ErrorKind::AlreadyExists.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::ledger::Change;

    fn ledger(name: &str) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.apply(
            Change::Held { name: name.parse().unwrap(), by: enclaved_core::ledger::HeldBy::Enclavectl },
            Timestamp::from_millis(1000),
        );
        ledger
    }

    fn files(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_ledger_is_loaded_as_it_was_saved_and_only_this_user_can_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = LedgerFile::new(folder.path().join("ledger.json"));
        assert_eq!(file.load().await.unwrap(), LoadedLedger::default());
        file.save(&ledger("a")).await.unwrap();
        file.save(&ledger("signer")).await.unwrap();
        assert_eq!(file.load().await.unwrap(), LoadedLedger { ledger: ledger("signer"), problem: None });
        assert_eq!(files(folder.path()), ["ledger.json"]);
        assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn what_the_first_version_wrote_can_still_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.json");
        fs::write(&path, include_str!("ledger_file/written-by-0.1.json")).unwrap();
        let loaded = LedgerFile::new(&path).load().await.unwrap();
        assert_eq!(loaded.problem, None);
        let ledger = loaded.ledger;
        let (signer, vault) =
            (&ledger.enclaves[&"signer".parse().unwrap()], &ledger.enclaves[&"vault".parse().unwrap()]);
        assert_eq!((signer.generations.len(), signer.restarts, signer.held_since), (2, 2, None));
        let launched = ledger.generation(&"signer-3".parse().unwrap()).unwrap().launch().unwrap();
        assert_eq!((launched.process.pid, ledger.next_cid.get()), (168, 19));
        assert!(vault.held_since.is_some() && ledger.images.len() == 1);
    }

    #[tokio::test]
    async fn what_a_later_version_added_in_the_same_format_is_ignored_and_nothing_else_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let (path, later) = (dir.path().join("ledger.json"), include_str!("ledger_file/written-by-a-later-one.json"));
        assert!(later.matches("added_later").count() > 10);
        fs::write(&path, later).unwrap();
        let loaded = LedgerFile::new(&path).load().await.unwrap();
        assert_eq!(loaded.problem, None);
        assert_eq!(loaded.ledger, parse(include_bytes!("ledger_file/written-by-0.1.json")).map(marked).unwrap());
        // But nothing is taken for less strict than it was meant to be.
        let allowed = later.replace("\"allow_addresses\": []", "\"allow_addresses\": [], \"only_on_sundays\": true");
        assert_ne!(allowed, later);
        fs::write(&path, allowed).unwrap();
        let loaded = LedgerFile::new(&path).load().await.unwrap();
        assert!(loaded.problem.unwrap().message.contains("unknown field `only_on_sundays`"));
    }

    #[tokio::test]
    async fn a_torn_or_foreign_ledger_is_put_aside_untouched_and_the_reason_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = LedgerFile::new(folder.path().join("ledger.json"));
        for (count, (text, reason)) in [
            ("{\"format\":1,\"boot", "EOF while parsing"),
            ("", "EOF while parsing"),
            ("\u{0}\u{0}\u{0}", "expected value"),
            ("{\"format\":1,\"other\":true}", "missing field `next_cid`"),
            ("{\"format\":2,\"whatever\":[]}", "a later version of enclaved wrote it, in format 2"),
        ]
        .into_iter()
        .enumerate()
        {
            fs::write(file.path(), text).unwrap();
            let loaded = file.load().await.unwrap();
            assert_eq!(loaded.ledger, Ledger::default());
            let problem = loaded.problem.unwrap();
            assert!(problem.message.contains(reason), "{problem}");
            let left = files(folder.path());
            assert_eq!(left.len(), count + 1, "{left:?}");
            // Within one millisecond, one name is another and a number.
            let told = left.iter().filter(|name| problem.message.contains(*name));
            let last = told.max_by_key(|name| name.len()).unwrap();
            assert!(last.starts_with("ledger.json.bad-2"), "{last}");
            assert_eq!(fs::read_to_string(folder.path().join(last)).unwrap(), text);
        }
        assert_eq!(file.load().await.unwrap(), LoadedLedger::default());
    }

    #[tokio::test]
    async fn a_ledger_that_cannot_be_read_just_now_is_not_taken_for_lost() {
        let folder = tempfile::tempdir().unwrap();
        let file = LedgerFile::new(folder.path().join("ledger.json"));
        fs::create_dir(file.path()).unwrap();
        let failure = file.load().await.unwrap_err();
        assert!(failure.message.contains("ledger.json"), "{failure}");
        assert_eq!(files(folder.path()), ["ledger.json"]);
    }

    #[tokio::test]
    async fn a_ledger_that_cannot_be_saved_says_so_and_the_old_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = LedgerFile::new(folder.path().join("ledger.json"));
        file.save(&ledger("a")).await.unwrap();
        fs::create_dir(folder.path().join(".ledger.json.tmp")).unwrap();
        let failure = file.save(&ledger("b")).await.unwrap_err();
        assert!(failure.message.contains("could not be saved"), "{failure}");
        assert!(failure.remedy.is_some());
        assert_eq!(file.load().await.unwrap().ledger, ledger("a"));
    }

    #[tokio::test]
    async fn a_save_that_was_given_up_never_overtakes_a_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = LedgerFile::new(folder.path().join("ledger.json"));
        for _ in 0..50 {
            {
                let (old, new) = (ledger("old"), ledger("new"));
                let mut given_up = std::pin::pin!(file.save(&old));
                // Begun, and dropped before its end.
                let begun = std::future::poll_fn(|context| {
                    let _pending = Future::poll(given_up.as_mut(), context);
                    std::task::Poll::Ready(())
                });
                begun.await;
                file.save(&new).await.unwrap();
            }
            assert_eq!(file.load().await.unwrap().ledger, ledger("new"));
        }
    }
}
