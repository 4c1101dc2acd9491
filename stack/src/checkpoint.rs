//! A Hugging Face checkpoint folder: config, weights in one file or many, and everything else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::{ConfigError, ModelConfig};
use crate::files::{is_safe_path, list_files};
use crate::json::{parse_strict, reason};
use crate::lineage::{CHECKSUMS_FILE, MANIFEST_FILE, SIGNATURE_FILE};
use crate::tensors::{TensorError, TensorFile, TensorInfo};

/// Weights in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The list of weight files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The tokenizer of a checkpoint's folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Longest index, in bytes.
const INDEX_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Most weight files; Hugging Face numbers them with five digits.
const SHARDS_MAX: usize = 1_000;
/// Endings of weights in other formats: beside folded weights they would be those of another model.
const OTHER_WEIGHTS: [&str; 9] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
];

/// A checkpoint folder that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The config is missing, malformed or of an unsupported model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A weight file is not a believable safetensors file.
    #[error(transparent)]
    Tensors(#[from] TensorError),
    /// There are no weights.
    #[error("{} has neither {WEIGHTS_FILE} nor {INDEX_FILE}", .0.display())]
    NoWeights(PathBuf),
    /// The index is malformed.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A weight file that the index names is missing.
    #[error("{} is missing; {INDEX_FILE} names it", .0.display())]
    MissingShard(PathBuf),
    /// The tensors are not those of the config.
    #[error("{}: {reason}", dir.display())]
    Weights {
        /// The folder.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// An open checkpoint folder whose weights are exactly those its config announces.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    weight_files: Vec<(String, TensorFile)>,
    places: HashMap<String, usize>,
    other_files: Vec<String>,
    left_out: Vec<String>,
}

impl Checkpoint {
    /// Opens a folder: config first, then the headers of all weight files; no weight is read.
    ///
    /// # Errors
    /// When the model is not supported, a file is missing or malformed, or names or shapes of the
    /// tensors are not exactly [`ModelConfig::weights`].
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let config = ModelConfig::load(dir)?;
        let at_dir = |source| CheckpointError::Io {
            path: dir.to_owned(),
            source,
        };
        let files = list_files(dir).map_err(at_dir)?;
        let has = |name: &str| {
            files
                .binary_search_by(|file| file.as_str().cmp(name))
                .is_ok()
        };
        let index = match (has(WEIGHTS_FILE), has(INDEX_FILE)) {
            // transformers prefers the single file; two sets of weights are a trap either way.
            (true, true) => {
                let reason = format!(
                    "has both {WEIGHTS_FILE} and {INDEX_FILE}; remove the one that is stale"
                );
                return Err(CheckpointError::Weights {
                    dir: dir.to_owned(),
                    reason,
                });
            }
            (true, false) => None,
            (false, true) => Some(read_index(&dir.join(INDEX_FILE))?),
            (false, false) => return Err(CheckpointError::NoWeights(dir.to_owned())),
        };
        let names: BTreeSet<String> = match &index {
            Some(index) => index.values().cloned().collect(),
            None => BTreeSet::from([WEIGHTS_FILE.to_owned()]),
        };
        let mut weight_files = Vec::new();
        for name in names {
            if !has(&name) {
                return Err(CheckpointError::MissingShard(dir.join(name)));
            }
            let file = TensorFile::open(&dir.join(&name))?;
            weight_files.push((name, file));
        }
        let places = place(&weight_files, index.as_ref(), &config).map_err(|reason| {
            CheckpointError::Weights {
                dir: dir.to_owned(),
                reason,
            }
        })?;
        let is_weights = |name: &String| weight_files.iter().any(|(file, _)| file == name);
        let ours = [MANIFEST_FILE, SIGNATURE_FILE, CHECKSUMS_FILE];
        let stale = |name: &String| {
            ours.contains(&name.as_str()) || OTHER_WEIGHTS.iter().any(|end| name.ends_with(end))
        };
        let (left_out, other_files) = files
            .into_iter()
            .filter(|name| !is_weights(name))
            .partition(stale);
        Ok(Self {
            dir: dir.to_owned(),
            config,
            weight_files,
            places,
            other_files,
            left_out,
        })
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's config.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Weight files with their names, in byte order of the names.
    #[must_use]
    pub fn weight_files(&self) -> &[(String, TensorFile)] {
        &self.weight_files
    }

    /// Files that are carried along byte for byte (config, index, tokenizer ...), relative to the folder.
    #[must_use]
    pub fn other_files(&self) -> &[String] {
        &self.other_files
    }

    /// Files that are no part of the checkpoint: weights in other formats, and an earlier manifest.
    #[must_use]
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// All files of the checkpoint, relative to the folder, in byte order.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = self
            .weight_files
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        files.extend(self.other_files.iter().cloned());
        files.sort();
        files
    }

    /// The tensor of that name and the file it is in.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&TensorFile, &TensorInfo)> {
        let (_, file) = self.weight_files.get(*self.places.get(name)?)?;
        Some((file, file.get(name)?))
    }

    /// One tensor in f32, row-major, with its shape.
    ///
    /// # Errors
    /// When there is no such tensor or its file cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), CheckpointError> {
        let (file, info) = self.named(name)?;
        Ok((info.shape.clone(), file.read_f32(info)?))
    }

    /// One tensor in f32, row-major, `count` numbers at a time and the rest.
    ///
    /// # Errors
    /// When there is no such tensor or its file cannot be read.
    pub fn read_pieces(
        &self,
        name: &str,
        count: usize,
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        let (file, info) = self.named(name)?;
        Ok(file.read_pieces(info, count, each)?)
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], CheckpointError> {
        Ok(&self.named(name)?.1.shape)
    }

    fn named(&self, name: &str) -> Result<(&TensorFile, &TensorInfo), CheckpointError> {
        self.get(name).ok_or_else(|| CheckpointError::Weights {
            dir: self.dir.clone(),
            reason: format!("there is no tensor {name:?}"),
        })
    }
}

/// The index's map from tensor to file.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let wrong = |reason: String| CheckpointError::Index {
        path: path.to_owned(),
        reason,
    };
    let at_path = |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    let bytes = fs::metadata(path).map_err(at_path)?.len();
    if bytes > INDEX_BYTES_MAX {
        return Err(wrong(format!(
            "{bytes} bytes; at most {INDEX_BYTES_MAX} are read"
        )));
    }
    let value =
        parse_strict(&fs::read(path).map_err(at_path)?).map_err(|error| wrong(reason(&error)))?;
    let Some(Value::Object(map)) = value.get("weight_map") else {
        return Err(wrong("there is no object `weight_map`".to_owned()));
    };
    let mut index = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|file| {
            is_safe_path(file) && !file.contains('/') && file.ends_with(".safetensors")
        });
        let file = file.ok_or_else(|| {
            let tensor: String = tensor.chars().take(128).collect();
            wrong(format!(
                "tensor {tensor:?} is not in a .safetensors file of this folder"
            ))
        })?;
        index.insert(tensor.clone(), file.to_owned());
    }
    let shards: BTreeSet<&String> = index.values().collect();
    if shards.is_empty() || shards.len() > SHARDS_MAX {
        return Err(wrong(format!(
            "it names {} weight files; 1 to {SHARDS_MAX} are read",
            shards.len()
        )));
    }
    Ok(index)
}

/// Finds every tensor's file; names, shapes and index must agree with the config exactly.
fn place(
    files: &[(String, TensorFile)],
    index: Option<&BTreeMap<String, String>>,
    config: &ModelConfig,
) -> Result<HashMap<String, usize>, String> {
    let mut places = HashMap::new();
    for (place, (file_name, file)) in files.iter().enumerate() {
        for tensor in file.tensors() {
            if index.is_some_and(|index| index.get(&tensor.name) != Some(file_name)) {
                return Err(format!(
                    "{INDEX_FILE} does not say that tensor {:?} is in {file_name}",
                    tensor.name
                ));
            }
            if places.insert(tensor.name.clone(), place).is_some() {
                return Err(format!("tensor {:?} is in two weight files", tensor.name));
            }
        }
    }
    if let Some(lost) =
        index.and_then(|index| index.keys().find(|name| !places.contains_key(*name)))
    {
        return Err(format!(
            "tensor {lost:?} is in {INDEX_FILE} but in no weight file"
        ));
    }
    let mut expected = BTreeSet::new();
    for (name, shape) in config.weights() {
        let file = places.get(&name).and_then(|place| files.get(*place));
        let Some(info) = file.and_then(|(_, file)| file.get(&name)) else {
            return Err(format!("tensor {name:?} is missing"));
        };
        if info.shape != shape {
            return Err(format!(
                "tensor {name:?} is {:?}, the config says {shape:?}",
                info.shape
            ));
        }
        expected.insert(name);
    }
    match places
        .keys()
        .filter(|name| !expected.contains(*name) && !config.is_redundant(name))
        .min()
    {
        Some(extra) => Err(format!(
            "tensor {extra:?} is no part of a {} model",
            config.family.model_type()
        )),
        None => Ok(places),
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
