//! The arithmetic of one tensor: blocks of rows, shared out to threads.

use std::io::Write;
use std::thread;

use super::{FoldError, Plan};
use crate::adapter::Pair;
use crate::tensors::{TensorFile, TensorInfo};

/// Bytes of base weights read, changed and written at once.
const BLOCK_BYTES: usize = 8 * 1024 * 1024;

/// One term's factors for the tensor at hand.
struct Factors {
    pair: Pair,
    /// `weight * scale`.
    factor: f64,
}

/// Writes one tensor with all its terms added.
pub(super) fn fold_tensor(
    plan: &Plan<'_>,
    file: &TensorFile,
    info: &TensorInfo,
    touching: &[(usize, usize)],
    out: &mut impl Write,
    mut progress: impl FnMut(u64) -> Result<(), FoldError>,
    to_error: impl Fn(std::io::Error) -> FoldError,
) -> Result<(), FoldError> {
    let mut factors = Vec::with_capacity(touching.len());
    for (term, place) in touching {
        let term = &plan.terms[*term];
        let pair = term.adapter.pair(*place)?;
        let factor = term.weight * pair.scale;
        factors.push(Factors { pair, factor });
    }
    // The plan has compared shapes: two dimensions, and every A has as many columns.
    let columns = info.shape.last().copied().unwrap_or(1).max(1);
    let row_bytes = columns * info.dtype.bytes();
    let block_rows = (BLOCK_BYTES / row_bytes).max(1);
    let rows = info.shape.first().copied().unwrap_or(1);
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for first_row in (0..rows).step_by(block_rows) {
        let count = block_rows.min(rows - first_row);
        bytes.resize(count * row_bytes, 0);
        file.read_at(info, (first_row * row_bytes) as u64, &mut bytes)?;
        info.dtype.decode(&bytes, &mut values);
        add_rows(&factors, first_row, columns, &mut values, plan.threads);
        info.dtype.encode(&values, &mut bytes);
        info.dtype.decode(&bytes, &mut values);
        if !values.iter().all(|value| value.is_finite()) {
            return Err(FoldError::NotFinite(info.name.clone()));
        }
        out.write_all(&bytes).map_err(&to_error)?;
        progress(bytes.len() as u64)?;
    }
    Ok(())
}

/// Adds all deltas to rows `first_row ..` of the base, a part of them on each thread.
fn add_rows(
    factors: &[Factors],
    first_row: usize,
    columns: usize,
    values: &mut [f32],
    threads: usize,
) {
    let rows = values.len() / columns;
    let rows_each = rows.div_ceil(threads.max(1)).max(1);
    thread::scope(|scope| {
        for (part, chunk) in values.chunks_mut(rows_each * columns).enumerate() {
            let first_row = first_row + part * rows_each;
            scope.spawn(move || {
                let mut delta = vec![0.0_f32; columns];
                for (row, base) in chunk.chunks_exact_mut(columns).enumerate() {
                    row_delta(factors, first_row + row, &mut delta);
                    base.iter_mut()
                        .zip(&delta)
                        .for_each(|(base, delta)| *base += delta);
                }
            });
        }
    });
}

/// One row of the sum of deltas: terms in order, k ascending, as the module's page says.
fn row_delta(factors: &[Factors], row: usize, delta: &mut [f32]) {
    delta.fill(0.0);
    for Factors { pair, factor } in factors {
        let b_row = pair.b.iter().skip(row * pair.rank).take(pair.rank);
        for (b, a_row) in b_row.zip(pair.a.chunks_exact(pair.in_features)) {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "rounding to f32 is the point"
            )]
            let coefficient = (factor * f64::from(*b)) as f32;
            delta
                .iter_mut()
                .zip(a_row)
                .for_each(|(delta, a)| *delta += coefficient * a);
        }
    }
}
