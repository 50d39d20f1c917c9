//! End to end: the real `enclaved`, its proxy, its launch helper and `enclavectl` on simulated machines. Each test has a
//! machine of its own, and none leaves anything behind.
//!
//! What is tested here is that the parts work together as a person sees it; what each decides has tests of its own.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod commands;
mod config;
mod continuity;
mod crashes;
mod crowd;
mod deaths;
mod drain;
mod fixture;
mod image_store;
mod images;
mod launch;
mod nitro_cli;
mod observability;
mod schema;
mod traffic;
mod updates;
