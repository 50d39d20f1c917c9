//! The control process: effects and wiring. See `daemon/ARCHITECTURE.md`.

pub mod atomic_file;
pub mod host;
pub mod launch;
pub mod launch_trace;
pub mod nitro_cli;
pub mod pidfd;
pub mod procfs;
#[cfg(test)]
mod test_support;
