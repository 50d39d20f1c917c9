//! What is sent ahead of those who take it: answers that clients do not read, and uploads that enclaves do not. What of it is held in
//! the proxy has bounds, for a client and for all of them.

use crate::frames::{
    DATA, END_HEADERS, End, HEADERS, LARGEST_WINDOW, Method, Reads, UNKNOWN, WHOLE, flood, frame, head, preface,
};
use crate::proxy::run;
use enclaved_core::routes::ProxyReport;
use std::iter::once;
use std::net::Ipv4Addr;

/// What one request may cost while its answer is not taken: see ARCHITECTURE.
const ANSWER_KIB: f64 = 192.0;
/// What one connection may cost whose uploads are not taken, with the largest window there is, 1 MiB.
const UPLOADS_MIB: f64 = 12.0;

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
            let asking =
                (1..).step_by(2).take(count).map(|stream| frame(HEADERS, WHOLE, stream, &head(Method::Get, "/big")));
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
fn uploads_that_no_enclave_takes_cost_a_few_times_their_window_however_they_are_cut_into_frames() {
    // Small frames of a body, each among so much that is none that it keeps a buffer of its own.
    let between = frame(UNKNOWN, 0, 0, &[0; 12_000]);
    run(async |proxy| {
        proxy.serves().await;
        let before = proxy.memory_mib();
        let mut held = Vec::new();
        for number in 0..4 {
            let tls = proxy.tls(b"h2", source(number + 1)).await;
            // Four requests with 256 KiB of window each.
            let pieces = (0..3400_u32).map(|round| {
                let stream = 1 + 2 * (round % 4);
                let begun = frame(HEADERS, END_HEADERS, stream, &head(Method::Post, "/hold"));
                let begun = if round < 4 { begun } else { Vec::new() };
                [begun, frame(DATA, 0, stream, &[b'd'; 300]), between.clone()].concat()
            });
            let (end, flooded) = flood(tls, Reads::All, once(preface(65_535, 65_535)).chain(pieces)).await;
            assert_eq!(end, End::Taken);
            held.push(flooded);
        }
        proxy.serves().await;
        let each = (proxy.memory_mib() - before) / 4.0;
        eprintln!("{each:.1} MiB each");
        assert!(each <= UPLOADS_MIB, "{each:.1} MiB each");
        drop(held);
        proxy.until("all are over", |report| report.https_connections == 0).await;
        proxy.rests().await;
    });
}

#[test]
fn one_source_has_no_more_requests_in_flight_than_it_may_have_connections_and_others_are_served() {
    run(async |proxy| {
        // Nine connections with 128 requests each, which no enclave answers: one connection more than there are places for.
        let mut held = Vec::new();
        for _ in 0..9 {
            let tls = proxy.tls(b"h2", source(1)).await;
            let asking = (1..).step_by(2).take(128);
            let asking = asking.map(|stream| frame(HEADERS, WHOLE, stream, &head(Method::Get, "/hold")));
            held.push(flood(tls, Reads::All, once(preface(65_535, 65_535)).chain(asking)).await);
        }
        let failed =
            |report: &ProxyReport| report.traffic.iter().filter_map(|it| it.failed.get("source_limit")).sum::<u64>();
        proxy.until("those of the last are refused", |report| failed(report) == 128).await;
        assert_eq!(proxy.report().traffic.iter().map(|traffic| traffic.open).sum::<u64>(), 1024);
        proxy.serves().await;
    });
}
