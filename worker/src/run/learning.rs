//! Learning work: one weight for each adapter of a candidate, by gradient of the set's loss.

use cairn_proto::v1;
use cairn_proto::v1::submit_findings_request::Findings;
use cairn_stack::adapter::Pair;
use cairn_stack::quantize::Quantize;

use super::context::Context;
use super::fetch::{Materials, chunk_count};
use super::unit::{Outcome, Reported, Unit};
use super::work::Desk;
use crate::data::Example;
use crate::evaluate::{EvaluateError, read_adapters, sequence_length};
use crate::learn::{LearnError, LearnJob, LearnProgress, learn as learn_weights};
use crate::limits::LEARN_PASSES_MAX;
use crate::progress::ProgressLine;

/// Learns weights on all sets of the work together. Blocking.
pub fn learn(
    context: &Context,
    unit: &Unit,
    work: &v1::LearnWork,
    materials: &Materials,
    desk: &mut Desk,
) -> Outcome {
    let evaluate = work.evaluate.clone().unwrap_or_default();
    let adapters = match adapters(materials) {
        Ok(adapters) => adapters,
        Err(error) => return Outcome::Failed(format!("read the candidate's adapters: {error}")),
    };
    let (model, sets) = match desk.model(&materials.base, Quantize::None, context.device()) {
        Ok(found) => found,
        Err(error) => return Outcome::Failed(format!("load the base: {error}")),
    };
    let length = sequence_length(&model.loaded, Some(evaluate.sequence_length as usize));
    let mut examples: Vec<Example> = Vec::new();
    let mut chunks = materials.chunks.as_slice();
    for set in &evaluate.sets {
        let (own, rest) = chunks.split_at(chunk_count(set).min(chunks.len()));
        chunks = rest;
        match sets.get(model, set, own, length) {
            Ok(found) if found.is_of_preferences => {
                let name = &set.dataset;
                let text = format!("set {name}: weights are learnt on texts, not on preferences");
                return Outcome::Failed(text);
            }
            Ok(found) => examples.extend(found.examples.iter().cloned()),
            Err(detail) => return Outcome::Failed(format!("set {}: {detail}", set.dataset)),
        }
    }
    let mut line = ProgressLine::new("batch");
    let result = learn_weights(
        &model.loaded,
        LearnJob {
            adapters: &adapters,
            examples: &examples,
            passes: work.steps.min(LEARN_PASSES_MAX),
            on_progress: &mut |progress| show(unit, &mut line, progress),
            cancel: &unit.cancel,
        },
    );
    line.finish();
    let report = match result {
        Ok(report) => report,
        Err(LearnError::Cancelled) => return Outcome::Stopped,
        Err(error) => return Outcome::Failed(format!("learn weights: {error}")),
    };
    eprintln!(
        "{}: learnt {} weights in {} passes, loss {:.4} -> {:.4} ({:.1} s)",
        unit.name(),
        report.weights.len(),
        report.passes,
        report.loss_before,
        report.loss_after,
        report.seconds
    );
    Outcome::Found(Findings::Learn(v1::LearnFindings {
        weights: report.weights,
        loss_before: report.loss_before,
        loss_after: report.loss_after,
    }))
}

/// Each adapter's pairs, and the weight to start from.
fn adapters(materials: &Materials) -> Result<Vec<(Vec<Pair>, f64)>, EvaluateError> {
    let read = |(dir, weight): &(std::path::PathBuf, f64)| {
        Ok((read_adapters(&[(dir.clone(), 1.0)])?, *weight))
    };
    materials.adapters.iter().map(read).collect()
}

fn show(unit: &Unit, line: &mut ProgressLine, progress: &LearnProgress) {
    unit.report(Reported {
        step: progress.step,
        steps: progress.steps,
        loss: progress.loss,
        eta_seconds: Some(progress.eta_seconds),
    });
    // Before the first pass is over there is no loss to show.
    if let Some(loss) = progress.loss {
        let (speed, left) = (progress.tokens_per_second, progress.eta_seconds);
        line.show(progress.step, progress.steps, loss, speed, left);
    }
}
