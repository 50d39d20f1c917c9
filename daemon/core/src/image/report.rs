//! What measuring an image has shown.

use super::layout::{Architecture, SectionInfo};
use super::metadata::ImageMetadata;
use super::signature::ImageSignature;
use crate::id::{EifDigest, Measurements};
use serde::Serialize;

/// A well-formed image and its measurements; whether it is the right one is for [`verify`](super::verify()) to say.
///
/// Only [`Lanes::join`](super::Lanes::join) makes one, and it can't be changed: the fields are private.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EifReport {
    pub(super) size: u64,
    pub(super) digest: EifDigest,
    pub(super) measurements: Measurements,
    pub(super) version: u16,
    pub(super) architecture: Architecture,
    pub(super) default_memory: u64,
    pub(super) default_cpus: u64,
    pub(super) signature: Option<ImageSignature>,
    pub(super) metadata: Option<ImageMetadata>,
    pub(super) sections: Vec<SectionInfo>,
}

impl EifReport {
    /// The file's size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The SHA-256 of the file.
    pub fn digest(&self) -> EifDigest {
        self.digest
    }

    /// The measurements that attestation documents of an enclave with this image will show.
    pub fn measurements(&self) -> &Measurements {
        &self.measurements
    }

    /// The version of the format, 2 to 4.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The processors it is for.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// The memory that the header suggests, in bytes. Nothing obeys it; AWS's builder always writes 1 GiB.
    pub fn default_memory(&self) -> u64 {
        self.default_memory
    }

    /// The number of CPUs that the header suggests. Nothing obeys it; AWS's builder always writes 2.
    pub fn default_cpus(&self) -> u64 {
        self.default_cpus
    }

    /// Whether it is signed. A signature that is there has been checked.
    pub fn signed(&self) -> bool {
        self.signature.is_some()
    }

    /// Who signed it, where it is signed.
    pub fn signature(&self) -> Option<&ImageSignature> {
        self.signature.as_ref()
    }

    /// What the image says of itself, where it does.
    pub fn metadata(&self) -> Option<&ImageMetadata> {
        self.metadata.as_ref()
    }

    /// The sections in the order of the file; 3 to 32.
    pub fn sections(&self) -> &[SectionInfo] {
        &self.sections
    }
}
