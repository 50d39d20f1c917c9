//! A small writer of enclave images (EIF), so that the demo and the tests run on real ones.
//!
//! It writes what AWS's `EifBuilder` writes, byte for byte (`eif-oracle` proves it), and shares no code with the reader in
//! `enclaved-core`: a mistake in the format made in one is not repeated by the other. It needs nothing of this crate, so
//! that the oracle, which is outside the workspace, can include this file as it is.

use crc32fast::Hasher;
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

/// Where the header ends and the first section begins.
pub const HEADER_LEN: usize = 548;
/// Length of the header that each section has of its own.
pub const SECTION_HEADER_LEN: usize = 12;
/// Where the header's CRC is; it is its last field.
pub const CRC_AT: usize = 544;

/// The parts of an image. Every field can be set; [`Eif::new`] fills in what AWS's builder would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eif {
    /// Version of the format.
    pub version: u16,
    /// 0 for x86-64, 1 for aarch64.
    pub flags: u16,
    /// In bytes.
    pub default_memory: u64,
    /// Number of CPUs.
    pub default_cpus: u64,
    /// Any bytes: what is no kernel does not boot, but measures all the same.
    pub kernel: Vec<u8>,
    /// The kernel's command line.
    pub cmdline: Vec<u8>,
    /// The metadata section, usually JSON; `None` leaves it out, which AWS's builder never does.
    pub metadata: Option<Vec<u8>>,
    /// The first boots the enclave, the rest is the application.
    pub ramdisks: Vec<Vec<u8>>,
    /// The signature section, as it stands in the file.
    pub signature: Option<Vec<u8>>,
}

impl Eif {
    /// An unsigned x86-64 image with metadata of its own.
    pub fn new(kernel: impl Into<Vec<u8>>, cmdline: &str, ramdisks: Vec<Vec<u8>>) -> Self {
        Self {
            version: 4,
            flags: 0,
            default_memory: 1 << 30,
            default_cpus: 2,
            kernel: kernel.into(),
            cmdline: cmdline.into(),
            metadata: Some(metadata("enclaved-integration", "0.1.0")),
            ramdisks,
            signature: None,
        }
    }

    /// The same image with this metadata section.
    #[must_use]
    pub fn with_metadata(self, metadata: impl Into<Vec<u8>>) -> Self {
        Self { metadata: Some(metadata.into()), ..self }
    }

    /// The sections in the order of the file, with their types.
    fn sections(&self) -> Vec<(u16, &[u8])> {
        let mut sections: Vec<(u16, &[u8])> = vec![(1, &self.kernel), (2, &self.cmdline)];
        sections.extend(self.metadata.iter().map(|metadata| (5, metadata.as_slice())));
        sections.extend(self.ramdisks.iter().map(|ramdisk| (3, ramdisk.as_slice())));
        sections.extend(self.signature.iter().map(|signature| (4, signature.as_slice())));
        sections
    }

    /// The header of an image whose sections are of these sizes, with no CRC yet.
    ///
    /// # Panics
    /// With more than 32 sections, for which it has no room.
    fn header(&self, section_sizes: &[u64]) -> Vec<u8> {
        assert!(section_sizes.len() <= 32, "an EIF has 32 sections at most, not {}", section_sizes.len());
        let mut offsets = [0_u64; 32];
        let mut sizes = [0_u64; 32];
        let mut end = HEADER_LEN as u64;
        for (index, size) in section_sizes.iter().enumerate() {
            offsets[index] = end;
            sizes[index] = *size;
            end += SECTION_HEADER_LEN as u64 + size;
        }
        let count: u16 = section_sizes.iter().map(|_| 1).sum();

        let mut header = Vec::with_capacity(HEADER_LEN);
        header.extend_from_slice(b".eif");
        header.extend_from_slice(&self.version.to_be_bytes());
        header.extend_from_slice(&self.flags.to_be_bytes());
        header.extend_from_slice(&self.default_memory.to_be_bytes());
        header.extend_from_slice(&self.default_cpus.to_be_bytes());
        header.extend_from_slice(&0_u16.to_be_bytes());
        header.extend_from_slice(&count.to_be_bytes());
        for slot in offsets.iter().chain(&sizes) {
            header.extend_from_slice(&slot.to_be_bytes());
        }
        header.extend_from_slice(&0_u32.to_be_bytes());
        header.extend_from_slice(&0_u32.to_be_bytes());
        header
    }

    /// The image file.
    ///
    /// # Panics
    /// With more than 32 sections, for which the header has no room.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.with_sections(&self.sections())
    }

    /// An image file with these sections (type, contents) in place of its own, whatever they are: also such that no tool writes.
    ///
    /// # Panics
    /// With more than 32 sections, for which the header has no room.
    pub fn with_sections(&self, sections: &[(u16, &[u8])]) -> Vec<u8> {
        let sizes: Vec<u64> = sections.iter().map(|(_, contents)| contents.len() as u64).collect();
        let mut file = self.header(&sizes);
        for (kind, contents) in sections {
            file.extend_from_slice(&section_header(*kind, contents.len() as u64));
            file.extend_from_slice(contents);
        }
        damage::seal(&mut file);
        file
    }
}

fn section_header(kind: u16, size: u64) -> [u8; SECTION_HEADER_LEN] {
    let mut header = [0; SECTION_HEADER_LEN];
    header[..2].copy_from_slice(&kind.to_be_bytes());
    header[4..].copy_from_slice(&size.to_be_bytes());
    header
}

/// An image as [`sample`] makes it, of any size, written without ever being in memory: byte for byte what
/// `sample(name, seed, size).to_bytes()` is.
///
/// # Errors
/// When the file can't be written.
pub fn write_sample(mut file: File, name: &str, seed: u64, size: u64) -> io::Result<()> {
    let mut state = seed;
    let (mut kernel, mut first) = (vec![0; 256], vec![0; 256]);
    fill(&mut kernel, &mut state);
    fill(&mut first, &mut state);
    let rest = size.max(2048) - 2048;
    // Everything but the contents of the last section, which is nearly all of the file.
    let small = sample_of(name, kernel, vec![first, Vec::new()]);
    let mut sections = small.sections();
    let last = sections.pop();
    let mut sizes: Vec<u64> = sections.iter().map(|(_, contents)| contents.len() as u64).collect();
    sizes.push(rest);

    let mut crc = Hasher::new();
    let header = small.header(&sizes);
    crc.update(&header[..CRC_AT]);
    let mut out = BufWriter::with_capacity(1 << 20, &mut file);
    out.write_all(&header)?;
    let mut put = |bytes: &[u8]| {
        crc.update(bytes);
        out.write_all(bytes)
    };
    for (kind, contents) in sections {
        put(&section_header(kind, contents.len() as u64))?;
        put(contents)?;
    }
    if let Some((kind, _)) = last {
        put(&section_header(kind, rest))?;
    }
    let mut piece = vec![0; 1 << 16];
    let mut left = rest;
    while left > 0 {
        let count = usize::try_from(left).map_or(piece.len(), |left| left.min(piece.len()));
        fill(&mut piece[..count], &mut state);
        put(&piece[..count])?;
        left -= count as u64;
    }
    out.flush()?;
    drop(out);
    file.seek(SeekFrom::Start(CRC_AT as u64))?;
    file.write_all(&crc.finalize().to_be_bytes())
}

/// A metadata section with the keys that AWS's builder writes, in its order, the same at every call.
pub fn metadata(name: &str, version: &str) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Metadata<'a> {
        image_name: &'a str,
        image_version: &'a str,
        build_metadata: Build,
        docker_info: Empty,
        custom_metadata: Empty,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Build {
        build_time: &'static str,
        build_tool: &'static str,
        build_tool_version: &'static str,
        operating_system: &'static str,
        kernel_version: &'static str,
    }
    #[derive(Serialize)]
    struct Empty {}

    let metadata = Metadata {
        image_name: name,
        image_version: version,
        build_metadata: Build {
            build_time: "2026-01-01T00:00:00Z",
            build_tool: "enclaved-integration",
            build_tool_version: "0.1.0",
            operating_system: "Linux",
            kernel_version: "6.12.95",
        },
        docker_info: Empty {},
        custom_metadata: Empty {},
    };
    #[expect(clippy::expect_used, reason = "only maps with keys that are no strings, and failing writers, fail")]
    serde_json::to_vec(&metadata).expect("structs of strings are JSON")
}

/// A well-formed image of about `size` bytes (2 KiB at least) whose contents follow from `seed` alone: two ramdisks, the
/// second, as in real images, with nearly all of it. Different seeds give different measurements.
pub fn sample(name: &str, seed: u64, size: usize) -> Eif {
    let mut state = seed;
    let mut bytes = |len: usize| {
        let mut bytes = vec![0; len];
        fill(&mut bytes, &mut state);
        bytes
    };
    let (kernel, first) = (bytes(256), bytes(256));
    let rest = bytes(size.max(2048) - 2048);
    sample_of(name, kernel, vec![first, rest])
}

fn sample_of(name: &str, kernel: Vec<u8>, ramdisks: Vec<Vec<u8>>) -> Eif {
    Eif::new(kernel, "console=ttyS0 reboot=k panic=30 nomodules nit.target=/run.sh", ramdisks)
        .with_metadata(metadata(name, "0.1.0"))
}

/// The next bytes of the sequence. What is left of its last number is not used.
fn fill(bytes: &mut [u8], state: &mut u64) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&splitmix(state).to_be_bytes()[..chunk.len()]);
    }
}

/// The next number of a SplitMix64 sequence: enough to fill files, of no use for anything secret.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Ways in which an image arrives broken.
pub mod damage {
    use super::{CRC_AT, HEADER_LEN, Hasher};

    /// Makes the header's CRC that of the file, so that another fault is found instead of the CRC.
    ///
    /// # Panics
    /// With less than a header.
    pub fn seal(file: &mut [u8]) {
        let mut crc = Hasher::new();
        crc.update(&file[..CRC_AT]);
        crc.update(&file[HEADER_LEN..]);
        file[CRC_AT..HEADER_LEN].copy_from_slice(&crc.finalize().to_be_bytes());
    }

    /// Spoils the header's CRC and nothing else.
    pub fn bad_crc(mut file: Vec<u8>) -> Vec<u8> {
        file[CRC_AT] ^= 1;
        file
    }

    /// The file without its last `missing` bytes.
    pub fn truncated(mut file: Vec<u8>, missing: usize) -> Vec<u8> {
        file.truncate(file.len().saturating_sub(missing));
        file
    }

    /// The file with one bit of its last section flipped: the size is right, the CRC is not.
    pub fn flipped(mut file: Vec<u8>) -> Vec<u8> {
        if let Some(last) = file.last_mut() {
            *last ^= 1;
        }
        file
    }

    /// The file with bytes after its end, which its CRC covers.
    pub fn trailing(mut file: Vec<u8>) -> Vec<u8> {
        file.extend_from_slice(b"more");
        seal(&mut file);
        file
    }

    /// The header names another place for the second section than where it is, under a right CRC: a reader that goes by the
    /// header and one that walks the sections see two different images.
    pub fn two_faced(mut file: Vec<u8>) -> Vec<u8> {
        let second_offset = 28 + 8;
        file[second_offset + 7] ^= 1;
        seal(&mut file);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::{damage, sample, write_sample};

    #[test]
    fn a_sample_written_to_a_file_is_the_one_made_in_memory_byte_for_byte() {
        for size in [0, 2048, 2049, 4097, 70_000, 300_001] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            write_sample(file.reopen().unwrap(), "a", 7, size).unwrap();
            let mut written = Vec::new();
            std::io::Read::read_to_end(&mut file, &mut written).unwrap();
            assert!(written == sample("a", 7, usize::try_from(size).unwrap()).to_bytes(), "{size}");
        }
    }

    #[test]
    fn a_sample_is_the_same_for_the_same_seed_and_about_as_large_as_asked() {
        let file = sample("a", 1, 100_000).to_bytes();
        assert_eq!(file, sample("a", 1, 100_000).to_bytes());
        assert_ne!(file, sample("a", 2, 100_000).to_bytes());
        assert!(file.len().abs_diff(100_000) < 1000, "{}", file.len());
    }

    #[test]
    fn every_kind_of_damage_is_refused_by_the_reader_each_with_an_error_of_its_own() {
        use enclaved_core::image::{EifError, Limits, Measurer};
        let read = |file: &[u8]| {
            let mut measurer = Measurer::new(Limits::default());
            measurer.update(file)?;
            measurer.finish()
        };
        let good = sample("a", 1, 4096).to_bytes();
        let report = read(&good).unwrap();
        assert_eq!(report.metadata().unwrap().name.as_deref(), Some("a"));
        assert!(matches!(read(&damage::bad_crc(good.clone())), Err(EifError::Crc { .. })));
        assert!(matches!(read(&damage::flipped(good.clone())), Err(EifError::Crc { .. })));
        assert!(matches!(read(&damage::truncated(good.clone(), 1)), Err(EifError::Truncated { .. })));
        assert!(matches!(read(&damage::trailing(good.clone())), Err(EifError::TrailingBytes { .. })));
        assert!(matches!(read(&damage::two_faced(good)), Err(EifError::SectionOffset { .. })));
    }
}
