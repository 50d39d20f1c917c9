//! The seeds of the image reader's fuzzer (`daemon/core/fuzz/seeds/eif`): small images, each of a kind of its own. They are made
//! here, and each must come to what is written here beside it; what holds for any bytes must hold for them too.
//!
//! After a change: `ENCLAVED_WRITE_SEEDS=1 cargo test -p enclaved-integration --test eif_seeds`.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "../../daemon/core/fuzz/property.rs"]
#[expect(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    unreachable_pub,
    reason = "it is the fuzzer's, which has its own rules"
)]
mod property;

use enclaved_integration::eif::{Eif, damage, metadata};
use enclaved_integration::signing::Signer;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const KERNEL: u16 = 1;
const CMDLINE: u16 = 2;
const RAMDISK: u16 = 3;
const SIGNATURE: u16 = 4;
const METADATA: u16 = 5;

/// A certificate, its key, and another one, made for tests alone.
const CERTIFICATE: &str = include_str!("../../daemon/core/src/image/tests/signer.pem");
const OTHER_CERTIFICATE: &str = include_str!("../../daemon/core/src/image/tests/p256.pem");
const KEY: [u8; 48] = [
    0x1e, 0xb0, 0xba, 0xc4, 0x39, 0x68, 0x8e, 0xcd, 0xc7, 0x8f, 0x7d, 0x21, 0xfd, 0x4d, 0x05, 0x3d, 0xe1, 0x33, 0xd3,
    0xdc, 0xbb, 0x46, 0x5f, 0x7d, 0x80, 0xc8, 0x90, 0x68, 0xcd, 0xc7, 0x1b, 0x17, 0xcc, 0x50, 0x58, 0x8c, 0x8b, 0xfd,
    0xc3, 0x97, 0x28, 0x68, 0x08, 0xdb, 0x99, 0xdc, 0x5f, 0x0b,
];

/// An image, and what the reader says of it: nothing, or an error with these words.
type Seed = (Vec<u8>, Option<&'static str>);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemon/core/fuzz/seeds/eif")
}

fn image() -> Eif {
    Eif::new("the kernel", "console=ttyS0", vec![b"bootstrap".to_vec(), b"application".to_vec()])
        .with_metadata(metadata("seed", "1"))
}

fn signed_with(certificates: &str, image: Eif) -> Eif {
    Signer::with_key(certificates, &KEY).unwrap().sign(image).unwrap()
}

/// An image of these sections.
fn of(sections: &[(u16, &[u8])]) -> Vec<u8> {
    image().with_sections(sections)
}

/// The honest image with other bytes somewhere, under a right CRC.
fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = image().to_bytes();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    damage::seal(&mut file);
    file
}

fn seeds() -> BTreeMap<&'static str, Seed> {
    let good = |file: Vec<u8>| (file, None);
    let bad = |file: Vec<u8>, words| (file, Some(words));
    let honest = image().to_bytes();
    let signed = signed_with(CERTIFICATE, image());
    let signature = signed.signature.clone().unwrap();
    let another = signed_with(CERTIFICATE, Eif { kernel: b"another".to_vec(), ..image() }).signature;
    let (kernel, cmdline, ramdisk) = ((KERNEL, &b"k"[..]), (CMDLINE, &b"c"[..]), (RAMDISK, &b"r"[..]));
    let said = metadata("seed", "1");
    let be = u64::to_be_bytes;
    BTreeMap::from([
        ("good-honest", good(honest.clone())),
        ("good-one-ramdisk", good(Eif { ramdisks: vec![b"r".to_vec()], ..image() }.to_bytes())),
        ("good-32-sections", good(Eif { ramdisks: vec![b"r".to_vec(); 29], ..image() }.to_bytes())),
        ("good-empty-sections", good(of(&[(KERNEL, b""), (CMDLINE, b""), (RAMDISK, b"")]))),
        ("good-aarch64", good(Eif { flags: 1, ..image() }.to_bytes())),
        ("good-version-2", good(Eif { version: 2, metadata: None, ..image() }.to_bytes())),
        ("good-metadata-last", good(of(&[kernel, cmdline, ramdisk, (METADATA, &said)]))),
        ("good-signed", good(signed.to_bytes())),
        (
            "good-signed-with-chain",
            good(signed_with(&format!("{CERTIFICATE}text\n{OTHER_CERTIFICATE}"), image()).to_bytes()),
        ),
        ("bad-nothing", bad(Vec::new(), "ends at byte 0, inside the header")),
        ("bad-other-file", bad(b"<?xml version=\"1.0\"?>".to_vec(), "not an EIF")),
        ("bad-header-alone", bad(honest[..548].to_vec(), "inside the header of section 0")),
        ("bad-truncated", bad(damage::truncated(honest.clone(), 5), "inside section 4, a ramdisk")),
        ("bad-crc", bad(damage::bad_crc(honest.clone()), "damaged: the CRC")),
        ("bad-flipped-bit", bad(damage::flipped(honest.clone()), "damaged: the CRC")),
        ("bad-trailing", bad(damage::trailing(honest.clone()), "bytes after the end")),
        ("bad-wrong-offset", bad(damage::two_faced(honest.clone()), "offset of section 1")),
        ("bad-gap", bad(with(28, &be(549)), "offset of section 0 (at byte 28) is 549")),
        ("bad-overlap", bad(with(36, &be(548)), "offset of section 1 (at byte 36) is 548")),
        ("bad-size-of-section", bad(with(552, &be(11)), "section 0 says (at byte 552)")),
        ("bad-size-in-header", bad(with(284 + 8 * 4, &be(12)), "the file's header says 12")),
        ("bad-exabytes", bad(with(284, &be(1 << 62)), "too large")),
        ("bad-count-too-small", bad(with(26, &[0, 4]), "offset of section 4")),
        ("bad-count-too-large", bad(with(26, &[0, 6]), "offset of section 5")),
        ("bad-unused-slot", bad(with(284 + 8 * 31, &be(1)), "size of section 31")),
        ("bad-flags", bad(with(6, &[0, 2]), "flags field at byte 6")),
        ("bad-section-flags", bad(with(550, &[0, 1]), "flags field at byte 550")),
        ("bad-unknown-type", bad(of(&[kernel, cmdline, ramdisk, (6, b"?")]), "is of type 6")),
        ("bad-second-kernel", bad(of(&[kernel, cmdline, ramdisk, kernel]), "a second kernel")),
        ("bad-second-cmdline", bad(of(&[kernel, cmdline, cmdline, ramdisk]), "a second command line")),
        (
            "bad-second-metadata",
            bad(of(&[kernel, cmdline, (METADATA, b"{}"), (METADATA, b"{}"), ramdisk]), "a second metadata"),
        ),
        (
            "bad-second-signature",
            bad(
                of(&[kernel, cmdline, ramdisk, (SIGNATURE, &signature), (SIGNATURE, &signature)]),
                "a second signature",
            ),
        ),
        ("bad-order", bad(of(&[cmdline, kernel, ramdisk]), "begins with its kernel")),
        ("bad-no-ramdisk", bad(of(&[kernel, cmdline, (METADATA, b"{}")]), "no ramdisk")),
        ("bad-metadata-no-json", bad(image().with_metadata("{\"a\":").to_bytes(), "the metadata (at byte")),
        (
            "bad-metadata-deep",
            bad(image().with_metadata(format!("{{\"a\":{}", "[".repeat(300))).to_bytes(), "recursion"),
        ),
        (
            "bad-signature-of-another-image",
            bad(Eif { signature: another, ..image() }.to_bytes(), "not this image's PCR0"),
        ),
        (
            "bad-signature-cut",
            bad(Eif { signature: Some(signature[..300].to_vec()), ..image() }.to_bytes(), "the signature (at byte"),
        ),
        (
            "bad-signature-endless",
            bad(
                Eif {
                    signature: Some(
                        b"\x81\xa2\x73signing_certificate\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x00".to_vec(),
                    ),
                    ..image()
                }
                .to_bytes(),
                "end of input",
            ),
        ),
        (
            "bad-signature-ambiguous-certificate",
            bad(signed_with(&format!("x -----BEGIN CERTIFICATE-----\n{CERTIFICATE}"), image()).to_bytes(), "two ways"),
        ),
    ])
}

#[test]
fn every_seed_is_judged_as_its_name_says_and_all_that_holds_for_any_bytes_holds_for_it() {
    for (name, (bytes, words)) in seeds() {
        match (property::check(&bytes), words) {
            (Ok(_), None) => assert!(name.starts_with("good-"), "{name}"),
            (Err(error), Some(words)) => {
                assert!(name.starts_with("bad-") && error.to_string().contains(words), "{name}: {error}");
            }
            (Ok(_), Some(words)) => panic!("{name} was accepted, but: {words}"),
            (Err(error), None) => panic!("{name} was refused: {error}"),
        }
    }
}

#[test]
fn the_seeds_in_the_tree_are_the_ones_that_are_made_here() {
    let folder = folder();
    let seeds: BTreeMap<String, Vec<u8>> =
        seeds().into_iter().map(|(name, (bytes, _))| (format!("{name}.eif"), bytes)).collect();
    if std::env::var_os("ENCLAVED_WRITE_SEEDS").is_some() {
        fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in &seeds {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    let in_tree: BTreeMap<String, Vec<u8>> = fs::read_dir(&folder).unwrap().map(read).collect();
    let names = |seeds: &BTreeMap<String, Vec<u8>>| seeds.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&in_tree), names(&seeds));
    for (name, bytes) in &seeds {
        assert!(in_tree[name] == *bytes, "{name} is another; see the head of this file for how to make them again");
    }
}

/// What the fuzzer would find in seconds, in a second: every byte of the honest and the signed seed, changed in a few ways, under a
/// right CRC.
#[test]
fn no_change_of_a_byte_breaks_what_holds_for_any_bytes() {
    for name in ["good-honest", "good-signed-with-chain"] {
        let (file, _) = seeds().remove(name).unwrap();
        for at in (0..file.len()).step_by(if name == "good-honest" { 1 } else { 17 }) {
            for flip in [0x01, 0x80, 0xff] {
                let mut changed = file.clone();
                changed[at] ^= flip;
                damage::seal(&mut changed);
                drop(property::check(&changed));
            }
        }
    }
}
