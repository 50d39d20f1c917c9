//! Requests that mean to be read in two ways: for each of `corpus/*.txt`, what its client gets and every byte that reaches the
//! enclave. Beside it stands what nginx does with the same bytes; `corpus/record` writes both anew.

mod file;
mod frames;
mod nginx;
mod upstream;

use crate::support::{Host, https_address, soon};
use enclaved_core::routes::Routes;
use file::{Case, Corpus, Verdict};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use upstream::Recorder;

/// How long the proxy waits for more of a request here: each case ends with that.
const WAIT: Duration = Duration::from_millis(250);

/// Proxies at a time.
const WORKERS: usize = 6;

/// What writes the verdicts anew: `ours`, or `nginx` for its.
const RECORD: &str = "ENCLAVED_RECORD_VERDICTS";

#[tokio::test(flavor = "multi_thread")]
async fn each_request_of_the_corpus_is_answered_and_reaches_the_enclave_as_it_is_written_there() {
    both_ways("requests.txt", 60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_http2_request_of_the_corpus_is_answered_and_reaches_the_enclave_as_it_is_written_there() {
    both_ways("http2.txt", 20).await;
}

async fn both_ways(name: &str, at_least: usize) {
    let mut corpus = Corpus::read(name);
    assert!(corpus.cases.len() >= at_least);
    match std::env::var(RECORD).as_deref() {
        Ok("ours") => {
            let seen = ours(&corpus.cases).await;
            corpus.cases.iter_mut().zip(seen).for_each(|(case, seen)| case.ours = seen);
            corpus.write();
        }
        Ok("nginx") => {
            let seen = nginx::verdicts(&corpus.cases).await;
            corpus.cases.iter_mut().zip(seen).for_each(|(case, seen)| case.nginx = seen);
            corpus.write();
        }
        Ok(other) => panic!("{RECORD}={other}: ours or nginx"),
        Err(_) => {
            let mut differ = Vec::new();
            for (case, seen) in corpus.cases.iter().zip(ours(&corpus.cases).await) {
                if seen != case.ours {
                    differ.push(format!("[{}] was:\n{}and is:\n{}", case.name, case.ours.text(""), seen.text("")));
                }
                assert!(!case.nginx.answers.is_empty(), "[{}] lacks nginx's verdict: see corpus/record", case.name);
            }
            assert!(differ.is_empty(), "{}", differ.join("\n"));
        }
    }
}

/// What our proxy does with each.
async fn ours(cases: &[Case]) -> Vec<Verdict> {
    let left: VecDeque<_> = cases.iter().cloned().enumerate().collect();
    let left = Arc::new(Mutex::new(left));
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        let left = left.clone();
        workers.spawn(async move {
            let host = Host::with_limits(|limits| {
                limits.request_head = WAIT;
                limits.request_body = WAIT;
                // Also how long a client of HTTP/2 may take to go once it was told to.
                limits.handshake = 4 * WAIT;
                limits.answer = 20 * WAIT;
            })
            .await;
            let mut verdicts = Vec::new();
            loop {
                let Some((number, case)) = left.lock().unwrap().pop_front() else { return verdicts };
                verdicts.push((number, one(&host, &case).await));
            }
        });
    }
    let mut verdicts: Vec<_> = workers.join_all().await.into_iter().flatten().collect();
    verdicts.sort_by_key(|(number, _)| *number);
    verdicts.into_iter().map(|(_, verdict)| verdict).collect()
}

async fn one(host: &Host, case: &Case) -> Verdict {
    let recorder = Recorder::new();
    let enclave = recorder.enclave(&host.vsock(), 16);
    let routes = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&routes).await);
    let answers = soon(&case.name, exchange(host, address, case)).await;
    // Every connection to the enclave ends, so that all it got is known.
    host.publish(&Routes { sites: Vec::new(), live: Vec::new(), ..routes }).await;
    let got = soon("the end of all connections to the enclave", recorder.all()).await;
    drop(enclave);
    Verdict { answers, got: told(&got) }
}

/// Sends a case to a server on that address, and says what came back.
async fn exchange(host: &Host, address: SocketAddr, case: &Case) -> Vec<String> {
    let alpn: &[u8] = if case.is_http2() { b"h2" } else { b"http/1.1" };
    let tls = host.tls(address, "a.test", alpn).await.unwrap();
    converse(tls, case).await
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Send, case: &Case) -> Vec<String> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    // A server may have seen enough before the end, and not read it.
    let writing = async {
        drop(writer.write_all(&case.sent()).await);
        drop(writer.flush().await);
        std::future::pending::<()>().await;
    };
    let mut answer = Vec::new();
    tokio::select! {
        // A close without close_notify is an error to rustls, and as good an end as any here.
        read = reader.read_to_end(&mut answer) => drop(read),
        () = writing => {}
    }
    if case.is_http2() { frames::answers(&answer) } else { file::statuses(&answer) }
}

/// What the proxy tells of client and request, in the place of which there is one word.
const TOLD: &str =
    "x-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: https\r\nx-forwarded-host: a.test\r\nx-request-id: ID\r\n";

fn told(got: &[u8]) -> Vec<u8> {
    let mut text: Vec<u8> = Vec::new();
    for line in got.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_prefix(b"x-request-id: ") {
            // Every id is another.
            Some(id) if id.contains(&b'-') => text.extend_from_slice(b"x-request-id: ID\r\n"),
            _ => text.extend_from_slice(line),
        }
    }
    let mut short = Vec::new();
    let mut rest = &text[..];
    while let Some(at) = rest.windows(TOLD.len()).position(|window| window == TOLD.as_bytes()) {
        short.extend_from_slice(&rest[..at]);
        short.extend_from_slice(b"$TOLD\n");
        rest = &rest[at + TOLD.len()..];
    }
    short.extend_from_slice(rest);
    short
}
