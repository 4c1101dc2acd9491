//! Singular values of a sum of low-rank deltas, and its best approximation of a smaller rank.
//!
//! `D = sum_i w_i s_i B_i A_i = B A` with the factors side by side, `B [out, k]`, `A [k, in]`. With
//! `B = Q_B R_B` and `A^T = Q_A R_A`, the singular values of `D` are those of `R_B R_A^T`, a matrix of
//! at most `k` x `k`: `D` itself is never built. All in f64.

use std::path::Path;

use crate::adapter::{
    AdapterError, AdapterFile, AdapterWriteConfig, Pair, PairShape, write_adapter_streamed,
};
use crate::compress::{concat_pairs, target_names, union};

mod dense;

use dense::{Matrix, qr, svd};

/// Largest summed rank that is looked at, per module: beyond it the time (which grows with its cube)
/// passes a minute a module, and the answer is an honest "not measured".
pub const SPECTRUM_RANK_MAX: usize = 1024;

/// What the singular values say.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// Frobenius norm.
    pub norm: f64,
    /// `exp(-sum p ln p)` with `p` the singular values over their sum (Roy and Vetterli, 2007): how
    /// many directions carry the delta. 0 for a zero delta.
    pub effective_rank: f64,
    /// Descending.
    pub singular: Vec<f64>,
}

impl Spectrum {
    /// From singular values in any order.
    #[must_use]
    pub fn of(mut singular: Vec<f64>) -> Self {
        singular.sort_by(|one, two| two.total_cmp(one));
        let sum: f64 = singular.iter().sum();
        let entropy: f64 = singular
            .iter()
            .map(|value| value / sum)
            .filter(|share| *share > 0.0)
            .map(|share| -share * share.ln())
            .sum();
        Self {
            norm: singular.iter().map(|s| s * s).sum::<f64>().sqrt(),
            effective_rank: if sum > 0.0 { entropy.exp() } else { 0.0 },
            singular,
        }
    }
}

/// Factors of the weighted sum as matrices, `[out, k]` and `[in, k]`.
fn factors(terms: &[(&Pair, f64)]) -> Result<(Matrix, Matrix, Pair), AdapterError> {
    let pair = concat_pairs(terms)?;
    let rank = pair.rank;
    if rank > SPECTRUM_RANK_MAX {
        return Err(AdapterError::Mismatch {
            module: pair.module,
            first: format!("summed rank {rank}"),
            second: format!("at most {SPECTRUM_RANK_MAX}"),
        });
    }
    let b = Matrix::from_fn(pair.out_features, rank, |row, k| {
        f64::from(pair.b[row * rank + k]) * pair.scale
    });
    let a = Matrix::from_fn(pair.in_features, rank, |column, k| {
        f64::from(pair.a[k * pair.in_features + column])
    });
    Ok((b, a, pair))
}

/// Singular values of the weighted sum of one module's deltas.
///
/// # Errors
/// As [`concat_pairs`], and when the summed rank is above [`SPECTRUM_RANK_MAX`].
pub fn spectrum(terms: &[(&Pair, f64)]) -> Result<Spectrum, AdapterError> {
    let (b, a, _) = factors(terms)?;
    let core = qr(b).1.times_transposed(&qr(a).1);
    Ok(Spectrum::of(svd(core).singular))
}

/// Singular values of the weighted sum of adapters, module by module in byte order; one module's
/// factors in memory at a time.
///
/// # Errors
/// As [`spectrum`], and when files fail.
pub fn stack_spectrum(
    terms: &[(&AdapterFile, f64)],
) -> Result<Vec<(String, Spectrum)>, AdapterError> {
    union(terms)
        .into_iter()
        .map(|shape| {
            let pairs = pairs_of(terms, &shape.module)?;
            let pairs: Vec<(&Pair, f64)> = pairs.iter().map(|(pair, w)| (pair, *w)).collect();
            Ok((shape.module, spectrum(&pairs)?))
        })
        .collect()
}

/// Multiplications, roughly, that the singular values of a sum of adapters take: QR of both factors,
/// and some ten sweeps over a core as large as the ranks or the module allow.
///
/// # Errors
/// The summed rank of a module that is above [`SPECTRUM_RANK_MAX`].
pub fn stack_work(terms: &[(&AdapterFile, f64)]) -> Result<f64, usize> {
    let shapes = union(terms);
    if let Some(shape) = shapes.iter().find(|shape| shape.rank > SPECTRUM_RANK_MAX) {
        return Err(shape.rank);
    }
    let module = |shape: &PairShape| {
        let (rank, rows, columns) = (
            shape.rank as f64,
            shape.out_features as f64,
            shape.in_features as f64,
        );
        let (left, right) = (rank.min(rows), rank.min(columns));
        4.0 * rank * (rows * left + columns * right)
            + left * right * (rank + 60.0 * left.min(right))
    };
    Ok(shapes.iter().map(module).sum())
}

fn pairs_of(terms: &[(&AdapterFile, f64)], module: &str) -> Result<Vec<(Pair, f64)>, AdapterError> {
    let found = |(adapter, weight): &(&AdapterFile, f64)| {
        let place = adapter.find(module)?;
        Some(adapter.pair(place).map(|pair| (pair, *weight)))
    };
    terms.iter().filter_map(found).collect()
}

/// What a compression left out.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressReport {
    /// `||D - D_r|| / ||D||` over all modules, Frobenius; 0 for a zero delta.
    pub relative_error: f64,
    /// The same for each module.
    pub modules: Vec<(String, f64)>,
}

/// Writes the best approximation of rank `rank` (Eckart and Young) of the weighted sum of adapters as
/// one PEFT adapter into `dir`: `B = U sqrt(S)`, `A = sqrt(S) V^T`, scale 1. Modules of a smaller rank
/// keep every direction and are filled up with zeros, so that the adapter has one rank.
///
/// # Errors
/// As [`stack_spectrum`], and when `rank` is 0 or nothing is left to compress.
pub fn compress(
    terms: &[(&AdapterFile, f64)],
    rank: usize,
    dir: &Path,
    base_model: Option<&str>,
    revision: Option<&str>,
) -> Result<CompressReport, AdapterError> {
    let mut shapes = union(terms);
    if rank == 0 || shapes.is_empty() {
        return Err(AdapterError::Empty);
    }
    for shape in &mut shapes {
        shape.rank = rank;
    }
    let config = AdapterWriteConfig {
        rank,
        alpha: rank as f64,
        use_rslora: false,
        target_modules: target_names(terms, &shapes),
        base_model: base_model.map(str::to_owned),
        revision: revision.map(str::to_owned),
    };
    // The writer asks in its own order, possibly not the shapes'.
    let mut lost: Vec<(f64, f64)> = vec![(0.0, 0.0); shapes.len()];
    write_adapter_streamed(dir, &shapes, &config, |index| {
        let (pair, left_out, whole) = compress_module(terms, &shapes[index])?;
        lost[index] = (left_out, whole);
        Ok(pair)
    })?;
    let part = |(left_out, whole): (f64, f64)| {
        if whole > 0.0 {
            (left_out / whole).sqrt()
        } else {
            0.0
        }
    };
    let total = lost
        .iter()
        .fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    Ok(CompressReport {
        relative_error: part(total),
        modules: shapes
            .into_iter()
            .zip(lost)
            .map(|(shape, lost)| (shape.module, part(lost)))
            .collect(),
    })
}

/// One module's pair, with the squared norms of what is left out and of the whole.
fn compress_module(
    terms: &[(&AdapterFile, f64)],
    shape: &PairShape,
) -> Result<(Pair, f64, f64), AdapterError> {
    let pairs = pairs_of(terms, &shape.module)?;
    let pairs: Vec<(&Pair, f64)> = pairs.iter().map(|(pair, w)| (pair, *w)).collect();
    let (b, a, pair) = factors(&pairs)?;
    let ((q_b, r_b), (q_a, r_a)) = (qr(b), qr(a));
    let core = svd(r_b.times_transposed(&r_a));
    let kept = shape.rank.min(core.singular.len());
    let squares = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
    let (left, right) = (q_b.times(&core.left), q_a.times(&core.right));
    let root = |k: usize| core.singular[k].sqrt();
    let mut out = Pair {
        module: pair.module,
        rank: shape.rank,
        in_features: pair.in_features,
        out_features: pair.out_features,
        a: vec![0.0; shape.rank * pair.in_features],
        b: vec![0.0; pair.out_features * shape.rank],
        scale: 1.0,
    };
    for k in 0..kept {
        for row in 0..out.out_features {
            out.b[row * shape.rank + k] = (left.get(row, k) * root(k)) as f32;
        }
        for column in 0..out.in_features {
            out.a[k * out.in_features + column] = (right.get(column, k) * root(k)) as f32;
        }
    }
    Ok((
        out,
        squares(&core.singular[kept..]),
        squares(&core.singular),
    ))
}

#[cfg(test)]
#[path = "spectral/tests.rs"]
mod tests;

#[cfg(test)]
#[path = "spectral/reference_tests.rs"]
mod reference_tests;
