//! A tiny HTTP server that gives canned answers.

use bytes::Bytes;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What a request is answered with.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
}

impl Answer {
    pub(crate) fn status(status: u16, body: impl Into<Bytes>) -> Self {
        Self { status, headers: Vec::new(), body: body.into() }
    }

    pub(crate) fn ok(body: impl Into<Bytes>) -> Self {
        Self::status(200, body)
    }

    pub(crate) fn with_header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

type Requests = Arc<Mutex<Vec<String>>>;

/// A server on loopback, until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    requests: Requests,
    _tasks: JoinSet<()>,
}

impl Server {
    /// Answers every request by its method and path (`GET /a`).
    pub(crate) async fn open(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, answer) = (Requests::default(), Arc::new(answer));
        let mut tasks = JoinSet::new();
        let seen = requests.clone();
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, seen) = (answer.clone(), seen.clone());
                // A client that hangs up early is one of the cases.
                clients.spawn(async move { drop(serve(stream, &*answer, &seen).await) });
            }
        });
        Self { address, requests, _tasks: tasks }
    }

    /// A metadata service: hands out a session token, and answers by path to whoever has it.
    pub(crate) async fn metadata(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        Self::open(move |request| match request.split_once(' ') {
            Some(("PUT", "/latest/api/token")) => {
                Answer::ok("token").with_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
            }
            Some(("GET", path)) => answer(path),
            _ => Answer::status(405, ""),
        })
        .await
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Methods and paths of all requests so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(
    stream: TcpStream,
    answer: &(dyn Fn(&str) -> Answer + Send + Sync),
    requests: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if stream.read_line(&mut request).await? == 0 {
            return Ok(());
        }
        let mut length = 0;
        let mut line = String::new();
        while stream.read_line(&mut line).await? > 2 {
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            line.clear();
        }
        stream.read_exact(&mut vec![0; length]).await?;
        let request = request.rsplit_once(' ').unwrap().0.to_owned();
        let answer = answer(&request);
        let is_head = request.starts_with("HEAD ");
        requests.lock().unwrap().push(request);
        let mut head = format!("HTTP/1.1 {} x\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await?;
        if is_head {
            continue;
        }
        stream.write_all(&answer.body).await?;
    }
}
