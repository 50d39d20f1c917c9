//! A server of one file that costs as little as can be, so that it is not what is measured: a thread for each connection,
//! `sendfile` for the contents. It speaks as much HTTP as S3's clients need to get an object, whose path it does not look
//! at, and checks no signature.

use anyhow::Context as _;
use rustix::fs::sendfile;
use s3s::crypto::{Checksum as _, Crc64Nvme};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

/// The longest line and the most lines of a request.
const LINE: u64 = 16 * 1024;
const LINES: usize = 100;
/// In the order of the bytes, as S3 writes it.
const ETAG: &str = "\"0123456789abcdef0123456789abcdef-128\"";

struct Object {
    file: File,
    size: u64,
    /// CRC64NVME of the whole, in base64.
    checksum: String,
}

/// Serves until it is killed. The first line that it prints is its URL.
pub(super) fn serve(path: &Path) -> anyhow::Result<()> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let size = file.metadata()?.len();
    let mut crc = Crc64Nvme::default();
    let mut piece = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut piece)?;
        let Some(read) = piece.get(..count).filter(|read| !read.is_empty()) else { break };
        crc.update(read);
    }
    let object = Arc::new(Object { file, size, checksum: base64(&crc.finalize()) });
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("http://{}", listener.local_addr()?);
    io::stdout().flush()?;
    for stream in listener.incoming() {
        let (stream, object) = (stream?, Arc::clone(&object));
        // Every thread ends with its connection, all with the process.
        std::thread::spawn(move || {
            // A client that goes away in the middle is nothing to report.
            let _ignored = answer_all(&stream, &object);
        });
    }
    Ok(())
}

/// What is read of a request.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    method: String,
    path: String,
    range: Option<(u64, u64)>,
    if_match: Option<String>,
    checksums: bool,
}

fn answer_all(stream: &TcpStream, object: &Object) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(asked) = read(&mut reader, object.size)? {
        answer(stream, object, &asked)?;
    }
    Ok(())
}

/// The next request; none at the end of the connection.
fn read(reader: &mut impl io::BufRead, size: u64) -> io::Result<Option<Asked>> {
    let mut asked = Asked::default();
    for number in 0..LINES {
        let mut line = String::new();
        if reader.by_ref().take(LINE).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end();
        if number == 0 {
            let mut words = line.split(' ').map(str::to_owned);
            asked.method = words.next().unwrap_or_default();
            asked.path = words.next().unwrap_or_default();
            continue;
        }
        let Some((name, value)) = line.split_once(':') else { return Ok(Some(asked)) };
        match (name.to_ascii_lowercase().as_str(), value.trim()) {
            ("range", value) => asked.range = range(value, size),
            ("if-match", value) => asked.if_match = Some(value.to_owned()),
            ("x-amz-checksum-mode", _) => asked.checksums = true,
            _ => {}
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// First byte, and the one after the last.
fn range(header: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = header.strip_prefix("bytes=")?.split_once('-')?;
    let first = first.parse().ok()?;
    let end = if last.is_empty() { size } else { last.parse::<u64>().ok()?.saturating_add(1).min(size) };
    (first < end).then_some((first, end))
}

fn answer(stream: &TcpStream, object: &Object, asked: &Asked) -> io::Result<()> {
    let mut stream = stream;
    // It is asked for the instance's credentials too, and has none.
    if asked.path.starts_with("/latest/") || !matches!(asked.method.as_str(), "GET" | "HEAD") {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    if asked.if_match.as_ref().is_some_and(|tag| tag != ETAG) {
        return stream.write_all(b"HTTP/1.1 412 Precondition Failed\r\ncontent-length: 0\r\n\r\n");
    }
    let (first, end) = asked.range.unwrap_or((0, object.size));
    let mut head = String::from("HTTP/1.1 ");
    head.push_str(if asked.range.is_some() { "206 Partial Content\r\n" } else { "200 OK\r\n" });
    if asked.range.is_some() {
        let _infallible = write!(head, "content-range: bytes {first}-{}/{}\r\n", end - 1, object.size);
    } else if asked.checksums {
        let checksum = &object.checksum;
        let _infallible = write!(head, "x-amz-checksum-crc64nvme: {checksum}\r\nx-amz-checksum-type: FULL_OBJECT\r\n");
    }
    let _infallible = write!(
        head,
        "content-length: {}\r\netag: {ETAG}\r\naccept-ranges: bytes\r\ncontent-type: binary/octet-stream\r\n\
         last-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n",
        end - first
    );
    stream.write_all(head.as_bytes())?;
    if asked.method == "HEAD" {
        return Ok(());
    }
    let mut at = first;
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 24);
        if sendfile(stream, &object.file, Some(&mut at), count)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let number =
            chunk.iter().fold(0_usize, |number, byte| number << 8 | usize::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let known = digit <= chunk.len();
            text.push(if known { char::from(DIGITS[number >> (18 - 6 * digit) & 63]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_far_as_it_matters() {
        let text = b"GET /b/k HTTP/1.1\r\nHost: x\r\nRange: bytes=10-19\r\nif-match: \"t\"\r\n\r\nGET";
        let mut reader = BufReader::new(&text[..]);
        let asked = read(&mut reader, 100).unwrap().unwrap();
        let expected = Asked {
            method: "GET".into(),
            path: "/b/k".into(),
            range: Some((10, 20)),
            if_match: Some("\"t\"".into()),
            checksums: false,
        };
        assert_eq!(asked, expected);
        assert_eq!(range("bytes=90-200", 100), Some((90, 100)));
        assert_eq!(range("bytes=5-", 100), Some((5, 100)));
        assert!(read(&mut BufReader::new(&b""[..]), 100).unwrap().is_none());
    }

    #[test]
    fn base64_is_written_as_the_standard_says() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
