//! What `/proc` says of processes and of this boot. Reading and parsing only: no decisions, no signals.

use enclaved_core::id::{BootId, Timestamp};
use enclaved_core::ledger::ProcessIdentity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// No file read here is longer; `/proc/<pid>/stat` has a few hundred bytes.
const MAX_FILE: u64 = 64 * 1024;
/// No environment that is searched is longer.
const MAX_ENVIRONMENT: u64 = 2 << 20;
/// How often, and how long after each other, is looked at a process that shows no environment.
const EXEC_LOOKS: u32 = 10;
const EXEC_PAUSE: Duration = Duration::from_millis(5);
/// That no process has a variable is concluded from so many looks, at this distance.
const LOOKS: u32 = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Clock ticks a second in what `/proc` shows: 100 on every Linux architecture that has Nitro (`USER_HZ`).
const TICKS_PER_SECOND: u64 = 100;

/// A live process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its PID and when it was started.
    pub identity: ProcessIdentity,
    /// The first 15 bytes of its executable's name, unless it changed that.
    pub name: String,
}

/// The process of that PID; `None` if there is none, or only its zombie.
///
/// # Errors
/// `/proc` can't be read (no descriptors left, hidden by its mount options): nothing is known of the process.
pub fn process(pid: u32) -> io::Result<Option<Process>> {
    let text = match read(Path::new(&format!("/proc/{pid}/stat"))) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return if is_hidden(pid)? { Err(hidden(pid)) } else { Ok(None) },
        Err(error) => return Err(error),
    };
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not understood"));
    let (name, state, start_time) = parse_stat(&text).ok_or_else(malformed)?;
    // A zombie has ended; it is only not yet waited for (in a container whose first process does not do that: never).
    let over = matches!(state, 'Z' | 'X' | 'x');
    let identity = ProcessIdentity { pid, start_time };
    Ok((!over).then(|| Process { identity, name: name.to_owned() }))
}

/// Whether exactly this process lives, not another one that has its PID by now.
///
/// # Errors
/// As [`process`].
pub fn is_alive(identity: ProcessIdentity) -> io::Result<bool> {
    Ok(process(identity.pid)?.is_some_and(|process| process.identity == identity))
}

/// Whether the process of that PID was started with exactly that variable in its environment, or forked from one that was.
/// False if there is no such process.
///
/// # Errors
/// Its environment can't be read: it belongs to another user, say.
pub fn has_variable(pid: u32, name: &str, value: &OsStr) -> io::Result<bool> {
    let mut environment = environment(pid)?;
    for _ in 0..EXEC_LOOKS {
        if !environment.is_empty() {
            break;
        }
        // The kernel shows none for a moment while a process becomes another program.
        std::thread::sleep(EXEC_PAUSE);
        environment = self::environment(pid)?;
    }
    Ok(holds(&environment, name, value))
}

/// The variables that the process was started with, each with a NUL behind it; nothing if there is no such process.
fn environment(pid: u32) -> io::Result<Vec<u8>> {
    match read_bytes(Path::new(&format!("/proc/{pid}/environ")), MAX_ENVIRONMENT) {
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        other => other,
    }
}

fn holds(environment: &[u8], name: &str, value: &OsStr) -> bool {
    let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
    environment.split(|byte| *byte == 0).any(|variable| variable == entry)
}

/// Whether any process lives that [`has_variable`]. Those whose environment can't be read are left out.
///
/// # Errors
/// `/proc` can't be listed.
pub fn any_has_variable(name: &str, value: &OsStr) -> io::Result<bool> {
    // One look can miss a process that begins another program just then, whose environment is empty for a moment, and a child whose
    // parent ends while it is made.
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(LOOK_PAUSE);
        }
        if any_seen_with_variable(name, value)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn any_seen_with_variable(name: &str, value: &OsStr) -> io::Result<bool> {
    for entry in std::fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        if pid.is_some_and(|pid| environment(pid).is_ok_and(|environment| holds(&environment, name, value))) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether that process is in the control group of this one; a service manager takes all others for somebody else's.
///
/// # Errors
/// `/proc` can't be read, or the process is gone.
pub fn same_control_group(pid: u32) -> io::Result<bool> {
    Ok(read(Path::new(&format!("/proc/{pid}/cgroup")))? == read(Path::new("/proc/self/cgroup"))?)
}

/// This very process.
///
/// # Errors
/// As [`process`].
pub fn own_identity() -> io::Result<ProcessIdentity> {
    let own = process(std::process::id())?;
    own.map(|process| process.identity).ok_or_else(|| io::Error::other("/proc does not show this very process"))
}

/// Which boot of the host this is.
///
/// # Errors
/// `/proc` is not mounted, or its file is not what it should be.
pub fn boot_id() -> io::Result<BootId> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = read(Path::new(path))?;
    let id = text.trim();
    if id.is_empty() || id.len() > 64 || !id.chars().all(|c| c.is_ascii_hexdigit() || c == '-') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{path} is not understood")));
    }
    Ok(BootId(id.to_owned()))
}

/// When the host was booted, by its present clock: it moves when the clock is set.
///
/// # Errors
/// As [`boot_id`].
pub fn boot_time() -> io::Result<Timestamp> {
    let text = read(Path::new("/proc/stat"))?;
    let seconds = text.lines().find_map(|line| line.strip_prefix("btime ")).and_then(|value| value.trim().parse().ok());
    let seconds: u64 =
        seconds.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/stat has no line btime"))?;
    Ok(Timestamp::from_millis(seconds.saturating_mul(1000)))
}

/// How long ago the host was booted, to a hundredth of a second. Setting the clock does not change it.
///
/// # Errors
/// As [`boot_id`].
pub fn since_boot() -> io::Result<Duration> {
    let path = "/proc/uptime";
    let text = read(Path::new(path))?;
    let seconds = text.split_whitespace().next().and_then(|seconds| seconds.parse().ok());
    let since = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    since.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} is not understood")))
}

/// How long after the boot that process was started.
pub fn started_after_boot(identity: ProcessIdentity) -> Duration {
    Duration::from_millis(identity.start_time.saturating_mul(1000 / TICKS_PER_SECOND))
}

/// How many descriptors this process has open.
///
/// # Errors
/// `/proc/self/fd` can't be read, which is the case when no descriptor is left.
pub fn open_descriptors() -> io::Result<u64> {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc/self/fd")? {
        entry?;
        count += 1;
    }
    // The one that was opened for counting.
    Ok(u64::saturating_sub(count, 1))
}

/// How many files are open on the whole host, and how many may be.
///
/// # Errors
/// As [`boot_id`].
pub fn host_files() -> io::Result<(u64, u64)> {
    let path = "/proc/sys/fs/file-nr";
    let text = read(Path::new(path))?;
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(open)), Some(Ok(_)), Some(Ok(limit))) => Ok((open, limit)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{path} is not understood"))),
    }
}

/// Name, state and start time. The name stands in parentheses and may hold any character, parentheses among them.
fn parse_stat(text: &str) -> Option<(&str, char, u64)> {
    let (before, after) = text.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let mut fields = after.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22 of the line is the 20th after the name, the state being the first.
    let start_time = fields.nth(18)?.parse().ok()?;
    Some((name, state, start_time))
}

/// Whether a process lives that `/proc` does not show.
fn is_hidden(pid: u32) -> io::Result<bool> {
    let path = format!("/proc/{pid}/stat");
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
    let descriptor = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(descriptor) => descriptor,
        // EINVAL: the PID is a thread's, whose process has another one.
        Err(Errno::SRCH | Errno::INVAL) => return Ok(false),
        // Without pidfds nothing can be said beyond what /proc says.
        Err(Errno::NOSYS) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // A process that was started since the first look is no reason for alarm: now it is shown.
    Ok(!has_ended(&descriptor)? && !Path::new(&path).exists())
}

/// A pidfd becomes readable when its process ends.
fn has_ended(descriptor: &OwnedFd) -> io::Result<bool> {
    let mut watched = [PollFd::new(descriptor, PollFlags::IN)];
    Ok(poll(&mut watched, Some(&Timespec::default()))? > 0)
}

fn hidden(pid: u32) -> io::Error {
    io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "process {pid} lives, and is hidden by the mount options of /proc: remount it without hidepid, or with gid= of a group this user is in"
        ),
    )
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

fn read(path: &Path) -> io::Result<String> {
    // A process may give itself a name that is not UTF-8.
    Ok(String::from_utf8_lossy(&read_bytes(path, MAX_FILE)?).into_owned())
}

fn read_bytes(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_nobody_with_its_pid_and_another_start_time_is() {
        let own = own_identity().unwrap();
        assert!(is_alive(own).unwrap());
        assert!(!is_alive(ProcessIdentity { start_time: own.start_time + 1, ..own }).unwrap());
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while process(pid).unwrap().is_some() {
            assert!(std::time::Instant::now() < deadline, "true did not end");
            std::thread::yield_now();
        }
        assert!(Path::new(&format!("/proc/{pid}/stat")).exists(), "the zombie should still be there");
        child.wait().unwrap();
        assert_eq!(process(pid).unwrap(), None);
    }

    #[test]
    fn a_process_that_proc_does_not_show_is_told_from_one_that_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let raw = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let descriptor = pidfd_open(raw, PidfdFlags::empty()).unwrap();
        assert!(!has_ended(&descriptor).unwrap());
        assert!(!is_hidden(child.id()).unwrap(), "this one is shown");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&descriptor).unwrap());
        assert!(!is_hidden(child.id()).unwrap());
    }

    #[test]
    fn a_process_is_known_by_what_its_environment_held_at_its_start() {
        let value = OsStr::new("/run/x/signer-3");
        let mut child =
            std::process::Command::new("sleep").arg("600").env("ENCLAVED_TEST_MARK", value).spawn().unwrap();
        let (pid, name) = (child.id(), "ENCLAVED_TEST_MARK");
        let seen = (
            has_variable(pid, name, value).unwrap(),
            has_variable(pid, name, OsStr::new("/run/x/signer")).unwrap(),
            any_has_variable(name, value).unwrap(),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, (true, false, true));
        assert!(!has_variable(pid, name, value).unwrap());
        assert!(!any_has_variable(name, value).unwrap());
    }

    #[test]
    fn a_process_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let line = "7 (a) R (b 1 2) S 1 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 4242 1 2 3";
        assert_eq!(parse_stat(line), Some(("a) R (b 1 2", 'S', 4242)));
        assert_eq!(parse_stat("7 (a S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn this_boot_has_an_identity_and_began_in_the_past() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
        assert!(boot_time().unwrap() < Timestamp::from(std::time::SystemTime::now()));
        let own = own_identity().unwrap();
        assert!(since_boot().unwrap() + Duration::from_secs(1) > started_after_boot(own));
        let (open, limit) = host_files().unwrap();
        assert!(open > 0 && limit > open);
        assert!(open_descriptors().unwrap() >= 3);
    }
}
