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
}

impl UploadSlots {
    /// At most this many at once.
    #[must_use]
    pub fn new(running_max: usize) -> Self {
        Self {
            slots: Arc::default(),
            running: Arc::new(Semaphore::new(running_max)),
        }
    }

    /// Asks the writer before us to stop, waits until it has, and becomes the writer. The guard
    /// must live as long as the file may be written to, blocking tasks included.
    pub async fn take(&self, key: UploadKey) -> Option<UploadGuard> {
        let permit = Arc::clone(&self.running).acquire_owned().await.ok()?;
        let writer = CancellationToken::new();
        let lock = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = slots.entry(key).or_insert_with(|| Slot {
                lock: Arc::default(),
                writer: CancellationToken::new(),
            });
            std::mem::replace(&mut slot.writer, writer.clone()).cancel();
            Arc::clone(&slot.lock)
        };
        let release = Release {
            slots: Arc::clone(&self.slots),
            key,
        };
        let held = lock.lock_owned().await;
        Some(UploadGuard {
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
        let slots = UploadSlots::new(4);
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
}
