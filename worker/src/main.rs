//! The command line of `cairn-worker`: parses and dispatches.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use cairn_worker::offline;

/// Cairn's volunteer: trains adapters, scores them, and sends them in.
#[derive(Debug, Parser)]
#[command(name = "cairn-worker", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(offline::train::TrainArgs),
    Evaluate(offline::evaluate::EvaluateArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => offline::train::run(&args),
        Command::Evaluate(args) => offline::evaluate::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}
