//! This project's reader of images beside `nitro-cli describe-eif`, the program itself: what both take they measure alike, and what
//! this one refuses is listed with what the other says of it.
//!
//! `ENCLAVED_REAL_NITRO_CLI` names the program; `integration/test --lane slow` builds it and sets that.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use enclaved_core::id::Measurements;
use enclaved_core::image::{EifError, EifReport, Limits, Measurer};
use enclaved_integration::eif::{self, Eif};
use enclaved_integration::signing::{Signer, Validity};
use proptest::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// The refused seeds that nitro-cli 1.5.2 finds nothing wrong with: it prints measurements and says that the CRC is right.
const TAKEN_BY_NITRO_CLI: &[&str] = &[
    "bad-count-too-large",
    "bad-count-too-small",
    "bad-exabytes",
    "bad-flags",
    "bad-gap",
    "bad-order",
    "bad-overlap",
    "bad-second-cmdline",
    "bad-second-kernel",
    "bad-section-flags",
    "bad-signature-ambiguous-certificate",
    "bad-size-in-header",
    "bad-unused-slot",
    "bad-wrong-offset",
];

/// More than it needs for any image here; it allocates whatever a length in the file says.
const MEMORY_KIB: u64 = 4 << 20;

fn measure(file: &[u8]) -> Result<EifReport, EifError> {
    let mut measurer = Measurer::new(Limits::default());
    measurer.update(file)?;
    measurer.finish()
}

/// What nitro-cli says of an image: its JSON, or its exit code and the first line of its complaint.
fn describe(file: &[u8]) -> Result<Value, String> {
    let program = std::env::var("ENCLAVED_REAL_NITRO_CLI")
        .expect("ENCLAVED_REAL_NITRO_CLI names no nitro-cli; run `integration/test --lane slow`, which builds it");
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image.eif");
    std::fs::write(&path, file).unwrap();
    let output = Command::new("timeout")
        .args(["60", "sh", "-c", &format!("ulimit -v {MEMORY_KIB}; exec \"$@\""), "sh", &program])
        .args(["describe-eif", "--eif-path"])
        .arg(&path)
        .env("NITRO_CLI_LOGS_PATH", folder.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = complaint.lines().find(|line| !line.trim().is_empty()).unwrap_or("nothing on stderr");
    match (output.status.success(), serde_json::from_slice(&output.stdout)) {
        (true, Ok(json)) => Ok(json),
        _ => Err(format!("{}: {complaint}", output.status)),
    }
}

/// The registers as describe-eif names them.
fn registers(found: &Measurements) -> BTreeMap<String, String> {
    let mut registers = BTreeMap::from([("PCR0", found.pcr0), ("PCR1", found.pcr1), ("PCR2", found.pcr2)]);
    registers.extend(found.pcr8.map(|pcr8| ("PCR8", pcr8)));
    registers.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect()
}

/// Both take it, and say the same.
fn agree(name: &str, file: &[u8]) {
    let ours = measure(file).unwrap_or_else(|error| panic!("{name}: {error}"));
    let theirs = describe(file).unwrap_or_else(|error| panic!("{name}: {error}"));
    let measured = theirs["Measurements"].as_object().unwrap().iter();
    let measured: BTreeMap<String, String> = measured
        .filter(|(key, _)| key.starts_with("PCR"))
        .map(|(key, value)| (key.clone(), value.as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(measured, registers(ours.measurements()), "{name}");
    assert_eq!(theirs["CheckCRC"], true, "{name}");
    assert_eq!(theirs["EifVersion"], ours.version(), "{name}");
    assert_eq!(theirs["IsSigned"], ours.signed(), "{name}");
    if ours.signed() {
        assert_eq!(theirs["SignatureCheck"], true, "{name}");
    }
}

/// The seeds of the fuzzer whose names begin with that.
fn seeds(prefix: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemon/core/fuzz/seeds/eif");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: std::path::PathBuf| {
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap())
    };
    entries.map(named).filter(|(name, _)| name.starts_with(prefix)).collect()
}

#[test]
fn honest_images_of_every_kind_measure_alike() {
    let seeds = seeds("good-");
    assert!(seeds.len() > 5);
    for (name, file) in seeds {
        agree(&name, &file);
    }
    agree("of 20 MiB", &eif::sample("large", 1, 20 << 20).to_bytes());
}

/// Every seed that is refused here, with nitro-cli's verdict: shown, so that a person can see what the strictness is for.
#[test]
fn what_is_refused_here_is_listed_with_what_nitro_cli_says() {
    let mut taken = Vec::new();
    for (name, file) in seeds("bad-") {
        let ours = measure(&file).expect_err(&name);
        let theirs = describe(&file);
        let verdict = match &theirs {
            Ok(json) if json["CheckCRC"] == true && json["SignatureCheck"] != false => "takes it".to_owned(),
            Ok(json) if json["CheckCRC"] == true => "measures it, SignatureCheck false".to_owned(),
            Ok(_) => "measures it, CheckCRC false".to_owned(),
            Err(error) => error.clone(),
        };
        let verdict = verdict.chars().take(120).collect::<String>();
        println!("{name:40} nitro-cli: {verdict}\n{:40} enclaved:  {ours}", "");
        if verdict == "takes it" {
            taken.push(name);
        }
    }
    assert_eq!(taken, TAKEN_BY_NITRO_CLI);
}

/// Images of one to six ramdisks, signed and not.
fn images() -> impl Strategy<Value = (Eif, bool)> {
    let bytes = || {
        prop_oneof![
            4 => prop::collection::vec(any::<u8>(), 0..300),
            1 => (any::<u64>(), 0_usize..200_000).prop_map(|(seed, size)| eif::sample("x", seed, size).to_bytes()),
        ]
    };
    (bytes(), "[ -~]{0,100}", prop::collection::vec(bytes(), 1..7), 0_u16..2, any::<bool>()).prop_map(
        |(kernel, cmdline, ramdisks, flags, signed)| (Eif { flags, ..Eif::new(kernel, &cmdline, ramdisks) }, signed),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_images_measure_alike((image, signed) in images()) {
        let image = if signed { Signer::new("signer", Validity::Valid).unwrap().sign(image).unwrap() } else { image };
        agree("a random image", &image.to_bytes());
    }
}
