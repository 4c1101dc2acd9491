//! Tables `datasets` and `dataset_chunks`.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use sqlx::any::AnyRow;

use super::{Tx, column, digest, signed, unsigned};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::RequestId;

/// What a dataset is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetKind {
    /// Trained on.
    Train,
    /// Secret; decides.
    Gate,
    /// Secret; reported only.
    Audit,
    /// Public evaluation data.
    Dev,
}

impl SetKind {
    /// The word in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Gate => "gate",
            Self::Audit => "audit",
            Self::Dev => "dev",
        }
    }

    /// Whether volunteers must not see it.
    #[must_use]
    pub const fn is_secret(self) -> bool {
        matches!(self, Self::Gate | Self::Audit)
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Train, Self::Gate, Self::Audit, Self::Dev]
            .into_iter()
            .find(|set| set.as_str() == word)
    }
}

/// A dataset without its chunks.
#[derive(Debug, Clone)]
pub struct DatasetRow {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub set: SetKind,
    /// SPDX expression.
    pub license: String,
    /// Where it came from.
    pub source: String,
    /// How many records.
    pub records: u64,
    /// How many bytes.
    pub bytes: u64,
    /// When it was made.
    pub created: Timestamp,
}

/// A run of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRow {
    /// The blob.
    pub blob: BlobName,
    /// How many records it has.
    pub records: u32,
}

const COLUMNS: &str = "name, set_kind, license, source, records, bytes, created_ms";

fn dataset(row: &AnyRow) -> Result<DatasetRow, Error> {
    let name: String = column(row, "name")?;
    let set: String = column(row, "set_kind")?;
    let set =
        SetKind::parse(&set).ok_or_else(|| Error::inconsistent("datasets", "set_kind", &name))?;
    Ok(DatasetRow {
        set,
        license: column(row, "license")?,
        source: column(row, "source")?,
        records: unsigned(row, "datasets", "records")?,
        bytes: unsigned(row, "datasets", "bytes")?,
        created: Timestamp(column(row, "created_ms")?),
        name,
    })
}

/// Adds a dataset with its chunks, whose blobs are held. False when the name or the request id
/// exists.
///
/// # Errors
/// When a query fails.
pub async fn dataset_insert(
    tx: &mut Tx,
    dataset: &DatasetRow,
    chunks: &[ChunkRow],
    request: RequestId,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into datasets \
         (name, set_kind, license, source, records, bytes, created_ms, request_id) \
         values ($1, $2, $3, $4, $5, $6, $7, $8) on conflict do nothing",
    )
    .bind(dataset.name.as_str())
    .bind(dataset.set.as_str())
    .bind(dataset.license.as_str())
    .bind(dataset.source.as_str())
    .bind(signed(dataset.records))
    .bind(signed(dataset.bytes))
    .bind(dataset.created.0)
    .bind(request.to_string())
    .execute(tx.conn())
    .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    for (position, chunk) in (0i64..).zip(chunks) {
        sqlx::query(
            "insert into dataset_chunks (dataset, position, digest, size_bytes, records) \
             values ($1, $2, $3, $4, $5)",
        )
        .bind(dataset.name.as_str())
        .bind(position)
        .bind(chunk.blob.digest.to_string())
        .bind(signed(chunk.blob.size_bytes))
        .bind(i64::from(chunk.records))
        .execute(tx.conn())
        .await?;
    }
    Ok(true)
}

/// The dataset with this name.
///
/// # Errors
/// When the query fails.
pub async fn dataset_get(tx: &mut Tx, name: &str) -> Result<Option<DatasetRow>, Error> {
    let sql = format!("select {COLUMNS} from datasets where name = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(name)
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(dataset).transpose()
}

/// The dataset that this request made.
///
/// # Errors
/// When the query fails.
pub async fn dataset_by_request(
    tx: &mut Tx,
    request: RequestId,
) -> Result<Option<DatasetRow>, Error> {
    let sql = format!("select {COLUMNS} from datasets where request_id = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(request.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(dataset).transpose()
}

/// Datasets by name after `after`, at most `limit`.
///
/// # Errors
/// When the query fails.
pub async fn dataset_list(tx: &mut Tx, after: &str, limit: i64) -> Result<Vec<DatasetRow>, Error> {
    let sql = format!("select {COLUMNS} from datasets where name > $1 order by name limit $2");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(after)
        .bind(limit)
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(dataset).collect()
}

/// A dataset's chunks in order.
///
/// # Errors
/// When the query fails.
pub async fn dataset_chunks(tx: &mut Tx, name: &str) -> Result<Vec<ChunkRow>, Error> {
    let rows = sqlx::query(
        "select digest, size_bytes, records from dataset_chunks where dataset = $1 \
         order by position",
    )
    .bind(name)
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let blob = BlobName {
                digest: digest(row, "dataset_chunks", "digest")?,
                size_bytes: unsigned(row, "dataset_chunks", "size_bytes")?,
            };
            let records = unsigned(row, "dataset_chunks", "records")?;
            let records = u32::try_from(records)
                .map_err(|_| Error::inconsistent("dataset_chunks", "records", blob.digest))?;
            Ok(ChunkRow { blob, records })
        })
        .collect()
}

/// Whether a blob is a chunk of a set that volunteers may read, or of one they may not.
///
/// # Errors
/// When the query fails.
pub async fn chunk_is_in(tx: &mut Tx, digest: Digest, secret: bool) -> Result<bool, Error> {
    let sql = if secret {
        "select d.name from dataset_chunks c join datasets d on d.name = c.dataset \
         where c.digest = $1 and d.set_kind in ('gate', 'audit') limit 1"
    } else {
        "select d.name from dataset_chunks c join datasets d on d.name = c.dataset \
         where c.digest = $1 and d.set_kind in ('train', 'dev') limit 1"
    };
    let row = sqlx::query(sql)
        .bind(digest.to_string())
        .fetch_optional(tx.conn())
        .await?;
    Ok(row.is_some())
}
