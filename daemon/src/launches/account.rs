//! How an end is told: by what its unit noted, and by what systemd says of that. Words only.

use super::Story;
use crate::launch_trace::Exit;

/// How an enclave's process ended, in words.
pub(super) fn account(exit: Option<&Exit>, story: Option<&Story>) -> Option<String> {
    let (result, words) = match story {
        Some(Story::Told { result, words }) => (Some(result.as_str()), last_words(words)),
        Some(Story::Coming) | None => (None, String::new()),
    };
    let how = match exit {
        Some(exit) => exit_words(exit),
        None => format!("its unit failed: {}", result?),
    };
    Some(format!("{how}{words}"))
}

fn exit_words(exit: &Exit) -> String {
    let Exit { result, code, status, .. } = exit;
    let memory = if result == "oom-kill" { ", for want of memory" } else { "" };
    match (code.as_str(), status.as_str()) {
        ("exited", "0") => "its process exited with status 0, as it does when an enclave ends by itself: its \
                            application crashed, or it was powered off inside"
            .to_owned(),
        ("exited", status) => format!("its process exited with status {status}{memory}"),
        ("killed" | "dumped", signal) => format!("its process was killed by SIG{signal}{memory}"),
        _ => format!("its unit ended with the result \"{result}\""),
    }
}

pub(super) fn last_words(words: &[String]) -> String {
    if words.is_empty() { String::new() } else { format!("; last in its journal: {}", words.join(" | ")) }
}
