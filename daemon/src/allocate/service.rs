//! The stock allocator's service, as little of it as is needed: restart it, and read what it said.

use crate::host::inventory::ALLOCATOR_UNIT;
use crate::journal;
use crate::systemd_bus::{JobError, SystemdBus, UnitState, Verb};
use enclaved_core::failure::Failure;
use std::future::Future;
use std::time::Duration;

/// What is done to the service.
pub trait StockService: Send + Sync {
    /// Whether it can be run: its unit is there and not masked.
    fn can_run(&self) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Restarts it and waits until its job is over, that long at the most. That it says it succeeded proves nothing: look at the pool.
    fn restart(&self, patience: Duration) -> impl Future<Output = Result<(), JobError>> + Send;

    /// Whether it is over: systemd has nothing to do for it, and it neither begins nor ends.
    fn at_rest(&self) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Its last lines in the journal.
    fn journal(&self, lines: u32) -> impl Future<Output = Result<Vec<String>, Failure>> + Send;
}

/// The service under systemd.
#[derive(Debug, Clone)]
pub struct Systemd(pub SystemdBus);

impl StockService for Systemd {
    async fn can_run(&self) -> Result<(), Failure> {
        match self.0.load_state(ALLOCATOR_UNIT).await?.as_str() {
            "loaded" => Ok(()),
            "not-found" => Err(Failure::new(format!("Unit {ALLOCATOR_UNIT} not found"))
                .with_remedy("install aws-nitro-enclaves-cli, which has it")),
            "masked" => Err(Failure::new(format!("Unit {ALLOCATOR_UNIT} is masked"))
                .with_remedy(format!("`systemctl unmask {ALLOCATOR_UNIT}`"))),
            other => Err(Failure::new(format!("systemd can't use {ALLOCATOR_UNIT}: {other}"))),
        }
    }

    async fn restart(&self, patience: Duration) -> Result<(), JobError> {
        match self.0.run_job(Verb::Restart, ALLOCATOR_UNIT, patience).await {
            // What has not begun must not begin when enclaves run.
            Err(JobError::Unknown(failure)) => match self.0.take_back(ALLOCATOR_UNIT).await {
                Ok(true) => Err(JobError::NotRun(failure)),
                Ok(false) | Err(_) => Err(JobError::Unknown(failure)),
            },
            other => other,
        }
    }

    async fn at_rest(&self) -> Result<bool, Failure> {
        Ok(!is_at_work(self.0.unit(ALLOCATOR_UNIT).await?.as_ref()))
    }

    async fn journal(&self, lines: u32) -> Result<Vec<String>, Failure> {
        journal::last_lines(ALLOCATOR_UNIT, lines).await
    }
}

/// Whether the service is changing the pool, or is about to.
pub(crate) fn is_at_work(unit: Option<&UnitState>) -> bool {
    // One that failed and is to be started again later rests until then, and may do so for ever.
    let rests = |unit: &UnitState| unit.sub == "auto-restart";
    let changes =
        |unit: &UnitState| matches!(unit.active.as_str(), "activating" | "deactivating" | "reloading") && !rests(unit);
    unit.is_some_and(|unit| unit.job.is_some() || changes(unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_begins_ends_or_has_a_job_is_at_work() {
        let unit = |active: &str, job: Option<&str>| UnitState {
            load: "loaded".to_owned(),
            active: active.to_owned(),
            sub: "start".to_owned(),
            job: job.map(str::to_owned),
        };
        assert!(!is_at_work(None));
        for (active, job, expected) in [
            ("inactive", None, false),
            ("active", None, false),
            ("failed", None, false),
            ("activating", None, true),
            ("deactivating", None, true),
            ("active", Some("restart"), true),
            ("inactive", Some("start"), true),
        ] {
            assert_eq!(is_at_work(Some(&unit(active, job))), expected, "{active} {job:?}");
        }
        let waits = UnitState { sub: "auto-restart".to_owned(), ..unit("activating", None) };
        assert!(!is_at_work(Some(&waits)));
    }
}
