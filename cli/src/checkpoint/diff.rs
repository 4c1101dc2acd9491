//! What two checkpoints have in common, and what not.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use cairn_stack::lineage::{Contribution, Manifest, SignedManifest};
use serde_json::{Value, json};

use super::fetch::{Named, describe, transfers};
use crate::output::{Output, table};
use crate::round::events::{loss, short};
use crate::{Globals, session, transfer};

/// Runs `cairn checkpoint diff`.
pub async fn run(globals: &Globals, a: &str, b: &str, output: Output) -> Result<()> {
    let (a, b) = (read(globals, a).await?, read(globals, b).await?);
    let rows = compare(a.manifest(), b.manifest());
    output.result(&to_json(&a, &b, &rows), || to_text(&a, &b, &rows))
}

/// A manifest by the folder of its checkpoint, or by name from the coordinator.
async fn read(globals: &Globals, text: &str) -> Result<SignedManifest> {
    if Path::new(text).is_dir() {
        return SignedManifest::read(Path::new(text))
            .with_context(|| format!("read the manifest in {text}"));
    }
    let named: Named = text.parse().map_err(anyhow::Error::msg)?;
    let client = session::connect(globals)?;
    let answer = describe(&client, &named.model, &named.revision).await?;
    let files: Vec<_> = answer
        .files
        .into_iter()
        .filter(|file| file.path.starts_with("cairn-manifest."))
        .collect();
    let dir = tempfile::tempdir().context("make a folder")?;
    transfer::download(&client, &transfers(&files, dir.path())?).await?;
    SignedManifest::read(dir.path()).with_context(|| format!("read the manifest of {text}"))
}

/// A contribution that is in one of them or has another weight, with its weight in each.
struct Row<'a> {
    contribution: &'a Contribution,
    before: Option<f64>,
    after: Option<f64>,
}

fn compare<'a>(a: &'a Manifest, b: &'a Manifest) -> Vec<Row<'a>> {
    let index = |manifest: &'a Manifest| -> BTreeMap<&'a str, &'a Contribution> {
        manifest
            .contributions
            .iter()
            .map(|one| (one.id.as_str(), one))
            .collect()
    };
    let (old, new) = (index(a), index(b));
    let mut all = old.clone();
    all.extend(new.iter());
    all.into_values()
        .map(|contribution| Row {
            contribution,
            before: old.get(contribution.id.as_str()).map(|one| one.weight),
            after: new.get(contribution.id.as_str()).map(|one| one.weight),
        })
        .filter(|row| row.before != row.after)
        .collect()
}

fn to_json(a: &SignedManifest, b: &SignedManifest, rows: &[Row]) -> Value {
    let side = |signed: &SignedManifest| {
        let manifest = signed.manifest();
        json!({ "model": manifest.model, "revision": manifest.revision, "commit": signed.commit(), "contributions": manifest.contributions.len(), "gate_loss": manifest.scores.gate_after, "audit_loss": manifest.scores.audit_after })
    };
    let row = |row: &Row| json!({ "id": row.contribution.id, "round": row.contribution.round, "worker": row.contribution.worker, "shard": row.contribution.shard, "weight_a": row.before, "weight_b": row.after });
    json!({ "a": side(a), "b": side(b), "contributions": rows.iter().map(row).collect::<Vec<_>>() })
}

fn to_text(a: &SignedManifest, b: &SignedManifest, rows: &[Row]) -> String {
    let side = |signed: &SignedManifest| {
        let manifest = signed.manifest();
        format!(
            "{} revision {} {}: {} contributions, gate loss {}, audit loss {}",
            manifest.model,
            manifest.revision,
            short(&signed.commit()),
            manifest.contributions.len(),
            loss(manifest.scores.gate_after),
            loss(manifest.scores.audit_after)
        )
    };
    let weight =
        |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let body = if rows.is_empty() {
        "the same contributions with the same weights".to_owned()
    } else {
        let rows: Vec<Vec<String>> = rows
            .iter()
            .map(|row| {
                vec![
                    row.contribution.id.clone(),
                    row.contribution.worker.clone(),
                    row.contribution.shard.to_string(),
                    weight(row.before),
                    weight(row.after),
                ]
            })
            .collect();
        table(
            &[
                "contribution",
                "worker",
                "shard",
                "weight in a",
                "weight in b",
            ],
            &rows,
        )
    };
    format!("a  {}\nb  {}\n\n{body}", side(a), side(b))
}
