//! Is a folder what was published, and has anything in it been revoked since?

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::client::{Client, Options};
use cairn_proto::identity::Identity;
use cairn_proto::v1::Revocation;
use cairn_stack::lineage::{FolderReport, Manifest, verify_folder};
use ed25519_dalek::VerifyingKey;
use serde_json::json;

use crate::output::Output;
use crate::round::events::short;
use crate::{Globals, contribution, session};

/// How long the coordinator is waited for: what is offline is verified without it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Runs `cairn checkpoint verify`.
pub async fn run(
    globals: &Globals,
    dir: &Path,
    key: Option<VerifyingKey>,
    offline: bool,
    output: Output,
) -> Result<()> {
    ensure!(dir.is_dir(), "there is no folder {}", dir.display());
    let kept = session::identity_path(globals)
        .ok()
        .and_then(|path| Identity::load(&path).ok());
    let expected = key.or(kept.as_ref().map(|identity| identity.server_key));
    let report = verify_folder(dir, expected.as_ref())
        .with_context(|| format!("verify {}", dir.display()))?;
    if expected.is_none() {
        eprintln!(
            "signed by {}; whose key that is, this machine does not know (--key)",
            report.signed.key_hex()
        );
    }
    require_intact(&report)?;
    let manifest = report.signed.manifest();
    let asked = match kept.filter(|identity| identity.server_key == *report.signed.key()) {
        Some(identity) if !offline => ask(globals, identity, manifest).await,
        _ => Err(anyhow::anyhow!("not asked")),
    };
    if let (Err(error), false) = (&asked, offline) {
        eprintln!("what was revoked since is not known here: {error:#}");
    }
    let revoked = asked.ok();
    let ids = |all: &Vec<Revocation>| -> Vec<_> { all.iter().map(revocation_json).collect() };
    let commit = report.signed.commit();
    output.result(
        &json!({
            "commit": commit,
            "model": manifest.model,
            "revision": manifest.revision,
            "files": report.intact.len(),
            "key": report.signed.key_hex(),
            "key_known": expected.is_some(),
            "unexpected": report.unexpected,
            "revoked": revoked.as_ref().map(ids),
        }),
        || {
            let mut text = format!(
                "{} revision {} {}: {} files and the signature are right",
                manifest.model,
                manifest.revision,
                short(&commit),
                report.intact.len()
            );
            for line in revoked.iter().flatten().map(revocation_line) {
                text.push('\n');
                text.push_str(&line);
            }
            text
        },
    )
}

/// The contributions of a manifest that have been revoked, by the coordinator that signed it.
async fn ask(
    globals: &Globals,
    identity: Identity,
    manifest: &Manifest,
) -> Result<Vec<Revocation>> {
    let options = Options {
        connect_timeout: PATIENCE,
        deadline: PATIENCE,
        patience: Duration::ZERO,
        ..session::options(globals)
    };
    let client = Client::new(identity, options).context("connect to the coordinator")?;
    let mut all = contribution::revocations(&client, &manifest.model).await?;
    let own: BTreeSet<&str> = manifest
        .contributions
        .iter()
        .map(|one| one.id.as_str())
        .collect();
    all.retain(|one| own.contains(one.contribution_id.as_str()));
    Ok(all)
}

fn revocation_json(one: &Revocation) -> serde_json::Value {
    json!({ "id": one.contribution_id, "worker": one.worker, "reason": one.reason, "revoked_ms": one.revoked_ms })
}

fn revocation_line(one: &Revocation) -> String {
    format!(
        "  but contribution {} by {} in it was revoked: {}; `cairn checkpoint list` names what takes \
         its place",
        one.contribution_id, one.worker, one.reason
    )
}

/// Fails naming every file that is missing or has other bytes.
pub fn require_intact(report: &FolderReport) -> Result<()> {
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
        "not the published checkpoint:\n{}\nfetch what is wrong again with `cairn checkpoint pull`",
        changed.chain(missing).collect::<Vec<_>>().join("\n")
    )
}
