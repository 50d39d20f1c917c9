//! One change of the pool: everything is looked at before anything is touched; then the stock service is restarted until the pool is
//! there, or there is no hope of it; and what was there before is had again where the new one can't be.
//!
//! Knows the stock service as a trait; believes the host alone.

use super::service::StockService;
use super::{Did, Places, Pool, Report, Request, file, lock, request};
use crate::host::inventory::{ALLOCATOR_UNIT, InventorySource};
use crate::systemd_bus::JobError;
use enclaved_core::allocator_file::{CpuRequest, Reservation};
use enclaved_core::failure::Failure;
use enclaved_core::inventory::{Hugepages, Inventory, known};
use enclaved_core::observed::Observation;
use enclaved_core::sizing::pool::{PoolNow, in_use, kernel_arguments, left_behind, node_of, within};
use enclaved_core::sizing::{Capacity, Reserve};
use std::cmp::Ordering;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// All of it is over by then: the unit of this command has 41 minutes.
const WHOLE: Duration = Duration::from_mins(38);
/// Moving pages out of the way of large ones can take minutes on a big host that is in use. The stock unit itself has no limit.
const RESTART: Duration = Duration::from_mins(10);
/// How often is looked whether the stock service is over, once the bus has not told.
const LOOK: Duration = Duration::from_secs(1);

/// Reserves what is asked for; all that was done and seen, and what came of it, goes into the report.
pub(super) async fn reserve<I: InventorySource, S: StockService>(
    places: &Places,
    reserve: Reserve,
    inventory: &I,
    service: &S,
    report: &mut Report,
) {
    let mut run =
        Run { places, inventory, service, until: Instant::now() + WHOLE, still_at_work: false, wrote: None, report };
    match run.reserve(reserve).await {
        Ok(did) => run.report.did = did,
        Err(failure) => run.report.failure = Some(failure),
    }
}

/// The pool that was there, as it can be asked for again. `None`: there was none.
fn former(before: &PoolNow) -> Option<Reservation> {
    let cpus = CpuRequest::Pool(before.cpus.clone());
    (!before.cpus.is_empty()).then_some(Reservation { cpus, memory_mib: before.memory })
}

/// Why the pool is not what was asked for.
struct Shortage {
    failure: Failure,
    of_memory: bool,
}

impl From<Failure> for Shortage {
    fn from(failure: Failure) -> Self {
        Self { failure, of_memory: false }
    }
}

struct Run<'a, I, S> {
    places: &'a Places,
    inventory: &'a I,
    service: &'a S,
    until: Instant,
    /// The stock service was restarted, and is not over.
    still_at_work: bool,
    /// What the stock service's file names, if it was written here.
    wrote: Option<Reservation>,
    report: &'a mut Report,
}

impl<I: InventorySource, S: StockService> Run<'_, I, S> {
    async fn reserve(&mut self, reserve: Reserve) -> Result<Did, Failure> {
        let request = request::read(&self.places.request)?;
        self.report.request = Some(request.clone());
        let Request { wish, least, .. } = request;
        // Before the look at what runs: no launch of enclaved begins after it. Held until the end.
        let no_launch = lock::no_launch(&self.places.launch_lock).await;
        let seen = self.inventory.read().await;
        let capacity = Capacity::of(&seen, reserve).map_err(|failure| Failure {
            message: format!("the host could not be sized up: {}", failure.message),
            ..failure
        })?;
        within(&capacity, &wish)?;
        if let Some(least) = &least {
            within(&capacity, least)?;
        }
        let left = left_behind(&seen, &wish)?;
        let before = PoolNow::of(&seen)?;
        self.report.before = Some(pool(&before));
        if before.is_just(&wish, &seen, &capacity)? {
            // The next boot should find it in the file, too.
            self.write(&wish)?;
            self.report.after.clone_from(&self.report.before);
            return Ok(Did::Nothing);
        }
        nothing_runs(&seen, &wish)?;
        let _no_launch = no_launch?;
        self.service.can_run().await.map_err(did_not_run)?;
        // Less than there was is no way out as long as that can be had again.
        let (less, fallback) = match least.filter(|least| *least != wish) {
            Some(least) if before.has(&least) => (None, Some(least)),
            other => (other, None),
        };
        let file = file::former(&self.places.allocator_file)?;
        let shortage = match self.try_all(&wish, less, &capacity, &seen).await {
            Ok(had) => {
                self.give_back(&left).await;
                return Ok(Did::Reserved(had));
            }
            Err(shortage) => shortage,
        };
        if self.report.restarts == 0 || self.still_at_work {
            return Err(shortage.failure);
        }
        let kept = self.keep_former(&before, &seen, &capacity).await;
        // Only where it was tried, and what is there was looked at: what could not be tried the service's next run may have.
        let short = kept.is_err() && !self.still_at_work && self.report.after.is_some();
        if let Some(least) = fallback.filter(|_| short) {
            match self.try_to_have(&least, &capacity).await {
                Ok(true) => {
                    self.give_back(&left).await;
                    self.report.failure = self.report.failure.take().or(Some(shortage.failure));
                    return Ok(Did::Reserved(least));
                }
                Ok(false) => {}
                Err(failure) => tracing::warn!("the least that is needed, {least}, can't be had either: {failure}"),
            }
        }
        // What the next boot, or the service's next run, reserves. A service that still runs has read its own.
        if !self.still_at_work {
            match (former(&before), shortage.of_memory) {
                // With another wish, or the same, the stock service would give back the pages that the kernel's command line reserves.
                // What is wanted is asked for again in the next boot.
                (None, _) if before.memory.0 > 0 => self.put_back(file.as_deref())?,
                // The boot is the remedy.
                (_, true) => self.write(&wish)?,
                (Some(former), false) => self.write(&former)?,
                (None, false) => {}
            }
        }
        match kept {
            Ok(Some(former)) => {
                self.report.failure = Some(shortage.failure);
                Ok(Did::KeptFormer(former))
            }
            Ok(None) => Err(shortage.failure),
            Err(lost) => Err(Failure {
                message: format!("{}; the former pool can't be had again: {}", shortage.failure.message, lost.message),
                ..shortage.failure
            }),
        }
    }

    /// The wish; again with free memory in one piece; the least. Gives what is there now.
    async fn try_all(
        &mut self,
        wish: &Reservation,
        least: Option<Reservation>,
        capacity: &Capacity,
        seen: &Inventory,
    ) -> Result<Reservation, Shortage> {
        if self.try_to_have(wish, capacity).await? {
            return Ok(wish.clone());
        }
        self.report.compacted = compact(&self.places.compact_memory).is_ok();
        if self.try_to_have(wish, capacity).await? {
            return Ok(wish.clone());
        }
        if let Some(least) = least
            && self.try_to_have(&least, capacity).await?
        {
            return Ok(least);
        }
        Err(self.shortage(wish, capacity, seen)?)
    }

    /// The pool that was there before, again if need be, wherever it lies: a growth that failed must not cost what ran. `None`: there
    /// was none, but for hugepages perhaps that the kernel's command line reserved, which the stock service has given back.
    async fn keep_former(
        &mut self,
        before: &PoolNow,
        seen: &Inventory,
        capacity: &Capacity,
    ) -> Result<Option<Reservation>, Failure> {
        let Some(former) = former(before) else {
            if before.memory.0 > 0 {
                self.reserve_pages_again(seen).await?;
            }
            return Ok(None);
        };
        // Also where it is there still: the file must not name what can't be had.
        self.write(&former)?;
        let there = self.report.after.as_ref() == Some(&pool(before)) || self.try_to_have(&former, capacity).await?;
        if there { Ok(Some(former)) } else { Err(self.short_of(&former)) }
    }

    /// Writes the file, restarts the stock service, and looks whether the pool is there, whatever the service says of itself.
    async fn try_to_have(&mut self, reservation: &Reservation, capacity: &Capacity) -> Result<bool, Failure> {
        let patience = self.until.saturating_duration_since(Instant::now()).min(RESTART);
        if patience.is_zero() {
            return Err(Failure::new(format!("there is no time left to try {reservation}")));
        }
        let file = file::former(&self.places.allocator_file)?;
        self.write(reservation)?;
        self.report.after = None;
        let restarted = self.service.restart(patience).await;
        if !matches!(restarted, Err(JobError::NotRun(_))) {
            self.report.restarts += 1;
        }
        let failure = restarted.as_ref().err().cloned().map(JobError::into_failure);
        self.report.service_failure.clone_from(&failure);
        match (restarted, failure) {
            // Neither more free memory nor another file helps where it does not run.
            (Err(JobError::NotRun(_)), Some(failure)) => {
                if self.report.restarts == 0
                    && let Err(failure) = self.put_back(file.as_deref())
                {
                    // It is asked for again, or written with the next change.
                    tracing::warn!("the allocator's file names what was not reserved: {failure}");
                }
                return Err(did_not_run(failure));
            }
            // What is done on top of one that still runs makes it worse; and while it runs, this is at work.
            (Err(JobError::Unknown(_)), Some(failure)) if !self.is_over().await => {
                self.still_at_work = true;
                return Err(Failure {
                    message: format!("what becomes of the pool is not known: {}", failure.message),
                    remedy: failure.remedy.or_else(|| Some(format!("look at `systemctl status {ALLOCATOR_UNIT}`"))),
                    code: None,
                });
            }
            _ => {}
        }
        let inventory = self.inventory.read().await;
        let seen = PoolNow::of(&inventory)?;
        self.report.after = Some(pool(&seen));
        seen.is_just(reservation, &inventory, capacity)
    }

    /// Waits until the stock service is over, as systemd says; `false`: that can't be known in time.
    async fn is_over(&self) -> bool {
        loop {
            match self.service.at_rest().await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(failure) => tracing::warn!("whether {ALLOCATOR_UNIT} is over is not known yet: {failure}"),
            }
            if Instant::now() + LOOK >= self.until {
                return false;
            }
            sleep(LOOK).await;
        }
    }

    /// Gives back the hugepages of the nodes that the pool has left: the stock service sees to those of the new node only. Nobody uses
    /// them, and they were the pool's. Only now, so that the former pool could have been had again.
    async fn give_back(&mut self, nodes: &[u32]) {
        for node in nodes {
            if let Err(failure) = self.free_pages(*node).await {
                self.report.failure = Some(failure);
            }
        }
    }

    /// Has the hugepages of all nodes as they were. What is more than that goes first, as its memory may be what the rest needs; then
    /// large ones come before small ones, which find memory in more places.
    async fn reserve_pages_again(&mut self, seen: &Inventory) -> Result<(), Failure> {
        let now = self.inventory.read().await;
        let mut more = Vec::new();
        for (node, of_node) in known(&seen.nodes)? {
            for (kib, former) in known(&of_node.hugepages)?.iter().rev() {
                let now = known(&now.nodes)?.get(node).and_then(|of| of.hugepages.known()?.get(kib));
                let (former, now) = (former.reserved(), now.map_or(0, Hugepages::reserved));
                match now.cmp(&former) {
                    Ordering::Greater => self.set_pages(*node, *kib, former)?,
                    Ordering::Less => more.push((*node, *kib, former)),
                    Ordering::Equal => {}
                }
            }
        }
        for (node, kib, pages) in more {
            self.set_pages(node, kib, pages)?;
        }
        let now = self.inventory.read().await;
        self.report.after = Some(pool(&PoolNow::of(&now)?));
        for node in known(&seen.nodes)?.keys() {
            let (former, there) = (seen.hugepages_on(*node)?.0, now.hugepages_on(*node)?.0);
            if there < former {
                return Err(Failure::new(format!("of {former} in hugepages on memory node {node} {there} are left")));
            }
        }
        Ok(())
    }

    fn set_pages(&self, node: u32, kib: u64, pages: u64) -> Result<(), Failure> {
        let path = format!("devices/system/node/node{node}/hugepages/hugepages-{kib}kB/nr_hugepages");
        let path = self.places.sysfs.join(path);
        std::fs::write(&path, format!("{pages}\n"))
            .map_err(|error| Failure::new(format!("writing {pages} to {}: {error}", path.display())))
    }

    async fn free_pages(&self, node: u32) -> Result<(), Failure> {
        let folder = self.places.sysfs.join(format!("devices/system/node/node{node}/hugepages"));
        let failed = |error: std::io::Error| {
            Failure::new(format!("freeing the hugepages of memory node {node} in {}: {error}", folder.display()))
        };
        for size in std::fs::read_dir(&folder).map_err(failed)? {
            let pages = size.map_err(failed)?.path().join("nr_hugepages");
            std::fs::write(&pages, "0\n").map_err(failed)?;
        }
        let (left, _) = self.inventory.read().await.hugepages_on(node)?;
        if left.0 > 0 {
            return Err(Failure::new(format!("{left} in hugepages of memory node {node} could not be freed"))
                .with_remedy("reboot: the pool has moved to another memory node"));
        }
        Ok(())
    }

    fn write(&mut self, reservation: &Reservation) -> Result<(), Failure> {
        let backup = file::write(&self.places.allocator_file, reservation)?;
        self.report.backup = self.report.backup.take().or(backup);
        self.wrote = Some(reservation.clone());
        Ok(())
    }

    /// The file as it was. What somebody else has written meanwhile stays.
    fn put_back(&self, former: Option<&[u8]>) -> Result<(), Failure> {
        let Some(wrote) = &self.wrote else { return Ok(()) };
        file::put_back(&self.places.allocator_file, wrote, former)
    }

    /// In numbers: what was asked for, and what is there.
    fn short_of(&self, wish: &Reservation) -> Failure {
        let there = match &self.report.after {
            Some(after) => {
                format!("the pool has {} CPUs ({}) and {} in hugepages", after.cpus.len(), after.cpus, after.memory)
            }
            None => "the pool was not read after the restart".to_owned(),
        };
        let said =
            self.report.service_failure.as_ref().map(|failure| format!(": {}", failure.message)).unwrap_or_default();
        Failure::new(format!("the allocator was asked for {wish}; {there}{said}"))
    }

    fn shortage(&self, wish: &Reservation, capacity: &Capacity, seen: &Inventory) -> Result<Shortage, Failure> {
        let failure = self.short_of(wish);
        if self.report.after.as_ref().is_none_or(|after| after.memory >= wish.memory_mib) {
            let remedy = format!("the journal of {ALLOCATOR_UNIT} says why it refused the CPUs");
            return Ok(failure.with_remedy(remedy).into());
        }
        let node = node_of(seen, wish)?;
        let of_node = capacity.nodes.iter().find(|candidate| node.is_none_or(|node| candidate.node == node));
        let pages = of_node.map_or(&[][..], |node| &node.pages_mib);
        // Where there is one node only, it needs no name.
        let named = node.filter(|_| capacity.nodes.len() > 1);
        let arguments = kernel_arguments(wish.memory_mib, pages, named);
        let since = if named.is_some() { " (Linux 5.16 or later)" } else { "" };
        let failure = failure.with_remedy(format!(
            "unless the journal of nitro-enclaves-allocator.service says otherwise, memory is in pieces: reboot (the file is in place, \
             and early after a boot it is in one piece), or reserve it on the kernel command line: {arguments}{since}"
        ));
        Ok(Shortage { failure, of_memory: true })
    }
}

fn pool(now: &PoolNow) -> Pool {
    Pool { cpus: now.cpus.clone(), memory: now.memory }
}

fn did_not_run(failure: Failure) -> Failure {
    Failure {
        message: format!("the stock allocator did not run: {}", failure.message),
        remedy: failure.remedy.or_else(|| Some(format!("`systemctl status {ALLOCATOR_UNIT}` says why"))),
        code: None,
    }
}

/// The stock service takes the CPUs and the memory of whatever runs away, or tries to: so nothing may run, nor be about to. An enclave
/// that boots has taken its memory before its socket is there.
fn nothing_runs(seen: &Inventory, wish: &Reservation) -> Result<(), Failure> {
    let (why, whose) = match (&seen.enclaves, in_use(seen, wish)?) {
        (Observation::Known(0), used) if used.0 == 0 => return Ok(()),
        (Observation::Known(0), used) => (
            format!("{used} of the hugepages are in use; an enclave may be booting"),
            "/proc/*/smaps shows whose they are",
        ),
        (Observation::Known(1), _) => ("1 enclave runs".to_owned(), "`nitro-cli describe-enclaves` lists them"),
        (Observation::Known(count), _) => (format!("{count} enclaves run"), "`nitro-cli describe-enclaves` lists them"),
        (Observation::Unknown(failure), _) => (
            format!("whether an enclave runs is not known: {}", failure.message),
            "`nitro-cli describe-enclaves` lists them",
        ),
    };
    Err(Failure::new(format!("{why}; what is reserved changes only while none does"))
        .with_remedy(format!("it is tried again when all have ended; {whose}")))
}

/// Asks the kernel to move pages together until free memory is in one piece, as far as it can be.
fn compact(compact_memory: &Path) -> std::io::Result<()> {
    std::fs::write(compact_memory, "1\n")
}
