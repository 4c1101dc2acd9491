//! Writing adapters: the same bytes for the same factors, and both files whole or absent.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::{AdapterError, CONFIG_FILE, Pair, WEIGHTS_FILE};
use crate::peft::{Factor, PeftConfig, TargetModules, tensor_name};
use crate::recipe::{Recipe, lora_scale};
use crate::tensors::{Dtype, TensorSpec, write_tensors};

/// What an adapter's config says besides what its factors say.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterWriteConfig {
    /// Rank of modules that have no other.
    pub rank: usize,
    /// Alpha of modules that have no other scale.
    pub alpha: f64,
    /// The scale is `alpha / sqrt(rank)`.
    pub use_rslora: bool,
    /// Names of the adapted modules; last parts of the paths when empty.
    pub target_modules: Vec<String>,
    /// The base model's name.
    pub base_model: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
}

impl AdapterWriteConfig {
    /// What a recipe's adapter says.
    #[must_use]
    pub fn of_recipe(recipe: &Recipe, base_model: Option<&str>, revision: Option<&str>) -> Self {
        Self {
            rank: recipe.rank as usize,
            alpha: recipe.alpha,
            use_rslora: recipe.use_rslora,
            target_modules: recipe
                .target_modules
                .iter()
                .map(ToString::to_string)
                .collect(),
            base_model: base_model.map(str::to_owned),
            revision: revision.map(str::to_owned),
        }
    }
}

/// Shape and scale of a pair that will be written.
#[derive(Debug, Clone, PartialEq)]
pub struct PairShape {
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
}

impl From<&Pair> for PairShape {
    fn from(pair: &Pair) -> Self {
        Self {
            module: pair.module.clone(),
            rank: pair.rank,
            in_features: pair.in_features,
            out_features: pair.out_features,
            scale: pair.scale,
        }
    }
}

/// Writes `adapter_model.safetensors` (F32) and `adapter_config.json` into `dir`, which is made
/// when absent. Ranks and scales that differ from the config become patterns. The bytes depend on
/// the arguments only, not on the order of `pairs`.
///
/// # Errors
/// When there is no pair, factors have the wrong length, or the folder cannot be written.
pub fn write_adapter(
    dir: &Path,
    pairs: &[Pair],
    config: &AdapterWriteConfig,
) -> Result<(), AdapterError> {
    let shapes: Vec<PairShape> = pairs.iter().map(PairShape::from).collect();
    write_adapter_streamed(dir, &shapes, config, |index| Ok(pairs[index].clone()))
}

/// As [`write_adapter`], with factors made on demand: `pair(i)` is asked once for each of `shapes`,
/// so that memory is bounded by one pair.
///
/// # Errors
/// As [`write_adapter`], and whatever `pair` answers.
pub fn write_adapter_streamed(
    dir: &Path,
    shapes: &[PairShape],
    config: &AdapterWriteConfig,
    mut pair: impl FnMut(usize) -> Result<Pair, AdapterError>,
) -> Result<(), AdapterError> {
    if shapes.is_empty() {
        return Err(AdapterError::Empty);
    }
    let mut order: Vec<usize> = (0..shapes.len()).collect();
    order.sort_by(|x, y| shapes[*x].module.cmp(&shapes[*y].module));
    let specs: Vec<TensorSpec> = order
        .iter()
        .flat_map(|index| tensor_specs(&shapes[*index]))
        .collect();
    fs::create_dir_all(dir).map_err(|source| AdapterError::Io {
        path: dir.to_owned(),
        source,
    })?;

    let mut b = Vec::new();
    write_whole(&dir.join(WEIGHTS_FILE), |out| {
        write_tensors(
            out,
            &[("format", "pt")],
            &specs,
            |tensor| -> Result<Vec<u8>, WriteError> {
                let mut bytes = Vec::new();
                // Factors come in twos, A first; B waits for its turn.
                if tensor.is_multiple_of(2) {
                    let index = order[tensor / 2];
                    let pair = checked(pair(index)?, &shapes[index])?;
                    Dtype::F32.encode(&pair.a, &mut bytes);
                    b = pair.b;
                } else {
                    Dtype::F32.encode(&std::mem::take(&mut b), &mut bytes);
                }
                Ok(bytes)
            },
        )
    })?;
    // The config last: a folder with a config is a whole adapter.
    let json = peft_config(shapes, &order, config).to_json();
    write_whole(&dir.join(CONFIG_FILE), |out| {
        Ok(out.write_all(json.as_bytes())?)
    })
}

fn tensor_specs(shape: &PairShape) -> [TensorSpec; 2] {
    let spec = |factor, shape_of: Vec<usize>| TensorSpec {
        name: tensor_name(&shape.module, factor),
        dtype: Dtype::F32,
        shape: shape_of,
    };
    [
        spec(Factor::A, vec![shape.rank, shape.in_features]),
        spec(Factor::B, vec![shape.out_features, shape.rank]),
    ]
}

fn checked(pair: Pair, shape: &PairShape) -> Result<Pair, AdapterError> {
    let fits = pair.rank.checked_mul(pair.in_features) == Some(pair.a.len())
        && pair.rank.checked_mul(pair.out_features) == Some(pair.b.len());
    if fits && PairShape::from(&pair) == *shape {
        return Ok(pair);
    }
    let PairShape {
        module,
        rank,
        in_features,
        out_features,
        ..
    } = shape.clone();
    Err(AdapterError::Factors {
        module,
        rank,
        in_features,
        out_features,
    })
}

/// The config, with a pattern for each module that differs from it.
fn peft_config(shapes: &[PairShape], order: &[usize], config: &AdapterWriteConfig) -> PeftConfig {
    let mut rank_pattern = Vec::new();
    let mut alpha_pattern = Vec::new();
    for shape in order.iter().map(|index| &shapes[*index]) {
        if shape.rank != config.rank {
            rank_pattern.push((regex::escape(&shape.module), shape.rank));
        }
        #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
        let rank = shape.rank as f64;
        let scale = lora_scale(config.alpha, rank, config.use_rslora);
        if scale.to_bits() != shape.scale.to_bits() {
            let alpha = if config.use_rslora {
                shape.scale * rank.sqrt()
            } else {
                shape.scale * rank
            };
            alpha_pattern.push((regex::escape(&shape.module), alpha));
        }
    }
    let last_part = |shape: &PairShape| {
        shape
            .module
            .rsplit('.')
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let names: BTreeSet<String> = if config.target_modules.is_empty() {
        shapes.iter().map(last_part).collect()
    } else {
        config.target_modules.iter().cloned().collect()
    };
    PeftConfig {
        rank: config.rank,
        alpha: config.alpha,
        use_rslora: config.use_rslora,
        rank_pattern,
        alpha_pattern,
        target_modules: TargetModules::List(names.into_iter().collect()),
        some_layers: false,
        base_model: config.base_model.clone(),
        revision: config.revision.clone(),
    }
}

/// An error on the way to a file whose path is added by [`write_whole`].
enum WriteError {
    Io(io::Error),
    Adapter(AdapterError),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<AdapterError> for WriteError {
    fn from(error: AdapterError) -> Self {
        Self::Adapter(error)
    }
}

/// Writes beside `path` and renames, so that a reader never sees half a file.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> Result<(), WriteError>,
) -> Result<(), AdapterError> {
    let at_path = |source| AdapterError::Io {
        path: path.to_owned(),
        source,
    };
    let partial = path.with_extension("partial");
    let file = File::create(&partial).map_err(at_path)?;
    let mut out = BufWriter::with_capacity(1 << 20, &file);
    let written = write(&mut out)
        .and_then(|()| Ok(out.flush()?))
        .and_then(|()| Ok(file.sync_all()?));
    let renamed = written.and_then(|()| Ok(fs::rename(&partial, path)?));
    renamed.map_err(|error| {
        // The half file is of no use; that it cannot be removed is no worse than that it is there.
        let _ = fs::remove_file(&partial);
        match error {
            WriteError::Io(source) => at_path(source),
            WriteError::Adapter(error) => error,
        }
    })
}
