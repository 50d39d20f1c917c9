//! The internal CA: certificates for localhost and private names, as Caddy has them. One root for the life of the state
//! directory, whose certificate clients are told to trust (`curl --cacert <state>/ca/root.crt`); its key never leaves this
//! host. Leaf certificates live a week and only in memory.

use super::{CertificateError, CertificateSource, Origin, Wanted, expiry};
use crate::current::Current;
use crate::durable;
use enclaved_core::routes::CertificateReport;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Thirty years: the root outlives every host, so nothing has to renew it under clients that trust it.
const ROOT_LIFETIME: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
const LEAF_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// Certificates are valid from somewhat earlier, for clients whose clocks are late.
const BACKDATE: Duration = Duration::from_secs(3600);
/// A leaf is renewed at two thirds of its life.
const RENEW_AFTER: Duration = Duration::from_secs(7 * 24 * 3600 * 2 / 3);

#[derive(Debug)]
pub(crate) struct InternalCa {
    dir: PathBuf,
    provider: Arc<CryptoProvider>,
    root: Mutex<Option<Root>>,
    leaves: Current<HashMap<String, Leaf>>,
}

#[derive(Debug, Clone)]
struct Leaf {
    certificate: Arc<CertifiedKey>,
    issued: SystemTime,
}

/// The root, proven to be one that clients who trust it accept.
struct Root {
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Root")
    }
}

type Cause = Box<dyn Error + Send + Sync>;

impl InternalCa {
    /// The CA of this directory, which need not exist yet.
    pub(crate) fn new(dir: PathBuf, provider: Arc<CryptoProvider>) -> Self {
        Self { dir, provider, root: Mutex::new(None), leaves: Current::default() }
    }

    fn key_path(&self) -> PathBuf {
        self.dir.join("root.key")
    }

    fn certificate_path(&self) -> PathBuf {
        self.dir.join("root.crt")
    }

    /// The root on disk, or a new one where there is none that can be used.
    fn open_root(&self, now: SystemTime) -> Result<Root, CertificateError> {
        match self.load_root(now) {
            Ok(Some(root)) => return Ok(root),
            Ok(None) => {}
            Err(Unusable::Now(source)) => {
                let what = format!("could not read the internal CA in {}", self.dir.display());
                return Err(CertificateError::new(what, source));
            }
            Err(Unusable::Ever(cause)) => self.quarantine(&cause)?,
        }
        let root = self.create_root(now).map_err(|cause| {
            CertificateError::new(format!("could not make an internal CA in {}", self.dir.display()), cause)
        })?;
        tracing::info!(certificate = %self.certificate_path().display(), "made an internal CA: clients that are to trust it need this certificate");
        Ok(root)
    }

    fn load_root(&self, now: SystemTime) -> Result<Option<Root>, Unusable> {
        let key = read(&self.key_path())?;
        let certificate = read(&self.certificate_path())?;
        let (key, certificate) = match (key, certificate) {
            (None, None) => return Ok(None),
            (Some(key), Some(certificate)) => (key, certificate),
            (None, Some(_)) => return Err(Unusable::Ever("root.key is missing".into())),
            (Some(_), None) => return Err(Unusable::Ever("root.crt is missing".into())),
        };
        let open = || -> Result<Root, Cause> {
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())?;
            let key = KeyPair::from_pem(&key)?;
            let root = Root { issuer: Issuer::new(root_params(&key, now)?, key) };
            root.prove(&certificate, &self.provider, now)?;
            Ok(root)
        };
        open().map(Some).map_err(Unusable::Ever)
    }

    fn quarantine(&self, cause: &Cause) -> Result<(), CertificateError> {
        for path in [self.key_path(), self.certificate_path()] {
            match durable::quarantine(&path) {
                Ok(to) => {
                    tracing::error!(path = %path.display(), to = %to.display(), error = %cause, "the internal CA cannot be used and was put aside; a new one is made, and clients have to be given its certificate");
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    let what =
                        format!("the internal CA cannot be used ({cause}), and {} cannot be put aside", path.display());
                    return Err(CertificateError::new(what, source));
                }
            }
        }
        Ok(())
    }

    fn create_root(&self, now: SystemTime) -> Result<Root, Cause> {
        let key = KeyPair::generate()?;
        let params = root_params(&key, now)?;
        let certificate = params.self_signed(&key)?;
        std::fs::create_dir_all(&self.dir)?;
        // The key first: a certificate without its key would be handed to clients in vain.
        durable::replace(&self.key_path(), key.serialize_pem().as_bytes(), 0o600)?;
        durable::replace(&self.certificate_path(), certificate.pem().as_bytes(), 0o644)?;
        let root = Root { issuer: Issuer::new(params, key) };
        root.prove(certificate.der(), &self.provider, now)?;
        Ok(root)
    }
}

impl CertificateSource for InternalCa {
    fn certificate(&self, domain: &str) -> Option<Arc<CertifiedKey>> {
        self.leaves.get().get(domain).map(|leaf| leaf.certificate.clone())
    }

    fn maintain(&self, wanted: &[Wanted], now: SystemTime) -> Result<(), CertificateError> {
        let domains: Vec<_> =
            wanted.iter().filter(|wanted| wanted.origin == Origin::InternalCa).map(|wanted| &*wanted.domain).collect();
        let mut root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        let leaves = self.leaves.get();
        let current = |domain: &str| leaves.get(domain).filter(|leaf| !leaf.is_due(now)).cloned();
        if domains.len() == leaves.len() && domains.iter().all(|domain| current(domain).is_some()) {
            return Ok(());
        }
        let root = match &mut *root {
            Some(root) => root,
            none => none.insert(self.open_root(now)?),
        };
        let issue = |domain: &str| {
            let leaf = root.issue(domain, now, &self.provider);
            leaf.map_err(|cause| CertificateError::new(format!("could not issue a certificate for {domain}"), cause))
        };
        let leaves = domains.into_iter().map(|domain| {
            let leaf = current(domain).map_or_else(|| issue(domain), Ok)?;
            Ok((domain.to_owned(), leaf))
        });
        self.leaves.set(leaves.collect::<Result<_, CertificateError>>()?);
        Ok(())
    }

    fn report(&self, wanted: &[Wanted]) -> Vec<CertificateReport> {
        let leaves = self.leaves.get();
        let ours = wanted.iter().filter(|wanted| wanted.origin == Origin::InternalCa);
        let of = |Wanted { domain, .. }: &Wanted| CertificateReport {
            domain: domain.clone(),
            expires: leaves.get(domain).and_then(|leaf| expiry(leaf.certificate.end_entity_cert().ok()?)),
            error: None,
        };
        ours.map(of).collect()
    }
}

impl Leaf {
    /// Also due if the clock was set back so far that it is not valid yet.
    fn is_due(&self, now: SystemTime) -> bool {
        now > self.issued + RENEW_AFTER || now + BACKDATE < self.issued
    }
}

impl Root {
    fn issue(&self, domain: &str, now: SystemTime, provider: &CryptoProvider) -> Result<Leaf, Cause> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([domain.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        // A common name has 64 characters at most (RFC 5280, ub-common-name); the domain stands in the alternative names.
        params.distinguished_name.push(DnType::CommonName, domain.get(..64).unwrap_or(domain));
        (params.not_before, params.not_after) = validity(now, LEAF_LIFETIME);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::try_from(key.serialize_der())?;
        let signer = provider.key_provider.load_private_key(key)?;
        let certificate = Arc::new(CertifiedKey::new(vec![certificate.der().clone()], signer));
        Ok(Leaf { certificate, issued: now })
    }

    /// Issues a certificate and verifies it as a client would that trusts the root's. What passes this is a key and a
    /// certificate that belong together, and a CA's.
    fn prove(
        &self,
        certificate: &CertificateDer<'_>,
        provider: &Arc<CryptoProvider>,
        now: SystemTime,
    ) -> Result<(), Cause> {
        let name = "proof.invalid";
        let leaf = self.issue(name, now, provider)?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build()?;
        let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH)?);
        verifier.verify_server_cert(
            leaf.certificate.end_entity_cert()?,
            &[],
            &ServerName::try_from(name)?,
            &[],
            now,
        )?;
        Ok(())
    }
}

/// The root's parameters. All that leaf certificates repeat (its name, its key's identifier) follows from the key, so that it
/// need not be read back from the certificate.
fn root_params(key: &KeyPair, now: SystemTime) -> Result<CertificateParams, Cause> {
    let mut params = CertificateParams::default();
    let id: String = params.key_identifier(key).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("enclaved internal CA {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity(now.checked_sub(DAY).unwrap_or(now), ROOT_LIFETIME);
    Ok(params)
}

fn validity(now: SystemTime, lifetime: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let from = now.checked_sub(BACKDATE).unwrap_or(now);
    (from.into(), (now + lifetime).into())
}

/// Why there is no root.
enum Unusable {
    /// It cannot be read, which may pass.
    Now(io::Error),
    /// What is there is damaged, incomplete or expired.
    Ever(Cause),
}

fn read(path: &Path) -> Result<Option<String>, Unusable> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(Unusable::Ever(error.into())),
        Err(error) => Err(Unusable::Now(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::tls;
    use std::os::unix::fs::PermissionsExt;

    fn ca(dir: &Path) -> InternalCa {
        InternalCa::new(dir.join("ca"), tls::provider())
    }

    fn names(names: &[&str]) -> Vec<Wanted> {
        names.iter().map(|name| Wanted { domain: (*name).to_owned(), origin: Origin::InternalCa }).collect()
    }

    /// Verifies what the CA serves for a domain as a client would that asks for `name` and trusts `root.crt`.
    fn verify(ca: &InternalCa, domain: &str, name: &'static str, when: SystemTime) -> Result<(), rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca.certificate_path()).unwrap()).unwrap();
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), tls::provider()).build().unwrap();
        let certificate = ca.certificate(domain).unwrap();
        let when = UnixTime::since_unix_epoch(when.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        let name = ServerName::try_from(name).unwrap();
        verifier.verify_server_cert(certificate.end_entity_cert().unwrap(), &[], &name, &[], when).map(drop)
    }

    #[test]
    fn clients_that_trust_the_root_accept_its_certificates_for_their_names_only() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ca(dir.path());
        let now = SystemTime::now();
        let long = format!("{}.{}.example.com", "a".repeat(63), "b".repeat(63));
        ca.maintain(&names(&["localhost", "*.example.com", "127.0.0.1", &long]), now).unwrap();
        verify(&ca, "localhost", "localhost", now).unwrap();
        verify(&ca, "*.example.com", "a.example.com", now).unwrap();
        verify(&ca, "127.0.0.1", "127.0.0.1", now).unwrap();
        verify(&ca, &long, String::leak(long.clone()), now).unwrap();
        verify(&ca, "localhost", "a.example.com", now).unwrap_err();
        assert!(ca.certificate("other.example.org").is_none());
        let report = ca.report(&names(&["localhost"])).remove(0);
        let week = now.duration_since(SystemTime::UNIX_EPOCH).unwrap() + LEAF_LIFETIME;
        assert_eq!((report.expires, report.error), (i64::try_from(week.as_secs()).ok(), None));
        let mode = std::fs::metadata(ca.key_path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn leaves_are_renewed_before_they_expire_and_not_sooner() {
        let dir = tempfile::tempdir().unwrap();
        let ca = ca(dir.path());
        let domains = names(&["localhost"]);
        let start = SystemTime::now();
        ca.maintain(&domains, start).unwrap();
        let first = ca.certificate("localhost").unwrap();
        ca.maintain(&domains, start + 4 * DAY).unwrap();
        assert!(Arc::ptr_eq(&first, &ca.certificate("localhost").unwrap()));
        ca.maintain(&domains, start + 5 * DAY).unwrap();
        let second = ca.certificate("localhost").unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        verify(&ca, "localhost", "localhost", start + 8 * DAY).unwrap();
        // The clock was wrong, and is set right.
        ca.maintain(&domains, start - 2 * DAY).unwrap();
        verify(&ca, "localhost", "localhost", start).unwrap();
        ca.maintain(&names(&["other"]), start).unwrap();
        assert!(ca.certificate("localhost").is_none(), "domains that left the routes are forgotten");
    }

    #[test]
    fn the_root_stays_the_same_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let before = ca(dir.path());
        before.maintain(&names(&["a.test"]), now).unwrap();
        let root = std::fs::read(before.certificate_path()).unwrap();
        let after = ca(dir.path());
        after.maintain(&names(&["b.test"]), now + DAY).unwrap();
        assert_eq!(std::fs::read(after.certificate_path()).unwrap(), root);
        verify(&after, "b.test", "b.test", now + DAY).unwrap();
    }

    #[test]
    fn a_root_that_is_damaged_incomplete_or_foreign_is_put_aside_and_made_again() {
        let other = tempfile::tempdir().unwrap();
        ca(other.path()).maintain(&names(&["a.test"]), SystemTime::now()).unwrap();
        let foreign = other.path().join("ca/root.crt");
        type Spoil<'a> = &'a dyn Fn(&InternalCa);
        let spoils: [(&str, Spoil<'_>); 6] = [
            ("torn key", &|ca| std::fs::write(ca.key_path(), "-----BEGIN PRIV").unwrap()),
            ("torn certificate", &|ca| std::fs::write(ca.certificate_path(), b"\xff\x00").unwrap()),
            ("empty key", &|ca| std::fs::write(ca.key_path(), "").unwrap()),
            ("missing key", &|ca| std::fs::remove_file(ca.key_path()).unwrap()),
            ("missing certificate", &|ca| std::fs::remove_file(ca.certificate_path()).unwrap()),
            ("foreign certificate", &|ca| {
                std::fs::copy(&foreign, ca.certificate_path()).unwrap();
            }),
        ];
        let now = SystemTime::now();
        for (what, spoil) in spoils {
            let dir = tempfile::tempdir().unwrap();
            ca(dir.path()).maintain(&names(&["a.test"]), now).unwrap();
            spoil(&ca(dir.path()));
            let ca = ca(dir.path());
            ca.maintain(&names(&["a.test"]), now).unwrap_or_else(|error| panic!("{what}: {error}"));
            verify(&ca, "a.test", "a.test", now).unwrap_or_else(|error| panic!("{what}: {error}"));
            let kept = std::fs::read_dir(dir.path().join("ca")).unwrap();
            let kept = kept.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains(".bad-1"));
            assert!(kept.count() >= 1, "{what}: nothing was kept of it");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_an_error_that_names_it_and_passes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca"), "a file in the way").unwrap();
        let ca = ca(dir.path());
        let error = ca.maintain(&names(&["a.test"]), SystemTime::now()).unwrap_err();
        assert!(error.to_string().contains(&*dir.path().join("ca").to_string_lossy()), "{error}");
        std::fs::remove_file(dir.path().join("ca")).unwrap();
        ca.maintain(&names(&["a.test"]), SystemTime::now()).unwrap();
    }
}
