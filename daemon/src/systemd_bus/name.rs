//! Names of units: which are some, and how they stand in the paths of D-Bus objects.

use enclaved_core::failure::Failure;
use std::fmt::Write as _;

/// The longest name that systemd takes for a unit (UNIT_NAME_MAX).
const MAX_NAME: usize = 255;

/// What cannot be a service's name is nothing that systemd is asked about.
pub(super) fn check_name(unit: &str) -> Result<(), Failure> {
    let stem = unit.strip_suffix(".service").unwrap_or_default();
    if stem.is_empty() || stem.starts_with('@') || unit.len() > MAX_NAME {
        return Err(Failure::new(format!("\"{}\" is not the name of a service", unit.escape_debug())));
    }
    check_prefix(stem)
}

pub(super) fn check_prefix(prefix: &str) -> Result<(), Failure> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    if prefix.is_empty() || prefix.len() > MAX_NAME || !prefix.bytes().all(allowed) {
        return Err(Failure::new(format!("\"{}\" can't be part of a unit's name", prefix.escape_debug())));
    }
    Ok(())
}

/// A name as it stands in an object's path: every byte that is no letter or digit in hexadecimal, behind `_`.
pub(super) fn label(name: &str) -> String {
    let mut label = String::with_capacity(name.len());
    for (at, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (at > 0 && byte.is_ascii_digit()) {
            label.push(char::from(byte));
        } else {
            // Writing to a string can't fail.
            let _written = write!(label, "_{byte:02x}");
        }
    }
    label
}
