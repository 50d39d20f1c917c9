//! What nitro-cli says on stderr when it fails, and what follows from its exit status.

use enclaved_core::failure::{ECode, Failure};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Most characters of nitro-cli's own words in a message.
const MAX_WORDS: usize = 400;

/// What a run of nitro-cli left.
#[derive(Debug)]
pub(super) struct Captured {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    /// There was more on stdout.
    pub(super) stdout_cut: bool,
    pub(super) stderr: Vec<u8>,
}

/// A failed run.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) failure: Failure,
    /// By what it says, it left no enclave. Otherwise one may run.
    pub(super) says_nothing_runs: bool,
    /// Enclave processes did not answer; what it printed is true of the others.
    pub(super) partial: bool,
}

/// Whether that code comes only before an enclave is started: of arguments, files, resources, and of the driver's calls up
/// to the start. After any other (and one that is not known here) an enclave, or the process that starts it, may be there.
fn is_before_start(code: ECode) -> bool {
    matches!(code.0, 1..=6 | 18..=35 | 42 | 47 | 59)
}

/// Reads a failed run. Its status is no guide (any failure in the background process ends in 39), the first error block on
/// stderr is.
pub(super) fn failure(command: &str, captured: &Captured) -> Report {
    let stderr = String::from_utf8_lossy(&captured.stderr);
    let block = Block::first(&stderr);
    let partial = stderr.lines().any(|line| line.trim_start().starts_with("Failed connections:"));
    let Some(block) = block else { return without_block(command, captured, partial) };
    let code = block.code;
    let meaning = code.explain().map_or("a code that is not known here", |entry| entry.meaning);
    let mut message = format!("nitro-cli {command} failed with {code}, {meaning}");
    let details = if block.details.is_empty() { block.text } else { &block.details };
    let details = printable(details.as_bytes(), MAX_WORDS);
    if !details.is_empty() {
        message = format!("{message}: {details}");
    }
    if let Some(log) = block.log {
        message = format!("{message} (its log: {})", printable(log.as_bytes(), 200));
    }
    Report {
        failure: Failure::new(message).with_code(code),
        says_nothing_runs: is_before_start(code) && says_nothing(captured),
        partial: partial && code == ECode::PROCESS_CONNECTION,
    }
}

/// A failure without an error block: clap's usage errors (2), a panic (101), a signal, or something that is no nitro-cli.
fn without_block(command: &str, captured: &Captured, partial: bool) -> Report {
    let words = printable(&captured.stderr, MAX_WORDS);
    let words = if words.is_empty() { "it said nothing".to_owned() } else { format!("it said: {words}") };
    let (how, remedy) = match (captured.status.code(), captured.status.signal()) {
        (_, Some(signal)) => (
            format!("was ended by signal {signal}"),
            "see the kernel log for who ended it (out of memory?), and try again",
        ),
        (Some(2), _) => (
            "refused its arguments".to_owned(),
            "check that the configured nitro-cli is AWS's, version 1.2 or later (`nitro-cli --version`)",
        ),
        (code, _) => (
            format!("exited with status {} and without an error code", code.unwrap_or(-1)),
            "see /var/log/nitro_enclaves/nitro_enclaves.log",
        ),
    };
    Report {
        failure: Failure::new(format!("nitro-cli {command} {how}; {words}")).with_remedy(remedy),
        says_nothing_runs: captured.status.code() == Some(2) && says_nothing(captured),
        partial,
    }
}

/// Whatever it prints on stdout may be the answer of an enclave that runs.
fn says_nothing(captured: &Captured) -> bool {
    captured.stdout.trim_ascii().is_empty()
}

/// One error block: `[ E19 ] text`, lines with details, an empty line, a URL, the path of the error's log.
struct Block<'a> {
    code: ECode,
    text: &'a str,
    details: String,
    log: Option<&'a str>,
}

impl<'a> Block<'a> {
    fn first(stderr: &'a str) -> Option<Self> {
        let mut lines = stderr.lines();
        let (code, text) = lines.by_ref().find_map(headline)?;
        let details: Vec<&str> = lines.by_ref().map(str::trim).take_while(|line| !line.is_empty()).collect();
        let log = lines
            .take_while(|line| headline(line).is_none())
            .find_map(|line| line.split_once("error log found at \"")?.1.split('"').next());
        // The text explains the code at length, as `nitro-cli explain` does; its first sentence names it.
        let text = text.split_once(". ").map_or(text, |(first, _)| first);
        Some(Self { code, text, details: details.join(" "), log })
    }
}

/// `[ E19 ] text`
fn headline(line: &str) -> Option<(ECode, &str)> {
    let (number, text) = line.trim_start().strip_prefix("[ E")?.split_once(" ]")?;
    if !(1..=2).contains(&number.len()) || !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    Some((ECode(number.parse().ok()?), text.trim()))
}

/// Somebody else's words, fit for one line: control characters become spaces, what is not UTF-8 becomes U+FFFD, and
/// it ends after `limit` characters.
pub(super) fn printable(bytes: &[u8], limit: usize) -> String {
    // A character has 4 bytes at most, so the rest can't be needed.
    let head = &bytes[..bytes.len().min(limit.saturating_mul(4).saturating_add(4))];
    let text = String::from_utf8_lossy(head);
    let words: Vec<&str> =
        text.split(|c: char| c.is_control() || c.is_whitespace()).filter(|w| !w.is_empty()).collect();
    let text = words.join(" ");
    let mut short: String = text.chars().take(limit).collect();
    if text.chars().count() > limit || head.len() < bytes.len() {
        short.push('…');
    }
    short
}
