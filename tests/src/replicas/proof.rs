//! What must be true afterwards.
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cairn_proto::signing::{ReceiptStatement, TreeHeadStatement};
use cairn_proto::v1;
use cairn_stack::merkle::{Hash, leaf_hash, root};
use tokio::time::Instant;

use super::Report;
use super::people::{Outcome, People};
use crate::stranger::{Stranger, succeeded};

/// How long verdicts may take to be sealed after the last round has ended.
const SEAL_MAX: Duration = Duration::from_mins(2);
/// How often the log is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(500);

/// What the log says of one submission.
#[derive(Default)]
struct Logged {
    lease: String,
    worker: String,
    /// Statements without a verdict: the acknowledgement.
    pending: Vec<Vec<u8>>,
    /// Statements with one: what each credits.
    verdicts: Vec<u64>,
}

/// Fills the report with what is found.
pub async fn check(
    people: &People,
    outcome: &Outcome,
    folder: &Path,
    report: &mut Report,
) -> Result<()> {
    report.submissions = outcome.acks.len();
    report.longest_pause_seconds = outcome.longest_pause;
    report.unexpected.clone_from(&outcome.unexpected);
    report.published = outcome.published.len();
    let entries = sealed_log(people, outcome.acks.len()).await?;
    report.log_entries = entries.len();
    let logged = by_submission(&entries)?;
    check_acks(people, outcome, &entries, &logged, report).await?;
    check_credits(people, &logged, report).await?;
    reproduce(people, outcome, folder, report).await
}

/// The whole log, once every submission has its verdict in it; its root is the signed one.
async fn sealed_log(people: &People, submissions: usize) -> Result<Vec<v1::LogEntry>> {
    let began = Instant::now();
    loop {
        let entries = pull(people).await?;
        let sealed = by_submission(&entries)?;
        let sealed = sealed
            .values()
            .filter(|one| !one.verdicts.is_empty())
            .count();
        if sealed >= submissions {
            return Ok(entries);
        }
        ensure!(
            began.elapsed() < SEAL_MAX,
            "{sealed} of {submissions} submissions have a verdict in the log"
        );
        tokio::time::sleep(LOOK).await;
    }
}

async fn pull(people: &People) -> Result<Vec<v1::LogEntry>> {
    let client = &people.maintainer.client;
    let head = client
        .call(|mut to| async move { to.log.get_tree_head(v1::GetTreeHeadRequest {}).await })
        .await?;
    let key = client.identity().server_key;
    let head = TreeHeadStatement::verify(&head.head.context("a head")?, key.as_bytes())?;
    let mut entries: Vec<v1::LogEntry> = Vec::new();
    while (entries.len() as u64) < head.size {
        let first = entries.len() as u64;
        let request = v1::ListEntriesRequest {
            first,
            page_size: 0,
        };
        let page = client
            .call(|mut to| async move { to.log.list_entries(request).await })
            .await?;
        ensure!(
            !page.entries.is_empty(),
            "the log ends at {first} of {}",
            head.size
        );
        entries.extend(page.entries);
    }
    entries.truncate(usize::try_from(head.size)?);
    let leaves: Vec<Hash> = entries.iter().map(|entry| leaf_hash(&entry.body)).collect();
    let found = hex::encode(root(&leaves));
    ensure!(found == head.root, "the log is not the signed one");
    for (place, entry) in (0u64..).zip(&entries) {
        ensure!(
            entry.index == place,
            "entry {place} says that it is {}",
            entry.index
        );
    }
    Ok(entries)
}

fn by_submission(entries: &[v1::LogEntry]) -> Result<BTreeMap<String, Logged>> {
    let mut logged: BTreeMap<String, Logged> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.kind == "receipt") {
        let statement: ReceiptStatement = serde_json::from_slice(&entry.body)?;
        ensure!(
            statement.log_index == entry.index,
            "a receipt of place {} lies at {}",
            statement.log_index,
            entry.index
        );
        let one = logged.entry(statement.submission).or_default();
        (one.lease, one.worker) = (statement.lease, statement.worker);
        if statement.verdict == "pending" {
            one.pending.push(entry.body.clone());
        } else {
            one.verdicts.push(statement.credit_tokens);
        }
    }
    Ok(logged)
}

/// Every acknowledgement is in the log byte for byte, in the view of its round, and in the list of
/// its worker.
async fn check_acks(
    people: &People,
    outcome: &Outcome,
    entries: &[v1::LogEntry],
    logged: &BTreeMap<String, Logged>,
    report: &mut Report,
) -> Result<()> {
    let mut known = BTreeSet::new();
    for round in &outcome.rounds {
        let view = people.maintainer.round(round).await?;
        known.extend(view.contributions.into_iter().map(|one| one.id));
    }
    let key = people.maintainer.client.identity().server_key;
    let mut seen = BTreeSet::new();
    for ack in &outcome.acks {
        let statement = ReceiptStatement::verify(&ack.receipt, key.as_bytes())?;
        let place = usize::try_from(statement.log_index)?;
        let written = entries
            .get(place)
            .is_some_and(|entry| entry.body == ack.receipt.statement);
        let worker = people.volunteers[ack.volunteer].id();
        let same = statement.submission == ack.id && statement.worker == worker;
        let once = logged
            .get(&ack.id)
            .is_some_and(|one| one.pending.len() == 1);
        if !(written && same && once && known.contains(&ack.id) && seen.insert(&ack.id)) {
            report.acks_lost += 1;
        }
    }
    Ok(())
}

/// A lease has one submission, and a submission one verdict; what they credit is what each worker has.
async fn check_credits(
    people: &People,
    logged: &BTreeMap<String, Logged>,
    report: &mut Report,
) -> Result<()> {
    let mut leases: BTreeMap<&str, usize> = BTreeMap::new();
    let mut credits: BTreeMap<&str, u64> = BTreeMap::new();
    for one in logged.values() {
        *leases.entry(&one.lease).or_default() += 1;
        report.double_credits += one.verdicts.len().saturating_sub(1);
        let credit: u64 = one.verdicts.iter().sum();
        report.credited += usize::from(credit > 0);
        *credits.entry(&one.worker).or_default() += credit;
    }
    report.double_credits += leases.values().filter(|count| **count > 1).count();
    for volunteer in &people.volunteers {
        let standing = volunteer.standing().await?;
        let stated = credits.get(volunteer.id()).copied().unwrap_or_default();
        ensure!(
            standing.credit_tokens == stated,
            "{} has {} tokens, its receipts say {stated}",
            standing.display_name,
            standing.credit_tokens
        );
    }
    Ok(())
}

/// Every published checkpoint is rebuilt from its base and contributions by the command line.
async fn reproduce(
    people: &People,
    outcome: &Outcome,
    folder: &Path,
    report: &mut Report,
) -> Result<()> {
    let url = people
        .maintainer
        .create_token(v1::Role::Maintainer, 1, 600_000)
        .await?;
    let stranger = Stranger::log_in(folder.join("stranger"), &url)?;
    for (model, revision) in &outcome.published {
        let made = stranger.cairn(&["checkpoint", "reproduce", &format!("{model}@{revision}")])?;
        match succeeded(made) {
            Ok(_) => report.reproduced += 1,
            Err(problem) => report.unexpected.push(problem.to_string()),
        }
    }
    Ok(())
}
