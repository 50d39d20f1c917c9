//! What holds for any bytes that are given to the image reader. Panics if it does not. Used by the fuzzer and by the replay of its
//! seeds.

use enclaved_core::id::Pcr;
use enclaved_core::image::{EifError, EifReport, Lanes, Limits, Measurer, SectionKind};
use sha2::{Digest, Sha256, Sha384};

/// Longest message that an error may have, in characters: it goes into logs and the status.
const MAX_MESSAGE: usize = 2000;

/// Reads the bytes in every way there is, holds the results against each other and against the bytes, and returns the result.
pub fn check(bytes: &[u8]) -> Result<EifReport, EifError> {
    let whole = on_one_thread(bytes, bytes.len().max(1));
    assert_eq!(whole, on_one_thread(bytes, 1 + bytes.len() % 61), "the result depends on how the bytes are cut");
    assert_eq!(whole, in_lanes(bytes), "lanes and one thread differ");
    match &whole {
        Ok(report) => accepted(bytes, report),
        Err(error) => refused(bytes, error),
    }
    whole
}

fn on_one_thread(bytes: &[u8], piece: usize) -> Result<EifReport, EifError> {
    let mut measurer = Measurer::new(Limits::default());
    bytes.chunks(piece).try_for_each(|piece| measurer.update(piece))?;
    measurer.finish()
}

/// The lanes one after another, the file's last, in pieces of different sizes.
fn in_lanes(bytes: &[u8]) -> Result<EifReport, EifError> {
    let mut lanes = Lanes::new(Limits::default());
    // What a lane finds wrong it keeps until it is joined with the others.
    drop(bytes.chunks(1 + bytes.len() % 127).try_for_each(|piece| lanes.application.update(piece)));
    drop(bytes.chunks(4096).try_for_each(|piece| lanes.image.update(piece)));
    drop(bytes.chunks(1 + bytes.len() % 31).try_for_each(|piece| lanes.file.update(piece)));
    lanes.join()
}

fn refused(bytes: &[u8], error: &EifError) {
    let text = error.to_string();
    assert!(text.chars().count() <= MAX_MESSAGE, "an error of {} bytes", text.len());
    assert!(!text.contains(char::is_control), "an error that is not one line of text: {text:?}");
    assert!(error.offset() <= bytes.len() as u64, "an error beyond the file's end: {text}");
}

/// The sections tile the file, and the measurements are those of the sections.
fn accepted(bytes: &[u8], report: &EifReport) {
    let (mut end, mut image, mut bootstrap, mut application) = (548, Sha384::new(), None, Sha384::new());
    for (index, section) in report.sections().iter().enumerate() {
        assert_eq!(section.offset, end + 12, "section {index} does not follow the one before it");
        end = section.offset + section.size;
        let contents = &bytes[section.offset as usize..end as usize];
        match section.kind {
            SectionKind::Kernel => assert_eq!(index, 0, "a kernel that is not the first section"),
            SectionKind::Cmdline => assert_eq!(index, 1, "a command line that is not the second section"),
            SectionKind::Ramdisk => {}
            SectionKind::Signature | SectionKind::Metadata => continue,
        }
        image.update(contents);
        if section.kind == SectionKind::Ramdisk {
            match bootstrap {
                None => bootstrap = Some(image.clone()),
                Some(_) => application.update(contents),
            }
        }
    }
    assert_eq!(end, bytes.len() as u64, "the sections do not reach the file's end");
    assert_eq!(report.size(), end);
    for once in [SectionKind::Signature, SectionKind::Metadata] {
        let there = report.sections().iter().filter(|section| section.kind == once).count();
        let shown = if once == SectionKind::Signature { report.signed() } else { report.metadata().is_some() };
        assert_eq!(there, usize::from(shown), "{once}");
    }
    let found = report.measurements();
    assert_eq!(found.pcr0, register(image));
    assert_eq!(found.pcr1, register(bootstrap.expect("an image without a ramdisk was accepted")));
    assert_eq!(found.pcr2, register(application));
    assert_eq!(found.pcr8.is_some(), report.signed());
    assert_eq!(report.digest().0, <[u8; 32]>::from(Sha256::digest(bytes)));
}

fn register(contents: Sha384) -> Pcr {
    Pcr(Sha384::new_with_prefix([0; 48]).chain_update(contents.finalize()).finalize().into())
}
