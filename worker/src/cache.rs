//! Downloaded blobs by digest, folders linked from them, and the bound on both.
//!
//! A blob is hashed when it arrives and again the first time a process uses it, so that bit-rot
//! on this disk is healed by a new download instead of ending in a rejected adapter.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use cairn_proto::client::{Client, ClientError};
use cairn_proto::convert::{self, BlobName};
use cairn_proto::limits::CHECKPOINT_FILES_MAX;
use cairn_proto::v1;
use cairn_stack::digest::Digest;

use crate::clock;
use crate::error::WorkerError;
use crate::home::is_plain_id;

/// The cache of one home.
pub struct Cache {
    blobs: PathBuf,
    folders: PathBuf,
    bytes_max: u64,
    verified: Mutex<HashSet<Digest>>,
}

impl Cache {
    /// Opens the cache in a folder.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(root: &Path, bytes_max: u64) -> Result<Self, WorkerError> {
        let (blobs, folders) = (root.join("blobs"), root.join("folders"));
        for path in [&blobs, &folders] {
            fs::create_dir_all(path).map_err(WorkerError::home("create", path))?;
        }
        Ok(Self {
            blobs,
            folders,
            bytes_max,
            verified: Mutex::default(),
        })
    }

    /// Where a blob lies or would lie.
    #[must_use]
    pub fn path(&self, blob: BlobName) -> PathBuf {
        let name = blob.digest.to_string();
        self.blobs.join(&name[..2]).join(name)
    }

    /// Brings a blob here, whole and with the right digest. Says whether it had to be downloaded.
    ///
    /// # Errors
    /// As [`Client::download`].
    pub async fn fetch(
        &self,
        client: &Client,
        blob: BlobName,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(PathBuf, bool), ClientError> {
        let path = self.path(blob);
        let known = self.is_verified(blob.digest);
        if path.exists() && (known || holds(&path, blob).await) {
            self.note_verified(blob.digest);
            touch(&path);
            return Ok((path, false));
        }
        self.forget(blob.digest);
        match fs::remove_file(&path) {
            Ok(()) => eprintln!("cache: {} was damaged; fetching it again", blob.digest),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
            Err(source) => {
                return Err(ClientError::File {
                    action: "remove",
                    path,
                    source,
                });
            }
        }
        client.download(blob, &path, progress).await?;
        self.note_verified(blob.digest);
        Ok((path, true))
    }

    fn is_verified(&self, digest: Digest) -> bool {
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&digest)
    }

    fn note_verified(&self, digest: Digest) {
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(digest);
    }

    fn forget(&self, digest: Digest) {
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&digest);
    }

    /// Links fetched files into one folder named by its commit, in Hugging Face layout.
    ///
    /// # Errors
    /// When a path or the commit is not plain, or linking fails.
    pub fn link_folder(&self, commit: &str, files: &[v1::File]) -> Result<PathBuf, WorkerError> {
        if !is_plain_id(commit) || files.len() > CHECKPOINT_FILES_MAX {
            let text = commit.chars().take(80).collect();
            return Err(convert::ConvertError::Word {
                kind: "commit",
                text,
            }
            .into());
        }
        let folder = self.folders.join(commit);
        for file in files {
            let blob = convert::blob("blob", file.blob.as_ref())?;
            let path = folder.join(convert::relative_path(&file.path)?);
            link(&self.path(blob), &path).map_err(WorkerError::home("link", &path))?;
        }
        Ok(folder)
    }

    /// Bytes on disk, unfinished downloads included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries().iter().map(|entry| entry.bytes).sum()
    }

    /// Removes what was used longest ago until the cache is within its bound, sparing `keep`.
    /// Linked folders go first: they are made again for nothing, and hold their blobs' bytes.
    pub fn evict(&self, keep: &HashSet<Digest>) {
        let mut entries = self.entries();
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        if bytes <= self.bytes_max {
            return;
        }
        let _ = fs::remove_dir_all(&self.folders);
        let _ = fs::create_dir_all(&self.folders);
        entries.sort_by_key(|entry| entry.used);
        for entry in entries {
            if bytes <= self.bytes_max {
                return;
            }
            if entry.digest.is_some_and(|digest| keep.contains(&digest)) {
                continue;
            }
            if fs::remove_file(&entry.path).is_ok() {
                bytes -= entry.bytes;
            }
        }
    }

    fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for folder in fs::read_dir(&self.blobs).into_iter().flatten().flatten() {
            for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let Ok(metadata) = file.metadata() else {
                    continue;
                };
                let path = file.path();
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .unwrap_or_default();
                entries.push(Entry {
                    digest: name.strip_suffix(".part").unwrap_or(name).parse().ok(),
                    bytes: metadata.len(),
                    used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                    path,
                });
            }
        }
        entries
    }
}

struct Entry {
    path: PathBuf,
    digest: Option<Digest>,
    bytes: u64,
    used: SystemTime,
}

async fn holds(path: &Path, blob: BlobName) -> bool {
    let path = path.to_owned();
    let hashed = tokio::task::spawn_blocking(move || Digest::of_file(&path)).await;
    matches!(hashed, Ok(Ok(found)) if found == (blob.digest, blob.size_bytes))
}

/// Marks a blob as used now. Failing costs only the order of eviction.
fn touch(path: &Path) {
    if let Ok(file) = File::options().append(true).open(path) {
        let _ = file.set_modified(clock::system_time());
    }
}

/// Links a file, anew if it is there; copies where the file system cannot link.
///
/// # Errors
/// When it can be neither linked nor copied.
pub fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => (),
    }
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(cache: &Cache, bytes: &[u8], age_seconds: u64) -> BlobName {
        let blob = BlobName {
            digest: Digest::of(bytes),
            size_bytes: bytes.len() as u64,
        };
        let path = cache.path(blob);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        let used = clock::system_time() - std::time::Duration::from_secs(age_seconds);
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(used)
            .unwrap();
        blob
    }

    #[test]
    fn the_oldest_goes_first_and_what_is_needed_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 250).unwrap();
        let oldest = put(&cache, &[1; 100], 300);
        let older = put(&cache, &[2; 100], 200);
        let newest = put(&cache, &[3; 100], 100);
        assert_eq!(cache.bytes(), 300);
        cache.evict(&HashSet::from([oldest.digest]));
        assert!(cache.path(oldest).exists() && cache.path(newest).exists());
        assert!(!cache.path(older).exists());
        assert_eq!(cache.bytes(), 200);
    }

    #[test]
    fn folders_are_linked_and_hostile_paths_refused() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path(), 1000).unwrap();
        let blob = put(&cache, b"{}", 0);
        let file = |path: &str| v1::File {
            path: path.to_owned(),
            blob: Some(blob.into()),
            sha256: String::new(),
        };
        let commit = "ab".repeat(20);
        let made = cache
            .link_folder(&commit, &[file("config.json"), file("a/b.json")])
            .unwrap();
        assert_eq!(fs::read(made.join("a/b.json")).unwrap(), b"{}");
        cache.link_folder(&commit, &[file("config.json")]).unwrap();
        assert!(
            cache
                .link_folder(&commit, &[file("../config.json")])
                .is_err()
        );
        assert!(cache.link_folder("../x", &[file("config.json")]).is_err());
    }
}
