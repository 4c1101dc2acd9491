//! Submissions that are handed in and not settled yet, kept on this machine: the training states
//! until the verdict, in case they are audited; adapter and request until the verdict's receipt, in
//! case the coordinator loses them.
//!
//! ```text
//! submitted/ID/kept.json     whose, under which lease, what was asked of it
//!             /request.bin   the request as it was sent
//!             /adapter/      the adapter
//!             /states/       the training states
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;
use serde::{Deserialize, Serialize};

use cairn_proto::identity::write_private;
use cairn_proto::limits::MESSAGE_BYTES_MAX;
use cairn_proto::v1;

use super::unit::{ADAPTER_FOLDER, STATES_FOLDER, Unit, remove};
use crate::clock;
use crate::error::WorkerError;
use crate::home::is_plain_id;
use crate::limits::{KEPT_BYTES_MAX, KEPT_MAX};
use crate::train::record;
use crate::train::states::Commitment;

const INFO_FILE: &str = "kept.json";
const REQUEST_FILE: &str = "request.bin";
/// Folders within each other below a kept submission: files of a state lie two below it.
const DEPTH_MAX: u32 = 4;

/// What is known of a kept submission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Whose it is.
    pub worker_id: String,
    /// The lease it was handed in under.
    pub lease_id: String,
    /// For lines about it: `shard 3 of round r`.
    pub name: String,
    /// When it was handed in, milliseconds since 1970 by this machine's clock.
    pub kept_ms: i64,
    /// The audit it is under.
    pub audit: Option<Audit>,
    /// Why it is not handed in again, although the coordinator does not list it.
    pub refused: Option<String>,
}

/// A segment that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Which, from 0.
    pub segment: u32,
    /// After this it is too late, milliseconds since 1970 by the coordinator's clock.
    pub until_ms: i64,
    /// Whether it has been opened.
    pub opened: bool,
}

impl From<&v1::AuditRequest> for Audit {
    fn from(asked: &v1::AuditRequest) -> Self {
        Self {
            segment: asked.segment,
            until_ms: asked.until_ms,
            opened: false,
        }
    }
}

/// A kept submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The submission's id.
    pub id: String,
    /// Its folder.
    pub dir: PathBuf,
    /// What is known of it.
    pub info: Info,
}

impl Kept {
    /// Takes over the folder of a unit that was acknowledged as submission `id`. Older ones are
    /// removed where there are too many.
    ///
    /// # Errors
    /// When the id is not plain or the folder cannot be moved; it is where it was then.
    pub fn take(
        submitted: &Path,
        unit: &Unit,
        request: &v1::SubmitAdapterRequest,
        id: &str,
        audit: Option<&v1::AuditRequest>,
    ) -> Result<Self, WorkerError> {
        if !is_plain_id(id) {
            let text = id.chars().take(80).collect();
            let kind = "submission id";
            return Err(cairn_proto::convert::ConvertError::Word { kind, text }.into());
        }
        let info = Info {
            worker_id: unit.saved().worker_id.clone(),
            lease_id: unit.lease.id.clone(),
            name: unit.name(),
            kept_ms: clock::now_ms(),
            audit: audit.map(Audit::from),
            refused: None,
        };
        let path = unit.dir.join(REQUEST_FILE);
        write_private(&path, &request.encode_to_vec())
            .map_err(WorkerError::home("write", &path))?;
        let kept = Self {
            id: id.to_owned(),
            dir: submitted.join(id),
            info,
        };
        write_info(&unit.dir, &kept.info)?;
        remove(&kept.dir);
        // One step: before it, the unit is handed in again and answered the same.
        fs::rename(&unit.dir, &kept.dir).map_err(WorkerError::home("move", &unit.dir))?;
        prune(submitted, &kept.info.worker_id, KEPT_MAX, KEPT_BYTES_MAX);
        Ok(kept)
    }

    /// All of a worker's, newest first. Removes nothing.
    #[must_use]
    pub fn all(submitted: &Path, worker_id: &str) -> Vec<Self> {
        let folders = fs::read_dir(submitted).into_iter().flatten().flatten();
        let mut all: Vec<Self> = folders
            .filter_map(|folder| Self::read(&folder.path()))
            .filter(|kept| kept.info.worker_id == worker_id)
            .collect();
        all.sort_by(|x, y| (y.info.kept_ms, &y.id).cmp(&(x.info.kept_ms, &x.id)));
        all
    }

    fn read(dir: &Path) -> Option<Self> {
        let info = serde_json::from_slice(&fs::read(dir.join(INFO_FILE)).ok()?).ok()?;
        Some(Self {
            id: dir.file_name()?.to_str()?.to_owned(),
            dir: dir.to_owned(),
            info,
        })
    }

    /// Notes something new about it. What cannot be written is said, and asked again later.
    pub fn save(&self) {
        if let Err(error) = write_info(&self.dir, &self.info) {
            eprintln!("{error}");
        }
    }

    /// The request as it was sent.
    #[must_use]
    pub fn request(&self) -> Option<v1::SubmitAdapterRequest> {
        let path = self.dir.join(REQUEST_FILE);
        if fs::metadata(&path).ok()?.len() > MESSAGE_BYTES_MAX as u64 {
            return None;
        }
        v1::SubmitAdapterRequest::decode(fs::read(path).ok()?.as_slice()).ok()
    }

    /// The adapter's folder.
    #[must_use]
    pub fn adapter(&self) -> PathBuf {
        self.dir.join(ADAPTER_FOLDER)
    }

    /// The training states' folder.
    #[must_use]
    pub fn states(&self) -> PathBuf {
        self.dir.join(STATES_FOLDER)
    }

    /// What the training states commit to; `None` when they are not here.
    #[must_use]
    pub fn commitment(&self) -> Option<Commitment> {
        record::commitment(&self.states())
    }

    /// It is judged: nobody will ask for its states any more.
    pub fn judged(&self) {
        remove(&self.states());
    }

    /// The verdict's receipt is here: nothing of it is needed any more.
    pub fn settled(&self) {
        remove(&self.dir);
    }
}

fn write_info(dir: &Path, info: &Info) -> Result<(), WorkerError> {
    let path = dir.join(INFO_FILE);
    let json = serde_json::to_vec_pretty(info).unwrap_or_default();
    write_private(&path, &json).map_err(WorkerError::home("write", &path))
}

/// Removes what is another identity's or broken, and the oldest beyond a count and a size. The
/// newest stays, however large.
fn prune(submitted: &Path, worker_id: &str, count_max: usize, bytes_max: u64) {
    let all = Kept::all(submitted, worker_id);
    let mut bytes = 0_u64;
    let mut stay = Vec::new();
    for (place, kept) in all.iter().enumerate() {
        bytes = bytes.saturating_add(folder_bytes(&kept.dir, DEPTH_MAX));
        if place == 0 || (place < count_max && bytes <= bytes_max) {
            stay.push(kept.dir.clone());
        } else {
            eprintln!(
                "{}: no longer kept for an audit or a restored coordinator: newer ones need the room",
                kept.info.name
            );
        }
    }
    for folder in fs::read_dir(submitted).into_iter().flatten().flatten() {
        if !stay.contains(&folder.path()) {
            remove(&folder.path());
        }
    }
}

/// Bytes of the files in a folder and in those below it.
fn folder_bytes(dir: &Path, depth: u32) -> u64 {
    let mut bytes = 0_u64;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let more = match depth.checked_sub(1) {
            Some(depth) if metadata.is_dir() => folder_bytes(&entry.path(), depth),
            _ => metadata.len(),
        };
        bytes = bytes.saturating_add(more);
    }
    bytes
}

#[cfg(test)]
#[path = "kept_tests.rs"]
mod tests;
