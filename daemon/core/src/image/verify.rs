//! Whether an image is the one that was asked for.
//!
//! [`VerifiedImage`] has one constructor, [`verify`]; whatever launches enclaves takes nothing else.

use super::layout::Architecture;
use super::metadata::ImageMetadata;
use super::report::EifReport;
use super::signature::ImageSignature;
use crate::id::{EifDigest, Measurements, MemoryMib, Pcr};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;

/// What an image must be. What is not given is not checked; with nothing given, any well-formed image will do.
///
/// PCR0 pins the contents of kernel, command line and ramdisks, but as one stream: it does not pin where one ends and the
/// next begins, nor the metadata. `sha256` pins every byte of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectedImage {
    /// SHA-256 of the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<EifDigest>,
    /// Measurement of the kernel, the command line and all ramdisks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr0: Option<Pcr>,
    /// Measurement of the kernel, the command line and the first ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr1: Option<Pcr>,
    /// Measurement of the ramdisks after the first: the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr2: Option<Pcr>,
    /// Measurement of the certificate that the image is signed with: any image signed by the holder of its key will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr8: Option<Pcr>,
}

impl ExpectedImage {
    /// Whether nothing at all is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// An image that is well-formed and is the one that was asked for. There is no way to have one without proof: [`verify`]
/// makes it, it can't be changed, and it can't be read from anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedImage {
    report: EifReport,
}

impl VerifiedImage {
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
/// Every difference, not only the first.
pub fn verify(report: EifReport, expected: &ExpectedImage) -> Result<VerifiedImage, Refusal> {
    let found = &report.measurements;
    let mut mismatches = Vec::new();
    if let Some(sha256) = expected.sha256
        && sha256 != report.digest
    {
        mismatches.push(Mismatch {
            what: Pinned::Sha256,
            expected: sha256.to_string(),
            found: Found::Value(report.digest.to_string()),
        });
    }
    let registers = [
        (Pinned::Pcr0, expected.pcr0, Some(found.pcr0)),
        (Pinned::Pcr1, expected.pcr1, Some(found.pcr1)),
        (Pinned::Pcr2, expected.pcr2, Some(found.pcr2)),
        (Pinned::Pcr8, expected.pcr8, found.pcr8),
    ];
    for (what, expected, found) in registers {
        let Some(expected) = expected.filter(|_| expected != found) else { continue };
        let found = match found {
            Some(found) => Found::Value(found.to_string()),
            None => Found::NotSigned,
        };
        mismatches.push(Mismatch { what, expected: expected.to_string(), found });
    }
    if mismatches.is_empty() {
        Ok(VerifiedImage { report })
    } else {
        Err(Refusal { digest: report.digest, mismatches })
    }
}

/// An image that is not the one that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the image (SHA-256 {digest}) is not the one that was asked for: {}; {}", list(mismatches), self.remedy())]
pub struct Refusal {
    /// Which image.
    pub digest: EifDigest,
    /// Every difference; at least one.
    pub mismatches: Vec<Mismatch>,
}

impl Refusal {
    /// What a person can do about it.
    pub fn remedy(&self) -> &'static str {
        let zero = |mismatch: &Mismatch| mismatch.expected.bytes().all(|digit| digit == b'0');
        let found = |found: Found| self.mismatches.iter().any(|mismatch| mismatch.found == found);
        if self.mismatches.iter().any(zero) {
            "zero is what an enclave in debug mode attests, never what an image measures: take the values from `enclavectl measure`"
        } else if found(Found::NotSigned) {
            "sign the image, or remove pcr8 from the enclave's measurements"
        } else {
            "if this image is right, put its values (`enclavectl measure`) into the enclave's measurements; if not, put the right image in its place"
        }
    }
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

fn list(mismatches: &[Mismatch]) -> String {
    mismatches.iter().map(Mismatch::to_string).collect::<Vec<_>>().join(", ")
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
