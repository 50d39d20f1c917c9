//! What an image must be: sets of values, of which one must fit as a whole, and whether it must be signed.

use crate::id::{EifDigest, Measurements, Pcr};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// One allowed image, or kind of images: the values that are given must be the image's; what is not given is not checked.
///
/// PCR0 pins the contents of kernel, command line and ramdisks, but as one stream: it does not pin where one ends and the
/// next begins, nor the metadata. `sha256` pins every byte of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pins {
    /// SHA-256 of the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<EifDigest>,
    /// Measurement of the kernel, the command line and all ramdisks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr0: Option<Pcr>,
    /// Measurement of the kernel, the command line and the first ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr1: Option<Pcr>,
    /// Measurement of the ramdisks after the first: the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr2: Option<Pcr>,
    /// Measurement of the certificate that the image is signed with: any image signed by the holder of its key will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr8: Option<Pcr>,
}

impl Pins {
    /// Whether nothing at all is pinned.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an image is one of those that are meant.
    pub fn fit(&self, digest: &EifDigest, found: &Measurements) -> bool {
        let Self { sha256, pcr0, pcr1, pcr2, pcr8 } = self;
        sha256.is_none_or(|sha256| sha256 == *digest)
            && pcr0.is_none_or(|pcr| pcr == found.pcr0)
            && pcr1.is_none_or(|pcr| pcr == found.pcr1)
            && pcr2.is_none_or(|pcr| pcr == found.pcr2)
            && pcr8.is_none_or(|pcr| Some(pcr) == found.pcr8)
    }
}

/// What an image must be. The default asks for nothing: any well-formed image will do.
///
/// Several sets allow several images, as while a new one is brought in on many hosts: an image must fit one of them as a whole,
/// never a part of one and a part of another. Their order is of no meaning.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub struct ExpectedImage {
    /// None of them is empty. No sets: any image.
    any_of: BTreeSet<Pins>,
    signed: bool,
}

impl ExpectedImage {
    /// An image that fits one of these sets, or any image if there are none; and that is signed, if that is asked for. (A set
    /// without a single value fits any image, so the others would be of no use: then there are none.)
    pub fn new(any_of: impl IntoIterator<Item = Pins>, signed: bool) -> Self {
        let mut any_of: BTreeSet<Pins> = any_of.into_iter().collect();
        if any_of.iter().any(Pins::is_empty) {
            any_of.clear();
        }
        Self { any_of, signed }
    }

    /// The allowed sets; none: any image. None of them is empty.
    pub fn any_of(&self) -> impl ExactSizeIterator<Item = &Pins> {
        self.any_of.iter()
    }

    /// Whether it must be signed, by whomever; who may sign is pinned by PCR8.
    pub fn signed(&self) -> bool {
        self.signed
    }

    /// Whether nothing at all is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The files that are pinned by their digest: a file with one of them may be the image, before anything else is known of it.
    pub fn digests(&self) -> impl Iterator<Item = EifDigest> {
        self.any_of.iter().filter_map(|pins| pins.sha256)
    }

    /// Whether an image with these values is one that is asked for. An image is signed exactly if it has a PCR8.
    pub fn admits(&self, digest: &EifDigest, found: &Measurements) -> bool {
        let fits = self.any_of.is_empty() || self.any_of.iter().any(|pins| pins.fit(digest, found));
        fits && (found.pcr8.is_some() || !self.signed)
    }
}

impl From<Pins> for ExpectedImage {
    fn from(pins: Pins) -> Self {
        Self::new([pins], false)
    }
}

/// How it is written: a single set as it was before there could be several, so that both can be read.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<EifDigest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pcr0: Option<Pcr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pcr1: Option<Pcr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pcr2: Option<Pcr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pcr8: Option<Pcr>,
    /// Two sets or more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    any_of: Vec<Pins>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    signed: bool,
}

impl From<ExpectedImage> for Form {
    fn from(ExpectedImage { any_of, signed }: ExpectedImage) -> Self {
        let several = any_of.len() > 1;
        let (single, any_of) = match several {
            true => (Pins::default(), any_of.into_iter().collect()),
            false => (any_of.into_iter().next().unwrap_or_default(), Vec::new()),
        };
        let Pins { sha256, pcr0, pcr1, pcr2, pcr8 } = single;
        Self { sha256, pcr0, pcr1, pcr2, pcr8, any_of, signed }
    }
}

impl TryFrom<Form> for ExpectedImage {
    type Error = &'static str;

    fn try_from(form: Form) -> Result<Self, &'static str> {
        let Form { sha256, pcr0, pcr1, pcr2, pcr8, any_of, signed } = form;
        let single = Pins { sha256, pcr0, pcr1, pcr2, pcr8 };
        if any_of.iter().any(Pins::is_empty) {
            return Err("an empty set in any_of would allow any image");
        }
        match (single.is_empty(), any_of.is_empty()) {
            (false, false) => Err("values beside any_of belong to no set"),
            (false, true) => Ok(Self::new([single], signed)),
            (true, _) => Ok(Self::new(any_of, signed)),
        }
    }
}
