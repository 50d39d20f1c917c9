//! The units, and the daemon in them, under the real systemd: each test boots a machine of its own. Needs root; run by
//! `integration/test --lane systemd`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod access_log;
mod allocator;
mod allocator_and_enclaves;
mod conformance;
mod continuity;
mod daemon;
mod doctor;
mod egress;
mod machine;
mod permissions;
mod readme;
mod stock_allocator;
mod supervisor;
mod units;

use enclaved_integration::machine::DEADLINE;
