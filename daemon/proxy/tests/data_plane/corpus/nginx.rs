//! nginx with the same bytes: only where its verdicts are written anew.

use super::file::{Case, Verdict};
use super::upstream::Recorder;
use super::{converse, soon};
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// As someone would write it who puts nginx before an application, with times as short as ours here.
fn configuration(dir: &Path, listen: SocketAddr, upstream: SocketAddr) -> String {
    let dir = dir.display();
    format!(
        "daemon off; master_process off; pid {dir}/pid; error_log {dir}/error.log;
        events {{}}
        http {{
            access_log off; client_header_timeout 1s; client_body_timeout 1s; keepalive_timeout 1s;
            client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c; uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e;
            server {{
                listen {listen} ssl http2; server_name a.test; ssl_certificate {dir}/crt; ssl_certificate_key {dir}/key;
                location / {{
                    proxy_pass http://{upstream}; proxy_http_version 1.1; proxy_set_header Connection \"\";
                    proxy_set_header Host $host; proxy_request_buffering off;
                }}
            }}
        }}"
    )
}

pub(super) async fn verdicts(cases: &[Case]) -> Vec<Verdict> {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap();
    std::fs::write(dir.path().join("crt"), key.cert.pem()).unwrap();
    std::fs::write(dir.path().join("key"), key.signing_key.serialize_pem()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(key.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut verdicts = Vec::new();
    for case in cases {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let text = configuration(dir.path(), free, upstream.local_addr().unwrap());
        std::fs::write(dir.path().join("conf"), text).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-c").arg(dir.path().join("conf")).arg("-p").arg(dir.path());
        let started = command.stderr(Stdio::null()).spawn();
        let nginx = Nginx(started.unwrap_or_else(|error| panic!("nginx, of the package nginx-light: {error}")));
        let recorder = Recorder::new();
        let serving = recorder.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = upstream.accept().await.unwrap();
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        let tcp = soon("nginx to listen", async {
            loop {
                match TcpStream::connect(free).await {
                    Ok(tcp) => return tcp,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        });
        let mut config = config.clone();
        config.alpn_protocols = vec![if case.is_http2() { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
        let tls = tls.connect(ServerName::try_from("a.test").unwrap(), tcp.await).await.unwrap();
        let answers = soon(&case.name, converse(tls, case)).await;
        drop(nginx);
        let got = soon("the end of all connections of nginx", recorder.all()).await;
        task.abort();
        verdicts.push(Verdict { answers, got });
    }
    verdicts
}
