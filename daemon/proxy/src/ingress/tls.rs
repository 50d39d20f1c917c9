//! TLS of the HTTPS ingress: which versions, key exchanges and ciphers, and which certificate for which name. Where
//! certificates come from is behind [`CertificateSource`].

use super::sites::Sites;
use crate::certificates::CertificateSource;
use crate::current::Current;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ProtocolVersion, ServerConfig};
use std::sync::Arc;

/// The protocols on offer, the better first.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The cryptography of the ingress. Its own, with its key exchanges listed: other parts of the same program set the
/// process-wide default to their needs.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519};
    Arc::new(CryptoProvider { kx_groups: vec![X25519, SECP256R1, SECP384R1], ..aws_lc_rs::default_provider() })
}

/// What all sites have in common.
#[derive(Debug, Clone)]
pub(crate) struct Basis {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) certificates: Arc<dyn CertificateSource>,
    pub(crate) sites: Arc<Current<Sites>>,
}

impl Basis {
    /// TLS 1.2 and 1.3. Sessions are resumed by tickets alone, whose keys are made here, change every six hours, and are good for
    /// the last six: what one of these settings has agreed with a client no other resumes.
    pub(crate) fn config(&self, clients: Arc<dyn ClientCertVerifier>) -> Result<ServerConfig, rustls::Error> {
        let resolver = Resolver { certificates: self.certificates.clone(), sites: self.sites.clone() };
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
        // One order for all clients, the provider's: whoever is in between cannot choose by changing what a client offers first.
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = aws_lc_rs::Ticketer::new()?;
        Ok(config)
    }
}

#[derive(Debug)]
struct Resolver {
    certificates: Arc<dyn CertificateSource>,
    sites: Arc<Current<Sites>>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let sites = self.sites.get();
        let (domain, _) = sites.for_client(hello.server_name())?;
        self.certificates.certificate(domain)
    }
}

/// A version of TLS, for people.
pub(crate) fn version_name(version: ProtocolVersion) -> Option<&'static str> {
    match version {
        ProtocolVersion::TLSv1_2 => Some("1.2"),
        ProtocolVersion::TLSv1_3 => Some("1.3"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::NamedGroup;

    #[test]
    fn key_exchanges_are_those_listed_whatever_the_process_prefers() {
        // Fails only if another test was faster, which is as good.
        drop(aws_lc_rs::default_provider().install_default());
        let groups: Vec<_> = provider().kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(groups, [NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1]);
    }
}
