//! What enclaved decides, without doing any of it: no I/O, no clock, no tasks. See `daemon/ARCHITECTURE.md`.

pub mod allocator_file;
pub mod desired;
pub mod diagnosis;
pub mod egress_policy;
pub mod failure;
pub mod fetch;
pub mod id;
pub mod image;
pub mod image_record;
pub mod inventory;
pub mod ledger;
pub mod observed;
pub mod plan;
pub mod routes;
pub mod sizing;
pub mod status;
