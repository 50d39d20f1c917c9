//! Finds and ends the processes that belong to a simulated host, however they were started and whoever their parent is
//! now: they carry the path of the host's folder in their arguments or in their environment.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// How long killed processes may take to disappear.
const DEADLINE: Duration = Duration::from_secs(10);

fn carries(pid: i32, marker: &[u8]) -> bool {
    let contains = |bytes: &[u8]| bytes.windows(marker.len()).any(|window| window == marker);
    // A process that has ended, or is somebody else's, shows nothing.
    ["cmdline", "environ"]
        .iter()
        .any(|file| fs::read(format!("/proc/{pid}/{file}")).is_ok_and(|bytes| contains(&bytes)))
}

/// The processes that carry this path, but for the one that asks. Those that have ended are not among them, even if
/// nobody has waited for them.
pub fn carrying(marker: &Path) -> Vec<i32> {
    let marker = marker.as_os_str().as_encoded_bytes();
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != own && !marker.is_empty() && carries(*pid, marker)).collect()
}

/// Kills all that carry this path, and those that they start meanwhile; gives those that are still there at the end.
pub fn end_all(marker: &Path) -> Vec<i32> {
    let began = Instant::now();
    loop {
        let found = carrying(marker);
        if found.is_empty() || began.elapsed() > DEADLINE {
            return found;
        }
        for pid in found {
            let Some(fd) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
                continue;
            };
            // Looked at again now that the number can't be given to another process.
            if carries(pid, marker.as_os_str().as_encoded_bytes()) {
                // One that has just ended needs no signal; one that can't be signalled is reported above.
                let _ignored = pidfd_send_signal(&fd, Signal::KILL);
                // Until it has really ended: one that is ending shows nothing any more, and still holds its files.
                let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
                let _ignored = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit));
            }
        }
    }
}

/// A process that ends with this, with no say in it.
#[derive(Debug)]
pub struct Owned(pub Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // It may have ended by itself, which who asked it has noticed.
        let _ignored = self.0.kill();
        let _ignored = self.0.wait();
    }
}

/// Sends a signal to one process.
///
/// # Errors
/// When there is no such process, or it belongs to somebody else.
pub fn signal(pid: u32, signal: Signal) -> std::io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(std::io::ErrorKind::InvalidInput)?;
    Ok(pidfd_send_signal(pidfd_open(pid, PidfdFlags::empty())?, signal)?)
}

/// These and all that they started, and what those did. By the parents that processes name: not every kernel lists children.
pub fn with_descendants(mut pids: Vec<u32>) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // Behind the name, which may hold anything: state, parent.
            Some((pid, stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()?))
        })
        .collect();
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        pids.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| child));
        next += 1;
    }
    pids
}

/// Whether a process is there and has not ended with all its threads; one that has, and that nobody has waited for yet,
/// is not.
pub fn is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    let ended = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    ended == Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn descendants_are_children_and_theirs() {
        let mut shell = Command::new("sh").args(["-c", "(sleep 600 & wait) & wait"]).spawn().unwrap();
        let began = Instant::now();
        let all = loop {
            let all = with_descendants(vec![shell.id()]);
            if all.len() >= 3 || began.elapsed() > DEADLINE {
                break all;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        for pid in all.iter().rev() {
            signal(*pid, Signal::KILL).unwrap();
        }
        shell.wait().unwrap();
        assert!(all.len() == 3 && all[0] == shell.id(), "{all:?}");
        assert!(!with_descendants(vec![std::process::id()]).contains(&shell.id()));
    }

    #[test]
    fn a_process_is_found_by_its_environment_and_by_its_arguments_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut by_environment =
            Command::new("sleep").arg("600").env("SOMEWHERE", folder.path().join("x")).spawn().unwrap();
        let mut by_arguments = Command::new("tail")
            .args(["-f", "/dev/null"])
            .arg(folder.path().join("y"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut other = Command::new("sleep").arg("600").spawn().unwrap();
        assert!(is_alive(by_environment.id()));
        assert_eq!(end_all(folder.path()), [] as [i32; 0]);
        assert!(!is_alive(by_environment.id()) && !is_alive(by_arguments.id()));
        by_environment.wait().unwrap();
        by_arguments.wait().unwrap();
        assert!(is_alive(other.id()));
        signal(other.id(), Signal::KILL).unwrap();
        other.wait().unwrap();
    }
}
