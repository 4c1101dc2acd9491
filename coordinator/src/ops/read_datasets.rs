//! Reading datasets.
use crate::app::App;
use crate::caller::Caller;
use crate::db::datasets::{ChunkRow, DatasetRow, dataset_chunks, dataset_get, dataset_list};
use crate::error::Error;

/// A dataset, and its chunks for those who may read them.
///
/// # Errors
/// NOT_FOUND.
pub async fn get_dataset(
    app: &App,
    caller: &Caller,
    name: &str,
) -> Result<(DatasetRow, Vec<ChunkRow>), Error> {
    let mut tx = app.db.read().await?;
    let row = dataset_get(&mut tx, name)
        .await?
        .ok_or_else(|| Error::not_found("dataset", name))?;
    let chunks = if row.set.is_secret() && !caller.role.is_trusted() {
        Vec::new()
    } else {
        dataset_chunks(&mut tx, name).await?
    };
    Ok((row, chunks))
}

/// Datasets by name after `after`, at most `limit`.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_datasets(app: &App, after: &str, limit: u32) -> Result<Vec<DatasetRow>, Error> {
    let mut tx = app.db.read().await?;
    dataset_list(&mut tx, after, i64::from(limit)).await
}
