//! Whether this host would launch its enclaves, and what is in the way. Looks at the host itself; of a daemon that runs only its process
//! is asked for, to judge for that one.

use super::client::Client;
use super::table::{self, Align};
use super::{CtlError, print};
use crate::config::{self, Config, ConfigErrors, SourceFile};
use crate::doctor::{Doctor, Patient, Places};
use enclaved_core::diagnosis::{Check, Diagnosis, Finding, Outcome, Verdict};
use enclaved_core::failure::Failure;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// A daemon that runs answers at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// Makes all checks, and prints them.
pub(super) async fn doctor(config_file: &Path, client: &Client, json: bool) -> Result<(), CtlError> {
    let loaded = config::load(config_file);
    let of_config = of_config(config_file, &loaded);
    let config = match loaded {
        Ok(config) => config,
        // What does not depend on it is checked all the same.
        Err(_) => nothing_configured(config_file)?,
    };
    let doctor = Doctor::new(config, patient(client).await, Places::default());
    let (diagnosis, judged_for) = doctor.examine(None).await;
    let diagnosis = Diagnosis::of(diagnosis.findings().iter().cloned().chain([of_config]).collect());
    print(&if json { as_json(&diagnosis, &judged_for) } else { as_text(&diagnosis, &judged_for) })?;
    judged(&diagnosis)
}

/// The daemon, if one answers and its process is to be seen from here (it may be in another container).
async fn patient(client: &Client) -> Patient {
    match tokio::time::timeout(PATIENCE, client.status()).await {
        Ok(Ok(status)) if is_enclaved(status.host.pid) => Patient::Running { daemon: status.host.pid },
        _ => Patient::NotRunning,
    }
}

fn is_enclaved(pid: u32) -> bool {
    crate::procfs::process(pid).ok().flatten().is_some_and(|process| process.name == "enclaved")
}

fn of_config(file: &Path, loaded: &Result<Config, ConfigErrors>) -> Finding {
    let check = Check::Configuration;
    match loaded {
        Ok(config) if config.warnings.is_empty() => {
            let number = config.desired.enclaves.len();
            let noun = if number == 1 { "enclave" } else { "enclaves" };
            Finding::ok(check, format!("{}: {number} {noun}, revision {}", file.display(), config.revision))
        }
        Ok(config) => Finding::warning(check, config.warnings.join("; "), "`enclavectl check` shows where"),
        // What may be right and can't be read here says nothing of the host.
        Err(_)
            if std::fs::File::open(file).is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied) =>
        {
            let failure = Failure::new(format!("{} can't be read by this user", file.display()));
            Finding::unknown(check, &failure.with_remedy("run it as root, or as a member of the group enclaved"))
        }
        Err(errors) => {
            let errors = errors.to_string();
            let mut lines = errors.lines();
            let first = lines.next().unwrap_or_default();
            let more = match lines.count() {
                0 => String::new(),
                more => format!(" (and {more} more lines)"),
            };
            let failure = Failure::new(format!("{} is refused: {first}{more}", file.display()));
            Finding::failed(check, &failure.with_remedy("`enclavectl check` shows all that is wrong; correct it"))
        }
    }
}

fn nothing_configured(file: &Path) -> Result<Config, CtlError> {
    let empty = SourceFile { path: file.to_owned(), text: String::new() };
    config::parse(&[empty]).map_err(|errors| CtlError::Bug(format!("an empty configuration is refused: {errors}")))
}

fn judged(diagnosis: &Diagnosis) -> Result<(), CtlError> {
    let names = |outcome| diagnosis.with(outcome).map(Finding::name).collect::<Vec<_>>().join(", ");
    match diagnosis.verdict() {
        Verdict::WouldLaunch => Ok(()),
        Verdict::Unknown => {
            Err(CtlError::TryAgain(format!("whether it would launch is not known: {}", names(Outcome::Unknown))))
        }
        Verdict::WouldNotLaunch => Err(CtlError::Unfit(format!("would not launch: {}", names(Outcome::Failure)))),
    }
}

fn as_json(diagnosis: &Diagnosis, judged_for: &str) -> String {
    let verdict = diagnosis.verdict();
    let value = json!({
        "would_launch": verdict == Verdict::WouldLaunch,
        "verdict": verdict,
        "judged_for": judged_for,
        "findings": diagnosis.findings(),
    });
    format!("{value:#}\n")
}

fn as_text(diagnosis: &Diagnosis, judged_for: &str) -> String {
    let mut rows = Vec::new();
    for finding in diagnosis.findings() {
        let seen = match &finding.about {
            Some(about) => format!("{about}: {}", finding.seen),
            None => finding.seen.clone(),
        };
        rows.push(vec![finding.outcome.as_str().to_owned(), finding.check.to_string(), seen]);
        if let Some(remedy) = &finding.remedy {
            rows.push(vec![String::new(), String::new(), format!("-> {remedy}")]);
        }
    }
    let heads = [("RESULT", Align::Left), ("CHECK", Align::Left), ("SEEN, AND WHAT TO DO", Align::Left)];
    let verdict = match diagnosis.verdict() {
        Verdict::WouldLaunch => "would launch",
        Verdict::Unknown => "whether it would launch is not known",
        Verdict::WouldNotLaunch => "would not launch",
    };
    format!("{}\n{verdict} (judged for {judged_for})\n", table::render(&heads, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis() -> Diagnosis {
        Diagnosis::of(vec![
            Finding::ok(Check::Driver, "nitro_enclaves is loaded"),
            Finding::failure(Check::EgressDns, "no such name", "correct it").about("kms:443"),
        ])
    }

    #[test]
    fn failures_come_first_with_what_to_do_below_them() {
        let text = as_text(&diagnosis(), "user enclaved: the running daemon");
        let expected = "RESULT   CHECK       SEEN, AND WHAT TO DO\nFAILURE  egress_dns  kms:443: no such name\n                     \
                        -> correct it\nok       driver      nitro_enclaves is loaded\n\nwould not launch (judged for user \
                        enclaved: the running daemon)\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn the_exit_code_says_whether_it_would_launch() {
        assert!(judged(&Diagnosis::of(vec![Finding::warning(Check::Disk, "", "")])).is_ok());
        assert_eq!(judged(&diagnosis()), Err(CtlError::Unfit("would not launch: egress_dns kms:443".to_owned())));
        let unknown = Diagnosis::of(vec![Finding::unknown(Check::Polkit, &Failure::new("slow"))]);
        assert_eq!(judged(&unknown).unwrap_err().code(), 75);
    }

    #[test]
    fn json_has_the_verdict_and_every_finding() {
        let json: serde_json::Value = serde_json::from_str(&as_json(&diagnosis(), "root")).unwrap();
        assert_eq!((&json["would_launch"], &json["verdict"]), (&json!(false), &json!("would-not-launch")));
        let expected = json!({
            "check": "egress_dns", "about": "kms:443", "outcome": "failure", "seen": "no such name", "remedy": "correct it",
        });
        assert_eq!(json["findings"][0], expected);
    }

    #[test]
    fn a_configuration_that_is_refused_is_a_failure_and_one_that_is_missing_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("enclaved.toml");
        assert_eq!(of_config(&path, &config::load(&path)).outcome, Outcome::Failure);
        std::fs::write(&path, "[host]\nno_such_key = 1\n").unwrap();
        let finding = of_config(&path, &config::load(&path));
        assert_eq!(finding.outcome, Outcome::Failure);
        assert!(finding.seen.contains("no_such_key"), "{}", finding.seen);
        std::fs::write(&path, "").unwrap();
        assert_eq!(of_config(&path, &config::load(&path)).outcome, Outcome::Ok);
    }
}
