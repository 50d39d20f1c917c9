//! Where the built programs are: beside the program that asks, or beside the folder of a test.

use std::io;
use std::path::PathBuf;

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
