//! Training one adapter: examples in, PEFT folder out. Blocking; callers give it a thread.
//!
//! Reading order: [`order`] (which rows when), [`schedule`], [`noise`], [`adamw`], [`objective`] (what is
//! minimised: [`dpo`], [`distill`], and [`frozen`], what both ask other models), [`trainer`] (one step), [`checkpoint`] (surviving kill -9), [`states`] and [`record`] (what a training commits to), and
//! [`train`] here, which strings them together. [`mod@replay`] and [`mod@guide`] are an evaluator's.
//!
//! The adapter is a function of base weights, examples and recipe on one kind of device, and so is
//! every training state. Being interrupted and resumed, however often, changes nothing in them.

pub mod adamw;
pub mod checkpoint;
pub mod distill;
pub mod dpo;
pub mod frozen;
pub mod guide;
pub mod noise;
pub mod objective;
pub mod order;
pub mod record;
pub mod replay;
pub mod schedule;
pub mod states;
pub mod trainer;

use std::path::{Path, PathBuf};

use cairn_stack::adapter::{
    AdapterError, AdapterSpec, AdapterWriteConfig, Pair, WEIGHTS_FILE, write_adapter,
};
use cairn_stack::carry::{CarryError, check_factors, difference, write_config_with_carry};
use cairn_stack::digest::Digest;
use cairn_stack::recipe::Recipe;

use crate::cancel::CancelFlag;
use crate::clock::Stopwatch;
use crate::data::Example;
use crate::model::lora::ForeignPair;
use crate::model::{Adapter, LoadedModel};
use crate::preflight::DoesNotFit;
use crate::preflight::watch::Watch;
use checkpoint::{CheckpointError, Numbers};
use dpo::Rewards;
use objective::{NoTeacher, Objective};
use order::Steps;
use record::{Recorder, Rewound};
use states::{Commitment, StateError, States};
use trainer::{NotFinite, Trainer};

pub use guide::{GuideJob, guide};
pub use replay::{ReplayError, ReplayJob, ReplayReport, StartState, replay};

/// Where and how often a run saves its state.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    /// A folder of this run's own.
    pub dir: PathBuf,
    /// Save when this many seconds have passed since the last time; what a crash costs at most.
    pub every_seconds: f64,
    /// And after every this many steps, where given.
    pub every_steps: Option<u64>,
}

impl Checkpoints {
    /// Once a minute: saving takes well under a second, so this costs nothing to notice.
    #[must_use]
    pub fn in_dir(dir: PathBuf) -> Self {
        Self {
            dir,
            every_seconds: 60.0,
            every_steps: None,
        }
    }
}

/// One adapter to train.
pub struct TrainJob<'a> {
    /// What to learn from; see [`crate::data::encode_records`].
    pub examples: &'a [Example],
    /// How.
    pub recipe: &'a Recipe,
    /// Factors to start from; `None` makes fresh ones from the recipe's seed, or takes the carried.
    pub initial: Option<Vec<Pair>>,
    /// Factors whose delta the base contains and training goes on from; the adapter is then what
    /// was changed ([`cairn_stack::carry`]).
    pub carry: Option<&'a [Pair]>,
    /// The model to learn from, where the recipe distils; it has the same vocabulary
    /// ([`distill::same_vocabulary`]).
    pub teacher: Option<&'a LoadedModel>,
    /// Leave every A as it starts (FFA-LoRA, arXiv 2403.12313), for studies: no round does.
    pub frozen_a: bool,
    /// The folder the adapter is written to.
    pub out_dir: &'a Path,
    /// The base model's name, for the adapter's config.
    pub base_model: Option<&'a str>,
    /// The base model's revision, for the adapter's config.
    pub revision: Option<&'a str>,
    /// Local checkpoints; `None` for none.
    pub checkpoints: Option<Checkpoints>,
    /// Training states to keep and commit to; `None` for none.
    pub states: Option<States>,
    /// Called after every step.
    pub on_progress: &'a mut dyn FnMut(&Progress),
    /// Looked at before every step.
    pub cancel: &'a CancelFlag,
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Loss of the last step, in nats per scored token or per preference.
    pub loss: f64,
    /// Rewards of the last step, where preferences are learnt.
    pub rewards: Option<Rewards>,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Tokens a second in this sitting.
    pub tokens_per_second: f64,
    /// Seconds left at this speed.
    pub eta_seconds: f64,
    /// The run was taken up from a local checkpoint or training state at this step.
    pub resumed_at: Option<u64>,
}

/// What a finished run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainReport {
    /// Optimiser steps.
    pub steps: u64,
    /// Tokens, padding left out.
    pub tokens: u64,
    /// Tokens that counted in the loss.
    pub scored_tokens: u64,
    /// Seconds of training, over all sittings.
    pub seconds: f64,
    /// `tokens / seconds`.
    pub tokens_per_second: f64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// Rewards of the last step, where preferences are learnt.
    pub last_rewards: Option<Rewards>,
    /// BLAKE3 of the adapter's weight file.
    pub adapter_blake3: Digest,
    /// What the kept training states commit to.
    pub commitment: Option<Commitment>,
}

/// Why training gave no adapter.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// There is nothing to learn from.
    #[error("there is no example with a scored token")]
    NoExamples,
    /// The recipe distils, and there is no teacher.
    #[error(transparent)]
    NoTeacher(#[from] NoTeacher),
    /// Loss or gradient became NaN or infinite.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// Stopped on request; the local checkpoint, if any, holds everything.
    #[error("stopped after {done} of {total} steps")]
    Cancelled {
        /// Steps done.
        done: u64,
        /// Steps in all.
        total: u64,
    },
    /// The local checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A training state could not be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// The adapter to start from does not fit the model.
    #[error(transparent)]
    Initial(#[from] ForeignPair),
    /// The carried factors are not the recipe's.
    #[error("the round's carried factors: {0}")]
    Carry(#[from] CarryError),
    /// Others took the memory that a step needs.
    #[error("stopped after {done} steps, a step {source}")]
    Memory {
        /// Steps done.
        done: u64,
        /// What is missing.
        source: DoesNotFit,
    },
    /// The adapter could not be written.
    #[error("write the adapter: {0}")]
    Write(#[from] AdapterError),
    /// The adapter could not be read back to be hashed.
    #[error("hash the adapter: {0}")]
    Hash(#[source] std::io::Error),
}

/// Trains an adapter and writes it to the job's folder.
///
/// # Errors
/// [`TrainError`]; after [`TrainError::Cancelled`] a call with the same job goes on where it was.
pub fn train<'m>(model: &'m LoadedModel, mut job: TrainJob<'m>) -> Result<TrainReport, TrainError> {
    let recipe = job.recipe;
    if !job
        .examples
        .iter()
        .any(|example| example.scored_tokens() > 0)
    {
        return Err(TrainError::NoExamples);
    }
    let (adapter, initial) = start::<TrainError>(model, recipe, job.initial.take(), job.carry)?;
    let carried = job.carry.unwrap_or_default();
    let key = checkpoint::key(
        recipe,
        job.examples,
        [
            Some(&model.digest),
            job.teacher.map(|teacher| &teacher.digest),
        ],
        carried,
        &initial,
    );
    drop(initial);
    let mut steps = Steps::new(job.examples, recipe);
    let (mut trainer, mut numbers, mut recorder) =
        take_up(model, &job, adapter, &key, steps.total)?;
    let resumed_at = (trainer.steps > 0).then_some(trainer.steps);
    for _ in 0..trainer.steps {
        steps.next();
    }

    let total = steps.total;
    let sitting = Sitting {
        watch: Stopwatch::start(),
        first_step: trainer.steps,
        tokens: numbers.tokens,
        seconds: numbers.seconds,
    };
    let mut watch = Watch::new(model, job.teacher, recipe);
    let mut saved_at = 0.0;
    let mut saved_step = trainer.steps;
    for micro_batches in steps {
        let save = |trainer: &Trainer<'_>, numbers: &Numbers| match &job.checkpoints {
            Some(checkpoints) => checkpoint::save(&checkpoints.dir, &key, trainer, numbers),
            None => Ok(()),
        };
        if job.cancel.is_cancelled() {
            if trainer.steps != saved_step {
                save(&trainer, &numbers)?;
            }
            return Err(TrainError::Cancelled {
                done: trainer.steps,
                total,
            });
        }
        trainer.passes = match watch.before_step(&micro_batches, job.cancel) {
            Ok(passes) => passes,
            Err(source) => {
                save(&trainer, &numbers)?;
                let done = trainer.steps;
                return Err(TrainError::Memory { done, source });
            }
        };
        let rate = schedule::learning_rate(recipe, trainer.steps, total);
        let step = trainer.step(&micro_batches, rate)?;
        numbers.add(&step, sitting.seconds + sitting.watch.seconds());
        if let Some(recorder) = &mut recorder {
            recorder.record(&trainer, &numbers)?;
        }
        let progress = sitting.progress(trainer.steps, total, rate, &numbers, resumed_at);
        (job.on_progress)(&progress);

        let due = job.checkpoints.as_ref().is_some_and(|checkpoints| {
            let by_steps = checkpoints
                .every_steps
                .is_some_and(|every| trainer.steps.is_multiple_of(every.max(1)));
            by_steps || sitting.watch.seconds() - saved_at >= checkpoints.every_seconds
        });
        if due {
            save(&trainer, &numbers)?;
            (saved_at, saved_step) = (sitting.watch.seconds(), trainer.steps);
        }
    }
    let commitment = recorder.as_ref().map(Recorder::commitment);
    drop(recorder);
    finish(model, &trainer, &numbers, commitment, &job)
}

/// A trainer where an earlier sitting left it, by its local checkpoint and its training states, or
/// before the first step.
fn take_up<'m>(
    model: &'m LoadedModel,
    job: &TrainJob<'m>,
    adapter: Adapter,
    key: &Digest,
    total: u64,
) -> Result<(Trainer<'m>, Numbers, Option<Recorder<'m>>), TrainError> {
    let config = &model.llama.config;
    let fresh = |adapter| {
        let teacher = job.teacher.map(|teacher| &teacher.llama);
        let objective = Objective::of(job.recipe, job.examples, teacher)?;
        let mut trainer = Trainer::new(&model.llama, adapter, job.recipe).minimising(objective);
        trainer.frozen_a = job.frozen_a;
        Ok::<_, TrainError>(trainer)
    };
    let mut trainer = fresh(adapter.clone())?;
    let mut numbers = Numbers::default();
    if let Some(checkpoints) = &job.checkpoints
        && let Some(before) = checkpoint::resume(&checkpoints.dir, key, &mut trainer)?
    {
        numbers = before;
    }
    let Some(states) = &job.states else {
        return Ok((trainer, numbers, None));
    };
    let write = AdapterWriteConfig::of_recipe(job.recipe, job.base_model, job.revision);
    let mut recorder = Recorder::open(states.clone(), config, write, key, total)?;
    match recorder.rewind(&mut trainer)? {
        Rewound::Fits => (),
        Rewound::ToState(before) => numbers = before,
        Rewound::ToStart => {
            trainer = fresh(adapter)?;
            numbers = Numbers::default();
        }
    }
    recorder.record(&trainer, &numbers)?;
    Ok((trainer, numbers, Some(recorder)))
}

/// The adapter before the first step, on the model's device, and its factors: those given, else the
/// carried ones, else fresh ones from the recipe's seed.
fn start<E: From<ForeignPair> + From<CarryError>>(
    model: &LoadedModel,
    recipe: &Recipe,
    given: Option<Vec<Pair>>,
    carry: Option<&[Pair]>,
) -> Result<(Adapter, Vec<Pair>), E> {
    assert_eq!(
        model.quantize, recipe.quantize,
        "the model is loaded as the recipe has it"
    );
    let config = &model.llama.config;
    let initial = given.unwrap_or_else(|| match carry {
        Some(carried) => carried.to_vec(),
        None => Adapter::fresh(
            config,
            &recipe.target_modules,
            recipe.rank as usize,
            recipe.scale(),
            recipe.seed,
        ),
    });
    let adapter = Adapter::new(config, &initial, &model.device)?;
    let Some(carried) = carry else {
        return Ok((adapter, initial));
    };
    let spec = AdapterSpec::new(config, recipe);
    check_factors(&spec, carried)?;
    check_factors(&spec, &initial)?;
    let carried = Adapter::new(config, carried, &model.device)?;
    Ok((adapter.instead_of(&carried), initial))
}

/// This run of the program, as a part of a run of training.
struct Sitting {
    watch: Stopwatch,
    first_step: u64,
    tokens: u64,
    seconds: f64,
}

impl Sitting {
    fn progress(
        &self,
        step: u64,
        steps: u64,
        learning_rate: f64,
        numbers: &Numbers,
        resumed_at: Option<u64>,
    ) -> Progress {
        let seconds = self.watch.seconds().max(1e-9);
        let done = (step - self.first_step).max(1) as f64;
        Progress {
            step,
            steps,
            loss: numbers.last_loss,
            rewards: numbers.last_rewards,
            learning_rate,
            tokens_per_second: (numbers.tokens - self.tokens) as f64 / seconds,
            eta_seconds: (steps - step) as f64 * seconds / done,
            resumed_at,
        }
    }
}

fn finish(
    model: &LoadedModel,
    trainer: &Trainer<'_>,
    numbers: &Numbers,
    commitment: Option<Commitment>,
    job: &TrainJob<'_>,
) -> Result<TrainReport, TrainError> {
    let (recipe, base_model, revision) = (job.recipe, job.base_model, job.revision);
    let mut pairs = trainer.adapter.to_pairs(&model.llama.config);
    let mut config = AdapterWriteConfig::of_recipe(recipe, base_model, revision);
    if let Some(carried) = job.carry {
        pairs = difference(recipe, &pairs, carried)?;
        config = write_config_with_carry(recipe, base_model, revision);
    }
    write_adapter(job.out_dir, &pairs, &config)?;
    let (adapter_blake3, _) =
        Digest::of_file(&job.out_dir.join(WEIGHTS_FILE)).map_err(TrainError::Hash)?;
    if let Some(checkpoints) = &job.checkpoints {
        checkpoint::discard(&checkpoints.dir);
    }
    Ok(TrainReport {
        steps: trainer.steps,
        tokens: numbers.tokens,
        scored_tokens: numbers.scored_tokens,
        seconds: numbers.seconds,
        tokens_per_second: numbers.tokens as f64 / numbers.seconds.max(1e-9),
        first_loss: numbers.first_loss,
        last_loss: numbers.last_loss,
        last_rewards: numbers.last_rewards,
        adapter_blake3,
        commitment,
    })
}
