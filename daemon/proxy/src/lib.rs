//! The data plane of enclaved.

mod unix_socket;
pub mod vsock;
