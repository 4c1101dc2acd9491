//! Which of these blobs does the caller still have to send?
use cairn_proto::convert::BlobName;

use crate::app::App;
use crate::caller::Caller;
use crate::db::blobs::blob_get;
use crate::error::Error;

/// The named blobs that are not held. What the caller may not read counts as not held: nobody
/// learns of secret sets by asking.
///
/// # Errors
/// UNAVAILABLE when database or store do not answer.
pub async fn find_missing(
    app: &App,
    caller: &Caller,
    names: Vec<BlobName>,
) -> Result<Vec<BlobName>, Error> {
    let mut missing = Vec::new();
    let mut tx = app.db.read().await?;
    let mut known = Vec::new();
    for name in names {
        match blob_get(&mut tx, name.digest).await? {
            Some(row) if row.name == name && row.is_readable_by(caller) => known.push(name),
            _ => missing.push(name),
        }
    }
    drop(tx);
    for name in known {
        // The row may have outlived the bytes: then they are welcome again.
        if app.blobs.size(name.digest).await? != Some(name.size_bytes) {
            missing.push(name);
        }
    }
    Ok(missing)
}
