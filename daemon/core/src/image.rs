//! Enclave images (EIF): what a file is, what its measurements are, whether it is the one that was asked for.
//!
//! [`Measurer`] is fed the file's bytes in order, in pieces of any size, as they arrive; it keeps no more of them than the
//! header, the metadata and the signature. It ends in an [`EifReport`], and [`verify`] turns that into a [`VerifiedImage`],
//! which is the only thing that can be launched.
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

mod error;
mod layout;
mod metadata;
mod report;
mod signature;
mod verify;

pub use error::{EifError, Place};
pub use layout::{Architecture, Limits, SectionInfo, SectionKind};
pub use metadata::ImageMetadata;
pub use report::EifReport;
pub use signature::{ImageSignature, SignatureAlgorithm};
pub use verify::{
    ExpectedImage, Found, Mismatch, Pinned, Refusal, VerifiedImage, os_image_hash, required_memory, verify,
};

use crate::id::{EifDigest, Measurements, Pcr};
use layout::{Layout, Sink};
use sha2::{Digest, Sha256, Sha384};
use signature::SignatureSection;

/// Reads an EIF as it arrives, checks its form and measures it.
///
/// The result does not depend on how the bytes are cut into chunks. Memory is bounded by [`Limits`] (a little over 1 MiB with
/// the defaults), whatever the file says of itself.
#[derive(Debug)]
pub struct Measurer {
    layout: Layout,
    contents: Contents,
    file: Sha256,
    crc: crc32fast::Hasher,
    /// The first error: everything after it repeats it.
    failed: Option<EifError>,
}

impl Measurer {
    /// Ready for the file's first byte.
    pub fn new(limits: Limits) -> Self {
        Self {
            layout: Layout::new(limits),
            contents: Contents::default(),
            file: Sha256::new(),
            crc: crc32fast::Hasher::new(),
            failed: None,
        }
    }

    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// As soon as what has arrived can't be the beginning of a well-formed image; from then on always the same error.
    pub fn update(&mut self, chunk: &[u8]) -> Result<(), EifError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let start = self.layout.position();
        let result = self.layout.advance(chunk, &mut self.contents);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            return result;
        }
        self.file.update(chunk);
        let (before, after) = layout::around_crc_field(start, chunk);
        self.crc.update(before);
        self.crc.update(after);
        Ok(())
    }

    /// How many bytes the file must have by its own header, once the header has arrived and been checked.
    pub fn expected_size(&self) -> Option<u64> {
        self.layout.expected_size()
    }

    /// How many bytes have been taken.
    pub fn position(&self) -> u64 {
        self.layout.position()
    }

    /// The report, after the file's last byte.
    ///
    /// # Errors
    /// The error of an earlier [`update`](Self::update); or that the file ends too early, lacks a section, that its CRC
    /// does not match, or that it is signed but not rightly.
    pub fn finish(self) -> Result<EifReport, EifError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let size = self.layout.position();
        let (header, sections) = self.layout.finish()?;
        let computed = self.crc.finalize();
        if header.crc != computed {
            return Err(EifError::Crc { found: header.crc, computed });
        }
        let missing = EifError::MissingSection { kind: SectionKind::Ramdisk, size };
        let pcr1 = self.contents.bootstrap.ok_or(missing)?;
        let pcr0 = extend(self.contents.image);
        let (pcr8, signature) = match self.contents.signature {
            Some(section) => {
                let pcr8 = extend(Sha384::new_with_prefix(&section.certificate));
                (Some(pcr8), Some(section.check(&pcr0)?))
            }
            None => (None, None),
        };
        let measurements = Measurements { pcr0, pcr1: extend(pcr1), pcr2: extend(self.contents.application), pcr8 };
        Ok(EifReport {
            size,
            digest: EifDigest(self.file.finalize().into()),
            measurements,
            version: header.version,
            architecture: header.architecture,
            default_memory: header.default_memory,
            default_cpus: header.default_cpus,
            signature,
            metadata: self.contents.metadata,
            sections,
        })
    }
}

/// What a register holds after its first extension: SHA-384 over 48 zero bytes and the SHA-384 of the contents.
fn extend(contents: Sha384) -> Pcr {
    let mut register = Sha384::new();
    register.update([0; 48]);
    register.update(contents.finalize());
    Pcr(register.finalize().into())
}

/// What becomes of the sections' contents: the three measurement chains, and the sections that are kept to be read.
#[derive(Debug, Default)]
struct Contents {
    /// Kernel, command line, all ramdisks: PCR0.
    image: Sha384,
    /// `image` as it stood after the first ramdisk: PCR1. The two chains share that prefix, so it is hashed once.
    bootstrap: Option<Sha384>,
    /// The ramdisks after the first: PCR2.
    application: Sha384,
    /// The section being read, where it must be whole to be understood. Bounded by its limit.
    kept: Vec<u8>,
    metadata: Option<ImageMetadata>,
    signature: Option<SignatureSection>,
}

impl Sink for Contents {
    fn contents(&mut self, section: &SectionInfo, bytes: &[u8]) {
        match section.kind {
            SectionKind::Kernel | SectionKind::Cmdline => self.image.update(bytes),
            SectionKind::Ramdisk => {
                self.image.update(bytes);
                if self.bootstrap.is_some() {
                    self.application.update(bytes);
                }
            }
            SectionKind::Metadata | SectionKind::Signature => self.kept.extend_from_slice(bytes),
        }
    }

    fn section_end(&mut self, section: &SectionInfo) -> Result<(), EifError> {
        match section.kind {
            SectionKind::Ramdisk if self.bootstrap.is_none() => self.bootstrap = Some(self.image.clone()),
            SectionKind::Metadata => {
                let json = std::mem::take(&mut self.kept);
                self.metadata = Some(ImageMetadata::parse(json, section)?);
            }
            SectionKind::Signature => {
                let contents = std::mem::take(&mut self.kept);
                self.signature = Some(SignatureSection::parse(&contents, section)?);
            }
            SectionKind::Kernel | SectionKind::Cmdline | SectionKind::Ramdisk => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
