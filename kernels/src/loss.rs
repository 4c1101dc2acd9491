//! Softmax and cross-entropy over rows of logits.

use rayon::prelude::*;

use crate::lanes::{exponentials, largest, rows_a_piece, vectorised};

/// The negative log-likelihood of every row's target, in nats; and, written over the logits, `scale`
/// times its gradient by them: `softmax - 1` at the target, `softmax` elsewhere.
///
/// # Shapes
/// - logits: `[S, V]`
/// - targets, output: `[S]`
///
/// # Panics
/// When a target is not in the vocabulary.
pub fn cross_entropy(logits: &mut [f32], targets: &[i32], scale: f32) -> Vec<f32> {
    rows(logits, targets)
        .map(|(row, target)| {
            let (loss, total) = of_row(row, target);
            let factor = scale / total;
            vectorised(
                #[inline(always)]
                || {
                    for value in row.iter_mut() {
                        *value *= factor;
                    }
                },
            );
            row[target] -= scale;
            loss
        })
        .collect()
}

/// The negative log-likelihood of every row's target, in nats. The logits are spent.
///
/// # Shapes
/// - logits: `[S, V]`
/// - targets, output: `[S]`
///
/// # Panics
/// When a target is not in the vocabulary.
pub fn losses(logits: &mut [f32], targets: &[i32]) -> Vec<f32> {
    rows(logits, targets)
        .map(|(row, target)| of_row(row, target).0)
        .collect()
}

fn rows<'a>(
    logits: &'a mut [f32],
    targets: &'a [i32],
) -> impl IndexedParallelIterator<Item = (&'a mut [f32], usize)> {
    let vocabulary = logits.len() / targets.len().max(1);
    assert_eq!(logits.len(), vocabulary * targets.len());
    let rows = logits.par_chunks_exact_mut(vocabulary.max(1));
    rows.with_min_len(rows_a_piece(vocabulary))
        .zip(targets)
        .map(|(row, target)| (row, *target as usize))
}

/// The loss of one row, which becomes `exp(logit - largest)`, and their sum.
fn of_row(row: &mut [f32], target: usize) -> (f32, f32) {
    let at_target = row[target];
    let (most, total) = vectorised(
        #[inline(always)]
        || {
            let most = largest(row);
            (most, exponentials(row, most))
        },
    );
    (total.ln() - (at_target - most), total)
}
