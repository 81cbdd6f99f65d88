//! The `close-sync` program: parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    close_sync::cli::main()
}
