//! What systemd is told: READY once the loop has looked at the host (configuration loaded, adoption decided, listeners
//! open; never waiting for an enclave), STATUS= that answers "what is it doing", and WATCHDOG as long as the loop turns.
//! Without systemd, nothing happens.

use crate::reconciler::Report;
use enclaved_core::status::{EnclaveState, Status};
use sd_notify::NotifyState;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Tells until `stop`.
pub async fn tell(mut reports: watch::Receiver<Option<Arc<Report>>>, stop: CancellationToken) {
    let mut told: Option<String> = None;
    loop {
        let line = reports.borrow_and_update().as_ref().map(|report| line(&report.status));
        if let Some(line) = line {
            if told.is_none() {
                READY.store(true, Ordering::Relaxed);
                notify(&[NotifyState::Ready]);
            }
            if told.as_deref() != Some(line.as_str()) {
                notify(&[NotifyState::Status(&line)]);
                told = Some(line);
            }
        }
        tokio::select! {
            // A change that is not seen now is seen by the next call.
            changed = reports.changed() => if changed.is_err() { return },
            // A plain wait.
            () = stop.cancelled() => return,
        }
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
fn line(status: &Status) -> String {
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
    use enclaved_core::status::HostStatus;
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
        told.send_replace(Some(Arc::new(Report { status: Status::default(), proxy: None, made: Instant::now() })));
        assert!(fed_within(limit).await >= 3);
        fed_within(Duration::from_secs(60)).await;
        assert_eq!(fed_within(limit).await, 0, "no pass for more than a minute");
        stop.cancel();
        feeding.await.unwrap();
    }

    fn status(failed_checks: Vec<Check>) -> Status {
        Status { host: HostStatus { failed_checks, ..HostStatus::default() }, ..Status::default() }
    }

    #[test]
    fn the_line_names_the_first_check_that_fails() {
        assert_eq!(line(&status(Vec::new())), "0 of 0 enclaves ready");
        let failed = line(&status(vec![Check::RoleCredentials]));
        assert_eq!(failed, "0 of 0 enclaves ready; check role_credentials failed, see enclavectl doctor");
        let failed = line(&status(vec![Check::Driver, Check::Device, Check::Disk]));
        assert_eq!(failed, "0 of 0 enclaves ready; check driver and 2 more failed, see enclavectl doctor");
    }
}
