//! Tests of signed images. The certificates were made with `openssl req -x509` for these tests alone; so was the key below,
//! which is that of `signer.pem`.

use super::*;
use crate::id::Timestamp;
use minicbor::Encoder;
use p384::ecdsa::{Signature, SigningKey, signature::Signer};

const SIGNER: &str = include_str!("signer.pem");
/// `(head -c48 /dev/zero; openssl x509 -outform der -in signer.pem | openssl dgst -sha384 -binary) | openssl dgst -sha384`
const SIGNER_PCR8: &str =
    "f65332aea2a8f02bc88d943ba231935e718fe9d6898b3c52d660e9deebc576b6b700c729717ca6e727db7ee62b8dfd32";
const KEY: [u8; 48] = [
    0x1e, 0xb0, 0xba, 0xc4, 0x39, 0x68, 0x8e, 0xcd, 0xc7, 0x8f, 0x7d, 0x21, 0xfd, 0x4d, 0x05, 0x3d, 0xe1, 0x33, 0xd3,
    0xdc, 0xbb, 0x46, 0x5f, 0x7d, 0x80, 0xc8, 0x90, 0x68, 0xcd, 0xc7, 0x1b, 0x17, 0xcc, 0x50, 0x58, 0x8c, 0x8b, 0xfd,
    0xc3, 0x97, 0x28, 0x68, 0x08, 0xdb, 0x99, 0xdc, 0x5f, 0x0b,
];

/// The parts of a signature section, each of which a test can spoil before or after signing.
#[derive(Clone)]
struct Signing {
    certificate: Vec<u8>,
    algorithm: i64,
    payload: Vec<u8>,
    tag: Option<u64>,
    /// Applied to the signature.
    spoil: fn(&mut Vec<u8>),
}

impl Signing {
    fn of(pcr0: &Pcr) -> Self {
        let mut payload = Encoder::new(Vec::new());
        payload.map(2).unwrap().str("register_index").unwrap().u8(0).unwrap().str("register_value").unwrap();
        numbers(&mut payload, &pcr0.0);
        let payload = payload.into_writer();
        Self { certificate: SIGNER.into(), algorithm: -35, payload, tag: None, spoil: |_| {} }
    }

    fn cose(&self) -> Vec<u8> {
        let mut protected = Encoder::new(Vec::new());
        protected.map(1).unwrap().u8(1).unwrap().i64(self.algorithm).unwrap();
        let protected = protected.into_writer();
        let mut message = Encoder::new(Vec::new());
        message.array(4).unwrap().str("Signature1").unwrap().bytes(&protected).unwrap().bytes(&[]).unwrap();
        message.bytes(&self.payload).unwrap();
        let signature: Signature = SigningKey::from_slice(&KEY).unwrap().sign(message.writer());
        let mut signature = signature.to_bytes().to_vec();
        (self.spoil)(&mut signature);
        let mut cose = Encoder::new(Vec::new());
        if let Some(tag) = self.tag {
            cose.tag(minicbor::data::Tag::new(tag)).unwrap();
        }
        cose.array(4).unwrap().bytes(&protected).unwrap().map(0).unwrap();
        cose.bytes(&self.payload).unwrap().bytes(&signature).unwrap();
        cose.into_writer()
    }

    fn section(&self) -> Vec<u8> {
        section(&[("signing_certificate", &self.certificate), ("signature", &self.cose())])
    }
}

fn section(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut section = Encoder::new(Vec::new());
    section.array(1).unwrap().map(entries.len() as u64).unwrap();
    for (key, bytes) in entries {
        section.str(key).unwrap();
        numbers(&mut section, bytes);
    }
    section.into_writer()
}

/// Bytes as AWS's tools write them: an array of numbers.
fn numbers(encoder: &mut Encoder<Vec<u8>>, bytes: &[u8]) {
    encoder.array(bytes.len() as u64).unwrap();
    for byte in bytes {
        encoder.u8(*byte).unwrap();
    }
}

/// An image with this section, in front of its ramdisks' end, where AWS's tools put it.
fn with(section: Vec<u8>) -> Vec<u8> {
    let mut image = typical();
    image.sections.push((SIGNATURE, section));
    image.bytes()
}

/// A typical image, signed.
pub(super) fn signed_image() -> Vec<u8> {
    with(Signing::of(&pcr0()).section())
}

fn pcr0() -> Pcr {
    measure(&typical().bytes()).unwrap().measurements().pcr0
}

/// Why an image with this section is refused.
fn refusal(section: Vec<u8>) -> String {
    match measure(&with(section)) {
        Err(EifError::Signature { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_signed_image_has_the_measurement_of_its_certificate_and_shows_it() {
    let report = measure(&with(Signing::of(&pcr0()).section())).unwrap();
    assert_eq!(report.measurements().pcr8.unwrap().to_string(), SIGNER_PCR8);
    assert_eq!(report.measurements().pcr0, pcr0());
    let signature = report.signature().unwrap();
    assert_eq!(signature.subject, "CN=signer (test),O=Example Ltd,C=GB");
    assert_eq!(signature.issuer, signature.subject);
    assert_eq!(signature.not_before.to_string(), "2026-11-21T04:32:19.000Z");
    assert_eq!(signature.not_after.to_string(), "2046-11-16T04:32:19.000Z");
    assert_eq!(signature.algorithm.to_string(), "ES384");
    let expected = Pins { pcr8: report.measurements().pcr8, ..Pins::default() };
    assert!(verify(report, &expected.into()).unwrap().signature().is_some());
}

#[test]
fn another_certificate_than_the_pinned_one_is_refused() {
    let report = measure(&with(Signing::of(&pcr0()).section())).unwrap();
    let refusal = verify(report, &Pins { pcr8: Some(pcr0()), ..Pins::default() }.into()).unwrap_err();
    assert!(refusal.to_string().contains(&format!("PCR8 is {SIGNER_PCR8}, expected")), "{refusal}");
}

#[test]
fn a_tag_a_chain_text_before_the_certificate_and_byte_strings_are_taken() {
    let good = Signing::of(&pcr0());
    let tagged = Signing { tag: Some(18), ..good.clone() };
    let chain = Signing { certificate: [SIGNER, include_str!("p256.pem")].concat().into(), ..good.clone() };
    let text = Signing { certificate: format!("Certificate:\n  Data: ...\n{SIGNER}").into(), ..good.clone() };
    let dos = Signing { certificate: SIGNER.replace('\n', "\r\n").into(), ..good.clone() };
    let mut strings = Encoder::new(Vec::new());
    strings.array(1).unwrap().map(2).unwrap().str("signature").unwrap().bytes(&good.cose()).unwrap();
    strings.str("signing_certificate").unwrap().bytes(SIGNER.as_bytes()).unwrap();
    for section in [tagged.section(), chain.section(), text.section(), dos.section(), strings.into_writer()] {
        assert_eq!(measure(&with(section)).unwrap().measurements().pcr8.unwrap().to_string(), SIGNER_PCR8);
    }
}

#[test]
fn the_whole_chain_is_shown_but_the_signer_alone_is_measured() {
    let with_chain = |chain: &[&str]| {
        let certificate = [&[SIGNER], chain].concat().concat().into();
        let section = Signing { certificate, ..Signing::of(&pcr0()) }.section();
        measure(&with(section)).unwrap()
    };
    let (p256, rsa) = (include_str!("p256.pem"), include_str!("rsa.pem"));
    let report = with_chain(&[p256, "  some text\r\n", rsa]);
    assert_eq!(report.measurements().pcr8.unwrap().to_string(), SIGNER_PCR8);
    let signature = report.signature().unwrap();
    let subjects: Vec<_> = signature.chain.iter().map(|certificate| certificate.subject.as_str()).collect();
    assert_eq!(subjects, ["CN=other", "CN=rsa"]);
    assert!(signature.chain.iter().all(|certificate| certificate.not_before < certificate.not_after));
    assert_eq!(with_chain(&[]).signature().unwrap().chain, []);
}

#[test]
fn a_certificate_is_valid_between_its_dates_and_ends_soon_in_its_last_30_days() {
    let day = |day: u64| Timestamp::from_millis(day * 24 * 60 * 60 * 1000);
    let at = |now| Validity::at(now, day(100), day(200));
    assert_eq!(at(day(99)), Validity::NotYet);
    assert_eq!(at(day(100)), Validity::Valid);
    assert_eq!(at(day(170)), Validity::Valid);
    assert_eq!(at(day(171)), Validity::EndsSoon);
    assert_eq!(at(day(200)), Validity::EndsSoon);
    assert_eq!(at(day(201)), Validity::Expired);
    let report = measure(&signed_image()).unwrap();
    assert_eq!(report.signature().unwrap().validity(day(1)), Validity::NotYet);
}

#[test]
fn a_signature_over_something_else_or_by_someone_else_is_refused() {
    let good = Signing::of(&pcr0());
    let other = Signing::of(&Pcr([1; 48]));
    assert!(refusal(other.section()).contains("not this image's PCR0"));
    // The payload is right, but not what was signed.
    let spliced = [good.payload.as_slice(), b"x"].concat();
    assert!(refusal(Signing { payload: spliced, ..good.clone() }.section()).contains("not this image's PCR0"));
    for spoil in [(|s| s[0] ^= 1) as fn(&mut Vec<u8>), |s| s.push(0), |s| s.clear(), |s| s.fill(0), |s| s.fill(0xff)] {
        let reason = refusal(Signing { spoil, ..good.clone() }.section());
        assert!(reason.contains("not the signature of the certificate's key"), "{reason}");
    }
}

#[test]
fn what_is_no_signature_section_of_aws_tools_is_refused_with_its_reason() {
    let good = Signing::of(&pcr0());
    let (pem, cose) = (SIGNER.as_bytes(), good.cose());
    let pem_of = |certificate: &str| Signing { certificate: certificate.into(), ..good.clone() }.section();
    let mut twice = good.section();
    twice.extend_from_slice(b"\x00");
    let huge = format!(
        "-----BEGIN CERTIFICATE-----\n{}-----END CERTIFICATE-----\n",
        format!("{}\n", "A".repeat(64)).repeat(400)
    );
    let endless = [&b"\x81\xa2"[..], b"\x73signing_certificate\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x00"].concat();
    let cases = [
        (vec![], "the list of signatures is not there"),
        (b"\x80".to_vec(), "has 0 entries, not 1"),
        (b"\x9f\xff".to_vec(), "has no definite length"),
        (twice, "1 bytes follow"),
        (endless, "end of input"),
        (section(&[("signing_certificate", pem), ("more", b"")]), "unknown entry \"more\""),
        (section(&[("signature", pem), ("signature", &cose)]), "does not have both"),
        (section(&[("signing_certificate", pem), ("signature", b"\x83")]), "has 3 entries, not 4"),
        (Signing { tag: Some(98), ..good.clone() }.section(), "CBOR tag 98"),
        (Signing { algorithm: -37, ..good.clone() }.section(), "COSE algorithm -37 is not supported"),
        (Signing { algorithm: -7, ..good.clone() }.section(), "not on the curve that ES256"),
        (pem_of(include_str!("p256.pem")), "not on the curve that ES384"),
        (pem_of(include_str!("rsa.pem")), "no elliptic-curve key"),
        (pem_of(""), "not in PEM form"),
        (pem_of(&SIGNER.replace("CERTIFICATE", "TRUSTED CERTIFICATE")), "not a CERTIFICATE"),
        (pem_of(&SIGNER[..300]), "has no end"),
        (pem_of(&SIGNER.replacen('M', "!", 1)), "can't be read"),
        (pem_of(&SIGNER.replacen("MIIC", "MIID", 1)), "its certificate can't be read"),
        (
            pem_of(&format!("{SIGNER}-----BEGIN PRIVATE KEY-----\nMIIC\n")),
            "holds \"-----BEGIN PRIVATE KEY-----\", which is",
        ),
        (
            pem_of(&format!("{SIGNER}{}", SIGNER.replacen("MIIC", "MIID", 1))),
            "certificate 1 of its chain can't be read",
        ),
        (pem_of(&SIGNER.repeat(17)), "more than 16 certificates"),
        (pem_of(&huge), "bytes, 16384 at most are taken"),
        // Texts in which OpenSSL might find another first certificate.
        (pem_of(&format!("text -----BEGIN CERTIFICATE-----\n{SIGNER}")), "can be read in two ways"),
        (pem_of(&format!("{}{SIGNER}", " ".repeat(254))), "can be read in two ways"),
        (pem_of(&format!("\0\n{SIGNER}")), "can be read in two ways"),
        (pem_of(&format!("\u{feff}{SIGNER}")), "can be read in two ways"),
        (pem_of(&SIGNER.replace("-----END CERTIFICATE-----\n", "-----END CERTIFICATE----- x\n")), "on the same line"),
    ];
    for (section, text) in cases {
        let reason = refusal(section);
        assert!(reason.contains(text) && !reason.contains(char::is_control), "{text}: {reason}");
    }
}

#[test]
fn a_second_signature_is_refused() {
    let mut image = typical();
    let section = Signing::of(&pcr0()).section();
    image.sections.extend([(SIGNATURE, section.clone()), (SIGNATURE, section)]);
    let error = measure(&image.bytes()).unwrap_err();
    assert!(matches!(error, EifError::RepeatedSection { kind: SectionKind::Signature, .. }), "{error}");
}

#[test]
fn a_signature_section_may_not_be_larger_than_its_limit() {
    let file = with(Signing::of(&pcr0()).section());
    let error = measure_with(Limits { signature: 100, ..Limits::default() }, &file).unwrap_err();
    assert!(matches!(error, EifError::SectionTooLarge { limit: 100, .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_change_of_any_byte_of_the_cose_signature_is_refused(at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let mut cose = Signing::of(&pcr0()).cose();
        let at = at.index(cose.len());
        cose[at] ^= flip;
        let section = section(&[("signing_certificate", SIGNER.as_bytes()), ("signature", &cose)]);
        let refused = matches!(measure(&with(section)), Err(EifError::Signature { .. }));
        prop_assert!(refused);
    }

    #[test]
    fn a_change_of_the_certificate_is_refused_or_measured(at in any::<prop::sample::Index>(), byte in b'+'..=b'z') {
        let mut signing = Signing::of(&pcr0());
        let content = "-----BEGIN CERTIFICATE-----\n".len()..SIGNER.find("\n-----END").unwrap();
        let at = content.start + at.index(content.len());
        prop_assume!(signing.certificate[at] != byte);
        signing.certificate[at] = byte;
        match measure(&with(signing.section())) {
            Ok(report) => prop_assert_ne!(report.measurements().pcr8.unwrap().to_string(), SIGNER_PCR8),
            Err(error) => prop_assert!(matches!(error, EifError::Signature { .. }), "{}", error),
        }
    }

    #[test]
    fn arbitrary_changes_of_the_section_never_panic_and_never_touch_the_other_registers(
        at in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(any::<u8>(), 1..9),
    ) {
        let mut section = Signing::of(&pcr0()).section();
        let at = at.index(section.len());
        let end = (at + bytes.len()).min(section.len());
        section.splice(at..end, bytes);
        match measure(&with(section)) {
            Ok(report) => prop_assert_eq!(report.measurements().pcr0, pcr0()),
            Err(error) => prop_assert!(matches!(error, EifError::Signature { .. }), "{}", error),
        }
    }

    #[test]
    fn arbitrary_sections_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let refused = matches!(measure(&with(bytes)), Err(EifError::Signature { .. }));
        prop_assert!(refused);
    }
}
