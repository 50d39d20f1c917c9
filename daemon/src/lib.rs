//! The control process: effects and wiring. See `daemon/ARCHITECTURE.md`.

pub mod admin;
pub mod allocate;
pub mod app;
pub mod asked;
pub mod atomic_file;
pub mod child_environment;
pub mod config;
pub mod control_plane;
pub mod ctl;
pub mod describe;
pub mod doctor;
pub mod events;
pub mod host;
pub mod imds;
pub mod jobs;
pub mod journal;
pub mod last_good;
pub mod launch;
pub mod launch_trace;
pub mod launches;
pub mod metrics;
pub mod nitro_cli;
pub mod pace;
pub mod pidfd;
pub mod procfs;
pub mod reconciler;
pub mod service_manager;
pub mod stop_notes;
pub mod systemd_bus;
#[cfg(test)]
mod test_support;
