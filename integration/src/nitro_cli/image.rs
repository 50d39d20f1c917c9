//! Reads EIFs as AWS's reader does: section after section, whatever the header says of their places.
//!
//! Deliberately not the daemon's parser: what `describe-enclaves` and `describe-eif` say of an image is a second opinion,
//! but for signatures, of which there is one checker here.

use enclaved_core::id::{Pcr, Timestamp};
use enclaved_core::image::{Limits, Measurer};
use sha2::{Digest, Sha384};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::SystemTime;

const HEADER_LEN: usize = 548;
/// The header's CRC stands in its last four bytes, and is not part of what it covers.
const CRC_AT: usize = 544;
const SECTION_HEADER_LEN: usize = 12;
const MAX_SECTIONS: usize = 32;
/// An application or a metadata section longer than this is not read.
const MAX_READ: u64 = 1024 * 1024;

const KERNEL: u16 = 1;
const CMDLINE: u16 = 2;
const RAMDISK: u16 = 3;
const SIGNATURE: u16 = 4;
const METADATA: u16 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Section {
    kind: u16,
    offset: u64,
    size: u64,
}

/// An image: where its sections are, and what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Format version.
    pub version: u16,
    /// Whether there is a signature section.
    pub is_signed: bool,
    /// The metadata section's bytes, where there is one.
    pub metadata: Option<Vec<u8>>,
    sections: Vec<Section>,
}

fn malformed(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn read_section(file: &mut (impl Read + Seek), section: Section) -> io::Result<Vec<u8>> {
    if section.size > MAX_READ {
        return Err(malformed(format!("section of type {} has {} bytes", section.kind, section.size)));
    }
    file.seek(SeekFrom::Start(section.offset))?;
    let mut bytes = Vec::new();
    file.take(section.size).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != section.size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

impl Image {
    /// Walks the sections.
    ///
    /// # Errors
    /// When the file can't be read or is no whole EIF.
    pub fn read(file: &mut (impl Read + Seek)) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        let mut header = [0; HEADER_LEN];
        file.read_exact(&mut header)?;
        if !header.starts_with(b".eif") {
            return Err(malformed("no EIF magic"));
        }
        let version = u16::from_be_bytes([header[4], header[5]]);
        let mut sections: Vec<Section> = Vec::new();
        let mut offset = HEADER_LEN as u64;
        while offset < len {
            let mut header = [0; SECTION_HEADER_LEN];
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut header)?;
            let [k0, k1, _, _, size @ ..] = header;
            let section = Section {
                kind: u16::from_be_bytes([k0, k1]),
                offset: offset + SECTION_HEADER_LEN as u64,
                size: u64::from_be_bytes(size),
            };
            offset = section
                .offset
                .checked_add(section.size)
                .filter(|end| *end <= len && sections.len() < MAX_SECTIONS)
                .ok_or_else(|| malformed(format!("section {} reaches beyond the file", sections.len())))?;
            if !(KERNEL..=METADATA).contains(&section.kind) {
                return Err(malformed(format!("section {} has the unknown type {}", sections.len(), section.kind)));
            }
            sections.push(section);
        }
        let metadata = sections.iter().find(|section| section.kind == METADATA);
        Ok(Self {
            version,
            is_signed: sections.iter().any(|section| section.kind == SIGNATURE),
            metadata: metadata.map(|section| read_section(file, *section)).transpose()?,
            sections,
        })
    }

    /// The bytes of the last ramdisk: where an image for the stand-in carries its application.
    ///
    /// # Errors
    /// When there is no ramdisk, or it can't be read, or it is too large to be an application.
    pub fn last_ramdisk(&self, file: &mut (impl Read + Seek)) -> io::Result<Vec<u8>> {
        let section = self.sections.iter().rfind(|section| section.kind == RAMDISK);
        read_section(file, *section.ok_or_else(|| malformed("no ramdisk"))?)
    }
}

/// What can be computed of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// `HashAlgorithm`, `PCR0`, `PCR1`, `PCR2`, of a signed image `PCR8`, as nitro-cli prints them.
    pub registers: BTreeMap<String, String>,
    /// Whether the CRC in the header is that of the file.
    pub crc_is_right: bool,
}

/// Computes the measurements and the CRC of a file.
///
/// # Errors
/// When the file can't be read or is no whole EIF, or is signed but not rightly.
pub fn measure(path: &Path) -> io::Result<Measured> {
    let mut file = File::open(path)?;
    let image = Image::read(&mut file)?;
    let mut measured = measure_sections(&image, file)?;
    if image.is_signed {
        measured.registers.insert("PCR8".to_owned(), check_signature(path)?.to_string());
    }
    Ok(measured)
}

/// Computes PCR0 of an image that is not in a file yet.
///
/// # Errors
/// When it is no whole EIF.
pub(crate) fn pcr0(bytes: &[u8]) -> io::Result<String> {
    let image = Image::read(&mut Cursor::new(bytes))?;
    let measured = measure_sections(&image, Cursor::new(bytes))?;
    measured.registers.get("PCR0").cloned().ok_or_else(|| malformed("no PCR0"))
}

/// Checks the signature of a signed image, as far as nitro-cli does; gives the register of its certificate.
///
/// # Errors
/// When it is not rightly signed, or the certificate is not valid now.
pub(super) fn check_signature(path: &Path) -> io::Result<Pcr> {
    let mut measurer = Measurer::new(Limits::default());
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => measurer.update(&buffer[..count]).map_err(|error| malformed(error.to_string()))?,
        }
    }
    let report = measurer.finish().map_err(|error| malformed(error.to_string()))?;
    let (Some(signature), Some(pcr8)) = (report.signature(), report.measurements().pcr8) else {
        return Err(malformed("not signed"));
    };
    let now = Timestamp::from(SystemTime::now());
    if now < signature.not_before || now > signature.not_after {
        return Err(malformed(format!("certificate valid from {} to {}", signature.not_before, signature.not_after)));
    }
    Ok(pcr8)
}

fn measure_sections(image: &Image, mut file: impl Read + Seek) -> io::Result<Measured> {
    let mut crc = crc32fast::Hasher::new();
    file.rewind()?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut header = [0; HEADER_LEN];
    reader.read_exact(&mut header)?;
    let (covered, crc_field) = header.split_at(CRC_AT);
    crc.update(covered);

    // PCR0, PCR1, PCR2.
    let mut registers = [Sha384::new(), Sha384::new(), Sha384::new()];
    let mut ramdisks = 0;
    let mut buffer = vec![0; 1 << 20];
    for section in &image.sections {
        let mut section_header = [0; SECTION_HEADER_LEN];
        reader.read_exact(&mut section_header)?;
        crc.update(&section_header);
        ramdisks += usize::from(section.kind == RAMDISK);
        let into: &[usize] = match (section.kind, ramdisks) {
            (KERNEL | CMDLINE, _) | (RAMDISK, 1) => &[0, 1],
            (RAMDISK, _) => &[0, 2],
            _ => &[],
        };
        let mut left = section.size;
        while left > 0 {
            let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            let count = reader.read(&mut buffer[..most])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            crc.update(&buffer[..count]);
            into.iter().for_each(|register| registers[*register].update(&buffer[..count]));
            left -= count as u64;
        }
    }
    let mut printed: BTreeMap<String, String> =
        registers.into_iter().enumerate().map(|(index, hash)| (format!("PCR{index}"), extended(hash))).collect();
    printed.insert("HashAlgorithm".to_owned(), "Sha512_48 { .. }".to_owned());
    Ok(Measured { registers: printed, crc_is_right: crc.finalize().to_be_bytes() == crc_field })
}

/// A register that was zero, extended by a hash.
fn extended(hash: Sha384) -> String {
    let register = Sha384::new().chain_update([0; 48]).chain_update(hash.finalize()).finalize();
    register.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eif::Eif;
    use std::io::Write as _;

    fn image(ramdisks: &[&[u8]]) -> tempfile::NamedTempFile {
        let ramdisks = ramdisks.iter().map(|ramdisk| ramdisk.to_vec()).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&Eif::new(*b"kernel", "quiet", ramdisks).with_metadata(*b"{}").to_bytes()).unwrap();
        file
    }

    #[test]
    fn registers_cover_their_sections_and_the_crc_the_file() {
        let measured = measure(image(&[b"init", b"application"]).path()).unwrap();
        assert!(measured.crc_is_right);
        let pcr = |contents: &[u8]| extended(Sha384::new().chain_update(contents));
        assert_eq!(measured.registers["PCR0"], pcr(b"kernelquietinitapplication"));
        assert_eq!(measured.registers["PCR1"], pcr(b"kernelquietinit"));
        assert_eq!(measured.registers["PCR2"], pcr(b"application"));
    }

    #[test]
    fn without_an_application_the_second_register_is_the_one_that_the_real_tool_prints() {
        let measured = measure(image(&[b"init"]).path()).unwrap();
        let captured = include_str!("../../captures/describe-eif-real.txt");
        assert!(captured.contains(&format!("\"PCR2\": \"{}\"", measured.registers["PCR2"])));
    }

    #[test]
    fn the_application_is_the_last_ramdisk() {
        let image = image(&[b"init", b"application"]);
        let mut file = File::open(image.path()).unwrap();
        let image = Image::read(&mut file).unwrap();
        assert_eq!(image.last_ramdisk(&mut file).unwrap(), b"application");
        assert_eq!(image.metadata.as_deref(), Some(b"{}".as_slice()));
        assert!(!image.is_signed);
    }

    #[test]
    fn what_is_no_whole_image_is_refused() {
        let image = image(&[b"init"]);
        let bytes = std::fs::read(image.path()).unwrap();
        for (what, cut) in [("empty", 0), ("header cut", 100), ("section cut", 575)] {
            std::fs::write(image.path(), &bytes[..cut]).unwrap();
            assert!(measure(image.path()).is_err(), "{what} was accepted");
        }
        let mut changed = bytes.clone();
        changed[560] ^= 1;
        std::fs::write(image.path(), &changed).unwrap();
        assert!(!measure(image.path()).unwrap().crc_is_right);
    }
}
