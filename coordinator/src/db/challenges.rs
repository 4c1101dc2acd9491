//! Table `challenges`: what a key must sign to get a session. Each is good once.
use cairn_stack::digest::Digest;
use ed25519_dalek::VerifyingKey;

use super::{Tx, column};
use crate::clock::Timestamp;
use crate::error::Error;

/// Adds a challenge for a key.
///
/// # Errors
/// When the query fails.
pub async fn challenge_insert(
    tx: &mut Tx,
    hash: Digest,
    key: &VerifyingKey,
    expires: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into challenges (challenge_hash, public_key, expires_ms) values ($1, $2, $3)",
    )
    .bind(hash.to_string())
    .bind(key.to_bytes().to_vec())
    .bind(expires.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Takes a challenge out of the world. False when it is not there, another's, or too old.
///
/// # Errors
/// When the query fails.
pub async fn challenge_take(
    tx: &mut Tx,
    hash: Digest,
    key: &VerifyingKey,
    now: Timestamp,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "delete from challenges where challenge_hash = $1 and public_key = $2 and expires_ms > $3",
    )
    .bind(hash.to_string())
    .bind(key.to_bytes().to_vec())
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// How many live challenges a key has.
///
/// # Errors
/// When the query fails.
pub async fn challenge_count(tx: &mut Tx, key: &VerifyingKey) -> Result<i64, Error> {
    let row = sqlx::query("select count(*) as live from challenges where public_key = $1")
        .bind(key.to_bytes().to_vec())
        .fetch_one(tx.conn())
        .await?;
    column(&row, "live")
}

/// Removes those whose time is over; returns how many.
///
/// # Errors
/// When the query fails.
pub async fn challenge_purge(tx: &mut Tx, now: Timestamp) -> Result<u64, Error> {
    let done = sqlx::query("delete from challenges where expires_ms <= $1")
        .bind(now.0)
        .execute(tx.conn())
        .await?;
    Ok(done.rows_affected())
}
