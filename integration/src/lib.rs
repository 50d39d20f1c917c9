//! skeleton

pub mod eif;
