//! Tables `log_entries` and `log_nodes`: the Merkle log, leaves in order and the roots of complete
//! subtrees. A tree of any size is a handful of complete subtrees, so appending and proving read
//! and write some tens of rows, however long the log.
use cairn_stack::merkle::{Hash, leaf_hash, node_hash, root};

use super::{Tx, column, unsigned};
use crate::clock::Timestamp;
use crate::error::Error;

/// How many leaves there are. Its row is what serialises appends on every database.
const LOG_SIZE: &str = "log_size";

/// What a leaf is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A receipt's statement.
    Receipt,
    /// A published manifest.
    Manifest,
}

impl EntryKind {
    /// The word in the database and on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Receipt => "receipt",
            Self::Manifest => "manifest",
        }
    }
}

/// A leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place, from 0.
    pub index: u64,
    /// `receipt` or `manifest`.
    pub kind: String,
    /// What is hashed.
    pub body: String,
}

/// Holds the end of the log: nobody else appends until this transaction ends. For a transaction that
/// appends after it has taken rows that others take after appending.
///
/// # Errors
/// When the query fails.
pub async fn log_hold(tx: &mut Tx) -> Result<(), Error> {
    sqlx::query(
        "insert into settings (name, value) values ($1, '0') \
         on conflict (name) do update set value = settings.value",
    )
    .bind(LOG_SIZE)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Takes the next place in the log, to be filled by [`log_write`] in the same transaction; until
/// that commits, nobody else gets one.
///
/// # Errors
/// When a query fails.
pub async fn log_reserve(tx: &mut Tx) -> Result<u64, Error> {
    sqlx::query(
        "insert into settings (name, value) values ($1, '0') on conflict (name) do nothing",
    )
    .bind(LOG_SIZE)
    .execute(tx.conn())
    .await?;
    let row = sqlx::query(
        "update settings set value = cast(cast(value as bigint) + 1 as text) where name = $1 \
         returning cast(value as bigint) as size",
    )
    .bind(LOG_SIZE)
    .fetch_one(tx.conn())
    .await?;
    let size = unsigned(&row, "settings", "size")?;
    size.checked_sub(1)
        .ok_or_else(|| Error::inconsistent("settings", "value", LOG_SIZE))
}

/// Fills a reserved place: the leaf, and the subtrees it completes.
///
/// # Errors
/// When a query fails, or the place is taken.
pub async fn log_write(
    tx: &mut Tx,
    index: u64,
    kind: EntryKind,
    body: &str,
    now: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into log_entries (position, kind, body, created_ms) values ($1, $2, $3, $4)",
    )
    .bind(index.cast_signed())
    .bind(kind.as_str())
    .bind(body)
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    let (mut level, mut position, mut hash) = (0, index, leaf_hash(body.as_bytes()));
    loop {
        sqlx::query("insert into log_nodes (level, position, hash) values ($1, $2, $3)")
            .bind(i64::from(level))
            .bind(position.cast_signed())
            .bind(hash.to_vec())
            .execute(tx.conn())
            .await?;
        if position & 1 == 0 {
            return Ok(());
        }
        hash = node_hash(&node(tx, level, position - 1).await?, &hash);
        (level, position) = (level + 1, position >> 1);
    }
}

/// Appends a leaf.
///
/// # Errors
/// When a query fails.
pub async fn log_append(
    tx: &mut Tx,
    kind: EntryKind,
    body: &str,
    now: Timestamp,
) -> Result<u64, Error> {
    let index = log_reserve(tx).await?;
    log_write(tx, index, kind, body, now).await?;
    Ok(index)
}

/// How many leaves there are.
///
/// # Errors
/// When the query fails.
pub async fn log_size(tx: &mut Tx) -> Result<u64, Error> {
    let row = sqlx::query("select cast(value as bigint) as size from settings where name = $1")
        .bind(LOG_SIZE)
        .fetch_optional(tx.conn())
        .await?;
    row.map_or(Ok(0), |row| unsigned(&row, "settings", "size"))
}

/// Leaves from `first` on.
///
/// # Errors
/// When the query fails.
pub async fn log_entries(tx: &mut Tx, first: u64, limit: u32) -> Result<Vec<Entry>, Error> {
    let rows = sqlx::query(
        "select position, kind, body from log_entries where position >= $1 \
         order by position limit $2",
    )
    .bind(i64::try_from(first).unwrap_or(i64::MAX))
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Entry {
                index: unsigned(row, "log_entries", "position")?,
                kind: column(row, "kind")?,
                body: column(row, "body")?,
            })
        })
        .collect()
}

async fn node(tx: &mut Tx, level: u32, position: u64) -> Result<Hash, Error> {
    let lost = || Error::inconsistent("log_nodes", "hash", format!("{level}:{position}"));
    let row = sqlx::query("select hash from log_nodes where level = $1 and position = $2")
        .bind(i64::from(level))
        .bind(position.cast_signed())
        .fetch_optional(tx.conn())
        .await?
        .ok_or_else(lost)?;
    let bytes: Vec<u8> = column(&row, "hash")?;
    bytes.try_into().map_err(|_| lost())
}

/// Root of the leaves `[first, first + size)`, where `first` is a multiple of a power of two that is
/// at least `size`: so it is in every tree of RFC 6962.
async fn range_root(tx: &mut Tx, first: u64, size: u64) -> Result<Hash, Error> {
    let (mut parts, mut at, mut left) = (Vec::new(), first, size);
    while left > 0 {
        let level = left.ilog2();
        parts.push(node(tx, level, at >> level).await?);
        at += 1 << level;
        left -= 1 << level;
    }
    let mut parts = parts.into_iter().rev();
    let Some(last) = parts.next() else {
        return Ok(root(&[]));
    };
    Ok(parts.fold(last, |right, left| node_hash(&left, &right)))
}

/// Root of the first `size` leaves.
///
/// # Errors
/// When a query fails or there are not so many.
pub async fn log_root(tx: &mut Tx, size: u64) -> Result<Hash, Error> {
    range_root(tx, 0, size).await
}

/// The largest power of two below `size`, which is 2 or more.
const fn left_size(size: u64) -> u64 {
    1 << (size - 1).ilog2()
}

/// That leaf `index` is among the first `size`; see [`cairn_stack::merkle::inclusion_proof`].
///
/// # Errors
/// When a query fails, or there is no such leaf.
pub async fn log_inclusion(tx: &mut Tx, index: u64, size: u64) -> Result<Vec<Hash>, Error> {
    let (mut first, mut size, mut proof) = (0, size, Vec::new());
    while size > 1 {
        let left = left_size(size);
        if index - first < left {
            proof.push(range_root(tx, first + left, size - left).await?);
            size = left;
        } else {
            proof.push(range_root(tx, first, left).await?);
            (first, size) = (first + left, size - left);
        }
    }
    proof.reverse();
    Ok(proof)
}

/// That the first `new` leaves go on from the first `old`; see
/// [`cairn_stack::merkle::consistency_proof`].
///
/// # Errors
/// When a query fails, or there are not so many.
pub async fn log_consistency(tx: &mut Tx, old: u64, new: u64) -> Result<Vec<Hash>, Error> {
    let (mut first, mut old, mut size) = (0, old, new);
    let (mut proof, mut whole) = (Vec::new(), true);
    while old < size {
        let left = left_size(size);
        if old <= left {
            proof.push(range_root(tx, first + left, size - left).await?);
            size = left;
        } else {
            proof.push(range_root(tx, first, left).await?);
            (first, old, size) = (first + left, old - left, size - left);
            whole = false;
        }
    }
    if !whole {
        proof.push(range_root(tx, first, size).await?);
    }
    proof.reverse();
    Ok(proof)
}
