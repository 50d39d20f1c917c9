//! What nitro-cli's own description of a running enclave says beside what was launched: the last piece of evidence that an enclave
//! is what the traces say. It compares; what follows is the planner's.

use crate::nitro_cli::{Described, Description, Flag, NitroCli, State};
use crate::procfs;
use enclaved_core::failure::Failure;
use enclaved_core::id::EnclaveKey;
use enclaved_core::plan::Launched;
use std::collections::BTreeMap;

/// Asks nitro-cli once, and says in what each of these differs; `None`: in nothing. Those that have ended are left out.
///
/// # Errors
/// nitro-cli can't be asked or understood, or did not speak of all: nothing is concluded from that.
pub async fn describe(
    nitro_cli: &NitroCli,
    launched: &[Launched],
) -> Result<BTreeMap<EnclaveKey, Option<Failure>>, Failure> {
    let description = nitro_cli.describe_enclaves().await?;
    let alive = |launched: &Launched| procfs::is_alive(launched.launch.process);
    compare(&description, launched, |launched| {
        alive(launched).map_err(|error| {
            Failure::new(format!("could not look at process {}: {error}", launched.launch.process.pid))
        })
    })
}

fn compare(
    description: &Description,
    launched: &[Launched],
    alive: impl Fn(&Launched) -> Result<bool, Failure>,
) -> Result<BTreeMap<EnclaveKey, Option<Failure>>, Failure> {
    let mut said = BTreeMap::new();
    for launched in launched {
        let id = &launched.launch.enclave_id;
        let listed = description.enclaves.iter().find(|enclave| enclave.enclave_id == *id);
        match listed {
            Some(enclave) if !matches!(enclave.state, State::Terminating | State::Empty) => {
                said.insert(launched.key.clone(), doubt(launched, enclave));
            }
            _ if !alive(launched)? => {}
            Some(_) => return Err(Failure::new(format!("nitro-cli describes {} ({id}) as ending", launched.key))),
            None => match &description.incomplete {
                Some(failure) => return Err(failure.clone()),
                None => {
                    let text = format!(
                        "its process {} runs, and nitro-cli lists no enclave {id}",
                        launched.launch.process.pid
                    );
                    said.insert(launched.key.clone(), Some(Failure::new(text)));
                }
            },
        }
    }
    Ok(said)
}

/// In what nitro-cli's words differ from what was launched.
fn doubt(launched: &Launched, enclave: &Described) -> Option<Failure> {
    let mut differences = Vec::new();
    let mut differs = |what: &str, said: String, expected: String| {
        if said != expected {
            differences.push(format!("its {what} is {said} instead of {expected}"));
        }
    };
    differs("process", enclave.process_id.to_string(), launched.launch.process.pid.to_string());
    differs("CID", enclave.cid.to_string(), launched.cid.to_string());
    let mode = |debug: bool| if debug { "debug" } else { "no debug" }.to_owned();
    match &enclave.flags {
        Flag::None | Flag::DebugMode => differs("mode", mode(enclave.flags == Flag::DebugMode), mode(launched.debug)),
        Flag::Other(word) => differs("mode", format!("\"{}\"", word.escape_debug()), mode(launched.debug)),
    }
    if let Some(said) = &enclave.measurements {
        let ours = &launched.measurements;
        for (name, said, ours) in
            [("PCR0", &said.pcr0, &ours.pcr0), ("PCR1", &said.pcr1, &ours.pcr1), ("PCR2", &said.pcr2, &ours.pcr2)]
        {
            if let Some(said) = said {
                differs(&format!("{name} as measured by nitro-cli"), said.to_string(), ours.to_string());
            }
        }
    }
    (!differences.is_empty()).then(|| {
        Failure::new(format!(
            "nitro-cli describes {} otherwise than it was launched: {}",
            launched.key,
            differences.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::id::{Cid, Measurements, MemoryMib, Pcr, Timestamp};
    use enclaved_core::ledger::{LaunchRecord, ProcessIdentity};

    fn pcr(byte: u8) -> Pcr {
        format!("{byte:02x}").repeat(48).parse().unwrap()
    }

    fn launched() -> Launched {
        Launched {
            key: "signer-1".parse().unwrap(),
            cid: Cid::FIRST,
            measurements: Measurements { pcr0: pcr(0), pcr1: pcr(1), pcr2: pcr(2), pcr8: None },
            debug: false,
            launch: LaunchRecord {
                enclave_id: "i-0-enc1".to_owned(),
                process: ProcessIdentity { pid: 77, start_time: 5 },
                cpu_ids: vec![1, 3],
                memory: MemoryMib(128),
                at: Timestamp::from_millis(1),
            },
        }
    }

    /// What nitro-cli says, with some of its words replaced.
    fn description(replace: &[(&str, &str)]) -> Description {
        let mut text = format!(
            r#"[{{"EnclaveName": "signer-1", "EnclaveID": "i-0-enc1", "ProcessID": 77, "EnclaveCID": 16, "NumberOfCPUs": 2,
                "CPUIDs": [1, 3], "MemoryMiB": 128, "State": "RUNNING", "Flags": "NONE",
                "Measurements": {{"HashAlgorithm": "Sha384 {{ ... }}", "PCR0": "{}", "PCR1": "{}", "PCR2": "{}"}}}}]"#,
            pcr(0),
            pcr(1),
            pcr(2)
        );
        for (from, to) in replace {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        Description { enclaves: serde_json::from_str(&text).unwrap(), incomplete: None }
    }

    fn said(description: &Description) -> Option<Failure> {
        let said = compare(description, &[launched()], |_| Ok(true)).unwrap();
        said.into_values().next().unwrap()
    }

    #[test]
    fn an_enclave_that_is_described_as_it_was_launched_leaves_no_doubt() {
        assert_eq!(said(&description(&[])), None);
        let mut silent = description(&[]);
        silent.enclaves[0].measurements = None;
        assert_eq!(said(&silent), None, "older versions say nothing of measurements");
    }

    #[test]
    fn every_difference_is_told_with_both_values() {
        let other = pcr(9).to_string();
        for (from, to, told) in [
            ("\"ProcessID\": 77", "\"ProcessID\": 78", "its process is 78 instead of 77"),
            ("\"EnclaveCID\": 16", "\"EnclaveCID\": 17", "its CID is 17 instead of 16"),
            ("\"NONE\"", "\"DEBUG_MODE\"", "its mode is debug instead of no debug"),
            ("\"NONE\"", "\"NEW\"", "its mode is \"NEW\" instead of no debug"),
            (pcr(0).to_string().as_str(), other.as_str(), "its PCR0 as measured by nitro-cli is 0909"),
            (pcr(2).to_string().as_str(), other.as_str(), "its PCR2 as measured by nitro-cli is 0909"),
        ] {
            let failure = said(&description(&[(from, to)])).unwrap();
            assert!(failure.message.contains(told) && failure.message.contains("signer-1"), "{failure}");
        }
    }

    #[test]
    fn one_that_runs_and_is_not_listed_is_doubtful_and_one_that_ended_is_not_spoken_of() {
        let nobody = Description { enclaves: Vec::new(), incomplete: None };
        assert!(said(&nobody).unwrap().message.contains("lists no enclave i-0-enc1"));
        assert!(compare(&nobody, &[launched()], |_| Ok(false)).unwrap().is_empty());
    }

    #[test]
    fn nothing_is_concluded_from_half_an_answer() {
        let half = Description { enclaves: Vec::new(), incomplete: Some(Failure::new("1 did not answer")) };
        assert_eq!(compare(&half, &[launched()], |_| Ok(true)).unwrap_err().message, "1 did not answer");
        let ending = description(&[("RUNNING", "TERMINATING")]);
        assert!(compare(&ending, &[launched()], |_| Ok(true)).unwrap_err().message.contains("as ending"));
        assert!(compare(&ending, &[launched()], |_| Ok(false)).unwrap().is_empty());
    }
}
