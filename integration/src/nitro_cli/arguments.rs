//! The command line of nitro-cli, and the launch configuration that may stand in its place.

use super::failure::{Code, Failure, VERSION};
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What `run-enclave` is asked for; also the form of its `--config` file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RunArguments {
    pub(super) eif_path: String,
    pub(super) enclave_cid: Option<u64>,
    pub(super) memory_mib: u64,
    pub(super) cpu_ids: Option<Vec<u32>>,
    #[serde(default)]
    pub(super) debug_mode: bool,
    #[serde(default)]
    pub(super) attach_console: bool,
    pub(super) cpu_count: Option<u32>,
    pub(super) enclave_name: Option<String>,
}

fn option(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).help(help)
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    option(name, help).action(ArgAction::SetTrue)
}

/// The command line.
pub(super) fn command() -> Command {
    let unsupported = |name: &'static str, about: &'static str| {
        Command::new(name).about(about).arg(Arg::new("arguments").num_args(0..).allow_hyphen_values(true).hide(true))
    };
    Command::new("Nitro CLI")
        .bin_name("nitro-cli")
        .version(VERSION)
        .about("CLI for enclave lifetime management")
        .arg_required_else_help(true)
        // As the real one, which is built without wrapping.
        .term_width(0)
        .subcommand(
            Command::new("run-enclave")
                .about("Starts a new enclave")
                .arg(
                    option("cpu-ids", "List of cpu-ids that will be provided to the enclave")
                        .num_args(1..)
                        .required_unless_present_any(["cpu-count", "config"])
                        .conflicts_with_all(["cpu-count", "config"]),
                )
                .arg(
                    option("cpu-count", "Number of cpus")
                        .required_unless_present_any(["cpu-ids", "config"])
                        .conflicts_with_all(["cpu-ids", "config"]),
                )
                .arg(
                    option("memory", "Memory to allocate for the enclave in MB. Depending on the available pages, more might be allocated.")
                        .required_unless_present("config")
                        .conflicts_with("config"),
                )
                .arg(
                    option("eif-path", "Path pointing to a prebuilt Eif image")
                        .required_unless_present("config")
                        .conflicts_with("config"),
                )
                .arg(option("enclave-cid", "CID to be used for the newly started enclave").conflicts_with("config"))
                .arg(flag("debug-mode", "Starts enclave in debug-mode, with a console").conflicts_with("config"))
                .arg(flag("attach-console", "Attach the enclave console immediately after starting the enclave. (implies debug-mode)"))
                .arg(option("enclave-name", "Custom name assigned to the enclave by the user").conflicts_with("config"))
                .arg(option("config", "Config is used to read enclave settings from JSON file").value_name("json-config")),
        )
        .subcommand(
            Command::new("terminate-enclave")
                .about("Terminates an enclave")
                .arg(
                    option("enclave-id", "Enclave ID, used to uniquely identify an enclave")
                        .required_unless_present_any(["all", "enclave-name"])
                        .conflicts_with_all(["all", "enclave-name"]),
                )
                .arg(
                    flag("all", "Terminate all running enclave instances belonging to the current user")
                        .required_unless_present_any(["enclave-id", "enclave-name"])
                        .conflicts_with_all(["enclave-id", "enclave-name"]),
                )
                .arg(
                    option("enclave-name", "Enclave name, used to uniquely identify an enclave")
                        .required_unless_present_any(["enclave-id", "all"])
                        .conflicts_with_all(["enclave-id", "all"]),
                ),
        )
        .subcommand(unsupported("build-enclave", "Builds an enclave image and saves it to a file"))
        .subcommand(
            Command::new("describe-eif")
                .about("Returns information about the EIF found at a given path.")
                .arg(option("eif-path", "Path to the EIF to describe.").required(true)),
        )
        .subcommand(
            Command::new("describe-enclaves")
                .about("Returns a list of the running enclaves")
                .arg(flag("metadata", "Adds EIF metadata of the current enclaves to the command output.")),
        )
        .subcommand(
            Command::new("console")
                .about("Connect to the console of an enclave")
                .arg(
                    option("enclave-id", "Enclave ID, used to uniquely identify an enclave")
                        .required_unless_present("enclave-name")
                        .conflicts_with("enclave-name"),
                )
                .arg(option("disconnect-timeout", "The time in seconds after the console disconnects from the enclave"))
                .arg(
                    option("enclave-name", "Enclave name, used to uniquely identify an enclave")
                        .required_unless_present("enclave-id")
                        .conflicts_with("enclave-id"),
                ),
        )
        .subcommand(unsupported("pcr", "Return the PCR hash value of the given input"))
        .subcommand(unsupported(
            "explain",
            "Display detailed information about an error returned by a misbehaving Nitro CLI command",
        ))
        .subcommand(unsupported("sign-eif", "Sign EIF with the given key"))
}

/// An argument's text.
pub(super) fn text(matches: &ArgMatches, name: &str) -> Option<String> {
    matches.try_get_one::<String>(name).ok().flatten().cloned()
}

fn invalid(name: &str, value: &str) -> Failure {
    Failure::new(Code::INVALID_ARGUMENT, format!("`{name}` is not a number")).about([name, value])
}

/// An argument that is a number, if given.
pub(super) fn number<T: std::str::FromStr>(matches: &ArgMatches, name: &str) -> Result<Option<T>, Failure> {
    text(matches, name).map(|value| value.parse().map_err(|_| invalid(name, &value))).transpose()
}

/// Memory in MiB: a number, or one with M, G or T behind it.
fn memory(value: &str) -> Result<u64, Failure> {
    let digits = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (number, unit) = value.split_at(digits);
    let factor = match unit {
        "" | "M" | "m" => 1,
        "G" | "g" => 1024,
        "T" | "t" => 1024 * 1024,
        _ => return Err(invalid("memory", value)),
    };
    number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(|| invalid("memory", value))
}

impl RunArguments {
    /// Takes them from the command line, or from the file that it names.
    ///
    /// # Errors
    /// E01, E02 and E17 of a configuration file, E19 where it can't be read; E03 of an argument. A CID in a
    /// configuration file is not looked at: the driver will refuse it.
    pub(super) fn from(matches: &ArgMatches) -> Result<Self, Failure> {
        if let Some(path) = text(matches, "config") {
            let path = Path::new(&path);
            let bytes = std::fs::read(path).map_err(|error| Failure::file(path, "Open", &error))?;
            let mut arguments: Self = serde_json::from_slice(&bytes)
                .map_err(|error| Failure::new(Code::SERDE, format!("Invalid JSON format for config file: {error}")))?;
            match (&arguments.cpu_count, &arguments.cpu_ids) {
                (None, None) => return Err(Failure::new(Code(1), "Missing both `cpu-count` and `cpu-ids`")),
                (Some(_), Some(_)) => return Err(Failure::new(Code(2), "`cpu-count` and `cpu-ids` together")),
                _ => {}
            }
            arguments.debug_mode |= arguments.attach_console;
            return Ok(arguments);
        }
        let cpu_ids = matches
            .get_many::<String>("cpu-ids")
            .map(|ids| ids.map(|id| id.parse().map_err(|_| invalid("cpu-id", id))).collect())
            .transpose()?;
        let enclave_cid = number(matches, "enclave-cid")?;
        match enclave_cid {
            Some(0) => eprintln!("The enclave CID will be auto-generated as the provided CID is 0"),
            Some(cid) if cid <= 3 || cid >= u64::from(u32::MAX) => {
                return Err(Failure::new(Code::INVALID_ARGUMENT, format!("CID {cid} is not to be used for enclaves")));
            }
            _ => {}
        }
        Ok(Self {
            cpu_count: number(matches, "cpu-count")?,
            // clap asks for both where there is no configuration file.
            eif_path: text(matches, "eif-path").unwrap_or_default(),
            memory_mib: memory(&text(matches, "memory").unwrap_or_default())?,
            enclave_cid,
            cpu_ids,
            debug_mode: matches.get_flag("debug-mode") || matches.get_flag("attach-console"),
            attach_console: matches.get_flag("attach-console"),
            enclave_name: text(matches, "enclave-name"),
        })
    }

    /// The name that the enclave is to have: the one asked for or the image's, made unique among those that run.
    pub(super) fn unique_name(&self, taken: &[String]) -> String {
        let name = self.enclave_name.clone().unwrap_or_else(|| {
            let file = self.eif_path.rsplit('/').next().unwrap_or_default();
            file.trim_end_matches(".eif").to_owned()
        });
        let mut unique = name.clone();
        let mut index = 0_u32;
        while taken.contains(&unique) {
            index += 1;
            unique = format!("{name}_{index}");
        }
        unique
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<RunArguments, Failure> {
        let matches = command().try_get_matches_from([&["nitro-cli", "run-enclave"], args].concat()).unwrap();
        RunArguments::from(matches.subcommand_matches("run-enclave").unwrap())
    }

    fn run_with(args: &[&str]) -> Result<RunArguments, Failure> {
        run(&[&["--eif-path", "/images/app.eif", "--cpu-count", "2", "--memory", "512"], args].concat())
    }

    #[test]
    fn the_help_is_the_real_ones() {
        let captured = include_str!("../../captures/help.txt");
        let expected = captured.split_once("--- stdout\n").unwrap().1.split_once("--- stderr").unwrap().0;
        assert_eq!(command().render_help().to_string(), expected);
    }

    #[test]
    fn reserved_cids_are_refused_and_zero_is_a_choice() {
        for cid in ["1", "2", "3", "4294967295", "4294967296", "x", "-1"] {
            let argument = format!("--enclave-cid={cid}");
            assert_eq!(run_with(&[&argument]).unwrap_err().code, Code::INVALID_ARGUMENT, "{cid}");
        }
        assert_eq!(run_with(&["--enclave-cid", "0"]).unwrap().enclave_cid, Some(0));
        assert_eq!(run_with(&["--enclave-cid", "16"]).unwrap().enclave_cid, Some(16));
    }

    #[test]
    fn memory_may_carry_a_unit() {
        for (value, expected) in [("512", 512), ("512M", 512), ("2g", 2048), ("1T", 1024 * 1024)] {
            assert_eq!(memory(value).unwrap(), expected);
        }
        for bad in ["", "512mb", "x", "99999999999999T"] {
            assert_eq!(memory(bad).unwrap_err().code, Code::INVALID_ARGUMENT, "{bad}");
        }
    }

    #[test]
    fn a_configuration_file_is_read_in_place_of_arguments() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let code_of = |text: &str| {
            std::fs::write(path, text).unwrap();
            run(&["--config", path]).map(|arguments| arguments.enclave_name).map_err(|failure| failure.code)
        };
        let good = r#"{"eif_path":"a","memory_mib":512,"cpu_count":2,"enclave_name":"signer-1","enclave_cid":3}"#;
        assert_eq!(code_of(good), Ok(Some("signer-1".to_owned())));
        assert_eq!(code_of(r#"{"eif_path":"a","memory_mib":512}"#), Err(Code(1)));
        assert_eq!(code_of(r#"{"eif_path":"a","memory_mib":512,"cpu_count":2,"cpu_ids":[1]}"#), Err(Code(2)));
        assert_eq!(code_of("{"), Err(Code::SERDE));
        assert_eq!(run(&["--config", "/nonexistent"]).unwrap_err().code, Code::FILE);
    }

    #[test]
    fn a_name_that_is_taken_gets_a_number() {
        let unnamed = run_with(&[]).unwrap();
        assert_eq!(unnamed.unique_name(&[]), "app");
        assert_eq!(unnamed.unique_name(&["app".into(), "app_1".into()]), "app_2");
        assert_eq!(run_with(&["--enclave-name", "signer"]).unwrap().unique_name(&["app".into()]), "signer");
    }
}
