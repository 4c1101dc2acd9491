//! The second stage: trains or evaluates, on threads that may block.

use std::path::PathBuf;
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

/// What stays in memory between units: a model, and sets encoded for it.
#[derive(Default)]
pub struct Desk {
    model: Option<Model>,
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
        folder: &std::path::Path,
        quantize: Quantize,
        device: DeviceName,
    ) -> Result<(&Model, &mut EvalSets), ModelError> {
        if self
            .model
            .as_ref()
            .is_none_or(|model| model.folder != folder || model.loaded.quantize != quantize)
        {
            self.model = None;
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
