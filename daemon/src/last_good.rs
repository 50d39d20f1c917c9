//! Keeps the last configuration that was in force, so that a bad edit or a stricter version never takes a working host down
//! (invariant 7): byte for byte, and as what it meant to the version that took it. The latter counts where this version would not
//! take the same bytes any more.

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
    /// A [`Config`] without its sources. Read only when it is needed, so that it can't spoil them.
    #[serde(default)]
    meaning: Option<serde_json::Value>,
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
    // All that is in it can be written as JSON; without it the bytes are kept all the same.
    let meaning = serde_json::to_value(config).ok();
    let kept = Kept { format: 1, sources: config.sources.iter().map(source).collect(), meaning };
    Ok(atomic_file::write_json(&state_dir.join(NAME), &kept)?)
}

/// The configuration that was kept. If this version refuses its bytes, it is what they meant to the one that kept them.
///
/// # Errors
/// There is none, or it can't be used.
pub fn recall(state_dir: &Path) -> Result<Config, LastGoodError> {
    let path = state_dir.join(NAME);
    let Some(kept) = atomic_file::read_json::<Kept>(&path, LIMIT)? else { return Err(LastGoodError::None(path)) };
    let source = |source: KeptSource| SourceFile { path: source.path, text: source.text };
    let sources: Vec<_> = kept.sources.into_iter().map(source).collect();
    config::parse(&sources).or_else(|errors| {
        let meant = kept.meaning.and_then(|meaning| serde_json::from_value::<Config>(meaning).ok());
        match meant {
            Some(config) => {
                tracing::warn!("this version refuses the last good configuration, too; what it meant before stays in force: {errors}");
                Ok(Config { sources, ..config })
            }
            None => Err(LastGoodError::Refused { path, errors }),
        }
    })
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

    /// As if an earlier version had taken a key that this one does not know.
    fn retire_a_key(dir: &Path) {
        let path = dir.join(NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("[host]"));
        std::fs::write(path, text.replace("[host]", "retired = 1\\n[host]")).unwrap();
    }

    #[test]
    fn what_a_stricter_version_refuses_stays_in_force_as_what_it_meant() {
        let dir = tempfile::tempdir().unwrap();
        let example =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/enclaved.toml")).unwrap();
        let config = config(dir.path(), &example);
        keep(dir.path(), &config).unwrap();
        retire_a_key(dir.path());
        let recalled = recall(dir.path()).unwrap();
        assert!(recalled.sources[0].text.contains("retired = 1"));
        let without = |config: Config| Config { sources: Vec::new(), warnings: Vec::new(), ..config };
        assert_eq!(without(recalled), without(config));

        let text = std::fs::read_to_string(dir.path().join(NAME)).unwrap();
        let mut kept: serde_json::Value = serde_json::from_str(&text).unwrap();
        kept["meaning"] = serde_json::json!({"nonsense": 1});
        std::fs::write(dir.path().join(NAME), kept.to_string()).unwrap();
        assert!(matches!(recall(dir.path()), Err(LastGoodError::Refused { .. })));
    }

    #[test]
    fn what_the_first_version_kept_can_still_be_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(NAME), include_str!("last_good/kept-by-0.1.json")).unwrap();
        let recalled = recall(dir.path()).unwrap();
        let (name, signer) = recalled.desired.enclaves.first_key_value().unwrap();
        assert_eq!((name.as_str(), signer.cpus, signer.egress.len()), ("signer", 2, 1));
        assert_eq!(recalled.host.state_dir, Path::new("/var/lib/enclaved"));
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
