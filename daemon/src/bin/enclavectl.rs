//! `enclavectl`: asks and tells the running daemon, and checks configurations and images without one. All of it is in
//! [`enclaved::ctl`].

use std::process::ExitCode;

fn main() -> ExitCode {
    enclaved::ctl::main(std::env::args_os())
}
