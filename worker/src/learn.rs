//! Learning one weight an adapter: how much of each contribution a model should take, by gradient of
//! the loss. Blocking.
//!
//! Gradients are formed for the weights alone. They are few, so a pass over all examples gives
//! the exact slope of every one of them, and [`descent`] needs no more than a few tens of passes.
//! The same model, adapters and examples give the same weights on one kind of device.

pub mod descent;

use cairn_stack::adapter::Pair;

use crate::cancel::CancelFlag;
use crate::clock::Stopwatch;
use crate::data::{Batch, Example};
use crate::evaluate::by_length;
use crate::model::input::{real_tokens, scored_tokens};
use crate::model::lora::{ForeignPair, Wanted};
use crate::model::mixture::Mixture;
use crate::model::{Input, LoadedModel};
use descent::{Value, minimise};

/// Tokens of a batch, padding included. Half of what scoring takes: activations are kept until the
/// backward pass.
const BATCH_TOKENS_MAX: usize = 1024;
/// Largest weight that is tried, unless the start is larger. A contribution is taken or left: below
/// zero it would be subtracted, which fits the set and not the model, and beyond this the loss has
/// left the ground on which the adapters were trained.
pub const WEIGHT_MAX: f64 = 10.0;

/// Weights to learn.
pub struct LearnJob<'a> {
    /// The adapters, each with the weight to start from.
    pub adapters: &'a [(Vec<Pair>, f64)],
    /// What to learn on.
    pub examples: &'a [Example],
    /// Passes over the examples at most; at least one is made, for the loss at the start.
    pub passes: u32,
    /// Called after every batch.
    pub on_progress: &'a mut dyn FnMut(&LearnProgress),
    /// Looked at before every batch.
    pub cancel: &'a CancelFlag,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearnProgress {
    /// Batches done, over all passes.
    pub step: u64,
    /// Batches of all passes that are allowed.
    pub steps: u64,
    /// Least loss of a whole pass so far, in nats per scored token; `None` in the first pass.
    pub loss: Option<f64>,
    /// Tokens a second, padding left out.
    pub tokens_per_second: f64,
    /// Seconds that all allowed passes still take at this speed.
    pub eta_seconds: f64,
}

/// What was learnt.
#[derive(Debug, Clone, PartialEq)]
pub struct LearnReport {
    /// One weight an adapter, in their order: the best that were seen.
    pub weights: Vec<f64>,
    /// Loss with the weights at the start, in nats per scored token.
    pub loss_before: f64,
    /// Loss with the learnt weights; never above `loss_before`.
    pub loss_after: f64,
    /// Passes over the examples.
    pub passes: u32,
    /// Seconds it took.
    pub seconds: f64,
}

/// Why nothing was learnt.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// There is nothing to weigh.
    #[error("there is no adapter to weigh")]
    NoAdapters,
    /// There is nothing to learn on.
    #[error("there is no scored token")]
    NothingScored,
    /// An adapter does not fit the model.
    #[error(transparent)]
    Foreign(#[from] ForeignPair),
    /// A weight to start from is not a finite number.
    #[error("the weight {0} is not a finite number")]
    Weight(f64),
    /// The loss at the start is NaN or infinite.
    #[error("the loss with the weights to start from is {0}: an adapter or the model is broken")]
    NotFinite(f64),
    /// Stopped on request.
    #[error("stopped")]
    Cancelled,
}

/// Finds the weights, from 0 to [`WEIGHT_MAX`], that lower the loss of the examples most, within a
/// bounded number of passes.
///
/// # Errors
/// [`LearnError`].
pub fn learn(model: &LoadedModel, job: LearnJob<'_>) -> Result<LearnReport, LearnError> {
    let start: Vec<f64> = job.adapters.iter().map(|(_, weight)| *weight).collect();
    if start.is_empty() {
        return Err(LearnError::NoAdapters);
    }
    if let Some(weight) = start.iter().find(|weight| !weight.is_finite()) {
        return Err(LearnError::Weight(*weight));
    }
    let adapters: Vec<&[Pair]> = job.adapters.iter().map(|(pairs, _)| &pairs[..]).collect();
    let mut batches = by_length(job.examples, BATCH_TOKENS_MAX);
    batches.retain(|batch| scored_tokens(batch) > 0);
    let scored: usize = batches.iter().map(scored_tokens).sum();
    if scored == 0 {
        return Err(LearnError::NothingScored);
    }
    let passes = job.passes.max(1);
    let mut task = Task {
        model,
        mixture: Mixture::new(&model.llama.config, &adapters, &model.device)?,
        steps: u64::from(passes) * batches.len() as u64,
        batches,
        scored,
        watch: Stopwatch::start(),
        step: 0,
        tokens: 0,
        best: None,
        on_progress: job.on_progress,
        cancel: job.cancel,
    };
    let found = minimise(&start, WEIGHT_MAX, passes, |weights| task.pass(weights))?;
    Ok(LearnReport {
        weights: found.point,
        loss_before: found.first_loss,
        loss_after: found.loss,
        passes: found.passes,
        seconds: task.watch.seconds(),
    })
}

/// What every pass needs.
struct Task<'a> {
    model: &'a LoadedModel,
    mixture: Mixture,
    batches: Vec<Batch>,
    /// Scored tokens of all batches.
    scored: usize,
    watch: Stopwatch,
    step: u64,
    steps: u64,
    tokens: usize,
    best: Option<f64>,
    on_progress: &'a mut dyn FnMut(&LearnProgress),
    cancel: &'a CancelFlag,
}

impl Task<'_> {
    /// Mean loss of all examples with these weights, and its slope by each of them.
    fn pass(&mut self, weights: &[f64]) -> Result<Value, LearnError> {
        let mut value = Value {
            loss: 0.0,
            slopes: vec![0.0; weights.len()],
        };
        for number in 0..self.batches.len() {
            if self.cancel.is_cancelled() {
                return Err(LearnError::Cancelled);
            }
            let batch = &self.batches[number];
            self.tokens += real_tokens(batch);
            let (loss, slopes) = self.batch(batch, weights);
            value.loss += loss;
            for (sum, slope) in value.slopes.iter_mut().zip(slopes) {
                *sum += slope;
            }
            self.step += 1;
            self.report();
        }
        if self.best.is_none() && !value.loss.is_finite() {
            return Err(LearnError::NotFinite(value.loss));
        }
        self.best = Some(self.best.map_or(value.loss, |best| best.min(value.loss)));
        Ok(value)
    }

    /// One batch's part of the mean loss and of its slopes.
    fn batch(&self, batch: &Batch, weights: &[f64]) -> (f64, Vec<f64>) {
        let (llama, device) = (&self.model.llama, &self.model.device);
        let input = Input::new(&llama.config, batch, device);
        let part = 1.0 / self.scored as f64;
        let adapter = self.mixture.at(weights);
        let (loss, gradients) = llama.loss_and_gradients(&adapter, &input, Wanted::Gains, part);
        let slopes = self.mixture.slopes(&gradients);
        (loss * part, slopes)
    }

    fn report(&mut self) {
        let seconds = self.watch.seconds().max(1e-9);
        let left = self.steps.saturating_sub(self.step) as f64;
        (self.on_progress)(&LearnProgress {
            step: self.step,
            steps: self.steps,
            loss: self.best,
            tokens_per_second: self.tokens as f64 / seconds,
            eta_seconds: left * seconds / self.step as f64,
        });
    }
}
