//! TOML files as one tree in which every value knows where it stands. No knowledge of which keys there are.

use super::SourceFile;
use super::error::{ConfigError, Position, Problems};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use toml::de::{DeTable, DeValue};

/// Tables and arrays nest at most this deep. Ours need 5.
const MAX_DEPTH: usize = 16;

/// A byte of one of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Place {
    file: usize,
    byte: usize,
}

impl Place {
    pub(super) fn error(self, sources: &[SourceFile], key: String, message: String) -> ConfigError {
        let source = sources.get(self.file);
        ConfigError {
            file: source.map_or_else(|| PathBuf::from("(no file)"), |source| source.path.clone()),
            position: source.map(|source| Position::of(&source.text, self.byte)),
            key,
            message,
        }
    }

    /// `file:line:column`.
    fn name(self, sources: &[SourceFile]) -> String {
        let error = self.error(sources, String::new(), String::new());
        let position = error.position.map(|at| format!(":{}:{}", at.line, at.column)).unwrap_or_default();
        format!("{}{position}", error.file.display())
    }
}

/// A value and its place.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// A value of TOML.
#[derive(Debug)]
pub(super) enum Value {
    Table(Table),
    Array(Vec<Node>),
    String(String),
    /// `None`: beyond 64 bits.
    Integer(Option<i64>),
    Boolean(bool),
    Float,
    Datetime,
}

/// A table's keys, each with its own place and its value.
pub(super) type Table = BTreeMap<String, (Place, Node)>;

impl Value {
    /// What it is, for people.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Table(_) => "a table",
            Self::Array(_) => "an array",
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Boolean(_) => "a boolean",
            Self::Float => "a floating-point number",
            Self::Datetime => "a date or time",
        }
    }

    /// The same without places. Values that no key takes become null.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Table(table) => {
                table.iter().map(|(key, (_, node))| (key.clone(), node.value.to_json())).collect::<serde_json::Value>()
            }
            Self::Array(items) => items.iter().map(|item| item.value.to_json()).collect(),
            Self::String(text) => text.as_str().into(),
            Self::Integer(number) => (*number).into(),
            Self::Boolean(value) => (*value).into(),
            Self::Float | Self::Datetime => serde_json::Value::Null,
        }
    }
}

/// The way to a value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Path(Vec<Step>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

impl Path {
    pub(super) fn key(&self, key: &str) -> Self {
        let mut path = self.clone();
        path.0.push(Step::Key(key.to_owned()));
        path
    }

    pub(super) fn index(&self, index: usize) -> Self {
        let mut path = self.clone();
        path.0.push(Step::Index(index));
        path
    }

    /// The path as the header of a table has it: without indices.
    pub(super) fn header(&self) -> String {
        let keys = self.0.iter().filter_map(|step| match step {
            Step::Key(key) => Some(key.as_str()),
            Step::Index(_) => None,
        });
        keys.collect::<Vec<_>>().join(".")
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if number == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// All files together.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) root: Node,
}

impl Tree {
    /// Reads each file on its own, then puts them together. What is wrong with any of them goes to `problems`; the tree
    /// then holds what could be read.
    pub(super) fn read(sources: &[SourceFile], problems: &mut Problems) -> Self {
        let mut tree = Self { root: Node { place: Place::default(), value: Value::Table(Table::new()) } };
        for (file, source) in sources.iter().enumerate() {
            let (table, errors) = DeTable::parse_recoverable(&source.text);
            for error in &errors {
                let byte = error.span().map_or(0, |span| span.start);
                problems.add_at(Place { file, byte }, String::new(), format!("not TOML: {}", error.message()));
            }
            if errors.is_empty() {
                let reader = Reader { file, sources };
                let table = reader.table(table.get_ref(), &Path::default(), problems);
                if let Value::Table(root) = &mut tree.root.value {
                    reader.merge(root, table, &Path::default(), problems);
                }
            }
        }
        tree
    }

    /// Where the value at `path` stands; if there is none, the nearest table or array around it.
    pub(super) fn place(&self, path: &Path) -> Place {
        self.nearest(path).0.place
    }

    /// Whether some file sets it.
    pub(super) fn has(&self, path: &Path) -> bool {
        self.nearest(path).1
    }

    /// The text at `path`, if there is one.
    pub(super) fn text(&self, path: &Path) -> Option<&str> {
        match self.nearest(path) {
            (Node { value: Value::String(text), .. }, true) => Some(text),
            _ => None,
        }
    }

    /// The value at `path`, or the nearest around it; and whether it is the value itself.
    fn nearest(&self, path: &Path) -> (&Node, bool) {
        let mut node = &self.root;
        for step in &path.0 {
            let next = match (step, &node.value) {
                (Step::Key(key), Value::Table(table)) => table.get(key).map(|(_, node)| node),
                (Step::Index(index), Value::Array(items)) => items.get(*index),
                _ => None,
            };
            let Some(next) = next else { return (node, false) };
            node = next;
        }
        (node, true)
    }

    /// `file:line:column` of the value at `path`; that it is a default if no file sets it.
    pub(super) fn place_name(&self, path: &Path, sources: &[SourceFile]) -> String {
        if self.has(path) { self.place(path).name(sources) } else { "by default".to_owned() }
    }

    /// What people call the value at `path`: `[host] drain`, `[[enclave]] "signer" egress[1].port`.
    pub(super) fn label(&self, path: &Path) -> String {
        let (head, rest) = match path.0.as_slice() {
            [] => return String::new(),
            [Step::Key(key), Step::Index(index), rest @ ..] => {
                (format!("[[{key}]] {}", self.item_name(key, *index)), rest)
            }
            [Step::Key(key), rest @ ..] => (format!("[{key}]"), rest),
            [Step::Index(index), rest @ ..] => (format!("[{index}]"), rest),
        };
        if rest.is_empty() { head } else { format!("{head} {}", Path(rest.to_vec())) }
    }

    /// An item by its name, or else by its number from 1.
    fn item_name(&self, key: &str, index: usize) -> String {
        let name = || {
            let Value::Table(root) = &self.root.value else { return None };
            let Value::Array(items) = &root.get(key)?.1.value else { return None };
            let Value::Table(item) = &items.get(index)?.value else { return None };
            match &item.get("name")?.1.value {
                Value::String(name) => Some(quoted(name)),
                _ => None,
            }
        };
        name().unwrap_or_else(|| format!("number {}", index + 1))
    }
}

/// A text from a file, for a message: escaped, and cut where it is long.
pub(super) fn quoted(text: &str) -> String {
    const MAX: usize = 64;
    match text.char_indices().nth(MAX) {
        None => format!("\"{}\"", text.escape_debug()),
        Some((end, _)) => format!("\"{}…\"", text.get(..end).unwrap_or_default().escape_debug()),
    }
}

/// Turns one file into nodes.
struct Reader<'a> {
    file: usize,
    sources: &'a [SourceFile],
}

impl Reader<'_> {
    fn table(&self, table: &DeTable<'_>, path: &Path, problems: &mut Problems) -> Table {
        let mut result = Table::new();
        for (key, value) in table {
            let place = Place { file: self.file, byte: key.span().start };
            let node = self.node(value.span().start, value.get_ref(), &path.key(key.get_ref()), problems);
            result.insert(key.get_ref().to_string(), (place, node));
        }
        result
    }

    fn node(&self, byte: usize, value: &DeValue<'_>, path: &Path, problems: &mut Problems) -> Node {
        let place = Place { file: self.file, byte };
        let value = match value {
            DeValue::Table(_) | DeValue::Array(_) if path.0.len() > MAX_DEPTH => {
                problems.add_at(place, String::new(), format!("nested more than {MAX_DEPTH} levels deep"));
                Value::Boolean(false)
            }
            DeValue::Table(table) => Value::Table(self.table(table, path, problems)),
            DeValue::Array(items) => {
                let item = |(index, item): (usize, &toml::Spanned<DeValue<'_>>)| {
                    self.node(item.span().start, item.get_ref(), &path.index(index), problems)
                };
                Value::Array(items.iter().enumerate().map(item).collect())
            }
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Integer(number) => Value::Integer(i64::from_str_radix(number.as_str(), number.radix()).ok()),
            DeValue::Boolean(value) => Value::Boolean(*value),
            DeValue::Float(_) => Value::Float,
            DeValue::Datetime(_) => Value::Datetime,
        };
        Node { place, value }
    }

    /// Adds what this file has to what the files before it have.
    fn merge(&self, into: &mut Table, from: Table, path: &Path, problems: &mut Problems) {
        for (key, (place, node)) in from {
            let path = path.key(&key);
            let Some((first, existing)) = into.get_mut(&key) else {
                into.insert(key, (place, node));
                continue;
            };
            match (&mut existing.value, node.value) {
                (Value::Table(into), Value::Table(from)) => self.merge(into, from, &path, problems),
                // [[enclave]]: every file may add some.
                (Value::Array(into), Value::Array(from)) if path.0.len() == 1 => into.extend(from),
                _ => {
                    let first = first.name(self.sources);
                    let message = format!("is set here and at {first}: a key may be set in one file only");
                    problems.add_at(place, Tree::plain_label(&path), message);
                }
            }
        }
    }
}

impl Tree {
    /// The label of a path that goes through tables only.
    fn plain_label(path: &Path) -> String {
        match path.0.as_slice() {
            [Step::Key(head)] => head.clone(),
            [Step::Key(head), rest @ ..] => format!("[{head}] {}", Path(rest.to_vec())),
            _ => path.to_string(),
        }
    }
}
