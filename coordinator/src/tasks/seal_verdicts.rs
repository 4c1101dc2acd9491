//! Every verdict gets a receipt of its own: signed, and a leaf of the log.
//!
//! Apart from where verdicts are reached, so that however a submission was decided, and whatever
//! died in between, its verdict is sealed exactly once, and what follows from it happens with it.
use cairn_proto::reason::VerdictReason;
use cairn_proto::signing::ReceiptStatement;
use tracing::info;

use super::Done;
use crate::app::App;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::evaluations::evaluation_cancel_job;
use crate::db::log::{EntryKind, log_reserve, log_write};
use crate::db::receipts::{Unsealed, receipt_seal, receipt_unsealed};
use crate::db::strikes::strike_insert;
use crate::domain::evaluation::Job;
use crate::error::Error;
use crate::ids::SubmissionId;

/// Verdicts sealed in one pass: each is a transaction of a few rows.
const BATCH: u32 = 64;

/// One batch.
///
/// # Errors
/// When the database fails.
pub async fn run(app: &App) -> Result<Done, Error> {
    let mut tx = app.db.read().await?;
    let waiting = receipt_unsealed(&mut tx, BATCH).await?;
    drop(tx);
    for decided in &waiting {
        seal(app, decided).await?;
    }
    Ok(if waiting.is_empty() {
        Done::All
    } else {
        Done::Part
    })
}

async fn seal(app: &App, decided: &Unsealed) -> Result<(), Error> {
    let mut tx = app.db.begin().await?;
    if seal_in(app, &mut tx, decided).await? {
        tx.commit().await?;
    }
    // Another coordinator was faster; dropping the transaction gives the place back.
    Ok(())
}

/// Seals a verdict in the caller's transaction. False: it has a receipt, or is no longer that; then
/// the transaction must be dropped, for it holds a place in the log that nothing fills.
///
/// # Errors
/// When a query fails.
pub async fn seal_in(app: &App, tx: &mut Tx, decided: &Unsealed) -> Result<bool, Error> {
    let pending: ReceiptStatement = serde_json::from_str(&decided.acknowledged)
        .map_err(|_| Error::inconsistent("submissions", "receipt_statement", decided.id))?;
    let now = app.clock.now_ms();
    let index = log_reserve(tx).await?;
    let statement = ReceiptStatement {
        verdict: decided.verdict.clone(),
        reason: decided.reason.clone(),
        credit_tokens: decided.credit_tokens,
        log_index: index,
        ..pending
    };
    let receipt = statement
        .sign(&app.key)
        .map_err(|error| Error::internal("sign a receipt", error))?;
    let body = std::str::from_utf8(&receipt.statement)
        .map_err(|error| Error::internal("write a receipt", error))?;
    if !receipt_seal(tx, decided, body, &receipt.signature).await? {
        return Ok(false);
    }
    log_write(tx, index, EntryKind::Receipt, body, now).await?;
    follow(tx, decided.id, &statement, now).await?;
    info!(submission.id = %decided.id, "sealed the verdict {} as log entry {index}", decided.verdict);
    Ok(true)
}

/// What follows from every verdict: nobody replays the submission any more, and a rejection that only
/// a broken or hostile worker earns is a strike.
async fn follow(
    tx: &mut Tx,
    id: SubmissionId,
    statement: &ReceiptStatement,
    now: Timestamp,
) -> Result<(), Error> {
    let bad = |column| Error::inconsistent("submissions", column, id);
    let round = statement.round.parse().map_err(|_| bad("round_id"))?;
    let replay = Job::Replay { submission: id };
    evaluation_cancel_job(tx, round, replay.key()).await?;
    if statement.reason.is_empty() {
        return Ok(());
    }
    let reason: VerdictReason = statement.reason.parse().map_err(|_| bad("reason"))?;
    if reason.is_strike() {
        let worker = statement.worker.parse().map_err(|_| bad("worker_id"))?;
        strike_insert(tx, id, worker, reason, now).await?;
    }
    Ok(())
}
