//! Want of memory, made from outside a machine: systemd in it has no memory controller of its own, and the kernel kills in earnest.

use super::Machine;
use anyhow::{Context as _, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// No program lives on so little.
const LIMIT: &str = "16384";

/// Processes that may take no more memory, until this is dropped.
#[derive(Debug)]
pub struct Starved {
    group: PathBuf,
}

impl Starved {
    /// From now on a process of the machine, by its number in there, gets no more memory: the kernel kills it when it asks for some.
    ///
    /// # Errors
    /// There is no such process, or this computer lets nobody limit memory.
    pub fn process(machine: &Machine, pid: u32) -> anyhow::Result<Self> {
        let outside = machine.outside(pid)?;
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let own = groups.lines().find_map(|line| line.split_once(":memory:")).map(|(_, own)| own.trim_end_matches('/'));
        let Some(own) = own else { bail!("this computer has no tree of groups for the memory controller (cgroup v1)") };
        let group = Path::new("/sys/fs/cgroup/memory").join(own.trim_start_matches('/'));
        let group = group.join(format!("enclaved-machine-{}-{pid}", machine.name()));
        fs::create_dir(&group).with_context(|| format!("making {}", group.display()))?;
        let starved = Self { group };
        fs::write(starved.group.join("memory.limit_in_bytes"), LIMIT).context("limiting memory")?;
        // What it has already is not counted.
        fs::write(starved.group.join("cgroup.procs"), outside.to_string()).context("taking a process in")?;
        Ok(starved)
    }

    /// How many processes the kernel killed for it.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn killed(&self) -> anyhow::Result<u64> {
        let text = fs::read_to_string(self.group.join("memory.oom_control"))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("no count of kills")?.trim().parse()?)
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        // Whoever is left goes on where it was before.
        let above = self.group.with_file_name("cgroup.procs");
        for pid in fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ignored = fs::write(&above, pid);
        }
        if let Err(error) = fs::remove_dir(&self.group) {
            eprintln!("{}: {error}", self.group.display());
        }
    }
}
