//! The record layer of a TLS handshake, as far as it is in clear (RFC 8446, 5.1; RFC 5246, 6.2.1): what one side says, cut into
//! the payloads of its records. Nothing is kept of it, and nothing understood.

/// Longest payload: encrypted early data may have this much more than [`PLAIN`].
const LONGEST: usize = PLAIN + 256;
/// Longest payload in clear.
pub(super) const PLAIN: usize = 1 << 14;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    ChangeCipherSpec,
    Alert,
    Handshake,
    /// Or something encrypted.
    ApplicationData,
}

/// It is no record of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRecord;

/// Where in its records one side is.
#[derive(Debug, Default)]
pub(super) struct Records {
    /// The header of the record, of which so many bytes are known.
    header: [u8; 5],
    known: usize,
    /// Bytes of its payload that are still to come.
    left: usize,
}

impl Records {
    /// The next piece of a payload, which is taken from `bytes`; none if there is none in them.
    pub(super) fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Option<(Kind, &'a [u8])>, NoRecord> {
        loop {
            if self.left > 0 {
                let (piece, rest) = bytes.split_at(self.left.min(bytes.len()));
                if piece.is_empty() {
                    return Ok(None);
                }
                (*bytes, self.left) = (rest, self.left - piece.len());
                return Ok(Some((self.kind()?, piece)));
            }
            if self.known == self.header.len() {
                self.known = 0;
            }
            while self.known < self.header.len() {
                let Some((first, rest)) = bytes.split_first() else { return Ok(None) };
                self.header[self.known] = *first;
                (*bytes, self.known) = (rest, self.known + 1);
                self.check()?;
            }
            self.left = self.len();
        }
    }

    fn kind(&self) -> Result<Kind, NoRecord> {
        match self.header[0] {
            20 => Ok(Kind::ChangeCipherSpec),
            21 => Ok(Kind::Alert),
            22 => Ok(Kind::Handshake),
            23 => Ok(Kind::ApplicationData),
            _ => Err(NoRecord),
        }
    }

    fn len(&self) -> usize {
        usize::from(u16::from_be_bytes([self.header[3], self.header[4]]))
    }

    /// As much of the header as is known.
    fn check(&self) -> Result<(), NoRecord> {
        let kind = self.kind()?;
        if self.known > 1 && self.header[1] != 3 {
            return Err(NoRecord);
        }
        if self.known == self.header.len() {
            let longest = if kind == Kind::ApplicationData { LONGEST } else { PLAIN };
            // Only application data may be empty.
            if self.len() > longest || (self.len() == 0 && kind != Kind::ApplicationData) {
                return Err(NoRecord);
            }
        }
        Ok(())
    }
}

/// One record.
#[cfg(test)]
pub(super) fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 3, 3], &u16::try_from(payload.len()).unwrap().to_be_bytes()[..], payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The payloads, put together by kind as they come.
    fn payloads(bytes: &[u8], piece: usize) -> Result<Vec<(Kind, Vec<u8>)>, NoRecord> {
        let (mut records, mut all) = (Records::default(), Vec::<(Kind, Vec<u8>)>::new());
        for mut piece in bytes.chunks(piece) {
            while let Some((kind, part)) = records.next(&mut piece)? {
                match all.last_mut() {
                    Some((last, whole)) if *last == kind => whole.extend_from_slice(part),
                    _ => all.push((kind, part.to_vec())),
                }
            }
        }
        Ok(all)
    }

    #[test]
    fn records_are_cut_alike_however_their_bytes_are_split() {
        let bytes = [record(22, b"hello"), record(22, b" there"), record(20, &[1]), record(23, b""), record(23, b"x")];
        let expected =
            [(Kind::Handshake, &b"hello there"[..]), (Kind::ChangeCipherSpec, &[1]), (Kind::ApplicationData, b"x")];
        for piece in [1, 2, 3, 7, 100] {
            let seen = payloads(&bytes.concat(), piece).unwrap();
            let seen: Vec<_> = seen.iter().map(|(kind, whole)| (*kind, whole.as_slice())).collect();
            assert_eq!(seen, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_record_is_told_as_soon_as_it_can_be() {
        let long = |kind, len: usize| record(kind, &vec![0; len]);
        for bad in
            [&b"G"[..], &[19], &[24], &[22, 2], &[22, 3, 1, 0, 0], &long(22, PLAIN + 1)[..5], &long(23, LONGEST + 1)]
        {
            assert_eq!(payloads(bad, 1).unwrap_err(), NoRecord, "{:?}", &bad[..bad.len().min(5)]);
        }
        payloads(&long(23, LONGEST), 4096).unwrap();
    }
}
