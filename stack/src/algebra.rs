//! Product space: norms and inner products of deltas `s * B * A` that are never built.
//!
//! `<s1 B1 A1, s2 B2 A2> = s1 s2 sum((B1^T B2) * (A1 A2^T))`, the elementwise product of two small
//! `[r1, r2]` matrices: exact, and cheap in rank instead of size. The factors alone mean nothing,
//! because `B M^-1` and `M A` are the same delta for any invertible M; so no rule looks at them.
//! All sums are in f64 and in a fixed order.

use crate::adapter::{AdapterError, AdapterFile, ModuleInfo, Pair};

/// Scale of the median absolute deviation that makes it the standard deviation of a normal cohort.
pub const MAD_TO_SIGMA: f64 = 1.4826;

/// Frobenius inner product of two deltas of one module. NaN when the pairs have different shapes,
/// for then there is none.
#[must_use]
pub fn inner(x: &Pair, y: &Pair) -> f64 {
    if (x.in_features, x.out_features) != (y.in_features, y.out_features) {
        return f64::NAN;
    }
    let (r1, r2) = (x.rank, y.rank);
    // [r1, r2]: B1^T B2, a row of both at a time.
    let mut left = vec![0.0_f64; r1 * r2];
    for (row1, row2) in x.b.chunks_exact(r1.max(1)).zip(y.b.chunks_exact(r2.max(1))) {
        for (sums, value1) in left.chunks_exact_mut(r2.max(1)).zip(row1) {
            let value1 = f64::from(*value1);
            sums.iter_mut()
                .zip(row2)
                .for_each(|(sum, value2)| *sum += value1 * f64::from(*value2));
        }
    }
    let mut total = 0.0;
    for (sums, row1) in left
        .chunks_exact(r2.max(1))
        .zip(x.a.chunks_exact(x.in_features.max(1)))
    {
        for (sum, row2) in sums.iter().zip(y.a.chunks_exact(y.in_features.max(1))) {
            // One entry of A1 A2^T, [r1, r2].
            let right: f64 = row1
                .iter()
                .zip(row2)
                .map(|(a1, a2)| f64::from(*a1) * f64::from(*a2))
                .sum();
            total += sum * right;
        }
    }
    x.scale * y.scale * total
}

/// Frobenius norm of one module's delta.
#[must_use]
pub fn pair_norm(pair: &Pair) -> f64 {
    // Rounding may leave a zero delta a little below zero.
    inner(pair, pair).max(0.0).sqrt()
}

/// Frobenius norm of each module's delta, in the adapter's order.
///
/// # Errors
/// When the adapter cannot be read.
pub fn module_norms(adapter: &AdapterFile) -> Result<Vec<(String, f64)>, AdapterError> {
    let norm = |(index, info): (usize, &ModuleInfo)| {
        Ok((info.module.clone(), pair_norm(&adapter.pair(index)?)))
    };
    adapter.modules().iter().enumerate().map(norm).collect()
}

/// Frobenius norm of the whole adapter's delta.
///
/// # Errors
/// When the adapter cannot be read.
pub fn norm(adapter: &AdapterFile) -> Result<f64, AdapterError> {
    let norms = module_norms(adapter)?;
    Ok(norms
        .iter()
        .map(|(_, norm)| norm * norm)
        .sum::<f64>()
        .sqrt())
}

/// Inner product of two whole adapters; a module that only one of them has adds nothing.
///
/// # Errors
/// When an adapter cannot be read, or a module has different shapes in them.
pub fn inner_adapters(x: &AdapterFile, y: &AdapterFile) -> Result<f64, AdapterError> {
    let mut total = 0.0;
    for (index, info) in x.modules().iter().enumerate() {
        let Some(other) = y.find(&info.module) else {
            continue;
        };
        let (first, second) = (x.pair(index)?, y.pair(other)?);
        if (first.in_features, first.out_features) != (second.in_features, second.out_features) {
            let shape = |pair: &Pair| format!("[{}, {}]", pair.out_features, pair.in_features);
            let module = info.module.clone();
            return Err(AdapterError::Mismatch {
                module,
                first: shape(&first),
                second: shape(&second),
            });
        }
        total += inner(&first, &second);
    }
    Ok(total)
}

/// Cosine between two whole adapters, -1 to 1; 0 when one of them is zero.
///
/// # Errors
/// As [`inner_adapters`].
pub fn cosine(x: &AdapterFile, y: &AdapterFile) -> Result<f64, AdapterError> {
    Ok(cosine_of(inner_adapters(x, y)?, norm(x)?, norm(y)?))
}

/// Cosine from an inner product and two norms that are already known.
#[must_use]
pub fn cosine_of(inner: f64, norm_x: f64, norm_y: f64) -> f64 {
    let product = norm_x * norm_y;
    if product > 0.0 {
        (inner / product).clamp(-1.0, 1.0)
    } else {
        0.0
    }
}

/// How far a training run again ends from where it was said to end, as a part of what it moved:
/// `||end - again|| / ||end - start||` in product space, over all modules. 0 when nothing differs;
/// infinite when the two ends differ and nothing was moved, or modules do not match.
#[must_use]
pub fn moved(start: &[Pair], end: &[Pair], again: &[Pair]) -> f64 {
    let apart = |x: &[Pair], y: &[Pair]| -> f64 {
        let same = x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x.module == y.module);
        if !same {
            return f64::NAN;
        }
        let squared = |(x, y): (&Pair, &Pair)| inner(x, x) - 2.0 * inner(x, y) + inner(y, y);
        let total: f64 = x.iter().zip(y).map(squared).sum();
        total.max(0.0).sqrt()
    };
    let (error, way) = (apart(end, again), apart(end, start));
    match (error, way) {
        (0.0, _) => 0.0,
        (error, way) if error.is_finite() && way > 0.0 => error / way,
        _ => f64::INFINITY,
    }
}

/// What brings a delta down to `tau`: `min(1, tau / norm)`; 1 for a zero delta.
#[must_use]
pub fn clip_factor(norm: f64, tau: f64) -> f64 {
    if norm > tau { tau / norm } else { 1.0 }
}

/// The middle value; the mean of the two middle ones for an even count; nothing of nothing.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len().is_multiple_of(2) {
        let lower = sorted.get(sorted.len() / 2 - 1)?;
        return Some(f64::midpoint(*lower, upper));
    }
    Some(upper)
}

/// Median absolute deviation from the median.
#[must_use]
pub fn mad(values: &[f64]) -> Option<f64> {
    let middle = median(values)?;
    let deviations: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    median(&deviations)
}

#[cfg(test)]
#[path = "algebra_tests.rs"]
mod tests;
