//! Ingress: clients reach enclaves, by HTTPS (names and paths) or by raw TCP (ports). Which generation of an enclave takes
//! them is in the routes; nothing here asks whether it is well.

pub(crate) mod body;
mod client;
pub(crate) mod client_ca;
mod forward;
mod handshake;
mod headers;
pub(crate) mod https;
mod in_flight;
mod passthrough;
mod proxy_protocol;
pub(crate) mod redirect;
mod serving;
pub(crate) mod sites;
mod sources;
pub(crate) mod tcp;
pub(crate) mod tls;
pub(crate) mod upstream;
