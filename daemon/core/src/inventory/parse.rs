//! The small texts of sysfs and procfs: numbers, lines of `meminfo`, names of folders. Whatever stands in them, the answer is a
//! value or a reason; nothing panics, nothing is guessed.

use super::Hugepages;
use std::fmt;

/// Why a text is not what it should be; names what was expected and shows what is there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{expected} was expected, found \"{found}\"")]
pub struct NotUnderstood {
    expected: &'static str,
    found: String,
}

fn not_understood(expected: &'static str, found: &str) -> NotUnderstood {
    NotUnderstood { expected, found: found.trim().chars().take(80).flat_map(char::escape_debug).collect() }
}

/// A file that holds one number.
///
/// # Errors
/// It does not, or the number does not fit into 64 bits.
pub fn number(text: &str) -> Result<u64, NotUnderstood> {
    let digits = text.trim();
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = if plain { digits.parse().ok() } else { None };
    number.ok_or_else(|| not_understood("a number", text))
}

/// The value in KiB of a field of `meminfo`, both in procfs's form (`MemTotal:  123 kB`) and in that of a memory node
/// (`Node 0 MemTotal:  123 kB`).
///
/// # Errors
/// The field is not there, or its value is not a number of kB.
pub fn meminfo_kib(text: &str, field: &str) -> Result<u64, NotUnderstood> {
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        if name.split_whitespace().next_back() != Some(field) {
            continue;
        }
        let digits = value.trim().strip_suffix("kB").ok_or_else(|| not_understood("a number of kB", line))?;
        return number(digits).map_err(|_| not_understood("a number of kB", line));
    }
    Err(not_understood("a line of memory information", text))
}

/// The number in a name like `cpu12` or `node0`; `None` if the name is another (`cpufreq`, `node`).
pub fn numbered(name: &str, prefix: &str) -> Option<u32> {
    let digits = name.strip_prefix(prefix)?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    // A leading zero is not how the kernel names them, and would make two names of one number.
    if plain && (digits == "0" || !digits.starts_with('0')) { digits.parse().ok() } else { None }
}

/// The page size in KiB that a folder's name says (`hugepages-2048kB`); `None` if it says none.
pub fn page_size_kib(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
    number(digits).ok().filter(|size| *size > 0)
}

/// Hugepages from the texts of their three files.
///
/// # Errors
/// One of them is no number, or more pages are free than there are.
pub fn hugepages(total: &str, free: &str, surplus: &str) -> Result<Hugepages, NotUnderstood> {
    let pages = Hugepages { total: number(total)?, free: number(free)?, surplus: number(surplus)? };
    if pages.free > pages.total || pages.surplus > pages.total {
        let found = format!("{} of {} free, {} surplus", pages.free, pages.total, pages.surplus);
        return Err(not_understood("a part of all hugepages", &found));
    }
    Ok(pages)
}

/// The instance type from what the firmware says of the machine.
///
/// # Errors
/// It is no machine of EC2, or a type was not named.
pub fn instance_type(vendor: &str, product: &str) -> Result<String, NotUnderstood> {
    if vendor.trim() != "Amazon EC2" {
        return Err(not_understood("a machine of Amazon EC2", vendor));
    }
    let product = product.trim();
    let plain = |text: &str| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    match product.split_once('.') {
        Some((family, size)) if product.len() <= 40 && plain(family) && plain(size) => Ok(product.to_owned()),
        _ => Err(not_understood("an instance type", product)),
    }
}

/// The version in what `nitro-cli --version` prints (`Nitro CLI 1.5.2`).
///
/// # Errors
/// There is none in it.
pub fn nitro_cli_version(text: &str) -> Result<String, NotUnderstood> {
    let version = text.lines().next().and_then(|line| line.strip_prefix("Nitro CLI "));
    let plain = |version: &&str| {
        let parts =
            version.split('.').filter(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
        version.len() <= 40 && parts.count() == version.split('.').count()
    };
    version
        .map(str::trim)
        .filter(plain)
        .map(str::to_owned)
        .ok_or_else(|| not_understood("a version of nitro-cli", text))
}

/// How many control sockets of enclaves are listened on, by `/proc/net/unix`: stream sockets with a name below `folder` that
/// accept connections. A socket file whose process is gone is in the folder, but not in this list.
pub fn listening_below(proc_net_unix: &str, folder: &str) -> u32 {
    let below = |name: &&str| {
        let file = name.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
        file.is_some_and(|file| file.ends_with(".sock"))
    };
    u32::try_from(listening(proc_net_unix).filter(below).count()).unwrap_or(u32::MAX)
}

/// Whether anybody listens at that path, by `/proc/net/unix`.
pub fn listens_at(proc_net_unix: &str, path: &str) -> bool {
    listening(proc_net_unix).any(|name| name == path)
}

/// The names of the sockets that accept connections.
fn listening(proc_net_unix: &str) -> impl Iterator<Item = &str> {
    /// `__SO_ACCEPTCON`: the kernel's mark of a listening socket.
    const LISTENING: u32 = 0x0001_0000;
    proc_net_unix.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        fields.nth(3).filter(|_| flags & LISTENING != 0)
    })
}

/// Whether `/proc/net/unix` is that of the host: it shows the socket of systemd or of the system's D-Bus. A network namespace of one's
/// own shows none of the host's sockets, so that no enclave would seem to run.
pub fn shows_the_hosts_sockets(proc_net_unix: &str) -> bool {
    let of_the_host = ["/run/systemd/private", "/run/dbus/system_bus_socket"];
    proc_net_unix.lines().filter_map(|line| line.split_whitespace().nth(7)).any(|name| of_the_host.contains(&name))
}

/// A number of CPUs with its noun.
pub(crate) fn cpus(count: u32) -> impl fmt::Display {
    format!("{count} {}", if count == 1 { "CPU" } else { "CPUs" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_network_namespace_of_ones_own_is_told_from_a_host_without_enclaves() {
        let head = "Num       RefCount Protocol Flags    Type St Inode Path\n";
        let own = "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /tmp/mine.sock\n";
        let host = "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/systemd/private\n";
        assert!(!shows_the_hosts_sockets(&format!("{head}{own}")));
        assert!(shows_the_hosts_sockets(&format!("{head}{own}{host}")));
    }

    #[test]
    fn memory_is_read_from_both_forms_of_meminfo() {
        assert_eq!(meminfo_kib("MemTotal:       24684092 kB\nMemFree: 1 kB\n", "MemTotal"), Ok(24_684_092));
        assert_eq!(meminfo_kib("Node 0 MemTotal:  100 kB\nNode 0 MemFree:  7 kB\n", "MemFree"), Ok(7));
        for bad in [
            "",
            "MemTotal: 1 MB",
            "MemTotal: kB",
            "MemTotal: -1 kB",
            "MemTotal: 99999999999999999999 kB",
            "SwapTotal: 1 kB",
        ] {
            assert!(meminfo_kib(bad, "MemTotal").is_err(), "{bad}");
        }
    }

    #[test]
    fn names_with_numbers_are_told_from_others() {
        assert_eq!(numbered("cpu12", "cpu"), Some(12));
        for other in ["cpu", "cpufreq", "cpu-1", "cpu+1", "cpu01", "cpu99999999999", "node1"] {
            assert_eq!(numbered(other, "cpu"), None, "{other}");
        }
        assert_eq!(page_size_kib("hugepages-1048576kB"), Some(1_048_576));
        for other in ["hugepages-", "hugepages-2048", "hugepages-0kB", "hugepages--1kB", "2048kB"] {
            assert_eq!(page_size_kib(other), None, "{other}");
        }
    }

    #[test]
    fn more_free_pages_than_there_are_is_not_believed() {
        assert_eq!(hugepages("4\n", "3\n", "1\n"), Ok(Hugepages { total: 4, free: 3, surplus: 1 }));
        let error = hugepages("4", "5", "0").unwrap_err().to_string();
        assert!(error.contains("5 of 4 free"), "{error}");
        assert!(hugepages("4", "", "0").is_err());
    }

    #[test]
    fn only_a_machine_of_ec2_has_an_instance_type() {
        assert_eq!(instance_type("Amazon EC2\n", "m5.xlarge\n"), Ok("m5.xlarge".to_owned()));
        assert_eq!(instance_type("Amazon EC2", "c7i-flex.2xlarge"), Ok("c7i-flex.2xlarge".to_owned()));
        assert!(instance_type("LENOVO", "20XW").unwrap_err().to_string().contains("LENOVO"));
        for product in ["", "m5", "m5.", ".xlarge", "m5.x large", "HVM domU"] {
            assert!(instance_type("Amazon EC2", product).is_err(), "{product}");
        }
    }

    #[test]
    fn the_version_of_nitro_cli_is_a_version_or_unknown() {
        assert_eq!(nitro_cli_version("Nitro CLI 1.5.2\n"), Ok("1.5.2".to_owned()));
        for text in ["", "Nitro CLI", "Nitro CLI \n", "Nitro CLI 1..2", "Nitro CLI one", "nitro-cli: not found"] {
            assert!(nitro_cli_version(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_sockets_that_are_listened_on_count_as_enclaves() {
        let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 22218 /run/nitro_enclaves/1f0.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 22219 /run/nitro_enclaves/1f0.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 22220 /run/nitro_enclaves2/1f0.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 22221 /run/nitro_enclaves/notes\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 22222\n\
            garbage\n";
        assert_eq!(listening_below(text, "/run/nitro_enclaves"), 1);
        let listens = |name: &str| listens_at(text, &format!("/run/nitro_enclaves/{name}"));
        assert_eq!(["1f0.sock", "notes", "1f0", "2f0.sock"].map(listens), [true, true, false, false]);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,80}|[0-9a-zA-Z :.\n-]{0,80}") {
            drop((number(&text), meminfo_kib(&text, "MemTotal"), numbered(&text, "cpu"), page_size_kib(&text)));
            drop((hugepages(&text, &text, &text), instance_type(&text, &text), nitro_cli_version(&text)));
            prop_assert!(listening_below(&text, "/run/nitro_enclaves") <= 80);
        }

        #[test]
        fn a_number_is_read_back_with_the_blanks_around_it(number in any::<u64>()) {
            prop_assert_eq!(super::number(&format!(" {number}\n")), Ok(number));
            prop_assert_eq!(meminfo_kib(&format!("Node 3 MemTotal: {number} kB"), "MemTotal"), Ok(number));
        }
    }
}
