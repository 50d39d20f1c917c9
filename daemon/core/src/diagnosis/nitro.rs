//! What stands between this host and the Nitro hypervisor: driver, device, nitro-cli and its folders, and the one vsock port that
//! booting enclaves call.

use super::access::{Account, ENTER, Node, NodeKind, PathSeen, READ, WRITE};
use super::{Check, Finding};
use crate::failure::Failure;
use crate::inventory::{Device, Inventory};
use crate::observed::Observation::{self, Known, Unknown};

const NO_ENCLAVES: &str = "the instance was started without enclaves: stop it and set `aws ec2 modify-instance-attribute \
     --enclave-options`, or start another with `--enclave-options Enabled=true`";

/// The driver.
pub fn driver(inventory: &Inventory) -> Finding {
    match &inventory.driver_loaded {
        Known(true) => Finding::ok(Check::Driver, "nitro_enclaves is loaded"),
        Known(false) => Finding::failure(
            Check::Driver,
            "the nitro_enclaves driver is not loaded",
            "start the instance with enclaves enabled (`--enclave-options Enabled=true`), install aws-nitro-enclaves-cli, and run \
             `modprobe nitro_enclaves`",
        ),
        Unknown(failure) => Finding::unknown(Check::Driver, failure),
    }
}

/// The device.
pub fn device(inventory: &Inventory) -> Finding {
    match &inventory.device {
        Known(Device::Present { character_device: true, mode, uid, gid, .. }) => {
            Finding::ok(Check::Device, format!("/dev/nitro_enclaves, mode {mode:04o}, user {uid}, group {gid}"))
        }
        Known(Device::Present { character_device: false, .. }) => Finding::failure(
            Check::Device,
            "/dev/nitro_enclaves is no device",
            "remove it, then `modprobe -r nitro_enclaves && modprobe nitro_enclaves`",
        ),
        Known(Device::Absent) if inventory.driver_loaded == Known(true) => {
            Finding::failure(Check::Device, "/dev/nitro_enclaves is missing though the driver is loaded", NO_ENCLAVES)
        }
        Known(Device::Absent) => Finding::failure(
            Check::Device,
            "/dev/nitro_enclaves is missing",
            format!("load the driver (`modprobe nitro_enclaves`); if that does not help, {NO_ENCLAVES}"),
        ),
        Unknown(failure) => Finding::unknown(Check::Device, failure),
    }
}

/// Whether the daemon's user may open the device.
pub fn device_group(inventory: &Inventory, account: &Observation<Account>) -> Finding {
    let check = Check::DeviceGroup;
    let account = match account {
        Known(account) => account,
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    let (mode, uid, gid, openable) = match &inventory.device {
        Known(Device::Present { mode, uid, gid, openable, .. }) => (*mode, *uid, *gid, openable),
        Known(Device::Absent) => {
            return Finding::unknown(check, &Failure::new("there is no /dev/nitro_enclaves to open"));
        }
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    let node = Node { path: "/dev/nitro_enclaves".to_owned(), kind: NodeKind::Other, mode, uid, gid };
    let by_mode = account.may(&node, READ | WRITE);
    let why = match (account.is_this_process, openable) {
        (true, Ok(())) => None,
        (true, Err(error)) => Some(error.clone()),
        (false, _) => (!by_mode).then(|| format!("mode {mode:04o}, user {uid}, group {gid}")),
    };
    match why {
        None => Finding::ok(check, format!("user {} may open /dev/nitro_enclaves ({})", account.name, account.how)),
        Some(why) if account.groups.contains(&gid) => Finding::failure(
            check,
            format!("user {} is in the device's group {gid}, and may not open it: {why}", account.name),
            "`chmod 0660 /dev/nitro_enclaves`, and see which udev rule or device cgroup (DevicePolicy=, DeviceAllow=) keeps it shut",
        ),
        Some(why) => Finding::failure(
            check,
            format!("user {} may not open /dev/nitro_enclaves: {why} ({})", account.name, account.how),
            format!(
                "add it to the device's group (`usermod -aG ne {}`, or SupplementaryGroups=ne in the unit) and restart enclaved",
                account.name
            ),
        ),
    }
}

/// The folder of nitro-cli's control sockets. They can be written to by anybody (0766), so the folder's mode is what protects enclaves.
pub fn sockets_folder(seen: &Observation<PathSeen>, account: &Observation<Account>) -> Finding {
    let check = Check::SocketsFolder;
    let (seen, node) = match folder(check, seen, account, "0770") {
        Ok(found) => found,
        Err(finding) => return finding,
    };
    let text = format!("{}, mode {:04o}, user {}, group {}", seen.path, node.mode, node.uid, node.gid);
    if node.mode & 0o007 == 0 {
        return Finding::ok(check, text);
    }
    Finding::warning(
        check,
        format!("{text}: any local user can reach the sockets in it, and end enclaves"),
        format!(
            "chmod 0770 {}; for good: `d {} 0770 root ne -` in a file of /etc/tmpfiles.d that sorts after the distribution's",
            seen.path, seen.path
        ),
    )
}

/// The folder of nitro-cli's log, without which it refuses every command.
pub fn log_folder(seen: &Observation<PathSeen>, account: &Observation<Account>) -> Finding {
    let check = Check::LogFolder;
    match folder(check, seen, account, "0775") {
        Ok((seen, node)) => Finding::ok(check, format!("{}, mode {:04o}", seen.path, node.mode)),
        Err(finding) => finding,
    }
}

fn folder<'a>(
    check: Check,
    seen: &'a Observation<PathSeen>,
    account: &Observation<Account>,
    mode: &str,
) -> Result<(&'a PathSeen, &'a Node), Finding> {
    let (seen, account) = match (seen, account) {
        (Known(seen), Known(account)) => (seen, account),
        (Unknown(failure), _) | (_, Unknown(failure)) => return Err(Finding::unknown(check, failure)),
    };
    let make = format!("install -d -m {mode} -o root -g ne {}", seen.path);
    let Some(node) = &seen.node else {
        let text = format!("{} is missing", seen.path);
        return Err(Finding::failure(check, text, format!("install aws-nitro-enclaves-cli, or `{make}`")));
    };
    if node.kind != NodeKind::Folder {
        return Err(Finding::failure(
            check,
            format!("{} is no folder", seen.path),
            format!("remove it, then `{make}`"),
        ));
    }
    match account.kept_from(seen, READ | WRITE | ENTER) {
        Some(why) => Err(Finding::failure(check, why, format!("`{make}`, and have the daemon's user in group ne"))),
        None => Ok((seen, node)),
    }
}

/// The first version that names enclaves, which is how enclaved knows its own.
const OLDEST: (u64, u64) = (1, 1);
/// The versions that enclaved was tried with begin here.
const TRIED: (u64, u64) = (1, 4);

/// nitro-cli, and its version.
pub fn nitro_cli(inventory: &Inventory) -> Finding {
    let check = Check::NitroCli;
    let version = match &inventory.nitro_cli {
        Known(version) => version,
        Unknown(failure) => {
            let remedy = "install aws-nitro-enclaves-cli, or set [nitro] cli to where it is";
            return Finding::failure(check, &failure.message, remedy);
        }
    };
    let mut numbers = version.split('.').map(|number| number.parse::<u64>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST => Finding::failure(
            check,
            format!("nitro-cli {version} is too old: it does not know --enclave-name"),
            "update aws-nitro-enclaves-cli",
        ),
        (Some(major), Some(minor)) if (major, minor) < TRIED || major > 1 => Finding::warning(
            check,
            format!("nitro-cli {version}; enclaved was tried with 1.4 and 1.5"),
            "use one of these if launches fail for reasons that nothing else explains",
        ),
        (Some(_), Some(_)) => Finding::ok(check, format!("nitro-cli {version}")),
        _ => Finding::warning(
            check,
            format!("nitro-cli says that it is version \"{version}\", which is not understood"),
            "see whether [nitro] cli names AWS's nitro-cli",
        ),
    }
}

/// vsock port 9000 of the parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeartbeatSeen {
    /// Nobody holds it.
    Free,
    /// An enclave is being launched just now, or may be: its launch holds the port by right, or is about to.
    Launching,
    /// Somebody holds it.
    Held,
    /// It can't be had, and that is why.
    Refused(String),
}

/// The port that booting enclaves call.
pub fn heartbeat_port(seen: &Observation<HeartbeatSeen>) -> Finding {
    let check = Check::HeartbeatPort;
    match seen {
        Known(HeartbeatSeen::Free) => Finding::ok(check, "vsock port 9000 is free"),
        Known(HeartbeatSeen::Launching) => Finding::ok(
            check,
            "an enclave is being launched just now, or may be: its launch needs the port, which is not looked at",
        ),
        Known(HeartbeatSeen::Held) => Finding::failure(
            check,
            "vsock port 9000 is held by a process that is not enclaved's",
            "a launch by hand holds it for as long as it takes; otherwise find the process that listens on vsock (`ss --vsock -lp`) \
             and give it another port",
        ),
        Known(HeartbeatSeen::Refused(why)) => Finding::failure(
            check,
            format!("vsock port 9000 can't be had: {why}"),
            "`modprobe vhost_vsock`; in a container, vsock must be allowed (seccomp, RestrictAddressFamilies=)",
        ),
        Unknown(failure) => Finding::unknown(check, failure),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::super::access::tests::{account, node, seen};
    use super::*;
    use crate::diagnosis::pool::tests::inventory;

    fn present(mode: u32, gid: u32, openable: Result<(), String>) -> Inventory {
        let device = Known(Device::Present { mode, uid: 0, gid, character_device: true, openable });
        Inventory { device, ..inventory() }
    }

    #[test]
    fn the_driver_is_missed_where_it_is_not_loaded() {
        assert_eq!(driver(&inventory()).outcome, Outcome::Ok);
        let finding = driver(&Inventory { driver_loaded: Known(false), ..inventory() });
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("modprobe nitro_enclaves"));
    }

    #[test]
    fn a_device_that_is_missing_or_is_none_fails_and_says_what_the_driver_says_of_it() {
        assert_eq!(device(&present(0o660, 991, Ok(()))).outcome, Outcome::Ok);
        let absent = Inventory { device: Known(Device::Absent), ..inventory() };
        let finding = device(&absent);
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("modify-instance-attribute"));
        let unloaded = device(&Inventory { driver_loaded: Known(false), ..absent });
        assert!(unloaded.remedy.unwrap().contains("load the driver"));
        let file = Device::Present { mode: 0o660, uid: 0, gid: 0, character_device: false, openable: Ok(()) };
        assert_eq!(device(&Inventory { device: Known(file), ..inventory() }).outcome, Outcome::Failure);
    }

    #[test]
    fn a_user_outside_the_devices_group_is_told_how_to_get_in_whoever_looked() {
        // Root looked, and could open it; the daemon could not.
        let finding = device_group(&present(0o660, 5, Ok(())), &Known(account()));
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("usermod -aG ne enclaved"));
        assert_eq!(device_group(&present(0o660, 991, Err("x".to_owned())), &Known(account())).outcome, Outcome::Ok);
    }

    #[test]
    fn the_daemon_itself_believes_what_it_tried() {
        let itself = Known(Account { is_this_process: true, ..account() });
        let finding = device_group(&present(0o660, 991, Err("Operation not permitted".to_owned())), &itself);
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("DeviceAllow="));
        assert_eq!(device_group(&present(0o600, 5, Ok(())), &itself).outcome, Outcome::Ok);
    }

    #[test]
    fn a_sockets_folder_that_is_open_to_all_is_a_warning_and_one_that_is_shut_a_failure() {
        let folder = |mode, gid| {
            let node = node("/run/nitro_enclaves", NodeKind::Folder, mode, 0, gid);
            sockets_folder(&Known(seen(node)), &Known(account()))
        };
        assert_eq!(folder(0o770, 991).outcome, Outcome::Ok);
        assert_eq!(folder(0o775, 991).outcome, Outcome::Warning);
        assert_eq!(folder(0o770, 5).outcome, Outcome::Failure);
        assert_eq!(folder(0o755, 5).outcome, Outcome::Failure);
        let missing = PathSeen { path: "/run/nitro_enclaves".to_owned(), above: Vec::new(), node: None };
        let finding = sockets_folder(&Known(missing), &Known(account()));
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.remedy.unwrap().contains("install -d -m 0770 -o root -g ne /run/nitro_enclaves"));
    }

    #[test]
    fn a_log_folder_that_can_not_be_written_to_or_is_a_file_fails() {
        let of = |kind, mode| {
            log_folder(&Known(seen(node("/var/log/nitro_enclaves", kind, mode, 0, 991))), &Known(account())).outcome
        };
        assert_eq!(of(NodeKind::Folder, 0o775), Outcome::Ok);
        assert_eq!(of(NodeKind::Folder, 0o755), Outcome::Failure);
        assert_eq!(of(NodeKind::File, 0o775), Outcome::Failure);
    }

    #[test]
    fn a_nitro_cli_that_is_missing_or_too_old_fails_and_one_that_was_never_tried_warns() {
        let of = |version: &str| nitro_cli(&Inventory { nitro_cli: Known(version.to_owned()), ..inventory() }).outcome;
        assert_eq!(of("1.5.2"), Outcome::Ok);
        assert_eq!(of("1.0.12"), Outcome::Failure);
        assert_eq!(of("1.2.0"), Outcome::Warning);
        assert_eq!(of("2.0.0"), Outcome::Warning);
        assert_eq!(of("nightly"), Outcome::Warning);
        let missing =
            Inventory { nitro_cli: Unknown(Failure::new("could not run nitro-cli --version")), ..inventory() };
        assert_eq!(nitro_cli(&missing).outcome, Outcome::Failure);
    }

    #[test]
    fn a_heartbeat_port_that_others_hold_fails_and_one_that_a_launch_holds_does_not() {
        let of = |seen| heartbeat_port(&Known(seen)).outcome;
        assert_eq!(of(HeartbeatSeen::Free), Outcome::Ok);
        assert_eq!(of(HeartbeatSeen::Launching), Outcome::Ok);
        assert_eq!(of(HeartbeatSeen::Held), Outcome::Failure);
        assert_eq!(of(HeartbeatSeen::Refused("Address family not supported".to_owned())), Outcome::Failure);
        assert_eq!(heartbeat_port(&Unknown(Failure::new("x"))).outcome, Outcome::Unknown);
    }
}
