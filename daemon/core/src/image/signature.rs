//! The signature section: who vouches for an image.
//!
//! CBOR: an array of one map with the two entries `signing_certificate` (PEM) and `signature` (a COSE_Sign1 whose payload is
//! the number and the value of PCR0). AWS's tools write both as arrays of numbers rather than as byte strings.
//!
//! What is judged here is whether the signature is that of the certificate's key over this image's PCR0, which is also what
//! the hypervisor judges. Whether the certificate is anybody one should trust is for whoever pins PCR8 to say; whether it has
//! expired, for whoever has a clock.

use super::certificate::{self, ImageCertificate, Validity};
use super::error::{EifError, reason};
use super::layout::SectionInfo;
use crate::id::{Pcr, Timestamp};
use minicbor::data::Type;
use minicbor::{Decoder, Encoder};
use p256::ecdsa::signature::Verifier;
use schemars::JsonSchema;
use serde::Serialize;
use std::convert::Infallible;
use std::fmt;
use x509_cert::der::asn1::ObjectIdentifier;

/// The certificate that an image is signed with. The signature has been checked against it and the image's PCR0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageSignature {
    /// Whom the certificate names, as text on one line (RFC 4514).
    pub subject: String,
    /// Who issued it, likewise.
    pub issuer: String,
    /// The certificate is not valid before this point.
    pub not_before: Timestamp,
    /// The certificate is not valid after this point: from then on the image does not boot (nitro-cli says E36).
    pub not_after: Timestamp,
    /// How it was signed.
    pub algorithm: SignatureAlgorithm,
    /// The certificates that stand after the signer's, in their order: as a rule who issued it, who issued that, and so on.
    /// **Neither measured nor checked**: anyone can change them without changing PCR8.
    pub chain: Vec<ImageCertificate>,
}

impl ImageSignature {
    /// Whether the signer's certificate is valid at that time. If it is not, the image does not boot.
    pub fn validity(&self, now: Timestamp) -> Validity {
        Validity::at(now, self.not_before, self.not_after)
    }
}

/// How an image is signed; AWS's tools know these three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// ECDSA on P-521 with SHA-512.
    Es512,
}

impl SignatureAlgorithm {
    /// By its number in COSE (RFC 9053).
    fn from_cose(number: i64) -> Option<Self> {
        match number {
            -7 => Some(Self::Es256),
            -35 => Some(Self::Es384),
            -36 => Some(Self::Es512),
            _ => None,
        }
    }

    /// The curve of its keys.
    fn curve(self) -> ObjectIdentifier {
        ObjectIdentifier::new_unwrap(match self {
            Self::Es256 => "1.2.840.10045.3.1.7",
            Self::Es384 => "1.3.132.0.34",
            Self::Es512 => "1.3.132.0.35",
        })
    }

    /// Whether `signature` (the two numbers, one after the other) is that of `key` (a point, as in SEC 1) over `message`.
    fn verifies(self, key: &[u8], message: &[u8], signature: &[u8]) -> bool {
        macro_rules! verifies {
            ($curve:ident) => {
                $curve::ecdsa::VerifyingKey::from_sec1_bytes(key).is_ok_and(|key| {
                    $curve::ecdsa::Signature::from_slice(signature)
                        .is_ok_and(|signature| key.verify(message, &signature).is_ok())
                })
            };
        }
        match self {
            Self::Es256 => verifies!(p256),
            Self::Es384 => verifies!(p384),
            Self::Es512 => verifies!(p521),
        }
    }
}

impl fmt::Display for SignatureAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::Es512 => "ES512",
        })
    }
}

/// A signature section that has been read, but not yet checked: its PCR0 is known only at the end of the file.
#[derive(Debug)]
pub(super) struct SignatureSection {
    /// Where its contents begin in the file.
    offset: u64,
    shown: ImageSignature,
    /// The certificate in DER form: what PCR8 measures.
    pub(super) certificate: Vec<u8>,
    /// The certificate's public key, a point as in SEC 1.
    key: Vec<u8>,
    signed: Sign1,
}

impl SignatureSection {
    pub(super) fn parse(contents: &[u8], section: &SectionInfo) -> Result<Self, EifError> {
        let refuse = |reason: String| EifError::Signature { offset: section.offset, reason };
        let (pem, cose) = entries(contents).map_err(refuse)?;
        let signed = Sign1::parse(&cose).map_err(refuse)?;
        let mut certificates = certificate::from_pem(&pem).map_err(refuse)?.into_iter();
        let der = certificates.next().unwrap_or_default();
        let algorithm = signed.algorithm;
        let (signer, key) =
            certificate::read_signer(&der, algorithm.curve(), &algorithm.to_string()).map_err(refuse)?;
        let chain = (1..).zip(certificates).map(|(number, der)| certificate::read_chained(&der, number));
        let chain = chain.collect::<Result<_, _>>().map_err(refuse)?;
        let ImageCertificate { subject, issuer, not_before, not_after } = signer;
        let shown = ImageSignature { subject, issuer, not_before, not_after, algorithm, chain };
        Ok(Self { offset: section.offset, shown, certificate: der, key, signed })
    }

    /// Checks the signature against the image's PCR0.
    pub(super) fn check(self, pcr0: &Pcr) -> Result<ImageSignature, EifError> {
        let refuse = |reason: &str| EifError::Signature { offset: self.offset, reason: reason.to_owned() };
        let encoding = |_: minicbor::encode::Error<Infallible>| refuse("its signed form can't be built");
        if self.signed.payload != payload(pcr0).map_err(encoding)? {
            return Err(refuse("what is signed is not this image's PCR0: the image was changed after it was signed"));
        }
        let message = self.signed.message().map_err(encoding)?;
        if !self.signed.algorithm.verifies(&self.key, &message, &self.signed.signature) {
            return Err(refuse("it is not the signature of the certificate's key: sign the image again"));
        }
        Ok(self.shown)
    }
}

/// The two entries of the section's one map: the certificate's PEM, and the COSE_Sign1.
fn entries(contents: &[u8]) -> Result<(Vec<u8>, Vec<u8>), String> {
    let decoder = &mut Decoder::new(contents);
    length(decoder.array(), 1, "the list of signatures")?;
    length(decoder.map(), 2, "the signature's map")?;
    let (mut certificate, mut signature) = (None, None);
    for _ in 0..2 {
        let key = decoder.str().map_err(|error| reason(&error))?;
        let entry = match key {
            "signing_certificate" => &mut certificate,
            "signature" => &mut signature,
            key => return Err(format!("unknown entry \"{}\"", reason(&key))),
        };
        *entry = Some(bytes(decoder)?);
    }
    end(decoder)?;
    match (certificate, signature) {
        (Some(certificate), Some(signature)) => Ok((certificate, signature)),
        _ => Err("it does not have both signing_certificate and signature".to_owned()),
    }
}

/// A COSE_Sign1 (RFC 9052) as AWS's tools make it: protected headers with the algorithm alone, no others, a payload within.
#[derive(Debug)]
struct Sign1 {
    protected: Vec<u8>,
    algorithm: SignatureAlgorithm,
    payload: Vec<u8>,
    signature: Vec<u8>,
}

impl Sign1 {
    const TAG: u64 = 18;

    fn parse(cose: &[u8]) -> Result<Self, String> {
        let decoder = &mut Decoder::new(cose);
        if matches!(decoder.datatype(), Ok(Type::Tag)) {
            let tag = decoder.tag().map_err(|error| reason(&error))?;
            if tag.as_u64() != Self::TAG {
                return Err(format!("it has the CBOR tag {}, a COSE_Sign1 has {}", tag.as_u64(), Self::TAG));
            }
        }
        length(decoder.array(), 4, "the COSE_Sign1")?;
        let protected = decoder.bytes().map_err(|error| reason(&error))?;
        length(decoder.map(), 0, "the map of unprotected headers")?;
        let payload = decoder.bytes().map_err(|error| reason(&error))?;
        let signature = decoder.bytes().map_err(|error| reason(&error))?;
        end(decoder)?;
        Ok(Self {
            protected: protected.to_vec(),
            algorithm: algorithm(protected)?,
            payload: payload.to_vec(),
            signature: signature.to_vec(),
        })
    }

    /// The bytes that are signed: RFC 9052's Sig_structure.
    fn message(&self) -> Result<Vec<u8>, minicbor::encode::Error<Infallible>> {
        let mut encoder = Encoder::new(Vec::new());
        encoder.array(4)?.str("Signature1")?.bytes(&self.protected)?.bytes(&[])?.bytes(&self.payload)?;
        Ok(encoder.into_writer())
    }
}

/// The algorithm, the only protected header there may be (label 1).
fn algorithm(protected: &[u8]) -> Result<SignatureAlgorithm, String> {
    let decoder = &mut Decoder::new(protected);
    length(decoder.map(), 1, "the map of protected headers")?;
    let label = decoder.i64().map_err(|error| reason(&error))?;
    if label != 1 {
        return Err(format!("a protected header {label}, where only the algorithm (1) is expected"));
    }
    let number = decoder.i64().map_err(|error| reason(&error))?;
    end(decoder)?;
    SignatureAlgorithm::from_cose(number)
        .ok_or_else(|| format!("COSE algorithm {number} is not supported: ES256 (-7), ES384 (-35) and ES512 (-36) are"))
}

/// What AWS's tools sign: `{"register_index": 0, "register_value": PCR0}`, the value as an array of numbers.
fn payload(pcr0: &Pcr) -> Result<Vec<u8>, minicbor::encode::Error<Infallible>> {
    let mut encoder = Encoder::new(Vec::new());
    encoder.map(2)?.str("register_index")?.u8(0)?.str("register_value")?.array(48)?;
    for byte in pcr0.0 {
        encoder.u8(byte)?;
    }
    Ok(encoder.into_writer())
}

/// Refuses an array or map of another length than `expected`, or of none given in advance.
fn length(found: Result<Option<u64>, minicbor::decode::Error>, expected: u64, what: &str) -> Result<(), String> {
    match found {
        Ok(Some(found)) if found == expected => Ok(()),
        Ok(Some(found)) => Err(format!("{what} has {found} entries, not {expected}")),
        Ok(None) => Err(format!("{what} has no definite length")),
        Err(error) => Err(format!("{what} is not there: {}", reason(&error))),
    }
}

/// Bytes, written as a byte string or as an array of numbers.
fn bytes(decoder: &mut Decoder<'_>) -> Result<Vec<u8>, String> {
    if !matches!(decoder.datatype(), Ok(Type::Array)) {
        return decoder.bytes().map(<[u8]>::to_vec).map_err(|error| reason(&error));
    }
    let count = decoder.array().map_err(|error| reason(&error))?.ok_or("an array has no definite length")?;
    // Not allocated in advance: only as many are taken as there are.
    let mut bytes = Vec::new();
    for _ in 0..count {
        bytes.push(decoder.u8().map_err(|error| reason(&error))?);
    }
    Ok(bytes)
}

fn end(decoder: &Decoder<'_>) -> Result<(), String> {
    match decoder.input().len() - decoder.position() {
        0 => Ok(()),
        more => Err(format!("{more} bytes follow where nothing is expected")),
    }
}
