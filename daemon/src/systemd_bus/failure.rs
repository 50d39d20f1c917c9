//! What systemd, and the bus before it, answer where they do not do what they are asked to: put into words, with what to do about it.

use super::{JobError, SYSTEMD, Verb};
use enclaved_core::failure::Failure;
use zbus::fdo;

/// What the result of a job says (org.freedesktop.systemd1(5), "JobRemoved").
pub(super) fn of_job(verb: Verb, unit: &str, result: &str) -> Result<(), JobError> {
    let failure = Failure::new(format!("{} {unit}: {result}", verb.doing()))
        .with_remedy(format!("`systemctl status {unit}` and `journalctl -u {unit}` say why"));
    match result {
        "done" => Ok(()),
        "failed" => Err(JobError::Failed(failure)),
        "dependency" | "skipped" | "invalid" | "assert" | "unsupported" => Err(JobError::NotRun(failure)),
        // Timed out while it was started or stopped, cancelled by another job, or a word of a later systemd.
        _ => Err(JobError::Unknown(failure)),
    }
}

/// Whether systemd itself, or the bus before it, answered that it does not do it. A lost answer is no answer.
pub(super) fn refused(error: &zbus::Error) -> bool {
    match error {
        // systemd's own: NoSuchUnit, UnitMasked and the like.
        zbus::Error::MethodError(..) => true,
        zbus::Error::FDO(error) => !matches!(
            **error,
            fdo::Error::NoReply(_)
                | fdo::Error::Timeout(_)
                | fdo::Error::TimedOut(_)
                | fdo::Error::Disconnected(_)
                | fdo::Error::ZBus(_)
        ),
        _ => false,
    }
}

/// Whether that is systemd's error of that name.
pub(super) fn is_named(error: &zbus::Error, name: &str) -> bool {
    matches!(error, zbus::Error::MethodError(full, ..) if full.strip_prefix(SYSTEMD) == Some(&format!(".{name}")))
}

/// What the bus says, and what to do about it.
pub(super) fn bus_failure(doing: &str, error: &zbus::Error) -> Failure {
    let failure = about(doing, Failure::from_error(error));
    let fdo = match error {
        zbus::Error::FDO(error) => Some(&**error),
        _ => None,
    };
    match (error, fdo) {
        (_, Some(fdo::Error::AccessDenied(_) | fdo::Error::InteractiveAuthorizationRequired(_))) => failure
            .with_remedy(
                "the polkit rule that comes with enclaved allows this to the user enclaved: see that it is in \
                 /usr/share/polkit-1/rules.d, that polkit runs, and as which user enclaved does",
            ),
        (
            _,
            Some(
                fdo::Error::ServiceUnknown(_)
                | fdo::Error::NameHasNoOwner(_)
                | fdo::Error::SpawnChildExited(_)
                | fdo::Error::SpawnFailed(_),
            ),
        ) => no_systemd(failure),
        _ if is_named(error, "NoSuchUnit") => {
            failure.with_remedy("is the unit file that comes with enclaved installed?")
        }
        _ if is_named(error, "UnitMasked") => failure.with_remedy("`systemctl unmask` it"),
        _ => failure,
    }
}

/// The remedy for a host on which systemd is not to be had, unless there is a better one.
pub(super) fn no_systemd(failure: Failure) -> Failure {
    match failure.remedy {
        Some(_) => failure,
        None => failure.with_remedy(
            "is the system bus of D-Bus there (/run/dbus/system_bus_socket), and systemd behind it? Without systemd, set \
             `supervisor = \"direct\"` in [host]",
        ),
    }
}

pub(super) fn about(doing: &str, failure: Failure) -> Failure {
    Failure { message: Failure::new(format!("{doing}: {}", failure.message)).message, ..failure }
}
