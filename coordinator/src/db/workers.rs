//! Table `workers`: identities.
use cairn_proto::signing::parse_public_key;
use ed25519_dalek::VerifyingKey;
use sqlx::any::AnyRow;

use super::{Hold, Tx, column, parsed};
use crate::caller::{Caller, Role};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::WorkerId;

/// An enrolled identity.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Who it is, as a caller.
    pub caller: Caller,
    /// Whether a maintainer has disabled it.
    pub revoked: bool,
}

/// Reads the columns `id, public_key, display_name, role, revoked_ms`.
pub(super) fn worker(row: &AnyRow) -> Result<Worker, Error> {
    let id: WorkerId = parsed(row, "workers", "id")?;
    let key: Vec<u8> = column(row, "public_key")?;
    let public_key =
        parse_public_key(&key).map_err(|_| Error::inconsistent("workers", "public_key", id))?;
    let role: Role = parsed(row, "workers", "role")?;
    let revoked_ms: Option<i64> = column(row, "revoked_ms")?;
    let name = column(row, "display_name")?;
    Ok(Worker {
        caller: Caller {
            worker: id,
            role,
            public_key,
            name,
        },
        revoked: revoked_ms.is_some(),
    })
}

/// The identity with this key.
///
/// # Errors
/// When the query fails.
pub async fn worker_by_key(tx: &mut Tx, key: &VerifyingKey) -> Result<Option<Worker>, Error> {
    let row = sqlx::query(
        "select id, public_key, display_name, role, revoked_ms from workers where public_key = $1",
    )
    .bind(key.to_bytes().to_vec())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref().map(worker).transpose()
}

/// The identity with this id.
///
/// # Errors
/// When the query fails.
pub async fn worker_get(tx: &mut Tx, id: WorkerId) -> Result<Option<Worker>, Error> {
    let row = sqlx::query(
        "select id, public_key, display_name, role, revoked_ms from workers where id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref().map(worker).transpose()
}

/// Holds an identity's row, so that of two calls of it that claim work one waits for the other.
///
/// # Errors
/// When the query fails.
pub async fn worker_hold(tx: &mut Tx, id: WorkerId) -> Result<(), Error> {
    let held = tx.hold(Hold::Alone, "workers");
    let sql = format!("select id from workers where id = $1{held}");
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    Ok(())
}

/// Adds an identity. False when the key is enrolled already.
///
/// # Errors
/// When the query fails.
pub async fn worker_insert(tx: &mut Tx, caller: &Caller, now: Timestamp) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into workers (id, public_key, display_name, role, created_ms) \
         values ($1, $2, $3, $4, $5) on conflict (public_key) do nothing",
    )
    .bind(caller.worker.to_string())
    .bind(caller.public_key.to_bytes().to_vec())
    .bind(caller.name.as_str())
    .bind(caller.role.as_str())
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}
