//! Signed images: AWS's builder and signer make them, with keys made on the spot; the reader must find them right, and what
//! AWS's checker finds wrong, wrong.

use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use aws_nitro_enclaves_image_format::utils::eif_signer::SignKey;
use aws_nitro_enclaves_image_format::utils::{EifSigner, SignKeyData};
use enclaved_core::id::Timestamp;
use enclaved_core::image::{EifError, Pins, SectionKind, SignatureAlgorithm, verify};
use enclaved_eif_oracle::eif::{self, Eif, damage};
use enclaved_eif_oracle::{build, identity, measure, read, registers, text};
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509Name};
use std::time::{Duration, SystemTime};

const CURVES: [(Nid, SignatureAlgorithm); 3] = [
    (Nid::X9_62_PRIME256V1, SignatureAlgorithm::Es256),
    (Nid::SECP384R1, SignatureAlgorithm::Es384),
    (Nid::SECP521R1, SignatureAlgorithm::Es512),
];

/// A key and a certificate for it that is valid for a day.
fn key(curve: Nid, name: &str) -> SignKeyData {
    let key = PKey::from_ec_key(EcKey::generate(&EcGroup::from_curve_name(curve).unwrap()).unwrap()).unwrap();
    let mut subject = X509Name::builder().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let subject = subject.build();
    let mut certificate = X509::builder().unwrap();
    certificate.set_version(2).unwrap();
    certificate.set_subject_name(&subject).unwrap();
    certificate.set_issuer_name(&subject).unwrap();
    let now = i64::try_from(Timestamp::from(SystemTime::now()).as_millis() / 1000).unwrap();
    certificate.set_not_before(&Asn1Time::from_unix(now).unwrap()).unwrap();
    certificate.set_not_after(&Asn1Time::from_unix(now + 24 * 60 * 60).unwrap()).unwrap();
    certificate.set_pubkey(&key).unwrap();
    certificate.sign(&key, MessageDigest::sha384()).unwrap();
    SignKeyData {
        cert: certificate.build().to_pem().unwrap(),
        key: SignKey::LocalPrivateKey(key.private_key_to_pem_pkcs8().unwrap()),
    }
}

/// Signs an image as `nitro-cli sign-eif` does, in place.
fn sign(file: &[u8], key: SignKeyData) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.eif");
    std::fs::write(&path, file).unwrap();
    EifSigner::new(Some(key)).unwrap().sign_image(&text(&path)).unwrap();
    std::fs::read(&path).unwrap()
}

/// Whether AWS's reader finds that the signature is one over the image's PCR0.
fn aws_finds_it_signed(file: &[u8]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.eif");
    std::fs::write(&path, file).unwrap();
    let mut reader = EifReader::from_eif(text(&path)).unwrap();
    let measurements = reader.get_measurements().unwrap();
    reader.get_certificate_info(measurements).is_ok() && reader.sign_check == Some(true)
}

#[test]
fn images_signed_while_they_are_built_are_measured_alike_on_every_curve() {
    for (curve, algorithm) in CURVES {
        let parts = eif::sample("x", 1, 100_000);
        let (file, built) = build(&parts, identity("x", "0.1.0"), Some(key(curve, "builder")));
        let report = measure(&file).unwrap_or_else(|error| panic!("{algorithm}: {error}"));
        assert!(aws_finds_it_signed(&file), "{algorithm}");
        assert!(built.contains_key("PCR8"), "{algorithm}");
        assert_eq!(registers(&report), built, "{algorithm}");
        assert_eq!(registers(&report), read(&file).unwrap().registers, "{algorithm}");

        let signature = report.signature().unwrap();
        assert_eq!((signature.algorithm, signature.subject.as_str()), (algorithm, "CN=builder"));
        let now = Timestamp::from(SystemTime::now());
        let day = Duration::from_secs(24 * 60 * 60);
        assert!(signature.not_before <= now && now < signature.not_after, "{signature:?}");
        assert_eq!(signature.not_after, signature.not_before.plus(day));

        let pinned = Pins { pcr8: report.measurements().pcr8, ..Pins::default() };
        assert!(verify(report.clone(), &pinned.into()).is_ok(), "{algorithm}");

        // The writer puts a signature where the builder puts it.
        let section = report.sections().last().unwrap();
        assert_eq!(section.kind, SectionKind::Signature);
        let signature = Some(file[usize::try_from(section.offset).unwrap()..].to_vec());
        assert!(Eif { signature, ..parts }.to_bytes() == file, "{algorithm}: the files differ");
    }
}

#[test]
fn images_signed_after_they_were_built_are_measured_alike_on_every_curve() {
    let unsigned = eif::sample("x", 2, 100_000).to_bytes();
    for (curve, algorithm) in CURVES {
        let file = sign(&unsigned, key(curve, "signer"));
        let report = measure(&file).unwrap_or_else(|error| panic!("{algorithm}: {error}"));
        assert_eq!(report.measurements().pcr0, measure(&unsigned).unwrap().measurements().pcr0);
        assert!(aws_finds_it_signed(&file), "{algorithm}");
        assert_eq!(registers(&report), read(&file).unwrap().registers, "{algorithm}");
    }
}

#[test]
fn an_image_changed_after_it_was_signed_is_found_by_both() {
    let parts = eif::sample("x", 3, 10_000);
    let (file, _) = build(&parts, identity("x", "1"), Some(key(Nid::SECP384R1, "x")));
    let ramdisk = measure(&file).unwrap().sections()[3].offset;
    let mut changed = file;
    changed[usize::try_from(ramdisk).unwrap()] ^= 1;
    damage::seal(&mut changed);
    assert!(read(&changed).unwrap().crc_matches);
    assert!(!aws_finds_it_signed(&changed));
    let error = measure(&changed).unwrap_err();
    assert!(matches!(&error, EifError::Signature { reason, .. } if reason.contains("PCR0")), "{error}");
}

#[test]
fn a_certificate_put_in_place_of_the_signers_is_found_by_both() {
    let parts = eif::sample("x", 4, 10_000);
    let (file, _) = build(&parts, identity("x", "0.1.0"), Some(key(Nid::SECP384R1, "right")));
    let (other, _) = build(&parts, identity("x", "0.1.0"), Some(key(Nid::SECP384R1, "wrong")));
    // Two sections of the same form: the certificate of one, the signature of the other.
    let section = |file: &[u8]| file[usize::try_from(measure(file).unwrap().sections()[5].offset).unwrap()..].to_vec();
    let split = |section: &[u8]| {
        let key = b"\x69signature";
        section.windows(key.len()).position(|window| window == key).unwrap()
    };
    let (right, wrong) = (section(&file), section(&other));
    let mixed = [&wrong[..split(&wrong)], &right[split(&right)..]].concat();
    let mixed = Eif { signature: Some(mixed), ..parts }.to_bytes();
    assert!(!aws_finds_it_signed(&mixed));
    let error = measure(&mixed).unwrap_err();
    assert!(matches!(&error, EifError::Signature { reason, .. } if reason.contains("key")), "{error}");
}

#[test]
fn an_image_that_aws_signed_twice_contradicts_itself_and_is_refused_with_that_explanation() {
    let mut file = sign(&eif::sample("x", 5, 10_000).to_bytes(), key(Nid::SECP384R1, "first"));
    // The signer writes the new size into the section but not into the header. They differ unless both signatures happen to
    // be written in as many bytes, hence with a name of another length.
    file = sign(&file, key(Nid::SECP384R1, "a longer name than the first one's"));
    let error = measure(&file).unwrap_err();
    assert!(matches!(error, EifError::SectionSize { kind: SectionKind::Signature, .. }), "{error}");
    assert!(error.to_string().contains("signed twice"), "{error}");
    // It is no artefact of this reader: AWS's own header says so.
    let reading = read(&file).unwrap();
    let last = usize::from(reading.header.num_sections) - 1;
    let end = reading.header.section_offsets[last] + 12 + reading.header.section_sizes[last];
    assert!(reading.crc_matches && end != file.len() as u64);
}
