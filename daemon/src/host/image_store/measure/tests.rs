//! Measuring files that are there, and files that are still being written.

use super::*;
use crate::test_support::eif::{damage, sample};
use enclaved_core::image::Measurer;
use std::io::Write;
use std::sync::Weak;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use tokio::time::timeout;

/// More than threads need on the slowest machine.
const DEADLINE: Duration = Duration::from_secs(60);

fn on_one_thread(bytes: &[u8]) -> Result<EifReport, EifError> {
    let mut measurer = Measurer::new(Limits::default());
    measurer.update(bytes)?;
    measurer.finish()
}

fn file_with(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

async fn whole(bytes: &[u8]) -> Result<EifReport, IntakeError> {
    let file = file_with(bytes);
    timeout(DEADLINE, measure_whole(file.reopen().unwrap(), &Arc::default())).await.unwrap()
}

fn eif_error(result: Result<EifReport, IntakeError>) -> EifError {
    match result {
        Err(IntakeError::Eif(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_that_is_there_measures_as_on_one_thread_and_its_progress_ends_at_its_size() {
    for size in [4096, 256 << 10, 3_000_001] {
        let bytes = sample("signer", 1, size).to_bytes();
        let progress = Arc::new(Progress::default());
        let file = file_with(&bytes);
        let report = timeout(DEADLINE, measure_whole(file.reopen().unwrap(), &progress)).await.unwrap().unwrap();
        assert_eq!(report, on_one_thread(&bytes).unwrap());
        let size = u64::try_from(bytes.len()).unwrap();
        assert_eq!(progress.get(), (size, size));
    }
}

#[tokio::test]
async fn every_damage_is_found_with_the_error_that_one_thread_finds() {
    let good = sample("signer", 1, 700_000).to_bytes();
    let mut late = good.clone();
    late.truncate(good.len() - 300_000);
    for bytes in [
        damage::bad_crc(good.clone()),
        damage::flipped(good.clone()),
        damage::truncated(good.clone(), 1),
        damage::trailing(good.clone()),
        damage::two_faced(good),
        late,
        b"<html>".to_vec(),
        Vec::new(),
    ] {
        assert_eq!(eif_error(whole(&bytes).await), on_one_thread(&bytes).unwrap_err());
    }
}

#[tokio::test]
async fn a_file_is_measured_behind_the_front_and_never_beyond_it() {
    let bytes = sample("signer", 2, 2_000_000).to_bytes();
    // As a download leaves it: the whole size from the start, with something else in what has not arrived.
    let file = file_with(&vec![0xee; bytes.len()]);
    let following = Following::begin(file.reopen().unwrap());
    let writer = file.reopen().unwrap();
    let mut front = 0;
    for step in [1, 547, 4096, 300_000, 1, 700_000, usize::MAX] {
        let end = bytes.len().min(front + step.min(bytes.len()));
        writer.write_all_at(&bytes[front..end], u64::try_from(front).unwrap()).unwrap();
        front = end;
        following.advance(u64::try_from(front).unwrap());
        // A front that seems to go back is none.
        following.advance(3);
    }
    let size = u64::try_from(bytes.len()).unwrap();
    let report = timeout(DEADLINE, following.finish(size)).await.unwrap().unwrap();
    assert_eq!(report, on_one_thread(&bytes).unwrap());
}

#[tokio::test]
async fn what_cannot_be_an_image_is_told_while_the_rest_is_still_to_come() {
    let good = sample("signer", 3, 2_000_000).to_bytes();
    let bytes = damage::two_faced(good);
    let file = file_with(&bytes[..600_000]);
    let following = Following::begin(file.reopen().unwrap());
    following.advance(600_000);
    timeout(DEADLINE, following.failed()).await.unwrap();
    let error = eif_error(timeout(DEADLINE, following.finish(600_000)).await.unwrap());
    assert_eq!(error, on_one_thread(&bytes[..600_000]).unwrap_err());
}

#[tokio::test]
async fn a_good_beginning_is_no_failure_and_a_file_that_is_finished_too_early_is_truncated() {
    let bytes = sample("signer", 4, 2_000_000).to_bytes();
    let file = file_with(&bytes);
    let following = Following::begin(file.reopen().unwrap());
    following.advance(1_000_000);
    let error = eif_error(timeout(DEADLINE, following.finish(1_000_000)).await.unwrap());
    assert!(matches!(error, EifError::Truncated { size: 1_000_000, .. }), "{error}");
}

#[tokio::test]
async fn a_file_that_has_less_than_was_said_to_be_written_cannot_be_read() {
    let bytes = sample("signer", 5, 1_000_000).to_bytes();
    let file = file_with(&bytes[..400_000]);
    let following = Following::begin(file.reopen().unwrap());
    following.advance(1_000_000);
    timeout(DEADLINE, following.failed()).await.unwrap();
    let error = timeout(DEADLINE, following.finish(1_000_000)).await.unwrap().unwrap_err();
    assert!(matches!(&error, IntakeError::Read(error) if error.kind() == io::ErrorKind::UnexpectedEof), "{error}");
}

#[tokio::test]
async fn a_file_that_cannot_be_read_at_all_fails_instead_of_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let following = Following::begin(File::open(folder.path()).unwrap());
    following.advance(1 << 20);
    timeout(DEADLINE, following.failed()).await.unwrap();
    let error = timeout(DEADLINE, following.finish(1 << 20)).await.unwrap().unwrap_err();
    assert!(matches!(error, IntakeError::Read(_)), "{error}");
}

/// Waits until no thread holds it any more.
fn wait_until_gone(shared: &Weak<Shared>) {
    let started = Instant::now();
    while shared.strong_count() > 0 {
        assert!(started.elapsed() < DEADLINE, "a thread goes on");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn dropping_it_ends_its_threads_whether_they_wait_or_work() {
    let bytes = sample("signer", 6, 5_000_000).to_bytes();
    let file = file_with(&bytes);
    for front in [0, 5_000_000] {
        let following = Following::begin(file.reopen().unwrap());
        let shared = Arc::downgrade(&following.owner.0);
        following.advance(front);
        drop(following);
        wait_until_gone(&shared);
    }
    // Also when nobody waits for its end any more.
    let following = Following::begin(file.reopen().unwrap());
    let shared = Arc::downgrade(&following.owner.0);
    drop(following.finish(5_000_000));
    wait_until_gone(&shared);
}

#[test]
fn no_lane_runs_further_ahead_of_the_slowest_than_the_page_cache_is_trusted_to_hold() {
    let mut state = State { front: 1 << 40, whole: true, ..State::default() };
    assert_eq!(state.limit(), LEAD);
    state.positions = [LEAD, 5, 7];
    assert_eq!(state.limit(), LEAD + 5);
    // One that has ended holds nobody up.
    state.positions = [LEAD, u64::MAX, u64::MAX];
    assert_eq!(state.limit(), 2 * LEAD);
    state.whole = false;
    state.front = LEAD + 100;
    assert_eq!(state.limit(), LEAD, "only whole pieces while there is more to come");
}

#[tokio::test]
async fn what_is_measured_behind_a_download_is_progress_once_there_is_no_other() {
    let bytes = sample("signer", 7, 2_000_000).to_bytes();
    let file = file_with(&bytes);
    let following = Following::begin(file.reopen().unwrap());
    following.advance(3 * PIECE + 5);
    let started = Instant::now();
    while following.owner.0.state().slowest() < 3 * PIECE {
        assert!(started.elapsed() < DEADLINE, "the lanes do not get on");
        std::thread::yield_now();
    }
    let progress = Arc::new(Progress::default());
    following.report_to(&progress);
    assert_eq!(progress.get().0, 3 * PIECE);
    let size = u64::try_from(bytes.len()).unwrap();
    timeout(DEADLINE, following.finish(size)).await.unwrap().unwrap();
    assert_eq!(progress.get().0, size);
}
