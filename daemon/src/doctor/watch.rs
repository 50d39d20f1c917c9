//! The daemon's own checks: made once at its start, beside everything else, and again with a changed configuration; those that fail are
//! repeated, ever more seldom, until they pass. What fails stands in the status; the log has a line for each change.

use super::{Doctor, Patient, Places};
use crate::config::Config;
use crate::events::{Event, Events};
use enclaved_core::diagnosis::{Diagnosis, Finding, Outcome};
use enclaved_core::failure::Failure;
use enclaved_core::plan::restart::Backoff;
use enclaved_core::status::{Facts, Problem};
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the problems of failing checks are about.
const ABOUT: &str = "doctor";
/// Pauses between looks at what fails: a young instance gets its network and its role within seconds.
const RETRY: Backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(600));
/// So many failures are shown one by one; there may be hundreds of endpoints.
const SHOWN: usize = 8;

/// Checks the host until `stop`.
pub async fn watch(
    configs: watch::Receiver<Config>,
    facts: watch::Sender<Facts>,
    events: Events,
    stop: CancellationToken,
) {
    tokio::select! {
        // What is cut off here has changed nothing: looks only look.
        () = keep_checking(configs, Places::default(), &facts, &events) => {}
        // A plain wait.
        () = stop.cancelled() => {}
    }
}

async fn keep_checking(
    mut configs: watch::Receiver<Config>,
    places: Places,
    facts: &watch::Sender<Facts>,
    events: &Events,
) {
    let mut said = BTreeSet::new();
    loop {
        let config = configs.borrow_and_update().clone();
        let doctor = Doctor::new(config, Patient::Itself, places.clone());
        tokio::select! {
            // Never ends.
            () = until_well(&doctor, facts, events, &mut said) => {}
            // A change that is not seen now is seen by the next call.
            changed = configs.changed() => if changed.is_err() {
                return std::future::pending().await;
            },
        }
    }
}

/// Makes all checks, then those that fail until none does; then waits for ever.
async fn until_well(doctor: &Doctor, facts: &watch::Sender<Facts>, events: &Events, said: &mut BTreeSet<String>) {
    let (mut diagnosis, _) = doctor.examine(None).await;
    let mut tries: u32 = 0;
    loop {
        tell(&diagnosis, facts, events, said);
        let unsettled = diagnosis.unsettled();
        if unsettled.is_empty() {
            return std::future::pending().await;
        }
        tries = tries.saturating_add(1);
        tokio::time::sleep(RETRY.after(tries)).await;
        let (fresh, _) = doctor.examine(Some(&unsettled)).await;
        diagnosis = diagnosis.renewed(&unsettled, fresh);
    }
}

/// Puts what fails into the status, and what has changed into the log.
fn tell(diagnosis: &Diagnosis, facts: &watch::Sender<Facts>, events: &Events, said: &mut BTreeSet<String>) {
    let failing: Vec<&Finding> = diagnosis.with(Outcome::Failure).collect();
    let names: BTreeSet<String> = failing.iter().map(|finding| finding.name()).collect();
    for finding in failing.iter().filter(|finding| !said.contains(&finding.name())).take(SHOWN) {
        events.emit(&Event::CheckFailed { finding });
    }
    for name in said.difference(&names).take(SHOWN) {
        events.emit(&Event::CheckPassed { name });
    }
    *said = names;
    let mut problems: Vec<Problem> = failing
        .iter()
        .take(SHOWN)
        .map(|finding| Problem { about: ABOUT.to_owned(), failure: finding.to_failure() })
        .collect();
    if failing.len() > SHOWN {
        let failure = Failure::new(format!("{} more checks fail", failing.len() - SHOWN));
        problems
            .push(Problem { about: ABOUT.to_owned(), failure: failure.with_remedy("`enclavectl doctor` lists all") });
    }
    let failed_checks: Vec<_> = diagnosis.failing().into_iter().collect();
    facts.send_modify(|facts| {
        facts.problems.retain(|problem| problem.about != ABOUT);
        facts.problems.extend(problems);
        facts.host.failed_checks = failed_checks;
        facts.host.checked_at = Some(SystemTime::now().into());
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use enclaved_core::diagnosis::Check;

    fn told(facts: &watch::Sender<Facts>) -> (Vec<Check>, Vec<String>) {
        let facts = facts.borrow();
        (
            facts.host.failed_checks.clone(),
            facts.problems.iter().map(|problem| problem.failure.message.clone()).collect(),
        )
    }

    #[test]
    fn what_fails_is_a_problem_by_name_until_it_passes_and_other_problems_stay() {
        let facts = watch::Sender::new(Facts::default());
        let other = Problem { about: "config".to_owned(), failure: Failure::new("refused") };
        facts.send_modify(|facts| facts.problems.push(other));
        let (events, mut said) = (Events::new(Metrics::new().unwrap()), BTreeSet::new());
        let bad = Finding::failure(Check::EgressDns, "no such name", "correct it").about("kms:443");
        tell(&Diagnosis::of(vec![bad, Finding::warning(Check::Disk, "little", "")]), &facts, &events, &mut said);
        let (failed, problems) = told(&facts);
        assert_eq!(failed, [Check::EgressDns]);
        assert_eq!(problems, ["refused", "egress_dns kms:443: no such name"]);
        assert!(facts.borrow().host.checked_at.is_some());
        tell(&Diagnosis::of(vec![Finding::ok(Check::EgressDns, "")]), &facts, &events, &mut said);
        assert_eq!(told(&facts), (Vec::new(), vec!["refused".to_owned()]));
        assert!(said.is_empty());
    }

    #[test]
    fn hundreds_of_failures_are_a_few_problems() {
        let facts = watch::Sender::new(Facts::default());
        let bad = |number: u32| Finding::failure(Check::EgressDns, "x", "y").about(number.to_string());
        let (events, mut said) = (Events::new(Metrics::new().unwrap()), BTreeSet::new());
        tell(&Diagnosis::of((0..300).map(bad).collect()), &facts, &events, &mut said);
        let (_, problems) = told(&facts);
        assert_eq!(problems.len(), SHOWN + 1);
        assert_eq!(problems[SHOWN], "292 more checks fail");
    }
}
