//! The program: parse, run, choose the exit code.

fn main() -> std::process::ExitCode {
    tunesmith::cli::main()
}
