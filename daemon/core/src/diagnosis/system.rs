//! What enclaved needs of the machine under it: a clock that is right, descriptors, room on the disk.

use super::{Check, Finding};
use crate::failure::Failure;
use crate::observed::Observation::{self, Known, Unknown};
use std::time::Duration;

/// Clock sources that a guest on EC2 can rely on: paravirtual, the CPU's own counter, and ARM's.
const GOOD_SOURCES: [&str; 3] = ["kvm-clock", "tsc", "arch_sys_counter"];

/// The kernel's clock source.
pub fn clock_source(seen: &Observation<String>) -> Finding {
    let check = Check::ClockSource;
    match seen {
        Known(name) if GOOD_SOURCES.contains(&name.as_str()) => Finding::ok(check, name),
        Known(name) => Finding::warning(
            check,
            format!("{name}: every look at the clock is slow, or the clock is not steady"),
            "remove clocksource= from the kernel's command line, or write kvm-clock, tsc or arch_sys_counter (what \
             /sys/devices/system/clocksource/clocksource0/available_clocksource has) to current_clocksource beside it",
        ),
        Unknown(failure) => Finding::unknown(check, failure),
    }
}

/// What is known of how right the clock is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClockSeen {
    /// What keeps it right, as far as it says that it does: `systemd-timesyncd`.
    pub kept_by: Option<String>,
    /// How far it is from others' clocks: whose, and by how much. They tell whole seconds.
    pub apart: Vec<(String, Duration)>,
}

/// AWS refuses requests that are signed with a clock this far off (SigV4).
const REFUSED: Duration = Duration::from_secs(15 * 60);
/// Others' clocks tell whole seconds, and their answers take time.
const NOTABLE: Duration = Duration::from_secs(5);
const SET_IT: &str =
    "`chronyc makestep`, or `timedatectl set-ntp true`; on EC2 169.254.169.123 serves the time to every instance";

/// How right the clock is.
pub fn clock_drift(seen: &Observation<ClockSeen>) -> Finding {
    let check = Check::ClockDrift;
    let seen = match seen {
        Known(seen) => seen,
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    let farthest = seen.apart.iter().max_by_key(|(_, apart)| *apart);
    let kept = match &seen.kept_by {
        Some(who) => format!("kept by {who}"),
        None => "nothing is known to keep it".to_owned(),
    };
    match farthest {
        Some((who, apart)) if *apart >= REFUSED => Finding::failure(
            check,
            format!("{} s apart from the clock of {who}: AWS refuses what is signed by it; {kept}", apart.as_secs()),
            SET_IT,
        ),
        Some((who, apart)) if *apart >= NOTABLE => {
            Finding::warning(check, format!("{} s apart from the clock of {who}; {kept}", apart.as_secs()), SET_IT)
        }
        _ if seen.kept_by.is_none() => Finding::warning(
            check,
            "neither systemd-timesyncd nor chrony says that it keeps the clock",
            "`systemctl enable --now chronyd`, or systemd-timesyncd",
        ),
        Some((who, _)) => Finding::ok(check, format!("{kept}; the same time as {who}")),
        None => Finding::ok(check, kept),
    }
}

/// The limit of open files of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescriptorsSeen {
    /// Whose: `the running daemon`.
    pub whose: String,
    /// The limit.
    pub limit: u64,
    /// How many are open.
    pub open: Option<u64>,
}

/// Below this no launch is tried: nitro-cli without descriptors ends enclaves.
const SPARE: u64 = 64;
/// With fewer the daemon alone can run out.
const LEAST: u64 = 512;
/// What busy ingress needs: two for each connection.
const COMFORTABLE: u64 = 8192;

/// Open files.
pub fn file_descriptors(seen: &Observation<DescriptorsSeen>) -> Finding {
    let check = Check::FileDescriptors;
    let DescriptorsSeen { whose, limit, open } = match seen {
        Known(seen) => seen,
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    let remedy = "LimitNOFILE=65536 in the unit";
    match open {
        Some(open) if open.saturating_add(SPARE) > *limit => Finding::failure(
            check,
            format!("{whose} has {open} of {limit} descriptors open, and launches nothing with so few left"),
            remedy,
        ),
        _ if *limit < LEAST => {
            Finding::failure(check, format!("{whose} may open {limit} files; {LEAST} are the least"), remedy)
        }
        _ if *limit < COMFORTABLE => {
            let text = format!("{whose} may open {limit} files; each connection takes two");
            Finding::warning(check, text, remedy)
        }
        Some(open) => Finding::ok(check, format!("{whose} may open {limit} files, {open} are")),
        None => Finding::ok(check, format!("{whose} may open {limit} files")),
    }
}

/// The file system that images are kept on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSeen {
    /// The folder.
    pub path: String,
    /// Bytes that users may still write.
    pub free: u64,
    /// Files that users may still make; `None`: as many as there is room for.
    pub free_inodes: Option<u64>,
    /// Why the daemon's user can't write there, if it can't.
    pub kept_from: Option<String>,
}

/// With less nothing can be relied on: ledger, routes and logs are written, too.
const LEAST_FREE: u64 = 64 << 20;
const LEAST_INODES: u64 = 64;

/// Room for images: `image_bytes` are the sizes of those that are not in the cache, added up.
pub fn disk(seen: &Observation<DiskSeen>, image_bytes: u64) -> Finding {
    let check = Check::Disk;
    let seen = match seen {
        Known(seen) => seen,
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    let mib = |bytes: u64| bytes >> 20;
    // Beside an image stands its successor while it is fetched.
    let wanted = image_bytes.saturating_mul(2).max(LEAST_FREE);
    let DiskSeen { path, free, .. } = seen;
    let text = format!("{} MiB are free for {path}", mib(*free));
    let remedy = "remove what is not needed there, enlarge the volume, lower image_cache_mib, or set host.state_dir";
    if let Some(why) = &seen.kept_from {
        return Finding::failed(check, &Failure::new(why).with_remedy(format!("give {path} to the daemon's user")));
    }
    if seen.free_inodes.is_some_and(|inodes| inodes < LEAST_INODES) {
        let text = format!("{} files can still be made on the file system of {path}", seen.free_inodes.unwrap_or(0));
        return Finding::failure(check, text, "remove small files there: its inodes are used up");
    }
    if *free < image_bytes.max(LEAST_FREE) {
        let text = format!("{text}; {} MiB are needed", mib(image_bytes.max(LEAST_FREE)));
        return Finding::failure(check, text, remedy);
    }
    if *free < wanted {
        let text = format!("{text}; the images to be fetched, and their successors, take {} MiB", mib(wanted));
        return Finding::warning(check, text, remedy);
    }
    Finding::ok(check, text)
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn a_slow_clock_source_warns() {
        assert_eq!(clock_source(&Known("kvm-clock".to_owned())).outcome, Outcome::Ok);
        let finding = clock_source(&Known("hpet".to_owned()));
        assert_eq!(finding.outcome, Outcome::Warning);
        assert!(finding.remedy.unwrap().contains("current_clocksource"));
        assert_eq!(clock_source(&Unknown(Failure::new("no sysfs"))).outcome, Outcome::Unknown);
    }

    fn clock(kept: bool, apart: &[u64]) -> Finding {
        let apart = apart.iter().map(|seconds| ("S3".to_owned(), Duration::from_secs(*seconds))).collect();
        clock_drift(&Known(ClockSeen { kept_by: kept.then(|| "chrony".to_owned()), apart }))
    }

    #[test]
    fn a_clock_that_aws_would_refuse_fails_whatever_keeps_it() {
        assert_eq!(clock(true, &[0, 900]).outcome, Outcome::Failure);
        assert_eq!(clock(true, &[899]).outcome, Outcome::Warning);
        assert_eq!(clock(true, &[4]).outcome, Outcome::Ok);
        assert_eq!(clock(true, &[]).outcome, Outcome::Ok);
        assert_eq!(clock(false, &[0]).outcome, Outcome::Warning, "right now, and nothing keeps it so");
    }

    #[test]
    fn too_few_descriptors_fail_and_few_warn() {
        let of = |limit, open| {
            file_descriptors(&Known(DescriptorsSeen { whose: "the daemon".to_owned(), limit, open })).outcome
        };
        assert_eq!(of(65_536, Some(40)), Outcome::Ok);
        assert_eq!(of(1024, Some(40)), Outcome::Warning);
        assert_eq!(of(256, None), Outcome::Failure);
        assert_eq!(of(65_536, Some(65_500)), Outcome::Failure);
    }

    #[test]
    fn a_disk_without_room_inodes_or_rights_fails_and_one_without_room_for_the_next_image_warns() {
        let whole = DiskSeen { path: "/var".to_owned(), free: 1 << 30, free_inodes: Some(1000), kept_from: None };
        let of = |seen: DiskSeen, bytes| disk(&Known(seen), bytes).outcome;
        assert_eq!(of(whole.clone(), 100 << 20), Outcome::Ok);
        assert_eq!(of(whole.clone(), 600 << 20), Outcome::Warning);
        assert_eq!(of(whole.clone(), 1100 << 20), Outcome::Failure);
        assert_eq!(of(DiskSeen { free: 1 << 20, ..whole.clone() }, 0), Outcome::Failure);
        assert_eq!(of(DiskSeen { free_inodes: Some(3), ..whole.clone() }, 0), Outcome::Failure);
        assert_eq!(of(DiskSeen { kept_from: Some("may not write".to_owned()), ..whole.clone() }, 0), Outcome::Failure);
        assert_eq!(of(DiskSeen { free_inodes: None, ..whole }, 0), Outcome::Ok);
    }
}
