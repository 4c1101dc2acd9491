//! Scoring: per-example losses of a model with weighted adapters. Blocking, no gradients.
//!
//! A [`LoadedModel`] is read once; evaluators score many candidates on one base with
//! [`score_set`]. [`preferences`] is what a set of preferences comes to.

pub mod preferences;

use std::path::PathBuf;

use cairn_stack::adapter::{AdapterError, AdapterFile, Pair};
use cairn_stack::records::Record;

use crate::cancel::CancelFlag;
use crate::clock::Stopwatch;
use crate::data::{Batch, DataError, Encoder, Example, batches, pack};
use crate::model::lora::ForeignPair;
use crate::model::loss::token_losses;
use crate::model::{Adapter, Input, LoadedModel};
use crate::train::dpo::Rewards;
pub use preferences::{EncodedSet, encode_set, score_set};

/// Longest sequence where the caller names none, in tokens. Attention scores grow with its square.
pub const SEQUENCE_LENGTH_DEFAULT: usize = 1024;
/// Tokens of a batch, padding included: enough to keep matrix products busy, few enough that
/// activations of a large model stay in the hundreds of megabytes.
pub(crate) const BATCH_TOKENS_MAX: usize = 2048;

/// Losses of one example.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct ExampleLoss {
    /// Summed negative log-likelihood of its scored tokens, in nats.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: u64,
}

/// What an evaluation came to.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluateReport {
    /// Mean negative log-likelihood per scored token over all examples, in nats.
    pub loss: f64,
    /// Scored tokens.
    pub tokens: u64,
    /// Examples that were cut at the sequence length.
    pub cut: u64,
    /// Seconds of scoring.
    pub seconds: f64,
    /// One entry an example, in the order of the examples.
    pub per_example: Vec<ExampleLoss>,
    /// Mean rewards, where preferences were scored: the examples are preferences then, and their
    /// losses those of [`preferences`], each counting as one token.
    pub rewards: Option<Rewards>,
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluateProgress {
    /// Examples scored.
    pub done: usize,
    /// Examples in all.
    pub total: usize,
    /// Mean negative log-likelihood so far, in nats per scored token.
    pub loss: f64,
    /// Tokens a second, padding left out.
    pub tokens_per_second: f64,
    /// Seconds left at this speed.
    pub eta_seconds: f64,
}

/// Why an evaluation gave no result.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// There is nothing to score.
    #[error("there is no scored token")]
    NothingScored,
    /// A record could not be encoded.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An adapter could not be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// An adapter does not fit the model.
    #[error(transparent)]
    Foreign(#[from] ForeignPair),
    /// A weight is not a finite number.
    #[error("the weight {0} is not a finite number")]
    Weight(f64),
    /// A loss is NaN or infinite.
    #[error("the loss of example {example} became {value}: the adapter or the model is broken")]
    NotFinite {
        /// The example, from 1.
        example: usize,
        /// Its loss.
        value: f64,
    },
    /// Stopped on request.
    #[error("stopped")]
    Cancelled,
}

/// The longest sequence to score: what was asked for, else the default, never beyond the model.
#[must_use]
pub fn sequence_length(model: &LoadedModel, asked: Option<usize>) -> usize {
    asked
        .unwrap_or(SEQUENCE_LENGTH_DEFAULT)
        .min(model.llama.config.max_positions)
        .max(2)
}

/// Encodes records for scoring: one example a record, so that losses keep the records' order and
/// number even where nothing of a record is scored.
///
/// # Errors
/// [`DataError`] with the record's number.
pub fn encode(
    encoder: &Encoder,
    records: impl Iterator<Item = (u64, Record)>,
    sequence_length: usize,
) -> Result<Vec<Example>, DataError> {
    records
        .map(|(number, record)| {
            encoder
                .encode(&record, sequence_length)
                .map_err(|fault| DataError::Record { number, fault })
        })
        .collect()
}

/// Reads adapters from folders, each scale multiplied with its weight: the sum of their deltas.
///
/// # Errors
/// When a folder is no adapter, or a weight is not finite.
pub fn read_adapters(adapters: &[(PathBuf, f64)]) -> Result<Vec<Pair>, EvaluateError> {
    let mut pairs = Vec::new();
    for (dir, weight) in adapters {
        if !weight.is_finite() {
            return Err(EvaluateError::Weight(*weight));
        }
        pairs.extend(
            AdapterFile::open(dir)?
                .pairs()?
                .into_iter()
                .map(|pair| Pair {
                    scale: pair.scale * weight,
                    ..pair
                }),
        );
    }
    Ok(pairs)
}

/// Scores examples with the sum of some adapters' deltas on top of the model.
///
/// # Errors
/// [`EvaluateError`].
pub fn score(
    model: &LoadedModel,
    adapters: &[Pair],
    examples: &[Example],
    on_progress: &mut dyn FnMut(&EvaluateProgress),
    cancel: &CancelFlag,
) -> Result<EvaluateReport, EvaluateError> {
    let config = &model.llama.config;
    let adapter = if adapters.is_empty() {
        None
    } else {
        Some(Adapter::new(config, adapters, &model.device)?)
    };
    let watch = Stopwatch::start();
    let mut per_example = vec![ExampleLoss::default(); examples.len()];
    let (mut done, mut seen, mut all) = (0, 0, ExampleLoss::default());
    for batch in by_length(examples, BATCH_TOKENS_MAX) {
        if cancel.is_cancelled() {
            return Err(EvaluateError::Cancelled);
        }
        let input = Input::new(config, &batch, &model.device);
        if !input.targets.is_empty() {
            let normed = model.llama.normed(adapter.as_ref(), &input); // [S, D]
            let losses = token_losses(&model.llama, &normed, &input.targets);
            for (owner, loss) in input.owners.iter().zip(losses) {
                per_example[*owner].nll += f64::from(loss);
                per_example[*owner].tokens += 1;
            }
        }
        for example in batch.rows.iter().flat_map(|row| &row.examples) {
            let ExampleLoss { nll, tokens } = per_example[*example];
            if !nll.is_finite() {
                return Err(EvaluateError::NotFinite {
                    example: example + 1,
                    value: nll,
                });
            }
            all = ExampleLoss {
                nll: all.nll + nll,
                tokens: all.tokens + tokens,
            };
            done += 1;
        }
        seen += input.real_tokens;
        let seconds = watch.seconds().max(1e-9);
        on_progress(&EvaluateProgress {
            done,
            total: examples.len(),
            loss: all.nll / (all.tokens as f64).max(1.0),
            tokens_per_second: seen as f64 / seconds,
            eta_seconds: (examples.len() - done) as f64 * seconds / (done as f64).max(1.0),
        });
    }
    // Summed again in the order of the examples, so that batching leaves no trace in the result.
    let nll: f64 = per_example.iter().map(|example| example.nll).sum();
    let tokens: u64 = per_example.iter().map(|example| example.tokens).sum();
    if tokens == 0 {
        return Err(EvaluateError::NothingScored);
    }
    Ok(EvaluateReport {
        loss: nll / tokens as f64,
        tokens,
        cut: examples.iter().filter(|example| example.cut).count() as u64,
        seconds: watch.seconds(),
        per_example,
        rewards: None,
    })
}

/// Batches of examples of about one length and at most `tokens_max` tokens, where not one is longer;
/// long ones first, so that little is padding and the largest buffers are asked for at once.
pub(crate) fn by_length(examples: &[Example], tokens_max: usize) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..examples.len())
        .filter(|n| !examples[*n].tokens.is_empty())
        .collect();
    order.sort_by_key(|number| std::cmp::Reverse(examples[*number].tokens.len()));
    let mut out = Vec::new();
    while let Some(first) = order.first() {
        let longest = examples[*first].tokens.len();
        let rows = (tokens_max / longest).clamp(1, order.len());
        let chunk: Vec<usize> = order.drain(..rows).collect();
        out.extend(batches(pack(examples, &chunk, longest, false), rows));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_in_one_batch_of_bounded_size() {
        let lengths = [5, 900, 30, 0, 30, 2100, 1, 700];
        let examples: Vec<Example> = lengths
            .iter()
            .map(|n| Example {
                tokens: vec![1; *n],
                scored: vec![false; *n],
                cut: false,
            })
            .collect();
        let batches = by_length(&examples, BATCH_TOKENS_MAX);
        let mut seen: Vec<usize> = batches
            .iter()
            .flat_map(|b| b.rows.iter().flat_map(|row| row.examples.clone()))
            .collect();
        assert_eq!(seen[0], 5);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 4, 5, 6, 7]);
        for batch in batches {
            assert!(batch.rows.len() == 1 || batch.rows.len() * batch.length <= BATCH_TOKENS_MAX);
        }
    }
}
