//! Certificates for HTTPS: the narrow seam between whoever serves TLS and wherever certificates come from.

pub(crate) mod files;
pub(crate) mod internal_ca;

use enclaved_core::routes::{CertificateFiles, CertificateReport};
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use std::error::Error;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::SystemTime;

/// Somewhere that certificates come from.
pub(crate) trait CertificateSource: Debug + Send + Sync + 'static {
    /// The certificate for a domain as the routes have it (`a.example.com`, `*.example.com`, an address), if there is one.
    /// Called in the middle of a handshake: it looks up, and does no work.
    fn certificate(&self, domain: &str) -> Option<Arc<CertifiedKey>>;

    /// Has certificates for these domains, and only these, as far as they come from here: gets missing ones, renews those that
    /// expire soon. Called before HTTPS listens, when the domains change, and every few seconds. May block on files and
    /// computation.
    fn maintain(&self, wanted: &[Wanted], now: SystemTime) -> Result<(), CertificateError>;

    /// What there is of these, as far as they come from here.
    fn report(&self, wanted: &[Wanted]) -> Vec<CertificateReport>;
}

/// A domain that needs a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) domain: String,
    pub(crate) origin: Origin,
}

/// Where a domain's certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    InternalCa,
    Files(CertificateFiles),
}

/// All places together.
#[derive(Debug)]
pub(crate) struct Sources(pub(crate) Vec<Box<dyn CertificateSource>>);

impl CertificateSource for Sources {
    fn certificate(&self, domain: &str) -> Option<Arc<CertifiedKey>> {
        self.0.iter().find_map(|source| source.certificate(domain))
    }

    /// Trouble in one place keeps no other from its work.
    fn maintain(&self, wanted: &[Wanted], now: SystemTime) -> Result<(), CertificateError> {
        let results: Vec<_> = self.0.iter().map(|source| source.maintain(wanted, now)).collect();
        results.into_iter().collect()
    }

    fn report(&self, wanted: &[Wanted]) -> Vec<CertificateReport> {
        self.0.iter().flat_map(|source| source.report(wanted)).collect()
    }
}

/// Until when a certificate is valid, in seconds since 1970. `None` if it cannot be read so far.
pub(crate) fn expiry(certificate: &CertificateDer<'_>) -> Option<i64> {
    use x509_cert::certificate::{CertificateInner, Raw};
    use x509_cert::der::Decode;
    let certificate = CertificateInner::<Raw>::from_der(certificate).ok()?;
    let not_after = certificate.tbs_certificate().validity().not_after;
    i64::try_from(not_after.to_unix_duration().as_secs()).ok()
}

/// Certificates are not to be had. Those that are there are still served.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct CertificateError {
    what: String,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CertificateError {
    pub(crate) fn new(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), source: Some(source.into()) }
    }
}
