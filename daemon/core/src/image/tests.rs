//! Tests of reading, measuring and verifying images. The images are built here, field by field, so that each test can
//! break one rule; that well-formed ones are read as AWS's tools read them is proven in `integration/eif-oracle`.

use super::*;
use crate::id::{EifDigest, Measurements, Pcr};
use proptest::prelude::*;
use sha2::{Digest, Sha256, Sha384};

mod lanes;
mod signature;
mod verdict;

/// PCR2 of an image with one ramdisk: the register of empty contents, as nitro-cli 1.5.2 prints it.
const EMPTY_REGISTER: &str =
    "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a";

const KERNEL: u16 = 1;
const CMDLINE: u16 = 2;
const RAMDISK: u16 = 3;
const SIGNATURE: u16 = 4;
const METADATA: u16 = 5;

/// An image's parts, from which its bytes are laid out.
#[derive(Debug, Clone)]
struct Image {
    version: u16,
    flags: u16,
    sections: Vec<(u16, Vec<u8>)>,
}

fn image(sections: &[(u16, &[u8])]) -> Image {
    Image { version: 4, flags: 0, sections: sections.iter().map(|(kind, bytes)| (*kind, bytes.to_vec())).collect() }
}

/// Kernel, command line, metadata, two ramdisks.
fn typical() -> Image {
    let metadata =
        br#"{"ImageName":"signer","ImageVersion":"1.2","BuildMetadata":{"BuildTool":"eif","KernelVersion":"6.12"}}"#;
    image(&[
        (KERNEL, b"the kernel"),
        (CMDLINE, b"console=ttyS0"),
        (METADATA, metadata),
        (RAMDISK, b"bootstrap"),
        (RAMDISK, b"application"),
    ])
}

impl Image {
    fn bytes(&self) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend(b".eif");
        file.extend(self.version.to_be_bytes());
        file.extend(self.flags.to_be_bytes());
        file.extend((1_u64 << 30).to_be_bytes());
        file.extend(2_u64.to_be_bytes());
        file.extend(0_u16.to_be_bytes());
        file.extend(u16::try_from(self.sections.len()).unwrap().to_be_bytes());
        let mut slots = [[0_u64; 32]; 2];
        let mut end = 548;
        for (index, (_, contents)) in self.sections.iter().enumerate() {
            slots[0][index] = end;
            slots[1][index] = contents.len() as u64;
            end += 12 + contents.len() as u64;
        }
        file.extend(slots.iter().flatten().flat_map(|slot| slot.to_be_bytes()));
        file.extend([0; 8]);
        for (kind, contents) in &self.sections {
            file.extend(kind.to_be_bytes());
            file.extend([0; 2]);
            file.extend((contents.len() as u64).to_be_bytes());
            file.extend(contents);
        }
        seal(&mut file);
        file
    }
}

/// Puts the right CRC into the header.
fn seal(file: &mut [u8]) {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&file[..544]);
    crc.update(&file[548..]);
    file[544..548].copy_from_slice(&crc.finalize().to_be_bytes());
}

fn measure_with(limits: Limits, file: &[u8]) -> Result<EifReport, EifError> {
    let mut measurer = Measurer::new(limits);
    measurer.update(file)?;
    measurer.finish()
}

fn measure(file: &[u8]) -> Result<EifReport, EifError> {
    measure_with(Limits::default(), file)
}

/// Measures an image after changing bytes of it and sealing it again.
fn measure_changed(image: &Image, at: usize, bytes: &[u8]) -> Result<EifReport, EifError> {
    let mut file = image.bytes();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    seal(&mut file);
    measure(&file)
}

fn register(contents: &[&[u8]]) -> Pcr {
    let mut register = Sha384::new();
    register.update([0; 48]);
    register.update(Sha384::digest(contents.concat()));
    Pcr(register.finalize().into())
}

#[test]
fn registers_are_extended_with_the_contents_that_belong_to_them() {
    let report = measure(&typical().bytes()).unwrap();
    let (kernel, cmdline, first, second): (&[u8], &[u8], &[u8], &[u8]) =
        (b"the kernel", b"console=ttyS0", b"bootstrap", b"application");
    assert_eq!(report.measurements().pcr0, register(&[kernel, cmdline, first, second]));
    assert_eq!(report.measurements().pcr1, register(&[kernel, cmdline, first]));
    assert_eq!(report.measurements().pcr2, register(&[second]));
    assert_eq!(report.measurements().pcr8, None);
}

#[test]
fn an_image_with_one_ramdisk_has_the_register_of_nothing_as_its_pcr2() {
    let report = measure(&image(&[(KERNEL, b"k"), (CMDLINE, b"c"), (RAMDISK, b"r")]).bytes()).unwrap();
    assert_eq!(report.measurements().pcr2.to_string(), EMPTY_REGISTER);
    assert_eq!(report.measurements().pcr0, report.measurements().pcr1);
}

#[test]
fn the_report_says_what_the_file_is() {
    let file = typical().bytes();
    let report = measure(&file).unwrap();
    assert_eq!(report.size(), file.len() as u64);
    assert_eq!(report.digest().0, <[u8; 32]>::from(Sha256::digest(&file)));
    assert_eq!((report.version(), report.architecture(), report.signed()), (4, Architecture::X86_64, false));
    assert_eq!((report.default_memory(), report.default_cpus()), (1 << 30, 2));
    let kinds: Vec<_> = report.sections().iter().map(|section| section.kind).collect();
    use SectionKind::{Cmdline, Kernel, Metadata, Ramdisk};
    assert_eq!(kinds, [Kernel, Cmdline, Metadata, Ramdisk, Ramdisk]);
    assert_eq!(report.sections()[1], SectionInfo { kind: Cmdline, offset: 548 + 12 + 10 + 12, size: 13 });
    let metadata = report.metadata().unwrap();
    assert_eq!((metadata.name.as_deref(), metadata.version.as_deref()), (Some("signer"), Some("1.2")));
    assert_eq!((metadata.build_tool.as_deref(), metadata.build_time.as_deref()), (Some("eif"), None));
    assert_eq!(serde_json::to_value(&report).unwrap()["metadata"]["json"]["BuildMetadata"]["KernelVersion"], "6.12");
}

#[test]
fn images_for_graviton_and_of_earlier_versions_are_read() {
    let mut old = image(&[(KERNEL, b"k"), (CMDLINE, b""), (RAMDISK, b"r")]);
    old.version = 2;
    old.flags = 1;
    let report = measure(&old.bytes()).unwrap();
    assert_eq!((report.version(), report.architecture()), (2, Architecture::Aarch64));
}

#[test]
fn every_departure_from_the_sequential_layout_is_refused_with_its_place() {
    let image = typical();
    let file = image.bytes();
    let second = 548 + 12 + 10;
    let be = u64::to_be_bytes;
    // (where, what, the refusal's text)
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"PK\x03\x04", r#"begins with "PK\x03\x04""#),
        (4, &[0, 1], "version 1 of the format (at byte 4)"),
        (4, &[0, 5], "version 5 of the format (at byte 4)"),
        (6, &[0, 2], "flags field at byte 6 is 0x2"),
        (24, &[0, 1], "reserved field at byte 24 is 0x1"),
        (26, &[0, 2], "2 sections (at byte 26)"),
        (26, &[0, 33], "33 sections (at byte 26)"),
        (26, &[0, 4], "offset of section 4 (at byte 60)"),
        (26, &[0, 6], "offset of section 5 (at byte 68) is 0, but the section before it ends at"),
        (28, &be(549), "offset of section 0 (at byte 28) is 549, but the section before it ends at 548"),
        (36, &be(548), "offset of section 1 (at byte 36) is 548, but the section before it ends at 570"),
        (284, &be(9), "offset of section 1 (at byte 36) is 570, but the section before it ends at 569"),
        (284, &be(u64::MAX), "too large: by its header the image has 18446744073709551615 bytes"),
        (284 + 8 * 4, &be(10), "section 4 says (at byte"),
        (284 + 8 * 5, &be(1), "size of section 5 (at byte 324) is 1, but the image has only 5 sections"),
        (540, &[0, 0, 0, 1], "unused field at byte 540 is 0x1"),
        (548, &[0, 2], "section 0 (at byte 548) is a command line"),
        (548, &[0, 0], "section 0 is of type 0 (at byte 548)"),
        (550, &[1, 0], "flags field at byte 550 is 0x100"),
        (552, &be(11), "section 0 says (at byte 552) that it has 11 bytes, the file's header says 10"),
        (second, &[0, 3], "section 1 (at byte 570) is a ramdisk"),
        (second, &[0, 1], "section 1 (at byte 570) is a second kernel: the first is at byte 548"),
        (second, &[0, 6], "section 1 is of type 6 (at byte 570)"),
    ];
    for (at, bytes, text) in cases {
        let error = measure_changed(&image, *at, bytes).expect_err(text);
        assert!(error.to_string().contains(text), "at {at}: {error}");
        assert!(error.offset() <= file.len() as u64);
    }
}

#[test]
fn sections_that_there_is_one_of_are_refused_a_second_time() {
    for (kind, contents, name) in [(CMDLINE, &b"x"[..], "command line"), (METADATA, b"{}", "metadata section")] {
        let twice = image(&[(KERNEL, b"k"), (CMDLINE, b"c"), (kind, contents), (kind, contents), (RAMDISK, b"r")]);
        let error = measure(&twice.bytes()).unwrap_err();
        assert!(matches!(error, EifError::RepeatedSection { .. }) && error.to_string().contains(name), "{error}");
    }
}

#[test]
fn an_image_without_a_ramdisk_is_refused() {
    let file = image(&[(KERNEL, b"k"), (CMDLINE, b"c"), (METADATA, b"{}")]).bytes();
    let size = file.len() as u64;
    assert_eq!(measure(&file), Err(EifError::MissingSection { kind: SectionKind::Ramdisk, size }));
}

#[test]
fn sections_that_a_version_does_not_have_are_unknown_to_it() {
    for (version, kind, contents) in [(2, SIGNATURE, &b"x"[..]), (3, METADATA, b"{}")] {
        let mut old = image(&[(KERNEL, b"k"), (CMDLINE, b"c"), (kind, contents), (RAMDISK, b"r")]);
        old.version = version;
        assert!(matches!(measure(&old.bytes()), Err(EifError::UnknownSectionType { found, .. }) if found == kind));
    }
}

#[test]
fn bytes_after_the_last_section_are_refused() {
    let mut file = typical().bytes();
    let offset = file.len() as u64;
    file.push(0);
    assert_eq!(measure(&file), Err(EifError::TrailingBytes { offset }));
}

#[test]
fn a_file_cut_off_anywhere_is_refused_and_says_where_it_ends() {
    let file = typical().bytes();
    for size in 0..file.len() {
        let error = measure(&file[..size]).unwrap_err();
        let expected = if size < 548 { 548 } else { file.len() as u64 };
        assert!(
            matches!(error, EifError::Truncated { size: s, expected: e, .. } if s == size as u64 && e == expected),
            "cut at {size}: {error}"
        );
    }
    assert!(measure(&file[..590]).unwrap_err().to_string().contains("inside section 1, a command line"));
    assert!(measure(&file[..575]).unwrap_err().to_string().contains("inside the header of section 1"));
}

#[test]
fn a_short_file_that_is_no_image_is_called_that_rather_than_truncated() {
    assert_eq!(measure(b"<?xml version"), Err(EifError::BadMagic { found: *b"<?xm" }));
}

#[test]
fn any_flipped_bit_is_refused() {
    let good = typical().bytes();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut file = good.clone();
            file[at] ^= 1 << bit;
            assert!(measure(&file).is_err(), "bit {bit} of byte {at} flipped unnoticed");
        }
    }
}

#[test]
fn a_change_with_a_matching_crc_is_refused_or_measured_unless_it_is_in_a_part_that_is_never_measured() {
    let image = typical();
    let good = image.bytes();
    let original = measure(&good).unwrap();
    let metadata = original.sections()[2];
    let metadata = usize::try_from(metadata.offset).unwrap()..usize::try_from(metadata.offset + metadata.size).unwrap();
    for at in (0..good.len()).filter(|at| !(544..548).contains(at)) {
        let Ok(report) = measure_changed(&image, at, &[good[at] ^ 1]) else { continue };
        assert_ne!(report.digest(), original.digest());
        // Version 4 becomes 5; the architecture's flag, default memory and default CPUs; the metadata.
        let unmeasured = at == 7 || (8..24).contains(&at) || metadata.contains(&at);
        assert_eq!(report.measurements() == original.measurements(), unmeasured, "byte {at}");
    }
}

#[test]
fn limits_are_kept_before_anything_is_read_or_kept() {
    let file = typical().bytes();
    let limits = Limits::default();
    let refusal = |limits| measure_with(limits, &file).unwrap_err().to_string();
    let size = file.len() as u64;
    assert!(measure_with(Limits { file: size, sections: 5, cmdline: 13, ..limits }, &file).is_ok());
    assert!(refusal(Limits { file: size - 1, ..limits }).contains("too large"));
    assert!(refusal(Limits { sections: 4, ..limits }).contains("5 sections"));
    assert!(refusal(Limits { cmdline: 12, ..limits }).contains("is a command line of 13 bytes: 12 at most"));
    assert!(refusal(Limits { metadata: 12, ..limits }).contains("is a metadata section of"));
    // A file of a few bytes that promises exabytes costs nothing.
    let mut measurer = Measurer::new(Limits { file: u64::MAX, metadata: u64::MAX, ..limits });
    let mut header = file[..548 + 12].to_vec();
    header[284..292].copy_from_slice(&(1_u64 << 62).to_be_bytes());
    assert!(measurer.update(&header).is_err());
}

#[test]
fn the_first_error_stays() {
    let mut measurer = Measurer::new(Limits::default());
    let error = measurer.update(b"nope").unwrap_err();
    assert_eq!(measurer.update(&typical().bytes()), Err(error.clone()));
    assert_eq!(measurer.finish(), Err(error));
}

#[test]
fn the_size_is_known_once_the_header_is() {
    let file = typical().bytes();
    let mut measurer = Measurer::new(Limits::default());
    measurer.update(&file[..547]).unwrap();
    assert_eq!(measurer.expected_size(), None);
    measurer.update(&file[547..548]).unwrap();
    assert_eq!((measurer.expected_size(), measurer.position()), (Some(file.len() as u64), 548));
}

#[test]
fn metadata_that_is_no_json_object_or_could_deceive_a_terminal_is_refused_with_a_reason_of_one_bounded_line() {
    let long = format!(r#"{{"ImageName":"{}"}}"#, "n".repeat(1025));
    let wrong_type = format!(r#"{{"BuildMetadata":"{}\u001b[2J"}}"#, "n".repeat(100_000));
    let deep = format!(r#"{{"CustomMetadata":{}"#, "[".repeat(100_000));
    for (json, text) in [
        (&b""[..], "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"{", "EOF"),
        (b"{} {}", "trailing"),
        (b"{\"ImageName\":\"\xff\"}", "utf-8"),
        (br#"{"ImageName":1}"#, "expected a string"),
        (br#"{"ImageName":"a","ImageName":"b"}"#, "duplicate"),
        (br#"{"ImageName":"\u001b[2J"}"#, "control characters"),
        (long.as_bytes(), "has 1025 bytes"),
        (wrong_type.as_bytes(), "invalid type"),
        (deep.as_bytes(), "recursion limit"),
    ] {
        let file = image(&[(KERNEL, b"k"), (CMDLINE, b"c"), (METADATA, json), (RAMDISK, b"r")]).bytes();
        let Err(EifError::Metadata { offset, reason }) = measure(&file) else { panic!("accepted: {text}") };
        assert_eq!(offset, 548 + 3 * 12 + 2);
        assert!(reason.contains(text) && reason.len() < 1000 && !reason.contains(char::is_control), "{text}: {reason}");
    }
}

/// Well-formed images of all shapes: ramdisks from one to five, metadata before, between or after them, or none.
fn images() -> impl Strategy<Value = Image> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..64);
    (bytes(), bytes(), prop::collection::vec(bytes(), 1..6), prop::option::of(0_usize..6)).prop_map(
        |(kernel, cmdline, ramdisks, metadata)| {
            let mut sections = vec![(KERNEL, kernel), (CMDLINE, cmdline)];
            sections.extend(ramdisks.into_iter().map(|ramdisk| (RAMDISK, ramdisk)));
            if let Some(place) = metadata {
                sections.insert((2 + place).min(sections.len()), (METADATA, br#"{"ImageName":"x"}"#.to_vec()));
            }
            Image { version: 4, flags: 0, sections }
        },
    )
}

/// Feeds a file in pieces whose sizes are taken from `cuts` in turn.
fn measure_in_pieces(file: &[u8], cuts: &[usize]) -> Result<EifReport, EifError> {
    let mut measurer = Measurer::new(Limits::default());
    let mut rest = file;
    for cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at((*cut).min(rest.len()));
        measurer.update(piece)?;
        rest = after;
    }
    measurer.finish()
}

proptest! {
    #[test]
    fn chunking_never_changes_the_result(image in images(), cuts in prop::collection::vec(1_usize..700, 1..8)) {
        let file = image.bytes();
        let whole = measure(&file);
        prop_assert!(whole.is_ok(), "{whole:?}");
        prop_assert_eq!(&whole, &measure_in_pieces(&file, &cuts));
        prop_assert_eq!(&whole, &measure_in_pieces(&file, &[1]));
        // An empty piece is nothing.
        let padded: Vec<usize> = cuts.iter().flat_map(|cut| [*cut, 0]).collect();
        prop_assert_eq!(&whole, &measure_in_pieces(&file, &padded));
    }

    #[test]
    fn chunking_never_changes_the_error(
        image in images(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
        cuts in prop::collection::vec(1_usize..700, 1..8),
    ) {
        let mut file = image.bytes();
        let at = at.index(file.len());
        file[at] = byte;
        file.truncate(cut.index(file.len()) + 1);
        let whole = measure(&file);
        prop_assert_eq!(&whole, &measure_in_pieces(&file, &cuts));
        prop_assert_eq!(&whole, &measure_in_pieces(&file, &[1]));
    }

    #[test]
    fn arbitrary_bytes_never_panic_and_are_no_image(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(measure(&bytes).is_err());
    }

    #[test]
    fn arbitrary_headers_never_panic(
        image in images(),
        changes in prop::collection::vec((0_usize..800, any::<u64>()), 1..6),
    ) {
        let mut file = image.bytes();
        for (at, value) in changes {
            let at = at.min(file.len() - 8);
            file[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        seal(&mut file);
        if let Ok(report) = measure(&file) {
            prop_assert_eq!(report.size(), file.len() as u64);
        }
    }
}
