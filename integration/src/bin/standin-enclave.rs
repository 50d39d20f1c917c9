//! The inside of a stand-in enclave; see [`enclaved_integration::enclave`].

use clap::Parser;
use enclaved_integration::enclave::{Options, main as run};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("standin-enclave: {error:#}");
            ExitCode::FAILURE
        }
    }
}
