//! What must hold after every scenario, whatever happened in it: looked at from outside, after one
//! more `kill -9` and start, with the programs that anybody has.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cairn_proto::v1;
use serde_json::{Value, json};

use super::uploads::name_of;
use super::world::World;
use crate::process::built;
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
    let stranger = Stranger::log_in(world).await?;
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

/// `cairn` with a home of its own, signed in as a maintainer: adapters are not for everybody.
struct Stranger {
    folder: std::path::PathBuf,
}

impl Stranger {
    async fn log_in(world: &World) -> Result<Self> {
        let folder = world.scratch().join("stranger");
        fs::create_dir_all(&folder)?;
        let url = world.url(v1::Role::Maintainer, 1).await?.secret_text();
        let stranger = Self { folder };
        succeeded(stranger.cairn(&["login", &url, "--name", "stranger", "--replace"])?)?;
        Ok(stranger)
    }

    fn cairn(&self, arguments: &[&str]) -> Result<Output> {
        let run = || {
            Ok(Command::new(built("cairn-cli", "cairn")?)
                .env_clear()
                .env("CAIRN_HOME", self.folder.join("home"))
                .args(arguments)
                .current_dir(&self.folder)
                .output()?)
        };
        tokio::task::block_in_place(run)
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = succeeded(self.cairn(arguments)?)?;
        serde_json::from_slice(&text).with_context(|| format!("cairn {}", arguments.join(" ")))
    }
}

fn succeeded(output: Output) -> Result<Vec<u8>> {
    let says = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cairn says: {}", says.trim());
    Ok(output.stdout)
}

/// The log verifies with every receipt in it, and credits no lease twice.
fn log(world: &World, stranger: &Stranger, found: &mut Findings) -> Result<()> {
    let receipts = stranger.folder.join("receipts");
    fs::create_dir_all(&receipts)?;
    for (number, ack) in world.acks().iter().enumerate() {
        let Some(receipt) = &ack.receipt else {
            continue;
        };
        let kept = json!({
            "statement": std::str::from_utf8(&receipt.statement)?,
            "signature": hex(&receipt.signature),
            "verdict": null,
        });
        fs::write(receipts.join(format!("{number}.json")), kept.to_string())?;
    }
    let copy = stranger.folder.join("log.jsonl");
    stranger.json(&["log", "pull", "log.jsonl", "--json"])?;
    let verified = stranger.cairn(&[
        "log",
        "verify",
        "log.jsonl",
        "--receipts",
        "receipts",
        "--json",
    ])?;
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // A string takes all that is written.
        let _ = write!(text, "{byte:02x}");
        text
    })
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
