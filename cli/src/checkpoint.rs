//! `cairn checkpoint`: listing, downloading, verifying, rebuilding and comparing checkpoints.

mod diff;
mod fetch;
mod reproduce;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::client::Client;
use cairn_proto::identity::Identity;
use cairn_proto::limits::PAGE_SIZE_MAX;
use cairn_proto::v1::ListCheckpointsRequest;
use cairn_stack::lineage::{FolderReport, verify_folder};
use clap::Subcommand;
use ed25519_dalek::VerifyingKey;
use serde_json::json;

use crate::output::Output;
use crate::round::events::{loss, short};
use crate::{Globals, clock, pages, session};
use fetch::Named;
pub use fetch::pull;

/// What `cairn checkpoint` can do.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List a model's checkpoints, newest first
    List {
        /// Name of the model
        name: String,
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
    },
    /// Check a downloaded checkpoint offline: every file's digests and the manifest's signature
    #[command(after_help = "Example:\n  cairn checkpoint verify ./trail --key 5f1c...")]
    Verify {
        /// Folder of the checkpoint
        dir: PathBuf,
        /// The coordinator's public key, hex [default: the one kept at login, if any]
        #[arg(long, value_name = "HEX", value_parser = parse_key)]
        key: Option<VerifyingKey>,
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
    /// Compare two checkpoints: contributions, weights, scores
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
        CheckpointCommand::List { name } => list(&session::connect(globals)?, &name, output).await,
        CheckpointCommand::Pull { name, dir, stack } => {
            let client = session::connect(globals)?;
            let commit = pull(&client, &name.model, &name.revision, &dir, stack).await?;
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
        CheckpointCommand::Verify { dir, key } => verify(globals, &dir, key, output),
        CheckpointCommand::Reproduce { name, keep } => {
            let report = reproduce::run(&session::connect(globals)?, &name, keep).await?;
            output.result(&report.json(), || report.text())
        }
        CheckpointCommand::Diff { a, b } => diff::run(globals, &a, &b, output).await,
    }
}

fn verify(
    globals: &Globals,
    dir: &std::path::Path,
    key: Option<VerifyingKey>,
    output: Output,
) -> Result<()> {
    ensure!(dir.is_dir(), "there is no folder {}", dir.display());
    let kept = session::identity_path(globals)
        .ok()
        .and_then(|path| Identity::load(&path).ok());
    let key = key.or(kept.map(|identity| identity.server_key));
    let report =
        verify_folder(dir, key.as_ref()).with_context(|| format!("verify {}", dir.display()))?;
    if key.is_none() {
        eprintln!(
            "signed by {}; whose key that is, this machine does not know (--key)",
            report.signed.key_hex()
        );
    }
    require_intact(&report)?;
    let commit = report.signed.commit();
    output.result(
        &json!({
            "commit": commit,
            "model": report.signed.manifest().model,
            "revision": report.signed.manifest().revision,
            "files": report.intact.len(),
            "key": report.signed.key_hex(),
            "key_known": key.is_some(),
            "unexpected": report.unexpected,
        }),
        || {
            format!(
                "{} revision {} {}: {} files and the signature are right",
                report.signed.manifest().model,
                report.signed.manifest().revision,
                short(&commit),
                report.intact.len()
            )
        },
    )
}

/// Fails naming every file that is missing or has other bytes.
fn require_intact(report: &FolderReport) -> Result<()> {
    if report.is_intact() {
        return Ok(());
    }
    let changed = report
        .changed
        .iter()
        .map(|path| format!("  {path}: other bytes than were published"));
    let missing = report
        .missing
        .iter()
        .map(|path| format!("  {path}: missing"));
    bail!(
        "not the published checkpoint:\n{}",
        changed.chain(missing).collect::<Vec<_>>().join("\n")
    )
}

async fn list(client: &Client, model: &str, output: Output) -> Result<()> {
    let checkpoints = pages::all(|page_token| async {
        let request = ListCheckpointsRequest {
            model: model.to_owned(),
            page_size: PAGE_SIZE_MAX as i32,
            page_token,
        };
        let page = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.models.list_checkpoints(request).await }
            })
            .await
            .context("list the checkpoints")?;
        Ok((page.checkpoints, page.next_page_token))
    })
    .await?;
    output.list(
        &checkpoints,
        &["revision", "commit", "contributions", "gate loss", "audit loss", "made"],
        |one| json!({ "model": one.model, "revision": one.revision, "commit": one.commit, "parent": one.parent_commit, "round": one.round_id, "contributions": one.contributions, "gate_loss": one.gate_loss, "audit_loss": one.audit_loss, "created_ms": one.created_ms }),
        |one| {
            vec![
                one.revision.to_string(),
                short(&one.commit).to_owned(),
                one.contributions.to_string(),
                loss(one.gate_loss),
                loss(one.audit_loss),
                clock::date(one.created_ms),
            ]
        },
    )
}
