//! One optimiser step after another, in memory.

use burn::tensor::Tensor;

use cairn_stack::recipe::Recipe;

use super::adamw::{AdamW, Moments, clip_factor, global_norm, parameters};
use super::dpo::Rewards;
use super::noise::{Noise, Pass};
use super::objective::{Measured, Micro, Objective};
use crate::data::Batch;
use crate::model::input::scored_tokens;
use crate::model::lora::{Factors, Gradient, Wanted};
use crate::model::{Adapter, Input, Llama};
use crate::preflight::Passes;

/// An adapter in training on a frozen model.
pub struct Trainer<'m> {
    model: &'m Llama,
    objective: Objective<'m>,
    optimiser: AdamW,
    clip_norm: f64,
    noise: Noise,
    /// Learning rate of B over that of A.
    rate_ratio: f64,
    /// Only B is trained (FFA-LoRA, arXiv 2403.12313).
    pub frozen_a: bool,
    /// How the batches of the next step are passed.
    pub passes: Passes,
    /// The factors as they are now.
    pub adapter: Adapter,
    /// Moments of every factor, in the order of [`parameters`].
    pub moments: Vec<Moments>,
    /// Optimiser steps done.
    pub steps: u64,
}

/// What one optimiser step came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Mean loss before the update, in nats: per scored token, or per preference.
    pub loss: f64,
    /// Mean rewards of the preferences before the update, where preferences are learnt.
    pub rewards: Option<Rewards>,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens that are not padding.
    pub tokens: u64,
    /// Tokens that counted in the loss.
    pub scored_tokens: u64,
}

/// A loss or gradient that is NaN or infinite; training on would only spread it.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "{what} became {value} at step {step}: the learning rate is too high, or the model or data are broken"
)]
pub struct NotFinite {
    /// "the loss" or "the gradient".
    pub what: &'static str,
    /// Its value.
    pub value: f64,
    /// Optimiser step, from 1.
    pub step: u64,
}

impl<'m> Trainer<'m> {
    /// A trainer before its first step, of the loss of the scored tokens.
    #[must_use]
    pub fn new(model: &'m Llama, adapter: Adapter, recipe: &Recipe) -> Self {
        let moments = parameters(&adapter).iter().map(Moments::zeros).collect();
        let optimiser = AdamW {
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            epsilon: recipe.epsilon,
            weight_decay: recipe.weight_decay,
        };
        Self {
            model,
            objective: Objective::Tokens,
            optimiser,
            clip_norm: recipe.clip_norm,
            noise: Noise::of(recipe),
            rate_ratio: recipe.loraplus_lr_ratio,
            frozen_a: false,
            passes: Passes::whole(usize::MAX),
            adapter,
            moments,
            steps: 0,
        }
    }

    /// The same trainer with another objective.
    #[must_use]
    pub fn minimising(mut self, objective: Objective<'m>) -> Self {
        self.objective = objective;
        self
    }

    /// One optimiser step over some micro-batches. The loss is the mean over the scored tokens, or the
    /// preferences, of all of them together, as transformers' Trainer has it, so accumulation changes
    /// nothing but memory. Neither do parts of a micro-batch, but for the order in which gradients are
    /// summed. Without a scored token nothing is updated.
    ///
    /// # Errors
    /// [`NotFinite`] when loss or gradient is NaN or infinite; the factors are as before.
    pub fn step(&mut self, micro_batches: &[Batch], rate: f64) -> Result<Step, NotFinite> {
        let (noise, hidden) = (self.noise, self.model.config.hidden_size);
        self.step_with(micro_batches, rate, &mut |pass, adapter, input| {
            noise.disturb(pass, adapter, input, hidden);
        })
    }

    /// The same with other disturbances than the recipe's.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn step_with(
        &mut self,
        micro_batches: &[Batch],
        rate: f64,
        disturb: &mut dyn FnMut(Pass, &mut Adapter, &mut Input),
    ) -> Result<Step, NotFinite> {
        let units = |batch: &Batch| self.objective.units(batch);
        let total: usize = micro_batches.iter().map(units).sum();
        let scored: usize = micro_batches.iter().map(scored_tokens).sum();
        let mut step = Step {
            loss: 0.0,
            rewards: None,
            gradient_norm: 0.0,
            tokens: 0,
            scored_tokens: scored as u64,
        };
        let mut gradients: Option<Vec<Tensor<2>>> = None;
        let (rows, objective) = (self.passes.rows, &self.objective);
        let parts: Vec<_> = micro_batches
            .iter()
            .enumerate()
            .flat_map(|(number, batch)| {
                let parts = objective.parts(batch, rows).into_iter();
                parts.map(move |(first, part)| (number, first * part.length, part))
            })
            .collect();
        for (micro_batch, first_token, batch) in parts {
            let mut input = Input::new(&self.model.config, &batch, &self.model.device);
            step.tokens += input.real_tokens as u64;
            if input.targets.is_empty() {
                continue;
            }
            let mut adapter = self.adapter.clone();
            let pass = Pass {
                step: self.steps,
                micro_batch,
                first_token,
            };
            disturb(pass, &mut adapter, &mut input);
            let (measured, more) = self.gradients(&adapter, &batch, &input, 1.0 / total as f64);
            step.loss += measured.loss / total as f64;
            if let Some(rewards) = measured.rewards {
                *step.rewards.get_or_insert_default() += rewards.over(total);
            }
            self.check("the loss", step.loss)?;
            gradients = Some(match gradients {
                None => more,
                Some(sum) => sum.into_iter().zip(more).map(|(a, b)| a + b).collect(),
            });
        }
        if let Some(gradients) = gradients {
            step.gradient_norm = global_norm(&gradients);
            self.check("the gradient", step.gradient_norm)?;
            self.update(
                gradients,
                clip_factor(step.gradient_norm, self.clip_norm),
                rate,
            );
        }
        self.steps += 1;
        Ok(step)
    }

    /// Summed loss of one micro-batch, and the gradient of `scale` times it by every factor.
    fn gradients(
        &mut self,
        adapter: &Adapter,
        batch: &Batch,
        input: &Input,
        scale: f64,
    ) -> (Measured, Vec<Tensor<2>>) {
        let micro = Micro {
            model: self.model,
            adapter,
            batch,
            input,
            keep: self.passes.keep,
            wanted: if self.frozen_a {
                Wanted::OnlyB
            } else {
                Wanted::Factors
            },
        };
        let (measured, gradients) = self.objective.gradients(&micro, scale);
        let of_pair = |(gradient, factors): (Gradient, &Factors)| match gradient {
            Gradient::Factors { a, b } => [a.unwrap_or_else(|| factors.a.zeros_like()), b],
            Gradient::Gains(_) => unreachable!("the factors' gradients were asked for"),
        };
        let pairs = gradients.into_iter().zip(adapter.factors());
        (measured, pairs.flat_map(of_pair).collect())
    }

    fn update(&mut self, gradients: Vec<Tensor<2>>, factor: f64, rate: f64) {
        let moments = std::mem::take(&mut self.moments);
        let slots = self
            .adapter
            .factors_mut()
            .flat_map(|pair| [(&mut pair.a, rate), (&mut pair.b, rate * self.rate_ratio)]);
        for (((slot, rate), gradient), moments) in slots.zip(gradients).zip(moments) {
            let gradient = if factor < 1.0 {
                gradient * factor
            } else {
                gradient
            };
            let (parameter, moments) =
                self.optimiser
                    .update(slot.clone(), gradient, moments, rate, self.steps + 1);
            *slot = parameter;
            self.moments.push(moments);
        }
    }

    fn check(&self, what: &'static str, value: f64) -> Result<(), NotFinite> {
        if value.is_finite() {
            Ok(())
        } else {
            Err(NotFinite {
                what,
                value,
                step: self.steps + 1,
            })
        }
    }
}
