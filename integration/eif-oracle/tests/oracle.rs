//! The writer against AWS's builder, byte for byte; the reader against AWS's builder and reader, register for register.

use enclaved_core::image::{Architecture, EifError};
use enclaved_eif_oracle::eif::{self, Eif, damage};
use enclaved_eif_oracle::{build, identity, measure, read, registers};
use proptest::prelude::*;

/// PCR2 of an image with one ramdisk, as `nitro-cli describe-eif` 1.5.2 printed it.
const EMPTY_REGISTER: &str =
    "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a";

/// Writes the parts both ways, reads them both ways, and compares all there is to compare.
fn agree(parts: &Eif, name: &str) {
    let ours = parts.clone().with_metadata(eif::metadata(name, "1.0")).to_bytes();
    let (theirs, built) = build(parts, identity(name, "1.0"), None);
    assert!(ours == theirs, "{name}: the two files of {} and {} bytes differ", ours.len(), theirs.len());

    let report = measure(&theirs).unwrap_or_else(|error| panic!("{name}: {error}"));
    let reading = read(&theirs).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(registers(&report), built, "{name}");
    assert_eq!(registers(&report), reading.registers, "{name}");
    assert!(reading.crc_matches, "{name}");
    assert_eq!(report.digest().0, openssl::sha::sha256(&theirs), "{name}");
    assert_eq!(report.size(), theirs.len() as u64, "{name}");

    let header = reading.header;
    assert_eq!((report.version(), report.default_memory()), (header.version, header.default_mem), "{name}");
    assert_eq!(report.default_cpus(), header.default_cpus, "{name}");
    assert_eq!(report.signed(), reading.signed, "{name}");
    assert_eq!(report.sections().len(), usize::from(header.num_sections), "{name}");
    for (index, section) in report.sections().iter().enumerate() {
        assert_eq!(section.offset, header.section_offsets[index] + eif::SECTION_HEADER_LEN as u64, "{name}");
        assert_eq!(section.size, header.section_sizes[index], "{name}");
    }
    let (metadata, known) = (report.metadata().expect("metadata"), reading.metadata.expect("metadata"));
    assert_eq!(metadata.name.as_ref(), Some(&known.img_name), "{name}");
    assert_eq!(metadata.version.as_ref(), Some(&known.img_version), "{name}");
    assert_eq!(metadata.build_time.as_ref(), Some(&known.build_info.build_time), "{name}");
    assert_eq!(metadata.build_tool.as_ref(), Some(&known.build_info.build_tool), "{name}");
    assert_eq!(metadata.build_tool_version.as_ref(), Some(&known.build_info.build_tool_version), "{name}");
    assert_eq!(metadata.operating_system.as_ref(), Some(&known.build_info.img_os), "{name}");
    assert_eq!(metadata.kernel_version.as_ref(), Some(&known.build_info.img_kernel), "{name}");
}

#[test]
fn images_of_all_shapes_and_sizes_are_written_and_read_alike() {
    let one = Eif::new("kernel", "console=ttyS0", vec![b"ramdisk".to_vec()]);
    agree(&one, "one ramdisk");
    agree(&Eif { flags: 1, ..one.clone() }, "for aarch64");
    agree(&Eif::new("", "", vec![vec![]]), "everything empty");
    agree(&Eif::new("k", "c", vec![vec![], b"second".to_vec(), vec![], vec![7; 3]]), "some empty");
    agree(&Eif::new("k", "c", (0..29).map(|n| vec![n; usize::from(n)]).collect()), "as many as the header takes");
    agree(&eif::sample("x", 1, 5 << 20), "five MiB");
    agree(&Eif { kernel: eif::sample("x", 2, 3 << 20).to_bytes(), ..one }, "a large kernel");
    agree(&Eif::new("k", "c", vec![]).with_ramdisks(65_536), "sections that end where pieces end");
}

/// Ramdisks of sizes around the pieces in which a file is fed and the blocks in which it is hashed.
trait WithRamdisks {
    fn with_ramdisks(self, size: usize) -> Self;
}

impl WithRamdisks for Eif {
    fn with_ramdisks(self, size: usize) -> Self {
        Self { ramdisks: (0..4).map(|n| vec![1; size - n]).collect(), ..self }
    }
}

#[test]
fn an_image_with_one_ramdisk_has_the_pcr2_that_nitro_cli_prints() {
    let (file, built) = build(&Eif::new("k", "c", vec![b"r".to_vec()]), identity("x", "1"), None);
    assert_eq!(built["PCR2"], EMPTY_REGISTER);
    assert_eq!(registers(&measure(&file).unwrap())["PCR2"], EMPTY_REGISTER);
}

#[test]
fn an_image_without_metadata_which_only_the_writer_makes_is_read_alike() {
    let file = Eif { metadata: None, ..eif::sample("x", 3, 10_000) }.to_bytes();
    let (report, reading) = (measure(&file).unwrap(), read(&file).unwrap());
    assert_eq!(registers(&report), reading.registers);
    assert!(reading.crc_matches && reading.metadata.is_none() && report.metadata().is_none());
}

#[test]
fn the_flag_for_aarch64_is_the_one_that_aws_defines() {
    use aws_nitro_enclaves_image_format::defs::EIF_HDR_ARCH_ARM64;
    let parts = Eif { flags: EIF_HDR_ARCH_ARM64, ..eif::sample("x", 4, 4096) };
    assert_eq!(measure(&build(&parts, identity("x", "1"), None).0).unwrap().architecture(), Architecture::Aarch64);
}

#[test]
fn a_flipped_bit_in_a_ramdisk_is_noticed_by_both() {
    let file = damage::flipped(eif::sample("x", 5, 10_000).to_bytes());
    assert!(!read(&file).unwrap().crc_matches);
    assert!(matches!(measure(&file), Err(EifError::Crc { .. })));
}

#[test]
fn images_that_could_be_read_in_two_ways_pass_with_aws_and_are_refused_here() {
    let good = eif::sample("x", 6, 10_000).to_bytes();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        damage::seal(&mut file);
        file
    };
    let mut trailing = good.clone();
    trailing.extend([0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, b'!']);
    damage::seal(&mut trailing);
    for (what, file) in [
        ("an offset that points elsewhere", damage::two_faced(good.clone())),
        ("a size that is not the section's", with(284 + 8, &7_u64.to_be_bytes())),
        ("fewer sections in the header than in the file", with(26, &[0, 4])),
        ("a ramdisk that the header does not know", trailing),
        ("a version that does not exist", with(4, &[0, 9])),
    ] {
        let reading = read(&file).unwrap_or_else(|error| panic!("AWS's reader refuses {what}: {error}"));
        assert!(reading.crc_matches, "{what}");
        assert!(measure(&file).is_err(), "{what} was accepted");
    }
}

/// Images of one to six ramdisks with sections of up to 100 KiB.
fn parts() -> impl Strategy<Value = Eif> {
    let bytes = || {
        prop_oneof![
            4 => prop::collection::vec(any::<u8>(), 0..300),
            1 => (any::<u64>(), 0_usize..100_000).prop_map(|(seed, size)| eif::sample("x", seed, size).to_bytes()),
        ]
    };
    (bytes(), "[ -~]{0,100}", prop::collection::vec(bytes(), 1..7), 0_u16..2)
        .prop_map(|(kernel, cmdline, ramdisks, flags)| Eif { flags, ..Eif::new(kernel, &cmdline, ramdisks) })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_images_are_written_and_read_alike(parts in parts(), name in "[a-zA-Z0-9 \"\\\\/é]{0,40}") {
        agree(&parts, &name);
    }

    #[test]
    fn whatever_passes_here_passes_with_aws_and_measures_the_same(
        parts in parts(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        in_header in any::<bool>(),
    ) {
        // AWS's reader wants every key of the metadata; this one shows those that are there.
        let mut file = Eif { metadata: None, ..parts }.to_bytes();
        for (at, byte) in changes {
            let range = if in_header { 544 } else { file.len() };
            file[at.index(range)] = byte;
        }
        damage::seal(&mut file);
        // Only then is it safe to show it to AWS's reader.
        if let Ok(report) = measure(&file) {
            let reading = read(&file);
            prop_assert!(reading.is_ok(), "AWS's reader refuses it: {:?}", reading.err());
            let reading = reading.unwrap();
            prop_assert!(reading.crc_matches);
            prop_assert_eq!(registers(&report), reading.registers);
        }
    }
}
