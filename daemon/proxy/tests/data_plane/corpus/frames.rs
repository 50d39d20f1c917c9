//! Frames of HTTP/2 by hand: headers that no library would send, and answers as far as they are of interest.

use std::collections::BTreeMap;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A header as HPACK has it without tables and Huffman (RFC 7541, 6.2.2).
fn literal(line: &[u8]) -> Vec<u8> {
    // A pseudo-header begins with a colon, so the name ends with the first space.
    let at = line.iter().position(|byte| *byte == b' ').unwrap();
    let (name, value) = (&line[..at], &line[at + 1..]);
    let mut coded = vec![0];
    for text in [name, value] {
        coded.extend(length(text.len()));
        coded.extend_from_slice(text);
    }
    coded
}

/// An integer with a prefix of seven bits (RFC 7541, 5.1).
fn length(number: usize) -> Vec<u8> {
    let Some(mut rest) = number.checked_sub(127) else { return vec![u8::try_from(number).unwrap()] };
    let mut coded = vec![127];
    while rest >= 128 {
        coded.push(u8::try_from(rest % 128 + 128).unwrap());
        rest /= 128;
    }
    coded.push(u8::try_from(rest).unwrap());
    coded
}

/// `>h name value` is a header of the request, `>d bytes` a frame of its body, `>e name value` a trailer, `>x` ends it. What
/// comes without `>x` ends with its last frame.
pub(super) fn sent(lines: &[(String, Vec<u8>)]) -> Vec<u8> {
    let of = |wanted: &str| -> Vec<_> {
        lines.iter().filter(|(mark, _)| mark == wanted).map(|(_, bytes)| bytes.clone()).collect()
    };
    let (headers, body, trailers) = (of(">h"), of(">d"), of(">e"));
    let open = lines.iter().any(|(mark, _)| mark == ">x");
    let block = |headers: &[Vec<u8>]| headers.iter().flat_map(|header| literal(header)).collect::<Vec<_>>();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    let mut frames = vec![(HEADERS, block(&headers))];
    frames.extend(body.into_iter().map(|data| (DATA, data)));
    if !trailers.is_empty() {
        frames.push((HEADERS, block(&trailers)));
    }
    let last = frames.len() - 1;
    for (number, (kind, payload)) in frames.into_iter().enumerate() {
        let ends = if number == last && !open { END_STREAM } else { 0 };
        bytes.extend(frame(kind, ends | if kind == HEADERS { END_HEADERS } else { 0 }, 1, &payload));
    }
    bytes.extend(frame(SETTINGS, ACK, 0, &[]));
    bytes
}

/// The status, or how the stream or the connection was ended.
pub(super) fn answers(mut bytes: &[u8]) -> Vec<String> {
    let mut found = BTreeMap::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, rest)) = rest.split_at_checked(length) else { break };
        let code = |at: usize| payload.get(at..at + 4).map(|code| u32::from_be_bytes(code.try_into().unwrap()));
        match head[3] {
            HEADERS => {
                found.entry(0).or_insert_with(|| status(payload));
            }
            RST_STREAM => {
                found.entry(1).or_insert_with(|| format!("reset {}", code(0).unwrap()));
            }
            // 0 is how a connection ends that is idle.
            GOAWAY if code(4) != Some(0) => {
                found.entry(2).or_insert_with(|| format!("gone {}", code(4).unwrap()));
            }
            _ => {}
        }
        bytes = rest;
    }
    if found.is_empty() { vec!["hung up".to_owned()] } else { found.into_values().collect() }
}

/// The status, which is the first header.
fn status(block: &[u8]) -> String {
    // A change of the table's size may come before it (RFC 7541, 6.3).
    let at = block.iter().position(|byte| byte & 0xe0 != 0x20).unwrap();
    let indexed = ["200", "204", "206", "304", "400", "404", "500"];
    let (first, rest) = (block[at], &block[at + 1..]);
    if (0x88..=0x8e).contains(&first) {
        return indexed[usize::from(first - 0x88)].to_owned();
    }
    let (huffman, length) = (rest[0] & 0x80 != 0, usize::from(rest[0] & 0x7f));
    let text = &rest[1..=length];
    if huffman { digits(text) } else { String::from_utf8(text.to_vec()).unwrap() }
}

/// Digits in HPACK's Huffman code: 0 to 2 have five bits, the others six (RFC 7541, appendix B).
fn digits(coded: &[u8]) -> String {
    let bits: Vec<u32> =
        coded.iter().flat_map(|byte| (0..8).rev().map(move |bit| u32::from(byte >> bit & 1))).collect();
    let number = |bits: &[u32]| bits.iter().fold(0, |number, bit| number * 2 + bit);
    let (mut at, mut text) = (0, String::new());
    while text.len() < 3 {
        let (digit, length) = match number(&bits[at..at + 5]) {
            short @ 0..=2 => (short, 5),
            _ => (number(&bits[at..at + 6]) - 0x19 + 3, 6),
        };
        text.push(char::from_digit(digit, 10).unwrap());
        at += length;
    }
    text
}
