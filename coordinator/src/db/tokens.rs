//! Tables `join_tokens` and `enrolments`.
use cairn_stack::digest::Digest;

use super::{Hold, Tx, column, parsed};
use crate::caller::Role;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::WorkerId;

/// A join token as stored.
#[derive(Debug, Clone, Copy)]
pub struct JoinTokenRow {
    /// Which role it gives.
    pub role: Role,
    /// How many identities may still join with it.
    pub uses_left: i64,
    /// Until when.
    pub expires: Timestamp,
}

/// Adds a join token by its hash.
///
/// # Errors
/// When the query fails.
pub async fn token_insert(
    tx: &mut Tx,
    hash: Digest,
    token: JoinTokenRow,
    now: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into join_tokens (token_hash, role, uses_left, created_ms, expires_ms) \
         values ($1, $2, $3, $4, $5)",
    )
    .bind(hash.to_string())
    .bind(token.role.as_str())
    .bind(token.uses_left)
    .bind(now.0)
    .bind(token.expires.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The token with this hash, held: whoever joins with it at the same time waits.
///
/// # Errors
/// When the query fails.
pub async fn token_get(tx: &mut Tx, hash: Digest) -> Result<Option<JoinTokenRow>, Error> {
    let held = tx.hold(Hold::Alone, "join_tokens");
    let sql =
        format!("select role, uses_left, expires_ms from join_tokens where token_hash = $1{held}");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(hash.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.map(|row| {
        Ok(JoinTokenRow {
            role: parsed(&row, "join_tokens", "role")?,
            uses_left: column(&row, "uses_left")?,
            expires: Timestamp(column(&row, "expires_ms")?),
        })
    })
    .transpose()
}

/// Spends one use. False when none is left or its time is over.
///
/// # Errors
/// When the query fails.
pub async fn token_spend(tx: &mut Tx, hash: Digest, now: Timestamp) -> Result<bool, Error> {
    let done = sqlx::query(
        "update join_tokens set uses_left = uses_left - 1 \
         where token_hash = $1 and uses_left > 0 and expires_ms > $2",
    )
    .bind(hash.to_string())
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Notes that an identity joined with a token.
///
/// # Errors
/// When the query fails.
pub async fn enrolment_insert(tx: &mut Tx, hash: Digest, worker: WorkerId) -> Result<(), Error> {
    sqlx::query(
        "insert into enrolments (token_hash, worker_id) values ($1, $2) on conflict do nothing",
    )
    .bind(hash.to_string())
    .bind(worker.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Whether an identity joined with this token.
///
/// # Errors
/// When the query fails.
pub async fn enrolment_exists(tx: &mut Tx, hash: Digest, worker: WorkerId) -> Result<bool, Error> {
    let row =
        sqlx::query("select worker_id from enrolments where token_hash = $1 and worker_id = $2")
            .bind(hash.to_string())
            .bind(worker.to_string())
            .fetch_optional(tx.conn())
            .await?;
    Ok(row.is_some())
}
