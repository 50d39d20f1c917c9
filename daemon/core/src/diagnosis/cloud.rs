//! What enclaved needs of AWS: the metadata service, credentials, and the images themselves. The words for what S3 answers are the
//! image store's.

use super::{Check, Finding};
use crate::failure::Failure;
use crate::observed::Observation::{self, Known, Unknown};
use std::time::Duration;

/// What came of asking the metadata service for a session token (IMDSv2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetadataSeen {
    /// It is not to be asked (`AWS_EC2_METADATA_DISABLED`).
    Disabled,
    /// No connection, and that is why.
    Unreachable(String),
    /// It answers questions without a token, and its answer to the one for a token never came: a packet that may pass no router
    /// (hop limit 1), as seen from a container.
    HopLimit,
    /// It takes connections and answers nothing.
    Silent,
    /// It gives no token: the HTTP status.
    Refused(u16),
    /// It answers.
    Answers {
        /// The instance's role, if it has one.
        role: Option<String>,
        /// How far its clock is from this host's, by the Date of its answer.
        apart: Option<Duration>,
    },
}

/// The metadata service. `needed`: images come from S3, and there are no other credentials.
pub fn metadata(seen: &Observation<MetadataSeen>, needed: bool) -> Finding {
    let check = Check::Metadata;
    let seen = match seen {
        Known(seen) => seen,
        Unknown(failure) => return Finding::unknown(check, failure),
    };
    let bad = |text: String, remedy: &str| match needed {
        true => Finding::failure(check, text, remedy),
        false => {
            let text = format!("{text}; this host's name, region and tags are not known");
            Finding::warning(check, text, remedy)
        }
    };
    match seen {
        MetadataSeen::Answers { role: Some(role), .. } => Finding::ok(check, format!("it answers; the role is {role}")),
        MetadataSeen::Answers { role: None, .. } => Finding::ok(check, "it answers; the instance has no role"),
        MetadataSeen::Disabled if !needed => {
            Finding::not_needed(check, "AWS_EC2_METADATA_DISABLED is set, and images need no role")
        }
        MetadataSeen::Disabled => bad(
            "it is not asked: AWS_EC2_METADATA_DISABLED is set".to_owned(),
            "unset AWS_EC2_METADATA_DISABLED, or give credentials by other means",
        ),
        MetadataSeen::Unreachable(why) => bad(
            format!("it can't be reached: {why}"),
            "on an EC2 instance: is it enabled (MetadataOptions: HttpEndpoint), is there a firewall rule for 169.254.169.254; elsewhere \
             set AWS_EC2_METADATA_DISABLED=true, and region and credentials in the environment",
        ),
        MetadataSeen::HopLimit => bad(
            "its answers with session tokens do not arrive, others do: the hop limit is too low for this place"
                .to_owned(),
            "aws ec2 modify-instance-metadata-options --instance-id ID --http-put-response-hop-limit 2 (each container network counts one)",
        ),
        MetadataSeen::Silent => bad(
            "it takes connections and does not answer".to_owned(),
            "see what stands in its place (a proxy, a firewall that drops), and HttpPutResponseHopLimit (2 or more in a container)",
        ),
        MetadataSeen::Refused(status) => bad(
            format!("it answered {status} when asked for a session token"),
            "see whether it is enabled for this instance (MetadataOptions: HttpEndpoint)",
        ),
    }
}

/// Credentials for S3: whose, or why there are none. `None`: no image comes from there.
pub fn role_credentials(seen: Option<&Observation<Result<String, Failure>>>) -> Finding {
    let check = Check::RoleCredentials;
    match seen {
        None => Finding::not_needed(check, "no image comes from S3"),
        Some(Known(Ok(caller))) => Finding::ok(check, format!("those of {caller}")),
        Some(Known(Err(failure))) => Finding::failed(check, failure),
        Some(Unknown(failure)) => Finding::unknown(check, failure),
    }
}

/// One image, by its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSeen {
    /// Where it comes from.
    pub source: String,
    /// Its size in bytes, or why it can't be had.
    pub size: Observation<Result<u64, Failure>>,
    /// What this request came to before is in the cache, and can be launched without the source.
    pub cached: bool,
    /// A file that the daemon's user can't read though whoever looked could, and why.
    pub kept_from: Option<String>,
}

/// The images.
pub fn images(seen: &[ImageSeen]) -> Vec<Finding> {
    if seen.is_empty() {
        return vec![Finding::not_needed(Check::Image, "no enclave is configured")];
    }
    seen.iter().map(|image| of_image(image).about(&image.source)).collect()
}

fn of_image(image: &ImageSeen) -> Finding {
    let check = Check::Image;
    let bad = |failure: &Failure| match image.cached {
        true => {
            let remedy = failure.remedy.clone().unwrap_or_else(|| "see whether it is still there".to_owned());
            Finding::warning(
                check,
                format!("{}; what was got from there before is in the cache", failure.message),
                remedy,
            )
        }
        false => Finding::failed(check, failure),
    };
    match (&image.size, &image.kept_from) {
        (_, Some(why)) => bad(&Failure::new(why).with_remedy("give the daemon's user the right to read it")),
        (Known(Ok(0)), None) => bad(&Failure::new("it is empty").with_remedy("put the image there again")),
        (Known(Ok(size)), None) => Finding::ok(check, format!("{} MiB", size.div_ceil(1 << 20))),
        (Known(Err(failure)), None) => bad(failure),
        (Unknown(failure), None) => Finding::unknown(check, failure),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn a_metadata_service_that_does_not_answer_fails_where_credentials_hang_on_it_and_warns_elsewhere() {
        let cases = [
            MetadataSeen::Unreachable("No route to host".to_owned()),
            MetadataSeen::HopLimit,
            MetadataSeen::Silent,
            MetadataSeen::Refused(403),
        ];
        for seen in cases {
            assert_eq!(metadata(&Known(seen.clone()), true).outcome, Outcome::Failure, "{seen:?}");
            assert_eq!(metadata(&Known(seen.clone()), false).outcome, Outcome::Warning, "{seen:?}");
        }
        let answers = MetadataSeen::Answers { role: None, apart: None };
        assert_eq!(metadata(&Known(answers), true).outcome, Outcome::Ok);
        assert_eq!(metadata(&Known(MetadataSeen::Disabled), false).outcome, Outcome::NotNeeded);
        assert_eq!(metadata(&Known(MetadataSeen::Disabled), true).outcome, Outcome::Failure);
    }

    #[test]
    fn a_hop_limit_that_is_too_low_is_told_from_a_service_that_is_off_with_the_command_that_raises_it() {
        let remedy = metadata(&Known(MetadataSeen::HopLimit), true).remedy.unwrap();
        assert!(remedy.contains("--http-put-response-hop-limit 2"), "{remedy}");
    }

    #[test]
    fn missing_credentials_fail_with_the_reason() {
        let none = Known(Err(Failure::new("the instance has no role").with_remedy("attach one")));
        let finding = role_credentials(Some(&none));
        assert_eq!((finding.outcome, finding.remedy.as_deref()), (Outcome::Failure, Some("attach one")));
        assert_eq!(role_credentials(Some(&Known(Ok("the role x".to_owned())))).outcome, Outcome::Ok);
        assert_eq!(role_credentials(None).outcome, Outcome::NotNeeded);
    }

    #[test]
    fn an_image_that_can_not_be_had_fails_unless_it_is_in_the_cache() {
        let refused = Known(Err(Failure::new("S3 answered 403")));
        let image = ImageSeen { source: "s3://b/k".to_owned(), size: refused, cached: false, kept_from: None };
        let outcome = |image: ImageSeen| images(&[image])[0].outcome;
        assert_eq!(outcome(image.clone()), Outcome::Failure);
        assert_eq!(outcome(ImageSeen { cached: true, ..image.clone() }), Outcome::Warning);
        assert_eq!(outcome(ImageSeen { size: Known(Ok(5)), ..image.clone() }), Outcome::Ok);
        assert_eq!(outcome(ImageSeen { size: Known(Ok(0)), ..image.clone() }), Outcome::Failure);
        let shut = Some("user enclaved may not read /x".to_owned());
        assert_eq!(outcome(ImageSeen { size: Known(Ok(5)), kept_from: shut, ..image }), Outcome::Failure);
        assert_eq!(images(&[])[0].outcome, Outcome::NotNeeded);
    }
}
