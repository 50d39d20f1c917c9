//! The instance metadata service (IMDSv2): asking it, and saying what is wrong when it does not answer. What is asked for is
//! the callers' business.

use aws_config::imds;
use aws_config::imds::client::error::ImdsError;
use enclaved_core::failure::Failure;
use std::error::Error;

/// Where the names of an instance's tags are.
pub const TAGS: &str = "/latest/meta-data/tags/instance/";
/// Where the name of the instance's role is, and below it the role's credentials.
pub const ROLE: &str = "/latest/meta-data/iam/security-credentials/";
/// The instance identity document.
pub const IDENTITY: &str = "/latest/dynamic/instance-identity/document";

/// The SDK's switch, which this project honours as well.
const DISABLED: &str = "AWS_EC2_METADATA_DISABLED";
/// Longer answers are not looked at: the longest is an identity document or credentials, a few KiB.
const MAX_ANSWER: usize = 64 * 1024;

/// Why the metadata service did not say what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// It is not to be asked.
    #[error("the instance metadata service is not asked: {DISABLED} is set")]
    Disabled,
    /// Nothing answers.
    #[error("the instance metadata service did not answer: {0}")]
    Silent(String),
    /// It answered with an error.
    #[error("the instance metadata service answered {status} to {path}")]
    Refused {
        /// What was asked for.
        path: String,
        /// The HTTP status.
        status: u16,
    },
    /// Its answer is not what it should be.
    #[error("the instance metadata service's answer to {path} is not understood: {reason}")]
    Malformed {
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl MetadataError {
    /// What a person can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Disabled => "unset AWS_EC2_METADATA_DISABLED, or give region and credentials by other means",
            Self::Silent(_) => {
                "on an EC2 instance, see whether it is enabled (`aws ec2 describe-instances`, MetadataOptions: HttpEndpoint) \
                 and, in a container, whether HttpPutResponseHopLimit is 2 or more; a firewall rule for 169.254.169.254 \
                 would do this, too; elsewhere, give region and credentials in the environment"
            }
            Self::Refused { .. } => "see whether it is enabled for this instance (MetadataOptions: HttpEndpoint)",
            Self::Malformed { .. } => "see whether something else answers at 169.254.169.254",
        }
    }

    /// As a failure, with the remedy.
    pub fn to_failure(&self) -> Failure {
        Failure::new(self.to_string()).with_remedy(self.remedy())
    }
}

/// The metadata service. Session tokens are fetched and kept by the SDK's client, which does not fall back to IMDSv1.
#[derive(Debug, Clone)]
pub struct Imds {
    client: imds::Client,
    disabled: bool,
}

impl Default for Imds {
    fn default() -> Self {
        Self::new()
    }
}

impl Imds {
    /// The one of this instance, or the one that the SDK's environment variables name.
    pub fn new() -> Self {
        let disabled = std::env::var(DISABLED).is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        Self { client: imds::Client::builder().build(), disabled }
    }

    /// One at another address, asked once.
    ///
    /// # Errors
    /// The address is none.
    pub fn at(endpoint: &str) -> Result<Self, MetadataError> {
        let builder = imds::Client::builder().max_attempts(1).endpoint(endpoint);
        let builder = builder.map_err(|error| MetadataError::Silent(error.to_string()))?;
        Ok(Self { client: builder.build(), disabled: false })
    }

    /// The answer at that path; `None` if there is nothing (404).
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn get(&self, path: &str) -> Result<Option<String>, MetadataError> {
        if self.disabled {
            return Err(MetadataError::Disabled);
        }
        let malformed = |reason: String| MetadataError::Malformed { path: path.to_owned(), reason };
        match self.client.get(path).await.map(String::from) {
            Ok(text) if text.len() > MAX_ANSWER => Err(malformed(format!("it has {} bytes", text.len()))),
            Ok(text) => Ok(Some(text)),
            Err(ImdsError::ErrorResponse(error)) => match error.response().status().as_u16() {
                404 => Ok(None),
                status => Err(MetadataError::Refused { path: path.to_owned(), status }),
            },
            Err(error @ (ImdsError::FailedToLoadToken(_) | ImdsError::IoError(_))) => {
                Err(MetadataError::Silent(innermost(&error)))
            }
            Err(error) => Err(malformed(innermost(&error))),
        }
    }

    /// The name of the instance's role; `None` if it has none.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn role(&self) -> Result<Option<String>, MetadataError> {
        let answer = self.get(ROLE).await?;
        let role = answer.as_deref().and_then(|answer| answer.lines().next()).map(str::trim).unwrap_or_default();
        // IAM's rule for names.
        let in_name = |c: char| c.is_ascii_alphanumeric() || "+=,.@-_".contains(c);
        if role.len() > 64 || !role.chars().all(in_name) {
            let reason = "a role's name is expected".to_owned();
            return Err(MetadataError::Malformed { path: ROLE.to_owned(), reason });
        }
        Ok((!role.is_empty()).then(|| role.to_owned()))
    }
}

/// The SDK wraps an error many times over; the innermost one says what happened.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    // Some wrap nothing, and only their debug form says what they are.
    let text = innermost.to_string();
    if text.is_empty() { format!("{innermost:?}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::http::{Answer, Server};

    #[tokio::test]
    async fn an_answer_a_404_and_a_refusal_are_told_apart() {
        let server = Server::metadata(|path| match path {
            ROLE => Answer::ok("caution-images\n"),
            "/latest/meta-data/closed" => Answer::status(403, ""),
            _ => Answer::status(404, ""),
        })
        .await;
        let imds = Imds::at(&server.url()).unwrap();
        assert_eq!(imds.role().await.unwrap().as_deref(), Some("caution-images"));
        assert_eq!(imds.get(IDENTITY).await.unwrap(), None);
        let error = imds.get("/latest/meta-data/closed").await.unwrap_err();
        assert!(matches!(error, MetadataError::Refused { status: 403, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_service_that_is_not_there_is_said_to_be_silent_with_what_to_check() {
        let imds = Imds::at("http://127.0.0.1:1").unwrap();
        let failure = imds.role().await.unwrap_err().to_failure();
        assert!(failure.message.contains("did not answer"), "{failure}");
        assert!(failure.remedy.unwrap().contains("HttpPutResponseHopLimit"));
    }

    #[tokio::test]
    async fn a_role_that_cannot_be_one_is_not_believed() {
        let server = Server::metadata(|_| Answer::ok("<html>captive portal</html>")).await;
        let error = Imds::at(&server.url()).unwrap().role().await.unwrap_err();
        assert!(matches!(error, MetadataError::Malformed { .. }), "{error}");
    }
}
