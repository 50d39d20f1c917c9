//! Certificates for HTTPS: the narrow seam between whoever serves TLS and wherever certificates come from.

pub(crate) mod internal_ca;

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

    /// Has certificates for these domains, and only these: gets missing ones, renews those that expire soon. Called before
    /// HTTPS listens, when the domains change, and every few seconds. May block on files and computation.
    fn maintain(&self, domains: &[String], now: SystemTime) -> Result<(), CertificateError>;
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
