//! A maintainer makes a dataset from chunks that are held.
use cairn_proto::limits::{DATASET_CHUNK_BYTES_MAX, DATASET_CHUNKS_MAX, NOTE_CHARS_MAX};
use cairn_proto::reason::ErrorReason;
use tracing::info;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::db::Tx;
use crate::db::blobs::{blob_get, blob_publish};
use crate::db::datasets::{
    ChunkRow, DatasetRow, SetKind, chunk_is_in, dataset_by_request, dataset_get, dataset_insert,
};
use crate::error::Error;
use crate::ids::RequestId;

use super::create_model::check_model_name;

/// What the maintainer says.
#[derive(Debug, Clone)]
pub struct NewDataset {
    /// 1 to 64 of a-z, 0-9, `-`, `_`, `.`.
    pub name: String,
    /// What it is for.
    pub set: SetKind,
    /// SPDX expression.
    pub license: String,
    /// Where it came from.
    pub source: String,
    /// Its chunks in order.
    pub chunks: Vec<ChunkRow>,
    /// The same id returns the first result.
    pub request: RequestId,
}

/// Makes a dataset. Its set decides who may read its chunks.
///
/// # Errors
/// BLOB_MISSING for a chunk that is not held; PRECONDITION_FAILED when a chunk is in a secret and
/// in a public set; ALREADY_EXISTS.
pub async fn create_dataset(
    app: &App,
    caller: &Caller,
    new: NewDataset,
) -> Result<DatasetRow, Error> {
    caller.require(Role::Maintainer)?;
    check(&new)?;
    let row = DatasetRow {
        records: new
            .chunks
            .iter()
            .map(|chunk| u64::from(chunk.records))
            .sum(),
        bytes: new.chunks.iter().map(|chunk| chunk.blob.size_bytes).sum(),
        name: new.name,
        set: new.set,
        license: new.license,
        source: new.source,
        created: app.clock.now_ms(),
    };
    let mut tx = app.db.begin().await?;
    if let Some(first) = dataset_by_request(&mut tx, new.request).await? {
        return if first.name == row.name && first.set == row.set && first.bytes == row.bytes {
            Ok(first)
        } else {
            let reason = ErrorReason::RequestIdReused;
            Err(Error::conflict(reason, reason.sentence()))
        };
    }
    if dataset_get(&mut tx, &row.name).await?.is_some() {
        return Err(Error::conflict(
            ErrorReason::AlreadyExists,
            format!(
                "there is a dataset {} already; datasets never change",
                row.name
            ),
        ));
    }
    for chunk in &new.chunks {
        admit(&mut tx, chunk, row.set).await?;
    }
    if !dataset_insert(&mut tx, &row, &new.chunks, new.request).await? {
        return Err(Error::unavailable(
            "the same dataset is being made by another call; try again",
        ));
    }
    if !row.set.is_secret() {
        for chunk in &new.chunks {
            blob_publish(&mut tx, chunk.blob.digest).await?;
        }
    }
    tx.commit().await?;
    info!(
        "added dataset {} ({}): {} records in {} chunks",
        row.name,
        row.set.as_str(),
        row.records,
        new.chunks.len()
    );
    Ok(row)
}

fn check(new: &NewDataset) -> Result<(), Error> {
    check_model_name("name", &new.name)?;
    if new.chunks.is_empty() {
        return Err(Error::invalid(
            "chunks",
            "a dataset has at least one record",
        ));
    }
    if new.chunks.len() > DATASET_CHUNKS_MAX {
        return Err(Error::invalid(
            "chunks",
            format!("at most {DATASET_CHUNKS_MAX}"),
        ));
    }
    for chunk in &new.chunks {
        // Every record is a line of at least `{}` and its newline.
        if chunk.records == 0 || u64::from(chunk.records) > chunk.blob.size_bytes / 3 + 1 {
            return Err(Error::invalid(
                "chunks",
                "a chunk has 0 records, or more than its bytes",
            ));
        }
        if chunk.blob.size_bytes > DATASET_CHUNK_BYTES_MAX {
            return Err(Error::invalid(
                "chunks",
                format!("at most {DATASET_CHUNK_BYTES_MAX} bytes each"),
            ));
        }
    }
    for (field, text) in [("license", &new.license), ("source", &new.source)] {
        if text.chars().count() > NOTE_CHARS_MAX || text.contains('\0') {
            return Err(Error::invalid(
                field,
                format!("at most {NOTE_CHARS_MAX} characters"),
            ));
        }
    }
    if new.license.trim().is_empty() {
        return Err(Error::invalid("license", "a dataset has a licence (SPDX)"));
    }
    Ok(())
}

async fn admit(tx: &mut Tx, chunk: &ChunkRow, set: SetKind) -> Result<(), Error> {
    let held = blob_get(tx, chunk.blob.digest).await?;
    if held.is_none_or(|held| held.name != chunk.blob) {
        return Err(crate::blobs::missing(chunk.blob.digest));
    }
    // A secret that was once public is none, and a public set may not give a secret away.
    if chunk_is_in(tx, chunk.blob.digest, !set.is_secret()).await? {
        return Err(Error::conflict(
            ErrorReason::PreconditionFailed,
            format!(
                "chunk {} is part of a {} set already",
                chunk.blob.digest,
                if set.is_secret() {
                    "public"
                } else {
                    "gate or audit"
                }
            ),
        ));
    }
    Ok(())
}
