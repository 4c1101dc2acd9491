//! The command line of `cairn-worker`: parses and dispatches.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use cairn_worker::allocator::{MiMalloc, keep_pages};
use cairn_worker::device::list;
use cairn_worker::error::WorkerError;
use cairn_worker::offline::{self, OfflineError};
use cairn_worker::{join, run, status};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Cairn's volunteer: trains adapters, scores them, and sends them in
///
/// It only dials out: no port is opened, and nothing but the home folder is written.
#[derive(Parser)]
#[command(name = "cairn-worker", version)]
#[command(
    after_help = "First steps:\n  cairn-worker devices\n  cairn-worker join 'cairn://host:7600/#TOKEN~spki-sha256:HEX'\n  cairn-worker run\n  cairn-worker status"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Join(join::JoinArgs),
    Run(run::RunArgs),
    Status(status::StatusArgs),
    Devices(list::DevicesArgs),
    #[command(hide = true)]
    Probe(list::ProbeArgs),
    Train(offline::train::TrainArgs),
    Evaluate(offline::evaluate::EvaluateArgs),
    Batch(offline::batch::BatchArgs),
}

fn main() -> ExitCode {
    keep_pages();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error")),
        )
        .init();
    match Cli::parse().command {
        Command::Join(args) => finish_online(online(join::run(args))),
        Command::Run(args) => finish_online(online(run::run(args))),
        Command::Status(args) => finish_online(online(status::run(args))),
        Command::Devices(args) => finish(list::run(&args).map_err(|error| (error.to_string(), 1))),
        Command::Probe(args) => finish(list::probe(&args).map_err(|error| (error.to_string(), 1))),
        Command::Train(args) => finish_offline(offline::train::run(&args)),
        Command::Evaluate(args) => finish_offline(offline::evaluate::run(&args)),
        Command::Batch(args) => finish_offline(offline::batch::run(&args)),
    }
}

/// Runs a command that talks to a coordinator.
fn online(command: impl Future<Output = Result<(), WorkerError>>) -> Result<(), WorkerError> {
    // One TLS provider for the process; a second install only says that there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| WorkerError::Setup(format!("start the runtime: {error}")))?
        .block_on(command)
}

fn finish_online(result: Result<(), WorkerError>) -> ExitCode {
    finish(result.map_err(|error| (error.to_string(), error.exit_code())))
}

fn finish_offline(result: Result<(), OfflineError>) -> ExitCode {
    finish(result.map_err(|error| (error.to_string(), error.exit_code())))
}

fn finish(result: Result<(), (String, i32)>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err((text, code)) => {
            eprintln!("error: {text}");
            ExitCode::from(u8::try_from(code).unwrap_or(1))
        }
    }
}
