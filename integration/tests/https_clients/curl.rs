//! curl, over HTTP/1.1 and HTTP/2.

use crate::{DOMAIN, before, origin};
use enclaved_integration::http::Server;
use enclaved_integration::https_site::{HSTS, HttpsSites, Program, Said, runtime};
use serde_json::Value;
use std::fs::{self, File};
use std::path::PathBuf;

const VERSIONS: [(&str, &str); 2] = [("--http1.1", "1.1"), ("--http2", "2")];
const UPLOAD: usize = 3 << 20;

/// The proxy, and the application behind it.
struct Setting {
    sites: HttpsSites,
    _origin: Server,
}

impl Setting {
    fn new() -> Self {
        // The application runs where the bridge does, and is there before the routes to it.
        let runtime = runtime().unwrap();
        let origin = runtime.block_on(origin::start());
        let sites = before(origin.address().port(), runtime);
        Self { sites, _origin: origin }
    }

    /// curl with this root alone, and the site's name.
    fn curl(&self) -> Program {
        let resolve = |port: u16| format!("{DOMAIN}:{port}:127.0.0.1");
        let curl = Program::new("curl", "curl").args(["--silent", "--show-error", "--max-time", "30"]);
        let curl = curl.arg("--cacert").arg(&self.sites.root);
        curl.args(["--resolve", &resolve(self.sites.https.port()), "--resolve", &resolve(self.sites.clear.port())])
    }

    fn url(&self, path: &str) -> String {
        self.sites.url(DOMAIN) + path
    }

    fn mirrored(&self, curl: Program) -> Value {
        let said = curl.arg(self.url("/mirror?a=b")).run().unwrap().ok();
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    fn upload(&self) -> (PathBuf, String) {
        let (path, bytes) = (self.sites.folder().join("upload"), vec![b'u'; UPLOAD]);
        fs::write(&path, &bytes).unwrap();
        (path, origin::digest(&bytes))
    }
}

/// What `--write-out` wrote, with the body left out.
fn written(curl: Program, what: &str) -> Said {
    curl.args(["--output", "/dev/null", "--write-out", what]).run().unwrap()
}

#[test]
fn curl_speaks_both_versions_and_trusts_the_root_of_the_internal_ca_alone() {
    let setting = Setting::new();
    for (option, version) in VERSIONS {
        let curl = setting.curl().arg(option).arg(setting.url("/file"));
        let what = "%{http_version} %{response_code} %{ssl_verify_result} %{size_download}";
        assert_eq!(written(curl, what).ok().stdout, format!("{version} 200 0 100000"));
    }
    let told = setting.mirrored(setting.curl());
    let host = format!("{DOMAIN}:{}", setting.sites.https.port());
    assert_eq!((&told["target"], &told["proto"]), (&"/mirror?a=b".into(), &"https".into()));
    assert_eq!((&told["host"], &told["from"]), (&host.into(), &"127.0.0.1".into()));

    let stranger = Program::new("curl", "curl").args(["--silent", "--show-error", "--max-time", "30"]);
    let stranger = stranger.arg("--resolve").arg(format!("{DOMAIN}:{}:127.0.0.1", setting.sites.https.port()));
    let said = stranger.arg(setting.url("/file")).run().unwrap();
    // CURLE_PEER_FAILED_VERIFICATION.
    assert_eq!(said.code, Some(60), "{said}");
}

#[test]
fn curl_uploads_after_100_continue_and_without_it_and_in_chunks() {
    let setting = Setting::new();
    let (path, digest) = setting.upload();
    for (option, version) in VERSIONS {
        let arrived = |told: &Value| {
            assert_eq!(
                (&told["bytes"], &told["sha256"]),
                (&UPLOAD.into(), &digest.as_str().into()),
                "{version}: {told}"
            );
            assert_eq!(told["expect"], Value::Null, "{version}");
        };
        let curl = setting.curl().arg(option).args(["--verbose", "--header", "Expect: 100-continue"]);
        let said = curl.arg("--upload-file").arg(&path).arg(setting.url("/mirror")).run().unwrap().ok();
        arrived(&serde_json::from_str(&said.stdout).unwrap());
        if version == "1.1" {
            assert!(said.stderr.contains("< HTTP/1.1 100 Continue"), "{said}");
            assert!(!said.stderr.contains("Done waiting for 100-continue"), "curl gave up waiting: {said}");
        }
        let curl = setting.curl().arg(option).args(["--header", "Expect:", "--upload-file"]).arg(&path);
        let told = setting.mirrored(curl);
        arrived(&told);
        assert_eq!((&told["method"], &told["length"]), (&"PUT".into(), &UPLOAD.to_string().into()));
        // What comes through a pipe has no length that anybody knows: chunks in HTTP/1.1, frames in HTTP/2.
        let curl = setting.curl().arg(option).args(["--upload-file", "-"]).stdin(File::open(&path).unwrap());
        let told = setting.mirrored(curl);
        arrived(&told);
        assert_eq!((&told["coding"], &told["length"]), (&"chunked".into(), &Value::Null), "{version}");
    }
}

#[test]
fn curl_gets_ranges_and_heads_over_a_connection_that_is_kept() {
    let setting = Setting::new();
    let part = setting.sites.folder().join("part");
    for (option, version) in VERSIONS {
        let curl =
            setting.curl().arg(option).args(["--range", "100-1099", "--write-out", "%{response_code}", "--output"]);
        let said = curl.arg(&part).arg(setting.url("/file")).run().unwrap().ok();
        assert_eq!(said.stdout, "206", "{version}");
        assert_eq!(fs::read(&part).unwrap(), origin::file()[100..1100], "{version}");
        let curl = setting.curl().arg(option).args(["--head", "--output", "/dev/null", "--output", "/dev/null"]);
        let what = "%{response_code} %{num_connects} %{size_download} %header{content-length}\n";
        let said =
            curl.args(["--write-out", what]).args([setting.url("/file"), setting.url("/file")]).run().unwrap().ok();
        assert_eq!(said.stdout, "200 1 0 100000\n200 0 0 100000\n", "{version}");
    }
}

#[test]
fn curl_is_sent_from_clear_to_https_with_its_method_and_body_and_told_of_hsts_there() {
    let setting = Setting::new();
    let clear = format!("http://{DOMAIN}:{}/mirror?a=b", setting.sites.clear.port());
    let what = "%{response_code} %{redirect_url} [%header{strict-transport-security}]";
    let said = written(setting.curl().arg(&clear), what).ok();
    assert_eq!(said.stdout, format!("308 {} []", setting.url("/mirror?a=b")));
    let said = setting.curl().args(["--location", "--data", "hello"]).arg(&clear).run().unwrap().ok();
    let told: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!((&told["method"], &told["sha256"]), (&"POST".into(), &origin::digest(b"hello").into()));
    for (option, version) in VERSIONS {
        for path in ["/file", "/none"] {
            let curl = setting.curl().arg(option).arg(setting.url(path));
            assert_eq!(written(curl, "%header{strict-transport-security}").ok().stdout, HSTS, "{version} {path}");
        }
    }
}
