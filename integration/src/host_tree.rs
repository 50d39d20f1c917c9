//! Recorded hosts: the files of sysfs, procfs and the like that make a shape of host, unpacked into a folder of a test.
//! Where each comes from is said in the head of its file under `fixtures/hosts`.

use std::io;
use std::path::{Component, Path, PathBuf};
use tempfile::TempDir;

/// The shapes there are.
pub const SHAPES: [&str; 8] =
    ["m5.xlarge", "m5.2xlarge", "m5.4xlarge", "m5.8xlarge", "m5.24xlarge", "c6g.xlarge", "m7g.2xlarge", "laptop"];

/// A recorded host on disk; gone when it is dropped.
#[derive(Debug)]
pub struct HostTree {
    folder: TempDir,
}

impl HostTree {
    /// Unpacks a shape.
    ///
    /// # Errors
    /// There is none of that name, a line of it is not understood, or it can't be written.
    pub fn unpack(shape: &str) -> io::Result<Self> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/hosts").join(shape).join("tree.txt");
        let text = std::fs::read_to_string(&file)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.display())))?;
        let tree = Self { folder: tempfile::tempdir()? };
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
            let bad = || io::Error::other(format!("{}:{}: not a line of a tree: {line}", file.display(), number + 1));
            match line.strip_suffix('/') {
                Some(folder) => std::fs::create_dir_all(tree.inside(folder).ok_or_else(bad)?)?,
                None => {
                    let (path, contents) = line.split_once(" = ").ok_or_else(bad)?;
                    tree.write(path, &contents.replace("\\n", "\n"))?;
                }
            }
        }
        Ok(tree)
    }

    /// Its root, in the place of `/`.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes one of its files.
    ///
    /// # Errors
    /// It can't be written, or its path leads out of the tree.
    pub fn write(&self, path: &str, contents: &str) -> io::Result<()> {
        let path = self.inside(path).ok_or_else(|| io::Error::other(format!("{path} is not inside the tree")))?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, contents)
    }

    fn inside(&self, path: &str) -> Option<PathBuf> {
        let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
        (plain && !path.is_empty()).then(|| self.path().join(path))
    }
}
