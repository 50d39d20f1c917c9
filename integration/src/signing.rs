//! Signs images as AWS's tools do: a section with the certificate and a COSE signature (ES384) over PCR0.

use crate::eif::Eif;
use crate::nitro_cli::pcr0;
use anyhow::Context as _;
use minicbor::Encoder;
use p384::ecdsa::signature::Signer as _;
use p384::ecdsa::{Signature, SigningKey};
use rcgen::{CertificateParams, DnType, KeyPair, SigningKey as _};

/// A key on P-384 and its certificate.
#[derive(Debug)]
pub struct Signer {
    /// PEM; what stands after the first certificate is its chain.
    certificate: String,
    key: Key,
}

#[derive(Debug)]
enum Key {
    /// Made on the spot. Signs differently each time.
    Made(KeyPair),
    /// Given. Signs the same each time.
    Given(SigningKey),
}

/// Whether a certificate is still good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// For decades.
    Valid,
    /// Since 2021.
    Expired,
}

impl Signer {
    /// Makes a key and a certificate of this name.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(name: &str, validity: Validity) -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(if validity == Validity::Valid { 2060 } else { 2021 }, 1, 1);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, key: Key::Made(key) })
    }

    /// With a certificate that there is, and its key: the number, in 48 bytes. The same image is then signed with the same bytes.
    ///
    /// # Errors
    /// When the number is not a key.
    pub fn with_key(certificate: &str, key: &[u8; 48]) -> anyhow::Result<Self> {
        let key = SigningKey::from_slice(key).context("a number that is no key on P-384")?;
        Ok(Self { certificate: certificate.to_owned(), key: Key::Given(key) })
    }

    fn signature(&self, message: &[u8]) -> anyhow::Result<Signature> {
        match &self.key {
            Key::Made(key) => Signature::from_der(&key.sign(message)?).context("reading the signature back"),
            Key::Given(key) => Ok(key.sign(message)),
        }
    }

    /// The image with a signature section.
    ///
    /// # Errors
    /// When it can't be measured or signed.
    pub fn sign(&self, image: Eif) -> anyhow::Result<Eif> {
        let register = pcr0(&image.to_bytes())?;
        let register: Vec<u8> = (0..register.len() / 2)
            .map(|at| u8::from_str_radix(register.get(2 * at..2 * at + 2).unwrap_or_default(), 16))
            .collect::<Result<_, _>>()?;

        let mut protected = Encoder::new(Vec::new());
        protected.map(1)?.u8(1)?.i64(-35)?;
        let protected = protected.into_writer();
        let mut payload = Encoder::new(Vec::new());
        payload.map(2)?.str("register_index")?.u8(0)?.str("register_value")?;
        numbers(&mut payload, &register)?;
        let payload = payload.into_writer();
        let mut message = Encoder::new(Vec::new());
        message.array(4)?.str("Signature1")?.bytes(&protected)?.bytes(&[])?.bytes(&payload)?;
        let signature = self.signature(message.writer())?;

        let mut cose = Encoder::new(Vec::new());
        cose.array(4)?.bytes(&protected)?.map(0)?.bytes(&payload)?.bytes(&signature.to_bytes())?;
        let mut section = Encoder::new(Vec::new());
        section.array(1)?.map(2)?.str("signing_certificate")?;
        numbers(&mut section, self.certificate.as_bytes())?;
        section.str("signature")?;
        numbers(&mut section, cose.writer())?;
        Ok(Eif { signature: Some(section.into_writer()), ..image })
    }
}

/// Bytes as AWS's tools write them: an array of numbers.
fn numbers(encoder: &mut Encoder<Vec<u8>>, bytes: &[u8]) -> anyhow::Result<()> {
    encoder.array(bytes.len() as u64)?;
    for byte in bytes {
        encoder.u8(*byte)?;
    }
    Ok(())
}
