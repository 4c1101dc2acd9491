//! Evaluation work: per-example losses of a base with weighted adapters over the sets asked for.

use std::path::PathBuf;
use std::sync::Arc;

use cairn_proto::limits::EVAL_RECORDS_MAX;
use cairn_proto::v1;
use cairn_stack::adapter::Pair;
use cairn_stack::quantize::Quantize;
use cairn_stack::records::Record;

use super::context::Context;
use super::fetch::{Materials, chunk_count};
use super::training::{chunk_records, range_records};
use super::unit::{Outcome, Reported, Unit};
use super::work::{Desk, Model};
use crate::evaluate::{
    EncodedSet, EvaluateError, EvaluateProgress, EvaluateReport, encode_set, read_adapters,
    score_set, sequence_length,
};
use crate::limits::{EVAL_RECORDS_KEPT, EVAL_SETS_KEPT, NLL_BROKEN};
use crate::progress::ProgressLine;

/// What a set is made of: chunks, and which records of each.
type Parts = Vec<(PathBuf, Option<(u32, u32)>)>;

/// Sets encoded for the model at hand, most recently used last.
#[derive(Default)]
pub struct EvalSets(Vec<(Parts, usize, Arc<EncodedSet>)>);

impl EvalSets {
    /// Forgets all: another model has another tokenizer.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// A set, encoded unless it is here.
    ///
    /// # Errors
    /// A sentence naming what cannot be read or encoded.
    pub fn get(
        &mut self,
        model: &Model,
        set: &v1::EvalSet,
        chunks: &[PathBuf],
        length: usize,
    ) -> Result<Arc<EncodedSet>, String> {
        let parts = parts(set, chunks);
        if let Some(at) = self
            .0
            .iter()
            .position(|(p, l, _)| *p == parts && *l == length)
        {
            let entry = self.0.remove(at);
            let encoded = entry.2.clone();
            self.0.push(entry);
            return Ok(encoded);
        }
        let records = records(&parts)?;
        let encoded = encode_set(&model.encoder, (1..).zip(records), length)
            .map_err(|error| format!("encode the set: {error}"))?;
        let encoded = Arc::new(encoded);
        self.0.push((parts, length, encoded.clone()));
        let count = |(_, _, set): &(_, _, Arc<EncodedSet>)| set.examples.len();
        let kept = |sets: &Self| sets.0.iter().map(count).sum::<usize>();
        while self.0.len() > 1 && (self.0.len() > EVAL_SETS_KEPT || kept(self) > EVAL_RECORDS_KEPT)
        {
            self.0.remove(0);
        }
        Ok(encoded)
    }
}

/// The parts of a set whose chunks lie at these paths.
fn parts(set: &v1::EvalSet, chunks: &[PathBuf]) -> Parts {
    if set.records.is_empty() {
        return chunks.iter().map(|path| (path.clone(), None)).collect();
    }
    let ranges = set.records.iter().map(|range| (range.first, range.count));
    chunks.iter().cloned().zip(ranges.map(Some)).collect()
}

/// The records of a set, in order.
fn records(parts: &Parts) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    for (path, range) in parts {
        match *range {
            None => records.extend(chunk_records(path, 0, EVAL_RECORDS_MAX)?),
            Some((first, count)) => {
                records.extend(range_records(path, first as usize, count as usize)?);
            }
        }
        if records.len() > EVAL_RECORDS_MAX {
            let count = records.len();
            return Err(format!(
                "{count} records are more than one evaluation holds"
            ));
        }
    }
    Ok(records)
}

/// Scores a candidate. Blocking.
pub fn evaluate(
    context: &Context,
    unit: &Unit,
    work: &v1::EvaluateWork,
    materials: &Materials,
    desk: &mut Desk,
) -> Outcome {
    let pairs = match read_adapters(&materials.adapters) {
        Ok(pairs) => pairs,
        Err(error) => return Outcome::Failed(format!("read the candidate's adapters: {error}")),
    };
    let (model, sets) = match desk.model(&materials.base, Quantize::None, context.device()) {
        Ok(found) => found,
        Err(error) => return Outcome::Failed(format!("load the base: {error}")),
    };
    let length = sequence_length(&model.loaded, Some(work.sequence_length as usize));
    let mut scored = Vec::with_capacity(work.sets.len());
    let mut chunks = materials.chunks.as_slice();
    let mut words = Vec::new();
    for set in &work.sets {
        let (own, rest) = chunks.split_at(chunk_count(set).min(chunks.len()));
        chunks = rest;
        let encoded = match sets.get(model, set, own, length) {
            Ok(encoded) => encoded,
            Err(detail) => return Outcome::Failed(format!("set {}: {detail}", set.dataset)),
        };
        match one_set(unit, model, &pairs, (&set.dataset, &encoded), work.dpo_beta) {
            Ok(scores) => {
                words.push(format!("{} {:.4}", set.dataset, mean(&scores)));
                scored.push(scores);
            }
            Err(outcome) => return outcome,
        }
    }
    let what = match work.adapters.len() {
        0 => "the base".to_owned(),
        1 => "1 adapter".to_owned(),
        n => format!("{n} adapters"),
    };
    eprintln!("{}: scored {what}: {}", unit.name(), words.join(", "));
    Outcome::Scored(scored)
}

fn mean(scores: &v1::SetScores) -> f64 {
    let nll: f64 = scores.nll.iter().copied().map(f64::from).sum();
    let tokens: u64 = scores.tokens.iter().copied().map(u64::from).sum();
    nll / (tokens as f64).max(1.0)
}

fn one_set(
    unit: &Unit,
    model: &Model,
    pairs: &[Pair],
    (dataset, set): (&str, &EncodedSet),
    beta: f64,
) -> Result<v1::SetScores, Outcome> {
    let mut line = ProgressLine::new("example");
    let mut on_progress = |progress: &EvaluateProgress| {
        unit.report(Reported {
            step: progress.done as u64,
            steps: progress.total as u64,
            loss: Some(progress.loss),
            eta_seconds: Some(progress.eta_seconds),
        });
        let (done, total) = (progress.done as u64, progress.total as u64);
        line.show(
            done,
            total,
            progress.loss,
            progress.tokens_per_second,
            progress.eta_seconds,
        );
    };
    let result = score_set(
        &model.loaded,
        pairs,
        set,
        beta,
        &mut on_progress,
        &unit.cancel,
    );
    line.finish();
    match result {
        Ok(report) => Ok(scores(dataset, &report)),
        Err(EvaluateError::Cancelled) => Err(Outcome::Stopped),
        Err(error @ EvaluateError::NotFinite { .. }) if !pairs.is_empty() => {
            // The candidate's fault, not this machine's: an answer, and the worst there is.
            eprintln!("{}: {error}", unit.name());
            Ok(broken_scores(dataset, set))
        }
        Err(error) => Err(Outcome::Failed(format!("score {dataset}: {error}"))),
    }
}

fn scores(dataset: &str, report: &EvaluateReport) -> v1::SetScores {
    v1::SetScores {
        dataset: dataset.to_owned(),
        nll: report
            .per_example
            .iter()
            .map(|example| example.nll as f32)
            .collect(),
        tokens: report
            .per_example
            .iter()
            .map(|example| u32::try_from(example.tokens).unwrap_or(u32::MAX))
            .collect(),
        cut: u32::try_from(report.cut).unwrap_or(u32::MAX),
    }
}

fn broken_scores(dataset: &str, set: &EncodedSet) -> v1::SetScores {
    let tokens = set.tokens();
    v1::SetScores {
        dataset: dataset.to_owned(),
        nll: tokens
            .iter()
            .map(|tokens| *tokens as f32 * NLL_BROKEN)
            .collect(),
        tokens: tokens
            .iter()
            .map(|tokens| u32::try_from(*tokens).unwrap_or(u32::MAX))
            .collect(),
        cut: u32::try_from(set.cut()).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;

    #[test]
    fn a_set_of_ranges_is_those_records_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chunk");
        let lines = ["a", "b", "c"].map(|text| format!("{{\"text\":\"{text}\"}}\n"));
        std::fs::write(&path, lines.concat()).unwrap();
        let range = |first, count| v1::RecordRange {
            chunk: None,
            first,
            count,
        };
        let texts = |set: &v1::EvalSet, chunks: &[PathBuf]| -> Result<Vec<String>, String> {
            let records = records(&parts(set, chunks))?;
            Ok(records.iter().map(Record::text_for_dedup).collect())
        };
        let sample = v1::EvalSet {
            records: vec![range(2, 1), range(0, 1)],
            ..Default::default()
        };
        let twice = [path.clone(), path.clone()];
        assert_eq!(texts(&sample, &twice).unwrap(), ["c", "a"]);
        let whole = v1::EvalSet::default();
        assert_eq!(
            texts(&whole, std::slice::from_ref(&path)).unwrap(),
            ["a", "b", "c"]
        );
        let beyond = v1::EvalSet {
            records: vec![range(2, 2)],
            ..Default::default()
        };
        assert!(
            texts(&beyond, &[path])
                .unwrap_err()
                .contains("no records 2 to 4")
        );
    }

    #[test]
    fn broken_candidates_get_finite_scores_of_the_right_shape() {
        let example = |scored: &[bool]| Example {
            tokens: vec![1; scored.len()],
            scored: scored.to_vec(),
            cut: true,
        };
        let examples = vec![example(&[false, true, true]), example(&[false, false])];
        let set = EncodedSet::new(examples, false);
        let scores = broken_scores("gate", &set);
        assert_eq!(scores.tokens, [2, 0]);
        assert_eq!(scores.nll, [200.0, 0.0]);
        assert_eq!(scores.cut, 2);
        assert_eq!(mean(&scores), f64::from(NLL_BROKEN));
    }
}
