//! `cairn`: the maintainers' and researchers' program.

mod checkpoint;
mod clock;
mod contribution;
mod curation;
mod dataset;
mod demo;
mod fold;
mod log;
mod login;
mod model;
mod output;
mod pages;
mod round;
mod session;
mod token;
mod transfer;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use output::Output;

/// Cairn trains language models together: this program schedules rounds and fetches what they made.
#[derive(Debug, Parser)]
#[command(
    name = "cairn",
    version,
    after_help = "Start with:\n  cairn demo                     see a whole round on this machine\n  cairn login 'cairn://...'      sign in to a coordinator as a maintainer\n  cairn checkpoint pull NAME DIR  download the newest checkpoint"
)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Globals {
    /// Folder for the identity and the server's address [default: the platform's data folder]
    #[arg(long, global = true, env = "CAIRN_HOME", value_name = "DIR")]
    pub home: Option<PathBuf>,
    /// Print one JSON object per result on stdout, and nothing else there
    #[arg(long, global = true)]
    pub json: bool,
    /// Allow plain text to another machine (cairn+insecure://)
    #[arg(long, global = true)]
    pub force_insecure: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sign in to a coordinator with a join URL
    Login(login::LoginArgs),
    /// Make join tokens
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Add and list models
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Curate, add and list datasets
    #[command(subcommand)]
    Dataset(dataset::DatasetCommand),
    /// Schedule, watch and stop rounds
    #[command(subcommand)]
    Round(round::RoundCommand),
    /// List, show, download, verify, rebuild and compare checkpoints
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    /// Show single contributions, take them back, list what was taken back
    #[command(subcommand)]
    Contribution(contribution::ContributionCommand),
    /// Void strikes
    #[command(subcommand)]
    Strike(contribution::StrikeCommand),
    /// Copy and check the coordinator's log of receipts and published checkpoints
    #[command(subcommand)]
    Log(log::LogCommand),
    /// Fold adapters into a base checkpoint, offline
    Fold(fold::FoldArgs),
    /// Run a coordinator, an evaluator, volunteers and a cheat on this machine for two real rounds
    Demo(demo::DemoArgs),
    /// The demo's cheat
    #[command(hide = true)]
    DemoCheat(demo::CheatArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = session::next_step(&error) {
                eprintln!("  {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(cli: Cli) -> Result<()> {
    let globals = cli.globals;
    let output = Output::from_flag(globals.json);
    match cli.command {
        Command::Login(args) => login::run(&globals, args, output).await,
        Command::Token(command) => token::run(&globals, command, output).await,
        Command::Model(command) => model::run(&globals, command, output).await,
        Command::Dataset(command) => dataset::run(&globals, command, output).await,
        Command::Round(command) => round::run(&globals, command, output).await,
        Command::Checkpoint(command) => checkpoint::run(&globals, command, output).await,
        Command::Contribution(command) => contribution::run(&globals, command, output).await,
        Command::Strike(command) => contribution::strike(&globals, command, output).await,
        Command::Log(command) => log::run(&globals, command, output).await,
        Command::Fold(args) => fold::run(&args, output),
        Command::Demo(args) => demo::run(args).await,
        Command::DemoCheat(args) => demo::cheat(args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
