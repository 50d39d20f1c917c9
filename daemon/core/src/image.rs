//! The EIF format: parsing, measuring, verifying.

use crate::id::{EifDigest, Pcr};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What an image must be; an absent value is not checked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExpectedImage {
    /// SHA-256 of the file.
    pub sha256: Option<EifDigest>,
    /// Kernel, command line and all ramdisks.
    pub pcr0: Option<Pcr>,
    /// Kernel, command line and the first ramdisk.
    pub pcr1: Option<Pcr>,
    /// The ramdisks after the first.
    pub pcr2: Option<Pcr>,
    /// The signing certificate.
    pub pcr8: Option<Pcr>,
}
