//! The stand-in for AWS's nitro-cli; see [`enclaved_integration::nitro_cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    enclaved_integration::nitro_cli::main()
}
