//! A guiding update: the first steps of an honest training on a sample of a shard.

use std::path::Path;

use cairn_stack::adapter::Pair;
use cairn_stack::recipe::{Length, Recipe, Schedule};

use super::{Progress, TrainError, TrainJob, TrainReport, train};
use crate::cancel::CancelFlag;
use crate::data::Example;
use crate::model::LoadedModel;

/// A guide to train.
pub struct GuideJob<'a> {
    /// A sample of the shard.
    pub examples: &'a [Example],
    /// The shard's recipe.
    pub recipe: &'a Recipe,
    /// Factors to start from; `None` makes fresh ones from the recipe's seed, or takes the carried,
    /// as the shard's own training does.
    pub initial: Option<Vec<Pair>>,
    /// Factors the round carries; see [`TrainJob::carry`].
    pub carry: Option<&'a [Pair]>,
    /// See [`TrainJob::teacher`].
    pub teacher: Option<&'a LoadedModel>,
    /// Optimiser steps.
    pub steps: u32,
    /// The folder the adapter is written to.
    pub out_dir: &'a Path,
    /// Called after every step.
    pub on_progress: &'a mut dyn FnMut(&Progress),
    /// Looked at before every step.
    pub cancel: &'a CancelFlag,
}

/// Trains a guide and writes it as an adapter.
///
/// As the recipe has it, but at its peak learning rate throughout: what is asked for is a
/// direction, and warming up would hardly leave the start.
///
/// # Errors
/// As [`train`].
pub fn guide<'m>(model: &'m LoadedModel, job: GuideJob<'m>) -> Result<TrainReport, TrainError> {
    let recipe = Recipe {
        length: Length::Steps(job.steps.max(1)),
        schedule: Schedule::Constant,
        warmup_steps: 0,
        ..job.recipe.clone()
    };
    let job = TrainJob {
        examples: job.examples,
        recipe: &recipe,
        initial: job.initial,
        carry: job.carry,
        teacher: job.teacher,
        frozen_a: false,
        out_dir: job.out_dir,
        base_model: None,
        revision: None,
        checkpoints: None,
        states: None,
        on_progress: job.on_progress,
        cancel: job.cancel,
    };
    train(model, job)
}
