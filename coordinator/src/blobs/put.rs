//! Putting a stream of bytes into the store: checked on the way, in bounded memory, whole or not
//! at all.
use std::pin::Pin;

use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::DigestHasher;
use futures::{Stream, TryStreamExt};
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, PutPayloadMut};
use tokio::task::JoinSet;

use super::errors::not_put;
use crate::error::Error;
use crate::limits::{PUT_PART_BYTES, PUT_PARTS_RUNNING_MAX};

/// Puts bytes that must be the named blob. Durable when it returns; nothing is visible before.
///
/// # Errors
/// DIGEST_MISMATCH when they are others; the stream's own errors; UNAVAILABLE.
pub(super) async fn put_checked(
    store: &dyn ObjectStore,
    key: &Path,
    name: BlobName,
    bytes: impl Stream<Item = Result<Bytes, Error>> + Send,
) -> Result<(), Error> {
    let mut source = Source {
        bytes: Box::pin(bytes),
        rest: Bytes::new(),
        hasher: DigestHasher::new(),
        name,
    };
    let first = source.next_part().await?;
    if first.content_length() < PUT_PART_BYTES {
        source.check()?;
        store.put(key, first).await.map_err(not_put)?;
        return Ok(());
    }
    let mut upload = store.put_multipart(key).await.map_err(not_put)?;
    let sent = async {
        send_parts(upload.as_mut(), first, &mut source).await?;
        source.check()?;
        upload.complete().await.map_err(not_put)
    };
    match sent.await {
        Ok(_) => Ok(()),
        Err(error) => {
            // Parts that nobody completes cost money and are seen by nobody.
            let _ = upload.abort().await;
            Err(error)
        }
    }
}

async fn send_parts<S>(
    upload: &mut dyn MultipartUpload,
    first: PutPayload,
    source: &mut Source<S>,
) -> Result<(), Error>
where
    S: Stream<Item = Result<Bytes, Error>> + Send,
{
    // Dropped with everything that is on its way.
    let mut running: JoinSet<object_store::Result<()>> = JoinSet::new();
    let mut part = first;
    while part.content_length() > 0 {
        if running.len() >= PUT_PARTS_RUNNING_MAX
            && let Some(done) = running.join_next().await
        {
            done?.map_err(not_put)?;
        }
        running.spawn(upload.put_part(part));
        part = source.next_part().await?;
    }
    while let Some(done) = running.join_next().await {
        done?.map_err(not_put)?;
    }
    Ok(())
}

/// The bytes, cut into parts and hashed.
struct Source<S> {
    bytes: Pin<Box<S>>,
    rest: Bytes,
    hasher: DigestHasher,
    name: BlobName,
}

impl<S: Stream<Item = Result<Bytes, Error>> + Send> Source<S> {
    /// The next part, full unless it is the last one; empty after it.
    async fn next_part(&mut self) -> Result<PutPayload, Error> {
        let mut part = PutPayloadMut::new();
        while part.content_length() < PUT_PART_BYTES {
            if self.rest.is_empty() {
                match self.bytes.try_next().await? {
                    Some(piece) => self.rest = piece,
                    None => break,
                }
                continue;
            }
            let room = PUT_PART_BYTES - part.content_length();
            let piece = self.rest.split_to(room.min(self.rest.len()));
            self.hasher.update(&piece);
            part.push(piece);
        }
        Ok(part.freeze())
    }

    fn check(&self) -> Result<(), Error> {
        if self.hasher.finish() == (self.name.digest, self.name.size_bytes) {
            return Ok(());
        }
        let reason = ErrorReason::DigestMismatch;
        Err(Error::new(reason, reason.sentence()).with("digest", self.name.digest))
    }
}
