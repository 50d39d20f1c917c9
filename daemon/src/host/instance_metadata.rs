//! Who this host is, from EC2's instance metadata service (IMDSv2 through the SDK's client: token first).

use super::Outcome;
use aws_config::imds::Client;
use aws_config::imds::client::error::ImdsError;
use enclaved_core::failure::Failure;
use std::collections::BTreeMap;
use std::time::Duration;

/// Tags on an instance: EC2 allows 50.
const MAX_TAGS: usize = 64;
/// A value of the metadata service that is longer is not one.
const MAX_VALUE: usize = 4096;

/// Who this host is. What the service does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceIdentity {
    /// `i-…`
    pub instance_id: Option<String>,
    /// Such as `m5.2xlarge`.
    pub instance_type: Option<String>,
    /// Such as `us-east-1`.
    pub region: Option<String>,
    /// Such as `us-east-1a`.
    pub availability_zone: Option<String>,
    /// The instance's tags, where its metadata options show them.
    pub tags: BTreeMap<String, String>,
}

/// Asks the metadata service. `AWS_EC2_METADATA_SERVICE_ENDPOINT` overrides where it is, as for every AWS client.
///
/// # Errors
/// It does not answer at all.
pub async fn identity() -> Outcome<InstanceIdentity> {
    let client = Client::builder().connect_timeout(Duration::from_secs(2)).read_timeout(Duration::from_secs(5)).build();
    let instance_id = match get(&client, "/latest/meta-data/instance-id").await {
        Ok(instance_id) => instance_id,
        Err(error) => {
            let cause = Failure::from_error(&error).message;
            let failure = Failure::new(format!("the instance metadata service does not answer: {cause}"));
            return Err(failure.with_remedy(
                "check that the instance's metadata options are enabled; in a container the hop limit must be 2 or more",
            ));
        }
    };
    // Each of these may be switched off or unreachable on its own; the others are still worth having.
    let optional = async |path: &str| get(&client, path).await.ok().flatten();
    let mut tags = BTreeMap::new();
    if let Some(names) = optional("/latest/meta-data/tags/instance").await {
        for name in names.lines().filter(|name| !name.is_empty() && !name.contains('/')).take(MAX_TAGS) {
            if let Some(value) = optional(&format!("/latest/meta-data/tags/instance/{}", escape(name))).await {
                tags.insert(name.to_owned(), value);
            }
        }
    }
    Ok(InstanceIdentity {
        instance_id,
        instance_type: optional("/latest/meta-data/instance-type").await,
        region: optional("/latest/meta-data/placement/region").await,
        availability_zone: optional("/latest/meta-data/placement/availability-zone").await,
        tags,
    })
}

/// One value; `None` if there is none of that name.
async fn get(client: &Client, path: &str) -> Result<Option<String>, ImdsError> {
    match client.get(path).await {
        Ok(value) => {
            let value = String::from(value);
            Ok((value.len() <= MAX_VALUE && !value.chars().any(|c| c.is_control() && c != '\n')).then_some(value))
        }
        Err(ImdsError::ErrorResponse(error)) if error.response().status().as_u16() == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tags may hold spaces and signs that a path may not.
fn escape(name: &str) -> String {
    let plain = |byte: u8| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b':' | b'@' | b'=' | b'+')
    };
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_with_spaces_has_a_path() {
        assert_eq!(escape("caution:deployment-id"), "caution:deployment-id");
        assert_eq!(escape("a b?ä"), "a%20b%3F%C3%A4");
    }
}
