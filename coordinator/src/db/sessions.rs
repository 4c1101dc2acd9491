//! Table `sessions`.
use cairn_stack::digest::Digest;

use super::workers::worker;
use super::{Tx, column};
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::WorkerId;

/// A session and whose it is.
#[derive(Debug, Clone)]
pub struct Session {
    /// Whose.
    pub caller: Caller,
    /// Until when.
    pub expires: Timestamp,
    /// Whether the identity has been disabled since.
    pub revoked: bool,
}

/// Begins a session; beyond `live_max` the identity's oldest end.
///
/// # Errors
/// When the query fails.
pub async fn session_insert(
    tx: &mut Tx,
    hash: Digest,
    worker: WorkerId,
    expires: Timestamp,
    live_max: i64,
) -> Result<(), Error> {
    sqlx::query("insert into sessions (token_hash, worker_id, expires_ms) values ($1, $2, $3)")
        .bind(hash.to_string())
        .bind(worker.to_string())
        .bind(expires.0)
        .execute(tx.conn())
        .await?;
    sqlx::query(
        "delete from sessions where worker_id = $1 and token_hash not in \
         (select token_hash from sessions where worker_id = $1 \
          order by expires_ms desc, token_hash limit $2)",
    )
    .bind(worker.to_string())
    .bind(live_max)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The session with this token hash, expired or not.
///
/// # Errors
/// When the query fails.
pub async fn session_find(tx: &mut Tx, hash: Digest) -> Result<Option<Session>, Error> {
    let row = sqlx::query(
        "select w.id, w.public_key, w.display_name, w.role, w.revoked_ms, s.expires_ms \
         from sessions s join workers w on w.id = s.worker_id where s.token_hash = $1",
    )
    .bind(hash.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.map(|row| {
        let found = worker(&row)?;
        let expires = Timestamp(column(&row, "expires_ms")?);
        Ok(Session {
            caller: found.caller,
            expires,
            revoked: found.revoked,
        })
    })
    .transpose()
}

/// Removes those that ended before a time, kept until then so that their callers hear why; returns
/// how many.
///
/// # Errors
/// When the query fails.
pub async fn session_purge(tx: &mut Tx, before: Timestamp) -> Result<u64, Error> {
    let done = sqlx::query("delete from sessions where expires_ms <= $1")
        .bind(before.0)
        .execute(tx.conn())
        .await?;
    Ok(done.rows_affected())
}
