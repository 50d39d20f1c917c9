//! Client certificates (mTLS): the TLS settings of each site that demands them, made of the authorities that its operator puts
//! on disk, and what the enclave is told of a certificate. The file is looked at every few seconds. What cannot be used takes the
//! place of nothing; and a site for which there was never anything good takes no connection, never one without the check.

use super::sites::Demand;
use super::tls::Basis;
use crate::certificates::CertificateError;
use crate::certificates::files::{LoadError, Stamp, read, stamp};
use crate::current::Current;
use crate::error_text::chain;
use enclaved_core::routes::ClientAuthorityReport;
use http::HeaderValue;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// Write, for anybody but owner and group: who can write there can let anybody in.
const OTHERS_WRITE: u32 = 0o002;
/// Longest subject that an enclave is told: servers take 8 KiB of headers, many no more.
const SUBJECT_BYTES: usize = 4 << 10;

#[derive(Debug)]
pub(crate) struct ClientCas {
    basis: Basis,
    by_site: Current<HashMap<Demand, Arc<Check>>>,
    files: Mutex<BTreeMap<Demand, AuthorityFile>>,
}

/// How the clients of a site are checked.
#[derive(Debug)]
pub(crate) struct Check {
    /// With tickets of its own: neither another site's clients nor those of earlier authorities are resumed.
    pub(crate) config: Arc<ServerConfig>,
    /// Cancelled when other authorities count, or none.
    pub(crate) replaced: CancellationToken,
    authorities: Vec<CertificateDer<'static>>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Check {
    /// Whether certificates that were good when a session began are so now: resuming asks for the keys alone, and a client may
    /// resume for ever.
    pub(crate) fn still_good(&self, chain: &[CertificateDer<'_>]) -> bool {
        let Some((leaf, intermediates)) = chain.split_first() else { return false };
        self.verifier.verify_client_cert(leaf, intermediates, UnixTime::now()).is_ok()
    }
}

#[derive(Debug, Default)]
struct AuthorityFile {
    /// The file as it was when it was last read.
    seen: Option<Stamp>,
    /// The last that was good.
    good: Option<Arc<Check>>,
    /// What is wrong with what is there now.
    error: Option<Arc<LoadError>>,
}

/// What a connection's client was let in by.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) demand: Arc<Demand>,
    pub(crate) certificate: ClientCertificate,
    /// Cancelled when that counts no more.
    pub(crate) replaced: CancellationToken,
}

/// What an enclave is told of a client's certificate.
#[derive(Debug)]
pub(crate) struct ClientCertificate {
    /// As RFC 4514 writes it, in ASCII. None where it cannot be read, or is too long.
    pub(crate) subject: Option<HeaderValue>,
    /// Of the certificate in DER, in lower-case hexadecimal.
    pub(crate) sha256: HeaderValue,
}

impl ClientCas {
    pub(crate) fn new(basis: Basis) -> Self {
        Self { basis, by_site: Current::default(), files: Mutex::default() }
    }

    /// How clients of that site are checked, if they can be. Called in the middle of a handshake: it looks up, and does no work.
    pub(crate) fn check(&self, demand: &Demand) -> Option<Arc<Check>> {
        self.by_site.get().get(demand).cloned()
    }

    /// Reads what has changed, for these sites and only these. Blocks on files.
    pub(crate) fn maintain(&self, wanted: &BTreeSet<Demand>) -> Result<(), CertificateError> {
        let mut files = self.lock();
        let mut before = std::mem::take(&mut *files);
        let mut replaced = Vec::new();
        for demand in wanted {
            let mut file = before.remove(demand).unwrap_or_default();
            replaced.extend(self.look(demand, &mut file));
            files.insert(demand.clone(), file);
        }
        replaced.extend(before.into_values().filter_map(|file| file.good));
        let good = files.iter().filter_map(|(demand, file)| Some((demand.clone(), file.good.clone()?)));
        self.by_site.set(good.collect());
        // Once nobody is let in by them any more. Requests in flight are finished.
        replaced.iter().for_each(|check| check.replaced.cancel());
        match files.values().find_map(|file| file.error.clone()) {
            None => Ok(()),
            Some(error) => Err(CertificateError::new("the authorities of client certificates cannot be used", error)),
        }
    }

    pub(crate) fn report(&self) -> Vec<ClientAuthorityReport> {
        let report = |(demand, file): (&Demand, &AuthorityFile)| ClientAuthorityReport {
            enclave: demand.enclave.clone(),
            usable: file.good.is_some(),
            error: file.error.as_ref().map(|error| chain(error)),
        };
        self.lock().iter().map(report).collect()
    }

    /// What was replaced by what is there now.
    fn look(&self, demand: &Demand, file: &mut AuthorityFile) -> Option<Arc<Check>> {
        // Not there is a state like others; reading says what is wrong.
        let seen = stamp(&demand.file);
        if seen.is_some() && seen == file.seen {
            return None;
        }
        // As it was before it was read: what changes meanwhile is read again.
        file.seen = seen;
        let loaded = load(&demand.file).and_then(|authorities| {
            let same = file.good.as_ref().is_some_and(|check| check.authorities == authorities);
            if same { Ok(None) } else { self.make(&demand.file, authorities).map(Some) }
        });
        match loaded {
            Ok(new) => {
                file.error = None;
                let new = new?;
                tracing::info!(enclave = %demand.enclave, file = %demand.file.display(), authorities = new.authorities.len(), "read the authorities of client certificates");
                file.good.replace(Arc::new(new))
            }
            Err(error) => {
                file.error = Some(Arc::new(error));
                None
            }
        }
    }

    fn make(&self, path: &Path, authorities: Vec<CertificateDer<'static>>) -> Result<Check, LoadError> {
        let mut roots = RootCertStore::empty();
        let unusable = |source| LoadError::Authority { path: path.to_owned(), source };
        for authority in &authorities {
            roots.add(authority.clone()).map_err(unusable)?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), self.basis.provider.clone())
            .build()
            .map_err(|source| LoadError::Verifier { path: path.to_owned(), source })?;
        let config = Arc::new(self.basis.config(verifier.clone()).map_err(unusable)?);
        Ok(Check { config, replaced: CancellationToken::new(), authorities, verifier })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Demand, AuthorityFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All or nothing: half a list would lock out clients without a word.
fn load(path: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let (text, metadata) = read(path)?;
    let mode = metadata.mode() & 0o7777;
    if mode & OTHERS_WRITE != 0 {
        return Err(LoadError::Mode { path: path.to_owned(), mode });
    }
    let broken = |source| LoadError::Chain { path: path.to_owned(), source };
    let authorities = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>().map_err(broken)?;
    if authorities.is_empty() { Err(broken(pem::Error::NoItemsFound)) } else { Ok(authorities) }
}

impl ClientCertificate {
    pub(crate) fn new(certificate: &CertificateDer<'_>) -> Self {
        let mut hex = String::with_capacity(64);
        for byte in Sha256::digest(certificate) {
            push_hex(&mut hex, byte);
        }
        let sha256 = HeaderValue::from_str(&hex).unwrap_or(HeaderValue::from_static(""));
        Self { subject: subject(certificate), sha256 }
    }
}

fn push_hex(text: &mut String, byte: u8) {
    for digit in [byte >> 4, byte & 15] {
        text.extend(char::from_digit(digit.into(), 16));
    }
}

fn subject(certificate: &CertificateDer<'_>) -> Option<HeaderValue> {
    use x509_cert::certificate::{CertificateInner, Raw};
    use x509_cert::der::Decode;
    let certificate = CertificateInner::<Raw>::from_der(certificate).ok()?;
    let name = certificate.tbs_certificate().subject().to_string();
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        // What a header cannot hold, or its readers would take for Latin-1, is written by its bytes (RFC 4514, 2.4).
        match byte {
            0x20..=0x7e => text.push(char::from(byte)),
            _ => {
                text.push('\\');
                push_hex(&mut text, byte);
            }
        }
    }
    HeaderValue::from_str(&text).ok().filter(|_| text.len() <= SUBJECT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    fn told(names: &[(DnType, &str)]) -> ClientCertificate {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        ClientCertificate::new(params.self_signed(&KeyPair::generate().unwrap()).unwrap().der())
    }

    #[test]
    fn a_subject_is_one_name_in_ascii_whatever_is_in_it() {
        let subject = |names: &[_]| told(names).subject.map(|subject| subject.to_str().unwrap().to_owned());
        let names = [(DnType::OrganizationName, "Example, Inc."), (DnType::CommonName, "robot")];
        assert_eq!(subject(&names).unwrap(), r"CN=robot,O=Example\, Inc.");
        assert_eq!(subject(&[(DnType::CommonName, "a,O=admin")]).unwrap(), r"CN=a\,O=admin");
        assert_eq!(subject(&[(DnType::CommonName, "a\r\nx-evil: 1")]).unwrap(), r"CN=a\0d\0ax-evil: 1");
        assert_eq!(subject(&[(DnType::CommonName, "Jörg")]).unwrap(), r"CN=J\c3\b6rg");
        assert_eq!(subject(&[]).unwrap(), "");
        assert_eq!(subject(&[(DnType::CommonName, "x".repeat(SUBJECT_BYTES).as_str())]), None, "too long to be told");
    }

    #[test]
    fn a_certificate_has_the_sha256_of_its_der() {
        let certificate = CertificateDer::from(b"abc".to_vec());
        let told = ClientCertificate::new(&certificate);
        assert_eq!(told.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(told.subject, None, "it is no certificate");
    }
}
