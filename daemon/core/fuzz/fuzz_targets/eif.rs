//! Any bytes as an image: as they are, and with the CRC that they ought to have, since hardly any change would get past it.
//!
//! The mutator knows the form of an image: it changes the contents of a section, leaves out, doubles or swaps sections, and lays
//! the whole out anew, so that what lies behind the layout's checks (metadata, signature, measurements) is reached too.
#![no_main]

#[path = "../../../../integration/src/eif.rs"]
#[allow(dead_code)] // Only its writer is of use here.
mod eif;
#[path = "../property.rs"]
mod property;

use eif::{Eif, HEADER_LEN, SECTION_HEADER_LEN, damage};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| {
    drop(property::check(bytes));
    if bytes.len() >= HEADER_LEN {
        let mut sealed = bytes.to_vec();
        damage::seal(&mut sealed);
        drop(property::check(&sealed));
    }
});

fuzz_mutator!(|bytes: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let laid_out = sections(&bytes[..size]);
    // Every fourth change is one of bytes that knows nothing of images.
    if laid_out.is_empty() || seed % 4 == 0 {
        return fuzzer_mutate(bytes, size, max_size);
    }
    let mut sections = laid_out;
    let at = (seed / 64) as usize % sections.len();
    match seed / 4 % 8 {
        0 => drop(sections.remove(at)),
        1 => sections.insert(at, sections[at].clone()),
        2 => sections.rotate_left(at),
        3 => sections[at].0 = (seed / 64 % 7) as u16,
        _ => {
            let contents = &mut sections[at].1;
            let len = contents.len();
            contents.resize(len.max(1) * 2, 0);
            let most = contents.len();
            let len = fuzzer_mutate(contents, len, most);
            contents.truncate(len);
        }
    }
    sections.truncate(32);
    let borrowed: Vec<(u16, &[u8])> = sections.iter().map(|(kind, contents)| (*kind, contents.as_slice())).collect();
    let mut parts = Eif::new("", "", Vec::new());
    parts.version = u16::from_be_bytes([bytes[4], bytes[5]]);
    let file = parts.with_sections(&borrowed);
    if file.len() > max_size {
        return fuzzer_mutate(bytes, size, max_size);
    }
    bytes[..file.len()].copy_from_slice(&file);
    file.len()
});

/// The sections as they follow each other, as far as they can be told.
fn sections(file: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut sections = Vec::new();
    let mut rest = file.get(HEADER_LEN..).unwrap_or_default();
    while let Some((header, after)) = rest.split_at_checked(SECTION_HEADER_LEN) {
        let kind = u16::from_be_bytes([header[0], header[1]]);
        let size =
            header[4..].iter().fold(0_usize, |size, byte| size.saturating_mul(256).saturating_add((*byte).into()));
        let (contents, after) = after.split_at(size.min(after.len()));
        sections.push((kind, contents.to_vec()));
        rest = after;
    }
    sections
}
