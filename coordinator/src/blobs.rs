//! Bytes by digest. A blob is durable before it is visible, and never changes.
mod direct;
mod errors;
mod local;
mod location;
mod parts;
mod put;
mod slots;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::{Digest, DigestHasher};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutPayload};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use crate::clock::Timestamp;
use crate::error::{Error, is_full};
use crate::failpoint::Step;
use crate::limits;

pub use direct::SignedRequest;
pub use location::Location;
pub use parts::Part;
pub use slots::{NoPlace, UploadGuard, UploadKey, UploadSlots};

/// Where a blob lies in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobKey {
    /// Content-addressed: `blobs/ab/abcd...`.
    Content(Digest),
}

const CONTENT: &str = "blobs";
/// Questions to the store at once where many blobs are looked at.
const LOOKS_RUNNING_MAX: usize = 8;

impl BlobKey {
    /// Relative to the store's root, `/` between parts.
    #[must_use]
    pub fn path(self) -> String {
        match self {
            Self::Content(digest) => {
                let hex = digest.to_string();
                format!("{CONTENT}/{}/{hex}", &hex[..2])
            }
        }
    }

    /// Largest length, bytes.
    #[must_use]
    pub const fn bytes_max(self) -> u64 {
        match self {
            Self::Content(_) => cairn_proto::limits::BLOB_BYTES_MAX,
        }
    }

    fn object(self) -> object_store::path::Path {
        object_store::path::Path::from(self.path())
    }
}

/// Who may read a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Everybody enrolled.
    Members,
    /// Evaluators, maintainers, and its uploader.
    Evaluators,
}

impl Audience {
    /// The word in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Members => "members",
            Self::Evaluators => "evaluators",
        }
    }
}

/// The blob store. Clones share it.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    /// The folder of a local store: there files can be linked instead of copied.
    root: Option<PathBuf>,
    /// What others need to reach a remote store themselves.
    direct: Option<direct::Direct>,
}

/// A blob's bytes, piece by piece.
pub type ByteStream = BoxStream<'static, Result<Bytes, Error>>;

impl Blobs {
    /// Opens the store at a URL, with the credentials of this process's environment.
    ///
    /// # Errors
    /// As [`Blobs::open_at_location`].
    pub fn open(url: &str) -> Result<Self, Error> {
        Self::open_at_location(&Location::from_env(url))
    }

    /// Opens a store; makes the folder of a local one when absent. Asks nothing of a remote one
    /// yet, see [`Blobs::probe`].
    ///
    /// # Errors
    /// For URLs of no store, and when the folder cannot be made or written.
    pub fn open_at_location(location: &Location) -> Result<Self, Error> {
        let path = match location.parse()? {
            location::Place::Folder(path) => path,
            location::Place::Bucket(bucket) => {
                return Ok(Self {
                    store: bucket.store,
                    root: None,
                    direct: Some(bucket.direct),
                });
            }
        };
        let root = std::path::absolute(path).map_err(Error::from)?;
        std::fs::create_dir_all(root.join(CONTENT))?;
        let store = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
        Ok(Self {
            store: Arc::new(store),
            root: Some(root),
            direct: None,
        })
    }

    /// Free bytes on the disk of a local store; none for a remote one.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        local::free_bytes(self.root.as_deref()?).ok()
    }

    /// Stores bytes; durable when it returns. The caller inserts the row.
    ///
    /// # Errors
    /// DISK_FULL, or UNAVAILABLE when the store does not answer.
    #[track_caller]
    pub fn put_bytes(&self, bytes: Bytes) -> impl Future<Output = Result<BlobName, Error>> {
        Step::here("put").around(self.store_bytes(bytes))
    }

    async fn store_bytes(&self, bytes: Bytes) -> Result<BlobName, Error> {
        let name = BlobName {
            digest: Digest::of(&bytes),
            size_bytes: bytes.len() as u64,
        };
        if self.size(name.digest).await? != Some(name.size_bytes) {
            let key = BlobKey::Content(name.digest);
            self.store
                .put(&key.object(), PutPayload::from_bytes(bytes))
                .await
                .map_err(errors::not_put)?;
        }
        Ok(name)
    }

    /// Stores a finished file, which must not be written to afterwards: a local store links it.
    /// Durable when it returns. The caller inserts the row.
    ///
    /// # Errors
    /// DISK_FULL, or UNAVAILABLE when the store does not answer.
    #[track_caller]
    pub fn put_file(&self, path: &Path) -> impl Future<Output = Result<BlobName, Error>> {
        Step::here("put").around(self.store_file(path))
    }

    async fn store_file(&self, path: &Path) -> Result<BlobName, Error> {
        let source = path.to_owned();
        let (digest, size_bytes) =
            tokio::task::spawn_blocking(move || Digest::of_file(&source)).await??;
        let name = BlobName { digest, size_bytes };
        self.store_verified(path, name).await?;
        Ok(name)
    }

    /// Stores a file whose digest has been checked. Durable when it returns.
    ///
    /// # Errors
    /// DISK_FULL, or UNAVAILABLE when the store does not answer.
    #[track_caller]
    pub fn put_verified(
        &self,
        path: &Path,
        name: BlobName,
    ) -> impl Future<Output = Result<(), Error>> {
        Step::here("put").around(self.store_verified(path, name))
    }

    async fn store_verified(&self, path: &Path, name: BlobName) -> Result<(), Error> {
        if self.size(name.digest).await? == Some(name.size_bytes) {
            return Ok(());
        }
        let key = BlobKey::Content(name.digest);
        if let Some(root) = &self.root {
            let (source, target) = (path.to_owned(), root.join(key.path()));
            return tokio::task::spawn_blocking(move || local::place(&source, &target))
                .await?
                .map_err(broken);
        }
        let file = tokio::fs::File::open(path).await?;
        let bytes = ReaderStream::with_capacity(file, limits::READ_BYTES).map_err(Error::from);
        let (store, object) = (Arc::clone(&self.store), key.object());
        // On its own: a caller that goes away must not leave half an upload behind.
        tokio::spawn(async move { put::put_checked(store.as_ref(), &object, name, bytes).await })
            .await?
    }

    /// Whether the store holds the blob.
    ///
    /// # Errors
    /// UNAVAILABLE when the store does not answer.
    pub async fn exists(&self, digest: Digest) -> Result<bool, Error> {
        Ok(self.size(digest).await?.is_some())
    }

    /// Looks once more whether blobs are there whose rows have just been written.
    ///
    /// Until there is a row, bytes that were put long ago, and were found instead of being put again,
    /// are garbage: `tasks/collect_blobs` holds the row's key while it removes them. Whoever has
    /// written the row finds out here; from then on nobody removes them.
    ///
    /// # Errors
    /// UNAVAILABLE when one has just been removed: put it again.
    pub async fn expect_held(
        &self,
        names: impl IntoIterator<Item = BlobName>,
    ) -> Result<(), Error> {
        futures::stream::iter(names.into_iter().map(Ok))
            .try_for_each_concurrent(LOOKS_RUNNING_MAX, async |name: BlobName| {
                if self.size(name.digest).await? == Some(name.size_bytes) {
                    return Ok(());
                }
                Err(Error::unavailable(
                    "the bytes were just collected as garbage; send them again",
                ))
            })
            .await
    }

    /// The blob's length, when it is held.
    ///
    /// # Errors
    /// UNAVAILABLE when the store does not answer.
    pub async fn size(&self, digest: Digest) -> Result<Option<u64>, Error> {
        match self.store.head(&BlobKey::Content(digest).object()).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => self.is_there().map(|()| None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a blob's bytes from an offset on, in pieces of at most `READ_BYTES`.
    ///
    /// # Errors
    /// BLOB_MISSING when it is not held, UNAVAILABLE when the store does not answer.
    pub async fn open_at(&self, digest: Digest, offset: u64) -> Result<ByteStream, Error> {
        let key = BlobKey::Content(digest);
        if let Some(root) = &self.root {
            let opened = local::open_at(root.join(key.path()), offset).await;
            return opened.map_err(|error| self.is_there().err().unwrap_or(error));
        }
        let range = (offset > 0).then_some(GetRange::Offset(offset));
        let options = GetOptions {
            range,
            ..Default::default()
        };
        let result = self.store.get_opts(&key.object(), options).await?;
        let pieces = result.into_stream().map_err(Error::from);
        Ok(pieces.map_ok(cut).try_flatten().boxed())
    }

    /// A blob's bytes, checked against its digest.
    ///
    /// # Errors
    /// BLOB_TOO_LARGE above `bytes_max`, DIGEST_MISMATCH when the store's bytes have changed.
    pub async fn get_bytes(&self, digest: Digest, bytes_max: u64) -> Result<Bytes, Error> {
        let mut stream = self.open_at(digest, 0).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = stream.try_next().await? {
            if (bytes.len() + piece.len()) as u64 > bytes_max {
                return Err(Error::new(
                    ErrorReason::BlobTooLarge,
                    format!("blob {digest} is larger than {bytes_max} bytes"),
                ));
            }
            bytes.extend_from_slice(&piece);
        }
        if Digest::of(&bytes) != digest {
            return Err(changed(digest));
        }
        Ok(bytes.into())
    }

    /// Puts a blob's bytes at a path that does not exist yet, checked against the digest. A local
    /// store links the file, so nobody may write to it.
    ///
    /// # Errors
    /// BLOB_MISSING, DIGEST_MISMATCH when the store's bytes have changed, DISK_FULL.
    pub async fn materialise(&self, digest: Digest, path: &Path) -> Result<u64, Error> {
        if let Some(parent) = path.parent() {
            tokio::fs::create_dir_all(parent).await?;
        }
        if let Some(root) = &self.root {
            let (source, target) = (root.join(BlobKey::Content(digest).path()), path.to_owned());
            let linked = tokio::task::spawn_blocking(move || {
                std::fs::hard_link(&source, &target)?;
                Digest::of_file(&target)
            })
            .await?;
            match linked {
                Ok((found, size)) if found == digest => return Ok(size),
                Ok(_) => {
                    let _ = tokio::fs::remove_file(path).await;
                    return Err(changed(digest));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(self.is_there().err().unwrap_or_else(|| missing(digest)));
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    return Err(error.into());
                }
                // Another file system, or one without links: copy.
                Err(_) => {}
            }
        }
        let copied = self.copy_out(digest, path).await;
        if copied.is_err() {
            let _ = tokio::fs::remove_file(path).await;
        }
        copied
    }

    /// Copies a blob's bytes to a path that does not exist yet, checked against the digest; never a
    /// link.
    ///
    /// # Errors
    /// As [`Blobs::materialise`]; what was written by then stays.
    pub async fn copy_out(&self, digest: Digest, path: &Path) -> Result<u64, Error> {
        let mut stream = self.open_at(digest, 0).await?;
        let mut file = tokio::fs::File::create_new(path).await?;
        let mut hasher = DigestHasher::new();
        while let Some(piece) = stream.try_next().await? {
            hasher.update(&piece);
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        let (found, size) = hasher.finish();
        if found == digest {
            Ok(size)
        } else {
            Err(changed(digest))
        }
    }

    /// Whether the store itself is there: a disk that is not mounted has lost nothing.
    fn is_there(&self) -> Result<(), Error> {
        match &self.root {
            Some(root) if !root.join(CONTENT).is_dir() => {
                let gone = io::Error::other(format!("{} is gone", root.join(CONTENT).display()));
                Err(broken(gone))
            }
            _ => Ok(()),
        }
    }

    /// Removes a blob; its row must be gone. Absent ones are fine.
    ///
    /// # Errors
    /// UNAVAILABLE when the store does not answer.
    #[track_caller]
    pub fn delete(&self, digest: Digest) -> impl Future<Output = Result<(), Error>> {
        Step::here("delete").around(self.remove(digest))
    }

    async fn remove(&self, digest: Digest) -> Result<(), Error> {
        match self.store.delete(&BlobKey::Content(digest).object()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Every blob in the store with the time it was put; files that are none are left out.
    #[must_use]
    pub fn list(&self) -> BoxStream<'static, Result<(Digest, Timestamp), Error>> {
        let prefix = object_store::path::Path::from(CONTENT);
        self.store
            .list(Some(&prefix))
            .map_err(Error::from)
            .try_filter_map(|meta| async move {
                let digest = meta.location.filename().and_then(|name| name.parse().ok());
                Ok(digest.map(|digest| (digest, Timestamp(meta.last_modified.timestamp_millis()))))
            })
            .boxed()
    }
}

/// A piece in pieces of at most `READ_BYTES`.
fn cut(piece: Bytes) -> impl futures::Stream<Item = Result<Bytes, Error>> {
    let mut rest = piece;
    futures::stream::iter(std::iter::from_fn(move || {
        let next = rest.split_to(rest.len().min(limits::READ_BYTES));
        (!next.is_empty()).then_some(Ok(next))
    }))
}

/// A local store that cannot be used now, as a remote one that does not answer.
fn broken(error: io::Error) -> Error {
    if is_full(&error) {
        Error::disk_full(error)
    } else {
        Error::unavailable("the blob store does not answer; try again").with_source(error)
    }
}

/// The store's bytes are no longer those that were put.
pub(crate) fn changed(digest: Digest) -> Error {
    Error::new(
        ErrorReason::DigestMismatch,
        format!("the stored bytes of blob {digest} are damaged; tell the coordinator's operator"),
    )
    .with("digest", digest)
}

/// The blob is not held.
pub(crate) fn missing(digest: Digest) -> Error {
    Error::new(
        ErrorReason::BlobMissing,
        format!("blob {digest} is not held; upload it first"),
    )
    .with("digest", digest)
}

/// Free bytes on the disk that holds a folder; none when it cannot be told.
#[must_use]
pub fn disk_free_bytes(folder: &Path) -> Option<u64> {
    local::free_bytes(folder).ok()
}

const _: () = assert!(limits::READ_BYTES <= cairn_proto::limits::CHUNK_BYTES_MAX);
