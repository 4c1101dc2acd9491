//! Scoring sets of preferences: how much more than the base a candidate prefers what was chosen.
//!
//! A preference's loss is DPO's ([`crate::train::dpo::preferred`]) against the same model without
//! adapters, so the base itself scores ln 2 on each. It counts as one token: what is compared between
//! candidates is the mean over preferences, whatever their lengths.

use std::sync::OnceLock;

use cairn_stack::adapter::Pair;
use cairn_stack::records::Record;

use super::{EvaluateError, EvaluateProgress, EvaluateReport, ExampleLoss, encode, score};
use crate::cancel::CancelFlag;
use crate::clock::Stopwatch;
use crate::data::{DataError, Encoder, Example};
use crate::model::LoadedModel;
use crate::train::dpo::{Rewards, preferred};

/// A set, encoded for one model.
#[derive(Debug)]
pub struct EncodedSet {
    /// One example a record; two where records are preferences, the chosen answer first.
    pub examples: Vec<Example>,
    /// Whether they are.
    pub is_of_preferences: bool,
    /// Summed losses of the examples by the model without adapters, once they were needed: a set is
    /// scored many times on one base.
    base: OnceLock<Vec<f64>>,
}

impl EncodedSet {
    /// Of these examples; two of them a record where those are preferences.
    #[must_use]
    pub fn new(examples: Vec<Example>, is_of_preferences: bool) -> Self {
        Self {
            examples,
            is_of_preferences,
            base: OnceLock::new(),
        }
    }

    /// How many records it has.
    #[must_use]
    pub fn records(&self) -> usize {
        self.examples.len() / if self.is_of_preferences { 2 } else { 1 }
    }

    /// What each record counts: its scored tokens; 1 for a preference, 0 where nothing of one of its
    /// answers is left to score.
    #[must_use]
    pub fn tokens(&self) -> Vec<u64> {
        if !self.is_of_preferences {
            let scored = self.examples.iter().map(Example::scored_tokens);
            return scored.map(|tokens| tokens as u64).collect();
        }
        let pairs = self.examples.chunks_exact(2);
        pairs
            .map(|pair| u64::from(pair.iter().all(|example| example.scored_tokens() > 0)))
            .collect()
    }

    /// Records that were cut at the sequence length.
    #[must_use]
    pub fn cut(&self) -> u64 {
        let each = if self.is_of_preferences { 2 } else { 1 };
        let records = self.examples.chunks(each);
        let cut = records.filter(|record| record.iter().any(|example| example.cut));
        cut.count() as u64
    }
}

/// Encodes a set for scoring; its first record says whether it is one of preferences.
///
/// # Errors
/// [`DataError`] with the record's number; also for a text among preferences, and the reverse.
pub fn encode_set(
    encoder: &Encoder,
    records: impl Iterator<Item = (u64, Record)>,
    sequence_length: usize,
) -> Result<EncodedSet, DataError> {
    let mut records = records.peekable();
    let is_of_preferences = records
        .peek()
        .is_some_and(|(_, record)| record.is_preference());
    let examples = if is_of_preferences {
        let mut examples = Vec::new();
        for (number, record) in records {
            let pair = encoder.encode_preference(&record, sequence_length);
            examples.extend(pair.map_err(|fault| DataError::Record { number, fault })?);
        }
        examples
    } else {
        encode(encoder, records, sequence_length)?
    };
    Ok(EncodedSet::new(examples, is_of_preferences))
}

/// Scores a set with the sum of some adapters' deltas on top of the model; preferences with this `beta`.
/// A set must be scored on one model only, the one that it was first scored on.
///
/// # Errors
/// [`EvaluateError`].
pub fn score_set(
    model: &LoadedModel,
    adapters: &[Pair],
    set: &EncodedSet,
    beta: f64,
    on_progress: &mut dyn FnMut(&EvaluateProgress),
    cancel: &CancelFlag,
) -> Result<EvaluateReport, EvaluateError> {
    let examples = &set.examples;
    if !set.is_of_preferences {
        return score(model, adapters, examples, on_progress, cancel);
    }
    let watch = Stopwatch::start();
    let mut losses = |adapters: &[Pair]| -> Result<Vec<f64>, EvaluateError> {
        let report = score(model, adapters, examples, on_progress, cancel)?;
        Ok(report
            .per_example
            .iter()
            .map(|example| example.nll)
            .collect())
    };
    let base = match set.base.get() {
        Some(base) => base,
        None => {
            let found = losses(&[])?;
            set.base.get_or_init(|| found)
        }
    };
    let own = if adapters.is_empty() {
        base.clone()
    } else {
        losses(adapters)?
    };
    let mut report = compared(beta, &own, base, &set.tokens())?;
    report.cut = set.cut();
    report.seconds = watch.seconds();
    Ok(report)
}

/// What the preferences come to by a candidate's and the base's losses of their answers.
fn compared(
    beta: f64,
    own: &[f64],
    base: &[f64],
    counts: &[u64],
) -> Result<EvaluateReport, EvaluateError> {
    let mut per_example = Vec::with_capacity(counts.len());
    let mut rewards = Rewards::default();
    let pairs = own.chunks_exact(2).zip(base.chunks_exact(2));
    for ((own, base), count) in pairs.zip(counts) {
        if *count == 0 {
            per_example.push(ExampleLoss::default());
            continue;
        }
        let found = preferred(beta, [own[0], own[1]], [base[0], base[1]]);
        if !found.loss.is_finite() {
            return Err(EvaluateError::NotFinite {
                example: per_example.len() + 1,
                value: found.loss,
            });
        }
        rewards += found.rewards();
        per_example.push(ExampleLoss {
            nll: found.loss,
            tokens: 1,
        });
    }
    let tokens: u64 = counts.iter().sum();
    if tokens == 0 {
        return Err(EvaluateError::NothingScored);
    }
    let loss: f64 = per_example.iter().map(|example| example.nll).sum();
    Ok(EvaluateReport {
        loss: loss / tokens as f64,
        tokens,
        cut: 0,
        seconds: 0.0,
        per_example,
        rewards: Some(rewards.over(tokens as usize)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_scores_ln_2_on_every_preference() {
        let base = [3.0, 4.0, 5.0, 6.0, 7.0, 0.0];
        let report = compared(0.1, &base, &base, &[1, 1, 0]).unwrap();
        assert_eq!((report.tokens, report.per_example.len()), (2, 3));
        for example in &report.per_example[..2] {
            assert_eq!((example.nll, example.tokens), (std::f64::consts::LN_2, 1));
        }
        assert_eq!(report.per_example[2], ExampleLoss::default());
        let rewards = report.rewards.unwrap();
        assert_eq!((rewards.accuracies, rewards.margins), (0.0, 0.0));

        let better = [2.0, 5.0, 5.5, 6.0, 7.0, 0.0];
        let report = compared(0.5, &better, &base, &[1, 1, 0]).unwrap();
        let rewards = report.rewards.unwrap();
        assert_eq!((rewards.accuracies, rewards.margins), (0.5, 0.375));
        assert!(report.loss < std::f64::consts::LN_2);
        assert!(compared(0.1, &base, &base, &[0, 0, 0]).is_err());
        assert!(compared(0.1, &[f64::NAN, 1.0], &[1.0, 1.0], &[1]).is_err());
    }

    #[test]
    fn a_preference_counts_once_while_both_answers_have_something_to_score() {
        let example = |scored: &[bool], cut| Example {
            tokens: vec![1; scored.len()],
            scored: scored.to_vec(),
            cut,
        };
        let (some, none) = ([false, true, true], [false, false]);
        let examples = vec![
            example(&some, false),
            example(&some, true),
            example(&some, true),
            example(&none, true),
        ];
        let mut set = EncodedSet::new(examples, false);
        assert_eq!((set.tokens(), set.records()), (vec![2, 2, 2, 0], 4));
        assert_eq!(set.cut(), 3);
        set.is_of_preferences = true;
        assert_eq!((set.tokens(), set.records()), (vec![1, 0], 2));
        assert_eq!(set.cut(), 2);
    }
}
