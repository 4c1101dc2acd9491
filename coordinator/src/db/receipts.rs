//! Receipts of submissions: columns of table `submissions`.
use sqlx::any::AnyRow;

use super::{Tx, column, parsed, unsigned};
use crate::error::Error;
use crate::ids::SubmissionId;

/// A decided submission whose verdict has no receipt yet, or whose receipt says something older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsealed {
    /// Which.
    pub id: SubmissionId,
    /// The statement of the acknowledgement.
    pub acknowledged: String,
    /// `accepted` or `rejected`.
    pub verdict: String,
    /// The stable word; empty unless rejected.
    pub reason: String,
    /// Verified tokens.
    pub credit_tokens: u64,
}

/// Decided submissions without a receipt of their verdict, oldest first.
///
/// # Errors
/// When the query fails.
pub async fn receipt_unsealed(tx: &mut Tx, limit: u32) -> Result<Vec<Unsealed>, Error> {
    let rows = sqlx::query(
        "select id, receipt_statement, state, reason, credit_tokens from submissions \
         where state in ('accepted', 'rejected') and verdict_statement is null \
         order by decided_ms, id limit $1",
    )
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(unsealed).collect()
}

fn unsealed(row: &AnyRow) -> Result<Unsealed, Error> {
    Ok(Unsealed {
        id: parsed(row, "submissions", "id")?,
        acknowledged: column(row, "receipt_statement")?,
        verdict: column(row, "state")?,
        reason: column(row, "reason")?,
        credit_tokens: unsigned(row, "submissions", "credit_tokens")?,
    })
}

/// One submission, when it is decided and has no receipt of its verdict.
///
/// # Errors
/// When the query fails.
pub async fn receipt_unsealed_of(tx: &mut Tx, id: SubmissionId) -> Result<Option<Unsealed>, Error> {
    let row = sqlx::query(
        "select id, receipt_statement, state, reason, credit_tokens from submissions \
         where state in ('accepted', 'rejected') and verdict_statement is null and id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref().map(unsealed).transpose()
}

/// Stores the receipt of a verdict. False: there is one, or the verdict is no longer that.
///
/// # Errors
/// When the query fails.
pub async fn receipt_seal(
    tx: &mut Tx,
    decided: &Unsealed,
    statement: &str,
    signature: &[u8],
) -> Result<bool, Error> {
    let done = sqlx::query(
        "update submissions set verdict_statement = $1, verdict_signature = $2 \
         where id = $3 and state = $4 and reason = $5 and verdict_statement is null",
    )
    .bind(statement)
    .bind(signature.to_vec())
    .bind(decided.id.to_string())
    .bind(decided.verdict.as_str())
    .bind(decided.reason.as_str())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The newest receipt of a submission: statement and signature.
///
/// # Errors
/// When the query fails.
pub async fn receipt_newest(tx: &mut Tx, id: SubmissionId) -> Result<(String, Vec<u8>), Error> {
    let row = sqlx::query(
        "select coalesce(verdict_statement, receipt_statement) as statement, \
         coalesce(verdict_signature, receipt_signature) as signature from submissions where id = $1",
    )
    .bind(id.to_string())
    .fetch_one(tx.conn())
    .await?;
    Ok((column(&row, "statement")?, column(&row, "signature")?))
}
