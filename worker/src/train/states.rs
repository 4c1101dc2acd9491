//! Training states: what a worker commits to, and opens when it is asked to.
//!
//! A training of `total` optimiser steps is cut into segments; boundary `k` of `n` is after step
//! `floor(k * total / n)`. The state at a boundary is two safetensors files: the factors, exactly as
//! the adapter itself is written, and the optimiser's moments. A Merkle tree over them is the
//! [`Commitment`]; together with examples, recipe and base one state decides the next, so that a
//! segment can be trained again by anybody who is given its start.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use cairn_proto::signing::state_leaf;
use cairn_proto::v1;
use cairn_stack::adapter::{AdapterError, AdapterWriteConfig, Pair, WEIGHTS_FILE, write_adapter};
use cairn_stack::config::ModelConfig;
use cairn_stack::digest::Digest;
use cairn_stack::merkle::{Hash, inclusion_proof, leaf_hash, root};
use cairn_stack::peft::{Factor, tensor_name};
use cairn_stack::tensors::{
    Dtype, TensorError, TensorErrorKind, TensorFile, TensorSpec, write_tensors,
};

use super::adamw::{values, with_values};
use super::trainer::Trainer;

/// File of the moments, beside [`WEIGHTS_FILE`], in a state's folder.
pub const MOMENTS_FILE: &str = "moments.safetensors";
/// Parts of a parameter's moments, as they end in a tensor's name.
const PARTS: [&str; 2] = ["first", "second"];

/// The states a run keeps.
#[derive(Debug, Clone)]
pub struct States {
    /// A folder of this run's own; a state lies in a folder of it, named by its step.
    pub dir: PathBuf,
    /// Segments to cut the run into; fewer where it has fewer steps.
    pub segments: u32,
}

/// A file by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// BLAKE3.
    pub digest: Digest,
    /// Length in bytes.
    pub bytes: u64,
}

impl Content {
    /// Of a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(path: &Path) -> io::Result<Self> {
        let (digest, bytes) = Digest::of_file(path)?;
        Ok(Self { digest, bytes })
    }

    fn to_wire(self) -> v1::BlobRef {
        v1::BlobRef {
            digest: self.digest.to_string(),
            size_bytes: self.bytes,
        }
    }
}

/// One state, by the digests of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The optimiser step it was taken after; 0 before the first.
    pub step: u32,
    /// The factors' file.
    pub factors: Content,
    /// The moments' file.
    pub moments: Content,
}

impl State {
    /// Its hash in the tree.
    #[must_use]
    pub fn leaf(&self) -> Hash {
        let (factors, moments) = (self.factors.digest, self.moments.digest);
        leaf_hash(&state_leaf(self.step, factors, moments))
    }
}

/// The states of a whole training and the tree over them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commitment {
    /// The tree's root.
    pub root: Hash,
    /// The states, first to last.
    pub states: Vec<State>,
}

impl Commitment {
    /// Over these states, in their order.
    #[must_use]
    pub fn over(states: Vec<State>) -> Self {
        let leaves: Vec<Hash> = states.iter().map(State::leaf).collect();
        Self {
            root: root(&leaves),
            states,
        }
    }

    /// State `leaf` with the proof that it is one of these; nothing when there is no such leaf.
    #[must_use]
    pub fn revealed(&self, leaf: usize) -> Option<v1::RevealedState> {
        let leaves: Vec<Hash> = self.states.iter().map(State::leaf).collect();
        let state = self.states.get(leaf)?;
        let proof = inclusion_proof(&leaves, leaf as u64)?;
        Some(v1::RevealedState {
            step: state.step,
            factors: Some(state.factors.to_wire()),
            moments: Some(state.moments.to_wire()),
            proof: proof.into_iter().map(Vec::from).collect(),
        })
    }

    /// As it is handed in: the root, how many leaves, and the last of them.
    #[must_use]
    pub fn to_wire(&self) -> v1::TrainCommitment {
        v1::TrainCommitment {
            root: self.root.to_vec(),
            leaves: u32::try_from(self.states.len()).unwrap_or(u32::MAX),
            last: self.revealed(self.states.len().wrapping_sub(1)),
        }
    }
}

/// A state that cannot be kept, or not be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system said no.
    #[error("training state {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The factors cannot be written.
    #[error("training state: {0}")]
    Write(#[from] AdapterError),
    /// A file is no sound safetensors file.
    #[error("training state: {0}")]
    Read(#[from] TensorError),
    /// A file holds other tensors than those of this training.
    #[error("training state {}: {what}", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
}

impl StateError {
    /// Whether the files themselves are at fault, and not the machine that reads them.
    #[must_use]
    pub fn is_content(&self) -> bool {
        match self {
            Self::Layout { .. } => true,
            Self::Read(error) => !matches!(error.kind, TensorErrorKind::Io(_)),
            Self::Io { .. } | Self::Write(_) => false,
        }
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// Steps after which a training of `total` steps has a state: the first is 0, the last `total`, each
/// once.
#[must_use]
pub fn boundaries(total: u64, segments: u32) -> Vec<u64> {
    let segments = u64::from(segments.max(1));
    let after = |k: u64| u128::from(k) * u128::from(total) / u128::from(segments);
    let mut steps: Vec<u64> = (0..=segments)
        .map(|k| u64::try_from(after(k)).unwrap_or(total))
        .collect();
    steps.dedup();
    steps
}

/// The folder of the state after `step` in a folder of states.
#[must_use]
pub fn state_dir(states: &Path, step: u32) -> PathBuf {
    states.join(step.to_string())
}

/// Writes the trainer's state into a folder: the factors as an adapter, and the moments.
///
/// # Errors
/// When it cannot be written.
pub fn write_state(
    dir: &Path,
    trainer: &Trainer<'_>,
    model: &ModelConfig,
    config: &AdapterWriteConfig,
) -> Result<State, StateError> {
    let pairs = trainer.adapter.to_pairs(model);
    write_adapter(dir, &pairs, config)?;
    let moments = dir.join(MOMENTS_FILE);
    write_moments(&moments, trainer, &pairs).map_err(StateError::io(&moments))?;
    let content = |path: &Path| Content::of(path).map_err(StateError::io(path));
    Ok(State {
        step: u32::try_from(trainer.steps).unwrap_or(u32::MAX),
        factors: content(&dir.join(WEIGHTS_FILE))?,
        moments: content(&moments)?,
    })
}

/// The moments by name, modules in byte order, A before B, first before second.
fn write_moments(path: &Path, trainer: &Trainer<'_>, pairs: &[Pair]) -> io::Result<()> {
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by(|x, y| pairs[*x].module.cmp(&pairs[*y].module));
    let mut specs = Vec::new();
    let mut tensors = Vec::new();
    for pair in order {
        for (place, factor) in [Factor::A, Factor::B].into_iter().enumerate() {
            let moments = &trainer.moments[2 * pair + place];
            let parts = [&moments.first, &moments.second];
            for (tensor, part) in parts.into_iter().zip(PARTS) {
                specs.push(TensorSpec {
                    name: moment_name(&pairs[pair].module, factor, part),
                    dtype: Dtype::F32,
                    shape: tensor.dims().to_vec(),
                });
                tensors.push(tensor);
            }
        }
    }
    let partial = path.with_extension("partial");
    let mut out = BufWriter::new(File::create(&partial)?);
    write_tensors(&mut out, &[("format", "pt")], &specs, |number| {
        let mut bytes = Vec::new();
        Dtype::F32.encode(&values(tensors[number]), &mut bytes);
        Ok::<_, io::Error>(bytes)
    })?;
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()?;
    fs::rename(&partial, path)
}

fn moment_name(module: &str, factor: Factor, part: &str) -> String {
    format!("{}.{part}", tensor_name(module, factor))
}

/// Reads a file of factors that has exactly the pairs `like`, in F32: what they are multiplied with
/// is taken from `like`, not from the file.
///
/// # Errors
/// [`StateError::Layout`] when the tensors are others, before any of them is read.
pub fn read_factors(path: &Path, like: &[Pair]) -> Result<Vec<Pair>, StateError> {
    let file = TensorFile::open(path)?;
    let names = like.iter().flat_map(|pair| {
        [
            (
                tensor_name(&pair.module, Factor::A),
                [pair.rank, pair.in_features],
            ),
            (
                tensor_name(&pair.module, Factor::B),
                [pair.out_features, pair.rank],
            ),
        ]
    });
    let mut tensors = read_exactly(&file, names.collect())?.into_iter();
    let mut pairs = Vec::with_capacity(like.len());
    for pair in like {
        if let (Some(a), Some(b)) = (tensors.next(), tensors.next()) {
            let module = pair.module.clone();
            pairs.push(Pair {
                module,
                a,
                b,
                ..*pair
            });
        }
    }
    Ok(pairs)
}

/// All tensors of a file by name and shape; it may hold no others.
fn read_exactly(
    file: &TensorFile,
    wanted: Vec<(String, [usize; 2])>,
) -> Result<Vec<Vec<f32>>, StateError> {
    let layout = |what: String| StateError::Layout {
        path: file.path().to_owned(),
        what,
    };
    if file.tensors().len() != wanted.len() {
        let (has, wants) = (file.tensors().len(), wanted.len());
        return Err(layout(format!("it has {has} tensors instead of {wants}")));
    }
    let mut infos = Vec::with_capacity(wanted.len());
    for (name, shape) in wanted {
        let info = file
            .get(&name)
            .ok_or_else(|| layout(format!("tensor {name:?} is missing")))?;
        if info.dtype != Dtype::F32 || info.shape != shape {
            let (dtype, has) = (info.dtype, &info.shape);
            return Err(layout(format!(
                "tensor {name:?} is {dtype} {has:?}, not F32 {shape:?}"
            )));
        }
        infos.push(info);
    }
    let read = |info: &&_| Ok(file.read_f32(info)?);
    infos.iter().map(read).collect()
}

/// Puts a trainer where a state was taken.
///
/// # Errors
/// When a file cannot be read or is of another training; the trainer is as before then.
pub fn restore(
    trainer: &mut Trainer<'_>,
    model: &ModelConfig,
    factors: &Path,
    moments: &Path,
    step: u64,
) -> Result<(), StateError> {
    let like = trainer.adapter.to_pairs(model);
    let pairs = read_factors(factors, &like)?;
    let file = TensorFile::open(moments)?;
    let mut names = Vec::new();
    for pair in &like {
        for (factor, shape) in [
            (Factor::A, [pair.rank, pair.in_features]),
            (Factor::B, [pair.out_features, pair.rank]),
        ] {
            names.extend(PARTS.map(|part| (moment_name(&pair.module, factor, part), shape)));
        }
    }
    let mut moments = read_exactly(&file, names)?.into_iter();
    for (slot, pair) in trainer.adapter.factors_mut().zip(pairs) {
        // Shapes were compared above, so every one of these is some.
        slot.a = with_values(&slot.a, pair.a).unwrap_or_else(|| slot.a.clone());
        slot.b = with_values(&slot.b, pair.b).unwrap_or_else(|| slot.b.clone());
    }
    for slot in &mut trainer.moments {
        for part in [&mut slot.first, &mut slot.second] {
            let restored = moments.next().and_then(|values| with_values(part, values));
            *part = restored.unwrap_or_else(|| part.clone());
        }
    }
    trainer.steps = step;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boundaries_start_at_nothing_and_end_at_all_each_once() {
        assert_eq!(boundaries(10, 4), [0, 2, 5, 7, 10]);
        assert_eq!(boundaries(3, 10), [0, 1, 2, 3]);
        assert_eq!(boundaries(7, 1), [0, 7]);
        assert_eq!(boundaries(7, 0), [0, 7]);
        assert_eq!(boundaries(0, 3), [0]);
        assert_eq!(boundaries(u64::MAX, 2), [0, u64::MAX / 2, u64::MAX]);
    }

    #[test]
    fn every_leaf_is_proven_and_none_beyond() {
        let content = |byte: u8| Content {
            digest: Digest::of(&[byte]),
            bytes: 1,
        };
        let state = |step: u32| State {
            step,
            factors: content(step as u8),
            moments: content(100 + step as u8),
        };
        let commitment = Commitment::over((0..6).map(state).collect());
        for leaf in 0..6 {
            let revealed = commitment.revealed(leaf).unwrap();
            let proof: Vec<Hash> = revealed
                .proof
                .iter()
                .map(|node| node.as_slice().try_into().unwrap())
                .collect();
            let hash = commitment.states[leaf].leaf();
            let holds = |index: u64| {
                cairn_stack::merkle::verify_inclusion(&hash, index, 6, &proof, &commitment.root)
            };
            assert!(holds(leaf as u64) && !holds((leaf as u64 + 1) % 6));
        }
        assert!(commitment.revealed(6).is_none());
        let wire = commitment.to_wire();
        assert_eq!((wire.leaves, wire.last.unwrap().step), (6, 5));
        assert!(Commitment::over(Vec::new()).to_wire().last.is_none());
    }
}
