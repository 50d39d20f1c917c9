//! Images from a web server: a presigned URL of S3, as a rule. Only ranged GETs are made, since what is signed is a GET. TLS is
//! rustls, trust is the system's. The URL's query may be what grants access, so no message holds it.

use super::remote::{Chunks, Head, Look, Opened, Remote, Trouble, content_range, number, shown, token};
use super::stamp::Object;
use crate::host::Outcome;
use bytes::Bytes;
use enclaved_core::desired::Url;
use enclaved_core::failure::Failure;
use enclaved_core::fetch::Cause;
use http::header::{self, HeaderMap, HeaderName};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Duration;
use tokio::time::timeout;

/// How many redirects are followed.
const MAX_REDIRECTS: u32 = 5;
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// So much of an answer that refuses is read, for its reason, and for so long.
const MAX_REASON: usize = 8 * 1024;
const REASON: Duration = Duration::from_secs(5);

type HttpClient = Client<HttpsConnector<HttpConnector>, Empty<Bytes>>;

/// The web as this host reaches it.
#[derive(Debug, Default)]
pub(super) struct Https {
    /// Made by the first fetch: most hosts need none, and reading the system's roots takes a while.
    client: OnceLock<HttpClient>,
}

impl Https {
    /// What is at that URL.
    ///
    /// # Errors
    /// The system's certificate authorities can't be read.
    pub(super) fn object(&self, url: &Url) -> Outcome<WebObject> {
        let client = match self.client.get() {
            Some(client) => client.clone(),
            None => {
                let client = client().map_err(|error| {
                    Failure::new(format!(
                        "could not get {url}: reading the system's certificate authorities failed: {error}"
                    ))
                    .with_remedy("install the package ca-certificates")
                })?;
                self.client.get_or_init(|| client).clone()
            }
        };
        Ok(WebObject { client, url: url.clone() })
    }
}

fn client() -> std::io::Result<HttpClient> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_nodelay(true);
    // http:// leads to this very host alone: `Url` sees to that, for redirects as well.
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::aws_lc_rs::default_provider())?
        .https_or_http()
        .enable_http1()
        .wrap_connector(tcp);
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

/// What is at a URL.
#[derive(Debug)]
pub(super) struct WebObject {
    client: HttpClient,
    url: Url,
}

impl WebObject {
    /// Asks, and follows redirects. Only good answers (200, 206) are returned.
    async fn get(&self, range: Option<&Range<u64>>, etag: Option<&str>) -> Result<Response<Incoming>, Trouble> {
        let mut url = self.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::get(url.secret()).header(header::ACCEPT_ENCODING, "identity");
            request = request.header(header::USER_AGENT, concat!("enclaved/", env!("CARGO_PKG_VERSION")));
            if let Some(range) = range {
                request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
            }
            if let Some(etag) = etag {
                request = request.header(header::IF_MATCH, etag);
            }
            let request = request.body(Empty::new()).map_err(|error| Trouble::malformed(error.to_string()))?;
            let response = self.client.request(request).await.map_err(|error| self.unreachable(&url, &error))?;
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
                    let encoding = text(response.headers(), header::CONTENT_ENCODING);
                    return match encoding.filter(|encoding| encoding != "identity") {
                        Some(encoding) => {
                            Err(Trouble::malformed(format!("it comes encoded ({encoding}), which was not asked for")))
                        }
                        None => Ok(response),
                    };
                }
                status if status.is_redirection() && response.headers().contains_key(header::LOCATION) => {
                    let location = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
                    url = url.join(location.unwrap_or_default()).map_err(|reason| {
                        let failure = Failure::new(format!(
                            "{} leads on to an address that is not followed: {reason}",
                            url.authority()
                        ));
                        Trouble { cause: refusal(status), failure }
                    })?;
                }
                status => return Err(refused(&url, status, response).await),
            }
        }
        let failure = Failure::new(format!("it leads on more than {MAX_REDIRECTS} times"));
        Err(Trouble { cause: refusal(StatusCode::FOUND), failure: failure.with_remedy("use the address it ends at") })
    }

    fn unreachable(&self, url: &Url, error: &hyper_util::client::legacy::Error) -> Trouble {
        let why = Failure::from_error(error).message;
        let failure = Failure::new(format!("{} was not reached: {why}", url.authority())).with_remedy(
            "see whether this host reaches it (DNS, route, security group), and whether its certificate is right for that name",
        );
        Trouble { cause: Cause::Broken, failure }
    }
}

/// What a status means that is no success. (No code: what S3 says of a presigned URL's credentials can't be mended here.)
fn refusal(status: StatusCode) -> Cause {
    Cause::Refused { status: status.as_u16(), code: None }
}

/// The server answered with an error: with S3's code and message, where it has them.
async fn refused(url: &Url, status: StatusCode, response: Response<Incoming>) -> Trouble {
    let reason = timeout(REASON, reason(response.into_body())).await.ok().flatten();
    let reason = reason.map(|reason| format!(" {reason}")).unwrap_or_default();
    let failure = Failure::new(format!("{} answered {}{reason}", url.authority(), status.as_u16()));
    let failure = match status.as_u16() {
        401 | 403 => failure.with_remedy(
            "a presigned URL may have expired (they live 7 days at most, and no longer than the credentials that signed it), or \
             whoever signed it may not read the object: sign a new one",
        ),
        404 | 410 => failure.with_remedy("there is nothing at that address: check it"),
        429 | 500..=599 => failure.with_remedy("the server is overloaded or out of order; it is tried again"),
        _ => failure,
    };
    Trouble { cause: refusal(status), failure }
}

/// `Code: Message` of S3's error document. Nothing else of it is looked at: it may repeat what was signed, and tokens with it.
async fn reason(mut body: Incoming) -> Option<String> {
    let mut text = Vec::new();
    while text.len() < MAX_REASON {
        match body.frame().await {
            Some(Ok(frame)) => text.extend_from_slice(frame.data_ref()?),
            Some(Err(_)) | None => break,
        }
    }
    let text = String::from_utf8_lossy(&text);
    let between = |tag: &str| {
        let (_, rest) = text.split_once(&format!("<{tag}>"))?;
        rest.split_once(&format!("</{tag}>")).map(|(found, _)| shown(found))
    };
    Some(format!("{}: {}", between("Code")?, between("Message")?))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).and_then(token)
}

impl Remote for WebObject {
    type Chunks = Incoming;

    async fn look(&self) -> Result<Look, Trouble> {
        let response = match self.get(Some(&(0..1)), None).await {
            Ok(response) => response,
            // A file of no bytes has no first one.
            Err(Trouble { cause: Cause::Refused { status: 416, .. }, .. }) => {
                let object = Object { etag: None, modified: None, size: 0, version: None };
                return Ok(Look { object, checksum: None, ranges: false });
            }
            Err(trouble) => return Err(trouble),
        };
        let headers = response.headers();
        let size = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                text(headers, header::CONTENT_RANGE).and_then(|range| content_range(&range)).map(|(_, size)| size)
            }
            _ => text(headers, header::CONTENT_LENGTH).and_then(|length| number(&length)),
        };
        let Some(size) = size else {
            let failure = Failure::new("the server does not say how long the file is");
            let failure = failure.with_remedy("use a server that sends Content-Length or Content-Range");
            return Err(Trouble { cause: Cause::Local, failure });
        };
        let object = Object {
            etag: text(headers, header::ETAG),
            modified: text(headers, header::LAST_MODIFIED),
            size,
            version: None,
        };
        let ranges = response.status() == StatusCode::PARTIAL_CONTENT && object.strong_etag().is_some();
        Ok(Look { object, checksum: None, ranges })
    }

    async fn open(&self, object: &Object, range: Option<Range<u64>>) -> Result<Opened<Incoming>, Trouble> {
        let response = self.get(range.as_ref(), object.strong_etag()).await?;
        let headers = response.headers();
        let head = Head {
            status: response.status().as_u16(),
            etag: text(headers, header::ETAG),
            content_range: text(headers, header::CONTENT_RANGE),
            content_length: text(headers, header::CONTENT_LENGTH).and_then(|length| number(&length)),
        };
        let is_range = head.fits(object, range.as_ref())?;
        let body = response.into_body();
        Ok(if is_range { Opened::Range(body) } else { Opened::Whole(body) })
    }

    fn renew(&self) {
        // What is signed is signed.
    }

    fn who(&self) -> String {
        self.url.to_string()
    }
}

impl Chunks for Incoming {
    async fn next(&mut self) -> Option<Result<Bytes, String>> {
        loop {
            match self.frame().await? {
                Ok(frame) => {
                    // Trailers are nobody's.
                    if let Ok(data) = frame.into_data() {
                        return Some(Ok(data));
                    }
                }
                Err(error) => return Some(Err(Failure::from_error(&error).message)),
            }
        }
    }
}
