//! Sums over the tables, for metrics.
use super::{Tx, column};
use crate::error::Error;

/// A table whose rows have a state.
#[derive(Debug, Clone, Copy)]
pub enum Table {
    /// `rounds`.
    Rounds,
    /// `shards`.
    Shards,
    /// `leases`.
    Leases,
    /// `submissions`.
    Submissions,
    /// `evaluations`.
    Evaluations,
}

/// How many rows are in each state.
///
/// # Errors
/// When the query fails.
pub async fn by_state(tx: &mut Tx, table: Table) -> Result<Vec<(String, i64)>, Error> {
    let sql = match table {
        Table::Rounds => "select state, count(*) as n from rounds group by state order by state",
        Table::Shards => "select state, count(*) as n from shards group by state order by state",
        Table::Leases => "select state, count(*) as n from leases group by state order by state",
        Table::Submissions => {
            "select state, count(*) as n from submissions group by state order by state"
        }
        Table::Evaluations => {
            "select state, count(*) as n from evaluations group by state order by state"
        }
    };
    let rows = sqlx::query(sql).fetch_all(tx.conn()).await?;
    rows.iter()
        .map(|row| Ok((column(row, "state")?, column(row, "n")?)))
        .collect()
}

/// What the blob store should hold.
#[derive(Debug, Clone, Copy)]
pub struct BlobCount {
    /// How many blobs.
    pub count: i64,
    /// Their lengths together.
    pub bytes: i64,
}

/// Sums the blobs up.
///
/// # Errors
/// When the query fails.
pub async fn blobs(tx: &mut Tx) -> Result<BlobCount, Error> {
    // PostgreSQL sums bigints to numeric, which `Any` does not know.
    let row = sqlx::query(
        "select count(*) as n, cast(coalesce(sum(size_bytes), 0) as bigint) as bytes from blobs",
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(BlobCount {
        count: column(&row, "n")?,
        bytes: column(&row, "bytes")?,
    })
}
