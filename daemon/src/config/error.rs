//! What is wrong with a configuration, and where: the error that people see, and the list in which problems are gathered
//! while a configuration is judged.

use super::source::{Path, Place, Tree};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// Everything that is wrong with a configuration; at least one thing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(.0))]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    pub(super) fn one(error: ConfigError) -> Self {
        Self(vec![error])
    }

    /// Each of them, in the order of the files and of the places in them.
    pub fn iter(&self) -> std::slice::Iter<'_, ConfigError> {
        self.0.iter()
    }
}

fn lines(errors: &[ConfigError]) -> String {
    errors.iter().map(ConfigError::to_string).collect::<Vec<_>>().join("\n")
}

/// One thing that is wrong with a configuration, written
/// `enclaved.toml:12:5: [[enclave]] "signer": unknown key "memroy_mib"; did you mean "memory_mib"?`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfigError {
    /// In which file.
    pub file: PathBuf,
    /// Where in it; `None` if it is the file as a whole.
    #[serde(flatten)]
    pub position: Option<Position>,
    /// The table or key, such as `[[enclave]] "signer" egress[1].port`; empty if it is none.
    pub key: String,
    /// What is wrong, what is allowed, what can be done.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(Position { line, column }) = self.position {
            write!(f, "{line}:{column}:")?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", self.key)?;
        }
        write!(f, " {}", self.message)
    }
}

/// A place in a text, both numbers from 1; columns are counted in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

impl Position {
    /// Of that byte in `text`, or of the text's end.
    pub(super) fn of(text: &str, byte: usize) -> Self {
        let end = (0..=byte.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let before = text.get(..end).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        Self { line, column: before.get(line_start..).unwrap_or_default().chars().count() + 1 }
    }
}

/// Gathers problems; each knows its place, so that they come out in order.
#[derive(Debug, Default)]
pub(super) struct Problems {
    found: Vec<(Place, String, String)>,
    warnings: Vec<(Place, String, String)>,
}

impl Problems {
    /// A problem with the value at `path`, or, if there is none, with the nearest table around it.
    pub(super) fn add(&mut self, tree: &Tree, path: &Path, message: impl Into<String>) {
        self.add_at(tree.place(path), tree.label(path), message);
    }

    /// A problem at a place of its own.
    pub(super) fn add_at(&mut self, place: Place, key: String, message: impl Into<String>) {
        self.found.push((place, key, message.into()));
    }

    /// Something that is allowed and should be known.
    pub(super) fn warn(&mut self, tree: &Tree, path: &Path, message: impl Into<String>) {
        self.warnings.push((tree.place(path), tree.label(path), message.into()));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The warnings, if there was no problem.
    pub(super) fn finish(mut self, sources: &[super::SourceFile]) -> Result<Vec<String>, ConfigErrors> {
        let render = |found: Vec<(Place, String, String)>| -> Vec<ConfigError> {
            found.into_iter().map(|(place, key, message)| place.error(sources, key, message)).collect()
        };
        if self.found.is_empty() {
            self.warnings.sort();
            return Ok(render(self.warnings).iter().map(ConfigError::to_string).collect());
        }
        self.found.sort();
        self.found.dedup();
        Err(ConfigErrors(render(self.found)))
    }
}
