//! A caller wants to read a blob straight from the store.
use cairn_proto::convert::BlobName;

use crate::app::App;
use crate::blobs::SignedRequest;
use crate::caller::Caller;
use crate::error::Error;
use crate::ops::read_blob::check_reader;

/// A request that reads the blob; none where the store cannot be reached directly.
///
/// # Errors
/// NOT_FOUND also for those who may not know of it.
pub async fn sign_read(
    app: &App,
    caller: &Caller,
    name: BlobName,
) -> Result<Option<SignedRequest>, Error> {
    check_reader(app, caller, name).await?;
    match app.limits.direct_url {
        Some(valid) => app.blobs.sign_read(name.digest, valid).await,
        None => Ok(None),
    }
}
