//! The three shares of measuring an image. Each takes the whole file, byte by byte, and needs nothing of the others until the end,
//! so that each can run on a thread of its own; threads, files and waiting are the business of whoever runs them.
//!
//! | lane | does | cost |
//! |---|---|---|
//! | file | SHA-256, metadata, signature | a third of one of the others |
//! | image | the chain of PCR0, of which PCR1 is a prefix | SHA-384 over nearly the whole file |
//! | application | the chain of PCR2 | SHA-384 over the ramdisks after the first, which are most of a file |
//!
//! All three follow the layout and compute the CRC: neither costs anything beside a hash, and so no lane can have seen another
//! file than the others did without being found out.

use super::error::EifError;
use super::layout::{self, Header, Layout, Limits, SectionInfo, SectionKind, Sink};
use super::metadata::ImageMetadata;
use super::report::EifReport;
use super::signature::SignatureSection;
use crate::id::{EifDigest, Measurements, Pcr};
use sha2::{Digest, Sha256, Sha384};

/// The three lanes of one image. They can be taken apart, given the same bytes at different times and in different chunks,
/// and put together again.
#[derive(Debug)]
pub struct Lanes {
    /// The file as a whole, and what can be wrong with it.
    pub file: Lane<FileShare>,
    /// PCR0 and PCR1.
    pub image: Lane<ImageShare>,
    /// PCR2.
    pub application: Lane<ApplicationShare>,
}

impl Lanes {
    /// Ready for the file's first byte.
    pub fn new(limits: Limits) -> Self {
        Self { file: Lane::new(limits), image: Lane::new(limits), application: Lane::new(limits) }
    }

    /// The report, after each lane has taken the file's last byte.
    ///
    /// # Errors
    /// That of the file's lane, if it has one: it finds all that the others can find and more, in the order of the file, so its
    /// error is the one at the earliest place, however far the others have come. Else that of another lane; that the file
    /// ends too early, lacks a section, that its CRC (as any lane saw it) does not match, or that it is signed but not
    /// rightly.
    pub fn join(self) -> Result<EifReport, EifError> {
        let (file, header, sections) = self.file.finish()?;
        let (image, ..) = self.image.finish()?;
        let (application, ..) = self.application.finish()?;
        let size = header.total;
        let computed = [file.crc, image.crc, application.crc].into_iter().find(|computed| *computed != header.crc);
        if let Some(computed) = computed {
            return Err(EifError::Crc { found: header.crc, computed });
        }
        let missing = EifError::MissingSection { kind: SectionKind::Ramdisk, size };
        let pcr1 = image.share.bootstrap.ok_or(missing)?;
        let pcr0 = extend(image.share.chain);
        let (pcr8, signature) = match file.share.signature {
            Some(section) => {
                let pcr8 = extend(Sha384::new_with_prefix(&section.certificate));
                (Some(pcr8), Some(section.check(&pcr0)?))
            }
            None => (None, None),
        };
        let measurements = Measurements { pcr0, pcr1: extend(pcr1), pcr2: extend(application.share.chain), pcr8 };
        Ok(EifReport {
            size,
            digest: EifDigest(file.share.hash.finalize().into()),
            measurements,
            version: header.version,
            architecture: header.architecture,
            default_memory: header.default_memory,
            default_cpus: header.default_cpus,
            signature,
            metadata: file.share.metadata,
            sections,
        })
    }
}

/// One share of measuring an image; it is fed the whole file, in order.
#[derive(Debug)]
pub struct Lane<S> {
    layout: Layout,
    crc: crc32fast::Hasher,
    share: S,
    /// The first error: everything after it repeats it.
    failed: Option<EifError>,
}

/// What a lane does with the file's bytes. There are three; no others can be made.
#[expect(private_bounds, reason = "the trait is sealed")]
pub trait Share: Sink + Default {
    /// The next bytes of the file, wherever in it they are.
    #[doc(hidden)]
    fn bytes(&mut self, _bytes: &[u8]) {}
}

/// A lane that has taken all.
struct Finished<S> {
    share: S,
    crc: u32,
}

impl<S: Share> Lane<S> {
    fn new(limits: Limits) -> Self {
        Self { layout: Layout::new(limits), crc: crc32fast::Hasher::new(), share: S::default(), failed: None }
    }

    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// As soon as what has arrived can't be the beginning of a well-formed image, by as much of it as this lane judges; from
    /// then on always the same error.
    pub fn update(&mut self, chunk: &[u8]) -> Result<(), EifError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let start = self.layout.position();
        if let Err(error) = self.layout.advance(chunk, &mut self.share) {
            self.failed = Some(error.clone());
            return Err(error);
        }
        self.share.bytes(chunk);
        let (before, after) = layout::around_crc_field(start, chunk);
        self.crc.update(before);
        self.crc.update(after);
        Ok(())
    }

    /// How many bytes have been taken.
    pub fn position(&self) -> u64 {
        self.layout.position()
    }

    /// How many bytes the file must have by its own header, once the header has arrived and been checked.
    pub fn expected_size(&self) -> Option<u64> {
        self.layout.expected_size()
    }

    fn finish(self) -> Result<(Finished<S>, Header, Vec<SectionInfo>), EifError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let (header, sections) = self.layout.finish()?;
        Ok((Finished { share: self.share, crc: self.crc.finalize() }, header, sections))
    }
}

/// What a register holds after its first extension: SHA-384 over 48 zero bytes and the SHA-384 of the contents.
fn extend(contents: Sha384) -> Pcr {
    let mut register = Sha384::new();
    register.update([0; 48]);
    register.update(contents.finalize());
    Pcr(register.finalize().into())
}

/// The file's lane: the hash of all its bytes, and the sections that are kept to be read.
#[derive(Debug, Default)]
pub struct FileShare {
    hash: Sha256,
    /// The section being read, where it must be whole to be understood. Bounded by its limit.
    kept: Vec<u8>,
    metadata: Option<ImageMetadata>,
    signature: Option<SignatureSection>,
}

impl Share for FileShare {
    fn bytes(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
    }
}

impl Sink for FileShare {
    fn contents(&mut self, section: &SectionInfo, bytes: &[u8]) {
        match section.kind {
            SectionKind::Metadata | SectionKind::Signature => self.kept.extend_from_slice(bytes),
            SectionKind::Kernel | SectionKind::Cmdline | SectionKind::Ramdisk => {}
        }
    }

    fn section_end(&mut self, section: &SectionInfo) -> Result<(), EifError> {
        match section.kind {
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

/// The lane of PCR0 and PCR1.
#[derive(Debug, Default)]
pub struct ImageShare {
    /// Kernel, command line, all ramdisks: PCR0.
    chain: Sha384,
    /// `chain` as it stood after the first ramdisk: PCR1. The two share that prefix, so it is hashed once.
    bootstrap: Option<Sha384>,
}

impl Share for ImageShare {}

impl Sink for ImageShare {
    fn contents(&mut self, section: &SectionInfo, bytes: &[u8]) {
        match section.kind {
            SectionKind::Kernel | SectionKind::Cmdline | SectionKind::Ramdisk => self.chain.update(bytes),
            SectionKind::Metadata | SectionKind::Signature => {}
        }
    }

    fn section_end(&mut self, section: &SectionInfo) -> Result<(), EifError> {
        if section.kind == SectionKind::Ramdisk && self.bootstrap.is_none() {
            self.bootstrap = Some(self.chain.clone());
        }
        Ok(())
    }
}

/// The lane of PCR2.
#[derive(Debug, Default)]
pub struct ApplicationShare {
    /// The ramdisks after the first: PCR2.
    chain: Sha384,
    /// Whether the first ramdisk is over.
    booted: bool,
}

impl Share for ApplicationShare {}

impl Sink for ApplicationShare {
    fn contents(&mut self, section: &SectionInfo, bytes: &[u8]) {
        if section.kind == SectionKind::Ramdisk && self.booted {
            self.chain.update(bytes);
        }
    }

    fn section_end(&mut self, section: &SectionInfo) -> Result<(), EifError> {
        self.booted |= section.kind == SectionKind::Ramdisk;
        Ok(())
    }
}
