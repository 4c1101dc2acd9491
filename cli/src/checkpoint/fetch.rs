//! Downloading a checkpoint and proving it whole.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use cairn_proto::client::Client;
use cairn_proto::convert::{BlobName, relative_path};
use cairn_proto::v1::{File, GetCheckpointRequest, GetCheckpointResponse};
use cairn_stack::lineage::verify_folder;

use super::verify::require_intact;
use crate::transfer::{self, Transfer};

/// Sub-folder for the round's stack.
const STACK_FOLDER: &str = "stack";

/// `NAME` or `NAME@REV`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The model.
    pub model: String,
    /// Revision number or commit; empty for the newest.
    pub revision: String,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (model, revision) = text.split_once('@').unwrap_or((text, ""));
        if model.is_empty() || (text.contains('@') && revision.is_empty()) {
            return Err("write NAME or NAME@REV, e.g. trail@3".to_owned());
        }
        Ok(Self {
            model: model.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

/// A checkpoint as the coordinator describes it.
pub async fn describe(
    client: &Client,
    model: &str,
    revision: &str,
) -> Result<GetCheckpointResponse> {
    let request = GetCheckpointRequest {
        model: model.to_owned(),
        revision: revision.to_owned(),
    };
    client
        .call(|mut to| {
            let request = request.clone();
            async move { to.models.get_checkpoint(request).await }
        })
        .await
        .with_context(|| {
            format!(
                "look up {model}{}{revision}",
                if revision.is_empty() { "" } else { "@" }
            )
        })
}

/// What is fetched beside a checkpoint.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras {
    /// The round's stack, into `stack`.
    pub stack: bool,
    /// The same at the recipe's rank, into `stack-rRANK`.
    pub compressed: bool,
}

/// Downloads a checkpoint into `dir`, with what is asked for beside it; verifies digests and
/// signature; returns the commit.
pub async fn pull(
    client: &Client,
    model: &str,
    revision: &str,
    dir: &Path,
    extras: Extras,
) -> Result<String> {
    let answer = describe(client, model, revision).await?;
    let checkpoint = answer
        .checkpoint
        .context("the coordinator answered without the checkpoint")?;
    let mut files = transfers(&answer.files, dir)?;
    if extras.stack {
        ensure!(
            !answer.stack_files.is_empty(),
            "{model}@{} has no stack of its own: it is the base, or all its round added was revoked",
            checkpoint.revision
        );
        files.extend(transfers(&answer.stack_files, &dir.join(STACK_FOLDER))?);
    }
    if extras.compressed {
        ensure!(
            !answer.compressed_files.is_empty(),
            "{model}@{} has no compressed stack; `cairn checkpoint show` says why",
            checkpoint.revision
        );
        files.extend(transfers(&answer.compressed_files, dir)?);
    }
    transfer::download(client, &files).await?;
    let report =
        verify_folder(dir, Some(&client.identity().server_key)).context("verify the checkpoint")?;
    require_intact(&report)?;
    ensure!(
        report.signed.commit() == checkpoint.commit,
        "the coordinator named {} but sent {}",
        checkpoint.commit,
        report.signed.commit()
    );
    Ok(checkpoint.commit)
}

/// Where each file goes; paths are the coordinator's words and checked.
pub fn transfers(files: &[File], dir: &Path) -> Result<Vec<Transfer>> {
    files
        .iter()
        .map(|file| {
            let path = dir.join(relative_path(&file.path)?);
            let blob = file
                .blob
                .as_ref()
                .with_context(|| format!("{} has no digest", file.path))?;
            Ok(Transfer {
                blob: BlobName::try_from(blob)?,
                path,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_and_without_revision() {
        let named = |text: &str| {
            text.parse::<Named>()
                .map(|named| (named.model, named.revision))
        };
        assert_eq!(named("trail"), Ok(("trail".to_owned(), String::new())));
        assert_eq!(named("trail@3"), Ok(("trail".to_owned(), "3".to_owned())));
        assert!(named("@3").is_err());
        assert!(named("trail@").is_err());
    }

    #[test]
    fn a_path_that_leaves_the_folder_is_refused() {
        let file = File {
            path: "../evil".to_owned(),
            ..File::default()
        };
        assert!(transfers(&[file], Path::new("x")).is_err());
    }
}
