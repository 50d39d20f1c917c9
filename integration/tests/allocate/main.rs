//! `enclaved allocate` on recorded hosts.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod command;
mod failing;
mod host;
mod reserving;
