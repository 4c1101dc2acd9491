//! One unit of work from claim to hand-in, and what of it survives a crash.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use cairn_proto::identity::write_private;
use cairn_proto::limits::MESSAGE_BYTES_MAX;
use cairn_proto::v1;
use cairn_proto::v1::lease::Work;
use cairn_proto::v1::submit_findings_request::Findings;

use crate::cancel::CancelFlag;
use crate::error::WorkerError;
use crate::home::is_plain_id;

const LEASE_FILE: &str = "lease.bin";
const STATE_FILE: &str = "state.json";
/// Folder of the trained adapter in a unit's folder.
pub const ADAPTER_FOLDER: &str = "adapter";
/// Folder of its training states, once it is handed in.
pub const STATES_FOLDER: &str = "states";

/// How far a unit is, as told with each renewal.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reported {
    /// Steps or examples done.
    pub step: u64,
    /// Of how many.
    pub steps: u64,
    /// Latest loss, nats per scored token.
    pub loss: Option<f64>,
    /// Seconds left; `None` before the first step.
    pub eta_seconds: Option<f64>,
}

/// The persisted part of training work.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    /// Whose work it is.
    pub worker_id: String,
    /// The request id of its submission, the same however often it is sent.
    pub request_id: String,
    /// Set when the adapter is trained.
    pub trained: Option<Numbers>,
}

/// What is said of a training with its submission; see `cairn.v1.TrainNumbers`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Numbers {
    pub steps: u32,
    pub tokens: u64,
    pub scored_tokens: u64,
    pub seconds: f64,
    pub first_loss: f64,
    pub last_loss: f64,
    pub device: String,
}

impl From<Numbers> for v1::TrainNumbers {
    fn from(n: Numbers) -> Self {
        Self {
            steps: n.steps,
            tokens: n.tokens,
            scored_tokens: n.scored_tokens,
            seconds: n.seconds,
            first_loss: n.first_loss,
            last_loss: n.last_loss,
            device: n.device,
        }
    }
}

/// One unit of work.
pub struct Unit {
    /// The right to do it.
    pub lease: v1::Lease,
    /// What it is.
    pub work: Work,
    /// Its folder, removed when it is over.
    pub dir: PathBuf,
    /// What of it survives.
    pub saved: Mutex<Saved>,
    /// Asks the training or evaluation to stop.
    pub cancel: CancelFlag,
    /// Cancelled when the lease is gone.
    pub lost: CancellationToken,
    /// Cancelled when it is over: ends the renewal.
    pub over: CancellationToken,
    reported: Mutex<Reported>,
    /// Held while the unit exists: one lease at a time.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// How the work on a unit ended.
pub enum Outcome {
    /// The adapter lies in the unit's folder.
    Trained(Numbers),
    /// All sets are scored.
    Scored(Vec<v1::SetScores>),
    /// A guide, a replay or learnt weights.
    Found(Findings),
    /// Put down because we are stopping.
    Stopped,
    /// The lease is gone.
    Lost,
    /// The work itself failed here; counts against the shard.
    Failed(String),
    /// Something around it failed; says nothing about the shard.
    Trouble(String),
}

impl Unit {
    /// Takes a claimed lease and makes its folder.
    ///
    /// # Errors
    /// When the lease has no work or no plain id, or the folder cannot be made.
    pub fn claimed(
        work_dir: &Path,
        lease: v1::Lease,
        worker_id: &str,
    ) -> Result<Self, WorkerError> {
        use cairn_proto::convert::ConvertError;
        if !is_plain_id(&lease.id) {
            let text = lease.id.chars().take(80).collect();
            return Err(ConvertError::Word {
                kind: "lease id",
                text,
            }
            .into());
        }
        let dir = work_dir.join(&lease.id);
        let saved = Saved {
            worker_id: worker_id.to_owned(),
            request_id: uuid::Uuid::new_v4().to_string(),
            trained: None,
        };
        let unit = Self::new(lease, dir, saved)?;
        // The same lease may be handed out again after a crash: its request id must not change.
        if let Some(saved) = read_saved(&unit.dir).filter(|saved| saved.worker_id == worker_id) {
            *unit.saved() = saved;
            return Ok(unit);
        }
        fs::create_dir_all(&unit.dir).map_err(WorkerError::home("create", &unit.dir))?;
        if matches!(unit.work, Work::Train(_)) {
            let path = unit.dir.join(LEASE_FILE);
            write_private(&path, &unit.lease.encode_to_vec())
                .map_err(WorkerError::home("write", &path))?;
            unit.save()?;
        }
        Ok(unit)
    }

    fn new(lease: v1::Lease, dir: PathBuf, saved: Saved) -> Result<Self, WorkerError> {
        use cairn_proto::convert::ConvertError;
        let work = lease
            .work
            .clone()
            .ok_or(ConvertError::Missing { field: "work" })?;
        Ok(Self {
            lease,
            work,
            dir,
            saved: Mutex::new(saved),
            cancel: CancelFlag::new(),
            lost: CancellationToken::new(),
            over: CancellationToken::new(),
            reported: Mutex::default(),
            permit: None,
        })
    }

    /// Unfinished training work of an earlier run. Other folders are removed.
    #[must_use]
    pub fn unfinished(work_dir: &Path, worker_id: &str) -> Vec<Self> {
        let units = Self::kept(work_dir, worker_id);
        for folder in fs::read_dir(work_dir).into_iter().flatten().flatten() {
            let dir = folder.path();
            if !units.iter().any(|unit| unit.dir == dir) {
                remove(&dir);
            }
        }
        units
    }

    /// The same, removing nothing.
    #[must_use]
    pub fn kept(work_dir: &Path, worker_id: &str) -> Vec<Self> {
        let folders = fs::read_dir(work_dir).into_iter().flatten().flatten();
        folders
            .filter_map(|folder| read_unit(&folder.path()))
            .filter(|unit| unit.saved().worker_id == worker_id)
            .collect()
    }

    /// The persisted part, locked.
    pub fn saved(&self) -> std::sync::MutexGuard<'_, Saved> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the persisted part.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<(), WorkerError> {
        let path = self.dir.join(STATE_FILE);
        let json = serde_json::to_vec_pretty(&*self.saved()).unwrap_or_default();
        write_private(&path, &json).map_err(WorkerError::home("write", &path))
    }

    /// Notes how far it is.
    pub fn report(&self, reported: Reported) {
        *self.reported.lock().unwrap_or_else(PoisonError::into_inner) = reported;
    }

    /// How far it is.
    pub fn reported(&self) -> Reported {
        *self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it and forgets what was kept.
    pub fn forget(&self) {
        self.over.cancel();
        remove(&self.dir);
    }

    /// For lines about it.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.work {
            Work::Train(work) => format!("shard {} of round {}", work.shard, work.round_id),
            Work::Evaluate(work) => {
                format!(
                    "evaluation {} of round {}",
                    work.evaluation_id, work.round_id
                )
            }
            Work::Guide(work) => {
                let (shard, round) = of_training(work.train.as_ref());
                format!("guide for shard {shard} of round {round}")
            }
            Work::Replay(work) => format!(
                "replay of steps {} to {} of submission {}",
                work.first_step, work.last_step, work.submission_id
            ),
            Work::Learn(work) => {
                let evaluate = work.evaluate.as_ref();
                let round = evaluate.map(|work| work.round_id.as_str());
                format!("weights of round {}", round.unwrap_or_default())
            }
        }
    }
}

fn of_training(work: Option<&v1::TrainWork>) -> (u32, &str) {
    work.map_or((0, ""), |work| (work.shard, &work.round_id))
}

fn read_saved(dir: &Path) -> Option<Saved> {
    serde_json::from_slice(&fs::read(dir.join(STATE_FILE)).ok()?).ok()
}

fn read_unit(dir: &Path) -> Option<Unit> {
    let path = dir.join(LEASE_FILE);
    if fs::metadata(&path).ok()?.len() > MESSAGE_BYTES_MAX as u64 {
        return None;
    }
    let lease = v1::Lease::decode(fs::read(path).ok()?.as_slice()).ok()?;
    if dir.file_name()?.to_str()? != lease.id {
        return None;
    }
    Unit::new(lease, dir.to_owned(), read_saved(dir)?).ok()
}

/// Removes a folder, if it is there. That it cannot be removed is said, and no error.
pub fn remove(dir: &Path) {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            eprintln!("cannot remove {}: {error}", dir.display());
        }
        _ => (),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(id: &str) -> v1::Lease {
        let work = v1::TrainWork {
            round_id: "r".into(),
            shard: 3,
            ..Default::default()
        };
        v1::Lease {
            id: id.into(),
            work: Some(Work::Train(work)),
            ..Default::default()
        }
    }

    #[test]
    fn training_survives_with_its_request_id() {
        let folder = tempfile::tempdir().unwrap();
        let unit = Unit::claimed(folder.path(), lease("l1"), "w").unwrap();
        let request_id = unit.saved().request_id.clone();
        let again = Unit::claimed(folder.path(), lease("l1"), "w").unwrap();
        assert_eq!(again.saved().request_id, request_id);
        drop(unit);

        let units = Unit::unfinished(folder.path(), "w");
        assert_eq!(units.len(), 1);
        assert_eq!(units[0].saved().request_id, request_id);
        assert_eq!(units[0].name(), "shard 3 of round r");
        units[0].forget();
        assert!(Unit::unfinished(folder.path(), "w").is_empty());
    }

    #[test]
    fn foreign_and_broken_work_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        Unit::claimed(folder.path(), lease("l1"), "w").unwrap();
        Unit::claimed(folder.path(), lease("l2"), "w").unwrap();
        fs::write(folder.path().join("l2").join(LEASE_FILE), [0xff; 9]).unwrap();
        assert!(Unit::unfinished(folder.path(), "other").is_empty());
        assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
        assert!(Unit::claimed(folder.path(), lease("../x"), "w").is_err());
    }
}
