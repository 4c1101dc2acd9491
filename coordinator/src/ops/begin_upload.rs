//! A caller wants to send a blob straight to the store, or to go on with it.
use cairn_proto::convert::BlobName;
use cairn_proto::limits::DIRECT_PARTS_MAX;

use crate::app::App;
use crate::blobs::{Part, SignedRequest, UploadKey};
use crate::caller::Caller;
use crate::error::Error;
use crate::ids::LeaseId;
use crate::ops::write_blob::{UploadHeader, begin, check_right, is_held};

/// What a direct upload still needs.
pub enum Plan {
    /// Nothing: the blob is held.
    Held,
    /// The store cannot be reached directly: the bytes go through `WriteBlob`.
    Indirect,
    /// These parts; none when all are there, and `CompleteUpload` comes next.
    Parts {
        /// Bytes in whole parts that the store holds.
        committed_bytes: u64,
        /// The next missing parts, each with the request that puts it.
        next: Vec<(Part, SignedRequest)>,
    },
}

/// Says which parts are missing, and how to put the next of them.
///
/// # Errors
/// As `WriteBlob`: ROLE_REQUIRED, LEASE_LOST, BLOB_TOO_LARGE, TOO_MANY.
pub async fn begin_upload(
    app: &App,
    caller: &Caller,
    name: BlobName,
    lease: Option<LeaseId>,
) -> Result<Plan, Error> {
    let Some(valid) = app.limits.direct_url.filter(|_| app.blobs.is_remote()) else {
        return Ok(Plan::Indirect);
    };
    let header = UploadHeader {
        name,
        offset: 0,
        lease,
    };
    check_right(app, caller, &header).await?;
    if is_held(app, name).await? {
        return Ok(Plan::Held);
    }
    begin(app, caller, name).await?;
    let upload = UploadKey {
        digest: name.digest,
        worker: caller.worker,
    };
    let (committed_bytes, missing) = app.blobs.missing_parts(upload, name.size_bytes).await?;
    let mut next = Vec::new();
    for part in missing.into_iter().take(DIRECT_PARTS_MAX) {
        match app.blobs.sign_part(upload, part, valid).await? {
            Some(request) => next.push((part, request)),
            None => return Ok(Plan::Indirect),
        }
    }
    Ok(Plan::Parts {
        committed_bytes,
        next,
    })
}
