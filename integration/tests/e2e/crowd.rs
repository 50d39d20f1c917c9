//! Clients of the ingress that keep their connections, of both protocols, and ask without a pause: short requests, bodies both ways,
//! and answers that take their time. Counts, and says what failed. No test's expectations.

use crate::fixture::DEADLINE;
use crate::traffic::Client;
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use enclaved_integration::enclave::Answer;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::BTreeMap;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long the slow answers take: shorter than the drain of the hosts here, and longer than an update's switch.
const SLOW_MILLIS: u64 = 800;
/// What is sent and sent back.
const WORDS: Bytes = Bytes::from_static(&[b'w'; 20_000]);

/// What is asked.
#[derive(Debug, Clone, Copy)]
enum Ask {
    /// A GET that goes on through egress to the upstream.
    Get,
    /// A POST whose body comes back.
    Post,
    /// A GET whose answer takes [`SLOW_MILLIS`].
    Slow,
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// How often each label answered [`Ask::Get`].
    pub(crate) labels: BTreeMap<String, u32>,
    /// Other requests that were answered as they must be.
    pub(crate) bodies: u32,
    pub(crate) slow: u32,
    /// Requests that were told to come again, by a 503 with `Retry-After`.
    pub(crate) told_to_wait: u32,
    /// What went wrong otherwise, request by request.
    pub(crate) failures: Vec<String>,
    /// Connections that were made.
    pub(crate) connections: u32,
}

/// The clients, until they are ended.
pub(crate) struct Crowd {
    stop: CancellationToken,
    clients: JoinSet<Tally>,
}

impl Crowd {
    /// How many connections it keeps.
    pub(crate) const CONNECTIONS: u32 = 8;

    /// Begins; returns when every connection is made.
    pub(crate) async fn gather(client: &Client) -> Self {
        let stop = CancellationToken::new();
        let mut clients = JoinSet::new();
        for http2 in [false, true] {
            for asks in [&[Ask::Get][..], &[Ask::Post], &[Ask::Slow], &[Ask::Get, Ask::Slow, Ask::Post]] {
                let mut one = Kept { client: client.clone(), http2, sender: None, tally: Tally::default() };
                one.ready().await.unwrap();
                let stopped = stop.clone();
                clients.spawn(async move {
                    for ask in asks.iter().cycle() {
                        // However soon what is tested is over, there were some that took their time.
                        let enough = one.tally.slow > 1 || !asks.iter().any(|ask| matches!(ask, Ask::Slow));
                        if stopped.is_cancelled() && (enough || !one.tally.failures.is_empty()) {
                            break;
                        }
                        one.ask_and_note(*ask).await;
                    }
                    one.tally
                });
            }
        }
        Self { stop, clients }
    }

    /// Ends them; what became of all their requests.
    pub(crate) async fn disperse(self) -> Tally {
        self.stop.cancel();
        let mut sum = Tally::default();
        for tally in self.clients.join_all().await {
            for (label, count) in tally.labels {
                *sum.labels.entry(label).or_default() += count;
            }
            sum.bodies += tally.bodies;
            sum.slow += tally.slow;
            sum.told_to_wait += tally.told_to_wait;
            sum.failures.extend(tally.failures);
            sum.connections += tally.connections;
        }
        sum
    }
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// A client with one connection.
struct Kept {
    client: Client,
    http2: bool,
    /// And what carries its connection, which ends with it.
    sender: Option<(Sender, JoinSet<()>)>,
    tally: Tally,
}

impl Kept {
    async fn ask_and_note(&mut self, ask: Ask) {
        let outcome = timeout(DEADLINE, self.ask(ask)).await.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer")));
        if let Err(error) = outcome {
            self.tally.failures.push(format!("{ask:?} over HTTP/{}: {error:#}", if self.http2 { 2 } else { 1 }));
            self.sender = None;
        }
    }

    async fn ask(&mut self, ask: Ask) -> anyhow::Result<()> {
        self.ready().await?;
        let Some((sender, _)) = &mut self.sender else { anyhow::bail!("no connection") };
        let (method, path, body) = match ask {
            Ask::Get => (Method::GET, "/".to_owned(), Bytes::new()),
            Ask::Post => (Method::POST, "/echo".to_owned(), WORDS),
            Ask::Slow => (Method::GET, format!("/slow?ms={SLOW_MILLIS}"), Bytes::new()),
        };
        let domain = self.client.domain();
        let request = Request::builder().method(method);
        let answer = match sender {
            Sender::Http1(sender) => {
                let request = request.uri(path).header("host", domain).body(Full::new(body))?;
                sender.send_request(request).await
            }
            Sender::Http2(sender) => {
                let request = request.uri(format!("https://{domain}{path}")).body(Full::new(body))?;
                sender.send_request(request).await
            }
        };
        let answer = answer.context("sending")?;
        let (status, told) = (answer.status(), answer.headers().contains_key("retry-after"));
        let body = answer.into_body().collect().await.context("reading the answer")?.to_bytes();
        if status == 503 && told {
            self.tally.told_to_wait += 1;
            return Ok(());
        }
        ensure!(status == 200, "{status}: {body:?}");
        match ask {
            Ask::Get => {
                let answer: Answer = serde_json::from_slice(&body)?;
                *self.tally.labels.entry(answer.label).or_default() += 1;
            }
            Ask::Post => {
                ensure!(body == WORDS, "{} bytes came back", body.len());
                self.tally.bodies += 1;
            }
            Ask::Slow => {
                ensure!(body == "done\n", "{body:?}");
                self.tally.slow += 1;
            }
        }
        Ok(())
    }

    /// Makes a connection if there is none, or the last was closed while nothing was asked over it.
    async fn ready(&mut self) -> anyhow::Result<()> {
        let open = match &mut self.sender {
            Some((Sender::Http1(sender), _)) => sender.ready().await.is_ok(),
            Some((Sender::Http2(sender), _)) => sender.ready().await.is_ok(),
            None => false,
        };
        if open {
            return Ok(());
        }
        let protocol: &[u8] = if self.http2 { b"h2" } else { b"http/1.1" };
        let io = TokioIo::new(self.client.connect(Some(protocol)).await.context("connecting")?);
        let mut carrier = JoinSet::new();
        let sender = if self.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            carrier.spawn(async move { drop(connection.await) });
            Sender::Http2(sender)
        } else {
            let (sender, connection) = http1::handshake(io).await?;
            carrier.spawn(async move { drop(connection.await) });
            Sender::Http1(sender)
        };
        self.tally.connections += 1;
        self.sender = Some((sender, carrier));
        Ok(())
    }
}
