//! Whether the stock allocator's service changes the pool just now, whoever started it: what is launched in the middle of that takes
//! memory that it counts on, and makes it fail. Asks systemd; starts and stops nothing.

use super::{Allocator, NotReserved, Outcome, SysfsAllocator};
use crate::allocate::service;
use crate::host::inventory::ALLOCATOR_UNIT;
use crate::systemd_bus::SystemdBus;
use enclaved_core::allocator_file::Reservation;
use enclaved_core::failure::Failure;
use enclaved_core::observed::Pool;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long systemd may take to say how the service is. It answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// What it said holds for so long.
const AGE: Duration = Duration::from_secs(1);
/// So long it is waited for its first answer, or the next one after the service was at work: at boot systemd is busy. Not for ever: a
/// bus that is away is no reason to launch nothing.
const FIRST: Duration = Duration::from_secs(30);

/// The stock allocator's unit.
pub trait StockUnit: Send + Sync + 'static {
    /// Whether it is changing the pool, or is about to, whoever started it.
    fn stock_at_work(&self) -> impl Future<Output = Outcome<bool>> + Send;
}

impl StockUnit for SystemdBus {
    async fn stock_at_work(&self) -> Outcome<bool> {
        Ok(service::is_at_work(self.unit(ALLOCATOR_UNIT).await?.as_ref()))
    }
}

/// What is known of the service.
#[derive(Debug)]
pub(super) struct Stock {
    since: Instant,
    /// What was last said, and when.
    said: Mutex<Option<(Instant, bool)>>,
}

impl Stock {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), said: Mutex::default() }
    }

    /// Whether it is at work. Where systemd does not answer any more it is as it was when that was last known, and at rest after a
    /// while: what is launched beside it fails, and is launched again.
    ///
    /// # Errors
    /// Systemd has not answered yet.
    pub(super) async fn is_at_work(&self, unit: &impl StockUnit) -> Outcome<bool> {
        let known = *self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, false)) = known
            && at.elapsed() < AGE
        {
            return Ok(false);
        }
        let failure = match timeout(PATIENCE, unit.stock_at_work()).await {
            Ok(Ok(said)) => {
                self.note(said);
                return Ok(said);
            }
            Ok(Err(failure)) => failure,
            Err(_) => Failure::new(format!("systemd does not answer within {PATIENCE:?}")),
        };
        let message = format!("whether {ALLOCATOR_UNIT} is at work is not known: {}", failure.message);
        if known.is_none() && self.since.elapsed() < FIRST {
            return Err(Failure { message, ..failure });
        }
        tracing::debug!("{message}");
        if let Some((at, true)) = known
            && at.elapsed() < FIRST
        {
            return Ok(true);
        }
        self.note(false);
        Ok(false)
    }

    fn note(&self, said: bool) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), said));
    }
}

/// The administrator's pool on a host with systemd: looked at and never changed, and not taken for what it will be while the stock
/// service is at work on it.
#[derive(Debug)]
pub struct VerifiedAllocator<U> {
    sysfs: SysfsAllocator,
    unit: U,
    stock: Stock,
}

impl<U: StockUnit> VerifiedAllocator<U> {
    /// With that unit.
    pub fn new(sysfs: SysfsAllocator, unit: U) -> Self {
        Self { sysfs, unit, stock: Stock::new() }
    }
}

impl<U: StockUnit> Allocator for VerifiedAllocator<U> {
    async fn observe(&self) -> Outcome<Pool> {
        // In this order: what was being changed when the numbers were read is said to be so.
        let before = self.stock.is_at_work(&self.unit).await?;
        let pool = self.sysfs.observe().await?;
        Ok(match pool {
            Pool::Sized { cpus, memory, memory_free, .. } => {
                let changing = before || self.stock.is_at_work(&self.unit).await?;
                Pool::Sized { cpus, memory, memory_free, changing }
            }
            Pool::External => Pool::External,
        })
    }

    async fn reserve(&self, wish: &Reservation, least: Option<&Reservation>) -> Result<(), NotReserved> {
        self.sysfs.reserve(wish, least).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    struct Unit(Mutex<Outcome<bool>>);

    impl Unit {
        fn says(&self, said: Outcome<bool>) {
            *self.0.lock().unwrap() = said;
        }
    }

    impl StockUnit for Unit {
        async fn stock_at_work(&self) -> Outcome<bool> {
            self.0.lock().unwrap().clone()
        }
    }

    fn away() -> Outcome<bool> {
        Err(Failure::new("the bus is away"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_of_which_nothing_was_heard_yet_is_unknown_for_a_while_and_holds_nothing_up_after_that() {
        let (stock, unit) = (Stock::new(), Unit(Mutex::new(away())));
        let failure = stock.is_at_work(&unit).await.unwrap_err();
        assert!(failure.message.contains("at work is not known: the bus is away"), "{failure}");
        advance(FIRST).await;
        assert_eq!(stock.is_at_work(&unit).await, Ok(false));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_heard_counts_and_a_bus_that_goes_away_holds_nothing_up() {
        let (stock, unit) = (Stock::new(), Unit(Mutex::new(Ok(true))));
        assert_eq!(stock.is_at_work(&unit).await, Ok(true));
        unit.says(away());
        assert_eq!(stock.is_at_work(&unit).await, Ok(true), "it was just now");
        advance(FIRST).await;
        assert_eq!(stock.is_at_work(&unit).await, Ok(false));
        unit.says(Ok(true));
        advance(AGE).await;
        assert_eq!(stock.is_at_work(&unit).await, Ok(true));
    }

    #[tokio::test(start_paused = true)]
    async fn the_administrators_pool_is_being_changed_while_the_stock_service_is_at_work() {
        let folder = tempfile::tempdir().unwrap();
        let parameters = folder.path().join("module/nitro_enclaves/parameters");
        std::fs::create_dir_all(&parameters).unwrap();
        std::fs::write(parameters.join("ne_cpus"), "\n").unwrap();
        std::fs::create_dir_all(folder.path().join("devices/system/node")).unwrap();
        let allocator = VerifiedAllocator::new(SysfsAllocator::new(folder.path()), Unit(Mutex::new(Ok(true))));
        for changing in [true, false] {
            allocator.unit.says(Ok(changing));
            let seen = allocator.observe().await.unwrap();
            assert!(matches!(seen, Pool::Sized { changing: is, .. } if is == changing), "{seen:?}");
        }
    }
}
