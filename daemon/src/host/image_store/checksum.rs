//! The checksum that a source has for a whole object, computed from what has arrived while it arrives.

use super::front::{Follower, Sink};
use super::measure::IntakeError;
use aws_smithy_checksums::{ChecksumAlgorithm, http::HttpChecksum};
use aws_smithy_types::base64;
use std::fmt;
use std::fs::File;

/// A checksum over all bytes of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checksum {
    pub(super) algorithm: ChecksumAlgorithm,
    /// In base64, as S3 gives it.
    pub(super) value: String,
}

impl Checksum {
    /// As S3 gives it; `None` if it is composed of the parts' of a multipart upload (`-3`), which cannot be computed from the
    /// object alone.
    pub(super) fn whole(algorithm: ChecksumAlgorithm, value: &str) -> Option<Self> {
        (!value.contains('-')).then(|| Self { algorithm, value: value.to_owned() })
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.algorithm.as_str().to_ascii_uppercase(), self.value)
    }
}

/// Computes a checksum of a file that is still being written. Dropping it ends its thread.
#[derive(Debug)]
pub(super) struct Summing {
    expected: Checksum,
    follower: Follower<String>,
}

/// The bytes are not those that the source has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its checksum is {found}, the source has {expected} for it")]
pub(super) struct Mismatch {
    expected: Checksum,
    found: Checksum,
}

impl Summing {
    /// Begins with a file that is open for reading.
    pub(super) fn begin(file: File, expected: Checksum) -> Self {
        let follower = Follower::begin(file, Sum(expected.algorithm.into_impl()));
        Self { expected, follower }
    }

    /// So many bytes are written from the beginning without a gap.
    pub(super) fn advance(&self, front: u64) {
        self.follower.advance(front);
    }

    /// The file is whole: whether the checksum is right.
    pub(super) async fn finish(self, size: u64) -> Result<Result<(), Mismatch>, IntakeError> {
        let value = self.follower.finish(size).await?;
        let found = Checksum { value, ..self.expected.clone() };
        Ok(if found == self.expected { Ok(()) } else { Err(Mismatch { expected: self.expected, found }) })
    }
}

struct Sum(Box<dyn HttpChecksum>);

impl Sink for Sum {
    type Output = String;

    fn take(&mut self, bytes: &[u8]) -> Result<(), IntakeError> {
        self.0.update(bytes);
        Ok(())
    }

    fn finish(self) -> Result<String, IntakeError> {
        Ok(base64::encode(self.0.finalize()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `123456789`, as the catalogues of CRCs and the standards give them.
    #[tokio::test]
    async fn every_checksum_is_computed_right_and_another_is_told_with_both_values() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "123456789").unwrap();
        for (algorithm, hex) in [
            (ChecksumAlgorithm::Crc32, "cbf43926"),
            (ChecksumAlgorithm::Crc32c, "e3069283"),
            (ChecksumAlgorithm::Crc64Nvme, "ae8b14860a799888"),
            (ChecksumAlgorithm::Sha1, "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
            (ChecksumAlgorithm::Sha256, "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"),
        ] {
            let bytes = (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap());
            let value = base64::encode(bytes.collect::<Vec<_>>());
            let sum = async |value: &str| {
                let summing = Summing::begin(File::open(&path).unwrap(), Checksum::whole(algorithm, value).unwrap());
                summing.advance(4);
                summing.finish(9).await.unwrap()
            };
            assert_eq!(sum(&value).await, Ok(()), "{algorithm:?}");
            let error = sum("AAAA").await.unwrap_err().to_string();
            assert!(error.contains("AAAA") && error.contains(&value), "{error}");
        }
    }

    #[test]
    fn a_checksum_of_checksums_is_not_taken_for_one_of_the_object() {
        assert_eq!(Checksum::whole(ChecksumAlgorithm::Sha256, "abc=-3"), None);
    }
}
