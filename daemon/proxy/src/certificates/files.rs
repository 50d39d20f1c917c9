//! Certificates that an operator puts on disk, each a chain and its key in PEM. Both files are looked at every few seconds and
//! read again when one has changed. What cannot be used (half written, of another key, a key that others may read) takes the
//! place of nothing: the last good pair is served on, and it is said why.

use super::{CertificateError, CertificateSource, Origin, Wanted, expiry};
use crate::current::Current;
use crate::error_text::chain;
use enclaved_core::routes::{CertificateFiles, CertificateReport};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Longest file that is read: a chain of a dozen certificates has 30 KB.
const FILE_BYTES: u64 = 1 << 20;
/// Read and write, for anybody but owner and group.
const OTHERS: u32 = 0o006;

#[derive(Debug)]
pub(crate) struct FileCertificates {
    provider: Arc<CryptoProvider>,
    by_domain: Current<HashMap<String, Arc<CertifiedKey>>>,
    /// Held while the disk is waited for.
    pairs: Mutex<BTreeMap<CertificateFiles, Pair>>,
    /// What is told of them, for those who wait for no disk.
    told: Current<BTreeMap<CertificateFiles, Told>>,
}

/// When a pair expires (seconds since 1970), and what is wrong with what is there now.
type Told = (Option<i64>, Option<String>);

/// A chain and its key.
#[derive(Debug, Default)]
struct Pair {
    /// The files as they were when they were last read.
    seen: Option<(Stamp, Stamp)>,
    /// The last that was good.
    good: Option<Good>,
    /// What is wrong with what is there now.
    error: Option<Arc<LoadError>>,
}

#[derive(Debug, Clone)]
struct Good {
    certificate: Arc<CertifiedKey>,
    /// Seconds since 1970.
    expires: Option<i64>,
}

/// What changes when a file does: device, inode, size, time of change.
pub(crate) type Stamp = (u64, u64, u64, i64, i64);

/// Why what is on disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("could not read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no file", path.display())]
    NoFile { path: PathBuf },
    #[error("{} has more than {FILE_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("{} may be read or written by everybody (mode {mode:o}): chmod o= it", path.display())]
    Mode { path: PathBuf, mode: u32 },
    #[error("{} holds no certificate in PEM, or a broken one", path.display())]
    Chain {
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("{} holds a certificate that cannot be an authority's", path.display())]
    Authority {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("what is in {} cannot be used to check certificates", path.display())]
    Verifier {
        path: PathBuf,
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    #[error("{} holds no private key in PEM, or a broken one", path.display())]
    Key { path: PathBuf },
    #[error("the key in {} is not that of the certificate in {}, or of a kind that is not known", key.display(), cert.display())]
    Mismatch {
        cert: PathBuf,
        key: PathBuf,
        #[source]
        source: rustls::Error,
    },
}

impl FileCertificates {
    pub(crate) fn new(provider: Arc<CryptoProvider>) -> Self {
        Self { provider, by_domain: Current::default(), pairs: Mutex::default(), told: Current::default() }
    }

    fn load(&self, files: &CertificateFiles) -> Result<Good, LoadError> {
        let (chain, _) = read(&files.cert)?;
        let (key, metadata) = read(&files.key)?;
        let mode = metadata.mode() & 0o7777;
        if mode & OTHERS != 0 {
            return Err(LoadError::Mode { path: files.key.clone(), mode });
        }
        let broken = |source| LoadError::Chain { path: files.cert.clone(), source };
        let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>().map_err(broken)?;
        let Some(leaf) = chain.first() else { return Err(broken(pem::Error::NoItemsFound)) };
        let expires = expiry(leaf);
        // Without its cause, which might quote what it could not read.
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| LoadError::Key { path: files.key.clone() })?;
        let certificate = CertifiedKey::from_der(chain, key, &self.provider).map_err(|source| LoadError::Mismatch {
            cert: files.cert.clone(),
            key: files.key.clone(),
            source,
        })?;
        Ok(Good { certificate: Arc::new(certificate), expires })
    }

    fn look(&self, files: &CertificateFiles, pair: &mut Pair) {
        // Not there is a state like others; reading says what is wrong.
        let seen = stamp(&files.cert).zip(stamp(&files.key));
        if seen.is_some() && seen == pair.seen {
            return;
        }
        match self.load(files) {
            Ok(good) => {
                let again = pair.good.is_some();
                tracing::info!(cert = %files.cert.display(), again, "read a certificate");
                (pair.good, pair.error) = (Some(good), None);
            }
            Err(error) => pair.error = Some(Arc::new(error)),
        }
        // As it was before it was read: what changed meanwhile is read again. So is what could not be read: that may pass without
        // a change of the file (descriptors, a network's disk).
        pair.seen = seen.filter(|_| !matches!(pair.error.as_deref(), Some(LoadError::Read { .. })));
    }

    /// Serves the pairs as they are, and tells of them.
    fn show(&self, pairs: &BTreeMap<CertificateFiles, Pair>, wanted: &[Wanted]) {
        let of = |wanted: &Wanted| {
            let Origin::Files(files) = &wanted.origin else { return None };
            let good = pairs.get(files)?.good.as_ref()?;
            Some((wanted.domain.clone(), good.certificate.clone()))
        };
        self.by_domain.set(wanted.iter().filter_map(of).collect());
        let told = |(files, pair): (&CertificateFiles, &Pair)| {
            let expires = pair.good.as_ref().and_then(|good| good.expires);
            (files.clone(), (expires, pair.error.as_ref().map(|error| chain(error))))
        };
        self.told.set(pairs.iter().map(told).collect());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<CertificateFiles, Pair>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CertificateSource for FileCertificates {
    fn certificate(&self, domain: &str) -> Option<Arc<CertifiedKey>> {
        self.by_domain.get().get(domain).cloned()
    }

    fn maintain(&self, wanted: &[Wanted], _: SystemTime) -> Result<(), CertificateError> {
        let mut pairs = self.lock();
        let files = |wanted: &Wanted| match &wanted.origin {
            Origin::Files(files) => Some(files.clone()),
            Origin::InternalCa => None,
        };
        // Several domains may have one pair.
        let all: BTreeSet<_> = wanted.iter().filter_map(files).collect();
        pairs.retain(|known, _| all.contains(known));
        self.show(&pairs, wanted);
        for files in all {
            self.look(&files, pairs.entry(files.clone()).or_default());
            // Each at once: the next one's disk may hang.
            self.show(&pairs, wanted);
        }
        match pairs.values().find_map(|pair| pair.error.clone().map(|error| (pair.good.is_some(), error))) {
            None => Ok(()),
            Some((true, error)) => Err(CertificateError::new(
                "a certificate on disk cannot be used; the last good one is served on",
                error,
            )),
            Some((false, error)) => Err(CertificateError::new("a certificate on disk cannot be used", error)),
        }
    }

    fn report(&self, wanted: &[Wanted]) -> Vec<CertificateReport> {
        let told = self.told.get();
        let of = |wanted: &Wanted| {
            let Origin::Files(files) = &wanted.origin else { return None };
            let (expires, error) = told.get(files)?.clone();
            Some(CertificateReport { domain: wanted.domain.clone(), expires, error })
        };
        wanted.iter().filter_map(of).collect()
    }
}

pub(crate) fn read(path: &Path) -> Result<(Vec<u8>, Metadata), LoadError> {
    let failed = |source| LoadError::Read { path: path.to_owned(), source };
    // A pipe is not waited for.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    // Of what is read, not of what has its name by then.
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(LoadError::NoFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(LoadError::TooLarge { path: path.to_owned() });
    }
    Ok((bytes, metadata))
}

pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::tls;
    use std::os::unix::fs::PermissionsExt;

    struct Disk {
        dir: tempfile::TempDir,
        source: FileCertificates,
        wanted: Vec<Wanted>,
    }

    impl Disk {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let files = CertificateFiles { cert: dir.path().join("crt"), key: dir.path().join("key") };
            let wanted = vec![Wanted { domain: "a.test".into(), origin: Origin::Files(files) }];
            Self { dir, source: FileCertificates::new(tls::provider()), wanted }
        }

        fn write(&self, name: &str, bytes: &str) {
            let path = self.dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        }

        /// The certificate's bytes, and what is wrong.
        fn look(&self) -> (Option<Vec<u8>>, Option<String>) {
            let result = self.source.maintain(&self.wanted, SystemTime::now());
            let certificate = self.source.certificate("a.test").map(|key| key.cert[0].to_vec());
            let reported = self.source.report(&self.wanted).remove(0);
            assert_eq!(reported.error.is_some(), result.is_err());
            assert_eq!(reported.expires.is_some(), certificate.is_some());
            (certificate, result.err().map(|error| chain(&error)))
        }
    }

    fn pair() -> (String, String, Vec<u8>) {
        let made = rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem(), made.cert.der().to_vec())
    }

    #[test]
    fn a_pair_is_read_and_read_again_when_it_has_changed() {
        let disk = Disk::new();
        let (missing, error) = disk.look();
        assert!(missing.is_none() && error.unwrap().contains("could not read"));
        for _ in 0..2 {
            let (chain, key, der) = pair();
            disk.write("crt", &chain);
            disk.write("key", &key);
            assert_eq!(disk.look(), (Some(der.clone()), None));
            assert_eq!(disk.look(), (Some(der), None));
        }
        let expires = disk.source.report(&disk.wanted)[0].expires.unwrap();
        assert!(expires > 1_700_000_000, "{expires}");
    }

    #[test]
    fn what_is_half_written_of_another_key_or_open_to_all_replaces_nothing_and_says_so() {
        let disk = Disk::new();
        let (chain, key, der) = pair();
        let (other_chain, other_key, other_der) = pair();
        disk.write("crt", &chain);
        disk.write("key", &key);
        disk.look();
        type Spoil<'a> = (&'a str, &'a str, &'a str);
        let spoils: [Spoil<'_>; 5] = [
            ("crt", &other_chain, "is not that of the certificate"),
            ("crt", &other_chain[..other_chain.len() / 2], "no certificate"),
            ("crt", "", "no certificate"),
            ("key", &key[..key.len() / 2], "no private key"),
            ("key", &other_key, "is not that of the certificate"),
        ];
        for (name, bytes, says) in spoils {
            disk.write(name, bytes);
            let (served, error) = disk.look();
            let error = error.unwrap();
            assert!(error.contains(says) && error.contains("last good"), "{error}");
            assert!(!error.contains(&key[40..60]), "a key is in the error");
            assert_eq!(served.as_ref(), Some(&der), "{says}");
            disk.write("crt", &chain);
            disk.write("key", &key);
            assert_eq!(disk.look(), (Some(der.clone()), None));
        }
        std::fs::set_permissions(disk.dir.path().join("key"), PermissionsExt::from_mode(0o644)).unwrap();
        let (served, error) = disk.look();
        assert!(served == Some(der) && error.unwrap().contains("mode 644"));
        // Both halves of the next pair are there in the end.
        disk.write("crt", &other_chain);
        disk.look();
        disk.write("key", &other_key);
        assert_eq!(disk.look(), (Some(other_der), None));
    }

    #[test]
    fn while_a_disk_hangs_others_are_served_and_reports_are_made() {
        let disk = Arc::new(Disk::new());
        let (chain, key, der) = pair();
        disk.write("crt", &chain);
        disk.write("key", &key);
        disk.look();
        // As whoever waits for a disk holds it.
        let _hangs = disk.source.lock();
        let (told, tell) = std::sync::mpsc::channel();
        let asking = disk.clone();
        let asked = std::thread::spawn(move || told.send(asking.source.report(&asking.wanted)));
        let reports = tell.recv_timeout(std::time::Duration::from_secs(20)).unwrap();
        asked.join().unwrap().unwrap();
        assert!(reports[0].expires.is_some() && reports[0].error.is_none());
        assert_eq!(disk.source.certificate("a.test").unwrap().cert[0].to_vec(), der);
    }

    #[test]
    fn a_pipe_in_a_files_place_is_refused_and_a_passing_failure_is_tried_again() {
        let disk = Disk::new();
        let (chain, key, der) = pair();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            disk.dir.path().join("crt"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        disk.write("key", &key);
        assert!(disk.look().1.unwrap().contains("is no file"));
        std::fs::remove_file(disk.dir.path().join("crt")).unwrap();
        disk.write("crt", &chain);
        assert_eq!(disk.look(), (Some(der.clone()), None));
        // The file as it was, and a reason that is none of its own.
        let failed = io::Error::from_raw_os_error(rustix::io::Errno::NFILE.raw_os_error());
        for pair in disk.source.lock().values_mut() {
            pair.error =
                Some(Arc::new(LoadError::Read { path: "crt".into(), source: io::Error::other(failed.to_string()) }));
            pair.seen = None;
        }
        assert_eq!(disk.look(), (Some(der), None));
    }

    #[test]
    fn a_domain_that_is_wanted_no_more_is_forgotten() {
        let disk = Disk::new();
        let (chain, key, _) = pair();
        disk.write("crt", &chain);
        disk.write("key", &key);
        disk.look();
        disk.source.maintain(&[], SystemTime::now()).unwrap();
        assert!(disk.source.certificate("a.test").is_none() && disk.source.lock().is_empty());
    }
}
