//! Whether this host would launch its enclaves: every precondition with what was seen of it and what a person can do. The judging is
//! here, in one file a subject, and pure; looking is the daemon's `doctor`.
//!
//! | file | subject |
//! |---|---|
//! | `access` | what a user may do with a file, by its mode |
//! | `nitro` | driver, device, folders, nitro-cli, heartbeat port |
//! | `pool` | sizes, CPU pool, hugepages, the allocator's service |
//! | `rights` | systemd on the bus, polkit |
//! | `cloud` | metadata service, credentials, images |
//! | `network` | names of endpoints, ports to listen on |
//! | `system` | clock, descriptors, disk |

pub mod access;
#[cfg(test)]
mod all_checks;
pub mod cloud;
pub mod network;
pub mod nitro;
pub mod pool;
pub mod rights;
pub mod system;

use crate::failure::Failure;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

macro_rules! checks {
    ($($(#[$doc:meta])* $name:ident $text:literal;)*) => {
        /// A precondition. Its name in JSON, in metrics and for people is stable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Check {
            $($(#[$doc])* $name,)*
        }

        impl Check {
            /// All of them, in the order in which they are shown.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

checks! {
    /// The configuration can be used.
    Configuration "configuration";
    /// The nitro_enclaves driver is loaded.
    Driver "driver";
    /// `/dev/nitro_enclaves` is there.
    Device "device";
    /// The daemon's user may open it, being in group `ne`.
    DeviceGroup "device_group";
    /// `/run/nitro_enclaves`, where nitro-cli's control sockets are.
    SocketsFolder "sockets_folder";
    /// `/var/log/nitro_enclaves`, without which nitro-cli does nothing.
    LogFolder "log_folder";
    /// nitro-cli runs, and its version is one that is known.
    NitroCli "nitro_cli";
    /// The configured enclaves fit the host.
    Sizing "sizing";
    /// The driver's CPUs are enough.
    CpuPool "cpu_pool";
    /// The hugepages are enough.
    Hugepages "hugepages";
    /// The stock allocator reserves them after a boot.
    AllocatorService "allocator_service";
    /// systemd can be asked over D-Bus.
    Bus "bus";
    /// polkit lets the daemon's user manage its units.
    Polkit "polkit";
    /// The instance metadata service answers.
    Metadata "metadata";
    /// There are credentials for S3.
    RoleCredentials "role_credentials";
    /// The image can be had.
    Image "image";
    /// The name of an egress endpoint leads to an address that an enclave may reach.
    EgressDns "egress_dns";
    /// vsock port 9000 is free for the heartbeat of an enclave that boots.
    HeartbeatPort "heartbeat_port";
    /// The ports to listen on are free, or held by enclaved.
    ListeningPorts "listening_ports";
    /// The kernel's clock source is a good one.
    ClockSource "clock_source";
    /// The clock is right, and something keeps it so.
    ClockDrift "clock_drift";
    /// The daemon may open enough files.
    FileDescriptors "file_descriptors";
    /// There is room for the images.
    Disk "disk";
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What came of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// No enclave would be launched, or none that works.
    Failure,
    /// It could not be looked at now.
    Unknown,
    /// Enclaves would be launched; something is not as it should be.
    Warning,
    /// As it should be.
    Ok,
    /// This configuration has no need of it.
    NotNeeded,
}

impl Outcome {
    /// Its name for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failure => "FAILURE",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Ok => "ok",
            Self::NotNeeded => "not needed",
        }
    }
}

/// What one check found; of a check of several things (endpoints, say), what it found of one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: Check,
    /// Of which thing, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// What came of it.
    pub outcome: Outcome,
    /// What was seen.
    pub seen: String,
    /// What a person can do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn new(check: Check, outcome: Outcome, seen: impl Into<String>) -> Self {
        Self { check, about: None, outcome, seen: seen.into(), remedy: None }
    }

    /// As it should be.
    pub fn ok(check: Check, seen: impl Into<String>) -> Self {
        Self::new(check, Outcome::Ok, seen)
    }

    /// No need of it, and why.
    pub fn not_needed(check: Check, why: impl Into<String>) -> Self {
        Self::new(check, Outcome::NotNeeded, why)
    }

    /// Not as it should be.
    pub fn warning(check: Check, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(check, Outcome::Warning, seen) }
    }

    /// In the way of a launch.
    pub fn failure(check: Check, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(check, Outcome::Failure, seen) }
    }

    /// In the way of a launch, as that failure says.
    pub fn failed(check: Check, failure: &Failure) -> Self {
        Self { remedy: failure.remedy.clone(), ..Self::new(check, Outcome::Failure, &failure.message) }
    }

    /// Could not be looked at.
    pub fn unknown(check: Check, why: &Failure) -> Self {
        let remedy = why.remedy.clone().or_else(|| Some("try again; as root, if it is a matter of rights".to_owned()));
        Self { remedy, ..Self::new(check, Outcome::Unknown, &why.message) }
    }

    /// About one of several things.
    #[must_use]
    pub fn about(mut self, about: impl Into<String>) -> Self {
        self.about = Some(about.into());
        self
    }

    /// Its check, and what it is about: `egress_dns kms.us-east-1.amazonaws.com`.
    pub fn name(&self) -> String {
        match &self.about {
            Some(about) => format!("{} {about}", self.check),
            None => self.check.to_string(),
        }
    }

    /// As a failure, for whoever shows those.
    pub fn to_failure(&self) -> Failure {
        let failure = Failure::new(format!("{}: {}", self.name(), self.seen));
        match &self.remedy {
            Some(remedy) => failure.with_remedy(remedy),
            None => failure,
        }
    }
}

/// Whether enclaves would be launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// No check fails, and each could be made.
    WouldLaunch,
    /// No check fails, but some could not be made.
    Unknown,
    /// A check fails.
    WouldNotLaunch,
}

/// What all checks found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnosis {
    findings: Vec<Finding>,
}

impl Diagnosis {
    /// Of findings in any order.
    pub fn of(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| (finding.outcome, finding.check));
        Self { findings }
    }

    /// All findings: failures first, then what is not known, warnings, the rest; each in the order of the checks.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether enclaves would be launched.
    pub fn verdict(&self) -> Verdict {
        // The worst stands first.
        match self.findings.first().map(|finding| finding.outcome) {
            Some(Outcome::Failure) => Verdict::WouldNotLaunch,
            Some(Outcome::Unknown) => Verdict::Unknown,
            Some(Outcome::Warning | Outcome::Ok | Outcome::NotNeeded) => Verdict::WouldLaunch,
            // Nothing was looked at.
            None => Verdict::Unknown,
        }
    }

    /// The findings with that outcome.
    pub fn with(&self, outcome: Outcome) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.outcome == outcome)
    }

    /// The checks that fail, each once, in their order.
    pub fn failing(&self) -> BTreeSet<Check> {
        self.with(Outcome::Failure).map(|finding| finding.check).collect()
    }

    /// The checks that are worth another look soon: those that fail, and those that could not be made.
    pub fn unsettled(&self) -> BTreeSet<Check> {
        self.with(Outcome::Failure).chain(self.with(Outcome::Unknown)).map(|finding| finding.check).collect()
    }

    /// This diagnosis, with what another look at those checks found in place of what it says of them.
    #[must_use]
    pub fn renewed(self, checks: &BTreeSet<Check>, fresh: Self) -> Self {
        let kept = self.findings.into_iter().filter(|finding| !checks.contains(&finding.check));
        let fresh = fresh.findings.into_iter().filter(|finding| checks.contains(&finding.check));
        Self::of(kept.chain(fresh).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_enough_and_what_is_not_known_is_no_yes() {
        let ok = || Finding::ok(Check::Disk, "");
        let warning = || Finding::warning(Check::ClockSource, "", "");
        let unknown = || Finding::unknown(Check::Polkit, &Failure::new("no answer"));
        let failure = || Finding::failure(Check::Image, "", "");
        let verdict = |findings: Vec<Finding>| Diagnosis::of(findings).verdict();
        assert_eq!(verdict(vec![ok(), warning()]), Verdict::WouldLaunch);
        assert_eq!(verdict(vec![ok(), unknown(), warning()]), Verdict::Unknown);
        assert_eq!(verdict(vec![ok(), unknown(), failure()]), Verdict::WouldNotLaunch);
        assert_eq!(verdict(vec![]), Verdict::Unknown);
    }

    #[test]
    fn failures_come_first_and_each_kind_in_the_order_of_the_checks() {
        let diagnosis = Diagnosis::of(vec![
            Finding::ok(Check::Driver, ""),
            Finding::failure(Check::Disk, "", ""),
            Finding::warning(Check::ClockSource, "", ""),
            Finding::failure(Check::Device, "", ""),
        ]);
        let order: Vec<_> = diagnosis.findings().iter().map(|finding| finding.check).collect();
        assert_eq!(order, [Check::Device, Check::Disk, Check::ClockSource, Check::Driver]);
        assert_eq!(diagnosis.failing(), [Check::Device, Check::Disk].into());
    }

    #[test]
    fn another_look_replaces_what_it_was_for_and_nothing_else() {
        let before = Diagnosis::of(vec![
            Finding::failure(Check::EgressDns, "", "").about("a"),
            Finding::failure(Check::EgressDns, "", "").about("b"),
            Finding::failure(Check::Disk, "", ""),
        ]);
        let fresh = Diagnosis::of(vec![Finding::ok(Check::EgressDns, "2"), Finding::ok(Check::Disk, "not asked for")]);
        let after = before.renewed(&[Check::EgressDns].into(), fresh);
        assert_eq!(after.failing(), [Check::Disk].into());
        assert_eq!(after.with(Outcome::Ok).count(), 1);
    }

    #[test]
    fn the_name_of_every_check_is_that_of_its_json() {
        for check in Check::ALL {
            assert_eq!(serde_json::to_value(check).unwrap(), check.as_str());
        }
    }
}
