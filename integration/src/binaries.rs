//! Where programs are: those of this workspace beside the program that asks, or beside the folder of a test; those of
//! others where `integration/tool` keeps them.

use anyhow::{Context as _, bail};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The path of a program of this workspace.
///
/// # Errors
/// When it has not been built; the message says how to.
pub fn find(name: &str) -> io::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let folder = this.parent().unwrap_or(&this);
    // Tests are built into `deps`, programs into the folder above.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let package = if matches!(name, "enclaved" | "enclavectl") { "enclaved" } else { "enclaved-integration" };
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("{} is not there; build it with `cargo build --package {package} --bins`", path.display()),
    ))
}

/// The path of a tool of others, which is installed if need be; that can take minutes.
///
/// # Errors
/// When it can't be installed; what was printed went to stderr.
pub fn of_others(name: &str) -> anyhow::Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tool");
    let output = Command::new(&script).arg(name).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("running {}", script.display()))?;
    if !output.status.success() {
        bail!("{} {name}: {}", script.display(), output.status);
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}
