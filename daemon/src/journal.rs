//! The last words of a unit in the journal, by `journalctl`, within limits. No judgement of what they say.

use enclaved_core::failure::Failure;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;

/// How long journalctl may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// As much of its output as is read.
const MAX_BYTES: u64 = 64 * 1024;

/// The last lines that a unit's own processes wrote in this boot, the oldest first; not what systemd says of the unit. Reading those of
/// another user's unit needs the group `systemd-journal`; without it, there are none.
///
/// # Errors
/// There is no journalctl, or it does not end in time.
pub async fn last_words(unit: &str, lines: u32) -> Result<Vec<String>, Failure> {
    read(Path::new("journalctl"), lines, "cat", &format!("_SYSTEMD_UNIT={unit}")).await
}

/// The last lines about a unit in this boot, with time, host and process, the oldest first: its own, and what systemd says of it.
///
/// # Errors
/// As [`last_words`].
pub async fn last_lines(unit: &str, lines: u32) -> Result<Vec<String>, Failure> {
    read(Path::new("journalctl"), lines, "short-iso", &format!("--unit={unit}")).await
}

/// `of` is one word, which no unit's name makes another option.
async fn read(program: &Path, lines: u32, output: &str, of: &str) -> Result<Vec<String>, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("could not run journalctl: {error}"));
    let mut command = tokio::process::Command::new(program);
    command.args(["--boot", "--no-pager", "--quiet", "--output", output, "--lines"]).arg(lines.to_string()).arg(of);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let stdout = child.stdout.take().ok_or_else(|| Failure::new("journalctl has no output"))?;
    let mut bytes = Vec::new();
    let read = async {
        stdout.take(MAX_BYTES).read_to_end(&mut bytes).await?;
        child.wait().await
    };
    match tokio::time::timeout(PATIENCE, read).await {
        Ok(Ok(_)) => Ok(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(Failure::new(format!("journalctl did not end within {} s", PATIENCE.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::write_script;

    #[tokio::test]
    async fn the_last_lines_are_asked_for_and_no_more_than_the_limit_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("journalctl");
        write_script(&program, "echo \"$@\"; yes | head -c 200000");
        let lines = read(&program, 20, "cat", "_SYSTEMD_UNIT=--x").await.unwrap();
        assert_eq!(lines[0], "--boot --no-pager --quiet --output cat --lines 20 _SYSTEMD_UNIT=--x");
        assert!(lines.len() < 40_000);
    }

    #[tokio::test]
    async fn without_journalctl_that_is_said() {
        let failure = read(Path::new("/nonexistent"), 1, "cat", "--unit=x").await.unwrap_err();
        assert!(failure.message.contains("could not run journalctl"), "{failure}");
    }
}
