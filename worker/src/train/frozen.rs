//! What frozen models say of the examples: found out when it is first needed, and then known.
//!
//! A model is always asked in the batches of the first epoch, whatever batch asks: they are a function
//! of examples and recipe, so a training that is resumed, or a segment of it that is replayed, hears
//! the same to the bit, and in the first epoch nothing is asked that the step at hand does not need.

use cairn_stack::recipe::Recipe;

use super::order::epoch;
use crate::data::{Batch, Example};

/// One answer an example.
pub struct Frozen<T> {
    batches: Vec<Batch>,
    /// The batch of each example that has one.
    batch_of: Vec<Option<usize>>,
    known: Vec<Option<T>>,
}

impl<T> Frozen<T> {
    /// Of no example yet.
    #[must_use]
    pub fn new(examples: &[Example], recipe: &Recipe) -> Self {
        let batches = epoch(examples, recipe, 0);
        let mut batch_of = vec![None; examples.len()];
        for (number, batch) in batches.iter().enumerate() {
            for example in batch.rows.iter().flat_map(|row| &row.examples) {
                if let Some(place) = batch_of.get_mut(*example) {
                    *place = Some(number);
                }
            }
        }
        Self {
            batches,
            batch_of,
            known: examples.iter().map(|_| None).collect(),
        }
    }

    /// Sees to it that everything is known of these examples. `ask` answers for every example of a
    /// batch that has a scored token.
    pub fn learn(&mut self, examples: &[usize], mut ask: impl FnMut(&Batch) -> Vec<(usize, T)>) {
        for example in examples {
            if self.of(*example).is_some() {
                continue;
            }
            let batch = self.batch_of.get(*example).copied().flatten();
            let Some(batch) = batch.and_then(|number| self.batches.get(number)) else {
                continue;
            };
            for (example, answer) in ask(batch) {
                if let Some(known) = self.known.get_mut(example) {
                    *known = Some(answer);
                }
            }
        }
    }

    /// What is known of an example.
    #[must_use]
    pub fn of(&self, example: usize) -> Option<&T> {
        self.known.get(example)?.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_asked_twice_and_always_in_the_same_batches() {
        let recipe = |seed: u32| {
            Recipe::parse_toml(&format!(
                "rank = 1\nalpha = 1\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1.0\n\
                 epochs = 2\nbatch_size = 3\nsequence_length = 8\nseed = {seed}"
            ))
            .unwrap()
        };
        let examples: Vec<Example> = (0..10)
            .map(|n| Example {
                tokens: vec![n; 4],
                scored: vec![false, true, true, true],
                cut: false,
            })
            .collect();
        let mut asked = Vec::new();
        let answers = |batch: &Batch| -> Vec<(usize, usize)> {
            let examples = batch.rows.iter().flat_map(|row| row.examples.clone());
            examples.map(|example| (example, 10 * example)).collect()
        };
        let mut frozen = Frozen::new(&examples, &recipe(5));
        for batch in epoch(&examples, &recipe(5), 1) {
            let wanted: Vec<usize> = batch
                .rows
                .iter()
                .flat_map(|row| row.examples.clone())
                .collect();
            frozen.learn(&wanted, |batch| {
                asked.push(batch.clone());
                answers(batch)
            });
            assert!(wanted.iter().all(|n| frozen.of(*n) == Some(&(10 * n))));
        }
        let mut first = epoch(&examples, &recipe(5), 0);
        let key = |batch: &Batch| batch.rows[0].examples[0];
        asked.sort_by_key(key);
        first.sort_by_key(key);
        assert_eq!(asked, first);
        assert_eq!(frozen.of(99), None);
    }
}
