//! Fold: `W = W0 + sum_i weight_i * s_i * B_i * A_i`, tensor by tensor, and always the same bytes.
//!
//! For each element, in f32:
//!
//! ```text
//! delta = 0
//! for each term i in the given order, for k = 0 .. rank_i - 1:
//!     delta = delta + round32(weight_i * s_i * B_i[row, k]) * A_i[k, column]
//! out   = round_to_base_dtype(W0[row, column] + delta)
//! ```
//!
//! Coefficients are computed in f64 and rounded once; each product and each sum is rounded by
//! itself (no fused multiply-add); the deltas are summed before the base is added, so that many
//! small contributions do not vanish one by one against a large weight; one rounding to nearest,
//! ties to even, at the end. No sum crosses rows, so threads, which share rows out, cannot change a
//! bit. Terms of weight 0 are left out; bytes that no term touches are copied as they are.

mod matrix;
mod output;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;

use crate::adapter::{AdapterError, AdapterFile, ModuleInfo};
use crate::checkpoint::Checkpoint;
use crate::config::Target;
use crate::files::FileEntry;
use crate::tensors::TensorError;

/// Most terms of one fold: a round has at most that many shards, and models many rounds.
pub const TERMS_MAX: usize = 1_000_000;

/// One adapter and the factor on its `s * B * A`.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// The adapter.
    pub adapter: &'a AdapterFile,
    /// The factor; 0 leaves the term out.
    pub weight: f64,
}

/// What may differ between two folds without changing the result.
#[derive(Default)]
pub struct FoldOptions<'a> {
    /// Threads for the arithmetic; as many as the machine has when absent.
    pub threads: Option<NonZeroUsize>,
    /// Called with weight bytes done and to do, now and then; returns whether to go on.
    pub progress: Option<&'a mut dyn FnMut(u64, u64) -> bool>,
}

/// What a fold did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoldReport {
    /// Every file of the new folder, in byte order, with its digests.
    pub files: Vec<FileEntry>,
    /// Tensors that some term touched.
    pub folded: usize,
    /// Tensors copied as they were.
    pub copied: usize,
    /// Files of the base folder that were not carried along.
    pub left_out: Vec<String>,
}

/// Why a fold did not happen. Then nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The target is there and not an empty folder.
    #[error("{} is already there and not empty", .0.display())]
    Exists(PathBuf),
    /// The disk is full.
    #[error("no space left for {}", .0.display())]
    NoSpace(PathBuf),
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// An adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A weight file cannot be read.
    #[error(transparent)]
    Tensors(#[from] TensorError),
    /// A term's weight is not a finite number.
    #[error("the weight {weight} of term {term} is not a finite number")]
    Weight {
        /// Its place, from 0.
        term: usize,
        /// The weight.
        weight: f64,
    },
    /// More than [`TERMS_MAX`].
    #[error("{0} terms; at most {TERMS_MAX} are folded")]
    TooManyTerms(usize),
    /// An adapter changes something the base has not.
    #[error("term {term} changes module {module:?}, which is no linear layer of the base")]
    UnknownModule {
        /// Its place, from 0.
        term: usize,
        /// The module.
        module: String,
    },
    /// An adapter does not fit the base.
    #[error("term {term}, module {module}: the adapter is {adapter}, the base {base}")]
    Shape {
        /// Its place, from 0.
        term: usize,
        /// The module.
        module: String,
        /// The adapter's `[out, in]`.
        adapter: String,
        /// The base's `[out, in]`.
        base: String,
    },
    /// A sum left the range of the base's dtype.
    #[error("tensor {0} has a NaN or infinite value after folding")]
    NotFinite(String),
    /// The progress callback said stop.
    #[error("stopped")]
    Stopped,
}

/// Which terms touch a module, in order: term, and the pair's place in its adapter.
type Touching = BTreeMap<String, Vec<(usize, usize)>>;

/// A checked fold: what will happen to each tensor.
struct Plan<'a> {
    base: &'a Checkpoint,
    terms: &'a [Term<'a>],
    /// By tensor name, `MODULE.weight`.
    touching: Touching,
    threads: usize,
}

/// Folds `terms` into `base` and writes a new checkpoint folder `out`.
///
/// The folder appears whole or not at all: it is written beside `out` and renamed. Weight files keep
/// their names, headers and tensor order; all other files are copied byte for byte.
/// Memory: a few blocks of rows and the factors of one module in all its terms.
///
/// # Errors
/// When `out` is there and not empty, a term does not fit the base, or files fail.
pub fn fold(base: &Checkpoint, terms: &[Term<'_>], out: &Path) -> Result<FoldReport, FoldError> {
    fold_with(base, terms, out, FoldOptions::default())
}

/// As [`fold`], with a number of threads and a progress callback.
///
/// # Errors
/// As [`fold`], and [`FoldError::Stopped`] when the callback says so.
pub fn fold_with(
    base: &Checkpoint,
    terms: &[Term<'_>],
    out: &Path,
    options: FoldOptions<'_>,
) -> Result<FoldReport, FoldError> {
    let touching = plan(base, terms)?;
    let threads = options
        .threads
        .or_else(|| thread::available_parallelism().ok())
        .map_or(1, NonZeroUsize::get);
    let plan = Plan {
        base,
        terms,
        touching,
        threads,
    };
    output::write_folder(&plan, out, options.progress)
}

/// Checks every term against the base before a byte is written.
fn plan(base: &Checkpoint, terms: &[Term<'_>]) -> Result<Touching, FoldError> {
    if terms.len() > TERMS_MAX {
        return Err(FoldError::TooManyTerms(terms.len()));
    }
    let config = base.config();
    let places =
        (0..config.layers).flat_map(|layer| Target::ALL.map(|target| config.module(layer, target)));
    let mut linear: BTreeSet<String> = places.collect();
    if !config.tied {
        linear.insert("lm_head".to_owned());
    }
    let mut touching = Touching::new();
    for (term, Term { adapter, weight }) in terms.iter().enumerate() {
        if !weight.is_finite() {
            return Err(FoldError::Weight {
                term,
                weight: *weight,
            });
        }
        for (place, info) in adapter.modules().iter().enumerate() {
            let tensor = format!("{}.weight", info.module);
            let found = base.get(&tensor).filter(|_| linear.contains(&info.module));
            let Some((_, target)) = found else {
                return Err(FoldError::UnknownModule {
                    term,
                    module: info.module.clone(),
                });
            };
            fits(term, info, &target.shape)?;
            if *weight != 0.0 {
                touching.entry(tensor).or_default().push((term, place));
            }
        }
    }
    Ok(touching)
}

fn fits(term: usize, info: &ModuleInfo, base: &[usize]) -> Result<(), FoldError> {
    let adapter = [info.out_features, info.in_features];
    if base == adapter {
        return Ok(());
    }
    let (adapter, base) = (format!("{adapter:?}"), format!("{base:?}"));
    Err(FoldError::Shape {
        term,
        module: info.module.clone(),
        adapter,
        base,
    })
}

#[cfg(test)]
mod properties;
#[cfg(test)]
#[path = "fold_tests.rs"]
mod tests;
