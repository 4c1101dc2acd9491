//! What a run minimises: the loss of a micro-batch and its gradients by the factors.

use std::borrow::Cow;

use cairn_stack::recipe::{Objective as Asked, Recipe};

use super::distill::Distillation;
use super::dpo::{Preferences, Rewards};
use crate::data::{Batch, Example};
use crate::model::input::scored_tokens;
use crate::model::llama::Keep;
use crate::model::lora::{Gradient, Wanted};
use crate::model::{Adapter, Input, Llama};

/// What a run minimises, and what it knows of the models that are held beside the one in training.
pub enum Objective<'m> {
    /// The loss of the scored tokens.
    Tokens,
    /// The loss of preferences against the base.
    Preferences(Preferences),
    /// The divergence from a teacher.
    Distillation(Box<Distillation<'m>>),
}

/// A recipe that distils, and no teacher to learn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the recipe's objective is \"distill\", and no teacher is given; name its folder with --teacher"
)]
pub struct NoTeacher;

/// What one micro-batch came to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// Summed loss over its units.
    pub loss: f64,
    /// Summed rewards over its preferences, where it has such.
    pub rewards: Option<Rewards>,
}

/// One forward pass to be made.
pub struct Micro<'a> {
    /// The model in training.
    pub model: &'a Llama,
    /// The adapter, disturbed as the recipe has it.
    pub adapter: &'a Adapter,
    /// The batch as it was packed, or a part of it.
    pub batch: &'a Batch,
    /// The batch as the model reads it, disturbed as the recipe has it.
    pub input: &'a Input,
    /// What is kept of each block.
    pub keep: Keep,
    /// Which gradients are wanted.
    pub wanted: Wanted,
}

impl<'m> Objective<'m> {
    /// That of a recipe, for a run over these examples.
    ///
    /// # Errors
    /// [`NoTeacher`].
    pub fn of(
        recipe: &Recipe,
        examples: &[Example],
        teacher: Option<&'m Llama>,
    ) -> Result<Self, NoTeacher> {
        Ok(match &recipe.objective {
            Asked::Sft => Self::Tokens,
            Asked::Dpo { beta } => Self::Preferences(Preferences::new(examples, recipe, *beta)),
            Asked::Distill(distill) => {
                let teacher = teacher.ok_or(NoTeacher)?;
                let made = Distillation::new(examples, recipe, distill, teacher);
                Self::Distillation(Box::new(made))
            }
        })
    }

    /// What the loss is a mean over: preferences, or scored tokens.
    #[must_use]
    pub fn units(&self, batch: &Batch) -> usize {
        match self {
            Self::Tokens | Self::Distillation(_) => scored_tokens(batch),
            Self::Preferences(_) => {
                batch
                    .rows
                    .iter()
                    .map(|row| row.examples.len())
                    .sum::<usize>()
                    / 2
            }
        }
    }

    /// A batch in parts of at most so many rows, as far as what is measured together lets it be cut: both
    /// answers of a preference stay in one part.
    #[must_use]
    pub fn parts<'b>(&self, batch: &'b Batch, rows: usize) -> Vec<(usize, Cow<'b, Batch>)> {
        let together: fn(usize) -> usize = match self {
            Self::Tokens | Self::Distillation(_) => |example| example,
            Self::Preferences(_) => |example| example / 2,
        };
        batch.parts(rows, together)
    }

    /// The summed loss of a micro-batch, and `scale` times its gradient by every pair.
    pub fn gradients(&mut self, micro: &Micro<'_>, scale: f64) -> (Measured, Vec<Gradient>) {
        match self {
            Self::Tokens => {
                let (input, wanted) = (micro.input, micro.wanted);
                let (loss, gradients) = micro.model.loss_and_gradients_keeping(
                    micro.keep,
                    micro.adapter,
                    input,
                    wanted,
                    scale,
                );
                let rewards = None;
                (Measured { loss, rewards }, gradients)
            }
            Self::Preferences(preferences) => preferences.gradients(micro, scale),
            Self::Distillation(distillation) => distillation.gradients(micro, scale),
        }
    }
}
