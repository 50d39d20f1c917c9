//! Who this instance is, as the metadata service says. What it does not say is left out; nothing here is a secret.

use super::Outcome;
use crate::imds::{IDENTITY, Imds, MetadataError, TAGS};
use serde::Deserialize;
use std::collections::BTreeMap;

/// EC2 has 50 tags a resource at most.
const MAX_TAGS: usize = 50;
/// EC2's limit of a tag's key, in characters.
const MAX_KEY: usize = 128;
/// EC2's limit of a tag's value, in characters.
const MAX_VALUE: usize = 256;

/// Who this instance is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceIdentity {
    /// `i-…`
    pub instance_id: Option<String>,
    /// `m5.xlarge`
    pub instance_type: Option<String>,
    /// `eu-central-1`
    pub region: Option<String>,
    /// `eu-central-1a`
    pub availability_zone: Option<String>,
    /// The account's 12 digits.
    pub account_id: Option<String>,
    /// `ami-…`
    pub ami_id: Option<String>,
    /// The instance's tags; empty unless access to them is enabled in the instance's metadata options.
    pub tags: BTreeMap<String, String>,
}

/// The part of the identity document that is of use.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    instance_id: Option<String>,
    instance_type: Option<String>,
    region: Option<String>,
    availability_zone: Option<String>,
    account_id: Option<String>,
    image_id: Option<String>,
}

/// Asks the metadata service of this instance.
///
/// # Errors
/// It did not answer; elsewhere than on EC2 there is none. Parts that it does not have are no errors.
pub async fn identity() -> Outcome<InstanceIdentity> {
    ask(&Imds::new()).await
}

async fn ask(imds: &Imds) -> Outcome<InstanceIdentity> {
    let document = match imds.get(IDENTITY).await {
        Ok(document) => document,
        // Whoever switched it off wants no name from it.
        Err(MetadataError::Disabled) => return Ok(InstanceIdentity::default()),
        Err(error) => return Err(error.to_failure()),
    };
    let document = document.and_then(|text| {
        let parsed = serde_json::from_str::<Document>(&text);
        parsed.map_err(|error| tracing::warn!("the instance identity document is not understood: {error}")).ok()
    });
    let mut identity = InstanceIdentity::default();
    if let Some(document) = document {
        identity = InstanceIdentity {
            instance_id: document.instance_id.filter(plausible),
            instance_type: document.instance_type.filter(plausible),
            region: document.region.filter(plausible),
            availability_zone: document.availability_zone.filter(plausible),
            account_id: document.account_id.filter(plausible),
            ami_id: document.image_id.filter(plausible),
            tags: BTreeMap::new(),
        };
    }
    identity.tags = tags(imds).await;
    Ok(identity)
}

/// None of the document's values is longer, or holds anything else.
#[expect(clippy::ptr_arg, reason = "the signature that Option<String>::filter asks for")]
fn plausible(value: &String) -> bool {
    value.len() <= 64 && value.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

async fn tags(imds: &Imds) -> BTreeMap<String, String> {
    let mut tags = BTreeMap::new();
    // Without access to tags, which is the default, there is nothing.
    let Ok(Some(keys)) = imds.get(TAGS).await else { return tags };
    // The keys that can be had this way: others can't be part of a path, and EC2 does not allow the access then.
    let in_key = |c: char| c.is_ascii_alphanumeric() || "+-=.,_:@".contains(c);
    let is_key = |key: &&str| !key.is_empty() && key.len() <= MAX_KEY && key.chars().all(in_key);
    for key in keys.lines().map(str::trim).filter(is_key).take(MAX_TAGS) {
        match imds.get(&format!("{TAGS}{key}")).await {
            Ok(Some(value)) if value.chars().count() <= MAX_VALUE && !value.chars().any(char::is_control) => {
                tags.insert(key.to_owned(), value);
            }
            // Removed since, or not a value that a tag can have.
            Ok(_) => {}
            Err(error) => {
                tracing::debug!("the instance tag {key} is not known: {error}");
            }
        }
    }
    tags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::http::{Answer, Server};

    const DOCUMENT: &str = r#"{"accountId":"123456789012","architecture":"x86_64","availabilityZone":"eu-central-1a",
        "imageId":"ami-1","instanceId":"i-0abc","instanceType":"m5.xlarge","region":"eu-central-1","ramdiskId":null}"#;

    #[tokio::test]
    async fn an_instance_is_known_by_its_document_and_its_tags() {
        let server = Server::metadata(|path| match path {
            IDENTITY => Answer::ok(DOCUMENT),
            TAGS => Answer::ok("Name\ncaution:deployment-id\na/b\ngone"),
            "/latest/meta-data/tags/instance/Name" => Answer::ok("signer host"),
            "/latest/meta-data/tags/instance/caution:deployment-id" => Answer::ok("d-1"),
            _ => Answer::status(404, ""),
        })
        .await;
        let identity = ask(&Imds::at(&server.url()).unwrap()).await.unwrap();
        let known = |text: &str| Some(text.to_owned());
        assert_eq!(
            identity,
            InstanceIdentity {
                instance_id: known("i-0abc"),
                instance_type: known("m5.xlarge"),
                region: known("eu-central-1"),
                availability_zone: known("eu-central-1a"),
                account_id: known("123456789012"),
                ami_id: known("ami-1"),
                tags: [("Name", "signer host"), ("caution:deployment-id", "d-1")]
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .into(),
            }
        );
    }

    #[tokio::test]
    async fn parts_that_are_missing_or_make_no_sense_are_left_out() {
        for document in [None, Some("{}"), Some("garbage"), Some(r#"{"instanceId":"<b>","region":null}"#)] {
            let server = Server::metadata(move |path| match (path, document) {
                (IDENTITY, Some(document)) => Answer::ok(document),
                _ => Answer::status(404, ""),
            })
            .await;
            let identity = ask(&Imds::at(&server.url()).unwrap()).await.unwrap();
            assert_eq!(identity, InstanceIdentity::default());
        }
    }

    #[tokio::test]
    async fn where_nothing_answers_nothing_is_known() {
        let failure = ask(&Imds::at("http://127.0.0.1:1").unwrap()).await.unwrap_err();
        assert!(failure.message.contains("did not answer"), "{failure}");
    }
}
