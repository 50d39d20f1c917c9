//! What is sent ahead of those who take it: answers that clients do not read, and uploads that enclaves do not. What of it is held in
//! the proxy has bounds, for a client and for all of them.

use crate::frames::{
    DATA, END_HEADERS, End, HEADERS, LARGEST_WINDOW, Method, Reads, UNKNOWN, WHOLE, flood, frame, head, preface,
};
use crate::proxy::run;
use std::iter::once;
use std::net::Ipv4Addr;

/// What one request may cost while its answer is not taken: see ARCHITECTURE.
const ANSWER_KIB: f64 = 192.0;
/// What all clients' uploads may cost that enclaves do not take: 16 KiB for each connection of the limit, 8192, and what each of these
/// few may have beyond that.
const AHEAD_MIB: f64 = 128.0 + 16.0;

fn source(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, number)
}

#[test]
fn answers_that_nobody_reads_cost_no_more_than_a_few_buffers_each() {
    // As many as one connection may ask for, with windows that let everything come: what holds it up is the socket; and with
    // windows of one byte for each answer.
    for (what, window, count) in [("without reading", LARGEST_WINDOW, 128), ("byte by byte", 1, 128)] {
        run(async |proxy| {
            proxy.serves().await;
            let before = proxy.memory_mib();
            let tls = proxy.tls(b"h2", source(1)).await;
            let asking = (1..).step_by(2).take(count).map(|stream| frame(HEADERS, WHOLE, stream, &head(Method::Get, "/big")));
            let (end, _held) = flood(tls, Reads::Nothing, once(preface(window, LARGEST_WINDOW)).chain(asking)).await;
            assert_eq!(end, End::Taken);
            proxy.until("all are in flight", |report| report.traffic.iter().any(|traffic| traffic.open >= 128)).await;
            proxy.rests().await;
            proxy.serves().await;
            let each = (proxy.memory_mib() - before) * 1024.0 / 128.0;
            eprintln!("{what}: {each:.0} KiB each");
            assert!(each <= ANSWER_KIB, "{what}: {each:.0} KiB each");
        });
    }
}

#[test]
fn uploads_that_no_enclave_takes_share_one_budget_however_they_are_cut_into_frames() {
    // Small frames of a body, each among so much that is none that it keeps a buffer of its own: for a mebibyte of window, some
    // sixty that nobody takes.
    let upload = |stream: u32| once(frame(HEADERS, END_HEADERS, stream, &head(Method::Post, "/hold")));
    let wide = || [frame(UNKNOWN, 0, 0, &vec![0; std::env::var("WIDE").map_or(16_000, |w| w.parse().unwrap())]), Vec::new()].concat();
    run(async |proxy| {
        proxy.serves().await;
        let before = proxy.memory_mib();
        let mut held = Vec::new();
        for number in 0..8 {
            let tls = proxy.tls(b"h2", source(number + 1)).await;
            let pieces = (0..3000_u32).map(|round| {
                let stream = 1 + 2 * (round % 4);
                let begun = if round < 4 { upload(stream).next().unwrap() } else { Vec::new() };
                [begun, frame(DATA, 0, stream, &[b'd'; 300]), wide()].concat()
            });
            let (end, flooded) = flood(tls, Reads::All, once(preface(65_535, 65_535)).chain(pieces)).await;
            eprintln!("{number}: {end:?} after {} KiB, {:.1} MiB", flooded.sent >> 10, proxy.memory_mib() - before);
            held.push(flooded);
        }
        proxy.serves().await;
        let grown = proxy.memory_mib() - before;
        assert!(grown <= AHEAD_MIB, "{grown:.1} MiB more");
        drop(held);
        proxy.until("all are over", |report| report.https_connections == 0).await;
        proxy.rests().await;
    });
}
