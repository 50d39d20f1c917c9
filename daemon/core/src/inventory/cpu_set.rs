//! A set of CPUs, written as the kernel writes one: `1-3,5`. Hostile text neither panics nor fills the memory.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// How many CPUs Linux can have (`NR_CPUS` of the largest kernels): a number beyond it is nonsense.
pub const MAX_CPUS: u32 = 8192;
/// A list of all CPUs, each by itself, is not longer.
const MAX_TEXT: usize = 64 * 1024;

/// A set of CPU numbers, all below [`MAX_CPUS`].
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet(BTreeSet<u32>);

/// A text that is no CPU list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a CPU list: {reason}; one is written like 1-3,5")]
pub struct BadCpuSet {
    text: String,
    reason: &'static str,
}

impl CpuSet {
    /// The set of these; `None` if one of them can't be a CPU.
    pub fn new(cpus: impl IntoIterator<Item = u32>) -> Option<Self> {
        let cpus: BTreeSet<u32> = cpus.into_iter().collect();
        cpus.last().is_none_or(|last| *last < MAX_CPUS).then_some(Self(cpus))
    }

    /// In rising order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// How many.
    pub fn len(&self) -> u32 {
        // There are no more than MAX_CPUS.
        u32::try_from(self.0.len()).unwrap_or(MAX_CPUS)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether that CPU is in it.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// The lowest.
    pub fn first(&self) -> Option<u32> {
        self.0.first().copied()
    }

    /// Whether all of these are in that set.
    pub fn is_subset(&self, of: &Self) -> bool {
        self.0.is_subset(&of.0)
    }

    /// Whether no CPU is in both.
    pub fn is_disjoint(&self, from: &Self) -> bool {
        self.0.is_disjoint(&from.0)
    }

    /// Adds all of those.
    pub fn extend(&mut self, others: &Self) {
        self.0.extend(&others.0);
    }
}

/// As the kernel reads and writes them, and a little less: no strides (`0-31:2/4`), no `all`.
impl FromStr for CpuSet {
    type Err = BadCpuSet;
    fn from_str(text: &str) -> Result<Self, BadCpuSet> {
        let bad =
            |reason| BadCpuSet { text: text.trim().chars().take(80).flat_map(char::escape_debug).collect(), reason };
        if text.len() > MAX_TEXT {
            return Err(bad("it is too long"));
        }
        let mut cpus = BTreeSet::new();
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self(cpus));
        }
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |digits: &str| {
                // `parse` would take a sign.
                let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
                if plain { digits.parse::<u32>().ok() } else { None }
            };
            let first = number(first).ok_or_else(|| bad("it holds something else than numbers and ranges"))?;
            let last = number(last).ok_or_else(|| bad("it holds something else than numbers and ranges"))?;
            if last >= MAX_CPUS {
                return Err(bad("it names a CPU that no kernel has"));
            }
            if first > last {
                return Err(bad("a range goes down"));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl TryFrom<String> for CpuSet {
    type Error = BadCpuSet;
    fn try_from(text: String) -> Result<Self, BadCpuSet> {
        text.parse()
    }
}

impl From<CpuSet> for String {
    fn from(cpus: CpuSet) -> Self {
        cpus.to_string()
    }
}

/// Ranges where there are three or more in a row, as `1,3,5-7`; the kernel writes two in a row as a range, too, and reads both.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if(|next| *next == last + 1) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                1 => write!(f, "{separator}{first},{last}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(text: &str) -> Vec<u32> {
        text.parse::<CpuSet>().unwrap().iter().collect()
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(list("1-3,5,7-8\n"), [1, 2, 3, 5, 7, 8]);
        assert_eq!(list("\n"), [0_u32; 0]);
        assert_eq!(list("0"), [0]);
        assert_eq!(list("2-3,2,3"), [2, 3]);
    }

    #[test]
    fn what_is_no_list_says_why_and_shows_it() {
        let cases = [
            ("a", "something else"),
            ("1-", "something else"),
            ("-1", "something else"),
            ("+1", "something else"),
            ("1,,2", "something else"),
            ("1, 2", "something else"),
            ("1;2", "something else"),
            ("0-7:2/4", "something else"),
            ("4294967296", "something else"),
            ("3-2", "goes down"),
            ("8192", "no kernel has"),
            ("0-4294967295", "no kernel has"),
        ];
        for (text, reason) in cases {
            let error = text.parse::<CpuSet>().unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(text), "{text}: {error}");
        }
        assert!("1,".repeat(40_000).parse::<CpuSet>().unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn runs_of_three_become_ranges() {
        assert_eq!(CpuSet::new([1, 2, 3, 5, 6, 9]).unwrap().to_string(), "1-3,5,6,9");
        assert_eq!(CpuSet::default().to_string(), "");
        assert_eq!(CpuSet::new([MAX_CPUS]), None);
    }

    proptest! {
        #[test]
        fn a_set_reads_back_what_it_writes(cpus in prop::collection::btree_set(0..MAX_CPUS, 0..200)) {
            let set = CpuSet::new(cpus.clone()).unwrap();
            prop_assert_eq!(set.to_string().parse::<CpuSet>().unwrap(), set.clone());
            prop_assert!(cpus.iter().all(|cpu| set.contains(*cpu)));
        }

        #[test]
        fn any_text_is_a_bounded_set_or_an_error(text in "[-0-9, a:/\n]{0,60}|\\PC{0,40}") {
            if let Ok(set) = text.parse::<CpuSet>() {
                prop_assert!(set.iter().all(|cpu| cpu < MAX_CPUS));
            }
        }
    }
}
