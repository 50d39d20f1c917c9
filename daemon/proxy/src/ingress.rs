//! Ingress: clients reach enclaves, by HTTPS (names and paths) or by raw TCP (ports). Which generation of an enclave takes
//! them is in the routes; nothing here asks whether it is well.

pub(crate) mod tcp;
