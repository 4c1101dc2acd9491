//! The second stage: trains or evaluates, on threads that may block.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;

use super::context::Ctx;
use super::evaluation::{self, EvalSets};
use super::fetch::Materials;
use super::findings;
use super::learning;
use super::training;
use super::unit::{Outcome, Unit};
use crate::data::Encoder;
use crate::device::DeviceName;
use crate::error::WorkerError;
use crate::model::{LoadedModel, ModelError};
use crate::train::distill::same_vocabulary;
use cairn_proto::v1::lease::Work;
use cairn_stack::quantize::Quantize;

/// A unit with all its parts, or how it ended before it began.
pub struct Prepared {
    /// The unit.
    pub unit: Arc<Unit>,
    /// Its parts.
    pub materials: Result<Materials, Outcome>,
}

/// A unit whose work is over.
pub struct Worked {
    /// The unit.
    pub unit: Arc<Unit>,
    /// How it ended.
    pub outcome: Outcome,
}

/// What stays in memory between units: a model, sets encoded for it, and a teacher.
#[derive(Default)]
pub struct Desk {
    model: Option<Model>,
    /// A model to learn from.
    teacher: Option<LoadedModel>,
    /// Encoded evaluation sets.
    pub sets: EvalSets,
}

/// A loaded base with its tokenizer.
pub struct Model {
    folder: PathBuf,
    /// The weights on the device.
    pub loaded: LoadedModel,
    /// The tokenizer.
    pub encoder: Encoder,
}

impl Desk {
    /// The model in a folder, kept as is said, loaded unless it is the one at hand. The old one is
    /// dropped first: two at once may not fit.
    ///
    /// # Errors
    /// As [`LoadedModel::load_quantised`].
    pub fn model(
        &mut self,
        folder: &Path,
        quantize: Quantize,
        device: DeviceName,
    ) -> Result<(&Model, &mut EvalSets), ModelError> {
        if self
            .model
            .as_ref()
            .is_none_or(|model| model.folder != folder || model.loaded.quantize != quantize)
        {
            self.model = None;
            self.teacher = None;
            self.sets.clear();
            let loaded = LoadedModel::load_quantised(folder, quantize, device)?;
            let encoder = loaded.encoder()?;
            self.model = Some(Model {
                folder: folder.to_owned(),
                loaded,
                encoder,
            });
        }
        match &self.model {
            Some(model) => Ok((model, &mut self.sets)),
            None => unreachable!("loaded above"),
        }
    }

    /// The model in a folder, and beside it the teacher in another where there is one. A model that
    /// teaches itself is held once.
    ///
    /// # Errors
    /// A sentence naming what cannot be loaded, or why the one cannot teach the other.
    pub fn model_and_teacher(
        &mut self,
        folder: &Path,
        teacher: Option<&Path>,
        quantize: Quantize,
        device: DeviceName,
    ) -> Result<(&Model, Option<&LoadedModel>), String> {
        self.model(folder, quantize, device)
            .map_err(|error| format!("load the base: {error}"))?;
        // In fewer bits it is no teacher of itself.
        let same = |teacher: &&Path| *teacher == folder && quantize == Quantize::None;
        let other = teacher.filter(|teacher| !same(teacher));
        if self.teacher.as_ref().map(|kept| kept.dir.as_path()) != other {
            self.teacher = None;
        }
        if let (Some(other), None) = (other, &self.teacher) {
            same_vocabulary(folder, other).map_err(|error| error.to_string())?;
            let loaded = LoadedModel::load(other, device)
                .map_err(|error| format!("load the teacher: {error}"))?;
            self.teacher = Some(loaded);
        }
        let Some(model) = &self.model else {
            unreachable!("loaded above")
        };
        let own = teacher.map(|_| self.teacher.as_ref().unwrap_or(&model.loaded));
        Ok((model, own))
    }
}

/// Runs until the picker has ended and its last unit is done.
///
/// # Errors
/// None of its own.
pub async fn run(
    context: Ctx,
    mut units: mpsc::Receiver<Prepared>,
    to_submit: mpsc::Sender<Worked>,
) -> Result<(), WorkerError> {
    let desk = Arc::new(Mutex::new(Desk::default()));
    while let Some(Prepared { unit, materials }) = units.recv().await {
        let outcome = match materials {
            Err(outcome) => outcome,
            Ok(materials) => do_work(&context, &unit, materials, &desk).await,
        };
        if to_submit.send(Worked { unit, outcome }).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn do_work(
    context: &Ctx,
    unit: &Arc<Unit>,
    materials: Materials,
    desk: &Arc<Mutex<Desk>>,
) -> Outcome {
    let (context, unit, desk) = (context.clone(), unit.clone(), desk.clone());
    let worked = tokio::task::spawn_blocking(move || {
        // A panic leaves the desk poisoned; what is on it is then not trusted.
        let mut desk = desk.lock().unwrap_or_else(|poisoned| {
            let mut fresh = poisoned.into_inner();
            *fresh = Desk::default();
            fresh
        });
        let outcome = match &unit.work {
            Work::Train(work) => training::train(&context, &unit, work, &materials, &mut desk),
            Work::Evaluate(work) => {
                evaluation::evaluate(&context, &unit, work, &materials, &mut desk)
            }
            Work::Guide(work) => findings::guide(&context, &unit, work, &materials, &mut desk),
            Work::Replay(work) => findings::replay(&context, &unit, work, &materials, &mut desk),
            Work::Learn(work) => learning::learn(&context, &unit, work, &materials, &mut desk),
        };
        match outcome {
            // Finished after all: the coordinator says whether it still wants it.
            Outcome::Trained(_) | Outcome::Scored(_) | Outcome::Found(_) => outcome,
            _ if unit.lost.is_cancelled() => Outcome::Lost,
            outcome => outcome,
        }
    });
    match worked.await {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Failed(format!("the work panicked: {error}")),
    }
}
