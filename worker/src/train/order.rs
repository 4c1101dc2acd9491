//! Which rows each optimiser step sees: a function of examples, recipe and epoch alone.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use cairn_stack::recipe::{Length, Recipe};

use crate::data::{Batch, Example, batches, pack, pair_batches};

/// Streams of the seed's generator beyond the one that makes the initial factors.
const ORDER_STREAM: u64 = 1;

/// The micro-batches of one epoch, in order. Where preferences are learnt, two examples are one of them,
/// and `batch_size` counts preferences.
#[must_use]
pub fn epoch(examples: &[Example], recipe: &Recipe, number: u64) -> Vec<Batch> {
    let preferences = recipe.objective.is_of_preferences();
    let count = examples.len() / if preferences { 2 } else { 1 };
    let mut order: Vec<usize> = (0..count).collect();
    let mut rng = ChaCha20Rng::seed_from_u64(recipe.seed);
    rng.set_stream(ORDER_STREAM + number);
    shuffle(&mut order, &mut rng);
    let (length, batch_size) = (recipe.sequence_length as usize, recipe.batch_size as usize);
    if preferences {
        return pair_batches(examples, &order, length, recipe.packing, batch_size);
    }
    batches(pack(examples, &order, length, recipe.packing), batch_size)
}

/// Walks through the optimiser steps of a recipe: epoch after epoch, `accumulation` micro-batches
/// a step, the last step of an epoch with what is left.
pub struct Steps<'a> {
    examples: &'a [Example],
    recipe: &'a Recipe,
    epoch_number: u64,
    batches: std::vec::IntoIter<Batch>,
    taken: u64,
    /// Optimiser steps in all.
    pub total: u64,
}

impl<'a> Steps<'a> {
    /// Starts before the first step. `examples` must not be empty, or there is no step to take.
    #[must_use]
    pub fn new(examples: &'a [Example], recipe: &'a Recipe) -> Self {
        let batches = epoch(examples, recipe, 0);
        let a_step = (recipe.accumulation as usize).max(1);
        // Packing makes epochs differ by a row or two; count each.
        let total = match recipe.length {
            Length::Steps(_) if batches.is_empty() => 0,
            Length::Steps(steps) => u64::from(steps),
            Length::Epochs(epochs) => (0..u64::from(epochs))
                .map(|number| {
                    let batches = match number {
                        0 => batches.len(),
                        _ if recipe.packing => epoch(examples, recipe, number).len(),
                        _ => batches.len(),
                    };
                    batches.div_ceil(a_step) as u64
                })
                .sum(),
        };
        Self {
            examples,
            recipe,
            epoch_number: 0,
            batches: batches.into_iter(),
            taken: 0,
            total,
        }
    }

    /// The number of steps taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken
    }
}

impl Iterator for Steps<'_> {
    type Item = Vec<Batch>;

    fn next(&mut self) -> Option<Vec<Batch>> {
        if self.taken == self.total {
            return None;
        }
        if self.batches.as_slice().is_empty() {
            self.epoch_number += 1;
            self.batches = epoch(self.examples, self.recipe, self.epoch_number).into_iter();
        }
        self.taken += 1;
        Some(
            self.batches
                .by_ref()
                .take((self.recipe.accumulation as usize).max(1))
                .collect(),
        )
    }
}

/// Fisher-Yates with 64-bit draws; the bias of the modulus is below 2^-32 for any real data set.
fn shuffle(order: &mut [usize], rng: &mut ChaCha20Rng) {
    for last in (1..order.len()).rev() {
        let other = (rng.next_u64() % (last as u64 + 1)) as usize;
        order.swap(last, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(lines: &str) -> Recipe {
        Recipe::parse_toml(&format!(
            "rank = 1\nalpha = 1\ntarget_modules = [\"q_proj\"]\nlearning_rate = 1.0\n\
             batch_size = 2\nsequence_length = 8\nseed = 5\n{lines}"
        ))
        .unwrap()
    }

    fn examples(count: usize) -> Vec<Example> {
        (0..count)
            .map(|n| Example {
                tokens: vec![n as u32; 3],
                scored: vec![false, true, true],
                cut: false,
            })
            .collect()
    }

    #[test]
    fn every_epoch_sees_every_example_once_in_another_order() {
        let (examples, recipe) = (
            examples(7),
            recipe("epochs = 2\npacking = false\naccumulation = 3"),
        );
        let steps: Vec<_> = Steps::new(&examples, &recipe).collect();
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 3, 1]);
        let seen = |steps: &[Vec<Batch>]| -> Vec<usize> {
            steps
                .iter()
                .flatten()
                .flat_map(|b| b.rows.iter().flat_map(|r| r.examples.clone()))
                .collect()
        };
        let (first, second) = (seen(&steps[..2]), seen(&steps[2..]));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..7).collect::<Vec<_>>());
        }
    }

    #[test]
    fn steps_start_over_as_often_as_needed() {
        let (examples, recipe) = (examples(3), recipe("steps = 5\npacking = false"));
        assert_eq!(Steps::new(&examples, &recipe).count(), 5);
        assert_eq!(Steps::new(&[], &recipe).count(), 0);
        let again: Vec<_> = Steps::new(&examples, &recipe).collect();
        assert_eq!(again, Steps::new(&examples, &recipe).collect::<Vec<_>>());
    }
}
