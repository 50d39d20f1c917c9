//! Talks to the daemon: HTTP/1.1 over its admin socket, one connection a request. Knows the API's form, not its meaning.

use super::{CtlError, understood};
use bytes::Bytes;
use enclaved_core::status::Status;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use std::io::{Error, ErrorKind};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;

/// A request may take this long: a reload judges a configuration and writes to disk.
const ANSWER: Duration = Duration::from_secs(30);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// One daemon.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) async fn status(&self) -> Result<Status, CtlError> {
        understood(&self.get("/v1/status").await?)
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, CtlError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    pub(super) async fn post(&self, path: &str) -> Result<Value, CtlError> {
        self.ask(Method::POST, path, Bytes::new()).await
    }

    pub(super) async fn post_json(&self, path: &str, body: &impl Serialize) -> Result<Value, CtlError> {
        let body = serde_json::to_vec(body);
        let body = body.map_err(|error| CtlError::Bug(format!("making the request {path}: {error}")))?;
        self.ask(Method::POST, path, body.into()).await
    }

    async fn ask(&self, method: Method, path: &str, body: Bytes) -> Result<Value, CtlError> {
        let asked = tokio::time::timeout(ANSWER, self.exchange(method, path, body)).await;
        let (status, body) = asked.unwrap_or_else(|_| {
            let text = format!("enclaved has not answered within {} s on {}", ANSWER.as_secs(), self.socket.display());
            Err(CtlError::TryAgain(text))
        })?;
        answer(status, &body)
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), CtlError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let broken = |error: &dyn std::fmt::Display| {
            CtlError::TryAgain(format!("talking to enclaved over {}: {error}", self.socket.display()))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .body(Full::new(body))
            .map_err(|error| CtlError::Bug(format!("making the request {path}: {error}")))?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok((status, body.map_err(|error| broken(&error))?.to_bytes()))
        };
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            // The exchange first: the connection may end as soon as the answer is complete.
            biased;
            // Ends this function; nothing is selected again after it.
            answer = &mut exchange => answer,
            // Whatever became of the connection, the exchange says it better.
            _ = connection => exchange.await,
        }
    }

    fn unreachable(&self, error: &Error) -> CtlError {
        let socket = self.socket.display();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => CtlError::TryAgain(format!(
                "enclaved is not running: nothing answers on {socket}\n\
                 start it: systemctl start enclaved\n\
                 its last words: journalctl -u enclaved -n 50"
            )),
            // Waiting does not help.
            ErrorKind::PermissionDenied => {
                CtlError::Usage(format!("may not use {socket}: run this as root, or as a member of the socket's group"))
            }
            _ => CtlError::TryAgain(format!("connecting to enclaved over {socket}: {error}")),
        }
    }
}

/// What an answer means.
fn answer(status: StatusCode, body: &[u8]) -> Result<Value, CtlError> {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let reason = json.as_ref().and_then(|json| json.get("error")).and_then(Value::as_str).map(str::to_owned);
    match (status, json, reason) {
        (StatusCode::OK, Some(json), _) => Ok(json),
        (StatusCode::UNPROCESSABLE_ENTITY, _, Some(reason)) => Err(CtlError::Unfit(format!("refused\n{reason}"))),
        (StatusCode::SERVICE_UNAVAILABLE, _, Some(reason)) => Err(CtlError::TryAgain(reason)),
        (StatusCode::NOT_FOUND, _, Some(reason)) => Err(CtlError::Usage(reason)),
        (status, _, Some(reason)) => Err(CtlError::Bug(format!("enclaved answers {status}: {reason}"))),
        (status, _, None) => Err(CtlError::Bug(format!(
            "enclaved answers {status} with {} bytes that are no JSON: is it another version?",
            body.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    /// A daemon that answers one request with these bytes; returns the head of the request and what the client made of
    /// the answer.
    async fn exchange(answer: &'static str) -> (String, Result<Value, CtlError>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(head).unwrap()
        };
        let client = Client::new(socket.clone());
        tokio::join!(server, client.get("/v1/status"))
    }

    #[tokio::test]
    async fn an_answer_is_read_also_if_the_daemon_closes_right_after_it() {
        let (head, answer) = exchange("HTTP/1.1 200 OK\r\n\r\n{\"a\": 1}").await;
        assert!(head.starts_with("GET /v1/status HTTP/1.1\r\n"), "{head}");
        assert_eq!(answer.unwrap()["a"], 1);
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_or_is_none_is_an_error() {
        for bad in ["", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "garbage\r\n\r\n"] {
            let (_, answer) = exchange(bad).await;
            assert!(matches!(answer, Err(CtlError::TryAgain(_))), "{bad}: {answer:?}");
        }
        let (_, answer) = exchange("HTTP/1.1 200 OK\r\n\r\nhello").await;
        assert!(matches!(answer, Err(CtlError::Bug(_))), "{answer:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let absent = Client::new(dir.path().join("none"));
        let dead = Client::new(dir.path().join("dead"));
        drop(UnixListener::bind(dir.path().join("dead")).unwrap());
        for client in [absent, dead] {
            let error = client.status().await.unwrap_err();
            assert_eq!(error.code(), 75);
            assert!(error.to_string().contains("systemctl start enclaved"), "{error}");
        }
    }

    #[test]
    fn refusals_have_exit_codes_of_their_own() {
        let code = |status: u16, body: &str| {
            answer(StatusCode::from_u16(status).unwrap(), body.as_bytes()).unwrap_err().code()
        };
        assert_eq!(code(422, r#"{"error": "x"}"#), 78);
        assert_eq!(code(503, r#"{"error": "x"}"#), 75);
        assert_eq!(code(404, r#"{"error": "x"}"#), 64);
        assert_eq!(code(500, r#"{"error": "x"}"#), 70);
        assert_eq!(code(200, "x"), 70);
    }
}
