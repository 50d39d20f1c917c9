//! Has the pool changed by `enclaved-allocator.service`, which runs as root: one request file out, one report file in. What the
//! report says is believed only where it answers this very request; what it lacks is a failure.
//!
//! Never writes the stock allocator's file, nor sysfs: this process may do neither.

use super::stock::{Stock, StockUnit};
use super::{NotReserved, Outcome, SysfsAllocator};
use crate::allocate::{ALLOCATE_UNIT, Did, FORMAT, Report, Request, is_at_work};
use crate::atomic_file;
use crate::host::Allocator;
use crate::launch_trace::Lock;
use crate::systemd_bus::{JobError, SystemdBus, Verb};
use enclaved_core::allocator_file::Reservation;
use enclaved_core::failure::Failure;
use enclaved_core::observed::Pool;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The stock service has ten minutes for each of four restarts at the most.
const PATIENCE: Duration = Duration::from_mins(42);
/// A report with the longest journal and CPU lists is shorter.
const MAX_REPORT: u64 = 1 << 20;
/// How soon the unit is at work once it was asked for. If it is not, systemd does not answer, or waits for something else.
const BEGIN: Duration = Duration::from_secs(60);
/// How often is looked whether it is.
const LOOK: Duration = Duration::from_millis(500);
/// Lines of the stock service's journal that go into a failure, and how long each may be.
const LINES: usize = 5;
const LINE: usize = 200;

/// Starts the unit that changes the pool.
pub trait AllocatorUnit: StockUnit {
    /// Starts it, and waits until it has ended.
    fn run(&self) -> impl Future<Output = Result<(), JobError>> + Send;

    /// Sees to it that it does not begin any more, if it has not; `false`: it has, or was not to.
    fn take_back(&self) -> impl Future<Output = Outcome<bool>> + Send;
}

/// The unit under systemd.
#[derive(Debug, Clone)]
pub struct SystemdUnit(pub SystemdBus);

impl AllocatorUnit for SystemdUnit {
    async fn run(&self) -> Result<(), JobError> {
        self.0.run_job(Verb::Start, ALLOCATE_UNIT, PATIENCE).await
    }

    async fn take_back(&self) -> Outcome<bool> {
        self.0.take_back(ALLOCATE_UNIT).await
    }
}

impl StockUnit for SystemdUnit {
    async fn stock_at_work(&self) -> Outcome<bool> {
        self.0.stock_at_work().await
    }
}

/// Where request and report are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagedSettings {
    /// `/sys`
    pub sysfs: PathBuf,
    /// What this process writes.
    pub request: PathBuf,
    /// What root writes, in a folder where nobody else can.
    pub report: PathBuf,
    /// What every launch holds while it is under way. Root holds it, too, but can't make it.
    pub launch_lock: PathBuf,
}

/// The pool is enclaved's to change.
#[derive(Debug)]
pub struct ManagedAllocator<U> {
    settings: ManagedSettings,
    sysfs: SysfsAllocator,
    unit: U,
    stock: Stock,
}

impl<U: AllocatorUnit> ManagedAllocator<U> {
    /// By that unit.
    pub fn new(settings: ManagedSettings, unit: U) -> Self {
        Self { sysfs: SysfsAllocator::new(&settings.sysfs), settings, unit, stock: Stock::new() }
    }

    /// Whether the pool is being changed: by root's process, or by a stock service that has outlived it, or was started by hand.
    async fn is_changing(&self) -> Outcome<bool> {
        Ok(is_at_work(&self.settings.report) || self.stock.is_at_work(&self.unit).await?)
    }

    /// Returns when it is known that the unit has not begun; never, once it has.
    async fn never_began(&self, request: &Request) {
        let until = tokio::time::Instant::now() + BEGIN;
        while tokio::time::Instant::now() < until {
            if is_at_work(&self.settings.report) || self.answer(request).is_ok() {
                return std::future::pending().await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What has not begun by now is not to begin later, when enclaves run.
    async fn give_up(&self) -> JobError {
        let late = Failure::new(format!("{ALLOCATE_UNIT} did not begin within {} s of being started", BEGIN.as_secs()));
        match self.unit.take_back().await {
            Ok(true) => JobError::NotRun(late),
            Ok(false) => JobError::Unknown(late),
            Err(failure) => JobError::Unknown(Failure::new(format!("{}; {}", late.message, failure.message))),
        }
    }

    /// The report, if it answers that request.
    fn answer(&self, request: &Request) -> Outcome<Report> {
        let path = &self.settings.report;
        let report = atomic_file::read_json::<Report>(path, MAX_REPORT)
            .map_err(|error| Failure::from_error(&error))?
            .ok_or_else(|| Failure::new(format!("there is no {}", path.display())))?;
        if report.request.as_ref() == Some(request) {
            return Ok(report);
        }
        let at = report.at;
        Err(Failure::new(format!("{} answers another request (it is of {at})", path.display())))
    }
}

impl<U: AllocatorUnit> Allocator for ManagedAllocator<U> {
    async fn observe(&self) -> Outcome<Pool> {
        // In this order: what was being changed when the numbers were read is said to be so.
        let before = self.is_changing().await?;
        let pool = self.sysfs.observe().await?;
        Ok(match pool {
            Pool::Sized { cpus, memory, memory_free, .. } => {
                Pool::Sized { cpus, memory, memory_free, changing: before || self.is_changing().await? }
            }
            Pool::External => Pool::External,
        })
    }

    async fn reserve(&self, wish: &Reservation, least: Option<&Reservation>) -> Result<(), NotReserved> {
        let least = least.filter(|least| *least != wish).cloned();
        let request = Request { format: FORMAT, id: new_id(), wish: wish.clone(), least };
        let written = Lock::make(&self.settings.launch_lock)
            .and_then(|()| atomic_file::write_json(&self.settings.request, &request));
        written.map_err(|error| NotReserved::not_tried(Failure::from_error(&error)))?;
        let ran = tokio::select! {
            biased;
            // What is dropped here goes on at systemd; whether it does is to be seen by its lock.
            ran = self.unit.run() => ran,
            () = self.never_began(&request) => Err(self.give_up().await),
        };
        if matches!(ran, Err(JobError::Unknown(_))) {
            // The bus was lost; it goes on, and will say what came of it.
            while is_at_work(&self.settings.report) {
                tokio::time::sleep(LOOK).await;
            }
        }
        let not_done = |failure: Failure| {
            let remedy = failure.remedy.clone().or_else(|| Some(format!("look at `systemctl status {ALLOCATE_UNIT}`")));
            Failure { message: format!("the enclave pool is not changed: {}", failure.message), remedy, ..failure }
        };
        match (ran, self.answer(&request)) {
            (Err(JobError::NotRun(failure)), _) => Err(NotReserved::not_tried(not_done(failure))),
            // It fails, too, where it says why.
            (Ok(()) | Err(JobError::Failed(_) | JobError::Unknown(_)), Ok(report)) => judge(report, &request),
            (Err(JobError::Unknown(failure)), Err(_)) => Err(NotReserved::not_tried(not_done(failure))),
            (ran, Err(none)) => {
                let failed = ran.err().map_or_else(String::new, |error| format!(" ({error})"));
                let message = format!("{ALLOCATE_UNIT} left no answer{failed}: {}", none.message);
                // It was at work, and nobody knows how far it got.
                Err(NotReserved::tried(not_done(
                    Failure::new(message).with_remedy(format!("`journalctl -u {ALLOCATE_UNIT}` says why")),
                )))
            }
        }
    }
}

/// What the report comes to.
fn judge(report: Report, request: &Request) -> Result<(), NotReserved> {
    let ran = report.restarts > 0;
    match (&report.did, &report.failure) {
        (Did::Nothing, _) => Ok(()),
        (Did::Reserved(reserved), _) if *reserved == request.wish || Some(reserved) == request.least.as_ref() => Ok(()),
        (Did::Reserved(other), _) => {
            let failure = Failure::new(format!("{ALLOCATE_UNIT} reserved {other}, which it was not asked for"));
            Err(NotReserved::tried(failure))
        }
        (Did::KeptFormer(_) | Did::Failed, failure) => {
            let failure = failure.clone().unwrap_or_else(|| Failure::new(format!("{ALLOCATE_UNIT} gave no reason")));
            let kept = match &report.did {
                Did::KeptFormer(former) => format!("; kept the former pool of {former}"),
                _ => String::new(),
            };
            // systemd's own lines about the service say that it failed, and not why.
            let own = report.journal.iter().filter(|line| !line.contains(" systemd[1]: "));
            let first = own.clone().count().saturating_sub(LINES);
            let lines: String = own
                .skip(first)
                .map(|line| format!("\n  {}", line.chars().take(LINE).filter(|c| !c.is_control()).collect::<String>()))
                .collect();
            let said = if lines.is_empty() { lines } else { format!("; nitro-enclaves-allocator said last:{lines}") };
            let text = Failure::new(format!("{}{kept}{said}", failure.message));
            Err(NotReserved { failure: Failure { remedy: failure.remedy, code: failure.code, ..text }, ran })
        }
    }
}

/// No other request has it.
fn new_id() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::lock::tests::Elsewhere;
    use enclaved_core::allocator_file::CpuRequest;
    use enclaved_core::id::MemoryMib;
    use std::fs;
    use std::path::Path;
    use tempfile::TempDir;

    fn wish(memory: u64) -> Reservation {
        Reservation { cpus: CpuRequest::Count(2), memory_mib: MemoryMib(memory) }
    }

    /// What the unit does when it is run: it sees the request, and gives what it ends with.
    type Act = Box<dyn Fn(&Path, &Path) -> Result<(), JobError> + Send + Sync>;

    struct Unit {
        request: PathBuf,
        report: PathBuf,
        act: Option<Act>,
        take_back: bool,
        stock: Outcome<bool>,
    }

    impl AllocatorUnit for Unit {
        async fn run(&self) -> Result<(), JobError> {
            match &self.act {
                Some(act) => act(&self.request, &self.report),
                None => std::future::pending().await,
            }
        }

        async fn take_back(&self) -> Outcome<bool> {
            Ok(self.take_back)
        }
    }

    impl StockUnit for Unit {
        async fn stock_at_work(&self) -> Outcome<bool> {
            self.stock.clone()
        }
    }

    fn host(act: Option<Act>) -> (TempDir, ManagedAllocator<Unit>) {
        let folder = tempfile::tempdir().unwrap();
        let (request, report) = (folder.path().join("allocate.json"), folder.path().join("report.json"));
        let settings = ManagedSettings {
            sysfs: folder.path().join("sys"),
            request: request.clone(),
            report: report.clone(),
            launch_lock: folder.path().join("launch.lock"),
        };
        (folder, ManagedAllocator::new(settings, Unit { request, report, act, take_back: false, stock: Ok(false) }))
    }

    /// A report that answers the request that is there, with these fields.
    fn answer(request: &Path, report: &Path, fields: &str) {
        let request = fs::read_to_string(request).unwrap();
        let text = format!(
            r#"{{"format":1,"at":"2026-01-01T00:00:00.000Z","request":{request},"before":null,"after":null,"restarts":1,
            "service_failure":null,"compacted":true,"backup":null,{fields}}}"#
        );
        fs::write(report, text).unwrap();
    }

    fn answers(fields: &'static str, ended: Result<(), JobError>) -> (TempDir, ManagedAllocator<Unit>) {
        host(Some(Box::new(move |request, report| {
            answer(request, report, fields);
            ended.clone()
        })))
    }

    fn failed() -> Result<(), JobError> {
        Err(JobError::Failed(Failure::new("starting: failed")))
    }

    #[tokio::test]
    async fn what_was_reserved_is_a_success_also_if_it_is_the_least_and_nothing_else_is() {
        let wished = r#""did":{"reserved":{"cpus":{"count":2},"memory_mib":64}},"failure":null,"journal":[]"#;
        let (_folder, allocator) = answers(wished, Ok(()));
        allocator.reserve(&wish(64), None).await.unwrap();
        allocator.reserve(&wish(128), Some(&wish(64))).await.unwrap();
        let failure = allocator.reserve(&wish(128), None).await.unwrap_err().failure;
        assert!(failure.message.contains("which it was not asked for"), "{failure}");
        let (_folder, allocator) = answers(r#""did":"nothing","failure":null,"journal":[]"#, Ok(()));
        allocator.reserve(&wish(64), None).await.unwrap();
    }

    #[tokio::test]
    async fn a_failure_has_the_numbers_the_remedy_and_the_last_lines_of_the_journal() {
        let said = r#""did":{"kept_former":{"cpus":{"count":2},"memory_mib":32}},
            "failure":{"message":"2 CPUs and 64 MiB were asked for","remedy":"reboot"},
            "journal":["one","two","three","host systemd[1]: failed","four","five","six \u0007"]"#;
        let (_folder, allocator) = answers(said, failed());
        let failure = allocator.reserve(&wish(64), None).await.unwrap_err().failure;
        let expected = "2 CPUs and 64 MiB were asked for; kept the former pool of 2 CPUs and 32 MiB; nitro-enclaves-allocator said \
                        last:\n  two\n  three\n  four\n  five\n  six ";
        assert_eq!((failure.message.as_str(), failure.remedy.as_deref()), (expected, Some("reboot")));
    }

    #[tokio::test]
    async fn a_report_that_answers_another_request_is_not_believed() {
        let act: Act = Box::new(|request, report| {
            answer(request, report, r#""did":"nothing","failure":null,"journal":[]"#);
            let old = fs::read_to_string(report).unwrap().replacen("\"id\": ", "\"id\": 1", 1);
            fs::write(report, old).unwrap();
            Ok(())
        });
        let (_folder, allocator) = host(Some(act));
        let failure = allocator.reserve(&wish(64), None).await.unwrap_err().failure;
        assert!(failure.message.contains("left no answer") && failure.message.contains("another request"), "{failure}");
        assert!(failure.remedy.unwrap().contains("journalctl -u enclaved-allocator.service"));
        // Nor one that was torn, or is not there.
        let (_folder, allocator) = host(Some(Box::new(|_, report| {
            fs::write(report, "{\"format\"").unwrap();
            failed()
        })));
        let failure = allocator.reserve(&wish(64), None).await.unwrap_err().failure;
        assert!(failure.message.contains("left no answer (starting: failed)"), "{failure}");
    }

    #[tokio::test]
    async fn a_unit_that_did_not_run_leaves_the_pool_as_it_is_and_an_answer_counts_though_its_end_was_not_seen() {
        let refused = Failure::new("access denied").with_remedy("install the polkit rule");
        let (_folder, allocator) = host(Some(Box::new(move |_, _| Err(JobError::NotRun(refused.clone())))));
        let failure = allocator.reserve(&wish(64), None).await.unwrap_err().failure;
        assert_eq!(failure.message, "the enclave pool is not changed: access denied");
        assert_eq!(failure.remedy.as_deref(), Some("install the polkit rule"));
        let lost = Err(JobError::Unknown(Failure::new("the bus was lost")));
        let (_folder, allocator) = answers(r#""did":"nothing","failure":null,"journal":[]"#, lost.clone());
        allocator.reserve(&wish(64), None).await.unwrap();
        let (_folder, allocator) = host(Some(Box::new(move |_, _| lost.clone())));
        assert!(allocator.reserve(&wish(64), None).await.unwrap_err().failure.message.contains("the bus was lost"));
    }

    #[tokio::test]
    async fn only_what_got_as_far_as_the_stock_service_was_a_try() {
        async fn ran(allocator: &ManagedAllocator<Unit>) -> bool {
            allocator.reserve(&wish(64), None).await.unwrap_err().ran
        }
        let not_run = || Err(JobError::NotRun(Failure::new("the bus is away")));
        let unknown = || Err(JobError::Unknown(Failure::new("the bus was lost")));
        assert!(!ran(&host(Some(Box::new(move |_, _| not_run()))).1).await);
        assert!(!ran(&host(Some(Box::new(move |_, _| unknown()))).1).await);
        // Root refused, or the stock service is masked.
        let refused = r#""did":"failed","failure":{"message":"1 enclave runs"},"journal":[]"#;
        let act = |restarts: u32| -> Option<Act> {
            Some(Box::new(move |request, report| {
                answer(request, report, refused);
                let text = fs::read_to_string(report).unwrap();
                fs::write(report, text.replace("\"restarts\":1", &format!("\"restarts\":{restarts}"))).unwrap();
                failed()
            }))
        };
        assert!(!ran(&host(act(0)).1).await);
        assert!(ran(&host(act(1)).1).await);
        // It was at work, and nobody knows how far it came.
        assert!(ran(&host(Some(Box::new(|_, _| failed()))).1).await);
    }

    #[tokio::test]
    async fn root_finds_the_lock_of_launches_which_it_cannot_make() {
        let lock_is_there: Act = Box::new(|request, report| {
            assert!(request.with_file_name("launch.lock").exists());
            answer(request, report, r#""did":"nothing","failure":null,"journal":[]"#);
            Ok(())
        });
        host(Some(lock_is_there)).1.reserve(&wish(64), None).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_stock_service_at_work_is_a_pool_that_changes_whoever_started_it() {
        let (folder, mut allocator) = host(None);
        let changing = async |allocator: &ManagedAllocator<Unit>| match allocator.observe().await.unwrap() {
            Pool::Sized { changing, .. } => changing,
            Pool::External => panic!("it is ours"),
        };
        fs::create_dir_all(folder.path().join("sys/module/nitro_enclaves/parameters")).unwrap();
        fs::write(folder.path().join("sys/module/nitro_enclaves/parameters/ne_cpus"), "\n").unwrap();
        fs::create_dir_all(folder.path().join("sys/devices/system/node")).unwrap();
        assert!(!changing(&allocator).await);
        allocator.unit.stock = Ok(true);
        allocator.stock = Stock::new();
        assert!(changing(&allocator).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_unit_that_does_not_begin_is_not_waited_for_and_one_that_works_is() {
        let (_folder, allocator) = host(None);
        let failure = allocator.reserve(&wish(64), None).await.unwrap_err().failure;
        assert!(failure.message.contains("did not begin within 60 s"), "{failure}");
        // It must not begin later either.
        let (_folder, mut allocator) = host(None);
        allocator.unit.take_back = true;
        let refused = allocator.reserve(&wish(64), None).await.unwrap_err();
        assert!(!refused.ran && refused.failure.message.starts_with("the enclave pool is not changed"), "{refused:?}");

        let (folder, allocator) = host(None);
        let report = folder.path().join("report.json");
        let root = Elsewhere::hold(&report, "show");
        let patience = Duration::from_secs(1800);
        let wish = wish(64);
        assert!(tokio::time::timeout(patience, allocator.reserve(&wish, None)).await.is_err(), "it is at work");
        assert!(is_at_work(&report));
        drop(root);
        assert!(!is_at_work(&report));
    }
}
