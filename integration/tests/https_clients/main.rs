//! HTTPS with clients that others wrote, against the real `enclaved proxy` on loopback: curl, openssl, h2load, and Debian's Python
//! with its WebSocket, gRPC and HTTP/2. They trust the root of the internal CA and nothing else; no check is switched off.
//!
//! A client that is not installed fails its test with the name of its Debian package.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed; helpers are tests, too")]

mod curl;
mod grpc;
mod http2;
mod origin;
mod tls;
mod websocket;

use enclaved_core::routes::UpstreamHttp;
use enclaved_integration::https_site::{HttpsSites, Program, Site};
use std::path::PathBuf;
use tokio::runtime::Runtime;

/// The site's name.
const DOMAIN: &str = "app.test";

/// The proxy with one site before a server that speaks HTTP/1.1.
fn before(port: u16, runtime: Runtime) -> HttpsSites {
    HttpsSites::start(&[Site { domain: DOMAIN, port, upstream: UpstreamHttp::Http1 }], runtime).unwrap()
}

/// A script of this folder.
fn python(script: &str, package: &'static str) -> Program {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/https_clients");
    Program::python(&folder.join(script), package)
}
