//! The control process: effects and wiring. See `daemon/ARCHITECTURE.md`.

pub mod admin;
pub mod config;
pub mod control_plane;
pub mod events;
pub mod host;
pub mod jobs;
pub mod metrics;
pub mod reconciler;
