//! `cargo run --release -p enclaved-integration --bin bench`: what the real programs cost beside their peers. What is
//! compared and how to read it is said in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    enclaved_integration::bench::main()
}
