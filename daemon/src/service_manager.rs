//! What systemd is told: READY once the loop has seen what runs (configuration loaded, adoption decided, listeners open; never
//! waiting for an enclave), STATUS= that answers "what is it doing", WATCHDOG as long as the loop turns, and that an end goes on.
//! Without systemd, nothing happens.
//!
//! While it can't be seen what runs (the ledger can't be read, the folder of the launches not be listed), nothing is adopted, and READY
//! would be a lie. But it is not withheld for ever: a start that hangs holds up cloud-init and whatever comes after, one that
//! fails ends a process that tells what is wrong, and neither helps the enclaves, which go on. So after a while READY is said all
//! the same, and the status line begins with what can't be seen.

use crate::reconciler::Report;
use enclaved_core::status::{EnclaveState, Status};
use sd_notify::NotifyState;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// So long READY waits until it is seen what runs. Less than `TimeoutStartSec=` of the unit.
const ADOPTION_PATIENCE: Duration = Duration::from_secs(45);
/// How often systemd is told that the end goes on, and for how long each time.
const EXTEND_EVERY: Duration = Duration::from_secs(10);
const EXTEND_USEC: u32 = 40_000_000;

/// Tells until `stop`.
pub async fn tell(reports: watch::Receiver<Option<Arc<Report>>>, stop: CancellationToken) {
    let ready = || READY.store(true, Ordering::Relaxed);
    tell_by(reports, ready, notify, stop).await;
}

async fn tell_by(
    mut reports: watch::Receiver<Option<Arc<Report>>>,
    ready: impl Fn(),
    notify: impl Fn(&[NotifyState<'_>]),
    stop: CancellationToken,
) {
    let mut told: Option<String> = None;
    let (mut is_ready, mut is_late) = (false, false);
    let patience = tokio::time::sleep(ADOPTION_PATIENCE);
    tokio::pin!(patience);
    loop {
        let report = reports.borrow_and_update().clone();
        if let Some(report) = report {
            if !is_ready && (report.unseen.is_none() || is_late) {
                is_ready = true;
                ready();
                notify(&[NotifyState::Ready]);
            }
            let line = line(&report);
            if told.as_deref() != Some(line.as_str()) {
                notify(&[NotifyState::Status(&line)]);
                told = Some(line);
            }
        }
        tokio::select! {
            // A change that is not seen now is seen by the next call.
            changed = reports.changed() => if changed.is_err() { return },
            // Goes on where it was.
            () = &mut patience, if !is_late => is_late = true,
            // A plain wait.
            () = stop.cancelled() => return,
        }
    }
}

/// Says again and again, until it is cut off, that the end of this process goes on: enclaves are drained before. Only while the loop
/// turns; it has a deadline of its own for that.
pub async fn extend_end(reports: watch::Receiver<Option<Arc<Report>>>) {
    loop {
        if reports.borrow().as_ref().is_some_and(|report| report.turning().is_ok()) {
            notify(&[NotifyState::ExtendTimeoutUsec(EXTEND_USEC)]);
        }
        tokio::time::sleep(EXTEND_EVERY).await;
    }
}

/// Feeds the watchdog of the service manager until `stop`, if it has one: only while the loop turns. One that hangs is so ended and
/// started again, which costs no enclave and no connection.
pub async fn feed_watchdog(reports: watch::Receiver<Option<Arc<Report>>>, stop: CancellationToken) {
    if let Some(limit) = sd_notify::watchdog_enabled() {
        feed(limit, &reports, || notify(&[NotifyState::Watchdog]), &stop).await;
    }
}

/// Three times within `limit`, so that one that comes late is none that is missing.
async fn feed(
    limit: Duration,
    reports: &watch::Receiver<Option<Arc<Report>>>,
    food: impl Fn(),
    stop: &CancellationToken,
) {
    loop {
        // Before the first report there is nothing to be watched: the start has a limit of its own.
        if reports.borrow().as_ref().is_none_or(|report| report.turning().is_ok()) {
            food();
        }
        tokio::select! {
            // A plain wait.
            () = tokio::time::sleep(limit / 3) => {}
            // A plain wait.
            () = stop.cancelled() => return,
        }
    }
}

/// READY was said; before that, a reload must not say it.
static READY: AtomicBool = AtomicBool::new(false);

/// A configuration is being read.
pub fn reloading() {
    if READY.load(Ordering::Relaxed) {
        notify(&[NotifyState::Reloading]);
    }
}

/// The reading is over.
pub fn reloaded() {
    if READY.load(Ordering::Relaxed) {
        notify(&[NotifyState::Ready]);
    }
}

/// The process ends.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("the service manager was not told: {error}");
    }
}

/// One line: how many serve, and what the others do.
fn line(report: &Report) -> String {
    let line = status_line(&report.status);
    match &report.unseen {
        Some(failure) => format!("what runs can't be seen: {}; {line}", failure.message),
        None => line,
    }
}

fn status_line(status: &Status) -> String {
    let wanted: Vec<_> = status.enclaves.iter().filter(|enclave| enclave.wanted).collect();
    let serving = wanted.iter().filter(|enclave| enclave.ready).count();
    let mut line = format!("{serving} of {} enclaves ready", wanted.len());
    for enclave in status.enclaves.iter().filter(|enclave| enclave.state != EnclaveState::Ready) {
        line.push_str(&format!("; {} {}", enclave.name, enclave.state.as_str()));
    }
    if let Some(first) = status.host.failed_checks.first() {
        let more = status.host.failed_checks.len() - 1;
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        line.push_str(&format!("; check {first}{more} failed, see enclavectl doctor"));
    }
    if !status.problems.is_empty() {
        line.push_str(&format!("; {} problems, see enclavectl status", status.problems.len()));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::diagnosis::Check;
    use enclaved_core::failure::Failure;
    use enclaved_core::status::HostStatus;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_while_the_loop_turns_and_starves_when_it_hangs() {
        let limit = Duration::from_secs(30);
        let (told, reports) = watch::channel(None);
        let (fed, stop) = (Arc::new(AtomicU32::new(0)), CancellationToken::new());
        let feeding = tokio::spawn({
            let (fed, stop) = (fed.clone(), stop.clone());
            async move { feed(limit, &reports, || _ = fed.fetch_add(1, Ordering::Relaxed), &stop).await }
        });
        let fed_within = async |time| {
            let before = fed.load(Ordering::Relaxed);
            tokio::time::sleep(time).await;
            fed.load(Ordering::Relaxed) - before
        };
        assert!(fed_within(limit).await >= 3, "before the first pass");
        told.send_replace(report(None));
        assert!(fed_within(limit).await >= 3);
        fed_within(Duration::from_secs(60)).await;
        assert_eq!(fed_within(limit).await, 0, "no pass for more than a minute");
        stop.cancel();
        feeding.await.unwrap();
    }

    fn report(unseen: Option<&str>) -> Option<Arc<Report>> {
        let unseen = unseen.map(Failure::new);
        Some(Arc::new(Report { status: Status::default(), proxy: None, unseen, made: Instant::now() }))
    }

    /// What is said when these reports are made, each a second after the one before, and then for two minutes.
    async fn said(reports: Vec<Option<Arc<Report>>>) -> Vec<(u64, String)> {
        let (told, receiver) = watch::channel(None);
        let (began, said, stop) = (Instant::now(), Arc::new(Mutex::new(Vec::new())), CancellationToken::new());
        let telling = tokio::spawn({
            let (said, stop) = (said.clone(), stop.clone());
            let notify = move |states: &[NotifyState<'_>]| {
                let words = states.iter().map(|state| (began.elapsed().as_secs(), state.to_string()));
                said.lock().unwrap().extend(words);
            };
            async move { tell_by(receiver, || (), notify, stop).await }
        });
        for report in reports {
            tokio::time::sleep(Duration::from_secs(1)).await;
            told.send_replace(report);
        }
        tokio::time::sleep(Duration::from_secs(120)).await;
        stop.cancel();
        telling.await.unwrap();
        let said = said.lock().unwrap();
        said.clone()
    }

    #[tokio::test(start_paused = true)]
    async fn ready_is_said_when_it_was_seen_what_runs_and_not_before() {
        let nothing = "0 of 0 enclaves ready";
        let said = said(vec![report(Some("no ledger")), report(Some("no ledger")), report(None), report(None)]).await;
        let expected = [
            (1, format!("STATUS=what runs can't be seen: no ledger; {nothing}")),
            (3, "READY=1".to_owned()),
            (3, format!("STATUS={nothing}")),
        ];
        assert_eq!(said, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_does_not_hang_for_what_cannot_be_seen_but_for_want_of_any_report_it_does() {
        let said_blind = said(vec![report(Some("no ledger"))]).await;
        assert_eq!(said_blind.last().unwrap(), &(ADOPTION_PATIENCE.as_secs(), "READY=1".to_owned()));
        assert_eq!(said(vec![None]).await, []);
    }

    fn status(failed_checks: Vec<Check>) -> Status {
        Status { host: HostStatus { failed_checks, ..HostStatus::default() }, ..Status::default() }
    }

    #[test]
    fn the_line_names_the_first_check_that_fails() {
        assert_eq!(status_line(&status(Vec::new())), "0 of 0 enclaves ready");
        let failed = status_line(&status(vec![Check::RoleCredentials]));
        assert_eq!(failed, "0 of 0 enclaves ready; check role_credentials failed, see enclavectl doctor");
        let failed = status_line(&status(vec![Check::Driver, Check::Device, Check::Disk]));
        assert_eq!(failed, "0 of 0 enclaves ready; check driver and 2 more failed, see enclavectl doctor");
    }
}
