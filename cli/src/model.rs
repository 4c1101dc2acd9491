//! `cairn model`: base checkpoints and the lines of checkpoints over them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cairn_proto::client::Client;
use cairn_proto::convert::BlobName;
use cairn_proto::limits::PAGE_SIZE_MAX;
use cairn_proto::v1::{self, Checkpoint as Head, CreateModelRequest, ListModelsRequest, Model};
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::files::FileEntry;
use clap::Subcommand;
use serde_json::json;

use crate::output::Output;
use crate::round::events::{loss, short};
use crate::transfer::{self, Transfer};
use crate::{Globals, clock, pages, session};

/// What `cairn model` can do.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Add a base checkpoint: a folder in Hugging Face layout
    #[command(after_help = "Example:\n  cairn model add ./SmolLM2-135M --name smollm")]
    Add {
        /// Folder with config.json, the weights and the tokenizer
        dir: PathBuf,
        /// Name of the model
        #[arg(long)]
        name: String,
    },
    /// List the models and their newest checkpoints
    List,
}

/// Runs `cairn model`.
pub async fn run(globals: &Globals, command: ModelCommand, output: Output) -> Result<()> {
    match command {
        ModelCommand::Add { dir, name } => {
            let checked = check(&dir)?;
            let client = session::connect(globals)?;
            let model = add(&client, &checked, &name).await?;
            let head = model.head.unwrap_or_default();
            output.result(
                &json!({ "model": model.name, "revision": head.revision, "commit": head.commit }),
                || {
                    format!(
                        "added {} ({} files), revision {} {}",
                        model.name,
                        checked.len(),
                        head.revision,
                        short(&head.commit)
                    )
                },
            )
        }
        ModelCommand::List => list(&session::connect(globals)?, output).await,
    }
}

/// One file of a checked checkpoint folder.
pub struct CheckedFile {
    path: String,
    sha256: String,
    transfer: Transfer,
}

/// Checks the whole folder on this machine before a byte is sent.
pub fn check(dir: &Path) -> Result<Vec<CheckedFile>> {
    ensure!(dir.is_dir(), "there is no folder {}", dir.display());
    let checkpoint = Checkpoint::open(dir).with_context(|| format!("check {}", dir.display()))?;
    let mut files = Vec::new();
    for path in checkpoint.files() {
        let full = dir.join(&path);
        let entry =
            FileEntry::of_file(dir, &path).with_context(|| format!("read {}", full.display()))?;
        let blob = BlobName {
            digest: entry.blake3,
            size_bytes: entry.size,
        };
        files.push(CheckedFile {
            path,
            sha256: entry.sha256,
            transfer: Transfer { blob, path: full },
        });
    }
    Ok(files)
}

/// Uploads what is missing and makes the model.
pub async fn add(client: &Client, files: &[CheckedFile], name: &str) -> Result<Model> {
    let transfers: Vec<Transfer> = files.iter().map(|file| file.transfer.clone()).collect();
    let moved = transfer::upload(client, &transfers).await?;
    eprintln!(
        "uploaded {} files ({} bytes), {} were there already",
        moved.blobs, moved.bytes, moved.held
    );
    let request = CreateModelRequest {
        name: name.to_owned(),
        files: files
            .iter()
            .map(|file| v1::File {
                path: file.path.clone(),
                blob: Some(file.transfer.blob.into()),
                sha256: file.sha256.clone(),
            })
            .collect(),
        request_id: session::request_id(),
    };
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.models.create_model(request).await }
        })
        .await
        .context("make the model")?;
    answer
        .model
        .context("the coordinator answered without the model")
}

async fn list(client: &Client, output: Output) -> Result<()> {
    let models = pages::all(|page_token| async {
        let request = ListModelsRequest {
            page_size: PAGE_SIZE_MAX as i32,
            page_token,
        };
        let page = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.models.list_models(request).await }
            })
            .await
            .context("list the models")?;
        Ok((page.models, page.next_page_token))
    })
    .await?;
    let heads: Vec<(String, Head)> = models
        .into_iter()
        .map(|model| (model.name, model.head.unwrap_or_default()))
        .collect();
    let header = [
        "model",
        "revision",
        "commit",
        "contributions",
        "gate loss",
        "audit loss",
        "made",
    ];
    output.list(
        &heads,
        &header,
        |(model, head)| json!({ "model": model, "revision": head.revision, "commit": head.commit, "contributions": head.contributions, "gate_loss": head.gate_loss, "audit_loss": head.audit_loss }),
        |(model, head)| {
            vec![
                model.clone(),
                head.revision.to_string(),
                short(&head.commit).to_owned(),
                head.contributions.to_string(),
                loss(head.gate_loss),
                loss(head.audit_loss),
                clock::date(head.created_ms),
            ]
        },
    )
}
