//! Builds all programs of the workspace, so that what is shown is what the sources say. It shows nothing of the host.

use super::stages::Stages;
use anyhow::{Context as _, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;

/// After this time a line says why nothing happens.
const LONG: Duration = Duration::from_millis(1500);

/// Builds the programs where this one was built, in the same profile.
pub(super) async fn build(stages: &mut Stages) -> anyhow::Result<()> {
    let this = std::env::current_exe().context("finding this program")?;
    let folder = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "--workspace", "--bins"]).args(options(&this)?).current_dir(folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let build = command.spawn().context("starting cargo")?.wait_with_output();
    tokio::pin!(build);
    let built = match timeout(LONG, &mut build).await {
        Ok(built) => built,
        Err(_) => {
            stages.say("building enclaved, enclavectl and the stand-ins; the first time this takes a minute");
            build.await
        }
    };
    let built = built.context("waiting for cargo")?;
    if !built.status.success() {
        bail!("cargo build: {}\n{}", built.status, String::from_utf8_lossy(&built.stderr).trim_end());
    }
    stages.stage("built", "enclaved, enclavectl and the stand-ins are built from these sources");
    Ok(())
}

/// Builds one program where this one was built, for one that has no stages to show. With the features that it has when all
/// are built, so that nothing is built twice.
///
/// # Errors
/// When cargo fails; what it printed went to stderr.
pub(crate) fn build_beside(program: &str) -> anyhow::Result<()> {
    let this = std::env::current_exe().context("finding this program")?;
    let mut command = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "--workspace", "--bin", program]).args(options(&this)?);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status().context("running cargo")?;
    if !status.success() {
        bail!("cargo build --bin {program}: {status}");
    }
    Ok(())
}

/// What makes cargo build beside this program: `<target dir>[/<triple>]/<profile>/demo`.
fn options(this: &Path) -> anyhow::Result<Vec<OsString>> {
    let profile_dir = this.parent().context("this program is in no folder")?;
    let mut target_dir = profile_dir.parent().context("this program is in no target folder")?;
    let name = |path: &Path| path.file_name().map(OsString::from).unwrap_or_default();
    let mut options = match name(profile_dir) {
        name if name == "debug" => Vec::new(),
        profile => vec!["--profile".into(), profile],
    };
    // cargo marks the folder that is the target folder.
    if let Some(parent) = target_dir.parent().filter(|parent| !is_target(target_dir) && is_target(parent)) {
        options.extend(["--target".into(), name(target_dir)]);
        target_dir = parent;
    }
    options.extend(["--target-dir".into(), PathBuf::from(target_dir).into_os_string()]);
    Ok(options)
}

fn is_target(folder: &Path) -> bool {
    folder.join(".rustc_info.json").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_are_built_beside_the_one_that_asks() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".rustc_info.json"), "").unwrap();
        let target_dir = folder.path().to_str().unwrap();
        let of = |path: &str| {
            let options = options(&folder.path().join(path)).unwrap();
            options.into_iter().map(|option| option.into_string().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(of("debug/demo"), ["--target-dir", target_dir]);
        assert_eq!(of("release/demo"), ["--profile", "release", "--target-dir", target_dir]);
        let triple = "x86_64-unknown-linux-musl";
        assert_eq!(of(&format!("{triple}/debug/demo")), ["--target", triple, "--target-dir", target_dir]);
    }
}
