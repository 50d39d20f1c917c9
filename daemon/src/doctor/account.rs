//! For whom the host is judged: the process that enclaves are launched by, or, where the daemon does not run, the user that its unit
//! would run it as. Reads /proc, /etc/passwd, /etc/group and the unit file; asks no name service.

use super::Patient;
use crate::host::inventory::Roots;
use enclaved_core::diagnosis::access::Account;
use enclaved_core::diagnosis::system::DescriptorsSeen;
use enclaved_core::failure::Failure;
use std::collections::BTreeSet;
use std::path::Path;

/// The user of the daemon, unless its unit says another.
const USER: &str = "enclaved";
/// CAP_NET_BIND_SERVICE (capabilities(7)).
const NET_BIND_SERVICE: u64 = 1 << 10;
/// More than any of these files has.
const MAX_FILE: u64 = 4 << 20;

/// Where the unit may be, the one that counts first.
const UNITS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

/// What a process is and may, as its `status` says (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Credentials {
    uid: u32,
    groups: BTreeSet<u32>,
    capabilities: u64,
}

/// The daemon's user.
pub(super) fn account(roots: &Roots, patient: Patient) -> Result<Account, Failure> {
    let of_process = |pid: Option<u32>, how: &str| {
        let process = credentials(roots, pid)?;
        let (uid, groups) = (process.uid, process.groups);
        Ok(Account { name: name_of(roots, uid), uid, groups, is_this_process: pid.is_none(), how: how.to_owned() })
    };
    match patient {
        Patient::Itself => of_process(None, "the daemon itself"),
        Patient::Running { daemon } => of_process(Some(daemon), &format!("the running daemon, process {daemon}")),
        Patient::NotRunning => {
            let unit = unit(roots);
            let user = value(&unit, "User").unwrap_or(USER);
            match of_files(roots, user, value(&unit, "SupplementaryGroups").unwrap_or_default()) {
                Some(account) => Ok(account),
                None => {
                    of_process(None, &format!("the user that asks; there is no user {user}, and enclaved does not run"))
                }
            }
        }
    }
}

/// The user's entries in the files, with the groups that its unit adds; `None`: there is no such user.
fn of_files(roots: &Roots, user: &str, more_groups: &str) -> Option<Account> {
    let passwd = text(&roots.root.join("etc/passwd")).ok()?;
    let entry =
        passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields.first() == Some(&user))?;
    let (uid, gid) = (entry.get(2)?.parse().ok()?, entry.get(3)?.parse().ok()?);
    let mut groups = BTreeSet::from([gid]);
    for line in text(&roots.root.join("etc/group")).unwrap_or_default().lines() {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, number, members] = fields[..] else { continue };
        let is_in =
            members.split(',').any(|member| member == user) || more_groups.split_whitespace().any(|g| g == name);
        if let (true, Ok(number)) = (is_in, number.parse()) {
            groups.insert(number);
        }
    }
    let how = format!("user {user} by /etc/passwd, /etc/group and the unit; enclaved does not run");
    Some(Account { name: user.to_owned(), uid, groups, is_this_process: false, how })
}

fn name_of(roots: &Roots, uid: u32) -> String {
    let passwd = text(&roots.root.join("etc/passwd")).unwrap_or_default();
    let number = uid.to_string();
    let entry = passwd.lines().find(|line| line.split(':').nth(2) == Some(number.as_str()));
    entry.and_then(|line| line.split(':').next()).map_or(number.clone(), str::to_owned)
}

/// The number of a user of that name in /etc/passwd.
pub(super) fn uid_of(roots: &Roots, user: &str) -> Option<u32> {
    Some(of_files(roots, user, "")?.uid)
}

/// Whether the proxy may bind low ports where the daemon starts it itself: it inherits what the daemon may.
pub(super) fn may_bind_low_ports(roots: &Roots, patient: Patient) -> Option<bool> {
    let pid = match patient {
        Patient::Itself => None,
        Patient::Running { daemon } => Some(daemon),
        Patient::NotRunning => return None,
    };
    Some(credentials(roots, pid).ok()?.capabilities & NET_BIND_SERVICE != 0)
}

/// How many files the daemon may open, and has open.
pub(super) fn descriptors(roots: &Roots, patient: Patient) -> Result<DescriptorsSeen, Failure> {
    let of_process = |pid: Option<u32>, whose: &str| {
        let folder = process(roots, pid);
        let path = folder.join("limits");
        let limits = text(&path)?;
        let limit = soft_limit(&limits).ok_or_else(|| Failure::new(format!("{} is not understood", path.display())))?;
        // Of another user's process only root may see it.
        let open = std::fs::read_dir(folder.join("fd")).ok().map(|entries| entries.count() as u64);
        Ok(DescriptorsSeen { whose: whose.to_owned(), limit, open })
    };
    match patient {
        Patient::Itself => of_process(None, "the daemon"),
        Patient::Running { daemon } => of_process(Some(daemon), "the running daemon"),
        Patient::NotRunning => {
            let unit = unit(roots);
            // `soft:hard`, or one number for both.
            let limit = value(&unit, "LimitNOFILE").and_then(|limit| limit.split(':').next()?.parse().ok());
            match limit {
                Some(limit) => Ok(DescriptorsSeen { whose: "enclaved.service".to_owned(), limit, open: None }),
                None => of_process(None, "this very command (enclaved does not run, and its unit sets no limit)"),
            }
        }
    }
}

fn process(roots: &Roots, pid: Option<u32>) -> std::path::PathBuf {
    roots.procfs.join(pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string()))
}

fn credentials(roots: &Roots, pid: Option<u32>) -> Result<Credentials, Failure> {
    let path = process(roots, pid).join("status");
    parse_status(&text(&path)?).ok_or_else(|| Failure::new(format!("{} is not understood", path.display())))
}

fn parse_status(text: &str) -> Option<Credentials> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    // Real, effective, saved, of files: the second is the one that counts.
    let effective = |name: &str| field(name)?.split_whitespace().nth(1)?.parse().ok();
    let mut groups: BTreeSet<u32> =
        field("Groups")?.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    groups.insert(effective("Gid")?);
    let capabilities = u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?;
    Some(Credentials { uid: effective("Uid")?, groups, capabilities })
}

fn soft_limit(limits: &str) -> Option<u64> {
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
}

/// The unit of the daemon; empty if there is none. Drop-ins are not looked at.
fn unit(roots: &Roots) -> String {
    UNITS.iter().find_map(|folder| text(&roots.root.join(folder).join("enclaved.service")).ok()).unwrap_or_default()
}

/// The last value of a setting.
fn value<'a>(unit: &'a str, key: &str) -> Option<&'a str> {
    let of_line = |line: &'a str| line.trim().strip_prefix(key)?.trim_start().strip_prefix('=');
    unit.lines().filter_map(of_line).map(str::trim).next_back().filter(|value| !value.is_empty())
}

fn text(path: &Path) -> Result<String, Failure> {
    super::files::text(path, MAX_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    const STATUS: &str = "Name:\tenclaved\nUid:\t0\t990\t990\t990\nGid:\t990\t990\t990\t990\nGroups:\t991 992 \n\
                          CapEff:\t0000000000000400\n";

    fn host(files: &[(&str, &str)]) -> (TempDir, Roots) {
        let folder = tempfile::tempdir().unwrap();
        for (path, contents) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        let roots = Roots::below(folder.path());
        (folder, roots)
    }

    #[test]
    fn a_running_daemon_is_judged_by_what_its_process_has() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 20000                files\n";
        let files =
            [("proc/12/status", STATUS), ("proc/12/limits", limits), ("etc/passwd", "enclaved:x:990:990::/:\n")];
        let (_folder, roots) = host(&files);
        let running = Patient::Running { daemon: 12 };
        let account = account(&roots, running).unwrap();
        assert_eq!((account.name.as_str(), account.uid, account.is_this_process), ("enclaved", 990, false));
        assert_eq!(account.groups, [990, 991, 992].into());
        assert_eq!(may_bind_low_ports(&roots, running), Some(true));
        assert_eq!(descriptors(&roots, running).unwrap().limit, 1024);
        assert!(descriptors(&roots, Patient::Running { daemon: 13 }).is_err());
    }

    #[test]
    fn a_daemon_that_does_not_run_is_judged_by_its_user_and_unit() {
        let unit = "[Service]\nUser=enclaved\nSupplementaryGroups=ne\nLimitNOFILE=65536\n";
        let group = "root:x:0:\nenclaved:x:990:\nne:x:991:\nsystemd-journal:x:992:alice,enclaved\n";
        let files = [
            ("etc/passwd", "root:x:0:0::/:\nenclaved:x:990:990::/:/usr/sbin/nologin\n"),
            ("etc/group", group),
            ("usr/lib/systemd/system/enclaved.service", unit),
        ];
        let (folder, roots) = host(&files);
        let account = account(&roots, Patient::NotRunning).unwrap();
        assert_eq!((account.uid, account.groups), (990, [990, 991, 992].into()));
        assert_eq!(descriptors(&roots, Patient::NotRunning).unwrap().limit, 65_536);
        fs::remove_file(folder.path().join("usr/lib/systemd/system/enclaved.service")).unwrap();
        let without = super::account(&roots, Patient::NotRunning).unwrap();
        assert_eq!(without.groups, [990, 992].into(), "neither it nor its unit is in group ne");
    }

    #[test]
    fn where_there_is_no_such_user_whoever_asks_is_judged_and_told_so() {
        let (_folder, roots) = host(&[("proc/self/status", STATUS), ("etc/passwd", "root:x:0:0::/:\n")]);
        let account = account(&roots, Patient::NotRunning).unwrap();
        assert!(account.is_this_process && account.how.contains("there is no user enclaved"), "{account:?}");
    }

    #[test]
    fn this_very_process_is_read_from_the_real_proc() {
        let roots = Roots::default();
        let account = account(&roots, Patient::Itself).unwrap();
        assert_eq!(account.uid, rustix::process::geteuid().as_raw());
        assert!(descriptors(&roots, Patient::Itself).unwrap().open.unwrap() >= 3);
    }
}
