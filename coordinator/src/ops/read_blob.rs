//! A caller reads a blob from an offset on.
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::DigestHasher;
use futures::{StreamExt, TryStreamExt};

use crate::app::App;
use crate::blobs::{self, ByteStream};
use crate::caller::Caller;
use crate::db::blobs::blob_get;
use crate::error::Error;

/// Opens a blob for a caller who may read it. Read from the start, its bytes are hashed on the way
/// and the stream ends with DIGEST_MISMATCH when they have changed on the disk.
///
/// # Errors
/// NOT_FOUND also for those who may not know of it; WRONG_OFFSET beyond its end.
pub async fn read_blob(
    app: &App,
    caller: &Caller,
    name: BlobName,
    offset: u64,
) -> Result<ByteStream, Error> {
    check_reader(app, caller, name).await?;
    if offset > name.size_bytes {
        return Err(Error::new(
            ErrorReason::WrongOffset,
            format!("the blob ends at {} bytes", name.size_bytes),
        )
        .with("size_bytes", name.size_bytes));
    }
    if offset == name.size_bytes {
        // Stores refuse a range without bytes.
        return Ok(futures::stream::empty().boxed());
    }
    let bytes = app.blobs.open_at(name.digest, offset).await?;
    Ok(if offset == 0 {
        checked(bytes, name)
    } else {
        bytes
    })
}

/// Whether this caller may read the blob.
///
/// # Errors
/// NOT_FOUND also for those who may not know of it.
pub(super) async fn check_reader(app: &App, caller: &Caller, name: BlobName) -> Result<(), Error> {
    let mut tx = app.db.read().await?;
    let row = blob_get(&mut tx, name.digest).await?;
    if row.is_some_and(|row| row.name == name && row.is_readable_by(caller)) {
        return Ok(());
    }
    Err(Error::not_found("blob", name.digest))
}

fn checked(bytes: ByteStream, name: BlobName) -> ByteStream {
    let state = Some((bytes, DigestHasher::new()));
    futures::stream::try_unfold(state, move |state| async move {
        let Some((mut bytes, mut hasher)) = state else {
            return Ok(None);
        };
        if let Some(piece) = bytes.try_next().await? {
            hasher.update(&piece);
            return Ok(Some((piece, Some((bytes, hasher)))));
        }
        if hasher.finish() == (name.digest, name.size_bytes) {
            Ok(None)
        } else {
            Err(blobs::changed(name.digest))
        }
    })
    .boxed()
}
