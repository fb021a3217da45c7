//! FLOOR 7. One file per command: flags -> a plain config struct -> one library call -> output.
#![allow(clippy::print_stdout)]
#![allow(rustdoc::broken_intra_doc_links, reason = "help texts write [@revision]")]

// First: its macros are for all that follow.
#[macro_use]
mod output;

mod bench;
mod bundle;
mod chat;
mod check;
mod client;
mod common;
mod config;
mod demo;
mod dialect;
mod eval;
mod files;
mod health;
mod jobs;
mod limits;
mod memory;
mod merge;
mod pause_signal;
mod progress;
mod pull;
pub mod serve;
mod settings;
mod speed;
mod stop_signal;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::kernels;
use crate::telemetry;

#[derive(Parser)]
#[command(name = "tunesmith", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// One line per command: a variant here, a file beside this one, an arm in `main`.
#[derive(Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    Train(Box<train::TrainArgs>),
    Eval(Box<eval::EvalArgs>),
    /// Serve a model and its adapters through OpenAI's HTTP interface
    Serve(Box<serve::ServeArgs>),
    Merge(merge::MergeArgs),
    Chat(chat::ChatArgs),
    Check(check::CheckArgs),
    Bench(bench::BenchArgs),
    Pull(pull::PullArgs),
    Health(health::HealthArgs),
    Files(files::FilesArgs),
    Jobs(jobs::JobsArgs),
    /// Write the sources of the bundled tiny base model and the demo's dataset
    #[command(hide = true)]
    Bundle(bundle::Args),
}

/// Parses the command line and runs the command; returns the process's exit code.
pub fn main() -> ExitCode {
    kernels::claim_threads();
    let cli = Cli::parse();
    telemetry::init_tracing();
    let result: anyhow::Result<ExitCode> = match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Serve(args) => serve::run(*args),
        Command::Merge(args) => merge::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Health(args) => health::run(&args),
        Command::Files(args) => files::run(&args),
        Command::Jobs(args) => jobs::run(&args),
        Command::Bundle(args) => bundle::run(&args),
    };
    let code = result.unwrap_or_else(|error| {
        eprintln!("error: {}", in_one_line(&error));
        ExitCode::FAILURE
    });
    if let Some(reason) = output::fault() {
        eprintln!("error: standard output: {reason}");
        return ExitCode::FAILURE;
    }
    code
}

/// An error and its causes. Most errors say their cause themselves, which is then not said again.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}
