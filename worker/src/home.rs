//! The folder a worker keeps its things in.
//!
//! ```text
//! worker.json          identity; secret
//! worker.lock          held while `run` runs
//! device.json          which device is worked on, or why none
//! cache/               downloaded blobs by digest, and folders linked from them
//! work/LEASE/          unfinished work
//! checkpoints/ROUND-SHARD/   local training checkpoints and states
//! submitted/ID/        adapters and training states until they are settled
//! receipts/ID.json     the coordinator's signed answers, and verdicts
//! ```

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use cairn_proto::identity::{self, Identity, WORKER_FILE};

use crate::error::WorkerError;
use crate::limits::ID_CHARS_MAX;

/// The home folder.
#[derive(Debug, Clone)]
pub struct Home {
    /// Its path.
    pub path: PathBuf,
}

impl Home {
    /// The chosen folder, or the platform's place for it. Makes nothing.
    ///
    /// # Errors
    /// When no home folder is known.
    pub fn new(chosen: Option<&Path>) -> Result<Self, WorkerError> {
        Ok(Self {
            path: identity::home(chosen)?,
        })
    }

    /// The identity's file.
    #[must_use]
    pub fn identity_file(&self) -> PathBuf {
        self.path.join(WORKER_FILE)
    }

    /// Reads the identity.
    ///
    /// # Errors
    /// When this machine has not joined, or the file is broken.
    pub fn identity(&self) -> Result<Identity, WorkerError> {
        Ok(Identity::load(&self.identity_file())?)
    }

    /// A folder under home, made if need be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf, WorkerError> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).map_err(WorkerError::home("create", &path))?;
        Ok(path)
    }

    /// Takes the home for one `run`; released when the file is dropped, or the process dies.
    ///
    /// # Errors
    /// [`WorkerError::Busy`] when another holds it.
    pub fn lock(&self) -> Result<File, WorkerError> {
        let path = self.path.join("worker.lock");
        let file = File::create(&path).map_err(WorkerError::home("create", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(WorkerError::Busy {
                home: self.path.clone(),
            }),
            Err(TryLockError::Error(source)) => Err(WorkerError::Home {
                action: "lock",
                path,
                source,
            }),
        }
    }
}

/// Whether an id from the coordinator may become a file name.
#[must_use]
pub fn is_plain_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= ID_CHARS_MAX
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_a_home() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path())).unwrap();
        let held = home.lock().unwrap();
        assert!(matches!(home.lock(), Err(WorkerError::Busy { .. })));
        drop(held);
        assert!(home.lock().is_ok());
    }

    #[test]
    fn ids_are_plain() {
        assert!(is_plain_id("0190-ab_C"));
        for id in ["", "..", "a/b", "a\\b", "a\0", &"x".repeat(65)] {
            assert!(!is_plain_id(id), "{id:?}");
        }
    }
}
