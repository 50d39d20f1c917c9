//! Health probes over vsock: one HTTP request, or one connection. What follows from an answer is the planner's.

use super::{Outcome, Prober};
use enclaved_core::desired::{HealthCheck, Probe};
use enclaved_core::failure::Failure;
use enclaved_core::id::Cid;
use enclaved_core::routes::VsockTransport;
use enclaved_proxy::vsock::{ConnectError, Stream, Transport};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

/// So much of an answer's body is read, so that the application can finish sending a short one; a long one is cut off.
const MAX_BODY: usize = 64 * 1024;
/// And for so long.
const DRAIN: Duration = Duration::from_millis(100);
/// An answer's head may be so long.
const MAX_HEAD: usize = 64 * 1024;

/// What a probe found: the answer is good, or what is wrong with it.
type Verdict = Result<(), String>;

/// Asks enclaves over vsock.
#[derive(Debug, Clone)]
pub struct VsockProber {
    transport: Transport,
}

impl VsockProber {
    /// Over that transport.
    pub fn new(transport: VsockTransport) -> Self {
        Self { transport: Transport::from(&transport) }
    }
}

impl Prober for VsockProber {
    async fn probe(&self, cid: Cid, check: &HealthCheck) -> Outcome<Verdict> {
        let probe = async {
            match &check.probe {
                Probe::Connect { port } => Ok(self.connect(cid, *port).await?.map(drop)),
                Probe::Http { port, path } => match self.connect(cid, *port).await? {
                    Ok(stream) => get(stream, path).await,
                    Err(why) => Ok(Err(why)),
                },
            }
        };
        within(check.timeout, probe).await
    }
}

impl VsockProber {
    async fn connect(&self, cid: Cid, port: u32) -> Outcome<Result<Stream, String>> {
        match self.transport.connect(cid, port).await {
            Ok(stream) => Ok(Ok(stream)),
            Err(error) if error.is_enclaves_fault() => Ok(Err(told(&error))),
            Err(error) => Err(Failure::new(format!("a health probe could not be made: {}", told(&error)))),
        }
    }
}

fn told(error: &ConnectError) -> String {
    Failure::from_error(error).message
}

async fn within(timeout: Duration, probe: impl Future<Output = Outcome<Verdict>>) -> Outcome<Verdict> {
    match tokio::time::timeout(timeout, probe).await {
        Ok(verdict) => verdict,
        Err(_) => Ok(Err(format!("it did not answer within {}", humantime::format_duration(timeout)))),
    }
}

/// One GET; 200 to 399 is well.
async fn get(stream: Stream, path: &str) -> Outcome<Verdict> {
    let request = http::Request::get(path)
        .header(http::header::HOST, "localhost")
        .header(http::header::USER_AGENT, concat!("enclaved/", env!("CARGO_PKG_VERSION")))
        .header(http::header::CONNECTION, "close")
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|error| Failure::new(format!("the health check's path \"{path}\" can't be asked for: {error}")))?;
    let mut client = hyper::client::conn::http1::Builder::new();
    client.max_buf_size(MAX_HEAD);
    let (mut sender, connection) = match client.handshake(TokioIo::new(stream)).await {
        Ok(connected) => connected,
        Err(error) => return Ok(Err(unanswered(path, &error))),
    };
    let exchange = async {
        let response = match sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return Err(unanswered(path, &error)),
        };
        let status = response.status();
        let mut body = response.into_body();
        let drain = async {
            let mut length = 0;
            while let Some(Ok(frame)) = body.frame().await {
                length += frame.data_ref().map_or(0, bytes::Bytes::len);
                if length > MAX_BODY {
                    break;
                }
            }
        };
        // The status is the answer: a body that breaks off, does not come or has no end does not change it.
        let _drained_or_late = tokio::time::timeout(DRAIN, drain).await;
        if (200..400).contains(&status.as_u16()) { Ok(()) } else { Err(format!("GET {path} answered {status}")) }
    };
    let (mut exchange, mut connection) = (pin!(exchange), pin!(connection));
    tokio::select! {
        biased;
        // Not polled again after it is ready.
        verdict = &mut exchange => return Ok(verdict),
        // Pinned: where the connection ends first, what it brought is still handed over, or why nothing comes.
        _ = &mut connection => {}
    }
    Ok(exchange.await)
}

fn unanswered(path: &str, error: &hyper::Error) -> String {
    format!("GET {path} was not answered: {}", Failure::from_error(error).message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use enclaved_core::desired::OnUnhealthy;
    use tempfile::TempDir;
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;
    use tokio::task::JoinHandle;

    /// An enclave with CID 16 behind hybrid vsock, which answers every request with these bytes.
    struct Enclave {
        folder: TempDir,
        task: JoinHandle<()>,
    }

    impl Enclave {
        fn answering(answer: &'static [u8], then_close: bool) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("16.sock")).unwrap();
            let task = tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let mut stream = BufReader::new(stream);
                    let mut line = String::new();
                    stream.read_line(&mut line).await.unwrap();
                    assert_eq!(line, "CONNECT 8080\n");
                    stream.write_all(b"OK 1024\n").await.unwrap();
                    while stream.read_line(&mut line).await.unwrap_or(0) > 2 {}
                    // A client that hangs up early is one of the cases.
                    let _gone = stream.write_all(answer).await;
                    if !then_close {
                        let _gone = stream.read_to_string(&mut line).await;
                    }
                }
            });
            Self { folder, task }
        }

        async fn probe(&self, probe: Probe) -> Outcome<Verdict> {
            let transport = VsockTransport::Hybrid(self.folder.path().to_owned());
            VsockProber::new(transport).probe(Cid::FIRST, &check(probe)).await
        }
    }

    impl Drop for Enclave {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    fn check(probe: Probe) -> HealthCheck {
        HealthCheck {
            probe,
            start_period: Duration::ZERO,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(10),
            failures: 1,
            on_failure: OnUnhealthy::Report,
        }
    }

    fn get() -> Probe {
        Probe::Http { port: 8080, path: "/health?full=1".to_owned() }
    }

    #[tokio::test]
    async fn answers_from_200_to_399_are_well_and_others_are_told() {
        for (answer, well) in [
            (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..], true),
            (b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n", true),
            (b"HTTP/1.0 204 No Content\r\n\r\n", true),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\nbroken off", true),
            (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", false),
            (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", false),
        ] {
            let verdict = Enclave::answering(answer, true).probe(get()).await.unwrap();
            assert_eq!(verdict.is_ok(), well, "{verdict:?}");
            if let Err(text) = verdict {
                assert!(text.starts_with("GET /health?full=1 answered"), "{text}");
            }
        }
    }

    #[tokio::test]
    async fn garbage_a_closed_connection_and_a_head_without_end_are_the_enclaves_fault() {
        const ENDLESS: &[u8] = &[b'a'; 200_000];
        for answer in [&b"what?\r\n\r\n"[..], b"", ENDLESS] {
            let text = Enclave::answering(answer, true).probe(get()).await.unwrap().unwrap_err();
            assert!(text.contains("was not answered"), "{text}");
        }
    }

    #[tokio::test]
    async fn a_body_without_end_does_not_hold_up_the_answer() {
        static ANSWER: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
            [&b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n"[..], &[0; 200_000]].concat()
        });
        Enclave::answering(&ANSWER, false).probe(get()).await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_does_not_change_the_verdict() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n";
        Enclave::answering(answer, false).probe(get()).await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_enclave_that_keeps_silent_is_unwell_after_the_timeout() {
        let text = Enclave::answering(b"", false).probe(get()).await.unwrap().unwrap_err();
        assert_eq!(text, "it did not answer within 10s");
    }

    #[tokio::test]
    async fn a_connection_alone_can_be_the_check() {
        let enclave = Enclave::answering(b"", true);
        enclave.probe(Probe::Connect { port: 8080 }).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_enclave_that_is_not_there_is_unwell() {
        let folder = tempfile::tempdir().unwrap();
        let transport = VsockTransport::Hybrid(folder.path().to_owned());
        let verdict = VsockProber::new(transport).probe(Cid::FIRST, &check(get())).await.unwrap();
        assert!(verdict.unwrap_err().contains("CID 16"));
    }

    #[tokio::test]
    async fn a_probe_that_the_host_cannot_make_says_nothing_of_the_enclave() {
        let folder = format!("/tmp/{}", "long/".repeat(100));
        let prober = VsockProber::new(VsockTransport::Hybrid(folder.into()));
        let failure = prober.probe(Cid::FIRST, &check(get())).await.unwrap_err();
        assert!(failure.message.contains("could not be made"), "{failure}");
    }
}
