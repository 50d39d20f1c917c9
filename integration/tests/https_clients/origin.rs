//! The application behind the proxy, for clients that need no application of their own kind: a file with ranges, and a mirror that
//! tells what came.

use bytes::Bytes;
use enclaved_integration::http::{Body, BreakOff, Server, full};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_RANGES, CONTENT_RANGE, CONTENT_SECURITY_POLICY, COOKIE, RANGE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};
use sha2::{Digest as _, Sha256};

/// The file: bytes that are told apart by their place.
pub(crate) fn file() -> Bytes {
    (0..100_000_u32).map(|place| u8::try_from(place % 251).unwrap()).collect()
}

/// Lower-case hexadecimal digits of a SHA-256.
pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Starts it within a runtime.
pub(crate) async fn start() -> Server {
    Server::start(answer).await.unwrap()
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, BreakOff> {
    match request.uri().path() {
        "/file" => part(&request),
        "/mirror" => mirror(request).await,
        "/" => Response::builder()
            .header(CONTENT_SECURITY_POLICY, "default-src 'none'")
            .header(X_CONTENT_TYPE_OPTIONS, "nosniff")
            .header(X_FRAME_OPTIONS, "DENY")
            .body(full("welcome\n")),
        _ => Response::builder().status(StatusCode::NOT_FOUND).body(full("nothing here\n")),
    }
    .map_err(|_| BreakOff)
}

/// The file, or the part that is asked for (`bytes=FIRST-LAST`).
fn part(request: &Request<Incoming>) -> http::Result<Response<Body>> {
    let file = file();
    let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok()?.strip_prefix("bytes="));
    let range = range.and_then(|range| range.split_once('-'));
    let range = range.and_then(|(first, last)| Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?)));
    let builder = Response::builder().header(ACCEPT_RANGES, "bytes");
    let length = file.len();
    let Some((first, last)) = range else {
        if request.method() == Method::HEAD {
            return builder.header("content-length", length).body(full(""));
        }
        return builder.body(full(file));
    };
    let builder = builder.header(CONTENT_RANGE, format!("bytes {first}-{last}/{length}"));
    builder.status(StatusCode::PARTIAL_CONTENT).body(full(file.slice(first..=last)))
}

/// What came, as JSON.
async fn mirror(request: Request<Incoming>) -> http::Result<Response<Body>> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else {
        return Response::builder().status(StatusCode::BAD_REQUEST).body(full(""));
    };
    let body = body.to_bytes();
    let header =
        |name: &str| head.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let told = serde_json::json!({
        "method": head.method.as_str(),
        "target": head.uri.to_string(),
        "host": header("host"),
        "proto": header("x-forwarded-proto"),
        "from": header("x-forwarded-for"),
        "expect": header("expect"),
        "coding": header("transfer-encoding"),
        "length": header("content-length"),
        "cookies": head.headers.get_all(COOKIE).iter().count(),
        "cookie": header("cookie"),
        "large": header("x-large").map(|large| large.len()),
        "bytes": body.len(),
        "sha256": digest(&body),
    });
    Response::builder().header("content-type", "application/json").body(full(told.to_string()))
}
