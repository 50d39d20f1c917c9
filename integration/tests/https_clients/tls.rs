//! `openssl s_client`: versions, names, protocols, sessions. And h2load, which wants many answers at a time.

use crate::{DOMAIN, before, origin};
use enclaved_integration::http::Server;
use enclaved_integration::https_site::{HttpsSites, Program, Said, runtime};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::process::Stdio;

/// A request after which the connection ends.
const REQUEST: &str = "GET /mirror HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n";

fn setting() -> (HttpsSites, Server) {
    let runtime = runtime().unwrap();
    let origin = runtime.block_on(origin::start());
    (before(origin.address().port(), runtime), origin)
}

/// With the root alone, and an end if the certificate is not the name's.
fn s_client(sites: &HttpsSites, name: &str, options: &[&str]) -> Program {
    let client = Program::new("openssl", "openssl").args(["s_client", "-connect", &sites.https.to_string()]);
    let client = client.args(["-servername", name, "-verify_hostname", name, "-verify_return_error"]);
    client.arg("-CAfile").arg(&sites.root).args(options)
}

/// A handshake, and a request whose answer is read to the end of the connection.
fn request(sites: &HttpsSites, options: &[&str]) -> Said {
    let path = sites.folder().join("request");
    fs::write(&path, REQUEST).unwrap();
    let client = s_client(sites, DOMAIN, options).arg("-ign_eof");
    client.stdin(File::open(path).unwrap()).run().unwrap().ok()
}

#[track_caller]
fn has(said: &Said, line: &str) {
    assert!(said.stdout.contains(line) || said.stderr.contains(line), "no {line:?}: {said}");
}

#[test]
fn openssl_agrees_on_tls_1_2_or_1_3_and_one_of_the_two_protocols() {
    let (sites, _origin) = setting();
    for (option, version) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let said = request(&sites, &[option]);
        has(&said, "Verify return code: 0 (ok)");
        has(&said, &format!("New, {version}, Cipher is "));
        // Without a word about protocols it is HTTP/1.1.
        has(&said, "No ALPN negotiated");
        has(&said, "HTTP/1.1 200 OK");
        for (offered, agreed) in [("h2,http/1.1", "h2"), ("http/1.1,h2", "h2"), ("spdy/3,http/1.1", "http/1.1")] {
            let said = s_client(&sites, DOMAIN, &[option, "-alpn", offered]).run().unwrap().ok();
            has(&said, &format!("ALPN protocol: {agreed}"));
        }
        let said = s_client(&sites, DOMAIN, &[option, "-alpn", "spdy/3"]).run().unwrap();
        assert_ne!(said.code, Some(0), "{said}");
        has(&said, "alert no application protocol");
    }
}

#[test]
fn openssl_is_refused_old_versions_weak_ciphers_and_unknown_names() {
    let (sites, _origin) = setting();
    let refused = |name: &str, options: &[&str], alert: &str| {
        let said = s_client(&sites, name, options).run().unwrap();
        assert_ne!(said.code, Some(0), "{said}");
        has(&said, alert);
    };
    // handshake_failure: what so old a client says has none of the signatures that are known here.
    for old in ["-tls1_1", "-tls1"] {
        refused(DOMAIN, &[old, "-cipher", "ALL:@SECLEVEL=0"], "SSL alert number 40");
    }
    // No forward secrecy; no authenticated encryption.
    for weak in ["AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA"] {
        refused(DOMAIN, &["-tls1_2", "-cipher", weak], "alert handshake failure");
    }
    for version in ["-tls1_2", "-tls1_3"] {
        // unrecognized_name. Who names none is served by the Host header.
        refused("other.test", &[version], "SSL alert number 112");
    }
}

#[test]
fn openssl_gets_the_cipher_that_the_proxy_prefers() {
    let (sites, _origin) = setting();
    for (options, chosen) in [
        (["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES256-GCM-SHA384"], "AES256-GCM-SHA384"),
        (["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"], "AES_256_GCM_SHA384"),
    ] {
        let said = s_client(&sites, DOMAIN, &options).run().unwrap().ok();
        assert!(said.stdout.lines().any(|line| line.starts_with("New, ") && line.ends_with(chosen)), "{said}");
    }
}

#[test]
fn openssl_takes_its_session_up_again() {
    let (sites, _origin) = setting();
    for version in ["-tls1_2", "-tls1_3"] {
        let session = sites.folder().join(version);
        let session = session.to_str().unwrap();
        has(&request(&sites, &[version, "-sess_out", session]), "New, TLSv1.");
        let said = request(&sites, &[version, "-sess_in", session]);
        has(&said, "Reused, TLSv1.");
        has(&said, "HTTP/1.1 200 OK");
    }
}

#[test]
fn openssl_can_not_negotiate_anew() {
    let (sites, _origin) = setting();
    let options = ["-tls1_2"];
    let mut client = s_client(&sites, DOMAIN, &options).stdin(Stdio::piped());
    let mut running = client.start().unwrap();
    let (mut stdin, mut stdout) = (running.0.stdin.take().unwrap(), running.0.stdout.take().unwrap());
    // A command, once the handshake is through: the session is shown then.
    let (mut shown, mut some) = (String::new(), [0; 4096]);
    while !shown.contains("Verify return code: 0 (ok)") {
        let count = stdout.read(&mut some).unwrap();
        assert_ne!(count, 0, "{shown}");
        shown.push_str(&String::from_utf8_lossy(&some[..count]));
    }
    assert!(shown.contains("Secure Renegotiation IS supported"), "{shown}");
    stdin.write_all(b"R\n").unwrap();
    let mut stderr = String::new();
    running.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(stderr.contains("RENEGOTIATING") && stderr.contains("no renegotiation"), "{stderr}");
    assert!(!running.0.wait().unwrap().success());
}

#[test]
fn h2load_has_every_one_of_many_streams_over_few_connections_answered() {
    let (sites, _origin) = setting();
    for (path, count, streams) in [("/mirror", 2000, "100"), ("/file", 60, "20"), ("/mirror", 100, "1")] {
        let load = Program::new("h2load", "nghttp2-client").args(["-n", &count.to_string(), "-c", "3", "-m", streams]);
        let load = load.arg(format!("--connect-to={}", sites.https));
        let said = load.arg(sites.url(DOMAIN) + path).run().unwrap().ok();
        has(&said, "Application protocol: h2");
        has(&said, &format!(" {count} succeeded, 0 failed, 0 errored, 0 timeout"));
        has(&said, &format!("status codes: {count} 2xx, 0 3xx, 0 4xx, 0 5xx"));
    }
}
