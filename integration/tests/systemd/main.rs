//! The units, and the daemon in them, under the real systemd: each test boots a machine of its own. Needs root; run by
//! `integration/test --lane systemd`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod allocator;
mod daemon;
mod machine;
mod permissions;
mod proxy;
mod units;

use enclaved_integration::machine::DEADLINE;
