//! Whether an image is the one that was asked for.
//!
//! [`VerifiedImage`] has one constructor, [`verify`]; whatever launches enclaves takes nothing else.

use super::expected::{ExpectedImage, Pins};
use super::layout::Architecture;
use super::metadata::ImageMetadata;
use super::report::EifReport;
use super::signature::ImageSignature;
use crate::id::{EifDigest, Measurements, MemoryMib, Pcr};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;

/// An image that is well-formed and is the one that was asked for. There is no way to have one without proof: [`verify`]
/// makes it, it can't be changed, and it can't be read from anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedImage {
    report: EifReport,
}

impl VerifiedImage {
    /// What measuring it has shown.
    pub fn report(&self) -> &EifReport {
        &self.report
    }

    /// The SHA-256 of the file: its name in the cache.
    pub fn digest(&self) -> EifDigest {
        self.report.digest
    }

    /// Its measurements, computed from the file.
    pub fn measurements(&self) -> &Measurements {
        &self.report.measurements
    }

    /// The file's size, in bytes.
    pub fn size(&self) -> u64 {
        self.report.size
    }

    /// The processors it is for.
    pub fn architecture(&self) -> Architecture {
        self.report.architecture
    }

    /// The name it gives itself. Not measured.
    pub fn name(&self) -> Option<&str> {
        self.metadata()?.name.as_deref()
    }

    /// The version it gives itself. Not measured.
    pub fn version(&self) -> Option<&str> {
        self.metadata()?.version.as_deref()
    }

    /// All it says of itself. Not measured.
    pub fn metadata(&self) -> Option<&ImageMetadata> {
        self.report.metadata()
    }

    /// Who signed it, where it is signed. The signature is right; whether the certificate has expired is a matter of the time.
    pub fn signature(&self) -> Option<&ImageSignature> {
        self.report.signature()
    }

    /// The least memory that an enclave with this image must have.
    pub fn required_memory(&self) -> MemoryMib {
        required_memory(self.report.size)
    }
}

/// Compares an image with what was asked for.
///
/// # Errors
/// Every difference from every allowed set, not only the first.
pub fn verify(report: EifReport, expected: &ExpectedImage) -> Result<VerifiedImage, Refusal> {
    if expected.admits(&report.digest, &report.measurements) {
        return Ok(VerifiedImage { report });
    }
    let sets: Vec<_> = expected.any_of().map(|pins| mismatches(&report, pins)).collect();
    // If one of them fits, only the signature is missing.
    let sets = if sets.iter().any(Vec::is_empty) { Vec::new() } else { sets };
    Err(Refusal { digest: report.digest, sets, not_signed: expected.signed() && !report.signed() })
}

/// Where an image differs from one set.
fn mismatches(report: &EifReport, pins: &Pins) -> Vec<Mismatch> {
    let Pins { sha256, pcr0, pcr1, pcr2, pcr8 } = pins;
    let found = &report.measurements;
    let text = |pcr: &Option<Pcr>| pcr.map(|pcr| pcr.to_string());
    let all = [
        (Pinned::Sha256, sha256.map(|digest| digest.to_string()), Some(report.digest.to_string())),
        (Pinned::Pcr0, text(pcr0), Some(found.pcr0.to_string())),
        (Pinned::Pcr1, text(pcr1), Some(found.pcr1.to_string())),
        (Pinned::Pcr2, text(pcr2), Some(found.pcr2.to_string())),
        (Pinned::Pcr8, text(pcr8), text(&found.pcr8)),
    ];
    let differs = |(what, expected, found): (Pinned, Option<String>, Option<String>)| {
        let different = expected != found;
        let expected = expected.filter(|_| different)?;
        Some(Mismatch { what, expected, found: found.map_or(Found::NotSigned, Found::Value) })
    };
    all.into_iter().filter_map(differs).collect()
}

/// An image that is not the one that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the image (SHA-256 {digest}) is not the one that was asked for: {}; {}", self.reason(), self.remedy())]
pub struct Refusal {
    /// Which image.
    pub digest: EifDigest,
    /// For each of the allowed sets every difference, of which there is at least one; none if only the signature is missing.
    pub sets: Vec<Vec<Mismatch>>,
    /// A signature is required, and there is none.
    pub not_signed: bool,
}

impl Refusal {
    /// What differs, on one line. The image's own values are given in full, once each.
    pub fn reason(&self) -> String {
        let mut reasons = Vec::new();
        match self.sets.as_slice() {
            [] => {}
            [only] => reasons.push(list(only, ", ", Mismatch::to_string)),
            several => {
                let found: BTreeMap<Pinned, &Found> =
                    several.iter().flatten().map(|mismatch| (mismatch.what, &mismatch.found)).collect();
                let found: Vec<_> = found.iter().map(|(what, found)| format!("{what} is {found}")).collect();
                let set = |set: &Vec<Mismatch>| list(set, " and ", |it| format!("{} {}", it.what, short(&it.expected)));
                reasons.push(format!(
                    "{}; none of the {} allowed sets fits, which differ in: {}",
                    found.join(", "),
                    several.len(),
                    list(several, ", or ", set)
                ));
            }
        }
        if self.not_signed {
            reasons.push("it is not signed, and a signature is required".to_owned());
        }
        reasons.join("; ")
    }

    /// What a person can do about it.
    pub fn remedy(&self) -> &'static str {
        let any = |is: fn(&Mismatch) -> bool| self.sets.iter().flatten().any(is);
        if any(|mismatch| mismatch.expected.bytes().all(|digit| digit == b'0')) {
            "zero is what an enclave in debug mode attests, never what an image measures: take the values from `enclavectl measure`"
        } else if self.not_signed {
            "sign the image (nitro-cli's --signing-certificate and --private-key), or remove require_signature from the enclave"
        } else if any(|mismatch| mismatch.found == Found::NotSigned) {
            "sign the image, or remove pcr8 from the enclave's measurements"
        } else {
            "if this image is right, put its values (`enclavectl measure`) into the enclave's measurements; if not, put the right image in its place"
        }
    }
}

fn list<T>(items: &[T], between: &str, text: impl Fn(&T) -> String) -> String {
    items.iter().map(text).collect::<Vec<_>>().join(between)
}

/// The beginning of a value: enough to find it in a configuration.
fn short(value: &str) -> String {
    const DIGITS: usize = 12;
    format!("{}…", value.get(..DIGITS).unwrap_or(value))
}

/// One difference between an image and what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// What differs.
    pub what: Pinned,
    /// The value asked for, in hexadecimal.
    pub expected: String,
    /// The image's.
    pub found: Found,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}, expected {}", self.what, self.found, self.expected)
    }
}

/// What can be asked of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pinned {
    /// The file's SHA-256.
    Sha256,
    /// Register 0.
    Pcr0,
    /// Register 1.
    Pcr1,
    /// Register 2.
    Pcr2,
    /// Register 8.
    Pcr8,
}

impl fmt::Display for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha256 => "SHA-256",
            Self::Pcr0 => "PCR0",
            Self::Pcr1 => "PCR1",
            Self::Pcr2 => "PCR2",
            Self::Pcr8 => "PCR8",
        })
    }
}

/// What an image has where something else was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// This value, in hexadecimal.
    Value(String),
    /// Nothing: the image is not signed, so it has no PCR8.
    NotSigned,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Value(value) => value,
            Self::NotSigned => "absent (the image is not signed)",
        })
    }
}

/// dstack's `OS_IMAGE_HASH` of an image on Nitro, which its governance registers before keys are released: SHA-256 over the
/// text of PCR0, PCR1 and PCR2 in lower-case hexadecimal and a newline (`sha256sum <<< "${PCR0}${PCR1}${PCR2}"`).
pub fn os_image_hash(measurements: &Measurements) -> [u8; 32] {
    let Measurements { pcr0, pcr1, pcr2, pcr8: _ } = measurements;
    Sha256::digest(format!("{pcr0}{pcr1}{pcr2}\n")).into()
}

/// The least memory that an enclave with an image of `size` bytes must have: four times the image, rounded up to whole MiB,
/// and at least 64 MiB. nitro-cli refuses less (E26).
pub fn required_memory(size: u64) -> MemoryMib {
    const MIB: u64 = 1 << 20;
    // 4 x size / MiB, in this order without overflow.
    MemoryMib(size.div_ceil(MIB / 4).max(64))
}
