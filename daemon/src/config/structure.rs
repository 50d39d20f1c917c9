//! Checks a tree against the file's schema: unknown keys, wrong types, values out of range, missing keys; all of them, each
//! with what is allowed in its place. Patterns of texts are left to [`meaning`](super::meaning), which can say more
//! about them.
//!
//! Only what schemars makes of [`form`](super::form) is understood; a test holds the two together.

use super::error::Problems;
use super::source::{Node, Path, Table, Tree, Value, quoted};
use serde_json::Value as Json;

/// Checks the whole tree and takes the unknown keys out of it. Returns whether its meaning can be judged: unknown keys
/// do not stand in the way of that.
pub(super) fn check(tree: &mut Tree, schema: &Json, problems: &mut Problems) -> bool {
    let mut findings = Vec::new();
    let checker = Checker { root: schema };
    checker.node(&mut tree.root, schema, &Path::default(), &mut findings);
    let judgeable = findings.iter().all(|finding| finding.harmless);
    for finding in findings {
        let label = tree.label(&finding.path);
        match finding.place {
            Some(place) => problems.add_at(place, label, finding.message),
            None => problems.add(tree, &finding.path, finding.message),
        }
    }
    judgeable
}

struct Finding {
    path: Path,
    /// Where it is, if not where the value at `path` is.
    place: Option<super::source::Place>,
    message: String,
    /// Whether the rest can be judged in spite of it.
    harmless: bool,
}

struct Checker<'a> {
    root: &'a Json,
}

impl<'a> Checker<'a> {
    fn node(&self, node: &mut Node, schema: &'a Json, path: &Path, findings: &mut Vec<Finding>) {
        let schema = self.resolve(schema);
        let variants = variants(schema);
        if !variants.is_empty() {
            // The variant that the value is meant to be is the one of its type.
            let fitting = variants.iter().find(|variant| self.fits(variant, node));
            match fitting {
                Some(variant) => self.node(node, variant, path, findings),
                None => findings.push(self.not_allowed(node, schema, path)),
            }
            return;
        }
        if !takes(schema, node) {
            findings.push(self.not_allowed(node, schema, path));
            return;
        }
        match &mut node.value {
            Value::Table(table) => self.table(table, schema, path, findings),
            Value::Array(items) => {
                let max = number(schema, "maxItems").and_then(|max| usize::try_from(max).ok());
                if let Some(max) = max.filter(|max| items.len() > *max) {
                    let message = format!("is one too many: there are {}, at most {max} are allowed", items.len());
                    findings.push(Finding { path: path.index(max), place: None, message, harmless: false });
                }
                if let Some(schema) = schema.get("items") {
                    for (index, item) in items.iter_mut().enumerate() {
                        self.node(item, schema, &path.index(index), findings);
                    }
                }
            }
            Value::String(_) | Value::Integer(_) | Value::Boolean(_) | Value::Float | Value::Datetime => {}
        }
    }

    /// Whether the value is of this schema's type, or of that of one of its variants.
    fn fits(&self, schema: &Json, node: &Node) -> bool {
        let schema = self.resolve(schema);
        match variants(schema) {
            [] => takes(schema, node),
            variants => variants.iter().any(|variant| self.fits(variant, node)),
        }
    }

    fn table(&self, table: &mut Table, schema: &'a Json, path: &Path, findings: &mut Vec<Finding>) {
        let nothing = serde_json::Map::new();
        let properties = schema.get("properties").and_then(Json::as_object).unwrap_or(&nothing);
        table.retain(|key, (place, _)| {
            let known = properties.contains_key(key);
            if !known {
                let what = if path.is_root() { "table or key" } else { "key" };
                let hint = unknown_hint(key, properties.keys().map(String::as_str));
                let message = format!("unknown {what} {}; {hint}", quoted(key));
                findings.push(Finding { path: path.clone(), place: Some(*place), message, harmless: true });
            }
            known
        });
        for (key, (_, node)) in table.iter_mut() {
            if let Some(schema) = properties.get(key) {
                self.node(node, schema, &path.key(key), findings);
            }
        }
        for key in schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str) {
            if !table.contains_key(key) {
                let needed = properties.get(key).map(|schema| self.allowed(schema)).unwrap_or_default();
                let message = format!("the key \"{key}\" is missing: {needed}");
                findings.push(Finding { path: path.clone(), place: None, message, harmless: false });
            }
        }
    }

    fn not_allowed(&self, node: &Node, schema: &Json, path: &Path) -> Finding {
        let allowed = self.allowed(schema);
        let table_of_tables = matches!(node.value, Value::Table(_)) && kind(schema) == Some("array");
        let message = match &node.value {
            Value::Integer(Some(number)) => format!("is {number}; allowed: {allowed}"),
            Value::Integer(None) => format!("does not fit into 64 bits; allowed: {allowed}"),
            Value::Boolean(value) => format!("is {value}; allowed: {allowed}"),
            Value::String(text) => {
                let mut words = Vec::new();
                self.words(schema, &mut words);
                let nearest = nearest(text, words.iter().copied());
                let hint = nearest.map(|word| format!("; did you mean \"{word}\"?")).unwrap_or_default();
                format!("is {}; allowed: {allowed}{hint}", quoted(text))
            }
            Value::Table(_) if table_of_tables => {
                format!("is a table; allowed: an array of tables, each under its own [[{}]]", path.header())
            }
            other => format!("is {}; allowed: {allowed}", other.kind()),
        };
        Finding { path: path.clone(), place: None, message, harmless: false }
    }

    /// What a schema allows, for people.
    fn allowed(&self, schema: &Json) -> String {
        let schema = self.resolve(schema);
        let variants = variants(schema);
        if !variants.is_empty() {
            let mut texts = Vec::new();
            for text in variants.iter().map(|variant| self.allowed(variant)) {
                if !texts.contains(&text) {
                    texts.push(text);
                }
            }
            return texts.join(" or ");
        }
        if let Some(word) = schema.get("const") {
            return word.to_string();
        }
        if let Some(words) = schema.get("enum").and_then(Json::as_array) {
            return words.iter().map(Json::to_string).collect::<Vec<_>>().join(" or ");
        }
        match kind(schema) {
            Some("integer") => match (number(schema, "minimum"), number(schema, "maximum")) {
                (Some(min), Some(max)) => format!("an integer from {min} to {max}"),
                _ => "an integer".to_owned(),
            },
            Some("object") => {
                let keys = schema.get("properties").and_then(Json::as_object).into_iter().flatten();
                format!("a table with {}", keys.map(|(key, _)| key.as_str()).collect::<Vec<_>>().join(", "))
            }
            Some("string") => {
                let example = schema.get("examples").and_then(|examples| examples.get(0));
                example.map_or_else(|| "a string".to_owned(), |example| format!("a string, such as {example}"))
            }
            Some("boolean") => "true or false".to_owned(),
            Some("array") => match schema.get("items") {
                Some(items) => format!("an array, each item {}", self.allowed(items)),
                None => "an array".to_owned(),
            },
            _ => "a value".to_owned(),
        }
    }

    /// The fixed texts that a schema allows.
    fn words<'s>(&'s self, schema: &'s Json, words: &mut Vec<&'s str>) {
        let schema = self.resolve(schema);
        words.extend(schema.get("const").and_then(Json::as_str));
        words.extend(schema.get("enum").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str));
        for variant in variants(schema) {
            self.words(variant, words);
        }
    }

    fn resolve<'s>(&self, schema: &'s Json) -> &'s Json
    where
        'a: 's,
    {
        let target = schema.get("$ref").and_then(Json::as_str).and_then(|target| target.strip_prefix('#'));
        target.and_then(|target| self.root.pointer(target)).unwrap_or(schema)
    }
}

fn variants(schema: &Json) -> &[Json] {
    let list = schema.get("anyOf").or_else(|| schema.get("oneOf"));
    list.and_then(Json::as_array).map_or(&[], Vec::as_slice)
}

fn kind(schema: &Json) -> Option<&str> {
    schema.get("type").and_then(Json::as_str)
}

fn number(schema: &Json, key: &str) -> Option<u64> {
    schema.get(key).and_then(Json::as_u64)
}

/// Whether the value itself, its contents aside, is one that the schema takes.
fn takes(schema: &Json, node: &Node) -> bool {
    match (&node.value, kind(schema)) {
        (Value::Table(_), Some("object")) | (Value::Array(_), Some("array")) | (Value::Boolean(_), Some("boolean")) => {
            true
        }
        (Value::String(text), Some("string")) => {
            let text = Json::from(text.as_str());
            let listed = schema.get("enum").and_then(Json::as_array).is_none_or(|words| words.contains(&text));
            listed && schema.get("const").is_none_or(|word| *word == text)
        }
        (Value::Integer(Some(value)), Some("integer")) => {
            let bound = |key| schema.get(key).and_then(Json::as_i64);
            bound("minimum").is_none_or(|min| *value >= min) && bound("maximum").is_none_or(|max| *value <= max)
        }
        _ => false,
    }
}

/// The known key that was probably meant, or all of them.
fn unknown_hint<'a>(key: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    match nearest(key, known.clone()) {
        Some(word) => format!("did you mean \"{word}\"?"),
        None => format!("known here: {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// The word that was probably meant.
fn nearest<'a>(text: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const MAX: usize = 64;
    if text.len() > MAX {
        return None;
    }
    let plain = text.to_lowercase().replace('-', "_");
    let distance = |word: &str| match word.strip_prefix(&plain) {
        // Cut short, as "memory" for "memory_mib".
        Some(_) if plain.len() >= 3 => 1,
        _ => strsim::damerau_levenshtein(&plain, &word.replace('-', "_")),
    };
    let (distance, word) = words.map(|word| (distance(word), word)).min()?;
    (distance <= (text.len() / 3).max(1) && distance < word.len()).then_some(word)
}
