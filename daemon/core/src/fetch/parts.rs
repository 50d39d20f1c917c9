//! The table of a download's parts: which are finished, which are being got, which is next, and how far the contiguous front
//! has come.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Most parts of a download. Larger objects have larger parts.
pub const MAX_PARTS: u64 = 10_000;

/// The size of the parts that an object of `size` bytes is got in: `wanted` bytes, or more, in whole MiB, where there would be
/// more than [`MAX_PARTS`] of them.
pub fn part_size(size: u64, wanted: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    let wanted = wanted.max(1);
    if size.div_ceil(wanted) <= MAX_PARTS {
        return wanted;
    }
    size.div_ceil(MAX_PARTS).div_ceil(MIB).saturating_mul(MIB)
}

/// One part of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which one, from 0.
    pub index: u64,
    /// Its bytes; never empty.
    pub bytes: Range<u64>,
}

/// What is known of every part of a download. Its memory is bounded by [`MAX_PARTS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    size: u64,
    part: u64,
    /// Indices of finished parts, as ranges that neither overlap nor touch: first -> one past the last.
    finished: BTreeMap<u64, u64>,
    /// Indices of parts that are being got.
    taken: BTreeSet<u64>,
}

/// Numbers that are no table of parts. They may come from a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartsError {
    /// No bytes, no parts, or more of them than there may be.
    #[error("{size} bytes in parts of {part} bytes are not between 1 and {MAX_PARTS} parts")]
    Count {
        /// The object's size.
        size: u64,
        /// A part's size.
        part: u64,
    },
    /// Finished parts that are not there, are empty, overlap, touch or are out of order.
    #[error("parts {first} to {end} can't be finished: there are {count}, and those before end at {previous}")]
    Finished {
        /// The first.
        first: u64,
        /// One past the last.
        end: u64,
        /// How many parts there are.
        count: u64,
        /// Where the finished ones before it end.
        previous: u64,
    },
}

impl Parts {
    /// Of an object of `size` bytes, in parts of `part` bytes; nothing is finished.
    ///
    /// # Errors
    /// [`PartsError::Count`].
    pub fn new(size: u64, part: u64) -> Result<Self, PartsError> {
        let count = if part == 0 { 0 } else { size.div_ceil(part) };
        if !(1..=MAX_PARTS).contains(&count) {
            return Err(PartsError::Count { size, part });
        }
        Ok(Self { size, part, finished: BTreeMap::new(), taken: BTreeSet::new() })
    }

    /// As [`Self::finished`] has written it down.
    ///
    /// # Errors
    /// It is not what that writes.
    pub fn restore(size: u64, part: u64, finished: &[(u64, u64)]) -> Result<Self, PartsError> {
        let mut parts = Self::new(size, part)?;
        let count = parts.count();
        let mut previous = None;
        for &(first, end) in finished {
            let beyond_previous = previous.is_none_or(|previous| first > previous);
            if !(beyond_previous && first < end && end <= count) {
                return Err(PartsError::Finished { first, end, count, previous: previous.unwrap_or(0) });
            }
            parts.finished.insert(first, end);
            previous = Some(end);
        }
        Ok(parts)
    }

    /// The finished parts, as ranges of indices in order: first, one past the last.
    pub fn finished(&self) -> Vec<(u64, u64)> {
        self.finished.iter().map(|(first, end)| (*first, *end)).collect()
    }

    /// The object's size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of a part, in bytes; the last one may be smaller.
    pub fn part(&self) -> u64 {
        self.part
    }

    /// How many parts there are.
    pub fn count(&self) -> u64 {
        self.size.div_ceil(self.part)
    }

    /// The first part that is neither finished nor being got; it is being got from now on. `None`: there is no such part.
    pub fn take(&mut self) -> Option<Part> {
        let mut index = 0;
        while index < self.count() {
            if let Some((_, end)) = self.finished.range(..=index).next_back().filter(|(_, end)| **end > index) {
                index = *end;
            } else if self.taken.contains(&index) {
                index += 1;
            } else {
                self.taken.insert(index);
                return Some(Part { index, bytes: self.bytes(index) });
            }
        }
        None
    }

    /// A part that was being got is complete.
    pub fn finish(&mut self, index: u64) {
        if !self.taken.remove(&index) {
            return;
        }
        let (mut first, mut end) = (index, index + 1);
        if let Some((before, _)) = self.finished.range(..index).next_back().filter(|(_, end)| **end == index) {
            first = *before;
        }
        if let Some(after) = self.finished.remove(&end) {
            end = after;
        }
        self.finished.insert(first, end);
    }

    /// Whether all parts are finished.
    pub fn is_whole(&self) -> bool {
        self.finished.get(&0) == Some(&self.count())
    }

    /// How many bytes from the beginning are there without a gap.
    pub fn front(&self) -> u64 {
        self.finished.get(&0).map_or(0, |end| self.offset(*end))
    }

    /// How many bytes the finished parts have.
    pub fn done(&self) -> u64 {
        self.finished.iter().map(|(first, end)| self.offset(*end) - self.offset(*first)).sum()
    }

    fn offset(&self, index: u64) -> u64 {
        index.saturating_mul(self.part).min(self.size)
    }

    fn bytes(&self, index: u64) -> Range<u64> {
        self.offset(index)..self.offset(index + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_are_given_out_from_the_front_and_finish_in_any_order() {
        let mut parts = Parts::new(25, 10).unwrap();
        let [a, b, c] = [(); 3].map(|()| parts.take().unwrap());
        assert_eq!([&a.bytes, &b.bytes, &c.bytes], [&(0..10), &(10..20), &(20..25)]);
        assert_eq!(parts.take(), None);
        parts.finish(c.index);
        assert_eq!((parts.front(), parts.done()), (0, 5));
        parts.finish(a.index);
        assert_eq!(parts.front(), 10);
        parts.finish(a.index);
        assert_eq!(parts.done(), 15, "once is enough");
        parts.finish(b.index);
        assert!(parts.is_whole());
        assert_eq!((parts.front(), parts.finished()), (25, vec![(0, 3)]));
    }

    #[test]
    fn a_large_object_has_larger_parts_not_more() {
        assert_eq!((part_size(1, 8 << 20), part_size(100, 10)), (8 << 20, 10));
        for size in [1, 64 << 30, 10_u64.pow(15), u64::MAX / 2] {
            let part = part_size(size, 8 << 20);
            assert!(Parts::new(size, part).is_ok(), "{size}");
        }
        assert!(Parts::new(0, 1).is_err() && Parts::new(1, 0).is_err() && Parts::new(MAX_PARTS + 1, 1).is_err());
    }

    #[test]
    fn a_table_that_cannot_be_is_not_restored() {
        for finished in [&[(0, 0)][..], &[(0, 4)], &[(2, 1)], &[(0, 1), (1, 2)], &[(1, 2), (0, 1)], &[(0, 2), (1, 3)]] {
            assert!(Parts::restore(30, 10, finished).is_err(), "{finished:?}");
        }
        assert!(Parts::restore(u64::MAX, 1, &[]).is_err());
    }

    #[derive(Debug, Clone)]
    enum Deed {
        Take,
        Finish(usize),
        /// As after a restart: what was being got is forgotten.
        Restart,
    }

    fn deed() -> impl Strategy<Value = Deed> {
        prop_oneof![
            3 => Just(Deed::Take),
            3 => any::<usize>().prop_map(Deed::Finish),
            1 => Just(Deed::Restart),
        ]
    }

    proptest! {
        /// Against a plain list of the parts' states.
        #[test]
        fn the_table_agrees_with_a_list(size in 1_u64..400, part in 1_u64..40, deeds in prop::collection::vec(deed(), 0..120)) {
            let mut parts = Parts::new(size, part).unwrap();
            let count = usize::try_from(parts.count()).unwrap();
            let mut list = vec!['-'; count];
            for deed in deeds {
                let taken: Vec<usize> = (0..count).filter(|at| list[*at] == 't').collect();
                let pick = |nth: usize| taken.get(nth % taken.len().max(1)).copied();
                match deed {
                    Deed::Take => {
                        let expected = list.iter().position(|state| *state == '-');
                        let got = parts.take();
                        prop_assert_eq!(got.as_ref().map(|part| usize::try_from(part.index).unwrap()), expected);
                        if let (Some(at), Some(got)) = (expected, got) {
                            list[at] = 't';
                            prop_assert!(!got.bytes.is_empty() && got.bytes.end <= size);
                            prop_assert_eq!(got.bytes.start, got.index * part);
                        }
                    }
                    Deed::Finish(nth) => if let Some(at) = pick(nth) {
                        parts.finish(at as u64);
                        list[at] = 'f';
                    },
                    Deed::Restart => {
                        parts = Parts::restore(size, part, &parts.finished()).unwrap();
                        list.iter_mut().filter(|state| **state == 't').for_each(|state| *state = '-');
                    }
                }
                let bytes = |at: usize| (at as u64 * part)..((at as u64 + 1) * part).min(size);
                let done: u64 = (0..count).filter(|at| list[*at] == 'f').map(|at| bytes(at).end - bytes(at).start).sum();
                let front = list.iter().take_while(|state| **state == 'f').count();
                prop_assert_eq!(parts.done(), done);
                prop_assert_eq!(parts.front(), if front == 0 { 0 } else { bytes(front - 1).end });
                prop_assert_eq!(parts.is_whole(), list.iter().all(|state| *state == 'f'));
            }
        }

        #[test]
        fn whatever_a_file_says_it_is_refused_or_is_a_table_that_can_be_used(
            size in any::<u64>(), part in any::<u64>(), finished in prop::collection::vec(any::<(u64, u64)>(), 0..4),
        ) {
            if let Ok(mut parts) = Parts::restore(size, part, &finished) {
                prop_assert!(parts.done() <= size && parts.front() <= parts.done());
                prop_assert_eq!(parts.finished(), finished);
                prop_assert_eq!(parts.take().is_none(), parts.is_whole());
            }
        }
    }
}
