//! The form of a corpus: see the head of `requests.txt`.

use super::frames;
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(Clone)]
pub(super) struct Case {
    /// The lines before its verdicts, as they are.
    head: String,
    pub(super) name: String,
    /// Each line that is sent, with its mark.
    lines: Vec<(String, Vec<u8>)>,
    pub(super) ours: Verdict,
    pub(super) nginx: Verdict,
}

/// What came of a case.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// What the client got.
    pub(super) answers: Vec<String>,
    /// What was sent on.
    pub(super) got: Vec<u8>,
}

pub(super) struct Corpus {
    path: PathBuf,
    preface: String,
    pub(super) cases: Vec<Case>,
}

impl Corpus {
    pub(super) fn read(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data_plane/corpus").join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        let (preface, text) = text.split_once("\n\n").unwrap();
        let mut cases: Vec<Case> = Vec::new();
        let mut head = String::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                let (name, lines) = (name.to_owned(), Vec::new());
                let head = std::mem::take(&mut head) + line + "\n";
                cases.push(Case { head, name, lines, ours: Verdict::default(), nginx: Verdict::default() });
                continue;
            }
            let split = line.split_once(' ').unwrap_or((line, ""));
            let case = cases.last_mut();
            match (split, case) {
                ((mark @ (">" | ">h" | ">d" | ">e" | ">x"), bytes), Some(case)) => {
                    case.lines.push((mark.to_owned(), unescape(bytes)));
                    case.head += line;
                    case.head.push('\n');
                }
                (("answers:", answers), Some(case)) => case.ours.answers = split_answers(answers),
                (("<", bytes), Some(case)) => case.ours.got.extend(unescape(bytes)),
                (("nginx:", answers), Some(case)) => case.nginx.answers = split_answers(answers),
                (("nginx<", bytes), Some(case)) => case.nginx.got.extend(unescape(bytes)),
                _ if line.is_empty() => {}
                _ if line.starts_with('#') => {
                    head += line;
                    head.push('\n');
                }
                _ => panic!("{}: not of the form: {line}", path.display()),
            }
        }
        Self { preface: preface.to_owned(), path, cases }
    }

    pub(super) fn write(&self) {
        let mut text = self.preface.clone() + "\n";
        for case in &self.cases {
            write!(text, "\n{}{}{}", case.head, case.ours.text(""), case.nginx.text("nginx")).unwrap();
        }
        std::fs::write(&self.path, text).unwrap();
    }
}

impl Case {
    pub(super) fn is_http2(&self) -> bool {
        self.lines.iter().any(|(mark, _)| mark != ">")
    }

    /// The bytes that the client sends.
    pub(super) fn sent(&self) -> Vec<u8> {
        if self.is_http2() {
            frames::sent(&self.lines)
        } else {
            self.lines.iter().flat_map(|(_, bytes)| bytes).copied().collect()
        }
    }
}

impl Verdict {
    /// As it stands in the file.
    pub(super) fn text(&self, whose: &str) -> String {
        if self.answers.is_empty() {
            return String::new();
        }
        let mut text = format!("{}: {}\n", if whose.is_empty() { "answers" } else { whose }, self.answers.join(", "));
        for line in self.got.split_inclusive(|byte| *byte == b'\n') {
            writeln!(text, "{whose}< {}", escape(line)).unwrap();
        }
        text
    }
}

fn split_answers(text: &str) -> Vec<String> {
    text.split(", ").map(str::to_owned).collect()
}

/// The statuses of answers of HTTP/1.1, one after another. Their bodies have no line that looks like one.
pub(super) fn statuses(answer: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(answer);
    let lines = text.lines().filter_map(|line| {
        // A body without a line end is followed at once by the next answer.
        let at = line.find("HTTP/1.")?;
        line[at..].split(' ').nth(1).map(str::to_owned)
    });
    let statuses: Vec<_> = lines.collect();
    if statuses.is_empty() { vec!["hung up".to_owned()] } else { statuses }
}

/// A line of bytes as text; a long row of one byte is cut short.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        let row = bytes[at..].iter().take_while(|other| **other == byte).count();
        let one = match byte {
            b'\\' => "\\\\".to_owned(),
            b'{' => "\\x7b".to_owned(),
            b'"' | b'\'' => char::from(byte).to_string(),
            0 => "\\0".to_owned(),
            _ => byte.escape_ascii().to_string(),
        };
        if row >= 32 {
            write!(text, "{{{one}*{row}}}").unwrap();
            at += row;
        } else {
            text += &one;
            at += 1;
        }
    }
    text
}

/// Line ends count only where they are written out.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after = &rest[first.len_utf8()..];
        if first == '{' {
            let (inner, after) = after.split_once('}').unwrap();
            let (what, times) = inner.rsplit_once('*').unwrap();
            bytes.extend(unescape(what).repeat(times.parse().unwrap()));
            rest = after;
        } else if first == '\\' {
            let (byte, length) = match after.as_bytes()[0] {
                b'r' => (b'\r', 1),
                b'n' => (b'\n', 1),
                b't' => (b'\t', 1),
                b'0' => (0, 1),
                b'\\' => (b'\\', 1),
                b'x' => (u8::from_str_radix(&after[1..3], 16).unwrap(), 3),
                other => panic!("unknown escape {other}: {text}"),
            };
            bytes.push(byte);
            rest = &after[length..];
        } else {
            bytes.extend(first.to_string().into_bytes());
            rest = after;
        }
    }
    bytes
}
