//! The certificates of a signature section: PEM taken apart, and what there is to show of each.
//!
//! OpenSSL, with which AWS's tools read the same text, takes the first certificate and leaves the rest alone. So the first is the
//! signer's and is measured (PCR8); the others, its chain, are neither measured nor checked by anybody, and are for people to
//! read. Where the text could be taken apart in two ways it is refused, so that nobody sees another first certificate here than
//! there.

use super::error::reason;
use crate::id::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use std::time::Duration;
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Encode};

/// More certificates than any chain has.
const MAX_CERTIFICATES: usize = 16;
/// The largest certificate, in bytes of DER. Usual ones have 1 to 2 KiB.
const MAX_DER: usize = 16 << 10;
/// The longest line of text between certificates, in bytes. OpenSSL cuts longer ones, and takes what follows for a new line.
const MAX_LINE: usize = 250;
const BEGIN: &[u8] = b"-----BEGIN ";
const BEGIN_CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";
const END_CERTIFICATE: &[u8] = b"-----END CERTIFICATE-----";

/// What a certificate says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageCertificate {
    /// Whom it names, as text on one line (RFC 4514), of at most a few hundred characters.
    pub subject: String,
    /// Who issued it, likewise.
    pub issuer: String,
    /// It is not valid before this point.
    pub not_before: Timestamp,
    /// It is not valid after this point.
    pub not_after: Timestamp,
}

impl ImageCertificate {
    /// Whether it is valid at that time.
    pub fn validity(&self, now: Timestamp) -> Validity {
        Validity::at(now, self.not_before, self.not_after)
    }
}

/// Whether a certificate is valid at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Validity {
    /// It is to become valid later.
    NotYet,
    /// It is, and for a while.
    Valid,
    /// It is, but ends within [`Validity::SOON`].
    EndsSoon,
    /// It was.
    Expired,
}

impl Validity {
    /// What is to end sooner than that should be replaced: 30 days.
    pub const SOON: Duration = Duration::from_secs(30 * 24 * 60 * 60);

    /// Of a certificate that is valid between those points, both included.
    pub fn at(now: Timestamp, not_before: Timestamp, not_after: Timestamp) -> Self {
        if now > not_after {
            Self::Expired
        } else if now < not_before {
            Self::NotYet
        } else if now.plus(Self::SOON) > not_after {
            Self::EndsSoon
        } else {
            Self::Valid
        }
    }
}

/// The certificates of a PEM file in DER form, in its order; at least one.
pub(super) fn from_pem(pem: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut certificates = Vec::new();
    let mut rest = pem;
    while !rest.is_empty() {
        if !rest.starts_with(BEGIN) {
            rest = after_text(rest)?;
            continue;
        }
        if !rest.starts_with(BEGIN_CERTIFICATE) {
            let label = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let label = reason(&String::from_utf8_lossy(label).trim());
            return Err(format!("its certificate's PEM holds \"{label}\", which is not a CERTIFICATE"));
        }
        if certificates.len() == MAX_CERTIFICATES {
            return Err(format!("it has more than {MAX_CERTIFICATES} certificates"));
        }
        let end = rest.windows(END_CERTIFICATE.len()).position(|window| window == END_CERTIFICATE);
        let end = end.ok_or("its certificate's PEM has no end")? + END_CERTIFICATE.len();
        certificates.push(decode(&rest[..end])?);
        let (same_line, after) = line(&rest[end..]);
        if !same_line.trim_ascii().is_empty() {
            return Err("its certificate's PEM goes on after an end, on the same line".to_owned());
        }
        rest = after;
    }
    if certificates.is_empty() {
        return Err("its certificate is not in PEM form".to_owned());
    }
    Ok(certificates)
}

/// What follows a line of text outside of certificates, such as `openssl x509 -text` writes before each.
fn after_text(pem: &[u8]) -> Result<&[u8], String> {
    let (text, after) = line(pem);
    let ambiguous =
        text.len() > MAX_LINE || text.contains(&0) || text.windows(BEGIN.len()).any(|window| window == BEGIN);
    if ambiguous {
        return Err(
            "the text around its certificate's PEM can be read in two ways: leave the PEM alone in its file".to_owned()
        );
    }
    Ok(after)
}

/// A line without its end, and what follows it.
fn line(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| *byte == b'\n').unwrap_or(text.len());
    (&text[..end], text.get(end + 1..).unwrap_or_default())
}

fn decode(pem: &[u8]) -> Result<Vec<u8>, String> {
    let unreadable = |error: pem_rfc7468::Error| format!("its certificate's PEM can't be read: {}", reason(&error));
    let mut decoder = pem_rfc7468::Decoder::new_detect_wrap(pem).map_err(unreadable)?;
    if decoder.remaining_len() > MAX_DER {
        return Err(format!("a certificate of it has {} bytes, {MAX_DER} at most are taken", decoder.remaining_len()));
    }
    let mut der = Vec::new();
    decoder.decode_to_end(&mut der).map_err(unreadable)?;
    Ok(der)
}

/// What there is to show of the signer's certificate, and its key: a point, as in SEC 1, on `curve`.
pub(super) fn read_signer(
    der: &[u8],
    curve: ObjectIdentifier,
    algorithm: &str,
) -> Result<(ImageCertificate, Vec<u8>), String> {
    const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
    let unreadable = |error: x509_cert::der::Error| format!("its certificate can't be read: {}", reason(&error));
    let certificate = CertificateInner::<Raw>::from_der(der).map_err(unreadable)?;
    // OpenSSL writes the certificate anew before it is measured; only of one way to write it is the measurement the same.
    if certificate.to_der().map_err(unreadable)? != der {
        return Err("its certificate is not in the distinguished encoding (DER)".to_owned());
    }
    let key = certificate.tbs_certificate().subject_public_key_info();
    if key.algorithm.oid != EC_PUBLIC_KEY {
        return Err(format!("its certificate's key ({}) is no elliptic-curve key", key.algorithm.oid));
    }
    let found = key.algorithm.parameters.as_ref().and_then(|curve| curve.decode_as::<ObjectIdentifier>().ok());
    if found != Some(curve) {
        return Err(format!("its certificate's key is not on the curve that {algorithm} signs with"));
    }
    let point = key.subject_public_key.as_bytes().ok_or("its certificate's key is no whole number of bytes")?;
    Ok((shown(&certificate), point.to_vec()))
}

/// What there is to show of a certificate of the chain; `number` is its place after the signer's, from 1.
pub(super) fn read_chained(der: &[u8], number: usize) -> Result<ImageCertificate, String> {
    CertificateInner::<Raw>::from_der(der).map(|certificate| shown(&certificate)).map_err(|error| {
        format!(
            "certificate {number} of its chain can't be read: {}; nothing needs it: sign with the signer's certificate alone",
            reason(&error)
        )
    })
}

fn shown(certificate: &CertificateInner<Raw>) -> ImageCertificate {
    let certificate = certificate.tbs_certificate();
    let validity = certificate.validity();
    ImageCertificate {
        subject: reason(certificate.subject()),
        issuer: reason(certificate.issuer()),
        not_before: point_in_time(validity.not_before),
        not_after: point_in_time(validity.not_after),
    }
}

fn point_in_time(time: x509_cert::time::Time) -> Timestamp {
    Timestamp::from_millis(0).plus(time.to_unix_duration())
}
