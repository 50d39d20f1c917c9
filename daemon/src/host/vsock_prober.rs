//! Asks enclaves how they are: an HTTP GET, or a mere connection, over vsock. One connection a probe, so that a probe
//! says what a new client would see.

use super::{Outcome, Prober};
use bytes::Bytes;
use enclaved_core::desired::{HealthCheck, Probe};
use enclaved_core::failure::Failure;
use enclaved_core::id::Cid;
use enclaved_core::routes::VsockTransport;
use enclaved_proxy::vsock::{ConnectError, Transport};
use http::{Request, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::time::Duration;

/// The head of an answer may be this long; its body is not read.
const MAX_HEAD: usize = 16 << 10;

/// Asks enclaves how they are.
#[derive(Debug, Clone)]
pub struct VsockProber {
    transport: Transport,
}

impl VsockProber {
    /// Over that transport.
    pub fn new(transport: &VsockTransport) -> Self {
        Self { transport: transport.into() }
    }
}

impl Prober for VsockProber {
    async fn probe(&self, cid: Cid, check: &HealthCheck) -> Outcome<Result<(), String>> {
        match tokio::time::timeout(check.timeout, self.ask(cid, &check.probe)).await {
            Ok(verdict) => verdict,
            Err(_) => Ok(Err(no_answer(check.timeout))),
        }
    }
}

fn no_answer(limit: Duration) -> String {
    format!("no answer within {}", humantime::format_duration(limit))
}

impl VsockProber {
    async fn ask(&self, cid: Cid, probe: &Probe) -> Outcome<Result<(), String>> {
        let port = match probe {
            Probe::Http { port, .. } | Probe::Connect { port } => *port,
        };
        let stream = match self.transport.connect(cid, port).await {
            Ok(stream) => stream,
            Err(error) => return verdict(cid, &error),
        };
        let Probe::Http { path, .. } = probe else { return Ok(Ok(())) };
        let request = Request::get(path.as_str())
            .header(header::HOST, "localhost")
            .header(header::USER_AGENT, concat!("enclaved/", env!("CARGO_PKG_VERSION")))
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new());
        let request =
            request.map_err(|error| Failure::new(format!("asking for the health path \"{path}\": {error}")))?;
        let connected = hyper::client::conn::http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
            .await;
        let (mut sender, connection) = match connected {
            Ok(connected) => connected,
            Err(error) => return Ok(Err(text(&error))),
        };
        let answer = sender.send_request(request);
        tokio::pin!(answer, connection);
        let mut over = false;
        loop {
            tokio::select! {
                answer = &mut answer => return Ok(match answer {
                    Ok(answer) if (200..400).contains(&answer.status().as_u16()) => Ok(()),
                    Ok(answer) => Err(format!("GET {path} on vsock port {port} answered {}", answer.status())),
                    Err(error) => Err(format!("GET {path} on vsock port {port}: {}", text(&error))),
                }),
                // It drives the request; when it ends first, the request learns of that.
                _ = &mut connection, if !over => over = true,
            }
        }
    }
}

/// Whether a connection that failed says something of the enclave, or of this host.
fn verdict(cid: Cid, error: &ConnectError) -> Outcome<Result<(), String>> {
    if error.is_enclaves_fault() {
        return Ok(Err(text(error)));
    }
    Err(Failure::new(format!("CID {cid} could not be asked how it is: {}", text(error))))
}

fn text(error: &(dyn Error + 'static)) -> String {
    Failure::from_error(error).message
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::desired::OnUnhealthy;
    use std::io;
    use std::path::Path;
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    fn check(probe: Probe) -> HealthCheck {
        HealthCheck {
            probe,
            start_period: Duration::from_secs(60),
            interval: Duration::from_secs(5),
            timeout: Duration::from_millis(500),
            failures: 3,
            on_failure: OnUnhealthy::Report,
        }
    }

    fn http() -> HealthCheck {
        check(Probe::Http { port: 8080, path: "/health".to_owned() })
    }

    /// An enclave that takes one connection, reads a request and answers with these bytes.
    fn enclave(dir: &Path, answer: &'static str) -> tokio::task::JoinHandle<String> {
        let listener = UnixListener::bind(dir.join("16.sock")).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            let mut request = vec![0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            line + &String::from_utf8_lossy(&request[..length])
        })
    }

    async fn probe(dir: &Path, check: &HealthCheck) -> Outcome<Result<(), String>> {
        VsockProber::new(&VsockTransport::Hybrid(dir.to_owned())).probe(Cid::FIRST, check).await
    }

    #[tokio::test]
    async fn a_good_answer_is_healthy_and_the_path_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let enclave = enclave(dir.path(), "HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(probe(dir.path(), &http()).await, Ok(Ok(())));
        let asked = enclave.await.unwrap();
        assert!(asked.starts_with("CONNECT 8080\nGET /health HTTP/1.1\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn a_bad_answer_garbage_and_silence_are_told_apart() {
        for (answer, said) in [("HTTP/1.1 503 x\r\n\r\n", "503"), ("hello\r\n\r\n", "GET /health"), ("", "GET /health")]
        {
            let dir = tempfile::tempdir().unwrap();
            let enclave = enclave(dir.path(), answer);
            let verdict = probe(dir.path(), &http()).await.unwrap().unwrap_err();
            assert!(verdict.contains(said), "{answer:?}: {verdict}");
            drop(enclave);
        }
        let dir = tempfile::tempdir().unwrap();
        let _silent = UnixListener::bind(dir.path().join("16.sock")).unwrap();
        let verdict = probe(dir.path(), &http()).await.unwrap().unwrap_err();
        assert!(verdict.contains("no answer within 500ms"), "{verdict}");
    }

    #[tokio::test]
    async fn an_enclave_that_is_not_there_is_unhealthy_not_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let verdict = probe(dir.path(), &check(Probe::Connect { port: 8080 })).await.unwrap();
        assert!(verdict.unwrap_err().contains("CID 16"));
    }

    #[test]
    fn a_shortage_of_descriptors_says_nothing_of_the_enclave() {
        let error = ConnectError::Io { cid: Cid::FIRST, port: 8080, source: io::Error::from_raw_os_error(24) };
        assert!(verdict(Cid::FIRST, &error).is_err());
    }
}
