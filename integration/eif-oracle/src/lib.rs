//! AWS's EIF crate, asked the two questions that this project's writer and reader answer too: what are the bytes of an
//! image with these parts, and what are the measurements of these bytes.
//!
//! Only honest images may be shown to it: it allocates whatever a length in the file says.

#[path = "../../src/eif.rs"]
pub mod eif;

use aws_nitro_enclaves_image_format::defs::{EifBuildInfo, EifHeader, EifIdentityInfo};
use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use aws_nitro_enclaves_image_format::utils::{EifBuilder, SignKeyData};
use eif::Eif;
use enclaved_core::image::{EifError, EifReport, Lanes, Limits, Measurer};
use sha2::{Digest, Sha384};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The registers by name, in hexadecimal.
pub type Registers = BTreeMap<String, String>;

/// The metadata that the writer's [`eif::metadata`] stands for, in AWS's own type.
pub fn identity(name: &str, version: &str) -> EifIdentityInfo {
    EifIdentityInfo {
        img_name: name.to_owned(),
        img_version: version.to_owned(),
        build_info: EifBuildInfo {
            build_time: "2026-01-01T00:00:00Z".to_owned(),
            build_tool: "enclaved-integration".to_owned(),
            build_tool_version: "0.1.0".to_owned(),
            img_os: "Linux".to_owned(),
            img_kernel: "6.12.95".to_owned(),
        },
        docker_info: serde_json::json!({}),
        custom_info: serde_json::json!({}),
    }
}

/// The image that AWS's builder makes of these parts, and the registers that it says it has. The parts' own metadata,
/// signature, version and default sizes are not used: the builder makes its own.
pub fn build(parts: &Eif, identity: EifIdentityInfo, key: Option<SignKeyData>) -> (Vec<u8>, Registers) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = |name: String, contents: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, contents).expect("a file in it");
        path
    };
    let cmdline = String::from_utf8(parts.cmdline.clone()).expect("AWS's builder takes text as command line");
    let kernel = file("kernel".to_owned(), &parts.kernel);
    let mut builder = EifBuilder::new(&kernel, cmdline, key, Sha384::new(), parts.flags, identity);
    for (index, ramdisk) in parts.ramdisks.iter().enumerate() {
        builder.add_ramdisk(&file(format!("ramdisk-{index}"), ramdisk));
    }
    let path = dir.path().join("image.eif");
    let registers = builder.write_to(&mut std::fs::File::create(&path).expect("a file for the image"));
    (std::fs::read(&path).expect("the image"), values(registers))
}

/// What AWS's reader finds in an image.
pub struct Reading {
    pub header: EifHeader,
    pub registers: Registers,
    pub crc_matches: bool,
    pub signed: bool,
    pub metadata: Option<EifIdentityInfo>,
}

/// Has AWS's reader read an image.
pub fn read(file: &[u8]) -> Result<Reading, String> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("image.eif");
    std::fs::write(&path, file).expect("a file in it");
    let mut reader = EifReader::from_eif(text(&path))?;
    Ok(Reading {
        header: reader.get_header(),
        registers: values(reader.get_measurements()?),
        crc_matches: reader.check_crc(),
        signed: reader.signature_section.is_some(),
        metadata: reader.get_metadata(),
    })
}

/// Has this project's reader read an image, on one thread and in lanes that are apart, which must come to the same.
pub fn measure(file: &[u8]) -> Result<EifReport, EifError> {
    let mut measurer = Measurer::new(Limits::default());
    // In pieces, as it arrives from a network.
    let fed = file.chunks(60_000).try_for_each(|piece| measurer.update(piece));
    let measured = fed.and_then(|()| measurer.finish());
    let mut lanes = Lanes::new(Limits::default());
    // What a lane finds wrong it keeps until it is joined with the others.
    drop(file.chunks(50_000).try_for_each(|piece| lanes.application.update(piece)));
    drop(file.chunks(65_536).try_for_each(|piece| lanes.image.update(piece)));
    drop(file.chunks(1_000).try_for_each(|piece| lanes.file.update(piece)));
    assert_eq!(lanes.join(), measured, "lanes and one thread differ");
    measured
}

/// The registers of a report, as AWS's crate gives its own.
pub fn registers(report: &EifReport) -> Registers {
    let found = report.measurements();
    let mut registers = BTreeMap::from([("PCR0", found.pcr0), ("PCR1", found.pcr1), ("PCR2", found.pcr2)]);
    registers.extend(found.pcr8.map(|pcr8| ("PCR8", pcr8)));
    registers.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect()
}

/// AWS's crate puts the debug form of its hasher among the registers.
fn values(mut registers: Registers) -> Registers {
    registers.remove("HashAlgorithm");
    registers
}

/// A path as AWS's crate takes them.
pub fn text(path: &Path) -> String {
    path.to_str().expect("a path of a temporary folder is text").to_owned()
}
