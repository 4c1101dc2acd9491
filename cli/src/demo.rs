//! `cairn demo`: a coordinator, an evaluator, three volunteers and a cheat, as separate processes
//! on this machine, for two real rounds.

mod cheat;
mod cluster;
mod files;
mod process;
mod story;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

pub use cheat::{CheatArgs, cheat};

/// Runs a whole community on this machine: a coordinator, an evaluator, three volunteers, and a
/// cheat, each a process of its own, for two rounds on a small model that comes with this program.
/// One volunteer is killed in the middle of its work. Needs no network and no graphics card.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cairn demo --dir ./cairn-demo")]
pub struct DemoArgs {
    /// Folder for everything the demo makes; must not exist, or be empty [default: a new one among the temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How many rounds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10))]
    rounds: u32,
}

/// Runs the demo; Ctrl-C ends every process it started.
pub async fn run(args: DemoArgs) -> Result<()> {
    let dir = folder(args.dir)?;
    let mut cluster = cluster::Cluster::new(&dir)?;
    let outcome = tokio::select! {
        outcome = story::tell(&mut cluster, args.rounds) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("stopped by Ctrl-C")),
    };
    cluster.leave().await;
    outcome.with_context(|| {
        format!(
            "the demo did not work out; its logs are in {}",
            dir.join("logs").display()
        )
    })
}

fn folder(chosen: Option<PathBuf>) -> Result<PathBuf> {
    let dir = match chosen {
        None => tempfile::Builder::new()
            .prefix("cairn-demo-")
            .tempdir()
            .context("make a folder")?
            .keep(),
        Some(dir) => {
            std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
            let mut entries =
                std::fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
            ensure!(
                entries.next().is_none(),
                "{} is not empty; choose another folder, or remove it",
                dir.display()
            );
            dir
        }
    };
    dir.canonicalize()
        .with_context(|| format!("find {}", dir.display()))
}
