//! `cairn checkpoint`: listing, downloading, verifying, rebuilding and comparing checkpoints.

mod diff;
mod fetch;
mod reproduce;
mod show;
mod spectrum;
mod verify;

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use ed25519_dalek::VerifyingKey;
use serde_json::json;

use crate::output::Output;
use crate::round::events::short;
use crate::{Globals, session};
use fetch::Named;
pub use fetch::{Extras, pull};

/// What `cairn checkpoint` can do.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List a model's checkpoints, newest first: losses, norm and effective rank of the stack, and
    /// what was revoked
    List {
        /// Name of the model
        name: String,
    },
    /// Show a checkpoint: losses, norm and effective rank of its stack module by module
    Show {
        /// Model, and a revision number or commit behind @ when not the newest
        #[arg(value_name = "NAME[@REV]")]
        name: Named,
    },
    /// Download a checkpoint; broken off, it goes on where it stopped
    #[command(
        after_help = "Examples:\n  cairn checkpoint pull trail ./trail\n  cairn checkpoint pull trail@3 ./trail-3 --stack"
    )]
    Pull {
        /// Model, and a revision number or commit behind @ when not the newest
        #[arg(value_name = "NAME[@REV]")]
        name: Named,
        /// Folder to put it in
        dir: PathBuf,
        /// Also fetch the round's stack as one PEFT adapter, into DIR/stack
        #[arg(long)]
        stack: bool,
        /// Also fetch the round's stack at the recipe's rank, approximately, into DIR/stack-rRANK
        #[arg(long)]
        compressed: bool,
    },
    /// Check a downloaded checkpoint offline: every file's digests and the manifest's signature. A
    /// coordinator that can be reached is asked what was revoked since
    #[command(after_help = "Example:\n  cairn checkpoint verify ./trail --key 5f1c... --offline")]
    Verify {
        /// Folder of the checkpoint
        dir: PathBuf,
        /// The coordinator's public key, hex [default: the one kept at login, if any]
        #[arg(long, value_name = "HEX", value_parser = parse_key)]
        key: Option<VerifyingKey>,
        /// Ask nobody what was revoked since
        #[arg(long)]
        offline: bool,
    },
    /// Rebuild a checkpoint from its base and its contributions, and compare every byte
    #[command(after_help = "Example:\n  cairn checkpoint reproduce trail@3")]
    Reproduce {
        /// Model, and a revision number or commit behind @ when not the newest
        #[arg(value_name = "NAME[@REV]")]
        name: Named,
        /// Keep the rebuilt checkpoint in this folder
        #[arg(long, value_name = "DIR")]
        keep: Option<PathBuf>,
    },
    /// Compare two checkpoints: contributions, weights, scores, norms
    #[command(after_help = "Example:\n  cairn checkpoint diff trail@2 trail@3")]
    Diff {
        /// The first: a name, with or without @REV, or a folder
        a: String,
        /// The second: the same
        b: String,
    },
}

fn parse_key(text: &str) -> Result<VerifyingKey, String> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| "a public key is 64 hex digits".to_owned())?;
    VerifyingKey::from_bytes(&bytes).map_err(|_| "not an Ed25519 public key".to_owned())
}

/// Runs `cairn checkpoint`.
pub async fn run(globals: &Globals, command: CheckpointCommand, output: Output) -> Result<()> {
    match command {
        CheckpointCommand::List { name } => {
            show::list(&session::connect(globals)?, &name, output).await
        }
        CheckpointCommand::Show { name } => {
            let client = session::connect(globals)?;
            let found = fetch::describe(&client, &name.model, &name.revision).await?;
            show::show(&found, output)
        }
        CheckpointCommand::Pull {
            name,
            dir,
            stack,
            compressed,
        } => {
            let client = session::connect(globals)?;
            let extras = Extras { stack, compressed };
            let commit = pull(&client, &name.model, &name.revision, &dir, extras).await?;
            output.result(
                &json!({ "model": name.model, "commit": commit, "dir": dir }),
                || {
                    format!(
                        "{} {} verified, in {}",
                        name.model,
                        short(&commit),
                        dir.display()
                    )
                },
            )
        }
        CheckpointCommand::Verify { dir, key, offline } => {
            verify::run(globals, &dir, key, offline, output).await
        }
        CheckpointCommand::Reproduce { name, keep } => {
            let report = reproduce::run(&session::connect(globals)?, &name, keep).await?;
            output.result(&report.json(), || report.text())
        }
        CheckpointCommand::Diff { a, b } => diff::run(globals, &a, &b, output).await,
    }
}
