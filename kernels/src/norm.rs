//! Root mean square norm (arXiv 1910.07467).

use rayon::prelude::*;

use crate::lanes::{rows_a_piece, sum2, sum3, vectorised};

/// `y = x · i · g`, `i = 1 / sqrt(mean(x²) + ε)`; and `i` of every row, for the way back.
///
/// # Shapes
/// - x, y: `[N, width]`
/// - gain: `[width]`
/// - inverse: `[N]`
pub fn rms_norm(x: &[f32], gain: &[f32], epsilon: f32, y: &mut [f32], inverse: &mut [f32]) {
    let width = gain.len();
    let rows = rows_a_piece(width);
    assert!(x.len() == y.len() && x.len() == inverse.len() * width);
    let pieces = x
        .par_chunks(rows * width)
        .zip(y.par_chunks_mut(rows * width));
    pieces
        .zip(inverse.par_chunks_mut(rows))
        .for_each(|((x, y), inverse)| {
            vectorised(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
                    for ((x, y), inverse) in rows.zip(inverse) {
                        let mean = sum2(x, x, |a, b| a * b) / width as f32;
                        *inverse = 1.0 / (mean + epsilon).sqrt();
                        for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
                            *y = x * *inverse * gain;
                        }
                    }
                },
            );
        });
}

/// Adds the gradient by `x` to `into`, from the gradient by `y`:
/// `i (g d) - x i³ / width · Σ g d x`.
///
/// # Shapes
/// - gradient, x, into: `[N, width]`
/// - gain: `[width]`
/// - inverse: `[N]`, as [`rms_norm`] left it
pub fn rms_norm_backward(
    gradient: &[f32],
    x: &[f32],
    inverse: &[f32],
    gain: &[f32],
    into: &mut [f32],
) {
    let width = gain.len();
    let rows = rows_a_piece(width);
    assert!(x.len() == into.len() && x.len() == gradient.len() && x.len() == inverse.len() * width);
    let pieces = x
        .par_chunks(rows * width)
        .zip(gradient.par_chunks(rows * width));
    let pieces = pieces
        .zip(inverse.par_chunks(rows))
        .zip(into.par_chunks_mut(rows * width));
    pieces.for_each(|(((x, gradient), inverse), into)| {
        vectorised(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
                let rows = rows.zip(inverse).zip(into.chunks_exact_mut(width));
                for (((x, gradient), inverse), into) in rows {
                    let along = sum3(x, gradient, gain, |x, d, g| x * d * g);
                    let back = along * inverse * inverse * inverse / width as f32;
                    let pieces = into.iter_mut().zip(x).zip(gradient).zip(gain);
                    for (((into, x), gradient), gain) in pieces {
                        *into += gradient * gain * inverse - x * back;
                    }
                }
            },
        );
    });
}
