//! LoRA adapters in PEFT's file format, read pair by pair so that memory is bounded by one module.
//!
//! For each adapted linear layer `W` of shape `[out, in]` a pair adds `scale * B * A`, with
//! `A: [rank, in]` and `B: [out, rank]`.

mod write;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::config::{ModelConfig, Target};
use crate::peft::{
    CONFIG_BYTES_MAX, Factor, PeftConfig, PeftConfigError, Scales, split_tensor_name, tensor_name,
};
use crate::recipe::Recipe;
use crate::tensors::{HEADER_BYTES_MAX, TensorError, TensorFile, TensorInfo};

pub use crate::check::{AdapterReject, Checked, RejectCode, check_adapter};
pub use write::{AdapterWriteConfig, PairShape, write_adapter, write_adapter_streamed};

/// The config's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Header bytes one tensor takes besides its name: shape, offsets, punctuation, with room to spare.
const HEADER_BYTES_PER_TENSOR: u64 = 160;

/// The adapter a recipe asks for on a model: what a worker must send and what the coordinator accepts.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSpec {
    /// Rank of every pair.
    pub rank: usize,
    /// Alpha, as the config must say it.
    pub alpha: f64,
    /// Whether the config must say rsLoRA.
    pub use_rslora: bool,
    /// What B·A is multiplied with.
    pub scale: f64,
    /// Adapted linear layers.
    pub targets: Vec<Target>,
    /// Every pair, layer by layer, targets in their order.
    pub pairs: Vec<PairSpec>,
}

/// One pair of an [`AdapterSpec`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairSpec {
    /// Module path, `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Input features: columns of A.
    pub in_features: usize,
    /// Output features: rows of B.
    pub out_features: usize,
}

impl AdapterSpec {
    /// The adapter of `recipe` on `config`: its targets on every layer.
    #[must_use]
    pub fn new(config: &ModelConfig, recipe: &Recipe) -> Self {
        let places = (0..config.layers).flat_map(|layer| {
            recipe
                .target_modules
                .iter()
                .map(move |target| (layer, *target))
        });
        let pairs = places.map(|(layer, target)| {
            let (in_features, out_features) = config.linear(target);
            PairSpec {
                module: config.module(layer, target),
                in_features,
                out_features,
            }
        });
        Self {
            rank: recipe.rank as usize,
            alpha: recipe.alpha,
            use_rslora: recipe.use_rslora,
            scale: recipe.scale(),
            targets: recipe.target_modules.clone(),
            pairs: pairs.collect(),
        }
    }

    /// Longest weight file that can hold this adapter in f32, in bytes.
    #[must_use]
    pub fn file_bytes_max(&self) -> u64 {
        let elements =
            |pair: &PairSpec| (pair.in_features as u64).saturating_add(pair.out_features as u64);
        let data = self
            .pairs
            .iter()
            .map(|pair| elements(pair).saturating_mul(4 * self.rank as u64));
        data.fold(
            self.header_bytes_max().saturating_add(8),
            u64::saturating_add,
        )
    }

    /// Longest header that such a file has reason to have, in bytes.
    pub(crate) fn header_bytes_max(&self) -> u64 {
        let tensor = |pair: &PairSpec| {
            HEADER_BYTES_PER_TENSOR + tensor_name(&pair.module, Factor::A).len() as u64
        };
        let tensors: u64 = self.pairs.iter().map(|pair| 2 * tensor(pair)).sum();
        (tensors + 4096).min(HEADER_BYTES_MAX)
    }
}

/// The two factors of one module, in f32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Module path.
    pub module: String,
    /// Rank.
    pub rank: usize,
    /// Columns of A.
    pub in_features: usize,
    /// Rows of B.
    pub out_features: usize,
    /// `[rank, in_features]`.
    pub a: Vec<f32>,
    /// `[out_features, rank]`.
    pub b: Vec<f32>,
    /// What B·A is multiplied with.
    pub scale: f64,
}

/// One pair of an [`AdapterFile`]: what is known without reading its factors.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleInfo {
    /// Module path.
    pub module: String,
    /// Rank.
    pub rank: usize,
    /// Columns of A.
    pub in_features: usize,
    /// Rows of B.
    pub out_features: usize,
    /// What B·A is multiplied with.
    pub scale: f64,
    a: TensorInfo,
    b: TensorInfo,
}

/// An adapter that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The config is malformed or asks for more than plain LoRA.
    #[error("{}: {source}", path.display())]
    Config {
        /// The config's file.
        path: PathBuf,
        /// What is wrong.
        source: PeftConfigError,
    },
    /// The weights are not a believable safetensors file.
    #[error(transparent)]
    Tensors(#[from] TensorError),
    /// The tensors are not the pairs the config announces.
    #[error("{}: {source}", path.display())]
    Layout {
        /// The weights' file.
        path: PathBuf,
        /// What is wrong.
        source: LayoutError,
    },
    /// Two adapters disagree about a module.
    #[error("module {module} is {first} in one adapter and {second} in another")]
    Mismatch {
        /// The module.
        module: String,
        /// One `[out, in]`.
        first: String,
        /// The other.
        second: String,
    },
    /// Factors that are to be written do not have the lengths their shape asks for.
    #[error(
        "module {module}: the factors do not fit rank {rank}, {in_features} in and {out_features} out"
    )]
    Factors {
        /// The module.
        module: String,
        /// Announced rank.
        rank: usize,
        /// Announced input features.
        in_features: usize,
        /// Announced output features.
        out_features: usize,
    },
    /// There is nothing to write or combine.
    #[error("the adapter has no module")]
    Empty,
    /// A weight that is not a finite number.
    #[error("the weight {0} is not a finite number")]
    Weight(f64),
}

/// How the tensors of a file differ from pairs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A tensor is missing, or one is there that no pair has.
    #[error("{0}")]
    Names(String),
    /// A tensor has another shape than its pair.
    #[error("{0}")]
    Shape(String),
    /// A tensor has another dtype than allowed here.
    #[error("{0}")]
    Dtype(String),
}

/// A PEFT adapter on disk.
#[derive(Debug)]
pub struct AdapterFile {
    config: PeftConfig,
    tensors: TensorFile,
    modules: Vec<ModuleInfo>,
}

impl AdapterFile {
    /// Opens a folder with `adapter_config.json` and `adapter_model.safetensors`. Factors may be
    /// F32, F16 or BF16.
    ///
    /// # Errors
    /// When a file is missing or malformed, the config asks for more than plain LoRA, or tensors and
    /// config disagree.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let config_path = dir.join(CONFIG_FILE);
        let json = read_config(&config_path).map_err(|source| AdapterError::Io {
            path: config_path.clone(),
            source,
        })?;
        Self::open_parts(&dir.join(WEIGHTS_FILE), &json)
    }

    /// As [`Self::open`], from a weight file anywhere and the config's bytes.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_parts(weights: &Path, config_json: &[u8]) -> Result<Self, AdapterError> {
        let config = PeftConfig::from_json(config_json);
        let config = config.map_err(|source| AdapterError::Config {
            path: beside(weights),
            source,
        })?;
        Self::of_tensors(TensorFile::open(weights)?, config)
    }

    /// Pairs the tensors of an open file up.
    pub(crate) fn of_tensors(
        tensors: TensorFile,
        config: PeftConfig,
    ) -> Result<Self, AdapterError> {
        let scales = Scales::new(&config).map_err(|source| AdapterError::Config {
            path: beside(tensors.path()),
            source,
        })?;
        let modules = pair_up(&tensors, &scales).map_err(|source| AdapterError::Layout {
            path: tensors.path().to_owned(),
            source,
        })?;
        drop(scales);
        Ok(Self {
            config,
            tensors,
            modules,
        })
    }

    /// Closes the weight file; each [`Self::pair`] opens it again. For folds of more adapters than
    /// files may be open at once. The file must stay where it is and as it is.
    #[must_use]
    pub fn closed(self) -> Self {
        Self {
            tensors: self.tensors.closed(),
            ..self
        }
    }

    /// The pairs, ordered by module path (byte order).
    #[must_use]
    pub fn modules(&self) -> &[ModuleInfo] {
        &self.modules
    }

    /// The adapter's config.
    #[must_use]
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// Where a module is in [`Self::modules`].
    #[must_use]
    pub fn find(&self, module: &str) -> Option<usize> {
        self.modules
            .binary_search_by(|info| info.module.as_str().cmp(module))
            .ok()
    }

    /// Reads the factors of one pair. Allocates what they take in f32.
    ///
    /// # Errors
    /// When the file cannot be read, or `index` is none of [`Self::modules`].
    pub fn pair(&self, index: usize) -> Result<Pair, AdapterError> {
        let info = self.modules.get(index).ok_or_else(|| AdapterError::Io {
            path: self.tensors.path().to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "no such pair"),
        })?;
        Ok(Pair {
            module: info.module.clone(),
            rank: info.rank,
            in_features: info.in_features,
            out_features: info.out_features,
            a: self.tensors.read_f32(&info.a)?,
            b: self.tensors.read_f32(&info.b)?,
            scale: info.scale,
        })
    }

    /// Reads the factors of all pairs, in the order of [`Self::modules`].
    ///
    /// # Errors
    /// As [`Self::pair`].
    pub fn pairs(&self) -> Result<Vec<Pair>, AdapterError> {
        (0..self.modules.len())
            .map(|index| self.pair(index))
            .collect()
    }
}

fn read_config(path: &Path) -> io::Result<Vec<u8>> {
    // One byte over the limit is enough to be told that it is too long.
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    io::Read::read_to_end(
        &mut io::Read::take(file, CONFIG_BYTES_MAX as u64 + 1),
        &mut bytes,
    )?;
    Ok(bytes)
}

fn beside(weights: &Path) -> PathBuf {
    weights.with_file_name(CONFIG_FILE)
}

/// Every tensor is a factor, every module has both, and shapes agree with each other and the config.
fn pair_up(tensors: &TensorFile, scales: &Scales<'_>) -> Result<Vec<ModuleInfo>, LayoutError> {
    let mut factors: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for tensor in tensors.tensors() {
        let (module, factor) = split_tensor_name(&tensor.name).ok_or_else(|| {
            LayoutError::Names(format!(
                "tensor {:?} is no LoRA factor of a linear layer",
                tensor.name
            ))
        })?;
        let slot = usize::from(factor == Factor::B);
        factors.entry(module).or_default()[slot] = Some(tensor);
    }
    if factors.is_empty() {
        return Err(LayoutError::Names("the file has no tensor".to_owned()));
    }
    factors
        .into_iter()
        .map(|(module, factors)| match factors {
            [Some(a), Some(b)] => pair_info(module, a, b, scales.of(module)),
            [None, _] => Err(LayoutError::Names(format!(
                "tensor {:?} is missing",
                tensor_name(module, Factor::A)
            ))),
            [_, None] => Err(LayoutError::Names(format!(
                "tensor {:?} is missing",
                tensor_name(module, Factor::B)
            ))),
        })
        .collect()
}

fn pair_info(
    module: &str,
    a: &TensorInfo,
    b: &TensorInfo,
    (rank, scale): (usize, f64),
) -> Result<ModuleInfo, LayoutError> {
    let (&[a_rows, in_features], &[out_features, b_columns]) = (&a.shape[..], &b.shape[..]) else {
        return Err(LayoutError::Shape(format!(
            "module {module}: A is {:?} and B is {:?}; both are matrices",
            a.shape, b.shape
        )));
    };
    if a_rows != rank || b_columns != rank {
        return Err(LayoutError::Shape(format!(
            "module {module}: A is {:?} and B is {:?}, but the config says rank {rank}",
            a.shape, b.shape
        )));
    }
    let module = module.to_owned();
    Ok(ModuleInfo {
        module,
        rank,
        in_features,
        out_features,
        scale,
        a: a.clone(),
        b: b.clone(),
    })
}

#[cfg(test)]
#[path = "adapter/tests.rs"]
mod tests;
