//! The files of `units/`: that systemd finds nothing wrong with them, who and what they make, and how confined they are.

use enclaved_integration::machine::MachineOptions;
use enclaved_integration::machine::parent::{Parent, parent_host};
use enclaved_integration::nitro_host::Shape;
use std::path::Path;

const SERVICES: [&str; 4] =
    ["enclaved.service", "enclaved-proxy.service", "enclaved-allocator.service", "enclave@x-1.service"];

#[test]
fn systemd_has_nothing_to_say_against_the_units() {
    let parent = parent_host().unwrap();
    for service in SERVICES {
        let said = parent.run(&["systemd-analyze", "verify", "--man=no", service]).unwrap();
        // Unknown directives are warnings only.
        assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (Some(0), "", ""), "{service}");
    }
    assert_eq!(parent.run_ok(&["systemctl", "is-system-running"]).unwrap(), "running\n");
}

#[test]
fn every_unit_is_confined_as_tightly_as_its_work_allows() {
    let parent = parent_host().unwrap();
    for service in SERVICES {
        // 2.0 of 10; systemd calls everything below 3 safe.
        let said = parent.run(&["systemd-analyze", "security", "--no-pager", "--threshold=20", service]).unwrap();
        assert!(said.success(), "{service}: {}", said.stdout);
    }
}

#[test]
fn every_directive_of_a_unit_has_its_reason_before_it() {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../units");
    let mut seen = 0;
    for entry in std::fs::read_dir(units).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let text = std::fs::read_to_string(&entry).unwrap();
        // A block of directives without a line between them may share one comment.
        for block in text.split("\n\n") {
            let directives: Vec<_> =
                block.lines().filter(|line| line.contains('=') && !line.starts_with('#')).collect();
            if directives.is_empty() {
                continue;
            }
            seen += 1;
            assert!(block.lines().any(|line| line.starts_with('#')), "{}: {directives:?}", entry.display());
        }
    }
    assert!(seen >= 8);
}

#[test]
fn users_and_folders_are_there_after_installing_and_after_a_reboot() {
    let parent = parent_host().unwrap();
    for _ in 0..2 {
        let groups = parent.run_ok(&["id", "--groups", "--name", "enclaved"]).unwrap();
        let mut groups: Vec<_> = groups.split_whitespace().collect();
        groups.sort_unstable();
        assert_eq!(groups, ["enclaved", "enclaved-proxy", "ne", "systemd-journal"]);
        assert_eq!(parent.run_ok(&["id", "--groups", "--name", "enclaved-proxy"]).unwrap(), "enclaved-proxy\n");
        for (folder, owner) in [
            ("/etc/enclaved", "750 root:enclaved"),
            ("/etc/enclaved/conf.d", "750 root:enclaved"),
            ("/etc/enclaved-proxy", "750 root:enclaved-proxy"),
            ("/var/lib/enclaved", "700 enclaved:enclaved"),
            ("/var/lib/enclaved/stopped", "700 enclaved:enclaved"),
            ("/var/lib/enclaved-proxy", "700 enclaved-proxy:enclaved-proxy"),
            ("/run/enclaved", "750 enclaved:enclaved"),
            ("/run/enclaved/enclaves", "700 enclaved:enclaved"),
            ("/run/enclaved-proxy", "750 enclaved-proxy:enclaved-proxy"),
            ("/run/enclaved-allocator", "750 root:enclaved"),
            ("/run/nitro_enclaves", "770 root:ne"),
            ("/var/log/nitro_enclaves", "775 root:ne"),
        ] {
            let said = parent.run_ok(&["stat", "--format=%a %U:%G", folder]).unwrap();
            assert_eq!(said.trim_end(), owner, "{folder}");
        }
        parent.reboot().unwrap();
    }
}

#[test]
fn the_folder_of_nitro_clis_sockets_is_closed_to_others_whatever_its_own_package_says() {
    let theirs = "d /run/nitro_enclaves 0775 root ne\nd /var/log/nitro_enclaves 0775 root ne\n";
    let options = MachineOptions::default().file("/usr/lib/tmpfiles.d/nitro_enclaves.conf", 0o644, theirs);
    let parent = Parent::boot(&Shape::small(), options).unwrap();
    for _ in 0..2 {
        let said = parent.run_ok(&["stat", "--format=%a %U:%G", "/run/nitro_enclaves"]).unwrap();
        assert_eq!(said, "770 root:ne\n");
        parent.reboot().unwrap();
    }
}

#[test]
fn the_shell_of_a_service_user_lets_nobody_in() {
    let parent = parent_host().unwrap();
    for user in ["enclaved", "enclaved-proxy"] {
        let entry = parent.run_ok(&["getent", "passwd", user]).unwrap();
        assert!(entry.trim_end().ends_with("/nologin"), "{entry}");
    }
}
