//! Uploads that go straight to the store: each part is an object of its own, put there by a
//! presigned URL. The parts become a blob once their bytes were read and are the announced ones.
use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_proto::limits::DIRECT_PART_BYTES;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::signer::Method;
use object_store::{ObjectStore, ObjectStoreExt};

use super::put::put_checked;
use super::{BlobKey, Blobs, ByteStream, UploadKey};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::Step;

const PARTS: &str = "parts";

/// One part of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub size_bytes: u64,
}

impl Part {
    /// The parts of so many bytes.
    pub fn all(size_bytes: u64) -> impl Iterator<Item = Self> {
        (0..size_bytes.div_ceil(DIRECT_PART_BYTES)).map(move |number| {
            let offset = number * DIRECT_PART_BYTES;
            Self {
                offset,
                size_bytes: DIRECT_PART_BYTES.min(size_bytes - offset),
            }
        })
    }
}

fn folder(upload: UploadKey) -> Path {
    Path::from(format!("{PARTS}/{}-{}", upload.digest, upload.worker))
}

fn object(upload: UploadKey, part: Part) -> Path {
    folder(upload).join(format!("{:012}", part.offset))
}

fn upload_of(object: &Path) -> Option<UploadKey> {
    let folder = object.parts().nth(1)?;
    let (digest, worker) = folder.as_ref().split_once('-')?;
    Some(UploadKey {
        digest: digest.parse().ok()?,
        worker: worker.parse().ok()?,
    })
}

impl Blobs {
    /// A request that puts a part; none where the store cannot be reached directly.
    ///
    /// # Errors
    /// UNAVAILABLE when nothing can be signed now.
    pub async fn sign_part(
        &self,
        upload: UploadKey,
        part: Part,
        valid: std::time::Duration,
    ) -> Result<Option<super::SignedRequest>, Error> {
        self.sign(Method::PUT, &object(upload, part), valid).await
    }

    /// Bytes of an upload that the store holds in whole parts, and the parts that it does not.
    ///
    /// # Errors
    /// UNAVAILABLE when the store does not answer.
    pub async fn missing_parts(
        &self,
        upload: UploadKey,
        size_bytes: u64,
    ) -> Result<(u64, Vec<Part>), Error> {
        let held: std::collections::HashMap<Path, u64> = self
            .store
            .list(Some(&folder(upload)))
            .map_ok(|meta| (meta.location, meta.size))
            .try_collect()
            .await?;
        let missing: Vec<Part> = Part::all(size_bytes)
            .filter(|part| held.get(&object(upload, *part)) != Some(&part.size_bytes))
            .collect();
        let missing_bytes: u64 = missing.iter().map(|part| part.size_bytes).sum();
        Ok((size_bytes - missing_bytes, missing))
    }

    /// Makes a blob of an upload's parts: reads them one after the other, and keeps what it wrote
    /// only when it was the announced bytes. `watched` sees each piece, and may break it off.
    ///
    /// # Errors
    /// DIGEST_MISMATCH; BLOB_MISSING when a part is gone; UNAVAILABLE.
    #[track_caller]
    pub fn compose(
        &self,
        upload: UploadKey,
        name: BlobName,
        watched: impl Fn(u64) -> Result<(), Error> + Send + 'static,
    ) -> impl Future<Output = Result<(), Error>> {
        Step::here("put").around(self.store_composed(upload, name, watched))
    }

    async fn store_composed(
        &self,
        upload: UploadKey,
        name: BlobName,
        watched: impl Fn(u64) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        let bytes = self.read_parts(upload, name.size_bytes);
        let mut seen = 0;
        let bytes = bytes.and_then(move |piece| {
            seen += piece.len() as u64;
            std::future::ready(watched(seen).map(|()| piece))
        });
        let store = self.store.clone();
        let key = BlobKey::Content(name.digest).object();
        // On its own: a caller that goes away must not leave half an upload behind.
        tokio::spawn(async move { put_checked(store.as_ref(), &key, name, bytes).await }).await?
    }

    fn read_parts(
        &self,
        upload: UploadKey,
        size_bytes: u64,
    ) -> impl Stream<Item = Result<Bytes, Error>> + Send + use<> {
        let store = self.store.clone();
        futures::stream::iter(Part::all(size_bytes))
            .then(move |part| {
                let store = store.clone();
                async move {
                    let found = store.get(&object(upload, part)).await?;
                    Ok::<ByteStream, Error>(found.into_stream().map_err(Error::from).boxed())
                }
            })
            .try_flatten()
    }

    /// Removes an upload's parts.
    ///
    /// # Errors
    /// UNAVAILABLE when the store does not answer.
    #[track_caller]
    pub fn delete_parts(&self, upload: UploadKey) -> impl Future<Output = Result<(), Error>> {
        let parts = folder(upload);
        Step::here("delete").around(async move { self.delete_under(&parts).await })
    }

    /// Every part in the store: whose it is, and when it was put.
    #[must_use]
    pub fn list_parts(&self) -> BoxStream<'static, Result<(UploadKey, Timestamp), Error>> {
        self.store
            .list(Some(&Path::from(PARTS)))
            .map_err(Error::from)
            .try_filter_map(|meta| async move {
                let put = Timestamp(meta.last_modified.timestamp_millis());
                Ok(upload_of(&meta.location).map(|upload| (upload, put)))
            })
            .boxed()
    }

    async fn delete_under(&self, folder: &Path) -> Result<(), Error> {
        let listed = self.store.list(Some(folder));
        let deleted = self
            .store
            .delete_stream(listed.map_ok(|meta| meta.location).boxed());
        deleted
            .try_for_each(|_| std::future::ready(Ok(())))
            .await
            .map_err(Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::WorkerId;
    use cairn_stack::digest::Digest;

    #[test]
    fn parts_cover_the_bytes_once() {
        for size in [0, 1, DIRECT_PART_BYTES, 3 * DIRECT_PART_BYTES + 5] {
            let mut end = 0;
            for part in Part::all(size) {
                assert_eq!(part.offset, end);
                assert!(part.size_bytes > 0 && part.size_bytes <= DIRECT_PART_BYTES);
                end += part.size_bytes;
            }
            assert_eq!(end, size);
        }
    }

    #[test]
    fn a_part_says_whose_it_is() {
        let upload = UploadKey {
            digest: Digest::of(b"x"),
            worker: WorkerId::new(),
        };
        let part = Part {
            offset: DIRECT_PART_BYTES,
            size_bytes: 1,
        };
        assert_eq!(upload_of(&object(upload, part)), Some(upload));
        assert_eq!(upload_of(&Path::from("parts/x-y/0")), None);
    }
}
