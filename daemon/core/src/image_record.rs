//! What is remembered of images: what each request came to, and what a launch must know of an image beside its
//! measurements. Values and judgements; fetching and proving happen in the daemon's image store.

use crate::desired::ImageRequest;
use crate::failure::Failure;
use crate::id::{EifDigest, Measurements, MemoryMib, Timestamp};
use crate::image::{VerifiedImage, required_memory};
use serde::{Deserialize, Serialize};

/// What an image request came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// What was asked for.
    pub request: ImageRequest,
    /// What it came to.
    pub outcome: ImageOutcome,
}

/// What an image request came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ImageOutcome {
    /// It was fetched and verified.
    Verified {
        /// When.
        at: Timestamp,
        /// The file's SHA-256.
        digest: EifDigest,
        /// Its measurements.
        measurements: Measurements,
        /// What else a launch must know; `None` in ledgers of before this was kept.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        facts: Option<ImageFacts>,
    },
    /// It could not be had, or it is not what was asked for.
    Failed {
        /// When it was tried last.
        at: Timestamp,
        /// How often in a row.
        count: u32,
        /// Why.
        failure: Failure,
    },
}

/// What decides whether an image can be launched, beside being the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// The file's size, in bytes.
    pub size: u64,
    /// When the certificate is valid that it is signed with; `None` if it is not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<ValidityPeriod>,
}

/// When a certificate is valid, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidityPeriod {
    /// Not before this.
    pub not_before: Timestamp,
    /// Not after this.
    pub not_after: Timestamp,
}

/// Why a good image can't be launched now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// What is in the way, and what can be done about it.
    pub failure: Failure,
    /// When it is over by itself, if it will be.
    pub until: Option<Timestamp>,
}

impl ImageFacts {
    /// Those of a proven image.
    pub fn of(image: &VerifiedImage) -> Self {
        let validity = |not_before, not_after| ValidityPeriod { not_before, not_after };
        let certificate = image.signature().map(|signature| validity(signature.not_before, signature.not_after));
        Self { size: image.size(), certificate }
    }

    /// Whether an enclave of that memory can be launched with the image at that time. Both rules are the platform's own:
    /// what breaks them ends in an error of nitro-cli that does not name the cause (E26, E36).
    ///
    /// # Errors
    /// What is in the way, with the numbers.
    pub fn launchable(&self, memory: MemoryMib, now: Timestamp) -> Result<(), Unfit> {
        let needed = required_memory(self.size);
        if memory < needed {
            let mib = self.size.div_ceil(1 << 20);
            let message = format!(
                "its image has {mib} MiB and needs an enclave of {needed}, four times as much; it is configured with {memory}"
            );
            let remedy = format!("set memory_mib = {} or more, or make the image smaller", needed.0);
            return Err(Unfit { failure: Failure::new(message).with_remedy(remedy), until: None });
        }
        let Some(ValidityPeriod { not_before, not_after }) = self.certificate else { return Ok(()) };
        if now > not_after {
            let message = format!(
                "the certificate that its image is signed with expired at {not_after}: it would not boot (nitro-cli says E36)"
            );
            let remedy = "sign the image again with a certificate that is valid, and update; if that time is not past, set the \
                          host's clock (`chronyc tracking`)";
            return Err(Unfit { failure: Failure::new(message).with_remedy(remedy), until: None });
        }
        if now < not_before {
            let message = format!("the certificate that its image is signed with is not valid before {not_before}");
            let remedy = "wait until then; if that time is past, set the host's clock (`chronyc tracking`)";
            return Err(Unfit { failure: Failure::new(message).with_remedy(remedy), until: Some(not_before) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(1_800_000_000_000 + seconds * 1000)
    }

    #[test]
    fn an_enclave_with_less_than_four_times_its_image_is_refused_with_the_number_it_needs() {
        let facts = ImageFacts { size: (300 << 20) + 1, certificate: None };
        let unfit = facts.launchable(MemoryMib(1200), at(0)).unwrap_err();
        assert!(unfit.failure.to_string().contains("memory_mib = 1201"), "{}", unfit.failure);
        assert_eq!(facts.launchable(MemoryMib(1201), at(0)), Ok(()));
    }

    #[test]
    fn an_image_is_launched_only_while_its_certificate_is_valid() {
        let certificate = Some(ValidityPeriod { not_before: at(10), not_after: at(20) });
        let facts = ImageFacts { size: 1, certificate };
        let judge = |now| facts.launchable(MemoryMib(64), now);
        assert_eq!(judge(at(9)).unwrap_err().until, Some(at(10)));
        assert_eq!((judge(at(10)), judge(at(20))), (Ok(()), Ok(())));
        let expired = judge(at(21)).unwrap_err();
        assert_eq!(expired.until, None);
        assert!(expired.failure.to_string().contains("E36"), "{}", expired.failure);
    }
}
