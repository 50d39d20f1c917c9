//! Asks the metadata service for a session token by hand, to see where it gets stuck: the SDK's client says only that it did.

use bytes::Bytes;
use enclaved_core::diagnosis::cloud::MetadataSeen;
use enclaved_core::id::Timestamp;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Where EC2 has it.
const EC2: &str = "http://169.254.169.254";
const EC2_IPV6: &str = "http://[fd00:ec2::254]";
/// It answers within milliseconds.
const CONNECT: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(3);
const MAX_ANSWER: usize = 4096;

/// Where it is, by the variables that the SDK goes by; `None`: it is not to be asked.
pub(super) fn endpoint() -> Option<String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if variable("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return None;
    }
    let mode = variable("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE");
    let usual = if mode.is_some_and(|mode| mode.eq_ignore_ascii_case("ipv6")) { EC2_IPV6 } else { EC2 };
    Some(variable("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|| usual.to_owned()))
}

/// Asks it.
pub(super) async fn ask(endpoint: Option<&str>) -> MetadataSeen {
    let Some(endpoint) = endpoint else { return MetadataSeen::Disabled };
    match token(endpoint).await {
        Ok((token, apart)) => MetadataSeen::Answers { role: role(endpoint, &token).await, apart },
        Err(Stuck::Unreachable(why)) => MetadataSeen::Unreachable(why),
        Err(Stuck::Status(status)) => MetadataSeen::Refused(status.as_u16()),
        // The limit is on the packets with a token alone: another question, even one that is refused, is answered.
        Err(Stuck::NoAnswer) => match request(endpoint, Method::GET, "/latest/meta-data/", None).await {
            Ok(_) => MetadataSeen::HopLimit,
            Err(_) => MetadataSeen::Silent,
        },
    }
}

/// Where it got stuck.
#[derive(Debug)]
enum Stuck {
    Unreachable(String),
    NoAnswer,
    Status(StatusCode),
}

/// A token, and how far the service's clock is from this host's.
async fn token(endpoint: &str) -> Result<(String, Option<Duration>), Stuck> {
    let answer =
        request(endpoint, Method::PUT, "/latest/api/token", Some(("x-aws-ec2-metadata-token-ttl-seconds", "60")))
            .await?;
    if answer.status() != StatusCode::OK {
        return Err(Stuck::Status(answer.status()));
    }
    let date = answer.headers().get(header::DATE).and_then(|date| date.to_str().ok()).and_then(date);
    let now = Timestamp::from(SystemTime::now());
    let apart = date.map(|date| now.since(date).max(date.since(now)));
    Ok((body(answer).await.ok_or(Stuck::NoAnswer)?, apart))
}

/// The name of the role; `None` if there is none, or it can't be told.
async fn role(endpoint: &str, token: &str) -> Option<String> {
    let answer =
        request(endpoint, Method::GET, crate::imds::ROLE, Some(("x-aws-ec2-metadata-token", token))).await.ok()?;
    if answer.status() != StatusCode::OK {
        return None;
    }
    let text = body(answer).await?;
    let name = text.lines().next()?.trim();
    let in_name = |c: char| c.is_ascii_alphanumeric() || "+=,.@-_".contains(c);
    (!name.is_empty() && name.len() <= 64 && name.chars().all(in_name)).then(|| name.to_owned())
}

async fn body(answer: Response<Incoming>) -> Option<String> {
    let bytes = timeout(ANSWER, Limited::new(answer.into_body(), MAX_ANSWER).collect()).await.ok()?.ok()?.to_bytes();
    String::from_utf8(bytes.to_vec()).ok()
}

async fn request(
    endpoint: &str,
    method: Method,
    path: &str,
    header: Option<(&'static str, &str)>,
) -> Result<Response<Incoming>, Stuck> {
    let unreachable = |why: String| Stuck::Unreachable(format!("{endpoint}: {why}"));
    let uri: Uri = endpoint.parse().map_err(|error| unreachable(format!("{error}")))?;
    let host = uri.host().ok_or_else(|| unreachable("it is no address".to_owned()))?;
    let address = (host.trim_start_matches('[').trim_end_matches(']'), uri.port_u16().unwrap_or(80));
    let stream = match timeout(CONNECT, TcpStream::connect(address)).await {
        Ok(connected) => connected.map_err(|error| unreachable(error.to_string()))?,
        Err(_) => return Err(unreachable(format!("no connection within {} s", CONNECT.as_secs()))),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| unreachable(error.to_string()))?;
    // Ends with the sender and the body.
    tokio::spawn(async move { drop(connection.await) });
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, host);
    if let Some((name, value)) = header {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| unreachable(error.to_string()))?;
    match timeout(ANSWER, sender.send_request(request)).await {
        Ok(answer) => answer.map_err(|error| unreachable(error.to_string())),
        Err(_) => Err(Stuck::NoAnswer),
    }
}

fn date(text: &str) -> Option<Timestamp> {
    use aws_smithy_types::DateTime;
    use aws_smithy_types::date_time::Format;
    let seconds = DateTime::from_str(text, Format::HttpDate).ok()?.secs();
    Some(Timestamp::from_millis(u64::try_from(seconds).ok()?.saturating_mul(1000)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::http::{Answer, Server};

    #[tokio::test]
    async fn a_service_that_answers_tells_the_role_and_its_time() {
        let server = Server::open(|request| match request.split_once(' ') {
            Some(("PUT", "/latest/api/token")) => {
                Answer::ok("token").with_header("date", "Tue, 15 Nov 1994 08:12:31 GMT")
            }
            Some(("GET", crate::imds::ROLE)) => Answer::ok("caution-images\n"),
            _ => Answer::status(401, ""),
        })
        .await;
        let seen = ask(Some(&server.url())).await;
        let MetadataSeen::Answers { role: Some(role), apart: Some(apart) } = &seen else { panic!("{seen:?}") };
        assert_eq!(role, "caution-images");
        assert!(*apart > Duration::from_secs(30 * 365 * 86_400), "that was in 1994: {apart:?}");
        assert_eq!(server.requests().len(), 2, "no question without a token, which would be on record");
    }

    #[tokio::test]
    async fn a_refusal_and_a_place_where_nothing_listens_are_told_apart() {
        let server = Server::open(|_| Answer::status(403, "")).await;
        assert_eq!(ask(Some(&server.url())).await, MetadataSeen::Refused(403));
        let seen = ask(Some("http://127.0.0.1:1")).await;
        assert!(matches!(&seen, MetadataSeen::Unreachable(why) if why.contains("refused")), "{seen:?}");
        assert!(matches!(ask(Some("rubbish")).await, MetadataSeen::Unreachable(_)));
        assert_eq!(ask(None).await, MetadataSeen::Disabled);
    }

    #[tokio::test]
    async fn a_service_that_takes_connections_and_answers_nothing_is_silent() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        assert_eq!(ask(Some(&url)).await, MetadataSeen::Silent);
    }
}
