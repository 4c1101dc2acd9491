//! Local checkpoints of a training run: everything needed to go on as if nothing had happened.
//!
//! One safetensors file, replaced by rename, so that there is always a whole one. It names what it
//! belongs to by a digest of recipe, examples, base and teacher, carried and initial factors: a
//! checkpoint of another task, or from before the recipe changed, is not taken up.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use cairn_stack::adapter::Pair;
use cairn_stack::digest::{Digest, DigestHasher};
use cairn_stack::recipe::Recipe;
use cairn_stack::tensors::{Dtype, TensorError, TensorFile, TensorSpec, write_tensors};

use super::adamw::{parameters, values, with_values};
use super::dpo::Rewards;
use super::trainer::{Step, Trainer};
use crate::data::Example;

/// The file's name.
const FILE: &str = "training.safetensors";
/// Raised when a checkpoint of an older program would not give the same result.
const VERSION: u64 = 1;

/// What a run has come to so far, for its report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Numbers {
    /// Tokens seen, padding left out.
    pub tokens: u64,
    /// Tokens that counted in the loss.
    pub scored_tokens: u64,
    /// Seconds of training, over all sittings.
    pub seconds: f64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// Rewards of the last step, where preferences are learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rewards: Option<Rewards>,
}

impl Numbers {
    /// Adds a step; `seconds` of training are over with it.
    pub(super) fn add(&mut self, step: &Step, seconds: f64) {
        if self.tokens == 0 {
            self.first_loss = step.loss;
        }
        self.last_loss = step.loss;
        self.last_rewards = step.rewards;
        self.tokens += step.tokens;
        self.scored_tokens += step.scored_tokens;
        self.seconds = seconds;
    }
}

/// Why a local checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file could not be written.
    #[error("write the local checkpoint {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is there and broken.
    #[error("read the local checkpoint: {0}; delete it to start afresh")]
    Read(#[from] TensorError),
    /// The file is sound, but its content is not what this program wrote.
    #[error("the local checkpoint {} is damaged ({what}); delete it to start afresh", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// What a checkpoint must have been made from; the models are the base and, where there is one, the
/// teacher.
#[must_use]
pub fn key(
    recipe: &Recipe,
    examples: &[Example],
    models: [Option<&Digest>; 2],
    carried: &[Pair],
    initial: &[Pair],
) -> Digest {
    let mut hasher = DigestHasher::new();
    let mut text = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    text("cairn training checkpoint");
    text(&VERSION.to_string());
    text(&recipe.to_toml());
    for digest in models.into_iter().flatten() {
        text(&digest.to_string());
    }
    for example in examples {
        hasher.update(&(example.tokens.len() as u64).to_le_bytes());
        for (token, scored) in example.tokens.iter().zip(&example.scored) {
            hasher.update(&(u64::from(*token) << 1 | u64::from(*scored)).to_le_bytes());
        }
    }
    if !carried.is_empty() {
        hasher.update(b"carried");
    }
    for pair in carried.iter().chain(initial) {
        hasher.update(pair.module.as_bytes());
        for value in pair.a.iter().chain(&pair.b) {
            hasher.update(&value.to_le_bytes());
        }
    }
    hasher.finish().0
}

/// Writes the trainer's state, whole or not at all.
///
/// # Errors
/// [`CheckpointError::Write`], and the checkpoint before this one is still there.
pub fn save(
    dir: &Path,
    key: &Digest,
    trainer: &Trainer<'_>,
    numbers: &Numbers,
) -> Result<(), CheckpointError> {
    let write = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let partial = dir.join(format!("{FILE}.partial"));
        let mut out = BufWriter::new(File::create(&partial)?);
        write_state(&mut out, key, trainer, numbers)?;
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()?;
        fs::rename(&partial, dir.join(FILE))?;
        sync_dir(dir)
    };
    write().map_err(|source| CheckpointError::Write {
        path: dir.join(FILE),
        source,
    })
}

fn write_state(
    out: &mut impl Write,
    key: &Digest,
    trainer: &Trainer<'_>,
    numbers: &Numbers,
) -> io::Result<()> {
    let key = key.to_string();
    let steps = trainer.steps.to_string();
    let numbers = serde_json::to_string(numbers)?;
    let metadata = [
        ("key", key.as_str()),
        ("steps", steps.as_str()),
        ("numbers", numbers.as_str()),
    ];
    let tensors: Vec<_> = parameters(&trainer.adapter)
        .into_iter()
        .zip(&trainer.moments)
        .flat_map(|(factor, moments)| [factor, moments.first.clone(), moments.second.clone()])
        .collect();
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .enumerate()
        .map(|(number, tensor)| TensorSpec {
            name: name(number),
            dtype: Dtype::F32,
            shape: tensor.dims().to_vec(),
        })
        .collect();
    write_tensors(out, &metadata, &specs, |number| {
        let mut bytes = Vec::new();
        Dtype::F32.encode(&values(&tensors[number]), &mut bytes);
        Ok::<_, io::Error>(bytes)
    })
}

/// Puts the trainer where the checkpoint was. `None` when there is none, or it belongs to
/// something else; the trainer is as before then.
///
/// # Errors
/// When there is one that belongs here and it cannot be read: going on from the start without a
/// word would waste what it holds.
pub fn resume(
    dir: &Path,
    key: &Digest,
    trainer: &mut Trainer<'_>,
) -> Result<Option<Numbers>, CheckpointError> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let file = TensorFile::open(&path)?;
    let metadata = |name: &str| {
        file.metadata()
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    };
    if metadata("key") != Some(key.to_string().as_str()) {
        return Ok(None);
    }
    let damaged = |what| CheckpointError::Damaged {
        path: path.clone(),
        what,
    };
    let steps: u64 = metadata("steps")
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| damaged("steps"))?;
    let numbers: Numbers = metadata("numbers")
        .and_then(|text| serde_json::from_str(text).ok())
        .ok_or_else(|| damaged("numbers"))?;
    let mut restored = Vec::new();
    for (number, like) in parameters(&trainer.adapter).iter().enumerate() {
        for part in 0..3 {
            let name = name(3 * number + part);
            let info = file
                .get(&name)
                .ok_or_else(|| damaged("a tensor is missing"))?;
            let tensor = with_values(like, file.read_f32(info)?);
            restored.push(tensor.ok_or_else(|| damaged("a tensor has another shape"))?);
        }
    }
    let mut restored = restored.into_iter();
    let slots = trainer
        .adapter
        .factors_mut()
        .flat_map(|pair| [&mut pair.a, &mut pair.b]);
    for (slot, moments) in slots.zip(&mut trainer.moments) {
        if let (Some(factor), Some(first), Some(second)) =
            (restored.next(), restored.next(), restored.next())
        {
            *slot = factor;
            moments.first = first;
            moments.second = second;
        }
    }
    trainer.steps = steps;
    Ok(Some(numbers))
}

/// Deletes the checkpoint once its adapter is written. A failure leaves a file behind and nothing
/// else, so it is no error.
pub fn discard(dir: &Path) {
    let _ = fs::remove_file(dir.join(FILE));
    let _ = fs::remove_dir(dir);
}

fn name(number: usize) -> String {
    format!("state.{number}")
}

#[cfg(unix)]
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(not(unix))]
fn sync_dir(_: &Path) -> io::Result<()> {
    Ok(())
}
