//! Brings what a unit of work needs onto this machine.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cairn_proto::client::ClientError;
use cairn_proto::convert::{self, BlobName, ConvertError};
use cairn_proto::v1;
use cairn_proto::v1::lease::Work;
use cairn_stack::adapter::{CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::digest::Digest;

use super::context::{Ctx, Patient};
use super::renew;
use super::unit::Unit;
use crate::cache;
use crate::clock::Stopwatch;
use crate::error::WorkerError;

/// Where the parts of a unit lie.
pub struct Materials {
    /// The base checkpoint's folder.
    pub base: PathBuf,
    /// The chunks, in the order of the work: one for each range of records.
    pub chunks: Vec<PathBuf>,
    /// Adapter folders with their weights: what is to be scored, or the factors a training starts
    /// from.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Opened training states, for a replay.
    pub opened: Option<Opened>,
    /// The teacher's folder, for a distillation.
    pub teacher: Option<PathBuf>,
}

/// Files of a segment that was opened.
pub struct Opened {
    /// Factors and moments at its start; `None` before the first step.
    pub start: Option<(PathBuf, PathBuf)>,
    /// Factors that were claimed for its end.
    pub end: PathBuf,
}

/// Why a unit is not complete.
pub enum Stop {
    /// Its lease is gone.
    Lost,
    /// This program is stopping.
    Stopping,
    /// Something failed.
    Error(WorkerError),
}

impl<E: Into<WorkerError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// What a unit needs, by name.
#[derive(Default)]
struct Needs<'a> {
    commit: &'a str,
    files: &'a [v1::File],
    chunks: Vec<Option<&'a v1::BlobRef>>,
    adapters: &'a [v1::WeightedAdapter],
    start: Option<(&'a v1::BlobRef, &'a v1::BlobRef)>,
    end: Option<&'a v1::BlobRef>,
    teacher: Option<&'a v1::Teacher>,
}

impl<'a> Needs<'a> {
    fn of(work: &'a Work) -> Result<Self, ConvertError> {
        let missing = |field| ConvertError::Missing { field };
        match work {
            Work::Train(work) => Ok(Self::of_training(work)),
            Work::Evaluate(work) => Ok(Self::of_evaluation(work)),
            Work::Guide(work) => {
                let train = work.train.as_ref().ok_or(missing("train"))?;
                Ok(Self::of_training(train))
            }
            Work::Replay(work) => {
                let train = work.train.as_ref().ok_or(missing("train"))?;
                let start = match (work.first_step, &work.start_state, &work.start_moments) {
                    (0, _, _) => None,
                    (_, Some(factors), Some(moments)) => Some((factors, moments)),
                    (_, None, _) => return Err(missing("start_state")),
                    (_, _, None) => return Err(missing("start_moments")),
                };
                Ok(Self {
                    start,
                    end: Some(work.end_factors.as_ref().ok_or(missing("end_factors"))?),
                    ..Self::of_training(train)
                })
            }
            Work::Learn(work) => {
                let evaluate = work.evaluate.as_ref().ok_or(missing("evaluate"))?;
                Ok(Self::of_evaluation(evaluate))
            }
        }
    }

    fn of_training(work: &'a v1::TrainWork) -> Self {
        Self {
            commit: &work.base_commit,
            files: &work.base_files,
            chunks: work.records.iter().map(chunk_of).collect(),
            adapters: work.carry.as_slice(),
            teacher: work.teacher.as_ref(),
            ..Self::default()
        }
    }

    fn of_evaluation(work: &'a v1::EvaluateWork) -> Self {
        Self {
            commit: &work.base_commit,
            files: &work.base_files,
            chunks: work.sets.iter().flat_map(set_chunks).collect(),
            adapters: &work.adapters,
            ..Self::default()
        }
    }
}

fn chunk_of(range: &v1::RecordRange) -> Option<&v1::BlobRef> {
    range.chunk.as_ref()?.blob.as_ref()
}

/// The chunks of a set: of each of its ranges where it has some, else its own.
fn set_chunks(set: &v1::EvalSet) -> Vec<Option<&v1::BlobRef>> {
    if set.records.is_empty() {
        set.chunks.iter().map(|chunk| chunk.blob.as_ref()).collect()
    } else {
        set.records.iter().map(chunk_of).collect()
    }
}

/// How many of [`Materials::chunks`] are a set's.
#[must_use]
pub fn chunk_count(set: &v1::EvalSet) -> usize {
    if set.records.is_empty() {
        set.chunks.len()
    } else {
        set.records.len()
    }
}

/// Fetches everything a unit needs and is not here.
pub async fn fetch(context: &Ctx, unit: &Unit) -> Result<Materials, Stop> {
    let needs = Needs::of(&unit.work)?;
    let name = |blob: Option<&v1::BlobRef>| convert::blob("blob", blob);
    let mut blobs = Vec::new();
    let of_teacher = needs.teacher.map_or(&[][..], |teacher| &teacher.files);
    for file in needs.files.iter().chain(of_teacher) {
        blobs.push(name(file.blob.as_ref())?);
    }
    let mut chunks = Vec::with_capacity(needs.chunks.len());
    for chunk in needs.chunks {
        chunks.push(name(chunk)?);
    }
    let mut weights = Vec::with_capacity(needs.adapters.len());
    for adapter in needs.adapters {
        weights.push(name(adapter.weights.as_ref())?);
    }
    let start = match needs.start {
        Some((factors, moments)) => Some((name(Some(factors))?, name(Some(moments))?)),
        None => None,
    };
    let end = match needs.end {
        Some(end) => Some(name(Some(end))?),
        None => None,
    };
    blobs.extend(chunks.iter().chain(&weights).chain(&end));
    blobs.extend(
        start
            .iter()
            .flat_map(|(factors, moments)| [factors, moments]),
    );

    let keep: HashSet<Digest> = blobs.iter().map(|blob| blob.digest).collect();
    context.cache.evict(&keep);
    fetch_all(context, unit, &blobs).await?;

    let path = |blob: &BlobName| context.cache.path(*blob);
    Ok(Materials {
        base: context.cache.link_folder(needs.commit, needs.files)?,
        teacher: needs
            .teacher
            .map(|teacher| context.cache.link_folder(&teacher.commit, &teacher.files))
            .transpose()?,
        chunks: chunks.iter().map(path).collect(),
        adapters: link_adapters(context, &unit.dir, needs.adapters, &weights)?,
        opened: end.map(|end| Opened {
            start: start.map(|(factors, moments)| (path(&factors), path(&moments))),
            end: path(&end),
        }),
    })
}

/// Adapter folders in a unit's folder, linked from the cache.
fn link_adapters(
    context: &Ctx,
    dir: &Path,
    adapters: &[v1::WeightedAdapter],
    weights: &[BlobName],
) -> Result<Vec<(PathBuf, f64)>, WorkerError> {
    let mut folders = Vec::with_capacity(adapters.len());
    for (number, (adapter, blob)) in adapters.iter().zip(weights).enumerate() {
        let folder = dir.join("adapters").join(number.to_string());
        let file = folder.join(WEIGHTS_FILE);
        cache::link(&context.cache.path(*blob), &file).map_err(WorkerError::home("link", &file))?;
        let config = folder.join(CONFIG_FILE);
        std::fs::write(&config, &adapter.config).map_err(WorkerError::home("write", &config))?;
        folders.push((folder, adapter.weight));
    }
    Ok(folders)
}

async fn fetch_all(context: &Ctx, unit: &Unit, blobs: &[BlobName]) -> Result<(), Stop> {
    let watch = Stopwatch::start();
    let (mut downloaded, mut bytes) = (0, 0);
    for blob in blobs {
        let fetched = context
            .patiently(&context.state.soft, || async {
                context.cache.fetch(&context.client, *blob, &|_| ()).await
            })
            .await;
        match fetched {
            Ok(Patient::Answer((_, false))) => (),
            Ok(Patient::Answer((_, true))) => {
                downloaded += 1;
                bytes += blob.size_bytes;
            }
            Ok(Patient::Stopped) => return Err(Stop::Stopping),
            Err(error) if renew::is_lost(&error) && unit.lost.is_cancelled() => {
                return Err(Stop::Lost);
            }
            Err(error) => return Err(ClientError::into(error)),
        }
    }
    if downloaded > 0 {
        eprintln!(
            "fetched {downloaded} of {} files, {} in {:.1} s; the rest was here",
            blobs.len(),
            indicatif::HumanBytes(bytes),
            watch.seconds()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(name: &str) -> v1::BlobRef {
        v1::BlobRef {
            digest: name.to_owned(),
            size_bytes: 1,
        }
    }

    fn range(name: &str, first: u32) -> v1::RecordRange {
        let chunk = v1::Chunk {
            blob: Some(blob(name)),
            records: 9,
        };
        v1::RecordRange {
            chunk: Some(chunk),
            first,
            count: 2,
        }
    }

    fn chunks<'a>(needs: &Needs<'a>) -> Vec<&'a str> {
        let names = needs.chunks.iter().flatten();
        names.map(|chunk| chunk.digest.as_str()).collect()
    }

    #[test]
    fn a_set_is_its_ranges_where_it_has_some() {
        let whole = v1::EvalSet {
            chunks: range("a", 0)
                .chunk
                .into_iter()
                .chain(range("b", 0).chunk)
                .collect(),
            ..Default::default()
        };
        let sample = v1::EvalSet {
            records: vec![range("c", 4), range("c", 7)],
            ..whole.clone()
        };
        assert_eq!((chunk_count(&whole), chunk_count(&sample)), (2, 2));
        let work = Work::Evaluate(v1::EvaluateWork {
            sets: vec![sample, whole],
            ..Default::default()
        });
        assert_eq!(chunks(&Needs::of(&work).unwrap()), ["c", "c", "a", "b"]);
    }

    #[test]
    fn a_replay_needs_its_start_unless_it_is_the_first_segment() {
        let train = v1::TrainWork {
            records: vec![range("a", 0)],
            ..Default::default()
        };
        let mut work = v1::ReplayWork {
            train: Some(train),
            last_step: 3,
            end_factors: Some(blob("end")),
            ..Default::default()
        };
        let first = Work::Replay(work.clone());
        let needs = Needs::of(&first).unwrap();
        assert!(needs.start.is_none() && needs.end.unwrap().digest == "end");
        assert_eq!(chunks(&needs), ["a"]);
        work.first_step = 1;
        work.start_state = Some(blob("factors"));
        assert!(Needs::of(&Work::Replay(work.clone())).is_err());
        work.start_moments = Some(blob("moments"));
        assert!(
            Needs::of(&Work::Replay(work.clone()))
                .unwrap()
                .start
                .is_some()
        );
        work.end_factors = None;
        assert!(Needs::of(&Work::Replay(work)).is_err());
        assert!(Needs::of(&Work::Guide(v1::GuideWork::default())).is_err());
    }
}
