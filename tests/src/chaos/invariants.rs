//! What must hold after every scenario, whatever happened in it: looked at from outside, after one
//! more `kill -9` and start, with the programs that anybody has.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cairn_proto::v1;
use serde_json::Value;

use super::uploads::name_of;
use super::world::World;
use crate::stranger::{Stranger, VERIFY_LOG, succeeded};
use crate::tiny;

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Submissions that were acknowledged.
    pub acks: usize,
    /// Those of them that are gone, or whose bytes are.
    pub acks_lost: usize,
    /// Leases under which more than one submission counts.
    pub double_credits: usize,
    /// Published checkpoints that were folded again from their manifests.
    pub reproduced: usize,
    /// How long the coordinator took to serve again.
    pub recovery: Duration,
    /// Every other way in which an invariant is broken.
    pub broken: Vec<String>,
}

/// Kills the coordinator, starts it again, and looks.
///
/// # Errors
/// When it does not start, or cannot be asked.
pub async fn check(world: &World) -> Result<Findings> {
    let mut found = Findings {
        recovery: world.kill_9().await?,
        ..Findings::default()
    };
    acknowledged(world, &mut found).await?;
    let stranger = log_in(world).await?;
    log(world, &stranger, &mut found)?;
    if !world.is_bare() {
        checkpoints(&stranger, &mut found)?;
    }
    Ok(found)
}

/// Every acknowledged submission is there, with its bytes.
async fn acknowledged(world: &World, found: &mut Findings) -> Result<()> {
    let acks = world.acks();
    found.acks = acks.len();
    let mut rounds: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for ack in &acks {
        if !rounds.contains_key(ack.round.as_str()) {
            let view = world.maintainer().round(&ack.round).await?;
            let held = view.contributions.into_iter().map(|one| one.id).collect();
            rounds.insert(&ack.round, held);
        }
        let held = &rounds[ack.round.as_str()];
        let blob: v1::BlobRef = name_of(&ack.bytes).into();
        let problem = if held.contains(&ack.submission) {
            match world.maintainer().fetch(&blob).await {
                Ok(bytes) if bytes == ack.bytes => continue,
                Ok(_) => "its bytes have changed".to_owned(),
                Err(error) => format!("its bytes cannot be read: {error}"),
            }
        } else {
            "nobody knows it any more".to_owned()
        };
        found.acks_lost += 1;
        let id = &ack.submission;
        found
            .broken
            .push(format!("acknowledged submission {id}: {problem}"));
    }
    Ok(())
}

/// Signed in as a maintainer: adapters are not for everybody.
async fn log_in(world: &World) -> Result<Stranger> {
    let url = world.url(v1::Role::Maintainer, 1).await?.secret_text();
    Stranger::log_in(world.scratch().join("stranger"), &url)
}

/// The log verifies with every receipt in it, and credits no lease twice.
fn log(world: &World, stranger: &Stranger, found: &mut Findings) -> Result<()> {
    // Also where nothing was acknowledged.
    fs::create_dir_all(stranger.folder().join("receipts"))?;
    for (number, ack) in world.acks().iter().enumerate() {
        if let Some(receipt) = &ack.receipt {
            stranger.keep(&number.to_string(), receipt)?;
        }
    }
    let copy = stranger.folder().join("log.jsonl");
    stranger.json(&["log", "pull", "log.jsonl", "--json"])?;
    let verified = stranger.cairn(&VERIFY_LOG)?;
    if let Err(error) = succeeded(verified) {
        found.broken.push(format!("the log: {error}"));
    }
    found.double_credits = credited_twice(&copy)?;
    if found.double_credits > 0 {
        let text = format!("{} leases are credited twice", found.double_credits);
        found.broken.push(text);
    }
    Ok(())
}

/// Leases that more than one submission stands for, or more than one verdict credits.
fn credited_twice(copy: &Path) -> Result<usize> {
    #[derive(Default)]
    struct Of {
        submissions: BTreeSet<String>,
        credited: usize,
    }
    let mut leases: BTreeMap<String, Of> = BTreeMap::new();
    for line in fs::read_to_string(copy)?.lines() {
        let line: Value = serde_json::from_str(line)?;
        if line["kind"] != "receipt" {
            continue;
        }
        let body: Value = serde_json::from_str(line["body"].as_str().context("a body")?)?;
        let word = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
        let of = leases.entry(word("lease")).or_default();
        of.submissions.insert(word("submission"));
        of.credited += usize::from(body["credit_tokens"].as_u64().unwrap_or(0) > 0);
    }
    let twice = |of: &&Of| of.submissions.len() > 1 || of.credited > 1;
    Ok(leases.values().filter(twice).count())
}

/// Every published checkpoint is what its manifest says: folded again, every byte is the same.
fn checkpoints(stranger: &Stranger, found: &mut Findings) -> Result<()> {
    let list = succeeded(stranger.cairn(&["checkpoint", "list", tiny::MODEL, "--json"])?)?;
    for line in String::from_utf8(list)?.lines() {
        let one: Value = serde_json::from_str(line)?;
        let revision = one["revision"].as_u64().context("a revision")?;
        let name = format!("{}@{revision}", tiny::MODEL);
        match stranger.json(&["checkpoint", "reproduce", &name, "--json"]) {
            Ok(_) => found.reproduced += 1,
            Err(error) => found
                .broken
                .push(format!("{name} does not reproduce: {error:#}")),
        }
    }
    Ok(())
}
