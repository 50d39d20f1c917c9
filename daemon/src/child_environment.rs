//! What the programs that the control process starts inherit of its environment. Nothing about what they are started for.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

/// What a program that outlives the control process, and talks to strangers, gets to see.
const ALLOWED: [&str; 11] = [
    "PATH",
    "HOME",
    "LANG",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RES_OPTIONS",
    "LOCALDOMAIN",
    "JOURNAL_STREAM",
];

/// Leaves it only what is known to be harmless and of use.
pub fn only_harmless(command: &mut Command) {
    command.env_clear().envs(std::env::vars_os().filter(|(name, _)| is_allowed(name)));
}

/// Takes away the credentials of AWS and the socket of the service manager: neither is meant for it.
pub fn without_secrets(command: &mut Command) {
    let names: Vec<OsString> = std::env::vars_os().map(|(name, _)| name).filter(|name| is_secret(name)).collect();
    for name in names {
        command.env_remove(name);
    }
}

fn is_allowed(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"LC_") || ALLOWED.iter().any(|allowed| name == *allowed)
}

fn is_secret(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b"AWS_") || name.starts_with(b"WATCHDOG_") || name == b"NOTIFY_SOCKET"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_and_the_service_managers_socket_are_for_nobody_else() {
        for name in ["AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "NOTIFY_SOCKET", "WATCHDOG_USEC"] {
            assert!(is_secret(OsStr::new(name)) && !is_allowed(OsStr::new(name)), "{name}");
        }
        for name in ["PATH", "LC_ALL", "SSL_CERT_FILE", "RUST_LOG"] {
            assert!(!is_secret(OsStr::new(name)) && is_allowed(OsStr::new(name)), "{name}");
        }
        assert!(!is_allowed(OsStr::new("LD_PRELOAD")));
    }

    #[test]
    fn what_is_not_allowed_does_not_reach_a_program() {
        let mut command = Command::new("env");
        only_harmless(&mut command);
        let seen = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert!(seen.lines().any(|line| line.starts_with("PATH=")), "{seen}");
        // Set by cargo for every test.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        assert!(!seen.contains("CARGO_MANIFEST_DIR"), "{seen}");
    }
}
