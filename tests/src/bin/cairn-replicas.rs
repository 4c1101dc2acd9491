//! `cairn-replicas`: several coordinators over one PostgreSQL under kill -9. A table and one last line
//! of JSON on standard output, progress on standard error.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cairn_tests::replicas::{Size, run};
use clap::Parser;

/// Kills coordinators while volunteers submit, and looks for everything that was acknowledged
#[derive(Parser)]
#[command(name = "cairn-replicas", version)]
struct Cli {
    /// An empty PostgreSQL database; scripts/postgres.sh makes one
    #[arg(long, env = "CAIRN_TEST_POSTGRES", hide_env_values = true)]
    database_url: String,
    /// Coordinators
    #[arg(long, default_value_t = 3)]
    replicas: usize,
    /// Rounds
    #[arg(long, default_value_t = 105)]
    rounds: usize,
    /// Rounds at once
    #[arg(long, default_value_t = 4)]
    at_once: usize,
    /// Shards of each round
    #[arg(long, default_value_t = 40)]
    shards: u32,
    /// Volunteers
    #[arg(long, default_value_t = 40)]
    volunteers: usize,
    /// Copies that each volunteer hands in, in each round
    #[arg(long, default_value_t = 2)]
    copies: u32,
    /// Evaluators
    #[arg(long, default_value_t = 4)]
    evaluators: usize,
    /// Mean seconds between two kills
    #[arg(long, default_value_t = 8)]
    kill_every: u64,
    /// Blobs in a bucket: an S3 server in this process, to which volunteers send directly
    #[arg(long)]
    bucket: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let size = Size {
        replicas: cli.replicas,
        rounds: cli.rounds,
        rounds_at_once: cli.at_once,
        shards: cli.shards,
        volunteers: cli.volunteers,
        copies: cli.copies,
        evaluators: cli.evaluators,
        kill_every: Duration::from_secs(cli.kill_every),
        bucket: cli.bucket,
    };
    let folder = tempfile::tempdir().context("make a folder")?;
    let report = run(&size, &cli.database_url, folder.path()).await?;
    println!("{}", report.text());
    println!("{}", serde_json::to_string(&report)?);
    ensure!(report.is_good(), "something was lost or counted twice");
    Ok(())
}
