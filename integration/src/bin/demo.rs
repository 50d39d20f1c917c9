//! `cargo demo`: the life of an enclave on a simulated host, with the real `enclaved`. What it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    enclaved_integration::demo::main()
}
