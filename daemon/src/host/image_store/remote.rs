//! Somewhere afar that has an image: what the download needs of it, and what it makes of answers to ranged requests. What is
//! asked for and when is the download's.

use super::checksum::Checksum;
use super::stamp::Object;
use bytes::Bytes;
use enclaved_core::failure::Failure;
use enclaved_core::fetch::Cause;
use std::fmt;
use std::future::Future;
use std::ops::Range;

/// A place that an image is got from.
pub(super) trait Remote: Send + Sync + 'static {
    /// A body on its way.
    type Chunks: Chunks + 'static;

    /// What there is now.
    fn look(&self) -> impl Future<Output = Result<Look, Trouble>> + Send;

    /// These bytes of that object, and of no other: the answer has been checked against it. `None` asks for all of them.
    fn open(
        &self,
        object: &Object,
        range: Option<Range<u64>>,
    ) -> impl Future<Output = Result<Opened<Self::Chunks>, Trouble>> + Send;

    /// The credentials have expired: others are to be asked for.
    fn renew(&self);

    /// Where, and as whom: `s3://bucket/key as the instance's role x`.
    fn who(&self) -> String;
}

/// A body that arrives piece by piece.
pub(super) trait Chunks: Send {
    /// The next piece; `None` after the last.
    fn next(&mut self) -> impl Future<Output = Option<Result<Bytes, String>>> + Send;
}

/// What a source has.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// The object.
    pub(super) object: Object,
    /// Of all its bytes, where it has one.
    pub(super) checksum: Option<Checksum>,
    /// Whether parts of it can be asked for, such as are certain to be of this object.
    pub(super) ranges: bool,
}

/// What was asked for is on its way.
#[derive(Debug)]
pub(super) enum Opened<C> {
    /// The bytes that were asked for.
    Range(C),
    /// All of them, although a part was asked for.
    Whole(C),
}

/// A request that brought nothing, or not all it should.
#[derive(Debug, Clone)]
pub(super) struct Trouble {
    /// What it means.
    pub(super) cause: Cause,
    /// In words.
    pub(super) failure: Failure,
}

impl Trouble {
    pub(super) fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, failure: Failure::new(message) }
    }

    /// The answer makes no sense.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self {
            cause: Cause::Malformed,
            failure: Failure::new(message)
                .with_remedy("see whether something else than the source answers in its place (a proxy?)"),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.failure.message)
    }
}

/// What the head of a good answer says of the bytes that follow it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// HTTP's: 200 or 206.
    pub(super) status: u16,
    pub(super) etag: Option<String>,
    pub(super) content_range: Option<String>,
    pub(super) content_length: Option<u64>,
}

impl Head {
    /// Whether an answer is about that object, and has the range (or, `false`, all of it).
    pub(super) fn fits(&self, object: &Object, range: Option<&Range<u64>>) -> Result<bool, Trouble> {
        if let (Some(expected), Some(found)) = (&object.etag, &self.etag)
            && expected != found
        {
            return Err(Trouble::new(Cause::Changed, format!("its ETag is {found} now, it was {expected}")));
        }
        let size = |found: u64| match found == object.size {
            true => Ok(()),
            false => {
                let text = format!("it has {found} bytes now, it had {}", object.size);
                Err(Trouble::new(Cause::Changed, text))
            }
        };
        match (self.status, range) {
            // Not every server looks at If-Match: without this, parts of two objects might be put together.
            (206, Some(_)) if object.strong_etag().is_some() && self.etag.is_none() => {
                Err(Trouble::malformed("the answer does not say of which object it is a part: it has no ETag"))
            }
            (206, Some(range)) => {
                let given = self.content_range.as_deref().unwrap_or_default();
                let Some((found, total)) = content_range(given) else {
                    return Err(Trouble::malformed(format!("the answer's Content-Range is \"{}\"", shown(given))));
                };
                size(total)?;
                if found != *range {
                    let (first, last) = (range.start, range.end - 1);
                    let text = format!("bytes {first}-{last} were asked for, \"{}\" came", shown(given));
                    return Err(Trouble::malformed(text));
                }
                Ok(true)
            }
            (200, _) => {
                self.content_length.map(size).transpose()?;
                Ok(false)
            }
            (status, _) => Err(Trouble::malformed(format!("an answer {status} was not to be expected"))),
        }
    }
}

/// The range and the total of a `Content-Range: bytes 0-9/20`; `None` if it is none, or nonsense.
pub(super) fn content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total) = (number(first)?, number(last)?, number(total)?);
    (first <= last && last < total).then_some((first..last + 1, total))
}

/// Digits alone: no sign.
pub(super) fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// A header's value that is to be sent back or kept; `None` if it is none that anybody honest sends.
pub(super) fn token(text: &str) -> Option<String> {
    let plain = text.len() <= 1024 && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    plain.then(|| text.to_owned())
}

/// What a remote party wrote, fit for a line of a log.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object() -> Object {
        Object { etag: Some("\"a\"".to_owned()), modified: None, size: 20, version: None }
    }

    fn head(status: u16, etag: &str, range: &str) -> Head {
        Head {
            status,
            etag: Some(etag.to_owned()),
            content_range: Some(range.to_owned()),
            content_length: (status == 200).then_some(20),
        }
    }

    #[test]
    fn a_content_range_is_read_strictly() {
        assert_eq!(content_range("bytes 0-9/20"), Some((0..10, 20)));
        for text in
            ["", "bytes */20", "bytes 9-0/20", "bytes 0-20/20", "bytes 0-9/*", "0-9/20", "bytes +0-9/20", "bytes -9/20"]
        {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    #[test]
    fn an_answer_is_taken_only_if_it_is_of_that_object_and_that_range() {
        let cause = |head: Head| head.fits(&object(), Some(&(0..10))).map_err(|trouble| trouble.cause);
        assert_eq!(cause(head(206, "\"a\"", "bytes 0-9/20")), Ok(true));
        assert_eq!(cause(head(200, "\"a\"", "")), Ok(false));
        assert_eq!(cause(head(206, "\"b\"", "bytes 0-9/20")), Err(Cause::Changed));
        assert_eq!(cause(head(206, "\"a\"", "bytes 0-9/30")), Err(Cause::Changed));
        assert_eq!(cause(Head { content_length: Some(30), ..head(200, "\"a\"", "") }), Err(Cause::Changed));
        assert_eq!(cause(head(206, "\"a\"", "bytes 1-9/20")), Err(Cause::Malformed));
        let nameless = Head { etag: None, ..head(206, "", "bytes 0-9/20") };
        assert_eq!(cause(nameless.clone()), Err(Cause::Malformed), "it may be a part of another");
        let never_named = Object { etag: None, ..object() };
        assert!(nameless.fits(&never_named, Some(&(0..10))).is_ok(), "there is nothing to compare");
        assert_eq!(cause(head(206, "\"a\"", "")), Err(Cause::Malformed));
        assert_eq!(cause(head(204, "\"a\"", "")), Err(Cause::Malformed));
    }
}
