//! A server with one object, as S3 or any web server has it: honours Range and If-Match, and does to single requests what a test
//! wants. It looks at no signature.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) range: Option<Range<u64>>,
    pub(super) if_match: Option<String>,
    /// Of the Authorization header, or empty.
    pub(super) authorization: String,
}

impl Asked {
    /// Whether it is for the part that begins there.
    pub(super) fn is_part(&self, begin: u64) -> bool {
        self.method == "GET" && self.range.as_ref().is_some_and(|range| range.start == begin && *range != (0..1))
    }
}

/// What is done to a request.
#[derive(Debug, Clone)]
pub(super) enum Deed {
    Serve,
    /// This status, S3's code, and other headers.
    Refuse(u16, &'static str, Vec<(&'static str, String)>),
    /// So many bytes, then the connection is closed.
    BreakOff(usize),
    /// No answer until the connection is closed.
    Hang,
    /// All of it, whatever was asked for.
    Whole,
    /// The byte at that place of what is sent is another.
    Corrupt(usize),
}

pub(super) fn refuse(status: u16, code: &'static str) -> Deed {
    Deed::Refuse(status, code, Vec::new())
}

#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) bytes: Vec<u8>,
    pub(super) etag: Option<String>,
    pub(super) headers: Vec<(&'static str, String)>,
}

/// The server, until it is dropped.
pub(super) struct Server {
    address: SocketAddr,
    object: Arc<Mutex<Object>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    _tasks: JoinSet<()>,
}

type Does = dyn Fn(&Asked, usize) -> Deed + Send + Sync;

impl Server {
    /// Has these bytes. `does` is told each request, and how many equal ones came before it.
    pub(super) async fn with(bytes: Vec<u8>, does: impl Fn(&Asked, usize) -> Deed + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let object = Object { bytes, etag: Some("\"one\"".to_owned()), headers: Vec::new() };
        let (object, asked) = (Arc::new(Mutex::new(object)), Arc::<Mutex<Vec<Asked>>>::default());
        let mut tasks = JoinSet::new();
        let (of_task, seen, does) = (Arc::clone(&object), Arc::clone(&asked), Arc::new(does));
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (object, seen, does) = (Arc::clone(&of_task), Arc::clone(&seen), Arc::clone(&does));
                // A client that hangs up early is one of the cases.
                clients.spawn(async move { drop(serve(stream, &object, &seen, &*does).await) });
            }
        });
        Self { address, object, asked, _tasks: tasks }
    }

    pub(super) async fn of(bytes: Vec<u8>) -> Self {
        Self::with(bytes, |_, _| Deed::Serve).await
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Puts another object in its place.
    pub(super) fn put(&self, bytes: Vec<u8>, etag: &str) {
        let mut object = self.object.lock().unwrap();
        *object = Object { bytes, etag: Some(etag.to_owned()), headers: Vec::new() };
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Object)) {
        change(&mut self.object.lock().unwrap());
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Where the ranges began that were asked for, in order, without looks.
    pub(super) fn parts(&self) -> Vec<u64> {
        let mut parts: Vec<u64> = self
            .asked()
            .iter()
            .filter(|asked| asked.range != Some(0..1))
            .filter_map(|asked| asked.range.as_ref().map(|range| range.start))
            .collect();
        parts.sort_unstable();
        parts
    }
}

async fn serve(
    stream: TcpStream,
    object: &Mutex<Object>,
    seen: &Mutex<Vec<Asked>>,
    does: &Does,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let mut asked = Asked { method, path, range: None, if_match: None, authorization: String::new() };
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? <= 2 {
                break;
            }
            let (name, value) = line.trim_end().split_once(": ").unwrap();
            match name.to_ascii_lowercase().as_str() {
                "range" => {
                    let (first, last) = value.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                    asked.range = Some(first.parse().unwrap()..last.parse::<u64>().unwrap() + 1);
                }
                "if-match" => asked.if_match = Some(value.to_owned()),
                "authorization" => asked.authorization = value.to_owned(),
                _ => {}
            }
        }
        let before = {
            let mut seen = seen.lock().unwrap();
            let same =
                |one: &&Asked| (&one.method, &one.range, &one.path) == (&asked.method, &asked.range, &asked.path);
            let before = seen.iter().filter(same).count();
            seen.push(asked.clone());
            before
        };
        let deed = does(&asked, before);
        // As it is after the deed, which may have replaced it.
        let object = object.lock().unwrap().clone();
        if matches!(deed, Deed::Hang) {
            return std::future::pending().await;
        }
        let (head, body) = answer(&asked, &deed, object);
        stream.write_all(head.as_bytes()).await?;
        if asked.method == "HEAD" {
            continue;
        }
        match deed {
            Deed::BreakOff(after) if after < body.len() => {
                stream.write_all(&body[..after]).await?;
                return stream.shutdown().await;
            }
            _ => stream.write_all(&body).await?,
        }
    }
}

fn answer(asked: &Asked, deed: &Deed, object: Object) -> (String, Vec<u8>) {
    let error = |status: u16, code: &str, headers: &[(&str, String)]| {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>said so</Message></Error>");
        let mut head =
            format!("HTTP/1.1 {status} x\r\ncontent-type: application/xml\r\ncontent-length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| write!(head, "{name}: {value}\r\n").unwrap());
        (head + "\r\n", body.into_bytes())
    };
    if let Deed::Refuse(status, code, headers) = deed {
        return error(*status, code, headers);
    }
    if asked.if_match.is_some() && asked.if_match != object.etag {
        return error(412, "PreconditionFailed", &[]);
    }
    let size = object.bytes.len() as u64;
    let range = asked.range.clone().filter(|_| !matches!(deed, Deed::Whole));
    if range.as_ref().is_some_and(|range| range.start >= size) {
        return error(416, "InvalidRange", &[]);
    }
    let mut head = format!("HTTP/1.1 {} x\r\n", if range.is_some() { 206 } else { 200 });
    let mut body = match range {
        Some(range) => {
            let end = range.end.min(size);
            write!(head, "content-range: bytes {}-{}/{size}\r\n", range.start, end - 1).unwrap();
            object.bytes[usize::try_from(range.start).unwrap()..usize::try_from(end).unwrap()].to_vec()
        }
        None => object.bytes,
    };
    if let Deed::Corrupt(at) = deed
        && let Some(byte) = body.get_mut(*at)
    {
        *byte ^= 0xff;
    }
    if let Some(etag) = object.etag {
        write!(head, "etag: {etag}\r\n").unwrap();
    }
    // What S3 says only to those who ask for it.
    if asked.method == "HEAD" {
        object.headers.iter().for_each(|(name, value)| write!(head, "{name}: {value}\r\n").unwrap());
    }
    write!(head, "content-length: {}\r\n\r\n", body.len()).unwrap();
    (head, body)
}
