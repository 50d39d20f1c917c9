//! Floods of frames that cost their sender nothing. Each ends, or is not read on, or costs no memory; whoever else asks is answered
//! meanwhile, and when it is over the proxy rests.

use crate::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, End, GOAWAY, HEADERS, LARGEST_WINDOW, Method, PING, PRIORITY,
    RST_STREAM, Reads, SETTINGS, UNKNOWN, WHOLE, WINDOW_UPDATE, flood, frame, head, next_frame, preface,
};
use crate::proxy::{DOMAIN, run};
use std::iter::once;
use std::net::Ipv4Addr;
use tokio::io::AsyncWriteExt as _;

const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Bytes of a flood that nobody ends, and of one whose sender reads nothing: more than sockets hold of what it makes the proxy say.
const FLOOD: usize = 3 << 20;
const DEAF_FLOOD: usize = 24 << 20;
/// What one connection may add to the proxy's memory while it floods, and a stranger's request beside it.
const GROWTH_MIB: f64 = 6.0;

/// This frame again and again, many in a piece.
fn again(frame: &[u8]) -> impl Iterator<Item = Vec<u8>> + use<> {
    bytes_of(frame, FLOOD)
}

fn bytes_of(frame: &[u8], bytes: usize) -> impl Iterator<Item = Vec<u8>> + use<> {
    let piece = frame.repeat((16 << 10) / frame.len() + 1);
    let count = bytes / piece.len();
    std::iter::repeat_n(piece, count)
}

/// Numbers of a client's streams.
fn streams() -> impl Iterator<Item = u32> {
    (1..).step_by(2)
}

/// A request of so many on one connection, of which each is followed by what makes it end.
fn requests(path: &'static str, count: usize, then: impl Fn(u32) -> Vec<u8>) -> impl Iterator<Item = Vec<u8>> {
    streams()
        .take(count)
        .map(move |stream| [frame(HEADERS, WHOLE, stream, &head(Method::Get, path)), then(stream)].concat())
}

struct Flood {
    what: &'static str,
    reads: Reads,
    pieces: Box<dyn Iterator<Item = Vec<u8>>>,
    /// How it may end.
    ends: &'static [End],
}

#[test]
fn floods_of_frames_end_or_are_not_read_on_and_cost_neither_memory_nor_others_their_answers() {
    const BOUNDED: &[End] = &[End::Ended, End::Stalled];
    const ANY: &[End] = &[End::Ended, End::Stalled, End::Taken];
    let flood_of = |what, reads, ends, pieces: Box<dyn Iterator<Item = Vec<u8>>>| Flood { what, reads, pieces, ends };
    let upload = || once(frame(HEADERS, END_HEADERS, 1, &head(Method::Post, "/hold")));
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]);
    let ping = frame(PING, 0, 0, b"abcdefgh");
    let floods = [
        flood_of("SETTINGS without reading", Reads::Nothing, BOUNDED, Box::new(bytes_of(&settings, DEAF_FLOOD))),
        flood_of("SETTINGS", Reads::All, ANY, Box::new(again(&settings))),
        flood_of("PING without reading", Reads::Nothing, BOUNDED, Box::new(bytes_of(&ping, DEAF_FLOOD))),
        flood_of("PING", Reads::All, ANY, Box::new(again(&ping))),
        flood_of("PRIORITY", Reads::All, ANY, Box::new(again(&frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 16])))),
        flood_of("frames of no known kind", Reads::All, ANY, Box::new(again(&frame(UNKNOWN, 0, 0, &[0; 4000])))),
        flood_of("empty DATA", Reads::All, &[End::Ended], Box::new(upload().chain(again(&frame(DATA, 0, 1, b""))))),
        flood_of(
            "DATA of one byte",
            Reads::All,
            &[End::Ended],
            Box::new(upload().chain(again(&frame(DATA, 0, 1, b"x")))),
        ),
        flood_of("DATA of padding", Reads::All, ANY, {
            let padded = frame(DATA, 8, 1, &[&[255][..], &[0; 255]].concat());
            Box::new(upload().chain(again(&padded)))
        }),
        flood_of("headers without an end", Reads::All, &[End::Ended], {
            let begun = once(frame(HEADERS, END_STREAM, 1, &head(Method::Get, "/")));
            Box::new(begun.chain(again(&frame(
                CONTINUATION,
                0,
                1,
                &[&b"\x00\x01x\x7f\xa1\x1e"[..], &[b'y'; 4000]].concat(),
            ))))
        }),
        flood_of("empty CONTINUATION", Reads::All, &[End::Ended], {
            let begun = once(frame(HEADERS, END_STREAM, 1, &head(Method::Get, "/")));
            Box::new(begun.chain(again(&frame(CONTINUATION, 0, 1, b""))))
        }),
        flood_of(
            "windows that grow by nothing",
            Reads::All,
            &[End::Ended],
            Box::new(again(&frame(WINDOW_UPDATE, 0, 0, &[0; 4]))),
        ),
        flood_of("windows that grow too large", Reads::All, &[End::Ended], {
            Box::new(again(&frame(WINDOW_UPDATE, 0, 0, &LARGEST_WINDOW.to_be_bytes())))
        }),
        flood_of("requests taken back at once", Reads::All, &[End::Ended], {
            let taken_back = |stream| frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            // Many in a piece: that nobody has looked at them yet is what it is about.
            let pieces: Vec<_> = requests("/hold", 20_000, taken_back).collect();
            Box::new(pieces.chunks(100).map(<[_]>::concat).collect::<Vec<_>>().into_iter())
        }),
        flood_of("requests that the server must reset", Reads::All, &[End::Ended], {
            Box::new(requests("/hold", 20_000, |stream| frame(WINDOW_UPDATE, 0, stream, &LARGEST_WINDOW.to_be_bytes())))
        }),
        flood_of("more requests than may be in flight", Reads::All, &[End::Ended], {
            Box::new(requests("/hold", 20_000, |_| Vec::new()))
        }),
    ];
    run(async |proxy| {
        // What is allocated once.
        proxy.serves().await;
        for Flood { what, reads, pieces, ends } in floods {
            let before = proxy.memory_mib();
            let tls = proxy.tls(b"h2", SOURCE).await;
            let (end, flooded) = flood(tls, reads, once(preface(65_535, 65_535)).chain(pieces)).await;
            assert!(ends.contains(&end), "{what}: {end:?} after {} bytes", flooded.sent);
            proxy.serves().await;
            let grown = proxy.memory_mib() - before;
            eprintln!("{what}: {end:?} after {} bytes, {grown:.1} MiB", flooded.sent);
            assert!(grown <= GROWTH_MIB, "{what}: {grown:.1} MiB more after {} bytes", flooded.sent);
            drop(flooded);
            proxy.until("the flooding connection is over", |report| report.https_connections == 0).await;
        }
        proxy.rests().await;
        assert_eq!(proxy.report().panics, 0, "{:?}", proxy.report());
    });
}

#[test]
fn requests_over_http_1_whose_answers_nobody_reads_are_not_read_on() {
    run(async |proxy| {
        proxy.serves().await;
        let before = proxy.memory_mib();
        let tls = proxy.tls(b"http/1.1", SOURCE).await;
        let request = format!("GET / HTTP/1.1\r\nhost: {DOMAIN}\r\n\r\n");
        let (end, flooded) = flood(tls, Reads::Nothing, bytes_of(request.as_bytes(), DEAF_FLOOD)).await;
        assert_eq!(end, End::Stalled, "after {} bytes", flooded.sent);
        proxy.serves().await;
        let grown = proxy.memory_mib() - before;
        assert!(grown <= GROWTH_MIB, "{grown:.1} MiB more after {} bytes", flooded.sent);
    });
}

#[test]
fn requests_taken_back_while_their_enclave_has_them_end_the_connection_that_does_nothing_else() {
    run(async |proxy| {
        let mut tls = proxy.tls(b"h2", SOURCE).await;
        let mut said = preface(65_535, 65_535);
        let (mut asked, mut numbers) = (0, streams());
        // One of each pair is answered, so the other is with its enclave when it is taken back.
        let ended = loop {
            let (held, well) = (numbers.next().unwrap(), numbers.next().unwrap());
            said.extend(frame(HEADERS, WHOLE, held, &head(Method::Get, "/hold")));
            if asked % 4 == 0 {
                said.extend(frame(HEADERS, WHOLE, well, &head(Method::Get, "/")));
            } else {
                said.extend(frame(PING, 0, 0, b"abcdefgh"));
            }
            asked += 1;
            if tls.write_all(&said).await.is_err() || tls.flush().await.is_err() {
                break asked;
            }
            let answered = loop {
                match next_frame(&mut tls).await {
                    // To the PING, or the end of the answer.
                    Some((PING, ..)) => break true,
                    Some((DATA, stream, _)) if stream == well => break true,
                    Some((GOAWAY, ..)) | None => break false,
                    Some(_) => {}
                }
            };
            if !answered {
                break asked;
            }
            said = frame(RST_STREAM, 0, held, &8_u32.to_be_bytes());
            assert!(asked < 5000, "{asked} requests were taken back, and the connection goes on");
        };
        assert!(ended >= 500, "the connection ended after {ended}: a browser may do that");
        proxy.serves().await;
        proxy.until("nothing is in flight", |report| report.https_connections == 0).await;
    });
}

#[test]
fn headers_that_grow_when_they_are_unpacked_are_refused_by_their_size_and_cost_nothing() {
    run(async |proxy| {
        proxy.serves().await;
        let before = proxy.memory_mib();
        // `x: ` and 4,000 bytes, which the table keeps; then that entry (62) again and again: 80 KB, and 48 MB, in one frame each.
        let kept = [&b"\x40\x01x\x7f\xa1\x1e"[..], &[b'y'; 4000]].concat();
        for (times, expected) in [(20, "431"), (12_000, "the end")] {
            let bomb = [head(Method::Get, "/"), kept.clone(), vec![0xbe; times]].concat();
            let mut tls = proxy.tls(b"h2", SOURCE).await;
            tls.write_all(&preface(65_535, 65_535)).await.unwrap();
            for stream in streams().take(50) {
                tls.write_all(&frame(HEADERS, WHOLE, stream, &bomb)).await.unwrap();
                tls.flush().await.unwrap();
                let answer = loop {
                    match next_frame(&mut tls).await {
                        // 431 as a literal (`:status` is entry 8 of the static table), in Huffman's code or not.
                        Some((HEADERS, of, block)) if of == stream => {
                            let literal = [&b"\x03431"[..], b"\x83\x69\x90\xff"];
                            let is = |text: &&[u8]| block.windows(text.len()).any(|part| part == *text);
                            // After the first it is in the table.
                            break if literal.iter().any(is) || block[0] >= 0xbe { "431" } else { "another" };
                        }
                        Some((RST_STREAM, of, _)) if of == stream => break "a reset",
                        Some((GOAWAY, ..)) | None => break "the end",
                        Some(_) => {}
                    }
                };
                assert_eq!(answer, expected, "to the request of stream {stream}");
                if answer == "the end" {
                    break;
                }
            }
        }
        proxy.serves().await;
        let grown = proxy.memory_mib() - before;
        assert!(grown <= GROWTH_MIB, "{grown:.1} MiB more");
    });
}
