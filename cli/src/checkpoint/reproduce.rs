//! Rebuilding a checkpoint from the manifest's parts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::client::Client;
use cairn_stack::adapter::{AdapterFile, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::digest::Digest;
use cairn_stack::files::FileEntry;
use cairn_stack::fold::{Term, fold};
use cairn_stack::lineage::{Contribution, SignedManifest};
use serde_json::{Value, json};

use super::fetch::{Named, describe, transfers};
use crate::round::events::short;
use crate::transfer;

/// What rebuilding found; there is only a report when every byte was the same.
pub struct Report {
    model: String,
    revision: u64,
    commit: String,
    contributions: usize,
    files: usize,
    bytes: u64,
}

impl Report {
    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({ "model": self.model, "revision": self.revision, "commit": self.commit, "contributions": self.contributions, "files": self.files, "bytes": self.bytes, "identical": true })
    }

    /// For people.
    pub fn text(&self) -> String {
        format!(
            "{} revision {} {} rebuilt from its base and {} contributions: {} files, {} bytes, all identical",
            self.model,
            self.revision,
            short(&self.commit),
            self.contributions,
            self.files,
            self.bytes
        )
    }
}

/// Downloads base and contributions, folds, and compares with what the signed manifest says.
pub async fn run(client: &Client, name: &Named, keep: Option<PathBuf>) -> Result<Report> {
    let target = describe(client, &name.model, &name.revision).await?;
    let scratch = tempfile::tempdir().context("make a folder")?;
    let signed = fetch_manifest(client, &target, &scratch.path().join("manifest")).await?;
    let manifest = signed.manifest();
    ensure!(
        manifest.contributions.is_empty() || !target.adapter_files.is_empty(),
        "the contributions of {}@{} cannot be fetched: only maintainers and evaluators may \
         (cairn login), and no more than some thousands at once",
        name.model,
        manifest.revision
    );
    let base_dir = scratch.path().join("base");
    let base = describe(client, &name.model, "0").await?;
    transfer::download(client, &transfers(&base.files, &base_dir)?).await?;
    check_base(&manifest.base, &base_dir)?;
    let adapters = scratch.path().join("adapters");
    transfer::download(client, &transfers(&target.adapter_files, &adapters)?).await?;
    let opened = manifest
        .contributions
        .iter()
        .map(|one| open_contribution(&adapters, one))
        .collect::<Result<Vec<AdapterFile>>>()?;
    let terms: Vec<Term> = opened
        .iter()
        .zip(&manifest.contributions)
        .map(|(adapter, one)| Term {
            adapter,
            weight: one.weight,
        })
        .collect();
    let out = keep.unwrap_or_else(|| scratch.path().join("folded"));
    let checkpoint = Checkpoint::open(&base_dir).context("open the base")?;
    let report = fold(&checkpoint, &terms, &out).context("fold")?;
    compare(&manifest.files, &report.files)?;
    Ok(Report {
        model: manifest.model.clone(),
        revision: manifest.revision,
        commit: signed.commit(),
        contributions: terms.len(),
        files: report.files.len(),
        bytes: report.files.iter().map(|file| file.size).sum(),
    })
}

async fn fetch_manifest(
    client: &Client,
    target: &cairn_proto::v1::GetCheckpointResponse,
    dir: &Path,
) -> Result<SignedManifest> {
    let is_manifest = |path: &str| path.starts_with("cairn-manifest.");
    let files: Vec<_> = target
        .files
        .iter()
        .filter(|file| is_manifest(&file.path))
        .cloned()
        .collect();
    transfer::download(client, &transfers(&files, dir)?).await?;
    let signed = SignedManifest::read(dir).context("read the manifest")?;
    signed
        .expect_key(&client.identity().server_key)
        .context("check who signed the manifest")?;
    Ok(signed)
}

fn check_base(expected: &[FileEntry], dir: &Path) -> Result<()> {
    for file in expected {
        let found = FileEntry::of_file(dir, &file.path)
            .with_context(|| format!("read the base's {}", file.path))?;
        ensure!(
            found == *file,
            "the base's {} is not the file the manifest names",
            file.path
        );
    }
    Ok(())
}

fn open_contribution(adapters: &Path, one: &Contribution) -> Result<AdapterFile> {
    let dir = adapters.join(&one.id);
    for (name, expected) in [
        (WEIGHTS_FILE, one.adapter),
        (CONFIG_FILE, one.adapter_config),
    ] {
        let (digest, _) = Digest::of_file(&dir.join(name))
            .with_context(|| format!("read {name} of contribution {}", one.id))?;
        ensure!(
            digest == expected,
            "{name} of contribution {} is not the file the manifest names",
            one.id
        );
    }
    let adapter = AdapterFile::open(&dir);
    let adapter = adapter.with_context(|| format!("open contribution {}", one.id))?;
    // A stack may have more of them than files may be open.
    Ok(adapter.closed())
}

fn compare(published: &[FileEntry], folded: &[FileEntry]) -> Result<()> {
    let folded: BTreeMap<&str, &FileEntry> = folded
        .iter()
        .map(|file| (file.path.as_str(), file))
        .collect();
    let mut differences = Vec::new();
    for file in published {
        match folded.get(file.path.as_str()) {
            Some(found) if *found == file => {}
            Some(_) => differences.push(format!("  {}: other bytes", file.path)),
            None => differences.push(format!("  {}: not made by the fold", file.path)),
        }
    }
    if !differences.is_empty() || folded.len() != published.len() {
        bail!(
            "the rebuilt checkpoint differs from the published one:\n{}",
            differences.join("\n")
        );
    }
    Ok(())
}
