//! What enclaved needs of the service manager: that it answers, and that polkit lets the daemon's user manage enclaved's units.

use super::{Check, Finding};
use crate::observed::Observation::{self, Known, Unknown};
use std::collections::BTreeMap;
use std::fmt;

/// Something that is done to a unit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// `start`, `stop`, `restart`, `reset-failed`
    pub verb: &'static str,
    /// The unit.
    pub unit: &'static str,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.unit)
    }
}

/// What came of asking systemd for its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusSeen {
    /// It answered.
    Version(String),
    /// It did not, and that is why.
    Unreachable(String),
}

/// What came of asking polkit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolkitSeen {
    /// The daemon runs as root, whom nobody asks.
    Root,
    /// What it allows the daemon's user.
    Answers(BTreeMap<Right, bool>),
    /// It answers these questions to root only. `rule`: where a rule of enclaved's was seen instead; `None`: there is none.
    ForRootOnly {
        /// Its path.
        rule: Option<String>,
    },
    /// It could not be asked, and that is why.
    Unreachable(String),
}

const NO_NEED: &str = "nothing is managed through systemd (supervisor = \"direct\", allocator not \"manage\")";
const RULE: &str =
    "install enclaved's rule into /usr/share/polkit-1/rules.d (it comes with the package), and polkit itself";

/// systemd on the bus.
pub fn bus(seen: &Observation<BusSeen>, rights: &[Right]) -> Finding {
    let check = Check::Bus;
    match seen {
        _ if rights.is_empty() => Finding::not_needed(check, NO_NEED),
        Known(BusSeen::Version(version)) => Finding::ok(check, format!("systemd {version} answers")),
        Known(BusSeen::Unreachable(why)) => Finding::failure(
            check,
            format!("systemd can't be asked over D-Bus: {why}"),
            "`systemctl status dbus`; where there is no systemd (a container), set supervisor = \"direct\" and allocator = \"verify\" or \
             \"external\"",
        ),
        Unknown(failure) => Finding::unknown(check, failure),
    }
}

/// What polkit allows.
pub fn polkit(seen: &Observation<PolkitSeen>, rights: &[Right]) -> Finding {
    let check = Check::Polkit;
    match seen {
        _ if rights.is_empty() => Finding::not_needed(check, NO_NEED),
        Known(PolkitSeen::Root) => {
            Finding::not_needed(check, "the daemon runs as root, whom polkit is not asked about")
        }
        Known(PolkitSeen::Answers(answers)) => {
            let refused: Vec<String> =
                rights.iter().filter(|right| answers.get(right) != Some(&true)).map(ToString::to_string).collect();
            match refused.is_empty() {
                true => Finding::ok(check, "polkit lets the daemon's user manage enclaved's units"),
                false => Finding::failure(check, format!("polkit does not allow: {}", refused.join(", ")), RULE),
            }
        }
        Known(PolkitSeen::ForRootOnly { rule: Some(rule) }) => Finding::ok(
            check,
            format!("{rule} is there; what it allows polkit tells root only (`sudo enclavectl doctor`)"),
        ),
        Known(PolkitSeen::ForRootOnly { rule: None }) => {
            Finding::failure(check, "there is no rule of polkit for enclaved's units", RULE)
        }
        Known(PolkitSeen::Unreachable(why)) => Finding::failure(
            check,
            format!("polkit can't be asked: {why}"),
            "install polkit and see `systemctl status polkit`: without it only root may manage units",
        ),
        Unknown(failure) => Finding::unknown(check, failure),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;
    use crate::failure::Failure;

    const START: Right = Right { verb: "start", unit: "enclaved-proxy.service" };
    const STOP: Right = Right { verb: "stop", unit: "enclave@x-1.service" };

    #[test]
    fn a_bus_that_does_not_answer_fails_where_it_is_needed_and_only_there() {
        let silent = || Known(BusSeen::Unreachable("no such file".to_owned()));
        assert_eq!(bus(&Known(BusSeen::Version("252".to_owned())), &[START]).outcome, Outcome::Ok);
        assert_eq!(bus(&silent(), &[START]).outcome, Outcome::Failure);
        assert_eq!(bus(&silent(), &[]).outcome, Outcome::NotNeeded);
        assert_eq!(bus(&Unknown(Failure::new("slow")), &[START]).outcome, Outcome::Unknown);
    }

    #[test]
    fn each_right_that_polkit_refuses_or_does_not_speak_of_is_named() {
        let answers = |answers: &[(Right, bool)]| Known(PolkitSeen::Answers(answers.iter().cloned().collect()));
        assert_eq!(polkit(&answers(&[(START, true), (STOP, true)]), &[START, STOP]).outcome, Outcome::Ok);
        for answers in [answers(&[(START, true), (STOP, false)]), answers(&[(START, true)])] {
            let finding = polkit(&answers, &[START, STOP]);
            assert_eq!(finding.outcome, Outcome::Failure);
            assert_eq!(finding.seen, "polkit does not allow: stop enclave@x-1.service");
        }
    }

    #[test]
    fn where_polkit_can_not_be_asked_the_rule_has_to_be_there() {
        let outcome = |seen| polkit(&Known(seen), &[START]).outcome;
        assert_eq!(outcome(PolkitSeen::ForRootOnly { rule: Some("/x.rules".to_owned()) }), Outcome::Ok);
        assert_eq!(outcome(PolkitSeen::ForRootOnly { rule: None }), Outcome::Failure);
        assert_eq!(outcome(PolkitSeen::Unreachable("ServiceUnknown".to_owned())), Outcome::Failure);
        assert_eq!(outcome(PolkitSeen::Root), Outcome::NotNeeded);
    }
}
