//! Keeps the last configuration that was in force, byte for byte, so that a bad edit or a stricter version never takes a
//! working host down (invariant 7).

use crate::atomic_file::{self, FileError};
use crate::config::{self, Config, ConfigErrors, SourceFile};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Its name in the state folder.
const NAME: &str = "last-good-config.json";
/// As large as all the files of a configuration can be, and their quoting.
const LIMIT: u64 = 2 * config::MAX_FILE_BYTES * config::MAX_FILES as u64;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    format: u32,
    sources: Vec<KeptSource>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptSource {
    path: PathBuf,
    text: String,
}

/// The last good configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LastGoodError {
    /// Its file can't be read or written.
    #[error("keeping the last good configuration")]
    File(#[from] FileError),
    /// There is none.
    #[error("no configuration was ever in force on this host ({0} does not exist)")]
    None(PathBuf),
    /// This version does not accept it.
    #[error("the last good configuration in {path} is refused as well: {errors}")]
    Refused {
        /// Where it is.
        path: PathBuf,
        /// Why.
        errors: ConfigErrors,
    },
}

/// Keeps that configuration.
///
/// # Errors
/// It could not be written; the one before it is still there.
pub fn keep(state_dir: &Path, config: &Config) -> Result<(), LastGoodError> {
    let source = |source: &SourceFile| KeptSource { path: source.path.clone(), text: source.text.clone() };
    let kept = Kept { format: 1, sources: config.sources.iter().map(source).collect() };
    Ok(atomic_file::write_json(&state_dir.join(NAME), &kept)?)
}

/// The configuration that was kept.
///
/// # Errors
/// There is none, or it can't be used.
pub fn recall(state_dir: &Path) -> Result<Config, LastGoodError> {
    let path = state_dir.join(NAME);
    let Some(kept) = atomic_file::read_json::<Kept>(&path, LIMIT)? else { return Err(LastGoodError::None(path)) };
    let source = |source: KeptSource| SourceFile { path: source.path, text: source.text };
    let sources: Vec<_> = kept.sources.into_iter().map(source).collect();
    config::parse(&sources).map_err(|errors| LastGoodError::Refused { path, errors })
}

/// Where the state folder is according to a configuration that is refused: a file with a wrong key in one place may well
/// be right in this one. `None` if that can't be told.
pub fn state_dir_of(path: &Path) -> Option<PathBuf> {
    config::read(path).ok()?.iter().find_map(|source| {
        let table: toml::Table = source.text.parse().ok()?;
        Some(PathBuf::from(table.get("host")?.get("state_dir")?.as_str()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path, text: &str) -> Config {
        let path = dir.join("enclaved.toml");
        std::fs::write(&path, text).unwrap();
        config::load(&path).unwrap()
    }

    #[test]
    fn what_was_kept_is_recalled_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), "# a comment\n[host]\nreserve_cpus = 4\n");
        keep(dir.path(), &config).unwrap();
        assert_eq!(recall(dir.path()).unwrap(), config);
    }

    #[test]
    fn nothing_kept_and_a_torn_file_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(recall(dir.path()), Err(LastGoodError::None(_))));
        std::fs::write(dir.path().join(NAME), "{\"format\": 1, \"sour").unwrap();
        assert!(matches!(recall(dir.path()), Err(LastGoodError::File(_))));
    }

    #[test]
    fn a_refused_configuration_still_tells_its_state_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("enclaved.toml");
        std::fs::write(&path, "nonsense = 1\n[host]\nstate_dir = \"/x\"\n").unwrap();
        assert_eq!(state_dir_of(&path), Some("/x".into()));
        std::fs::write(&path, "nonsense = = 1\n").unwrap();
        assert_eq!(state_dir_of(&path), None);
    }
}
