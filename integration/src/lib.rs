//! What stands in for the world around the daemon, and the simulated host.

pub mod eif;
pub mod sim;
