//! The last snapshot of the routes, on disk: what a restarted proxy serves before anyone talks to it. A file that cannot be
//! used is put aside and reported, and never keeps the proxy from starting.

use crate::durable;
use crate::error_text::chain;
use enclaved_core::routes::{InvalidRoutes, ROUTES_FORMAT, Routes, limits};
use serde::Deserialize;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    /// Who holds it is a disk that hangs.
    #[cfg(test)]
    disk: std::sync::Arc<tokio::sync::Mutex<()>>,
}

/// Why a snapshot on disk is of no use.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error("could not read it")]
    Read(#[source] io::Error),
    #[error("it is larger than {} bytes", limits::LINK_LINE_BYTES)]
    TooLarge,
    #[error("it has format {0}, and this version reads {ROUTES_FORMAT}")]
    Format(u32),
    #[error("it is torn, or no snapshot")]
    Syntax(#[source] serde_json::Error),
    #[error("it makes no sense")]
    Invalid(#[source] InvalidRoutes),
}

/// The one field that every format has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

impl Store {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            #[cfg(test)]
            disk: std::sync::Arc::default(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The disk hangs for as long as this is locked.
    #[cfg(test)]
    pub(crate) fn disk(&self) -> std::sync::Arc<tokio::sync::Mutex<()>> {
        self.disk.clone()
    }

    /// The last snapshot, if there is one; and what to tell people if there is one that cannot be used.
    pub(crate) fn load(&self) -> (Option<Routes>, Option<String>) {
        let error = match self.read() {
            Ok(routes) => return (routes, None),
            Err(error) => error,
        };
        let path = self.path.display();
        let put_aside = match &error {
            // It may be sound, and readable another time.
            LoadError::Read(_) => "it was left where it is".to_owned(),
            _ => match durable::quarantine(&self.path) {
                Ok(to) => format!("it was put aside as {}", to.display()),
                Err(error) => format!("it could not be put aside: {error}"),
            },
        };
        let error = chain(&error);
        let text = format!("the last routes in {path} cannot be served: {error}; {put_aside}");
        tracing::error!("{text}; serving nothing until the control process sends routes");
        (None, Some(text))
    }

    fn read(&self) -> Result<Option<Routes>, LoadError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(LoadError::Read(error)),
        };
        let mut text = Vec::new();
        file.take(limits::LINK_LINE_BYTES as u64 + 1).read_to_end(&mut text).map_err(LoadError::Read)?;
        if text.len() > limits::LINK_LINE_BYTES {
            return Err(LoadError::TooLarge);
        }
        // First the format alone: what else a newer one has may not be read by this version's rules.
        match serde_json::from_slice(&text) {
            Ok(Format { format }) if format != ROUTES_FORMAT => return Err(LoadError::Format(format)),
            Ok(_) | Err(_) => {}
        }
        let routes: Routes = serde_json::from_slice(&text).map_err(LoadError::Syntax)?;
        routes.check().map_err(LoadError::Invalid)?;
        Ok(Some(routes))
    }

    /// Keeps a snapshot; when this returns, it survives a power cut.
    pub(crate) fn save(&self, routes: &Routes) -> io::Result<()> {
        #[cfg(test)]
        let _goes_on = self.disk.blocking_lock();
        durable::replace(&self.path, &serde_json::to_vec(routes)?, 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::id::Cid;

    fn store(dir: &Path) -> Store {
        Store::new(dir.join("routes.json"))
    }

    fn routes() -> Routes {
        Routes { format: ROUTES_FORMAT, live: vec![Cid::FIRST], ..Routes::default() }
    }

    #[test]
    fn a_snapshot_reads_back_as_it_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(store(dir.path()).load(), (None, None));
        store(dir.path()).save(&routes()).unwrap();
        assert_eq!(store(dir.path()).load(), (Some(routes()), None));
    }

    #[test]
    fn a_torn_foreign_newer_or_senseless_file_is_put_aside_with_its_reason() {
        let whole = serde_json::to_string(&routes()).unwrap();
        let newer = whole.replace("\"format\":1", "\"format\":2,\"news\":true");
        let unknown = whole.replace("\"format\":1", "\"format\":1,\"news\":true");
        let senseless = whole.replace("\"af_vsock\"", "{\"hybrid\":\"relative\"}");
        let cases = [
            (whole[..whole.len() / 2].to_owned(), "torn"),
            (String::new(), "torn"),
            ("\u{0}\u{0}\u{0}".to_owned(), "torn"),
            ("[1]".to_owned(), "torn"),
            (unknown, "news"),
            (newer, "format 2"),
            (senseless, "not absolute"),
            (" ".repeat(limits::LINK_LINE_BYTES + 1), "larger"),
        ];
        for (content, reason) in cases {
            let dir = tempfile::tempdir().unwrap();
            let store = store(dir.path());
            std::fs::write(&store.path, &content).unwrap();
            let (loaded, error) = store.load();
            let error = error.unwrap();
            assert!(loaded.is_none() && error.contains(reason) && error.contains("routes.json.bad-1"), "{error}");
            assert_eq!(std::fs::read_to_string(dir.path().join("routes.json.bad-1")).unwrap(), content);
            assert_eq!(store.load(), (None, None));
        }
    }
}
