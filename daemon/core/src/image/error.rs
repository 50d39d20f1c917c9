//! What can be wrong with an image file, and where.

use super::SectionKind;
use std::fmt;

/// Why a file is not an image that can be launched. Every message says what is wrong, at which byte of the file, what was
/// found there and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EifError {
    /// The file is something else.
    #[error("not an EIF: it begins with \"{}\", an EIF begins with \".eif\"", found.escape_ascii())]
    BadMagic {
        /// The file's first four bytes.
        found: [u8; 4],
    },
    /// The file ends too early.
    #[error(
        "truncated: the file ends at byte {size}, inside {inside}, where at least {expected} bytes were expected; fetch it again"
    )]
    Truncated {
        /// The file's size, in bytes.
        size: u64,
        /// How many bytes it needs by what could be read of it.
        expected: u64,
        /// What is incomplete.
        inside: Place,
    },
    /// The file goes on after its last section.
    #[error("bytes after the end: by its header the image ends at byte {offset}, but the file goes on")]
    TrailingBytes {
        /// Where the file should have ended.
        offset: u64,
    },
    /// A version of the format that is not known.
    #[error(
        "version {found} of the format (at byte 4) is not supported: 2 to 4 are; build the image with a current tool"
    )]
    UnsupportedVersion {
        /// The header's version.
        found: u16,
    },
    /// A field that must be zero is not, or a flag is set whose meaning is not known.
    #[error("{field} at byte {offset} is {found:#x}: only {allowed} is known")]
    UnknownBits {
        /// What the field is.
        field: &'static str,
        /// Where it is.
        offset: u64,
        /// Its value.
        found: u64,
        /// The values it may have.
        allowed: &'static str,
    },
    /// Fewer or more sections than an image can have.
    #[error(
        "{found} sections (at byte 26): an image has at least 3 (kernel, command line, ramdisk) and may have {limit} at most"
    )]
    SectionCount {
        /// The header's number of sections.
        found: u16,
        /// The most that are taken.
        limit: u16,
    },
    /// By its header, the file is larger than is allowed.
    #[error("too large: by its header the image has {found} bytes or more, {limit} at most are taken")]
    TooLarge {
        /// The size by the header, or as much of it as can be added up.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A section is larger than its kind may be.
    #[error("section {index} (header at byte {offset}) is a {kind} of {found} bytes: {limit} at most are taken")]
    SectionTooLarge {
        /// Which section, from 0.
        index: u16,
        /// Where its header is.
        offset: u64,
        /// What it is.
        kind: SectionKind,
        /// Its size.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// The header puts a section elsewhere than where it follows from the sizes before it: there is a gap or an overlap.
    #[error(
        "the header's offset of section {index} (at byte {offset}) is {found}, but the section before it ends at {expected}"
    )]
    SectionOffset {
        /// Which section, from 0.
        index: u16,
        /// Where in the header the offset is.
        offset: u64,
        /// The header's offset.
        found: u64,
        /// Where the section must begin.
        expected: u64,
    },
    /// A section's own header and the file's header give different sizes.
    #[error("section {index} says (at byte {offset}) that it has {found} bytes, the file's header says {expected}{}", hint(*kind))]
    SectionSize {
        /// Which section, from 0.
        index: u16,
        /// What it is.
        kind: SectionKind,
        /// Where the section's own size is.
        offset: u64,
        /// The size by the section's header.
        found: u64,
        /// The size by the file's header.
        expected: u64,
    },
    /// The header describes sections beyond their number.
    #[error(
        "the header's {field} of section {index} (at byte {offset}) is {found}, but the image has only {count} sections"
    )]
    UnusedSlot {
        /// Which slot, from 0.
        index: u16,
        /// `"offset"` or `"size"`.
        field: &'static str,
        /// Where in the header the slot is.
        offset: u64,
        /// Its value.
        found: u64,
        /// The number of sections.
        count: u16,
    },
    /// A section of a type that this version of the format does not have.
    #[error("section {index} is of type {found} (at byte {offset}): version {version} of the format has no such type")]
    UnknownSectionType {
        /// Which section, from 0.
        index: u16,
        /// Where its type is.
        offset: u64,
        /// The type.
        found: u16,
        /// The image's version.
        version: u16,
    },
    /// The image does not begin with its kernel, followed by its command line.
    #[error(
        "section {index} (at byte {offset}) is a {found}: an image begins with its kernel and command line, so a {expected} must stand there"
    )]
    UnexpectedSection {
        /// Which section, from 0.
        index: u16,
        /// Where its header is.
        offset: u64,
        /// What stands there.
        found: SectionKind,
        /// What must stand there.
        expected: SectionKind,
    },
    /// A second section of a kind of which there is one.
    #[error("section {index} (at byte {offset}) is a second {kind}: the first is at byte {first}")]
    RepeatedSection {
        /// Which section, from 0.
        index: u16,
        /// Where its header is.
        offset: u64,
        /// What it is.
        kind: SectionKind,
        /// Where the first one's header is.
        first: u64,
    },
    /// A section that every image has is not there.
    #[error("no {kind}: all {size} bytes were read")]
    MissingSection {
        /// What is missing.
        kind: SectionKind,
        /// The file's size, in bytes.
        size: u64,
    },
    /// The bytes are not those that the file was built with.
    #[error(
        "damaged: the CRC in the header (at byte 544) is {found:08x}, that of the file is {computed:08x}; fetch it again"
    )]
    Crc {
        /// The header's CRC.
        found: u32,
        /// The CRC of the file's bytes.
        computed: u32,
    },
    /// The metadata can't be read.
    #[error("the metadata (at byte {offset}) can't be read: {reason}")]
    Metadata {
        /// Where the metadata's contents begin.
        offset: u64,
        /// What is wrong with them.
        reason: String,
    },
    /// The signature can't be read, or is not one of this image.
    #[error("the signature (at byte {offset}) is not valid: {reason}")]
    Signature {
        /// Where the signature's contents begin.
        offset: u64,
        /// What is wrong with them.
        reason: String,
    },
}

impl EifError {
    /// The byte of the file at which it was found to be wrong.
    pub fn offset(&self) -> u64 {
        match self {
            Self::BadMagic { .. } => 0,
            Self::UnsupportedVersion { .. } => 4,
            Self::SectionCount { .. } => 26,
            Self::Crc { .. } => 544,
            Self::Truncated { size, .. } | Self::MissingSection { size, .. } => *size,
            // The sum of all sizes is at fault; it has no place of its own in the file.
            Self::TooLarge { .. } => 284,
            Self::TrailingBytes { offset }
            | Self::UnknownBits { offset, .. }
            | Self::SectionTooLarge { offset, .. }
            | Self::SectionOffset { offset, .. }
            | Self::SectionSize { offset, .. }
            | Self::UnusedSlot { offset, .. }
            | Self::UnknownSectionType { offset, .. }
            | Self::UnexpectedSection { offset, .. }
            | Self::RepeatedSection { offset, .. }
            | Self::Metadata { offset, .. }
            | Self::Signature { offset, .. } => *offset,
        }
    }
}

/// AWS's `sign-eif` leaves the old size in the header when it signs an image a second time.
fn hint(kind: SectionKind) -> &'static str {
    match kind {
        SectionKind::Signature => "; was the image signed twice? Build it anew and sign it once",
        SectionKind::Kernel | SectionKind::Cmdline | SectionKind::Ramdisk | SectionKind::Metadata => "",
    }
}

/// A part of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The file's header.
    Header,
    /// The header of a section, by its index from 0.
    SectionHeader(u16),
    /// The contents of a section.
    Contents(u16, SectionKind),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::SectionHeader(index) => write!(f, "the header of section {index}"),
            Self::Contents(index, kind) => write!(f, "section {index}, a {kind}"),
        }
    }
}

/// A reason that another library gives, fit for one line of a log: it may quote the file, which may be hostile.
pub(super) fn reason(error: &dyn fmt::Display) -> String {
    const MAX_CHARS: usize = 200;
    let text = error.to_string();
    let mut reason: String = text.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        reason.push_str("...");
    }
    reason
}
