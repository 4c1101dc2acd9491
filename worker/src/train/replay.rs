//! Training one segment again, to see whether it was trained as it was said to be.

use std::path::Path;

use cairn_stack::adapter::Pair;
use cairn_stack::algebra::moved;
use cairn_stack::carry::CarryError;
use cairn_stack::recipe::Recipe;

use super::objective::{NoTeacher, Objective};
use super::order::Steps;
use super::states::{StateError, boundaries, read_factors, restore};
use super::trainer::{NotFinite, Trainer};
use super::{Progress, Sitting, schedule, start};
use crate::cancel::CancelFlag;
use crate::clock::Stopwatch;
use crate::data::Example;
use crate::model::LoadedModel;
use crate::model::lora::ForeignPair;
use crate::preflight::DoesNotFit;
use crate::preflight::watch::Watch;

/// A state that was opened: where a segment starts.
#[derive(Debug, Clone, Copy)]
pub struct StartState<'a> {
    /// The file of factors.
    pub factors: &'a Path,
    /// The file of moments.
    pub moments: &'a Path,
}

/// One segment to train again.
pub struct ReplayJob<'a> {
    /// What the whole training learnt from.
    pub examples: &'a [Example],
    /// How.
    pub recipe: &'a Recipe,
    /// Factors the whole training started from; `None` makes fresh ones from the recipe's seed, or
    /// takes the carried.
    pub initial: Option<Vec<Pair>>,
    /// Factors the round carries; see [`super::TrainJob::carry`].
    pub carry: Option<&'a [Pair]>,
    /// See [`super::TrainJob::teacher`].
    pub teacher: Option<&'a LoadedModel>,
    /// Segments the whole training was cut into.
    pub segments: u32,
    /// The state to start from; not looked at for a segment that starts before the first step.
    pub start: Option<StartState<'a>>,
    /// Steps done at the start.
    pub first_step: u64,
    /// Steps done at the end.
    pub last_step: u64,
    /// The factors that were claimed for the end.
    pub end_factors: &'a Path,
    /// Called after every step.
    pub on_progress: &'a mut dyn FnMut(&Progress),
    /// Looked at before every step.
    pub cancel: &'a CancelFlag,
}

/// How far the segment, trained again, ends from where it was said to end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplayReport {
    /// `||claimed - again|| / ||claimed - start||` in product space; 0 when nothing differs,
    /// infinite when they differ and nothing was moved.
    pub distance: f64,
    /// Whether all factors are the same bit for bit.
    pub identical: bool,
    /// Steps trained.
    pub steps: u64,
    /// Seconds of training.
    pub seconds: f64,
}

/// Why a segment could not be trained again.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// There is no such segment in a training of these examples by this recipe: who trained less
    /// than that has other ones.
    #[error("steps {first} to {last} are no segment of a training of {total} steps")]
    Segment {
        /// Steps done at the start.
        first: u64,
        /// Steps done at the end.
        last: u64,
        /// Steps of the training.
        total: u64,
    },
    /// There is no state to start from.
    #[error("the segment starts after step {0}, and there is no state to start from")]
    NoStart(u64),
    /// A state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The recipe distils, and there is no teacher.
    #[error(transparent)]
    NoTeacher(#[from] NoTeacher),
    /// Loss or gradient became NaN or infinite.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// The adapter to start from does not fit the model.
    #[error(transparent)]
    Initial(#[from] ForeignPair),
    /// The carried factors are not the recipe's.
    #[error("the round's carried factors: {0}")]
    Carry(#[from] CarryError),
    /// Others took the memory that a step needs.
    #[error("a step {0}")]
    Memory(#[from] DoesNotFit),
    /// Stopped on request.
    #[error("stopped")]
    Cancelled,
}

impl ReplayError {
    /// Whether what was opened is at fault: steps or files that are none of this training's states,
    /// or a state from which no training goes on. Honest states are neither.
    #[must_use]
    pub fn is_claim(&self) -> bool {
        match self {
            Self::State(error) => error.is_content(),
            Self::Segment { .. } | Self::NotFinite(_) => true,
            Self::NoStart(_)
            | Self::NoTeacher(_)
            | Self::Initial(_)
            | Self::Carry(_)
            | Self::Memory(_)
            | Self::Cancelled => false,
        }
    }
}

/// Trains a segment again and compares its end with the one that was claimed.
///
/// # Errors
/// [`ReplayError`]; [`ReplayError::is_claim`] says which are an answer.
pub fn replay<'m>(
    model: &'m LoadedModel,
    mut job: ReplayJob<'m>,
) -> Result<ReplayReport, ReplayError> {
    let config = &model.llama.config;
    let steps = Steps::new(job.examples, job.recipe);
    let (first, last, total) = (job.first_step, job.last_step, steps.total);
    let boundaries = boundaries(total, job.segments);
    if !boundaries
        .windows(2)
        .any(|segment| segment == [first, last])
    {
        return Err(ReplayError::Segment { first, last, total });
    }
    let opened = job.start.filter(|_| first > 0);
    if first > 0 && opened.is_none() {
        return Err(ReplayError::NoStart(first));
    }
    let (adapter, _) = start::<ReplayError>(model, job.recipe, job.initial.take(), job.carry)?;
    let teacher = job.teacher.map(|teacher| &teacher.llama);
    let objective = Objective::of(job.recipe, job.examples, teacher)?;
    let mut trainer = Trainer::new(&model.llama, adapter, job.recipe).minimising(objective);
    if let Some(start) = opened {
        restore(&mut trainer, config, start.factors, start.moments, first)?;
    }
    let start = trainer.adapter.to_pairs(config);
    // Read before training: what cannot be read needs no training.
    let claimed = read_factors(job.end_factors, &start)?;

    let sitting = Sitting {
        watch: Stopwatch::start(),
        first_step: first,
        tokens: 0,
        seconds: 0.0,
    };
    let mut watch = Watch::new(model, job.teacher, job.recipe);
    let mut numbers = super::checkpoint::Numbers::default();
    let segment = (last - first) as usize;
    for micro_batches in steps.skip(first as usize).take(segment) {
        if job.cancel.is_cancelled() {
            return Err(ReplayError::Cancelled);
        }
        trainer.passes = watch.before_step(&micro_batches, job.cancel)?;
        let rate = schedule::learning_rate(job.recipe, trainer.steps, total);
        let step = trainer.step(&micro_batches, rate)?;
        numbers.add(&step, sitting.watch.seconds());
        (job.on_progress)(&sitting.progress(trainer.steps, last, rate, &numbers, None));
    }
    let again = trainer.adapter.to_pairs(config);
    let identical = claimed.iter().zip(&again).all(|(x, y)| same_bits(x, y));
    Ok(ReplayReport {
        distance: if identical {
            0.0
        } else {
            moved(&start, &claimed, &again)
        },
        identical,
        steps: last - first,
        seconds: sitting.watch.seconds(),
    })
}

fn same_bits(x: &Pair, y: &Pair) -> bool {
    let same = |x: &[f32], y: &[f32]| {
        x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits())
    };
    same(&x.a, &y.a) && same(&x.b, &y.b)
}
