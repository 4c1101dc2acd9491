//! What every operation works with.
use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cairn_proto::convert::BlobName;
use cairn_proto::url::Server;
use cairn_stack::digest::Digest;
use ed25519_dalek::SigningKey;
use tokio::sync::{Notify, watch};

use crate::blobs::{Blobs, UploadSlots, disk_free_bytes};
use crate::clock::Clock;
use crate::comparisons::Comparisons;
use crate::db::Db;
use crate::db::blobs::{SERVER, blob_insert};
use crate::error::Error;
use crate::lifecycle::Lifecycle;
use crate::limits::Limits;
use crate::rpc::auth::Gate;

/// The running coordinator. Clones are the same one.
#[derive(Clone)]
pub struct App(Arc<AppInner>);

/// See [`App`].
pub struct AppInner {
    /// Which coordinator this is, among those over one database: that of its data folder.
    pub id: String,
    /// The database.
    pub db: Db,
    /// The blob store.
    pub blobs: Blobs,
    /// The time.
    pub clock: Clock,
    /// Signs receipts and manifests.
    pub key: SigningKey,
    /// Draws audits; leaves the process only to the database.
    pub(crate) audit_secret: [u8; 32],
    /// What is allowed.
    pub limits: Limits,
    /// Who waits for what.
    pub wake: Wake,
    /// A folder for temporary files, on the same file system as a local blob store; wiped at start.
    pub scratch: PathBuf,
    /// Where uploads lie until they are complete.
    pub uploads_folder: PathBuf,
    /// Where volunteers reach us, for join URLs.
    pub endpoint: Server,
    /// Shutdown and tasks.
    pub lifecycle: Lifecycle,
    /// Held while a model is made: they are large, and one at a time is fast enough.
    pub(crate) creating: tokio::sync::Mutex<()>,
    /// Comparisons of losses that were read already.
    pub(crate) compared: Comparisons,
    /// Uploads that run now.
    pub(crate) uploads: UploadSlots,
    /// Sessions and rates.
    pub(crate) gate: Gate,
    /// Held as long as the app lives: one server a data folder.
    pub(crate) _lock: std::fs::File,
}

impl App {
    /// Puts the parts together.
    #[must_use]
    pub fn new(inner: AppInner) -> Self {
        Self(Arc::new(inner))
    }

    /// A fresh folder under scratch for one job, removed when the value is dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch_folder(&self, what: &str) -> std::io::Result<tempfile::TempDir> {
        tempfile::Builder::new()
            .prefix(what)
            .tempdir_in(&self.scratch)
    }

    /// Whether new work may be taken: not draining.
    #[must_use]
    pub fn takes_work(&self) -> bool {
        !self.lifecycle.is_draining()
    }

    /// Whether our disks have room above the watermark: that of a local blob store, and that of
    /// the data folder, where uploads and folds lie until they are complete.
    #[must_use]
    pub fn disk_has_room(&self) -> bool {
        [self.blobs.free_bytes(), disk_free_bytes(&self.scratch)]
            .into_iter()
            .flatten()
            .all(|free| free >= self.limits.disk_free_bytes_min)
    }

    /// Writes the rows of blobs that this server has put, so that they stay for a day without being
    /// named by anything: time to name them in a transaction that waits for no store.
    ///
    /// # Errors
    /// UNAVAILABLE when one has just been collected as garbage: put it again.
    pub async fn keep_blobs(&self, names: impl IntoIterator<Item = BlobName>) -> Result<(), Error> {
        // In one order, so that two who keep the same wait for each other and not crosswise.
        let names: BTreeMap<Digest, BlobName> =
            names.into_iter().map(|name| (name.digest, name)).collect();
        if names.is_empty() {
            return Ok(());
        }
        let now = self.clock.now_ms();
        let mut tx = self.db.begin().await?;
        for name in names.values() {
            blob_insert(&mut tx, *name, SERVER, now).await?;
        }
        tx.commit().await?;
        self.blobs.expect_held(names.into_values()).await
    }

    /// The scratch folder.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }
}

impl Deref for App {
    type Target = AppInner;

    fn deref(&self) -> &AppInner {
        &self.0
    }
}

/// Wakes those who wait, here and at other coordinators over the same database: tasks also run on a
/// period, so a lost wake only delays.
#[derive(Debug)]
pub struct Wake {
    /// A submission is to be judged, or an evaluation has ended.
    pub judge: Notify,
    /// A round may be able to move on.
    pub rounds: Notify,
    /// There may be work to claim.
    pub work: Notify,
    /// Counts changes to any round.
    pub changed: watch::Sender<u64>,
    /// Something is to be told to other coordinators.
    pub(crate) told: Notify,
    /// Whether others are heard, where there may be others.
    pub(crate) hears: AtomicBool,
}

impl Default for Wake {
    fn default() -> Self {
        Self {
            judge: Notify::new(),
            rounds: Notify::new(),
            work: Notify::new(),
            changed: watch::Sender::new(0),
            told: Notify::new(),
            hears: AtomicBool::new(true),
        }
    }
}

impl Wake {
    /// Wakes everybody everywhere: something has been committed.
    pub fn all(&self) {
        self.here();
        self.told.notify_one();
    }

    /// Wakes everybody in this process: something has been committed, perhaps elsewhere.
    pub(crate) fn here(&self) {
        // A permit for the task, should it not be waiting just now; claimers wait in numbers.
        self.judge.notify_one();
        self.rounds.notify_one();
        self.work.notify_waiters();
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Whether wake-ups from other coordinators come in.
    #[must_use]
    pub fn hears_others(&self) -> bool {
        self.hears.load(Ordering::Relaxed)
    }
}
