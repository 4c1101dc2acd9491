//! Is this submitted adapter exactly what the recipe asked for?
//!
//! Cheapest first: header, names, shapes and dtypes, config, then every number once. Texts name no
//! path of this machine, so a volunteer may read them.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::path::Path;

use crate::adapter::{AdapterError, AdapterFile, AdapterSpec, LayoutError};
use crate::algebra;
use crate::peft::{Factor, PeftConfig, TargetModules, tensor_name};
use crate::tensors::{Dtype, TensorErrorKind, TensorFile};

/// A delta of a smaller Frobenius norm vanishes when added to f32 weights.
pub const DELTA_NORM_MIN: f64 = 1e-9;

/// Why a submitted adapter is refused, as a stable word for machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectCode {
    /// Not a believable safetensors file.
    BadHeader,
    /// A tensor too few or too many.
    WrongTensors,
    /// A tensor of another shape.
    WrongShape,
    /// A tensor that is not F32.
    WrongDtype,
    /// The config cannot be read, or asks for more than plain LoRA.
    BadConfig,
    /// The config says something else than the recipe.
    ConfigMismatch,
    /// NaN or infinity.
    NotFinite,
    /// It adds nothing.
    ZeroDelta,
    /// Our storage failed; not the volunteer's fault.
    StorageFault,
}

impl RejectCode {
    /// The stable word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadHeader => "BAD_HEADER",
            Self::WrongTensors => "WRONG_TENSORS",
            Self::WrongShape => "WRONG_SHAPE",
            Self::WrongDtype => "WRONG_DTYPE",
            Self::BadConfig => "BAD_CONFIG",
            Self::ConfigMismatch => "CONFIG_MISMATCH",
            Self::NotFinite => "NOT_FINITE",
            Self::ZeroDelta => "ZERO_DELTA",
            Self::StorageFault => "STORAGE_FAULT",
        }
    }

    /// Whether the check itself failed, so that the submission is neither good nor bad.
    #[must_use]
    pub const fn is_fault(self) -> bool {
        matches!(self, Self::StorageFault)
    }
}

impl fmt::Display for RejectCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a submitted adapter is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct AdapterReject {
    /// For machines.
    pub code: RejectCode,
    /// For the volunteer.
    pub text: String,
}

/// Something that passed its check; only the check makes these.
#[derive(Debug)]
pub struct Checked<T>(T);

impl<T> Checked<T> {
    /// Takes it out, and with it the proof away.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> Deref for Checked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Checks a submitted weight file and config against what the recipe asks for.
///
/// # Errors
/// The first rule that is broken.
pub fn check_adapter(
    weights: &Path,
    config_json: &[u8],
    spec: &AdapterSpec,
) -> Result<Checked<AdapterFile>, AdapterReject> {
    let tensors = TensorFile::open_bounded(weights, spec.header_bytes_max())
        .map_err(|error| reject_tensors(&error.kind))?;
    check_tensors(&tensors, spec)?;
    let config = PeftConfig::from_json(config_json)
        .map_err(|error| reject(RejectCode::BadConfig, error.to_string()))?;
    check_config(&config, spec)?;
    let adapter =
        AdapterFile::of_tensors(tensors, config).map_err(|error| reject_adapter(&error))?;
    check_numbers(&adapter)?;
    Ok(Checked(adapter))
}

fn check_tensors(tensors: &TensorFile, spec: &AdapterSpec) -> Result<(), AdapterReject> {
    let mut expected = BTreeSet::new();
    for pair in &spec.pairs {
        for (factor, shape) in [
            (Factor::A, [spec.rank, pair.in_features]),
            (Factor::B, [pair.out_features, spec.rank]),
        ] {
            let name = tensor_name(&pair.module, factor);
            let Some(tensor) = tensors.get(&name) else {
                return Err(reject(
                    RejectCode::WrongTensors,
                    format!("tensor {name} is missing"),
                ));
            };
            if tensor.shape != shape {
                let text = format!(
                    "tensor {name} is {:?}, the recipe asks for {shape:?}",
                    tensor.shape
                );
                return Err(reject(RejectCode::WrongShape, text));
            }
            if tensor.dtype != Dtype::F32 {
                let text = format!("tensor {name} is {}, the recipe asks for F32", tensor.dtype);
                return Err(reject(RejectCode::WrongDtype, text));
            }
            expected.insert(name);
        }
    }
    match tensors
        .tensors()
        .iter()
        .find(|tensor| !expected.contains(&tensor.name))
    {
        Some(tensor) => {
            let name: String = tensor.name.chars().take(128).collect();
            Err(reject(
                RejectCode::WrongTensors,
                format!("tensor {name:?} is not part of the recipe's adapter"),
            ))
        }
        None => Ok(()),
    }
}

/// The server fixes rank, alpha and targets: a config that says otherwise hides a scale.
fn check_config(config: &PeftConfig, spec: &AdapterSpec) -> Result<(), AdapterReject> {
    let differs = |text: String| Err(reject(RejectCode::ConfigMismatch, text));
    if config.rank != spec.rank {
        return differs(format!(
            "r is {}, the recipe says {}",
            config.rank, spec.rank
        ));
    }
    if config.alpha.to_bits() != spec.alpha.to_bits() {
        return differs(format!(
            "lora_alpha is {}, the recipe says {}",
            config.alpha, spec.alpha
        ));
    }
    if config.use_rslora != spec.use_rslora {
        return differs(format!(
            "use_rslora is {}, the recipe says {}",
            config.use_rslora, spec.use_rslora
        ));
    }
    if !config.rank_pattern.is_empty() || !config.alpha_pattern.is_empty() {
        return differs("rank_pattern and alpha_pattern must be empty".to_owned());
    }
    if config.some_layers {
        return differs("layers_to_transform and layers_pattern must be empty".to_owned());
    }
    let wanted: BTreeSet<&str> = spec.targets.iter().map(|target| target.name()).collect();
    let named = match &config.target_modules {
        TargetModules::List(names) => names.iter().map(String::as_str).collect(),
        TargetModules::Pattern(_) => BTreeSet::new(),
    };
    if named != wanted {
        let wanted: Vec<&str> = wanted.into_iter().collect();
        return differs(format!(
            "target_modules must be the list {}",
            wanted.join(", ")
        ));
    }
    Ok(())
}

fn check_numbers(adapter: &AdapterFile) -> Result<(), AdapterReject> {
    let mut squared = 0.0;
    for index in 0..adapter.modules().len() {
        let pair = adapter
            .pair(index)
            .map_err(|error| reject_adapter(&error))?;
        if !pair.a.iter().chain(&pair.b).all(|value| value.is_finite()) {
            return Err(reject(
                RejectCode::NotFinite,
                format!("module {} has a NaN or infinite value", pair.module),
            ));
        }
        squared += algebra::inner(&pair, &pair);
    }
    if squared.sqrt() >= DELTA_NORM_MIN {
        return Ok(());
    }
    Err(reject(
        RejectCode::ZeroDelta,
        format!("the adapter adds nothing: the norm of its update is below {DELTA_NORM_MIN:e}"),
    ))
}

fn reject(code: RejectCode, text: String) -> AdapterReject {
    AdapterReject { code, text }
}

fn reject_tensors(kind: &TensorErrorKind) -> AdapterReject {
    match kind {
        TensorErrorKind::Io(_) => reject(
            RejectCode::StorageFault,
            "the server could not read the submission".to_owned(),
        ),
        TensorErrorKind::Truncated { .. }
        | TensorErrorKind::HeaderTooLong { .. }
        | TensorErrorKind::Header(_)
        | TensorErrorKind::Tensor { .. } => reject(RejectCode::BadHeader, kind.to_string()),
    }
}

fn reject_adapter(error: &AdapterError) -> AdapterReject {
    match error {
        AdapterError::Tensors(error) => reject_tensors(&error.kind),
        AdapterError::Layout { source, .. } => {
            let code = match source {
                LayoutError::Names(_) => RejectCode::WrongTensors,
                LayoutError::Shape(_) => RejectCode::WrongShape,
                LayoutError::Dtype(_) => RejectCode::WrongDtype,
            };
            reject(code, source.to_string())
        }
        AdapterError::Config { source, .. } => reject(RejectCode::BadConfig, source.to_string()),
        AdapterError::Io { .. }
        | AdapterError::Mismatch { .. }
        | AdapterError::Factors { .. }
        | AdapterError::Empty
        | AdapterError::Weight(_) => reject(
            RejectCode::StorageFault,
            "the server could not read the submission".to_owned(),
        ),
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
