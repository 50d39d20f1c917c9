//! The data plane of enclaved.

mod counters;
mod current;
mod dial;
mod egress;
mod error_text;
mod host_addresses;
mod ingress;
mod limits;
mod listening;
mod relay;
mod shared;
mod tcp;
mod throttle;
mod unix_socket;
pub mod vsock;
