//! Training work: records of the shard, the recipe, one adapter.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cairn_proto::limits::DATASET_CHUNK_BYTES_MAX;
use cairn_proto::v1;
use cairn_stack::adapter::Pair;
use cairn_stack::recipe::Recipe;
use cairn_stack::records::Record;

use super::context::Context;
use super::fetch::Materials;
use super::unit::{ADAPTER_FOLDER, Numbers, Outcome, Reported, STATES_FOLDER, Unit};
use super::work::{Desk, Model};
use crate::data::{Example, encode_to_learn};
use crate::evaluate::read_adapters;
use crate::home::is_plain_id;
use crate::limits::CHECKPOINTS_KEPT;
use crate::model::LoadedModel;
use crate::progress::ProgressLine;
use crate::train::states::States;
use crate::train::{
    Checkpoints, Progress, TrainError, TrainJob, TrainReport, train as train_adapter,
};

/// A shard ready to be trained on.
pub struct Shard<'d> {
    /// How.
    pub recipe: Recipe,
    /// On what.
    pub examples: Vec<Example>,
    /// From which base.
    pub model: &'d Model,
    /// The factors the round carries, where it does.
    pub carry: Option<Vec<Pair>>,
    /// The model to learn from, where the recipe distils.
    pub teacher: Option<&'d LoadedModel>,
}

/// Reads, loads and encodes what a training takes.
///
/// # Errors
/// How the unit ended, when something of it cannot be used.
pub fn shard<'d>(
    context: &Context,
    unit: &Unit,
    work: &v1::TrainWork,
    materials: &Materials,
    desk: &'d mut Desk,
) -> Result<Shard<'d>, Outcome> {
    let recipe = Recipe::parse_toml(&work.recipe)
        .map_err(|error| Outcome::Failed(format!("the recipe cannot be read: {error}")))?;
    let records = shard_records(work, &materials.chunks).map_err(Outcome::Failed)?;
    let carry = carried(work, materials).map_err(Outcome::Failed)?;
    let (model, teacher) = desk
        .model_and_teacher(
            &materials.base,
            materials.teacher.as_deref(),
            recipe.quantize,
            context.device(),
        )
        .map_err(Outcome::Failed)?;
    let length = recipe.sequence_length as usize;
    let positions = model.loaded.llama.config.max_positions;
    if length > positions {
        return Err(Outcome::Failed(format!(
            "the recipe's sequence_length {length} is beyond the model's {positions} positions"
        )));
    }
    let encoded = encode_to_learn(&model.encoder, (1..).zip(records), &recipe);
    let (examples, report) =
        encoded.map_err(|error| Outcome::Failed(format!("encode the shard: {error}")))?;
    eprintln!(
        "{}: {} records, {} tokens, {} scored; {} cut at {length}",
        unit.name(),
        report.records,
        report.tokens,
        report.scored_tokens,
        report.cut
    );
    Ok(Shard {
        recipe,
        examples,
        model,
        carry,
        teacher,
    })
}

/// Shows a training's progress here, and notes it for the next renewal.
pub struct Watched<'a> {
    unit: &'a Unit,
    line: ProgressLine,
    said: bool,
}

impl<'a> Watched<'a> {
    /// Before the first step.
    #[must_use]
    pub fn new(unit: &'a Unit) -> Self {
        Self {
            unit,
            line: ProgressLine::new("step"),
            said: false,
        }
    }

    /// After a step.
    pub fn show(&mut self, progress: &Progress) {
        if let (Some(step), false) = (progress.resumed_at, self.said) {
            let name = self.unit.name();
            eprintln!("{name}: going on from the local checkpoint at step {step}");
            self.said = true;
        }
        self.unit.report(Reported {
            step: progress.step,
            steps: progress.steps,
            loss: Some(progress.loss),
            eta_seconds: Some(progress.eta_seconds),
        });
        let (speed, left) = (progress.tokens_per_second, progress.eta_seconds);
        self.line.note_rewards(progress.rewards);
        self.line
            .show(progress.step, progress.steps, progress.loss, speed, left);
    }

    /// After the last step.
    pub fn finish(&self) {
        self.line.finish();
    }
}

/// Trains a shard's adapter into the unit's folder. Blocking.
pub fn train(
    context: &Context,
    unit: &Unit,
    work: &v1::TrainWork,
    materials: &Materials,
    desk: &mut Desk,
) -> Outcome {
    let shard = match shard(context, unit, work, materials, desk) {
        Ok(shard) => shard,
        Err(outcome) => return outcome,
    };
    make_room(context, work);
    let mut watched = Watched::new(unit);
    let result = train_adapter(
        &shard.model.loaded,
        TrainJob {
            examples: &shard.examples,
            recipe: &shard.recipe,
            initial: None,
            carry: shard.carry.as_deref(),
            teacher: shard.teacher,
            frozen_a: false,
            out_dir: &unit.dir.join(ADAPTER_FOLDER),
            base_model: None,
            revision: None,
            checkpoints: checkpoint_folder(context, work).map(|dir| Checkpoints {
                every_seconds: context.checkpoint_seconds,
                ..Checkpoints::in_dir(dir)
            }),
            states: (work.segments > 0).then(|| States {
                dir: states_folder(context, unit, work),
                segments: work.segments,
            }),
            on_progress: &mut |progress| watched.show(progress),
            cancel: &unit.cancel,
        },
    );
    watched.finish();
    outcome(context, unit, result)
}

fn outcome(context: &Context, unit: &Unit, result: Result<TrainReport, TrainError>) -> Outcome {
    let report = match result {
        Ok(report) => report,
        Err(TrainError::Cancelled { done, total }) => {
            eprintln!("{}: put down after step {done} of {total}", unit.name());
            return Outcome::Stopped;
        }
        Err(
            error @ (TrainError::Write(_)
            | TrainError::Hash(_)
            | TrainError::Checkpoint(_)
            | TrainError::State(_)
            | TrainError::Memory { .. }),
        ) => {
            return Outcome::Trouble(format!("train: {error}"));
        }
        Err(
            error @ (TrainError::NoExamples
            | TrainError::NoTeacher(_)
            | TrainError::NotFinite(_)
            | TrainError::Initial(_)
            | TrainError::Carry(_)),
        ) => {
            return Outcome::Failed(format!("train: {error}"));
        }
    };
    eprintln!(
        "{}: trained {} steps, {} tokens in {:.1} s ({:.0} tokens/s), loss {:.4} -> {:.4}",
        unit.name(),
        report.steps,
        report.tokens,
        report.seconds,
        report.tokens_per_second,
        report.first_loss,
        report.last_loss
    );
    if let Some(rewards) = report.last_rewards {
        eprintln!("{}: rewards of the last step: {rewards}", unit.name());
    }
    let numbers = Numbers {
        steps: u32::try_from(report.steps).unwrap_or(u32::MAX),
        tokens: report.tokens,
        scored_tokens: report.scored_tokens,
        seconds: report.seconds,
        first_loss: report.first_loss,
        last_loss: report.last_loss,
        device: context.device().to_string(),
    };
    unit.saved().trained = Some(numbers.clone());
    match unit.save() {
        Ok(()) => Outcome::Trained(numbers),
        Err(error) => Outcome::Trouble(error.to_string()),
    }
}

/// The factors the round carries, where it does.
fn carried(work: &v1::TrainWork, materials: &Materials) -> Result<Option<Vec<Pair>>, String> {
    let Some(carry) = &work.carry else {
        return Ok(None);
    };
    // A weight would be a second scale, and the difference has room for one.
    if carry.weight.to_bits() != 1.0_f64.to_bits() {
        return Err(format!(
            "the round's carried factors have the weight {}, not 1",
            carry.weight
        ));
    }
    read_adapters(&materials.adapters)
        .map(Some)
        .map_err(|error| format!("read the round's carried factors: {error}"))
}

/// The shard's records, in order.
fn shard_records(work: &v1::TrainWork, chunks: &[PathBuf]) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    for (range, path) in work.records.iter().zip(chunks) {
        let (first, count) = (range.first as usize, range.count as usize);
        records.extend(range_records(path, first, count)?);
    }
    if records.is_empty() {
        Err("the shard has no records".to_owned())
    } else {
        Ok(records)
    }
}

/// As [`chunk_records`], and all of them must be there.
///
/// # Errors
/// A sentence naming the records that are not, or the line that is no record.
pub fn range_records(path: &Path, first: usize, count: usize) -> Result<Vec<Record>, String> {
    let found = chunk_records(path, first, count)?;
    if found.len() == count {
        return Ok(found);
    }
    let (path, end) = (path.display(), first.saturating_add(count));
    Err(format!("chunk {path} has no records {first} to {end}"))
}

/// Records `[first, first + count)` of a chunk, one canonical JSON record a line.
///
/// # Errors
/// A sentence naming the line that is no record.
pub fn chunk_records(path: &Path, first: usize, count: usize) -> Result<Vec<Record>, String> {
    let bytes = fs::metadata(path)
        .map_err(|error| format!("read a chunk: {error}"))?
        .len();
    if bytes > DATASET_CHUNK_BYTES_MAX {
        return Err(format!("a chunk of {bytes} bytes is larger than any"));
    }
    let text = fs::read_to_string(path).map_err(|error| format!("read a chunk: {error}"))?;
    text.lines()
        .enumerate()
        .skip(first)
        .take(count)
        .map(|(number, line)| {
            Record::from_json_line(line)
                .map_err(|error| format!("record {number} of a chunk: {error}"))
        })
        .collect()
}

/// The local checkpoint's folder: by round and shard, so that the same shard claimed again goes on
/// where it was.
fn checkpoint_folder(context: &Context, work: &v1::TrainWork) -> Option<PathBuf> {
    let name = format!("{}-{}", work.round_id, work.shard);
    is_plain_id(&work.round_id).then(|| context.checkpoints.join(name))
}

/// Where a training's states lie until it is handed in: beside its local checkpoint, so that they
/// are there when it is gone on with under another lease.
#[must_use]
pub fn states_folder(context: &Context, unit: &Unit, work: &v1::TrainWork) -> PathBuf {
    let folder = checkpoint_folder(context, work);
    folder
        .unwrap_or_else(|| unit.dir.clone())
        .join(STATES_FOLDER)
}

/// Removes the oldest local checkpoints of other work.
fn make_room(context: &Context, work: &v1::TrainWork) {
    let wanted = checkpoint_folder(context, work);
    let mut folders: Vec<(SystemTime, PathBuf)> = fs::read_dir(&context.checkpoints)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|folder| Some((folder.metadata().ok()?.modified().ok()?, folder.path())))
        .filter(|(_, path)| Some(path) != wanted.as_ref())
        .collect();
    folders.sort();
    let surplus = folders.len().saturating_sub(CHECKPOINTS_KEPT - 1);
    for (_, path) in folders.into_iter().take(surplus) {
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_chunks_become_records() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chunk");
        fs::write(
            &path,
            "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"text\":\"c\"}\n",
        )
        .unwrap();
        let range = |first, count| v1::RecordRange {
            chunk: None,
            first,
            count,
        };
        let work = v1::TrainWork {
            records: vec![range(1, 2), range(0, 1)],
            ..Default::default()
        };
        let records = shard_records(&work, &[path.clone(), path.clone()]).unwrap();
        let texts: Vec<String> = records.iter().map(Record::text_for_dedup).collect();
        assert_eq!(texts, ["b", "c", "a"]);

        let beyond = v1::TrainWork {
            records: vec![range(2, 2)],
            ..Default::default()
        };
        assert!(
            shard_records(&beyond, std::slice::from_ref(&path))
                .unwrap_err()
                .contains("no records 2 to 4")
        );
        assert!(shard_records(&v1::TrainWork::default(), &[]).is_err());
        fs::write(&path, "{\"text\":\"a\"}\nnonsense\n").unwrap();
        assert!(chunk_records(&path, 0, 2).unwrap_err().contains("record 1"));
    }
}
