//! What two checkpoints have in common, and what not.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use cairn_proto::client::Client;
use cairn_proto::v1;
use cairn_stack::lineage::{Contribution, Manifest, SignedManifest};
use serde_json::{Value, json};

use super::fetch::{Named, describe, transfers};
use super::spectrum::{self, Spectrum, number};
use crate::output::{Output, table};
use crate::round::events::{loss, short};
use crate::{Globals, contribution, session, transfer};

/// Most contributions whose norm and score are asked for, one by one.
const ASKED_MAX: usize = 200;

/// One of the two.
struct Side {
    signed: SignedManifest,
    /// What the coordinator measured; nothing for a folder.
    spectrum: Spectrum,
    is_folder: bool,
}

/// Runs `cairn checkpoint diff`.
pub async fn run(globals: &Globals, a: &str, b: &str, output: Output) -> Result<()> {
    let (a, b) = (read(globals, a).await?, read(globals, b).await?);
    let mut rows = compare(a.signed.manifest(), b.signed.manifest());
    // Two folders are compared offline, too, with what their manifests say.
    if !(a.is_folder && b.is_folder) {
        ask(&session::connect(globals)?, &mut rows).await;
    }
    output.result(&to_json(&a, &b, &rows), || to_text(&a, &b, &rows))
}

/// A manifest by the folder of its checkpoint, or by name from the coordinator.
async fn read(globals: &Globals, text: &str) -> Result<Side> {
    if Path::new(text).is_dir() {
        let signed = SignedManifest::read(Path::new(text))
            .with_context(|| format!("read the manifest in {text}"))?;
        return Ok(Side {
            signed,
            spectrum: Spectrum::default(),
            is_folder: true,
        });
    }
    let named: Named = text.parse().map_err(anyhow::Error::msg)?;
    let client = session::connect(globals)?;
    let answer = describe(&client, &named.model, &named.revision).await?;
    let spectrum = spectrum::of(&answer.checkpoint.unwrap_or_default());
    let files: Vec<_> = answer
        .files
        .into_iter()
        .filter(|file| file.path.starts_with("cairn-manifest."))
        .collect();
    let dir = tempfile::tempdir().context("make a folder")?;
    transfer::download(&client, &transfers(&files, dir.path())?).await?;
    let signed =
        SignedManifest::read(dir.path()).with_context(|| format!("read the manifest of {text}"))?;
    Ok(Side {
        signed,
        spectrum,
        is_folder: false,
    })
}

/// A contribution that is in one of them or has another weight, with its weight in each.
struct Row<'a> {
    contribution: &'a Contribution,
    before: Option<f64>,
    after: Option<f64>,
    /// What the coordinator says of it.
    told: Option<v1::Contribution>,
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
            told: None,
        })
        .filter(|row| row.before != row.after)
        .collect()
}

/// Adds norms, scores and revocations; what cannot be had stays a dash.
async fn ask(client: &Client, rows: &mut [Row<'_>]) {
    if rows.len() > ASKED_MAX {
        eprintln!("norms and scores are asked for at most {ASKED_MAX} contributions");
        return;
    }
    for row in rows {
        let Ok(found) = contribution::get(client, &row.contribution.id).await else {
            return;
        };
        row.told = found.contribution;
    }
}

fn to_json(a: &Side, b: &Side, rows: &[Row]) -> Value {
    let side = |side: &Side| {
        let manifest = side.signed.manifest();
        json!({ "model": manifest.model, "revision": manifest.revision, "commit": side.signed.commit(), "contributions": manifest.contributions.len(), "gate_loss": manifest.scores.gate_after, "audit_loss": manifest.scores.audit_after, "norm": side.spectrum.norm, "effective_rank": side.spectrum.effective_rank, "modules": side.spectrum.modules })
    };
    let row = |row: &Row| {
        let told = row.told.as_ref();
        let norm = told.map(|told| told.norm).filter(|norm| *norm > 0.0);
        let revoked = told.map(|told| told.revoked_ms > 0);
        json!({ "id": row.contribution.id, "round": row.contribution.round, "worker": row.contribution.worker, "shard": row.contribution.shard, "weight_a": row.before, "weight_b": row.after, "norm": norm, "gate_loss": told.and_then(|told| told.gate_loss), "gain": told.and_then(|told| told.gain), "revoked": revoked })
    };
    json!({ "a": side(a), "b": side(b), "contributions": rows.iter().map(row).collect::<Vec<_>>() })
}

fn to_text(a: &Side, b: &Side, rows: &[Row]) -> String {
    let side = |side: &Side| {
        let manifest = side.signed.manifest();
        format!(
            "{} revision {} {}: {} contributions, gate loss {}, audit loss {}, norm {}, effective rank {}",
            manifest.model,
            manifest.revision,
            short(&side.signed.commit()),
            manifest.contributions.len(),
            loss(manifest.scores.gate_after),
            loss(manifest.scores.audit_after),
            number(side.spectrum.norm, 4),
            number(side.spectrum.effective_rank, 1)
        )
    };
    let cells = |row: &Row| {
        let told = row.told.clone().unwrap_or_default();
        vec![
            row.contribution.id.clone(),
            row.contribution.worker.clone(),
            row.contribution.shard.to_string(),
            number(row.before, 4),
            number(row.after, 4),
            number((told.norm > 0.0).then_some(told.norm), 4),
            loss(told.gate_loss),
            number(told.gain, 4),
            if told.revoked_ms > 0 { "revoked" } else { "" }.to_owned(),
        ]
    };
    let body = if rows.is_empty() {
        "the same contributions with the same weights".to_owned()
    } else {
        let rows: Vec<Vec<String>> = rows.iter().map(cells).collect();
        let header = [
            "contribution",
            "worker",
            "shard",
            "weight in a",
            "weight in b",
            "norm",
            "gate loss",
            "gain",
            "",
        ];
        table(&header, &rows)
    };
    format!("a  {}\nb  {}\n\n{body}", side(a), side(b))
}
