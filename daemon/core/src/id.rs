//! The names of things: enclaves, generations, CIDs, measurements, points in time.
//!
//! Every type here holds its precondition: whoever has one need not check it again. Nothing here knows what the
//! things are for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// A value that does not have the form its type asks for. The message says what the form is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(Cow<'static, str>);

impl Malformed {
    fn new(message: impl Into<Cow<'static, str>>) -> Self {
        Self(message.into())
    }
}

/// Implements the string form (`Display`, `FromStr`, serde, JSON schema) of a type from its `parse` and `Display`.
macro_rules! string_form {
    ($type:ident, $schema_name:literal, $pattern:literal) => {
        impl FromStr for $type {
            type Err = Malformed;
            fn from_str(text: &str) -> Result<Self, Malformed> {
                Self::parse(text)
            }
        }
        impl TryFrom<String> for $type {
            type Error = Malformed;
            fn try_from(text: String) -> Result<Self, Malformed> {
                Self::parse(&text)
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $schema_name.into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

/// The name of an enclave: 1 to 32 characters of `a-z`, `0-9` and `-`, beginning and ending with a letter or digit.
///
/// It becomes part of unit names, file names and vsock paths, hence the narrow alphabet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EnclaveName(String);

impl EnclaveName {
    /// Longest name, in bytes.
    pub const MAX_LEN: usize = 32;

    fn parse(text: &str) -> Result<Self, Malformed> {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let edges = bytes.first().is_some_and(|b| ok(*b)) && bytes.last().is_some_and(|b| ok(*b));
        if bytes.len() > Self::MAX_LEN || !edges || !bytes.iter().all(|b| ok(*b) || *b == b'-') {
            return Err(Malformed::new(format!(
                "\"{}\" is not an enclave name: 1 to 32 characters of a-z, 0-9 and -, beginning and ending with a letter or digit",
                text.escape_debug()
            )));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EnclaveName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
string_form!(EnclaveName, "EnclaveName", "^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$");

/// The number of one launch of an enclave, from 1 up. Every launch is a generation of its own: it has its own CID, its
/// own unit, its own evidence; a number is never used twice for the same enclave.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One generation of one enclave, written `name-generation` (`signer-3`): the instance of its unit
/// `enclave@signer-3.service`, its name in nitro-cli, the name of its launch record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EnclaveKey {
    /// Which enclave.
    pub name: EnclaveName,
    /// Which launch of it.
    pub generation: Generation,
}

impl EnclaveKey {
    fn parse(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed::new(format!("\"{}\" is not <enclave name>-<generation>", text.escape_debug()));
        let (name, generation) = text.rsplit_once('-').ok_or_else(malformed)?;
        if generation.starts_with(['+', '0']) {
            return Err(malformed());
        }
        let generation = Generation(generation.parse().map_err(|_| malformed())?);
        Ok(Self { name: name.parse()?, generation })
    }
}

impl fmt::Display for EnclaveKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.name, self.generation)
    }
}
string_form!(EnclaveKey, "EnclaveKey", "^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?-[1-9][0-9]*$");

/// The vsock context identifier of an enclave, 16 to 2^32-2.
///
/// 0 to 3 and 2^32-1 are reserved by vsock; 4 to 15 are left to enclaves started by hand, whose CIDs nitro-cli chooses
/// from 4 upwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Cid(u32);

impl Cid {
    /// The first CID that is given to an enclave.
    pub const FIRST: Self = Self(16);

    /// The CID of that number, if it is one that an enclave may have.
    pub const fn new(number: u32) -> Option<Self> {
        let loopback = cfg!(feature = "loopback-cid") && number == 1;
        if loopback || number >= Self::FIRST.0 && number < u32::MAX { Some(Self(number)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The CID after this one; after the last comes the first.
    #[must_use]
    pub fn next(self) -> Self {
        Self::new(self.0 + 1).unwrap_or(Self::FIRST)
    }
}

impl TryFrom<u32> for Cid {
    type Error = Malformed;
    fn try_from(number: u32) -> Result<Self, Malformed> {
        Self::new(number)
            .ok_or_else(|| Malformed::new(format!("{number} is not a CID for an enclave: 16 to 4294967294")))
    }
}

impl From<Cid> for u32 {
    fn from(cid: Cid) -> u32 {
        cid.0
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl JsonSchema for Cid {
    fn schema_name() -> Cow<'static, str> {
        "Cid".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "integer", "minimum": 16, "maximum": 4_294_967_294_u32 })
    }
}

/// An amount of memory in MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct MemoryMib(pub u64);

impl fmt::Display for MemoryMib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// The SHA-256 of a whole EIF file: its name in the cache, and what `sha256 =` pins. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EifDigest(pub [u8; 32]);

impl EifDigest {
    fn parse(text: &str) -> Result<Self, Malformed> {
        parse_hex(text).map(Self).ok_or_else(|| Malformed::new("not a SHA-256: 64 hexadecimal digits"))
    }

    /// The first 12 digits, enough for a person to tell images apart.
    pub fn short(&self) -> String {
        self.to_string().chars().take(12).collect()
    }
}

impl fmt::Display for EifDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}
impl fmt::Debug for EifDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}
string_form!(EifDigest, "EifDigest", "^[0-9a-fA-F]{64}$");

/// One platform configuration register: a SHA-384, written as 96 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pcr(pub [u8; 48]);

impl Pcr {
    fn parse(text: &str) -> Result<Self, Malformed> {
        parse_hex(text).map(Self).ok_or_else(|| Malformed::new("not a PCR: 96 hexadecimal digits (SHA-384)"))
    }
}

impl fmt::Display for Pcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}
impl fmt::Debug for Pcr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}
string_form!(Pcr, "Pcr", "^[0-9a-fA-F]{96}$");

/// The measurements of an image, as the enclave's attestation documents will show them (unless it runs in debug mode,
/// where they are zero). Computed from the file by this project, never taken from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Measurements {
    /// Kernel, command line and all ramdisks.
    pub pcr0: Pcr,
    /// Kernel, command line and the first ramdisk.
    pub pcr1: Pcr,
    /// The ramdisks after the first: the application.
    pub pcr2: Pcr,
    /// The signing certificate, where the image is signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcr8: Option<Pcr>,
}

/// The kernel's identity of one boot of the host (`/proc/sys/kernel/random/boot_id`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct BootId(pub String);

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A point in time, in milliseconds since 1970-01-01 UTC; written in RFC 3339 (`2026-01-02T03:04:05.678Z`).
///
/// Wall-clock time, because it must mean the same after a restart of the process and of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(u64);

impl Timestamp {
    /// 9999-12-31T23:59:59.999Z, the last point that RFC 3339 can write.
    const LAST: u64 = 253_402_300_799_999;

    /// From milliseconds since the epoch; beyond the year 9999 it stays there.
    pub const fn from_millis(millis: u64) -> Self {
        Self(if millis > Self::LAST { Self::LAST } else { millis })
    }

    /// Milliseconds since the epoch.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// This point plus a duration.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self::from_millis(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero if it lies ahead (clocks step).
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    fn parse(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed::new(format!("\"{}\" is not an RFC 3339 time in UTC", text.escape_debug()));
        let time = humantime::parse_rfc3339(text).map_err(|_| malformed())?;
        Ok(Self::from(time))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        Self::UNIX_EPOCH + Duration::from_millis(time.0)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_rfc3339_millis((*self).into()))
    }
}
string_form!(Timestamp, "Timestamp", "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z$");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_lower_case_letters_digits_and_inner_dashes() {
        for good in ["a", "signer", "a-b", "0x", "a--b", &"a".repeat(32)] {
            assert_eq!(good.parse::<EnclaveName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", &"a".repeat(33)] {
            assert!(bad.parse::<EnclaveName>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_key_reads_back_what_it_writes_even_where_the_name_has_dashes_and_digits() {
        for text in ["signer-3", "a-1-2", "0-1"] {
            assert_eq!(text.parse::<EnclaveKey>().unwrap().to_string(), text);
        }
        for bad in ["signer", "signer-", "signer-0", "signer-03", "signer-+3", "-3", "signer-99999999999"] {
            assert!(bad.parse::<EnclaveKey>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn reserved_cids_do_not_exist() {
        for number in [0, 1, 2, 3, 4, 15, u32::MAX] {
            assert_eq!(Cid::new(number), None);
        }
        assert_eq!(Cid::new(16), Some(Cid::FIRST));
        assert_eq!(Cid::new(u32::MAX - 1).unwrap().next(), Cid::FIRST);
    }

    #[test]
    fn hexadecimal_forms_take_either_case_and_nothing_shorter_or_longer() {
        let pcr = "aB".repeat(48).parse::<Pcr>().unwrap();
        assert_eq!(pcr.to_string(), "ab".repeat(48));
        assert!("ab".repeat(47).parse::<Pcr>().is_err());
        assert!("zz".repeat(48).parse::<Pcr>().is_err());
        assert!("+1".repeat(32).parse::<EifDigest>().is_err());
    }

    #[test]
    fn a_timestamp_reads_back_what_it_writes_and_never_leaves_its_range() {
        let time = Timestamp::from_millis(1_767_323_045_678);
        assert_eq!(time.to_string(), "2026-01-02T03:04:05.678Z");
        assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time);
        assert_eq!(Timestamp::from_millis(u64::MAX).plus(Duration::MAX).to_string(), "9999-12-31T23:59:59.999Z");
        assert_eq!(Timestamp::from_millis(5).since(Timestamp::from_millis(9)), Duration::ZERO);
    }
}
