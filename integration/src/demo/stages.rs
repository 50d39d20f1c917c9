//! What a person sees: a line for each stage as it ends, progress in between, a summary at the end. It knows nothing of
//! what the stages are about.

use super::Failed;
use serde_json::json;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// The longest name of a stage.
const WIDTH: usize = 16;

/// A stage that has ended.
#[derive(Debug)]
struct Stage {
    name: &'static str,
    took: Duration,
    what: String,
}

/// All stages so far.
#[derive(Debug)]
pub(super) struct Stages {
    json: bool,
    terminal: bool,
    began: Instant,
    /// When the last stage ended.
    last: Instant,
    done: Vec<Stage>,
    /// What is shown of something that goes on, and is overwritten on a terminal.
    progress: Option<String>,
}

impl Stages {
    /// None yet. With `json`, stdout is for the summary alone.
    pub(super) fn new(json: bool) -> Self {
        let terminal = if json { std::io::stderr().is_terminal() } else { std::io::stdout().is_terminal() };
        let began = Instant::now();
        Self { json, terminal, began, last: began, done: Vec::new(), progress: None }
    }

    /// Prints a text. Who does not read any more is no reason to end in the middle.
    pub(super) fn say(&mut self, text: &str) {
        self.end_progress();
        self.print(&format!("{text}\n"));
    }

    fn print(&self, text: &str) {
        if self.json {
            let mut stderr = std::io::stderr().lock();
            drop(stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush()));
        } else {
            let mut stdout = std::io::stdout().lock();
            drop(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
        }
    }

    /// A stage has ended just now.
    pub(super) fn stage(&mut self, name: &'static str, what: impl Into<String>) {
        self.ended(name, Instant::now(), what.into());
    }

    /// A stage had ended at that moment, by a record of somebody else.
    pub(super) fn stage_at(&mut self, name: &'static str, at: SystemTime, what: impl Into<String>) {
        let now = Instant::now();
        let ago = SystemTime::now().duration_since(at).unwrap_or_default();
        self.ended(name, now.checked_sub(ago).unwrap_or(now), what.into());
    }

    fn ended(&mut self, name: &'static str, at: Instant, what: String) {
        let at = at.max(self.last);
        let stage = Stage { name, took: at.duration_since(self.last), what };
        self.last = at;
        self.end_progress();
        self.print(&format!("{:>8}  {:<WIDTH$}{}\n", seconds(stage.took), stage.name, indented(&stage.what)));
        self.done.push(stage);
    }

    /// What goes on now: overwritten on a terminal; elsewhere a new line, so not to be called all the time with news.
    pub(super) fn progress(&mut self, name: &str, what: &str) {
        let line = format!("{:>8}  {name:<WIDTH$}{what}", "...");
        if self.progress.as_deref() == Some(&line) {
            return;
        }
        if self.terminal {
            self.print(&format!("\r\x1b[K{line}"));
        } else {
            self.print(&format!("{line}\n"));
        }
        self.progress = Some(line);
    }

    /// Whether progress overwrites itself.
    pub(super) fn redraws(&self) -> bool {
        self.terminal
    }

    fn end_progress(&mut self) {
        if self.progress.take().is_some() && self.terminal {
            self.print("\r\x1b[K");
        }
    }

    /// All went well: the table of the stages, or the JSON.
    pub(super) fn summary(&mut self, folder: Option<&Path>) {
        self.end_progress();
        let total = self.began.elapsed();
        if self.json {
            return self.print_json(folder, None);
        }
        let mut text = format!("\n{:<WIDTH$}{:>8}\n", "STAGE", "TIME");
        for stage in &self.done {
            text.push_str(&format!("{:<WIDTH$}{:>8}\n", stage.name, seconds(stage.took)));
        }
        text.push_str(&format!(
            "{:<WIDTH$}{:>8}\n\nall of it worked; nothing is left behind\n",
            "total",
            seconds(total)
        ));
        self.print(&text);
    }

    /// It did not go well: where, why, and what the daemon said last.
    pub(super) fn failed(&mut self, folder: Option<&Path>, failed: &Failed) {
        self.end_progress();
        let reason = format!("{:#}", failed.error);
        let mut text = String::new();
        if !failed.last_lines.is_empty() {
            text.push_str(&format!("\nthe last lines of the daemon's log:\n  {}\n", failed.last_lines.join("\n  ")));
        }
        let after = self.done.last().map_or(String::new(), |stage| format!(" (after the stage \"{}\")", stage.name));
        text.push_str(&format!("\nFAILED{after}: {reason}\n"));
        let mut stderr = std::io::stderr().lock();
        drop(stderr.write_all(text.as_bytes()));
        if self.json {
            self.print_json(folder, Some((&reason, &failed.last_lines)));
        }
    }

    fn print_json(&self, folder: Option<&Path>, failure: Option<(&str, &[String])>) {
        let of = |stage: &Stage| json!({ "name": stage.name, "seconds": rounded(stage.took), "what": stage.what });
        let summary = json!({
            "ok": failure.is_none(),
            "failure": failure.map(|(reason, _)| reason),
            "log": failure.map(|(_, last_lines)| last_lines),
            "folder": folder,
            "seconds": rounded(self.began.elapsed()),
            "stages": self.done.iter().map(of).collect::<Vec<_>>(),
        });
        drop(writeln!(std::io::stdout().lock(), "{summary:#}"));
    }
}

/// To the millisecond.
fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

/// Further lines stand under the first.
fn indented(text: &str) -> String {
    text.trim_end().replace('\n', &format!("\n{:1$}", "", 10 + WIDTH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_takes_from_the_end_of_the_one_before_to_its_own() {
        let mut stages = Stages::new(true);
        let began = stages.began;
        stages.ended("one", began + Duration::from_millis(200), "first\nstage".into());
        stages.ended("two", began + Duration::from_millis(250), String::new());
        stages.ended("late", began + Duration::from_millis(10), String::new());
        let took: Vec<_> = stages.done.iter().map(|stage| stage.took.as_millis()).collect();
        assert_eq!(took, [200, 50, 0]);
        assert_eq!(indented("a\nb\n"), format!("a\n{}b", " ".repeat(26)));
    }
}
