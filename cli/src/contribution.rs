//! `cairn contribution` and `cairn strike`: single contributions, taking them back, and what was
//! taken back.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use cairn_proto::client::Client;
use cairn_proto::convert::verdict_word;
use cairn_proto::limits::PAGE_SIZE_MAX;
use cairn_proto::v1::{
    Checkpoint, GetContributionRequest, GetContributionResponse, ListRevocationsRequest, Refold,
    Revocation, RevokeContributionRequest, VoidStrikeRequest,
};
use clap::Subcommand;
use serde_json::{Value, json};

use crate::output::{Output, table};
use crate::round::events::{gain, loss, short};
use crate::{Globals, clock, pages, session};

/// How often the folds that a revocation asked for are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What `cairn contribution` can do.
#[derive(Debug, Subcommand)]
pub enum ContributionCommand {
    /// Show a contribution: its verdict, the numbers behind it, the checkpoints it is part of
    #[command(
        after_help = "Ids are in `cairn round show ID --json` and `cairn checkpoint diff A B`."
    )]
    Show {
        /// The contribution's id
        id: String,
    },
    /// Take a contribution back: it is stacked no more
    #[command(
        after_help = "Example:\n  cairn contribution revoke 3f0c... --reason 'its data was poisoned' --refold"
    )]
    Revoke {
        /// The contribution's id
        id: String,
        /// Why; volunteers and researchers read it
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Fold every checkpoint that contains it again without it, as new revisions, and wait
        #[arg(long)]
        refold: bool,
        /// Do not wait for the folds; the coordinator makes them anyway
        #[arg(long, requires = "refold")]
        detach: bool,
    },
    /// List what was taken back, why, and which checkpoints took the place of which; newest first
    ListRevocations {
        /// Only this model's
        #[arg(long, value_name = "NAME")]
        model: Option<String>,
    },
}

/// What `cairn strike` can do.
#[derive(Debug, Subcommand)]
pub enum StrikeCommand {
    /// Void the strike that a rejected contribution gave its volunteer
    #[command(
        after_help = "Example:\n  cairn strike void 3f0c... --reason 'the evaluator was broken'"
    )]
    Void {
        /// The rejected contribution's id
        id: String,
        /// Why
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// Runs `cairn contribution`.
pub async fn run(globals: &Globals, command: ContributionCommand, output: Output) -> Result<()> {
    let client = session::connect(globals)?;
    match command {
        ContributionCommand::Show { id } => {
            let found = get(&client, &id).await?;
            output.result(&show_json(&found), || show_text(&found))
        }
        ContributionCommand::Revoke {
            id,
            reason,
            refold,
            detach,
        } => {
            let request = RevokeContributionRequest {
                id,
                reason,
                refold,
                request_id: session::request_id(),
            };
            let done = revoke(&client, &request, refold && !detach).await?;
            output.result(&revocation_json(&done), || revocation_text(&done, refold))?;
            let failed = done.refolds.iter().filter(|one| !one.failure.is_empty());
            match failed.count() {
                0 => Ok(()),
                count => bail!(
                    "{count} checkpoints could not be folded again; the same command tries once more"
                ),
            }
        }
        ContributionCommand::ListRevocations { model } => {
            let all = revocations(&client, &model.unwrap_or_default()).await?;
            list(&all, output)
        }
    }
}

/// Runs `cairn strike`.
pub async fn strike(globals: &Globals, command: StrikeCommand, output: Output) -> Result<()> {
    let StrikeCommand::Void { id, reason } = command;
    let client = session::connect(globals)?;
    let request = VoidStrikeRequest {
        submission_id: id.clone(),
        reason,
    };
    client
        .call(|mut to| {
            let request = request.clone();
            async move { to.contributions.void_strike(request).await }
        })
        .await
        .context("void the strike")?;
    output.result(&json!({ "id": id, "voided": true }), || {
        format!("the strike of {id} counts no more")
    })
}

/// One contribution with the checkpoints it is part of.
pub async fn get(client: &Client, id: &str) -> Result<GetContributionResponse> {
    let request = GetContributionRequest { id: id.to_owned() };
    client
        .call(|mut to| {
            let request = request.clone();
            async move { to.contributions.get_contribution(request).await }
        })
        .await
        .with_context(|| format!("look up contribution {id}"))
}

/// Every revocation of a model, or of all when it is empty; newest first.
pub async fn revocations(client: &Client, model: &str) -> Result<Vec<Revocation>> {
    pages::all(|page_token| async {
        let request = ListRevocationsRequest {
            page_size: PAGE_SIZE_MAX as i32,
            page_token,
            model: model.to_owned(),
        };
        let page = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.contributions.list_revocations(request).await }
            })
            .await
            .context("list the revocations")?;
        Ok((page.revocations, page.next_page_token))
    })
    .await
}

/// Revokes, and with `wait` stays until every fold has been made or has failed. The same request is
/// sent again and again: it counts once and answers with how far things are.
async fn revoke(
    client: &Client,
    request: &RevokeContributionRequest,
    wait: bool,
) -> Result<Revocation> {
    let (mut said, mut told) = (false, 0);
    loop {
        let answer = client
            .call(|mut to| {
                let request = request.clone();
                async move { to.contributions.revoke_contribution(request).await }
            })
            .await
            .context("revoke the contribution")?;
        let revocation = answer
            .revocation
            .context("the coordinator answered without the revocation")?;
        let ended: Vec<&Refold> = revocation.refolds.iter().filter(|one| ended(one)).collect();
        if wait && !said && ended.len() < revocation.refolds.len() {
            said = true;
            eprintln!(
                "revoked; the coordinator folds {} checkpoints again (Ctrl-C leaves it to it)",
                revocation.refolds.len()
            );
        }
        if wait {
            for one in ended.iter().skip(told) {
                eprintln!("  {}", refold_line(one));
            }
            told = ended.len();
        }
        if !wait || ended.len() == revocation.refolds.len() {
            return Ok(revocation);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn ended(refold: &Refold) -> bool {
    refold.replacement.is_some() || !refold.failure.is_empty()
}

fn name_of(checkpoint: Option<&Checkpoint>) -> String {
    checkpoint.map_or_else(
        || "-".to_owned(),
        |one| format!("{}@{} ({})", one.model, one.revision, short(&one.commit)),
    )
}

fn refold_line(refold: &Refold) -> String {
    let affected = name_of(refold.affected.as_ref());
    match (&refold.replacement, refold.failure.as_str()) {
        (Some(new), _) => format!("{affected}: {} takes its place", name_of(Some(new))),
        (None, "") => format!("{affected}: to be folded again"),
        (None, failure) => format!("{affected}: cannot be folded again: {failure}"),
    }
}

fn checkpoint_json(one: &Checkpoint) -> Value {
    json!({ "model": one.model, "revision": one.revision, "commit": one.commit, "refold_of": (one.refold_of > 0).then_some(one.refold_of), "replaced_by": (one.replaced_by > 0).then_some(one.replaced_by) })
}

fn revocation_json(one: &Revocation) -> Value {
    let refold = |refold: &Refold| json!({ "affected": refold.affected.as_ref().map(checkpoint_json), "replacement": refold.replacement.as_ref().map(checkpoint_json), "failure": refold.failure });
    json!({ "id": one.contribution_id, "worker": one.worker, "round": one.round_id, "reason": one.reason, "revoked_ms": one.revoked_ms, "refolds": one.refolds.iter().map(refold).collect::<Vec<_>>() })
}

fn revocation_text(one: &Revocation, refold: bool) -> String {
    let mut lines = vec![format!(
        "contribution {} by {} is revoked: {}",
        one.contribution_id, one.worker, one.reason
    )];
    lines.extend(
        one.refolds
            .iter()
            .map(|one| format!("  {}", refold_line(one))),
    );
    if one.refolds.is_empty() {
        lines.push(if refold {
            "  no checkpoint contains it".to_owned()
        } else {
            format!(
                "  checkpoints that contain it stay as they are; fold them again with: \
                 cairn contribution revoke {} --reason ... --refold",
                one.contribution_id
            )
        });
    }
    lines.join("\n")
}

fn list(all: &[Revocation], output: Output) -> Result<()> {
    let header = ["contribution", "worker", "revoked", "checkpoints", "reason"];
    output.list(all, &header, revocation_json, |one| {
        let moves = one.refolds.iter().map(|refold| {
            let revision = |one: &Option<Checkpoint>| {
                one.as_ref()
                    .map_or_else(|| "?".to_owned(), |one| one.revision.to_string())
            };
            let (from, to) = (revision(&refold.affected), revision(&refold.replacement));
            format!("{from} -> {to}")
        });
        let moves: Vec<String> = moves.collect();
        vec![
            one.contribution_id.clone(),
            one.worker.clone(),
            clock::date(one.revoked_ms),
            if moves.is_empty() {
                "not folded again".to_owned()
            } else {
                moves.join(", ")
            },
            one.reason.clone(),
        ]
    })
}

/// The coordinator's JSON as JSON; null when there is none.
pub fn evidence(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

fn show_json(found: &GetContributionResponse) -> Value {
    let one = found.contribution.clone().unwrap_or_default();
    json!({
        "id": one.id,
        "round": found.round_id,
        "worker": one.worker,
        "worker_id": one.worker_id,
        "shard": one.shard,
        "verdict": verdict_word(one.verdict()),
        "reason": one.reason,
        "detail": one.detail,
        "weight": one.weight,
        "norm": (one.norm > 0.0).then_some(one.norm),
        "gate_loss": one.gate_loss,
        "audit_loss": one.audit_loss,
        "gain": one.gain,
        "gain_se": one.gain_se,
        "adapter": one.adapter_digest,
        "submitted_ms": one.submitted_ms,
        "revoked_ms": (one.revoked_ms > 0).then_some(one.revoked_ms),
        "evidence": evidence(&one.evidence_json),
        "checkpoints": found.checkpoints.iter().map(checkpoint_json).collect::<Vec<_>>(),
    })
}

fn show_text(found: &GetContributionResponse) -> String {
    let one = found.contribution.clone().unwrap_or_default();
    let reason = if one.reason.is_empty() {
        String::new()
    } else {
        format!(": {}: {}", one.reason, one.detail)
    };
    let mut text = format!(
        "contribution {} of shard {} by {}\nround      {}\nsubmitted  {}\nverdict    {}{reason}\n",
        one.id,
        one.shard,
        one.worker,
        found.round_id,
        clock::date(one.submitted_ms),
        verdict_word(one.verdict()),
    );
    if one.revoked_ms > 0 {
        text.push_str(&format!("revoked    {}\n", clock::date(one.revoked_ms)));
    }
    if one.norm > 0.0 {
        text.push_str(&format!("norm       {:.4}\n", one.norm));
    }
    text.push_str(&format!(
        "gate loss  {}\naudit loss {}\ngain       {}\nadapter    {}\n",
        loss(one.gate_loss),
        loss(one.audit_loss),
        gain(&one).unwrap_or_else(|| "-".to_owned()),
        one.adapter_digest
    ));
    text.push_str(&evidence_text(&one.evidence_json));
    if found.checkpoints.is_empty() {
        text.push_str("part of no checkpoint");
        return text;
    }
    let rows: Vec<Vec<String>> = found
        .checkpoints
        .iter()
        .map(|one| {
            vec![
                format!("{}@{}", one.model, one.revision),
                short(&one.commit).to_owned(),
                if one.replaced_by > 0 {
                    format!("replaced by {}", one.replaced_by)
                } else {
                    String::new()
                },
            ]
        })
        .collect();
    text.push_str(&table(&["part of", "commit", ""], &rows));
    text
}

/// The numbers behind a verdict, indented; nothing when there are none.
pub fn evidence_text(text: &str) -> String {
    match evidence(text) {
        Value::Object(map) if !map.is_empty() => {
            let lines = serde_json::to_string_pretty(&map).unwrap_or_default();
            format!("evidence   {}\n", lines.replace('\n', "\n           "))
        }
        _ => String::new(),
    }
}
