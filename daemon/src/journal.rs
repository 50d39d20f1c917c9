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

/// What is shown of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// With its time, host and process.
    Whole,
    /// The words alone.
    Words,
}

/// The last lines of a unit in this boot, the oldest first. Reading those of another user's unit needs the group
/// `systemd-journal`; without it, there are none.
///
/// # Errors
/// There is no journalctl, or it does not end in time.
pub async fn last_lines(unit: &str, lines: u32, shown: Shown) -> Result<Vec<String>, Failure> {
    last_lines_of(Path::new("journalctl"), unit, lines, shown).await
}

async fn last_lines_of(program: &Path, unit: &str, lines: u32, shown: Shown) -> Result<Vec<String>, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("could not run journalctl: {error}"));
    let output = match shown {
        Shown::Whole => "short-iso",
        Shown::Words => "cat",
    };
    let mut command = tokio::process::Command::new(program);
    command.args(["--boot", "--no-pager", "--quiet", "--output", output, "--lines"]).arg(lines.to_string());
    // In one word with its option: so it is none itself.
    command.arg(format!("--unit={unit}"));
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
    async fn the_last_lines_of_that_unit_are_asked_for_and_no_more_than_the_limit_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("journalctl");
        write_script(&program, "echo \"$@\"; yes | head -c 200000");
        let lines = last_lines_of(&program, "--x", 20, Shown::Words).await.unwrap();
        assert_eq!(lines[0], "--boot --no-pager --quiet --output cat --lines 20 --unit=--x");
        assert!(lines.len() < 40_000);
    }

    #[tokio::test]
    async fn without_journalctl_that_is_said() {
        let failure = last_lines_of(Path::new("/nonexistent"), "x", 1, Shown::Whole).await.unwrap_err();
        assert!(failure.message.contains("could not run journalctl"), "{failure}");
    }
}
