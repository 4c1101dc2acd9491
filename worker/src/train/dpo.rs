//! Preferences (DPO, arXiv 2305.18290): the loss of a pair of answers against the base, in training and
//! in scoring.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use cairn_stack::recipe::Recipe;

use super::frozen::Frozen;
use super::objective::{Measured, Micro};
use crate::data::{Batch, Example};
use crate::model::lora::Gradient;
use crate::model::loss::{losses_and_gradient, token_losses};
use crate::model::{Input, Llama};

/// What TRL calls rewards: `beta (log p - log r)` of an answer, `r` being the base. Summed over
/// preferences, or their mean.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rewards {
    /// Preferences whose chosen answer has the larger reward.
    pub accuracies: f64,
    /// Reward of the chosen answer over that of the rejected one.
    pub margins: f64,
}

impl Rewards {
    /// Divided by a number of preferences.
    #[must_use]
    pub fn over(self, count: usize) -> Self {
        let count = count.max(1) as f64;
        Self {
            accuracies: self.accuracies / count,
            margins: self.margins / count,
        }
    }
}

impl fmt::Display for Rewards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (accuracy, margin) = (self.accuracies, self.margins);
        write!(f, "accuracy {accuracy:.2}, margin {margin:.4}")
    }
}

impl AddAssign for Rewards {
    fn add_assign(&mut self, more: Self) {
        self.accuracies += more.accuracies;
        self.margins += more.margins;
    }
}

/// One preference, measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preferred {
    /// `-log sigmoid(margin)`, in nats.
    pub loss: f64,
    /// `beta ((log p_c - log r_c) - (log p_r - log r_r))`.
    pub margin: f64,
    /// Its slope by the chosen answer's negative log-likelihood; by the rejected one's, the negative.
    pub slope: f64,
}

/// Measures a preference from the summed negative log-likelihoods of the chosen and the rejected answer,
/// by the model and by the base.
#[must_use]
pub fn preferred(beta: f64, model: [f64; 2], base: [f64; 2]) -> Preferred {
    let margin = beta * ((base[0] - model[0]) - (base[1] - model[1]));
    // -log sigmoid(m) = log(1 + e^-m), without overflow on either side.
    let loss = (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
    let slope = beta / (1.0 + margin.exp());
    Preferred {
        loss,
        margin,
        slope,
    }
}

impl Preferred {
    /// As rewards.
    #[must_use]
    pub fn rewards(&self) -> Rewards {
        Rewards {
            accuracies: f64::from(u8::from(self.margin > 0.0)),
            margins: self.margin,
        }
    }
}

/// The loss of preferences. Preference `p` is examples `2 p` and `2 p + 1`.
pub struct Preferences {
    beta: f64,
    /// Summed negative log-likelihood of every example by the base: the model in training with its
    /// adapter off, undisturbed, so no second model is held.
    base: Frozen<f64>,
}

impl Preferences {
    /// For a run over these examples.
    #[must_use]
    pub fn new(examples: &[Example], recipe: &Recipe, beta: f64) -> Self {
        Self {
            beta,
            base: Frozen::new(examples, recipe),
        }
    }

    /// The summed loss of a micro-batch, and `scale` times its gradient by every pair.
    ///
    /// The gradient of an answer's log-likelihood is the cross-entropy's, token by token; how much an
    /// answer weighs is known when both have been read. So the rows of the cross-entropy's gradient
    /// are multiplied with their answer's weight between the way there and the way back.
    pub fn gradients(&mut self, micro: &Micro<'_>, scale: f64) -> (Measured, Vec<Gradient>) {
        let Micro { model, input, .. } = *micro;
        let examples = answers(&input.owners);
        self.base.learn(&examples, |batch| of_base(model, batch));
        let (beta, base) = (self.beta, &self.base);
        let of = |normed: &Tensor<2>| {
            let (losses, gradient) = losses_and_gradient(model, normed, &input.targets, 1.0);
            let (measured, weights) = weigh(beta, &input.owners, &losses, |n| base.of(n).copied());
            let weights = weights.iter().map(|weight| (scale * weight) as f32);
            let weights = TensorData::new(weights.collect::<Vec<f32>>(), [input.owners.len(), 1]);
            let weights: Tensor<2> = Tensor::from_data(weights, &model.device); // [S, 1]
            (measured, gradient * weights)
        };
        model.gradients_of(micro.keep, micro.adapter, input, micro.wanted, of)
    }
}

/// The examples that scored tokens belong to, each once.
fn answers(owners: &[usize]) -> Vec<usize> {
    let mut examples = owners.to_vec();
    examples.sort_unstable();
    examples.dedup();
    examples
}

/// Summed losses of a batch's examples by the model without adapters.
fn of_base(model: &Llama, batch: &Batch) -> Vec<(usize, f64)> {
    let input = Input::new(&model.config, batch, &model.device);
    if input.targets.is_empty() {
        return Vec::new();
    }
    let normed = model.normed(None, &input); // [S, D]
    let losses = token_losses(model, &normed, &input.targets);
    sums(&input.owners, &losses).into_iter().collect()
}

/// Summed losses by example.
fn sums(owners: &[usize], losses: &[f32]) -> BTreeMap<usize, f64> {
    let mut sums = BTreeMap::new();
    for (owner, loss) in owners.iter().zip(losses) {
        *sums.entry(*owner).or_insert(0.0) += f64::from(*loss);
    }
    sums
}

/// What the preferences of a batch come to, and what each scored token's own gradient is multiplied
/// with.
fn weigh(
    beta: f64,
    owners: &[usize],
    losses: &[f32],
    base: impl Fn(usize) -> Option<f64>,
) -> (Measured, Vec<f64>) {
    let own = sums(owners, losses);
    let mut weights = BTreeMap::new();
    let (mut loss, mut rewards) = (0.0, Rewards::default());
    for (chosen, first) in own.iter().filter(|(example, _)| *example % 2 == 0) {
        let rejected = chosen + 1;
        // Both answers are in one batch, each with something to score: see `data::pairs`.
        let (Some(second), Some(base_first), Some(base_second)) =
            (own.get(&rejected), base(*chosen), base(rejected))
        else {
            continue;
        };
        let found = preferred(beta, [*first, *second], [base_first, base_second]);
        loss += found.loss;
        rewards += found.rewards();
        weights.insert(*chosen, found.slope);
        weights.insert(rejected, -found.slope);
    }
    let weight = |owner: &usize| weights.get(owner).copied().unwrap_or(0.0);
    let measured = Measured {
        loss,
        rewards: Some(rewards),
    };
    (measured, owners.iter().map(weight).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_is_that_of_the_paper_and_its_slope_is_its_own() {
        let unmoved = preferred(0.1, [3.0, 5.0], [3.0, 5.0]);
        assert_eq!(unmoved.loss, std::f64::consts::LN_2);
        assert_eq!((unmoved.margin, unmoved.slope), (0.0, 0.05));
        assert_eq!(unmoved.rewards().accuracies, 0.0);
        let (beta, base) = (0.7, [4.0, 2.0]);
        for model in [[3.0, 5.0], [9.0, 1.0], [0.0, 900.0], [900.0, 0.0]] {
            let found = preferred(beta, model, base);
            let margin = beta * ((base[0] - model[0]) - (base[1] - model[1]));
            let sigmoid = 1.0 / (1.0 + (-margin).exp());
            if sigmoid > 0.0 {
                assert!((found.loss + sigmoid.ln()).abs() < 1e-9 * found.loss.max(1.0));
            }
            assert!(found.loss.is_finite() && found.slope.is_finite());
            let step = 1e-6;
            for side in 0..2 {
                let at = |by: f64| {
                    let mut moved = model;
                    moved[side] += by;
                    preferred(beta, moved, base).loss
                };
                let slope = (at(step) - at(-step)) / (2.0 * step);
                let expected = if side == 0 { found.slope } else { -found.slope };
                assert!(
                    (slope - expected).abs() < 1e-4,
                    "{model:?}: {slope} {expected}"
                );
            }
        }
    }

    #[test]
    fn tokens_weigh_what_their_answer_does() {
        let owners = [2, 2, 3, 0];
        let losses = [1.0, 2.0, 4.0, 8.0];
        let (measured, weights) = weigh(1.0, &owners, &losses, |_| Some(3.0));
        // Margin (3 - 3) - (3 - 4) = 1; example 0 has lost its partner.
        let slope = 1.0 / (1.0 + 1_f64.exp());
        assert_eq!(weights, [slope, slope, -slope, 0.0]);
        assert_eq!(measured.rewards.unwrap().margins, 1.0);
        assert!((measured.loss - (-1_f64).exp().ln_1p()).abs() < 1e-12);
    }
}
