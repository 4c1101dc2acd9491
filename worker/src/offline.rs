//! The commands that need no coordinator: train one adapter, evaluate a model with adapters, or many
//! of both in one process. Results go to standard output, one JSON object with `--json`; everything else to standard error.

pub mod batch;
pub mod evaluate;
pub mod train;

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use cairn_stack::config::ConfigError;
use cairn_stack::records::{Format, Record, RecordError, read_records};

use crate::data::DataError;
use crate::device::DeviceError;
use crate::evaluate::EvaluateError;
use crate::model::ModelError;
use crate::preflight::DoesNotFit;
use crate::train::TrainError;
use crate::train::distill::TeacherError;
use crate::train::dpo::Rewards;

/// Why an offline command gave no result.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// A file could not be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line of the data is not a record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The data hold no record.
    #[error("{} holds no record", .0.display())]
    NoRecords(PathBuf),
    /// The recipe is broken.
    #[error("{}: {source}", path.display())]
    Recipe {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: cairn_stack::recipe::RecipeError,
    },
    /// The recipe asks for longer sequences than the model was made for.
    #[error("the recipe's sequence_length {asked} is beyond the model's {model} positions")]
    TooLong {
        /// What the recipe says.
        asked: usize,
        /// What the model has.
        model: usize,
    },
    /// A teacher, and nothing that it could teach.
    #[error("--teacher is for recipes with objective = \"distill\"; this one has {0:?}")]
    NothingToTeach(&'static str),
    /// The teacher cannot teach this model.
    #[error(transparent)]
    Teacher(#[from] TeacherError),
    /// The model and the recipe do not fit this machine.
    #[error(transparent)]
    DoesNotFit(#[from] DoesNotFit),
    /// The model's config is broken or asks for something unsupported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data could not be encoded.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The device cannot be used, or computes wrong.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Training was interrupted and can go on.
    #[error("stopped after {done} of {total} steps; the same command goes on from there")]
    Interrupted {
        /// Steps done.
        done: u64,
        /// Steps in all.
        total: u64,
    },
    /// Evaluation failed.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Signals cannot be caught, or the result cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl OfflineError {
    /// The process's exit status.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Interrupted { .. } | Self::Evaluate(EvaluateError::Cancelled) => {
                crate::interrupt::EXIT_INTERRUPTED
            }
            _ => 1,
        }
    }
}

/// Reads all records of a file, each with its line.
fn read_file(path: &Path, format: Format) -> Result<Vec<(u64, Record)>, OfflineError> {
    let file = File::open(path).map_err(|source| OfflineError::Read {
        path: path.to_owned(),
        source,
    })?;
    let name = path.display().to_string();
    let records =
        read_records(BufReader::new(file), format, &name).collect::<Result<Vec<_>, _>>()?;
    if records.is_empty() {
        return Err(OfflineError::NoRecords(path.to_owned()));
    }
    Ok(records)
}

/// A report with the rewards of preferences beside it, by the names that TRL logs them under.
fn with_rewards(mut json: serde_json::Value, rewards: Option<Rewards>) -> serde_json::Value {
    if let Some(rewards) = rewards {
        json["rewards/accuracies"] = json_number(rewards.accuracies);
        json["rewards/margins"] = json_number(rewards.margins);
    }
    json
}

/// A number for JSON: not a number and infinity become null, as JSON has neither.
fn json_number(value: f64) -> serde_json::Value {
    serde_json::Number::from_f64(value).map_or(serde_json::Value::Null, serde_json::Value::Number)
}
