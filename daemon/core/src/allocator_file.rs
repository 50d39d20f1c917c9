//! `/etc/nitro_enclaves/allocator.yaml`: what is written into it, and what the stock allocator makes of a file that somebody
//! else wrote. Its parser is a shell script that knows lines, not YAML: much that is good YAML fails there or, worse, means
//! something else. The checker here follows it step by step (nitro-enclaves-allocator of aws-nitro-enclaves-cli 1.2 to 1.5).
//!
//! Texts only; reading and writing the file happens in the daemon's `allocate`.

use crate::id::MemoryMib;
use crate::inventory::CpuSet;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// Where the stock allocator looks for it.
pub const PATH: &str = "/etc/nitro_enclaves/allocator.yaml";
/// The line by which a file of ours is known. The allocator skips comment lines.
pub const MARK: &str = "# Written by enclaved, which replaces it: change enclaved's configuration instead.";
/// More memory than any host has, in MiB (16 TiB): a larger number overflows in the script.
const MAX_MEMORY: u64 = 16 << 20;
/// Longer files are not judged; a real one has a few hundred bytes.
pub const MAX_FILE: u64 = 64 * 1024;

/// The CPUs that are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuRequest {
    /// That many, chosen by the allocator: whole cores of one node, without CPU 0's.
    Count(u32),
    /// Exactly these.
    Pool(CpuSet),
}

impl CpuRequest {
    /// How many.
    pub fn count(&self) -> u32 {
        match self {
            Self::Count(count) => *count,
            Self::Pool(cpus) => cpus.len(),
        }
    }
}

impl fmt::Display for CpuRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count} CPUs"),
            Self::Pool(cpus) => write!(f, "the {} CPUs {cpus}", cpus.len()),
        }
    }
}

/// What the allocator is asked to reserve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reservation {
    /// The CPUs.
    pub cpus: CpuRequest,
    /// The hugepages, all sizes together.
    pub memory_mib: MemoryMib,
}

impl fmt::Display for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.cpus, self.memory_mib)
    }
}

/// The file for that reservation, in the one form that every version of the allocator reads.
pub fn write(reservation: &Reservation) -> String {
    let memory = reservation.memory_mib.0;
    let cpus = match &reservation.cpus {
        CpuRequest::Count(count) => format!("cpu_count: {count}"),
        CpuRequest::Pool(cpus) => format!("cpu_pool: {cpus}"),
    };
    format!("---\n{MARK}\nmemory_mib: {memory}\n{cpus}\n")
}

/// Whether a file is one that [`write`] made, so that nothing of anybody else's is lost with it.
pub fn is_ours(text: &str) -> bool {
    text.lines().nth(1) == Some(MARK)
}

/// What the allocator makes of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// What it would reserve, or the first reason why it fails.
    #[serde(serialize_with = "serialize_outcome")]
    pub outcome: Result<Reservation, String>,
    /// What a person may not expect: lines that are not read, values that mean something else.
    pub remarks: Vec<String>,
}

/// `{"reserves": {...}}` or `{"fails": "why"}`.
fn serialize_outcome<S: Serializer>(outcome: &Result<Reservation, String>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(1))?;
    match outcome {
        Ok(reservation) => map.serialize_entry("reserves", reservation)?,
        Err(reason) => map.serialize_entry("fails", reason)?,
    }
    map.end()
}

/// Follows the allocator's parser through a file.
pub fn check(text: &str) -> FileReport {
    let mut remarks = Vec::new();
    let outcome = parse(text, &mut remarks);
    FileReport { outcome, remarks }
}

/// The three keys, by the value that came last.
#[derive(Default)]
struct Values {
    memory_mib: Option<String>,
    cpu_count: Option<String>,
    cpu_pool: Option<String>,
}

fn parse(text: &str, remarks: &mut Vec<String>) -> Result<Reservation, String> {
    if u64::try_from(text.len()).is_ok_and(|length| length > MAX_FILE) {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    let mut values = Values::default();
    let mut started = false;
    for (number, line) in lines(text, remarks) {
        let shown = shown(&line);
        if line.starts_with('#') {
            continue;
        }
        if line == "---" {
            started = true;
            continue;
        }
        if !started {
            if !line.is_empty() {
                let why =
                    if line.trim_end_matches('\r') == "---" { ": the line ends with a carriage return" } else { "" };
                remarks.push(format!(
                    "line {number} (`{shown}`) is not read: it stands before a line that is just `---`{why}"
                ));
            }
            continue;
        }
        if line.is_empty() {
            return Err(format!(
                "line {number} is blank: after `---` every line must be a key with a value, or a comment"
            ));
        }
        let key: String = line
            .split(':')
            .next()
            .unwrap_or_default()
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
            .collect();
        let value = value_of(&line);
        let place = match key.as_str() {
            "memory_mib" => &mut values.memory_mib,
            "cpu_count" => &mut values.cpu_count,
            "cpu_pool" => &mut values.cpu_pool,
            _ => {
                return Err(format!(
                    "line {number} (`{shown}`): unexpected key `{key}`; known are memory_mib, cpu_count and cpu_pool"
                ));
            }
        };
        if value.is_empty() {
            return Err(format!("line {number} (`{shown}`): the value of {key} is missing"));
        }
        if let Some(earlier) = place.replace(value) {
            remarks.push(format!(
                "line {number}: {key} is given again; its former value, `{}`, does not count",
                self::shown(&earlier)
            ));
        }
    }
    judge(values, started, remarks)
}

/// The lines as the shell's `read` gives them: without the blanks around them, backslashes taken out, and the last one only
/// if it ends.
fn lines(text: &str, remarks: &mut Vec<String>) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    let (mut line, mut number) = (String::new(), 1);
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\n' => {
                lines.push((number, trimmed(&line)));
                line.clear();
                number += 1;
            }
            '\\' => match characters.next() {
                // A backslash at the end joins the next line to this one.
                Some('\n') => {
                    remarks.push(format!("line {number} ends with a backslash: the next line is a part of it"))
                }
                Some(other) => line.push(other),
                None => {}
            },
            other => line.push(other),
        }
    }
    if !line.is_empty() {
        remarks.push(format!(
            "the last line (`{}`) is not read: there is no newline at the end of the file",
            shown(&trimmed(&line))
        ));
    }
    lines
}

fn trimmed(line: &str) -> String {
    line.trim_matches([' ', '\t']).to_owned()
}

/// What stands after the last colon, without the first run of blanks and a quote that follows it, and without a quote at the
/// end. Everything else, comments included, is the value.
fn value_of(line: &str) -> String {
    let value = match line.rfind(':') {
        Some(at) if at > 0 => line.get(at + 1..).unwrap_or_default(),
        Some(_) | None => line,
    };
    let blank = |c: char| c.is_ascii_whitespace() || c == '\u{b}';
    let value = match value.find(blank) {
        None => value.to_owned(),
        Some(at) => {
            let (before, rest) = value.split_at(at);
            let rest = rest.trim_start_matches(blank);
            format!("{before}{}", rest.strip_prefix('"').unwrap_or(rest))
        }
    };
    value.strip_suffix('"').unwrap_or(&value).to_owned()
}

fn judge(values: Values, started: bool, remarks: &mut Vec<String>) -> Result<Reservation, String> {
    let start = if started { "" } else { ": no line is just `---`, and only what follows such a line is read" };
    let memory = values.memory_mib.ok_or_else(|| format!("memory_mib is missing{start}"))?;
    let cpus = match (values.cpu_count, values.cpu_pool) {
        (None, None) => return Err(format!("both cpu_count and cpu_pool are missing{start}; one of them is needed")),
        (Some(_), Some(_)) => return Err("both cpu_count and cpu_pool are given; only one of them may be".to_owned()),
        (Some(count), None) => {
            let count = decimal("cpu_count", &count)?;
            let count = u32::try_from(count).ok().filter(|count| *count > 0);
            CpuRequest::Count(count.ok_or("cpu_count must be more than 0 and no more than the host has")?)
        }
        (None, Some(pool)) => {
            // The kernel takes blanks for commas.
            let list = pool.split(|c: char| c == ',' || c.is_ascii_whitespace()).filter(|part| !part.is_empty());
            let cpus: CpuSet = list
                .collect::<Vec<_>>()
                .join(",")
                .parse()
                .map_err(|error| format!("the kernel refuses the value of cpu_pool: {error}{}", hint(&pool)))?;
            CpuRequest::Pool(cpus)
        }
    };
    let memory = octal("memory_mib", &memory, remarks)?;
    if memory == 0 {
        remarks.push("memory_mib is 0: one page of the smallest size is reserved".to_owned());
    }
    Ok(Reservation { cpus, memory_mib: MemoryMib(memory) })
}

fn decimal(key: &str, value: &str) -> Result<u64, String> {
    if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("the value of {key} is `{}`, which is not a number{}", shown(value), hint(value)));
    }
    // The remainder by the threads of a core is computed of it in the shell's arithmetic.
    if value.len() > 1 && value.starts_with('0') && value.contains(['8', '9']) {
        return Err(octal_error(key, value));
    }
    let number: Option<u64> = value.parse().ok();
    number
        .filter(|number| *number <= MAX_MEMORY)
        .ok_or_else(|| format!("the value of {key}, {}, is more than any host has", shown(value)))
}

/// A number that goes through the shell's arithmetic, where a leading zero means base 8.
fn octal(key: &str, value: &str, remarks: &mut Vec<String>) -> Result<u64, String> {
    let number = decimal(key, value)?;
    let digits = value.trim_start_matches('0');
    if digits.is_empty() || digits.len() == value.len() {
        return Ok(number);
    }
    let number = u64::from_str_radix(digits, 8).map_err(|_| octal_error(key, value))?;
    remarks.push(format!("{key} begins with a zero, so the allocator reads it to base 8: {value} is {number}"));
    Ok(number)
}

fn octal_error(key: &str, value: &str) -> String {
    format!(
        "the value of {key} is `{}`: with a zero before it, the shell takes it for a number to base 8, which it is not",
        shown(value)
    )
}

/// What is probably meant by a value that is none.
fn hint(value: &str) -> &'static str {
    if value.contains('#') {
        " (a comment on the line of a value becomes part of it)"
    } else if value.contains('\'') {
        " (single quotes become part of the value)"
    } else if value.contains('"') {
        " (double quotes are understood only after a blank, and around the whole value)"
    } else if value.contains('[') {
        " (lists in brackets are not understood: write 1,3)"
    } else if value.contains('\r') {
        " (it ends with a carriage return: save the file with Unix line ends)"
    } else {
        ""
    }
}

fn shown(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests;
