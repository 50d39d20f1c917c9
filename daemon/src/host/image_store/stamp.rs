//! By what is known whether something is still what it was, without reading it: files by what the kernel keeps of them,
//! objects by what their source says of them.

use serde::{Deserialize, Serialize};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// A file as the kernel keeps it. Whoever writes to it changes `changed`, which nobody can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// mtime: seconds, nanoseconds.
    modified: (i64, i64),
    /// ctime: seconds, nanoseconds.
    changed: (i64, i64),
}

impl FileStamp {
    pub(super) fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }

    /// Whether that is the same file, whatever became of its contents.
    pub(super) fn is_file_of(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether the contents are the same, whatever became of name and permissions.
    pub(super) fn has_contents_of(&self, other: &Self) -> bool {
        Self { changed: other.changed, ..*self } == *other
    }
}

/// An object as its source describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Object {
    /// As sent, with its quotes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) etag: Option<String>,
    /// When it was changed last, as sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) modified: Option<String>,
    /// Bytes.
    pub(super) size: u64,
    /// S3's, where the bucket keeps versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) version: Option<String>,
}

impl Object {
    /// The ETag, if it stands for exactly these bytes.
    pub(super) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }

    /// Whether these are the same contents: `None` if that can't be told.
    pub(super) fn is(&self, other: &Self) -> Option<bool> {
        if self.size != other.size {
            return Some(false);
        }
        match (&self.etag, &other.etag) {
            (Some(own), Some(others)) => Some(own == others),
            _ => match (&self.modified, &other.modified) {
                (Some(own), Some(others)) => Some(own == others),
                _ => None,
            },
        }
    }
}

/// What a source had when an image was taken from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stamp {
    /// An object.
    Object(Object),
    /// A file.
    File(FileStamp),
}

impl Stamp {
    /// Whether that is what it was: `None` if that can't be told.
    pub(super) fn is(&self, other: &Self) -> Option<bool> {
        match (self, other) {
            (Self::Object(own), Self::Object(other)) => own.is(other),
            (Self::File(own), Self::File(other)) => Some(own == other),
            _ => Some(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(etag: Option<&str>, modified: Option<&str>, size: u64) -> Object {
        Object { etag: etag.map(str::to_owned), modified: modified.map(str::to_owned), size, version: None }
    }

    #[test]
    fn an_object_is_told_by_its_etag_else_by_its_date_and_always_by_its_size() {
        let tagged = object(Some("\"a\""), Some("Mon"), 1);
        assert_eq!(tagged.is(&object(Some("\"a\""), Some("Tue"), 1)), Some(true));
        assert_eq!(tagged.is(&object(Some("\"b\""), Some("Mon"), 1)), Some(false));
        assert_eq!(tagged.is(&object(Some("\"a\""), Some("Mon"), 2)), Some(false));
        assert_eq!(tagged.is(&object(None, Some("Mon"), 1)), Some(true));
        assert_eq!(tagged.is(&object(None, None, 1)), None);
        assert_eq!(object(Some("W/\"a\""), None, 1).strong_etag(), None);
    }

    #[test]
    fn a_file_that_is_written_to_is_another_and_one_that_is_renamed_has_the_same_contents() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::write(&path, "x").unwrap();
        let before = FileStamp::of(&std::fs::metadata(&path).unwrap());
        std::fs::rename(&path, &moved).unwrap();
        assert!(before.has_contents_of(&FileStamp::of(&std::fs::metadata(&moved).unwrap())));
        std::fs::write(&moved, "yz").unwrap();
        assert!(!before.has_contents_of(&FileStamp::of(&std::fs::metadata(&moved).unwrap())));
    }
}
