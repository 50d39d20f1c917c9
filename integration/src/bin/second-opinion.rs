//! What others' stand-in for S3 says to the questions that the tests ask of ours, and whether the real image store gets
//! along with it. What it asks is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    enclaved_integration::second_opinion::main()
}
