//! The README's commands, run as they stand there, as far as they need no Nitro host.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use enclaved_integration::binaries;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The lines of all shell blocks, without prompts, indents and comments.
fn commands() -> Vec<String> {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let mut commands = Vec::new();
    let mut shell = false;
    for line in readme.lines().map(str::trim) {
        if let Some(language) = line.strip_prefix("```") {
            shell = language == "sh";
        } else if shell {
            let command = line.split(" #").next().unwrap().trim();
            commands.push(command.strip_prefix("sudo ").unwrap_or(command).to_owned());
        }
    }
    commands.retain(|command| !command.is_empty() && !command.starts_with('#'));
    commands
}

fn run(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).current_dir(root()).output().unwrap()
}

fn assert_success(command: &str, output: &Output) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "`{command}` ended with {}:\n{out}\n{err}", output.status);
}

#[test]
fn the_demo_runs_once_by_the_command_of_the_readme() {
    let commands = commands();
    let command = commands.iter().find(|command| command.starts_with("cargo demo") && command.ends_with("--once"));
    let command = command.expect("the README shows how to run the demo once");
    let output = run(command);
    assert_success(command, &output);
    assert!(String::from_utf8_lossy(&output.stdout).contains("nothing is left behind"));
}

#[test]
fn the_test_command_of_the_readme_is_there_and_explains_itself() {
    let commands = commands();
    let command = commands.iter().find(|command| command.starts_with("./integration/test"));
    let command = format!("{} --help", command.expect("the README shows how to run the tests"));
    let output = run(&command);
    assert_success(&command, &output);
    assert!(String::from_utf8_lossy(&output.stdout).contains("--lane"));
}

#[test]
fn every_enclavectl_command_of_the_readme_exists() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let mut subcommands = BTreeSet::new();
    for text in readme.split("enclavectl ").skip(1) {
        let word: String = text.chars().take_while(char::is_ascii_lowercase).collect();
        // In a sentence, enclavectl is followed by other words; in a command, by a subcommand in the same quotes.
        let before_is_code = readme.contains(&format!("`enclavectl {word}"))
            || commands().iter().any(|command| command.starts_with(&format!("enclavectl {word}")));
        if before_is_code && !word.is_empty() {
            subcommands.insert(word);
        }
    }
    assert!(subcommands.len() >= 5, "{subcommands:?}");
    let enclavectl = binaries::find("enclavectl").unwrap();
    for subcommand in subcommands {
        let output = Command::new(&enclavectl).args([subcommand.as_str(), "--help"]).output().unwrap();
        assert_success(&format!("enclavectl {subcommand} --help"), &output);
    }
}
