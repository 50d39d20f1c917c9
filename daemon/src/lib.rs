//! The control process: effects and wiring. See `daemon/ARCHITECTURE.md`.

pub mod host;
