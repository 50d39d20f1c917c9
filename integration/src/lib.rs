//! What stands in for the world around enclaved: the host with its nitro-cli and its enclaves, AWS, the control plane;
//! and the simulated host of the reconcile loop's tests.
//!
//! Nothing here is part of the daemon, and nothing in the daemon knows of it.

pub mod application;
pub mod bench;
pub mod binaries;
pub mod control_plane;
pub mod demo;
pub mod eif;
pub mod enclave;
pub mod file_server;
pub mod guests;
pub mod host;
pub mod host_tree;
pub mod http;
pub mod https_site;
pub mod imds;
pub mod machine;
pub mod nitro_cli;
pub mod nitro_host;
pub mod processes;
pub mod s3;
pub mod second_opinion;
pub mod service_manager;
pub mod signing;
pub mod sim;
pub mod upstream;
