//! Where things are in an image file: the header, the sections, and the rules that bind them together.
//!
//! Only the layout is judged here; what the sections contain is the [`Sink`]'s affair. No number from the file is ever used
//! to allocate.

use super::error::{EifError, Place};
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;

const HEADER_LEN: usize = 548;
const SECTION_HEADER_LEN: usize = 12;
/// How many sections the header has room for.
const SLOTS: u16 = 32;

const VERSION_AT: usize = 4;
const FLAGS_AT: usize = 6;
const DEFAULT_MEMORY_AT: usize = 8;
const DEFAULT_CPUS_AT: usize = 16;
const RESERVED_AT: usize = 24;
const COUNT_AT: usize = 26;
const OFFSETS_AT: usize = 28;
const SIZES_AT: usize = 284;
const UNUSED_AT: usize = 540;
const CRC_AT: usize = 544;

/// How much of an image is taken before it is refused. Sizes are in bytes.
///
/// Kernel and ramdisks are bounded by the file's size alone: they are hashed as they pass, never kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The whole file. Default 64 GiB: with the four times as much memory that it would need, more than any parent has.
    pub file: u64,
    /// Number of sections. Default 32, which is what the header has room for; more than that is always refused.
    pub sections: u16,
    /// The command line. Default 64 KiB; Linux takes 2 KiB on x86-64.
    pub cmdline: u64,
    /// The metadata. Default 1 MiB.
    pub metadata: u64,
    /// The signature section. Default 256 KiB; one signature with its certificate takes about 4 KiB.
    pub signature: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { file: 64 << 30, sections: SLOTS, cmdline: 64 << 10, metadata: 1 << 20, signature: 256 << 10 }
    }
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SectionKind {
    /// The kernel image. Type 1.
    Kernel,
    /// The kernel's command line. Type 2.
    Cmdline,
    /// A ramdisk. Type 3. The first one boots the enclave, those after it are the application.
    Ramdisk,
    /// The signature over PCR0, with its certificate. Type 4, since version 3.
    Signature,
    /// Where the image comes from, in JSON. Type 5, since version 4. **Not measured**: anyone can change it.
    Metadata,
}

impl SectionKind {
    fn from_type(number: u16, version: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Kernel),
            2 => Some(Self::Cmdline),
            3 => Some(Self::Ramdisk),
            4 if version >= 3 => Some(Self::Signature),
            5 if version >= 4 => Some(Self::Metadata),
            _ => None,
        }
    }

    fn limit(self, limits: &Limits) -> u64 {
        match self {
            Self::Kernel | Self::Ramdisk => limits.file,
            Self::Cmdline => limits.cmdline,
            Self::Signature => limits.signature,
            Self::Metadata => limits.metadata,
        }
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Cmdline => "command line",
            Self::Ramdisk => "ramdisk",
            Self::Signature => "signature",
            Self::Metadata => "metadata section",
        })
    }
}

/// The processors that an image is for, by the header's flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Intel and AMD.
    X86_64,
    /// Graviton.
    Aarch64,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        })
    }
}

/// One section of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SectionInfo {
    /// What it holds.
    pub kind: SectionKind,
    /// Where its contents begin in the file, in bytes; its own header stands in the 12 bytes before.
    pub offset: u64,
    /// The size of its contents, in bytes.
    pub size: u64,
}

/// Who takes the contents of the sections.
pub(super) trait Sink {
    /// The next bytes of a section's contents.
    fn contents(&mut self, section: &SectionInfo, bytes: &[u8]);
    /// All of a section's contents have been taken. Called once for each section, for an empty one too.
    fn section_end(&mut self, section: &SectionInfo) -> Result<(), EifError>;
}

/// The file's header, checked.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u16,
    pub(super) architecture: Architecture,
    /// In bytes.
    pub(super) default_memory: u64,
    pub(super) default_cpus: u64,
    pub(super) crc: u32,
    /// The sizes of the sections' contents; their number is that of the sections.
    sizes: Vec<u64>,
    /// The file's size.
    pub(super) total: u64,
}

/// Follows the layout of a file through its bytes.
#[derive(Debug)]
pub(super) struct Layout {
    limits: Limits,
    position: u64,
    state: State,
    gathered: Gathered,
    header: Option<Header>,
    sections: Vec<SectionInfo>,
}

#[derive(Debug)]
enum State {
    /// Gathering the file's header, or a section's.
    Gathering,
    /// Inside the contents of the last of `sections`; so many bytes of them are still to come (at least one).
    Contents { left: u64 },
    /// After the last section.
    End,
}

/// The bytes of a header that have arrived. Has room for the longer of the two.
#[derive(Debug)]
struct Gathered {
    bytes: [u8; HEADER_LEN],
    len: usize,
}

impl Layout {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            position: 0,
            state: State::Gathering,
            gathered: Gathered { bytes: [0; HEADER_LEN], len: 0 },
            header: None,
            sections: Vec::new(),
        }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn expected_size(&self) -> Option<u64> {
        self.header.as_ref().map(|header| header.total)
    }

    /// Takes the next bytes of the file.
    pub(super) fn advance(&mut self, mut chunk: &[u8], sink: &mut impl Sink) -> Result<(), EifError> {
        while !chunk.is_empty() {
            let taken = match &mut self.state {
                State::Gathering => {
                    let wanted = if self.header.is_none() { HEADER_LEN } else { SECTION_HEADER_LEN };
                    let taken = self.gathered.take(chunk, wanted);
                    if self.header.is_none() {
                        self.gathered.check_magic()?;
                    }
                    if self.gathered.len == wanted {
                        self.gathered.len = 0;
                        self.header_complete(self.position + as_u64(taken), sink)?;
                    }
                    taken
                }
                State::Contents { left } => {
                    let taken = usize::try_from(*left).map_or(chunk.len(), |left| left.min(chunk.len()));
                    *left -= as_u64(taken);
                    let ended = *left == 0;
                    if let Some(section) = self.sections.last() {
                        sink.contents(section, &chunk[..taken]);
                        if ended {
                            sink.section_end(section)?;
                        }
                    }
                    if ended {
                        self.next_section();
                    }
                    taken
                }
                State::End => return Err(EifError::TrailingBytes { offset: self.position }),
            };
            self.position += as_u64(taken);
            chunk = &chunk[taken..];
        }
        Ok(())
    }

    /// The header and the sections, after the last byte.
    pub(super) fn finish(self) -> Result<(Header, Vec<SectionInfo>), EifError> {
        let inside = match (&self.state, self.sections.last()) {
            (State::End, _) => None,
            (State::Contents { .. }, Some(section)) => {
                Some(Place::Contents(index(self.sections.len() - 1), section.kind))
            }
            (State::Contents { .. } | State::Gathering, _) if self.header.is_none() => Some(Place::Header),
            (State::Contents { .. } | State::Gathering, _) => Some(Place::SectionHeader(index(self.sections.len()))),
        };
        let expected = self.expected_size().unwrap_or(as_u64(HEADER_LEN));
        match (self.header, inside) {
            (Some(header), None) => Ok((header, self.sections)),
            (_, inside) => {
                Err(EifError::Truncated { size: self.position, expected, inside: inside.unwrap_or(Place::Header) })
            }
        }
    }

    /// All bytes of the file's header, or of the next section's, are there; the last of them is the one before `end`.
    fn header_complete(&mut self, end: u64, sink: &mut impl Sink) -> Result<(), EifError> {
        let bytes = &self.gathered.bytes;
        let Some(header) = &self.header else {
            self.header = Some(Header::parse(bytes, &self.limits)?);
            self.next_section();
            return Ok(());
        };
        let section = section(bytes, header, &self.sections, end, &self.limits)?;
        self.sections.push(section);
        if section.size == 0 {
            sink.section_end(&section)?;
            self.next_section();
        } else {
            self.state = State::Contents { left: section.size };
        }
        Ok(())
    }

    /// Turns to the section after those that are complete.
    fn next_section(&mut self) {
        let count = self.header.as_ref().map_or(0, |header| header.sizes.len());
        self.state = if self.sections.len() < count { State::Gathering } else { State::End };
    }
}

impl Gathered {
    /// Takes as much of a chunk as is still wanted; says how much.
    fn take(&mut self, chunk: &[u8], wanted: usize) -> usize {
        let taken = chunk.len().min(wanted - self.len);
        self.bytes[self.len..self.len + taken].copy_from_slice(&chunk[..taken]);
        self.len += taken;
        taken
    }

    /// Refuses a file that is no EIF as early as its bytes show it, also one that is shorter than a header.
    fn check_magic(&self) -> Result<(), EifError> {
        let found = [self.bytes[0], self.bytes[1], self.bytes[2], self.bytes[3]];
        if self.len >= found.len() && found != *b".eif" {
            return Err(EifError::BadMagic { found });
        }
        Ok(())
    }
}

impl Header {
    /// Checks everything that the header alone can show.
    fn parse(bytes: &[u8; HEADER_LEN], limits: &Limits) -> Result<Self, EifError> {
        let version = u16_at(bytes, VERSION_AT);
        if !(2..=4).contains(&version) {
            return Err(EifError::UnsupportedVersion { found: version });
        }
        let architecture = match u16_at(bytes, FLAGS_AT) {
            0 => Architecture::X86_64,
            1 => Architecture::Aarch64,
            found => return Err(unknown_bits("the header's flags field", FLAGS_AT, found.into(), "0 or 1 (aarch64)")),
        };
        let reserved = u16_at(bytes, RESERVED_AT);
        if reserved != 0 {
            return Err(unknown_bits("the header's reserved field", RESERVED_AT, reserved.into(), "0"));
        }
        let count = u16_at(bytes, COUNT_AT);
        let limit = limits.sections.min(SLOTS);
        if count < 3 || count > limit {
            return Err(EifError::SectionCount { found: count, limit });
        }
        let unused = u32_at(bytes, UNUSED_AT);
        if unused != 0 {
            return Err(unknown_bits("the header's unused field", UNUSED_AT, unused.into(), "0"));
        }
        let (sizes, total) = Self::slots(bytes, count, limits)?;
        Ok(Self {
            version,
            architecture,
            default_memory: u64_at(bytes, DEFAULT_MEMORY_AT),
            default_cpus: u64_at(bytes, DEFAULT_CPUS_AT),
            crc: u32_at(bytes, CRC_AT),
            sizes,
            total,
        })
    }

    /// The sections' sizes, and the file's size that follows from them.
    fn slots(bytes: &[u8; HEADER_LEN], count: u16, limits: &Limits) -> Result<(Vec<u64>, u64), EifError> {
        let mut sizes = Vec::with_capacity(usize::from(count));
        let mut end = as_u64(HEADER_LEN);
        for index in 0..SLOTS {
            let (offset_at, size_at) = (OFFSETS_AT + 8 * usize::from(index), SIZES_AT + 8 * usize::from(index));
            let (offset, size) = (u64_at(bytes, offset_at), u64_at(bytes, size_at));
            if index >= count {
                for (field, at, found) in [("offset", offset_at, offset), ("size", size_at, size)] {
                    if found != 0 {
                        return Err(EifError::UnusedSlot { index, field, offset: as_u64(at), found, count });
                    }
                }
                continue;
            }
            if offset != end {
                return Err(EifError::SectionOffset { index, offset: as_u64(offset_at), found: offset, expected: end });
            }
            end = end.saturating_add(as_u64(SECTION_HEADER_LEN)).saturating_add(size);
            if end > limits.file {
                return Err(EifError::TooLarge { found: end, limit: limits.file });
            }
            sizes.push(size);
        }
        Ok((sizes, end))
    }
}

/// Checks the header of the next section; its last byte is the one before `end`.
fn section(
    bytes: &[u8; HEADER_LEN],
    header: &Header,
    before: &[SectionInfo],
    end: u64,
    limits: &Limits,
) -> Result<SectionInfo, EifError> {
    let index = index(before.len());
    let offset = end - as_u64(SECTION_HEADER_LEN);
    let number = u16_at(bytes, 0);
    let Some(kind) = SectionKind::from_type(number, header.version) else {
        return Err(EifError::UnknownSectionType { index, offset, found: number, version: header.version });
    };
    let flags = u16_at(bytes, 2);
    if flags != 0 {
        return Err(EifError::UnknownBits {
            field: "a section's flags field",
            offset: offset + 2,
            found: flags.into(),
            allowed: "0",
        });
    }
    let expected = header.sizes.get(before.len()).copied().unwrap_or(0);
    let size = u64_at(bytes, 4);
    if size != expected {
        return Err(EifError::SectionSize { index, kind, offset: offset + 4, found: size, expected });
    }
    let limit = kind.limit(limits);
    if size > limit {
        return Err(EifError::SectionTooLarge { index, offset, kind, found: size, limit });
    }
    let first_of_kind = before.iter().find(|section| section.kind == kind && kind != SectionKind::Ramdisk);
    if let Some(first) = first_of_kind {
        return Err(EifError::RepeatedSection {
            index,
            offset,
            kind,
            first: first.offset - as_u64(SECTION_HEADER_LEN),
        });
    }
    // PCR0 and PCR1 are chains over kernel, command line, ramdisks in this order. Readers that hash in the order of the file
    // and readers that go by type agree only if the file has that order.
    match before.len() {
        0 if kind != SectionKind::Kernel => {
            Err(EifError::UnexpectedSection { index, offset, found: kind, expected: SectionKind::Kernel })
        }
        1 if kind != SectionKind::Cmdline => {
            Err(EifError::UnexpectedSection { index, offset, found: kind, expected: SectionKind::Cmdline })
        }
        _ => Ok(SectionInfo { kind, offset: end, size }),
    }
}

/// The parts of a chunk before and after the header's CRC field, which the CRC does not cover.
pub(super) fn around_crc_field(position: u64, chunk: &[u8]) -> (&[u8], &[u8]) {
    let within = |field: usize| {
        let distance = as_u64(field).saturating_sub(position);
        usize::try_from(distance).map_or(chunk.len(), |distance| distance.min(chunk.len()))
    };
    (&chunk[..within(CRC_AT)], &chunk[within(HEADER_LEN)..])
}

fn unknown_bits(field: &'static str, at: usize, found: u64, allowed: &'static str) -> EifError {
    EifError::UnknownBits { field, offset: as_u64(at), found, allowed }
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_be_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

/// `N` bytes of a header; `at` is one of the constants above, or a slot, and always within it.
fn array_at<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// A length in memory, as a length in the file.
const fn as_u64(len: usize) -> u64 {
    // There is no TryFrom in const functions; usize has at most 64 bits on every platform Rust knows.
    len as u64
}

/// A section's index; the header bounds them to 32.
fn index(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}
