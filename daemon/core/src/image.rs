//! Enclave images (EIF): what a file is, what its measurements are, whether it is the one that was asked for.
//!
//! [`Measurer`] is fed the file's bytes in order, in pieces of any size, as they arrive; it keeps no more of them than the
//! header, the metadata and the signature. It ends in an [`EifReport`], and [`verify`] turns that into a [`VerifiedImage`],
//! which is the only thing that can be launched. Who has threads gives each of the three [`Lanes`] one.
//!
//! The reader is strict where AWS's is lax. AWS's walks the sections one after another and ignores the header's
//! offsets and sizes; a loader may go by the header instead. A file that the two would read differently is refused, so
//! nobody can show one image to whoever measures it and another to whoever boots it.
//!
//! The format, big-endian throughout: a header of 548 bytes (magic `.eif`, u16 version, u16 flags, u64 default memory, u64
//! default CPUs, u16 reserved, u16 number of sections, 32 u64 section offsets, 32 u64 section sizes, u32 unused, u32
//! CRC), then the sections, each with a header of its own of 12 bytes (u16 type, u16 flags, u64 size). The header's offsets
//! point at these section headers, its sizes count the contents only. The CRC (CRC-32 as in zlib) covers everything but
//! itself.
//!
//! No files and no network here: whoever has the bytes feeds them.

mod certificate;
mod error;
mod expected;
mod lane;
mod layout;
mod metadata;
mod report;
mod signature;
mod verify;

pub use certificate::{ImageCertificate, Validity};
pub use error::{EifError, Place};
pub use expected::{ExpectedImage, Pins};
pub use lane::{ApplicationShare, FileShare, ImageShare, Lane, Lanes, Share};
pub use layout::{Architecture, Limits, SectionInfo, SectionKind};
pub use metadata::ImageMetadata;
pub use report::EifReport;
pub use signature::{ImageSignature, SignatureAlgorithm};
pub use verify::{Found, Mismatch, Pinned, Refusal, VerifiedImage, os_image_hash, required_memory, verify};

/// Reads an EIF as it arrives, checks its form and measures it: all three [`Lanes`] one after another, on the caller's thread.
///
/// The result does not depend on how the bytes are cut into chunks. Memory is bounded by [`Limits`] (a few MiB with the
/// defaults), whatever the file says of itself.
#[derive(Debug)]
pub struct Measurer {
    lanes: Lanes,
}

impl Measurer {
    /// Ready for the file's first byte.
    pub fn new(limits: Limits) -> Self {
        Self { lanes: Lanes::new(limits) }
    }

    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// As soon as what has arrived can't be the beginning of a well-formed image; from then on always the same error.
    pub fn update(&mut self, chunk: &[u8]) -> Result<(), EifError> {
        // The file's lane first: it finds all that the others do, and first.
        self.lanes.file.update(chunk)?;
        self.lanes.image.update(chunk)?;
        self.lanes.application.update(chunk)
    }

    /// How many bytes the file must have by its own header, once the header has arrived and been checked.
    pub fn expected_size(&self) -> Option<u64> {
        self.lanes.file.expected_size()
    }

    /// How many bytes have been taken.
    pub fn position(&self) -> u64 {
        self.lanes.file.position()
    }

    /// The report, after the file's last byte.
    ///
    /// # Errors
    /// The error of an earlier [`update`](Self::update); or that the file ends too early, lacks a section, that its CRC
    /// does not match, or that it is signed but not rightly.
    pub fn finish(self) -> Result<EifReport, EifError> {
        self.lanes.join()
    }
}

#[cfg(test)]
mod tests;
