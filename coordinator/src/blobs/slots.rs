//! One writer per upload. A newer connection takes over from an older one, which may be a dead
//! peer we have not noticed yet.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cairn_stack::digest::Digest;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::ids::WorkerId;

/// Names an upload: the same bytes from two identities are two uploads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UploadKey {
    /// What the bytes shall be.
    pub digest: Digest,
    /// Who sends them.
    pub worker: WorkerId,
}

#[derive(Debug)]
struct Slot {
    lock: Arc<tokio::sync::Mutex<()>>,
    writer: CancellationToken,
}

/// The uploads that run now.
#[derive(Debug, Clone)]
pub struct UploadSlots {
    slots: Arc<Mutex<HashMap<UploadKey, Slot>>>,
    running: Arc<Semaphore>,
    per_worker_max: usize,
}

/// Why there is no place for an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// This identity has as many running as it may.
    #[error("you have {0} uploads running; finish or end one first")]
    Yours(usize),
    /// Everybody together has.
    #[error("too many uploads run now; try again")]
    All,
}

impl UploadSlots {
    /// At most this many at once, and so many of one identity.
    #[must_use]
    pub fn new(running_max: usize, per_worker_max: usize) -> Self {
        Self {
            slots: Arc::default(),
            running: Arc::new(Semaphore::new(running_max)),
            per_worker_max,
        }
    }

    /// Asks the writer before us to stop, waits until it has, and becomes the writer. The guard
    /// must live as long as the file may be written to, blocking tasks included.
    ///
    /// # Errors
    /// When the identity has too many running; those that wait for a place count too.
    pub async fn take(&self, key: UploadKey) -> Result<UploadGuard, NoPlace> {
        let writer = CancellationToken::new();
        // Dropped after the clone of the lock below, so that it sees whether others wait.
        let release = Release {
            slots: Arc::clone(&self.slots),
            key,
        };
        let lock = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let others = |other: &&UploadKey| other.worker == key.worker && **other != key;
            let running = slots.keys().filter(others).count();
            if running >= self.per_worker_max {
                return Err(NoPlace::Yours(running));
            }
            let slot = slots.entry(key).or_insert_with(|| Slot {
                lock: Arc::default(),
                writer: CancellationToken::new(),
            });
            std::mem::replace(&mut slot.writer, writer.clone()).cancel();
            Arc::clone(&slot.lock)
        };
        let permit = Arc::clone(&self.running).acquire_owned().await;
        let permit = permit.map_err(|_| NoPlace::All)?;
        let held = lock.lock_owned().await;
        Ok(UploadGuard {
            superseded: writer,
            _held: held,
            _release: release,
            _permit: permit,
        })
    }
}

/// The right to write to an upload's file.
#[derive(Debug)]
pub struct UploadGuard {
    superseded: CancellationToken,
    // Dropped in this order: the lock first, so that `Release` sees whether others wait.
    _held: OwnedMutexGuard<()>,
    _release: Release,
    _permit: OwnedSemaphorePermit,
}

impl UploadGuard {
    /// Cancelled when a newer writer waits.
    #[must_use]
    pub fn superseded(&self) -> CancellationToken {
        self.superseded.clone()
    }
}

/// Forgets a slot that nobody holds or waits for.
#[derive(Debug)]
struct Release {
    slots: Arc<Mutex<HashMap<UploadKey, Slot>>>,
    key: UploadKey,
}

impl Drop for Release {
    fn drop(&mut self) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Holders and waiters each keep a clone of the lock.
        if slots
            .get(&self.key)
            .is_some_and(|slot| Arc::strong_count(&slot.lock) == 1)
        {
            slots.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_newer_writer_takes_over() {
        let slots = UploadSlots::new(4, 2);
        let key = UploadKey {
            digest: Digest::of(b"x"),
            worker: WorkerId::new(),
        };
        let first = slots.take(key).await.unwrap();
        let stopped = first.superseded();
        let second = tokio::spawn({
            let slots = slots.clone();
            async move { slots.take(key).await.unwrap() }
        });
        stopped.cancelled().await;
        drop(first);
        let second = second.await.unwrap();
        assert!(!second.superseded().is_cancelled());
        drop(second);
        assert!(slots.slots.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn one_identity_leaves_places_to_others() {
        let slots = UploadSlots::new(2, 1);
        let (worker, other) = (WorkerId::new(), WorkerId::new());
        let key = |bytes: &[u8], worker| UploadKey {
            digest: Digest::of(bytes),
            worker,
        };
        let held = slots.take(key(b"a", worker)).await.unwrap();
        let refused = slots.take(key(b"b", worker)).await.unwrap_err();
        assert_eq!(refused, NoPlace::Yours(1));
        let others = slots.take(key(b"b", other)).await.unwrap();
        // One who waits for a place and gives up leaves nothing behind.
        let third = WorkerId::new();
        let waiting = slots.take(key(b"c", third));
        let waited = tokio::time::timeout(std::time::Duration::from_millis(10), waiting).await;
        assert!(waited.is_err());
        drop((held, others));
        assert!(slots.slots.lock().unwrap().is_empty());
    }
}
