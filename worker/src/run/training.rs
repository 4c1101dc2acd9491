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
use super::pick::Materials;
use super::unit::{ADAPTER_FOLDER, Numbers, Outcome, Reported, Unit};
use super::work::Desk;
use crate::data::encode_numbered;
use crate::evaluate::read_adapters;
use crate::home::is_plain_id;
use crate::limits::CHECKPOINTS_KEPT;
use crate::progress::ProgressLine;
use crate::train::{
    Checkpoints, Progress, TrainError, TrainJob, TrainReport, train as train_adapter,
};

/// Trains a shard's adapter into the unit's folder. Blocking.
pub fn train(
    context: &Context,
    unit: &Unit,
    work: &v1::TrainWork,
    materials: &Materials,
    desk: &mut Desk,
) -> Outcome {
    let recipe = match Recipe::parse_toml(&work.recipe) {
        Ok(recipe) => recipe,
        Err(error) => return Outcome::Failed(format!("the recipe cannot be read: {error}")),
    };
    let records = match shard_records(work, &materials.chunks) {
        Ok(records) => records,
        Err(detail) => return Outcome::Failed(detail),
    };
    let carry = match carried(work, materials) {
        Ok(carry) => carry,
        Err(detail) => return Outcome::Failed(detail),
    };
    let model = match desk.model(&materials.base, context.device) {
        Ok((model, _)) => model,
        Err(error) => return Outcome::Failed(format!("load the base: {error}")),
    };
    let length = recipe.sequence_length as usize;
    let positions = model.loaded.llama.config.max_positions;
    if length > positions {
        return Outcome::Failed(format!(
            "the recipe's sequence_length {length} is beyond the model's {positions} positions"
        ));
    }
    let encoded = encode_numbered(&model.encoder, (1..).zip(records), length);
    let (examples, report) = match encoded {
        Ok(encoded) => encoded,
        Err(error) => return Outcome::Failed(format!("encode the shard: {error}")),
    };
    eprintln!(
        "{}: {} records, {} tokens, {} scored; {} cut at {length}",
        unit.name(),
        report.records,
        report.tokens,
        report.scored_tokens,
        report.cut
    );
    let checkpoints = checkpoint_folder(context, work);
    let mut line = ProgressLine::new("step");
    let mut said = false;
    let mut on_progress = |progress: &Progress| {
        if let (Some(step), false) = (progress.resumed_at, said) {
            eprintln!(
                "{}: going on from the local checkpoint at step {step}",
                unit.name()
            );
            said = true;
        }
        unit.report(Reported {
            step: progress.step,
            steps: progress.steps,
            loss: Some(progress.loss),
            eta_seconds: Some(progress.eta_seconds),
        });
        let (speed, left) = (progress.tokens_per_second, progress.eta_seconds);
        line.show(progress.step, progress.steps, progress.loss, speed, left);
    };
    let result = train_adapter(
        &model.loaded,
        TrainJob {
            examples: &examples,
            recipe: &recipe,
            initial: None,
            carry: carry.as_deref(),
            out_dir: &unit.dir.join(ADAPTER_FOLDER),
            base_model: None,
            revision: None,
            checkpoints: checkpoints.map(|dir| Checkpoints {
                every_seconds: context.checkpoint_seconds,
                ..Checkpoints::in_dir(dir)
            }),
            states: None,
            on_progress: &mut on_progress,
            cancel: &unit.cancel,
        },
    );
    line.finish();
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
            | TrainError::State(_)),
        ) => {
            return Outcome::Trouble(format!("keep the adapter: {error}"));
        }
        Err(
            error @ (TrainError::NoExamples
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
    let numbers = Numbers {
        steps: u32::try_from(report.steps).unwrap_or(u32::MAX),
        tokens: report.tokens,
        scored_tokens: report.scored_tokens,
        seconds: report.seconds,
        first_loss: report.first_loss,
        last_loss: report.last_loss,
        device: context.device.to_string(),
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
        let found = chunk_records(path, first, count)?;
        if found.len() != count {
            return Err(format!(
                "chunk {} has no records {first} to {}",
                path.display(),
                first + count
            ));
        }
        records.extend(found);
    }
    if records.is_empty() {
        Err("the shard has no records".to_owned())
    } else {
        Ok(records)
    }
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
/// where it was. Old ones are removed.
fn checkpoint_folder(context: &Context, work: &v1::TrainWork) -> Option<PathBuf> {
    if !is_plain_id(&work.round_id) {
        return None;
    }
    let wanted = context
        .checkpoints
        .join(format!("{}-{}", work.round_id, work.shard));
    let mut folders: Vec<(SystemTime, PathBuf)> = fs::read_dir(&context.checkpoints)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|folder| Some((folder.metadata().ok()?.modified().ok()?, folder.path())))
        .filter(|(_, path)| *path != wanted)
        .collect();
    folders.sort();
    let surplus = folders.len().saturating_sub(CHECKPOINTS_KEPT - 1);
    for (_, path) in folders.into_iter().take(surplus) {
        let _ = fs::remove_dir_all(path);
    }
    Some(wanted)
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
