//! An error and its causes in one line, for reports and log lines.

use std::error::Error;
use std::fmt::Write;

pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        drop(write!(text, ": {error}"));
        cause = error.source();
    }
    text
}
