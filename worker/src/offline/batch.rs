//! `cairn-worker batch`: offline jobs from standard input, one JSON object a line, each answered by
//! one line. Models and encoded data stay in memory between jobs, so a study of thousands of small
//! trainings and evaluations loads each but once.
//!
//! ```json
//! {"train":{"model":"DIR","data":"FILE","recipe":{"rank":4,...},"out":"DIR",
//!           "initial":"ADAPTER_DIR","carry":"ADAPTER_DIR","teacher":"DIR","frozen_a":false,
//!           "states":{"dir":"DIR","segments":4}}}
//! {"evaluate":{"model":"DIR","adapters":[["DIR",0.5]],"data":"FILE","sequence_length":128,"dpo_beta":0.1}}
//! ```
//!
//! The answers are those of `train --json` and `evaluate --json`, or `{"error":"..."}`: a job that
//! fails does not end the batch.

use std::collections::VecDeque;
use std::io::{BufRead, Read, Write, stdin, stdout};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use cairn_stack::adapter::{AdapterFile, Pair};
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::{DPO_BETA_DEFAULT, Recipe};
use cairn_stack::records::Format;

use super::{OfflineError, evaluate, read_file, train};
use crate::cancel::CancelFlag;
use crate::data::encode_to_learn;
use crate::device::{Depth, DeviceChoice, DeviceName};
use crate::evaluate::{
    EncodedSet, EvaluateError, encode_set, read_adapters, score_set, sequence_length,
};
use crate::interrupt::cancel_on_signal;
use crate::model::LoadedModel;
use crate::train::states::States;
use crate::train::{TrainJob, train as train_adapter};

/// Longest job, in bytes; a stack of a thousand adapters fits.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Models kept loaded.
const MODELS_KEPT: usize = 2;
/// Encoded files kept.
const FILES_KEPT: usize = 64;

/// Train and evaluate offline, many jobs in one process
///
/// Reads one JSON object a line from standard input and answers each with one line.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  echo '{\"evaluate\":{\"model\":\"base\",\"adapters\":[[\"a1\",0.5],[\"a2\",0.5]],\"data\":\"gate.jsonl\"}}' | cairn-worker batch"
)]
pub struct BatchArgs {
    /// auto, or flex, tch, cuda:0, vulkan, ... as far as built in (cairn-worker devices lists them)
    #[arg(long, env = "CAIRN_DEVICE", default_value_t)]
    pub device: DeviceChoice,
}

/// One line.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Job {
    Train(Box<TrainOrder>),
    Evaluate(EvaluateOrder),
}

/// An adapter to train.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrainOrder {
    model: PathBuf,
    data: PathBuf,
    recipe: Recipe,
    initial: Option<PathBuf>,
    /// An adapter that the base contains and training goes on from.
    carry: Option<PathBuf>,
    /// The model to learn from, where the recipe distils.
    teacher: Option<PathBuf>,
    /// Leave every A as it starts, as FFA-LoRA does.
    #[serde(default)]
    frozen_a: bool,
    /// Training states to keep; a folder of them says what to commit to.
    states: Option<StatesOrder>,
    out: PathBuf,
}

/// Training states to keep.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StatesOrder {
    dir: PathBuf,
    segments: u32,
}

/// A model with adapters to score.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EvaluateOrder {
    model: PathBuf,
    #[serde(default)]
    adapters: Vec<(PathBuf, f64)>,
    data: PathBuf,
    sequence_length: Option<usize>,
    dpo_beta: Option<f64>,
    #[serde(default)]
    quantize: Quantize,
}

/// Runs the command until standard input ends.
///
/// # Errors
/// [`OfflineError`] when standard input or output fails; a job's own failure is its answer.
pub fn run(args: &BatchArgs) -> Result<(), OfflineError> {
    let cancel = CancelFlag::new();
    cancel_on_signal(&cancel)?;
    let mut desk = Desk {
        device: args.device.settle(Depth::Small)?.name,
        cancel,
        models: VecDeque::new(),
        files: VecDeque::new(),
    };
    let mut input = stdin().lock();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut input)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)?;
        if read == 0 || desk.cancel.is_cancelled() {
            return Ok(());
        }
        if read as u64 == LINE_BYTES_MAX && line.last() != Some(&b'\n') {
            return Err(std::io::Error::other("a job is longer than 4 MiB").into());
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let answer = serde_json::from_slice(&line)
            .map_err(|error| format!("this line is no job: {error}"))
            .and_then(|job| desk.work(&job).map_err(|error| error.to_string()))
            .unwrap_or_else(|error| json!({"error": error}));
        let mut out = stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
}

/// What a file is encoded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// To be scored.
    Score,
    /// To be learnt from.
    Learn,
    /// To be learnt from as preferences.
    Prefer,
}

/// A file, as encoded for one purpose.
struct Encoded {
    /// Model, file, sequence length and purpose.
    key: (PathBuf, PathBuf, usize, Purpose),
    set: Rc<EncodedSet>,
}

/// What is kept between jobs; the least recently used goes first.
struct Desk {
    device: DeviceName,
    cancel: CancelFlag,
    models: VecDeque<Rc<LoadedModel>>,
    files: VecDeque<Encoded>,
}

impl Desk {
    fn work(&mut self, job: &Job) -> Result<Value, OfflineError> {
        match job {
            Job::Train(order) => self.train(order),
            Job::Evaluate(order) => self.evaluate(order),
        }
    }

    fn train(&mut self, order: &TrainOrder) -> Result<Value, OfflineError> {
        let model = self.model(&order.model, order.recipe.quantize)?;
        let length = order.recipe.sequence_length as usize;
        let positions = model.llama.config.max_positions;
        if length > positions {
            return Err(OfflineError::TooLong {
                asked: length,
                model: positions,
            });
        }
        let set = self.set(&model, &order.data, length, Some(&order.recipe))?;
        let teacher = match &order.teacher {
            Some(folder) => {
                train::check_teacher(folder, &order.recipe, &order.model)?;
                Some(self.model(folder, Quantize::None)?)
            }
            None => None,
        };
        let initial = order.initial.as_deref().map(read_pairs).transpose()?;
        let carry = order.carry.as_deref().map(read_pairs).transpose()?;
        let job = TrainJob {
            examples: &set.examples,
            recipe: &order.recipe,
            initial,
            carry: carry.as_deref(),
            teacher: teacher.as_deref(),
            frozen_a: order.frozen_a,
            out_dir: &order.out,
            base_model: None,
            revision: None,
            checkpoints: None,
            states: order.states.as_ref().map(|states| States {
                dir: states.dir.clone(),
                segments: states.segments,
            }),
            on_progress: &mut |_| {},
            cancel: &self.cancel,
        };
        let report = train_adapter(&model, job)?;
        Ok(train::to_json(&report, self.device))
    }

    fn evaluate(&mut self, order: &EvaluateOrder) -> Result<Value, OfflineError> {
        let model = self.model(&order.model, order.quantize)?;
        let length = sequence_length(&model, order.sequence_length);
        let set = self.set(&model, &order.data, length, None)?;
        let pairs = read_adapters(&order.adapters)?;
        let beta = order.dpo_beta.unwrap_or(DPO_BETA_DEFAULT);
        let report = score_set(&model, &pairs, &set, beta, &mut |_| {}, &self.cancel)?;
        Ok(evaluate::to_json(&report))
    }

    fn model(&mut self, dir: &Path, quantize: Quantize) -> Result<Rc<LoadedModel>, OfflineError> {
        let is_it = |model: &Rc<LoadedModel>| model.dir == dir && model.quantize == quantize;
        let kept = self.models.iter().position(is_it);
        let model = match kept.and_then(|place| self.models.remove(place)) {
            Some(model) => model,
            None => Rc::new(LoadedModel::load_quantised(dir, quantize, self.device)?),
        };
        self.models.push_back(Rc::clone(&model));
        while self.models.len() > MODELS_KEPT {
            self.models.pop_front();
        }
        Ok(model)
    }

    /// A file's records, encoded for a recipe to learn from, or to be scored.
    fn set(
        &mut self,
        model: &LoadedModel,
        path: &Path,
        length: usize,
        recipe: Option<&Recipe>,
    ) -> Result<Rc<EncodedSet>, OfflineError> {
        let purpose = match recipe {
            None => Purpose::Score,
            Some(recipe) if recipe.objective.is_of_preferences() => Purpose::Prefer,
            Some(_) => Purpose::Learn,
        };
        let key = (model.dir.clone(), path.to_owned(), length, purpose);
        let kept = self.files.iter().position(|file| file.key == key);
        let file = match kept.and_then(|place| self.files.remove(place)) {
            Some(file) => file,
            None => Encoded {
                set: Rc::new(read_set(model, path, length, recipe)?),
                key,
            },
        };
        let set = Rc::clone(&file.set);
        self.files.push_back(file);
        while self.files.len() > FILES_KEPT {
            self.files.pop_front();
        }
        Ok(set)
    }
}

fn read_set(
    model: &LoadedModel,
    path: &Path,
    length: usize,
    recipe: Option<&Recipe>,
) -> Result<EncodedSet, OfflineError> {
    let records = read_file(path, Format::Auto)?.into_iter();
    let encoder = model.encoder()?;
    let Some(recipe) = recipe else {
        return Ok(encode_set(&encoder, records, length)?);
    };
    let (examples, _) = encode_to_learn(&encoder, records, recipe)?;
    let of_preferences = recipe.objective.is_of_preferences();
    Ok(EncodedSet::new(examples, of_preferences))
}

fn read_pairs(dir: &Path) -> Result<Vec<Pair>, EvaluateError> {
    Ok(AdapterFile::open(dir)?.pairs()?)
}
